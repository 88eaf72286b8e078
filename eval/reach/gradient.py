"""The gradient field: how the energy of d(output)/d(input embedding) is spread over distance.

After Luo et al., *Understanding the Effective Receptive Field in Deep Convolutional Neural Networks*, 2017
(arXiv:1701.04128), over held-out text and random output directions, before and after training.

Legend: B batch, T positions, E hidden size.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.forward import body
from eval.models import Examined
from eval.receipt.states import load_before, with_config
from model.decoder import WindreachForCausalLM, build_model

QUANTILES = (0.5, 0.9, 0.99)


def gradient_energy(model: Any, texts: Tensor, directions: int = 4, seed: int = 0) -> np.ndarray:
    """Energy of the input gradient by distance (T,), summing to 1: index d is d tokens back from the query.

    For each of `directions` random directions u, the gradient of u.h with respect to every input embedding is squared
    and summed over E, where h is the final hidden state at the last position. The result is the mean over u and texts
    (B, T).
    """
    device = next(model.parameters()).device
    options = {} if isinstance(model, WindreachForCausalLM) else {"use_cache": False}
    generator = torch.Generator().manual_seed(seed)
    total = np.zeros(texts.shape[1])
    for batch in texts.split(8):
        embeddings = model.get_input_embeddings()(batch.to(device)).detach().requires_grad_()
        hidden = body(model)(inputs_embeds=embeddings, **options).last_hidden_state[:, -1]
        for _ in range(directions):
            direction = torch.randn(hidden.shape, generator=generator).to(device)
            (gradient,) = torch.autograd.grad((hidden * direction).sum(), embeddings, retain_graph=True)
            energy = gradient.double().square().sum(-1)
            share = energy / energy.sum(-1, keepdim=True).clamp_min(1e-300)
            total += share.sum(0).cpu().numpy()[::-1]
    return total / total.sum()


def energy_quantiles(energy: np.ndarray, window: int | None, reach: int | None) -> list[dict[str, Any]]:
    """For each share of the energy, the distance within which it lies: in tokens, in W and in % of R."""
    distances = np.searchsorted(np.cumsum(energy) / energy.sum(), QUANTILES).tolist()
    return [
        {
            "share": share,
            "distance": distance,
            "in_windows": distance / window if window else None,
            "percent_of_reach": 100 * distance / reach if reach else None,
        }
        for share, distance in zip(QUANTILES, distances, strict=True)
    ]


def untrained(examined: Examined) -> nn.Module:
    """The model before training: the pretrained weights under the windows of the run, else the same architecture drawn
    by our seeded initialisation or by the library's default. Raises UserError for a pretrained model that is gone.
    """
    if not examined.ours:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        drawn = AutoModelForCausalLM.from_config(examined.model.config, trust_remote_code=False)
        return drawn.eval().to(examined.device)
    from training.settings.build import init_options

    settings = examined.trained_with() if examined.settings else None
    if settings and (named := settings.model.init.from_pretrained):
        original = load_before("model.init.from_pretrained", named, str(examined.device))
        return with_config(original, examined.model.config).model
    init = init_options(settings) if settings else None
    seed = int(examined.settings.get("seed", 0))
    return build_model(examined.model.config, init, seed).eval().to(examined.device)


def gradient_field(examined: Examined, texts: Tensor, seed: int = 0) -> dict[str, Any]:
    """{"before": {...}, "after": {...}}: energy by distance and its quantiles, before and after training."""
    field: dict[str, Any] = {"texts": texts.shape[0], "tokens": texts.shape[1]}
    window, reach = examined.window, examined.reach
    for moment, model in (("before", untrained(examined)), ("after", examined.model)):
        energy = gradient_energy(model, texts, seed=seed)
        field[moment] = {
            "energy": [float(f"{value:.4g}") for value in energy],
            "quantiles": energy_quantiles(energy, window, reach),
        }
    return field
