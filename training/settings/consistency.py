"""Settings that are right one by one and contradict each other, and the lengths that follow from several settings."""

from collections.abc import Iterator, Mapping
from functools import reduce
from math import gcd
from typing import Any

from data.settings import DataSettings, SourceSettings
from data.tasks import TASKS
from model.windows import LayerSpec, reach
from training.settings.build import layer_dicts
from training.settings.problems import ABSENT, Keys, Problem
from training.settings.schema import InitSettings, RopeScalingSettings, Settings

Check = tuple[str, object, str, str]  # the setting, whether it is wrong, what is wrong, the remedy


def inconsistencies(settings: Settings) -> list[Problem]:
    """All problems between settings. Recall is checked if the layers are right, because it depends on the reach."""
    checks = [*_layers(settings), *_init(settings), *_model_and_data(settings), *_steps(settings)]
    if settings.recall.enabled and not any(wrong for _, wrong, *_ in _layers(settings)):
        checks += [*_recall_lengths(settings), *_recall_questions(settings)]
    problems: list[Problem] = []
    tree: Any = settings.model_dump()
    for path, wrong, what, remedy in checks:
        if wrong:
            keys: Keys = tuple(int(key) if key.isdecimal() else key for key in path.split("."))
            value: Any = reduce(lambda section, key: section[key], keys, tree)
            problems.append(Problem(keys, ABSENT if value is None else value, what, remedy))
    return problems


def last_distance(settings: Settings) -> int:
    """The farthest distance that recall trains on, in tokens."""
    layers = [LayerSpec(**layer) for layer in layer_dicts(settings.model)]
    return settings.recall.curriculum.max_distance or reach(layers) or settings.data.seq_len


def recall_seq_len(settings: Settings) -> int:
    """Tokens in the longest recall rows."""
    last = last_distance(settings)
    needed = row_tokens(settings, dict.fromkeys(settings.recall.tasks, last))
    return settings.recall.seq_len or max(last + 2 * settings.model.sliding_window, needed)


def row_tokens(settings: Settings, distances: Mapping[str, int]) -> int:
    """Tokens in a row that is long enough for a question of every task at its distance, with markers of one token."""
    options = settings.recall.questions
    return max(TASKS[task].size(options).row(distance) for task, distance in distances.items())


def _layers(s: Settings) -> Iterator[Check]:
    pattern, depth = len(s.model.layers), s.model.num_hidden_layers
    yield ("model.layers", pattern > depth, f"the pattern has {pattern} layers, the model {depth}",
           "shorten it, or raise model.num_hidden_layers")  # fmt: skip
    for i, layer in enumerate(s.model.layers):
        at, kind = f"model.layers.{i}", layer.kind
        yield f"{at}.window", kind == "full" and layer.window is not None, "a full layer has no window", "remove it"
        yield (f"{at}.dilation", kind != "dilated" and layer.dilation > 1, f"a {kind} layer has no dilation",
               "remove it, or use kind: dilated")  # fmt: skip
        yield (f"{at}.rope_theta", not layer.rope and layer.rope_theta is not None,
               "rope is false on this layer, so it has no effect", "remove one of them")  # fmt: skip


def _init(s: Settings) -> Iterator[Check]:
    for name, field in InitSettings.model_fields.items():
        differs = getattr(s.model.init, name) != field.default and name != "from_pretrained"
        yield (f"model.init.{name}", s.model.init.from_pretrained is not None and differs,
               "the weights are those of the pretrained model, so it has no effect", "remove it")  # fmt: skip


