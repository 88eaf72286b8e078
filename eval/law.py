"""Fits how the horizon grows with window and depth, H = c W^a k^b, to the runs of a sweep.

    python -m eval.law runs/sweeps/law/sweep.json [--out DIR]

The fit is least squares on logarithms. The intervals are those of a linear regression (Student's t) with the run as the
unit; they hold if the law holds. For comparison: how far runs scatter around W k, W sqrt(k), W and the exact reach
k(W - 1), each with one free factor. A run whose curriculum did not reach its last distance may have needed more
training, so a second fit leaves such runs out. Writes law.json and law.png.

Legend: N runs, W window in tokens, k layers, H horizon in tokens, D the distance that training reached.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from rich import box
from rich.console import Console
from rich.table import Table

from model.errors import UserError, cli
from training.run.checkpoint import write_json

Run = dict[str, Any]
Summary = dict[str, Any]
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
    """H = factor * W^window * k^depth over `n` runs. scatter: the factor by which runs are off, root mean square."""

    factor: float
    window: Exponent
    depth: Exponent
    scatter: float
    n: int


def fit(windows: ArrayLike, layers: ArrayLike, horizons: ArrayLike) -> Law:
    """The power law nearest to N runs in logarithms. All arguments are (N,): tokens, layers, tokens.

    Raises UserError if the runs don't determine it: fewer than four runs, only one window, or only one depth.

    >>> law = fit([8, 8, 16, 16], [2, 4, 2, 8], [32, 64, 64, 256])
    >>> print(round(law.factor, 2), law.window, law.depth)
    2.0 1.00 (1.00 to 1.00) 1.00 (1.00 to 1.00)
    """
    from scipy.stats import t as student

    y = np.log(np.asarray(horizons, dtype=np.float64))
    x = np.column_stack((np.ones(len(y)), np.log(windows), np.log(layers)))
    n, free = x.shape
    if n <= free or np.linalg.matrix_rank(x) < free:
        remedy = "it takes at least four, of several windows and several depths"
        raise UserError(f"{n} runs with a horizon don't determine a law of window and depth; {remedy}")
    values, *_ = np.linalg.lstsq(x, y, rcond=None)
    errors = y - x @ values
    variance = float(errors @ errors) / (n - free)
    half = student.ppf(0.975, n - free) * np.sqrt(variance * np.diag(np.linalg.inv(x.T @ x)))
    window, depth = (Exponent(*map(float, (v, v - h, v + h))) for v, h in zip(values[1:], half[1:]))
    return Law(float(np.exp(values[0])), window, depth, _factor(errors), n)


def _factor(errors: np.ndarray) -> float:
    """The root mean square of errors (N,) in logarithms, as a factor; 1 is exact."""
    return float(np.exp(np.sqrt(np.mean(errors**2))))


def summary(runs: Sequence[Run], horizon: str) -> Summary:
    """The fit, the scatter around each law of comparison, and the runs left out because they have no horizon."""
    seen = [run for run in runs if run.get(horizon)]
    w, k, reach, h = (np.array([run[key] for run in seen], float) for key in ("window", "layers", "reach", horizon))
    predicted = {name: w**a * k**b for name, (a, b) in LAWS.items()} | {"k (W - 1)": reach}
    errors = {name: np.log(h) - np.log(guess) for name, guess in predicted.items()}
    left_out = [run["run"] for run in runs if not run.get(horizon)]
    scatter = {name: _factor(e - e.mean()) for name, e in errors.items()}
    return {"fit": fit(w, k, h), "scatter": scatter, "left_out": left_out}


def read_runs(path: Path) -> list[Run]:
    """The finished runs of a sweep. Raises UserError if the file is no sweep.json."""
    try:
        return [run for run in json.loads(path.read_text())["runs"] if run["state"] == "done" and run["reach"]]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{path}: not the sweep.json of a sweep ({problem}); run scripts/sweep.py first") from problem


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.law", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("sweep", type=Path, metavar="SWEEP.json", help="as scripts/sweep.py wrote it")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: beside the sweep")
    arguments = parser.parse_args()
    runs = read_runs(arguments.sweep)
    ended = [run for run in runs if (run.get("distance") or 0) >= run["reach"]]
    groups = {"all": runs} | ({"D came to R": ended} if 3 < len(ended) < len(runs) else {})
    laws = {f"{title}, {name}": summary(group, h) for name, group in groups.items() for h, title in HORIZONS.items()}
    out = arguments.out or arguments.sweep.parent
    out.mkdir(parents=True, exist_ok=True)
    written = {title: law | {"fit": asdict(law["fit"])} for title, law in laws.items()}
    write_json(out / "law.json", {"laws": written})
    from eval.plots.canvas import save
    from eval.plots.law import figure

    save(figure(runs, laws, HORIZONS), out / "law.png")
    heads = ("horizon, runs", "N", "exponent of W", "exponent of k", "off by", *LAWS, "k (W - 1)")
    table = Table(*heads, box=box.SIMPLE_HEAD)
    for name, one in laws.items():
        law, off = one["fit"], (f"x{factor:.2f}" for factor in (one["fit"].scatter, *one["scatter"].values()))
        table.add_row(name, str(law.n), str(law.window), str(law.depth), *off)
    Console().print(table)
    print(f"Written: {out}/law.json, law.png")


if __name__ == "__main__":
    sys.exit(cli(main))
