"""The pictures show what `model.windows` says, cell by cell, for every kind of layer."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.plots import masks as mask_plots
from eval.reach import masks
from model import windows
from model.errors import cli
from model.windows import LayerSpec

STACKS = {
    "sliding": [LayerSpec("sliding", 4)] * 3,
    "growing": [LayerSpec("sliding", 2), LayerSpec("sliding", 5), LayerSpec("sliding", 9)],
    "chunked": [LayerSpec("chunked", 5), LayerSpec("sliding", 3), LayerSpec("chunked", 4)],
    "dilated": [LayerSpec("dilated", 3, dilation=3)] * 2,
    "global": [LayerSpec("sliding", 4, global_tokens=2), LayerSpec("sliding", 3)],
    "hybrid": [LayerSpec("sliding", 4), LayerSpec("full"), LayerSpec("sliding", 4)],
    "full": [LayerSpec("full")] * 2,
}


def filled(ax: Axes) -> list[list[bool]]:
    """Which cells of a picture are painted."""
    (image,) = ax.images
    return (np.asarray(image.get_array()) > 0).tolist()


def test_the_sentence_stands_beside_a_triangle_and_a_band_of_three() -> None:
    figure = mask_plots.sentence_figure()
    vanilla, sliding = figure.axes
    assert filled(vanilla) == np.tri(5, dtype=bool).tolist()
    assert filled(sliding) == (np.tri(5, dtype=bool) & ~np.tri(5, k=-3, dtype=bool)).tolist()
    for ax in figure.axes:
        assert [label.get_text() for label in ax.get_xticklabels()] == ["The", "cat", "sat", "on", "the"]
        assert [label.get_text() for label in ax.get_yticklabels()] == ["The", "cat", "sat", "on", "the"]
        assert ax.yaxis_inverted()
    assert [text.get_text() for text in sliding.texts[15:20]] == ["0", "1", "1", "1", "0"]
    assert [text.get_position()[1] for text in sliding.texts[15:20]] == [3.52] * 5


@pytest.mark.parametrize("stack", STACKS)
def test_the_cone_is_painted_where_the_last_token_sees_and_nowhere_else(stack: str) -> None:
    specs = STACKS[stack]
    ax = mask_plots.cone_figure(specs).axes[0]
    length = mask_plots.cone_length(specs)
    seen = windows.cone(specs, length)
    assert filled(ax) == seen.tolist()
    assert list(ax.images[0].get_extent()) == [0.5 - length, 0.5, len(specs) + 1, 0], "the last token is at 0"


@pytest.mark.parametrize("stack", STACKS)
def test_each_kind_of_layer_has_its_mask(stack: str) -> None:
    specs = STACKS[stack]
    kinds, figure = mask_plots.kinds_of(specs), mask_plots.layers_figure(specs)
    assert len(figure.axes) == len(kinds) == len(set(specs))
    for ax, (spec, count) in zip(figure.axes, kinds.items(), strict=True):
        length = int(ax.get_xlim()[1])
        assert length > 2 * (spec.ring_slots or 0)
        assert filled(ax) == mask_plots.mask(spec, length).tolist()
        title = " ".join(ax.get_title(loc="left").split())
        assert title == f"{mask_plots.title_of(spec)} {count} of {len(specs)} layers"


def test_marks_say_the_reach_and_the_headline_figure() -> None:
    assert {"R = 9", "W·k = 12"} <= texts_of(mask_plots.cone_figure(STACKS["sliding"]))
    assert "R = 5, global tokens aside" in texts_of(mask_plots.cone_figure(STACKS["global"]))
    assert "unbounded: a full layer sees every earlier token" in texts_of(mask_plots.cone_figure(STACKS["hybrid"]))


def texts_of(figure: Figure) -> set[str]:
    return {text.get_text() for text in figure.axes[0].texts}


def test_long_windows_are_drawn_to_scale_and_that_is_said() -> None:
    mistral = [LayerSpec("sliding", 4096)] * 32
    cone = mask_plots.cone_figure(mistral).axes[0]
    assert cone.get_title(loc="left") == (
        "What the last token sees, layer by layer, every window divided by 32 (the real R is 131,040)"
    )
    assert {"R = 4,064", "W·k = 4,096"} <= texts_of(cone.figure)
    panel = mask_plots.layers_figure(mistral).axes[0]
    assert panel.get_title(loc="left") == "sliding, W = 4,096\ndrawn as W = 23\n32 of 32 layers"
    assert filled(panel) == mask_plots.mask(LayerSpec("sliding", 23), 50).tolist()


def test_shades_of_kinds_differ_in_grey() -> None:
    grey = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b, _ in mask_plots._shades(4)]
    assert all(lighter - darker > 0.15 for darker, lighter in pairwise(grey))


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["masks", *map(str, arguments)])
    return cli(masks.main)


def test_the_command_draws_a_config_without_a_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "configs/twins/global.yaml", "--out", tmp_path / "new") == 0
    written = sorted(file.name for file in (tmp_path / "new").iterdir())
    assert written == ["cone.png", "layers.png", "mask.png"]
    assert all((tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG") for name in written)
    assert "cone.png" in capsys.readouterr().out


def test_a_config_or_folder_that_can_not_be_used_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, tmp_path / "none.yaml") == 2
    assert "none.yaml" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert call(monkeypatch, "--out", tmp_path / "file") == 2
    assert "can't be created (File exists); choose another folder" in capsys.readouterr().err
