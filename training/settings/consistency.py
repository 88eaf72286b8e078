"""Settings that are right one by one and wrong together: each check yields the problems it finds."""

from collections.abc import Iterator, Mapping
from itertools import chain

from data.tasks import TASKS
from data.tasks.question import TaskOptions
from model.windows import LayerSpec, reach
from training.settings.build import layer_dicts
from training.settings.problems import ABSENT, Keys, Problem
from training.settings.schema import Settings

MANY_HEADS = 4096  # no divisor beyond is looked for: the search would not end for a number typed wrong


def inconsistencies(settings: Settings) -> list[Problem]:
    """All problems between fields. Those of the layers come first: reach is not known while they are wrong."""
    layers = list(_layers(settings))
    checks = [_heads, _data, _steps, _lengths]
    if settings.recall.enabled and not layers:
        checks += [_windows_bind, _recall_tasks, _recall_distances, _recall_rows]
    return layers + list(chain.from_iterable(check(settings) for check in checks))


def last_distance(settings: Settings) -> int:
    """The farthest distance that recall trains on, in tokens."""
    specs = [LayerSpec(**layer) for layer in layer_dicts(settings.model)]
    return settings.recall.curriculum.max_distance or reach(specs) or settings.data.seq_len


def recall_seq_len(settings: Settings) -> int:
    """Tokens of the longest recall rows."""
    last = last_distance(settings)
    needed = row_tokens(settings, dict.fromkeys(settings.recall.tasks, last))
    return settings.recall.seq_len or max(last + 2 * settings.model.sliding_window, needed)


def row_tokens(settings: Settings, distances: Mapping[str, int]) -> int:
    """Tokens of a recall row that surely holds a question of every task at its distance, the markers one token each."""
    options = TaskOptions(**settings.recall.questions.model_dump())
    return max(TASKS[task].size(options).row(distance) for task, distance in distances.items())


def _problem(path: str, value: object, what: str, remedy: str, *rests_on: str) -> Problem:
    keys: Keys = tuple(int(k) if k.isdecimal() else k for k in path.split("."))
    return Problem(keys, value, what, remedy, (path, *rests_on))


def _heads(s: Settings) -> Iterator[Problem]:
    m = s.model
    heads = "model.num_attention_heads"
    if m.num_attention_heads % m.num_key_value_heads:
        what = f"model.num_attention_heads = {m.num_attention_heads} is not a multiple of it"
        few = range(1, min(m.num_key_value_heads, MANY_HEADS))
        near = max(k for k in few if m.num_attention_heads % k == 0)
        yield _problem("model.num_key_value_heads", m.num_key_value_heads, what, f"use {near} for example", heads)
    if m.head_dim is None and m.hidden_size % m.num_attention_heads:
        what = f"not a multiple of model.num_attention_heads = {m.num_attention_heads}"
        remedy = "change one of them, or give model.head_dim"
        yield _problem("model.hidden_size", m.hidden_size, what, remedy, heads, "model.head_dim")
    elif m.head_size % 2:
        what = "rotary positions need an even number per head"
        remedy = f"set model.head_dim to {m.head_size + 1}"
        yield _problem("model.head_dim", m.head_size, what, remedy, heads, "model.hidden_size")


def _layers(s: Settings) -> Iterator[Problem]:
    m = s.model
    if len(m.layers) > m.num_hidden_layers:
        what = f"the pattern has {len(m.layers)} layers, the model {m.num_hidden_layers}"
        yield _problem("model.layers", ABSENT, what, "shorten it, or raise model.num_hidden_layers", _DEPTH)
    for i, layer in enumerate(m.layers):
        at = f"model.layers.{i}"
        if layer.kind == "full" and layer.window is not None:
            yield _problem(f"{at}.window", layer.window, "a full layer has no window", "remove it", f"{at}.kind")
        if layer.kind != "dilated" and layer.dilation > 1:
            what, remedy = f"a {layer.kind} layer has no dilation", "remove it, or use kind: dilated"
            yield _problem(f"{at}.dilation", layer.dilation, what, remedy, f"{at}.kind")
        if not layer.rope and layer.rope_theta is not None:
            what, remedy = "rope is false on this layer, so it does nothing", "remove one of them"
            yield _problem(f"{at}.rope_theta", layer.rope_theta, what, remedy, f"{at}.rope")


_DEPTH = "model.num_hidden_layers"


def _data(s: Settings) -> Iterator[Problem]:
    d = s.data
    if d.source == "hub" and d.hub is None:
        remedy = "add a section such as hub: {name: wikitext}"
        yield _problem("data.hub", ABSENT, "data.source is hub, but no data set is named", remedy, "data.source")
    if d.source != "hub" and d.hub is not None:
        what = f"data.source is {d.source}, so it does nothing"
        yield _problem("data.hub", ABSENT, what, "remove it, or use data.source: hub", "data.source")
    for name in ("train_files", "heldout_files"):
        files: list[str] = getattr(d, name)
        if d.source == "files" and not files and name == "train_files":
            remedy = f"add {name}: [texts/*.txt]"
            yield _problem(f"data.{name}", files, "data.source is files, but none is given", remedy, "data.source")
        if d.source != "files" and files:
            what = f"data.source is {d.source}, so it does nothing"
            yield _problem(f"data.{name}", files, what, "remove it, or use data.source: files", "data.source")


