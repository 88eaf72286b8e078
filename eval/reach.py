"""How far a model can see: theory, the exact cliff, and where the gradient really goes.

    python -m eval.reach MODEL [--out DIR] [--plot]

1. **Theory**, from the layer descriptions alone: reach R, receptive field R + 1, W x k.
2. **Cliff test**, exact: change one token at distance d and compare the logits at the query bit by bit. Beyond R
   they must be equal, through every backend and every way of feeding the model. A reachable token that changes no
   bit is not a fault: thirty-two hops may underflow float32.
3. **Gradient field**: how the energy of d(output)/d(input embedding) is spread over distance, before and after
   training, over held-out text and random output directions.
4. **Alpha**, the share of the residual stream that stays put at each layer, and what others predict from it.

Legend: B batch, T positions, E hidden size, V vocabulary.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from eval import plots, theory
from eval.forward import body, last_logits
from eval.haystack import Haystack, open_haystack
from eval.models import Examined, load_model
from model import hub, windows
from model.cache import RingCache
from model.decoder import InitOptions, WindreachForCausalLM, build_model
from model.errors import UserError, cli

FloatArray = NDArray[np.float64]
LastLogits = Callable[[Tensor], Tensor]
BACKENDS = ("reference", "blocked", "flex", "flash", "xformers")
DENSE_LIMIT = 4096
QUANTILES = (0.5, 0.9, 0.99)


# ------------------------------------------------------------------------------------------------- cliff test


def prefill_in_chunks(examined: Examined, input_ids: Tensor, size: int) -> Tensor:
    """Logits (B, V) at the last position when the row is fed through the ring `size` tokens at a time."""
    cache = RingCache(examined.model.config)
    with torch.inference_mode():
        for chunk in input_ids.to(examined.device).split(size, dim=1):
            output = examined.model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1].float().cpu()


def left_padded(examined: Examined, input_ids: Tensor) -> Tensor:
    """Logits (B, V) when row r is padded on the left by r tokens more than the last row needs."""
    rows, length = input_ids.shape
    padded = torch.zeros(rows, length + rows - 1, dtype=torch.long)
    mask = torch.zeros_like(padded)
    trimmed = [input_ids[r, r:] for r in range(rows)]
    for r, row in enumerate(trimmed):
        padded[r, -len(row) :] = row
        mask[r, -len(row) :] = 1
    with torch.inference_mode():
        output = examined.model(
            input_ids=padded.to(examined.device), attention_mask=mask.to(examined.device), logits_to_keep=1
        )
    return output.logits[:, -1].float().cpu()


def packed_behind(examined: Examined, input_ids: Tensor, own: int) -> Tensor:
    """Logits (B, V) when only the last `own` tokens are the query's document; what precedes is another document."""
    documents = torch.zeros_like(input_ids)
    documents[:, -own:] = 1
    device = examined.device
    with torch.inference_mode():
        output = examined.model(
            input_ids=input_ids.to(device), documents=documents.to(device), use_cache=False, logits_to_keep=1
        )
    return output.logits[:, -1].float().cpu()


def cliff_distances(examined: Examined) -> list[int]:
    """One, around W, around R, and the headline figure."""
    window, reach = examined.window or 1, examined.reach or 0
    product = examined.window_times_layers or 0
    wanted = {1, window - 1, window, reach - 1, reach, reach + 1, reach + 2, product, product + window}
    return sorted(d for d in wanted if d >= 1)


def cliff_paths(examined: Examined) -> Iterator[tuple[str, LastLogits | str]]:
    """(name, logits function) for each way of feeding the model, or (name, why it can't be had here)."""
    if not examined.ours:
        yield "full forward", lambda ids: last_logits(examined, ids)
        return
    assert examined.folder is not None
    assert examined.window is not None
    for backend in BACKENDS:
        try:
            model = hub.load(str(examined.folder), backend=backend).eval().to(examined.device)
        except UserError as error:
            yield f"forward, {backend}", str(error)
            continue
        twin = Examined(examined.name, model, examined.tokenizer, examined.specs, examined.folder, examined.run_dir)
        yield f"forward, {backend}", lambda ids, twin=twin: last_logits(twin, ids)  # type: ignore[misc]
    window = examined.window
    for size in sorted({max(1, window - 1), window, window + 1, 2 * window + 3}):
        yield f"prefill by {size}", lambda ids, size=size: prefill_in_chunks(examined, ids, size)  # type: ignore[misc]
    yield "token by token", lambda ids: prefill_in_chunks(examined, ids, 1)
    yield "left-padded batch", lambda ids: left_padded(examined, ids)


