"""How information hops: after which layer, and how far behind a needle, can its value be read?

    python -m eval.relay MODEL [--out DIR] [--n 400] [--read auto|head|probe] [--max-offset N] [--text FILE]

Rows are `haystack <needle> VALUE haystack ...`, without a question. The residual stream after layer l at offset d
behind the value is asked for the value: layer x offset is the **relay map**. The stream after l layers can hold the
value at most up to the reach of the first l layers, l (W - 1) for equal windows: the frontier. Each row is also run
with another value, and beyond the frontier both runs must give the same bits.

Two ways to read: the relay head that the run was trained with (`head`), kept in its checkpoints; and, for any model, a
linear probe (`probe`) for each cell: ridge regression onto the values, in closed form, fit on one half of the rows and
scored on the other (Alain and Bengio, 2016). `auto` takes the head where there is one.

Legend: N rows, T positions, D offsets, K streams (the embedding, then after each layer), E hidden size, V values.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor

from data.tasks.layout import clean_filler
from data.tasks.vocabulary import RecallVocabulary, recall_vocabulary
from eval import plots
from eval.forward import ROW_TOKENS, body
from eval.haystack import Haystack, open_haystack
from eval.models import Examined, load_model
from eval.recall.__main__ import n_values_of
from model import windows
from model.errors import UserError, cli
from training.run.checkpoint import newest_valid

Reader = Callable[[Tensor], Tensor]  # streams (K, N, E) at one offset -> values read (K, N), of the rows to be scored
COLUMNS = 48  # offsets of the map
RIDGE = 0.1  # of the rows: the penalty, for features of unit variance
KEPT_BYTES = 1 << 30  # of streams held at once
HELD = 0.5  # the front of the value: where at least half of the rows still give it


@dataclass(frozen=True)
class Rows:
    """Token ids (N, T) with the value and with another in its place; `labels` (N,): which value it is."""

    first: Tensor
    second: Tensor
    labels: Tensor
    value_at: int


def offsets_of(examined: Examined, longest: int, columns: int = COLUMNS) -> list[int]:
    """Evenly spaced offsets, in tokens, from 1 to a window beyond the reach, at most `longest`."""
    window = examined.window or 64
    reach = examined.reach if examined.reach is not None else examined.layers * (window - 1)
    last = max(1, min(reach + window, longest))
    return sorted({max(1, round(last * i / columns)) for i in range(1, columns + 1)} | {1})


def frontier(examined: Examined) -> list[int | None]:
    """Farthest offset, in tokens, that each stream can know of: 0 for the embedding; None: unbounded."""
    return [0, *(windows.reach(examined.specs[:layers]) for layers in range(1, examined.layers + 1))]


def make_rows(haystack: Haystack, vocabulary: RecallVocabulary, n: int, lead: int, longest: int, seed: int) -> Rows:
    """N rows of `lead` tokens of haystack, the needle, its value, and `longest` tokens of haystack."""
    length, value_at = lead + len(vocabulary.needle) + 1 + longest, lead + len(vocabulary.needle)
    tokens = np.stack([clean_filler(haystack.filler(i, length, seed), vocabulary) for i in range(n)])
    rng = np.random.default_rng([seed, 17])
    labels = np.arange(n) % len(vocabulary.values)  # all equally often
    rng.shuffle(labels)
    others = (labels + rng.integers(1, len(vocabulary.values), n)) % len(vocabulary.values)
    values = np.asarray(vocabulary.values)
    tokens[:, lead:value_at] = vocabulary.needle
    first, second = tokens.copy(), tokens.copy()
    first[:, value_at], second[:, value_at] = values[labels], values[others]
    return Rows(torch.from_numpy(first), torch.from_numpy(second), torch.from_numpy(labels), value_at)


@torch.inference_mode()
def streams(examined: Examined, input_ids: Tensor, at: Sequence[int], layers: Sequence[int]) -> Tensor:
    """(K, D, N, E) the residual streams of `layers` at the positions `at`; in batches."""
    size = max(1, ROW_TOKENS.get(examined.device.type, 65_536) // input_ids.shape[1])
    options = {} if examined.ours else {"use_cache": False}
    parts = []
    for ids in input_ids.to(examined.device).split(size):
        hidden = body(examined.model)(input_ids=ids, output_hidden_states=True, **options).hidden_states
        parts.append(torch.stack([hidden[i][:, list(at)].transpose(0, 1).float().cpu() for i in layers]))
    return torch.cat(parts, dim=2)


# --------------------------------------------------------------------------------------------------------- readers


def linear_probe(labels: Tensor, n_values: int) -> Reader:
    """Reads the second half of the rows by what a ridge regression onto one-hot values learned from the first."""
    half = len(labels) // 2
    target = torch.nn.functional.one_hot(labels[:half], n_values).float()
    target = target - target.mean(0)

    def read(stream_kne: Tensor) -> Tensor:
        fit, asked = stream_kne[:, :half], stream_kne[:, half:]
        mean, spread = fit.mean(1, keepdim=True), fit.std(1, keepdim=True).clamp_min(1e-6)
        fit, asked = (fit - mean) / spread, (asked - mean) / spread
        return (asked @ ridge(fit, target, RIDGE * half)).argmax(-1)

    return read


def ridge(x_kne: Tensor, y_nv: Tensor, penalty: float) -> Tensor:
    """(K, E, V) weights that minimise |x w - y|^2 + penalty |w|^2, by the smaller of the two normal equations."""
    n, e = x_kne.shape[1:]
    x_t = x_kne.transpose(1, 2)
    if e <= n:
        return torch.linalg.solve(x_t @ x_kne + penalty * torch.eye(e, dtype=x_kne.dtype), x_t @ y_nv)
    return x_t @ torch.linalg.solve(
        x_kne @ x_t + penalty * torch.eye(n, dtype=x_kne.dtype), y_nv.expand(len(x_kne), -1, -1)
    )


def head_reader(examined: Examined, weight_ve: Tensor) -> Reader:
    """Reads all rows by the head that the run was trained with, behind the decoder's final norm, as in training."""
    norm = examined.model.model.norm

    @torch.inference_mode()
    def read(stream_kne: Tensor) -> Tensor:
        return (norm(stream_kne.to(examined.device)).cpu() @ weight_ve.T).argmax(-1)

    return read


