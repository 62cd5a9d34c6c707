"""Steps of a model on a card that is not here: what they keep there, launch, send and wait for.

    python step_on_card.py JSON …

Each JSON is an object: `config` (a model's), and where they differ from what is usual `lora` (settings of the adapter),
`tokens` (of the micro-batch), `recomputed` (layers), `dtype`, `nf4` (weights of 4 bits, by bitsandbytes), `liger`
(false leaves its kernels out), `card`, `lacking` (what Triton needs and does not find) and `compiled` (cards that each
of Triton's kernels is compiled for). It is the engine's own step, on tensors that have a shape and a device and no
numbers: what can not go on without a number that a card would have to give fails. Prints a line of JSON for each.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import no_card  # before torch
from no_card import CARDS

# isort: split
import torch
import triton
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention, flex_attention_backward
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention.flex_attention import _identity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tunesmith import models
from tunesmith.engine import batch, flex, step
from tunesmith.engine.hf import compiler, liger
from tunesmith.engine.loss import Labels
from tunesmith.recipe import EngineSettings, LoraSettings, Recipe
from tunesmith.training import planning
from tunesmith.training.planning import Choice
from tunesmith.types import Origin, Rendered

# Another look at the same numbers, or memory alone: nothing is launched.
_NOT_LAUNCHED = frozenset(
    (
        *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze"),
        *("alias", "detach", "as_strided", "split", "split_with_sizes", "unbind", "unflatten", "lift_fresh"),
        *("_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty"),
    )
)


MICRO_BATCHES = 2


class Card(TorchDispatchMode):
    """Counts what happens on the card inside."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._older = [tensor.untyped_storage() for tensor in before]
        self._seen = {storage._cdata for storage in self._older}
        self.forget()

    def forget(self) -> None:
        """Launches and copies begin at none."""
        self.launched: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.read: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.saw(func.__name__.split(".")[0], (args, kwargs), made)
        return made

    def saw(self, name: str, given: Any, made: Any) -> None:
        """An operation, with what it was given and what it made."""
        before, after = ([t for t in tree_leaves(each) if isinstance(t, Tensor)] for each in (given, made))
        is_copy = name in ("_to_copy", "copy_")
        if is_copy and (came := {t.device.type for t in before}) | {t.device.type for t in after} == {"cpu", "cuda"}:
            (self.sent if "cpu" in came and after[0].device.type == "cuda" else self.read)[name] += 1
        if any(t.device.type == "cuda" for t in after) and name not in _NOT_LAUNCHED:
            self.launched[name] += 1
        for tensor in after:
            storage = tensor.untyped_storage()
            if tensor.device.type == "cuda" and storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                if self.now > self.peak:
                    self.peak, self.at = self.now, name
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, n_bytes: int) -> None:
        self._seen.discard(key)
        self.now -= n_bytes


def _see(operation: Any) -> None:
    """Lets a `Card` see one of those that torch does not dispatch as others."""

    @operation.py_impl(Card)
    def _(card: Card, *args: Any, **kwargs: Any) -> Any:
        made = operation(*args, **kwargs)
        card.saw(str(operation), (), made)
        return made


for each in (flex_attention, flex_attention_backward):
    _see(each)


def attended(
    query: Tensor, key: Tensor, value: Tensor, *, block_mask: Any, scale: float, **_: Any
) -> tuple[Tensor, Any]:
    """What torch's own function does once it is compiled, as far as tensors are made."""
    options = {
        "BACKEND": "AUTO", "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True, "OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": False,
    }  # fmt: skip
    # A soft cap is computed in registers; traced here, it would keep what it was traced with.
    out, lse, _ = flex_attention(query, key, value, _identity, block_mask.as_tuple(), scale, options)
    return out, SimpleNamespace(lse=lse)


