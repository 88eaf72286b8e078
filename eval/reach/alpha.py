"""Alpha: the share of the residual stream that stays put at each layer, measured, and what others predict from it.

Legend: B batch, T positions, E hidden size.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.models import Examined
from eval.reach import theory


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
