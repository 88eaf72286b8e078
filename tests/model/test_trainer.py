"""Claims about our class in the training loop of `transformers`."""

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from model.decoder import build_model
from tests.model.tiny import VOCAB, tiny_config


class Rows(Dataset):
    """Eight rows of random tokens, of which some labels are ignored, a different number in each row."""

    def __init__(self):
        self.ids = torch.randint(0, VOCAB, (8, 24), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        labels = self.ids[i].clone()
        labels[: 2 * i] = -100
        return {"input_ids": self.ids[i], "labels": labels}


def trained(folder, per_step, accumulation):
    """(logged loss, gradient norm, weights) after one step over the eight rows."""
    model = build_model(tiny_config())
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=per_step, report_to=[], save_strategy="no",
        gradient_accumulation_steps=accumulation, logging_steps=1, learning_rate=1e-2, use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, max_grad_norm=1e9,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows())
    trainer.train()
    row = trainer.state.log_history[0]
    return row["loss"], row["grad_norm"], torch.cat([p.detach().flatten() for p in model.parameters()])


def test_four_micro_batches_of_transformers_trainer_are_one_batch(tmp_path):
    loss, norm, weights = trained(tmp_path / "whole", 8, 1)
    loss_of_parts, norm_of_parts, weights_of_parts = trained(tmp_path / "parts", 2, 4)
    assert abs(loss - loss_of_parts) < 1e-3
    assert abs(norm - norm_of_parts) < 1e-3 * norm
    torch.testing.assert_close(weights_of_parts, weights, rtol=1e-3, atol=1e-4)
