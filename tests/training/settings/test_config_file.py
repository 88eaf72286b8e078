import copy
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from model.errors import UserError
from training.settings.config_file import load_settings
from training.settings.schema import Settings

GOOD: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "sliding_window": 8,
    },
    "data": {"seq_len": 64},
    "training": {"max_steps": 200, "tokens_per_step": 512},
}  # fmt: skip


def write(folder: Path, text: str | dict[str, Any], name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text, sort_keys=False))
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write(tmp_path, GOOD)


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_settings(path, overrides)
    return str(caught.value)


# -- what is read -----------------------------------------------------------------------------------------------------


def test_scientific_notation_is_a_number_and_a_whole_one_serves_as_an_integer(good: Path) -> None:
    read = load_settings(good, ["training.optimizer.lr=3e-4", "training.max_steps=1e9", "model.rope_theta=500"])
    assert (read.training.optimizer.lr, read.training.max_steps, read.model.rope_theta) == (3e-4, 10**9, 500.0)
    assert isinstance(read.training.max_steps, int)
    assert isinstance(read.model.rope_theta, float)


def test_leading_zeros_are_decimal_and_dates_are_text(good: Path) -> None:
    read = load_settings(good, ["seed=010", "training.validation_tokens=0x40", "name=2024-01-02"])
    assert (read.seed, read.training.validation_tokens, read.name) == (10, 64, "2024-01-02")


def test_yes_no_on_off_are_text_and_true_false_are_switches(good: Path) -> None:
    assert load_settings(good, ["name=off"]).name == "off"
    assert load_settings(good, ["recall.enabled=false"]).recall.enabled is False
    message = refusal(good, "recall.enabled=off")
    assert "recall.enabled = 'off'  (override recall.enabled=off)" in message
    assert "expected a valid boolean; only true and false are read as switches: write one of them" in message


def test_extends_merges_sections_and_replaces_lists_and_values(tmp_path: Path) -> None:
    write(tmp_path, GOOD | {"recall": {"curriculum": {"row_lengths": [16, 32], "growth": 1.5}}}, "parent.yaml")
    child = write(tmp_path, "extends: parent.yaml\nrecall: {curriculum: {row_lengths: [48]}}\n")
    curriculum = load_settings(child).recall.curriculum
    assert (curriculum.row_lengths, curriculum.growth) == ([48], 1.5)


def test_later_files_of_extends_win_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, GOOD, "a.yaml")
    write(tmp_path / "sub", "name: from-b\nseed: 5\n", "b.yaml")
    child = write(tmp_path / "sub", "extends: [../a.yaml, b.yaml]\nseed: 6\n")
    assert (load_settings(child).name, load_settings(child).seed) == ("from-b", 6)


def test_null_takes_the_default_back(tmp_path: Path) -> None:
    write(tmp_path, GOOD | {"seed": 7, "recall": {"tasks": {"needle": 1.0}}}, "parent.yaml")
    child = write(tmp_path, "extends: parent.yaml\nseed: null\nrecall: {tasks: {needle: null, needle-noise: 1}}\n")
    assert (load_settings(child).seed, load_settings(child).recall.tasks) == (0, {"needle-noise": 1.0})


def test_later_overrides_win_and_reach_into_lists(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD | {"model": GOOD["model"] | {"layers": [{"kind": "sliding"}, {"window": 4}]}})
    read = load_settings(path, ["model.layers.1.window=5", "model.layers.1.window=6", "model.layers.0={kind: chunked}"])
    assert [(layer.kind, layer.window) for layer in read.model.layers] == [("chunked", None), ("sliding", 6)]


def test_points_are_lists_in_yaml(good: Path) -> None:
    read = load_settings(good, ["training.text_weight=[[0, 0], [0.5, 1]]"])
    assert read.training.text_weight == [(0.0, 0.0), (0.5, 1.0)]


def test_saved_settings_load_as_the_same_settings(good: Path, tmp_path: Path) -> None:
    read = load_settings(good)
    saved = write(tmp_path, yaml.safe_dump(read.model_dump(mode="json")), "saved.yaml")
    assert load_settings(saved) == read


