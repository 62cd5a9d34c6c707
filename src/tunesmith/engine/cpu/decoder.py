"""The dense decoder with its backward pass written by hand: the layers of Llama and its relatives.

Buffers are kept from step to step. What is cheap to compute is not stored but computed again: norms' outputs, the
activation, attention's scores. Nothing is computed below the lowest adapted layer in the backward pass, nor behind the
last layer's attention for tokens that predict nothing. All of it is done lane by lane (`lanes`): but for keys and
values, tokens have nothing to do with each other.

Legend: T tokens of a lane, U predicting positions of a lane, H width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from tunesmith.engine import attention
from tunesmith.engine.batch import Batch
from tunesmith.engine.cpu import products
from tunesmith.engine.cpu.lanes import Lanes, count_for, shares
from tunesmith.engine.cpu.layers import (
    Activation,
    Head,
    InFloat32,
    Linears,
    Masks,
    Norm,
    NotCovered,
    Sums,
    add_share,
    arithmetic,
    drop,
    put,
    rotate,
)
from tunesmith.engine.cpu.memory import Buffers, Mapped, Pieces
from tunesmith.engine.cpu.onepass import kernels
from tunesmith.engine.loss import loss_and_gradient
from tunesmith.engine.sight import Sight, Style

# Decoder layers whose forward is exactly: x + o(attention(rope(qkv(norm(x))))), then x + down(act(gate) · up)(norm(x)).
LAYERS = frozenset(f"{name}DecoderLayer" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma"))
# What a number of a query costs per key, beside that of a weight: 16 operations beside 4, and the softmax twice.
_COST_OF_A_KEY = 6.0


# --- the model --------------------------------------------------------------------------------------------------------


class _Saved(NamedTuple):
    """What a layer's backward pass needs of its forward pass."""

    x: Tensor
    rstd: Tensor
    h_qkv: Tensor
    qkv: Tensor
    attention_backward: Callable[[Tensor], Sequence[Tensor]]
    h_o: Tensor
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
    """(tokens, rotary / 2)"""
    sin: Tensor
    sight: Sight
    masks: Masks | None
    n_supervised: int | None
    """What the gradient is divided by; None: the loss alone is wanted."""
    joint: Buffers
    lanes: Lanes
    rows: Sequence[range]
    """Each lane's tokens."""
    key_gradients: dict[tuple[int, int, int], Sequence[Tensor]]
    """For each layer, what a lane's queries say of the keys and values of a lane before it; taken out when read."""


class _Layer:
    def __init__(self, number: int, layer: nn.Module, pieces: Pieces) -> None:
        self.number = number
        module = cast("Any", layer)
        attention, mlp = module.self_attn, module.mlp
        fused = hasattr(attention, "qkv_proj")
        of_heads = [attention.qkv_proj] if fused else [attention.q_proj, attention.k_proj, attention.v_proj]
        self.qkv = Linears(of_heads, pieces)
        self.o = Linears([attention.o_proj], pieces)
        self.gate_up = Linears([mlp.gate_up_proj] if fused else [mlp.gate_proj, mlp.up_proj], pieces)
        self.down = Linears([mlp.down_proj], pieces)
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
    head: Head
    lowest: int
    """Number of the first layer with an adapter."""
    recomputed: int


