"""Fetches the text of a config, trains its tokenizer, stores its tokens, and prints a summary.

    python scripts/prepare_data.py CONFIG.yaml [key=value ...]
    python scripts/prepare_data.py CONFIG.yaml --tokenizer DIR      trains the tokenizer alone and saves it
    python scripts/prepare_data.py CONFIG.yaml --source NAME        encodes one source of a mixture alone
    python scripts/prepare_data.py CONFIG.yaml --verify             reads every file again and says which have changed
    python scripts/prepare_data.py CONFIG.yaml --stats              also says how long the documents are, what packing
                                                                    cuts, and how many are duplicates

For conversations it also prints how many answers stand farther behind their instruction than a window holds.

The results are cached in data.cache_dir. `train.py` does the same if they are not there yet. The same command goes on
where a killed one stopped. DIR gets tokenizer.model (for data.tokenizer.model_file) and the files that
`AutoTokenizer.from_pretrained` reads. `--verify` ends with exit code 2 if a file has changed. `--stats` prints a table
and writes statistics.json and statistics.png.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import track
from rich.table import Table

from data.chat.lint import FarAnswers, far_answers, sentences
from data.mixture import open_sources, prepare_sources
from data.settings import DataSettings
from data.sources import SPLITS, altered_files
from data.statistics import Statistics, statistics
from data.token_store import TokenStore, open_tokens
from data.token_writer import read_index
from data.tokenizer import prepare_tokenizer
from model.errors import UserError, cli
from model.windows import LayerSpec, reach
from training.run.checkpoint import write_json
from training.settings.build import layer_dicts
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
    parser.add_argument("--stats", action="store_true", help="also write and print what the sources consist of")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for --stats; default: statistics in data.cache_dir")
    arguments = parser.parse_intermixed_args()
    if arguments.out and not arguments.stats:
        parser.error("--out is the folder of the statistics; add --stats")
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
    table, stores = Table("source", "split", "documents", "tokens", "bytes", "bytes per token"), {}
    for (name, folder), split in product(folders.items(), SPLITS):
        store = open_tokens(folder, tokenizer)[split]
        n_bytes, tokens = store.n_bytes, store.n_tokens
        sizes = f"{store.n_documents:,}", f"{tokens:,}", f"{n_bytes:,}", f"{n_bytes / tokens:.3f}"
        table.add_row(name or settings.data.source, split, *sizes)
        stores[f"{name or settings.data.source}, {split}"] = store
    console.print(table, facts, sep="\n")
    for name, folder in folders.items():
        index = read_index(folder) or {}
        notes = [
            f"{n:,} {what.replace('_', ' ')}" for what in ("bad_rows", "unused_documents") if (n := index.get(what))
        ]
        console.print(f"tokens{f' of {name}' if name else ''}: {folder}", *notes, sep=", ", soft_wrap=True)
    if settings.data.packing == "best_fit":
        for name, source in open_sources(folders, tokenizer, settings.data).items():
            padding = 1 - source.train.n_tokens / (len(source.rows) * settings.data.seq_len)
            console.print(f"best_fit{f' of {name}' if name else ''}: {padding:.2%} of the training rows is padding")
    far = lint(settings, stores, console)
    if arguments.stats:
        folder = arguments.out or Path(settings.data.cache_dir) / "statistics"
        write_statistics(settings, stores, far, folder, console)


def lint(settings: Settings, stores: Mapping[str, TokenStore], console: Console) -> dict[str, FarAnswers]:
    """Print how far the answers of conversations stand behind what they depend on; the figures by source and split."""
    chats = {name: store for name, store in stores.items() if store.conversations}
    if not chats:
        return {}
    limits = {name: tokens for name, tokens in named_lengths(settings).items() if name != "seq_len"}
    far = {name: far_answers(map(store.shard, range(len(store.shards))), limits) for name, store in chats.items()}
    table = Table("conversations", *far)
    table.add_row("answers", *(f"{of.answers:,}" for of in far.values()))
    for name, tokens in limits.items():
        beyond = f"begins farther back than {name} = {tokens:,}"
        table.add_row(f"instruction {beyond}", *(f"{of.instruction[name]:.2%}" for of in far.values()))
        table.add_row(f"system prompt {beyond}", *(f"{of.system[name]:.2%}" for of in far.values()))
    console.print(table)
    for name, of in far.items():
        if name.endswith(", train"):
            console.print(name.removesuffix(", train"), " ".join(sentences(of, limits)), sep=": ", soft_wrap=True)
    if settings.data.packing == "concat":
        console.print(
            "data.packing is concat: a conversation is cut at the end of a row, and what follows is trained without "
            "what came before; best_fit cuts only conversations longer than a row",
            soft_wrap=True,
        )
    return far


def write_statistics(
    settings: Settings, stores: Mapping[str, TokenStore], far: Mapping[str, FarAnswers], folder: Path, console: Console
) -> None:
    """Print and draw what the training text of each source consists of; `folder` also gets that of held-out text."""
    limits, figures = named_lengths(settings), {}
    for name, store in stores.items():
        numbers = range(len(store.shards))
        shown = track(numbers, name, console=console, transient=True, disable=not console.is_terminal)
        figures[name] = statistics(map(store.shard, shown), store.n_bytes, settings.data.seq_len, limits)
    trained = {name.removesuffix(", train"): of for name, of in figures.items() if name.endswith(", train")}
    console.print(statistics_table(trained, limits))
    from eval.plots.canvas import save  # imports matplotlib
    from eval.plots.lengths import lengths_figure

    sources = {n: asdict(of) | ({"answers": asdict(far[n])} if n in far else {}) for n, of in figures.items()}
    result = {"name": settings.name, "limits": limits, "sources": sources}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "statistics.json", result)
        save(lengths_figure(trained, limits), folder / "statistics.png")
    except OSError as error:
        raise UserError(f"--out {folder}: can't be written: {error.strerror}; name another folder") from error
    console.print(f"Written: {folder}/statistics.json, statistics.png")


def named_lengths(settings: Settings) -> dict[str, int]:
    """W, R and the row, in tokens. W is the smallest window. A stack with full layers has no R."""
    from eval.models import smallest_window

    layers = [LayerSpec(**layer) for layer in layer_dicts(settings.model)]
    named = {"W": smallest_window(layers), "R": reach(layers), "seq_len": settings.data.seq_len}
    return {name: tokens for name, tokens in named.items() if tokens}


def statistics_table(sources: Mapping[str, Statistics], limits: Mapping[str, int]) -> Table:
    """One column for each source. Shares of tokens are shares of all tokens of the source."""
    table = Table("training text", *sources)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    columns = [statistics_cells(source, limits) for source in sources.values()]
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    return table


def statistics_cells(source: Statistics, limits: Mapping[str, int]) -> dict[str, str]:
    cells, total = {}, source.total
    for name, size in source.longer.items():
        cells[f"documents longer than {name} = {limits[name]:,}"] = f"{size.documents / total.documents:.2%}"
        cells[f"tokens in documents longer than {name}"] = f"{size.tokens / total.tokens:.2%}"
    for packing, wasted in source.packings.items():
        cells[f"documents cut by {packing}"] = f"{wasted.cut:.2%}"
        cells[f"padding with {packing}"] = f"{wasted.padding:.2%}"
    return cells | {"documents equal to an earlier one": f"{source.duplicates:.2%}"}


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