def rows(n_tokens: int, length: int = 130, shared: int = 40, reply: int = 70) -> list[Rendered]:
    """Rows that are so many tokens together, of which all share a beginning."""
    draw = random.Random(0)
    start, made = [draw.randrange(1000) for _ in range(shared)], []
    while shared + len(made) * (length - shared) < n_tokens:
        own = [draw.randrange(1000) for _ in range(length - shared)]
        made.append(Rendered((*start, *own), ((length - reply, length),), Origin("rows", len(made) + 1)))
    return made


Kernels = dict[str, tuple[ASTSource, dict[str, Any]]]
"""By name, as they were launched, and how."""
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32"}


def as_launched(
    kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ASTSource, dict[str, Any]]:
    """A kernel with the types of what it was given; no tensor is kept."""
    names = [parameter.name for parameter in kernel.params]
    given = {**dict(zip(names, args, strict=False)), **{name: value for name, value in kwargs.items() if name in names}}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for parameter in kernel.params:
        value = given.get(parameter.name, parameter.default)
        if isinstance(value, Tensor) and not parameter.is_constexpr:
            signature[parameter.name] = "*" + _TYPES[value.dtype]
        elif parameter.is_constexpr or value is None or isinstance(value, bool):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
    how = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
    return ASTSource(kernel, signature, constants), how


def compiled(source: ASTSource, how: dict[str, Any], card: no_card.Card) -> dict[str, int]:
    """What a kernel takes of a card."""
    return no_card.taken_by(triton.compile(source, target=GPUTarget("cuda", card.arch, 32), options=how))


@contextlib.contextmanager
def on_card(
    card: no_card.Card, launched: Counter[str], kernels: Kernels, *, with_liger: bool, lacking: str | None
) -> Iterator[None]:
    """Inside, torch believes in the card, and what is written for it is counted and kept, and not run."""
    of_tree = batch.of_tree
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def faked(tree: Any) -> batch.Batch:
        with unset_fake_temporarily():
            made = of_tree(tree)
        labels = made.labels
        of_labels = map(fake.from_tensor, (labels.row, labels.target, labels.count, labels.row_count))
        ids, positions, predict_from = map(fake.from_tensor, (made.input_ids, made.position_ids, made.predict_from))
        return batch.Batch(ids, positions, predict_from, Labels(*of_labels, labels.begins))

    def launch(self: JITFunction[Any], *args: Any, **kwargs: Any) -> None:
        launched[self.fn.__name__] += 1
        if self.fn.__name__ not in kernels:
            kernels[self.fn.__name__] = as_launched(self, args, kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(no_card.told_of(card))
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", property(lambda _: True)))
        stack.enter_context(mock.patch.object(batch, "of_tree", faked))
        stack.enter_context(mock.patch.object(flex, "_flex", attended))
        stack.enter_context(mock.patch.object(JITFunction, "run", launch))
        stack.enter_context(mock.patch.object(compiler, "lacking", return_value=lacking))
        if not with_liger:
            stack.enter_context(mock.patch.object(liger, "version", return_value=None))
        stack.enter_context(fake)
        yield


def lay_on_card(model: torch.nn.Module) -> None:
    """Gives a model without memory tensors on the card; what was one stays one."""
    laid: dict[Tensor, Tensor] = {}

    def on_card(tensor: Tensor) -> Tensor:
        if tensor not in laid:
            made = torch.empty_like(tensor, device="cuda:0")
            laid[tensor] = torch.nn.Parameter(made, tensor.requires_grad) if type(tensor) is not Tensor else made
        return laid[tensor]

    for module in model.modules():
        for holder in (module._parameters, module._buffers, vars(module)):
            for name, held in holder.items():
                if isinstance(held, Tensor):
                    holder[name] = on_card(held)


def in_four_bits(model: torch.nn.Module) -> None:
    """Holds what adapters stand beside as bitsandbytes does."""
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]
    from bitsandbytes.nn import Linear4bit  # pyright: ignore[reportMissingImports]
    from peft.tuners.lora import bnb

    with unset_fake_temporarily():
        functional.name2qmap["dynamic"] = functional.create_dynamic_map()  # of numbers, once for all
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        linear: Any = layer.get_base_layer()
        with unset_fake_temporarily():
            held: Any = Linear4bit(linear.in_features, linear.out_features, False, linear.weight.dtype, device="meta")
        packed, state = functional.quantize_4bit(linear.weight.data, compress_statistics=True, quant_type="nf4")
        held.weight = torch.nn.Parameter(packed, requires_grad=False)  # a tensor without numbers can be no Params4bit
        held.weight.quant_state = state
        held.compute_type_is_set = True
        layer.base_layer, layer.__class__ = held, bnb.Linear4bit


