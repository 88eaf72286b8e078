"""Where figures go: `metrics.jsonl` always, and wandb with the same columns while wandb works."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

from training.settings.schema import Settings, TrackingSettings


class Metrics:
    """Appends one JSON object a line. On resume, lines beyond the checkpoint's step are cut off first.

    With `write=False` (ranks other than the first) nothing is written anywhere.
    """

    def __init__(self, run_dir: Path, settings: Settings, wandb_id: str, step: int, write: bool = True):
        self.path = run_dir / "metrics.jsonl"
        self._file, self._wandb = None, None
        if write:
            truncate(self.path, step)
            self._file = self.path.open("a", buffering=1)
            self._wandb = _start_wandb(run_dir, settings.tracking, settings.name, wandb_id)

    def write(self, kind: str, step: int, **values: Any) -> None:
        if self._file is None:
            return
        row = {"step": step, "kind": kind} | {k: _finite(v) for k, v in values.items()}
        self._file.write(json.dumps(row) + "\n")
        if self._wandb is not None:
            columns = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
            self._guarded(lambda: self._wandb.log(columns, step=step))

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._guarded(self._wandb.finish)

    def _guarded(self, call: Any) -> None:
        try:
            call()
        except Exception as problem:  # a tracker must never end a run
            print(f"wandb failed ({problem}); training goes on, metrics are in {self.path}")
            self._wandb = None


def truncate(path: Path, step: int) -> None:
    """Keep the lines up to `step`; a half-written last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] <= step:
            kept.append(line)
    aside = path.with_suffix(".new")
    aside.write_text("".join(f"{line}\n" for line in kept))
    aside.replace(path)


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _start_wandb(run_dir: Path, tracking: TrackingSettings, name: str, wandb_id: str | None) -> Any:
    if tracking.wandb_mode == "disabled":
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import wandb

            return wandb.init(
                project=tracking.wandb_project,
                name=name,
                id=wandb_id,
                resume="allow" if tracking.wandb_mode == "online" else None,
                mode=tracking.wandb_mode,
                dir=run_dir,
                settings=wandb.Settings(silent=True, console="off"),
            )
    except Exception as problem:  # absent, broken or unreachable: a tracker must never end a run
        print(f"wandb is not available ({problem}); training goes on, metrics are in {run_dir}/metrics.jsonl")
        return None