class Decoder:
    """A causal language model with LoRA, ready to give the gradient of a micro-batch.

    The lowest `recomputed` layers keep nothing but their input.
    Raises NotCovered when a part of the model is not exactly what is written here.
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
        pieces, mapped = Pieces(head.weight.device), Mapped()
        output = Head(head, body.embed_tokens, pieces)
        self._dtype, self._device = arithmetic(head.weight.dtype), head.weight.device
        if head.weight.dtype == self._dtype:
            _unmap(causal, head, pieces, mapped, kept=output.narrowed)
        written = [_Layer(number, layer, pieces) for number, layer in enumerate(layers)]
        self._groups = [group for layer in written for group in layer.linears]
        adapters = [adapter for group in self._groups for adapter in group.adapters]
        self._trained = [parameter for adapter in adapters for parameter in (adapter.a, adapter.b)]
        covered = set(map(id, self._trained))
        if any(p.requires_grad and id(p) not in covered for p in model.parameters()):
            raise NotCovered("trained parameters outside the decoder layers")
        if not adapters:
            raise NotCovered("no adapter at all")
        dropouts = {group.dropout for group in self._groups if group.ranks}
        if len(dropouts) > 1:
            raise NotCovered("adapters with different dropout")
        (self._dropout,) = dropouts
        lowest = next(layer.number for layer in written if layer.adapted)
        self._model = _Model(body.embed_tokens, written, Norm(body.norm), output, lowest, recomputed)
        self._rotary = body.rotary_emb
        self._lanes: dict[int, Lanes] = {}
        compiled = kernels(head.weight.new_empty(0, dtype=self._dtype))
        if compiled is not None:  # now, not within the first step
            compiled.load(written[0].activation.kind, drops=self._dropout > 0)
            products.amx_attention()
        self._stored = (output, *self._groups)
        for part in self._stored:
            part.take_over(mapped)
        self.forget()

    def forget(self) -> None:
        """Gives the memory back that is kept from step to step."""
        self._joint = Buffers(self._dtype, self._device)
        self._memories: list[_Memory] = []

    @property
    def n_split(self) -> int:
        """Groups of linear layers whose products are split, with the output layer."""
        return sum(part.splits for part in self._stored)

    @property
    def narrowed(self) -> bool:
        """Whether some of the model's own weights are bf16 now, and were something else before."""
        return any(part.narrowed for part in self._stored)

    def leave(self) -> None:
        """Gives the memory back, and the model its weights in the type that they had."""
        self.forget()
        for part in self._stored:
            part.widen()

    def gradient(self, batch: Batch, sight: Sight, n_supervised: int, *, dropout: bool = True) -> Tensor:
        """The loss summed over the batch and divided by `n_supervised`; adds its gradient to the adapters' `.grad`."""
        with torch.no_grad():
            for parameter in self._trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            loss, (first, *others) = self._run(batch, sight, n_supervised, dropout)
            for other in others:
                first.trained.add_(other.trained)
            for layer, sums in zip(self._model.layers, first.sums, strict=True):
                for linears, of_group in zip(layer.linears, sums, strict=True):
                    linears.add_to_grad(of_group)
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
        cos, sin = self._rotary(torch.empty(0, dtype=self._dtype, device=self._device), batch.position_ids[None])
        half = cos.shape[-1] // 2
        cos, sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        masks = None
        if dropout and self._dropout:
            widest = max(linears.inputs for linears in model.layers[0].linears)
            masks = Masks(self._dropout, n_tokens * widest, len(model.layers), self._joint)
        rows = shares(self._costs(batch), lanes.count)
        micro = _Micro(batch, cos, sin, sight, masks, n_supervised, self._joint, lanes, rows, {})
        losses = lanes.run(lambda number: _Lane(model, micro, number, memories[number]).run())
        return torch.stack(losses).sum(), memories

    def _costs(self, batch: Batch) -> Tensor:
        """(T,) what each token costs a lane: products with the weights, the last layer's end for those that predict
        something alone, and attention to what stands before it in its document."""
        layers = self._model.layers
        last = sum(linears.inputs * linears.outputs for linears in layers[-1].linears[1:])
        every = sum(group.inputs * group.outputs for layer in layers for group in layer.linears) - last
        costs = torch.ones(len(batch.input_ids), dtype=torch.float64)
        costs[batch.predict_from] += last / every
        queries = sum(layer.query_width for layer in layers)
        costs += (batch.position_ids + 1) * (_COST_OF_A_KEY * queries / every)
        return costs

    def _lanes_for(self, n_tokens: int) -> Lanes:
        count = count_for(n_tokens)
        if count not in self._lanes:
            self._lanes[count] = Lanes(count)
        while len(self._memories) < count:
            sizes = [group.n_trained for group in self._groups]
            flat = torch.empty(sum(sizes), dtype=self._dtype, device=self._device)
            parts = iter(flat.split(sizes))
            sums = [[linears.sums(next(parts)) for linears in layer.linears] for layer in self._model.layers]
            self._memories.append(_Memory(Buffers(self._dtype, self._device), flat, sums))
        return self._lanes[count]


