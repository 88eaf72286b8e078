"""A deep stack that starts as a shallower one."""

import pytest
import torch

from model.errors import UserError
from tests.model.tiny import tiny_model
from training.start import grow, grown_from


def test_ends_stay_ends_and_the_last_layers_between_are_repeated() -> None:
    assert grown_from(3, 6) == [0, 1, 1, 1, 1, 2]
    assert grown_from(5, 8) == [0, 1, 2, 3, 1, 2, 3, 4]
    assert grown_from(6, 8) == [0, 1, 2, 3, 4, 3, 4, 5]
    assert grown_from(4, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("depths", [(2, 8), (8, 4)])
def test_depths_that_cannot_grow_are_named(depths: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{depths[0]} layers can't grow to {depths[1]}"):
        grown_from(*depths)


def test_a_stack_grown_to_its_own_depth_says_the_same() -> None:
    trained, fresh = tiny_model(seed=1), tiny_model()
    ids = torch.arange(20)[None]
    assert not torch.equal(fresh(ids).logits, trained(ids).logits)
    grow(fresh, trained)
    assert torch.equal(fresh(ids).logits, trained(ids).logits)


def test_every_layer_of_a_grown_stack_is_the_one_it_comes_from() -> None:
    trained, deep = tiny_model(num_hidden_layers=4, seed=1), tiny_model(num_hidden_layers=7)
    grow(deep, trained)
    for number, source in enumerate(grown_from(4, 7)):
        theirs = trained.model.layers[source].state_dict()
        assert all(torch.equal(w, theirs[name]) for name, w in deep.model.layers[number].state_dict().items())
    assert torch.equal(deep.lm_head.weight, trained.lm_head.weight)


def test_other_widths_and_weights_that_are_missing_are_named() -> None:
    trained = tiny_model()
    with pytest.raises(UserError, match=r"embed_tokens\.weight is \(\d+, 32\) there, .* \(\d+, 64\) here"):
        grow(tiny_model(hidden_size=64), trained)
    with pytest.raises(UserError, match=r"q_norm\.weight is missing there"):
        grow(tiny_model(qk_norm=True), trained)
