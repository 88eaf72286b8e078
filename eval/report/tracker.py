"""The report's tables and pictures as tables and images of wandb."""

import json
import warnings
from pathlib import Path
from typing import Any, Literal

from eval.report.page import Contents, of_one, shared
from eval.report.runs import Run
from eval.report.sheets import Sheet
from model.errors import UserError

Mode = Literal["offline", "online"]


def log_to_wandb(runs: list[Run], mode: Mode, folder: Path) -> str:
    """One run: into its own wandb run, whose id run.json keeps. Several: a run of their own. Returns wandb's folder.

    `mode` is `offline` or `online`. Raises UserError where wandb can't start.
    """
    import wandb
    from PIL import Image

    first = runs[0]
    tracking = first.any["settings"].get("tracking", {})
    own = _facts(first.folder).get("wandb_id") if len(runs) == 1 else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # wandb's own deprecations are no fault of the run
        try:
            run = wandb.init(
                project=tracking.get("wandb_project", "windreach"),
                name=first.name if len(runs) == 1 else f"comparison of {len(runs)} runs",
                id=own,
                resume="allow" if own and mode == "online" else None,
                job_type="report",
                mode=mode,
                dir=first.folder if len(runs) == 1 else folder,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.errors.Error, OSError) as error:
            raise UserError(f"--wandb {mode}: {error}; try --wandb offline") from error
        with run:
            for prefix, contents in _parts(runs):
                tables = {f"{prefix}{k}": wandb.Table(**as_table(s)) for k, s in contents.sheets.items()}
                images = {
                    f"{prefix}{k}": wandb.Image(Image.open(p.png()), caption=p.caption)
                    for k, p in contents.pictures.items()
                }
                run.log(tables | images)
            return str(Path(run.dir).parent)


def _parts(runs: list[Run]) -> list[tuple[str, Contents]]:
    if len(runs) == 1:
        return [("report/", shared(runs)), ("report/", of_one(runs[0]))]
    return [("report/", shared(runs)), *((f"report/{run.name}/", of_one(run)) for run in runs)]


def as_table(sheet: Sheet) -> dict[str, Any]:
    """Columns and data of a `wandb.Table`: numbers as numbers where a whole column has them, else what is shown."""
    columns = list(zip(*sheet.rows, strict=True))
    numeric = [all(cell.number is not None or not cell.text for cell in column) for column in columns]
    data = [
        [cell.number if is_number else cell.text for cell, is_number in zip(row, numeric, strict=True)]
        for row in sheet.rows
    ]
    return {"columns": sheet.columns, "data": data}


def _facts(folder: Path) -> dict[str, Any]:
    file = folder / "run.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}
