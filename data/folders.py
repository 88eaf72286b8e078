"""Cache folders that appear whole or not at all."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import UserError


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new empty folder to write into; it takes the place of `folder` when the block ends well.

    A killed process leaves no half of a cache under the right name. Raises `UserError` where nothing can be written.
    """
    aside = _make_aside(folder)
    try:
        yield aside
        if folder.exists():
            shutil.rmtree(folder)
        _put(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put(aside: Path, folder: Path) -> None:
    """Rename, unless another process was faster: folders are named by what made them, so it made the same."""
    try:
        os.replace(aside, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _make_aside(folder: Path) -> Path:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"{str(folder.parent)!r} can't be written ({error.strerror}); give another folder, e.g. data.cache_dir"
        ) from error
