"""The dense decoder with its backward pass written by hand: the layers of Llama and its relatives.

One product per group of linear layers with the same input, adapter included: `[x | h] · [W | sB]ᵀ` with `h = x̃Aᵀ`
(x̃ is x after dropout, with one mask for the group), so the adapter costs no pass of its own, and the product for dX
gives `dh` as well. Weights lie in one storage as `[W | sB]`; the model's own parameters become views of it. Weights of
16 bits stay as they are, and only those of the group at work stand in fp32 as well: few processors multiply 16 bits
well, and half the memory is worth two conversions per step.

Buffers are kept from step to step. What is cheap to compute is not stored but computed again: norms' outputs, the
activation. Nothing is computed below the lowest adapted layer in the backward pass, nor behind the last layer's
attention for tokens that predict nothing. All of it is done lane by lane (`lanes`): but for keys and values, tokens
have nothing to do with each other.

Legend: T tokens of a lane, U predicting positions of a lane, H width, I width of the MLP, R sum of the group's ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tunesmith.engine import attention
from tunesmith.engine.attention import Sight, Style
from tunesmith.engine.batch import Batch
from tunesmith.engine.lanes import Lanes, count_for, shares
from tunesmith.engine.loss import chunk_rows, loss_and_gradient
from tunesmith.engine.memory import Buffers, empty

# Decoder layers whose forward is exactly: x + o(attention(rope(qkv(norm(x))))), then x + down(act(gate) · up)(norm(x)).
LAYERS = frozenset(
    f"{name}DecoderLayer" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma")
)  # fmt: skip
GROUPS = ("qkv", "o", "gate_up", "down")
_ROWS_AT_ONCE = 128  # of the MLP's activation; what they need stays in the cache


class NotCovered(Exception):
    """The model has something that is not written here; the message says what."""


# --- linear layers with one input -------------------------------------------------------------------------------------


def _unmap(model: nn.Module, head: nn.Linear) -> None:
    """Copies what `Linears` will not. Weights read from a file are mapped, and a single one that stays so keeps the
    pages of all others that were read among this process's memory: those of the whole base a second time."""
    for module in model.modules():
        copied_later = {"weight"} if isinstance(module, nn.Linear) and module is not head else set()
        for name, parameter in module.named_parameters(recurse=False):
            if name not in copied_later and not parameter.requires_grad:
                kept = empty(*parameter.shape, dtype=parameter.dtype, device=parameter.device)
                parameter.data = kept.copy_(parameter.data)


Take = Callable[..., Tensor]
"""`Buffers.take` of a lane."""
Gradients = Mapping[nn.Parameter, Tensor]
"""Where a lane adds its share."""


class _Adapter(NamedTuple):
    """One adapter's place in its group."""

    a: nn.Parameter
    """(r, in)"""
    b: nn.Parameter
    """(out, r)"""
    scaling: float
    out: slice
    ranks: slice


