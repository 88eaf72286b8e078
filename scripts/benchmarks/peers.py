"""The decoder of a config as `transformers` builds it, with our weights."""

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
    """The model config of a run. Raises UserError where `MistralForCausalLM` can't compute the same function."""
    config = model_config(settings, settings.model.vocab_size or settings.data.tokenizer.vocab_size)
    if not hub.is_mistral(config):
        raise UserError(
            f"{settings.name}: its layers are not all alike, so Mistral can't be compared; give another config"
        )
    return config


def mistral_twin(ours: WindreachForCausalLM, attention: str) -> MistralForCausalLM:
    """`MistralForCausalLM` with the weights of `ours`, saved to a checkpoint and loaded again."""
    with tempfile.TemporaryDirectory() as folder:
        hub.save_hf(ours, folder)
        twin = MistralForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)
    return twin.to(ours.device)
