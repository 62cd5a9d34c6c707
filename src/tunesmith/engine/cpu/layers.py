"""The parts of a decoder layer, each with its backward pass written by hand.

One product per group of linear layers with the same input, adapter included: `[x | h] · [W | sB]ᵀ` with `h = x̃Aᵀ`
(x̃ is x after dropout, with one mask for the group), so the adapter costs no pass of its own, and the product for dX
gives `dh` as well. Weights lie in one storage as `[W | sB]`; the model's own parameters become views of it. Weights of
16 bits stay as they are, and only those of the group at work stand in fp32 as well: few processors multiply 16 bits
well, and half the memory is worth two conversions per step. On those that do, weights that are bf16 numbers are kept as
such, those of an fp32 model too, and multiplied by `products.mm_of_split`.

Legend: T tokens of a lane, H width, I width of the MLP, R sum of the group's ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tunesmith.engine.cpu import products
from tunesmith.engine.cpu.memory import Buffers, Mapped, Pieces, Take
from tunesmith.engine.cpu.onepass import array, kernels
from tunesmith.engine.cpu.products import add_mm, mm

GROUPS = ("qkv", "o", "gate_up", "down")
_ALIGNED = 16  # numbers: a row that begins with a cache line is stored in half the time by `mm_of_split`
_ROWS_AT_ONCE = 128  # of the MLP's activation; what they need stays in the cache


class NotCovered(Exception):
    """The model has something that is not written here; the message says what."""


# --- linear layers with one input -------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """A lane's share of the gradients of a group's adapters, added up over its tokens."""

    a: Tensor
    """(R, H)"""
    bs: Sequence[Tensor]
    """(r, outputs) for each adapter: of Bᵀ, not yet scaled."""


class _Adapter(NamedTuple):
    """One adapter's place in its group."""

    a: nn.Parameter
    """(r, in)"""
    b: nn.Parameter
    """(out, r)"""
    scaling: float
    number: int
    """Of its layer within the group."""
    a_place: Tensor
    """Where the group has A, (r, in)."""
    b_place: Tensor
    """Where the group has sB, (out, r)."""


