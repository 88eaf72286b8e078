"""Which window do these documents need? Measures what a model gains from more context, and computes what windows cost.

    python -m eval.needs TEXT ... --model MODEL [--contexts 16,64,256,1024] [--plan configs/X.yaml]

A TEXT is a file, a glob in quotes, or the YAML file of a run, which stands for its held-out text. Each text has its own
rows in the table. The advice is for all texts together. MODEL should have full attention: a model with windows gains
nothing from what it can't see.
"""

import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from eval.command import at_least, existing_file, numbers, progress
from eval.haystack import encode_documents
from eval.models import Examined, load_model
from eval.needs.advice import advice, shape_of
from eval.needs.measure import draw_excerpts, excerpt_length, score, together, windows_of
from eval.results import write_result
from model.errors import UserError, cli

CONTEXTS = (16, 64, 256, 1024)
MOST_BYTES = 1 << 24  # of a text; the excerpts are drawn from its first 16 MiB


def arguments() -> Namespace:
    parser = ArgumentParser(prog="python -m eval.needs", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("texts", nargs="+", metavar="TEXT", help="[NAME=] and a file, 'a pattern in quotes', or the YAML of a run")
    add("--model", required=True, help="run folder, checkpoint, or Hugging Face causal model, with full attention")
    add("--contexts", type=numbers, help="tokens; default: those of 16,64,256,1024 that MODEL was trained to read")
    add("--tokens", type=at_least(320), default=8192, help="tokens to score in each text; default %(default)s")
    add("--text-column", default="text", help="column of jsonl, csv and parquet files; default %(default)s")
    add("--plan", type=existing_file, metavar="CONFIG", help="YAML of a run to price; default: the shape of MODEL")
    add("--serve", type=at_least(1), default=32_768, help="tokens in the cache that is priced; default %(default)s")
    add("--out", metavar="DIR", help="folder for needs.json and needs.png; default: the run folder, else this one")
    add("--seed", type=int, default=0, help="of the excerpts and the intervals; default %(default)s")
    add("--device", help="cpu or cuda; default: cuda if there is one")
    return parser.parse_args()


def read_text(text: str, column: str) -> tuple[str, list[str]]:
    """(name, documents) of a TEXT of the command line. Raises UserError if it can't be read."""
    from data.settings import DataSettings
    from data.sources import texts
    from training.settings.config_file import load_settings

    name, _, files = text.rpartition("=")
    try:
        if files.endswith((".yaml", ".yml")):
            data = load_settings(files).data
        else:
            data = DataSettings(source="files", heldout_files=[files], text_column=column)
        return name or files, [document for source in data.mixture for document in texts(source, "heldout")]
    except UserError as error:
        raise UserError(f"TEXT {text!r}: {error}; or name a file, or a pattern such as 'docs/**/*.md'") from error


def contexts_of(examined: Examined, chosen: tuple[int, ...] | None, tokens: int) -> tuple[int, ...]:
    """The contexts to measure. Raises UserError for fewer than two, and for some that the model can't read."""
    trained = examined.settings.get("data", {}).get("seq_len")
    longest = trained or getattr(examined.model.config.get_text_config(), "max_position_embeddings", 1 << 40)
    longest = min(longest, 1 << 40 if examined.reach is None else examined.reach + 1)
    contexts = chosen or tuple(c for c in CONTEXTS if c + c // 4 <= longest)
    if len(contexts) < 2:
        raise UserError(f"--contexts {','.join(map(str, contexts))}: give at least two, such as 16,64")
    if contexts[-1] + excerpt_length(contexts, tokens) > longest:
        raise UserError(
            f"--contexts {contexts[-1]}: {examined.name} reads {longest:,} tokens (its training length or its reach), "
            f"and a pass needs a quarter more than its context; give contexts up to {longest * 4 // 5:,}"
        )
    return contexts


def measure(examined: Examined, texts: list[tuple[str, list[str]]], args: Namespace) -> dict[str, Any]:
    """Everything that needs.json holds."""
    contexts = contexts_of(examined, args.contexts, args.tokens)
    length, shape = excerpt_length(contexts, args.tokens), shape_of(examined, args.plan)
    excerpts = []
    for i, (_, documents) in enumerate(texts):
        encoded = encode_documents(examined.tokenizer, documents, MOST_BYTES)
        excerpts.append(draw_excerpts(encoded, length, args.tokens, [args.seed, i]))
    read = sum(end - start for e in excerpts for c in contexts for _, start, _, end in windows_of(e, c))
    with progress("needs", read) as advance:
        scored = [
            score(examined, name, e, contexts, [args.seed, i], advance)
            for i, ((name, _), e) in enumerate(zip(texts, excerpts, strict=True))
        ]
    everything = together(scored).result(contexts)
    return examined.header() | {
        "seed": args.seed,
        "excerpt_tokens": length,
        "texts": [text.result(contexts) for text in scored],
        "together": everything,
        "shape": args.plan or examined.name,
        "serve_tokens": args.serve,
        "advice": advice(shape, everything["contexts"], args.serve),
    }


def main() -> None:
    args = arguments()
    texts = [read_text(text, args.text_column) for text in args.texts]
    examined = load_model(args.model, args.device)
    result = measure(examined, texts, args)
    write_result("needs", result, examined.out_dir(args.out), lambda plots: plots.needs_figure(result))
    if not result["advice"]:
        print("No gain from longer contexts is beyond doubt, so there is no advice. Give more text or another model.")


if __name__ == "__main__":
    sys.exit(cli(main))
