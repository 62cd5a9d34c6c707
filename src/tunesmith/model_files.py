"""What the files of a model or an adapter may say, looked at before a library opens them.

Somebody else wrote them. A field that would bring code or weights from elsewhere is refused by its name; a file that
claims to hold more than it does is refused before anything is made of the claim.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith import reading
from tunesmith.errors import ModelError
from tunesmith.language import marked, said
from tunesmith.reading import MIB, Unfit

# Files of settings, with the most that they may hold. A tokenizer_config.json names every added token.
_SETTINGS = {
    "config.json": 8 * MIB,
    "generation_config.json": MIB,
    "tokenizer_config.json": 32 * MIB,
    "special_tokens_map.json": 8 * MIB,
    "added_tokens.json": 32 * MIB,
    "processor_config.json": MIB,
    "preprocessor_config.json": MIB,
    "adapter_config.json": 4 * MIB,
}
_INDEX = 64 * MIB
_OTHER_TEXT = 128 * MIB  # tokenizer.json: 33 MB for a vocabulary of 262,144
_TEXTS = (".json", ".jinja", ".model", ".tiktoken", ".txt")
_MOST_FILES = 10_000

_FETCH = marked("Look at where the folder comes from; fetch the model again.")


def check(folder: Path) -> None:
    """Raises ModelError for a file of a model's or an adapter's folder that must not be opened, naming file and field.

    Looked at are the kinds and sizes of all files, and every field of the settings that could name code or weights
    which lie elsewhere.
    """
    for number, path in enumerate(folder.iterdir()):
        if number == _MOST_FILES:
            raise ModelError(
                str(folder),
                said("more than {n:,} files", n=_MOST_FILES),
                said("the files of one model"),
                said(_FETCH),
            )
        if kind := reading.unusual(path):
            raise ModelError(str(path), kind, said("a file"), said("Delete it; nothing of a model is one."))
        if path.suffix in _TEXTS and path.is_file() and path.name not in _SETTINGS:
            limit = _INDEX if path.name.endswith(".index.json") else _OTHER_TEXT
            if (size := path.stat().st_size) > limit:
                raise ModelError(
                    str(path), f"{size / MIB:,.0f} MiB", said("at most {n} MiB", n=limit // MIB), said(_FETCH)
                )
    read = {name: settings(folder / name) for name in _SETTINGS}
    for name, tree in read.items():
        for place, field, value in _fields(tree):
            if why := _refused(name, place, field, value):
                raise _field(folder / name, f"{place}.{field}".removeprefix("."), value, why)
    for name in ("config.json", "tokenizer_config.json"):
        named = read[name].get("tokenizer_class")
        if named is not None and not (isinstance(named, str) and _TOKENIZER.fullmatch(named)):
            raise _field(
                folder / name, "tokenizer_class", named, said("the name of a tokenizer's class in transformers")
            )
    for path in folder.glob("*.index.json"):
        _check_index(path)


def settings(path: Path) -> dict[str, Any]:
    """The object in one of the files of settings, empty where there is none; raises ModelError for a broken one."""
    if not path.is_file():
        return {}
    try:
        return reading.json_object(path, _SETTINGS[path.name])
    except (Unfit, OSError) as error:
        raise ModelError(
            str(path), str(error), said("a whole JSON object of settings"), said("Fetch the model again.")
        ) from None


def _field(path: Path, field: str, value: Any, expected: str) -> ModelError:
    found = json.dumps(value, ensure_ascii=False, default=str)
    found = f"{found[:80]}{'…' if len(found) > 80 else ''}"
    fix = said("No code of others is ever run. Delete the field if the model is whole without it.")
    return ModelError(f"{path}: {field}", found, expected, fix)


def _fields(tree: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Place, name and value of every field, however deep."""
    waiting: list[tuple[str, Any]] = [("", tree)]
    for place, item in waiting:
        if isinstance(item, dict):
            for name, value in item.items():
                yield place, name, value
                if isinstance(value, dict | list):
                    waiting.append((f"{place}.{name[:40]}".removeprefix(".")[:200], value))
        else:
            waiting += [(place, inner) for inner in item if isinstance(inner, dict | list)]


# --- fields that could name code --------------------------------------------------------------------------------------

