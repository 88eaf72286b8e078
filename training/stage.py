"""What a stretch of steps with the same settings trains: the layers and how they are computed, and the objectives.

A run without `training.stages` has one. The decoder, its weights and the optimizer are those of the whole run.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import PartialState

from data.mixture import Source, open_sources, prepare_sources
from data.tasks import need_keys
from data.tasks.vocabulary import RecallVocabulary, recall_vocabulary
from data.tokenizer import Tokenizer
from model.attention import AttentionPlan, Device, check_backend, plan_attention
from model.flops import flops_per_token
from model.windows import reach
from training.captured import check_graphs, worth_capturing
from training.curriculum import Curriculum, State
from training.objective import TextObjective, objectives
from training.processes.context import Layout
from training.processes.precision import DTYPES
from training.processes.ranks import ask_main
from training.reporting.probe import Probe
from training.settings.build import model_config
from training.settings.schema import Settings
from training.settings.stages import Stretch, stretches_of
from training.start import run_tokenizer


class Stage:
    """`sources`: the text in rows of this stage."""

    def __init__(
        self, stretch: Stretch, sources: Mapping[str, Source], vocabulary: RecallVocabulary | None, vocab_size: int,
        layout: Layout,
    ):  # fmt: skip
        self.settings = settings = stretch.settings
        self.first, self.sources, self.vocabulary, self.layout = stretch.first, sources, vocabulary, layout
        self.ranks, self.config = PartialState(), model_config(settings, vocab_size)
        farthest = reach(self.config.specs) or settings.data.seq_len
        self.curriculum = Curriculum(settings.recall.curriculum, settings.model.sliding_window, farthest)
        self.objectives = objectives(settings, sources, vocabulary, self.curriculum, layout.ranks, stretch.text_first)
        self.text = next(o for o in self.objectives if isinstance(o, TextObjective))

    def start(self) -> State:
        """The state of a run before its first step."""
        return State(curriculum=dict.fromkeys(self.settings.recall.tasks, self.curriculum.start()))

    def probe(self) -> Probe:
        """What measures the model while this stage trains it."""
        heldout = {name: source.heldout for name, source in self.sources.items()}
        micro_rows = self.text.plan({}).micro_rows
        return Probe(self.settings, heldout, self.vocabulary, self.curriculum, micro_rows, self.layout)

    def attention(self, dtype: torch.dtype) -> list[AttentionPlan]:
        """How each kind of layer is computed if matrix products are in `dtype`."""
        config = self.config
        facts = config.head_dim, config.attention_backend, self.ranks.device.type, dtype, True
        return [plan_attention(spec, *facts) for spec in dict.fromkeys(config.specs)]

    def check_device(self) -> None:
        """Raises UserError, before anything is written, for settings that this device can't serve."""
        training, config = self.settings.training, self.config
        dtype = DTYPES.get(training.precision)  # None: `auto` is not decided yet
        waits = any(plan.waits for plan in self.attention(dtype or torch.bfloat16))
        check_graphs(training.compile, self.ranks, waits)
        attention, here = (config.attention_backend, config.specs, config.head_dim), Device.here(self.ranks.device.type)
        check_backend(*attention, here, dtype, gradients=True, deterministic=training.deterministic)

    def worth_capturing(self, dtype: torch.dtype, matmul_rate: float, teacher_waits: bool) -> bool:
        """Whether a step becomes a CUDA graph. `matmul_rate`: FLOP/s of this machine's matrix products."""
        plan, waits = self.text.plan({}), teacher_waits or any(plan.waits for plan in self.attention(dtype))
        flops = plan.micro_rows * plan.seq_len * flops_per_token(self.config, plan.seq_len, training=True)
        seconds_per_layer = flops / self.config.num_hidden_layers / matmul_rate
        return worth_capturing(self.settings.training.compile, self.ranks, seconds_per_layer, waits)


def prepare_stages(settings: Settings, layout: Layout) -> tuple[Tokenizer, list[Stage]]:
    """The tokenizer, and the stages of the run with their text in rows.

    The main process fills the cache, then every process maps it. Only the main one reads the text.
    """
    stretches, recall = stretches_of(settings), settings.recall
    tokenizer, folders = ask_main(lambda: _fill_cache(settings, stretches))
    keys = recall.keys if need_keys(recall.tasks) else 0
    vocabulary = recall_vocabulary(tokenizer, recall.values, keys) if recall.enabled else None
    return tokenizer, [
        Stage(s, open_sources(folders, tokenizer, s.settings.data), vocabulary, tokenizer.vocab_size, layout)
        for s in stretches
    ]


def _fill_cache(settings: Settings, stretches: list[Stretch]) -> tuple[Tokenizer, dict[str, Path]]:
    """The tokenizer, and the folder with the tokens of each source, which also holds its rows of every length."""
    tokenizer, folders = run_tokenizer(settings), {}
    for data in {stretch.settings.data.seq_len: stretch.settings for stretch in stretches}.values():
        folders = prepare_sources(data, tokenizer)
    return tokenizer, folders
