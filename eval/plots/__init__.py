"""The pictures: one drawing of each, used for the PNG beside the numbers and for the SVG inside the report."""

from eval.plots.canvas import save as save
from eval.plots.canvas import svg as svg
from eval.plots.curves import has_curves as has_curves
from eval.plots.curves import loss_figure as loss_figure
from eval.plots.curves import training_figure as training_figure
from eval.plots.maps import heat_figure as heat_figure
from eval.plots.maps import relay_figure as relay_figure
from eval.plots.recall import hero_figure as hero_figure
from eval.plots.recall import reach_figure as reach_figure
