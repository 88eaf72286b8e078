"""Alpha: the share of the residual stream that each layer leaves as it is, measured, and the predictions from it.

Legend: B batch, T positions, E hidden size.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.models import Examined
from eval.reach import theory

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")


def _attention_of(layer: nn.Module) -> nn.Module | None:
    modules = (getattr(layer, name, None) for name in ATTENTION_NAMES)
    return next((module for module in modules if isinstance(module, nn.Module)), None)


def residual_shares(examined: Examined, texts: Tensor) -> list[float]:
    """Alpha of each layer: |x| / (|x| + |a|), where x is the residual stream and a what attention adds to it.

    Norms are taken over E and averaged over positions and texts (B, T). Empty when no attention module is known.
    """
    streams: dict[int, Tensor] = {}
    shares: dict[int, float] = {}
    lists = [m for m in examined.model.modules() if isinstance(m, nn.ModuleList) and len(m) and _attention_of(m[0])]
    decoder = max(map(list, lists), key=len, default=[])
    handles = []
    for i, layer in enumerate(decoder):

        def keep_stream(_m: nn.Module, args: Any, kwargs: Any, i: int = i) -> None:
            streams[i] = args[0] if args else kwargs["hidden_states"]

        def compute_share(_m: nn.Module, _inputs: Any, output: Any, i: int = i) -> None:
            added = output[0] if isinstance(output, tuple) else output
            x, a = streams[i].norm(dim=-1), added.norm(dim=-1)
            shares[i] = float((x / (x + a).clamp_min(1e-12)).mean())

        attention = _attention_of(layer)
        assert attention is not None
        handles.append(layer.register_forward_pre_hook(keep_stream, with_kwargs=True))
        handles.append(attention.register_forward_hook(compute_share))
    try:
        with torch.inference_mode():
            examined.model(input_ids=texts.to(examined.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return [shares[i] for i in sorted(shares)]


def predictions(examined: Examined, alphas: list[float]) -> dict[str, Any]:
    """Xiao's bound and the exact mixture at the measured alphas, and his bound at his own example alpha = 0.95.

    Empty for an unbounded reach, for alphas that were not measured, and for chunked layers: how far their queries see
    depends on the position in the block, so the recurrence does not hold.
    """
    window, reach = examined.window, examined.reach
    chunked = any(spec.kind == "chunked" for spec in examined.specs)
    if window is None or reach is None or chunked or len(alphas) != examined.layers:
        return {}
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
