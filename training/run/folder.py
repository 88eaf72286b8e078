"""Creates or reopens the folder of a run. Refuses it if it holds another run. Renames it for a fresh start.

settings.yaml   all settings, defaults included        run.json    what the first start decided, such as the precision
checkpoints/    step-000200/ ...                       tokenizer/  metrics.jsonl  hf/  skipped/  profile/
.lock           names the process that writes here now, or wrote last
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count, product, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import yaml
from pydantic import BaseModel, ValidationError

from model.errors import UserError
from training.run.checkpoint import (
    checkpoints,
    clear_leftovers,
    newest_valid,
    problem_with,
    replace_folder,
    write_json,
    write_text,
)  # fmt: skip
from training.run.writer import LOCK, Writer
from training.settings.schema import Settings

if TYPE_CHECKING:
    import torch

    from data.mixture import Source
    from data.tokenizer import Tokenizer
    from training.objective import Objective


class Facts(BaseModel, extra="allow"):
    """run.json: what the first start decided."""

    precision: str | None = None
    data_sha256: dict[str, str] | None = None
    row_order: int | None = None
    tokenizer_sha256: str | None = None
    teacher_sha256: str | None = None
    settings_sha256: str | None = None
    wandb_id: str | None = None


FACTS_SAVED = tuple(Facts.model_fields)  # with a checkpoint
FOLDERS = ("checkpoints", "hf", "tokenizer", "skipped", "profile")
FILES = ("settings.yaml", "run.json", "metrics.jsonl")
# These settings change no weight, so they may change between two starts of a run.
FREE = (
    "name", "run_dir", "tracking.", "data.cache_dir", "training.log_every_steps", "training.save_every_steps",
    "training.keep_checkpoints", "training.validate_every_steps", "training.validation_tokens",
    "training.probe_distances", "training.probe_items", "training.max_skipped_steps", "training.profile",
)  # fmt: skip
# These change weights only by rounding: the order of a sum, or where a product is computed. So a run that ran out of
# memory can go on with smaller micro-batches, and on another machine. Not `training.precision`: the run keeps its own.
ROUNDING = (
    "training.micro_batch_tokens", "training.activation_checkpointing", "training.compile", "training.num_threads",
    "training.deterministic", "training.context_parallel", "model.attention_backend",
)  # fmt: skip


ROW_ORDER = 2  # raise it when the same text and settings would give other batches
LAST_WITH_ORDER = {1: "commit a715185"}


def run_dir(settings: Settings) -> Path:
    """The run folder. A leading ~ is the home folder, as in a shell. Raises UserError for ~NAME without such a user."""
    folder = Path(os.path.expanduser(settings.run_dir or f"runs/{settings.name}"))
    if str(folder).startswith("~"):
        raise UserError(f"run_dir: {folder} names the home folder of nobody here\n  write ./{folder} or another path")
    return folder


def settings_hash(settings: Settings) -> str:
    """Hash of all settings that decide the weights. It stands in for a settings.yaml that is missing or damaged."""
    flat = _flat(settings.model_dump(mode="json"))
    bound = {k: v for k, v in flat.items() if not k.startswith(FREE + ROUNDING)}
    return hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()


def check_start(settings: Settings, resume: str) -> None:
    """Raises UserError for mistakes that are visible before torch is imported. `open_run` checks them again."""
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise _no_checkpoint(resume, "no such folder")
    refuse_foreign(run_dir(settings))
    if resume != "never":
        check_settings(run_dir(settings), settings)


def refuse_foreign(folder: Path) -> None:
    """Raises UserError for a folder that holds something, but no run, and for one whose files are not what they should.

    Logs and the notes of a sweep are written before the run begins.
    """
    try:
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except OSError as problem:
        raise _not_writable(folder, problem) from problem
    begun = {name for name in names if name.startswith((LOCK, ".writing-")) or name.endswith((".log", "sweep.json"))}
    if names > begun and "run.json" not in names and not checkpoints(folder) and not _saved_settings(folder):
        what = "holds no run of ours (it has no run.json), but other files"
        raise UserError(f"run_dir: {folder} {what}\n  choose an empty or a new folder with run_dir=PATH")
    right = dict.fromkeys(FOLDERS, Path.is_dir) | dict.fromkeys(FILES, Path.is_file)
    for path in (folder / name for name in right if os.path.lexists(folder / name)):
        if not right[path.name](path):
            raise UserError(f"{path} should be a {'folder' if path.name in FOLDERS else 'file'}\n  move it elsewhere")


def open_run(settings: Settings, resume: str) -> tuple[Path | None, Writer]:
    """Prepare the run folder. Returns the checkpoint to resume (None: a fresh start), and the right to write there.

    `resume` is `auto` (newest valid checkpoint), `never` (an existing folder is set aside) or a checkpoint's path.
    Raises UserError, which names the other process, if the run is being trained.
    """
    folder = run_dir(settings)
    refuse_foreign(folder)
    try:
        writer = _become_writer(folder, anew=resume == "never")
    except OSError as problem:
        raise _not_writable(folder, problem) from problem
    try:
        return _choose_checkpoint(folder, settings, resume), writer
    except BaseException:
        writer.close()
        raise


def _choose_checkpoint(folder: Path, settings: Settings, resume: str) -> Path | None:
    for key in check_settings(folder, settings):
        print(f"{folder / 'settings.yaml'}: {key} is ignored, because this version has no such setting")
    clear_leftovers(folder)
    chosen = newest_valid(folder) if resume in ("auto", "never") else _explicit(Path(resume))
    if chosen is not None:
        _check_checkpoint(chosen, settings)
    write_text(folder / "settings.yaml", yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    (folder / "checkpoints").mkdir(exist_ok=True)
    for path in _not_resumed(folder, chosen):  # or the next start would resume them
        print(f"{path} is not resumed and is now {_set_aside(path, f'not-resumed-{path.name}').name}")
    return chosen


def _not_resumed(folder: Path, chosen: Path | None) -> Iterable[Path]:
    """The run's checkpoints that are newer than the one `chosen`, or all if that is another run's."""
    last = chosen.resolve() if chosen is not None else None
    return takewhile(lambda path: path.resolve() != last, checkpoints(folder))


def _not_writable(folder: Path, problem: OSError) -> UserError:
    remedy = "choose another with run_dir=PATH, or change its permissions"
    return UserError(f"run_dir: {folder} can't be read, written or set aside: {problem.strerror}\n  {remedy}")


def _become_writer(folder: Path, anew: bool) -> Writer:
    remedy = "start another run with name=NAME or run_dir=PATH"
    folder.mkdir(parents=True, exist_ok=True)
    writer = Writer(folder, remedy)
    if not anew or all(path.name == LOCK for path in folder.iterdir()):
        return writer
    print(f"--resume never: {folder} was there and is now {_set_aside(folder, folder.absolute().name)}")
    folder.mkdir()
    writer.close()
    return Writer(folder, remedy)


def decide_once(
    settings: Settings, tokenizer: "Tokenizer", sources: Mapping[str, "Source"], device: "torch.device",
    checkpoint: Path | None = None, origin: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The facts that the first start writes and every resume keeps, and this machine's matmul rate in FLOP/s.

    A run that resumes another run's `checkpoint` takes its precision. `origin` describes initial weights that were not
    random. Raises UserError where the text (`sources` by name) or the tokenizer has changed.
    """
    from training.distillation import teacher_hash
    from training.processes.precision import measure

    folder, machine = run_dir(settings), measure(device)
    now = {
        "precision": machine.choose(settings.training.precision),
        "data_sha256": data_hashes(sources),
        "row_order": ROW_ORDER,
        "tokenizer_sha256": tokenizer.sha256,
        "teacher_sha256": teacher_hash(settings),
        "settings_sha256": settings_hash(settings),
        "wandb_id": uuid4().hex[:8],
    }
    decided = settings.training.precision != "auto"
    if checkpoint is not None:
        saved = read_facts(checkpoint, "state.json").get("precision")
        now["precision"], decided = saved or now["precision"], decided or saved is not None
    # A start that ended before its first checkpoint may have begun with other weights.
    facts: dict[str, Any] = now | _noted(folder) | dict(origin or {})
    if decided and facts["precision"] != now["precision"]:
        where = checkpoint or "training.precision"
        remedy = f"put the old {folder / 'run.json'} back, or start another run with run_dir=PATH"
        raise UserError(f"{folder}: precision is {facts['precision']}, but {now['precision']} in {where}\n  {remedy}")
    check_same_data(folder, facts, now)
    write_json(folder / "run.json", facts)
    replace_folder(folder / "tokenizer", tokenizer.save)
    rates = f"fp32 {machine.fp32_flops / 1e9:.0f}, bf16 {machine.bf16_flops / 1e9:.0f} GFLOP/s"
    print(f"matmul: {rates} -> {facts['precision']} (training.precision={settings.training.precision})")
    return facts | {"matmul_rate": machine.rate(facts["precision"])}


