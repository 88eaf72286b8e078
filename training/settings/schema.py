"""Settings of a run: one frozen, validated object read from YAML.

The classes below are the schema; every field has a description with its unit, and its default or an example.
`training/settings/config_file.py` reads files (`extends`, dotted overrides) and reports problems, `training/settings/consistency.py`
holds what fields ask of each other. After a change here: `python -m training.settings.generate`.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

PositiveInt = Annotated[int, Field(ge=1, le=2**53)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Points = Annotated[
    list[Annotated[tuple[Fraction, NonNegative], Field(strict=False)]],  # YAML has lists only
    Field(min_length=1, description="[share of all steps, value] points, linear in between"),
]


TaskName = Literal["needle", "needle-noise", "keys", "induction", "variable-tracking", "instruction"]


class Strict(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class LayerSettings(Strict):
    """One layer kind of the stack; see `model.windows.LayerSpec` for what each may see."""

    kind: Literal["sliding", "full", "chunked", "dilated"] = Field(
        "sliding",
        description="the last `window` tokens; all; those of a block of `window`; `window` tokens, `dilation` apart",
    )
    window: PositiveInt | None = Field(
        None, description="tokens, the current one included; default: model.sliding_window; none for a full layer"
    )
    dilation: PositiveInt = Field(1, description="tokens from one visible key of a dilated layer to the next")
    global_tokens: int = Field(
        0, ge=0, le=2**20, description="first tokens of a document that all its later tokens see"
    )
    sink: bool = Field(False, description="a learned sink logit per head")
    rope: bool = Field(True, description="rotary position embedding on this kind")
    rope_theta: PositiveFloat | None = Field(
        None, description="base of the rotary frequencies; default: model.rope_theta"
    )


class InitSettings(Strict):
    """Initialisation of the weights."""

    std: PositiveFloat | None = Field(
        None, description="standard deviation of the matrices; default: 1/sqrt(fan-in) of each"
    )
    embedding_std: PositiveFloat = Field(1.0, description="standard deviation of the embedding")
    scale_residual_by_depth: bool = Field(True, description="o_proj and down_proj divided by sqrt(2 * layers)")
    copy_first_layer: bool = Field(False, description="all layers start as copies of the first")
    grow_from: str | None = Field(
        None, description="folder of a shallower run; its trained layers, repeated, are the start instead"
    )


class ModelSettings(Strict):
    """The decoder. Names are those of `transformers.MistralConfig`."""

    hidden_size: PositiveInt = Field(description="width of the residual stream", examples=[256])
    intermediate_size: PositiveInt = Field(description="width inside the feed-forward part", examples=[688])
    num_hidden_layers: int = Field(32, ge=1, le=1024, description="depth")
    num_attention_heads: PositiveInt = Field(description="query heads", examples=[4])
    num_key_value_heads: PositiveInt = Field(description="key and value heads; divides the query heads", examples=[2])
    head_dim: PositiveInt | None = Field(None, description="numbers a head, even; default: hidden_size / heads")
    vocab_size: PositiveInt | None = Field(None, description="rows of the embedding; default: the tokenizer's pieces")
    sliding_window: PositiveInt = Field(description="W in tokens, the current one included", examples=[64])
    layers: list[LayerSettings] = Field(
        default_factory=lambda: [LayerSettings()], min_length=1, description="pattern, repeated over the depth"
    )
    max_position_embeddings: PositiveInt = Field(131072, description="longest row in tokens, written into exports")
    rope_theta: PositiveFloat = Field(10000.0, description="base of the rotary frequencies")
    rms_norm_eps: PositiveFloat = Field(1e-5, description="added to the mean square")
    qk_norm: bool = Field(False, description="RMSNorm of each head's queries and keys, as in Qwen3; exported as such")
    tie_word_embeddings: bool = Field(False, description="the output matrix is the embedding")
    attention_backend: Literal["auto", "reference", "blocked", "flex", "flash", "xformers"] = Field(
        "auto", description="how attention is done; auto is blocked on a CPU and flex on CUDA"
    )
    init: InitSettings = Field(InitSettings(), description="initial weights")

    @property
    def head_size(self) -> int:
        """Numbers per head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


class TokenizerSettings(Strict):
    """A sentencepiece model: trained on the training text, or given."""

    model_file: str | None = Field(None, description="path of a sentencepiece .model; default: train one")
    vocab_size: PositiveInt = Field(2048, description="pieces of a trained tokenizer, recall tokens included")