class Linears:
    """Linear layers with the same input as one product."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        bases = [_base(module) for module in modules]
        self.inputs = bases[0].in_features
        self.outputs = sum(base.out_features for base in bases)
        self.adapters: list[_Adapter] = []
        self.dropout = 0.0
        row = ranks = 0
        for module, base in zip(modules, bases, strict=True):
            if isinstance(module, LoraLinear):
                a, b = (cast("nn.Parameter", part["default"].weight) for part in (module.lora_A, module.lora_B))
                self.adapters.append(
                    _Adapter(
                        a,
                        b,
                        module.scaling["default"],
                        slice(row, row + base.out_features),
                        slice(ranks, ranks + len(a)),
                    )
                )
                self.dropout = _dropout(module)
                ranks += len(a)
            row += base.out_features
        self.ranks = ranks
        first = bases[0].weight
        dtype = _arithmetic(first.dtype)
        self.a = first.new_zeros(ranks, self.inputs, dtype=dtype)
        self._stored: list[Tensor] = []
        self._weight: Tensor | None = None
        if first.dtype != dtype:
            self._stored = [base.weight.data for base in bases]
            self._b = first.new_zeros(self.outputs, ranks, dtype=dtype)
        else:
            self._weight = empty(self.outputs, self.inputs + ranks, dtype=dtype, device=first.device).zero_()
            self._b = self._weight[:, self.inputs :]
            row = 0
            for base in bases:
                place = self._weight[row : row + base.out_features, : self.inputs]
                place.copy_(base.weight.data)
                base.weight.data = place
                row += base.out_features
        self.bias = None
        if any(base.bias is not None for base in bases):
            biases = [first.new_zeros(b.out_features) if b.bias is None else b.bias.data for b in bases]
            self.bias = torch.cat(biases).to(dtype)

    def refresh(self) -> None:
        """Takes over the adapters' numbers; to be called when they have changed."""
        for adapter in self.adapters:
            self.a[adapter.ranks].copy_(adapter.a.detach())
            place = self._b[adapter.out, adapter.ranks]
            torch.mul(
                adapter.b.detach(), adapter.scaling, out=place
            ) if place.dtype == adapter.b.dtype else place.copy_(adapter.b.detach() * adapter.scaling)

    def weight(self, take: Take) -> Tensor:
        """`[W | sB]`, (outputs, H + R)."""
        if self._weight is not None:
            return self._weight
        whole = take("weight", self.outputs, self.inputs + self.ranks)
        row = 0
        for stored in self._stored:
            whole[row : row + len(stored), : self.inputs].copy_(stored)
            row += len(stored)
        whole[:, self.inputs :].copy_(self._b)
        return whole

    def forward(
        self, take: Take, extended: Tensor, dropped: Tensor, out: Tensor, residual: Tensor | None = None
    ) -> None:
        """`extended` is (T, H + R) with x in its first H columns; h is put behind it. `dropped` is x̃."""
        if self.ranks:
            torch.mm(dropped, self.a.T, out=extended[:, self.inputs :])
        weight = self.weight(take)
        if residual is not None:
            torch.addmm(residual, extended, weight.T, out=out)
        elif self.bias is not None:
            torch.addmm(self.bias, extended, weight.T, out=out)
        else:
            torch.mm(extended, weight.T, out=out)
        if residual is not None and self.bias is not None:
            out.add_(self.bias)

    def backward(self, take: Take, d_out: Tensor, d_extended: Tensor, keep: Tensor | None) -> Tensor:
        """The gradient with respect to x: fills `d_extended` (T, H + R) with it and dh, and returns a view of it."""
        torch.mm(d_out, self.weight(take), out=d_extended)
        d_x, d_h = d_extended[:, : self.inputs], d_extended[:, self.inputs :]
        if self.ranks:
            through = torch.mm(d_h, self.a, out=take("dropped", len(d_out), self.inputs))
            d_x.add_(through) if keep is None else d_x.addcmul_(through, keep)
        return d_x

    def adapter_backward(
        self, gradients: Gradients, d_out: Tensor, h: Tensor, dropped: Tensor, d_h: Tensor | None = None
    ) -> None:
        """Adds to the gradients of the adapters. `d_h` is known where `backward` was called."""
        if not self.ranks:
            return
        if d_h is None:
            d_h = d_out @ self._b
        d_a = d_h.T @ dropped
        for adapter in self.adapters:
            gradients[adapter.a].add_(d_a[adapter.ranks])
            # The other order, d_outᵀ · h, takes six times as long.
            d_b = (h[:, adapter.ranks].T @ d_out[:, adapter.out]).T
            gradients[adapter.b].add_(d_b, alpha=adapter.scaling)


