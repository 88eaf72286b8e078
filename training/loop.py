"""A training run, in the order in which things happen:

    1 data   2 model   3 run folder   4 optimizer   5 stage   6 resume   7 loop   8 evaluate   9 save   10 export

`train.py` reads the settings and calls `train`. Each step differentiates every objective (text, recall) at the same
weights, then applies the sum of their updates (`training.step`). Every process runs this code; the main one decides and
writes files. The host runs up to two steps ahead of its GPU.
"""

import base64
import gc
import math
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils._pytree import tree_map_only

from model import hub
from model.decoder import give_memory
from model.errors import UserError
from model.projections import row_sizes
from model.windows import reach
from training.adaptation import FROZEN, adapt, merged, plain_names, spared_flops, start_adapters, write_frozen
from training.captured import Captured
from training.curriculum import State
from training.distillation import load_teacher
from training.objective import DISTILLATION, Scorer, Work, step_flops, teacher_flops
from training.optimizer import SummedOptimizer
from training.processes.context import Layout
from training.processes.parallel import (
    Tensors,
    load_weights,
    load_whole,
    shards,
    spread,
    stored_in_shards,
    whole,
    whole_weights,
)  # fmt: skip
from training.processes.precision import DTYPES, lack_of_memory_is_fault, make_deterministic, set_up_threads
from training.processes.ranks import ask_main, join_ranks, lost_rank_is_fault, shorten_timeout
from training.processes.signals import STOPPED, StopRequest
from training.reporting.metrics import Metrics, TrainingProgress
from training.reporting.nonfinite import keep_batch, stop_after
from training.reporting.profiling import profiled
from training.run.checkpoint import load_state, prune, save_checkpoint, save_export
from training.run.folder import (
    FACTS_SAVED,
    check_same_batches,
    check_same_data,
    check_same_order,
    decide_once,
    open_run,
    run_dir,
)  # fmt: skip
from training.schedule import interpolate, rate_factor
from training.settings.schema import Settings
from training.stage import Stage, prepare_stages
from training.start import grow_from_run, new_decoder, pretrained_folder, weights_fact
from training.step import DELAY, Inputs, Outcome, Update


def train(settings: Settings, resume: str, stop: StopRequest) -> int:
    """Run or continue the training that `settings` describe. Returns the exit code; see train.py for `resume`.

    Raises UserError for wrong input and TrainingFault where training can't go on.
    """
    with lost_rank_is_fault(), lack_of_memory_is_fault(settings):
        trainer = Trainer(settings, resume, stop)
        if not trainer.run():
            return STOPPED
        trainer.export()
        return 0


