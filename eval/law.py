"""How the horizon grows with window and depth: H ~ c W^a k^b, fitted to the runs of a sweep.

    python -m eval.law runs/sweeps/law/sweep.json [--out DIR]

Least squares on logarithms; the intervals are those of a linear regression (Student's t) with the run as the unit:
they hold if the law does. Beside it stand the laws that are spoken of, W k, W sqrt(k) and W, and the exact reach k(W
- 1), each with one free factor, and how far runs scatter around them. A run whose curriculum did not come to its last
distance may have been short of training, not of reach: the fit is made with and without these. Writes law.json,
law.png.

Legend: N runs; W window in tokens, k layers, H horizon in tokens, D the distance that training came to.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from eval.plots.canvas import COLORS, GREY, GRID, STYLE, save
from model.errors import UserError, cli

FloatArray = NDArray[np.float64]
Run = dict[str, Any]
HORIZONS = {"h90": "H90", "h50": "H50"}
LAWS = {"W k": (1.0, 1.0), "W sqrt(k)": (1.0, 0.5), "W": (1.0, 0.0)}  # exponents of W and of k


@dataclass(frozen=True)
class Exponent:
    """With its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Law:
    """H = factor * W^window * k^depth over `n` runs; `scatter`: runs are off by this factor, root mean square."""

    factor: float
    window: Exponent
    depth: Exponent
    scatter: float
    n: int


def fit(windows: Sequence[float], layers: Sequence[float], horizons: Sequence[float]) -> Law:
    """The power law nearest to N runs in logarithms. All arguments are (N,), in tokens, layers and tokens.

    Raises UserError where they don't determine it: fewer than four runs, or one window or depth only.

    >>> law = fit([8, 8, 16, 16], [2, 4, 2, 8], [32, 64, 64, 256])
    >>> print(round(law.factor, 2), law.window, law.depth)
    2.0 1.00 (1.00 to 1.00) 1.00 (1.00 to 1.00)
    """
    x = np.column_stack((np.ones(len(windows)), np.log(windows), np.log(layers)))
    y = np.log(np.asarray(horizons, dtype=np.float64))
    n, free = x.shape
    if n <= free or np.linalg.matrix_rank(x) < free:
        raise UserError(
            f"{n} runs with a horizon don't determine a law of window and depth; "
            "it takes at least four, of several windows and several depths"
        )
    values, *_ = np.linalg.lstsq(x, y, rcond=None)
    errors = y - x @ values
    variance = float(errors @ errors) / (n - free)
    half = student.ppf(0.975, n - free) * np.sqrt(variance * np.diag(np.linalg.inv(x.T @ x)))
    window, depth = (Exponent(*map(float, (v, v - h, v + h))) for v, h in zip(values[1:], half[1:], strict=True))
    return Law(float(np.exp(values[0])), window, depth, _factor(errors), n)


def scatter(horizons: Sequence[float], predicted: Sequence[float]) -> float:
    """By what factor runs are off a law with one free factor, root mean square; 1 is exact.

    >>> round(scatter([10, 20], [1, 2]), 2), round(scatter([10, 20], [1, 1]), 2)
    (1.0, 1.41)
    """
    errors = np.log(np.asarray(horizons, dtype=np.float64)) - np.log(np.asarray(predicted, dtype=np.float64))
    return _factor(errors - errors.mean())


def _factor(errors: FloatArray) -> float:
    return float(np.exp(np.sqrt(np.mean(errors**2))))


def summary(runs: Sequence[Run], horizon: str) -> dict[str, Any]:
    """The fit, the scatter around each law spoken of, and the runs left out, which have no horizon at all."""
    seen = [run for run in runs if run.get(horizon)]
    windows, layers, horizons = ([run[key] for run in seen] for key in ("window", "layers", horizon))
    law = fit(windows, layers, horizons)
    spoken = {
        name: scatter(horizons, [w**a * k**b for w, k in zip(windows, layers, strict=True)])
        for name, (a, b) in LAWS.items()
    }
    reach = scatter(horizons, [run["reach"] for run in seen])
    left_out = [run["run"] for run in runs if not run.get(horizon)]
    return {"fit": asdict(law), "scatter": {**spoken, "k (W - 1)": reach}, "left_out": left_out}


