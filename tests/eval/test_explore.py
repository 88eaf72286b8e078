"""Claims about docs/explore.html: it computes what the code computes, and is usable on a desk and on a phone."""

import json
import random
import re
import shutil
import subprocess
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import torch
from transformers import GptOssConfig, Olmo3Config

from eval.models import specs_of
from eval.plots import masks
from eval.report.page import EXPLORER, explorer_settings
from model import windows
from model.config import WindreachConfig
from model.errors import UserError
from model.flops import cache_bytes, forward_flops
from model.windows import LayerSpec
from tests.eval.browser import CHROMIUM, look, needs_browser
from training.settings.build import model_config
from training.settings.config_file import load_settings

PAGE = EXPLORER.read_text(encoding="utf-8")
NODE = shutil.which("node")
needs_script = pytest.mark.skipif(NODE is None and CHROMIUM is None, reason="neither node nor a browser is installed")

NUMBERS = """cases => cases.map(({m, layers}) => {
  const refused = f => { try { return f(layers); } catch (error) { return error.message; } };
  return {
    reach: refused(reach), other: refused(reachOfOtherTokens), quoted: windowTimesLayers(layers),
    flops: forwardFlops(m, layers), cache: cacheBytes(m, layers),
    keys: layers.map(layer => keysPerQuery(layer, m.length)),
  };
})"""
PICTURES = """cases => cases.map(({m, layers}) => {
  const steps = cone(layers, m.length);
  return {
    steps: [...steps], paths: [...steps.keys()].filter(i => steps[i] >= 0).map(i => path(layers, steps, i)),
    masks: layers.map(layer => {
      const [drawn, length] = drawnMask(layer), positions = [...Array(length).keys()];
      return positions.map(query => positions.map(key => visible(drawn, query, key)));
    }),
  };
})"""


def computed(script: str, cases: list[dict[str, Any]], folder: Path) -> Any:
    """What `script`, a function of the cases, returns: in node, or in the browser where there is no node."""
    call = f"({script})({json.dumps(cases)})"
    if NODE is None:
        answer, complaints = look(EXPLORER, f"(page, view) => view.eval({json.dumps(call)})", 900, folder)
        assert complaints == []
        return answer
    theory = re.search(r'<script id="theory">(.*?)</script>', PAGE, re.DOTALL)
    assert theory
    code = f"{theory[1]}\nconsole.log(JSON.stringify({call}))"
    return json.loads(subprocess.run([NODE], input=code, capture_output=True, text=True, check=True).stdout)


def config_of(specs: list[LayerSpec], **sizes: int) -> WindreachConfig:
    return WindreachConfig(num_hidden_layers=len(specs), layers=[asdict(spec) for spec in specs], **sizes)


def case(config: WindreachConfig, length: int, dtype_bytes: int = 2) -> dict[str, Any]:
    """The numbers of the form and the layers, as the page's own functions take them."""
    m = {
        "length": length, "heads": config.num_attention_heads, "kv": config.num_key_value_heads,
        "head": config.head_dim, "bytes": dtype_bytes, "hidden": config.hidden_size,
        "ffn": config.intermediate_size, "vocab": config.vocab_size,
    }  # fmt: skip
    fields = ("kind", "window", "dilation")
    layers = [{key: getattr(s, key) for key in fields} | {"globals": s.global_tokens} for s in config.specs]
    return {"m": m, "layers": layers}


def random_layer(draw: random.Random) -> LayerSpec:
    kind = draw.choices(windows.KINDS, weights=[4, 1, 3, 3])[0]
    window, dilation = draw.randint(1, 12), draw.randint(1, 4) if kind == "dilated" else 1
    first = draw.choice([0, 0, 0, 0, 1, 3, 20])
    return LayerSpec(kind, None if kind == "full" else window, dilation, global_tokens=first)


