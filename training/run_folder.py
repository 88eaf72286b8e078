"""The folder of a run: made, found again, refused when it holds another run, set aside when a fresh start is asked."""

import hashlib
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import yaml

from data.tokenizer import Tokenizer
from model.errors import UserError
from training.checkpoint import checkpoints, newest_valid, problem_with, write_json
from training.precision import measure
from training.settings import Settings

# Changing these between two starts of one run changes no loss.
FREE = (
    "name",
    "run_dir",
    "tracking.",
    "training.log_every_steps",
    "training.save_every_steps",
    "training.keep_checkpoints",
    "training.validate_every_steps",
    "training.validation_tokens",
    "training.probe_distances",
    "training.probe_items",
    "training.max_skipped_steps",
    "training.profile",
    "data.cache_dir",
)


def run_dir(settings: Settings) -> Path:
    return Path(settings.run_dir or f"runs/{settings.name}")


def settings_hash(settings: Settings) -> str:
    """Hash of all settings that decide the weights."""
    bound = {k: v for k, v in _flat(settings.model_dump(mode="json")).items() if not k.startswith(FREE)}
    return hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()


def open_run(settings: Settings, resume: str) -> Path | None:
    """Make the run folder fit for this run and return the checkpoint to go on from, or None for a fresh start.

    `resume` is `auto` (newest valid checkpoint), `never` (a folder in the way is set aside) or a checkpoint's path.
    """
    folder = run_dir(settings)
    if resume == "never":
        _set_aside(folder)
    _check_writable(folder)
    _check_same_settings(folder, settings)
    chosen = newest_valid(folder) if resume in ("auto", "never") else _explicit(Path(resume))
    (folder / "checkpoints").mkdir(exist_ok=True)
    if chosen is not None and chosen.parent == folder / "checkpoints":
        _set_aside_newer(folder, chosen)
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    (folder / "settings.yaml").write_text(text)
    return chosen


def decide_once(settings: Settings, tokenizer: Tokenizer, device: torch.device) -> dict[str, Any]:
    """What a resume must find as it was, written at the first start; and the matmul rate of this machine, in FLOP/s."""
    folder = run_dir(settings)
    machine = measure(device)
    facts = {
        "precision": machine.choose(settings.training.precision),
        "tokenizer_sha256": tokenizer.sha256,
        "settings_sha256": settings_hash(settings),
        "wandb_id": uuid4().hex[:8],
    } | read_facts(folder)
    check_tokenizer(folder, facts["tokenizer_sha256"], tokenizer.sha256)
    write_json(folder / "run.json", facts)
    tokenizer.save(folder / "tokenizer")
    print(
        f"matmul: fp32 {machine.fp32_flops / 1e9:.0f}, bf16 {machine.bf16_flops / 1e9:.0f} GFLOP/s "
        f"-> {facts['precision']} (training.precision={settings.training.precision})"
    )
    return facts | {"matmul_rate": machine.rate(facts["precision"])}


def read_facts(folder: Path) -> dict[str, Any]:
    """What was decided when the run first started: precision, wandb id, tokenizer hash. Empty for a new run."""
    path = folder / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def check_tokenizer(where: Path, expected: str | None, tokenizer_sha256: str) -> None:
    if expected not in (None, tokenizer_sha256):
        raise UserError(
            f"{where}: was trained with another tokenizer\n"
            f"  there: sha256 {expected}\n  now:   sha256 {tokenizer_sha256}\n"
            "  give data.tokenizer.model_file the tokenizer of that run, or start a run under another name"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix[:-1]: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}{key}.").items()}


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as problem:
        raise UserError(
            f"run_dir: {folder} can't be written: {problem.strerror}\n"
            "  choose another with run_dir=PATH, or change its permissions"
        ) from problem


def _check_same_settings(folder: Path, settings: Settings) -> None:
    path = folder / "settings.yaml"
    if not path.exists():
        return
    there = _flat(yaml.safe_load(path.read_text()) or {})
    now = _flat(settings.model_dump(mode="json"))
    keys = sorted(k for k in there.keys() | now.keys() if there.get(k) != now.get(k) and not k.startswith(FREE))
    if keys:
        lines = [f"  {k}: {there.get(k)!r} there, {now.get(k)!r} now" for k in keys]
        raise UserError(
            f"run folder {folder} holds a run with other settings:\n"
            + "\n".join(lines)
            + "\n  use another name=..., or --resume never to set that folder aside and start anew"
        )


def _explicit(path: Path) -> Path:
    problem = problem_with(path) if path.is_dir() else "no such folder"
    if problem is not None:
        raise UserError(f"--resume {path}: {problem}\n  give a folder such as runs/NAME/checkpoints/step-000200")
    return path


def _set_aside(folder: Path) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    target = _free_name(folder)
    try:
        folder.rename(target)
    except OSError as problem:
        raise UserError(f"--resume never: {folder} can't be set aside as {target}: {problem.strerror}") from problem
    print(f"--resume never: {folder} was there and is now {target}")


def _set_aside_newer(folder: Path, chosen: Path) -> None:
    """After `--resume PATH` the run goes on from PATH; later checkpoints must not be resumed next time."""
    newer = [p for p in checkpoints(folder) if p.name > chosen.name]
    for path in newer:
        target = _free_name(path.with_name(f"not-resumed-{path.name}"))
        path.rename(target)
        print(f"{path} is newer than the checkpoint resumed and is now {target.name}")


def _free_name(path: Path) -> Path:
    number = 1
    while (target := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return target
