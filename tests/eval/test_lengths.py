"""The picture of document lengths shows shares of each source, and a line at each limit."""

import numpy as np
from matplotlib.patches import StepPatch

from data.statistics import statistics
from data.token_store import Shard
from eval.plots.lengths import lengths_figure

LIMITS = {"seq_len": 32, "W": 4, "R": 12}


def source(lengths):
    starts = np.cumsum(lengths) - lengths
    return statistics([Shard(np.zeros(sum(lengths), dtype=np.uint16), starts)], 1, 32, LIMITS)


def test_lengths_are_shown_as_shares_of_documents_and_of_tokens():
    figure = lengths_figure({"web": source([2, 3, 16]), "books": source([64])}, LIMITS)
    outlines = [
        [p.get_data() for p in ax.patches if isinstance(p, StepPatch) and not p.get_fill()] for ax in figure.axes
    ]
    for (web, books), shares in zip(outlines, ([2 / 3, 0, 0, 1 / 3], [5 / 21, 0, 0, 16 / 21])):
        np.testing.assert_allclose(web.values, shares)
        np.testing.assert_array_equal(web.edges, [2, 4, 8, 16, 32])
        assert (books.values.tolist(), books.edges.tolist()) == ([1.0], [64, 128])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["web", "books"]


def test_each_limit_has_a_line_and_labels_do_not_meet():
    figure = lengths_figure({"web": source([2, 3, 16])}, LIMITS)
    for ax in figure.axes:
        assert sorted(float(line.get_xdata()[0]) for line in ax.lines) == [4, 12, 32]
    labels = figure.axes[0].texts
    assert {label.get_text() for label in labels} == {"W = 4", "R = 12", "seq_len = 32"}
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in labels]
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
