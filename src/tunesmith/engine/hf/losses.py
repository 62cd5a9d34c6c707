"""Losses of a micro-batch by transformers' own layers and logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.engine import batch
from tunesmith.engine.loss import HeadLoss, chunk_rows, cross_entropy, summed_cross_entropy
from tunesmith.engine.packing import without_adapter
from tunesmith.types import Rendered

# Settings of a config that change what the output layer gives; for those the model is asked for the logits itself.
_HEAD_SETTINGS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale", "mup_width_scale")
_ALIKE = 2e-3
"""Largest relative difference of logits that one output layer gives twice."""


def summed_loss(model: nn.Module, inputs: batch.Batch | batch.Padded) -> Tensor:
    """The micro-batch's loss, a scalar with a graph.

    Padded rows take the logits that the model itself gives, whatever it does to them, at predicting positions only
    where it lets us select them; they are the truth that other ways are compared with. A tree goes through the output
    layer in chunks where that is one plain matrix.
    """
    causal = without_adapter(model)
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
    causal = without_adapter(model)
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
        bound = max(_ALIKE, 4 * torch.finfo(first.dtype).eps) * first.abs().max()
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
    if "logits_to_keep" in inspect.signature(without_adapter(model).forward).parameters:
        return model(**arguments, use_cache=False, logits_to_keep=inputs.predict_from).logits.flatten(0, -2)
    logits = model(**arguments, use_cache=False).logits
    return logits[inputs.predict_from if isinstance(inputs, batch.Padded) else (0, inputs.predict_from)]


def _arguments(inputs: batch.Batch | batch.Padded) -> dict[str, Tensor]:
    if isinstance(inputs, batch.Batch):
        return {"input_ids": inputs.input_ids[None], "position_ids": inputs.position_ids[None]}
    return {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}


def _plain_head(config: Any, head: nn.Module | None) -> bool:
    config = config.get_text_config()
    return (
        type(head) is nn.Linear
        and head.bias is None
        and not head.weight.requires_grad
        and not any(getattr(config, name, None) not in (None, 1, 1.0) for name in _HEAD_SETTINGS)
    )
