"""Bytes and seconds of a training, before a weight is read, and what to do with the memory there is.

Every term is a closed form of the model's shape and of the micro-batches that the recipe will really have: rows are
rendered, their order is a function of the seed, so the trees of the steps can be laid out before there is a model.
What was measured instead of derived is a named constant with the machine and date.

Legend: T tokens of a micro-batch, U of them predicting, L layers, H width, I width of the MLP, Q and K widths of all
query heads and of all key heads, V vocabulary, R ranks of the adapters with the same input, added up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tunesmith import chat, markup, models, system
from tunesmith.data.rows import Row, Rows
from tunesmith.engine import trie
from tunesmith.engine.cpu import gather, lanes, products
from tunesmith.engine.cpu.decoder import LAYERS
from tunesmith.engine.cpu.memory import Pieces
from tunesmith.engine.cpu.products import ROWS_AT_ONCE, SHARED_AT_ONCE
from tunesmith.engine.hf import liger
from tunesmith.engine.loss import WORDS_AT_ONCE, chunk_rows
from tunesmith.engine.step import TOKENS
from tunesmith.errors import OutOfMemory
from tunesmith.language import said
from tunesmith.machines import CARDS, Device, Machine, machine_of, this_machine
from tunesmith.recipe import Recipe, settled
from tunesmith.training import hyperparameters, rehearsal, rehearsed
from tunesmith.training.checking import Checked, hold_out
from tunesmith.training.hyperparameters import Chosen
from tunesmith.training.steps import Steps
from tunesmith.types import Rendered

# --- what was measured ------------------------------------------------------------------------------------------------

# Bytes that libraries take once they compute, beyond those they take when they are imported.
_AT_WORK_BYTES = 180 << 20
# The same on a card: cuBLAS's workspace and the kernels that are compiled. And what torch's allocator holds beyond what
# is asked of it: 1.5 to 7 % of what messages about memory say is allocated (issues of many projects, 2024 to 2026),
# where it does not move its segments; it is told to (`cli.console`), and half of that is planned.
_CARD_AT_WORK_BYTES = 150 << 20
_BETWEEN_TENSORS = 0.03
# Share of the machine's rate for large products that a step's floor of operations reaches.
_REACHED = {"cpu": 0.55, "cuda": 0.4}  # SmolLM2 on 2 AVX2 cores, 2026-11; CUDA not yet measured
_REACHED_SPLIT = 0.85  # where products are split: SmolLM2 on 2 cores with AMX, 2026-11
_REACHED_WRITING = 0.5  # the same where words are written; SmolLM2 on 2 AVX2 cores, 2026-11, as what follows
_LAYER_SECONDS = {"base": 1e-3, "tuned": 2e-3}  # of calls, whose number does not depend on that of replies
# A scale in 8 bits for every 64 numbers, and one in 32 for every 256 scales (arXiv 2305.14314, section 3).
_NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
# Layers with the same input.
_GROUPS = (
    ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj", "gate_up_proj"),
    ("down_proj",),
)
_STEPS_LAID_OUT = 60  # the others are taken to be like them
_SAMPLES, _SAMPLE_TOKENS = 3, 1024
"""Rows whose questions are asked before and after, and fewer tokens than these are in such a question."""


# --- the model's shape ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What memory and time depend on."""

    layers: int
    width: int
    inner: int
    queries: int
    keys: int
    heads: int
    vocabulary: int
    linear: int
    """Numbers in the layers' linear weights."""
    weights: int
    """All numbers, a tied one once."""
    adapter: int
    ranks: tuple[int, int, int, int]
    """Of the adapters of qkv, o, gate and up, down."""
    stored_bytes: int
    """Per number, in the model's files."""
    by_hand: bool
    """There are layers written by hand for it (`engine.decoder`)."""
    head_norms: bool
    norms: int
    """Of a layer, over its whole width."""
    softcap: bool
    """The logits are capped."""
    dropout: bool
    masks: int
    """Numbers that dropout masks in a token of a layer: the inputs of all adapters."""
    fused: bool
    """q, k and v come out of one product."""
    narrow: int
    """Numbers in weights that stay in 16 bits on this machine's CPU where they are bf16 numbers, because products with
    them are split."""
    published_in_bfloat16: bool
    """They are, whatever they are stored as."""
    split_attention: bool
    """Products of attention are split there."""


