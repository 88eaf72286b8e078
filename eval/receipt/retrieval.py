"""Which layers of a pretrained model fetch a value from far back? These should stay full when the others get windows.

    python -m eval.receipt.retrieval MODEL [--keep 4] [--window 64] [--distance 384]

The items are those of `eval.receipt`. At the query's last token each head spreads its attention over the row. The
share that falls on the value and its two neighbours, summed over the heads of a layer, says how much the layer fetches
(the retrieval heads of Wu et al., 2024, arXiv 2404.15574, on two tasks). The command prints the layers with the most as
`model.layers` of a config. Check the pattern with `python -m eval.receipt MODEL --layers ...` before training.

Legend: B rows, T query positions, S key positions, H heads, G kv heads, D head size.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from eval.command import at_least, existing_file, progress
from eval.models import Examined
from eval.receipt.states import load_before
from model.errors import UserError, cli

if TYPE_CHECKING:
    from torch import Tensor

    from eval.receipt.recall import Probe


def attention_at_end(q_bhtd: "Tensor", k_bgsd: "Tensor") -> "Tensor":
    """(B, H, S) what the last query of each row attends to, if the layer sees all keys."""
    import torch

    k = k_bgsd.repeat_interleave(q_bhtd.shape[1] // k_bgsd.shape[1], dim=1)
    scores = (q_bhtd[:, :, -1:] @ k.transpose(-1, -2))[:, :, 0] * q_bhtd.shape[-1] ** -0.5
    return torch.softmax(scores, dim=-1)


def shares_on_values(examined: Examined, probe: "Probe", items: Sequence[int]) -> list[float]:
    """For each layer the attention on the value and its two neighbours, summed over heads; the mean of the items."""
    import torch

    layers = examined.model.model.layers
    shares, batch = [0.0] * len(layers), [probe.item(i, probe.distances[-1]) for i in items]
    at = batch[0].value_position

    def watch(layer: int) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
        def hook(_module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            x, rotary, attend, cache = arguments

            def watched(q: "Tensor", k: "Tensor", *others: Any) -> "Tensor":
                shares[layer] += float(attention_at_end(q, k)[..., at - 1 : at + 2].sum(dim=(1, 2)).mean()) / len(batch)
                return attend(q, k, *others)

            return x, rotary, watched, cache

        return hook

    with ExitStack() as hooks, torch.inference_mode():
        for i, layer in enumerate(layers):
            hooks.callback(layer.self_attn.register_forward_pre_hook(watch(i)).remove)
        for item in batch:
            ids = torch.tensor([item.tokens], device=examined.device)
            examined.model(input_ids=ids, logits_to_keep=1)
    return shares


def pattern(full: Sequence[int], layers: int, window: int, global_tokens: int) -> str:
    """`model.layers` in one line of YAML, with the layers `full` full and the others sliding.

    >>> pattern([1], 3, 64, 4)
    '[{window: 64, global_tokens: 4}, {kind: full}, {window: 64, global_tokens: 4}]'
    """
    sliding = f"{{window: {window}, global_tokens: {global_tokens}}}" if global_tokens else f"{{window: {window}}}"
    return f"[{', '.join('{kind: full}' if i in full else sliding for i in range(layers))}]"


def main() -> None:
    parser = ArgumentParser(prog="python -m eval.receipt.retrieval", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("model", metavar="MODEL", help="the pretrained model: folder, hub name, GGUF file or smollm2")
    add("--keep", type=at_least(1), default=4, help="number of layers that stay full; default %(default)s")
    add("--window", type=at_least(1), default=64, help="window of the other layers in tokens; default %(default)s")
    add("--global-tokens", type=at_least(0), default=4, help="first tokens that those always see; default %(default)s")
    add("--distance", type=at_least(16), default=384, help="from value to query, in tokens; default %(default)s")
    add("--n", type=at_least(1), default=8, help="items of each task; default %(default)s")
    add("--text", type=existing_file, metavar="FILE", help="use this UTF-8 file as held-out text")
    add("--device", help="cpu or cuda; default: cuda if there is one")
    args = parser.parse_args()
    examined = load_before("MODEL", args.model, args.device)
    if args.keep >= examined.layers:
        raise UserError(f"--keep {args.keep}: the model has {examined.layers} layers; keep fewer of them full")

    from eval.haystack import open_haystack
    from eval.receipt.recall import open_probes

    probes = open_probes(examined.tokenizer, open_haystack(examined, args.text), [args.distance], seed=0)
    with progress("attention on values", len(probes)) as advance:
        by_task = []
        for probe in probes:
            by_task.append(shares_on_values(examined, probe, range(args.n)))
            advance(1)
    mean = [sum(shares) / len(shares) for shares in zip(*by_task, strict=True)]
    print("layer  " + "  ".join(f"{probe.name:>8}" for probe in probes))
    for layer, shares in enumerate(zip(*by_task, strict=True)):
        print(f"{layer:>5}  " + "  ".join(f"{share:8.2f}" for share in shares))
    full = sorted(sorted(range(examined.layers), key=lambda i: -mean[i])[: args.keep])
    print(f"\nLayers {', '.join(map(str, full))} fetch most from {args.distance:,} tokens back. With these full:")
    print(f"layers: {pattern(full, examined.layers, args.window, args.global_tokens)}")


if __name__ == "__main__":
    sys.exit(cli(main))
