"""The folder of a run: created, opened again, refused if it holds another run, or set aside for a fresh start.

settings.yaml   all settings, defaults included        run.json    what the first start decided
checkpoints/    step-000200/ ...                       tokenizer/  metrics.jsonl  hf/  skipped/  profile/
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import count, product, takewhile
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import yaml
from pydantic import ValidationError

from model.errors import UserError
from training.run.checkpoint import checkpoints, clear_leftovers, newest_valid, problem_with, write_json, write_text
from training.settings.schema import Settings

if TYPE_CHECKING:
    import torch

    from data.mixture import Source
    from data.tokenizer import Tokenizer
    from training.objective import Objective

FACTS_SAVED = (
    "data_sha256",
    "row_order",
    "tokenizer_sha256",
    "settings_sha256",
    "precision",
    "wandb_id",
)  # with a checkpoint
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
    "training.deterministic", "model.attention_backend",
)  # fmt: skip


ROW_ORDER = 2  # raise it when the same text and settings would give other batches
LAST_WITH_ORDER = {1: "commit a715185"}


def run_dir(settings: Settings) -> Path:
    return Path(settings.run_dir or f"runs/{settings.name}")


def settings_hash(settings: Settings) -> str:
    """Hash of all settings that are not `FREE`. It stands in for a settings.yaml that is missing."""
    bound = {k: v for k, v in _flat(settings.model_dump(mode="json")).items() if not k.startswith(FREE)}
    return hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()


def check_start(settings: Settings, resume: str) -> None:
    """Raises UserError for mistakes that are visible before torch is imported. `open_run` checks them again."""
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise _no_checkpoint(resume, "no such folder")
    if resume != "never":
        check_settings(run_dir(settings), settings)


def open_run(settings: Settings, resume: str) -> Path | None:
    """Prepare the run folder and return the checkpoint to resume, or None for a fresh start.

    `resume` is `auto` (newest valid checkpoint), `never` (an existing folder is set aside) or a checkpoint's path.
    """
    folder = run_dir(settings)
    try:
        if resume == "never" and folder.is_dir() and any(folder.iterdir()):
            print(f"--resume never: {folder} was there and is now {_set_aside(folder, folder.name)}")
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as problem:
        remedy = "choose another with run_dir=PATH, or change its permissions"
        raise UserError(f"run_dir: {folder} can't be written or set aside: {problem.strerror}\n  {remedy}") from problem
    for key in check_settings(folder, settings):
        print(f"{folder / 'settings.yaml'}: {key} is ignored, because this version has no such setting")
    clear_leftovers(folder)
    chosen = newest_valid(folder) if resume in ("auto", "never") else _explicit(Path(resume), settings)
    (folder / "checkpoints").mkdir(exist_ok=True)
    if chosen is not None and chosen.parent.resolve() == (folder / "checkpoints").resolve():
        for path in takewhile(lambda p: p.name != chosen.name, checkpoints(folder)):  # or the next start resumes them
            now = _set_aside(path, f"not-resumed-{path.name}").name
            print(f"{path} is newer than the checkpoint resumed and is now {now}")
    write_text(folder / "settings.yaml", yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    return chosen


def decide_once(
    settings: Settings, tokenizer: "Tokenizer", sources: Mapping[str, "Source"], device: "torch.device",
    checkpoint: Path | None = None, origin: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The facts that the first start writes and every resume keeps, and this machine's matmul rate in FLOP/s.

    A run that resumes another run's `checkpoint` takes its precision. `origin` describes initial weights that were not
    random. Raises UserError where the text (`sources` by name) or the tokenizer has changed.
    """
    from training.processes.precision import measure

    folder, machine = run_dir(settings), measure(device)
    now = {
        "precision": machine.choose(settings.training.precision),
        "data_sha256": data_hashes(sources),
        "row_order": ROW_ORDER,
        "tokenizer_sha256": tokenizer.sha256,
        "settings_sha256": settings_hash(settings),
        "wandb_id": uuid4().hex[:8],
    } | dict(origin or {})
    if checkpoint is not None:
        now["precision"] = read_facts(checkpoint, "state.json").get("precision", now["precision"])
    facts: dict[str, Any] = now | read_facts(folder)
    check_same_data(folder, facts, now)
    write_json(folder / "run.json", facts)
    tokenizer.save(folder / "tokenizer")
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
    """The content of a JSON file in the folder of a run or a checkpoint; empty if the file is missing or empty."""
    text = (folder / name).read_text() if (folder / name).exists() else ""
    return json.loads(text or "{}")


def check_same_data(where: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError if a hash of `now`, of a split of the text or of the tokenizer, is another one in `saved`."""
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
    path = folder / "settings.yaml"
    if not path.exists():
        return []
    saved, dropped = _read_settings(path)
    there, now = (_flat(s.model_dump(mode="json")) for s in (saved, settings))
    differing = (k for k in sorted(there | now) if there.get(k) != now.get(k))
    if names := [k for k in differing if not k.startswith(FREE + ROUNDING)]:
        lines = (f"  {k}: {there.get(k)!r} there, {now.get(k)!r} now\n" for k in names)
        where = checkpoint or f"run folder {folder}"
        remedy = "use another name=..., or --resume never to set that folder aside and start anew"
        raise UserError(f"{where} holds a run with other settings:\n{''.join(lines)}  {remedy}")
    return dropped


def _read_settings(path: Path) -> tuple[Settings, list[str]]:
    """The settings saved at `path`, and the names of those that this version does not have."""
    tree = yaml.safe_load(path.read_text()) or {}
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


def _explicit(path: Path, settings: Settings) -> Path:
    """The checkpoint at `path`, which may belong to another run with the same settings."""
    problem = problem_with(path) if path.is_dir() else "no such folder"
    if problem is not None:
        raise _no_checkpoint(path, problem)
    run = path.resolve().parents[1]
    check_settings(run, settings, path)
    saved = read_facts(path, "state.json").get("settings_sha256")
    if not (run / "settings.yaml").exists() and saved != settings_hash(settings):
        remedy = f"give the settings of its run, or copy that run's settings.yaml to {run} to see what differs"
        raise UserError(f"{path}: was written by a run with other settings, or by another version\n  {remedy}")
    return path


def _no_checkpoint(path: Path | str, problem: str) -> UserError:
    return UserError(f"--resume {path}: {problem}\n  give a folder such as runs/NAME/checkpoints/step-000200")


def _set_aside(path: Path, name: str) -> Path:
    """Rename `path` to the first of NAME.old-1, NAME.old-2 ... that is free."""
    names = (path.with_name(f"{name}.old-{number}") for number in count(1))
    return path.rename(next(name for name in names if not name.exists()))