def _model_and_data(s: Settings) -> list[Check]:
    m, d, heads = s.model, s.data, f"model.num_attention_heads = {s.model.num_attention_heads}"
    uneven = m.head_dim is None and m.hidden_size % m.num_attention_heads
    scaling = m.rope_scaling
    return [
        ("model.rope_scaling", scaling and scaling.rope_type == "llama3" and not _llama3(scaling),
         "llama3 needs high_freq_factor above low_freq_factor", "give both, as in the config.json of the model"),
        ("model.num_key_value_heads", m.num_attention_heads % m.num_key_value_heads, f"{heads} is not a multiple of it",
         f"use {m.num_attention_heads} or a divisor of it"),
        ("model.hidden_size", uneven, f"not a multiple of {heads}", "change one of them, or give model.head_dim"),
        ("model.head_dim", not uneven and m.head_size % 2, "rotary positions need heads of even size",
         f"set model.head_dim to {m.head_size + 1}"),
        ("data.seq_len", d.seq_len > m.max_position_embeddings,
         f"model.max_position_embeddings is {m.max_position_embeddings}", "lower one, raise the other"),
        ("data.chat_template", d.chat_template is not None and not any(of.conversations for of in d.mixture),
         "no source has conversations, so it has no effect", "remove it, or name the messages_column of a source"),
        *(_source("data", d) if not d.sources else _mixture(d)),
    ]  # fmt: skip


