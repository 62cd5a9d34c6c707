"""Liger's kernels, on a CPU by Triton's interpreter: the gradient is still that of plain transformers and peft.

Run by `test_liger.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import liger_kernel.ops.geglu
import liger_kernel.ops.rms_norm
import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter
from transformers.models.llama import modeling_llama

from conftest import cases
from test_engine import FAMILIES, FEW, distance, engine, family, ignored, n_supervised, plain, take
from tunesmith.engine.hf import liger
from tunesmith.engine.hf.along import GATHERED, WITH_LIGER
from tunesmith.engine.step import Engine
from tunesmith.recipe import EngineSettings


class Number(float):
    """A number as kernels get it from the compiler; the interpreter hands over Python's, which have no `to`."""

    def to(self, dtype: Any) -> Number:
        return self


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What Triton 3's interpreter lacks: types of numbers, and the GPU's own functions."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    module = triton.runtime.interpreter
    converted = module._implicit_cvt
    monkeypatch.setattr(module, "_implicit_cvt", lambda a: Number(a) if type(a) is float else converted(a))
    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", lambda x: 1.0 / tl.sqrt(x))
    monkeypatch.setattr(liger_kernel.ops.geglu, "tanh", lambda x: 1 - 2 / (tl.exp(2 * x) + 1))


DIFFERENT = ("Llama", "Qwen3", "Phi-3", "Gemma", "Gemma 2", "Gemma 3")
FEW_OF_THEM = ("Llama", "Gemma 2")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_norm_and_mlp_takes_them(name: str) -> None:
    model = family(name, torch.float32)
    norms = {"Qwen3": 4, "Gemma 2": 4, "Gemma 3": 6}.get(name, 2)  # of a layer, and the MLP
    assert liger.install(model) == 2 * (norms + 1) + 1


@pytest.mark.parametrize("name", cases(DIFFERENT, FEW_OF_THEM.__contains__))
def test_the_gradient_is_that_of_plain_transformers_and_peft(name: str) -> None:
    """The families whose norms or MLPs differ: what a Mistral or a Qwen2 gives a kernel is what a Llama gives."""
    made = engine(family(name, torch.float32), "tree", ignored)
    right = plain(family(name), FEW)
    assert distance(take(made, FEW), right) < 5e-6  # observed 1.7e-6 at most, as far as without the kernels


def test_they_leave_nothing_behind() -> None:
    model = family("Llama", torch.float32)
    made = engine(model, "tree", ignored)
    with_kernels = take(made, FEW).gradient
    with liger.removed(model):
        without = take(made, FEW).gradient
        assert not liger.installed(model)
    assert liger.installed(model)
    assert not torch.equal(with_kernels, without)
    assert modeling_llama.LlamaRMSNorm.__module__ == modeling_llama.LlamaMLP.__module__ == modeling_llama.__name__
    made.take("padded")
    assert not liger.installed(model)


def test_the_self_check_compares_them_with_plain_layers() -> None:
    model, notes = family("Llama", torch.float32), []
    made = checked(model, notes)
    made.gradient(FEW, n_supervised(FEW))
    assert made.way == "tree" and liger.installed(model)
    assert [note for note in notes if "another gradient" in note] == []


def test_kernels_that_are_wrong_are_left_and_stay_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernels = liger_kernel.ops.rms_norm
    monkeypatch.setattr(kernels, "rsqrt", lambda x: 1.01 / tl.sqrt(x))
    model, notes = family("Llama", torch.float32), []
    made = checked(model, notes)
    made.gradient(FEW, n_supervised(FEW))
    assert made.way == "tree" and not liger.installed(model)
    assert [note for note in notes if "The tree way with Liger's kernels gives another gradient" in note]
    assert [path.read_text() for path in (tmp_path / "self_checks").glob("*")] == [GATHERED]
    again = checked(second := family("Llama", torch.float32), [])
    again.gradient(FEW, n_supervised(FEW))
    assert again.way == "tree" and not liger.installed(second)


def test_kernels_that_can_not_be_run_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", lambda x: x.nothing)
    made = checked(model := family("Llama", torch.float32), [])
    made.gradient(FEW, n_supervised(FEW))
    assert made.way == "tree" and not liger.installed(model)


def test_a_family_that_was_not_compared_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("Llama", torch.float32)
    monkeypatch.setattr(model.get_base_model().config, "model_type", "nemotron")
    assert liger.install(model) == 0 and not liger.installed(model)


def test_every_number_of_rows_takes_the_kernel_that_was_checked() -> None:
    model = family("Qwen3", torch.float32)
    liger.install(model)
    norms = [module for module in liger._changed(model) if hasattr(module, "row_mode")]
    assert len(norms) == 9 and all(norm.row_mode for norm in norms)


def checked(model: Any, notes: list[str]) -> Engine:
    """An engine over transformers' own layers that compares itself with plain ones before its first step."""
    made = Engine(model, EngineSettings(), notes.append)
    made.take(WITH_LIGER)
    return made
