"""An update of the optimizer with plain numbers."""

from collections.abc import Mapping

import torch

from training.optimizer import SummedOptimizer


def update(optimizer: SummedOptimizer, rate: float, weights: Mapping[str, float], finite: bool = True) -> None:
    shares = {name: torch.tensor(weight) for name, weight in weights.items()}
    optimizer.step(torch.tensor(rate), shares, torch.tensor(finite))
