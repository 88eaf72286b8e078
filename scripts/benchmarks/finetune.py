"""A step of fine-tuning a pretrained model beside that of `transformers.Trainer`: all weights, and adapters alone.

Both see the same batch, and compute the same loss, clipping and AdamW update. The layers are the model's own, so the
functions are equal: windows that a config puts on the model would make our step shorter.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from data.pretrained import checkpoint_folder
from model.decoder import WindreachForCausalLM
from model.errors import UserError
from model.packing import Packing
from scripts.benchmarks.timing import OURS, Row, Setup, Work, compare
from training.adaptation import adapt, peft_config, start_adapters
from training.objective import Scorer, Target
from training.optimizer import SummedOptimizer
from training.processes.parallel import spread
from training.settings.schema import LoraSettings, OptimizerSettings, TrainingSettings

LORA = LoraSettings(rank=16, alpha=32)
PEERS = {"transformers.Trainer": False, "transformers.Trainer, layers compiled": True}
LIMIT = 1.0  # the least ratio that is aimed at
OPTIMIZER = OptimizerSettings(lr=1e-5)


def bench_finetune(setup: Setup, rows: int | None = None, seq_len: int | None = None) -> list[Row]:
    """Forward, backward, clipping and AdamW. `rows` is the batch size. Raises UserError without a pretrained model."""
    named, training = setup.settings.model.init.from_pretrained, setup.settings.training
    if named is None:
        raise UserError("this config starts from no pretrained model; give --config configs/retrofit-smollm2.yaml")
    t = seq_len or setup.settings.data.seq_len
    rows = rows or max(1, training.tokens_per_step // t)
    ways = {"all weights": None, "adapters": training.lora or LORA}
    case = f"{named}: %s, {rows} x {t}"
    return [row for what, lora in ways.items() for row in _compared(setup, case % what, lora, rows, t)]


def _compared(setup: Setup, case: str, lora: LoraSettings | None, rows: int, t: int) -> list[Row]:
    """One way to train beside its peers. The compiled peer is left out where our own step isn't compiled."""
    named, compiled = setup.settings.model.init.from_pretrained, bool(setup.settings.training.compile)
    assert named is not None
    folder = checkpoint_folder(named)
    ours = WindreachForCausalLM.from_pretrained(folder).to(setup.device)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(ours.config.vocab_size, (rows, t), generator=draw).to(setup.device)
    works = {OURS: our_step(ours, ids, lora, setup.precision, compiled)}
    for name, theirs in PEERS.items():
        if compiled or not theirs:
            works[name] = their_step(folder, ids, lora, setup.precision, theirs)
    return compare("finetune", case, works, setup.rounds, setup.precision, dict.fromkeys(PEERS, LIMIT))


def our_step(
    decoder: WindreachForCausalLM, ids: Tensor, lora: LoraSettings | None, precision: str, compiled: bool = False
) -> Work:
    """A step as the training loop makes it, which returns its loss."""
    adapt(decoder.train(), TrainingSettings(max_steps=1, lora=lora))
    start_adapters(decoder, seed=0)
    if compiled:
        decoder.compile_layers()
    scorer = Scorer(decoder, relay_values=None)
    accelerator, wrapped = spread(scorer, precision)
    optimizer = SummedOptimizer(scorer.named_parameters(), ["text"], OPTIMIZER)
    rows, t = ids.shape
    scored = torch.arange(rows * t, device=ids.device).view(rows, t)[:, :-1].flatten()
    targets = {"text": Target(scored, ids[:, 1:].flatten())}
    packing, yes = Packing.of_whole_rows(t, ids.device), torch.tensor(True)
    rate, weights = torch.tensor(OPTIMIZER.lr), {"text": torch.tensor(1.0)}

    def step() -> Tensor:
        loss: Tensor = wrapped(ids, packing, targets)["text"].loss / len(scored)
        accelerator.backward(loss)
        optimizer.take("text", OPTIMIZER.max_grad_norm)
        optimizer.step(rate, weights, yes)
        return loss.detach()

    return step


def their_step(folder: Path, ids: Tensor, lora: LoraSettings | None, precision: str, compiled: bool = False) -> Work:
    """A step as `Trainer.train` makes it, which returns its loss."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    if lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config(lora))
    for layer in model.get_decoder().layers if compiled else ():
        layer.compile()
    arguments = TrainingArguments(
        "unused", learning_rate=OPTIMIZER.lr, lr_scheduler_type="constant", weight_decay=OPTIMIZER.weight_decay,
        adam_beta1=OPTIMIZER.beta1, adam_beta2=OPTIMIZER.beta2, optim="adamw_torch_fused", report_to=[],
        max_grad_norm=OPTIMIZER.max_grad_norm, bf16=precision == "bf16", use_cpu=ids.device.type == "cpu",
    )  # fmt: skip
    trainer = Trainer(model, arguments)
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    batch, scored = {"input_ids": ids, "labels": ids}, torch.tensor(ids[:, 1:].numel(), device=ids.device)

    def step() -> Tensor:
        loss: Tensor = trainer.training_step(model, batch, scored)
        trainer.accelerator.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        model.zero_grad()
        return loss

    return step