class Trainer:
    """One run: set up or resumed by `__init__`, trained by `run`, exported by `export`."""

    def __init__(self, settings: Settings, resume: str, stop: StopRequest):
        self.settings, self.dir, self.stop = settings, run_dir(settings), stop
        self.lora = settings.training.lora
        self.ranks = join_ranks()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks.num_processes))
        set_up_threads(settings.training.num_threads, local_processes=local)
        self.layout = Layout.of(self.ranks, settings.training.context_parallel)
        make_deterministic(settings.training.deterministic)

        # 1. Data, and the stages that train on it.
        self.tokenizer, self.stages = prepare_stages(settings, self.layout)
        recall, device = settings.recall, self.ranks.device

        # 2. Model. A pretrained one is filled here, or where processes share it, when each has its part.
        for stage in self.stages:
            stage.check_device()
        self.decoder = new_decoder(self.stages[0].config, settings)
        origin, auxiliary = grow_from_run(self.decoder, settings, self.tokenizer, resume)
        pretrained = pretrained_folder(self.decoder, settings, resume)
        if not shards():
            give_memory(self.decoder, torch.device("cpu"))
            self._fill(pretrained)
        teacher = load_teacher(settings, self.tokenizer, self.decoder.config.vocab_size, device)
        adapt(self.decoder, settings.training)
        self.spared = spared_flops(self.decoder)

        # 3. Run folder: which checkpoint to resume, and what the first start decided.
        checkpoint = ask_main(lambda: self._open_run(resume))
        described = settings, self.tokenizer, self.stages[0].sources, device, checkpoint
        self.facts = ask_main(lambda: decide_once(*described, origin | weights_fact(pretrained)))

        # 4. Optimizer, over the model as the processes share it.
        torch.manual_seed(settings.seed * 1009 + self.ranks.process_index)
        self.relay_values = recall.values if recall.enabled and recall.relay_loss_weight else 0
        self.scorer = Scorer(self.decoder, self.relay_values, settings.training.z_loss_weight, teacher)
        if settings.training.activation_checkpointing:
            drops = bool(self.lora and self.lora.dropout)  # the same inputs in both passes
            self.decoder.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": drops})
        if compiled := settings.training.compile:
            for decoder in (self.decoder, *([teacher.decoder] if teacher else [])):
                decoder.compile_layers("max-autotune-no-cudagraphs" if compiled == "max-autotune" else None)
        self.accelerator, self.wrapped = spread(self.scorer, self.facts["precision"])
        names, parameters = [o.name for o in self.stages[0].objectives], self.scorer.named_parameters()
        optimizer, muon_dtype = settings.training.optimizer, DTYPES[self.facts["precision"]]
        self.optimizer = SummedOptimizer(parameters, names, optimizer, muon_dtype, row_sizes(self.scorer))

        # 5. Stage: objectives, and the probe that measures them during training.
        self.state, self.saved_step = self.stages[0].start(), -1
        self.outcomes: deque[Outcome] = deque()  # of the last steps, oldest first: they don't count yet
        self._enter(self.stages[0])

        # 6. Resume.
        if shards():
            self._fill(pretrained)
        start_adapters(self.decoder, settings.seed)
        if checkpoint is not None:
            self._resume(checkpoint)
        elif auxiliary:
            load_whole({n: w for n, w in self.scorer.auxiliary().items() if n in auxiliary}, auxiliary)

    def _open_run(self, resume: str) -> Path | None:
        """The checkpoint to resume. The main process becomes the only writer of the run folder."""
        checkpoint, self.writer = open_run(self.settings, resume)
        return checkpoint

    def _stage_of(self, step: int) -> Stage:
        """The stage that trains step number `step`."""
        return next(stage for stage in reversed(self.stages) if stage.first <= max(0, step))

    def _enter(self, stage: Stage) -> None:
        """Train as `stage` says from here on. Weights and moments stay."""
        self.stage = stage
        self.decoder.reconfigure(stage.config)
        self.state.limit(stage.curriculum.last_distance)
        self.probe = stage.probe()
        self.update: Callable[[Inputs], Tensor]
        self.update = Update(stage.objectives, self.accelerator, self.wrapped, self.optimizer)
        dtype, teacher = DTYPES[self.facts["precision"]], self.scorer.teacher
        if stage.worth_capturing(dtype, self.facts["matmul_rate"], bool(teacher and teacher.waits(dtype))):
            self.update = Captured(self.update, self.ranks.device)

    def _fill(self, folder: Path | None, weights: Path | None = None) -> None:
        """Copy weights into the decoder, and what `folder` says of generation. `weights`: their folder, if another."""
        if folder is not None:
            load_weights(self.decoder, hub.SavedWeights(weights or folder))
            self.decoder.generation_config = hub.load_generation_config(folder) or self.decoder.generation_config

    def _resume(self, path: Path) -> None:
        saved, tensors = load_state(path, dict(self.scorer.named_parameters()))
        check_same_data(path, saved, self.facts)
        check_same_order(path, saved)
        plain = plain_names(self.decoder.state_dict())
        hub.check_shapes(path / "hf", plain, self.decoder.config.tie_word_embeddings)
        self._fill(path / "hf", path / FROZEN if self.lora else None)
        self.optimizer.load_state_tensors(tensors)
        load_whole(self.scorer.auxiliary(), tensors)
        self.state = State.of(saved["progress"])
        self.outcomes.extend(map(Outcome.load, saved.get("outcomes", [])))
        self._enter(self._stage_of(self.state.step - 1))
        nearest = min(self.state.distances.values())
        for stage in self.stages[self.stages.index(self.stage) :]:
            last = stage.curriculum.last_distance
            to_come = [dict.fromkeys(self.state.distances, d) for d in range(min(nearest, last), last + 1)]
            groups = len(saved["random"]) // saved.get("context_parallel", 1)
            check_same_batches(path, stage.objectives, groups, to_come)
        ask_main(lambda: self._stage_of(self.state.step).text.mixture.verify(self.state.step))
        if self.ranks.process_index < len(saved["random"]):
            random = bytearray(base64.b64decode(saved["random"][self.ranks.process_index]["torch"]))
            torch.set_rng_state(torch.frombuffer(random, dtype=torch.uint8))
        if path.parent.resolve() == (self.dir / "checkpoints").resolve():
            self.saved_step = self.state.step
        self.ranks.print(f"resumed {path} at step {self.state.step}")

    # -- 7. loop ------------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Train to the last step: True. Stopped by a signal, after a checkpoint: False."""
        settings, main, step = self.settings.training, self.ranks.is_main_process, self.state.step
        self.metrics = Metrics(self.dir, self.settings, self._described(), step, write=main)
        self.progress = TrainingProgress(settings.max_steps, step, show=main)
        profile = profiled(settings.profile if main else None, self.dir, step, self.progress.say)
        self._say_how()
        with self.metrics, self.progress, profile as after_step:
            gc.collect()
            gc.freeze()
            gc.disable()  # a full collection during a step costs more than the loop's few cycles
            self.began, self.tokens, self.flops = time.perf_counter(), 0, 0.0  # since the last logged step
            while self.state.step < settings.max_steps:
                if self._stopping():
                    if not self._skipping():
                        self._save()
                    self.progress.say(f"stopped at step {self.state.step}; run the same command again to go on")
                    return False
                self._step()
                after_step()
        return True

    def _described(self) -> dict[str, Any]:
        """Facts of the run for a tracker."""
        farthest = reach(self.stages[-1].config.specs)
        return self.facts | {"reach": farthest, "parameters": self.decoder.num_parameters()}

    def _say_how(self) -> None:
        """Print which attention computes the layers, why, and whether a step is one CUDA graph."""
        plans = self.stage.attention(DTYPES[self.facts["precision"]])
        how = ", ".join(dict.fromkeys(f"{plan.backend} ({plan.reason})" for plan in plans))
        self.progress.say(f"attention: {how}" + "; each step is a CUDA graph" * isinstance(self.update, Captured))

    def _stopping(self) -> bool:
        """Whether a rank has had a signal. All ranks say so before the same step."""
        if self.ranks.num_processes == 1:
            return bool(self.stop)
        on_cpu = self.ranks.device.type == "cpu"
        known = [o for o in self.outcomes if on_cpu or o.step <= self.state.step - DELAY]
        return any(outcome.asked_to_stop for outcome in known)

    def _step(self) -> None:
        """Launch one update, count the outcome of an earlier one, and do what is due at this step."""
        step = self.state.step
        self._change_stage(step)
        self._count_outcomes(step - DELAY)
        settings = self.stage.settings.training
        weights = {o.name: interpolate(o.points, step, settings.max_steps) for o in self.stage.objectives}
        rate = settings.optimizer.lr * rate_factor(settings.schedule, step, settings.max_steps)
        inputs = self._inputs(step, rate, {name: weight for name, weight in weights.items() if weight > 0})
        active = [o for o in self.stage.objectives if o.name in inputs.works]
        outcome = Outcome.of(step, self.state.distances, active, self.update(inputs))
        self.outcomes.append(outcome)
        self.state.step = step = step + 1
        first, last = step == self.progress.first_step + 1, step == settings.max_steps
        if first:
            shorten_timeout()
            self.stop.training = True
        if step % settings.log_every_steps == 0 or last or first:
            self._log(outcome, {"lr": rate} | {f"weight_{name}": weight for name, weight in weights.items()})
        if last:
            self._count_outcomes(step)
        if step % settings.validate_every_steps == 0 or last:
            self._evaluate()
        if self._due(step) or last:
            self._save()
        self.progress.update(self.progress.task, completed=step)

    def _change_stage(self, step: int) -> None:
        """Enter the stage of this step, if it is another. The steps before it count first, as their stage says."""
        if (stage := self._stage_of(step)) is self.stage:
            return
        self._count_outcomes(step)
        if self.settings.training.compile:
            torch._dynamo.reset()  # what was compiled for the stage before is not used again
        self._enter(stage)
        number, data = self.stages.index(stage) + 1, stage.settings.data
        farthest = reach(stage.config.specs) or "unbounded"
        self.progress.say(f"stage {number} from step {step + 1}: R = {farthest}, rows of {data.seq_len} tokens")
        self._say_how()

    def _inputs(self, step: int, rate: float, weights: dict[str, float]) -> Inputs:
        """What the step needs, on its way to the device. `weights`: of the objectives that take part."""
        works, ranks = {}, self.ranks.num_processes
        for objective in (o for o in self.stage.objectives if o.name in weights):
            plan = objective.plan(self.state.distances)
            batches = objective.micro_batches(step, self.state.distances, self.layout.rank)
            works[objective.name] = work = Work.of(objective, [self.layout.cut(batch) for batch in batches])
            counts = dict(zip(objective.term_weights, work.counts.tolist(), strict=False))
            relayed = ranks * counts.pop("relay", 0.0)
            self.state.tokens += plan.tokens
            self.tokens += plan.tokens
            taught, scored = ranks * counts.pop(DISTILLATION, 0.0), ranks * sum(counts.values())
            self.flops += step_flops(self.stage.config, plan, scored, relayed, self.relay_values)
            self.flops -= plan.tokens * self.spared[0] + scored * self.spared[1]
            if taught and self.scorer.teacher is not None:
                self.flops += teacher_flops(self.scorer.teacher.decoder.config, plan, taught)
        shares = {name: torch.tensor(weight) for name, weight in weights.items()}
        inputs = Inputs(works, torch.tensor(rate), shares, torch.tensor(float(bool(self.stop)), dtype=torch.float64))
        if isinstance(self.update, Captured):
            return tree_map_only(Tensor, Tensor.pin_memory, inputs.padded())
        if self.ranks.device.type == "cpu":
            return inputs
        return tree_map_only(Tensor, lambda x: x.pin_memory().to(self.ranks.device, non_blocking=True), inputs)

    def _count_outcomes(self, last: int) -> None:
        """Let the outcomes of the steps up to index `last` count: for the curriculum, or as skipped."""
        while self.outcomes and self.outcomes[0].step <= last:
            outcome = self.outcomes.popleft()
            if not outcome.finite:
                self._count_skipped(outcome)
                continue
            self.state.skipped_in_a_row = 0
            if recall := outcome.measured.get("recall"):
                for task, state in self.state.curriculum.items():
                    asked = recall.right[task], recall.count[task]
                    self.state.curriculum[task] = self.stage.curriculum.advance(state, *asked)

    def _count_skipped(self, outcome: Outcome) -> None:
        """Count a step whose loss or gradient was not finite, so that its update was left out. Keep its batches."""
        self.state.skipped += 1
        self.state.skipped_in_a_row += 1
        step, in_a_row = outcome.step + 1, self.state.skipped_in_a_row
        now = min(
            self.state.step + 1, self.settings.training.max_steps
        )  # so that a resume which counts it again first removes it
        for o in self.stage.objectives:
            if o.name in outcome.measured and not outcome.measured[o.name].finite:
                saved = keep_batch(
                    self.dir, o, outcome.measured[o.name], outcome.step, outcome.distances, self.tokenizer
                )  # fmt: skip
                self.progress.say(f"step {step} skipped: loss or gradient of {o.name} is not finite; {saved}")
                self.metrics.write("skipped", now, skipped_step=step, objective=o.name, in_a_row=in_a_row)
        stop_after(in_a_row, self.settings.training.max_skipped_steps, step)

    def _log(self, outcome: Outcome, schedule: dict[str, float]) -> None:
        measured = outcome.measured  # waits for the step, so that the time includes it
        seconds, state = time.perf_counter() - self.began, self.state
        rate = self.tokens / seconds
        flops = self.flops / seconds / self.ranks.num_processes
        self.facts["matmul_rate"] = max(flops, self.facts["matmul_rate"])  # it was busy at the start
        mfu = flops / self.facts["matmul_rate"]
        columns = {k: v for name, m in measured.items() for k, v in m.columns(name).items()}
        self.metrics.write(
            "train", state.step, **columns, **schedule, **state.columns(), horizon=state.horizon,
            tokens=state.tokens, tokens_per_second=rate, mfu=mfu, skipped=state.skipped,
        )  # fmt: skip
        losses = "  ".join(f"{k.removeprefix('loss_')} {v:.3f}" for k, v in columns.items() if k.startswith("loss_"))
        distances = "/".join(map(str, state.distances.values()))
        recall = f"  D {distances}  horizon {state.horizon}" if self.settings.recall.enabled else ""
        self.progress.figures(state.step, f"{losses}  {rate:,.0f} tok/s  MFU {mfu:.1%}{recall}")
        self.began, self.tokens, self.flops = time.perf_counter(), 0, 0.0

    def _stop_clock(self) -> float:
        """Wait for the device and return the time, so that evaluation and saving are not counted."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    # -- 8. evaluate --------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Measure held-out text and recall; every rank measures its share. The clock stands still meanwhile."""
        paused = self._stop_clock()
        with whole(self.wrapped), self.accelerator.autocast():
            bits, recall = self.probe.text(self.decoder), self.probe.recall(self.decoder)
        columns = recall.columns()
        total = bits.pop("")
        self.state.validation_bits_per_byte = total if math.isfinite(total) else None  # JSON has no NaN
        self.state.horizon = columns["horizon"]
        by_source = {f"bits_per_byte_{name}": figure for name, figure in bits.items()}
        self.metrics.write("validation", self.state.step, bits_per_byte=total, **by_source)
        if recall:
            self.metrics.write("probe", self.state.step, **columns)
        each = "".join(f"  {name} {figure:.3f}" for name, figure in bits.items())
        self.progress.say(f"step {self.state.step}  held-out {total:.3f} bits per byte{each}  recall{recall}")
        self.began += time.perf_counter() - paused

    # -- 9. save ------------------------------------------------------------------------------------------------------

    def _due(self, step: int) -> bool:
        """Whether a checkpoint is due: each `save_every_steps`, and later while steps are skipped."""
        every, last = self.settings.training.save_every_steps, max(self.saved_step, self.progress.first_step)
        return step // every > last // every and not self._skipping()

    def _skipping(self) -> bool:
        """Whether the last step was skipped, which may be the fault of the weights. Waits for the device."""
        return not self.outcomes[-1].finite if self.outcomes else self.state.skipped_in_a_row > 0

    def _check_folder(self) -> None:
        if not self.writer.still_there():
            raise UserError(f"{self.dir} was deleted, moved or replaced while this run was training in it")

    def _save(self) -> None:
        """Save a checkpoint: every rank sends its random state, the main process writes. The clock stands still.

        While steps are skipped the older checkpoints stay: the weights may be broken.
        """
        if self.state.step == self.saved_step:
            return
        ask_main(self._check_folder)
        paused = self._stop_clock()
        random = {"torch": base64.b64encode(bytes(torch.get_rng_state().numpy())).decode()}
        facts = {name: self.facts[name] for name in FACTS_SAVED}
        outcomes = [outcome.saved() for outcome in self.outcomes]
        state = {"progress": asdict(self.state), "outcomes": outcomes, "random": gather_object([random])} | facts
        state["context_parallel"] = self.layout.parts
        weights = whole_weights(self.decoder, keep=self.ranks.is_main_process)
        tensors = self.optimizer.state_tensors() | self.scorer.auxiliary()
        stored = stored_in_shards(self.dir / "checkpoints", self.state.step, tensors)
        ask_main(lambda: save_checkpoint(self.dir, self.state.step, state, stored, partial(self._write_model, weights)))
        if not self._skipping():
            ask_main(lambda: prune(self.dir, self.settings.training.keep_checkpoints))
        self.saved_step = self.state.step
        gc.collect()
        self.began += time.perf_counter() - paused

    def _write_model(self, weights: Tensors, hf: Path) -> None:
        """What a checkpoint holds of the decoder, but for what is trained beside it."""
        self._write_hf(weights, hf)
        if self.lora is not None:
            write_frozen(hf.parent, weights, self.decoder)

    def _write_hf(self, weights: Tensors, folder: Path) -> None:
        """A Hugging Face checkpoint with its tokenizer, without the relay head, and with the adapters merged."""
        hub.save_hf(self.decoder, folder, merged(weights, self.lora), self.tokenizer)

    # -- 10. export ---------------------------------------------------------------------------------------------------

    def export(self) -> None:
        """Write the last weights to runs/NAME/hf and print where everything is."""
        weights = whole_weights(self.decoder, keep=self.ranks.is_main_process)
        ask_main(self._check_folder)
        ask_main(lambda: save_export(self.dir / "hf", partial(self._write_hf, weights)))
        s, farthest = self.state, reach(self.stage.config.specs) or "unbounded"
        recall = f"recall horizon {s.horizon} tokens of R = {farthest}\n" if self.settings.recall.enabled else ""
        self.ranks.print(
            f"\ndone: {s.step} steps, {s.tokens:,} tokens, {s.skipped} skipped\n"
            f"held-out text  {s.validation_bits_per_byte or math.nan:.3f} bits per byte\n"
            f"{recall}run folder     {self.dir}\nexport         {self.dir / 'hf'}"
        )
