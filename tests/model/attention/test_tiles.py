"""Tiles and folded layers against the oracle, forward and backward, over random shapes."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention import plan as attention
from model.attention import tiles
from model.attention.composed import ByDocument
from model.attention.reference import Dense, attend_dense
from model.attention.squares import Squares
from model.attention.tiles import Tile, Tiles
from model.packing import Packing, may_see
from model.windows import LayerSpec, visible
from tests.model.attention.oracle import (
    HEADS,
    attend,
    close,
    draw_qkv,
    forget_plans,
    oracle,
    packings,
    plan_for,
    prepared,
    whole,
)


@pytest.fixture
def tiles_for_all(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles for windows and rows of any length. Plans are kept, so those of other tests must go."""
    monkeypatch.setattr(attention, "MIN_TILE_WINDOW", 1)
    forget_plans()
    yield
    forget_plans()


@settings(max_examples=150)
@given(
    st.sampled_from(["sliding", "chunked"]), st.integers(1, 40), st.integers(1, 130), st.sampled_from([1, 2, 4]),
    st.integers(1, 2), st.booleans(), st.integers(0, 9), st.sampled_from([2, 8, 128]),
)  # fmt: skip
def test_tiles_equal_reference(
    kind: str, window: int, total: int, groups: int, batch: int, sink: bool, global_tokens: int, leaf: int
) -> None:
    q, k, v, sinks = draw_qkv(batch, groups, total, seed=total)
    packing = whole(total)
    first = min(global_tokens, window) if kind == "chunked" else global_tokens
    spec, chosen = LayerSpec(kind, window, sink=sink, global_tokens=first), sinks if sink else None
    expected = oracle(q, k, v, spec, packing, chosen)
    with leaves_of(leaf):
        actual = Tiles(window, kind == "sliding", first)(q, k, v, chosen)
    close(actual, expected, [q, k, v, *([sinks] if sink else [])])


@settings(max_examples=300)
@given(st.integers(1, 300), st.integers(1, 100), st.booleans(), st.integers(0, 5), st.sampled_from([1, 4, 16]))
def test_parts_cover_each_wanted_pair_once_and_no_other(
    total: int, window: int, overlap: bool, global_tokens: int, leaf: int
) -> None:
    window, global_tokens = min(total, window), min(global_tokens, window)
    cover = tiles.cover(total, window, overlap, global_tokens, leaf)
    covered = torch.zeros(total, total, dtype=torch.int)
    for part in cover.first + cover.more:
        for q, k, square in squares_of(part) if isinstance(part, Squares) else blocks_of(part):
            covered[q : q + len(square), k : k + square.shape[1]] += square
    spec = LayerSpec("sliding" if overlap else "chunked", window, global_tokens=global_tokens)
    at = torch.arange(total)
    assert torch.equal(covered, visible(spec, at[:, None], at[None]).int())


@contextmanager
def leaves_of(side: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "LEAF", side)
        yield


def blocks_of(tile: Tile) -> Iterator[tuple[int, int, Tensor]]:
    for n in range(tile.blocks):
        part = torch.ones(tile.rows, tile.columns, dtype=torch.int)
        yield tile.query + n * tile.step, tile.key + n * tile.step, part.tril() if tile.causal else part


def squares_of(squares: Squares) -> Iterator[tuple[int, int, Tensor]]:
    for n in range(squares.blocks):
        at, part = squares.query + n * squares.side, torch.ones(squares.side, squares.side, dtype=torch.int)
        yield at, at, part.tril()
        if squares.back:
            yield at, at - squares.back, part.triu(1)


@pytest.mark.usefixtures("tiles_for_all")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from(["sliding", "full", "dilated"]), st.integers(1, 130), st.sampled_from([1, 2, 4]))
def test_packed_and_padded_rows_equal_reference_in_tiles(
    data: st.DataObject, kind: str, total: int, groups: int
) -> None:
    window = None if kind == "full" else data.draw(st.integers(1, 30))
    spec = LayerSpec(kind, window, dilation=data.draw(st.integers(2, 5)) if kind == "dilated" else 1)
    packing = data.draw(packings(2, total))
    q, k, v, _ = draw_qkv(2, groups, total, seed=total)
    expected = oracle(q, k, v, spec, packing, None)
    close(attend(q, k, v, spec, packing, "blocked", None), expected, [q, k, v])


@settings(max_examples=60)
@given(
    st.data(), st.sampled_from(["sliding", "chunked", "dilated"]), st.integers(1, 130), st.sampled_from([1, 2, 4]),
    st.booleans(),
)  # fmt: skip
def test_global_tokens_equal_reference(data: st.DataObject, kind: str, total: int, groups: int, sink: bool) -> None:
    spec = LayerSpec(
        kind, data.draw(st.integers(1, 12)), dilation=data.draw(st.integers(2, 3)) if kind == "dilated" else 1,
        global_tokens=data.draw(st.integers(1, 5)), sink=sink,
    )  # fmt: skip
    packing = data.draw(packings(2, total))
    q, k, v, sinks = draw_qkv(2, groups, total, seed=total)
    chosen = sinks if sink else None
    expected = oracle(q, k, v, spec, packing, chosen)
    actual = attend(q, k, v, spec, packing, "blocked", chosen)
    close(actual, expected, [q, k, v])


@pytest.mark.usefixtures("tiles_for_all")
@pytest.mark.parametrize("kind", ["sliding", "full"])
def test_rows_of_one_document_are_computed_whole_and_all_others_by_document(kind: str) -> None:
    spec = LayerSpec(kind, 7 if kind == "sliding" else None)
    positions, q = torch.arange(30).expand(2, -1), torch.zeros(2, HEADS, 30, 8)
    whole_rows = Packing(positions, torch.zeros(2, 30, dtype=torch.long))
    assert isinstance(prepared(q, spec, whole_rows), Tiles)
    assert isinstance(prepared(q, spec, Packing(positions, torch.full((2, 30), -1))), Dense)  # nothing but padding
    for documents in (
        torch.tensor([[0] * 30, [1] * 30]),
        torch.tensor([[0] * 15 + [1] * 15] * 2),
    ):
        assert isinstance(prepared(q, spec, Packing(positions, documents)), ByDocument)


@pytest.mark.usefixtures("tiles_for_all")
@pytest.mark.parametrize("before", [3, 9, 20])
def test_chunk_behind_a_cache_equals_reference_in_tiles(before: int) -> None:
    spec, total = LayerSpec("sliding", 9), 60
    q, k, v, _ = draw_qkv(2, 2, total, seed=before)
    keys = Packing(torch.arange(total).expand(2, -1), torch.zeros(2, total, dtype=torch.long))
    assert keys.documents is not None
    queries = Packing(keys.positions[:, before:], keys.documents[:, before:])
    actual = plan_for(q, spec).prepare_cached(queries, keys)(q[:, :, before:], k, v, None)
    expected = attend_dense(q[:, :, before:], k, v, may_see(spec, queries, keys))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_tiles_hold_no_scores() -> None:
    """Peak memory grows with n, not with n * W: no tensor is as large as one block's scores."""
    from scripts.benchmarks.timing import peak_bytes

    n, window = 8192, 2048
    q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for _ in range(3))
    held = peak_bytes(lambda: torch.autograd.grad(Tiles(window)(q, k, v).sum(), (q, k, v)))
    assert held < window * window * 4