def _steps(s: Settings) -> Iterator[Problem]:
    t, seq_len = s.training, s.data.seq_len
    for name, tokens in (("tokens_per_step", t.tokens_per_step), ("micro_batch_tokens", t.micro_batch_tokens)):
        if tokens is not None and tokens % seq_len:
            what = f"not a multiple of data.seq_len = {seq_len}"
            near = f"use {max(1, round(tokens / seq_len)) * seq_len} for example"
            yield _problem(f"training.{name}", tokens, what, near, "data.seq_len")
    warmup = t.schedule.warmup_steps
    if warmup >= t.max_steps:
        what = f"the run has training.max_steps = {t.max_steps}, so its full rate is never reached"
        yield _problem("training.schedule.warmup_steps", warmup, what, "lower it", "training.max_steps")
    if t.profile is not None and t.profile.start_step >= t.max_steps:
        what, remedy = f"the run has training.max_steps = {t.max_steps}, so nothing is recorded", "lower it"
        yield _problem("training.profile.start_step", t.profile.start_step, what, remedy, "training.max_steps")


def _lengths(s: Settings) -> Iterator[Problem]:
    limit = s.model.max_position_embeddings
    if s.data.seq_len > limit:
        what, rests_on = f"model.max_position_embeddings is {limit}", "model.max_position_embeddings"
        yield _problem("data.seq_len", s.data.seq_len, what, "lower one or raise the other", rests_on)


def _windows_bind(s: Settings) -> Iterator[Problem]:
    """A row within one window never needs a second layer: it can neither teach nor test a reach beyond W."""
    windows = [layer["window"] * layer["dilation"] for layer in layer_dicts(s.model) if layer["window"]]
    widest = max(windows, default=0)
    for path, length in (("data.seq_len", s.data.seq_len), ("recall.seq_len", s.recall.seq_len)):
        if length is not None and length <= widest:
            what = f"rows lie within one window of {widest} tokens, so recall beyond it can't be learned"
            remedy = f"use more than {2 * widest}, or lower model.sliding_window, or set recall.enabled: false"
            yield _problem(path, length, what, remedy, "model.sliding_window", "model.layers", "recall.enabled")


def _recall_tasks(s: Settings) -> Iterator[Problem]:
    recall = s.recall
    for name in recall.tasks:
        option, most = TASKS[name].option, TASKS[name].most(recall.values, recall.keys)
        asked = getattr(recall.questions, option) if option else 0
        if most is not None and asked > most:
            what = f"{name} allows at most {most} with recall.values = {recall.values} and recall.keys = {recall.keys}"
            remedy = "lower it, or raise them"
            rests_on = ("recall.tasks", "recall.values", "recall.keys")
            yield _problem(f"recall.questions.{option}", asked, what, remedy, *rests_on)


def _recall_distances(s: Settings) -> Iterator[Problem]:
    c = s.recall.curriculum
    farthest = reach([LayerSpec(**layer) for layer in layer_dicts(s.model)])
    stack = ("model.sliding_window", "model.layers", _DEPTH)
    if c.max_distance is not None and farthest is not None and c.max_distance > farthest:
        what = f"no token farther back than R = {farthest} can influence a prediction of this stack"
        remedy = f"use {farthest} or less, or remove it to take R"
        yield _problem("recall.curriculum.max_distance", c.max_distance, what, remedy, *stack)
    if isinstance(c.start_distance, int) and c.start_distance > last_distance(s):
        what = f"the last distance is {last_distance(s)}"
        rests_on = ("recall.curriculum.max_distance", "data.seq_len", *stack)
        yield _problem("recall.curriculum.start_distance", c.start_distance, what, "lower it", *rests_on)


def _recall_rows(s: Settings) -> Iterator[Problem]:
    rows = s.recall.rows
    if rows.short_share + rows.long_share > 1:
        what = f"with recall.rows.short_share = {rows.short_share:g} it is more than all"
        yield _problem("recall.rows.long_share", rows.long_share, what, "lower one", "recall.rows.short_share")
    last = last_distance(s)
    name, needed = max(((task, row_tokens(s, {task: last})) for task in s.recall.tasks), key=lambda found: found[1])
    rests_on = ("recall.curriculum", "recall.questions", "model.sliding_window", "model.layers", _DEPTH, "data.seq_len")
    if s.recall.seq_len is not None and s.recall.seq_len < needed:
        what = f"a question of {name} at the last distance {last} needs rows of {needed} tokens"
        remedy = "raise it, or lower recall.curriculum.max_distance"
        yield _problem("recall.seq_len", s.recall.seq_len, what, remedy, *rests_on)
    limit = s.model.max_position_embeddings
    if recall_seq_len(s) > limit:
        what = f"model.max_position_embeddings is {limit}"
        remedy = "lower recall.curriculum.max_distance or raise model.max_position_embeddings"
        yield _problem("recall.seq_len", recall_seq_len(s), what, remedy, "model.max_position_embeddings", *rests_on)