def _llama3(scaling: RopeScalingSettings) -> bool:
    """Whether the two limits are given and in order."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return low is not None and high is not None and low < high


def _source(at: str, d: SourceSettings) -> Iterator[Check]:
    """`at` is the path of the source."""
    hub, files = d.source == "hub", d.source == "files"
    unused = f"{at}.source is {d.source}, so it has no effect"
    yield (f"{at}.hub", hub and d.hub is None, f"{at}.source is hub, but no data set is named",
           "add a section such as hub: {name: wikitext}")  # fmt: skip
    yield f"{at}.hub", not hub and d.hub is not None, unused, f"remove it, or use {at}.source: hub"
    yield (f"{at}.train_files", files and not d.train_files, f"{at}.source is files, but none is given",
           "add train_files: [texts/*.txt]")  # fmt: skip
    for name in ("train_files", "heldout_files"):
        yield f"{at}.{name}", not files and getattr(d, name), unused, f"remove it, or use {at}.source: files"
    yield from _columns(at, d)


def _columns(at: str, d: SourceSettings) -> Iterator[Check]:
    """Columns with conversations."""
    pair = {"prompt_column": "answer_column", "answer_column": "prompt_column"}
    for name in ("messages_column", *pair):
        given = getattr(d, name) is not None
        yield (f"{at}.{name}", given and d.source == "novels", f"{at}.source is novels, which hold no conversations",
               f"remove it, or use {at}.source: files")  # fmt: skip
        other = pair.get(name)
        yield (f"{at}.{name}", given and other is not None and getattr(d, other) is None,
               f"{at}.{other} is missing", "add it: a conversation needs both")  # fmt: skip
    yield (f"{at}.messages_column", d.messages_column is not None and d.prompt_column is not None,
           f"{at}.prompt_column is given too", "remove one of them")  # fmt: skip
    yield (f"{at}.text_column", d.conversations and d.text_column != "text", "the rows are conversations, so it has no "
           "effect", "remove it, or messages_column, prompt_column and answer_column")  # fmt: skip


def _mixture(d: DataSettings) -> Iterator[Check]:
    for name, field in SourceSettings.model_fields.items():
        differs = getattr(d, name) != field.get_default(call_default_factory=True)
        yield f"data.{name}", differs, "data.sources is given, so it has no effect", "move it to the sources"
    names = [source.name for source in d.sources]
    for i, source in enumerate(d.sources):
        yield (f"data.sources.{i}.name", source.name in names[:i], "another source has this name",
               "give each source its own")  # fmt: skip
        starts = [] if isinstance(source.weight, float) else [at for at, _ in source.weight]
        yield (f"data.sources.{i}.weight", len(set(starts)) < len(starts),
               "two points are at the same share of all steps", "remove one of them")  # fmt: skip
        yield from _source(f"data.sources.{i}", source)
    points = [[(0.0, s.weight)] if isinstance(s.weight, float) else sorted(s.weight) for s in d.sources]
    for start in sorted({0.0, *(at for source in points for at, _ in source)} - {1.0}):
        weights = [[weight for at, weight in source if at <= start][-1:] for source in points]
        yield ("data.sources", not any(map(any, weights)), f"from {start:g} of all steps on, no source has a weight",
               "give one of them a weight above 0")  # fmt: skip


def _steps(s: Settings) -> Iterator[Check]:
    t, seq_len = s.training, s.data.seq_len
    parts = t.context_parallel
    least, shared = seq_len // gcd(seq_len, parts), f" / training.context_parallel = {parts}" * (parts > 1)
    yield ("training.context_parallel", parts > seq_len, f"a row has data.seq_len = {seq_len} tokens", "lower it")
    for name, tokens, unit, of in (
        ("tokens_per_step", t.tokens_per_step, seq_len, ""),
        ("micro_batch_tokens", t.micro_batch_tokens or 0, least, shared),
    ):
        near = max(1, round(tokens / unit)) * unit
        yield (f"training.{name}", tokens % unit, f"not a multiple of data.seq_len = {seq_len}{of}",
               f"use {near} for example")  # fmt: skip
    steps, late = f"the run has training.max_steps = {t.max_steps}", t.profile and t.profile.start_step >= t.max_steps
    yield ("training.schedule.warmup_steps", t.schedule.warmup_steps >= t.max_steps,
           f"{steps}, so the peak learning rate is never reached", "lower it")  # fmt: skip
    yield ("training.distillation", t.distillation and not (t.distillation.teacher or s.model.init.from_pretrained),
           "the run starts from no pretrained model, so there is no teacher",
           "give training.distillation.teacher, or model.init.from_pretrained")  # fmt: skip
    yield ("training.optimizer.kind", t.lora is not None and t.optimizer.kind == "muon",
           "Muon's updates are made for whole matrices, and training.lora trains two thin factors of each",
           "use adamw, or remove training.lora")  # fmt: skip
    yield "training.profile.start_step", late, f"{steps}, so nothing is recorded", "lower it"


def _recall_lengths(s: Settings) -> list[Check]:
    """A row within one window never needs a second layer. It can neither teach nor test a reach beyond W."""
    recall, c, last, layers = s.recall, s.recall.curriculum, last_distance(s), layer_dicts(s.model)
    farthest = reach([LayerSpec(**layer) for layer in layers])
    widest = max((layer["window"] * layer["dilation"] for layer in layers if layer["window"]), default=0)
    within = f"rows lie within one window of {widest} tokens, so recall beyond it can't be learned"
    longer = f"use more than {2 * widest}, or lower model.sliding_window, or set recall.enabled: false"
    name = max(recall.tasks, key=lambda task: row_tokens(s, {task: last}))
    needed, length, limit = row_tokens(s, {name: last}), recall_seq_len(s), s.model.max_position_embeddings
    return [
        ("data.seq_len", s.data.seq_len <= widest, within, longer),
        ("recall.seq_len", recall.seq_len and recall.seq_len <= widest, within, longer),
        ("recall.seq_len", length < needed,
         f"a question of {name} at the last distance {last} needs rows of {needed} tokens",
         "raise it, or lower recall.curriculum.max_distance"),
        ("recall.seq_len", length > limit, f"rows of {length} tokens, but model.max_position_embeddings is {limit}",
         "lower recall.curriculum.max_distance or raise model.max_position_embeddings"),
        ("recall.curriculum.max_distance", farthest is not None and (c.max_distance or 0) > farthest,
         f"no token farther back than R = {farthest} can influence a prediction of this stack",
         f"use {farthest} or less, or remove it to take R"),
        ("recall.curriculum.start_distance", isinstance(c.start_distance, int) and c.start_distance > last,
         f"the last distance is {last}", "lower it"),
    ]  # fmt: skip


def _recall_questions(s: Settings) -> Iterator[Check]:
    recall, rows = s.recall, s.recall.rows
    yield ("recall.rows.long_share", rows.short_share + rows.long_share > 1,
           f"with recall.rows.short_share = {rows.short_share:g} the sum is more than 1", "lower one")  # fmt: skip
    for name in recall.tasks:
        option, most = TASKS[name].option, TASKS[name].most(recall.values, recall.keys)
        if option is not None and most is not None:
            what = f"{name} allows at most {most} with recall.values = {recall.values} and recall.keys = {recall.keys}"
            wrong = getattr(recall.questions, option) > most
            yield f"recall.questions.{option}", wrong, what, "lower it, or raise them"
