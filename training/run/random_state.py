"""The state of every random generator of a process, as JSON; a checkpoint saves one entry per rank."""

import base64
import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, rank: int) -> None:
    random.seed(f"{seed}/{rank}")
    np.random.seed((seed * 1009 + rank) % 2**32)
    torch.manual_seed(seed * 1009 + rank)


def get_random_states() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": _to_text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _to_text(torch.cuda.get_rng_state())
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Continue where `get_random_states` was called, before or after a trip through JSON."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_text(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_text(states["cuda"]))


def _to_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
