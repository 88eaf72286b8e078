import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import law
from model.errors import UserError

GRID = [(w, k) for w in (8, 16, 32) for k in (2, 4, 8, 16)]
WINDOWS, LAYERS = [w for w, _ in GRID], [k for _, k in GRID]


def run(window: int, layers: int, horizon: float | None, distance: int | None = None) -> law.Run:
    reach = layers * (window - 1)
    return {
        "run": f"w{window},k{layers}", "state": "done", "window": window, "layers": layers, "reach": reach,
        "h90": horizon, "h50": horizon, "distance": reach if distance is None else distance,
    }  # fmt: skip


def written(folder: Path, runs: list[law.Run]) -> Path:
    path = folder / "sweep.json"
    path.write_text(json.dumps({"name": "law", "runs": runs}))
    return path


@settings(deadline=None)  # the first call imports scipy
@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(0.1, 10))
def test_a_power_law_is_found_again_from_its_own_values(a: float, b: float, factor: float) -> None:
    found = law.fit(WINDOWS, LAYERS, [factor * w**a * k**b for w, k in GRID])
    assert (found.factor, found.window.value, found.depth.value) == pytest.approx((factor, a, b), abs=1e-6, rel=1e-6)
    assert found.scatter == pytest.approx(1.0)
    assert found.n == len(GRID)


def test_intervals_hold_the_true_exponents_in_nineteen_of_twenty_draws() -> None:
    rng, held, draws = np.random.default_rng(0), 0, 400
    for _ in range(draws):
        noisy = [3 * w * k**0.5 * np.exp(rng.normal(0, 0.3)) for w, k in GRID]
        depth = law.fit(WINDOWS, LAYERS, noisy).depth
        held += depth.low <= 0.5 <= depth.high
    assert 0.92 <= held / draws <= 0.98


@pytest.mark.parametrize("name", list(law.LAWS))
def test_the_law_that_made_the_runs_is_the_nearest(name: str) -> None:
    a, b = law.LAWS[name]
    found = law.summary([run(w, k, w**a * k**b) for w, k in GRID], "h50")
    assert found["scatter"][name] == pytest.approx(1.0)
    assert all(found["scatter"][other] > 1.1 for other in law.LAWS if other != name)


def test_runs_without_a_horizon_are_left_out_and_named() -> None:
    runs = [run(w, k, w * k if (w, k) != (8, 2) else 0) for w, k in GRID]
    found = law.summary(runs, "h90")
    assert found["left_out"] == ["w8,k2"]
    assert found["fit"].n == len(GRID) - 1


def test_too_few_runs_or_one_window_are_refused() -> None:
    with pytest.raises(UserError, match="3 runs with a horizon don't determine a law of window and depth"):
        law.fit([8, 16, 32], [2, 4, 8], [1, 2, 3])
    with pytest.raises(UserError, match="it takes at least four, of several windows and several depths"):
        law.fit([8, 8, 8, 8], [2, 4, 8, 16], [1, 2, 3, 4])


def test_command_writes_fit_picture_and_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [run(w, k, w * k / 4, distance=3) for w, k in [(32, 8), (32, 16)]]
    path = written(tmp_path, [run(w, k, w * k) for w, k in GRID[:10]] + short)
    monkeypatch.setattr("sys.argv", ["law", str(path)])
    monkeypatch.setenv("COLUMNS", "160")
    law.main()
    made = json.loads((tmp_path / "law.json").read_text())
    assert list(made["laws"]) == ["H90, all", "H50, all", "H90, D came to R", "H50, D came to R"]
    assert made["laws"]["H50, D came to R"]["fit"]["depth"]["value"] == pytest.approx(1.0)
    assert made["laws"]["H50, all"]["fit"]["depth"]["value"] < 0.9
    assert (tmp_path / "law.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "exponent of W" in shown
    assert "H90, D came to R" in shown


def test_a_file_that_is_no_sweep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(UserError, match=r"other\.json: not the sweep\.json of a sweep .* run scripts/sweep\.py first"):
        law.read_runs(tmp_path / "other.json")
