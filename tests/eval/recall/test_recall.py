"""Claims about the recall measurement, made on a model that was never trained: nothing may look like recall."""

import copy
import dataclasses
import json
import shutil
import sys

import pytest

from data.tasks import TASKS
from eval import loss, stats
from eval.haystack import open_haystack
from eval.models import load_model, nominal_reach
from eval.reach import __main__ as reach
from eval.recall import __main__ as recall
from eval.recall import measure as measuring
from eval.recall.measure import measure
from eval.recall.order import Order, default_distances, parse_distances
from model.errors import UserError, cli
from model.windows import LayerSpec

DISTANCES = [1, 7, 8, 20, 21, 22, 24, 32]


@pytest.fixture(scope="module")
def examined(untrained_run):
    return load_model(str(untrained_run), "cpu")


def order(tasks, distances, n, **more):
    return Order(tuple(tasks), tuple(distances), n, seed=0, precision="fp32", **more)


@pytest.fixture(scope="module")
def result(examined):
    return measure(examined, open_haystack(examined), order(recall.NEEDLES, DISTANCES, 60))


def rows(result):
    return [row for entry in result["tasks"].values() for row in entry["rows"]]


def test_an_untrained_model_recalls_at_chance(result):
    correct, n = sum(row["correct"] for row in rows(result)), sum(row["n"] for row in rows(result))
    low, high = stats.wilson(correct, n, confidence=0.999)
    assert low < 1 / 8 < high
    assert {entry["h90"] for entry in result["tasks"].values()} == {0}


def test_pairs_are_bit_identical_beyond_the_reach_and_not_at_it(result):
    beyond = [row for row in rows(result) if row["distance"] > 21]
    assert [row["identical_pairs"] for row in beyond] == [1.0] * len(beyond)
    assert [row["pair_accuracy"] for row in beyond] == [0.0] * len(beyond)
    assert all(row["identical_pairs"] < 0.5 for row in rows(result) if row["distance"] <= 20)
    assert all(entry["identical_beyond_reach"] is True for entry in result["tasks"].values())


def test_a_model_that_sees_farther_than_it_claims_is_found_out(examined):
    narrower = (LayerSpec("sliding", 7),) * 3
    liar = dataclasses.replace(examined, specs=narrower)
    found = measure(liar, open_haystack(liar), order(["needle"], [18, 19, 20], 20))
    assert found["tasks"]["needle"]["identical_beyond_reach"] is False


def test_full_forward_ring_and_generation_give_the_same_answers(result):
    for entry in result["tasks"].values():
        paths = entry["paths"]
        assert paths["agree"] == paths["n"]
        assert paths["generated_agree"] == paths["generated_n"]
        assert paths["max_abs_logit_difference"] < 1e-4


def test_the_keys_of_recall_json_are_those_of_the_protocol(result):
    top = {"model", "checkpoint_sha256", "settings", "seed", "versions", "window", "layers", "reach"}
    assert top | {"window_times_layers", "tasks"} <= result.keys()
    assert (result["window"], result["layers"], result["reach"], result["window_times_layers"]) == (8, 3, 21, 24)
    entry = result["tasks"]["needle"]
    assert {"chance", "total_length", "rows", "h90", "h50", "u90", "u50"} <= entry.keys()
    assert {
        "distance", "distance_in_windows", "n", "correct", "accuracy", "low", "high", "pair_accuracy",
        "identical_pairs", "delta_nll_bits", "accuracy_without_needle",
    } <= entry["rows"][0].keys()  # fmt: skip
    json.dumps(result)


# ------------------------------------------------------------------------------------------- all tasks and controls


@pytest.fixture(scope="module")
def keyed(examined):
    """The same model, for a run of all tasks; the small tokenizer has few words to lend."""
    settings = copy.deepcopy(examined.settings)
    settings["recall"] |= {"tasks": dict.fromkeys(TASKS, 1.0), "keys": 8}
    settings["recall"] |= {"questions": {"pairs": 3, "span_pairs": 2, "hops": 1, "rules": 4}}
    return dataclasses.replace(examined, settings=settings)


@pytest.fixture(scope="module")
def all_tasks(keyed):
    asked = order(
        TASKS, [1, 7, 20, 21, 22, 40], 16, sizes={"pairs": (1, 3)}, controls=("distractors", "untrained")
    )  # fmt: skip
    return measure(keyed, open_haystack(keyed), asked)


