import json
import random

import numpy as np
import torch

from training.run.random_state import get_random_states, seed_everything, set_random_states


def draw() -> tuple[float, float, list[float]]:
    return random.random(), float(np.random.rand()), torch.randn(3).tolist()


def test_states_survive_json_and_continue_every_generator() -> None:
    seed_everything(3, rank=1)
    draw()
    saved = json.loads(json.dumps(get_random_states()))
    expected = draw()
    seed_everything(4, rank=0)
    set_random_states(saved)
    assert draw() == expected
