"""Settings of a run: one frozen, validated object read from YAML.

The classes below are the schema; every field carries its unit in its name or its description.
`training/config_file.py` reads files (`extends`, dotted overrides) and reports problems.
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


class Strict(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class LayerSettings(Strict):
    """One layer kind of the stack; see `model.windows.LayerSpec` for what each may see."""

    kind: Literal["sliding", "full", "chunked", "dilated"] = "sliding"
    window: PositiveInt | None = Field(None, description="tokens, current one included; default model.sliding_window")
    dilation: PositiveInt = Field(1, description="step between visible keys of a dilated layer")
    global_tokens: int = Field(0, ge=0, description="first tokens of a document that all its later tokens see")
    sink: bool = Field(False, description="a learned sink logit per head")
    rope: bool = Field(True, description="rotary position embedding on this kind")
    rope_theta: PositiveFloat | None = Field(None, description="default model.rope_theta")


class InitSettings(Strict):
    """Initialisation of the weights."""

    std: PositiveFloat | None = Field(None, description="standard deviation; default 1/sqrt(fan-in) of each matrix")
    embedding_std: PositiveFloat = 1.0
    scale_residual_by_depth: bool = Field(True, description="o_proj and down_proj are divided by sqrt(2 * layers)")
    copy_first_layer: bool = Field(False, description="all layers start as copies of the first")


class ModelSettings(Strict):
    """The decoder. Names are those of `transformers.MistralConfig`."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: int = Field(32, ge=1, le=1024)
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt | None = Field(None, description="default hidden_size / num_attention_heads")
    vocab_size: PositiveInt | None = Field(None, description="default: the tokenizer's")
    sliding_window: PositiveInt = Field(4096, description="W in tokens, current one included")
    layers: list[LayerSettings] = Field(
        default_factory=lambda: [LayerSettings()], description="pattern repeated over depth"
    )
    max_position_embeddings: PositiveInt = 131072
    rope_theta: PositiveFloat = 10000.0
    rms_norm_eps: PositiveFloat = 1e-5
    tie_word_embeddings: bool = False
    attention_backend: Literal["auto", "reference", "blocked"] = "auto"
    init: InitSettings = InitSettings()

    @property
    def head_size(self) -> int:
        """Numbers per head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


class TokenizerSettings(Strict):
    """A sentencepiece model: trained on the training text, or given."""

    model_file: str | None = Field(None, description="path of a given .model; default: train one")
    vocab_size: PositiveInt = Field(2048, description="pieces of a trained tokenizer, recall tokens included")


class HubSettings(Strict):
    """A hub data set, read with `datasets.load_dataset`."""

    name: str
    config: str | None = None
    train_split: str = "train"
    heldout_split: str = "validation"
    text_column: str = "text"
    streaming: bool = False
    max_documents: PositiveInt | None = None


class DataSettings(Strict):
    """Where the text comes from."""

    source: Literal["novels", "files", "hub"] = "novels"
    train_files: list[str] = Field(default_factory=list, description="text, jsonl or parquet files (globs allowed)")
    heldout_files: list[str] = Field(
        default_factory=list, description="files training never sees; default: a share of the documents of train_files"
    )
    text_column: str = "text"
    hub: HubSettings | None = None
    tokenizer: TokenizerSettings = TokenizerSettings()
    cache_dir: str = ".cache/data"
    seq_len: PositiveInt = Field(512, description="tokens per packed text row")


class CurriculumSettings(Strict):
    """Distances are drawn from [1, D]; D grows while accuracy holds."""

    start_distance: PositiveInt | None = Field(None, description="first D in tokens; default W")
    max_distance: PositiveInt | None = Field(None, description="last D in tokens; default R")
    growth: Annotated[float, Field(gt=1.0)] = 1.2
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


class RecallSettings(Strict):
    """Recall documents in the training data; `enabled: false` trains on text alone."""

    enabled: bool = True
    tasks: dict[Literal["needle", "needle-noise"], PositiveFloat] = Field(
        default_factory=lambda: {"needle": 1.0}, description="task: share of the recall rows"
    )
    values: PositiveInt = Field(32, description="number of one-token values; chance is 1/values")
    seq_len: PositiveInt | None = Field(None, description="tokens per recall row at full D; default R + 2W")
    relay_loss_weight: NonNegative = Field(0.0, description="auxiliary head that reads the value at filler positions")
    text_loss_weight: NonNegative = Field(0.0, description="next-token loss on recall rows, part of their objective")
    weight: Points = Field(default_factory=lambda: [(0.0, 1.0)], description="weight of the recall update over the run")
    tokens_per_step: PositiveInt | None = Field(None, description="recall tokens; default training.tokens_per_step")
    max_grad_norm: PositiveFloat | None = Field(None, description="of recall; default training.optimizer.max_grad_norm")
    curriculum: CurriculumSettings = CurriculumSettings()


class OptimizerSettings(Strict):
    """AdamW."""

    lr: PositiveFloat = 1e-3
    beta1: Fraction = 0.9
    beta2: Fraction = 0.98
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegative = Field(0.1, description="on matrices; norms and embeddings are not decayed")
    max_grad_norm: PositiveFloat = 1.0


class ScheduleSettings(Strict):
    """Learning rate as a pure function of the step."""

    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = Field(100, ge=0)
    decay_fraction: Fraction = Field(0.3, description="share of all steps over which wsd decays")
    min_lr_ratio: Fraction = 0.05


class TrainingSettings(Strict):
    """The loop."""

    max_steps: PositiveInt
    tokens_per_step: PositiveInt = Field(8192, description="text, global, over all ranks and micro-batches")
    text_weight: Points = Field(
        default_factory=lambda: [(0.0, 1.0)], description="weight of the text update over the run"
    )
    micro_batch_tokens: PositiveInt | None = Field(None, description="per rank; default: no accumulation")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = True
    num_threads: PositiveInt | None = Field(None, description="CPU threads of a process; default cores / processes")
    max_skipped_steps: PositiveInt = Field(10, description="steps in a row with a loss that is not finite, then stop")
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    log_every_steps: PositiveInt = 10
    validate_every_steps: PositiveInt = 200
    validation_tokens: PositiveInt = 32768
    probe_distances: list[PositiveInt] = Field(default_factory=list, description="default: W, 2W, 4W … R")
    probe_items: PositiveInt = 64
    save_every_steps: PositiveInt = 200
    keep_checkpoints: PositiveInt = 2


class TrackingSettings(Strict):
    """`metrics.jsonl` is always written; wandb gets the same columns."""

    wandb_mode: Literal["offline", "online", "disabled"] = "offline"
    wandb_project: str = "windreach"


class Settings(Strict):
    """Everything a run needs."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the run and its folder")
    run_dir: str | None = Field(None, description="default runs/NAME")
    seed: int = Field(0, ge=0)
    model: ModelSettings
    data: DataSettings = DataSettings()
    recall: RecallSettings = RecallSettings()
    training: TrainingSettings
    tracking: TrackingSettings = TrackingSettings()
