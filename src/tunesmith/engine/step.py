"""The gradient of a step, by the fastest way that is right for the model at hand.

`decoder`: layers written by hand, over trees. `tree`: transformers' own layers, over trees. `padded`: transformers' own
layers, rows side by side; works for every model. Before the first step of a model, the way that is taken is checked,
and left if it is wrong.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from tunesmith.engine import attention, check, trie
from tunesmith.engine.cpu import memory
from tunesmith.engine.cpu.by_hand import ByHand
from tunesmith.engine.cpu.layers import NotCovered
from tunesmith.engine.hf import compiler
from tunesmith.engine.hf.along import GATHERED, WITH_LIGER, Along
from tunesmith.engine.hf.padded import Padded
from tunesmith.engine.packing import longest_together, not_packable
from tunesmith.engine.ranks import Ranks
from tunesmith.engine.trees import Trees
from tunesmith.engine.way import Kind, Way
from tunesmith.errors import OutOfMemory
from tunesmith.language import said
from tunesmith.recipe import EngineSettings
from tunesmith.types import Rendered

TOKENS = {"cpu": 2048, "cuda": 16384}
# Of fp16's gradients: the power of two that what one token says of the loss is multiplied by, so that it is not
# rounded to zero on its way; a sum over many tokens may then be more than 65,504, and the power is lowered.
_FIRST_EXPONENT, _LEAST_EXPONENT = 8, -24


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
        self._checked = False
        self._limit = 2**62
        self._exponent = _FIRST_EXPONENT
        self._in_hand: Sequence[Rendered] = ()
        self._longest_together = longest_together(model)
        n_layers = int(cast("Any", model.get_base_model()).config.get_text_config().num_hidden_layers)
        asked = settings.recompute_layers
        self._recomputed = asked if isinstance(asked, int) else n_layers if asked == "all" else 0
        self._backend: attention.Backend = _backend(settings, self._device)
        _recompute(model, self._recomputed)
        self.at_work: Way = Padded(model)
        """The way by which steps are computed."""
        if reason := not_packable(model):
            note(said("Rows are trained side by side with padding: {reason}.", reason=reason))
            return
        if self._device.type == "cuda" and (lack := compiler.lacking()) is not None:
            slower = said("Slower kernels are used: Triton finds {lack}. {fix}", lack=lack, fix=compiler.fix())
            note(slower)
        self.at_work = self._fastest()
        memory.give_back()

    def _fastest(self) -> Way:
        if self._device.type == "cpu" and not self._sharded:
            try:
                way = ByHand(self._model, self._trees(self._backend), self._recomputed)
            except NotCovered as reason:
                text = said("transformers' own layers are used: {reason} is not written by hand.", reason=str(reason))
                self._note(text)
            else:
                if self._dtype.itemsize == 2:
                    dtype = str(self._dtype).removeprefix("torch.")
                    self._note(said("Weights stay in {dtype}; products are computed in float32.", dtype=dtype))
                elif way.decoder.narrowed:
                    kept = said("Weights that are bfloat16 numbers are kept as such; products are computed in float32.")
                    self._note(kept)
                return way
        return self._along(WITH_LIGER)

    def _along(self, name: str) -> Along:
        """Transformers' own layers along a tree; `name` says with which kernels, as far as they are here."""
        trees = self._trees("gather" if name == GATHERED and self._backend == "flex" else self._backend)
        way = Along(self._model, trees, with_liger=name == WITH_LIGER)
        if way.n_by_peft and name == WITH_LIGER:
            n = way.n_by_peft
            self._note(said("{n} adapters are not plain LoRA on a linear layer; peft applies them.", n=n))
        return way

    def _trees(self, backend: attention.Backend) -> Trees:
        return Trees(self._device, backend, self._settings.share_prefix, self._longest_together)

    @property
    def way(self) -> Kind:
        """How steps are computed."""
        return self.at_work.kind

    def take(self, name: str) -> Way:
        """Leaves the way at work for a slower one, by its name (see `check.WAYS`)."""
        self.at_work.close()
        self.at_work = Padded(self._model) if name == "padded" else self._along(name)
        return self.at_work

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

    def close(self) -> None:
        """Gives the model's weights back in the type that they had, for transformers' own layers. No step may
        follow."""
        self.at_work.close()

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
                self._in_hand = part
                total += self.at_work.gradient(part, n_supervised, weight=weight, scale=scale)
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
                self._in_hand = part
                total += self.at_work.loss(part) * weight
            return total

        with torch.no_grad(), check.mode(self._model, training=False):
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
            self.at_work.forget()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            part = self._in_hand
            own = self.at_work.layout.n_tokens(part)
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
        return (self.at_work.layout.cut(together, self._budget) if together else []) + alone

    def _goes_alone(self, document: Rendered) -> bool:
        return len(document.token_ids) > self._longest_together

    def _check_once(self, documents: Sequence[Rendered]) -> None:
        """Lets the way at work be checked on a few of these documents' tokens, which may end in a slower one."""
        if not self._checked and self._settings.self_check:
            self._checked = True
            asked = check.Asked(self._model, self._settings, self._dtype, self._backend)
            check.settle(asked, self.at_work, self.take, documents, self._ranks, self._note)


def _backend(settings: EngineSettings, device: torch.device) -> attention.Backend:
    """Who computes attention along a tree."""
    if settings.attention != "auto":
        return settings.attention
    return "flex" if device.type == "cuda" and compiler.lacking() is None else "gather"


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


def _recompute(model: PeftModel, n_layers: int) -> None:
    """The lowest `n_layers` of transformers' layers keep nothing but their input."""
    if not n_layers:
        return
    cast("Any", model.get_base_model()).activation_checkpointing_enable()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[n_layers:]:
        layer.gradient_checkpointing = False
