"""The pictures: one drawing of each, used for the PNG beside the numbers and for the SVG inside the report."""

from eval.plots.canvas import save, svg
from eval.plots.curves import hero_figure, loss_figure, reach_figure, training_figure, training_panels
from eval.plots.maps import heat_figure, relay_figure
from eval.plots.needs import needs_figure
from eval.plots.receipt import receipt_figure

__all__ = [
    "heat_figure", "hero_figure", "loss_figure", "needs_figure", "reach_figure", "receipt_figure", "relay_figure",
    "save", "svg", "training_figure", "training_panels",
]  # fmt: skip