def shape_of(checked: Checked) -> Shape:
    """The shape of a recipe's model and adapter."""
    return shape(checked.config, checked.recipe, checked.targets, checked.found.folder)


def shape(config: PreTrainedConfig, recipe: Recipe, targets: Sequence[models.Target], folder: Path) -> Shape:
    """The shape of a model and of the adapter on these layers; `folder` has the model's weights, or none."""
    text = config.get_text_config()
    skeleton = models.skeleton(config)
    layers = models.decoder_layers(skeleton)
    head = skeleton.get_output_embeddings()
    linear = sum(m.weight.numel() for m in skeleton.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    heads = int(text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    names = [target.name for target in targets]
    width, inner = int(text.hidden_size), int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    adapters = [sum(name in group for name in names) for group in _GROUPS]
    settings = recipe.lora
    ranks = [settings.r * count for count in adapters]
    inputs = (width, heads * size, width, inner)
    by_hand = bool(layers) and all(type(layer).__name__ in LAYERS for layer in layers) and settings.variant != "dora"
    return Shape(
        layers=int(text.num_hidden_layers),
        width=width,
        inner=inner,
        queries=heads * size,
        keys=int(getattr(text, "num_key_value_heads", None) or heads) * size,
        heads=heads,
        vocabulary=int(text.vocab_size),
        linear=linear,
        weights=sum(p.numel() for p in skeleton.parameters()),
        adapter=sum(target.parameters for target in targets),
        ranks=(ranks[0], ranks[1], ranks[2], ranks[3]),
        stored_bytes=cast("torch.dtype", config.dtype or torch.bfloat16).itemsize,
        by_hand=by_hand,
        head_norms=any(name.endswith("q_norm") for name, _ in skeleton.named_modules()),
        norms=sum(type(part).__name__.endswith("RMSNorm") for part in layers[0].children()) if layers else 2,
        softcap=getattr(text, "final_logit_softcapping", None) is not None,
        dropout=settings.dropout > 0,
        masks=sum(count * n for count, n in zip(adapters, inputs, strict=True)) if settings.dropout > 0 else 0,
        fused=any(name.endswith("qkv_proj") for name, _ in skeleton.named_modules()),
        narrow=_narrow(recipe, skeleton, linear) if by_hand else 0,
        published_in_bfloat16=models.published_in_bfloat16(folder, config),
        split_attention=size % 32 == 0 and products.are_split(),
    )


def _narrow(recipe: Recipe, skeleton: PreTrainedModel, linear: int) -> int:
    dtype = recipe.model.dtype
    if not products.are_split() or dtype == "float16":
        return 0
    head, embed = cast("torch.nn.Linear", skeleton.get_output_embeddings()), skeleton.get_input_embeddings()
    scaled = embed.weight is head.weight and type(embed) is not torch.nn.Embedding
    stays = scaled and dtype != "bfloat16"  # `engine.layers.Head`
    return linear + (0 if stays else head.weight.numel())


# --- micro-batches ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What memory depends on in a micro-batch."""

    tokens: int
    predicting: int
    longest: int
    """Tokens of the longest document."""


def load_of(documents: Sequence[Any], *, share_prefix: bool) -> Load:
    """The load of a micro-batch, from its layout."""
    tree = trie.lay_out(documents, share_prefix=share_prefix)
    return Load(
        tokens=len(tree.token_ids),
        predicting=len({where for where, _, _ in tree.pairs}),
        longest=max(tree.position) + 1,
    )


# --- memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Bytes at the peak, by what takes them."""

    runtime: int
    """Interpreter and libraries."""
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    """What the backward pass needs of the forward pass."""
    logits: int
    workspace: int
    """What is needed for a moment, within a layer."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Choice:
    """How a step is computed, as far as memory depends on it."""

    tokens_per_micro_batch: int
    recompute_layers: int
    weight_bytes: int
    """Per number: 4 or 2."""
    nf4: bool = False
    """The layers' linear weights in 4 bits."""
    shares: int = 1
    """Processes that the layers' weights are spread over."""

    def bytes_of(self, shape: Shape) -> int:
        linear = shape.linear / self.shares * (_NF4_BYTES if self.nf4 else self.weight_bytes)
        if self.shares > 1:  # the layer at work is there as a whole, and the one that comes next
            linear += 2 * shape.linear / shape.layers * self.weight_bytes
        return int(linear + (shape.weights - shape.linear) * self.weight_bytes)


def loading(shape: Shape, choice: Choice, runtime: int) -> Parts:
    """When the weights are read, on a CPU. Those of another type stand there beside the file's, all of them; those of
    the file's own type leave it one by one where the layers by hand copy them, so beside it stands the largest one."""
    in_file = shape.weights * shape.stored_bytes
    if choice.weight_bytes != shape.stored_bytes:
        return Parts(runtime, in_file + choice.bytes_of(shape), 0, 0, 0, 0, 0, 0)
    copied = 0
    if choice.weight_bytes == 4 and shape.by_hand:
        copied = shape.vocabulary * shape.width * (2 if _narrowed(shape, choice) else 4)
    return Parts(runtime + _AT_WORK_BYTES, in_file + copied, 0, 0, 0, 0, 0, 0)


def leaving(shape: Shape, choice: Choice, runtime: int) -> Parts:
    """When weights that stayed in 16 bits get the type again that they had, after the last step."""
    return Parts(
        runtime=runtime,
        weights=choice.weight_bytes * shape.weights,
        adapter=4 * shape.adapter,
        gradients=4 * shape.adapter,
        optimizer=8 * shape.adapter,
        activations=0,
        logits=0,
        workspace=Pieces.BYTES,  # the one that is not empty yet
    )


def _narrowed(shape: Shape, choice: Choice) -> int:
    """Numbers in weights that stay in 16 bits."""
    return shape.narrow if choice.weight_bytes == 2 or shape.published_in_bfloat16 else 0


def _weights_by_hand(shape: Shape, choice: Choice) -> int:
    narrowed = _narrowed(shape, choice)
    return 2 * narrowed + choice.weight_bytes * (shape.weights - narrowed)


def parts_by_hand(shape: Shape, load: Load, choice: Choice, runtime: int, n_lanes: int) -> Parts:
    """The layers written by hand, on a CPU: fp32, in memory that is kept from step to step (`engine.decoder`)."""
    e = 4
    t, u, kept = load.tokens, load.predicting, shape.layers - choice.recompute_layers
    r_qkv, r_o, r_up, r_down = shape.ranks
    h, i, q, k = shape.width, shape.inner, shape.queries, shape.keys
    # One layer: q, k, v; attention's result, and two numbers per head; x before the MLP; gate and up; the adapters' h.
    layer = (q + 2 * k) + (q + 2 * shape.heads) + h + 2 * i + (r_qkv + r_o + r_up + r_down)
    if shape.head_norms:
        layer += q + k
    # The last layer's part behind attention has no rows but those that predict.
    last = (t - u) * (r_o + h + 2 * i)
    activations = e * (kept * t * layer - last)
    activations += e * (shape.layers + 2) * t * h  # every layer's input and the last output
    if choice.recompute_layers:  # one layer while it passes, one while it is computed again
        activations += e * 2 * t * layer
    rows = min(chunk_rows(math.ceil(u / n_lanes), shape.vocabulary, torch.device("cpu"), n_lanes), u)
    logits = e * n_lanes * rows * shape.vocabulary
    # Inputs with their h, before and after; the gradient of each; dropped inputs; x, its norm and their gradients.
    workspace = e * t * (2 * (h + max(r_qkv, r_up, r_o)) + 2 * (i + r_down) + max(i, q) + 4 * h)
    # Attention: gradients of all keys and values, and what it works on.
    of_heads = math.ceil(t / n_lanes), shape.heads, k * shape.heads // q, q // shape.heads, load.longest
    workspace += e * n_lanes * (t * 2 * k + gather.space(*of_heads, split=shape.split_attention))
    if shape.dropout:
        workspace += t * max(i, q, h) * (2 * e + 4)  # the pool of masks, and the 16-bit numbers it is drawn from
    widest, words = max(2 * i, q + 2 * k), min(WORDS_AT_ONCE, shape.vocabulary)
    if _narrowed(shape, choice):  # some rows as three numbers of bf16; weights at work, or some words, in other order
        rows_each, each = math.ceil(t / n_lanes), max(1, torch.get_num_threads() // n_lanes)
        n_threads, at_once = n_lanes * min(products.worth(rows_each, h, widest), each), min(ROWS_AT_ONCE, rows_each)
        at_work = widest if shape.fused or choice.weight_bytes == 4 else max(i, q)
        workspace += n_threads * 6 * at_once * min(SHARED_AT_ONCE, widest) + n_lanes * 2 * h * max(at_work, words)
    elif choice.weight_bytes < 4:  # the group at work and some words of the head stand in fp32, in every lane
        workspace += e * n_lanes * h * (widest + words)
    own_b = shape.layers * sum(r * w for r, w in zip(shape.ranks, (q + 2 * k, h, 2 * i, h), strict=True))
    return Parts(
        runtime=runtime,
        weights=_weights_by_hand(shape, choice),
        adapter=e * (shape.adapter + own_b),  # peft's matrices, and sB beside the weights
        gradients=e * shape.adapter * (1 + n_lanes),  # each lane adds its own up first
        optimizer=2 * e * shape.adapter,
        activations=activations,
        logits=logits,
        workspace=workspace,
    )


def parts_of_graph(
    shape: Shape, load: Load, choice: Choice, runtime: int, device: Device, *, with_liger: bool = False
) -> Parts:
    """transformers' own layers over trees, with autograd: what it saves for each token of a layer.

    With e bytes per number: each norm its input, in fp32 or, by Liger's kernels, as it is; the inputs of qkv, of gate
    and up, of o (attention's result) and of down, once each, and a byte per number that dropout masks; q and k once
    they are turned, v, two fp32 numbers per head; where q, k and v are parts of one result all of it, and attention's
    in another order; gate, up and, but for Liger's kernels, act(gate). A recomputed layer keeps its input.
    """
    e = 4 if device == "cpu" else choice.weight_bytes
    t, u, kept = load.tokens, load.predicting, shape.layers - choice.recompute_layers
    h, i, q, k = shape.width, shape.inner, shape.queries, shape.keys
    of_norm = e if with_liger else 4
    norms = of_norm * (shape.norms * h + shape.head_norms * (q + k))
    inputs = e * (2 * h + q + i) + shape.masks
    heads = e * (q + 2 * k + shape.fused * (2 * q + k)) + 2 * 4 * shape.heads
    mlp = e * (2 if with_liger else 3) * i
    layer = t * (norms + inputs + heads + mlp + e * sum(shape.ranks))
    activations = kept * layer + choice.recompute_layers * e * t * h
    # The last norm's input, the positions that predict and their gradient; a chunk in fp32, and once more for a soft
    # cap's slope, or for the product in the weights' type where that is another.
    rows = chunk_rows(u, shape.vocabulary, torch.device(device))
    of_logit = 8 if shape.softcap else 4 + e * (e < 4)
    logits = of_norm * t * h + 2 * e * u * h + of_logit * rows * shape.vocabulary
    # On the way down, when the logits are gone: what the last norm's gradient is made of; that of the MLP's product,
    # when what the product's layer kept is gone, of gate and up, and those of the layer's own input.
    # Before the last of these is there, the weight that they come from is, which of 4 bits is turned into 16.
    product = e * (t * (h + i) + i * (max(t, h) if choice.nf4 else t))
    workspace = max(t * h * (4 * e if with_liger else 5 * 4), product if kept else 0)
    if choice.recompute_layers:  # the lowest ones, so what the others kept is gone when they are computed again
        workspace = max(workspace, product + layer - with_liger * e * t * h - kept * layer)
    workspace = max(workspace - logits, 0)
    return Parts(
        runtime=runtime,
        weights=choice.bytes_of(shape),
        adapter=4 * shape.adapter,
        gradients=4 * shape.adapter,
        optimizer=8 * shape.adapter,
        activations=activations,
        logits=logits,
        workspace=workspace,
    )


# --- the plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Seconds, by what takes them."""

    before: float
    """The base answers questions, and the general prompts that are rehearsed."""
    steps: float
    measures: float
    """Of the held-out loss."""
    after: float
    """The tuned model answers the questions."""

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Plan:
    """What a training will take."""

    machine: Machine
    fits: bool
    parts: Parts
    steps: int
    prompts: int
    """General ones that the base answers."""
    tokens: int
    """Of the rows of all steps, as a run counts them; what the base has yet to answer as long as it may be."""
    supervised_tokens: int
    shared_tokens: int
    """Of `tokens`, those that do not go through the model, because rows of a step have them in common."""
    times: Times
    choices: tuple[Chosen, ...]

    def __repr__(self) -> str:
        return f"<Plan {self.in_a_line}>"

    def _repr_html_(self) -> str:
        memory = markup.table(
            ((said(name), f"{count / 2**20:,.0f}") for name, count in asdict(self.parts).items()),
            (said("memory"), "MiB"),
        )
        times = markup.table(
            ((said(name), clock(seconds)) for name, seconds in asdict(self.times).items()), (said("time"), "")
        )
        chosen = markup.table(
            ((choice.setting, choice.value, choice.why) for choice in self.choices), (said("chosen"), "", said("why"))
        )
        return markup.block(self.in_a_line, memory, times, *([chosen] if self.choices else []))

    @property
    def in_a_line(self) -> str:
        """Whether it fits, its memory and its time."""
        needed, there = self.peak_memory_bytes / 2**30, self.machine.available_bytes / 2**30
        return said(
            "{fits}: {needed:.1f} of {there:.1f} GiB on {machine}; {n:,} steps in about {time}, {all} with answers",
            fits=said("fits") if self.fits else said("does not fit"),
            needed=needed,
            there=there,
            machine=self.machine.called,
            n=self.steps,
            time=clock(self.times.steps),
            all=clock(self.seconds),
        )

    @property
    def seconds(self) -> float:
        """Of all work, from the base's first answer to the tuned model's last."""
        return self.times.total

    @property
    def peak_memory_bytes(self) -> int:
        return self.parts.total

    def as_dict(self) -> dict[str, Any]:
        return {
            "fits": self.fits,
            "peak_memory_bytes": self.peak_memory_bytes,
            "available_bytes": self.machine.available_bytes,
            "device": self.machine.device,
            "machine": self.machine.name,
            "limit": self.machine.whose,
            "parts": asdict(self.parts),
            "steps": self.steps,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "shared_tokens": self.shared_tokens,
            "seconds": self.seconds,
            "times": asdict(self.times),
            "choices": [asdict(choice) for choice in self.choices],
        }

    @property
    def chosen(self) -> dict[str, Any]:
        """The values of the settings that were left open, by dotted name."""
        return {choice.setting: choice.value for choice in self.choices}

    def too_large(self) -> OutOfMemory:
        """What to say where it does not fit."""
        needed, there = self.peak_memory_bytes / 2**30, self.machine.available_bytes / 2**30
        largest = max(asdict(self.parts).items(), key=lambda item: item[1])
        on_card = self.machine.device == "cuda"
        fix = said("--set model.quantize=nf4 holds the weights in 4 bits. ") if on_card else ""
        more = system.more_memory(self.machine.whose)
        whose = self.machine.whose
        by = "" if whose == system.MACHINE else said(", by {whose}", whose=system.called(whose))
        return OutOfMemory(
            said("the plan"),
            said(
                "{needed:.1f} GiB needed at the least, most of it for {part} ({gib:.1f} GiB)",
                needed=needed,
                part=said(largest[0]),
                gib=largest[1] / 2**30,
            ),
            said("{there:.1f} GiB that are free ({machine}{by})", there=there, machine=self.machine.called, by=by),
            fix
            + said(
                "Take a smaller model, shorter rows (data.max_length) or a lower lora.r, or try it with --anyway. "
                "Or: {more}.",
                more=f"{more[0].lower()}{more[1:]}",
            ),
        )


def clock(seconds: float) -> str:
    """
    >>> clock(7), clock(3700)
    ('0:07', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def applied(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with some settings replaced, by dotted name."""
    for name, value in values.items():
        section, _, field = name.partition(".")
        part = getattr(recipe, section).model_copy(update={field: value})
        recipe = recipe.model_copy(update={section: part})
    return recipe


def general_prompts(checked: Checked, at_most: int) -> list[Row]:
    """The general prompts that a recipe rehearses, with room for their answers."""
    prompts = rehearsal.prompts(checked.recipe.data.rehearse)[:at_most] if at_most else ()
    return rehearsed.unanswered(checked.renderer, prompts, checked.recipe.template.system)


def asked(training: Rows, held_out: Rows) -> list[Row]:
    """The rows whose questions are answered before and after a training."""
    rows = (row for row in held_out or training if len(row.documents[-1].prompt_ids) < _SAMPLE_TOKENS)
    return list(itertools.islice(rows, _SAMPLES))


def plan(checked: Checked, machine: Machine | None = None, questions: Sequence[str] = (), *, shares: int = 1) -> Plan:
    """What the recipe's training will take on a machine (default: this one), with what is best for its memory chosen
    where the recipe leaves it open. `questions` are those that it is asked besides its own; `shares` is how many
    processes the layers' weights are spread over.

    In this order, until it fits: everything is kept for the backward pass; smaller micro-batches, on a card of 4,096
    tokens at least; some layers are recomputed; all of them; on a card smaller micro-batches yet, on a CPU weights in
    16 bits. Where nothing fits, what takes least is given, with `fits` False.
    """
    machine = machine or this_machine()
    taught = tuple(hyperparameters.chosen(checked.recipe, checked.config, hold_out(checked)[0]))
    checked = replace(checked, recipe=applied(checked.recipe, {choice.setting: choice.value for choice in taught}))
    recipe, shape = checked.recipe, shape_of(checked)
    sample = _Sample(checked)
    parts, choice = Parts(0, 0, 0, 0, 0, 0, 0, 0), Choice(0, 0, 4)
    on_card = models.card_dtype(machine.sixteen_bits, checked.config)
    with_liger = machine.device == "cuda" and liger.computes(checked.config, "cuda")
    for choice in _candidates(recipe, shape, machine.device, on_card, shares):
        parts = _peak(shape, sample.heaviest(choice.tokens_per_micro_batch), choice, machine, with_liger)
        if parts.total <= machine.available_bytes:
            break
    through, predicting = sample.per_step(choice.tokens_per_micro_batch)
    again = choice.recompute_layers / shape.layers
    operations = (4 + 2 * again) * shape.linear * through + 4 * predicting * shape.width * shape.vocabulary
    split = machine.device == "cpu" and shape.by_hand and _narrowed(shape, choice)
    reached = machine.flops * (_REACHED_SPLIT if split else _REACHED[machine.device])
    at_steps = sample.n_steps * operations / reached
    of_measure = 2 * (shape.linear * sample.measured[0] + sample.measured[1] * shape.width * shape.vocabulary) / reached
    own = rehearsed.unanswered(checked.renderer, questions, recipe.template.system)
    lengths = [len(row.documents[-1].prompt_ids) for row in (*sample.asked, *own)]
    general = [len(row.documents[-1].prompt_ids) for row in sample.general]
    times = Times(
        before=_writing(shape, choice, machine, [*lengths, *general], _LAYER_SECONDS["base"]),
        steps=at_steps,
        measures=sample.n_measures(at_steps) * of_measure,
        after=_writing(shape, choice, machine, lengths, _LAYER_SECONDS["tuned"]),
    )
    return Plan(
        machine,
        parts.total <= machine.available_bytes,
        parts,
        sample.n_steps,
        len(sample.general),
        sample.n_tokens,
        sample.n_supervised,
        max(0, sample.n_tokens - round(sample.n_steps * through)),
        times,
        (*taught, *_explained(recipe, choice, machine, on_card)),
    )


def _writing(shape: Shape, choice: Choice, machine: Machine, lengths: Sequence[int], of_layer: float) -> float:
    """Seconds in which all prompts of these lengths are answered: for every word of a group the weights are read, and
    each of its replies is multiplied with them."""
    n_tokens = rehearsed.ANSWER_TOKENS
    together = min(chat.SIDE_BY_SIDE, max(1, chat.TOKENS_SIDE_BY_SIDE // (max(lengths, default=0) + n_tokens)))
    words = math.ceil(len(lengths) / together) * n_tokens
    reading = choice.bytes_of(shape) / machine.bytes_per_second + shape.layers * of_layer
    multiplying = 2 * (shape.linear + shape.width * shape.vocabulary) * len(lengths) * n_tokens
    multiplying += 2 * shape.linear * sum(lengths)
    return words * reading + multiplying / (machine.flops * _REACHED_WRITING)


def _peak(shape: Shape, loads: Sequence[Load], choice: Choice, machine: Machine, with_liger: bool) -> Parts:
    if machine.device == "cuda":
        moments = [
            parts_of_graph(shape, load, choice, _CARD_AT_WORK_BYTES, "cuda", with_liger=with_liger) for load in loads
        ]
        moments = [
            replace(each, runtime=each.runtime + int(_BETWEEN_TENSORS * (each.total - each.weights)))
            for each in moments
        ]
    else:
        runtime = machine.runtime_bytes + _AT_WORK_BYTES
        moments = [loading(shape, choice, machine.runtime_bytes)]
        if choice.weight_bytes == 4 and shape.by_hand and _narrowed(shape, choice):
            moments.append(leaving(shape, choice, runtime))
        for load in loads:
            if shape.by_hand and choice.shares == 1:
                moments.append(parts_by_hand(shape, load, choice, runtime, lanes.count_for(load.tokens)))
            else:
                moments.append(parts_of_graph(shape, load, choice, runtime, "cpu"))
    return max(moments, key=lambda each: each.total)


def _candidates(recipe: Recipe, shape: Shape, device: Device, on_card: str, shares: int) -> Iterator[Choice]:
    """From the fastest to the smallest; `on_card` is the type that the model's weights are best held in there."""
    engine = recipe.engine
    budgets, smaller = [TOKENS[device] >> n for n in range(3)], list[int]()
    if device == "cuda":  # what is smaller leaves the card waiting for its next kernel: rather compute layers again
        smaller = [budgets[-1] >> 1, budgets[-1] >> 2]
    if engine.tokens_per_micro_batch != "auto":
        budgets, smaller = [engine.tokens_per_micro_batch], []
    asked = engine.recompute_layers
    layers = list(range(shape.layers + 1))
    if asked != "auto":
        layers = [{"none": 0, "all": shape.layers}[asked] if isinstance(asked, str) else min(asked, shape.layers)]
    dtype = on_card if device == "cuda" and recipe.model.dtype == "auto" else recipe.model.dtype
    sizes = {"auto": (4, 2), "float32": (4,)}.get(dtype, (2,))
    nf4 = recipe.model.quantize == "nf4"
    for size in sizes:
        for budget in budgets:
            yield Choice(budget, layers[0], size, nf4, shares)
        for recomputed in layers[1:]:
            yield Choice(budgets[-1], recomputed, size, nf4, shares)
        for budget in smaller:
            yield Choice(budget, layers[-1], size, nf4, shares)


def _explained(recipe: Recipe, choice: Choice, machine: Machine, on_card: str) -> Iterator[Chosen]:
    """What was left open, as it was chosen."""
    memory = f"{machine.available_bytes / 2**30:.1f} GiB"
    if recipe.engine.tokens_per_micro_batch == "auto":
        usual = choice.tokens_per_micro_batch == TOKENS[machine.device]
        why = said("larger ones are not faster") if usual else said("larger ones do not fit {memory}", memory=memory)
        yield Chosen("engine.tokens_per_micro_batch", choice.tokens_per_micro_batch, why)
    if recipe.engine.recompute_layers == "auto":
        n = choice.recompute_layers
        why = said("without it {memory} are not enough", memory=memory) if n else said("everything fits")
        yield Chosen("engine.recompute_layers", n, why)
    if recipe.model.dtype == "auto":
        name = "float32" if choice.weight_bytes == 4 else "bfloat16"
        why = said("weights of 32 bits fit")
        if machine.device == "cuda":
            name, why = on_card, said("what the card computes in")
            if on_card != machine.sixteen_bits:
                why = said("the model's numbers are too large for {dtype}", dtype=machine.sixteen_bits)
        elif choice.weight_bytes == 2:
            why = said("weights of 32 bits do not fit {memory}; sums are still in 32", memory=memory)
        yield Chosen("model.dtype", name, why)


class _Sample:
    """Some of a training's steps laid out: those with the longest rows and the most tokens, and others evenly."""

    def __init__(self, checked: Checked) -> None:
        settings = checked.recipe.train
        rows, held_out = hold_out(checked)
        self._share, self._every = checked.recipe.engine.share_prefix, checked.recipe.eval.every
        size, epochs = settled(settings.examples_per_step), settled(settings.epochs)
        per_epoch = rehearsed.per_epoch(settled(settings.rehearse), int(rows.n_supervised.sum()))
        self.general = general = general_prompts(checked, rehearsed.n_prompts(per_epoch, epochs))
        self.asked = asked(rows, held_out)
        self._steps = Steps(rows, size, settings.seed, checked.data.digest, general, per_epoch)
        self.n_steps = len(self._steps) * epochs
        dealt = [general[turn % len(general)].documents[0] for turn in range(per_epoch * epochs)]
        self.n_tokens = epochs * int(rows.n_tokens.sum()) + sum(len(document.token_ids) for document in dealt)
        self.n_supervised = epochs * int(rows.n_supervised.sum()) + sum(document.n_supervised for document in dealt)
        self.measured = int(held_out.n_tokens.sum()), int(held_out.n_supervised.sum())
        """Tokens of the rows held out, and those of them that count."""
        chosen: list[np.ndarray] = []
        tokens, longest = [], []
        for epoch in range(epochs):
            order = np.array(self._steps.order(epoch))
            starts = np.arange(0, len(order), size)
            chosen += np.split(order, starts[1:])
            tokens.append(np.add.reduceat(rows.n_tokens[order], starts))
            longest.append(np.maximum.reduceat(rows.longest[order], starts))
        heavy = [n for seen in (tokens, longest) for n in np.argsort(np.concatenate(seen), kind="stable")[-4:].tolist()]
        evenly = range(0, len(chosen), max(1, len(chosen) // _STEPS_LAID_OUT))

        def documents(number: int) -> tuple[Rendered, ...]:
            others = self._steps.rehearsed(*divmod(number, len(self._steps)))
            rows_of = [*(rows[n] for n in chosen[number].tolist()), *(general[n] for n in others)]
            return tuple(document for row in rows_of for document in row.documents)

        self._evenly = [documents(number) for number in evenly]
        self._heavy = [documents(number) for number in dict.fromkeys(heavy)]
        self._loads: dict[int, list[Load]] = {}

    def n_measures(self, seconds: float) -> int:
        """How often the held-out loss is measured in a training whose steps take so long."""
        if not self.measured[0]:
            return 0
        number, unit = self._every.split()
        if unit.startswith("minute"):
            return 1 + max(1, round(seconds / 60 / int(number)))
        return 1 + math.ceil(self.n_steps / int(number) / (len(self._steps) if unit.startswith("epoch") else 1))

    def heaviest(self, budget: int) -> list[Load]:
        """The loads of the largest micro-batches."""
        if budget not in self._loads:
            cuts = [
                part
                for documents in (*self._heavy, *self._evenly)
                for part in trie.cut(documents, budget, share_prefix=self._share)
            ]
            sized = sorted(cuts, key=self._tokens, reverse=True)[:6]
            self._loads[budget] = [load_of(part, share_prefix=self._share) for part in sized]
        return self._loads[budget]

    def per_step(self, budget: int) -> tuple[float, float]:
        """Tokens that go through the model and supervised tokens, on average."""
        tokens = [
            sum(map(self._tokens, trie.cut(documents, budget, share_prefix=self._share))) for documents in self._evenly
        ]
        predicting = [sum(document.n_supervised for document in documents) for documents in self._evenly]
        return sum(tokens) / len(tokens), sum(predicting) / len(predicting)

    def _tokens(self, documents: Sequence[Any]) -> int:
        return len(trie.lay_out(documents, share_prefix=self._share).token_ids)


def fitting(checked: Checked, sizes: Sequence[int]) -> list[tuple[int, Plan]]:
    """For each of some memories in GiB, the plan on a card that has as much: in 16 bits, or where that does not fit in
    4 bits."""
    found: list[tuple[int, Plan]] = []
    for gib in sizes:
        machine = replace(machine_of(CARDS[1], gib << 30), name=f"{gib} GiB")
        made = plan(checked, machine)
        if not made.fits:
            smaller = applied(checked.recipe, {"model.quantize": "nf4"})
            four_bits = plan(replace(checked, recipe=smaller), machine)
            made = replace(
                four_bits,
                choices=(*four_bits.choices, Chosen("model.quantize", "nf4", said("weights of 16 bits do not fit"))),
            )
        found.append((gib, made))
    return found
