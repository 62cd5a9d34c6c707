"""Base models: config, weights, and the type and device that they are opened in."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tunesmith import driver, hub, machines, model_files, reading
from tunesmith.data.template import Template
from tunesmith.errors import MissingExtra, ModelError, RecipeError, first_line
from tunesmith.language import said
from tunesmith.models import pretrained
from tunesmith.models.quiet import quietly
from tunesmith.recipe import ModelSettings


def device() -> torch.device:
    """The device that is trained and chatted on: a CUDA GPU where there is one, of several this process's own."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@quietly()
def load_config(folder: Path) -> PreTrainedConfig:
    """The model's config; raises ModelError when transformers does not build such a model itself."""
    return pretrained.config(folder)


def context_length(config: PreTrainedConfig) -> int:
    """How many tokens the model can read."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31)


def n_words(model: nn.Module) -> int:
    """How many token ids its input layer knows."""
    embeddings: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return int(embeddings.get_input_embeddings().weight.shape[0])


@quietly()
def generation_config(folder: Path, template: Template) -> GenerationConfig:
    """The model's own sampling settings with all stop ids of the template."""
    config = pretrained.generation(folder)
    config.eos_token_id = list(template.stop_ids)
    pad = template.tokenizer.pad_token_id
    config.pad_token_id = pad if isinstance(pad, int) else template.stop_ids[0]
    config.max_length = None  # counts the prompt too; chat bounds the reply instead
    return config


@quietly()
def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights (meta device)."""
    return pretrained.skeleton(config)


def published_in_bfloat16(folder: Path, config: PreTrainedConfig) -> bool:
    """Whether the layers' weights are bf16 numbers, whatever they are stored as: as far as one row of them tells, and
    where no weights are here by what a conversion would make of them, or by the config."""
    for path in sorted(folder.glob("*.safetensors")):
        with suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # a file of safetensors can not be iterated
                part = file.get_slice(name)
                if ".layers." in name and len(part.get_shape()) == 2:
                    row = part[:1]
                    return torch.equal(row.bfloat16().to(row.dtype), row)
    with suppress(OSError, ValueError, LookupError):
        return bool(reading.json_object(folder / NUMBERS, 1 << 10)["bfloat16"])
    return config.dtype == torch.bfloat16


NUMBERS = "numbers.json"
"""Beside a GGUF file's config and tokenizer: which numbers its weights are."""


_MOST_PACKED = 16  # numbers of a few bits that a file holds as one


@quietly()
def load_base(found: hub.LocalModel, settings: ModelSettings, where: torch.device | None = None) -> PreTrainedModel:
    """The frozen base model in evaluation mode, on this machine's device unless it is wanted on another.

    Raises ModelError when weights are missing, truncated or do not belong to the config, UnsupportedSystem for a card
    that torch has no kernels for.
    """
    driver.require_kernels()
    folder = found.folder
    if absent := hub.missing_parts(folder, weights=True):
        fix = said("Fetch it again, or name the right folder.")
        raise ModelError(str(folder), said("no {names}", names=", ".join(absent)), said("a whole model"), fix)
    held, wanted = model_files.n_numbers(sorted(folder.glob("*.safetensors"))), pretrained.size(folder).n_numbers
    if wanted > _MOST_PACKED * held:
        found_text = said("a config for {wanted:,} numbers, and weights of {held:,}", wanted=wanted, held=held)
        raise ModelError(str(folder), found_text, said("weights of the config's shape"), said("Fetch the model again."))
    arguments: dict[str, Any] = {"dtype": asked_dtype(settings.dtype, folder)}
    if settings.quantize == "nf4":
        arguments |= _nf4(arguments["dtype"])
    try:
        loaded: Any = pretrained.causal_lm(folder, use_safetensors=True, output_loading_info=True, **arguments)
    except ModelError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        found_text = said("weights that can not be read ({error})", error=first_line(error))
        raise ModelError(
            str(folder), found_text, said("weights of the config's shape"), said("Fetch the model again.")
        ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            str(folder),
            said(
                "no weights for {n} parts ({names})",
                n=len(missing),
                names=", ".join(missing[:3]) + " …" * (len(missing) > 3),
            ),
            said("weights for every part"),
            said("transformers would make them up at random; fetch the model again."),
        )
    model.requires_grad_(False)
    if settings.quantize == "none":
        model.to(where or device())
    return model.eval()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that are stacked, from the input up."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def asked_dtype(name: str, folder: Path) -> torch.dtype:
    if name == "auto":
        on_card = device().type == "cuda"
        name = card_dtype(machines.sixteen_bits(), pretrained.config(folder)) if on_card else "float32"
    return getattr(torch, name)


def card_dtype(sixteen_bits: machines.Sixteen, config: PreTrainedConfig) -> str:
    """The type that a model's weights are best held in on a card that multiplies in this one of 16 bits: that, but for
    models whose hidden states are larger than the largest number of fp16, 65,504 (Gemma 2, of whose attention's scores
    its authors say so, and Gemma 3): float32."""
    too_large = config.get_text_config().model_type in _LARGE_STATES
    return "float32" if sixteen_bits == "float16" and too_large else sixteen_bits


_LARGE_STATES = ("gemma2", "gemma3_text", "gemma3")


def _nf4(compute: torch.dtype) -> dict[str, Any]:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra("model.quantize=nf4", "gpu")
    if device().type != "cuda":
        raise RecipeError("model.quantize", said("nf4 on a CPU"), said("a CUDA GPU"), said("Leave it at none."))
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": quantization, "device_map": {"": device()}}
