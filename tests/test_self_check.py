"""Before the first step of a model its way is compared with plain transformers and peft, and left if it differs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from test_engine import (
    FAMILIES,
    FEW,
    MORE,
    ROWS,
    SENTENCE,
    VOCABULARY,
    adapted,
    base,
    distance,
    family,
    n_supervised,
    of_bfloat16_numbers,
    plain,
    take,
    truth,
)
from tunesmith.engine import attention, check, flex, step, trie
from tunesmith.engine.cpu import by_hand, decoder
from tunesmith.engine.cpu.by_hand import ByHand
from tunesmith.engine.cpu.layers import NotCovered
from tunesmith.engine.hf.along import GATHERED
from tunesmith.engine.step import Engine
from tunesmith.recipe import EngineSettings
from tunesmith.types import Rendered


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where verdicts are remembered."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    return tmp_path


def checking(model: PeftModel, notes: list[str], **asked: Any) -> Engine:
    """An engine that compares itself with plain transformers and peft before its first step."""
    return Engine(model, EngineSettings(**asked), notes.append)


def verdicts(cache: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in (cache / "self_checks").glob("*")]


def wrong_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers written by hand forget where a token stands, forward and backward alike."""

    def as_it_is(
        x: Tensor, size: int, heads: int, cos: Tensor, sin: Tensor, out: Tensor, at: int = 0, **_: int
    ) -> None:
        out[:, at : at + heads * size] = x[:, : heads * size]

    monkeypatch.setattr(decoder, "rotate", as_it_is)


