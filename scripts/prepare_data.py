"""Fetches the text of a config, trains its tokenizer, stores its tokens, and prints a summary.

    python scripts/prepare_data.py CONFIG.yaml [key=value ...]
    python scripts/prepare_data.py CONFIG.yaml --tokenizer DIR      trains the tokenizer alone and saves it
    python scripts/prepare_data.py CONFIG.yaml --source NAME        encodes one source of a mixture alone
    python scripts/prepare_data.py CONFIG.yaml --verify             reads every file again and says which have changed

The results are cached in data.cache_dir. `train.py` does the same if they are not there yet. The same command goes on
where a killed one stopped. DIR gets tokenizer.model (for data.tokenizer.model_file) and the files that
`AutoTokenizer.from_pretrained` reads. `--verify` ends with exit code 2 if a file has changed.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from data.mixture import prepare_sources
from data.settings import DataSettings
from data.sources import SPLITS, altered_files
from data.token_store import open_tokens
from data.token_writer import read_index
from data.tokenizer import prepare_tokenizer
from model.errors import UserError, cli
from training.settings.config_file import load_settings
from training.settings.schema import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.tokenizer.vocab_size=4096")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="train the tokenizer alone and save it in DIR")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that encode text; default: one a core")
    parser.add_argument("--source", metavar="NAME", help="only this source of data.sources")
    parser.add_argument("--verify", action="store_true", help="only compare every file with its remembered hash")
    arguments = parser.parse_intermixed_args()
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers is {arguments.workers}; give at least 1, or leave it out for one a core")
    settings = load_settings(arguments.config, arguments.overrides)
    if arguments.verify:
        return verify(settings.data)
    console, tokenizer = Console(), prepare_tokenizer(settings)
    facts = f"tokenizer: {tokenizer.vocab_size:,} tokens, sha256 {tokenizer.sha256[:16]}"
    if arguments.tokenizer:
        try:
            tokenizer.save(arguments.tokenizer)
        except OSError as error:
            raise UserError(f"--tokenizer {arguments.tokenizer}: can't be written: {error.strerror}") from error
        return console.print(f"{facts}, in {arguments.tokenizer}")
    if arguments.source:
        settings = only(settings, arguments.source)
    folders = prepare_sources(settings, tokenizer, arguments.workers)
    table = Table("source", "split", "documents", "tokens", "bytes", "bytes per token")
    for (name, folder), split in product(folders.items(), SPLITS):
        store = open_tokens(folder, tokenizer)[split]
        n_bytes, tokens = store.n_bytes, store.n_tokens
        sizes = f"{store.n_documents:,}", f"{tokens:,}", f"{n_bytes:,}", f"{n_bytes / tokens:.3f}"
        table.add_row(name or settings.data.source, split, *sizes)
    console.print(table, facts, sep="\n")
    for name, folder in folders.items():
        index = read_index(folder) or {}
        notes = [
            f"{n:,} {what.replace('_', ' ')}" for what in ("bad_rows", "unused_documents") if (n := index.get(what))
        ]
        console.print(f"tokens{f' of {name}' if name else ''}: {folder}", *notes, sep=", ", soft_wrap=True)


def only(settings: Settings, name: str) -> Settings:
    """The settings with one source. Raises UserError if there is none of that name."""
    chosen = [source for source in settings.data.sources if source.name == name]
    if not chosen:
        names = ", ".join(source.name for source in settings.data.sources) or "none"
        raise UserError(f"--source {name}: no such name in data.sources; give one of: {names}")
    return settings.model_copy(update={"data": settings.data.model_copy(update={"sources": chosen})})


def verify(data: DataSettings) -> None:
    """Raises UserError if a file has another content than when it was last read."""
    files, altered = altered_files(data)
    if altered:
        raise UserError(
            f"{len(altered)} of {files} files have changed since they were last read; put the old ones back, or go on "
            "with the new ones\n" + "\n".join(f"  {path}" for path in altered)
        )
    print(f"{files} files were read; none has changed")


if __name__ == "__main__":
    sys.exit(cli(main))