def cliff(examined: Examined, seed: int = 0, max_tokens: int = 8192) -> list[dict[str, Any]]:
    """Rows {path, distance, changed, expected, equal}: `expected` is what theory says of equality of the logits."""
    if examined.reach is None or examined.window is None:
        return []
    distances = cliff_distances(examined)
    rows = len(distances) + 1
    length = distances[-1] + rows + 2
    if length > min(max_tokens, examined.max_tokens or max_tokens):
        return []
    base, changed = _probe_batch(examined, distances, length, seed)
    reachable = windows.reachable(examined.specs, length)
    table: list[dict[str, Any]] = []
    for path, logits in cliff_paths(examined):
        if isinstance(logits, str):
            table.append({"path": path, "unavailable": logits})
            continue
        if "reference" in path and length > DENSE_LIMIT:
            table.append({"path": path, "unavailable": f"the dense mask of {length:,} tokens would not fit"})
            continue
        before, after = logits(base), logits(changed)
        for row, distance in enumerate([*distances, examined.reach + 1]):
            table.append(
                {
                    "path": path,
                    "distance": distance,
                    "changed": "one token" if row < len(distances) else "every token from here back",
                    "expected": not bool(reachable[distance]),
                    "equal": bool(torch.equal(before[row], after[row])),
                }
            )
    if examined.ours:
        table.extend(_cliff_between_documents(examined, base))
    return table


