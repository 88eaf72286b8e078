"""Settings that are right one by one and contradict each other. Each check yields the problems that it finds."""

from collections.abc import Iterator, Mapping
from typing import Any

from data.tasks import TASKS
from model.windows import LayerSpec, reach
from training.settings.build import layer_dicts
from training.settings.problems import ABSENT, Keys, Problem
from training.settings.schema import Settings

MANY_HEADS = 4096  # the search for a divisor ends here, because a mistyped number may be huge
_DEPTH = "model.num_hidden_layers"
_STACK = ("model.sliding_window", "model.layers", _DEPTH)


def inconsistencies(settings: Settings) -> list[Problem]:
    """All problems between settings. Recall is checked if the layers are right, because it depends on the reach."""
    layers = list(_layers(settings))
    checks = [_heads, _data, _steps]
    if settings.recall.enabled and not layers:
        checks += [_windows_bind, _recall_tasks, _recall_distances, _recall_rows]
    return layers + [problem for check in checks for problem in check(settings)]


def last_distance(settings: Settings) -> int:
    """The farthest distance that recall trains on, in tokens."""
    return settings.recall.curriculum.max_distance or _reach(settings) or settings.data.seq_len


def recall_seq_len(settings: Settings) -> int:
    """Tokens in the longest recall rows."""
    last = last_distance(settings)
    needed = row_tokens(settings, dict.fromkeys(settings.recall.tasks, last))
    return settings.recall.seq_len or max(last + 2 * settings.model.sliding_window, needed)


def row_tokens(settings: Settings, distances: Mapping[str, int]) -> int:
    """Tokens in a row that is long enough for a question of every task at its distance, with markers of one token."""
    options = settings.recall.questions
    return max(TASKS[task].size(options).row(distance) for task, distance in distances.items())


def _reach(settings: Settings) -> int | None:
    return reach([LayerSpec(**layer) for layer in layer_dicts(settings.model)])


def _problem(path: str, value: Any, what: str, remedy: str, *rests_on: str) -> Problem:
    keys: Keys = tuple(int(k) if k.isdecimal() else k for k in path.split("."))
    return Problem(keys, value, what, remedy, (path, *rests_on))


def _heads(s: Settings) -> Iterator[Problem]:
    m = s.model
    heads = "model.num_attention_heads"
    if m.num_attention_heads % m.num_key_value_heads:
        what = f"{heads} = {m.num_attention_heads} is not a multiple of it"
        fewer = range(1, min(m.num_key_value_heads, MANY_HEADS))
        near = max(k for k in fewer if m.num_attention_heads % k == 0)
        yield _problem("model.num_key_value_heads", m.num_key_value_heads, what, f"use {near} for example", heads)
    if m.head_dim is None and m.hidden_size % m.num_attention_heads:
        what = f"not a multiple of {heads} = {m.num_attention_heads}"
        remedy = "change one of them, or give model.head_dim"
        yield _problem("model.hidden_size", m.hidden_size, what, remedy, heads, "model.head_dim")
    elif m.head_size % 2:
        what, remedy = "rotary positions need heads of even size", f"set model.head_dim to {m.head_size + 1}"
        yield _problem("model.head_dim", m.head_size, what, remedy, heads, "model.hidden_size")


def _layers(s: Settings) -> Iterator[Problem]:
    m = s.model
    if len(m.layers) > m.num_hidden_layers:
        what = f"the pattern has {len(m.layers)} layers, the model {m.num_hidden_layers}"
        yield _problem("model.layers", ABSENT, what, f"shorten it, or raise {_DEPTH}", _DEPTH)
    for i, layer in enumerate(m.layers):
        at = f"model.layers.{i}"
        if layer.kind == "full" and layer.window is not None:
            yield _problem(f"{at}.window", layer.window, "a full layer has no window", "remove it", f"{at}.kind")
        if layer.kind != "dilated" and layer.dilation > 1:
            what, remedy = f"a {layer.kind} layer has no dilation", "remove it, or use kind: dilated"
            yield _problem(f"{at}.dilation", layer.dilation, what, remedy, f"{at}.kind")
        if not layer.rope and layer.rope_theta is not None:
            what = "rope is false on this layer, so it has no effect"
            yield _problem(f"{at}.rope_theta", layer.rope_theta, what, "remove one of them", f"{at}.rope")


def _data(s: Settings) -> Iterator[Problem]:
    d, source = s.data, "data.source"
    unused = f"data.source is {d.source}, so it has no effect"
    if d.source == "hub" and d.hub is None:
        remedy = "add a section such as hub: {name: wikitext}"
        yield _problem("data.hub", ABSENT, "data.source is hub, but no data set is named", remedy, source)
    if d.source != "hub" and d.hub is not None:
        yield _problem("data.hub", ABSENT, unused, "remove it, or use data.source: hub", source)
    if d.source == "files" and not d.train_files:
        what, remedy = "data.source is files, but none is given", "add train_files: [texts/*.txt]"
        yield _problem("data.train_files", d.train_files, what, remedy, source)
    for name, files in (("train_files", d.train_files), ("heldout_files", d.heldout_files)):
        if d.source != "files" and files:
            yield _problem(f"data.{name}", files, unused, "remove it, or use data.source: files", source)
    limit = s.model.max_position_embeddings
    if d.seq_len > limit:
        what, longest = f"model.max_position_embeddings is {limit}", "model.max_position_embeddings"
        yield _problem("data.seq_len", d.seq_len, what, "lower one or raise the other", longest)


