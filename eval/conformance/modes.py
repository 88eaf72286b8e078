"""The ways to feed a model: what each mode passes to the model, and how many tokens at a time.

Every document of a batch is a prefix of one text. So in every mode the output at position p of a document must equal
the output at position p of the text. One plain forward pass over the text is the reference for all modes.

Legend: B rows, S columns of a batch, T tokens of the text, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eval.conformance.wrapped import unwrapped
from model.errors import UserError
from model.packing import Packing

EVERY_COLUMN = 64  # up to so many columns, each of them is changed once; of longer rows, some are
MODES = ("train", "eval", "packed", "left-padded", "cached", "chunked", "generate")


@dataclass(frozen=True)
class Batch:
    """What a mode feeds.

    documents: (B, S) document ids, -1 for padding. columns: (B,) the column of each row that is changed.
    """

    text: Tensor
    documents: Tensor
    columns: Tensor

    @cached_property
    def packing(self) -> Packing:
        return Packing.of_documents(self.documents)

    @cached_property
    def positions(self) -> Tensor:
        """Position of each token in its document (B, S); 0 for padding."""
        return self.packing.positions.expand_as(self.documents).where(self.documents >= 0, 0)

    @cached_property
    def input_ids(self) -> Tensor:
        return self.text[self.positions]

    def changed_ids(self) -> Tensor:
        """The ids (B, S) with another token of the text in the changed column of each row."""
        ids, rows = self.input_ids.clone(), torch.arange(len(self.columns))
        ids[rows, self.columns] = self.text[self.positions[rows, self.columns] - 1]
        return ids


Feed = Callable[[Any, Batch, Tensor], Tensor]  # model, batch, ids (B, S) -> logits (B, n, V) of the last n ids fed


class Way(NamedTuple):
    """One way to feed a model in a mode. `label` names its sizes. `starts` are the first columns of later calls.

    training: in training mode with gradients, else in evaluation mode without.
    """

    mode: str
    label: str
    feed: Feed
    batch: Batch
    starts: tuple[int, ...] = ()
    training: bool = False


def forward(model: Any, batch: Batch, ids: Tensor, labels: bool = False) -> Tensor:
    return model(input_ids=ids, use_cache=False, **({"labels": ids} if labels else {})).logits


def packed(model: Any, batch: Batch, ids: Tensor) -> Tensor:
    """Documents in one row are told apart by position ids that start again, as transformers' data collators do it."""
    return model(input_ids=ids, position_ids=batch.positions, use_cache=False).logits


def padded(model: Any, batch: Batch, ids: Tensor) -> Tensor:
    mask = (batch.documents >= 0).long()
    return model(input_ids=ids, attention_mask=mask, position_ids=batch.positions, use_cache=False).logits


def in_steps(model: Any, batch: Batch, ids: Tensor, starts: Sequence[int], pad: bool = False) -> Tensor:
    """Through the model's own cache: the columns from one start to the next at a time."""
    logits, cache = [], None
    for first, end in zip((0, *starts), (*starts, ids.shape[1])):
        mask, positions = (batch.documents[:, :end] >= 0).long(), batch.positions[:, first:end]
        padding = {"attention_mask": mask, "position_ids": positions} if pad else {}
        output = model(input_ids=ids[:, first:end], past_key_values=cache, use_cache=True, **padding)
        if (cache := getattr(output, "past_key_values", None)) is None:
            raise UserError("the model returns no cache")
        logits.append(output.logits)
    return torch.cat(logits, 1)


def generate(model: Any, batch: Batch, ids: Tensor, prompt: int) -> Tensor:
    """`model.generate` from a prompt, made to choose the tokens of `ids`."""

    def choose(so_far: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).scatter(1, ids[:, so_far.shape[1], None], 0.0)

    output = unwrapped(model).generate(
        input_ids=ids[:, :prompt], attention_mask=torch.ones_like(ids[:, :prompt]), logits_processor=[choose],
        max_new_tokens=ids.shape[1] - prompt, do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return torch.stack(output.logits, 1)


def one_document(text: Tensor) -> Batch:
    columns = _columns(len(text))
    return Batch(text, torch.zeros(len(columns), len(text), dtype=torch.long), columns)


def packed_documents(text: Tensor, window: int) -> Batch:
    """One row of four documents: more than a window, 1 token, 2 tokens, and nearly two windows."""
    lengths = torch.tensor([window + 3, 1, 2])
    lengths = torch.cat((lengths, len(text) - lengths.sum(0, keepdim=True)))
    columns = _columns(len(text), lengths.cumsum(0).tolist())
    return Batch(text, torch.arange(4).repeat_interleave(lengths).expand(len(columns), -1), columns)


def padded_documents(text: Tensor, window: int) -> Batch:
    """Rows with half a window of padding on the left, with 1 token of padding, and without padding."""
    columns, pads = _columns(len(text)), torch.tensor([window // 2 + 1, 1, 0])
    shown = torch.arange(len(text)) >= pads.repeat_interleave(len(columns))[:, None]
    return Batch(text, shown.long() - 1, columns.repeat(len(pads)))


def _columns(length: int, borders: Sequence[int] = ()) -> Tensor:
    """The columns to change: all of a short row; else the first, the last, and those around `borders` and between."""
    if length <= EVERY_COLUMN:
        return torch.arange(length)
    evenly = torch.linspace(0, length - 1, 12).long().tolist()
    return torch.tensor(sorted({c for c in (*evenly, *borders, *(b - 1 for b in borders)) if 0 <= c < length}))


def text_length(window: int) -> int:
    return 3 * window + 5


def ways(modes: Sequence[str], text: Tensor, windows: Sequence[int]) -> Iterator[Way]:
    """Every way to feed a model in these modes. windows: the smallest and the largest of its layers.

    Prefills and chunks have one token less than a window, a window, one token more, and more than two windows.
    """
    last, window, whole = len(text), max(windows), one_document(text)
    sizes = sorted({max(1, n) for w in windows for n in (w - 1, w, w + 1, 2 * w + 3)})
    for mode in modes:
        if mode == "packed":
            batch = packed_documents(text, window)
            yield Way(mode, "in training", packed, batch, training=True)
            yield Way(mode, "in evaluation", packed, batch)
        elif mode == "left-padded":
            batch, starts = padded_documents(text, window), tuple(range(window + 2, last))
            yield Way(mode, "", padded, batch)
            yield Way(mode, f"prefill {window + 2}", partial(in_steps, starts=starts, pad=True), batch, starts)
        elif mode in ("cached", "chunked"):
            for size in sizes:
                starts = tuple(range(size, last, 1 if mode == "cached" else size))
                label = f"prefill {size}" if mode == "cached" else f"chunks of {size}"
                yield Way(mode, label, partial(in_steps, starts=starts), whole, starts)
        elif mode == "generate":
            for size in (max(1, window // 2), window + 2):
                starts = tuple(range(size, last - 1))
                yield Way(mode, f"prompt {size}", partial(generate, prompt=size), whole, starts)
        else:
            train = mode == "train"
            yield Way(mode, "", partial(forward, labels=train), whole, training=train)