class InFloat32(TorchFunctionMode):
    """Inside, embeddings and linear layers whose weights have 16 bits give fp32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and args[1].dtype.itemsize == 2:
            args = [None if given is None else given.float() for given in args]
        result = func(*args, **kwargs)
        return result.float() if func is F.embedding and result.dtype.itemsize == 2 else result


def _arithmetic(stored: torch.dtype) -> torch.dtype:
    return torch.promote_types(stored, torch.float32)


def _base(module: nn.Module) -> nn.Linear:
    if isinstance(module, LoraLinear):
        variant = module.lora_variant or module.merged or list(module.lora_A) != ["default"]
        if variant or module.fan_in_fan_out or any(module.lora_bias.values()):
            raise NotCovered("an adapter that is not plain LoRA")
        module = cast("nn.Module", module.get_base_layer())
    if type(module) is not nn.Linear:
        raise NotCovered(f"{type(module).__name__} where a linear layer is expected")
    return module


def _dropout(module: LoraLinear) -> float:
    dropout = module.lora_dropout["default"]
    return dropout.p if isinstance(dropout, nn.Dropout) else 0.0


# --- element-wise parts -----------------------------------------------------------------------------------------------


class Norm:
    """x · rsqrt(mean(x²) + eps) · weight over the last dimension."""

    def __init__(self, module: nn.Module) -> None:
        kind = type(module).__name__
        if not kind.endswith("RMSNorm"):
            raise NotCovered(f"{kind} where an RMS norm is expected")
        self.eps = float(getattr(module, "variance_epsilon", None) or cast("Any", module).eps)
        weight = cast("Tensor", module.weight).detach()
        weight = weight.to(_arithmetic(weight.dtype))
        self.weight = 1 + weight if kind.startswith("Gemma") else weight

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """Writes the result; returns rsqrt(mean(x²) + eps), (…, 1)."""
        rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rstd.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        self.again(x, rstd, out)
        return rstd

    def again(self, x: Tensor, rstd: Tensor, out: Tensor) -> None:
        torch.mul(x, rstd, out=out).mul_(self.weight)

    def backward(self, d_out: Tensor, x: Tensor, rstd: Tensor, d_x: Tensor) -> None:
        """Adds to `d_x`; destroys `d_out`."""
        d_out.mul_(self.weight)
        along = torch.linalg.vecdot(d_out, x)[..., None].mul_(rstd.pow(3)).div_(-x.shape[-1])
        d_x.addcmul_(d_out, rstd).addcmul_(x, along)


def _rotate(x_THD: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding in place; cos and sin are (T, 1, rotary / 2). With -sin it is undone."""
    half = cos.shape[-1]
    first, second = x_THD[..., :half], x_THD[..., half : 2 * half]
    rotated = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated)


class Activation:
    """act(gate) · up, in blocks of rows that stay in the processor's cache."""

    def __init__(self, module: nn.Module) -> None:
        probe = torch.linspace(-4, 4, 65)
        known: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
            "silu": (F.silu, torch.ops.aten.silu_backward),
            "gelu": (
                lambda x: F.gelu(x, approximate="tanh"),
                lambda d, x: torch.ops.aten.gelu_backward(d, x, approximate="tanh"),
            ),
        }
        match = [pair for pair in known.values() if torch.equal(pair[0](probe), module(probe))]
        if not match:
            raise NotCovered(f"the activation {type(module).__name__}")
        ((self._act, self._act_backward),) = match

    def forward(self, gate_up: Tensor, out: Tensor) -> None:
        half = out.shape[1]
        for block, result in zip(gate_up.split(_ROWS_AT_ONCE), out.split(_ROWS_AT_ONCE), strict=True):
            torch.mul(self._act(block[:, :half]), block[:, half:], out=result)

    def backward(self, d_out: Tensor, gate_up: Tensor, out: Tensor) -> None:
        """Replaces `gate_up` by its gradient and gives the result once more, in `out`."""
        half = out.shape[1]
        for d, block, result in zip(*(t.split(_ROWS_AT_ONCE) for t in (d_out, gate_up, out)), strict=True):
            gate, up = block[:, :half], block[:, half:]
            active = self._act(gate)
            torch.mul(active, up, out=result)
            d_gate = self._act_backward(d * up, gate)
            torch.mul(d, active, out=up)
            gate.copy_(d_gate)


# --- the model --------------------------------------------------------------------------------------------------------


class _Saved(NamedTuple):
    """What a layer's backward pass needs of its forward pass."""

    x: Tensor
    rstd: Tensor
    h_qkv: Tensor
    qkv: Tensor
    attention_backward: Callable[[Tensor], Sequence[Tensor]]
    extended: Tensor
    x_middle: Tensor
    rstd_middle: Tensor
    h_gate_up: Tensor
    gate_up: Tensor
    h_down: Tensor
    head_rstds: tuple[Tensor, ...]