def held_by(model: torch.nn.Module) -> list[Tensor]:
    """All tensors that a model consists of."""
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    found = [vars(state).values() for state in states if state] + [vars(s.state2).values() for s in states if s]
    return [*model.parameters(), *model.buffers(), *(t for each in found for t in each if isinstance(t, Tensor))]


def taken(asked: dict[str, Any]) -> dict[str, Any]:
    """What two steps take, and what the plan says of them."""
    config = AutoConfig.for_model(**asked["config"])
    recipe = Recipe(lora=LoraSettings(**asked.get("lora", {})))
    targets = models.targets(models.skeleton(config), recipe.lora)
    shape, recomputed = planning.shape(config, recipe, targets, Path("nowhere")), asked.get("recomputed", 0)
    documents = rows(asked.get("tokens", 2048))
    n_supervised = sum(document.n_supervised for document in documents)
    load = planning.load_of(documents, share_prefix=True)
    dtype = getattr(torch, asked.get("dtype", "bfloat16"))
    (card,) = [card for card in CARDS if card.name == asked.get("card", "RTX 4090")]
    launched: Counter[str] = Counter()
    base = models.skeleton(config).to(dtype).requires_grad_(False)
    model = models.attach(base, recipe.lora, 0, "base").train()
    notes: list[str] = []
    kernels: Kernels = {}
    with on_card(card, launched, kernels, with_liger=asked.get("liger", True), lacking=asked.get("lacking")):
        lay_on_card(model)
        if asked.get("nf4"):
            in_four_bits(model)
        engine = step.Engine(model, EngineSettings(self_check=False, recompute_layers=recomputed), notes.append)
        weights = held_by(model)
        assert {tensor.device.type for tensor in weights} == {"cuda"}
        counted = Card(weights)

        def asked_for(_: Any) -> bool:
            counted.read["all_finite"] += 1
            return True

        with counted, mock.patch.object(step, "all_finite", asked_for):
            engine.gradient(documents, n_supervised)
            counted.forget()
            launched.clear()
            model.zero_grad()
            with mock.patch.object(step.Engine, "_share", return_value=[(documents, 1)] * MICRO_BATCHES):
                engine.gradient(documents, n_supervised)  # the second one with the first one's gradient there
    choice, with_liger = Choice(load.tokens, recomputed, dtype.itemsize, asked.get("nf4", False)), bool(launched)
    parts = planning.parts_of_graph(shape, load, choice, 0, "cuda", with_liger=with_liger)
    held = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in weights}
    return {
        "way": engine.way,
        "tokens": load.tokens,
        "layers": shape.layers,
        "held": sum(held.values()),
        "planned_held": parts.weights + parts.adapter,
        "peak": counted.peak,
        "at": counted.at,
        "planned": parts.activations + parts.logits + parts.workspace + parts.gradients,
        "parts": {name: getattr(parts, name) for name in ("activations", "logits", "workspace", "gradients")},
        "launched": (counted.launched.total() + launched.total()) / MICRO_BATCHES,
        "sent": counted.sent.total() / MICRO_BATCHES,
        "read": counted.read.total(),
        "often": counted.launched.most_common(12),
        "by_liger": dict(launched),
        "notes": notes,
        "kernels": [
            {"kernel": name, "card": each.name, "limit": each.shared_bytes, **compiled(*kernel, each)}
            for each in CARDS
            if each.name in asked.get("compiled", ())
            for name, kernel in kernels.items()
        ],
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps({"asked": json.loads(argument), **taken(json.loads(argument))}), flush=True)
