"""The gradient of a step, by the cheapest way that is exact for the model at hand.

`decoder`: layers written by hand, over trees. `tree`: transformers' own layers, over trees. `padded`: transformers' own
layers, rows side by side; works for every model. Before the first step of a model, what is chosen is compared with
`padded` on a few tokens, and left if it differs.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D  # a linear layer in spite of its name

from tunesmith import hub
from tunesmith.engine import attention, batch, compiler, liger, lora, trie
from tunesmith.engine.cpu import memory, onepass, products
from tunesmith.engine.cpu.decoder import Decoder
from tunesmith.engine.cpu.layers import InFloat32, NotCovered
from tunesmith.engine.loss import HeadLoss, chunk_rows, cross_entropy, summed_cross_entropy
from tunesmith.engine.ranks import Ranks
from tunesmith.errors import OutOfMemory
from tunesmith.language import said
from tunesmith.recipe import EngineSettings
from tunesmith.types import Origin, Rendered

Way = Literal["decoder", "tree", "padded"]
TOKENS = {"cpu": 2048, "cuda": 16384}
_TREE_WITHOUT_LIGER = "tree without Liger's kernels"
_TREE_GATHERED = "tree with gathered attention"
_WAYS = ("decoder", "tree", _TREE_WITHOUT_LIGER, _TREE_GATHERED, "padded")  # from the fastest to the slowest
# Largest relative difference of the adapter's gradient between two right computations, ten times what was seen.
_BOUND = {torch.float64: 1e-5, torch.float32: 2e-3}
# Of fp16's gradients: the power of two that what one token says of the loss is multiplied by, so that it is not
# rounded to zero on its way; a sum over many tokens may then be more than 65,504, and the power is lowered.
_FIRST_EXPONENT, _LEAST_EXPONENT = 8, -24
_RECURRENT = ("mamba", "conv", "recurrent", "linear_attention", "rwkv", "lstm", "linearattention", "lightning")
# Settings of a config that change what the output layer gives; for those the model is asked for the logits itself.
_HEAD_SETTINGS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale", "mup_width_scale")


class Engine:
    """Computes steps of one model."""

    def __init__(
        self,
        model: PeftModel,
        settings: EngineSettings,
        note: Callable[[str], None] = lambda text: None,
        ranks: Ranks | None = None,
        *,
        sharded: bool = False,
    ) -> None:
        self._ranks, self._sharded = ranks or Ranks(), sharded
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._model, self._settings, self._note = model, settings, note
        self._device = next(model.parameters()).device
        self._dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
        self._decoder: Decoder | None = None
        self._checked = False
        self._limit = 2**62
        self._compiles = True
        self._exponent = _FIRST_EXPONENT
        self._at_work: Sequence[Rendered] = ()
        self.way: Way = "padded"
        """How steps are computed."""
        self._longest_together = longest_together(model)
        self._dynamic_rotaries: list[Any] = [
            module for module in model.modules() if getattr(module, "rope_type", None) == "dynamic"
        ]
        n_layers = int(cast("Any", model.get_base_model()).config.get_text_config().num_hidden_layers)
        asked = settings.recompute_layers
        self._recomputed = asked if isinstance(asked, int) else n_layers if asked == "all" else 0
        if reason := not_packable(model):
            _recompute(model, self._recomputed)
            note(said("Rows are trained side by side with padding: {reason}.", reason=reason))
            return
        attention.register()
        if self._device.type == "cuda" and (lack := compiler.lacking()) is not None:
            self._compiles = False
            slower = said("Slower kernels are used: Triton finds {lack}. {fix}", lack=lack, fix=compiler.fix())
            note(slower)
        if self._device.type == "cpu" and not sharded:
            try:
                self._decoder = Decoder(model, recomputed=self._recomputed)
                self.way = "decoder"
                if self._dtype.itemsize == 2:
                    dtype = _name(self._dtype)
                    note(said("Weights stay in {dtype}; products are computed in float32.", dtype=dtype))
                elif self._decoder.narrowed:
                    note(said("Weights that are bfloat16 numbers are kept as such; products are computed in float32."))
            except NotCovered as reason:
                note(said("transformers' own layers are used: {reason} is not written by hand.", reason=str(reason)))
        _recompute(model, self._recomputed)
        if self._decoder is None:
            self._take_tree()
        memory.give_back()

    @property
    def found(self) -> dict[str, int]:
        """What steps so far have found out about memory and numbers; steps that go on with it are the same."""
        return {"tokens_at_most": self._limit, "exponent": self._exponent}

    def go_on_with(self, found: Mapping[str, int]) -> None:
        """Takes what an engine `found`; raises ValueError for what none can have."""
        limit, exponent = (found[name] for name in ("tokens_at_most", "exponent"))
        known = type(limit) is int and type(exponent) is int
        if not known or limit < 1 or not _LEAST_EXPONENT <= exponent <= _FIRST_EXPONENT:
            raise ValueError(f"{limit!r} and {exponent!r}")
        self._limit, self._exponent = limit, exponent

    @property
    def _budget(self) -> int:
        """Tokens that go through the model at once."""
        asked = self._settings.tokens_per_micro_batch
        if asked == "auto":
            asked = TOKENS[self._device.type] // (2 if self.way == "padded" else 1)
        return min(self._limit, asked)

    def _take_tree(self) -> None:
        self._leave_decoder()
        self.way = "tree"
        if others := lora.install(self._model):
            self._note(said("{n} adapters are not plain LoRA on a linear layer; peft applies them.", n=others))
        liger.install(self._model)

    def _take_padded(self) -> None:
        self._leave_decoder()
        self.way = "padded"
        lora.remove(self._model)
        liger.remove(self._model)

    def close(self) -> None:
        """Gives the model's weights back in the type that they had, for transformers' own layers. No step may
        follow."""
        self._leave_decoder()

    def _leave_decoder(self) -> None:
        if self._decoder is not None:
            self._decoder.leave()
            self._decoder = None

    # --- one step ----------------------------------------------------------------------------------------------------

    def gradient(self, documents: Sequence[Rendered], n_supervised: int) -> Tensor:
        """The documents' loss, summed over supervised tokens and divided by `n_supervised`; a scalar.

        Adds its gradient to the `.grad` of what is trained. With several processes each computes its share, and all
        have the sum.
        """
        self._check_once(documents)
        if self._sharded:
            self._ranks.begin_pass()

        def add_up(scale: float) -> Tensor:
            total = torch.zeros((), dtype=torch.float64, device=self._device)
            for part, weight in self._share(documents):
                self._at_work = part
                total += self._part_gradient(part, n_supervised, self.way, weight, scale)
            return total

        total = self._in_smaller_parts(lambda: self._scaled(add_up, n_supervised))
        return self._ranks.add_up(self._trained, total)[0]

    def loss(self, documents: Sequence[Rendered]) -> float:
        """The documents' summed loss without dropout."""
        self._check_once(documents)
        if self._sharded:
            self._ranks.begin_pass()

        def add_up() -> Tensor:
            total = torch.zeros((), dtype=torch.float64, device=self._device)
            for part, weight in self._share(documents):
                self._at_work = part
                total += self._part_loss(part, self.way) * weight
            return total

        with torch.no_grad(), _mode(self._model, training=False):
            total = self._in_smaller_parts(add_up)
        return self._ranks.add_up([], total)[0].item()

    def _scaled(self, add_up: Callable[[float], Tensor], n_supervised: int) -> Tensor:
        """What `add_up` returns. Where gradients pass through fp16 they are multiplied on their way, and divided in the
        end, by a power of two: as large a one as leaves them finite, found by trying, from the same random state."""
        if self._dtype != torch.float16 or self.way == "decoder":
            return add_up(1)
        random_state, before = _random_state(self._device), [parameter.grad for parameter in self._trained]
        while True:
            for parameter in self._trained:
                parameter.grad = None
            scale = 2.0 ** (self._exponent + math.floor(math.log2(n_supervised)))
            total = add_up(scale)
            whole = all_finite([parameter.grad for parameter in self._trained if parameter.grad is not None])
            if self._sharded:  # they compute together
                whole = not self._ranks.any(not whole)
            if whole or self._exponent <= _LEAST_EXPONENT:
                break
            self._exponent -= 4
            _set_random_state(random_state, self._device)
        for parameter, gradient in zip(self._trained, before, strict=True):
            if parameter.grad is not None:
                parameter.grad.div_(scale)
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient + parameter.grad
        return total

    def _in_smaller_parts(self, add_up: Callable[[], Tensor]) -> Tensor:
        """What `add_up` returns. When memory runs out it begins again with micro-batches of half the size, from the
        same random state, and they stay so; raises OutOfMemory when one row alone is too much."""
        random_state, before = _random_state(self._device), [_copy(p.grad) for p in self._trained]
        while True:
            try:
                return add_up()
            except memory.RAISED as error:
                if self._sharded or not memory.ran_out(error):
                    raise
                reason = str(error).splitlines()[0]
            # Out here the exception is gone, and with it what its frames held; threads' exceptions and frames hold each
            # other.
            gc.collect()
            if self._decoder is not None:
                self._decoder.forget()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            part = self._at_work
            own = sum(map(trie.input_length, part))
            if self.way != "padded":
                own = trie.own_tokens(part, share_prefix=self._settings.share_prefix)
            if len(part) < 2 or own < 2:
                raise OutOfMemory(
                    str(part[0].origin),
                    said("no memory for its {n} tokens ({reason})", n=len(part[0].token_ids), reason=reason),
                    said("room for one row"),
                    said("Set engine.recompute_layers=all, a smaller model.dtype, or data.max_length below it."),
                )
            self._limit = min(self._budget, own) // 2
            self._note(said("Memory ran out; engine.tokens_per_micro_batch is {n} from here on.", n=self._limit))
            for parameter, gradient in zip(self._trained, before, strict=True):
                parameter.grad = _copy(gradient)
            _set_random_state(random_state, self._device)

    def _share(self, documents: Sequence[Rendered]) -> list[tuple[list[Rendered], int]]:
        """This process's micro-batches, each with its weight: 1, or 0 where it only keeps step with the others."""
        if self._ranks.size == 1:
            return [(part, 1) for part in self._parts(documents)]
        shares = trie.deal(documents, self._ranks.size, share_prefix=self._settings.share_prefix)
        parts = [self._parts(share) for share in shares]
        mine = [(part, 1) for part in parts[self._ranks.rank]]
        if not self._sharded:
            return mine
        # Sharded weights are collected by all processes together, so all pass through the model equally often.
        return mine + [(list(documents[:1]), 0)] * (max(map(len, parts)) - len(mine))

    def _parts(self, documents: Sequence[Rendered]) -> list[list[Rendered]]:
        alone = [[document] for document in documents if self._goes_alone(document)]
        together = [document for document in documents if not self._goes_alone(document)]
        if not together:
            return alone
        if self.way == "padded":
            return _cut_padded(together, self._budget) + alone
        return trie.cut(together, self._budget, share_prefix=self._settings.share_prefix) + alone

    def _goes_alone(self, document: Rendered) -> bool:
        return len(document.token_ids) > self._longest_together

    def _part_gradient(
        self, documents: Sequence[Rendered], n_supervised: int, way: Way, weight: int = 1, scale: float = 1
    ) -> Tensor:
        self._forget_lengths()
        if way == "decoder":
            tree_batch, sight = self._tree(documents)
            assert self._decoder is not None
            return self._decoder.gradient(tree_batch, sight, n_supervised, dropout=self._model.training)
        with self._seen(documents, way) as inputs:
            loss = summed_loss(self._model, inputs) * weight / n_supervised
            (loss if scale == 1 else loss * scale).backward()
        return loss.detach()

    def _part_loss(self, documents: Sequence[Rendered], way: Way) -> Tensor:
        self._forget_lengths()
        if way == "decoder":
            assert self._decoder is not None
            return self._decoder.loss(*self._tree(documents))
        with self._seen(documents, way) as inputs:
            return summed_loss(self._model, inputs)

    def _tree(self, documents: Sequence[Rendered]) -> tuple[batch.Batch, attention.Sight]:
        whole = self._goes_alone(documents[0])
        tree = trie.lay_out(documents, share_prefix=self._settings.share_prefix, whole=whole)
        return batch.of_tree(tree).to(self._device), attention.sight(tree, self._backend, self._device)

    @contextmanager
    def _seen(self, documents: Sequence[Rendered], way: Way) -> Iterator[batch.Batch | batch.Padded]:
        if way == "padded":
            yield batch.pad(documents, self._device, whole=self._goes_alone(documents[0]))
            return
        tree_batch, sight = self._tree(documents)
        with attention.looking_through(sight, self._model):
            yield tree_batch

    def _forget_lengths(self) -> None:
        """transformers' dynamic rotary embedding keeps the frequencies of the longest row so far."""
        for module in self._dynamic_rotaries:
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq = module.original_inv_freq.to(module.inv_freq)

    @property
    def _backend(self) -> attention.Backend:
        if (asked := self._settings.attention) != "auto":
            return asked
        return "flex" if self._device.type == "cuda" and self._compiles else "gather"

    # --- is it right? ------------------------------------------------------------------------------------------------

    def _check_once(self, documents: Sequence[Rendered]) -> None:
        """Compares the way chosen with `padded` on a few of these documents' tokens; takes the next one if it differs.

        What was found right is remembered for the same model, settings and versions of the libraries. Of several
        processes each compares, and where one finds a difference all take the next way.
        """
        if self._checked or not self._settings.self_check:
            return
        self._checked = True
        self._go_to(max(self._ranks.gather(self._place())))
        if self.way == "padded":
            return
        mark = hub.cache_dir() / "self_checks" / self._key()
        found = mark.read_text(encoding="utf-8") if mark.exists() else ""
        remembered = self._ranks.gather(_WAYS.index(found) if found in _WAYS else None)
        if None not in remembered:
            self._go_to(max(remembered))
            return
        few, alike = _few_tokens(documents), True
        trained = [p for p in self._model.parameters() if p.requires_grad]
        # Products of 16 bits put two right computations up to a third apart, which would hide most mistakes.
        with _mode(self._model, training=False), _not_the_identity(self._model), _in_float32(self._model):
            expected = self._gradient_of(few, "padded", trained)
            while self.way != "padded":
                bound = _BOUND[torch.promote_types(self._dtype, torch.float32)]
                difference = self._difference(few, trained, expected)
                everywhere = self._ranks.gather(difference)
                right = [each < bound for each in everywhere]  # NaN is not
                alike = alike and len({*right}) == 1
                if all(right):
                    break
                difference = everywhere[right.index(False)]
                way = said("{way} way", way=self.way)
                if liger.installed(self._model):
                    way = said("tree way with Liger's kernels")
                if self._reason:
                    slower = said(
                        "The {way} can not be run here ({reason}); a slower one is taken. Please report it with the "
                        "model's name and the card's.",
                        way=way,
                        reason=self._reason,
                    )
                else:
                    slower = said(
                        "The {way} gives another gradient than plain transformers and peft for this model (relative "
                        "difference {difference:.1e}); a slower one is taken. Please report the model's name.",
                        way=way,
                        difference=difference,
                    )
                self._note(slower)
                self._go_to(self._place() + 1)
        memory.give_back()
        if not alike:  # what another process found says nothing about this machine
            return
        mark.parent.mkdir(parents=True, exist_ok=True)
        partial = mark.with_name(f".{mark.name}.{os.getpid()}")
        one_tree = self._device.type == "cpu" and liger.version(self._device) is None
        partial.write_text(self.way if one_tree else _WAYS[self._place()], encoding="utf-8")
        partial.replace(mark)

    def _place(self) -> int:
        """The place of the way at work in `_WAYS`."""
        way: str = self.way
        if way == "tree" and not liger.installed(self._model):
            way = _TREE_WITHOUT_LIGER if self._backend == "flex" else _TREE_GATHERED
        return _WAYS.index(way)

    def _go_to(self, place: int) -> None:
        """Takes the way at this place, from a faster one."""
        if place == _WAYS.index("padded"):
            self._take_padded()
        elif place and self.way == "decoder":
            self._take_tree()
        if _WAYS[place] in (_TREE_WITHOUT_LIGER, _TREE_GATHERED):
            liger.remove(self._model)
            self._compiles = self._compiles and _WAYS[place] != _TREE_GATHERED

    def _difference(self, documents: Sequence[Rendered], trained: Sequence[nn.Parameter], expected: Tensor) -> float:
        """Relative, of the gradient by the way chosen; infinite where kernels that are compiled can not be here."""
        self._reason = ""
        try:
            found = self._gradient_of(documents, self.way, trained)
        except Exception as error:  # Triton and its compilers raise what they like
            if memory.ran_out(error) or not (liger.installed(self._model) or self._backend == "flex"):
                raise
            self._reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            return math.inf
        return float((found - expected).norm() / expected.norm())

    def _gradient_of(self, documents: Sequence[Rendered], way: Way, trained: Sequence[nn.Parameter]) -> Tensor:
        before = [parameter.grad for parameter in trained]
        for parameter in trained:
            parameter.grad = None
        try:
            with _plain(self._model) if way == "padded" else nullcontext():
                self._part_gradient(documents, sum(document.n_supervised for document in documents), way)
            return torch.cat([_filled(p).flatten().double() for p in trained])
        finally:
            for parameter, gradient in zip(trained, before, strict=True):
                parameter.grad = gradient

    def _key(self) -> str:
        packages = ("tunesmith", "torch", "transformers", "peft")
        seen = {
            "config": self._model.get_base_model().config.to_json_string(use_diff=False),  # type: ignore[operator]
            "adapter": _in_order(self._model.peft_config["default"].to_dict()),
            "settings": self._settings.model_dump(),
            "versions": [importlib.metadata.version(name) for name in packages],
            "kernels": [onepass.version(), liger.version(self._device)],
            "split": self._decoder and [self._decoder.n_split, products.amx_attention() is not None],
            "kind": [self.way, self._backend, str(self._device.type), str(self._dtype)],
            "card": torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "",
        }
        return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:32]


