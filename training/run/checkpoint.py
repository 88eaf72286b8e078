"""Writes, checks and finds checkpoints. They are written under another name, synced and then renamed.

checkpoints/step-000200/manifest.json        {"step": 200, "files": {"state.json": {"sha256": ..., "bytes": ...}}}
                        hf/                  a complete Hugging Face checkpoint with its tokenizer
                        trainer.safetensors  moments, relay head, adapters; shard-*.safetensors where they are sharded
                        frozen/              with adapters: the frozen weights; one file, linked by each checkpoint
                        state.json           step, token counts, curriculum, RNG states, settings hash, wandb id
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from model.errors import MAKE_ROOM, UserError

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "step-"
OURS = re.compile(PREFIX + "([0-9]+)")  # a user's own copy, step-000010-good, is no checkpoint and is never deleted
LEFTOVER = re.compile(rf"\.(writing|deleting|shards)-{PREFIX}[0-9]+")
MANIFEST = "manifest.json"
SHARDS = "shard-*.safetensors"
Expected = Mapping[str, tuple[int, str]]  # by file name: bytes and sha256
Write = Callable[[Path], None]  # writes files into an existing folder


def save_checkpoint(
    run_dir: Path, step: int, state: dict[str, Any], tensors: "dict[str, Tensor] | Path", write_hf: Write
) -> None:
    """Write a checkpoint that appears complete or not at all. Raises UserError where the disk is full or read-only.

    `tensors` are the trainer's, or a folder that holds their shards (`training.processes.parallel`). `write_hf`
    fills the folder `hf`, and may write files beside it.
    """
    from safetensors.torch import save_file

    path = run_dir / "checkpoints" / f"{PREFIX}{step:06d}"

    def write(folder: Path) -> None:
        (folder / "hf").mkdir()
        write_hf(folder / "hf")
        if isinstance(tensors, Path):
            for shard in tensors.glob(SHARDS):
                shard.rename(folder / shard.name)
            shutil.rmtree(tensors)
        else:
            copies = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
            save_file(copies, folder / "trainer.safetensors")
        write_json(folder / "state.json", state)
        _write_manifest(folder, step=step)

    try:
        replace_folder(path, write)  # an invalid one that the last resume passed over may be there
    except OSError as problem:
        clear_leftovers(run_dir)
        what = f"the checkpoint of step {step} could not be written"
        raise UserError(f"{path}: {what}: {problem.strerror}\n{MAKE_ROOM}") from problem


def save_export(path: Path, write_hf: Write) -> None:
    """Write the `hf` folder of a run with a manifest, which replaces the one that is there. Raises OSError."""

    def write(folder: Path) -> None:
        write_hf(folder)
        _write_manifest(folder)

    replace_folder(path, write)


def _write_manifest(folder: Path, **facts: Any) -> None:
    """List all files of `folder` with their sizes and hashes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    listed = {str(p.relative_to(folder)): {"sha256": file_sha256(p), "bytes": p.stat().st_size} for p in files}
    write_json(folder / MANIFEST, facts | {"files": listed})


def replace_folder(path: Path, write: Write) -> None:
    """Write a new folder, which replaces the one at `path` once everything is synced. Raises OSError."""
    aside = path.with_name(f".writing-{path.name}")
    _delete(aside)
    try:
        aside.mkdir(parents=True)
        write(aside)
        for file in [*aside.rglob("*"), aside]:
            _sync(file)
        _delete(path)
        aside.rename(path)
    except Exception as problem:  # safetensors and tokenizers report a full disk as an error of their own
        number = re.search(r"\(os error ([0-9]+)\)", str(problem))
        if isinstance(problem, OSError) or number is None:
            raise
        raise OSError(int(number[1]), str(problem), str(path)) from problem
    finally:
        with suppress(OSError):
            _delete(aside)
    _sync(path.parent)


def _delete(path: Path) -> None:
    """Delete a folder, or a file; of a link only the link."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def problem_with(path: Path, below: str = "") -> str | None:
    """Why the checkpoint can't be trusted; None if it is complete and each file has its size and hash in the manifest.

    A file of weights or settings that is not in the manifest is a problem too: a loader could take it for one of ours.
    Only files whose names begin with `below` are read.
    """
    return _problem(path, lambda expected: _difference(path, expected, below))


def problem_with_export(path: Path) -> str | None:
    """Why the weights of an `hf` folder can't be trusted; None if they are those of its manifest.

    Its other files are the user's to change.
    """

    def changed(expected: Expected) -> str | None:
        return _changed(path, {name: facts for name, facts in expected.items() if name.endswith(".safetensors")})

    return _problem(path, changed)


def _problem(path: Path, compare: Callable[[Expected], str | None]) -> str | None:
    """What `compare` finds about the files of a manifest, or why it can't."""
    try:
        if not (path / MANIFEST).is_file():
            return f"{MANIFEST} can't be read (no such file)"
        files = json.loads((path / MANIFEST).read_text())["files"]
        return compare({name: (facts["bytes"], facts["sha256"]) for name, facts in files.items()})
    except OSError as problem:
        return f"{Path(problem.filename or path).name} can't be read ({problem.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        return f"{MANIFEST} can't be read ({problem.__class__.__name__})"


