"""How far the encoding of text is: a bar on a terminal, else a line every ten seconds, on standard error."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

SECONDS_BETWEEN_LINES = 10


@contextmanager
def encoding_progress(split: str, total: int | None, n_bytes: int) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of the bytes of text and the documents encoded so far.

    `total` is about the bytes of text in all, if known. `n_bytes` were encoded before.
    """
    console, first = Console(stderr=True), n_bytes
    start = last_line = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(split, total=total, completed=n_bytes)

        def advance(n_bytes: int, documents: int) -> None:
            nonlocal last_line
            text = f"{split}: {documents:,} documents"
            bar.update(task, completed=n_bytes, description=text)
            now = time.monotonic()
            if not console.is_terminal and now - last_line >= SECONDS_BETWEEN_LINES:
                last_line, rate = now, (n_bytes - first) / (now - start)
                left = f", about {max(0, total - n_bytes) / rate / 60:.1f} minutes left" if total else ""
                console.print(f"{text}, {n_bytes / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s{left}", highlight=False)

        yield advance
