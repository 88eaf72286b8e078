"""Planted faults are found, each in its modes and by its name; right implementations raise no alarm."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.conformance.check import check
from model.windows import LayerSpec
from tests.eval.conformance.faults import GLOBAL, HYBRID, PLANTED, SINKS, SLIDING, Planted, W
from tests.eval.conformance.plain import Call, PlainDecoder, Tokens


def test_at_least_thirty_different_faults_are_planted() -> None:
    assert len({planted.what for planted in PLANTED}) >= 30


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.what)
def test_a_planted_fault_is_found_in_its_modes_and_named(planted: Planted) -> None:
    rows = {row["mode"]: {fault["name"] for fault in row["faults"]} for row in check(planted.decoder())["rows"]}
    assert {mode for mode, names in rows.items() if names} == planted.modes
    assert all(rows[mode] & set(planted.name.split(", ")) for mode in planted.modes)


def sdpa(self: PlainDecoder, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~mask.any(-1, keepdim=True), scale=1.0)


def query_by_query(self: PlainDecoder, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None) -> Tensor:
    attend = PlainDecoder.attend
    return torch.cat([attend(self, q[:, :, [i]], k, v, mask[:, :, [i]], sinks) for i in range(q.shape[2])], 2)


def heads_apart(self: PlainDecoder, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None) -> Tensor:
    attend = PlainDecoder.attend
    return torch.cat([attend(self, q[:, [h]], k[:, [h]], v[:, [h]], mask, sinks) for h in range(q.shape[1])], 1)


def sharp(self: PlainDecoder, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None) -> Tensor:
    """Most keys have a weight that is lost in rounding."""
    return PlainDecoder.attend(self, 64 * q, k, v, mask, sinks)


def noisy_in_training(self: PlainDecoder, input_ids: Tensor) -> Tensor:
    embedded = self.embedding(input_ids)
    return embedded + torch.randn_like(embedded) if self.training else embedded


def keeps_all(self: PlainDecoder, spec: LayerSpec, call: Call, tokens: Tokens) -> Tensor:
    return torch.arange(tokens.columns.shape[1])


def in_another_order(self: PlainDecoder, spec: LayerSpec, call: Call, tokens: Tokens) -> Tensor:
    """A ring: the slots of the cache are not in order of age."""
    right = PlainDecoder.kept(self, spec, call, tokens)
    return right.roll(call.past % len(right)) if len(right) else right


def no_positions(self: PlainDecoder, call: Call, tokens: Tokens) -> Tensor:
    return torch.zeros_like(tokens.positions)


SHARP = "scores 64 times as large"  # through the stack, rounding hides some tokens
RIGHT: dict[str, tuple[Any, dict[str, Callable[..., Any]]]] = {
    "sliding": ((SLIDING, SLIDING), {}),
    "windows that grow": ([LayerSpec("sliding", w) for w in (2, 4, 6)], {}),
    "a window of one token": ((LayerSpec("sliding", 1), SLIDING), {}),
    "sliding and full": (HYBRID, {}),
    "full": ((LayerSpec("full"),) * 2, {}),
    "chunked": ((LayerSpec("chunked", W), LayerSpec("chunked", 3)), {}),
    "dilated": ((LayerSpec("dilated", 4, dilation=2), SLIDING), {}),
    "global tokens": (GLOBAL, {}),
    "sinks": (SINKS, {}),
    "scaled_dot_product_attention": ((SLIDING, SLIDING), {"attend": sdpa}),
    "query by query": ((SLIDING, SLIDING), {"attend": query_by_query}),
    "head by head, without positions": ((SLIDING, SLIDING), {"attend": heads_apart, "rope_positions": no_positions}),
    SHARP: ((SLIDING, SLIDING), {"attend": sharp}),
    "random numbers in training": ((SLIDING, SLIDING), {"embed": noisy_in_training}),
    "a cache that keeps everything": ((SLIDING, SLIDING), {"kept": keeps_all}),
    "a ring cache": ((SLIDING, SLIDING), {"kept": in_another_order}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_implementation_raises_no_alarm_and_its_windows_are_reached(name: str) -> None:
    specs, methods = RIGHT[name]
    report = check(PlainDecoder(specs, **methods))
    assert [row["faults"] for row in report["rows"]] == [[]] * 7
    for row in report["rows"]:
        assert all(way["measured"] == report["asked"] for way in row["ways"])
        assert name == SHARP or all(way["stack_as_asked"] for way in row["ways"])