def _probe_batch(examined: Examined, distances: list[int], length: int, seed: int) -> tuple[Tensor, Tensor]:
    """(B, T) twice: row r of the second differs from the first at distances[r]; the last row everywhere beyond R."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = examined.tokenizer.vocab_size
    row = torch.randint(0, vocabulary, (1, length), generator=generator)
    base = row.repeat(len(distances) + 1, 1)
    changed = base.clone()
    for r, distance in enumerate(distances):
        changed[r, length - 1 - distance] = (base[r, length - 1 - distance] + 1) % vocabulary
    assert examined.reach is not None
    beyond = slice(0, length - 1 - examined.reach)
    changed[-1, beyond] = (base[-1, beyond] + 1) % vocabulary
    return base, changed


def _cliff_between_documents(examined: Examined, base: Tensor) -> list[dict[str, Any]]:
    """Tokens of another document never matter, not even the one just before the query's document."""
    table = []
    for own in sorted({1, 2, max(2, (examined.window or 2) // 2)}):
        other = base.clone()
        other[:, :-own] = (other[:, :-own] + 1) % examined.tokenizer.vocab_size
        equal = torch.equal(packed_behind(examined, base, own), packed_behind(examined, other, own))
        table.append(
            {
                "path": "packed documents",
                "distance": own,
                "changed": "the whole document before",
                "expected": True,
                "equal": equal,
            }
        )
    return table


def cliff_holds(rows: list[dict[str, Any]]) -> bool:
    """True when no token beyond the reach, and none of another document, changed a bit on any path."""
    return all(row["equal"] for row in rows if row.get("expected"))


# --------------------------------------------------------------------------------------------- gradient field


@contextmanager
def embeddings_caught(model: Any) -> Iterator[list[Tensor]]:
    """Inside, each forward pass leaves its input embeddings (B, T, E), as a leaf that collects gradient."""
    caught: list[Tensor] = []

    def catch(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_(True)
        caught.append(leaf)
        return leaf

    handle = model.get_input_embeddings().register_forward_hook(catch)
    try:
        yield caught
    finally:
        handle.remove()


def gradient_energy(model: Any, texts: Tensor, directions: int = 4, seed: int = 0) -> FloatArray:
    """Energy of the input gradient by distance (T,), summing to 1: index d is d tokens back from the query.

    texts (B, T). For each random unit direction u of the final hidden state h, the gradient of u.h at the last
    position with respect to every input embedding; squared, summed over E, averaged over texts and directions.
    """
    device = next(model.parameters()).device
    options = {} if isinstance(model, WindreachForCausalLM) else {"use_cache": False}
    generator = torch.Generator().manual_seed(seed)
    total = np.zeros(texts.shape[1])
    for row in texts.split(8):
        with embeddings_caught(model) as caught:
            hidden = body(model)(input_ids=row.to(device), **options).last_hidden_state[:, -1]
        for _ in range(directions):
            direction = torch.randn(hidden.shape, generator=generator).to(device)
            (gradient,) = torch.autograd.grad((hidden * direction).sum(), caught[0], retain_graph=True)
            energy = gradient.double().square().sum(-1)
            energy = energy / energy.sum(-1, keepdim=True).clamp_min(1e-300)
            total += energy.sum(0).cpu().numpy()[::-1]
    return total / total.sum()


def energy_quantiles(energy: FloatArray, window: int | None, reach: int | None) -> list[dict[str, Any]]:
    """For each share of the energy: the distance within which it lies, in tokens, in W and in % of R."""
    cumulative = np.cumsum(energy) / energy.sum()
    rows = []
    for share in QUANTILES:
        distance = int(np.searchsorted(cumulative, share))
        rows.append(
            {
                "share": share,
                "distance": distance,
                "in_windows": distance / window if window else None,
                "percent_of_reach": 100 * distance / reach if reach else None,
            }
        )
    return rows


def fit_decay(energy: FloatArray, reach: int | None) -> dict[str, dict[str, float]]:
    """Least squares on log energy at distances 1..R: exponential exp(-d/length) and power d^-exponent."""
    end = min(len(energy) - 1, reach or len(energy) - 1)
    distance = np.arange(1, end + 1, dtype=np.float64)
    value = energy[1 : end + 1]
    used = value > 1e-30
    if used.sum() < 3:
        return {}
    log = np.log(value[used])
    slope, _, straight = _line(distance[used], log)
    exponent, _, power = _line(np.log(distance[used]), log)
    return {
        "exponential": {"length_tokens": -1.0 / slope if slope else float("inf"), "r_squared": straight},
        "power": {"exponent": -exponent, "r_squared": power},
    }


def _line(x: FloatArray, y: FloatArray) -> tuple[float, float, float]:
    """(slope, intercept, R squared) of y over x."""
    slope, intercept = np.polyfit(x, y, 1)
    rest = y - (slope * x + intercept)
    spread = float(((y - y.mean()) ** 2).sum())
    return float(slope), float(intercept), 1.0 - float((rest**2).sum()) / spread if spread else 1.0


def untrained(examined: Examined) -> nn.Module:
    """The same architecture before its first step: our seeded initialisation, or the library's default one."""
    if not examined.ours:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(examined.model.config).eval().to(examined.device)
    init, seed = None, int(examined.settings.get("seed", 0))
    if examined.settings:
        from training.settings import Settings

        init = InitOptions(**Settings.model_validate(examined.settings).model.init.model_dump())
    return build_model(examined.model.config, init, seed).eval().to(examined.device)


def gradient_field(examined: Examined, texts: Tensor, seed: int = 0) -> dict[str, Any]:
    """{"before": {...}, "after": {...}}: energy by distance, quantiles and fits, before and after training."""
    field: dict[str, Any] = {"texts": texts.shape[0], "tokens": texts.shape[1]}
    for moment, model in (("before", untrained(examined)), ("after", examined.model)):
        energy = gradient_energy(model, texts, seed=seed)
        field[moment] = {
            "energy": [float(f"{value:.4g}") for value in energy],
            "quantiles": energy_quantiles(energy, examined.window, examined.reach),
            "quantiles_beyond_own_token": energy_quantiles(
                np.concatenate([[0.0], energy[1:]]), examined.window, examined.reach
            ),
            "fits": fit_decay(energy, examined.reach),
        }
    return field


# ------------------------------------------------------------------------------------------- alpha and theory


def _attention_of(layer: nn.Module) -> nn.Module | None:
    for name in ("self_attn", "attn", "attention", "self_attention"):
        if isinstance(module := getattr(layer, name, None), nn.Module):
            return module
    return None


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The stack of decoder layers: the longest ModuleList whose members have an attention block."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and _attention_of(m[0])]
    return max((list(stack) for stack in stacks), key=len, default=[])


def residual_shares(examined: Examined, texts: Tensor) -> list[float]:
    """Alpha of each layer: |x| / (|x| + |a|), x the residual stream, a what the attention block writes into it.

    Norms over E, averaged over positions and texts. Empty when the model hides its attention blocks.
    """
    streams: dict[int, Tensor] = {}
    shares: dict[int, float] = {}
    handles = []
    for i, layer in enumerate(_decoder_layers(examined.model)):

        def keep(_m: nn.Module, args: Any, kwargs: Any, i: int = i) -> None:
            streams[i] = args[0] if args else kwargs["hidden_states"]

        def weigh(_m: nn.Module, _inputs: Any, output: Any, i: int = i) -> None:
            written = output[0] if isinstance(output, tuple) else output
            x, a = streams[i].norm(dim=-1), written.norm(dim=-1)
            shares[i] = float((x / (x + a).clamp_min(1e-12)).mean())

        attention = _attention_of(layer)
        assert attention is not None
        handles += [layer.register_forward_pre_hook(keep, with_kwargs=True), attention.register_forward_hook(weigh)]
    try:
        with torch.inference_mode():
            examined.model(input_ids=texts.to(examined.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return [shares[i] for i in sorted(shares)]


def predictions(examined: Examined, alphas: list[float]) -> dict[str, Any]:
    """Xiao's bound and the exact mixture at the measured alphas, and Xiao's own example (alpha = .95)."""
    window, reach = examined.window, examined.reach
    if window is None or reach is None or len(alphas) != examined.layers:
        return {}
    if any(spec.kind == "chunked" for spec in examined.specs):
        return {}  # how far a query sees depends on where it stands in its block: the recurrence does not hold
    alpha = float(np.mean(alphas))
    spans = [spec.window for spec in examined.specs]
    influence = theory.mixture(spans, alphas, reach + 1, [spec.dilation for spec in examined.specs])
    return {
        "epsilon": 0.01,
        "xiao_bound": theory.xiao_bound(window, alpha),
        "xiao_bound_at_alpha_0.95": theory.xiao_bound(window, 0.95),
        "mixture_mean": float(np.arange(reach + 1) @ influence),
        "mixture_horizon": theory.mixture_horizon(influence),
        "mixture": [float(f"{value:.4g}") for value in influence],
    }


def field_length(examined: Examined, max_tokens: int) -> int:
    """Tokens of a text for the gradient field: the whole reach and two windows more, if that is affordable."""
    window = examined.window or 64
    wanted = examined.reach + 2 * window if examined.reach is not None else window * examined.layers
    return min(wanted, max_tokens, examined.max_tokens or max_tokens)


def measure(
    examined: Examined, haystack: Haystack, seed: int = 0, texts: int = 16, max_tokens: int = 8192
) -> dict[str, Any]:
    """Everything `reach.json` holds."""
    sample = haystack.rows(texts, field_length(examined, max_tokens), seed)
    alphas = residual_shares(examined, sample)
    rows = cliff(examined, seed, max_tokens)
    return examined.header() | {
        "seed": seed,
        "receptive_field": None if examined.reach is None else examined.reach + 1,
        "layer_kinds": [f"{spec.kind}:{spec.window}" if spec.window else spec.kind for spec in examined.specs],
        "cliff": rows,
        "cliff_holds": cliff_holds(rows) if rows else None,
        "gradient": gradient_field(examined, sample, seed),
        "alpha": {
            "residual_share": float(np.mean(alphas)) if alphas else None,
            "attention_share": 1 - float(np.mean(alphas)) if alphas else None,
            "residual_share_by_layer": alphas,
        },
        "predictions": predictions(examined, alphas),
        "haystack": haystack.name,
    }


# ---------------------------------------------------------------------------------------------- on the terminal


def print_result(result: dict[str, Any], console: Console) -> None:
    if result["reach"] is None:
        console.print(f"[bold]{result['model']}[/]: {result['layers']} layers; the reach is unbounded")
    else:
        console.print(
            f"[bold]{result['model']}[/]: {result['layers']} layers, W = {result['window']:,}; "
            f"reach R = {result['reach']:,} tokens back, receptive field {result['receptive_field']:,}, "
            f"W·k = {result['window_times_layers']:,}"
        )
    _print_cliff(result, console)
    _print_gradient(result, console)
    alpha, said = result["alpha"]["residual_share"], result["predictions"]
    if alpha is not None and said:
        console.print(
            f"alpha = {alpha:.3f} (measured): bound of Xiao {said['xiao_bound']:.0f} tokens, "
            f"exact mixture: mean {said['mixture_mean']:.0f}, horizon {said['mixture_horizon']} tokens"
        )


def _print_cliff(result: dict[str, Any], console: Console) -> None:
    if not result["cliff"]:
        console.print("Cliff test: not run (the reach is unbounded or longer than --max-tokens)")
        return
    table = Table(title="Cliff test: is the output bit-identical when a token changes?", title_justify="left")
    for name in ("path", "beyond reach", "within reach"):
        table.add_column(name)
    for path in dict.fromkeys(row["path"] for row in result["cliff"]):
        rows = [row for row in result["cliff"] if row["path"] == path]
        if "unavailable" in rows[0]:
            table.add_row(path, "[dim]not available here[/]", "")
            continue
        beyond = [row["equal"] for row in rows if row["expected"]]
        within = [row["distance"] for row in rows if not row["expected"] and not row["equal"]]
        verdict = "[green]identical[/]" if all(beyond) else "[red]DIFFERS[/]"
        table.add_row(path, f"{verdict} ({sum(beyond)} of {len(beyond)})", f"seen to {max(within)}" if within else "")
    console.print(table)


def _print_gradient(result: dict[str, Any], console: Console) -> None:
    table = Table(title="Gradient field: distance that holds so much of the energy", title_justify="left")
    for name in ("", "50 %", "90 %", "99 %"):
        table.add_column(name, justify="right")
    for moment in ("before", "after"):
        cells = [
            f"{row['distance']}" + (f" ({row['in_windows']:.1f} W)" if row["in_windows"] is not None else "")
            for row in result["gradient"][moment]["quantiles"]
        ]
        table.add_row(f"{moment} training", *cells)
    console.print(table)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.reach", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint, or Hugging Face causal LM")
    parser.add_argument("--out", metavar="DIR", help="where reach.json goes; default: the run folder, or here")
    parser.add_argument("--plot", action="store_true", help="also write reach.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", type=int, default=16, help="held-out texts for the gradient field")
    parser.add_argument("--max-tokens", type=int, default=8192, help="longest sequence to run")
    parser.add_argument("--text", metavar="FILE", help="a UTF-8 file to read instead of the run's held-out text")
    parser.add_argument("--device", help="cpu or cuda; default: cuda when there is one")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    console = Console()
    examined = load_model(args.model, args.device)
    result = measure(examined, open_haystack(examined, args.text), args.seed, args.texts, args.max_tokens)
    out = examined.out_dir(args.out)
    (out / "reach.json").write_text(json.dumps(result, indent=1))
    print_result(result, console)
    if args.plot:
        plots.save(plots.reach_figure(result), out / "reach.png")
    console.print(f"Written: {out / 'reach.json'}")
    if result["cliff_holds"] is False:
        raise SystemExit("a token beyond the reach changed the output: the attention path that differs is at fault")


if __name__ == "__main__":
    sys.exit(cli(main))