def wrong_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is learned from a tree is right."""
    right_layout = trie.lay_out

    def wrong_layout(documents: Sequence[Rendered], **others: Any) -> trie.Tree:
        tree = right_layout(documents, **others)
        return replace(tree, pairs=tuple((where, (target + 1) % VOCABULARY, n) for where, target, n in tree.pairs))

    monkeypatch.setattr(trie, "lay_out", wrong_layout)


CHECKED = [(name, torch.float32) for name in FAMILIES if name not in MORE]
CHECKED += [
    ("Llama", torch.float64),
    ("Llama", torch.bfloat16),
    ("Gemma 2", torch.bfloat16),
    ("Gemma 3", torch.bfloat16),
]


@pytest.mark.parametrize(("name", "dtype"), CHECKED, ids=str)
def test_a_way_that_is_right_is_kept_and_remembered(name: str, dtype: torch.dtype, cache: Path) -> None:
    notes: list[str] = []
    made = checking(family(name, dtype), notes)
    expected = made.way
    made.gradient(FEW, n_supervised(FEW))
    assert [note for note in notes if "another gradient" in note] == []
    assert [made.way] == [expected] == verdicts(cache)


def test_a_wrong_way_is_left_for_the_next_one_with_a_note(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    notes: list[str] = []
    wrong_rotation(monkeypatch)
    made = checking(family("Llama"), notes)
    assert made.way == "decoder" and notes == []
    assert distance(take(made), truth("Llama", lifted=False)) < 5e-6  # observed 1.0e-7
    assert made.way == "tree" and verdicts(cache) == ["tree"]
    (note,) = notes
    assert note.startswith("The decoder way gives another gradient than plain transformers and peft for this model")
    assert SENTENCE.fullmatch(note)


def test_where_no_tree_is_right_rows_are_padded(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    notes: list[str] = []
    wrong_trees(monkeypatch)
    made = checking(family("Llama"), notes)
    assert distance(take(made), truth("Llama", lifted=False)) < 5e-6  # observed 1.0e-7
    assert made.way == "padded" and verdicts(cache) == ["padded"]
    assert [note.split(" gives ")[0] for note in notes] == ["The decoder way", "The tree way"]


@pytest.mark.parametrize(("fault", "way"), [(None, "decoder"), (wrong_rotation, "tree"), (wrong_trees, "padded")])
def test_a_verdict_is_remembered(fault: Callable[[pytest.MonkeyPatch], None] | None, way: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if fault is not None:
            fault(patch)
        take(checking(family("Llama"), []), FEW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "gradient_of", lambda *_: pytest.fail("checked again"))
        again = checking(family("Llama"), [])
        assert distance(take(again), truth("Llama", lifted=False)) < 5e-6  # observed 3.0e-7
        assert again.way == way
        another_window = adapted(base("mistral", sliding_window=6)).double()
        with pytest.raises(pytest.fail.Exception, match="checked again"):
            take(checking(another_window, []), FEW)


def test_what_other_code_found_right_is_checked_again(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    take(checking(family("Llama"), []), FEW)
    monkeypatch.setattr(check, "_code", lambda: "another file")
    take(checking(family("Llama"), []), FEW)
    assert verdicts(cache) == ["decoder", "decoder"]


@pytest.mark.parametrize(("fault", "way"), [(wrong_rotation, "tree"), (wrong_trees, "padded")])
def test_weights_that_were_narrowed_are_as_before_where_a_way_is_left(
    split: None, fault: Callable[[pytest.MonkeyPatch], None], way: str
) -> None:
    model = of_bfloat16_numbers("Llama", 0)
    right = plain(model, FEW)
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        made = checking(copy.deepcopy(model), [])
        assert isinstance(made.at_work, ByHand) and made.at_work.decoder.narrowed
        take(made, FEW)
    for again in (made, checking(copy.deepcopy(model), [])):  # checked, and remembered
        assert distance(take(again, FEW), right) < 1e-5  # observed 7.3e-7
        assert again.way == way
        pairs = zip(again._model.parameters(), model.parameters(), strict=True)
        assert all(found.dtype == was.dtype and torch.equal(found, was) for found, was in pairs)


@pytest.mark.parametrize("init_lora_weights", [True, False])
@pytest.mark.parametrize("fault", [None, wrong_rotation, wrong_trees])
def test_the_check_leaves_no_trace_in_the_model(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None] | None, init_lora_weights: bool
) -> None:
    """A new adapter, whose B is zero, is filled with random numbers meanwhile; training must not start from those."""
    if fault is not None:
        fault(monkeypatch)
    model = adapted(base("llama"), init_lora_weights=init_lora_weights, lora_dropout=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generator = torch.get_rng_state()
    made = checking(model, [])
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_share", lambda *_: [])
        made.loss(FEW)  # only the check computes anything
    assert made.way == {None: "decoder", wrong_rotation: "tree", wrong_trees: "padded"}[fault]
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(module.training for module in model.modules())


def test_a_check_that_is_not_wanted_is_not_made(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(check, "gradient_of", lambda *_: pytest.fail("checked"))
    take(checking(family("Llama"), [], self_check=False), FEW)
    assert verdicts(cache) == []


# --- weights of 16 bits and fewer -------------------------------------------------------------------------------------


def not_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, transformers' layers are taken, with products of 16 bits."""

    def refuses(*_: Any, **__: Any) -> None:
        raise NotCovered("this test")

    monkeypatch.setattr(by_hand, "Decoder", refuses)


def bare(model: PeftModel) -> None:
    """Nothing of the check is left in the model."""
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not any("forward" in vars(m) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding))
    assert {module.training for module in model.modules()} == {True}


@pytest.mark.parametrize("way", ["decoder", "tree"])
def test_weights_of_16_bits_are_checked_by_products_in_fp32(
    monkeypatch: pytest.MonkeyPatch, cache: Path, way: str
) -> None:
    """In a deep model plain products of 16 bits are further off than many a mistake."""
    model = adapted(base("llama", num_hidden_layers=40))
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    right = plain(copy.deepcopy(model).double(), FEW)
    assert distance(plain(model, FEW), right) > 0.05  # observed 0.13
    if way == "tree":
        not_by_hand(monkeypatch)
    notes: list[str] = []
    made = checking(model, notes)
    monkeypatch.setitem(check.BOUND, torch.float32, 1e-4)  # observed 2.9e-6
    made.gradient(FEW, n_supervised(FEW))
    assert [made.way] == [way] == verdicts(cache) and len(notes) == 1
    bare(model)


