"""Tasks for lm-evaluation-harness: the needle items of `eval.recall` as text, with recall at each distance as a metric.

    lm_eval --model hf --model_args pretrained=runs/quickstart/hf --include_path eval/harness --tasks windreach_recall

The harness tokenises text again. An item whose text would become other tokens is left out and the next one is tried, so
that distances are exact. Items of all distances alternate, so that `--limit` shortens each of them alike.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import AutoConfig, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the harness runs in another folder

from data.tasks.layout import RecallItem, item
from data.tasks.vocabulary import RecallVocabulary, recall_vocabulary
from data.tokenizer import HubTokenizer
from eval.haystack import read_haystack
from eval.models import smallest_window, specs_of
from eval.recall.order import default_distances
from model.errors import UserError

TRIES = 50  # items tried for one whose text becomes the same tokens
MARGIN = 10  # tokens of an item besides its farthest distance


def documents(
    pretrained: str | None = None,
    tokenizer: str | None = None,
    distances: Sequence[int] | None = None,
    n: int = 20,
    values: int = 32,
    seed: int = 0,
    text: str | None = None,
    max_distance: int = 4096,
    **_model_arguments: Any,
) -> dict[str, datasets.Dataset]:
    """Rows {context, choices, answer, distance}: `n` of each distance, alternating.

    The harness passes the arguments of `--metadata` and of `--model_args`. `distances` are in tokens, by default the
    protocol's: 28 for a quickstart model, so 560 items of 32 choices, 17,920 requests. `text` names a haystack file.
    Raises UserError without a model, and if an item is longer than the model can read.
    """
    if not pretrained:
        raise UserError("windreach_recall needs to know the model: give --model_args pretrained=FOLDER")
    if distances is not None and not (
        isinstance(distances, list | tuple) and all(isinstance(d, int) and d > 0 for d in distances)
    ):
        raise UserError(f"distances is {distances!r}; give a list of tokens, such as [16, 64]")
    config = AutoConfig.from_pretrained(pretrained, trust_remote_code=False)
    hub_tokenizer = HubTokenizer(AutoTokenizer.from_pretrained(tokenizer or pretrained, trust_remote_code=False))
    specs = specs_of(config)  # a model without windows gets the distances of W = 64
    distances = sorted(distances or default_distances(specs, smallest_window(specs) or 64, max_distance))
    length = distances[-1] + MARGIN
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest and length >= longest:
        raise UserError(
            f"distance {distances[-1]}: items would be {length:,} tokens long; the harness cuts the front of what is "
            f"longer than {longest:,}, and the needle with it: give --metadata '{{\"max_distance\": {longest - 64}}}'"
        )
    vocabulary, haystack = recall_vocabulary(hub_tokenizer, values), read_haystack(hub_tokenizer, text)

    def candidates(number: int, distance: int) -> Iterator[RecallItem]:
        for attempt in range(number * TRIES, (number + 1) * TRIES):
            rng = np.random.default_rng([seed, attempt, distance])
            yield item("needle", rng, haystack.filler(attempt, length, seed), vocabulary, length, distance)

    rows = [as_row(candidates(i, distance), vocabulary, hub_tokenizer) for i in range(n) for distance in distances]
    return {"test": datasets.Dataset.from_list(rows)}


def as_row(candidates: Iterator[RecallItem], vocabulary: RecallVocabulary, tokenizer: HubTokenizer) -> dict[str, Any]:
    """The first candidate whose text, with and without the answer, has the item's tokens; UserError if none has."""
    for question in candidates:
        context, tokens = tokenizer.decode(question.tokens), list(question.tokens)
        whole = tokenizer.decode([*tokens, question.value])
        keeps_tokens = tokenizer.encode(context) == tokens and tokenizer.encode(whole) == [*tokens, question.value]
        if keeps_tokens and whole.startswith(context):
            choices = [tokenizer.decode([*tokens, value]).removeprefix(context) for value in vocabulary.values]
            answer = vocabulary.values.index(question.value)
            return {"context": context, "choices": choices, "answer": answer, "distance": question.distance}
    raise UserError(
        f"distance {question.distance}: none of {TRIES} items keeps its tokens when its text is tokenised again; "
        "this tokenizer does not work with the harness, use `python -m eval.recall`"
    )


def score_choice(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Right if the value is the most likely choice, as in `eval.recall`. `results`: log-likelihood of each choice."""
    return _metrics(doc, np.argmax([likelihood for likelihood, _ in results]) == doc["answer"])


def score_generated(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Right if the generated text is the value."""
    return _metrics(doc, results[0].strip() == doc["choices"][doc["answer"]].strip())


def _metrics(doc: dict[str, Any], right: bool | np.bool_) -> dict[str, float]:
    """Recall over all distances, and at the item's own. The harness averages each over the items that have it."""
    return {"recall": float(right), f"recall@{doc['distance']}": float(right)}
