"""Weights as safetensors: GGUF and `.bin` are converted once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from tunesmith import hub, model_files
from tunesmith.confined import Ended, WorkFailed, confined
from tunesmith.errors import ModelError, first_line
from tunesmith.language import said
from tunesmith.models import pretrained
from tunesmith.models.base import NUMBERS
from tunesmith.models.quiet import quietly


def needs_preparing(found: hub.LocalModel, *, weights: bool = True) -> bool:
    """The folder's weights are in another form than safetensors; without `weights`, its config and tokenizer are."""
    return any(weights or source.suffix == ".gguf" for source in _to_convert(found.folder))


def prepared(found: hub.LocalModel, *, weights: bool = True) -> hub.LocalModel:
    """The model in a folder with safetensors: itself, or a conversion of its GGUF or `.bin` weights made once.

    Without `weights`, a folder with config and tokenizer is enough.
    """
    folder = found.folder
    if not needs_preparing(found, weights=weights):
        return found
    sources = _to_convert(folder)
    model_files.check(folder)
    of_gguf = sources[0].suffix == ".gguf"
    version = "-bf16" if of_gguf else ""  # what quantised weights are rounded to; another one makes another folder
    ready = hub.cache_dir() / "converted" / f"{folder.name}-{_state(folder)}{version}"
    if not weights and not ready.is_dir():
        ready = ready.with_name(f"{ready.name}-without-weights")
    if not ready.is_dir():
        partial = ready.with_name(f".{ready.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        try:
            if of_gguf:
                _convert_gguf(folder, sources[0], partial, weights=weights)
            else:
                _convert_bins(folder, sources, partial)
            try:
                partial.rename(ready)
            except OSError:  # another process was faster
                if not ready.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return hub.LocalModel(ready, found.source, found.revision, found.alias)


def _to_convert(folder: Path) -> list[Path]:
    heavy = [folder / name for name in hub.weight_files(path.name for path in folder.iterdir() if path.is_file())]
    return [path for path in heavy if path.suffix != ".safetensors"]


def _state(folder: Path) -> str:
    """Sixteen digits that change when a file of the folder does; a conversion belongs to one such state."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    seen = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([str(folder.absolute()), seen]).encode()).hexdigest()[:16]


@quietly()
def _convert_gguf(folder: Path, path: Path, out: Path, *, weights: bool) -> None:
    held = model_files.check_gguf(path)
    file: dict[str, Any] = {"gguf_file": path.name}
    try:
        with _reading_once():
            quantised = is_quantised(path)
            if (wanted := pretrained.size(folder, **file).n_numbers) > 2 * held:
                raise ValueError(f"settings for {wanted:,} numbers, and {held:,} in the file")
            tokenizer = pretrained.tokenizer(folder, **file)
            loaded = pretrained.causal_lm(folder, dtype=torch.float32, **file) if weights else None
            config = pretrained.config(folder, **file) if loaded is None else loaded.config
    except Exception as error:  # transformers and gguf raise what they like
        found = said("a GGUF file that can not be read ({error})", error=first_line(error))
        expected = said("an architecture and a quantization that transformers reads")
        raise ModelError(str(path), found, expected, said("Fetch it again, or use the model's safetensors.")) from error
    special = {name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    generation = GenerationConfig(**{name: i for name, i in special.items() if i is not None})
    # Numbers of a few bits stand for published ones, which are bf16 as a rule, and cheaper to multiply as such.
    if loaded is None:
        (out / NUMBERS).write_text(json.dumps({"bfloat16": quantised}), encoding="utf-8")
        fresh = pretrained.skeleton(pretrained.in_float32(config))
        fresh.config.architectures = [type(fresh).__name__]
        fresh.config.save_pretrained(out)
        generation.save_pretrained(out)
    else:
        # A model read from GGUF keeps a quantizer that refuses to save or train; its numbers go into a fresh one.
        fresh = pretrained.empty(config)
        fresh.load_state_dict(loaded.state_dict())
        for parameter in fresh.parameters() if quantised else ():
            if parameter.dim() > 1:
                parameter.data.copy_(parameter.data.bfloat16())
        fresh.generation_config = generation
        fresh.save_pretrained(out)
    tokenizer.save_pretrained(out)
    if (template := folder / "chat_template.jinja").is_file():  # said beside the file, it goes before what is in it
        shutil.copyfile(template, out / template.name)


def is_quantised(path: Path) -> bool:
    whole = {gguf.GGMLQuantizationType[name] for name in ("F64", "F32", "F16", "BF16")}
    return any(tensor.tensor_type not in whole for tensor in gguf.GGUFReader(str(path)).tensors)


@contextmanager
def _reading_once() -> Iterator[None]:
    """transformers reads the head of a GGUF file anew for tokenizer, config and weights, seconds each time for a
    vocabulary of 50,000; while this holds, it is given the reader that it had before."""
    reader = gguf.GGUFReader
    gguf.GGUFReader = cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def _convert_bins(folder: Path, bins: Sequence[Path], out: Path) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for number, path in enumerate(bins, 1):
        tensors = _read_bin(path)
        name = f"model-{number:05}-of-{len(bins):05}.safetensors" if len(bins) > 1 else "model.safetensors"
        save_file(tensors, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(value.numel() * value.element_size() for value in tensors.values())
    if len(bins) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for path in folder.iterdir():
        if path.is_file() and path.suffix in (".json", ".model", ".jinja", ".txt") and "pytorch_model" not in path.name:
            shutil.copyfile(path, out / path.name)


def _read_bin(path: Path) -> dict[str, torch.Tensor]:
    model_files.check_bin(path)
    size = path.stat().st_size

    def read() -> dict[str, torch.Tensor]:
        # Files of torch before 1.6 are no zip archives and can not be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError("something else than tensors by name")
        sizes = [value.numel() * value.element_size() for value in state.values()]
        if max(sizes, default=0) > size or sum(sizes) > 4 * size:  # two names may share a tensor
            raise ValueError(f"tensors of {sum(sizes):,} bytes in a file of {size:,}")
        return state

    fix = said("Pickles that hold code are never run; fetch the model again, or a revision with safetensors.")
    try:
        # What a pickle builds is known only when it is built.
        confined(lambda: len(read()), seconds=6 + size // (50 << 20), more_bytes=2 * size + (512 << 20))
        return {name: value.detach().clone().contiguous() for name, value in read().items()}
    except Ended as ended:
        found = said("a pickle that takes {what}", what=ended)
    except WorkFailed as error:
        found = said("no plain weights ({error})", error=error)
    raise ModelError(str(path), found, said("tensors and nothing else"), fix)