class _Micro(NamedTuple):
    """What all layers and lanes of a micro-batch share."""

    batch: Batch
    cos: Tensor
    """(tokens, 1, rotary / 2)"""
    sin: Tensor
    sight: Sight
    masks: Masks | None
    n_supervised: int | None
    """What the gradient is divided by; None: the loss alone is wanted."""
    joint: Buffers
    lanes: Lanes
    key_gradients: tuple[list[Sequence[Tensor]], list[Sequence[Tensor]]]
    """Of every lane, what its queries' gradients are for all keys and values; layers take turns with the two lists, so
    that no lane overwrites what another has not read yet."""


class _Layer:
    def __init__(self, number: int, layer: nn.Module) -> None:
        self.number = number
        module = cast("Any", layer)
        attention, mlp = module.self_attn, module.mlp
        fused = hasattr(attention, "qkv_proj")
        self.qkv = Linears([attention.qkv_proj] if fused else [attention.q_proj, attention.k_proj, attention.v_proj])
        self.o = Linears([attention.o_proj])
        self.gate_up = Linears([mlp.gate_up_proj] if fused else [mlp.gate_proj, mlp.up_proj])
        self.down = Linears([mlp.down_proj])
        self.norm, self.norm_middle = Norm(module.input_layernorm), Norm(module.post_attention_layernorm)
        self.head_norms = (Norm(attention.q_norm), Norm(attention.k_norm)) if hasattr(attention, "q_norm") else None
        self.activation = Activation(mlp.activation_fn if fused else mlp.act_fn)
        config = attention.config
        self.head_size = int(attention.head_dim)
        self.query_width = self.o.inputs
        self.key_width = (self.qkv.outputs - self.query_width) // 2
        window = getattr(attention, "sliding_window", None) if hasattr(attention, "sliding_window") else None
        if fused or type(module).__name__.startswith("Mistral"):
            window = getattr(config, "sliding_window", None)
        self.style = Style(float(attention.scaling), window)
        self.linears = (self.qkv, self.o, self.gate_up, self.down)
        self.adapted = any(linears.ranks for linears in self.linears)


class _Model(NamedTuple):
    """The model in the parts that a micro-batch passes through."""

    embed: nn.Module
    layers: Sequence[_Layer]
    norm: Norm
    head: Tensor
    """(V, H)"""
    lowest: int
    """Number of the first layer with an adapter."""
    recomputed: int