def test_every_task_is_an_entry_and_every_size_one_of_its_own(all_tasks):
    assert list(all_tasks["tasks"]) == [
        "needle", "needle-noise", "keys-1", "keys-3", "induction", "variable-tracking", "instruction",
    ]  # fmt: skip
    for name, size in (("keys-3", {"keys": 3}), ("induction", {"span_pairs": 2}), ("variable-tracking", {"hops": 1})):
        assert all(size.items() <= row.items() for row in all_tasks["tasks"][name]["rows"])
    assert len({entry["total_length"] for entry in all_tasks["tasks"].values()}) == 1
    assert all_tasks["distractors"] == 4


def test_an_untrained_model_is_at_chance_on_every_task_with_and_without_controls(all_tasks):
    for entry in all_tasks["tasks"].values():
        n = sum(row["n"] for row in entry["rows"])
        kinds = [sum(row["correct"] for row in entry["rows"])]
        kinds += [
            round(sum(row[key] * row["n"] for row in entry["rows"]))
            for key in ("accuracy_without_needle", "accuracy_with_distractors")
            if key in entry["rows"][0]
        ]
        for correct in kinds:
            low, high = stats.wilson(correct, n, confidence=0.9999)
            assert low < entry["chance"] < high or entry["task"] == "instruction"  # whose rules it has to know
            assert low < 1 / 8 < high
        asked, right = (sum(row[key] for row in entry["untrained"]) for key in ("n", "correct"))
        low, high = stats.wilson(right, asked, confidence=0.9999)
        assert low < 1 / 8 < high


def test_chance_and_what_naming_any_answer_in_sight_would_give(all_tasks):
    found = {name: (entry["chance"], entry["chance_in_context"]) for name, entry in all_tasks["tasks"].items()}
    assert found["needle"] == (1 / 8, 1.0)
    assert found["keys-3"] == (1 / 8, 1 / 3)
    assert found["induction"] == found["variable-tracking"] == (1 / 8, 1 / 2)
    assert found["instruction"] == (1 / 4, 1 / 4)


def test_pairs_of_every_task_are_identical_beyond_the_reach_and_not_within(all_tasks):
    for entry in all_tasks["tasks"].values():
        assert entry["identical_beyond_reach"] is True
        assert {row["pair_accuracy"] for row in entry["rows"] if row["distance"] > 21} == {0.0}
        assert all(row["identical_pairs"] < 0.5 for row in entry["rows"] if row["distance"] <= 20)
        assert entry["paths"]["agree"] == entry["paths"]["n"]
        assert entry["paths"]["generated_agree"] == entry["paths"]["generated_n"]


def test_distances_that_a_task_can_not_have_are_left_out(all_tasks):
    nearest = {name: entry["rows"][0]["distance"] for name, entry in all_tasks["tasks"].items()}
    assert nearest == {
        "needle": 1, "needle-noise": 1, "keys-1": 7, "keys-3": 7, "induction": 7, "variable-tracking": 20,
        "instruction": 7,
    }  # fmt: skip


def test_distractors_are_older_needles_and_keys_have_theirs_by_definition(all_tasks):
    having = {name for name, entry in all_tasks["tasks"].items() if "accuracy_with_distractors" in entry["rows"][0]}
    assert having == all_tasks["tasks"].keys() - {"keys-1", "keys-3"}


def test_the_same_seed_gives_the_same_result_whatever_else_is_asked(examined, result):
    alone = measure(examined, open_haystack(examined), order(["needle"], DISTANCES, 60))
    assert alone["tasks"]["needle"] == result["tasks"]["needle"]


def test_the_sentences_say_what_the_controls_found(all_tasks):
    said = {name: " ".join(recall.sentences(name, entry)) for name, entry in all_tasks["tasks"].items()}
    assert "Naming any of the values in the text would give 33%." in said["keys-3"]
    assert {name for name, text in said.items() if "With four older needles" not in text} == {"keys-1", "keys-3"}
    for text in said.values():
        assert "Before training, the model answered" in text
        assert "all gave the same logits with another value" in text


# ------------------------------------------------------------------------------------------------------- refusals


def refusal(monkeypatch, capsys, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["eval", *map(str, arguments)])
    try:
        code = cli(module.main)
    except SystemExit as error:  # argparse
        code = error.code
    return code, " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("module", [recall, reach, loss])
