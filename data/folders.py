"""Writes cache folders completely or not at all, and remembers the hashes of files."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from model.errors import UserError

SETTLED_NS = 2_000_000_000  # a file changed later than this may change again within one tick of its file system's clock
FORGET_AFTER = 10_000  # hashes of files that were not asked for


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file. Raises `UserError` if it can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{str(path)!r} can't be read: {error.strerror}") from error


def file_hashes(paths: Iterable[Path], memory: Path, *, trust: bool = True) -> list[str]:
    """SHA-256 (hex) of each file. The JSON file `memory` remembers them.

    A file is not read if `trust` is set and its size and times are the remembered ones. Raises `UserError` if a file
    can't be read.
    """
    known = remembered(memory)
    hashes, settled = [], {}
    for path in paths:
        name, stamp = str(path.absolute()), _stamp(path)
        *known_stamp, known_hash = known.get(name, [""])
        hashes.append(known_hash if trust and known_stamp == stamp else sha256_of(path))
        if time.time_ns() - max(stamp[1:]) > SETTLED_NS and _stamp(path) == stamp:
            settled[name] = [*stamp, hashes[-1]]
    if any(known.get(name) != entry for name, entry in settled.items()):
        # Another process may have added its own while this one read the files.
        others = [item for item in remembered(memory).items() if item[0] not in settled]
        with suppress(OSError):  # in a cache that can't be written, the next start reads the files again
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_text(memory, json.dumps(dict(others[-FORGET_AFTER:]) | settled))
    return hashes


def remembered(memory: Path) -> dict[str, list[Any]]:
    """By absolute path: the size, the times, and last the hash of a file. Empty if `memory` is missing or damaged."""
    try:
        entries = dict(json.loads(memory.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
    return {name: entry for name, entry in entries.items() if isinstance(entry, list) and len(entry) == 4}


def _stamp(path: Path) -> list[int]:
    """Bytes, and two times: copying a file may set the first back, but never the second."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def write_text(path: Path, text: str) -> None:
    """Replace a file by one that is on the disk. A process that is killed leaves the old file or the new one."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait while another process on this folder is in such a block. A killed process holds nobody up.

    Raises `UserError` if nothing can be written beside `folder`.
    """
    with _unwritable_is_mistake(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(".lock").open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _unwritable_is_mistake(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"{str(folder)!r} can't be written ({error.strerror})"
        raise UserError(f"{what}; give another folder, e.g. data.cache_dir") from error


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new empty folder to write into. It replaces `folder` when the block ends without an exception.

    A killed process leaves no half-written cache under the right name. Raises `UserError` if nothing can be written.
    """
    with _unwritable_is_mistake(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    new = aside / folder.name  # `aside` is closed to other users, who may share the cache
    try:
        new.mkdir()
        yield new
        if folder.exists():
            shutil.rmtree(folder)
        try:
            os.replace(new, folder)
        except OSError as error:
            # Another process was faster. Folders are named by a fingerprint of their content, so it wrote the same.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