def test_the_home_folder_of_data_is_where_the_shell_would_look(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = {
        "source": "files",
        "train_files": "[~/a.txt, b.txt]",
        "cache_dir": "~/cache",
        "tokenizer.model_file": "~/t.model",
    }
    data = load_settings(good, [f"data.{name}={value}" for name, value in given.items()]).data
    assert data.train_files == ["/home/me/a.txt", "b.txt"]
    assert (data.cache_dir, data.tokenizer.model_file) == ("/home/me/cache", "/home/me/t.model")


# -- what is refused --------------------------------------------------------------------------------------------------


def test_all_problems_are_told_at_once_with_path_value_place_and_remedy(tmp_path: Path) -> None:
    text = """\
name: tiny
model:
  hidden_size: 32
  intermediate_size: "48"
  num_attention_heads: 4
  num_key_value_heads: 2
  slidng_window: 8
training: {max_steps: many, lr: 3e-4, optimizer: {lr: 0}, schedule: {kind: cosin}}
"""
    path = write(tmp_path, text)
    assert (
        refusal(path, "data.seq_len=1.5", "seed")
        == f"""\
{path}: 9 problems in the settings
  'seed'  (command line)
    expected key=value; write for example training.max_steps=100
  model.intermediate_size = '48'  ({path}:4)
    expected a whole number; write it in digits, without quotes, commas and _
  model.sliding_window  ({path}:2)
    missing: Window W in tokens, the current token included; add it
  model.slidng_window = 8  ({path}:7)
    unknown key; did you mean model.sliding_window?
  data.seq_len = 1.5  (override data.seq_len=1.5)
    expected a whole number; write it in digits, without quotes, commas and _
  training.max_steps = 'many'  ({path}:8)
    expected a whole number; write it in digits, without quotes, commas and _
  training.optimizer.lr = 0  ({path}:8)
    expected greater than 0; correct it, or remove the line to take the default
  training.schedule.kind = 'cosin'  ({path}:8)
    expected 'wsd', 'cosine' or 'constant'; did you mean cosine?
  training.lr = 0.0003  ({path}:8)
    unknown key; did you mean training.optimizer.lr?"""
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "model.sliding_window=0",
            "model.sliding_window = 0  (override model.sliding_window=0)\n    expected at least 1",
        ),
        ("model.sliding_window=-4", "expected at least 1"),
        ("training.num_threads=2147483648", "expected at most 1024"),
        ("model.sliding_window=1_000", "expected a whole number; write it in digits, without quotes, commas and _"),
        ("training.optimizer.lr='3e-4'", "expected a valid number; write it in digits, without quotes, commas and _"),
        ("training.optimizer.lr=.nan", "expected a finite number"),
        ("training.max_steps=true", "expected a whole number"),
        ("name=7", "expected a valid string; put it in quotes if it looks like a number"),
        ("name=a/b", "should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$'; use letters, digits and . _ -"),
        ("model=3", "expected a section; write it as key: value on lines of its own"),
        ("model.layers={kind: full}", "expected a valid list; write it as [a, b]"),
        ("recall.tasks={nedle: 1}", "'variable-tracking' or 'instruction'; did you mean needle?"),
        ("recall.tasks={}", "should have at least 1 item"),
        ("recall.questions.rules=1", "expected at least 2"),
        ("recall.weight=[[0, 1, 2]]", "recall.weight.0 = [0, 1, 2]"),
        ("recall.weight=[]", "should have at least 1 item"),
        (
            "recall.curriculum.start_distance=lst",
            "recall.curriculum.start_distance = 'lst'  (override recall.curriculum.start_distance=lst)\n"
            "    expected a whole number or 'last'; did you mean last?",
        ),
        ("tracking.wandb_mode=none", "'offline', 'online' or 'disabled'; did you mean disabled?"),
        ("tracking.wandb_mode=ofline", "'offline', 'online' or 'disabled'; did you mean offline?"),
        ("name.x=3", "name = {'x': 3}  (override name.x=3)\n    expected a valid string"),
        ("model.layrs.0.kind=full", "unknown key; did you mean model.layers?"),
        ("data.hub={}", "data.hub.name  (override data.hub={})\n    missing"),
        ("=3", "expected key=value"),
        ("seed=[1", "not YAML"),
        ("foo.bar=3", "foo = {'bar': 3}  (override foo.bar=3)\n    unknown key; known here: name, run_dir, seed"),
    ],
)
def test_a_wrong_value_is_refused_with_a_sentence(good: Path, override: str, expected: str) -> None:
    assert expected in refusal(good, override)


