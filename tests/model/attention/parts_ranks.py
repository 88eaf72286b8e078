"""What `test_parts.py` launches as four processes: each function is one claim about rows that are cut into parts.

python -m tests.model.attention.parts_ranks NAME    (the address and the rank are in the environment)
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.decoder import WindreachForCausalLM
from model.packing import Packing, cut
from tests.model.tiny import tiny_model, token_ids

T, WORLD = 61, 4
STACKS: dict[str, list[dict[str, Any]]] = {
    "sees only itself": [{"window": 1}] * 2,
    "sliding": [{"window": 5}] * 3,
    "longer than a part": [{"window": 24}, {"window": 16}],
    "longer than the row": [{"window": 90}] * 2,
    "chunked": [{"kind": "chunked", "window": 7}] * 2,
    "chunked, global tokens": [{"kind": "chunked", "window": 7, "global_tokens": 3}] * 2,
    "dilated": [{"kind": "dilated", "window": 4, "dilation": 3}] * 2,
    "dilated, global tokens": [{"kind": "dilated", "window": 4, "dilation": 3, "global_tokens": 2}] * 2,
    "global tokens": [{"window": 5, "global_tokens": 2}] * 2,
    "more global tokens than W": [{"window": 5, "global_tokens": 9}] * 2,
    "sinks": [{"window": 5, "sink": True}, {"window": 4, "sink": True, "global_tokens": 1}],
    "full": [{"kind": "full"}, {"kind": "full", "sink": True}],
    "hybrid": [{"window": 5}, {"kind": "full", "rope": False}, {"kind": "chunked", "window": 6, "rope_theta": 100.0}],
}
TILES: list[dict[str, Any]] = [{"window": 130}, {"window": 130, "global_tokens": 4}, {"kind": "full"}]


def documents(tokens: int, *borders: list[int]) -> Packing:
    """Rows in which a document begins at 0 and at each border."""
    ids = torch.zeros(len(borders), tokens, dtype=torch.long)
    for row, starts in zip(ids, borders):
        for start in starts:
            row[start:] += 1
    return Packing.of_documents(ids)


def rows(parts: int) -> list[Packing]:
    """Whole rows; rows of documents; and rows with borders on, before and after the first cut."""
    at = T // parts
    return [
        Packing.of_whole_rows(T, torch.device("cpu")),
        documents(T, [10, 30, 37, 39, 50], [3, 57]),
        documents(T, [at - 1, at + 1, at + 12], [at, 2 * T // 3]),
    ]


def stack(
    layers: list[dict[str, Any]], dtype: torch.dtype, backend: str = "auto", **sizes: int
) -> WindreachForCausalLM:
    model = tiny_model(layers, attention_backend=backend).to(dtype).train()
    for name, parameter in model.named_parameters():
        if "sink_logits" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return model


def differentiate(model: WindreachForCausalLM, ids: Tensor, packing: Packing, weights: Tensor) -> Tensor:
    hidden = model.model(ids, packing=packing).last_hidden_state
    (hidden * weights).sum().backward()
    return hidden.detach()


def greatest_difference(
    layers: list[dict[str, Any]], row: Packing, parts: int, group: Any, dtype: torch.dtype, oracle: str = "reference"
) -> float:
    """Between this process's part, or the summed gradients, and one process with dense masks; relative."""
    tokens = row.positions.shape[1]
    ids, generator = token_ids(2, tokens), torch.Generator().manual_seed(2)
    weights = torch.randn(2, tokens, 32, dtype=dtype, generator=generator)
    one, mine = stack(layers, dtype, oracle), stack(layers, dtype)
    expected = differentiate(one, ids, row, weights)
    packing = cut(row, parts, dist.get_rank(), group)
    assert packing.part is not None
    own = slice(packing.part.first, packing.part.end)
    hidden = differentiate(mine, ids[:, own], packing, weights[:, own])
    differences = [relative(hidden, expected[:, own])]
    for parameter, other in zip(mine.parameters(), one.parameters()):
        if parameter.grad is not None and other.grad is not None:
            dist.all_reduce(parameter.grad, group=group)
            differences.append(relative(parameter.grad, other.grad))
    return max(differences)


def relative(x: Tensor, expected: Tensor) -> float:
    return float((x - expected).abs().max() / expected.abs().max())


