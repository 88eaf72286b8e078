"""Where a relay carries a value to: one pass over a sequence answers every distance at once.

The sequence is filler with one value. Each token behind the value is a query, and its distance is its position minus
the value's. A second pass has the complement of the value, so that every bit is read in both states. Recall at a
distance is 1 if both values are read right there. Where no value can arrive, the two passes must agree in every bit.

Legend: T positions, V vocabulary.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from eval.command import progress
from eval.proof.weights import FILLER, VALUES
from eval.reach.cliff import DENSE_LIMIT
from model import hub, windows
from model.decoder import WindreachForCausalLM
from model.windows import LayerSpec

Logits = Callable[[Tensor], Tensor]  # token ids (1, T) -> logits (T, V)
VALUE, COMPLEMENT = 6, VALUES - 1 - 6
LEAD = 3  # filler tokens in front of the value, which must not change
BEYOND = 16  # tokens behind the farthest distance of interest


def arrivals(specs: Sequence[LayerSpec], at: int, length: int, rows: int = 1024) -> Tensor:
    """Which of `length` positions have a path from position `at` through all layers, as bool (T,).

    >>> arrivals([LayerSpec("sliding", 3)] * 2, at=1, length=7).int().tolist()
    [0, 1, 1, 1, 1, 1, 0]
    """
    positions = torch.arange(length)
    arrived = positions == at
    for spec in specs:
        before = arrived.clone()
        for queries in positions.split(rows):
            first = 0 if spec.ring_slots is None else max(0, int(queries[0]) - spec.ring_slots + 1)
            keys = torch.cat((positions[: min(first, spec.global_tokens)], positions[first : int(queries[-1]) + 1]))
            keys, queries = keys[before[keys]], queries[~before[queries]]
            arrived[queries] |= windows.visible(spec, queries[:, None], keys).any(1)
    return arrived


def plantings(specs: Sequence[LayerSpec]) -> list[int]:
    """Positions for the value: one from which it gets as far as any does, and 0 where that is a global token.

    Where chunked layers make the reach depend on the position, all positions of a period are compared.
    """
    tokens = max(spec.global_tokens for spec in specs)
    others, reach = [replace(spec, global_tokens=0) for spec in specs], windows.reach_of_other_tokens(specs)
    at = tokens + LEAD
    if reach is not None:
        period = math.lcm(*(spec.window or 1 for spec in specs if spec.kind == "chunked"))
        queries = at + reach + np.arange(period)
        sources = windows.farthest_source(others, queries)
        at = int(sources[(queries - sources).argmax()])
    return [0, at] if tokens else [at]


def default_tokens(specs: Sequence[LayerSpec]) -> int:
    """Tokens behind the value: somewhat more than W·k, where a full layer counts as 64."""
    return sum(spec.ring_slots or 64 for spec in specs) + BEYOND


@torch.inference_mode()
def logits_of(model: Any, input_ids: Tensor, size: int | None = None) -> Tensor:
    """Logits (T, V) of one forward pass, or of `size` tokens at a time through the model's own cache."""
    cache, parts = None, []
    for chunk in input_ids.to(model.device).split(size or input_ids.shape[1], 1):
        output = model(input_ids=chunk, past_key_values=cache, use_cache=size is not None)
        cache = output.past_key_values
        parts.append(output.logits[0].float().cpu())
    return torch.cat(parts)


def paths(model: WindreachForCausalLM, length: int, chosen: Sequence[str]) -> Iterator[tuple[str, Logits]]:
    """The chosen paths from tokens to logits that a sequence of `length` tokens has room for."""
    chunk = min(spec.window or 64 for spec in model.config.specs) + 1
    short = length <= DENSE_LIMIT
    if "forward" in chosen:
        yield "forward", partial(logits_of, model)
    if "reference" in chosen and short:
        yield "forward, reference", partial(_by_backend, model, "reference")
    if "cache" in chosen:
        yield f"cache, {chunk:,} tokens at a time", partial(logits_of, model, size=chunk)
    if "token" in chosen and short:
        yield "cache, token by token", partial(logits_of, model, size=1)
    if "export" in chosen:
        exported = export(model)
        yield f"exported {type(exported).__name__}", partial(logits_of, exported, size=None if short else chunk)


