"""Claims about `python -m eval.receipt`: what it writes, what it says, and the sentence for each mistake."""

import json
import math
import re
import shutil
import sys
from html import escape

import pytest
import torch

from data.tokenizer import train_tokenizer
from eval.haystack import open_haystack
from eval.models import load_model
from eval.needs.measure import draw_excerpts
from eval.receipt import __main__ as command
from eval.receipt.findings import finding
from eval.receipt.states import layers_of, open_states, with_config
from eval.report.page import page as report
from eval.report.runs import read_run
from model import hub
from model.decoder import WindreachForCausalLM, build_model
from model.errors import UserError, cli

FULL = "--layers", "[{kind: full}]"
SMALL = "--distances", "36,48", "--n", "50", "--tokens", "320"


@pytest.fixture
def run(monkeypatch, capsys):
    """The exit code and both streams of the command."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["receipt", *map(str, arguments)])
        return cli(command.main), *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def receipt(before, untrained_run, tmp_path_factory):
    """The printed text, receipt.json and the page of one run of the command, on a model whose name holds markup."""
    folder = tmp_path_factory.mktemp("receipt")
    named = shutil.copytree(before, folder / "<b>before")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["receipt", str(named), str(untrained_run), "--out", str(folder), *SMALL])
        assert cli(command.main) == 0
    return json.loads((folder / "receipt.json").read_text()), (folder / "receipt.html").read_text(), folder


def test_three_states_answer_the_same_items_and_read_the_same_text(receipt):
    result, _, _ = receipt
    assert list(result["states"]) == ["original", "windowed", "adapted"]
    for task in result["recall"].values():
        for row in task["rows"]:
            # Nothing was trained: AFTER has the weights of BEFORE, so both windowed states are one model.
            assert row["states"]["windowed"] == row["states"]["adapted"]
            assert row["states"]["original"]["difference"][0] == 0
    bits = {name: of["bits_per_byte"] for name, of in result["text"]["states"].items()}
    assert bits["windowed"] == bits["adapted"]
    assert bits["original"][-1] != bits["windowed"][-1]
    original, windowed = (result["text"]["states"][name] for name in ("original", "windowed"))
    assert original["difference"][-1] == [0, 0, 0]
    saved = [of["bits_per_byte"][0][0] - of["bits_per_byte"][-1][0] for of in (original, windowed)]
    assert [original["gain"][0], windowed["gain"][0]] == pytest.approx(saved, abs=1e-4)
    assert windowed["gain_difference"][0] == pytest.approx(saved[1] - saved[0], abs=1e-4)
    assert result["text"]["tokens"] >= 320


def test_cache_and_reach_are_those_of_the_layers(receipt):
    states = receipt[0]["states"]
    assert states["original"]["reach"] is None
    assert states["adapted"]["reach"] == 21
    # 2 x 3 layers x 2 key-value heads x 8 numbers x 2 bytes a token
    a_token = states["original"]["cache_bytes"][0] // 4096
    assert states["original"]["cache_bytes"] == [a_token * n for n in (4096, 32_768, 131_072)]
    assert states["adapted"]["cache_bytes"] == [a_token * 8] * 3


def test_the_page_fetches_nothing_and_escapes_names(receipt):
    _, page, folder = receipt
    assert "<b>before" not in page
    assert "&lt;b&gt;before" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert page.count("<figure>") == 4  # recall and text, and a relay map for each state
    assert (folder / "receipt.png").stat().st_size > 10_000


def test_the_report_of_the_adapted_run_links_the_receipt_and_says_what_it_found(receipt, untrained_run, tmp_path):
    result, _, folder = receipt
    run = shutil.copytree(untrained_run, tmp_path / "run")
    shutil.copy(folder / "receipt.json", run)
    page = report([read_run(str(run))])
    assert '<a href="receipt.html">The receipt</a>' in page
    assert escape(finding(result)) in page


def test_the_finding_is_computed_from_the_figures(receipt):
    """By hand: what the windows cost, what remains, and how far recall is at least 90 % of the original's."""
    result = json.loads(json.dumps(receipt[0]))
    shares = {"original": (0.8, 0.8), "windowed": (0.72, 0.70), "adapted": (0.73, 0.75)}
    for name, of in shares.items():
        for task in result["recall"].values():
            for row, share in zip(task["rows"], of, strict=True):
                row["states"][name]["accuracy"] = share
    for name, bits, ratio in ("windowed", 0.25, 1.25), ("adapted", -0.011, 0.989):
        text = result["text"]["states"][name]
        text["difference"][-1], text["ratio"][-1] = [bits, 0, 0], [ratio, 0, 0]
    assert finding(result) == (
        "With the windows alone the model needs 0.250 bits per byte more (25.0 %) and keeps recall up to 36 tokens; "
        "after training it needs 0.011 bits per byte less (1.1 %) and keeps recall up to 48 tokens, the farthest "
        "measured."
    )
    for task in result["recall"].values():
        task["rows"][0]["states"]["windowed"]["accuracy"] = 0.7
    assert "25.0 %) and keeps recall at no distance;" in finding(result)