FILES = ["data.source=files", "data.train_files=[a.jsonl]"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["model.num_key_value_heads=3"],
            "model.num_key_value_heads = 3  (override model.num_key_value_heads=3)\n"
            "    model.num_attention_heads = 4 is not a multiple of it; use 4 or a divisor of it",
        ),
        (
            ["model.hidden_size=30"],
            "not a multiple of model.num_attention_heads = 4; change one of them, or give model.head_dim",
        ),
        (["model.head_dim=7"], "rotary positions need heads of even size; set model.head_dim to 8"),
        (["data.seq_len=8"], "data.seq_len = 8  (override data.seq_len=8)\n    rows lie within one window of 8 tokens"),
        (["recall.seq_len=8"], "recall.seq_len = 8  (override recall.seq_len=8)\n    rows lie within one window"),
        (["recall.seq_len=29"], "a question of needle at the last distance 28 needs rows of 30 tokens"),
        (
            ["recall.tasks={keys: 1}", "recall.questions.pairs=32"],
            "keys allows at most 31 with recall.values = 32 and recall.keys = 32; lower it, or raise them",
        ),
        (["recall.tasks={induction: 1}", "recall.values=4"], "induction allows at most 3 with recall.values = 4"),
        (["recall.tasks={variable-tracking: 1}", "recall.keys=4"], "recall.questions.hops = 2"),
        (["recall.tasks={instruction: 1}", "recall.questions.rules=33"], "instruction allows at most 31"),
        (["recall.curriculum.max_distance=29"], "no token farther back than R = 28 can influence a prediction"),
        (["recall.curriculum.start_distance=29"], "the last distance is 28; lower it"),
        (["training.tokens_per_step=100"], "not a multiple of data.seq_len = 64; use 128 for example"),
        (["training.micro_batch_tokens=32"], "not a multiple of data.seq_len = 64; use 64 for example"),
        (["training.schedule.warmup_steps=200"], "the run has training.max_steps = 200"),
        (["data.source=files"], "data.train_files = []"),
        (["data.source=hub"], "data.source is hub, but no data set is named; add a section such as hub:"),
        (["data.hub={name: wikitext}"], "data.source is novels, so it has no effect; remove it, or use data.source"),
        (["data.train_files=[a.txt]"], "data.source is novels, so it has no effect; remove it, or use"),
        (["data.messages_column=m"], "data.source is novels, which hold no conversations; remove it, or"),
        ([*FILES, "data.prompt_column=q"], "data.answer_column is missing; add it: a conversation needs both"),
        ([*FILES, "data.answer_column=a"], "data.prompt_column is missing; add it: a conversation needs both"),
        (
            [*FILES, "data.messages_column=m", "data.prompt_column=q", "data.answer_column=a"],
            "data.prompt_column is given too; remove one of them",
        ),
        ([*FILES, "data.messages_column=m", "data.text_column=t"], "the rows are conversations, so it has no effect"),
        ([*FILES, "data.chat_template=a"], "no source has conversations, so it has no effect; remove it, or name the"),
        (
            ["data.sources=[{name: a, prompt_column: q}]"],
            "data.sources.0.source is novels, which hold no conversations; remove it, or use",
        ),
        (
            ["data.sources=[{name: a}]", "data.train_files=[a.txt]"],
            "data.train_files = ['a.txt']  (override data.train_files=[a.txt])\n"
            "    data.sources is given, so it has no effect; move it to the sources",
        ),
        (["data.sources=[{name: a}]", "data.source=files"], "data.source = 'files'"),
        (["data.sources=[{name: a}]", "data.heldout_share=0.1"], "data.heldout_share = 0.1"),
        (["data.sources=[{name: a}, {name: b}, {name: a}]"], "data.sources.2.name = 'a'"),
        (["data.sources=[{name: a}, {name: a}]"], "another source has this name; give each source its own"),
        (
            ["data.sources=[{name: a, source: files}]"],
            "data.sources.0.source is files, but none is given; add train_files: [texts/*.txt]",
        ),
        (
            ["data.sources=[{name: a}, {name: b, hub: {name: wikitext}}]"],
            "data.sources.1.source is novels, so it has no effect; remove it, or use data.sources.1.source: hub",
        ),
        (
            ["data.sources=[{name: a, weight: [[0.5, 0], [0, 1]]}, {name: b, weight: [[0.7, 1]]}]"],
            "from 0.5 of all steps on, no source has a weight; give one of them a weight above 0",
        ),
        (
            ["data.sources=[{name: a, weight: [[0, 1], [0.5, 9], [0.5, 0]]}]"],
            "two points are at the same share of all steps; remove one of them",
        ),
        (["data.sources=[{name: a, weight: [[0.1, 1]]}]"], "from 0 of all steps on, no source has a weight"),
        (["model.layers=[{kind: full, window: 3}]"], "model.layers.0.window = 3"),
        (["model.layers=[{dilation: 2}]"], "a sliding layer has no dilation; remove it, or use kind: dilated"),
        (["model.layers=[{rope: false, rope_theta: 9}]"], "rope is false on this layer, so it has no effect"),
        (["model.layers=[{}, {}, {}, {}, {}]"], "the pattern has 5 layers, the model 4; shorten it"),
        (["model.max_position_embeddings=40"], "data.seq_len = 64"),
        (["model.max_position_embeddings=64", "model.sliding_window=16"], "rows of 92 tokens, but"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(good: Path, overrides: list[str], expected: str) -> None:
    assert expected in refusal(good, *overrides)


def test_a_mixture_with_a_weight_at_every_step_is_fine(good: Path) -> None:
    sources = "data.sources=[{name: a, weight: [[0, 1], [0.5, 0]]}, {name: b, weight: [[0.5, 2], [1, 0]]}]"
    assert [source.name for source in load_settings(good, [sources]).data.mixture] == ["a", "b"]


def test_text_alone_may_have_rows_within_one_window(good: Path) -> None:
    assert load_settings(good, ["recall.enabled=false", "data.seq_len=8"]).data.seq_len == 8


def test_contradictions_are_looked_for_once_every_value_is_right(good: Path) -> None:
    contradictions = ["model.num_key_value_heads=3", "data.seq_len=2"]
    assert "2 problems" in refusal(good, *contradictions)
    wrong_value = refusal(good, *contradictions, "model.sliding_window=none")
    assert "1 problem in" in wrong_value
    assert "model.sliding_window = 'none'" in wrong_value


def test_index_beyond_a_list_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD | {"model": GOOD["model"] | {"layers": [{"kind": "sliding"}, {"kind": "full"}]}})
    assert "a number in a path selects an item that is in the list" in refusal(path, "model.layers.2.kind=full")