_TOKENIZER = re.compile(r"(?!Auto)\w*(Tokenizer|TokenizerFast|TokenizersBackend|PythonBackend|MistralCommonBackend)")
# transformers loads any other name ("org/repository", "org/repository:function") as a kernel from a hub.
_ATTENTION = ("eager", "sdpa", "flex_attention")
if importlib.util.find_spec("flash_attn"):  # else transformers looks for it on a hub
    _ATTENTION += ("flash_attention_2",)
_EXPERTS = ("eager", "grouped_mm", "batched_mm", "linear_loop")
# Ways to quantise whose code transformers fetches from a hub, whatever the machine has.
_FETCHING = ("eetq", "fbgemm_fp8", "metal")
_CONFIGS = ("config.json",)


def _one_of(names: Sequence[str]) -> Callable[[Any], bool]:
    def ok(value: Any) -> bool:
        return value in names if isinstance(value, str) else isinstance(value, dict) and all(map(ok, value.values()))

    return ok


def _never(value: Any) -> bool:
    """Empty, or not there."""
    return not value


_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
        (_one_of(_ATTENTION), marked("one of {attention}: other names are kernels of a hub")),
    ),
    **dict.fromkeys(
        ("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
        (_one_of(_EXPERTS), marked("one of {experts}: other names are kernels of a hub")),
    ),
    **dict.fromkeys(
        ("use_kernels", "kernel_config", "fusion_config", "distributed_config", "custom_generate", "custom_pipelines"),
        (_never, marked("no such field: it would load code from a hub")),
    ),
    "transformers_weights": (_never, marked("no such field: the weights are the folder's *.safetensors")),
    "quant_method": (
        lambda value: not isinstance(value, str) or value.lower() not in _FETCHING,
        marked("a way to quantise whose code is installed, not fetched from a hub"),
    ),
}
# Ways to generate that need code from a hub, another model or many times the memory.
_GENERATION = {
    **dict.fromkeys(
        ("custom_generate", "penalty_alpha", "dola_layers", "constraints", "force_words_ids", "watermarking_config",
         "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp", "compile_config", "stop_strings",
         "sequence_bias", "bad_words_ids", "continuous_batching_config"),
        (_never, marked("no such field: only sampling and greedy search are used")),
    ),
    **dict.fromkeys(
        ("num_beams", "num_beam_groups", "num_return_sequences"),
        (lambda value: value in (None, 1), marked("1: only sampling and greedy search are used")),
    ),
    **dict.fromkeys(
        ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "epsilon_cutoff", "eta_cutoff",
         "length_penalty", "no_repeat_ngram_size", "encoder_repetition_penalty", "guidance_scale", "top_h"),
        (lambda value: value is None or (type(value) in (int, float) and 0 <= value <= 1e9), marked("a number")),
    ),
    "cache_implementation": (
        lambda value: value is None or (isinstance(value, str) and re.fullmatch(r"\w{1,40}", value) is not None),
        marked("the name of a cache of transformers"),
    ),
}  # fmt: skip


def _refused(file: str, place: str, field: str, value: Any) -> str | None:
    """What is expected of a field instead, where its value is refused."""
    if file == "adapter_config.json":
        return None  # `check_adapter` allows what it knows
    if field == "auto_map" and place and file in _CONFIGS and value:
        # At the top it is left alone: transformers is told not to follow it. Below, it would ask.
        return said("no such field inside another: it would load code of the folder")
    allowed = _ALLOWED.get(field)
    if file == "generation_config.json" and not place:
        allowed = _GENERATION.get(field, allowed)
    if not allowed or value is None or allowed[0](value):
        return None
    return said(allowed[1], attention=", ".join(_ATTENTION), experts=", ".join(_EXPERTS))


def _check_index(path: Path) -> None:
    """Raises ModelError unless every file that holds weights lies in the folder itself."""
    try:
        weight_map = reading.json_object(path, _INDEX).get("weight_map")
    except (Unfit, OSError) as error:
        raise ModelError(
            str(path), str(error), said("a whole JSON index of weights"), said("Fetch the model again.")
        ) from None
    names = set(weight_map.values()) if isinstance(weight_map, dict) and _hashable(weight_map.values()) else {None}
    for name in names:
        if name is None or "/" in name or not reading.is_beside(name):
            raise _field(path, "weight_map", name, said("names of files in this folder"))


