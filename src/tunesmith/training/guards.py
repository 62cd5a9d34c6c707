"""What is watched while training: numbers that are not finite, adapters that learn nothing, losses that look wrong."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from tunesmith.engine import batch
from tunesmith.engine.hf import lora
from tunesmith.engine.hf.losses import summed_loss
from tunesmith.errors import ProofError
from tunesmith.language import marked, said
from tunesmith.runs import rundir
from tunesmith.runs.rundir import RunDir
from tunesmith.types import Rendered

NOT_FINITE = "not_finite.json"
# Settings of a config by which some layers rest: experts that no token was sent to, keys taken over from other layers.
_RESTING = ("num_experts", "num_local_experts", "n_routed_experts", "num_kv_shared_layers")


# --- numbers that are not finite --------------------------------------------------------------------------------------


def stop_not_finite(where: str, found: str, run: RunDir, model: PeftModel, documents: Sequence[Rendered]) -> NoReturn:
    """Writes the rows with their token ids to not_finite.json, looks for the first place that went wrong in a second
    pass, and raises ProofError with both."""
    first = first_not_finite(model, documents)
    rows = [{"row": str(document.origin), "token_ids": list(document.token_ids)} for document in documents]
    rundir.write_text(
        run.path / NOT_FINITE, json.dumps({"where": where, "found": found, "first": first, "rows": rows}, indent=1)
    )
    lines = list(dict.fromkeys(str(document.origin) for document in documents))
    rows_named = ", ".join(lines[:4])
    if len(lines) > 4:
        rows_named = said("{rows} and {n} more rows", rows=rows_named, n=len(lines) - 4)
    raise ProofError(
        said("{where} ({rows})", where=where, rows=rows_named),
        f"{found}; {first}",
        said("finite numbers"),
        said(
            "The step was not applied and no adapter was saved; checkpoints are as they were. Lower "
            "train.learning_rate, or look at the rows: their token ids are in {file}.",
            file=run.path / NOT_FINITE,
        ),
    )


def first_not_finite(model: PeftModel, documents: Sequence[Rendered]) -> str:
    """Where plain transformers and peft first give a number that is not finite for these rows, in words."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return said("{name} holds a weight that is not finite", name=_plain_name(name))
    device = next(model.parameters()).device
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    was_training = model.training
    model.eval()
    try:
        with lora.removed(model):
            for document in documents:
                model.zero_grad()
                with _seen(model) as seen, warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # embeddings
                    summed_loss(model, batch.pad([document], device)).backward()
                if seen:
                    return said("{found} for {row}", found=seen[0], row=document.origin)
    finally:
        model.train(was_training)
        for parameter, gradient in kept:
            parameter.grad = gradient
    return said("plain transformers and peft give finite numbers for the same rows, so it came and went: try `resume`")


@contextmanager
def _seen(model: PeftModel) -> Iterator[list[str]]:
    """Inside, places whose results are not finite come into the list in the order in which they are computed."""
    seen: list[str] = []

    def watch(name: str, module: nn.Module) -> list[Any]:
        def forward(module: nn.Module, given: Any, result: Any) -> None:
            if not _finite(result):
                seen.append(said("the first result that is not finite is that of {name}", name=name))

        def backward(module: nn.Module, of_input: Any, of_result: Any) -> None:
            if not _finite(of_input):
                seen.append(said("the first gradient that is not finite is that of the input of {name}", name=name))

        hooks: list[Any] = [module.register_forward_hook(forward)]
        if not any(True for _ in module.children()):
            hooks.append(module.register_full_backward_hook(backward))
        return hooks

    hooks = [hook for name, module in model.named_modules() if name for hook in watch(_plain_name(name), module)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _finite(result: Any) -> bool:
    if isinstance(result, Tensor):
        return not result.is_floating_point() or bool(torch.isfinite(result).all())
    if isinstance(result, dict):
        return all(map(_finite, result.values()))
    return all(map(_finite, result)) if isinstance(result, list | tuple) else True


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".default", "")


# --- adapters that learn nothing --------------------------------------------------------------------------------------


def require_gradients(model: PeftModel) -> None:
    """Raises ProofError unless every matrix of the adapter has a gradient after the first backward pass, and every
    lora_B one that is not zero (those of lora_A are zero as long as lora_B is)."""
    idle = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or ("lora_B" in name and not bool(parameter.grad.any()) and not _may_rest(model)))
    ]
    _require_none(idle, marked("{n} adapter matrices without a gradient in step 1"))


def signatures(model: PeftModel) -> dict[str, tuple[float, float]]:
    """Two numbers for each lora_B that change when it does."""
    return {
        name: (parameter.double().sum().item(), parameter.double().norm().item())
        for name, parameter in model.named_parameters()
        if "lora_B" in name
    }


def require_moved(model: PeftModel, before: dict[str, tuple[float, float]]) -> None:
    """Raises ProofError for a lora_B that is as it was."""
    now = signatures(model)
    _require_none(
        [] if _may_rest(model) else [name for name in now if now[name] == before[name]],
        marked("{n} adapter matrices still after step 2"),
    )


def _require_none(names: Sequence[str], what: str) -> None:
    if names:
        raise ProofError(
            _plain_name(names[0]),
            said(what, n=len(names)),
            said("all of them learning"),
            said(
                "This is a fault of tunesmith or of the model's code; please report the model's name. "
                "lora.targets leaves layers out."
            ),
        )


def _may_rest(model: PeftModel) -> bool:
    config = cast("Any", model.get_base_model()).config.get_text_config()
    return any(getattr(config, name, None) for name in _RESTING)


# --- losses that look wrong -------------------------------------------------------------------------------------------


class Losses:
    """Notices a loss that explodes or sits at zero, and says each once."""

    _MEMORY = 0.8
    _LEAST_STEPS = 8
    _ZERO = 1e-3

    def __init__(self) -> None:
        self._n = 0
        self._mean = 0.0
        self._best = math.inf
        self._said: set[str] = set()

    def odd(self, loss: float) -> str | None:
        """What is wrong with the losses up to this one; None where nothing is, or it has been said."""
        self._n += 1
        self._mean = self._MEMORY * self._mean + (1 - self._MEMORY) * loss
        mean = self._mean / (1 - self._MEMORY**self._n)
        if self._n >= self._LEAST_STEPS:
            self._best = min(self._best, mean)
            if mean > 1.5 * self._best + 0.5 and "explodes" not in self._said:
                self._said.add("explodes")
                return said(
                    "The loss rises: {best:.2f} at its best, {now:.2f} now. A lower train.learning_rate or a "
                    "longer warm-up (train.warmup_ratio) usually helps.",
                    best=self._best,
                    now=mean,
                )
            if mean < self._ZERO and "zero" not in self._said:
                self._said.add("zero")
                return said(
                    "The loss is almost zero: the model knows these rows by heart. More epochs teach it nothing; "
                    "the held-out loss says whether it still generalises."
                )
        return None
