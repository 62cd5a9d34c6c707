"""The loss of a micro-batch: summed, so that a step's sum can be divided once by the step's count."""

from __future__ import annotations

import inspect

import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from tunesmith.engine.batch import Batch


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy in fp32, summed over the supervised tokens of the batch; a scalar with a graph.

    Only positions that predict a supervised token go through the output layer where the model can select them
    (`logits_to_keep`): 600 of 4,096 positions with 151,936 words are 0.85 instead of 5.8 GiB.
    """
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if _selects(model):
        logits_NV = model(**inputs, logits_to_keep=batch.predict_from).logits
    else:
        logits_NV = model(**inputs).logits[batch.predict_from]
    return F.cross_entropy(logits_NV.reshape(-1, logits_NV.shape[-1]).float(), batch.targets, reduction="sum")


def _selects(model: nn.Module) -> bool:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
