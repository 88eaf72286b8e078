"""How influence fades with distance: alpha measured on a model, and two predictions from it.

Alpha is the share of the residual stream that a layer leaves as it is. Both predictions follow
Guangxuan Xiao, "Why Stacking Sliding Windows Can't See Very Far" (2025). In each of k layers a share alpha of the
residual stream stays where it is, and a share 1 - alpha comes evenly from the W visible tokens.

* Xiao's bound W * ln(eps) / ln(1 - alpha) is the distance at which influence falls below eps. It does not grow with k.
* The exact mixture is what the same recurrence gives when it is iterated: Binomial(k, 1 - alpha) hops, each uniform on
  0..W-1. Its mean is k(1 - alpha)(W - 1)/2, which grows with k.

Legend: B batch, T positions, E hidden size.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.models import Examined

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")


def xiao_bound(window: int, alpha: float, epsilon: float = 0.01) -> float:
    """Distance in tokens at which influence falls below epsilon, according to Xiao.

    >>> round(xiao_bound(16, 0.95) / 16, 2)
    1.54
    """
    if not 0.0 < alpha < 1.0:
        return math.inf if alpha <= 0.0 else 0.0
    return window * math.log(epsilon) / math.log(1.0 - alpha)


def mixture(
    windows: Sequence[int | None], alphas: Sequence[float], length: int, dilations: Sequence[int] | None = None
) -> np.ndarray:
    """Influence by distance (length,) after all layers. It sums to 1 when `length` exceeds the reach.

    >>> influence = mixture([3, 3], [0.5, 0.5], 5)
    >>> influence.round(3).tolist()
    [0.444, 0.222, 0.25, 0.056, 0.028]
    """
    influence = np.eye(1, length)[0]
    for window, alpha, dilation in zip(windows, alphas, dilations or [1] * len(windows), strict=True):
        seen = length if window is None else window
        one_layer = np.zeros(length)
        one_layer[: seen * dilation : dilation] = (1.0 - alpha) / seen
        one_layer[0] += alpha
        influence = np.convolve(influence, one_layer)[:length]
    return influence


def mixture_horizon(influence: np.ndarray, epsilon: float = 0.01) -> int:
    """Largest distance (tokens) at or beyond which at least epsilon of the influence lies."""
    beyond = np.cumsum(influence[::-1])[::-1]
    return int(np.flatnonzero(beyond >= epsilon * influence.sum())[-1])


def residual_shares(examined: Examined, texts: Tensor) -> list[float]:
    """Alpha of each layer: |x| / (|x| + |a|), where x is the residual stream and a what attention adds to it.

    Norms are taken over E and averaged over positions and texts (B, T). Empty when no attention module is known.
    """
    lists = [
        [(layer, child) for layer in module for name, child in layer.named_children() if name in ATTENTION_NAMES]
        for module in examined.model.modules()
        if isinstance(module, nn.ModuleList)
    ]
    shares: list[float] = []
    stream = torch.empty(0)

    def keep_stream(_layer: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal stream
        stream = args[0] if args else kwargs["hidden_states"]

    def add_share(_attention: nn.Module, _inputs: Any, output: Any) -> None:
        x, a = stream.norm(dim=-1), (output[0] if isinstance(output, tuple) else output).norm(dim=-1)
        shares.append(float((x / (x + a).clamp_min(1e-12)).mean()))

    with ExitStack() as hooks, torch.inference_mode():
        for layer, attention in max(lists, key=len, default=[]):
            hooks.enter_context(layer.register_forward_pre_hook(keep_stream, with_kwargs=True))
            hooks.enter_context(attention.register_forward_hook(add_share))
        examined.model(input_ids=texts.to(examined.device), use_cache=False, logits_to_keep=1)
    return shares


def predictions(examined: Examined, alphas: list[float]) -> dict[str, Any]:
    """Xiao's bound and the exact mixture at the measured alphas, and his bound at his own example alpha = 0.95.

    Empty for an unbounded reach, for alphas that were not measured, and for chunked layers: how far their queries see
    depends on the position in the block, so the recurrence does not hold.
    """
    window, reach, specs = examined.window, examined.reach, examined.specs
    chunked = any(spec.kind == "chunked" for spec in specs)
    if window is None or reach is None or chunked or len(alphas) != examined.layers:
        return {}
    alpha = float(np.mean(alphas))
    influence = mixture([spec.window for spec in specs], alphas, reach + 1, [spec.dilation for spec in specs])
    return {
        "epsilon": 0.01,
        "xiao_bound": xiao_bound(window, alpha),
        "xiao_bound_at_alpha_0.95": xiao_bound(window, 0.95),
        "mixture_mean": float(np.arange(reach + 1) @ influence),
        "mixture_horizon": mixture_horizon(influence),
        "mixture": [float(f"{value:.4g}") for value in influence],
    }
