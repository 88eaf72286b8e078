"""Train a model.

    accelerate launch [--config_file configs/accelerate/X.yaml] train.py CONFIG.yaml [key=value ...]
    python train.py configs/quickstart.yaml training.max_steps=100 --dry-run

Exit codes: 0 done; 2 the input is wrong; 75 stopped by a signal after a checkpoint, run again to go on; 1 a fault.
"""

import argparse
import gc
import math
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from data.token_store import TokenStore, prepare_tokens
from data.tokenizer import Tokenizer, prepare_tokenizer
from model import hub
from model.errors import cli
from model.windows import reach
from training.curriculum import Curricula, Curriculum
from training.objective import Measured, Objective, Scorer, differentiate, objectives, step_flops, task_vocabulary
from training.optimizer import SummedOptimizer
from training.planning.dry_run import plan_text
from training.probe import Probe
from training.processes.allocator import keep_freed_memory
from training.processes.parallel import Tensors, load_whole, spread, whole, whole_weights
from training.processes.precision import DTYPES, make_deterministic, set_up_threads
from training.processes.ranks import (
    ask_main,
    gather_from_ranks,
    join_ranks,
    local_processes,
    lost_rank_is_fault,
    sum_over_ranks,
)
from training.processes.signals import STOPPED, StopRequest, TrainingFault, end_process
from training.reporting.metrics import Metrics
from training.reporting.nonfinite import keep_batch, stop_after
from training.reporting.profiling import ProfileWindow
from training.reporting.progress import TrainingProgress
from training.run.checkpoint import load_state, prune, save_checkpoint
from training.run.export import replace_export, write_hf
from training.run.folder import decide_once, open_run, run_dir
from training.run.random_state import get_random_states, seed_everything, set_random_states
from training.run.resume import FACTS_SAVED, check_checkpoint, check_same_batches
from training.run.shards import stored_in_shards
from training.run.state import State
from training.schedule import interpolate, rate_factor
from training.settings.config_file import load_settings
from training.settings.schema import Settings
from training.start import start


def main() -> int:
    arguments = parse_arguments()
    settings = load_settings(arguments.config, arguments.overrides)
    if arguments.dry_run:
        if os.environ.get("RANK", "0") == "0":  # of the processes launched, one speaks
            print(plan_text(settings))
        return 0
    keep_freed_memory()
    try:
        with lost_rank_is_fault():
            trainer = Trainer(settings, arguments.resume)
            return trainer.close() if trainer.run() else STOPPED
    except TrainingFault as fault:
        print(f"fault: {fault}", file=sys.stderr)
        return 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a model; see the head of train.py.")
    parser.add_argument("config", type=Path, help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example model.sliding_window=32")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and leave")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="default: auto")
    return parser.parse_intermixed_args()