def test_missing_file_is_refused_with_the_files_beside_it(good: Path) -> None:
    message = refusal(good.with_name("rum.yaml"))
    assert "rum.yaml: can't be read: No such file or directory" in message
    assert f"{good.parent} has run.yaml" in message


def test_missing_parent_is_refused_with_the_file_that_asked_for_it(tmp_path: Path) -> None:
    child = write(tmp_path, "extends: nowhere.yaml\n")
    assert f"{child} extends it; the path is relative to that file" in refusal(child)


def test_a_circle_of_extends_is_refused_with_its_chain(tmp_path: Path) -> None:
    a = write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    assert f"extends runs in a circle: {a} -> {tmp_path}/b.yaml -> {tmp_path}/a.yaml" in refusal(a)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nseed: 1\nname: b\n", "run.yaml:3: name is here twice"),
        ("name: &a x\nrun_dir: *a\n", "run.yaml:2: aliases are not read; use extends"),
        ("seed: !!float 3\n", "run.yaml:1: remove the tag"),
        ("[1, 2]: 3\n", "run.yaml:1: a key must be a word"),
        ("name: [\n", "run.yaml:2: "),
        ("- name\n", "has no settings"),
        ("", "has no settings"),
        ("extends: 3\n", "extends = 3\n  expected a file name or a list of them"),
        ("[" * 5000, "nested too deeply"),
        ("name: a\0b\n", "special characters are not allowed"),
        ('name: a\nrun_dir: "\\0"\n', r"run.yaml:2: text holds the character '\x00'"),
        ('name: "\\U00110000"\n', "text holds a character that does not exist"),
        ('"\\ud800": 3\n', r"run.yaml:1: text holds the character '\ud800'"),
    ],
)
def test_text_that_is_not_settings_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(write(tmp_path, text))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "can't be read: Is a directory" in refusal(tmp_path)


