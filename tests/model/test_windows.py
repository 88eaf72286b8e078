"""What a layer sees, and how far a stack reaches, against definitions written out in loops."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import UserError
from model.windows import (
    LayerSpec,
    cone,
    farthest_source,
    keys_per_query,
    one_layer_back,
    reach,
    reach_of_other_tokens,
    reachable,
    visible,
    window_times_layers,
)


def sees(spec: LayerSpec, i: int, j: int) -> bool:
    """The definition, one pair at a time."""
    if j > i:
        return False
    if j < spec.global_tokens or spec.kind == "full":
        return True
    assert spec.window is not None
    if spec.kind == "chunked":
        return i // spec.window == j // spec.window
    return (i - j) in {n * spec.dilation for n in range(spec.window)}


@st.composite
def layers(draw: st.DrawFn, max_window: int = 6, bounded: bool = False) -> LayerSpec:
    kind = draw(st.sampled_from(["sliding", "chunked", "dilated"] + ([] if bounded else ["full"])))
    return LayerSpec(
        kind,
        window=None if kind == "full" else draw(st.integers(1, max_window)),
        dilation=draw(st.integers(1, 4)) if kind == "dilated" else 1,
        global_tokens=0 if bounded else draw(st.integers(0, 3)),
    )


@given(layers(), st.integers(0, 40))
def test_visibility_is_its_definition_for_every_kind(spec: LayerSpec, last: int) -> None:
    positions = torch.arange(last + 1)
    expected = [[sees(spec, i, j) for j in range(last + 1)] for i in range(last + 1)]
    assert visible(spec, positions[:, None], positions[None, :]).tolist() == expected


@given(layers())
def test_every_query_sees_itself_and_never_the_future(spec: LayerSpec) -> None:
    positions = torch.arange(40)
    seen = visible(spec, positions[:, None], positions[None, :])
    assert seen.diagonal().all()
    assert not seen.triu(1).any()


@given(st.integers(1, 9))
def test_sliding_window_counts_the_current_token(window: int) -> None:
    positions = torch.arange(2 * window + 3)
    seen = visible(LayerSpec("sliding", window), positions[-1], positions)
    assert seen.sum() == window
    assert seen.nonzero().min() == positions[-1] - window + 1


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 50))
def test_ring_slots_are_enough_for_the_next_query(window: int, dilation: int, query: int) -> None:
    for spec in (LayerSpec("sliding", window), LayerSpec("chunked", window), LayerSpec("dilated", window, dilation)):
        keys = torch.arange(query + 1)
        seen = keys[visible(spec, torch.tensor(query), keys)]
        assert spec.ring_slots is not None
        assert query - seen.min() < spec.ring_slots


def reachable_by_matrices(specs: list[LayerSpec], length: int) -> torch.Tensor:
    positions = torch.arange(length)
    paths = torch.eye(length)
    for spec in specs:
        seen = visible(spec, positions[:, None], positions[None, :]).float()
        paths = ((seen + torch.eye(length)).clamp(max=1) @ paths).clamp(max=1)
    return paths.bool()


@given(st.lists(layers(max_window=4), min_size=2, max_size=4), st.integers(2, 50))
def test_reachable_is_the_product_of_the_masks(specs: list[LayerSpec], length: int) -> None:
    assert torch.equal(reachable(specs, length), reachable_by_matrices(specs, length)[-1].flip(0))


@given(st.lists(layers(max_window=4, bounded=True), min_size=2, max_size=4))
def test_closed_form_of_reach_is_the_farthest_boolean_path_of_any_query(specs: list[LayerSpec]) -> None:
    border = math.lcm(*(s.window or 1 for s in specs if s.kind == "chunked"))
    length = 2 * border + 1 + sum(s.ring_slots or 0 for s in specs)
    paths = reachable_by_matrices(specs, length)
    distances = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    assert reach(specs) == int(distances[paths].max())


@given(layers(max_window=5), st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 9))
def test_one_layer_back_is_the_union_of_the_rows_of_the_mask(spec: LayerSpec, chosen: list[bool], rows: int) -> None:
    reached, positions = torch.tensor(chosen), torch.arange(len(chosen))
    seen = visible(spec, positions[:, None], positions[None, :])
    assert torch.equal(one_layer_back(spec, reached, rows), seen[reached].any(0))


@given(st.lists(layers(max_window=4), min_size=2, max_size=5), st.integers(2, 40))
def test_cone_grows_and_ends_in_what_is_reachable(specs: list[LayerSpec], length: int) -> None:
    rows = cone(specs, length)
    assert rows[0].nonzero().flatten().tolist() == [length - 1]
    assert not (rows[:-1] & ~rows[1:]).any()
    assert torch.equal(rows[-1].flip(0), reachable(specs, length))
    assert torch.equal(rows[1], one_layer_back(specs[-1], rows[0]))


def lengths_of_a_period(specs: list[LayerSpec]) -> range:
    """Sequences so long that no reach meets their start, one for each place of the last token between borders."""
    period = math.lcm(*(s.window or 1 for s in specs if s.kind == "chunked"))
    least = sum(s.ring_slots or 0 for s in specs) + max(s.global_tokens for s in specs) + 1
    return range(least, least + period)


@settings(max_examples=60)
@given(st.lists(layers(max_window=5), min_size=2, max_size=4))
def test_reach_is_the_farthest_reachable_distance_for_stacks_of_all_kinds_in_any_order(specs: list[LayerSpec]) -> None:
    first = max(spec.global_tokens for spec in specs)
    farthest = 0
    for length in lengths_of_a_period(specs):
        seen = reachable(specs, length)
        if any(spec.kind == "full" for spec in specs):
            assert seen.all()
            continue
        others = seen[: length - first].nonzero().flatten()
        assert seen[length - first :].all(), "every global token is seen"
        farthest = max(farthest, int(others.max()))
    unbounded = first > 0 or any(spec.kind == "full" for spec in specs)
    assert reach(specs) == (None if unbounded else farthest)
    if any(spec.kind == "full" for spec in specs):
        assert reach_of_other_tokens(specs) is None
    else:
        assert reach_of_other_tokens(specs) == farthest


@given(st.lists(layers(max_window=6, bounded=True), min_size=2, max_size=5), st.integers(0, 60))
def test_the_farthest_source_of_a_query_is_its_farthest_boolean_path(specs: list[LayerSpec], query: int) -> None:
    far = query + sum(spec.ring_slots or 0 for spec in specs)
    source = farthest_source(specs, far)
    assert source >= 0
    assert int(reachable(specs, far + 1).nonzero().max()) == far - source


def reach_by_trying_every_place(specs: list[LayerSpec]) -> int:
    period = math.lcm(*(s.window or 1 for s in specs if s.kind == "chunked"))
    return max(place - farthest_source(specs, place) for place in range(period))


chunks = st.builds(LayerSpec, st.just("chunked"), st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12]))


@given(st.lists(st.one_of(chunks, chunks, layers(max_window=9, bounded=True)), min_size=1, max_size=9))
def test_reach_of_chunked_layers_is_the_largest_of_all_places_of_the_query(specs: list[LayerSpec]) -> None:
    assert reach(specs) == reach_by_trying_every_place(specs)


def test_reach_of_chunked_windows_without_common_factor_is_exact_and_fast() -> None:
    specs = [LayerSpec("chunked", 1021), LayerSpec("chunked", 1019)] * 16
    started = time.process_time()
    found = reach(specs)
    assert time.process_time() - started < 4.0, "seconds of the processor"
    ends_of_blocks = range(1018, 1019 * 1021, 1019)  # of the top layer; no other place reaches farther
    assert found == max(place - farthest_source(specs, place) for place in ends_of_blocks)


def test_chunked_windows_whose_borders_hardly_ever_coincide_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        reach([LayerSpec("chunked", window) for window in (4093, 4099)] * 4)
    assert str(caught.value) == (
        "the borders of chunked windows [4093, 4099] coincide only every 16,777,207 tokens, too many to work out the "
        "reach; choose windows that divide each other"
    )


def test_reach_of_mistral_by_boolean_reachability_at_a_sixteenth_of_its_size() -> None:
    specs = [LayerSpec("sliding", 256)] * 32
    assert int(reachable(specs, 8192).nonzero().max()) == reach(specs) == 32 * 255


@given(st.integers(1, 6), st.integers(2, 5))
def test_reach_of_equal_layers_is_layers_times_window_less_one(window: int, depth: int) -> None:
    specs = [LayerSpec("sliding", window)] * depth
    steps = reachable(specs, depth * window + 3).nonzero().max()
    assert reach(specs) == depth * (window - 1) == steps


@pytest.mark.parametrize("spec", [LayerSpec("full"), LayerSpec("sliding", 4, global_tokens=1)])
def test_reach_is_unbounded_with_a_layer_that_sees_the_start(spec: LayerSpec) -> None:
    assert reach([LayerSpec("sliding", 4), spec]) is None


def test_chunked_layers_alone_never_leave_their_chunk_and_a_sliding_layer_carries_over_the_border() -> None:
    assert reach([LayerSpec("chunked", 4)] * 8) == 3
    assert reach([LayerSpec("chunked", 4), LayerSpec("sliding", 2), LayerSpec("chunked", 4)]) == 7


def test_headline_figure_is_the_sum_of_windows() -> None:
    assert window_times_layers([LayerSpec("sliding", 4096)] * 32) == 131_072
    assert window_times_layers([LayerSpec("dilated", 4, dilation=2), LayerSpec("sliding", 3)]) == 11
    assert window_times_layers([LayerSpec("sliding", 4), LayerSpec("full")]) is None
    assert window_times_layers([LayerSpec("sliding", 4, global_tokens=2)] * 3) == 12


@given(st.lists(layers(max_window=9, bounded=True), min_size=1, max_size=6))
def test_headline_figure_exceeds_the_reach_by_the_layers_at_least_and_by_no_more_if_all_slide(
    specs: list[LayerSpec],
) -> None:
    headline, far = window_times_layers(specs), reach(specs)
    assert headline is not None
    assert far is not None
    assert headline - far >= len(specs)
    if all(spec.kind == "sliding" for spec in specs):
        assert headline - far == len(specs)


@given(layers(), st.integers(1, 40))
def test_keys_per_query_is_the_mean_of_the_mask(spec: LayerSpec, length: int) -> None:
    pairs = sum(sees(spec, i, j) for i in range(length) for j in range(length))
    assert keys_per_query(spec, length) == pytest.approx(pairs / length)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "slidng"}, "layer kind 'slidng' is unknown; choose one of sliding, full, chunked, dilated"),
        ({"kind": "full", "window": 4}, "a full layer has no window, but window is 4; remove it"),
        ({"kind": "sliding"}, "a sliding layer needs window >= 1, but window is None"),
        ({"kind": "chunked", "window": 0}, "a chunked layer needs window >= 1, but window is 0"),
        (
            {"kind": "sliding", "window": 4, "dilation": 2},
            "dilation is 2 on a sliding layer; only dilated layers take one, >= 1",
        ),
        (
            {"kind": "dilated", "window": 4, "dilation": 0},
            "dilation is 0 on a dilated layer; only dilated layers take one, >= 1",
        ),
        ({"window": 4, "global_tokens": -1}, "global_tokens is -1; it must be >= 0"),
    ],
)
def test_a_layer_that_means_nothing_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        LayerSpec(**fields)
    assert str(caught.value) == message
