"""The same decoder as `transformers` has it, for benchmarks."""

import tempfile

import torch
from transformers import MistralForCausalLM

from model import hub
from model.config import WindreachConfig
from model.decoder import WindreachForCausalLM
from model.errors import UserError
from training.settings.build import model_config
from training.settings.schema import Settings


def plain_config(settings: Settings) -> WindreachConfig:
    """The decoder of the config; refused when the peer can't be built with the same function."""
    config = model_config(settings, settings.model.vocab_size or settings.data.tokenizer.vocab_size)
    if not hub.is_mistral(config):
        raise UserError(f"{settings.name}: its layers are not all one sliding window, so Mistral is no peer for it")
    return config


def mistral_twin(ours: WindreachForCausalLM, attention: str) -> MistralForCausalLM:
    """`MistralForCausalLM` with our weights, by way of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        hub.save_hf(ours, folder)
        return MistralForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)