def data_hashes(sources: Mapping[str, "Source"]) -> dict[str, str]:
    """Fingerprint of the text by source and split."""
    stores = {
        f"{name} ".lstrip() + split: getattr(s, split) for name, s in sources.items() for split in ("train", "heldout")
    }
    return {name: store.source_sha256 for name, store in stores.items()}


def read_facts(folder: Path, name: str = "run.json") -> dict[str, Any]:
    """The content of a JSON file in the folder of a run or a checkpoint; empty if the file is missing or empty.

    Raises UserError if it is damaged.
    """
    path = folder / name
    if not path.exists():
        return {}
    try:
        if not path.is_file() or not isinstance(facts := json.loads(path.read_text() or "{}"), dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as problem:
        raise UserError(f"{path} can't be read ({problem})\n  restore it from a backup, or delete it") from problem
    return facts


def _noted(folder: Path) -> dict[str, Any]:
    """What run.json says; if it is missing or damaged, what the newest sound checkpoint says."""
    with suppress(UserError, ValidationError):
        if facts := Facts.model_validate(read_facts(folder)).model_dump(exclude_none=True):
            return facts
    newest = next((path for path in checkpoints(folder) if problem_with(path) is None), None)
    state = read_facts(newest, "state.json") if newest else {}
    return {name: state[name] for name in FACTS_SAVED if name in state}


def check_same_data(where: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError if a hash of `now` is another one in `saved`: of the text by split, the tokenizer, a teacher."""
    text, before = now.get("data_sha256", {}), saved.get("data_sha256", {})
    if changed := [split for split in text if before.get(split) != text[split]]:
        lines = (f"  {s}: sha256 {before.get(s, 'none')[:16]}... there, {text[s][:16]}... now\n" for s in changed)
        remedy = "put the old text back, or start a run under another name, or --resume never to start anew"
        raise UserError(f"{where}: the text under this run has changed since it began\n{''.join(lines)}  {remedy}")
    if saved.get("tokenizer_sha256") not in (None, now["tokenizer_sha256"]):
        raise UserError(
            f"{where}: was trained with another tokenizer\n"
            f"  there: sha256 {saved['tokenizer_sha256']}\n  now:   sha256 {now['tokenizer_sha256']}\n"
            "  give data.tokenizer.model_file the tokenizer of that run, or start a run under another name"
        )
    if "teacher_sha256" in now and saved.get("teacher_sha256") not in (None, now["teacher_sha256"]):
        remedy = "put the old weights back into the folder of the teacher, or start a run under another name"
        raise UserError(f"{where}: the weights of the teacher (training.distillation) have changed\n  {remedy}")


def check_same_order(where: Path, saved: Mapping[str, Any]) -> None:
    """Raises UserError if a checkpoint was written by a version that reads the rows of text in another order."""
    if saved.get("row_order", 1) != ROW_ORDER:
        last = LAST_WITH_ORDER.get(saved.get("row_order", 1), "a later one")
        raise UserError(
            f"{where}: was written by a version that reads the rows of text in another order\n"
            f"  go on with that version ({last}), or start a run under another name, or --resume never"
        )


def check_same_batches(
    path: Path, objectives: Sequence["Objective"], before: int, distances: Iterable[Mapping[str, int]]
) -> None:
    """Raises UserError if a step would have another number of sequences than with the `before` processes of `path`.

    Otherwise another number of processes changes nothing: each takes an equal share of the same sequences.
    `distances` are the values of D that are still to come, by task.
    """
    processes = "1 process" if before == 1 else f"{before} processes"
    for objective, of_tasks in product(objectives, distances):
        now, rows = objective.ranks, objective.plan(of_tasks, before).rows
        if rows != objective.plan(of_tasks).rows:
            at = f" at distance {max(of_tasks.values())}" if objective.name == "recall" else ""
            raise UserError(
                f"{path}: was saved by {processes}; {now} would train on other batches\n"
                f"  a step has {rows} rows of {objective.name}{at}, which {now} can't share equally\n"
                f"  start it with {processes}, or with a number that divides {rows}"
            )


def check_settings(folder: Path, settings: Settings, checkpoint: Path | None = None) -> list[str]:
    """Raises UserError if the run in `folder` has settings that would give other weights; the message lists them.

    A setting that is newer than the run has its default there. Returns the settings of the run that no longer exist.
    """
    noted = _noted(folder).get("settings_sha256")
    if noted == settings_hash(settings):
        return []
    if (read := _saved_settings(folder)) is None:
        if noted is not None:
            raise _other_settings(checkpoint or folder, f"{folder / 'settings.yaml'} is missing or damaged, and ")
        return []
    saved, dropped = read
    there, now = (_flat(s.model_dump(mode="json")) for s in (saved, settings))
    differing = (k for k in sorted(there | now) if there.get(k) != now.get(k))
    if names := [k for k in differing if not k.startswith(FREE + ROUNDING)]:
        lines = (f"  {k}: {there.get(k)!r} there, {now.get(k)!r} now\n" for k in names)
        where = checkpoint or f"run folder {folder}"
        remedy = "use another name=..., or --resume never to set that folder aside and start anew"
        raise UserError(f"{where} holds a run with other settings:\n{''.join(lines)}  {remedy}")
    return dropped


def _other_settings(where: Path, why: str = "") -> UserError:
    remedy = "give the settings of its run, or put that run's settings.yaml back to see what differs"
    return UserError(f"{where}: {why}was written by a run with other settings, or by another version\n  {remedy}")


def _saved_settings(folder: Path) -> tuple[Settings, list[str]] | None:
    """The settings saved in `folder`, and the names of those that this version does not have.

    None if the file is missing or damaged. Raises UserError if this version can't read a setting.
    """
    path = folder / "settings.yaml"
    try:
        tree = yaml.safe_load(path.read_text()) if path.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(tree, dict):
        return None
    try:
        return Settings.model_validate(tree), []
    except ValidationError as problem:
        faults = [(e["type"], ".".join(map(str, e["loc"])), e["msg"]) for e in problem.errors()]
    if wrong := "; ".join(f"{key}: {what}" for kind, key, what in faults if kind != "extra_forbidden"):
        remedy = "go on with the version that wrote them, or use another name=..., or --resume never to start anew"
        raise UserError(f"{path}: this version can't read the settings of that run: {wrong}\n  {remedy}")
    return Settings.model_validate(tree, extra="ignore"), [key for _, key, _ in faults]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted name."""
    if not isinstance(tree, dict) or not tree:
        return {prefix[:-1]: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}{key}.").items()}


def _explicit(path: Path) -> Path:
    if problem := problem_with(path) if path.is_dir() else "no such folder":
        raise _no_checkpoint(path, problem)
    return path


def _check_checkpoint(path: Path, settings: Settings) -> None:
    """Raises UserError if `path`, which may lie in another run's folder, was trained with other settings."""
    run, written_with = path.resolve().parents[1], read_facts(path, "state.json").get("settings_sha256")
    check_settings(run, settings, path)
    noted = _noted(run).get("settings_sha256", written_with)
    if written_with != noted or (_saved_settings(run) is None and written_with != settings_hash(settings)):
        raise _other_settings(path)


def _no_checkpoint(path: Path | str, problem: str) -> UserError:
    return UserError(f"--resume {path}: {problem}\n  give a folder such as runs/NAME/checkpoints/step-000200")


def _set_aside(path: Path, name: str) -> Path:
    """Rename `path` to the first of NAME.old-1, NAME.old-2 ... that is free."""
    path = Path(os.path.abspath(path))
    names = (path.with_name(f"{name}.old-{number}") for number in count(1))
    return path.rename(next(name for name in names if not name.exists()))