class Decoder:
    """A causal language model with LoRA, ready to give the gradient of a micro-batch.

    The lowest `recomputed` layers keep nothing but their input. Raises NotCovered when a part of the model is not
    exactly what is written here.
    """

    def __init__(self, model: PeftModel, recomputed: int = 0) -> None:
        causal = cast("Any", model.get_base_model())
        body = getattr(causal, "model", None)
        layers = getattr(body, "layers", None)
        if body is None or layers is None:
            raise NotCovered(f"{type(causal).__name__}, a model without decoder layers")
        config = causal.config
        for layer in layers:
            if type(layer).__name__ not in LAYERS or not type(layer).__module__.startswith("transformers."):
                raise NotCovered(f"the layers of {type(causal).__name__}")
        if (
            getattr(config, "attention_dropout", 0)
            or getattr(config, "resid_pdrop", 0)
            or getattr(config, "embd_pdrop", 0)
        ):
            raise NotCovered("dropout inside the base model")
        head = causal.lm_head
        if type(head) is not nn.Linear or head.bias is not None:
            raise NotCovered("an output layer that is not one plain matrix")
        if head.weight.dtype == _arithmetic(head.weight.dtype):
            _unmap(causal, head)
        written = [_Layer(number, layer) for number, layer in enumerate(layers)]
        adapters = [a for layer in written for group in layer.linears for a in group.adapters]
        self._trained = [parameter for adapter in adapters for parameter in (adapter.a, adapter.b)]
        covered = set(map(id, self._trained))
        if any(p.requires_grad and id(p) not in covered for p in model.parameters()):
            raise NotCovered("trained parameters outside the decoder layers")
        if not adapters:
            raise NotCovered("no adapter at all")
        dropouts = {linears.dropout for layer in written for linears in layer.linears if linears.ranks}
        if len(dropouts) > 1:
            raise NotCovered("adapters with different dropout")
        (self._dropout,) = dropouts
        lowest = next(layer.number for layer in written if layer.adapted)
        self._model = _Model(body.embed_tokens, written, Norm(body.norm), head.weight, lowest, recomputed)
        self._rotary = body.rotary_emb
        self._dtype = _arithmetic(head.weight.dtype)
        self._joint = Buffers(self._dtype, head.weight.device)
        self._lanes: dict[int, Lanes] = {}
        self._memories: list[_Memory] = []

    def gradient(self, batch: Batch, sight: Sight, n_supervised: int, *, dropout: bool = True) -> Tensor:
        """The loss summed over the batch and divided by `n_supervised`; adds its gradient to the adapters' `.grad`."""
        with torch.no_grad():
            for parameter in self._trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            loss, memories = self._run(batch, sight, n_supervised, dropout)
            for memory in memories:
                for parameter, share in memory.gradients.items():
                    if share is not parameter.grad:
                        cast("Tensor", parameter.grad).add_(share)
        return loss / n_supervised

    def loss(self, batch: Batch, sight: Sight) -> Tensor:
        """The summed loss, without dropout and gradients."""
        with torch.no_grad():
            return self._run(batch, sight, None, False)[0]

    def _run(
        self, batch: Batch, sight: Sight, n_supervised: int | None, dropout: bool
    ) -> tuple[Tensor, Sequence[_Memory]]:
        n_tokens, model = len(batch.input_ids), self._model
        lanes = self._lanes_for(n_tokens if isinstance(sight, attention.Gather) else 0)
        memories = self._memories[: lanes.count]
        cos, sin = self._rotary(model.head.new_empty(0, dtype=self._dtype), batch.position_ids[None])
        half = cos.shape[-1] // 2
        cos, sin = cos[0, :, None, :half].contiguous(), sin[0, :, None, :half].contiguous()
        masks = None
        if dropout and self._dropout:
            widest = max(linears.inputs for linears in model.layers[0].linears)
            masks = Masks(self._dropout, n_tokens * widest, len(model.layers), self._joint)
        turns: tuple[list[Sequence[Tensor]], list[Sequence[Tensor]]] = ([()] * lanes.count, [()] * lanes.count)
        micro = _Micro(batch, cos, sin, sight, masks, n_supervised, self._joint, lanes, turns)
        rows = shares(n_tokens, lanes.count)
        if n_supervised is not None:
            memories[0].gradients.update((p, cast("Tensor", p.grad)) for p in self._trained)
        losses = lanes.run(lambda number: _Lane(model, micro, number, rows[number], memories[number]).run())
        return torch.stack(losses).sum(), memories

    def _lanes_for(self, n_tokens: int) -> Lanes:
        count = count_for(n_tokens)
        if count not in self._lanes:
            self._lanes[count] = Lanes(count)
        head = self._model.head
        while len(self._memories) < count:
            own = {parameter: torch.zeros_like(parameter) for parameter in self._trained if self._memories}
            self._memories.append(_Memory(Buffers(self._dtype, head.device), own))
        return self._lanes[count]


# --- one lane of a micro-batch ----------------------------------------------------------------------------------------


class _Memory(NamedTuple):
    """What a lane keeps from step to step."""

    buffers: Buffers
    gradients: dict[nn.Parameter, Tensor]
    """The adapters' own `.grad` for the first lane."""