def _in_order(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Sets have another order in each process."""
    return {
        name: sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
        for name, value in settings.items()
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def all_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether all of their numbers are finite; waits for a card."""
    return not gradients or bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all())


def _copy(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.clone()


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _filled(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _recompute(model: PeftModel, n_layers: int) -> None:
    """The lowest `n_layers` of transformers' layers keep nothing but their input."""
    if not n_layers:
        return
    cast("Any", model.get_base_model()).activation_checkpointing_enable()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[n_layers:]:
        layer.gradient_checkpointing = False


# --- transformers' own layers -----------------------------------------------------------------------------------------


def summed_loss(model: nn.Module, inputs: batch.Batch | batch.Padded) -> Tensor:
    """The micro-batch's loss, a scalar with a graph.

    Padded rows take the logits that the model itself gives, whatever it does to them, at predicting positions only
    where it lets us select them; they are the truth that other ways are compared with. A tree goes through the output
    layer in chunks where that is one plain matrix.
    """
    causal = _causal(model)
    if isinstance(inputs, batch.Batch):
        body, head = getattr(causal, causal.base_model_prefix, None), causal.get_output_embeddings()
        if body is not None and _plain_head(causal.config, head):
            hidden = (
                body(**_arguments(inputs), use_cache=False).last_hidden_state[0].index_select(0, inputs.predict_from)
            )
            softcap = getattr(causal.config.get_text_config(), "final_logit_softcapping", None)
            return cast("Tensor", HeadLoss.apply(hidden, head.weight, inputs.labels, softcap))
    return summed_cross_entropy(_logits(model, inputs), inputs.labels)


def losses(model: nn.Module, documents: Sequence[Rendered]) -> list[float]:
    """Each document's loss, summed over what is learned, by the model's own layers and logits, side by side."""
    inputs = batch.pad(documents, next(model.parameters()).device)
    with torch.inference_mode():
        each = [
            cross_entropy(logits, inputs.labels.part(start, start + len(logits)))
            for start, logits in _logits_in_chunks(model, inputs)
        ]
    return [part.sum().item() for part in torch.cat(each).split([document.n_supervised for document in documents])]


def _logits_in_chunks(model: nn.Module, inputs: batch.Padded) -> Iterator[tuple[int, Tensor]]:
    """Number of a chunk's first predicting position, and its logits (rows, V).

    The model gives those of the first chunk itself. Where its output layer alone makes the same of what its body gave,
    that makes the others; else the model is run again for each of them.
    """
    causal = _causal(model)
    body: Any = getattr(causal, causal.base_model_prefix, None)
    head: Any = causal.get_output_embeddings()
    config = causal.config.get_text_config()
    where = inputs.predict_from.nonzero()
    rows = chunk_rows(len(where), config.vocab_size, inputs.input_ids.device)
    if rows == len(where) or body is None or head is None:
        hidden, first = None, _logits(model, _only(inputs, where[:rows]))
    else:
        seen: list[Tensor] = []
        hook = body.register_forward_hook(lambda module, given, result: seen.append(result[0][inputs.predict_from]))
        try:
            first = _logits(model, _only(inputs, where[:rows]))
        finally:
            hook.remove()
        hidden = seen[0]
    yield 0, first
    softcap = getattr(config, "final_logit_softcapping", None)

    def alone(hidden: Tensor) -> Tensor:
        assert head is not None  # or there is no `hidden`
        logits = head(hidden)
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    if hidden is not None:
        bound = max(_BOUND[torch.float32], 4 * torch.finfo(first.dtype).eps) * first.abs().max()
        if not bool((alone(hidden[:rows]) - first).abs().max() <= bound):
            hidden = None
    del first
    for start in range(rows, len(where), rows):
        some = where[start : start + rows]
        yield start, _logits(model, _only(inputs, some)) if hidden is None else alone(hidden[start : start + rows])


def _only(inputs: batch.Padded, where: Tensor) -> batch.Padded:
    """With only these of the predicting positions, each a row and a place in it."""
    predict_from = torch.zeros_like(inputs.predict_from)
    predict_from[where[:, 0], where[:, 1]] = True
    return replace(inputs, predict_from=predict_from)


def _logits(model: nn.Module, inputs: batch.Batch | batch.Padded) -> Tensor:
    """(U, V), at predicting positions."""
    arguments = _arguments(inputs)
    if "logits_to_keep" in inspect.signature(_causal(model).forward).parameters:
        return model(**arguments, use_cache=False, logits_to_keep=inputs.predict_from).logits.flatten(0, -2)
    logits = model(**arguments, use_cache=False).logits
    return logits[inputs.predict_from if isinstance(inputs, batch.Padded) else (0, inputs.predict_from)]


def _arguments(inputs: batch.Batch | batch.Padded) -> dict[str, Tensor]:
    if isinstance(inputs, batch.Batch):
        return {"input_ids": inputs.input_ids[None], "position_ids": inputs.position_ids[None]}
    return {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}


def _causal(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _plain_head(config: Any, head: nn.Module | None) -> bool:
    config = config.get_text_config()
    return (
        type(head) is nn.Linear
        and head.bias is None
        and not head.weight.requires_grad
        and not any(getattr(config, name, None) not in (None, 1, 1.0) for name in _HEAD_SETTINGS)
    )


def not_packable(model: nn.Module) -> str | None:
    """Why documents in one row would see each other; None where they would not."""
    causal = _causal(model)
    config = causal.config.get_text_config()
    if causal.config.is_encoder_decoder:
        return said("the model has an encoder")
    modules = {type(module).__name__ for module in causal.modules() if not isinstance(module, Conv1D)}
    kinds = [*(getattr(config, "layer_types", None) or ()), *sorted(modules)]
    if recurrent := [kind for kind in kinds if any(word in kind.lower() for word in _RECURRENT)]:
        return said("the model has layers that are not attention ({kind})", kind=recurrent[0])
    if "chunked_attention" in kinds or getattr(config, "index_topk", None):
        return said("the model chooses the tokens it attends to by their place in the row")
    if not causal._supports_attention_backend:
        return said("{model} does not use transformers' attention interface", model=type(causal).__name__)
    if getattr(config, "attention_dropout", 0):
        return said("the model drops attention")
    return None


def longest_together(model: nn.Module) -> int:
    """The longest row that may lie beside others and lose what stands behind its last learned token: beyond, a rotary
    embedding counts the tokens. None may where an indexer picks the best keys of a row (DeepSeek 3.2)."""
    config = _causal(model).config.get_text_config()
    if getattr(config, "index_topk", None):
        return 0
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = list(parameters.values()) if any(isinstance(v, dict) for v in parameters.values()) else [parameters]
    limits = [2**62]
    for kind in kinds:
        if isinstance(kind, dict) and kind.get("rope_type") == "dynamic":
            limits.append(config.max_position_embeddings)
        elif isinstance(kind, dict) and kind.get("rope_type") == "longrope":
            limits.append(kind.get("original_max_position_embeddings") or config.max_position_embeddings)
    return min(limits)


def _cut_padded(documents: Sequence[Rendered], max_tokens: int) -> list[list[Rendered]]:
    """Groups of at most `max_tokens` tokens with padding, longest with longest; a longer document goes alone."""
    groups: list[list[Rendered]] = []
    for document in sorted(documents, key=trie.input_length, reverse=True):
        if groups and trie.input_length(groups[-1][0]) * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(document)
        else:
            groups.append([document])
    return groups


# --- the check --------------------------------------------------------------------------------------------------------


def _few_tokens(documents: Sequence[Rendered]) -> list[Rendered]:
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
def _mode(model: PeftModel, *, training: bool) -> Iterator[None]:
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