class HubSettings(Strict):
    """A hub data set, read with `datasets.load_dataset`."""

    name: str = Field(description="as load_dataset takes it: a hub name or a local folder", examples=["wikitext"])
    config: str | None = Field(None, description="configuration of the data set; default: its only one")
    train_split: str = Field("train", description="split to train on")
    heldout_split: str = Field("validation", description="split that training never sees")
    text_column: str = Field("text", description="column that holds the text")
    streaming: bool = Field(False, description="read while downloading, keep no copy")
    max_documents: PositiveInt | None = Field(None, description="documents per split; default: all")


class DataSettings(Strict):
    """Where the text comes from."""

    source: Literal["novels", "files", "hub"] = Field(
        "novels", description="pinned public-domain novels; local files; a hub data set"
    )
    train_files: list[str] = Field(default_factory=list, description="text, jsonl or parquet files (globs allowed)")
    heldout_files: list[str] = Field(
        default_factory=list, description="files training never sees; default: a share of the documents of train_files"
    )
    text_column: str = Field("text", description="column of jsonl and parquet files")
    hub: HubSettings | None = Field(None, description="for source: hub")
    tokenizer: TokenizerSettings = Field(TokenizerSettings(), description="sentencepiece")
    cache_dir: str = Field(".cache/data", description="folder of the tokenizer and the packed tokens")
    seq_len: PositiveInt = Field(512, description="tokens per packed text row")


class CurriculumSettings(Strict):
    """Distances are drawn from [1, D]; D grows while accuracy holds."""

    start_distance: PositiveInt | Literal["last"] | None = Field(
        None, description="first D in tokens; last: the last D from the start; default: W"
    )
    max_distance: PositiveInt | None = Field(
        None, description="last D in tokens; default: R, or data.seq_len where R is unbounded"
    )
    growth: float = Field(1.2, gt=1.0, description="factor by which D grows")
    accuracy: Fraction = Field(0.95, description="running accuracy at which D grows")
    smoothing: Fraction = Field(0.9, description="weight of the past in the running accuracy")
    row_lengths: list[PositiveInt] = Field(
        default_factory=list,
        description="tokens per recall row while D is small: the shortest that holds D + 2W; each is compiled once",
    )
    larger_batches: list[Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]] = Field(
        default_factory=list,
        description="[distance, factor]: from that D on, recall tokens per step x factor",
    )


class RowSettings(Strict):
    """How recall rows of training are laid out."""

    single_share: Fraction = Field(0.5, description="of rows: one needle, its query at the end, as in evaluation")
    short_share: Fraction = Field(0.2, description="of distances: drawn from [1, short_distance], not [1, D]")
    short_distance: PositiveInt = Field(16, description="tokens")
    long_share: Fraction = Field(
        0.0, description="of distances: D itself, so that fillers of every age are asked; with short_share at most 1"
    )
    relay_share: Fraction = Field(
        1 / 9, description="of the filler between value and query: where the relay head is asked"
    )
    relay_pace: PositiveFloat | None = Field(
        None, description="tokens a layer: after layer l it is asked up to l x pace tokens on; default: after the last"
    )


class QuestionSettings(Strict):
    """How large the questions of the tasks are; training draws up to that, evaluation asks for exactly that."""

    pairs: PositiveInt = Field(4, description="keys: pairs of key and value in a row, one of which is asked")
    span_pairs: PositiveInt = Field(4, description="induction: pairs of key and value in the repeated span")
    hops: PositiveInt = Field(2, description="variable-tracking: copies in a chain; in training none too")
    rules: int = Field(4, ge=2, le=2**20, description="instruction: rules to choose from; chance is 1/rules")


class RecallSettings(Strict):
    """Recall documents in the training data; `enabled: false` trains on text alone."""

    enabled: bool = Field(True, description="off: text alone")
    tasks: dict[TaskName, PositiveFloat] = Field(
        {"needle": 1.0},
        min_length=1,
        description="task: share of the recall rows; each has a curriculum of its own",
    )
    values: PositiveInt = Field(32, description="number of one-token values; chance is 1/values")
    keys: PositiveInt = Field(
        32, description="rare words lent as keys to keys, induction, variable-tracking, instruction; unused by needles"
    )
    questions: QuestionSettings = Field(QuestionSettings(), description="how large the questions of the tasks are")
    seq_len: PositiveInt | None = Field(None, description="tokens per recall row at the last D; default: last D + 2W")
    answer_loss_weight: PositiveFloat = Field(
        1.0, description="of the answers; small where they are rare and their gradients huge, as in deep stacks"
    )
    relay_loss_weight: NonNegative = Field(0.0, description="auxiliary head that reads the value at filler positions")
    text_loss_weight: NonNegative = Field(0.0, description="next-token loss on recall rows, part of their objective")
    weight: Points = Field(default_factory=lambda: [(0.0, 1.0)], description="weight of the recall update over the run")
    tokens_per_step: PositiveInt | None = Field(None, description="recall tokens; default: training.tokens_per_step")
    max_grad_norm: PositiveFloat | None = Field(
        None, description="of recall; default: training.optimizer.max_grad_norm"
    )
    rows: RowSettings = Field(RowSettings(), description="how training rows are laid out")
    curriculum: CurriculumSettings = Field(CurriculumSettings(), description="how distances grow")


