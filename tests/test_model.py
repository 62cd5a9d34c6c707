"""Tokenizers, bases and adapters: what is read is whole and belongs together, what is saved is what was trained."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.utils import save_and_load
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from conftest import CHATML, FAMILIES, SHARED, byte_tokenizer, cases, needs_shared, save_tiny_model, shows
from tunesmith import hub, recipe
from tunesmith import models as model
from tunesmith.engine.cpu.decoder import Decoder
from tunesmith.errors import ModelError, ProofError, RecipeError, TemplateError
from tunesmith.models import base as opened
from tunesmith.models import conversion, open_renderer, targets, tokenizer
from tunesmith.recipe import LoraSettings, ModelSettings, TemplateSettings
from tunesmith.training import checking

LORA = LoraSettings(r=8)
BASE = ModelSettings()


def located(folder: Path, *, weights: bool = True) -> hub.LocalModel:
    return hub.locate(str(folder), weights=weights)


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder, copy_function=shutil.copyfile))


def trainable(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


# --- what is trained --------------------------------------------------------------------------------------------------

# Printed by the tutorials' own notebooks (Gemma) or counted on full-size models when the facts were gathered.
TRAINED = {
    "phi-3-mini": 12_582_912,
    "phi-4": 27_852_800,
    "gemma-2b": 9_805_824,
    "atom-7b-standin": 19_988_480,
    "deepseek-7b": 18_739_200,
}


@functools.cache
def full_size(family: str) -> PreTrainedModel:
    """The real model without memory for its weights."""
    return model.skeleton(model.load_config(SHARED / "models" / family))


@needs_shared
@pytest.mark.parametrize("family", TRAINED)
def test_every_linear_layer_of_the_full_size_model_is_adapted(family: str) -> None:
    found = targets(full_size(family), LORA)
    assert sum(target.parameters for target in found) == TRAINED[family]
    names = {"down_proj", "o_proj"} | (
        {"qkv_proj", "gate_up_proj"}
        if family.startswith("phi")
        else {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    )
    layers = full_size(family).config.num_hidden_layers
    assert {target.name: target.layers for target in found} == dict.fromkeys(names, layers)


@needs_shared
@pytest.mark.parametrize("family", TRAINED)
def test_peft_trains_as_many_numbers_as_the_table_says(family: str) -> None:
    base = model.skeleton(model.load_config(SHARED / "models" / family))
    attached = model.attach(base.requires_grad_(False), LORA, seed=0, base_name="x")
    assert trainable(attached) == TRAINED[family]
    assert all("lora_" in name for name, p in attached.named_parameters() if p.requires_grad)


@needs_shared
@pytest.mark.parametrize("family", TRAINED)
def test_the_full_size_model_has_as_many_numbers_as_its_alias_says(family: str) -> None:
    alias = hub.aliases()[family.removesuffix("-standin")]
    assert sum(p.numel() for p in full_size(family).parameters()) == alias.parameters


@pytest.mark.parametrize("variant", ["plain", "rslora", "dora", "pissa"])
def test_the_table_counts_what_peft_trains_for_every_variant(variant: Any, tiny_model: Path) -> None:
    settings = LoraSettings(r=4, variant=variant, targets=["q_proj", "down_proj"])
    base = model.load_base(located(tiny_model), BASE)
    counted = sum(target.parameters for target in targets(base, settings))
    assert trainable(model.attach(base, settings, seed=0, base_name="x")) == counted


@needs_shared
@pytest.mark.parametrize(
    ("family", "name", "suggested"),
    [
        ("atom-7b-standin", "W_pack", "k_proj and q_proj and v_proj"),
        ("phi-3-mini", "q_proj", "qkv_proj"),
        ("phi-4", "up_proj", "gate_up_proj"),
        ("gemma-2b", "qkv_proj", "k_proj and q_proj and v_proj"),
        ("gemma-2b", "donw_proj", "Did you mean down_proj?"),
        ("gemma-2b", "nothing_like_it", "all-linear takes them all"),
    ],
)
def test_a_target_that_matches_nothing_names_the_real_layers_and_the_likely_one(
    family: str, name: str, suggested: str
) -> None:
    present = sorted(target.name for target in targets(full_size(family), LORA))
    with pytest.raises(RecipeError) as caught:
        targets(full_size(family), LoraSettings(targets=["o_proj", name]))
    assert caught.value.where == "lora.targets"
    assert f"'{name}'" in caught.value.found
    assert caught.value.expected == f"one of {', '.join(present)}"
    assert suggested in caught.value.fix


@needs_shared
def test_the_seven_names_of_llama_are_refused_on_phi() -> None:
    """peft alone adapts the two that match and says nothing: 4,456,448 numbers instead of 12,582,912."""
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with pytest.raises(RecipeError, match="'q_proj', which matches no layer"):
        targets(full_size("phi-3-mini"), LoraSettings(targets=seven))
    llama = targets(full_size("deepseek-7b"), LoraSettings(r=8, targets=seven))
    assert sum(target.parameters for target in llama) == TRAINED["deepseek-7b"]


def test_nothing_is_attached_where_a_name_matches_nothing(tiny_model: Path) -> None:
    base = model.load_base(located(tiny_model), BASE)
    with pytest.raises(RecipeError, match="W_pack"):
        model.attach(base, LoraSettings(targets=["W_pack", "o_proj"]), seed=0, base_name="x")
    assert not any("lora" in name for name, _ in base.named_modules())


# --- tokenizer and template -------------------------------------------------------------------------------------------

HARD = [
    "Human: Hi\nAssistant: Hello",
    " x",
    "x ",
    "  two  spaces\n\n",
    "你是谁？🙂",
    "<s>Human: a\n</s><s>Assistant: b",
]


@needs_shared
@pytest.mark.parametrize("family", cases(FAMILIES, lambda family: family != "gemma-2b"))
def test_a_saved_tokenizer_gives_the_same_ids_and_the_same_template(family: str, tmp_path: Path) -> None:
    renderer = open_renderer(located(SHARED / "models" / family, weights=False), TemplateSettings())
    model.save_tokenizer(renderer, tmp_path, HARD[:1])
    again = open_renderer(hub.LocalModel(tmp_path, "folder", None, None), TemplateSettings()).template
    for text in [*HARD, "Answer: the 2nd\tCafé", renderer.template.text]:
        for special in (True, False):
            before, after = (t.tokenizer(text, add_special_tokens=special) for t in (renderer.template, again))
            assert after == before, text
    assert again.digest == renderer.template.digest
    assert again.folds_system == renderer.template.folds_system
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == renderer.template.text


@needs_shared
def test_save_pretrained_alone_splits_atoms_words_differently(tmp_path: Path) -> None:
    """Negative control: transformers 5.23 forgets `legacy`, and Human is then two tokens instead of one."""
    tokenizer = open_renderer(
        located(SHARED / "models" / "atom-7b-standin", weights=False), TemplateSettings()
    ).template.tokenizer
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<s>Human: Hi"
    before, after = (t(text, add_special_tokens=False)["input_ids"] for t in (tokenizer, again))
    assert (before[1:2], after[1:3]) == ([12968], [29950, 7889])


def test_a_tokenizer_that_can_not_be_saved_faithfully_is_a_failed_proof(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = open_renderer(located(tiny_model), TemplateSettings())
    other = byte_tokenizer()
    other.add_tokens(["Human"])
    monkeypatch.setattr(tokenizer, "_read_tokenizer", lambda folder: other)
    with pytest.raises(ProofError, match="other ids than the one trained with"):
        model.save_tokenizer(renderer, tmp_path, [])


def folder_with(folder: Path, **tokenizer_config: Any) -> Path:
    """A folder with the byte tokenizer and a config, without weights."""
    save_tokens = byte_tokenizer(None)
    save_tokens.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **tokenizer_config}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 259, "eos_token_id": 258}))
    return folder


def test_a_tokenizer_without_template_is_refused_and_the_ways_out_named(tmp_path: Path) -> None:
    with pytest.raises(TemplateError) as caught:
        open_renderer(located(folder_with(tmp_path), weights=False), TemplateSettings())
    assert "without a chat template" in caught.value.found
    assert "template.path" in caught.value.fix
    assert "atom" in caught.value.fix


def test_the_template_comes_from_the_file_that_is_named(tmp_path: Path) -> None:
    found = located(folder_with(tmp_path / "m", chat_template=CHATML), weights=False)
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML.replace("assistant\n", "assistant:"), encoding="utf-8")
    with pytest.raises(TemplateError, match="does not begin the conversation"):
        open_renderer(found, TemplateSettings(path=str(file)))
    file.write_text("{# mine #}" + CHATML, encoding="utf-8")
    template = open_renderer(found, TemplateSettings(path=str(file))).template
    assert (template.source, template.text) == (f"file {file}", "{# mine #}" + CHATML)
    for broken in (b"\xff\xfe\x00", None):
        file.unlink()
        if broken:
            file.write_bytes(broken)
        else:
            file = tmp_path / "nowhere.jinja"
        with pytest.raises(TemplateError, match="no readable template"):
            open_renderer(found, TemplateSettings(path=str(file)))


def test_an_unknown_template_name_lists_those_that_are_shipped(tmp_path: Path) -> None:
    found = located(folder_with(tmp_path, chat_template=CHATML), weights=False)
    for name in ("atmo", "../atom", "chatml"):
        with pytest.raises(RecipeError, match="auto or one of atom"):
            open_renderer(found, TemplateSettings(name=name))


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    found = located(folder_with(tmp_path, chat_template=several), weights=False)
    assert open_renderer(found, TemplateSettings()).template.text == CHATML


def test_a_template_with_windows_lines_is_the_same_after_saving(tmp_path: Path) -> None:
    text = "{# one #}\r\n".join(["", CHATML])
    found = located(folder_with(tmp_path / "m", chat_template=text), weights=False)
    renderer = open_renderer(found, TemplateSettings())
    model.save_tokenizer(renderer, tmp_path / "saved", [])
    again = open_renderer(hub.LocalModel(tmp_path / "saved", "folder", None, None), TemplateSettings())
    assert again.template.digest == renderer.template.digest


@pytest.mark.parametrize("eos", [256, [256, 7], [7, 256, 258]])
def test_stop_ids_come_from_template_tokenizer_and_both_configs(eos: Any, tmp_path: Path) -> None:
    found = located(folder_with(tmp_path, chat_template=CHATML), weights=False)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "temperature": 0.7}))
    template = open_renderer(found, TemplateSettings()).template
    assert template.stop_ids[0] == 258
    assert set(template.stop_ids) == {258, *([eos] if isinstance(eos, int) else eos)}
    generation = model.generation_config(tmp_path, template)
    assert generation.eos_token_id == list(template.stop_ids)
    assert generation.pad_token_id == 256
    assert generation.temperature == 0.7


@pytest.mark.parametrize("broken", ["{", "[1]", "\ufeff{"])
def test_a_broken_generation_config_is_named_not_ignored(broken: str, tmp_path: Path) -> None:
    found = located(folder_with(tmp_path, chat_template=CHATML), weights=False)
    (tmp_path / "generation_config.json").write_text(broken, encoding="utf-8")
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        open_renderer(found, TemplateSettings())


@needs_shared
def test_an_alias_adds_the_stop_token_that_gemma_forgets() -> None:
    folder = SHARED / "models" / "gemma-2b"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 1
    template = open_renderer(located(folder, weights=False), TemplateSettings()).template
    assert model.generation_config(folder, template).eos_token_id == [107, 1]


@pytest.mark.parametrize(("damage", "found"), [("unlink", "no tokenizer"), ("cut", "a tokenizer that can not be read")])
def test_a_missing_or_broken_tokenizer_is_named(damage: str, found: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "m")
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").unlink()
    if damage == "cut":
        (folder / "tokenizer.json").write_bytes(whole[:1000])
    with pytest.raises(ModelError) as caught:
        model.load_tokenizer(folder)
    assert found in caught.value.found


# --- the base ---------------------------------------------------------------------------------------------------------


def test_the_base_is_frozen_and_in_evaluation_mode(tiny_model: Path) -> None:
    base = model.load_base(located(tiny_model), BASE)
    assert trainable(base) == 0
    assert not base.training
    assert torch.equal(logits(base), logits(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)))


def drop_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def transpose_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name].T.contiguous()}, path, metadata={"format": "pt"})


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 5)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 8)


def fill_with_text(path: Path) -> None:
    path.write_text("<html>404</html>" * 99)


def strange_header(path: Path) -> None:
    header = json.dumps({"x": 1}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (drop_a_tensor, "no weights for 1 parts (model.layers.1.mlp.down_proj.weight)"),
        (transpose_a_tensor, "weights that can not be read"),
        (cut_short, "bytes"),
        (cut_to_nothing, "no safetensors"),
        (grow, "bytes"),
        (fill_with_text, "no safetensors"),
        (strange_header, "no safetensors"),
        (Path.unlink, "no weights (*.safetensors)"),
    ],
)
def test_damaged_weights_are_named_and_never_made_up(
    damage: Callable[[Path], None], found: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_model, tmp_path / "m")
    whole = located(folder)
    damage(folder / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        model.load_base(whole, BASE)
    assert found in caught.value.found


def test_remote_code_is_never_run(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "m")
    trace = tmp_path / "it ran"
    (folder / "mine.py").write_text(f"open({str(trace)!r}, 'w')\nraise SystemExit\n")
    config = json.loads((folder / "config.json").read_text())
    remote = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M", "AutoTokenizer": ["mine.T", "mine.T"]}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": remote}))
    found = located(folder)
    assert logits(model.load_base(found, BASE)).shape == (1, 12, 259)  # a native type is built natively
    open_renderer(found, TemplateSettings())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": remote, "model_type": "mine"}))
    with pytest.raises(ModelError, match="Remote code is never run"):
        model.load_config(folder)
    assert not trace.exists()


# --- a GGUF file ------------------------------------------------------------------------------------------------------


def test_config_and_tokenizer_of_a_gguf_file_are_had_without_its_weights(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = hub.locate("smollm2")
    whole = model.prepared(found)
    assert model.prepared(found, weights=False) == whole  # it is there already
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    assert model.needs_preparing(found, weights=False)
    ready = model.prepared(found, weights=False)
    assert not model.needs_preparing(ready) and model.prepared(found, weights=False) == ready
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*")) < 10 << 20
    names = {path.name for path in whole.folder.iterdir()} - {"model.safetensors"}
    for name in names:
        assert (ready.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    config = model.load_config(ready.folder)
    of_both = [model.published_in_bfloat16(folder, config) for folder in (ready.folder, whole.folder)]
    assert of_both == [True, True] and config.dtype != torch.bfloat16
    with pytest.raises(ModelError, match="no weights"):
        model.load_base(ready, BASE)
    by_check = checking.locate(recipe.resolve(flags={"model.name": str(found.folder)})[0], weights=False)
    assert by_check.folder == ready.folder


def test_bin_weights_are_left_alone_where_none_are_needed(tiny_model: Path, tmp_path: Path, cache: Path) -> None:
    found = located(as_bins(copied(tiny_model, tmp_path / "m")))
    assert model.prepared(found, weights=False) == found and not cache.exists()


# --- weights in .bin files --------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


def as_bins(folder: Path, count: int = 1, *, zipped: bool = True) -> Path:
    """The folder with its weights in .bin files instead."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for number in range(count):
        name = "pytorch_model.bin" if count == 1 else f"pytorch_model-{number + 1:05}-of-{count:05}.bin"
        part = {key: tensors[key] for key in names[number::count]}
        torch.save(part, folder / name, _use_new_zipfile_serialization=zipped)
    if count > 1:
        index = {"weight_map": {k: f"pytorch_model-{i % count + 1:05}-of-{count:05}.bin" for i, k in enumerate(names)}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_bin_weights_are_converted_once_and_are_the_same_numbers(
    count: int, zipped: bool, tiny_model: Path, tmp_path: Path, cache: Path
) -> None:
    folder = as_bins(copied(tiny_model, tmp_path / "m"), count, zipped=zipped)
    found = located(folder)
    assert model.needs_preparing(found)
    ready = model.prepared(found)
    assert ready.folder.parent == cache
    assert not list(ready.folder.glob("*.bin"))
    assert not model.needs_preparing(ready)
    assert torch.equal(logits(model.load_base(ready, BASE)), logits(model.load_base(located(tiny_model), BASE)))
    assert open_renderer(ready, TemplateSettings()).template.text == CHATML
    times = {path: path.stat().st_mtime_ns for path in ready.folder.iterdir()}
    assert model.prepared(found) == ready
    assert times == {path: path.stat().st_mtime_ns for path in ready.folder.iterdir()}
    assert [path.name for path in cache.iterdir()] == [ready.folder.name]


def test_two_folders_of_one_name_and_size_are_two_models(tiny_model: Path, tmp_path: Path, cache: Path) -> None:
    one = as_bins(copied(tiny_model, tmp_path / "one" / "m"))
    two = as_bins(copied(tiny_model, tmp_path / "two" / "m"))
    state = torch.load(two / "pytorch_model.bin", weights_only=True)
    torch.save({name: value * 2 for name, value in state.items()}, two / "pytorch_model.bin")
    ready = [model.prepared(located(folder)) for folder in (one, two)]
    weights = [load_file(found.folder / "model.safetensors")["lm_head.weight"] for found in ready]
    assert torch.equal(weights[0] * 2, weights[1])


def test_weights_that_changed_are_converted_anew(tiny_model: Path, tmp_path: Path, cache: Path) -> None:
    folder = as_bins(copied(tiny_model, tmp_path / "m"))
    before = model.prepared(located(folder))
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({name: value * 2 for name, value in state.items()}, folder / "pytorch_model.bin")
    os.utime(folder / "pytorch_model.bin", ns=(0, 10**18))
    after = model.prepared(located(folder))
    weights = [load_file(found.folder / "model.safetensors")["lm_head.weight"] for found in (before, after)]
    assert torch.equal(weights[0] * 2, weights[1])


class Evil:
    """Unpickling it runs code."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_pickle_with_code_is_refused_and_not_run(zipped: bool, tiny_model: Path, tmp_path: Path, cache: Path) -> None:
    folder = as_bins(copied(tiny_model, tmp_path / "m"))
    trace = tmp_path / "it ran"
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**state, "evil": Evil(trace)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match="never run"):
        model.prepared(located(folder))
    assert not trace.exists()
    assert list(cache.iterdir()) == []
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert trace.exists()  # it would have run


@pytest.mark.parametrize("state", [[1, 2], {"step": 3}, "text"], ids=["list", "number", "text"])
def test_a_bin_that_holds_no_weights_is_refused(state: Any, tiny_model: Path, tmp_path: Path, cache: Path) -> None:
    folder = as_bins(copied(tiny_model, tmp_path / "m"))
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="something else than tensors"):
        model.prepared(located(folder))


def test_a_cut_bin_is_refused_and_leaves_nothing(tiny_model: Path, tmp_path: Path, cache: Path) -> None:
    folder = as_bins(copied(tiny_model, tmp_path / "m"), 2)
    cut_short(folder / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(ModelError, match="no plain weights"):
        model.prepared(located(folder))
    assert list(cache.iterdir()) == []


def test_a_gguf_that_is_none_is_refused(tiny_model: Path, tmp_path: Path, cache: Path) -> None:
    reader = gguf.GGUFReader
    folder = copied(tiny_model, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.gguf").write_bytes(b"GGUF" + b"\0" * 99)
    with pytest.raises(ModelError, match="a GGUF file that can not be read"):
        model.prepared(located(folder))
    assert list(cache.iterdir()) == []
    assert gguf.GGUFReader is reader  # a model file is read once per conversion, not once per process


def test_weights_of_a_few_bits_become_bfloat16_numbers(smollm2: Path) -> None:
    weights = load_file(smollm2 / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(torch.equal(w, w.bfloat16().float()) for w in weights.values() if w.dim() > 1)


@pytest.mark.parametrize(("kind", "quantised"), [("Q8_0", True), ("Q4_1", True), ("F32", False), ("BF16", False)])
def test_whether_a_gguf_is_quantised_is_told_by_its_numbers(kind: str, quantised: bool, tmp_path: Path) -> None:
    numbers, path = gguf.GGMLQuantizationType[kind], tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("norm.weight", np.ones(64, np.float32))
    writer.add_tensor("one.weight", gguf.quantize(np.ones((2, 64), np.float32), numbers), raw_dtype=numbers)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    assert conversion.is_quantised(path) is quantised


@pytest.mark.parametrize(
    ("capability", "kind", "dtype"),
    [
        ((7, 5), "llama", torch.float16),  # T4
        ((7, 0), "qwen3", torch.float16),  # V100
        ((8, 6), "llama", torch.bfloat16),
        ((9, 0), "gemma3_text", torch.bfloat16),
        ((7, 5), "gemma3_text", torch.float32),  # whose hidden states are larger than fp16 holds
        ((7, 5), "gemma2", torch.float32),
    ],
)
def test_weights_on_a_card_are_of_the_type_that_it_multiplies_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: tuple[int, int], kind: str, dtype: torch.dtype
) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert opened.asked_dtype("auto", tmp_path) == dtype
    assert opened.asked_dtype("bfloat16", tmp_path) == torch.bfloat16  # what is asked for is done


# --- adapters ---------------------------------------------------------------------------------------------------------


def tuned(folder: Path, settings: LoraSettings = LORA) -> PeftModel:
    """A model with an adapter that changes a lot."""
    attached = model.attach(model.load_base(located(folder), BASE), settings, seed=1, base_name=str(folder))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return attached.eval()


def loaded(base: Path, adapter: Path) -> PeftModel:
    return model.load_adapter(model.load_base(located(base), BASE), adapter)


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    model.save_adapter(tuned(tiny_model), folder)
    return folder


def test_an_adapter_in_the_type_of_its_base_computes_about_the_same_without_copies(
    tiny_model: Path, adapter: Path
) -> None:
    """What chat and serve do on a card."""
    in_bf16 = ModelSettings(dtype="bfloat16")
    as_saved = model.load_adapter(model.load_base(located(tiny_model), in_bf16), adapter)
    whole, with_it = loaded(tiny_model, adapter), copy.deepcopy(as_saved)
    model.take_type_of_base(with_it)
    assert {p.dtype for n, p in with_it.named_parameters() if "lora_" in n} == {torch.bfloat16}
    right = logits(whole)
    off, off_in_fp32 = ((logits(each).float() - right).norm() / right.norm() for each in (with_it, as_saved))
    assert off < 2 * off_in_fp32  # observed 1.0 times
    with as_saved.disable_adapter():
        assert shows(float((logits(as_saved).float() - right).norm() / right.norm()), 10 * float(off))


def test_a_saved_adapter_computes_what_the_live_one_does(tiny_model: Path, adapter: Path) -> None:
    live = logits(tuned(tiny_model))
    assert (live - logits(model.load_base(located(tiny_model), BASE))).abs().max() > 0.3  # observed 0.9
    again = loaded(tiny_model, adapter)
    assert torch.equal(logits(again), live)
    assert trainable(again) == 0
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, str(adapter))), live)
    assert sorted(path.name for path in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_saving_asks_no_hub(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself, peft asks Hugging Face for the base's config whenever an adapter is saved."""
    asked: list[str] = []
    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", lambda name, *_, **__: asked.append(name))
    attached = tuned(tiny_model)
    attached.peft_config["default"].base_model_name_or_path = "some/model"
    model.save_adapter(attached, tmp_path / "a")
    assert asked == []
    with pytest.warns(UserWarning, match="Could not find a config file in some/model"):
        attached.save_pretrained(str(tmp_path / "b"))
    assert asked == ["some/model"]  # the trap is there


def test_an_adapter_that_changes_nothing_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    fresh = model.attach(model.load_base(located(tiny_model), BASE), LORA, seed=0, base_name="x")
    model.save_adapter(fresh, tmp_path / "a")
    with pytest.raises(ModelError, match="lora_B is all zero"):
        loaded(tiny_model, tmp_path / "a")


@pytest.mark.parametrize(
    "shape", [{"hidden_size": 32}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}], ids=["width", "more", "fewer"]
)
def test_an_adapter_of_another_shape_is_refused(shape: dict[str, int], adapter: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", **shape)
    with pytest.raises(ModelError, match="found an adapter") as caught:
        loaded(other, adapter)
    assert caught.value.fix == "Use the base that it was trained on."


@pytest.mark.parametrize("damage", [cut_short, Path.unlink])
def test_a_damaged_adapter_is_refused(
    damage: Callable[[Path], None], tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = copied(adapter, tmp_path / "a")
    damage(folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        loaded(tiny_model, folder)


def test_a_number_that_is_not_finite_is_never_saved(tiny_model: Path, tmp_path: Path) -> None:
    attached = tuned(tiny_model)
    attached.requires_grad_(False)
    name, parameter = next((n, p) for n, p in attached.named_parameters() if "lora_B" in n)
    parameter.requires_grad_(True)
    with torch.no_grad():
        parameter[0, 0] = torch.inf
    with pytest.raises(ProofError) as caught:
        model.save_adapter(attached, tmp_path / "a")
    assert caught.value.where == name
    assert not (tmp_path / "a").exists()


def test_the_seed_decides_how_an_adapter_starts(tiny_model: Path) -> None:
    def start(seed: int) -> torch.Tensor:
        attached = model.attach(model.load_base(located(tiny_model), BASE), LORA, seed=seed, base_name="x")
        return torch.cat([p.flatten() for n, p in attached.named_parameters() if "lora_A" in n])

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_the_adapter_is_kept_in_fp32_over_a_base_in_half_precision(tiny_model: Path) -> None:
    base = model.load_base(located(tiny_model), ModelSettings(dtype="bfloat16"))
    attached = model.attach(base, LORA, seed=0, base_name="x")
    assert {p.dtype for p in attached.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in attached.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped")
@pytest.mark.parametrize("tied", [False, True])
def test_layers_by_hand_keep_no_page_of_the_weights_file(tied: bool, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m", tie_word_embeddings=tied)
    base = model.load_base(located(folder), BASE)
    expected = logits(base)
    attached = model.attach(base, LORA, seed=1, base_name=str(folder))
    assert str(folder / "model.safetensors") in Path("/proc/self/maps").read_text()
    Decoder(attached)
    assert str(folder / "model.safetensors") not in Path("/proc/self/maps").read_text()
    torch.testing.assert_close(logits(attached), expected, rtol=1e-5, atol=1e-6)