def relay_head(examined: Examined, n_values: int) -> Tensor | None:
    """(V, E) weight of the relay head in the run's newest whole checkpoint; None where there is none."""
    if not (examined.ours and examined.run_dir):
        return None
    checkpoint = newest_valid(examined.run_dir)
    weight = load_file(checkpoint / "trainer.safetensors").get("relay_head") if checkpoint else None
    if weight is None or weight.shape != (n_values, examined.model.config.hidden_size):
        return None
    return weight.float()


# ------------------------------------------------------------------------------------------------------ measurement


def read_map(
    examined: Examined, rows: Rows, offsets: Sequence[int], read: Reader, console: Console
) -> tuple[Tensor, int, int]:
    """Share read rightly (K, D); then how many of the pairs beyond the frontier gave the same bits, and of how many.

    Layers are taken in groups, so that what is held stays below `KEPT_BYTES`; each group runs the model once more.
    """
    at = [rows.value_at + d for d in offsets]
    cell = len(rows.first) * examined.model.config.get_text_config().hidden_size * 4 * len(at) * 2
    groups = torch.arange(examined.layers + 1).split(max(1, KEPT_BYTES // cell))
    limits, table, same, beyond = frontier(examined), [], 0, 0
    for group in track(groups, "relay map", console=console, transient=True, disable=console.quiet):
        layers = group.tolist()
        first, second = (streams(examined, ids, at, layers) for ids in (rows.first, rows.second))
        read_kdn = torch.stack([read(first[:, d]) for d in range(len(at))], dim=1)
        table.append((read_kdn == rows.labels[-read_kdn.shape[-1] :]).float().mean(-1))
        equal = (first == second).all(-1).sum(-1)
        out = torch.tensor([[(limit := limits[i]) is not None and d > limit for d in offsets] for i in layers])
        same, beyond = same + int(equal[out].sum()), beyond + int(out.sum()) * len(rows.first)
    return torch.cat(table), same, beyond


def front(accuracy: Tensor, offsets: Sequence[int]) -> list[int]:
    """Per stream the farthest offset at which at least half of the rows give their value; 0 where none does.

    >>> front(torch.tensor([[0.1, 0.0, 0.0], [0.9, 0.6, 0.2]]), [1, 8, 16])
    [0, 8]
    """
    return [max((d for d, right in zip(offsets, row, strict=True) if right >= HELD), default=0) for row in accuracy]


def pace(fronts: Sequence[int]) -> float | None:
    """Tokens a layer by which the front moves on, by least squares up to where it is farthest; None if it does not.

    >>> pace([0, 5, 10, 15, 15])
    5.0
    """
    last = int(np.argmax(fronts))
    if last < 1:
        return None
    return float(round(np.polyfit(np.arange(last + 1), fronts[: last + 1], 1)[0], 3))


def measure(
    examined: Examined,
    haystack: Haystack,
    n: int = 400,
    seed: int = 0,
    how: str = "auto",
    max_offset: int = 4096,
    console: Console | None = None,
) -> dict[str, Any]:
    """Everything relay.json holds. Raises UserError where `how` is `head` and the run has none."""
    n_values = n_values_of(examined)
    vocabulary = recall_vocabulary(examined.tokenizer, n_values)
    lead = examined.window or 16
    room = (examined.max_tokens or 1 << 40) - lead - len(vocabulary.needle) - 1
    offsets = offsets_of(examined, min(max_offset, room))
    rows = make_rows(haystack, vocabulary, n, lead, offsets[-1], seed)
    head = relay_head(examined, n_values) if how != "probe" else None
    if how == "head" and head is None:
        raise UserError(
            f"--read head: {examined.name!r} has no checkpoint with a relay head for {n_values} values; "
            "use --read probe, or train with recall.relay_loss_weight"
        )
    read = linear_probe(rows.labels, n_values) if head is None else head_reader(examined, head)
    accuracy, same, beyond = read_map(examined, rows, offsets, read, console or Console(quiet=True))
    fronts = front(accuracy, offsets)
    return examined.header() | {
        "seed": seed,
        "haystack": haystack.name,
        "read_by": "linear probe" if head is None else "relay head",
        "n": n - n // 2 if head is None else n,
        "chance": 1 / n_values,
        "offsets": offsets,
        "accuracy": [[round(float(value), 4) for value in row] for row in accuracy],
        "frontier": frontier(examined),
        "front": fronts,
        "tokens_per_layer": pace(fronts),
        "pairs_beyond_frontier": beyond,
        "identical_beyond_frontier": same == beyond if beyond else None,
    }


# --------------------------------------------------------------------------------------------------- command line


def finding(result: dict[str, Any]) -> str:
    """What the map says, in a sentence or two."""
    farthest, moved = max(result["front"]), result["tokens_per_layer"]
    text = (
        f"Read by the {result['read_by']}, the value is there in at least half of the rows up to {farthest:,} tokens "
        "behind it"
    )
    if moved and result["window"] and result["reach"] is not None:
        text += f"; its front moves {moved:.1f} tokens a layer, where W − 1 = {result['window'] - 1:,} are possible"
    if result["identical_beyond_frontier"] is None:
        return text + "."
    verdict = "give the same bits with another value" if result["identical_beyond_frontier"] else "DIFFER: a fault"
    return text + f". Beyond the frontier all {result['pairs_beyond_frontier']:,} streams {verdict}."


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.relay", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint, or Hugging Face causal LM")
    parser.add_argument("--out", metavar="DIR", help="where relay.json goes; default: the run folder, or here")
    parser.add_argument("--n", type=int, default=400, help="rows; a probe is fit on one half, scored on the other")
    parser.add_argument("--read", choices=("auto", "head", "probe"), default="auto", help="auto: head if there is one")
    parser.add_argument("--max-offset", type=int, default=4096, help="tokens behind the value at which to stop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", metavar="FILE", help="a UTF-8 file to use as haystack")
    parser.add_argument("--data", metavar="CONFIG.yaml", help="take the held-out text of this config")
    parser.add_argument("--device", help="cpu or cuda; default: cuda when there is one")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    if args.n < 4:
        raise UserError(
            f"--n {args.n}: give at least 4 rows; a probe needs some to learn from and some to be scored on"
        )
    if args.max_offset < 1:
        raise UserError(f"--max-offset {args.max_offset}: give at least 1 token")
    console = Console()
    examined = load_model(args.model, args.device)
    text = open_haystack(examined, args.text, args.data)
    result = measure(examined, text, args.n, args.seed, args.read, args.max_offset, console)
    out = examined.out_dir(args.out)
    (out / "relay.json").write_text(json.dumps(result))
    plots.save(plots.relay_figure(result), out / "relay.png")
    console.print(finding(result), highlight=False)
    console.print(f"Written: {out / 'relay.json'}, {out / 'relay.png'}")
    if result["identical_beyond_frontier"] is False:
        raise SystemExit("a stream beyond its frontier changed with the value: the attention sees too far")


if __name__ == "__main__":
    sys.exit(cli(main))
