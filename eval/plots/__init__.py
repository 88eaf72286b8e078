"""The pictures: one drawing of each, used for the PNG beside the numbers and for the SVG inside the report."""

from eval.plots.canvas import save, svg
from eval.plots.curves import has_curves, hero_figure, loss_figure, reach_figure, training_figure
from eval.plots.maps import heat_figure, relay_figure

__all__ = [
    "has_curves", "heat_figure", "hero_figure", "loss_figure", "reach_figure", "relay_figure", "save", "svg",
    "training_figure",
]  # fmt: skip
