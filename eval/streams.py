"""The residual stream after each layer, and two ways to read a planted value from it: a trained head, or a probe.

The relay head is trained with the run. The linear probe works for any model: for each layer and offset a ridge
regression onto the values, fitted on one half of the texts and scored on the other (Alain and Bengio, 2016).

Legend: N texts, T positions, D offsets, K streams (the embedding, then one after each layer), E hidden size, V values.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from data.tasks.layout import clean_filler
from data.tasks.vocabulary import RecallVocabulary
from eval.command import progress
from eval.forward import batch_rows, body
from eval.haystack import Haystack
from eval.models import Examined
from training.run.checkpoint import newest_valid

StreamReader = Callable[[Tensor], Tensor]  # streams (K, N, E) at one offset -> values read (K, N), of the scored texts
RIDGE = 0.1  # penalty per text, for features of unit variance
KEPT_BYTES = 1 << 30  # of streams in memory at once


class Texts(NamedTuple):
    """Token ids (N, T) with a value and with another in its place; `labels` (N,): the number of the value."""

    first: Tensor
    second: Tensor
    labels: Tensor
    value_at: int  # position


def make_texts(haystack: Haystack, vocabulary: RecallVocabulary, n: int, lead: int, behind: int, seed: int) -> Texts:
    """N texts: `lead` tokens of haystack, the needle, its value, and `behind` tokens of haystack."""
    value_at, n_values = lead + len(vocabulary.needle), len(vocabulary.values)
    length = value_at + 1 + behind
    tokens = np.stack([clean_filler(haystack.filler(i, length, seed), vocabulary) for i in range(n)])
    rng = np.random.default_rng([seed, 17])
    labels = np.arange(n) % n_values  # all values equally often
    rng.shuffle(labels)
    other_labels = (labels + rng.integers(1, n_values, n)) % n_values
    tokens[:, lead:value_at] = vocabulary.needle
    first, second = tokens.copy(), tokens.copy()
    first[:, value_at] = np.asarray(vocabulary.values)[labels]
    second[:, value_at] = np.asarray(vocabulary.values)[other_labels]
    return Texts(torch.from_numpy(first), torch.from_numpy(second), torch.from_numpy(labels), value_at)


@torch.inference_mode()
def streams(examined: Examined, input_ids: Tensor, positions: Sequence[int], layers: Sequence[int]) -> Tensor:
    """(K, D, N, E) the residual streams after `layers` (0: the embedding) at `positions`, computed in batches."""
    options = {} if examined.ours else {"use_cache": False}
    parts = []
    for ids in input_ids.to(examined.device).split(batch_rows(examined, input_ids.shape[1])):
        hidden = body(examined.model)(input_ids=ids, output_hidden_states=True, **options).hidden_states
        parts.append(torch.stack([hidden[i][:, list(positions)].transpose(0, 1).float().cpu() for i in layers]))
    return torch.cat(parts, dim=2)


def linear_probe(labels: Tensor, n_values: int) -> StreamReader:
    """Reads the second half of the texts with a ridge regression onto one-hot values, fitted on the first half."""
    half = len(labels) // 2
    target = torch.nn.functional.one_hot(labels[:half], n_values).float()
    target = target - target.mean(0)

    def read(stream_kne: Tensor) -> Tensor:
        fitted, scored = stream_kne[:, :half], stream_kne[:, half:]
        mean, spread = fitted.mean(1, keepdim=True), fitted.std(1, keepdim=True).clamp_min(1e-6)
        weights = ridge((fitted - mean) / spread, target, RIDGE * half)
        return ((scored - mean) / spread @ weights).argmax(-1)

    return read


def ridge(x_kne: Tensor, y_nv: Tensor, penalty: float) -> Tensor:
    """(K, E, V) weights that minimise |x w - y|^2 + penalty |w|^2, by the smaller of the two normal equations."""
    n, e = x_kne.shape[1:]
    x_t = x_kne.transpose(1, 2)
    if e <= n:
        return torch.linalg.solve(x_t @ x_kne + penalty * torch.eye(e, dtype=x_kne.dtype), x_t @ y_nv)
    gram = x_kne @ x_t + penalty * torch.eye(n, dtype=x_kne.dtype)
    return x_t @ torch.linalg.solve(gram, y_nv.expand(len(x_kne), -1, -1))


def head_reader(examined: Examined, n_values: int) -> StreamReader | None:
    """Reads all texts with the relay head of the run's newest sound checkpoint, as in training; None without a head."""
    checkpoint = newest_valid(examined.run_dir) if examined.ours and examined.run_dir else None
    try:
        weight = load_file(checkpoint / "trainer.safetensors").get("relay_head") if checkpoint else None
    except FileNotFoundError:
        if checkpoint is None or checkpoint.exists():
            raise
        return head_reader(examined, n_values)  # training has deleted that checkpoint: read the next one
    if weight is None or weight.shape != (n_values, examined.model.config.hidden_size):
        return None
    norm, weight_ev = examined.model.model.norm, weight.float().T
    return lambda stream_kne: (norm(stream_kne.to(examined.device)).cpu() @ weight_ev).argmax(-1)


@torch.inference_mode()
def read_map(
    examined: Examined, texts: Texts, offsets: Sequence[int], limits: Sequence[int | None], read: StreamReader
) -> tuple[Tensor, int, int]:
    """(K, D) share of values read right; the number of pairs beyond their limit with the same bits; and of all such.

    `limits` (K,) are the farthest offsets at which the streams can depend on the value; None: any. The model runs once
    for each group of layers whose streams take at most `KEPT_BYTES`.
    """
    positions = [texts.value_at + offset for offset in offsets]
    layer_bytes = 2 * 4 * len(texts.first) * len(positions) * examined.model.config.get_text_config().hidden_size
    groups = torch.arange(len(limits)).split(max(1, KEPT_BYTES // layer_bytes))
    shares, same, beyond = [], 0, 0
    with progress("relay map", len(limits)) as advance:
        for layers in (group.tolist() for group in groups):
            first, second = (streams(examined, ids, positions, layers) for ids in (texts.first, texts.second))
            read_kdn = torch.stack([read(first[:, d]) for d in range(len(positions))], dim=1)
            shares.append((read_kdn == texts.labels[-read_kdn.shape[-1] :]).float().mean(-1))
            equal = (first == second).all(-1).sum(-1)
            outside = torch.tensor([[(limit := limits[i]) is not None and d > limit for d in offsets] for i in layers])
            same += int(equal[outside].sum())
            beyond += int(outside.sum()) * len(texts.first)
            advance(len(layers))
    return torch.cat(shares), same, beyond
