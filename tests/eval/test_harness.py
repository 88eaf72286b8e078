"""Claims about the tasks for lm-evaluation-harness: what becomes text comes back as the same tokens and distances."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from data.tokenizer import HubTokenizer
from eval.harness import recall_by_distance as pack
from eval.models import load_model
from model.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DISTANCES = [1, 8, 21, 30]
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (docs/harness.md says how)"
)


@pytest.fixture(scope="module")
def asked(untrained_run):
    """What `--model_args` and `--metadata` hand to the pack."""
    return {
        "pretrained": str(untrained_run / "hf"),
        "text": str(untrained_run.parent / "heldout.txt"),
        "distances": DISTANCES,
        "values": 8,
        "n": 6,
    }


@pytest.fixture(scope="module")
def rows(asked):
    return list(pack.documents(**asked)["test"])


def test_distances_are_exact_in_the_tokens_that_the_harness_makes_of_the_text(asked, rows):
    tokenizer = HubTokenizer(pack.AutoTokenizer.from_pretrained(asked["pretrained"]))
    for row in rows:
        tokens = tokenizer.encode(row["context"])
        (value,) = tokenizer.encode(row["choices"][row["answer"]])
        assert tokens.count(value) == 1
        assert len(tokens) - 1 - tokens.index(value) == row["distance"]
        assert len(tokens) == DISTANCES[-1] + pack.MARGIN
        assert tokenizer.encode(row["context"] + row["choices"][row["answer"]]) == [*tokens, value]


def test_distances_alternate_so_that_a_limit_shortens_all_alike(rows):
    assert [row["distance"] for row in rows] == DISTANCES * 6


def test_the_default_distances_are_the_protocols_for_the_models_own_windows(asked):
    asked = asked | {"distances": None, "n": 1}
    assert {1, 7, 8, 9, 20, 21, 22, 24, 32} <= set(pack.documents(**asked)["test"]["distance"])
    assert max(pack.documents(**asked, max_distance=21)["test"]["distance"]) == 21


def test_a_choice_is_right_when_it_is_the_likeliest_and_a_generation_when_it_is_the_value():
    row = {"answer": 1, "distance": 8, "choices": ["<v00>", "<v01>"]}
    assert pack.score_choice(row, [(-3.0, False), (-2.0, False)]) == {"recall": 1.0, "recall@8": 1.0}
    assert pack.score_choice(row, [(-1.0, True), (-2.0, False)]) == {"recall": 0.0, "recall@8": 0.0}
    assert pack.score_generated(row, [" <v01> "])["recall"] == 1.0
    assert pack.score_generated(row, ["<v00>"])["recall@8"] == 0.0


def test_refusals(asked):
    with pytest.raises(UserError, match="give --model_args pretrained=FOLDER"):
        pack.documents()
    with pytest.raises(UserError, match="the harness cuts the front of what is longer than"):
        pack.documents(**(asked | {"distances": [1_000_000]}))
    for wrong in (16, "16", [16, "64"], [0]):
        with pytest.raises(UserError, match=r"distances is .*; give a list of tokens"):
            pack.documents(**(asked | {"distances": wrong}))


@pytest.mark.parametrize("task", ["windreach_recall", "windreach_recall_generate"])
def test_both_tasks_name_functions_that_are_there(task):
    class Loader(yaml.SafeLoader):
        """Reads `!function module.name` as the name."""

    Loader.add_constructor("!function", lambda loader, node: node.value)
    described = yaml.load((ROOT / "eval/harness" / f"{task}.yaml").read_text(), Loader)  # a SafeLoader
    assert described["task"] == task
    for key in ("custom_dataset", "process_results"):
        module, name = described[key].split(".")
        assert module == "recall_by_distance"
        assert callable(getattr(pack, name))


@needs_harness
def test_the_harness_finds_what_the_logits_say(asked, rows, untrained_run, tmp_path):
    metadata = {key: asked[key] for key in ("text", "distances", "values", "n")}
    subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "8"),
            *("--model_args", f"pretrained={asked['pretrained']}", "--include_path", str(ROOT / "eval" / "harness")),
            *("--tasks", "windreach_recall,windreach_recall_generate", "--metadata", json.dumps(metadata)),
            *("--output_path", str(tmp_path)),
        ],
        check=True, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=300,
    )  # fmt: skip
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["windreach_recall"]
    examined = load_model(str(untrained_run), "cpu")
    right: dict[int, list[bool]] = {distance: [] for distance in DISTANCES}
    for row in rows:
        ids = torch.tensor([examined.tokenizer.encode(row["context"])])
        values = [examined.tokenizer.encode(choice)[0] for choice in row["choices"]]
        with torch.no_grad():
            logits = examined.model(input_ids=ids).logits[0, -1, values]
        right[row["distance"]].append(int(logits.argmax()) == row["answer"])
    for distance, hits in right.items():
        assert found[f"recall@{distance},none"] == pytest.approx(sum(hits) / len(hits))
