"""Fetch the text of a configuration, train its tokenizer, pack its tokens, and show what came of it.

    python scripts/prepare_data.py CONFIG.yaml [key=value ...]

All of it is cached in data.cache_dir; `train.py` does the same when it is not there yet.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.token_store import TokenStore, fingerprint, prepare_tokens
from data.tokenizer import prepare_tokenizer
from model.errors import cli
from training.settings.config_file import load_settings


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare the data of a configuration; see the head of this file.")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.tokenizer.vocab_size=4096")
    arguments = parser.parse_intermixed_args()
    settings = load_settings(arguments.config, arguments.overrides)
    tokenizer = prepare_tokenizer(settings)
    train, heldout = prepare_tokens(settings, tokenizer)
    console = Console()
    console.print(summary({"train": train, "heldout": heldout}))
    console.print(f"tokenizer: {tokenizer.vocab_size:,} pieces, sha256 {tokenizer.sha256[:16]}")
    made_of = fingerprint([train.source_sha256, heldout.source_sha256], tokenizer)
    console.print(f"tokens: fingerprint {made_of[:16]}, in {settings.data.cache_dir}")


def summary(stores: dict[str, TokenStore]) -> Table:
    """Documents, tokens, bytes and bytes per token of each split."""
    table = Table("split", *("documents", "tokens", "bytes", "bytes per token"))
    for split, store in stores.items():
        n_bytes, tokens = store.bytes_of(0, len(store.tokens)), len(store.tokens)
        table.add_row(split, f"{len(store.names):,}", f"{tokens:,}", f"{n_bytes:,}", f"{n_bytes / tokens:.3f}")
    return table


if __name__ == "__main__":
    sys.exit(cli(main))
