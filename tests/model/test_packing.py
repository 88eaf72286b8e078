"""What a batch's packing is, and what is known of it before it is on a GPU."""

import pytest
import torch

from model.packing import Packing, RowEnds, count_positions


@pytest.mark.parametrize(
    ("documents", "padded", "spans"),
    [
        ([[4, 4, 4, 5], [6, 6, 7, 7]], False, 4),
        ([[4, 4, -1, -1], [-1, 6, 7, 7]], True, 5),
        ([[-1, -1, -1, -1], [4, 4, 4, 4]], True, 2),
        ([[4, 4, -1, 4], [6, 6, 6, 6]], True, None),  # padding inside a document
    ],
)
def test_facts_are_counted_on_the_cpu(documents: list[list[int]], padded: bool, spans: int | None) -> None:
    ids = torch.tensor(documents)
    packing, counted = Packing.of_documents(ids), count_positions(ids, RowEnds.of_empty_rows(ids))[0]
    assert packing.documents is not None
    assert counted.documents is not None
    assert torch.equal(packing.positions, counted.positions)
    assert torch.equal(packing.documents, counted.documents)
    assert (packing.whole, packing.padded, packing.spans) == (False, padded, spans)


def test_rows_of_one_document_each_are_whole_rows() -> None:
    packing = Packing.of_documents(torch.tensor([[3, 3, 3], [5, 5, 5]]))
    assert packing is Packing.of_whole_rows(3, torch.device("cpu"))


@pytest.mark.parametrize("documents", [[[1, 1, 2, -1]], [[1, 1, 1, 1]]])
def test_the_facts_stay_on_another_device(documents: list[list[int]]) -> None:
    packing = Packing.of_documents(torch.tensor(documents))
    moved = packing.to(torch.device("meta"))
    assert moved.positions.device.type == "meta"
    assert (moved.whole, moved.padded, moved.spans) == (packing.whole, packing.padded, packing.spans)
