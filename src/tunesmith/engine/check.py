"""Is a way right? Its gradient beside that of plain transformers and peft, on a few tokens, before the first step."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from tunesmith import hub
from tunesmith.engine.attention import Backend
from tunesmith.engine.cpu import memory, onepass, products
from tunesmith.engine.cpu.by_hand import ByHand
from tunesmith.engine.cpu.layers import InFloat32
from tunesmith.engine.hf import liger, lora
from tunesmith.engine.hf.along import GATHERED, WITH_LIGER, WITHOUT_LIGER
from tunesmith.engine.hf.padded import Padded
from tunesmith.engine.ranks import Ranks
from tunesmith.engine.way import Way
from tunesmith.errors import first_line
from tunesmith.language import said
from tunesmith.recipe import EngineSettings
from tunesmith.types import Origin, Rendered

WAYS = ("decoder", WITH_LIGER, WITHOUT_LIGER, GATHERED, "padded")
"""By their names, from the fastest to the slowest."""
BOUND = {torch.float64: 1e-5, torch.float32: 2e-3}
"""Largest relative difference of the adapter's gradient between two right computations, ten times what was seen."""


@dataclass(frozen=True)
class Asked:
    """A model with its adapter, and how its steps are to be computed."""

    model: PeftModel
    settings: EngineSettings
    dtype: torch.dtype
    """Of the base."""
    backend: Backend

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def settle(
    asked: Asked,
    way: Way,
    take: Callable[[str], Way],
    documents: Sequence[Rendered],
    ranks: Ranks,
    note: Callable[[str], None],
) -> None:
    """Takes the fastest way from `way` on whose gradient is that of plain transformers and peft, on a few of these
    documents' tokens; `take` makes the one of a name, and closes the one before.

    What was found right is remembered for the same model, settings, code and versions of the libraries. Of several
    processes each compares, and where one finds a difference all take the next way.
    """

    def at_least(place: int) -> Way:
        return way if place <= place_of(way) else take(WAYS[place])

    way = at_least(max(ranks.gather(place_of(way))))
    if way.kind == "padded":
        return
    mark = hub.cache_dir() / "self_checks" / key(asked, way)
    found = mark.read_text(encoding="utf-8") if mark.exists() else ""
    remembered = ranks.gather(WAYS.index(found) if found in WAYS else None)
    if None not in remembered:
        at_least(max(remembered))
        return
    few, alike = few_tokens(documents), True
    # Products of 16 bits put two right computations up to a third apart, which would hide most mistakes.
    with mode(asked.model, training=False), _not_the_identity(asked.model), _in_float32(asked.model):
        with _plain(asked.model):
            expected = gradient_of(Padded(asked.model), asked.model, few)
        while way.kind != "padded":
            difference, reason = _difference(asked, way, few, expected)
            everywhere = ranks.gather(difference)
            right = [each < BOUND[torch.promote_types(asked.dtype, torch.float32)] for each in everywhere]  # NaN is not
            alike = alike and len({*right}) == 1
            if all(right):
                break
            note(_said(way, everywhere[right.index(False)], reason))
            way = take(WAYS[place_of(way) + 1])
    memory.give_back()
    if alike:  # what another process found says nothing about this machine
        one_tree = asked.device.type == "cpu" and liger.version(asked.device) is None
        _remember(mark, way.kind if one_tree else way.name)


def place_of(way: Way) -> int:
    """Its place among all."""
    return WAYS.index(way.name)


def _said(way: Way, difference: float, reason: str) -> str:
    """What is wrong with a way."""
    name = said("{way} way", way=way.kind)
    if way.name == WITH_LIGER:
        name = said("tree way with Liger's kernels")
    if reason:
        return said(
            "The {way} can not be run here ({reason}); a slower one is taken. Please report it with the model's name "
            "and the card's.",
            way=name,
            reason=reason,
        )
    return said(
        "The {way} gives another gradient than plain transformers and peft for this model (relative difference "
        "{difference:.1e}); a slower one is taken. Please report the model's name.",
        way=name,
        difference=difference,
    )