def test_a_file_is_read_once_however_often_it_is_named(tmp_path: Path) -> None:
    """Twenty files that name the next one twice each: a million reads without memory of what was read."""
    write(tmp_path, GOOD, "20.yaml")
    for i in range(20):
        write(tmp_path, f"extends: [{i + 1}.yaml, {i + 1}.yaml]\nseed: {i}\n", f"{i}.yaml")
    assert load_settings(tmp_path / "0.yaml").seed == 0


def test_the_common_parent_of_two_files_does_not_take_back_what_the_first_says(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "base.yaml")
    write(tmp_path, "extends: base.yaml\nname: from-b\n", "b.yaml")
    write(tmp_path, "extends: base.yaml\nseed: 7\n", "c.yaml")
    read = load_settings(write(tmp_path, "extends: [b.yaml, c.yaml]\n"))
    assert (read.name, read.seed) == ("from-b", 7)


def test_only_the_first_problems_are_told(good: Path, tmp_path: Path) -> None:
    many = write(tmp_path, f"extends: {good.name}\n" + "".join(f"k{i}: 1\n" for i in range(9000)), "many.yaml")
    message = refusal(many)
    assert message.startswith(f"{many}: more than 20, of which these are the first problems in the settings\n  k0 = 1")
    assert message.count("unknown key") == 20


def test_devices_pipes_and_large_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (Path("/dev/zero"), tmp_path / "pipe.yaml"):
        assert "is a device or a pipe; give a regular file" in refusal(path)
    large = write(tmp_path, "#" * 300_000)
    assert "is larger than 262,144 bytes, the most that is read" in refusal(large)
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert "can't be read: Too many levels of symbolic links" in refusal(tmp_path / "loop.yaml")


def test_an_override_that_is_deeper_than_any_setting_is_refused(good: Path) -> None:
    assert "expected key=value" in refusal(good, ".".join(["a"] * 2000) + "=1")


# -- any file at all --------------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-4, 4096), st.integers(), st.floats(), st.text(max_size=6),
    st.sampled_from(["full", "chunked", "dilated", "files", "hub", "3e-4", "off", "1_000"]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
PATHS = sorted(
    ["name", "seed", "model", "data", "training", "recall", "extends", "model.layers", "model.layers.0.window"]
    + [f"model.{k}" for k in GOOD["model"]]
    + ["model.head_dim", "data.source", "data.seq_len", "data.hub", "data.train_files", "training.max_steps"]
    + ["recall.seq_len", "recall.tasks", "recall.weight", "recall.curriculum.max_distance", "training.nonsense"]
)


@hypothesis_settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(PATHS), values, min_size=1, max_size=4), as_override=st.booleans())
def test_any_change_gives_settings_or_a_user_error(tmp_path: Path, changes: dict[str, Any], as_override: bool) -> None:
    tree, overrides = copy.deepcopy(GOOD), []
    for path, value in changes.items():
        if as_override or "." not in path:
            overrides.append(f"{path}={yaml.safe_dump(value, default_flow_style=True)}")
        elif isinstance(tree.get(path.split(".")[0]), dict):
            tree[path.split(".")[0]][path.partition(".")[2]] = value
    give_settings_or_user_error(write(tmp_path, tree), overrides)


@hypothesis_settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_the_text_gives_settings_or_a_user_error(tmp_path: Path, data: st.DataObject) -> None:
    text = bytearray(yaml.safe_dump(GOOD, sort_keys=False).encode())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(text)))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3)
            | st.sampled_from([b"{", b"[", b": ", b"\n", b"*a", b"&a ", b"!!int ", b"<<: ", b"1e99", b"#"])
        )
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    give_settings_or_user_error(path, [])


def give_settings_or_user_error(path: Path, overrides: list[str]) -> None:
    try:
        read = load_settings(path, overrides)
    except UserError:
        return
    assert isinstance(read, Settings)