def test_bits_per_byte_are_nats_over_bytes(receipt, before, untrained_run):
    """By hand: -ln p of each scored token of the excerpts behind at least 48 tokens, over the bytes of these tokens."""
    result, examined = receipt[0], load_model(str(before), "cpu")
    contexts = result["text"]["contexts"]
    documents = open_haystack(load_model(str(untrained_run), "cpu")).documents
    nats, n_bytes = 0.0, 0
    for excerpt in draw_excerpts(documents, 6, 320, [0, 23]):
        start = max(0, excerpt.first - contexts[-1])
        scored = excerpt.tokens[excerpt.first : excerpt.end].tolist()
        ids = torch.from_numpy(excerpt.tokens[start : excerpt.end])[None]
        with torch.no_grad():
            log_p = examined.model(input_ids=ids).logits[0].log_softmax(-1)
        nats -= sum(float(log_p[excerpt.first - start - 1 + i, token]) for i, token in enumerate(scored))
        n_bytes += len(examined.tokenizer.decode(scored).encode())
    assert n_bytes == result["text"]["bytes"]
    measured = result["text"]["states"]["original"]["bits_per_byte"][-1][0]
    assert measured == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)


def test_patterns_without_an_adapted_model_are_windowed_states(run, before, tmp_path):
    pattern = "hybrid=[{window: 8}, {kind: full}]"
    code, out, _ = run(
        before, "--layers", pattern, "[{window: 8, sink: true}]", "--out", tmp_path, *SMALL, "--text", "README.md"
    )
    assert code == 0
    result = json.loads((tmp_path / "receipt.json").read_text())
    assert list(result["states"]) == ["original", "hybrid", "[{window: 8, sink: true}]"]
    assert result["states"]["hybrid"]["kinds"] == "2 sliding W = 8, 1 full"
    assert "Nothing was trained: hybrid needs 0." in out


def test_a_pattern_keeps_what_the_weights_of_a_layer_need(before, tmp_path):
    model = WindreachForCausalLM.from_pretrained(before)
    layers = [{"kind": "full"}, {"kind": "full", "rope": False}, {"kind": "full", "sink": True}]
    tokenizer = load_model(str(before), "cpu").tokenizer
    hub.save_hf(
        build_model(type(model.config)(**model.config.to_dict() | {"layers": layers})), tmp_path, None, tokenizer
    )
    windowed = open_states(str(tmp_path), None, ["wide=[{window: 8}]"])["wide"]
    assert [(spec.window, spec.rope, spec.sink) for spec in windowed.specs] == [
        (8, True, False), (8, False, False), (8, True, True),
    ]  # fmt: skip


def test_windowed_weights_share_the_memory_of_the_original_and_a_sink_starts_at_logit_0(before):
    original = load_model(str(before), "cpu")
    config = type(original.model.config)(
        **original.model.config.to_dict() | {"layers": layers_of("[{window: 8, sink: true}]", 3)}
    )
    windowed = with_config(original, config)
    theirs = dict(original.model.named_parameters())
    for name, weight in windowed.model.named_parameters():
        if name.endswith("sink_logits"):
            assert torch.equal(weight, torch.zeros(weight.shape))
        else:
            assert weight is theirs[name]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["BEFORE"], "a receipt compares states; give AFTER, the run folder of the adapted model, or --layers"),
        (["BEFORE", "--layers", "64"], "--layers '64' is no list of layers; write it as model.layers is written"),
        (["BEFORE", "--layers", "[{window: }"], "is no list of layers"),
        (["BEFORE", "--layers", "[{widow: 8}]"], "model.layers[0]: "),
        (
            ["BEFORE", *FULL, "--distances", "1"],
            "the longest distance is 1, and a question needs 2 tokens; give a longer",
        ),
        (["no.gguf", *FULL], "BEFORE 'no.gguf': there is no such file; give a .gguf file"),
        (["BEFORE", "no/such"], "MODEL 'no/such': no such folder"),
    ],
)
def test_mistakes_are_answered_with_a_remedy(run, before, arguments, sentence):
    code, _, errors = run(*(argument.replace("BEFORE", str(before)) for argument in arguments))
    assert code == 2
    assert sentence in errors


def test_another_model_is_no_adapted_state(before, tmp_path):
    shutil.copytree(before, tmp_path / "after")
    model = WindreachForCausalLM.from_pretrained(before)
    wider = type(model.config)(**model.config.to_dict() | {"intermediate_size": 24})
    hub.save_hf(build_model(wider), tmp_path / "after")
    with pytest.raises(UserError, match=r"other layers: model\.layers.* is \(.*\) in AFTER and \(.*\) in BEFORE"):
        open_states(str(before), str(tmp_path / "after"))


def test_another_tokenizer_is_refused(before, tmp_path):
    after = shutil.copytree(before, tmp_path / "after")
    vocab_size = load_model(str(before), "cpu").tokenizer.vocab_size
    train_tokenizer([" ".join(f"ship {i} came over the grey water" for i in range(400))], vocab_size - 20).save(after)
    with pytest.raises(UserError, match="has another tokenizer than BEFORE"):
        open_states(str(before), str(after))