def _unmap(model: nn.Module, head: nn.Linear, pieces: Pieces, mapped: Mapped, *, kept: bool) -> None:
    """Copies what `Linears` will not, nor `Head` where it has been `kept`. Weights read from a file are mapped, and a
    single one that stays so keeps the pages of all others that were read among this process's memory: those of the
    whole base a second time."""
    copied = {id(head.weight)} if kept else set[int]()  # a tied one once
    for module in model.modules():
        copied_later = {"weight"} if isinstance(module, nn.Linear) and module is not head else set()
        for name, parameter in module.named_parameters(recurse=False):
            if name not in copied_later and not parameter.requires_grad and id(parameter) not in copied:
                copied.add(id(parameter))
                mapped.move(parameter, pieces.take(*parameter.shape, dtype=parameter.dtype))


# --- one lane of a micro-batch ----------------------------------------------------------------------------------------


class _Memory(NamedTuple):
    """What a lane keeps from step to step."""

    buffers: Buffers
    trained: Tensor
    """The sums of all groups, one behind the other."""
    sums: Sequence[Sequence[Sums]]
    """For each layer and group."""


class _Lane:
    """Some consecutive tokens on their way through the model and back."""

    def __init__(self, model: _Model, micro: _Micro, number: int, memory: _Memory) -> None:
        self._model, self._micro, self._number = model, micro, number
        self._range = rows = micro.rows[number]
        self._earlier, self._later = range(number), range(number + 1, micro.lanes.count)
        self._rows = slice(rows.start, rows.stop)
        self._memory, self._buffers, self._take = memory, memory.buffers, memory.buffers.take
        self._masks: dict[int, Sequence[Tensor | None]] = {}
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
        if n_supervised is not None:
            self._memory.trained.zero_()
        micro.lanes.tell(self._number, "refreshed")
        micro.lanes.hear(range(micro.lanes.count), "refreshed")
        with InFloat32():
            x = model.embed(micro.batch.input_ids[self._rows])
        last = len(layers) - 1
        inputs, saved = [x], dict[int, _Saved]()
        for number, layer in enumerate(layers):
            differentiated = n_supervised is not None and number >= model.lowest
            keep = differentiated and number >= model.recomputed
            out = self._buffers.take_each("x", 2 + len(layers) - model.lowest, len(x), x.shape[1])[
                2 + number - model.lowest if differentiated else number % 2
            ]
            x, state = self._forward(layer, x, out, "" if keep else "passing", keep=keep)
            inputs.append(x)
            if state is not None:
                saved[number] = state
        normed = micro.joint.take("normed", len(micro.batch.predict_from), x.shape[1])
        own = normed[self._first : self._behind]
        rstd = model.norm.of_heads(x, own)
        loss = self._loss(normed)
        if n_supervised is None:
            return loss
        d_x = torch.zeros_like(x)
        model.norm.of_heads_backward(own.div_(n_supervised), x, rstd, d_x)
        for number in range(last, model.lowest - 1, -1):
            layer, state = layers[number], saved.pop(number, None)
            if state is None:
                out = self._take("x again", len(inputs[number]), d_x.shape[1])
                _, state = self._forward(layer, inputs[number], out, "again", keep=True)
            assert state is not None
            d_x = self._backward(layer, state, d_x, d_input=number > model.lowest)
        return loss

    def _loss(self, normed: Tensor) -> Tensor:
        """The loss of an equal part of all predicting tokens, whoever's they are; their gradient takes the place of
        `normed`. Lanes have as many tokens as each other, but not as many of those that predict."""
        head, lanes, batch = self._model.head, self._micro.lanes, self._micro.batch
        every = range(lanes.count)
        lanes.tell(self._number, "normed")
        lanes.hear(every, "normed")
        start, stop = (len(normed) * number // lanes.count for number in (self._number, self._number + 1))
        loss, gradient = loss_and_gradient(
            normed[start:stop],
            head.weight,
            batch.labels.part(start, stop),
            with_gradient=self._micro.n_supervised is not None,
            take=self._take,
            split=head.splits,
            at_once=lanes.count,
        )
        if self._micro.n_supervised is not None:
            normed[start:stop] = gradient
            lanes.tell(self._number, "gradient of normed")
            lanes.hear(every, "gradient of normed")
        return loss

    def _is_last(self, layer: _Layer) -> bool:
        return layer.number == len(self._model.layers) - 1

    def _keeps(self, layer: _Layer) -> Sequence[Tensor | None]:
        """Dropout's mask for each of the layer's groups; None where nothing is dropped."""
        if layer.number not in self._masks:
            masks, batch = self._micro.masks, self._micro.batch
            every = behind = len(batch.input_ids), self._rows
            if self._is_last(layer):
                behind = len(batch.predict_from), slice(self._first, self._behind)
            self._masks[layer.number] = [
                None if masks is None or not linears.ranks else masks.take(layer.number, i, n, linears.inputs)[rows]
                for i, (linears, (n, rows)) in enumerate(
                    zip(layer.linears, (every, behind, behind, behind), strict=True)
                )
            ]
        return self._masks[layer.number]

    def _dropped(self, extended: Tensor, width: int, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Where x̃ is to be written, and x̃ once it is: x itself where nothing is dropped."""
        if keep is None:
            return extended, extended[:, :width]
        dropped = self._take("dropped", len(extended), width)
        return dropped, dropped

    def _place(self, buffers: Buffers, layer: _Layer, name: str, rows: int, width: int, tag: str) -> Tensor:
        """Memory of the layer's own, or with a `tag` that of this name."""
        if tag or self._is_last(layer):  # which has fewer rows
            return buffers.take(f"{name} {tag or 'last'}", rows, width)
        first = max(self._model.recomputed, self._model.lowest)  # those below have no memory of their own
        return buffers.take_each(f"{name} {width}", len(self._model.layers) - 1 - first, rows, width)[
            layer.number - first
        ]

    def _forward(self, layer: _Layer, x: Tensor, out: Tensor, tag: str, *, keep: bool) -> tuple[Tensor, _Saved | None]:
        """The layer's output, in `out`, and with `keep` what its backward pass needs: in buffers of the layer's own, or
        with a `tag` in those of that name."""
        micro, take, rows = self._micro, self._take, self._rows
        place = functools.partial(self._place, self._buffers, layer, tag=tag)
        keep_qkv, keep_o, keep_gate_up, keep_down = self._keeps(layer)
        extended = take("extended", len(x), layer.qkv.width)
        room, dropped = self._dropped(extended, layer.qkv.inputs, keep_qkv)
        rstd = layer.norm.forward(x, extended, keep_qkv, room)
        # While a lane is in the next layer, those behind it may still look at the keys of this one.
        joint_tag = tag if keep else f"{tag} {layer.number % 2}"
        if not keep and layer.number >= 2:
            micro.lanes.hear(self._later, ("looked", layer.number - 2))
        n_tokens = len(micro.batch.input_ids)
        qkv_all = self._place(micro.joint, layer, "qkv", n_tokens, layer.qkv.outputs, joint_tag)
        qkv = qkv_all[rows]
        layer.qkv.forward(take, extended, dropped, qkv)
        h_qkv = extended[:, layer.qkv.h].clone()
        query, key, value = qkv_all.split((layer.query_width, layer.key_width, layer.key_width), dim=1)
        query, key, value = (part.unflatten(1, (-1, layer.head_size)) for part in (query, key, value))
        head_rstds = []
        if layer.head_norms is not None:
            normed_heads = []
            for norm, part, name in zip(layer.head_norms, (query, key), ("query", "key"), strict=True):
                width = part.shape[1] * part.shape[2]
                normed_part = self._place(micro.joint, layer, name, n_tokens, width, joint_tag).view(part.shape)
                head_rstds.append(norm.of_heads(part[rows], normed_part[rows]))
                normed_heads.append(normed_part)
            query, key = normed_heads
            for part in normed_heads:
                own = part[rows].flatten(1)
                rotate(own, layer.head_size, part.shape[1], self._cos, self._sin, own)
        else:
            rotate(qkv, layer.head_size, query.shape[1] + key.shape[1], self._cos, self._sin, qkv)
        micro.lanes.tell(self._number, ("keys", tag, layer.number))
        micro.lanes.hear(self._earlier, ("keys", tag, layer.number))
        attended, attention_backward = attention.by_hand(
            micro.sight, (query, key, value), layer.style, self._range, take=take, keep=place
        )
        if not keep:
            micro.lanes.tell(self._number, ("looked", layer.number))
        result = attended.flatten(1)
        x_rows = x
        if self._is_last(layer):
            result, x_rows = (t.index_select(0, self._predicting) for t in (result, x))
            out = out[: len(self._predicting)]
        extended = take("extended", len(x_rows), layer.o.width)
        x_middle = place("x middle", len(x_rows), layer.o.outputs)
        room, dropped = self._dropped(extended, layer.o.inputs, keep_o)
        put(result, extended, keep_o, room)
        layer.o.forward(take, extended, dropped, x_middle)
        h_o = extended[:, layer.o.h].clone()

        extended = take("extended", len(x_rows), layer.gate_up.width)
        room, dropped = self._dropped(extended, layer.gate_up.inputs, keep_gate_up)
        rstd_middle = layer.norm_middle.forward(x_middle, extended, keep_gate_up, room, more=x_rows)
        gate_up = place("gate up", len(x_rows), layer.gate_up.outputs)
        layer.gate_up.forward(take, extended, dropped, gate_up)
        h_gate_up = extended[:, layer.gate_up.h].clone()
        extended = take("extended down", len(x_rows), layer.down.width)
        room, dropped = self._dropped(extended, layer.down.inputs, keep_down)
        layer.activation.forward(gate_up, extended, keep_down, room)
        layer.down.forward(take, extended, dropped, out)
        out.add_(x_middle)
        h_down = extended[:, layer.down.h].clone()
        if not keep:
            return out, None
        state = _Saved(
            x, rstd, h_qkv, qkv, attention_backward, h_o, x_middle, rstd_middle, h_gate_up, gate_up, h_down,
            tuple(head_rstds),
        )  # fmt: skip
        return out, state

    def _backward(self, layer: _Layer, saved: _Saved, d_out: Tensor, *, d_input: bool) -> Tensor:
        """Gradient with respect to the layer's input; `d_out` is used up."""
        keep_qkv, keep_o, keep_gate_up, keep_down = self._keeps(layer)
        take = self._take
        of_qkv, of_o, of_gate_up, of_down = self._memory.sums[layer.number]

        # MLP
        n_rows = len(d_out)
        d_extended = take("d extended down", n_rows, layer.down.width)
        layer.down.backward(take, d_out, d_extended)
        d_gate_up = saved.gate_up  # its numbers are needed no more
        dropped = take("dropped", n_rows, layer.down.inputs)
        layer.activation.backward(d_extended, layer.down.share, keep_down, d_gate_up, dropped)
        layer.down.adapter_backward(of_down, d_out, saved.h_down, dropped, d_extended[:, layer.down.h])
        d_extended = take("d extended", n_rows, layer.gate_up.width)
        layer.gate_up.backward(take, d_gate_up, d_extended)
        dropped = take("dropped", n_rows, layer.gate_up.inputs)
        layer.norm_middle.backward(
            d_extended, layer.gate_up.share, keep_gate_up, saved.x_middle, saved.rstd_middle, d_out, dropped
        )
        d_h = d_extended[:, layer.gate_up.h]
        layer.gate_up.adapter_backward(of_gate_up, d_gate_up, saved.h_gate_up, dropped, d_h)

        # attention
        d_extended = take("d extended", n_rows, layer.o.width)
        layer.o.backward(take, d_out, d_extended)
        d_attended, d_middle = add_share(d_extended, layer.o.inputs, layer.o.share, keep_o), d_out
        if self._is_last(layer):
            d_attended, d_out = (
                t.new_zeros(len(saved.x), t.shape[1]).index_copy_(0, self._predicting, t) for t in (d_attended, d_out)
            )
        *d_heads, attended = self._attention_backward(layer, saved, d_attended)
        dropped = attended.flatten(1)
        if self._is_last(layer):
            dropped = dropped.index_select(0, self._predicting)
        drop(dropped, keep_o, dropped)
        layer.o.adapter_backward(of_o, d_middle, saved.h_o, dropped, d_extended[:, layer.o.h])
        d_qkv = saved.qkv  # its numbers are needed no more once a part's gradient is known
        places = (0, layer.query_width, layer.query_width + layer.key_width)
        for i, (at, gradient) in enumerate(zip(places, d_heads, strict=True)):
            flat = gradient.flatten(1)
            part = d_qkv[:, at : at + flat.shape[1]]
            if i == 2:
                part.copy_(flat)
            elif layer.head_norms is None:
                rotate(flat, layer.head_size, gradient.shape[1], self._cos, self._sin, d_qkv, at, sign=-1)
            else:
                rotate(flat, layer.head_size, gradient.shape[1], self._cos, self._sin, flat, sign=-1)
                d_head = torch.zeros_like(gradient)
                raw = part.unflatten(1, (-1, layer.head_size))
                d_normed = flat.unflatten(1, (-1, layer.head_size))
                layer.head_norms[i].of_heads_backward(d_normed, raw, saved.head_rstds[i], d_head)
                part.copy_(d_head.flatten(1))
        dropped = take("dropped", len(saved.x), layer.qkv.inputs)
        if not d_input:
            layer.norm.again(saved.x, saved.rstd, keep_qkv, dropped)
            layer.qkv.adapter_backward(of_qkv, d_qkv, saved.h_qkv, dropped)
            return d_out
        d_extended = take("d extended", len(saved.x), layer.qkv.width)
        layer.qkv.backward(take, d_qkv, d_extended)
        layer.norm.backward(d_extended, layer.qkv.share, keep_qkv, saved.x, saved.rstd, d_out, dropped)
        layer.qkv.adapter_backward(of_qkv, d_qkv, saved.h_qkv, dropped, d_extended[:, layer.qkv.h])
        return d_out

    def _attention_backward(self, layer: _Layer, saved: _Saved, d_attended: Tensor) -> list[Tensor]:
        """(rows, heads, D) each: the gradients of the lane's own queries, keys and values, and the result again."""
        d_query, *of_keys, attended = saved.attention_backward(d_attended.unflatten(1, (-1, layer.head_size)))
        micro, number = self._micro, self._number
        for other in self._earlier:
            rows = micro.rows[other]
            micro.key_gradients[layer.number, number, other] = [t[rows.start : rows.stop] for t in of_keys]
        micro.lanes.tell(number, ("key gradients", layer.number))
        micro.lanes.hear(self._later, ("key gradients", layer.number))
        d_key, d_value = (tensor[self._rows] for tensor in of_keys)
        for other in self._later:
            theirs = micro.key_gradients.pop((layer.number, other, number))
            d_key.add_(theirs[0])
            d_value.add_(theirs[1])
        return [d_query, d_key, d_value, attended]
