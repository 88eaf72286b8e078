"""Claims about the relay map and the heat map: they find a value that is there, and none where none can be."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

from data.tasks.vocabulary import recall_vocabulary
from eval import heat, relay, streams
from eval.haystack import open_haystack
from eval.models import load_model
from eval.recall.order import Order, open_items
from model.errors import cli
from model.windows import LayerSpec
from training.run import checkpoint

VALUES = 8  # of the run


@pytest.fixture(scope="module")
def examined(untrained_run):
    return load_model(str(untrained_run), "cpu")


@pytest.fixture(scope="module")
def carrier(untrained_run):
    """The untrained model, its attention writing the mean of what it sees on top of the stream: values spread."""
    carried = load_model(str(untrained_run), "cpu")
    with torch.no_grad():
        for layer in carried.model.model.layers:
            attention = layer.self_attn
            attention.q_proj.weight.zero_()
            attention.v_proj.weight.copy_(torch.eye(*attention.v_proj.weight.shape))
            attention.o_proj.weight.mul_(12)
            layer.mlp.down_proj.weight.zero_()
    return carried


@pytest.fixture(scope="module")
def found(carrier):
    return relay.measure(carrier, open_haystack(carrier), n=320)


def call(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["eval", *map(str, arguments)])
    try:
        return cli(module.main)
    except SystemExit as error:  # argparse
        return error.code


def test_the_map_has_a_row_for_each_stream_and_its_frontier_is_the_reach_of_the_layers_so_far(found):
    assert found["frontier"] == [0, 7, 14, 21]
    assert np.array(found["accuracy"]).shape == (4, len(found["offsets"]))
    assert found["offsets"][0] == 1
    assert found["offsets"][-1] == 21 + 8
    assert found["read_by"] == "linear probe"
    assert found["n"] == 160


def test_a_value_that_is_carried_is_read_and_none_is_read_beyond_the_frontier(found):
    accuracy, offsets = np.array(found["accuracy"]), np.array(found["offsets"])
    assert accuracy[1, offsets < 7].mean() > 0.5
    assert accuracy[2, (offsets > 7) & (offsets <= 10)].mean() > 0.25
    for row, limit in zip(accuracy, found["frontier"], strict=True):
        beyond = row[offsets > limit]
        assert abs(beyond.mean() - 1 / VALUES) < 0.05


def test_streams_beyond_the_frontier_are_bit_identical(found, carrier):
    assert found["pairs_beyond_frontier"] > 0
    assert found["identical_beyond_frontier"] is True
    narrower = dataclasses.replace(carrier, specs=(LayerSpec("sliding", 5),) * 3)
    assert relay.measure(narrower, open_haystack(carrier), n=16)["identical_beyond_frontier"] is False


def test_layers_taken_in_groups_give_the_same_map(carrier, monkeypatch):
    whole = relay.measure(carrier, open_haystack(carrier), n=32)
    monkeypatch.setattr(streams, "KEPT_BYTES", 1)
    assert relay.measure(carrier, open_haystack(carrier), n=32) | {"seconds": 0} == whole | {"seconds": 0}


@pytest.mark.parametrize("rows", [6, 40])
def test_ridge_solves_its_normal_equations_for_few_and_for_many_rows(rows):
    x, y = torch.randn(2, rows, 16, dtype=torch.float64), torch.randn(rows, 3, dtype=torch.float64)
    w = streams.ridge(x, y, penalty=0.7)
    assert torch.allclose(x.transpose(1, 2) @ (x @ w - y) + 0.7 * w, torch.zeros_like(w), atol=1e-9)


def test_a_probe_reads_rows_that_it_was_not_fit_on():
    labels = torch.arange(200) % 4
    means = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    stream = means[labels] + 0.1 * torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    read = streams.linear_probe(labels, 4)(torch.stack([stream, torch.randn(200, 8)]))
    assert read.shape == (2, 100)
    right = (read == labels[100:]).float().mean(1)
    assert right[0] > 0.98
    assert right[1] < 0.5


def test_the_trained_head_is_taken_from_the_checkpoint_where_there_is_one(carrier, untrained_run, tmp_path):
    vocabulary = recall_vocabulary(carrier.tokenizer, VALUES)
    rows = streams.make_texts(open_haystack(carrier), vocabulary, 400, 8, 4, seed=0)
    stream = streams.streams(carrier, rows.first, [rows.value_at + 2], [3])[:, 0]
    normed = carrier.model.model.norm(stream)
    weight = streams.ridge(normed, torch.nn.functional.one_hot(rows.labels, VALUES).float() - 1 / VALUES, 1.0)[0].T
    (tmp_path / "checkpoints").mkdir()
    checkpoint.save_checkpoint(tmp_path, 1, {}, {"relay_head": weight}, carrier.model.save_pretrained)
    run = dataclasses.replace(carrier, run_dir=tmp_path)
    by_head = relay.measure(run, open_haystack(carrier), n=200, seed=1)
    assert by_head["read_by"] == "relay head"
    assert by_head["n"] == 200
    assert by_head["accuracy"][3][by_head["offsets"].index(2)] > 0.4
    assert relay.measure(run, open_haystack(carrier), n=200, how="probe")["read_by"] == "linear probe"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--n", "3"], "argument --n: '3': give a whole number of at least 4"),
        (["--max-offset", "0"], "argument --max-offset: '0': give a whole number of at least 1"),
        (["--read", "head"], "has no checkpoint with a relay head for 8 values; use --read probe"),
        (["--max-offset", "1000000"], None),
    ],
)
def test_arguments_of_the_relay_map(monkeypatch, capsys, untrained_run, tmp_path, arguments, said):
    code = call(monkeypatch, relay, untrained_run, "--device", "cpu", "--out", tmp_path, "--n", "8", *arguments)
    assert code == (2 if said else 0)
    assert (said or "") in capsys.readouterr().err
    assert said or json.loads((tmp_path / "relay.json").read_text())["offsets"][-1] == 29
    assert said or (tmp_path / "relay.png").stat().st_size > 0


# ------------------------------------------------------------------------------------------------------- heat map


@pytest.fixture(scope="module")
def heated(untrained_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("heat")
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, heat, untrained_run, "--device", "cpu", "--out", out, "--n", 6, "--depths", 4) == 0
    assert (out / "heat.png").stat().st_size > 0
    return json.loads((out / "heat.json").read_text())


def test_every_length_has_every_depth_once_and_its_own_distances(heated):
    places = [(cell["length"], cell["depth"]) for cell in heated["cells"]]
    assert len(set(places)) == len(places) == len(heated["lengths"]) * len(heated["depths"])
    assert len(heated["lengths"]) >= 2
    for cell in heated["cells"]:
        assert 1 <= cell["distance"] <= cell["farthest"] < cell["length"]
        assert (cell["distance"] == 1) == (cell["depth"] == 1)
        assert (cell["distance"] == cell["farthest"]) == (cell["depth"] == 0)


def test_the_line_of_r_crosses_the_map_and_pairs_above_it_are_identical(heated):
    beyond = [cell["identical_pairs"] for cell in heated["cells"] if cell["distance"] > heated["reach"]]
    assert beyond
    assert set(beyond) == {1.0}
    assert any(cell["identical_pairs"] < 1 for cell in heated["cells"] if cell["distance"] <= heated["reach"])


@pytest.mark.parametrize("length", [32, 64, 544])
def test_items_are_as_long_as_the_length_that_was_asked_for(examined, length):
    distances = heat.distances_of(length, 4)
    order = Order(("needle",), tuple(distances), n=1, seed=0, precision="fp32")
    (entry,) = open_items(examined, open_haystack(examined), order)
    assert entry.total_length == length


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "nedle"], "invalid choice: 'nedle' (choose from"),
        (["--depths", "1"], "argument --depths: '1': give a whole number of at least 2"),
        (["--n", "0"], "argument --n: '0': give a whole number of at least 1"),
        (["--lengths", "64,long"], "argument --lengths: 'long': give a whole number of at least 1"),
        (["--lengths", "32", "--depths", "20"], "with --depths 20 a length is at least 36 tokens"),
    ],
)
def test_arguments_of_the_heat_map_that_make_no_sense_are_refused(monkeypatch, capsys, untrained_run, arguments, said):
    assert call(monkeypatch, heat, untrained_run, "--device", "cpu", *arguments) == 2
    assert said in capsys.readouterr().err