def equal_to_one_process(groups: dict[int, Any]) -> None:
    for parts, group in groups.items():
        for name in STACKS if parts == WORLD else ("sliding", "global tokens", "hybrid"):
            for number, row in enumerate(rows(parts)):
                difference = greatest_difference(STACKS[name], row, parts, group, torch.float64)
                assert difference < 1e-12, (parts, name, number, difference)
        difference = greatest_difference(STACKS["hybrid"], rows(parts)[2], parts, group, torch.float32, "auto")
        assert difference < 2e-6, (parts, "float32", difference)


def equal_in_tiles(groups: dict[int, Any]) -> None:
    for row in (Packing.of_whole_rows(620, torch.device("cpu")), documents(620, [300], [140, 311])):
        difference = greatest_difference(TILES, row, 4, groups[4], torch.float64)
        assert difference < 1e-12, difference


def equal_with_recomputed_layers(groups: dict[int, Any]) -> None:
    row, ids, weights = rows(4)[1], token_ids(2, T), torch.ones(2, T, 32)
    packing = cut(row, 4, dist.get_rank(), groups[4])
    assert packing.part is not None
    own = slice(packing.part.first, packing.part.end)
    gradients = []
    for recomputed in (False, True):
        model = stack(STACKS["hybrid"], torch.float32)
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        differentiate(model, ids[:, own], packing, weights[:, own])
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def sees_exactly_r_tokens(groups: dict[int, Any]) -> None:
    """The query is the last token, on the last process. Row d differs in the token d positions before it."""
    tokens, window, layers = 20, 8, 2  # parts of 5 tokens: a halo of 7 comes from two neighbours
    model, ids = stack([{"window": window}] * layers, torch.float32).eval(), token_ids(1, tokens).expand(tokens, -1)
    changed = ids.clone()
    for d in range(1, tokens):
        changed[d, tokens - 1 - d] = 1 + changed[d, tokens - 1 - d] % 60
    packing = cut(Packing.of_whole_rows(tokens, torch.device("cpu")), 4, dist.get_rank(), groups[4])
    assert packing.part is not None
    own = slice(packing.part.first, packing.part.end)
    with torch.no_grad():
        before, after = (model.model(x[:, own], packing=packing).last_hidden_state[:, -1] for x in (ids, changed))
    if packing.part.index == 3:
        differs = (before != after).any(-1).tolist()
        assert differs == [0 < d <= layers * (window - 1) for d in range(tokens)], differs


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of each message that this process sends."""
    sent: list[int] = []
    real = dist.batch_isend_irecv

    def counting(operations: list[dist.P2POp]) -> list[dist.Work]:
        sent.extend(x.tensor.nbytes for x in operations if x.op is dist.isend)
        return real(operations)

    dist.batch_isend_irecv = counting
    try:
        yield sent
    finally:
        dist.batch_isend_irecv = real


def sends_the_window_whatever_the_length(groups: dict[int, Any]) -> None:
    """4 bytes; 2 kv heads of 8; keys and values; W - 1 tokens; 3 layers; 2 rows. The same back as gradients."""
    index = dist.get_rank()
    one_way = 3 * 2 * 2 * 4 * (2 * 8) * 4
    for tokens in (64, 256):
        packing = cut(Packing.of_whole_rows(tokens, torch.device("cpu")), 4, index, groups[4])
        ids, weights = token_ids(2, tokens // 4), torch.ones(2, tokens // 4, 32)
        with counted() as sent:
            differentiate(stack([{"window": 5}] * 3, torch.float32), ids, packing, weights)
        assert sum(sent) == one_way * ((index < 3) + (index > 0)), (index, sent)


CLAIMS: dict[str, Callable[[dict[int, Any]], None]] = {
    claim.__name__: claim
    for claim in (
        equal_to_one_process, equal_in_tiles, equal_with_recomputed_layers, sees_exactly_r_tokens,
        sends_the_window_whatever_the_length,
    )
}  # fmt: skip


def main() -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    groups = {parts: dist.new_group(range(parts)) for parts in (1, 2, 3, 4)}
    mine = {parts: group for parts, group in groups.items() if dist.get_rank() < parts}
    for name in sys.argv[1:]:
        CLAIMS[name](mine)
        dist.barrier()
    return 0