class Trainer:
    """A run: made ready or resumed by `__init__`, trained by `run`, exported by `close`."""

    def __init__(self, settings: Settings, resume: str):
        self.settings, self.dir = settings, run_dir(settings)
        self.stop = StopRequest()
        self.ranks = join_ranks()
        set_up_threads(settings.training.num_threads, local_processes())
        make_deterministic()

        self.tokenizer, self.train_store, self.heldout_store = self._prepare_data()
        self.decoder, origin = start(settings, self.tokenizer, resume)
        self.config = self.decoder.config
        self.saved_step: int | None = None
        checkpoint = ask_main(lambda: open_run(settings, resume))
        stores, device = {"train": self.train_store, "heldout": self.heldout_store}, self.ranks.device
        self.facts = ask_main(lambda: decide_once(settings, self.tokenizer, stores, device, checkpoint, origin.facts))

        seed_everything(settings.seed, self.ranks.process_index)
        self.curriculum = Curriculum(
            settings.recall.curriculum, settings.model.sliding_window, reach(self.config.specs) or settings.data.seq_len
        )
        recall = settings.recall
        self.state = State(curriculum=Curricula.start(self.curriculum, recall.tasks))
        self.vocabulary = task_vocabulary(settings, self.tokenizer) if recall.enabled else None
        self.objectives = self._objectives(self.ranks.num_processes)
        self.probe = Probe(settings, self.heldout_store, self.vocabulary, self.curriculum)

        values = recall.values if recall.enabled and recall.relay_loss_weight else None
        self.scorer = Scorer(self.decoder, values, settings.training.z_loss_weight)
        if settings.training.activation_checkpointing:
            self.decoder.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        if settings.training.compile:
            self.decoder.compile_layers()
        self.accelerator, self.wrapped = spread(self.scorer, self.facts["precision"])
        self.optimizer = SummedOptimizer(
            self.scorer.named_parameters(),
            [o.name for o in self.objectives],
            settings.training.optimizer,
            DTYPES[self.facts["precision"]],
        )
        if checkpoint is not None:
            self._resume(checkpoint)
        elif origin.auxiliary:
            load_whole(self.scorer.auxiliary(), origin.auxiliary)

    # -- making ready ------------------------------------------------------------------------------------------------

    def _prepare_data(self) -> tuple[Tokenizer, TokenStore, TokenStore]:
        """The main process fills the cache, then every process reads it."""
        ask_main(lambda: self._cached_data() and None)
        return self._cached_data()

    def _cached_data(self) -> tuple[Tokenizer, TokenStore, TokenStore]:
        tokenizer = prepare_tokenizer(self.settings)
        return (tokenizer, *prepare_tokens(self.settings, tokenizer))

    def _objectives(self, processes: int) -> list[Objective]:
        return objectives(self.settings, self.train_store, self.vocabulary, self.curriculum, processes)

    def _resume(self, path: Path) -> None:
        saved, tensors = load_state(path, dict(self.scorer.named_parameters()))
        check_checkpoint(path, saved, self.facts)
        load_whole(self.decoder.state_dict(), hub.load(path / "hf").state_dict())
        self.optimizer.load_state_tensors(tensors)
        load_whole(self.scorer.auxiliary(), tensors)
        self.state = State.of(saved["progress"])
        to_come = self.state.curriculum.to_come(self.curriculum)
        check_same_batches(path, self._objectives(len(saved["random"])), self.objectives, to_come)
        if self.ranks.process_index < len(saved["random"]):
            set_random_states(saved["random"][self.ranks.process_index])
        self.saved_step = self.state.step if path.parent.resolve() == (self.dir / "checkpoints").resolve() else None
        self.ranks.print(f"resumed {path} at step {self.state.step}")

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Train to the last step: True. Stopped by a signal, after a checkpoint: False."""
        last = self.settings.training.max_steps
        main, step = self.ranks.is_main_process, self.state.step
        self.metrics = Metrics(self.dir, self.settings, self.facts["wandb_id"], step, write=main)
        self.progress = TrainingProgress(last, step, show=main)
        window = ProfileWindow(self.settings.training.profile, self.dir, main, self.progress.say)
        with self.metrics, self.progress, window:
            gc.collect()
            gc.freeze()
            gc.disable()  # a full collection in mid-step costs more than the loop's few cycles
            self._start_clock()
            while self.state.step < last:
                if any(sum_over_ranks([float(bool(self.stop))])):
                    self._save()
                    self.progress.say(f"stopped at step {self.state.step}; run the same command again to go on")
                    return False
                with window.around(self.state.step):
                    self._step()
        return True

    def _step(self) -> None:
        """One update: every objective is differentiated at the same weights, then their updates are summed."""
        step, settings = self.state.step, self.settings.training
        weights = {o.name: interpolate(o.points, step, settings.max_steps) for o in self.objectives}
        rate = settings.optimizer.lr * rate_factor(settings.schedule, step, settings.max_steps)
        measured = {o.name: self._differentiate(o, step) for o in self.objectives if weights[o.name] > 0}
        self.state.step += 1
        if all(m.finite for m in measured.values()):
            self.optimizer.step(rate, weights)
            self.state.skipped_in_a_row = 0
            self._advance_curriculum(measured.get("recall"))
        else:
            self._skip(measured)
        self._after_step(measured, {"lr": rate} | {f"weight_{name}": w for name, w in weights.items()})

    def _differentiate(self, objective: Objective, step: int) -> Measured:
        """Gradients of one objective, clipped on their own and kept apart until the update."""
        distances = self.state.curriculum.distances
        plan, sums, answered = differentiate(objective, self.accelerator, self.wrapped, step, distances)
        norm = self.optimizer.take(objective.name, objective.max_grad_norm)
        scored = sum(count for _, _, count in sums.values())
        self.state.tokens += plan.tokens
        self.tokens += plan.tokens
        self.flops += step_flops(self.config, plan, scored)
        return Measured(sums, float(norm), answered)

    def _advance_curriculum(self, recall: Measured | None) -> None:
        if recall is not None:
            self.state.curriculum = self.state.curriculum.advanced(self.curriculum, recall.answered)

    def _skip(self, measured: dict[str, Measured]) -> None:
        """A loss or gradient that is not finite never reaches the weights."""
        self.optimizer.drop()
        self.state.skipped += 1
        self.state.skipped_in_a_row += 1
        step, distances, in_a_row = self.state.step, self.state.curriculum.distances, self.state.skipped_in_a_row
        for objective in (o for o in self.objectives if o.name in measured and not measured[o.name].finite):
            name = objective.name
            kept = keep_batch(self.dir, objective, measured[name], step - 1, distances, self.tokenizer)
            self.progress.say(f"step {step} skipped: loss or gradient of {name} is not finite; {kept}")
            self.metrics.write("skipped", step, objective=name, in_a_row=in_a_row)
        stop_after(in_a_row, self.settings.training.max_skipped_steps, step)

    def _after_step(self, measured: dict[str, Measured], schedule: dict[str, float]) -> None:
        step, t = self.state.step, self.settings.training
        last = step == t.max_steps
        if step % t.log_every_steps == 0 or last or self.progress.first_step + 1 == step:
            self._log(measured, schedule)
        if step % t.validate_every_steps == 0 or last:
            self._validate()
        if step % t.save_every_steps == 0 or last:
            self._save()
        self.progress.advance(step)

    # -- what is reported and saved ----------------------------------------------------------------------------------

    def _log(self, measured: dict[str, Measured], schedule: dict[str, float]) -> None:
        seconds = time.perf_counter() - self.began
        columns = {k: v for name, m in measured.items() for k, v in m.columns(name).items()}
        mfu = self.flops / seconds / (self.facts["matmul_rate"] * self.ranks.num_processes)
        curriculum = self.state.curriculum
        self.metrics.write(
            "train", self.state.step, **columns, **schedule, **curriculum.columns(), horizon=self.state.horizon,
            tokens=self.state.tokens, tokens_per_second=self.tokens / seconds, mfu=mfu, skipped=self.state.skipped,
        )  # fmt: skip
        losses = "  ".join(f"{k.removeprefix('loss_')} {v:.3f}" for k, v in columns.items() if k.startswith("loss_"))
        recall = f"  D {curriculum}  horizon {self.state.horizon}" if self.settings.recall.enabled else ""
        self.progress.figures(self.state.step, f"{losses}  {self.tokens / seconds:,.0f} tok/s  MFU {mfu:.1%}{recall}")
        self._start_clock()

    def _start_clock(self) -> None:
        self.began, self.tokens, self.flops = time.perf_counter(), 0, 0.0

    def _validate(self) -> None:
        """Held-out text and recall; every rank measures its share."""
        paused = time.perf_counter()
        with whole(self.accelerator, self.wrapped):
            bits, recall = self.probe.text(self.decoder), self.probe.recall(self.decoder)
        self.state.validation_bits_per_byte, self.state.horizon = bits, recall.horizon
        if self.ranks.is_main_process:
            self.metrics.write("validation", self.state.step, bits_per_byte=bits)
            if recall:
                self.metrics.write("probe", self.state.step, **recall.columns())
            self.progress.say(f"step {self.state.step}  held-out {bits:.3f} bits per byte  recall{recall}")
        self.began += time.perf_counter() - paused

    def _save(self) -> None:
        """A checkpoint; every rank gives its random state, the main process writes."""
        paused = time.perf_counter()
        if self.state.step == self.saved_step:
            return
        random_states = gather_from_ranks(get_random_states())
        weights = whole_weights(self.decoder, keep=self.ranks.is_main_process)
        tensors = self.optimizer.state_tensors() | self.scorer.auxiliary()
        stored = stored_in_shards(self.dir / "checkpoints", self.state.step, tensors)
        ask_main(lambda: self._write_checkpoint(random_states, weights, stored))
        self.saved_step = self.state.step
        gc.collect()
        self.began += time.perf_counter() - paused

    def _write_checkpoint(self, random_states: list[dict[str, Any]], weights: Tensors, stored: Tensors | Path) -> None:
        state = {
            "progress": asdict(self.state),
            "random": random_states,
        } | {k: self.facts[k] for k in FACTS_SAVED}
        write = partial(write_hf, self.decoder, weights, self.tokenizer)
        save_checkpoint(self.dir, self.state.step, state, stored, write)
        prune(self.dir, self.settings.training.keep_checkpoints)

    def close(self) -> int:
        """Export the last checkpoint as runs/NAME/hf and say where everything is."""
        weights = whole_weights(self.decoder, keep=self.ranks.is_main_process)
        ask_main(lambda: replace_export(self.decoder, weights, self.tokenizer, self.dir / "hf"))
        s, R = self.state, reach(self.config.specs)
        self.ranks.print(
            f"\ndone: {s.step} steps, {s.tokens:,} tokens, {s.skipped} skipped\n"
            f"held-out text  {s.validation_bits_per_byte or math.nan:.3f} bits per byte\n"
            + (f"recall horizon {s.horizon} tokens of R = {R or 'unbounded'}\n" if self.settings.recall.enabled else "")
            + f"run folder     {self.dir}\nexport         {self.dir / 'hf'}"
        )
        return 0


if __name__ == "__main__":
    end_process(cli(main))