class _Lane:
    """Some consecutive tokens on their way through the model and back."""

    def __init__(self, model: _Model, micro: _Micro, number: int, rows: range, memory: _Memory) -> None:
        self._model, self._micro, self._number, self._range = model, micro, number, rows
        self._rows = slice(rows.start, rows.stop)
        self._take, self._gradients = memory.buffers.take, memory.gradients
        self._cos, self._sin = micro.cos[self._rows], micro.sin[self._rows]
        predict_from = micro.batch.predict_from
        bounds = torch.tensor([rows.start, rows.stop])
        self._first, self._behind = torch.searchsorted(predict_from, bounds).tolist()
        self._predicting = predict_from[self._first : self._behind] - rows.start

    def run(self) -> Tensor:
        """The lane's summed loss; adds its share of the gradient where one is wanted."""
        with torch.no_grad():
            return self._there_and_back()

    def _there_and_back(self) -> Tensor:
        model, micro = self._model, self._micro
        layers, n_supervised = model.layers, micro.n_supervised
        for layer in layers[self._number :: micro.lanes.count]:
            for linears in layer.linears:
                linears.refresh()
        if self._number and n_supervised is not None:
            for share in self._gradients.values():
                share.zero_()
        micro.lanes.meet()
        with InFloat32():
            x = model.embed(micro.batch.input_ids[self._rows])
        last = len(layers) - 1
        inputs, saved = [x], dict[int, _Saved]()
        for number, layer in enumerate(layers):
            differentiated = n_supervised is not None and number >= model.lowest
            keep = differentiated and number >= model.recomputed
            out = self._take(f"x {number if differentiated else number % 2}", len(x), x.shape[1])
            x, state = self._forward(layer, x, out, str(number) if keep else "passing", keep=keep)
            inputs.append(x)
            if state is not None:
                saved[number] = state
        normed = torch.empty_like(x)
        rstd = model.norm.forward(x, normed)
        loss, d_normed = self._loss(normed)
        if n_supervised is None:
            return loss
        d_x = torch.zeros_like(x)
        model.norm.backward(d_normed.div_(n_supervised), x, rstd, d_x)
        for number in range(last, model.lowest - 1, -1):
            layer, state = layers[number], saved.pop(number, None)
            if state is None:
                out = self._take("x again", len(inputs[number]), d_x.shape[1])
                _, state = self._forward(layer, inputs[number], out, "again", keep=True)
            assert state is not None
            d_x = self._backward(layer, state, d_x, d_input=number > model.lowest)
        return loss

    def _loss(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        head, lanes = self._model.head, self._micro.lanes
        space = self._take("logits", chunk_rows(len(normed), len(head), head.device, lanes.count) * len(head))
        labels = self._micro.batch.labels.part(self._first, self._behind)
        return loss_and_gradient(
            normed,
            head,
            labels,
            with_gradient=self._micro.n_supervised is not None,
            space=space,
            at_once=lanes.count,
        )

    def _is_last(self, layer: _Layer) -> bool:
        return layer.number == len(self._model.layers) - 1

    def _keeps(self, layer: _Layer) -> list[Tensor | None]:
        """Dropout's mask for each of the layer's groups; None where nothing is dropped."""
        masks, batch = self._micro.masks, self._micro.batch
        every = behind = len(batch.input_ids), self._rows
        if self._is_last(layer):
            behind = len(batch.predict_from), slice(self._first, self._behind)
        return [
            None if masks is None or not linears.ranks else masks.take(layer.number, i, n, linears.inputs)[rows]
            for i, (linears, (n, rows)) in enumerate(zip(layer.linears, (every, behind, behind, behind), strict=True))
        ]

    def _dropped(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """x̃; `x` itself where nothing is dropped."""
        return x if keep is None else torch.mul(x, keep, out=self._take("dropped", *x.shape))

    def _forward(self, layer: _Layer, x: Tensor, out: Tensor, tag: str, *, keep: bool) -> tuple[Tensor, _Saved | None]:
        """The layer's output, in `out`, and with `keep` what its backward pass needs, in buffers named by `tag`."""
        micro, take, rows = self._micro, self._take, self._rows
        keep_qkv, keep_o, keep_gate_up, keep_down = self._keeps(layer)
        extended = take("extended", len(x), layer.qkv.inputs + layer.qkv.ranks)
        normed = extended[:, : layer.qkv.inputs]
        rstd = layer.norm.forward(x, normed)
        # While a lane is in the next layer, others may still look at the keys of this one.
        joint_tag = tag if keep else f"{tag} {layer.number % 2}"
        n_tokens = len(micro.batch.input_ids)
        qkv_all = micro.joint.take(f"qkv {joint_tag}", n_tokens, layer.qkv.outputs)
        qkv = qkv_all[rows]
        layer.qkv.forward(take, extended, self._dropped(normed, keep_qkv), qkv)
        h_qkv = extended[:, layer.qkv.inputs :].clone()
        query, key, value = qkv_all.split((layer.query_width, layer.key_width, layer.key_width), dim=1)
        query, key, value = (part.unflatten(1, (-1, layer.head_size)) for part in (query, key, value))
        head_rstds = []
        if layer.head_norms is not None:
            normed_heads = []
            for norm, part, name in zip(layer.head_norms, (query, key), ("query", "key"), strict=True):
                width = part.shape[1] * part.shape[2]
                normed_part = micro.joint.take(f"{name} {joint_tag}", n_tokens, width).view(part.shape)
                head_rstds.append(norm.forward(part[rows], normed_part[rows]))
                normed_heads.append(normed_part)
            query, key = normed_heads
        _rotate(query[rows], self._cos, self._sin)
        _rotate(key[rows], self._cos, self._sin)
        micro.lanes.meet()
        attended, attention_backward = attention.by_hand(
            micro.sight, query, key, value, layer.style, self._range, keep=keep
        )
        result = attended.flatten(1)
        x_rows = x
        if self._is_last(layer):
            result, x_rows = (t.index_select(0, self._predicting) for t in (result, x))
            out = out[: len(self._predicting)]
        extended_o = take(f"o {tag}", len(x_rows), layer.o.inputs + layer.o.ranks)
        extended_o[:, : layer.o.inputs] = result
        x_middle = take(f"x middle {tag}", len(x_rows), layer.o.outputs)
        given = extended_o[:, : layer.o.inputs]
        layer.o.forward(take, extended_o, self._dropped(given, keep_o), x_middle, residual=x_rows)

        extended = take("extended", len(x_rows), layer.gate_up.inputs + layer.gate_up.ranks)
        normed = extended[:, : layer.gate_up.inputs]
        rstd_middle = layer.norm_middle.forward(x_middle, normed)
        gate_up = take(f"gate up {tag}", len(x_rows), layer.gate_up.outputs)
        layer.gate_up.forward(take, extended, self._dropped(normed, keep_gate_up), gate_up)
        h_gate_up = extended[:, layer.gate_up.inputs :].clone()
        extended = take("extended down", len(x_rows), layer.down.inputs + layer.down.ranks)
        active = extended[:, : layer.down.inputs]
        layer.activation.forward(gate_up, active)
        layer.down.forward(take, extended, self._dropped(active, keep_down), out, residual=x_middle)
        h_down = extended[:, layer.down.inputs :].clone()
        if not keep:
            return out, None
        state = _Saved(
            x, rstd, h_qkv, qkv, attention_backward, extended_o, x_middle, rstd_middle, h_gate_up, gate_up, h_down,
            tuple(head_rstds),
        )  # fmt: skip
        return out, state

    def _backward(self, layer: _Layer, saved: _Saved, d_out: Tensor, *, d_input: bool) -> Tensor:
        """Gradient with respect to the layer's input; `d_out` is used up."""
        keep_qkv, keep_o, keep_gate_up, keep_down = self._keeps(layer)
        take, gradients = self._take, self._gradients

        # MLP
        n_rows = len(d_out)
        extended = take("extended down", n_rows, layer.down.inputs + layer.down.ranks)
        d_extended = take("d extended down", n_rows, layer.down.inputs + layer.down.ranks)
        active = extended[:, : layer.down.inputs]
        d_active = layer.down.backward(take, d_out, d_extended, keep_down)
        d_gate_up = saved.gate_up  # its numbers are needed no more
        layer.activation.backward(d_active, d_gate_up, active)
        dropped = self._dropped(active, keep_down)
        layer.down.adapter_backward(gradients, d_out, saved.h_down, dropped, d_extended[:, layer.down.inputs :])
        extended = take("extended", n_rows, layer.gate_up.inputs)
        layer.norm_middle.again(saved.x_middle, saved.rstd_middle, extended)
        d_extended = take("d extended", n_rows, layer.gate_up.inputs + layer.gate_up.ranks)
        d_normed = layer.gate_up.backward(take, d_gate_up, d_extended, keep_gate_up)
        dropped, d_h = self._dropped(extended, keep_gate_up), d_extended[:, layer.gate_up.inputs :]
        layer.gate_up.adapter_backward(gradients, d_gate_up, saved.h_gate_up, dropped, d_h)
        layer.norm_middle.backward(d_normed, saved.x_middle, saved.rstd_middle, d_out)

        # attention
        d_extended = take("d extended", n_rows, layer.o.inputs + layer.o.ranks)
        d_attended = layer.o.backward(take, d_out, d_extended, keep_o)
        given, h = saved.extended.tensor_split([layer.o.inputs], 1)
        layer.o.adapter_backward(gradients, d_out, h, self._dropped(given, keep_o), d_extended[:, layer.o.inputs :])
        if self._is_last(layer):
            d_attended, d_out = (
                t.new_zeros(len(saved.x), t.shape[1]).index_copy_(0, self._predicting, t) for t in (d_attended, d_out)
            )
        d_heads = self._attention_backward(layer, saved, d_attended)
        d_qkv = saved.qkv  # its numbers are needed no more once a part's gradient is known
        parts = d_qkv.split((layer.query_width, layer.key_width, layer.key_width), dim=1)
        for i, (part, gradient) in enumerate(zip(parts, d_heads, strict=True)):
            if i < 2:
                _rotate(gradient, self._cos, -self._sin)
                if layer.head_norms is not None:
                    raw = part.unflatten(1, (-1, layer.head_size))
                    d_normed_head, gradient = gradient, torch.zeros_like(gradient)
                    layer.head_norms[i].backward(d_normed_head, raw, saved.head_rstds[i], gradient)
            part.copy_(gradient.flatten(1))
        extended = take("extended", len(saved.x), layer.qkv.inputs)
        layer.norm.again(saved.x, saved.rstd, extended)
        if not d_input:
            layer.qkv.adapter_backward(gradients, d_qkv, saved.h_qkv, self._dropped(extended, keep_qkv))
            return d_out
        d_extended = take("d extended", len(saved.x), layer.qkv.inputs + layer.qkv.ranks)
        d_normed = layer.qkv.backward(take, d_qkv, d_extended, keep_qkv)
        dropped = self._dropped(extended, keep_qkv)
        layer.qkv.adapter_backward(gradients, d_qkv, saved.h_qkv, dropped, d_extended[:, layer.qkv.inputs :])
        layer.norm.backward(d_normed, saved.x, saved.rstd, d_out)
        return d_out

    def _attention_backward(self, layer: _Layer, saved: _Saved, d_attended: Tensor) -> list[Tensor]:
        """(rows, heads, D) each: the gradients of the lane's own queries, keys and values."""
        d_query, *of_keys = saved.attention_backward(d_attended.unflatten(1, (-1, layer.head_size)))
        everybodys = self._micro.key_gradients[layer.number % 2]
        everybodys[self._number] = of_keys
        self._micro.lanes.meet()
        d_key, d_value = (tensor[self._rows] for tensor in everybodys[0])
        for theirs in everybodys[1:]:
            d_key.add_(theirs[0][self._rows])
            d_value.add_(theirs[1][self._rows])
        return [d_query, d_key, d_value]


class Masks:
    """Dropout's masks of a micro-batch: slices, at places drawn anew for each, of one pool of independent numbers.

    Every number is 0 with probability `dropout` (to 16 bits), else 1 / (1 - dropout), and the numbers of one mask are
    independent; two masks may have a stretch of the pool in common. Drawing each afresh takes a tenth of a step.
    """

    def __init__(self, dropout: float, largest: int, n_layers: int, buffers: Buffers) -> None:
        draw = np.random.Generator(np.random.SFC64(int(torch.randint(2**62, ()))))
        lanes = draw.integers(0, 2**64, largest // 2 + 1, np.uint64).view(np.int16)[: 2 * largest]
        self._pool = buffers.take("dropout", 2 * largest)
        torch.ge(torch.from_numpy(lanes), round(dropout * 2**16) - 2**15, out=self._pool)
        self._pool.mul_(1 / (1 - dropout))
        self._starts = draw.integers(0, largest + 1, (n_layers, len(GROUPS))).tolist()

    def take(self, layer: int, group: int, rows: int, columns: int) -> Tensor:
        """The mask of a group's input."""
        start = self._starts[layer][group]
        return self._pool[start : start + rows * columns].view(rows, columns)