class OptimizerSettings(Strict):
    """AdamW, or Muon for the matrices of the layers and AdamW for the rest."""

    kind: Literal["adamw", "muon"] = Field("adamw", description="muon: orthogonalised updates of the layers' matrices")
    lr: PositiveFloat = Field(1e-3, description="peak learning rate")
    beta1: Fraction = Field(0.9, lt=1.0, description="decay of the mean of gradients, a step")
    beta2: Fraction = Field(0.98, lt=1.0, description="decay of the mean of squared gradients, a step")
    eps: PositiveFloat = Field(1e-8, description="added to the root of the second moment")
    weight_decay: NonNegative = Field(0.1, description="on matrices; norms and embeddings are not decayed")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradients of text are scaled down to this norm")


class ScheduleSettings(Strict):
    """Learning rate as a pure function of the step."""

    kind: Literal["wsd", "cosine", "constant"] = Field("wsd", description="wsd: warm up, hold, decay linearly")
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up")
    decay_fraction: Fraction = Field(0.3, description="share of all steps over which wsd decays")
    min_lr_ratio: Fraction = Field(0.05, description="last learning rate as a share of the peak")


class ProfileSettings(Strict):
    """A window of steps under torch.profiler."""

    start_step: int = Field(ge=0, le=2**53, description="first step recorded, counted from 0", examples=[20])
    steps: PositiveInt = Field(3, description="steps recorded")


class TrainingSettings(Strict):
    """The loop."""

    max_steps: PositiveInt = Field(description="steps of the whole run", examples=[1000])
    tokens_per_step: PositiveInt = Field(8192, description="text, global, over all ranks and micro-batches")
    text_weight: Points = Field(
        default_factory=lambda: [(0.0, 1.0)], description="weight of the text update over the run"
    )
    micro_batch_tokens: PositiveInt | None = Field(None, description="tokens a rank; default: no accumulation")
    activation_checkpointing: bool = Field(
        False, description="keep only each layer's input, compute the rest again: less memory, a third more work"
    )
    z_loss_weight: NonNegative = Field(0.0, description="of log(Z)^2 a token, against drifting logits; 1e-4 is usual")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where its matmul is much faster")
    compile: bool = Field(True, description="compile the layers with torch.compile")
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="CPU threads of a process; default: cores / processes"
    )
    max_skipped_steps: PositiveInt = Field(10, description="steps in a row with a loss that is not finite, then stop")
    optimizer: OptimizerSettings = Field(OptimizerSettings(), description="AdamW, moments of its own per objective")
    schedule: ScheduleSettings = Field(ScheduleSettings(), description="learning rate over the run")
    profile: ProfileSettings | None = Field(None, description="steps to record with torch.profiler")
    log_every_steps: PositiveInt = Field(10, description="steps from one log line to the next")
    validate_every_steps: PositiveInt = Field(200, description="steps from one validation and probe to the next")
    validation_tokens: PositiveInt = Field(32768, description="held-out tokens a validation reads")
    probe_distances: list[PositiveInt] = Field(
        default_factory=list, description="tokens from value to query; default: W, 2W, 4W ... last D"
    )
    probe_items: PositiveInt = Field(64, description="questions a distance")
    save_every_steps: PositiveInt = Field(200, description="steps from one checkpoint to the next")
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints kept")


class TrackingSettings(Strict):
    """`metrics.jsonl` is always written; wandb gets the same columns."""

    wandb_mode: Literal["offline", "online", "disabled"] = Field("offline", description="offline: into the run folder")
    wandb_project: str = Field("windreach", description="project name at wandb")


class Settings(Strict):
    """Everything a run needs."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the run and its folder", examples=["my-run"]
    )
    run_dir: str | None = Field(None, description="run folder; default: runs/NAME")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of weights, order of text and recall rows")
    model: ModelSettings = Field(description="the decoder")
    data: DataSettings = Field(DataSettings(), description="the text")
    recall: RecallSettings = Field(RecallSettings(), description="recall documents in the training data")
    training: TrainingSettings = Field(description="the loop")
    tracking: TrackingSettings = Field(TrackingSettings(), description="metrics")
