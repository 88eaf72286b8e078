"""The folder of a run: made, found again, refused when it holds another run, set aside when a fresh start is asked."""

import hashlib
import json
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import yaml

from data.token_store import TokenStore
from data.tokenizer import Tokenizer
from model.errors import UserError
from training.processes.precision import measure
from training.run.checkpoint import checkpoints, clear_leftovers, newest_valid, problem_with, write_json, write_text
from training.settings.schema import Settings

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
    check_settings(f"run folder {folder}", folder / "settings.yaml", settings)
    clear_leftovers(folder)
    chosen = newest_valid(folder) if resume in ("auto", "never") else _explicit(Path(resume), settings)
    (folder / "checkpoints").mkdir(exist_ok=True)
    if chosen is not None and chosen.parent.resolve() == (folder / "checkpoints").resolve():
        _set_aside_newer(folder, chosen)
    write_text(folder / "settings.yaml", yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    return chosen


def decide_once(
    settings: Settings,
    tokenizer: Tokenizer,
    stores: Mapping[str, TokenStore],
    device: torch.device,
    checkpoint: Path | None = None,
    origin: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What a resume must find as it was, written at the first start; and the matmul rate of this machine, in FLOP/s.

    A run that goes on from another run's `checkpoint` takes its precision; `origin` tells of the weights that it began
    with, where these were not drawn. Raises `UserError` where the text (`stores`
    by split) or the tokenizer is not that of the run.
    """
    folder = run_dir(settings)
    machine = measure(device)
    data_sha256 = {split: store.source_sha256 for split, store in stores.items()}
    facts: dict[str, Any] = {
        "precision": machine.choose(settings.training.precision),
        "data_sha256": data_sha256,
        "tokenizer_sha256": tokenizer.sha256,
        "settings_sha256": settings_hash(settings),
        "wandb_id": uuid4().hex[:8],
    } | dict(origin or {})
    facts |= _inherited(checkpoint) | read_facts(folder)
    check_data(folder, facts["data_sha256"], data_sha256)
    check_tokenizer(folder, facts["tokenizer_sha256"], tokenizer.sha256)
    write_json(folder / "run.json", facts)
    tokenizer.save(folder / "tokenizer")
    print(
        f"matmul: fp32 {machine.fp32_flops / 1e9:.0f}, bf16 {machine.bf16_flops / 1e9:.0f} GFLOP/s "
        f"-> {facts['precision']} (training.precision={settings.training.precision})"
    )
    return facts | {"matmul_rate": machine.rate(facts["precision"])}


def _inherited(checkpoint: Path | None) -> dict[str, Any]:
    state = json.loads((checkpoint / "state.json").read_text()) if checkpoint else {}
    return {"precision": state["precision"]} if "precision" in state else {}


def read_facts(folder: Path) -> dict[str, Any]:
    """What was decided when the run first started: precision, wandb id, tokenizer hash. Empty for a new run."""
    path = folder / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def check_data(where: Path, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """`expected` and `found` are the fingerprints of the text by split."""
    changed = [split for split in found if expected[split] != found[split]]
    if changed:
        lines = [f"  {split}: sha256 {expected[split][:16]}... there, {found[split][:16]}... now" for split in changed]
        raise UserError(
            f"{where}: the text under this run has changed since it began\n"
            + "\n".join(lines)
            + "\n  put the old text back, or start a run under another name, or --resume never to start anew"
        )


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


def check_settings(where: object, path: Path, settings: Settings) -> None:
    """Raises `UserError` where the settings saved at `path` would give other weights; `where` begins the sentence."""
    if not path.exists():
        return
    there = _flat(yaml.safe_load(path.read_text()) or {})
    now = _flat(settings.model_dump(mode="json"))
    keys = sorted(k for k in there.keys() | now.keys() if there.get(k) != now.get(k) and not k.startswith(FREE))
    if keys:
        lines = [f"  {k}: {there.get(k)!r} there, {now.get(k)!r} now" for k in keys]
        raise UserError(
            f"{where} holds a run with other settings:\n"
            + "\n".join(lines)
            + "\n  use another name=..., or --resume never to set that folder aside and start anew"
        )


def _explicit(path: Path, settings: Settings) -> Path:
    """The checkpoint at `path`, which may be of another run with the same settings."""
    problem = problem_with(path) if path.is_dir() else "no such folder"
    if problem is not None:
        raise UserError(f"--resume {path}: {problem}\n  give a folder such as runs/NAME/checkpoints/step-000200")
    beside = path.resolve().parents[1] / "settings.yaml"
    check_settings(path, beside, settings)
    saved = json.loads((path / "state.json").read_text())
    if not beside.exists() and saved["settings_sha256"] != settings_hash(settings):
        raise UserError(f"{path}: was written by a run with other settings\n  give those of its run folder")
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
    for path in takewhile(lambda p: p.name != chosen.name, checkpoints(folder)):
        target = _free_name(path.with_name(f"not-resumed-{path.name}"))
        path.rename(target)
        print(f"{path} is newer than the checkpoint resumed and is now {target.name}")


def _free_name(path: Path) -> Path:
    number = 1
    while (target := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return target
