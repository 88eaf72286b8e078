"""Cache folders that appear complete or not at all, and hashes of files."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import UserError


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file. Raises `UserError` if it can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{str(path)!r} can't be read: {error.strerror}") from error


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new empty folder to write into. It replaces `folder` when the block ends without an exception.

    A killed process leaves no half-written cache under the right name. Raises `UserError` if nothing can be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    except OSError as error:
        what = f"{str(folder.parent)!r} can't be written ({error.strerror})"
        raise UserError(f"{what}; give another folder, e.g. data.cache_dir") from error
    try:
        yield aside
        if folder.exists():
            shutil.rmtree(folder)
        try:
            os.replace(aside, folder)
        except OSError as error:
            # Another process was faster. Folders are named by a fingerprint of their content, so it wrote the same.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