def random_config(draw: random.Random) -> WindreachConfig:
    pattern = [random_layer(draw) for _ in range(draw.randint(1, 3))]
    kv = draw.randint(1, 3)
    return config_of(
        (pattern * 8)[: draw.randint(1, 8)], num_key_value_heads=kv, num_attention_heads=kv * draw.randint(1, 4),
        head_dim=2 * draw.randint(1, 64), hidden_size=draw.randint(1, 300), intermediate_size=draw.randint(1, 900),
        vocab_size=draw.randint(1, 5000),
    )  # fmt: skip


CONFIGS = [random_config(random.Random(seed)) for seed in range(300)]
LENGTHS = [random.Random(-seed).randint(1, 300) for seed in range(1, 301)]


def assert_same_numbers(config: WindreachConfig, length: int, dtype_bytes: int, answer: dict[str, Any]) -> None:
    assert answer["reach"] == windows.reach(config.specs)
    assert answer["other"] == windows.reach_of_other_tokens(config.specs)
    assert answer["quoted"] == windows.window_times_layers(config.specs)
    assert answer["cache"] == cache_bytes(config, dtype_bytes, length=length)
    assert answer["keys"] == [windows.keys_per_query(spec, length) for spec in config.specs]
    assert answer["flops"] == pytest.approx(forward_flops(config, length), rel=1e-12)


@needs_script
def test_the_numbers_are_those_of_the_code_on_random_stacks(tmp_path):
    orders = [(config, length, 2 ** (i % 3)) for i, (config, length) in enumerate(zip(CONFIGS, LENGTHS, strict=True))]
    answers = computed(NUMBERS, [case(*order) for order in orders], tmp_path)
    assert len({answer["reach"] for answer in answers}) > 30
    for order, answer in zip(orders, answers, strict=True):
        assert_same_numbers(*order, answer)


