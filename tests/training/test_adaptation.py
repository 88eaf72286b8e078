"""Adapters and frozen parameters: what is trained, and what files hold of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralForCausalLM

from model.decoder import WindreachForCausalLM, empty_model, give_memory
from model.errors import UserError
from model.hub import SavedWeights, save_hf
from model.packing import Packing
from model.projections import fused_names
from tests.model.tiny import VOCAB, tiny_config, tiny_model, token_ids
from training.adaptation import (
    FROZEN,
    adapt,
    count_trained,
    merged,
    peft_config,
    peft_tensors,
    spared_flops,
    start_adapters,
    trained_beside,
    write_frozen,
)
from training.objective import Scorer, Target
from training.processes.parallel import load_weights
from training.run.checkpoint import save_checkpoint
from training.settings.schema import LoraSettings, TrainingSettings

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft

T = 23
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "alpha": 6},
    "dora": {"rank": 3, "alpha": 6, "dora": True},
    "of some": {"rank": 2, "alpha": 1, "targets": ["k_proj", "o_proj", "up_proj"]},
    "dora of some": {"rank": 2, "alpha": 1, "targets": ["q_proj", "down_proj"], "dora": True},
}


def settings(**fields: Any) -> TrainingSettings:
    return TrainingSettings.model_validate({"max_steps": 1} | fields)


def adapted(lora: dict[str, Any], train_only: list[str] | None = None, **fields: Any) -> WindreachForCausalLM:
    """A tiny model with adapters that are not zero, so that they change the logits."""
    decoder = tiny_model(**fields)
    adapt(decoder, settings(lora=lora, train_only=train_only or []))
    start_adapters(decoder, seed=0)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if ".lora_" in name:
                p += 0.1 * torch.randn(p.shape, generator=draw)
    return decoder


def lora_settings(decoder: dict[str, Any]) -> LoraSettings:
    return LoraSettings.model_validate(decoder)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(token_ids(2, T)).logits
    return found


def trained(decoder: torch.nn.Module) -> set[str]:
    return {name for name, p in decoder.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("lora", VARIANTS.values(), ids=VARIANTS)
def test_the_loss_of_training_is_that_of_the_adapted_model_and_only_adapters_get_a_gradient(lora: dict) -> None:
    decoder, ids = adapted(lora).train(), token_ids(2, T)
    scorer = Scorer(decoder, relay_values=3)
    relay = Target(torch.arange(9), torch.tensor([0, 1, 2] * 3))
    n = T - 1
    index = torch.cat((torch.arange(n), T + torch.arange(n)))
    text = Target(index, ids[:, 1:].flatten())
    scores = scorer(ids, Packing.of_whole_rows(T, ids.device), {"text": text, "relay": relay})
    torch.testing.assert_close(scores["text"].loss / (2 * n), decoder(ids, labels=ids).loss)
    assert not torch.allclose(decoder(ids).logits, tiny_model()(ids).logits, atol=1e-3)
    (scores["text"].loss + scores["relay"].loss).backward()
    with_gradient = {name for name, p in scorer.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == trained(scorer)
    parts = 2 + lora.get("dora", False)
    assert len(with_gradient) == 1 + 3 * parts * len(lora_settings(lora).targets)
    assert all(".lora_" in name or name == "relay_head.weight" for name in with_gradient)


def test_adapters_begin_as_nothing_and_are_drawn_from_the_seed_as_peft_draws_them() -> None:
    first, again, other = tiny_model(), tiny_model(), tiny_model()
    for decoder, seed in ((first, 5), (again, 5), (other, 6)):
        adapt(decoder, settings(lora=VARIANTS["dora"]))
        theirs = {name: p.std() for name, p in decoder.named_parameters() if name.endswith("lora_A.default.weight")}
        start_adapters(decoder, seed)
        for name, std in theirs.items():
            assert decoder.get_parameter(name).std().item() == pytest.approx(std.item(), rel=0.3)
    torch.testing.assert_close(logits(first), logits(tiny_model()), atol=1e-5, rtol=1e-5)
    name = "model.layers.1.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_adapters_of_a_model_that_is_filled_later_are_those_of_one_that_was_filled_before() -> None:
    """As where processes share a pretrained model: adapters are added on the meta device."""
    before, later = tiny_model(tie_word_embeddings=True), empty_model(tiny_config(tie_word_embeddings=True))
    weights = before.state_dict()
    for decoder in (before, later):
        adapt(decoder, settings(lora=VARIANTS["dora"]))
    assert all(p.is_meta for p in later.parameters())
    give_memory(later, torch.device("cpu"))
    load_weights(later, fused_names(weights))
    for decoder in (before, later):
        start_adapters(decoder, seed=0)
    assert trained(later) == trained(before)
    for name, p in before.named_parameters():
        assert torch.equal(later.get_parameter(name), p), name


def test_a_compiled_layer_computes_what_an_uncompiled_one_does() -> None:
    decoder, compiled = (adapted(VARIANTS["of some"], layers=[{"kind": "full"}]).train() for _ in range(2))
    for layer in compiled.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    ids = token_ids(2, T)
    for model in (decoder, compiled):
        model(ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    found = {name.replace("._orig_mod", ""): p.grad for name, p in compiled.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() == trained(decoder)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_recomputed_layers_drop_the_same_inputs() -> None:
    """As in a run: with dropout the random state of the forward pass is kept."""
    gradients = []
    for recomputed in (False, True):
        decoder, ids = adapted(VARIANTS["lora"] | {"dropout": 0.5}).train(), token_ids(2, T)
        if recomputed:
            decoder.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": True})
        torch.manual_seed(3)
        decoder(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in decoder.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lora", VARIANTS.values(), ids=VARIANTS)
def test_a_merged_checkpoint_has_the_logits_of_the_adapted_model_in_transformers(
    lora: dict, tied: bool, tmp_path: Path
) -> None:
    decoder = adapted(lora, tie_word_embeddings=tied)
    save_hf(decoder, tmp_path, merged(decoder.state_dict(), lora_settings(lora)))
    theirs = MistralForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(theirs), logits(decoder), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        logits(WindreachForCausalLM.from_pretrained(tmp_path)), logits(decoder), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("lora", VARIANTS.values(), ids=VARIANTS)
def test_peft_loads_the_adapters_onto_the_model_of_transformers(lora: dict, tmp_path: Path) -> None:
    save_hf(tiny_model(), tmp_path / "base")
    decoder = adapted(lora)
    config = peft_config(lora_settings(lora))
    config.base_model_name_or_path = str(tmp_path / "base")
    config.save_pretrained(str(tmp_path / "adapter"))
    save_file(peft_tensors(trained_beside(decoder)), tmp_path / "adapter" / "adapter_model.safetensors")
    base = MistralForCausalLM.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(theirs), logits(decoder), atol=1e-4, rtol=1e-4)


def test_the_frozen_file_is_written_once_and_linked_after_that(tmp_path: Path) -> None:
    lora = lora_settings(VARIANTS["lora"])
    decoder = adapted(VARIANTS["lora"], ["*norm*"])

    def write(hf: Path) -> None:
        save_hf(decoder, hf, merged(decoder.state_dict(), lora))
        write_frozen(hf.parent, decoder.state_dict(), decoder)

    file = Path(FROZEN) / "model.safetensors"
    files = [tmp_path / "checkpoints" / f"step-00000{step}" / file for step in (1, 2, 3)]
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {}, trained_beside(decoder), write)
    assert files[0].samefile(files[1])
    files[1].unlink()
    files[1].write_bytes(b"damaged")
    save_checkpoint(tmp_path, 3, {}, trained_beside(decoder), write)
    assert files[2].read_bytes() == files[0].read_bytes()
    assert not files[2].samefile(files[0])
    assert "model.layers.0.mlp.up_proj.weight" in load_file(files[2])
    assert not [name for name in load_file(files[2]) if "norm" in name or "lora" in name or "base_layer" in name]
    other = adapted(VARIANTS["lora"], ["*norm*"], seed=1)
    load_weights(other, SavedWeights(files[2].parent))
    for name, p in decoder.named_parameters():
        assert p.requires_grad or torch.equal(p, other.get_parameter(name))


# --------------------------------------------------------------------------------------------------------- train_only


def test_patterns_name_parameters_as_files_do_and_all_others_are_frozen() -> None:
    decoder = tiny_model()
    adapt(decoder, settings(train_only=["model.layers.*.self_attn.*", "*norm*"]))
    expected = {f"model.layers.{i}.self_attn.{n}" for i in range(3) for n in ("qkv_weight", "o_proj.weight")}
    expected |= {f"model.layers.{i}.{n}_layernorm.weight" for i in range(3) for n in ("input", "post_attention")}
    assert trained(decoder) == expected | {"model.norm.weight"}
    tied = tiny_model(tie_word_embeddings=True)
    adapt(tied, settings(train_only=["lm_head.weight"]))
    assert trained(tied) == {"model.embed_tokens.weight"}


def test_patterns_beside_adapters_are_trained_too() -> None:
    decoder = adapted(VARIANTS["of some"], ["*norm*", "model.layers.0.self_attn.o_proj.weight"])
    names = trained(decoder)
    assert "model.layers.0.self_attn.o_proj.base_layer.weight" in names
    assert sum(".lora_" in name for name in names) == 3 * 2 * 3
    assert sum("norm" in name for name in names) == 7
    assert names == trained_beside(decoder).keys()


def test_a_pattern_that_names_nothing_is_refused_with_names_that_are_near() -> None:
    with pytest.raises(UserError, match=r"'model\.layers\.\*\.attn\.\*' matches no parameter") as refusal:
        adapt(tiny_model(), settings(train_only=["*norm*", "model.layers.*.attn.*"]))
    assert "model.layers.*.self_attn.q_proj.weight" in str(refusal.value)
    with pytest.raises(ValidationError, match="at least 1 character"):
        settings(train_only=[""])


def test_one_projection_of_a_joined_matrix_is_refused() -> None:
    message = (
        r"train_only names model\.layers\.0\.self_attn\.q_proj\.weight, but not model\.layers\.0\.self_attn\.k_proj"
        r"\.weight, model\.layers\.0\.self_attn\.v_proj\.weight\n  they are one matrix in memory"
    )
    with pytest.raises(UserError, match=message):
        adapt(tiny_model(), settings(train_only=["*.q_proj.*"]))
    adapt(tiny_model(), settings(train_only=["*.[qkv]_proj.*"]))


# ------------------------------------------------------------------------------------------------------------- counts


def test_counts_are_those_of_the_model() -> None:
    s = settings(lora=VARIANTS["dora"], train_only=["*norm*"])
    decoder = tiny_model()
    adapt(decoder, s)
    every, by_gradient = (
        sum(p.numel() for p in decoder.parameters()),
        sum(p.numel() for p in decoder.parameters() if p.requires_grad),
    )
    assert count_trained(tiny_config(), s) == (every, by_gradient, 0)
    muon = settings(train_only=["*.mlp.*", "*norm*"], optimizer={"kind": "muon"})
    assert count_trained(tiny_config(), muon) == (tiny_model().num_parameters(), 3 * 3 * 32 * 48 + 7 * 32, 9 * 32 * 48)


def test_what_frozen_matrices_spare_is_what_torch_counts() -> None:
    def counted(decoder: WindreachForCausalLM) -> int:
        ids = token_ids(1, T)
        with FlopCounterMode(display=False) as counter:
            decoder.train()(ids, labels=ids).loss.backward()
        return counter.get_total_flops()

    plain, lora = tiny_model(), adapted(VARIANTS["lora"])
    assert spared_flops(plain) == (0, 0)
    per_token, per_scored = spared_flops(lora)
    first = 2 * T * (64 * 32)  # the first layer's q, k and v pass no gradient on to the frozen embedding
    found = counted(plain) - counted(lora)
    assert per_scored == 2 * VOCAB * 32
    assert found == pytest.approx(T * (per_token + per_scored), abs=2 * first)