def _steps(s: Settings) -> Iterator[Problem]:
    t, seq_len = s.training, s.data.seq_len
    for name, tokens in (("tokens_per_step", t.tokens_per_step), ("micro_batch_tokens", t.micro_batch_tokens)):
        if tokens is not None and tokens % seq_len:
            what = f"not a multiple of data.seq_len = {seq_len}"
            near = f"use {max(1, round(tokens / seq_len)) * seq_len} for example"
            yield _problem(f"training.{name}", tokens, what, near, "data.seq_len")
    steps = f"the run has training.max_steps = {t.max_steps}"
    warmup, start = t.schedule.warmup_steps, t.profile.start_step if t.profile else -1
    if warmup >= t.max_steps:
        what = f"{steps}, so the peak learning rate is never reached"
        yield _problem("training.schedule.warmup_steps", warmup, what, "lower it", "training.max_steps")
    if start >= t.max_steps:
        what = f"{steps}, so nothing is recorded"
        yield _problem("training.profile.start_step", start, what, "lower it", "training.max_steps")


def _windows_bind(s: Settings) -> Iterator[Problem]:
    """A row within one window never needs a second layer. It can neither teach nor test a reach beyond W."""
    widest = max((layer["window"] * layer["dilation"] for layer in layer_dicts(s.model) if layer["window"]), default=0)
    for path, length in (("data.seq_len", s.data.seq_len), ("recall.seq_len", s.recall.seq_len)):
        if length is not None and length <= widest:
            what = f"rows lie within one window of {widest} tokens, so recall beyond it can't be learned"
            remedy = f"use more than {2 * widest}, or lower model.sliding_window, or set recall.enabled: false"
            yield _problem(path, length, what, remedy, "model.sliding_window", "model.layers", "recall.enabled")


def _recall_tasks(s: Settings) -> Iterator[Problem]:
    recall = s.recall
    for name in recall.tasks:
        option, most = TASKS[name].option, TASKS[name].most(recall.values, recall.keys)
        if option is not None and most is not None and (size := getattr(recall.questions, option)) > most:
            what = f"{name} allows at most {most} with recall.values = {recall.values} and recall.keys = {recall.keys}"
            rests_on = ("recall.tasks", "recall.values", "recall.keys")
            yield _problem(f"recall.questions.{option}", size, what, "lower it, or raise them", *rests_on)


def _recall_distances(s: Settings) -> Iterator[Problem]:
    c, farthest, last = s.recall.curriculum, _reach(s), last_distance(s)
    if c.max_distance is not None and farthest is not None and c.max_distance > farthest:
        what = f"no token farther back than R = {farthest} can influence a prediction of this stack"
        remedy = f"use {farthest} or less, or remove it to take R"
        yield _problem("recall.curriculum.max_distance", c.max_distance, what, remedy, *_STACK)
    if isinstance(c.start_distance, int) and c.start_distance > last:
        rests_on = ("recall.curriculum.max_distance", "data.seq_len", *_STACK)
        what = f"the last distance is {last}"
        yield _problem("recall.curriculum.start_distance", c.start_distance, what, "lower it", *rests_on)


def _recall_rows(s: Settings) -> Iterator[Problem]:
    rows = s.recall.rows
    if rows.short_share + rows.long_share > 1:
        what = f"with recall.rows.short_share = {rows.short_share:g} the sum is more than 1"
        yield _problem("recall.rows.long_share", rows.long_share, what, "lower one", "recall.rows.short_share")
    last = last_distance(s)
    name = max(s.recall.tasks, key=lambda task: row_tokens(s, {task: last}))
    needed = row_tokens(s, {name: last})
    rests_on = ("recall.curriculum", "recall.questions", "data.seq_len", *_STACK)
    if s.recall.seq_len is not None and s.recall.seq_len < needed:
        what = f"a question of {name} at the last distance {last} needs rows of {needed} tokens"
        remedy = "raise it, or lower recall.curriculum.max_distance"
        yield _problem("recall.seq_len", s.recall.seq_len, what, remedy, *rests_on)
    limit = s.model.max_position_embeddings
    if recall_seq_len(s) > limit:
        what = f"model.max_position_embeddings is {limit}"
        remedy = "lower recall.curriculum.max_distance or raise model.max_position_embeddings"
        yield _problem("recall.seq_len", recall_seq_len(s), what, remedy, "model.max_position_embeddings", *rests_on)