@needs_script
def test_cones_paths_and_masks_are_those_of_the_code_on_random_stacks(tmp_path):
    answers = computed(PICTURES, [case(*order) for order in zip(CONFIGS, LENGTHS, strict=True)], tmp_path)
    for config, length, answer in zip(CONFIGS, LENGTHS, answers, strict=True):
        specs, steps = config.specs, torch.tensor(answer["steps"])
        rows = torch.arange(len(specs) + 1)[:, None]
        assert torch.equal((steps >= 0) & (steps <= rows), windows.cone(specs, length))
        for way in answer["paths"]:
            assert_allowed(way, specs, length)
        for spec, drawn in zip(specs, answer["masks"], strict=True):
            by = -(-max(spec.ring_slots or 8, spec.global_tokens) // masks.WIDEST_MASK)
            assert masks.mask(masks.scaled(spec, by), len(drawn)).tolist() == drawn


def assert_allowed(way: list[list[int]], specs: tuple[LayerSpec, ...], length: int) -> None:
    """From the input to the last token at the output, upwards; every hop is through one layer that sees the token."""
    assert (way[0][0], way[-1]) == (len(specs), [0, length - 1])
    for (below, key), (above, query) in pairwise(way):
        if key == query:
            assert above <= below
        else:
            assert above == below - 1
            assert windows.visible(specs[-below], torch.tensor(query), torch.tensor(key))


@needs_script
def test_windows_whose_borders_never_meet_are_refused_as_in_the_code(tmp_path):
    config = config_of([LayerSpec("chunked", 4093), LayerSpec("chunked", 4099)])
    (answer,) = computed(NUMBERS, [case(config, 64)], tmp_path)
    with pytest.raises(UserError, match="coincide only every 16,777,207 tokens"):
        windows.reach(config.specs)
    assert "coincide only every 16,777,207 tokens" in answer["reach"]


# ---------------------------------------------------------------------------------------------------------- presets


def presets() -> dict[str, str]:
    written = re.findall(r'^  "(.+)":\s+"(layers=.+)" \+\s+"(.+)",$', PAGE, re.MULTILINE)
    return {name: first + second for name, first, second in written}


def without_length(settings: str) -> dict[str, list[str]]:
    return {key: value for key, value in parse_qs(settings).items() if key != "length"}


def config_of_preset(settings: str) -> tuple[WindreachConfig, int]:
    """The configuration that a preset describes, and its length, read without the page's code."""
    said = {key: value[0] for key, value in parse_qs(settings).items()}
    pattern = []
    for kind, count, window, dilation, first in (row.split(":") for row in said["pattern"].split(",")):
        spec = LayerSpec(kind, int(window) if window else None, int(dilation), int(first))
        pattern += [spec] * int(count)
    depth = int(said["layers"])
    sizes = {
        "num_attention_heads": "heads", "num_key_value_heads": "kv", "head_dim": "head", "hidden_size": "hidden",
        "intermediate_size": "ffn", "vocab_size": "vocab",
    }  # fmt: skip
    config = config_of((pattern * depth)[:depth], **{key: int(said[name]) for key, name in sizes.items()})
    return config, int(said["length"])


@pytest.mark.parametrize(("preset", "file"), [("Windreach quickstart", "quickstart"), ("Mistral 7B", "mistral-7b")])
def test_presets_of_our_configs_are_those_configs(preset, file):
    settings = load_settings(EXPLORER.parents[1] / "configs" / f"{file}.yaml")
    config = model_config(settings, settings.data.tokenizer.vocab_size)
    assert without_length(explorer_settings(config)) == without_length(presets()[preset])


def test_presets_of_other_models_have_the_shapes_that_transformers_knows():
    gpt, olmo = GptOssConfig(), Olmo3Config()
    config, length = config_of_preset(presets()["gpt-oss 120B"])
    shared = ("num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size", "head_dim")
    assert [getattr(config, key) for key in shared] == [getattr(gpt, key) for key in shared]
    assert config.intermediate_size == gpt.intermediate_size * gpt.num_experts_per_tok
    assert (config.specs, length) == (specs_of(gpt), gpt.max_position_embeddings)
    config, _ = config_of_preset(presets()["OLMo 3 7B"])
    shared = ("num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size")
    assert [getattr(config, key) for key in shared] == [getattr(olmo, key) for key in shared]
    assert config.specs == specs_of(olmo)


@needs_script
def test_the_numbers_of_the_presets_are_those_of_the_code(tmp_path):
    orders = [(*config_of_preset(settings), 2) for settings in presets().values()]
    assert len(orders) == 5
    for order, answer in zip(orders, computed(NUMBERS, [case(*order) for order in orders], tmp_path), strict=True):
        assert_same_numbers(*order, answer)


# ---------------------------------------------------------------------------------------------------------- browser

USE = """(page, view) => {
  const $ = id => page.getElementById(id), text = id => $(id).textContent.replaceAll("\\u00a0", " ");
  const set = (input, value) => { input.value = value; input.dispatchEvent(new view.Event("input", {bubbles: true})); };
  const field = name => page.querySelector(`[name=${name}]`), kind = key => page.querySelector(`[data-key=${key}]`);
  const numbers = () => Object.fromEntries(["reach", "quoted", "cache", "flops", "summary"].map(id => [id, text(id)]));
  const drawn = canvas => new Set(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data).size;
  const seen = {width: view.innerWidth, opened: numbers(), overflow: []};
  const check = () => {
    if (page.documentElement.scrollWidth > view.innerWidth) seen.overflow.push(view.location.hash);
    for (const e of page.querySelectorAll("input, select, button, canvas, dd, td"))
      if (e.getBoundingClientRect().right > view.innerWidth) seen.overflow.push(e.outerHTML);
  };
  check();
  seen.colours = [...page.querySelectorAll("canvas")].map(drawn);
  seen.unnamed = [...page.querySelectorAll("input, select")].filter(e => !e.closest("label")?.textContent.trim()).length
    + [...page.querySelectorAll("canvas")].filter(e => !e.getAttribute("aria-label")).length;
  seen.presets = [...$("presets").children].map(button => {
    button.click();
    check();
    return [button.textContent, {...numbers(), pressed: button.getAttribute("aria-pressed"), hash: view.location.hash}];
  });
  $("presets").firstElementChild.click();
  set($("distance"), 16);
  seen.answer = text("answer");
  set($("distance"), 481);
  seen.unreached = text("answer");
  const {right, top} = $("cone").getBoundingClientRect();
  const mouse = {clientX: right - .2, clientY: top, pointerType: "mouse"};
  $("cone").dispatchEvent(new view.PointerEvent("pointermove", mouse));
  seen.pointed = text("answer");
  set(field("layers"), 8);
  seen.shallow = numbers();
  set(field("layers"), "");
  seen.problems = [text("problem")];
  set(field("layers"), 8);
  set(field("heads"), 3);
  seen.problems.push(text("problem"));
  set(field("heads"), 4);
  seen.solved = $("problem").hidden;
  set(kind("kind"), "chunked");
  seen.chunked = numbers();
  set(kind("globals"), 2);
  seen.global = numbers();
  $("add").click();
  seen.added = numbers();
  seen.focus = page.activeElement.dataset.key;
  const follow = hash => {
    view.location.hash = hash;
    view.dispatchEvent(new view.Event("hashchange"));
  };
  follow("layers=4&pattern=dilated:1:3:2:0&length=40");
  seen.linked = numbers();
  follow("pattern=round:1:16");
  seen.problems.push(text("problem"));
  check();
  return seen;
}"""


@needs_browser
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_the_numbers_with_units_and_nothing_overflows(tmp_path, width):
    seen, complaints = look(EXPLORER, USE, width, tmp_path)
    assert complaints == []
    assert "failed" not in seen, seen
    assert (seen["width"], seen["overflow"], seen["unnamed"]) == (width, [], 0)
    assert min(seen["colours"]) > 3
    sentence = "A token can influence the last one from at most 480 tokens back, through 32 layers."
    opened = {"reach": "480 tokens", "quoted": "512 tokens", "cache": "96 KiB", "flops": "5.9 MFLOPs"}
    assert seen["opened"] == opened | {"summary": sentence}
    shown = dict(seen["presets"])
    assert shown.keys() == presets().keys()
    assert {name: "#" + settings for name, settings in presets().items()} == {n: s["hash"] for n, s in shown.items()}
    assert {s["pressed"] for s in shown.values()} == {"true"}
    assert (shown["Mistral 7B"]["reach"], shown["Mistral 7B"]["cache"]) == ("131,040 tokens", "512 MiB")
    assert (shown["gpt-oss 120B"]["reach"], shown["gpt-oss 120B"]["quoted"]) == ("unbounded", "not defined")


@needs_browser
def test_a_browser_follows_what_is_changed_and_names_what_is_wrong(tmp_path):
    seen, _ = look(EXPLORER, USE, 900, tmp_path)
    near = "16 tokens back: this token can influence the last one, in 2 hops through the top 2 layers."
    assert seen["answer"] == near
    assert seen["unreached"].startswith("481 tokens back: no path leads from this token to the last one.")
    assert seen["pointed"] == "This is the last token itself."
    assert seen["shallow"]["reach"] == "120 tokens"
    assert seen["problems"] == [
        "Layers k: give a whole number from 1 to 1,024.",
        "Query heads: 3 is not a multiple of 2 key/value heads. Change one of them.",
        "Kind: choose one from the list.",
    ]
    assert seen["linked"]["reach"] == "16 tokens"
    assert seen["solved"]
    assert (seen["chunked"]["reach"], seen["chunked"]["quoted"]) == ("15 tokens", "128 tokens")
    assert seen["global"]["summary"].startswith("The global tokens influence all later ones. Every other token can")
    assert seen["added"]["summary"].startswith("4 layers of 8 see every earlier token.")
    assert seen["focus"] == "kind"


def test_the_page_fetches_nothing():
    assert not re.search(r"https?:|@import|<link|<img|\bsrc=|url\(|fetch\(|href=", PAGE)