def _hashable(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


# --- adapters ---------------------------------------------------------------------------------------------------------

_HIGHEST_RANK = 4096
_MOST_NAMES = 8192
_PLAIN = re.compile(r"[\w-]+(\.[\w-]+)*")


def _plain(value: Any) -> bool:
    """A name or a list of names, each of which stands for itself where peft reads it as a pattern."""
    names = [value] if isinstance(value, str) else value
    return (
        isinstance(names, list)
        and len(names) <= _MOST_NAMES
        and all(isinstance(name, str) and len(name) <= 512 and _PLAIN.fullmatch(name) for name in names)
    )


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _HIGHEST_RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= 1e6


def _by_layer(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and _plain(list(value)) and all(map(good, value.values()))


def _are_numbers_of_layers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return len(numbers) <= _MOST_NAMES and all(type(number) is int and 0 <= number < 10_000 for number in numbers)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) < 4096


_PLAIN_NAMES = marked("plain names of layers, no patterns")
_RANK = marked("a rank from 1 to {highest:,}")
_ADAPTER: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda value: value == "LORA", "LORA"),
    "r": (_is_rank, _RANK),
    "target_modules": (_plain, _PLAIN_NAMES),
    "init_lora_weights": (lambda value: value in (True, False, "gaussian"), marked("true, false or gaussian")),
    "bias": (lambda value: value in ("none", "all", "lora_only"), marked("none, all or lora_only")),
    "rank_pattern": (
        _by_layer(_is_rank),
        marked("plain names of layers, no patterns, each with a rank from 1 to {highest:,}"),
    ),
    "alpha_pattern": (_by_layer(_is_number), marked("plain names of layers, no patterns, each with a number")),
    "layers_to_transform": (_are_numbers_of_layers, marked("numbers of layers")),
    **dict.fromkeys(("lora_alpha", "lora_dropout"), (_is_number, marked("a number"))),
    **dict.fromkeys(
        ("modules_to_save", "exclude_modules", "layers_pattern", "target_parameters"), (_plain, _PLAIN_NAMES)
    ),
    **dict.fromkeys(
        ("use_dora", "use_rslora", "lora_bias", "inference_mode", "fan_in_fan_out", "ensure_weight_tying"),
        (lambda value: isinstance(value, bool), marked("true or false")),
    ),
    # Read by nobody here: the base is the one that is asked for, and the rest is of use only with fields refused below.
    **dict.fromkeys(
        ("base_model_name_or_path", "revision", "task_type", "peft_version", "megatron_core"),
        (_is_text, marked("a text")),
    ),
    "qalora_group_size": (_is_number, marked("a number")),
}


def check_adapter(folder: Path) -> dict[str, Any]:
    """An adapter's settings; raises ModelError for one that peft would make code, endless matching or another base of.

    What is not known here (layers repeated, modules of Megatron imported, a base changed at the start) must be empty.
    """
    path = folder / "adapter_config.json"
    check(folder)
    read = settings(path)
    if "peft_type" not in read:
        raise ModelError(
            str(path), said("no peft_type"), said("the settings of a LoRA adapter"), said("Copy the adapter again.")
        )
    for field, value in read.items():
        good, expected = _ADAPTER.get(field, (_never, marked("nothing: a plain LoRA adapter has no use for it")))
        if value not in (None, [], {}) and not good(value):
            fix = said("Save the adapter as plain LoRA (merged into a base or converted), or ask who made it.")
            found = json.dumps(value, ensure_ascii=False)
            found = found[:80] + "…" * (len(found) > 80)
            raise ModelError(f"{path}: {field[:60]}", found, said(expected, highest=_HIGHEST_RANK), fix)
    return read


# --- weights ----------------------------------------------------------------------------------------------------------