def _difference(path: Path, expected: Expected, below: str) -> str | None:
    """What tells the files of a checkpoint from those of its manifest."""
    there = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    tensors = {str(Path(name).parent) for name in expected if name.endswith(".safetensors")}
    if {"state.json", "hf/config.json"} - expected.keys() or {".", "hf"} - tensors:
        return f"{MANIFEST} lists no complete checkpoint"
    if missing := sorted(expected.keys() - there):
        return f"{missing[0]} is missing"
    unlisted = [name for name in sorted(there - expected.keys()) if name.startswith("hf/") or name.endswith("tensors")]
    if unlisted:
        return f"{unlisted[0]} is not in {MANIFEST}; move it elsewhere"
    return _changed(path, {name: facts for name, facts in expected.items() if name.startswith(below)})


def _changed(path: Path, expected: Expected) -> str | None:
    """The first file that is not as it was written."""
    for name, size_and_hash in expected.items():
        if ((path / name).stat().st_size, file_sha256(path / name)) != size_and_hash:
            return f"{name} has another size or sha256 than when it was written"
    return None


def refuse_damaged(folder: Path) -> None:
    """Raises UserError if `folder` is a checkpoint, or the `hf` of one or of a run, with other weights than written."""
    if (folder / MANIFEST).exists() and not (folder / "hf").exists() and (problem := problem_with_export(folder)):
        raise UserError(f"{folder}: {problem}\n  give a checkpoint of the run, or restore it from a backup")
    for path in (folder, folder.parent):
        if (path / MANIFEST).exists() and (path / "hf").is_dir() and (problem := problem_with(path, "hf/")):
            raise UserError(f"{path}: {problem}\n  take another checkpoint, or restore this one from a backup")


def checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, newest first, not verified."""
    steps = {path: OURS.fullmatch(path.name) for path in (run_dir / "checkpoints").glob(f"{PREFIX}*")}
    return sorted((path for path, step in steps.items() if step), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def newest_valid(run_dir: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest valid checkpoint; None if there is none at all. Reports invalid ones; UserError if all are invalid.

    If the training deletes checkpoints while they are looked at, those that it wrote meanwhile are looked at too.
    """
    listed: list[Path] = []
    while listed != (listed := checkpoints(run_dir)):
        problems = ""
        for path in listed:
            problem = problem_with(path)
            if problem is None:
                return path
            if path.exists():
                problems += f"{path}: {problem}\n  "
                say(f"checkpoint passed over: {path}: {problem}")
    if listed:
        remedy = "restore one from a backup, or start again with --resume never (the folder is set aside, not deleted)"
        raise UserError(f"no valid checkpoint is left to resume from:\n  {problems}{remedy}")
    return None


def load_state(path: Path, like: "Mapping[str, Tensor] | None" = None) -> "tuple[dict[str, Any], dict[str, Tensor]]":
    """state.json and the trainer's tensors; shards are spread over the processes as the parameters `like` are."""
    from safetensors.torch import load_file

    from training.processes.parallel import read_shards

    state, whole = json.loads((path / "state.json").read_text()), path / "trainer.safetensors"
    try:
        return state, load_file(whole) if whole.exists() else read_shards(path, like or {})
    except SafetensorError as problem:
        raise UserError(f"{whole} can't be read ({problem})\n  run the same command again") from problem


def prune(run_dir: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep`, and leftovers.

    At least two stay: no step has shown yet that the weights of the newest one are good.
    """
    for path in checkpoints(run_dir)[max(2, keep) :]:
        path.rename(path.with_name(f".deleting-{path.name}"))
    clear_leftovers(run_dir)


def clear_leftovers(run_dir: Path) -> None:
    """Delete what interrupted writes and deletions left: it takes room and is no checkpoint."""
    for path in (run_dir / "checkpoints").glob(f".*-{PREFIX}*"):
        if LEFTOVER.fullmatch(path.name):
            with suppress(OSError):
                _delete(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. Numbers that are not finite become null."""
    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False))


def finite(tree: Any) -> Any:
    """The same tree with None for NaN and infinity, which JSON does not have.

    >>> finite({"bits": [1.5, float("nan")], "n": 2})
    {'bits': [1.5, None], 'n': 2}
    """
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write atomically: a reader sees the old file or the new one, never half of one."""
    aside = path.with_name(f".writing-{path.name}")
    aside.write_bytes(content)
    _sync(aside)
    aside.replace(path)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