def came_to_the_end(run: Run) -> bool:
    """Whether the curriculum came to the exact reach."""
    return (run.get("distance") or 0) >= run["reach"]


def answer(found: dict[str, Any], horizon: str) -> str:
    """In one sentence."""
    law, scatters = found["fit"], {name: found["scatter"][name] for name in LAWS}
    window, depth = Exponent(**law["window"]), Exponent(**law["depth"])
    nearest = min(scatters, key=scatters.__getitem__)
    return (
        f"{HORIZONS[horizon]} grows as W^{window} x k^{depth} over {law['n']} runs; of W k, W sqrt(k) and W, "
        f"{nearest} is nearest: with one free factor, runs are off by x{scatters[nearest]:.2f}."
    )


def law_table(found: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("horizon, runs", "N", "exponent of W", "exponent of k", "off by", *LAWS, "k (W - 1)"):
        table.add_column(name, justify="left" if name == "horizon, runs" else "right")
    for name, one in found.items():
        law = one["fit"]
        exponents = (str(Exponent(**law[key])) for key in ("window", "depth"))
        scatters = (f"x{one['scatter'][key]:.2f}" for key in (*LAWS, "k (W - 1)"))
        table.add_row(name, str(law["n"]), *exponents, f"x{law['scatter']:.2f}", *scatters)
    return table


def figure(runs: Sequence[Run], found: dict[str, dict[str, Any]]) -> Figure:
    """Each horizon against depth, a colour a window: the fit as a line, the exact reach in grey.

    Hollow marks: the curriculum did not come to its end.
    """
    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(5.2 * len(HORIZONS), 4.4), layout="constrained")
        for ax, horizon in zip(made.subplots(1, len(HORIZONS), squeeze=False)[0], HORIZONS, strict=True):
            law = found[f"{HORIZONS[horizon]}, all"]["fit"]
            windows = sorted({run["window"] for run in runs})
            for color, window in zip(COLORS, windows, strict=False):
                group = [run for run in runs if run["window"] == window and run.get(horizon)]
                depths = np.array(sorted({run["layers"] for run in runs}), dtype=np.float64)
                ax.plot(depths, depths * (window - 1), color=GREY, lw=1, ls=":")
                line = law["factor"] * window ** law["window"]["value"] * depths ** law["depth"]["value"]
                ax.plot(depths, line, color=color, lw=1.4, label=f"W = {window}")
                for ended in (True, False):
                    points = [(r["layers"], r[horizon]) for r in group if came_to_the_end(r) is ended]
                    face = color if ended else "white"
                    ax.scatter(*np.array(points).reshape(-1, 2).T, s=26, color=face, edgecolors=color, zorder=3)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.set_xlabel("layers k")
            ax.set_title(
                f"{HORIZONS[horizon]}, tokens; dotted: reach k(W - 1); hollow: D fell short of it", fontsize=9.5
            )
            ax.grid(color=GRID, lw=0.8)
            ax.legend(fontsize=8)
        return made


def read_runs(path: Path) -> list[Run]:
    """The finished runs of a sweep. UserError where the file is none."""
    try:
        tree = json.loads(path.read_text())
        return [run for run in tree["runs"] if run["state"] == "done" and run["reach"]]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{path}: not the sweep.json of a sweep ({problem}); run scripts/sweep.py first") from problem


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.law", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("sweep", type=Path, metavar="SWEEP.json", help="as scripts/sweep.py wrote it")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: beside the sweep")
    arguments = parser.parse_args()
    runs = read_runs(arguments.sweep)
    found = {f"{HORIZONS[h]}, all": summary(runs, h) for h in HORIZONS}
    ended = [run for run in runs if came_to_the_end(run)]
    if 3 < len(ended) < len(runs):
        found |= {f"{HORIZONS[h]}, D came to R": summary(ended, h) for h in HORIZONS}
    out = arguments.out or arguments.sweep.parent
    out.mkdir(parents=True, exist_ok=True)
    answers = [answer(one, name[:3].lower()) for name, one in found.items() if name.endswith("all")]
    (out / "law.json").write_text(json.dumps({"answers": answers, "laws": found}, indent=1))
    save(figure(runs, found), out / "law.png")
    console = Console()
    console.print(law_table(found))
    console.print(*answers, f"Written: {out}/law.json, law.png", sep="\n", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(cli(main))
