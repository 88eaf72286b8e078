"""In which settings several runs differ."""

from typing import Any

import yaml

from eval.report.runs import Run
from eval.report.sheets import Cell, Sheet

OF_THE_FOLDER = ("name", "run_dir")  # they differ between any two runs, and decide nothing


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted path.

    >>> flat({"model": {"sliding_window": 16, "layers": [{"kind": "full"}]}, "seed": 0})
    {'model.sliding_window': 16, 'model.layers': [{'kind': 'full'}], 'seed': 0}
    """
    if not isinstance(tree, dict) or not tree:
        return {prefix[:-1]: tree}
    return {path: value for key, part in tree.items() for path, value in flat(part, f"{prefix}{key}.").items()}


def differences_sheet(runs: list[Run]) -> Sheet | None:
    """One row for each setting that is not the same in all runs; None when fewer than two runs have settings."""
    described = [flat(run.any["settings"]) if run.any["settings"] else {} for run in runs]
    if sum(bool(settings) for settings in described) < 2:
        return None
    paths = list(dict.fromkeys(path for settings in described for path in settings if path not in OF_THE_FOLDER))
    rows = [
        [Cell(path), *(_cell(settings, path) for settings in described)]
        for path in paths
        if any(settings.get(path) != described[0].get(path) for settings in described)
    ]
    caption = "Settings that differ." if rows else "All settings are the same, but for the run's name and folder."
    return Sheet(caption, ["setting", *(run.name for run in runs)], rows)


def _cell(settings: dict[str, Any], path: str) -> Cell:
    value = settings.get(path)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(f"{value:g}" if isinstance(value, float) else f"{value:,}", float(value))
    if value is None:
        return Cell("" if path in settings else "not set")
    return Cell(yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip())