def test_a_window_that_is_off_by_one_is_seen_in_bf16(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    not_by_hand(monkeypatch)
    made = checking(family("Mistral", torch.bfloat16), notes := [])
    style = attention.Style
    monkeypatch.setattr(attention, "Style", lambda scale, window, *more: style(scale, window + 1, *more))
    made.gradient(ROWS, n_supervised(ROWS))
    assert made.way == "padded" and "The tree way gives another gradient" in notes[-1]
    bare(made._model)


def test_where_attention_can_not_be_compiled_the_next_one_is_taken_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a card whose shared memory is too small for a kernel, which no smaller micro-batch mends."""

    def too_large(*_: Any) -> Tensor:
        raise RuntimeError("No valid triton configs. OutOfMemoryError: out of resource: triton_tem_fused_0 Required …")

    monkeypatch.setattr(step, "_backend", lambda *_: "flex")
    monkeypatch.setattr(flex.Flex, "attend", too_large)
    not_by_hand(monkeypatch)
    made = checking(family("Llama"), notes := [])
    assert distance(take(made), truth("Llama", lifted=False)) < 5e-6
    assert made.at_work.name == GATHERED
    (note,) = [note for note in notes if "can not be run" in note]
    assert note.startswith("The tree way can not be run here (No valid triton configs.") and SENTENCE.fullmatch(note)


def nf4(tmp_path: Path) -> PeftModel:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: it adds 1.7 s to every import of peft")
    cast("PreTrainedModel", base("llama")).to(torch.bfloat16).save_pretrained(tmp_path)
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return adapted(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=asked))


def test_a_base_of_4_bits_is_checked_by_products_in_fp32(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    not_by_hand(monkeypatch)
    model = nf4(tmp_path / "base")
    monkeypatch.setitem(check.BOUND, torch.float32, 1e-4)  # observed 1.1e-6
    made = checking(model, notes := [])
    made.gradient(FEW, n_supervised(FEW))
    assert [made.way] == ["tree"] == verdicts(cache)
    assert [note for note in notes if "another gradient" in note] == []
    assert {m.compute_dtype for m in model.modules() if hasattr(m, "compute_dtype")} == {torch.bfloat16}
    bare(model)


def test_what_a_base_of_4_bits_gives_is_not_copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    not_by_hand(monkeypatch)
    model = nf4(tmp_path / "base")
    made = checking(model, [], self_check=False)
    of_linear = type(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer).forward
    given: list[Tensor] = []

    def remembered(layer: Any, x: Tensor) -> Tensor:
        given.append(of_linear(layer, x))
        return given[-1]

    monkeypatch.setattr("bitsandbytes.nn.Linear4bit.forward", remembered)
    layer, x = model.base_model.model.model.layers[0].self_attn.q_proj, torch.ones(1, 3, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        assert layer(x) is given[-1]
        with model.disable_adapter():
            assert layer(x) is given[-1]
        made.take("padded")
        assert layer(x) is not given[-1]


def test_a_wrong_tree_of_a_base_of_4_bits_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    not_by_hand(monkeypatch)
    wrong_trees(monkeypatch)
    made = checking(nf4(tmp_path / "base"), [])
    made.gradient(FEW, n_supervised(FEW))
    assert made.way == "padded"


def test_an_empty_verdict_is_none(cache: Path) -> None:
    """Of a process that was killed while it wrote, or a full disk."""
    model = family("Llama", torch.float32)
    checking(model, []).gradient(FEW, n_supervised(FEW))
    (mark,) = (cache / "self_checks").iterdir()
    mark.write_text("")
    checking(model, []).gradient(FEW, n_supervised(FEW))
    assert verdicts(cache) == ["decoder"]


def test_the_settings_of_an_adapter_have_one_name_in_every_process() -> None:
    """Where the verdict is remembered: names of target modules are a set, whose order is another one in each."""
    names = [f"layer_{i}" for i in range(20)]  # a set of them is in this order once in 20! times
    assert check.in_order(LoraConfig(target_modules=names[::-1]).to_dict())["target_modules"] == sorted(names)