def _difference(asked: Asked, way: Way, documents: Sequence[Rendered], expected: Tensor) -> tuple[float, str]:
    """Relative, of the gradient by a way; infinite, with the reason, where kernels that are compiled can not be
    here."""
    try:
        found = gradient_of(way, asked.model, documents)
    except Exception as error:  # Triton and its compilers raise what they like
        if memory.ran_out(error) or way.name not in (WITH_LIGER, WITHOUT_LIGER):
            raise
        return math.inf, first_line(error)
    return float((found - expected).norm() / expected.norm()), ""


def gradient_of(way: Way, model: PeftModel, documents: Sequence[Rendered]) -> Tensor:
    """All of the gradient of what is trained, in one row, float64; the model's own is left as it was."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    try:
        way.gradient(documents, sum(document.n_supervised for document in documents))
        return torch.cat([_filled(parameter).flatten().double() for parameter in trained])
    finally:
        for parameter, gradient in zip(trained, before, strict=True):
            parameter.grad = gradient


def key(asked: Asked, way: Way) -> str:
    """The name under which it is remembered what was found right."""
    packages = ("tunesmith", "torch", "transformers", "peft")
    seen = {
        "config": asked.model.get_base_model().config.to_json_string(use_diff=False),  # type: ignore[operator]
        "adapter": in_order(asked.model.peft_config["default"].to_dict()),
        "settings": asked.settings.model_dump(),
        "versions": [importlib.metadata.version(name) for name in packages],
        "code": _code(),
        "kernels": [onepass.version(), liger.version(asked.device)],
        "split": [way.decoder.n_split, products.amx_attention() is not None] if isinstance(way, ByHand) else None,
        "kind": [way.kind, asked.backend, str(asked.device.type), str(asked.dtype)],
        "card": torch.cuda.get_device_name(asked.device) if asked.device.type == "cuda" else "",
    }
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _code() -> str:
    """A digest of the engine's own files."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _remember(mark: Path, name: str) -> None:
    mark.parent.mkdir(parents=True, exist_ok=True)
    partial = mark.with_name(f".{mark.name}.{os.getpid()}")
    partial.write_text(name, encoding="utf-8")
    partial.replace(mark)


def in_order(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Sets have another order in each process."""
    return {
        name: sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
        for name, value in settings.items()
    }


def _filled(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def few_tokens(documents: Sequence[Rendered]) -> list[Rendered]:
    """Three short documents out of these ones' tokens: two that share a beginning, one that does not."""
    first, other = documents[0].token_ids, documents[-1].token_ids
    made = (first[:24], first[: len(first[:24]) // 2] + other[-10:], other[-16:])
    return [Rendered(ids, ((max(1, len(ids) // 2), len(ids)),), Origin("self check", n)) for n, ids in enumerate(made)]


@contextmanager
def _in_float32(model: PeftModel) -> Iterator[None]:
    """Inside, transformers' layers multiply in fp32, with weights in fp32 for one layer at a time."""
    short = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding) and m.weight.dtype.itemsize < 4]
    if not short:
        yield
        return
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    before = [(module, dict(vars(module))) for module in (*layers, *short)]
    try:
        cast("Any", model.get_base_model()).activation_checkpointing_enable()
        for layer in layers:
            layer.training = True  # or it recomputes nothing; what it holds keeps its mode, dropout too
        for module in short:
            if hasattr(module, "compute_dtype"):  # bitsandbytes' own layers
                vars(module).update(compute_dtype=torch.float32, compute_type_is_set=True)
            else:
                vars(module).update(forward=functools.partial(_forward_in_float32, module))
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


@contextmanager
def _plain(model: PeftModel) -> Iterator[None]:
    """Inside, transformers and peft compute everything themselves."""
    with lora.removed(model), liger.removed(model):
        yield


def _forward_in_float32(module: nn.Module, x: Tensor) -> Tensor:
    with InFloat32():
        return type(module).forward(module, x)


@contextmanager
def mode(model: PeftModel, *, training: bool) -> Iterator[None]:
    """Inside, the model is trained, or it is not."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


@contextmanager
def _not_the_identity(model: PeftModel) -> Iterator[None]:
    """A new adapter's B is zero, so nothing of A's gradient would be seen; random numbers stand in meanwhile."""
    generator = torch.Generator().manual_seed(0)
    kept = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    try:
        with torch.no_grad():
            for parameter, before in kept:
                if not before.any():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        yield
    finally:
        with torch.no_grad():
            for parameter, before in kept:
                parameter.copy_(before)
