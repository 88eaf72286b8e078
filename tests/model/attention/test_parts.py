"""Rows cut into parts among processes: exact outputs and gradients, the cliff at R, and the bytes sent."""

import pytest
import torch

from model.attention.parts import halo
from model.packing import Packing
from model.windows import LayerSpec, visible
from tests.integration.tiny_run import launch
from tests.model.attention.parts_ranks import CLAIMS, WORLD, documents


@pytest.mark.parametrize("claim", CLAIMS)
def test_four_processes(claim: str) -> None:
    processes = launch(["tests.model.attention.parts_ranks", claim], WORLD)
    outcomes = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(e for _, e in outcomes)


SPECS = [
    LayerSpec("sliding", 5),
    LayerSpec("sliding", 5, global_tokens=3),
    LayerSpec("dilated", 3, 4, global_tokens=2),
    LayerSpec("chunked", 6),
    LayerSpec("chunked", 6, global_tokens=4),
    LayerSpec("full"),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("row", [Packing.of_whole_rows(40, torch.device("cpu")), documents(40, [7, 19, 20], [33])])
def test_halo_holds_every_earlier_token_that_a_part_sees(spec: LayerSpec, row: Packing) -> None:
    for first in (1, 2, 13, 19, 20, 21, 36):
        for number, index in enumerate(halo(spec, row, first)):
            positions = row.positions[number]
            seen = visible(spec, positions[first:, None], positions[None, :first])
            if row.documents is not None:
                seen &= row.documents[number, first:, None] == row.documents[number, None, :first]
            needed = set(seen.any(0).nonzero()[:, 0].tolist())
            assert needed <= set(index.tolist())
            assert index[index >= 0].diff().gt(0).all()


def test_halo_is_the_window_whatever_the_length() -> None:
    for tokens in (100, 10_000):
        row = Packing.of_whole_rows(tokens, torch.device("cpu"))
        assert halo(LayerSpec("sliding", 5), row, tokens // 2).shape == (1, 4)