class Linears:
    """Linear layers with the same input as one product."""

    def __init__(self, modules: Sequence[nn.Module], pieces: Pieces) -> None:
        bases = [_base(module) for module in modules]
        self.inputs = bases[0].in_features
        self._widths = [base.out_features for base in bases]
        self.outputs = sum(self._widths)
        adapted = [module if isinstance(module, LoraLinear) else None for module in modules]
        self._ranks = [0 if module is None else module.r["default"] for module in adapted]
        self.ranks = sum(self._ranks)
        self._bases, first = bases, bases[0].weight
        self._before, dtype = first.dtype, arithmetic(first.dtype)
        self.a = first.new_zeros(self.ranks, self.inputs, dtype=dtype)
        weights = [base.weight.data for base in bases]
        self.splits = all(w.dtype == first.dtype and products.splits(w) and _is_bfloat16(w) for w in weights)
        behind = self.inputs + self.ranks
        self.h = slice(self.inputs, behind)
        """Where h stands behind x."""
        self.width = -(-behind // _ALIGNED) * _ALIGNED if self.splits else behind
        """Numbers in a row of x with h behind it."""
        self._stored: Sequence[Tensor] = ()
        self._weight: Tensor | None = None
        self._place: Tensor | None = None
        if self.splits and first.dtype != torch.bfloat16:
            self._place = pieces.take(self.outputs, self.inputs, dtype=torch.bfloat16)
            self._stored = (self._place,)
        elif first.dtype != dtype:
            self._stored = [base.weight.data for base in bases]
        else:
            self._weight = pieces.take(self.outputs, self.inputs + self.ranks, dtype=dtype)
            self._place = self._weight[:, : self.inputs]
        if self._weight is None:
            self._b = first.new_zeros(self.outputs, self.ranks, dtype=dtype)
        else:
            self._b = self._weight[:, self.inputs :]
        self.adapters: list[_Adapter] = []
        self.dropout = 0.0
        a_places, b_rows = self.a.split(self._ranks), self._b.split(self._widths)
        for number, module in enumerate(adapted):
            if module is not None:
                a, b = (cast("nn.Parameter", part["default"].weight) for part in (module.lora_A, module.lora_B))
                b_place = b_rows[number].split(self._ranks, 1)[number]
                self.adapters.append(_Adapter(a, b, module.scaling["default"], number, a_places[number], b_place))
                self.dropout = _dropout(module)
        self.bias = None
        if any(base.bias is not None for base in bases):
            biases = [first.new_zeros(b.out_features) if b.bias is None else b.bias.data for b in bases]
            self.bias = torch.cat(biases).to(dtype)

    def take_over(self, mapped: Mapped) -> None:
        """Moves the model's own weights to where they are multiplied; once it is sure that they will be."""
        if self._weight is not None:
            self._b.zero_()
        if self._place is not None:
            for base, place in zip(self._bases, self._place.split(self._widths), strict=True):
                mapped.move(base.weight, place)

    @property
    def narrowed(self) -> bool:
        """Whether the model's own weights are bf16 once they are taken over, and were something else before."""
        return self.splits and self._place is not None

    def widen(self) -> None:
        """The model's own weights in the type that they had, for who goes on without these layers."""
        if self.narrowed:
            for base in self._bases:
                base.weight.data = base.weight.data.to(self._before)
            self._stored, self._place = (), None

    def refresh(self) -> None:
        """Takes over the adapters' numbers; to be called when they have changed."""
        for adapter in self.adapters:
            adapter.a_place.copy_(adapter.a)
            adapter.b_place.copy_(adapter.b * adapter.scaling)

    def weight(self, take: Take) -> Tensor:
        """`[W | sB]`, (outputs, H + R), where products are not split."""
        if self._weight is not None:
            return self._weight
        whole = take("weight", self.outputs, self.inputs + self.ranks)
        row = 0
        for stored in self._stored:
            whole[row : row + len(stored), : self.inputs].copy_(stored)
            row += len(stored)
        whole[:, self.inputs :].copy_(self._b)
        return whole

    def forward(self, take: Take, extended: Tensor, dropped: Tensor, out: Tensor) -> None:
        """`extended` is (T, width) with x in its first H columns; h is put behind it. `dropped` is x̃."""
        h = extended[:, self.h]
        if self.ranks:
            mm(dropped, self.a.T, out=h)
        if not self.splits:
            mm(extended, self.weight(take).T, out=out)
        else:
            if self.ranks:
                mm(h, self._b.T, out=out)
            for stored, columns in zip(self._stored, out.split([len(s) for s in self._stored], 1), strict=True):
                products.mm_of_split(extended[:, : self.inputs], stored.T, columns, take, add=self.ranks > 0)
        if self.bias is not None:
            out.add_(self.bias)

    def backward(self, take: Take, d_out: Tensor, d_extended: Tensor) -> None:
        """Fills `d_extended` (T, width) with the base's share of the gradient with respect to x, and dh behind it, of
        which the adapter's `share` is to be made."""
        if not self.splits:
            mm(d_out, self.weight(take), out=d_extended)
            return
        parts = d_out.split([len(stored) for stored in self._stored], 1)
        for number, (stored, part) in enumerate(zip(self._stored, parts, strict=True)):
            products.mm_of_split(part, stored, d_extended[:, : self.inputs], take, add=number > 0)
        if self.ranks:
            mm(d_out, self._b, out=d_extended[:, self.h])

    @property
    def share(self) -> Tensor | None:
        """A (R, H), by which dh becomes the adapter's share of the gradient; None where there is no adapter."""
        return self.a if self.ranks else None

    @property
    def n_trained(self) -> int:
        return sum(adapter.a.numel() + adapter.b.numel() for adapter in self.adapters)

    def sums(self, flat: Tensor) -> Sums:
        """Views of `n_trained` numbers."""
        shapes = [(self.ranks, self.inputs), *(adapter.b.shape[::-1] for adapter in self.adapters)]
        a, *bs = (part.view(shape) for part, shape in zip(flat.split([r * n for r, n in shapes]), shapes, strict=True))
        return Sums(a, bs)

    def adapter_backward(
        self, sums: Sums, d_out: Tensor, h: Tensor, dropped: Tensor, d_h: Tensor | None = None
    ) -> None:
        """Adds to the sums. `d_h` is known where `backward` was called."""
        if not self.ranks:
            return
        if d_h is None:
            d_h = mm(d_out, self._b)
        add_mm(d_h.T, dropped, sums.a)
        hs, d_outs = h.T.split(self._ranks), d_out.split(self._widths, 1)
        for adapter, b in zip(self.adapters, sums.bs, strict=True):
            # The other order, d_outᵀ · h, takes six times as long.
            add_mm(hs[adapter.number], d_outs[adapter.number], b)

    def add_to_grad(self, sums: Sums) -> None:
        """The sums into the adapters' own `.grad`."""
        of_a = sums.a.split(self._ranks)
        for adapter, b in zip(self.adapters, sums.bs, strict=True):
            cast("Tensor", adapter.a.grad).add_(of_a[adapter.number])
            cast("Tensor", adapter.b.grad).add_(b.T, alpha=adapter.scaling)


class Head:
    """The output layer's weight, as bf16 numbers where products with them are split."""

    def __init__(self, head: nn.Linear, embed: nn.Embedding, pieces: Pieces) -> None:
        self.weight, self._before = head.weight, head.weight.dtype
        """(V, H)"""
        self.splits = products.splits(self.weight.data) and _is_bfloat16(self.weight.data)
        scaled = embed.weight is head.weight and type(embed) is not nn.Embedding
        # Gemma's embedding, which may be the same weight, rounds its scale to whatever type its weight has.
        self.narrowed = self.splits and self._before != torch.bfloat16 and not scaled
        if self.narrowed:
            self._place = pieces.take(*self.weight.shape, dtype=torch.bfloat16)

    def take_over(self, mapped: Mapped) -> None:
        """As `Linears.take_over`."""
        if self.narrowed:
            mapped.move(self.weight, self._place)

    def widen(self) -> None:
        """As `Linears.widen`."""
        if self.narrowed:
            self.weight.data = self.weight.data.to(self._before)
            del self._place
            self.narrowed = False


class InFloat32(TorchFunctionMode):
    """Inside, embeddings and linear layers whose weights have 16 bits give fp32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            args, kwargs = [_lifted(given) for given in args], {name: _lifted(given) for name, given in kwargs.items()}
        result = func(*args, **kwargs)
        return result.float() if func is F.embedding and result.dtype.itemsize == 2 else result


def _lifted(given: Tensor | None) -> Tensor | None:
    return given if given is None or given.dtype.itemsize != 2 else given.float()


def arithmetic(stored: torch.dtype) -> torch.dtype:
    """The type that weights of a type are computed with."""
    return torch.promote_types(stored, torch.float32)


def _is_bfloat16(weight: Tensor) -> bool:
    """Of a matrix of float32 or bfloat16, on a processor that has the low half of a number first, as all with AMX do.
    Takes no memory: converting every weight to compare it left torch's heap in pieces, 200 MiB of them for SmolLM2."""
    return weight.dtype == torch.bfloat16 or not weight.contiguous().view(torch.int16)[:, ::2].count_nonzero()


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
#
# All of them know two ways to the same result (`onepass`). x̃ = x · keep is given with x, because both are wanted and x
# is at hand; a `keep` of None drops nothing. Gradients that come from `Linears.backward` are completed by the adapter's
# share first: d_x += keep · (dh · A).


def put(x: Tensor, extended: Tensor, keep: Tensor | None, dropped: Tensor) -> None:
    """x (T, H) into the first columns of `extended`, and x̃ where something is dropped."""
    compiled = kernels(x, extended, dropped)
    if compiled is not None:
        compiled.put(array(x), array(extended), array(keep), array(dropped))
        return
    extended[:, : x.shape[1]] = x
    drop(x, keep, dropped)


def drop(x: Tensor, keep: Tensor | None, dropped: Tensor) -> None:
    if keep is not None:
        torch.mul(x, keep, out=dropped)


def add_share(d_extended: Tensor, width: int, a: Tensor | None, keep: Tensor | None) -> Tensor:
    """Completes the gradient with respect to x, and returns it as a view (T, H); `width` is H."""
    d_x = d_extended[:, :width]
    if a is None:
        return d_x
    d_h = d_extended[:, width : width + len(a)]
    compiled = kernels(d_extended, a)
    if compiled is not None:
        compiled.add_share(array(d_extended), array(a), array(keep))
    elif keep is None:
        d_x.add_(mm(d_h, a))
    else:
        d_x.addcmul_(mm(d_h, a), keep)
    return d_x


class Norm:
    """x · rsqrt(mean(x²) + eps) · weight over the last dimension."""

    def __init__(self, module: nn.Module) -> None:
        kind = type(module).__name__
        if not kind.endswith("RMSNorm"):
            raise NotCovered(f"{kind} where an RMS norm is expected")
        self.eps = float(getattr(module, "variance_epsilon", None) or cast("Any", module).eps)
        weight = cast("Tensor", module.weight).detach()
        weight = weight.to(arithmetic(weight.dtype))
        self.weight = (1 + weight if kind.startswith("Gemma") else weight).contiguous()

    def forward(
        self, x: Tensor, extended: Tensor, keep: Tensor | None, dropped: Tensor, more: Tensor | None = None
    ) -> Tensor:
        """Adds `more` to x; puts the norm of it into the first columns of `extended`, and x̃; returns
        rsqrt(mean(x²) + eps), (T, 1)."""
        compiled = kernels(x, extended, dropped)
        if compiled is None:
            if more is not None:
                x.add_(more)
            normed = extended[:, : x.shape[1]]
            rstd = self.of_heads(x, normed)
            drop(normed, keep, dropped)
            return rstd
        rstd = x.new_empty(len(x), 1)
        arrays = map(array, (extended, keep, dropped, rstd.view(-1)))
        compiled.norm(array(x), array(more), array(self.weight), np.float32(self.eps), *arrays)
        return rstd

    def of_heads(self, x: Tensor, out: Tensor) -> Tensor:
        """Writes the result for x of any shape; returns rsqrt(mean(x²) + eps), (…, 1)."""
        rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rstd.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        torch.mul(x, rstd, out=out).mul_(self.weight)
        return rstd

    def again(self, x: Tensor, rstd: Tensor, keep: Tensor | None, dropped: Tensor) -> None:
        """x̃ alone."""
        torch.mul(x, rstd, out=dropped).mul_(self.weight)
        drop(dropped, keep, dropped)

    def backward(
        self, d_extended: Tensor, a: Tensor | None, keep: Tensor | None, x: Tensor, rstd: Tensor, d_x: Tensor,
        dropped: Tensor,
    ) -> None:  # fmt: skip
        """Adds to `d_x`, gives x̃ again, and destroys `d_extended` but for what stands behind its first columns."""
        compiled = kernels(d_extended, x, d_x, dropped)
        if compiled is None:
            self.of_heads_backward(add_share(d_extended, x.shape[1], a, keep), x, rstd, d_x)
            self.again(x, rstd, keep, dropped)
            return
        arrays = map(array, (d_extended, a, keep, x, rstd.view(-1), self.weight, d_x, dropped))
        compiled.norm_backward(*arrays)

    def of_heads_backward(self, d_out: Tensor, x: Tensor, rstd: Tensor, d_x: Tensor) -> None:
        """Adds to `d_x`; destroys `d_out`."""
        d_out.mul_(self.weight)
        along = torch.linalg.vecdot(d_out, x)[..., None].mul_(rstd.pow(3)).div_(-x.shape[-1])
        d_x.addcmul_(d_out, rstd).addcmul_(x, along)


def rotate(x: Tensor, size: int, heads: int, cos: Tensor, sin: Tensor, out: Tensor, at: int = 0, sign: int = 1) -> None:
    """Rotary embedding of the first `heads` heads of x (T, …), of `size` numbers each, into `out` (T, …) from column
    `at` on; cos and sin are (T, rotary / 2). `out` may be x, and with a sign of -1 it is undone."""
    compiled = kernels(x, out, cos, sin)
    if compiled is not None:
        given = map(array, (cos, sin))
        compiled.rotate(array(x), size, heads, *given, np.float32(sign), array(out), at)
        return
    half = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None] * sign
    x, out = (t[:, first : first + heads * size].unflatten(1, (heads, size)) for t, first in ((x, 0), (out, at)))
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated = (first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)
    out[..., 2 * half :] = x[..., 2 * half :]
    for i, part in enumerate(rotated):
        out[..., i * half : (i + 1) * half] = part