def _by_backend(model: WindreachForCausalLM, backend: str, input_ids: Tensor) -> Tensor:
    before, model.config.attention_backend = model.config.attention_backend, backend
    try:
        return logits_of(model, input_ids)
    finally:
        model.config.attention_backend = before


def export(model: WindreachForCausalLM) -> Any:
    """The model as a checkpoint on disk gives it back: of a class of transformers where one can express the stack."""
    with tempfile.TemporaryDirectory() as folder:
        hub.save_hf(model, folder)
        if hub.exported_type(model.config) != "windreach":
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(model.device).eval()
        return WindreachForCausalLM.from_pretrained(Path(folder)).to(model.device)


def carry(logits: Logits, at: int, length: int) -> tuple[Tensor, Tensor]:
    """bool (T,) each: positions that read both values right, and those where both give the same bits."""
    ids = torch.full((1, length), FILLER)
    first, second = (logits(ids.index_fill(1, torch.tensor(at), value)) for value in (VALUE, COMPLEMENT))
    recalled = (first.argmax(-1) == VALUE) & (second.argmax(-1) == COMPLEMENT)
    return recalled, (first == second).all(-1)


def prove(
    model: WindreachForCausalLM, specs: Sequence[LayerSpec], chosen: Sequence[str], tokens: int = 0
) -> list[dict[str, Any]]:
    """One result per position of the value and path: what the model does, against what `specs` allow.

    There are at least `tokens` tokens behind the value. `recalled`, `reachable` and `farthest` are distances of at
    least 1. `missing` are positions that the value reaches but where it is not read, `leaks` those that it does not
    reach but where it changes a bit; the first ten of each.
    """
    jobs = []
    for at in plantings(specs):
        length = at + 1 + max(tokens, default_tokens(specs))
        expected = arrivals(specs, at, length)
        jobs += [(at, expected, path, logits) for path, logits in paths(model, length, chosen)]
    with progress("proof", len(jobs)) as advance:
        return [_try(*job, advance) for job in jobs]


def _try(at: int, expected: Tensor, path: str, logits: Logits, advance: Callable[[int], None]) -> dict[str, Any]:
    start = time.monotonic()
    recalled, same = carry(logits, at, len(expected))
    advance(1)
    facts = {"path": path, "value_at": at, "tokens": len(expected), "seconds": round(time.monotonic() - start, 1)}
    return facts | _compare(recalled, same, expected, at)


def _compare(recalled: Tensor, same: Tensor, expected: Tensor, at: int) -> dict[str, Any]:
    distances = recalled.nonzero().flatten() - at
    return {
        "farthest": int(distances.max()) if len(distances) else None,
        "recalled": int((recalled & expected)[at + 1 :].sum()),
        "reachable": int(expected[at + 1 :].sum()),
        "identical": int((same & ~expected).sum()),
        "unreachable": int((~expected).sum()),
        "missing": (expected & ~recalled).nonzero().flatten().tolist()[:10],
        "leaks": (~expected & ~same).nonzero().flatten().tolist()[:10],
    }


def holds(results: Sequence[dict[str, Any]], specs: Sequence[LayerSpec]) -> bool:
    """Whether every path carries the value to all positions that it can reach, and changes no bit at any other.

    A value that is not in a global token must get exactly as far as `windows` says in a closed form.
    """
    reach = windows.reach_of_other_tokens(specs)
    others = [r["farthest"] for r in results if r["value_at"] == results[-1]["value_at"]]
    exact = reach is None or set(others) == {reach}
    return exact and not any(r["missing"] or r["leaks"] for r in results)