_HEADER = 16 * MIB
_DAMAGED = marked("The file is cut or damaged; fetch the model again.")


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor by the head of a safetensors file, which is as long as its head says.

    Raises ModelError for a file that is cut or damaged, or whose head is larger than any model's.
    """
    fix = said(_DAMAGED)
    try:
        with open(reading.descriptor(path), "rb") as file:
            start = file.read(8)
            if start == b"version ":
                fix = said("Run `git lfs pull` in the model's folder, or fetch the model again.")
                raise ModelError(str(path), said("a Git LFS pointer"), said("a whole safetensors file"), fix)
            (size,) = struct.unpack("<Q", start)
            found = path.stat().st_size
            if size > min(_HEADER, found):
                raise ValueError(f"a head of {size:,} bytes in {found:,}")
            header = json.loads(file.read(size))
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        expected = 8 + size + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        if found != expected:
            raise ModelError(str(path), said("{n:,} bytes", n=found), f"{expected:,}", fix)
        read = {name: tuple(map(int, tensor["shape"])) for name, tensor in tensors.items()}
        if any(math.prod(shape) > 8 * found for shape in read.values()):
            raise ValueError("a tensor larger than the file")
        return read
    except (struct.error, ValueError, TypeError, LookupError, AttributeError, RecursionError, Unfit) as error:
        found_text = said("no safetensors ({error})", error=str(error)[:200] or type(error).__name__)
        raise ModelError(str(path), found_text, said("a whole safetensors file"), fix) from None


def n_numbers(paths: Sequence[Path]) -> int:
    """How many numbers some safetensors files hold, by their heads."""
    return sum(math.prod(shape) for path in paths for shape in shapes(path).values())


def check_bin(path: Path) -> None:
    """Raises ModelError for a `.bin` file whose parts are packed: they could unpack to any size."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise ModelError(
            str(path),
            said("a damaged archive ({error})", error=error),
            said("weights as torch saves them"),
            said(_DAMAGED),
        ) from None
    total = sum(part.file_size for part in parts)
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or total > path.stat().st_size:
        found = said("packed parts that claim {total:,} bytes in {size:,}", total=total, size=path.stat().st_size)
        raise ModelError(str(path), found, said("weights as torch saves them, unpacked"), said(_FETCH))


@dataclass
class _Walk:
    """A walk through the head of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

    data: bytes
    at: int = 0

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def text(self, at_most: int) -> bytes:
        length = self.number("Q")
        if length > min(at_most, len(self.data) - self.at):
            raise ValueError(f"a text of {length:,} bytes")
        self.at += length
        return self.data[self.at - length : self.at]

    def value(self, kind: int, room: list[int]) -> None:
        if kind == 8:
            self.text(MIB)
        elif kind == 9:
            inner, length = self.number("I"), self.number("Q")
            room[0] -= length
            if room[0] < 0 or inner == 9:
                raise ValueError(f"a list of {length:,}" if inner != 9 else "lists in lists")
            if inner == 8:
                for _ in range(length):
                    self.text(MIB)
            else:
                self.at += length * _GGUF_SIZES[inner]
        else:
            self.at += _GGUF_SIZES[kind]
        if self.at > len(self.data):
            raise ValueError("a head that is cut")


_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_GGUF_HEAD = 256 * MIB
_GGUF_ENTRIES = 3_000_000  # of all lists: Gemma 3 has 262,144 tokens in three lists and 514,906 merges
_GGUF_TENSORS = 100_000


def check_gguf(path: Path) -> int:
    """How many numbers a GGUF file holds by its head; raises ModelError for one that claims more than the file holds
    or any model has."""
    try:
        with open(reading.descriptor(path), "rb") as file:
            walk = _Walk(file.read(_GGUF_HEAD))
        if walk.data[:4] != b"GGUF":
            raise ValueError(f"it begins with {walk.data[:4]!r}")
        walk.at = 4
        if (version := walk.number("I")) not in (2, 3):
            raise ValueError(f"version {version}")
        n_tensors, n_values = walk.number("Q"), walk.number("Q")
        if n_tensors > _GGUF_TENSORS or n_values > 10_000:
            raise ValueError(f"{n_tensors:,} tensors, {n_values:,} settings")
        room = [_GGUF_ENTRIES]
        for _ in range(n_values):
            walk.text(65_535)
            walk.value(walk.number("I"), room)
        size, n_numbers = path.stat().st_size, 0
        for _ in range(n_tensors):
            walk.text(65_535)
            n_dimensions = walk.number("I")
            if n_dimensions > 4:
                raise ValueError(f"a tensor of {n_dimensions:,} dimensions")
            shape = [walk.number("Q") for _ in range(n_dimensions)]
            walk.number("I")
            if walk.number("Q") > size or math.prod(shape) > 16 * size:  # at fewest half a bit a number
                raise ValueError(f"a tensor of {math.prod(shape):,} numbers in {size:,} bytes")
            n_numbers += math.prod(shape)
        return n_numbers
    except (struct.error, ValueError, LookupError, OSError) as error:
        found = said("a GGUF file that can not be read ({error})", error=str(error)[:200])
        raise ModelError(str(path), found, said("a whole GGUF file"), said("Fetch it again.")) from None
