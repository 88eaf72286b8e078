"""The cliff test: every kind of layer, every backend, every way to feed a model; and that it finds a fault."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.models import Examined
from eval.reach import cliff
from model import hub, windows
from model.decoder import WindreachForCausalLM
from model.errors import UserError
from model.windows import LayerSpec
from tests.model.tiny import VOCAB, tiny_model

W = 5
STACKS: dict[str, list[dict[str, Any]]] = {
    "sliding": [{"window": W}] * 3,
    "growing": [{"window": 2}, {"window": 4}, {"window": 7}],
    "chunked": [{"kind": "chunked", "window": W}] * 3,
    "chunked and sliding": [{"kind": "chunked", "window": W}, {"window": 3}, {"kind": "chunked", "window": 4}],
    "dilated": [{"kind": "dilated", "window": 3, "dilation": 2}, {"window": 4}],
    "only dilated": [{"kind": "dilated", "window": 3, "dilation": 3}] * 2,
    "sinks": [{"window": W, "sink": True}, {"window": 3, "rope": False}],
    "mixed": [{"kind": "dilated", "window": 3, "dilation": 2}, {"kind": "chunked", "window": 4}, {"window": 3}],
    "global": [{"window": 4, "global_tokens": 2}, {"window": 3}],
    "wide": [{"window": 40}, {"window": 3}],
    "tiles": [{"window": 128}, {"window": 128}],
}
FULL = {"full": [{"kind": "full"}] * 2, "hybrid": [{"window": W}, {"window": W}, {"kind": "full"}]}


@pytest.fixture(scope="module")
def examine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Examined]:
    """A tiny model of a kind, from its checkpoint on disk."""
    made: dict[str, Examined] = {}

    def get(stack: str) -> Examined:
        if stack not in made:
            folder: Path = tmp_path_factory.mktemp("checkpoint")
            hub.save_hf(tiny_model({**STACKS, **FULL}[stack]), folder)
            model = WindreachForCausalLM.from_pretrained(folder)
            tokenizer = SimpleNamespace(vocab_size=VOCAB)
            made[stack] = Examined(stack, model, tokenizer, model.config.specs, folder, None)
        return made[stack]

    return get


def under(examined: Examined, backend: str) -> Examined:
    """The checkpoint under a backend; skipped, with the reason, where that is not to be had."""
    try:
        return replace(examined, model=WindreachForCausalLM.from_pretrained(str(examined.folder), backend=backend))
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("backend", cliff.BACKENDS)
@pytest.mark.parametrize("stack", STACKS)
def test_a_token_changes_the_logits_exactly_when_it_has_a_path_to_the_query_however_the_model_is_fed(
    stack: str, backend: str, examine: Callable[[str], Examined]
) -> None:
    examined = under(examine(stack), backend)
    length = cliff.cliff_length(examined.specs)
    assert length is not None
    reachable = windows.reachable(examined.specs, length)
    every = length < 128
    probe = cliff.make_probe(reachable, range(length) if every else cliff.cliff_distances(reachable, [1]), VOCAB)
    assert not reachable.all()
    assert length > 2 * max(spec.ring_slots or 0 for spec in examined.specs)
    ways = {"full forward": lambda ids: cliff.feed(examined, ids), **cliff.ways_to_feed(examined)}
    for way, logits in ways.items():
        rows = cliff.compare(way, logits, probe)
        unavailable = [row for row in rows if "unavailable" in row]
        if unavailable:
            assert "global tokens" in unavailable[0]["unavailable"], way
            continue
        wrong = [row for row in rows if row["equal"] != row["expected"]]
        assert not wrong, way


@pytest.mark.parametrize("stack", ["sliding", "mixed", "global"])
def test_the_test_takes_every_backend_and_every_way_or_says_why_not(
    stack: str, examine: Callable[[str], Examined]
) -> None:
    examined = examine(stack)
    rows, note = cliff.cliff(examined)
    assert note is None
    assert cliff.cliff_holds(rows)
    paths = {row["path"] for row in rows}
    assert paths >= {f"forward, {backend}" for backend in cliff.BACKENDS} | set(cliff.ways_to_feed(examined))
    assert paths >= {"packed documents", "token by token", "left-padded batch", "behind another document"}
    done = {row["path"] for row in rows if "equal" in row}
    assert done >= {"forward, reference", "forward, blocked"}
    assert all(row["unavailable"] for row in rows if row["path"] not in done)


def test_chunks_are_below_at_and_above_each_window_and_longer_than_two() -> None:
    assert cliff.chunk_sizes([LayerSpec("sliding", 8), LayerSpec("dilated", 5, dilation=4)]) == [
        7, 8, 9, 19, 20, 21, 43,
    ]  # fmt: skip
    assert cliff.chunk_sizes([LayerSpec("full")]) == [15, 16, 17, 35]


@pytest.mark.parametrize("stack", ["sliding", "only dilated", "chunked", "sinks"])
def test_a_model_that_sees_farther_than_it_is_said_to_is_found_out(
    stack: str, examine: Callable[[str], Examined]
) -> None:
    examined = examine(stack)
    said = [replace(spec, window=spec.window - 1) for spec in examined.specs if spec.window]
    rows, _ = cliff.cliff(replace(examined, specs=tuple(said)))
    assert not cliff.cliff_holds(rows)
    caught = {row["path"] for row in rows if row.get("expected") and not row["equal"]}
    assert caught >= {"forward, reference", "forward, blocked", "token by token", "left-padded batch"}


def test_a_document_that_leaks_is_found_out(
    examine: Callable[[str], Examined], monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_one(examined: Examined, ids: Tensor, other: Tensor, size: int | None = None) -> Tensor:
        return cliff.feed(examined, torch.cat((other, ids), 1), size)

    monkeypatch.setattr(cliff, "behind_document", as_one)
    rows = cliff._between_documents(examine("sliding"), 0, 100)
    assert not cliff.cliff_holds(rows)


@pytest.mark.parametrize("stack", FULL)
def test_a_full_layer_leaves_only_other_documents_to_test_and_that_is_said(
    stack: str, examine: Callable[[str], Examined]
) -> None:
    rows, note = cliff.cliff(examine(stack))
    assert note == "a full layer sees every earlier token: no distance is beyond the reach"
    assert {row["path"].split(",")[0] for row in rows} == {"packed documents"}
    assert cliff.cliff_holds(rows)


def test_a_reach_too_long_to_run_is_said_with_both_numbers(examine: Callable[[str], Examined]) -> None:
    rows, note = cliff.cliff(examine("sliding"), max_tokens=20)
    assert note == "a sequence longer than the reach has 24 tokens, more than the limit 20"
    assert {row["path"].split(",")[0] for row in rows} == {"packed documents"}


def test_beyond_the_reach_only_global_tokens_are_seen(examine: Callable[[str], Examined]) -> None:
    specs = examine("global").specs
    length = cliff.cliff_length(specs)
    assert length is not None
    far = windows.reach_of_other_tokens(specs)
    assert far == 5
    seen = windows.reachable(specs, length).nonzero().flatten().tolist()
    assert [length - 1 - d for d in seen if d > far] == [1, 0]


def test_the_last_token_stands_where_its_reach_is_attained() -> None:
    for specs in (
        [LayerSpec("chunked", 7)] * 4,
        [LayerSpec("chunked", 6), LayerSpec("sliding", 4), LayerSpec("chunked", 5), LayerSpec("dilated", 3, 2)],
    ):
        length = cliff.cliff_length(specs)
        assert length is not None
        assert windows.reachable(specs, length).nonzero().max() == windows.reach(specs)


def test_the_last_row_changes_all_that_has_no_path_and_no_more() -> None:
    reachable = torch.tensor([True, False, True, False, False])
    probe = cliff.make_probe(reachable, [2, 3], VOCAB)
    moved = (probe.before != probe.after).int().tolist()
    assert moved == [[0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [1, 1, 0, 1, 0]]
    assert [change["expected"] for change in probe.changes] == [False, True, True]
    assert [change["distance"] for change in probe.changes] == [2, 3, 1]