def test_a_missing_model_is_refused(monkeypatch, capsys, module, tmp_path):
    code, message = refusal(monkeypatch, capsys, module, tmp_path / "nowhere")
    assert code == 2
    assert "nowhere" in message
    assert "no such folder" in message


@pytest.mark.parametrize("kept", [4, 100, 5000])
def test_a_checkpoint_cut_short_is_refused(monkeypatch, capsys, untrained_run, tmp_path, kept):
    run = shutil.copytree(untrained_run, tmp_path / "run")
    weights = run / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    code, message = refusal(monkeypatch, capsys, recall, run)
    assert code == 2
    assert "model.safetensors can't be read" in message
    assert "it was cut short" in message


def test_another_tokenizer_than_the_one_trained_with_is_refused(monkeypatch, capsys, untrained_run, tmp_path):
    run = shutil.copytree(untrained_run, tmp_path / "run")
    (run / "run.json").write_text(json.dumps({"tokenizer_sha256": "0" * 64}))
    code, message = refusal(monkeypatch, capsys, recall, run)
    assert code == 2
    assert "trained with 000000000000" in message


def test_distances_are_asked_for_in_tokens_or_as_shares_of_window_and_reach():
    assert parse_distances("R+1, 7,W,.5R,R", window=16, reach=90) == (7, 16, 45, 90, 91)
    with pytest.raises(UserError, match="this model has no W"):
        parse_distances("W", window=None, reach=None)


def test_a_stack_of_unbounded_reach_gets_the_distances_of_its_sliding_twin(examined):
    hybrid = dataclasses.replace(examined, specs=(LayerSpec("sliding", 8), LayerSpec("full"), LayerSpec("sliding", 8)))
    assert hybrid.reach is None
    assert nominal_reach(hybrid.specs, 8) == examined.reach == 21
    assert default_distances(hybrid.specs, 8, 4096) == default_distances(examined.specs, 8, 4096)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "needles"], "known: needle, needle-noise"),
        (["--tasks", "keys"], "recall.keys is 32, but the tokenizer offers"),
        (["--tasks", "keys", "--keys", "8"], "--keys 8: keys allows at most 7 with 8 values and 32 keys; lower it"),
        (["--tasks", "keys", "--keys", "two"], "argument --keys: 'two': give a whole number of at least 1"),
        (["--tasks", "keys", "--keys", "2,0"], "argument --keys: '0': give a whole number of at least 1"),
        (["--tasks", "needle", "--hops", "2"], "--hops is for the task variable-tracking; add it to --tasks"),
        (["--hops", "2"], "--hops is for the task variable-tracking; add it to --tasks"),
        (["--controls", "blind"], "argument --controls: unknown 'blind'; known: distractors, untrained"),
        (["--n", "0"], "argument --n: '0': give a whole number of at least 1"),
        (["--distances", "1,two"], "'two' is no distance; give tokens, or shares of W and R"),
        (["--distances", "0"], "at least 1 token"),
        (["--distances", "100000"], "give a longer text"),
        (["--text", "nowhere.txt"], "argument --text: 'nowhere.txt': no such file"),
        (["--compare", "nowhere"], "no such result"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(monkeypatch, capsys, untrained_run, arguments, said):
    code, message = refusal(monkeypatch, capsys, recall, untrained_run, *arguments)
    assert code == 2
    assert said in message


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile
def test_threads_and_compiled_layers_find_what_one_eager_thread_finds(untrained_run, examined, monkeypatch):
    asked = order(["needle"], DISTANCES, 60)
    monkeypatch.setattr(measuring.torch, "get_num_threads", lambda: 1)
    alone = measure(examined, open_haystack(examined), asked)
    monkeypatch.setattr(measuring, "LONG_WORK", 0)
    monkeypatch.setattr(measuring.torch, "get_num_threads", lambda: 2)
    shared = measure(load_model(str(untrained_run), "cpu"), open_haystack(examined), asked)
    for a, b in zip(alone["tasks"]["needle"]["rows"], shared["tasks"]["needle"]["rows"], strict=True):
        assert {k: v for k, v in a.items() if "bits" not in k} == {k: v for k, v in b.items() if "bits" not in k}
        assert a["nll_bits"] == pytest.approx(b["nll_bits"], abs=1e-4)
