"""How transformers and peft open a folder that somebody else wrote; every such call stands here.

No code of a folder or of a hub is run, nobody is asked whether it may, and nothing is fetched. Before a model is built
its config is tried in a process that a limit can end: it may ask for any number of layers.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftModel
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.quantization_config import Mxfp4Config

from tunesmith import model_files
from tunesmith.confined import Ended, WorkFailed, confined
from tunesmith.errors import ModelError
from tunesmith.language import said

_HERE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
_SECONDS = 4  # DeepSeek-V3 (671 billion numbers, 61 layers of 257 experts) is built in 0.3
_MORE_BYTES = 768 << 20
_MOST_NUMBERS = 10**13
_MOST_BUFFER_BYTES = 1 << 30  # what a model computes for itself when it is loaded: masks, angles
_MOST_MODULES = 500_000


class Size(NamedTuple):
    """What a config asks for."""

    n_numbers: int
    n_buffer_bytes: int
    n_modules: int


@contextmanager
def _nobody_is_asked() -> Iterator[None]:
    """Standard input is empty while this holds: transformers asks there whether code may be run, where a model inside
    a model is built without the argument that says no."""
    with open(os.devnull, encoding="utf-8") as nowhere:
        asked, sys.stdin = sys.stdin, nowhere
        try:
            yield
        finally:
            sys.stdin = asked


def config(folder: Path, **file: Any) -> PreTrainedConfig:
    """The folder's config (or that of its `gguf_file`).

    Raises ModelError where transformers builds no such model itself, or where none of that size could be built.
    """
    size(folder, **file)
    with _nobody_is_asked():
        return AutoConfig.from_pretrained(folder, **_HERE, **file)


def size(folder: Path, **file: Any) -> Size:
    """What the folder's config asks for; raises ModelError as `config` does."""
    model_files.check(folder)
    read = model_files.settings(folder / "config.json")
    written = [(folder / name).stat().st_mtime_ns for name in file.values()]
    return _tried(str(folder), hashlib.sha256(json.dumps([read, written]).encode()).digest(), **file)


@cache
def _tried(folder: str, digest: bytes, **file: Any) -> Size:
    """`size`, found out once for each state of a config."""
    with suppress(Exception):  # what is imported by the trial alone is imported again
        model_type = model_files.settings(Path(folder) / "config.json")["model_type"]
        MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    expected = said("an architecture that transformers {version} builds itself", version=transformers.__version__)
    fix = said("Remote code is never run; a newer transformers may know the model.")

    def build() -> list[int]:
        with _nobody_is_asked():
            built = skeleton(AutoConfig.from_pretrained(folder, **_HERE, **file))
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in built.buffers())
        return [sum(parameter.numel() for parameter in built.parameters()), buffers, sum(1 for _ in built.modules())]

    try:
        found = Size(*confined(build, seconds=_SECONDS, more_bytes=_MORE_BYTES))
    except WorkFailed as error:
        raise ModelError(folder, said("a config that can not be read ({error})", error=error), expected, fix) from None
    except Ended as ended:
        found_text = said("a config whose model takes {what} to lay out, without its weights", what=ended)
        raise ModelError(
            folder, found_text, said("the config of a model that exists"), said("Fetch the model again.")
        ) from None
    if found.n_numbers > _MOST_NUMBERS or found.n_buffer_bytes > _MOST_BUFFER_BYTES or found.n_modules > _MOST_MODULES:
        found_text = said(
            "a config that asks for {n:,} numbers in {parts:,} parts",
            n=found.n_numbers,
            parts=found.n_modules,
        )
        raise ModelError(folder, found_text, said("the config of a model that exists"), said("Fetch the model again."))
    return found


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config without memory for its weights (meta device)."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def empty(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config in fp32, with weights that are to be replaced."""
    return AutoModelForCausalLM.from_config(in_float32(config), dtype=torch.float32, trust_remote_code=False)


def in_float32(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same config for weights in fp32 that are not quantised."""
    config = AutoConfig.for_model(**{k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    config.dtype = "float32"
    return config


def tokenizer(folder: Path, **file: Any) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; raises what transformers raises, and ModelError for files that must not be opened."""
    model_files.check(folder)
    with _nobody_is_asked():
        return AutoTokenizer.from_pretrained(folder, **_HERE, **file)


def causal_lm(folder: Path, **how: Any) -> Any:
    """The folder's model; raises what transformers raises, and ModelError for files that must not be opened."""
    model_files.check(folder)
    if (path := folder / "adapter_config.json").is_file():  # transformers would put the adapter into the model
        fix = said("Move it to a folder of its own.")
        raise ModelError(str(path), said("an adapter beside a model's weights"), said("the model alone"), fix)
    if model_files.settings(folder / "config.json").get("quantization_config", {}).get("quant_method") == "mxfp4":
        # Left as they are, those weights are multiplied by a kernel that is fetched from a hub; nor can they be tuned.
        how.setdefault("quantization_config", Mxfp4Config(dequantize=True))
    with _nobody_is_asked():
        return AutoModelForCausalLM.from_pretrained(folder, **_HERE, **how)


def generation(folder: Path, **changes: Any) -> GenerationConfig:
    """The folder's generation config with some changes, or one with them alone where there is none.

    Raises ModelError for one that can not be read or asks for more than sampling.
    """
    model_files.check(folder)
    path = folder / "generation_config.json"
    if not path.is_file():
        return GenerationConfig(**changes)
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True, **changes)
    except Exception as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(
            str(path), said("settings that can not be read ({text})", text=text), said("a whole file"), said("Mend it.")
        ) from error


def with_adapter(base: PreTrainedModel | PeftModel, folder: Path, name: str) -> PeftModel:
    """The base with a saved adapter, with one more where it has some; raises what peft raises, and ModelError for
    settings that must not be followed."""
    read = model_files.check_adapter(folder)
    _require_room(base, folder, read)
    if isinstance(base, PeftModel):
        base.load_adapter(str(folder), name, is_trainable=False, local_files_only=True)
        return base
    return PeftModel.from_pretrained(base, str(folder), name, is_trainable=False, local_files_only=True)


def _require_room(base: PreTrainedModel | PeftModel, folder: Path, read: dict[str, Any]) -> None:
    """Raises ModelError for an adapter whose rank asks for many times the numbers that its file holds: peft makes room
    for them all before it looks."""
    names, layers = read.get("target_modules") or [], read.get("layers_to_transform")
    names = [names] if isinstance(names, str) else names
    rank = max([read.get("r", 8), *(read.get("rank_pattern") or {}).values()])
    wanted = 0
    for path, module in base.named_modules():
        sides: list[Any] = [getattr(module, "in_features", None), getattr(module, "out_features", None)]
        if None not in sides and (names == ["all-linear"] or any(f".{path}".endswith(f".{name}") for name in names)):
            wanted += rank * sum(sides)
    if layers is not None:
        n_layers = base.config.get_text_config().num_hidden_layers
        wanted = wanted * len(layers if isinstance(layers, list) else [layers]) // max(1, n_layers)
    held = model_files.n_numbers([folder / "adapter_model.safetensors"])
    if wanted > 4 * held and wanted > 1 << 24:
        found = said("settings for {wanted:,} numbers, and a file with {held:,}", wanted=wanted, held=held)
        raise ModelError(
            str(folder), found, said("settings and weights of one adapter"), said("Copy the adapter again.")
        )
