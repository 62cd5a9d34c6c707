"""LoRA adapters through peft: made, loaded, switched, saved."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteria

from tunesmith import model_files
from tunesmith.errors import ModelError, ProofError, first_line
from tunesmith.language import said
from tunesmith.models import pretrained
from tunesmith.models.adaptable import targets
from tunesmith.models.quiet import quietly
from tunesmith.recipe import LoraSettings


@quietly()
def attach(base: PreTrainedModel, settings: LoraSettings, seed: int, base_name: str) -> PeftModel:
    """The base with a fresh adapter; the adapter alone is trainable and kept in fp32.

    `base_name` is what the adapter's config says it belongs to: a hub id or a folder.
    """
    names = [target.name for target in targets(base, settings)]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=_whole(settings.alpha),
        lora_dropout=settings.dropout,
        target_modules=names,
        use_rslora=settings.variant == "rslora",
        use_dora=settings.variant == "dora",
        init_lora_weights="pissa" if settings.variant == "pissa" else True,
    )
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    model.peft_config["default"].base_model_name_or_path = base_name
    return model


@quietly()
def load_adapter(base: PreTrainedModel | PeftModel, folder: Path, name: str = "default") -> PeftModel:
    """The base with a saved adapter, not trainable, in evaluation mode; with one more where it has some already.

    Raises ModelError when the adapter's tensors do not fit the base, or when it would change nothing.
    """
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        fix = said("Name a run's folder or its adapter/ folder.")
        raise ModelError(str(folder), said("no adapter_model.safetensors"), said("a peft adapter"), fix)
    model_files.shapes(path)
    expected = said("one made for {model} of this shape", model=base.config.model_type)
    fix = said("Use the base that it was trained on.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = pretrained.with_adapter(base, folder, name)
    except ModelError:
        raise
    except Exception as error:  # peft raises what it likes
        found = said("an adapter that does not fit ({error})", error=first_line(error))
        raise ModelError(str(folder), found, expected, fix) from error
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    with safe_open(path, framework="pt") as file:
        surplus, absent = sorted(set(file.keys()) - state.keys()), sorted(state.keys() - set(file.keys()))
    if absent:  # of a second adapter peft does not tell
        raise ModelError(str(folder), said("an adapter that does not fit (no {name})", name=absent[0]), expected, fix)
    if surplus:  # peft leaves them out without a word
        found = said(
            "an adapter with {n} tensors for layers that are not there ({name})", n=len(surplus), name=surplus[0]
        )
        raise ModelError(str(folder), found, expected, fix)
    if not any(bool(tensor.any()) for key, tensor in state.items() if "lora_B" in key):
        found = said("an adapter whose lora_B is all zero")
        fix = said("It was saved before training; use another checkpoint.")
        raise ModelError(str(folder), found, said("one that changes the base"), fix)
    if base.device.type == "cuda":
        take_type_of_base(model)
    return model.eval()


def take_type_of_base(model: PeftModel) -> None:
    """Puts every plain adapter into the type of the layer that it stands beside, as which it is multiplied in training
    (`engine.lora`); in fp32 peft turns what comes in into fp32 at every layer, and what goes out back."""
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or layer.lora_variant:
            continue
        if (dtype := _computed_in(layer.get_base_layer())) is not None:
            for part in (layer.lora_A, layer.lora_B):
                part.to(dtype)


def _computed_in(layer: nn.Module) -> torch.dtype | None:
    """The type of what a linear layer gives, where it is one of 16 bits."""
    dtype = getattr(layer, "compute_dtype", None) or getattr(getattr(layer, "weight", None), "dtype", None)
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def switched(model: nn.Module, adapter: str | None) -> AbstractContextManager[Any]:
    """While it holds, the model has this one of its adapters; None: it is the base alone."""
    if not isinstance(model, PeftModel):
        return nullcontext()
    if adapter is None:
        return model.disable_adapter()
    if model.active_adapter != adapter:
        model.set_adapter(adapter, inference_mode=True)
    return nullcontext()


class Cancelled(StoppingCriteria):
    """Ends `generate` behind the token at which it is cancelled."""

    def __init__(self, cancelled: Callable[[], bool]) -> None:
        self._cancelled = cancelled

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._cancelled(), device=input_ids.device, dtype=torch.bool)


def save_adapter(model: PeftModel, folder: Path, pissa_start: Path | None = None) -> None:
    """Writes the adapter in peft's format and proves that the file holds finite numbers.

    A pissa adapter changes its base when it starts; `pissa_start` is the folder of the adapter as it was then, and
    what is written fits the unchanged base. Raises ProofError for a number that is not finite; nothing is left then.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            fix = said("Lower train.learning_rate; nothing was saved.")
            raise ProofError(name, said("a number that is not finite"), said("finite adapter weights"), fix)
    # Embeddings are never resized; left to itself, peft would ask the hub how large they were.
    extra: dict[str, Any] = {"save_embedding_layers": False}
    if pissa_start:
        extra["path_initial_model_for_weight_conversion"] = str(pissa_start)
    card = folder / "README.md"  # peft fills in what is there, and compiles a template where nothing is: 25 ms
    folder.mkdir(parents=True, exist_ok=True)
    card.write_text("---\n{}\n---\n")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="PiSSA changes the base weights")  # the conversion is what it advises
        model.save_pretrained(str(folder), safe_serialization=True, **extra)
    card.unlink(missing_ok=True)  # a run writes its own


def _whole(number: float) -> Any:  # peft says int and takes any number
    return int(number) if math.isfinite(number) and number == int(number) else number
