"""Figures of a source: the same as counted by hand, and the same however the documents are split into shards."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.statistics import Size, WasteShares, statistics
from data.token_store import Shard

DOCUMENT = st.lists(st.integers(1, 3), min_size=1, max_size=12)


def shard(documents, dtype=np.uint16):
    lengths = np.array([len(d) for d in documents], dtype=np.int64)
    return Shard(np.concatenate(documents).astype(dtype), np.cumsum(lengths) - lengths)


def test_figures_of_a_small_source():
    documents = [[3, 3], [1, 2, 3], [0, 2, 2, 2, 0], [1, 2, 3], [3, 3], [1, 2, 3], [3] + [1] * 16]
    figures = statistics([shard(documents)], 103, 8, {"W": 2, "R": 5, "seq_len": 17})
    assert figures.total == Size(7, 35)
    assert figures.bytes_per_token == 103 / 35
    assert figures.by_length == {2: Size(5, 13), 4: Size(1, 5), 8: Size(0, 0), 16: Size(1, 17)}
    assert figures.longer == {"W": Size(5, 31), "R": Size(1, 17), "seq_len": Size(0, 0)}
    assert figures.packings == {"concat": WasteShares(3 / 7, 0), "best_fit": WasteShares(1 / 7, 5 / 40)}
    assert figures.duplicates == 3 / 7


@given(st.lists(st.lists(DOCUMENT, min_size=1), min_size=1, max_size=4))
def test_shards_do_not_change_the_figures_of_documents(shards):
    everything = [document for documents in shards for document in documents]
    one, many = (
        statistics([shard(documents) for documents in split], 99, 4, {"W": 3}) for split in ([everything], shards)
    )
    assert (one.total, one.by_length, one.longer) == (many.total, many.by_length, many.longer)
    assert one.packings["concat"] == many.packings["concat"]
    assert one.packings["best_fit"].cut == many.packings["best_fit"].cut
    copies = len(everything) - len(set(map(tuple, everything)))
    assert one.duplicates == many.duplicates == copies / len(everything)


def test_documents_are_equal_only_if_all_their_tokens_are():
    documents = [[1, 2], [2, 1], [1], [1, 2, 0], [0, 1, 2], [258], [2, 1]]
    for dtype in ("<u2", "<u4"):
        assert statistics([shard(documents, dtype)], 1, 8, {}).duplicates == 1 / 7