class Activation:
    """act(gate) · up."""

    def __init__(self, module: nn.Module) -> None:
        probe = torch.linspace(-4, 4, 65)
        known: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
            "silu": (F.silu, torch.ops.aten.silu_backward),
            "gelu": (
                lambda x: F.gelu(x, approximate="tanh"),
                lambda d, x: torch.ops.aten.gelu_backward(d, x, approximate="tanh"),
            ),
        }
        match = [number for number, (act, _) in enumerate(known.values()) if torch.equal(act(probe), module(probe))]
        if not match:
            raise NotCovered(f"the activation {type(module).__name__}")
        (self.kind,) = match
        self._act, self._act_backward = list(known.values())[self.kind]

    def forward(self, gate_up: Tensor, extended: Tensor, keep: Tensor | None, dropped: Tensor) -> None:
        """Into the first I columns of `extended`, and x̃."""
        compiled = kernels(gate_up, extended, dropped)
        if compiled is not None:
            arrays = map(array, (extended, keep, dropped))
            compiled.activation(array(gate_up), self.kind, *arrays)
            return
        half = gate_up.shape[1] // 2
        for block, result in zip(gate_up.split(_ROWS_AT_ONCE), extended.split(_ROWS_AT_ONCE), strict=True):
            torch.mul(self._act(block[:, :half]), block[:, half:], out=result[:, :half])
        drop(extended[:, :half], keep, dropped)

    def backward(
        self, d_extended: Tensor, a: Tensor | None, keep: Tensor | None, gate_up: Tensor, dropped: Tensor
    ) -> None:
        """Replaces `gate_up` by its gradient, and gives x̃ again."""
        compiled = kernels(d_extended, gate_up, dropped)
        if compiled is not None:
            arrays = map(array, (d_extended, a, keep, gate_up))
            compiled.activation_backward(*arrays, self.kind, array(dropped))
            return
        half = gate_up.shape[1] // 2
        d_out = add_share(d_extended, half, a, keep)
        for d, block, result in zip(*(t.split(_ROWS_AT_ONCE) for t in (d_out, gate_up, dropped)), strict=True):
            gate, up = block[:, :half], block[:, half:]
            active = self._act(gate)
            torch.mul(active, up, out=result)
            d_gate = self._act_backward(d * up, gate)
            torch.mul(d, active, out=up)
            gate.copy_(d_gate)
        drop(dropped, keep, dropped)


# --- dropout ----------------------------------------------------------------------------------------------------------


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
