"""Base models, tokenizers and adapters: the thin layer over transformers and peft.

Remote code is never run. Weights come from safetensors; GGUF and `.bin` are converted to safetensors once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from tunesmith import driver, hub, machines, model_files, reading
from tunesmith.confined import Ended, WorkFailed, confined
from tunesmith.data import tokenizer_trial
from tunesmith.data.render import Renderer
from tunesmith.data.template import Template, probe
from tunesmith.errors import MissingExtra, ModelError, ProofError, RecipeError, TemplateError
from tunesmith.language import said
from tunesmith.models import pretrained
from tunesmith.recipe import LoraSettings, ModelSettings, TemplateSettings
from tunesmith.spelling import nearest

SHIPPED_TEMPLATES = Path(__file__).parent / "templates"
# Layers that one model has apart and another has as one; for a better hint than spelling can give.
_SAME_PLACE = (
    {"q_proj", "k_proj", "v_proj", "qkv_proj", "W_pack", "c_attn", "query_key_value", "query", "key", "value"},
    {"gate_proj", "up_proj", "gate_up_proj", "dense_h_to_4h", "w1", "w3", "fc1"},
    {"down_proj", "dense_4h_to_h", "w2", "fc2"},
    {"o_proj", "out_proj", "dense"},
)


@dataclass(frozen=True)
class Target:
    """A name of layers that get an adapter."""

    name: str
    layers: int
    parameters: int
    """Trained numbers of that name over all layers."""


def hush_libraries() -> None:
    """Keeps transformers' bars and its notes on defaults to itself; what matters is checked here and raised."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


@contextmanager
def quietly() -> Iterator[None]:
    """While it holds, transformers keeps its notes and its bars to itself, unless somebody has asked it for more or
    for less than it says by itself. What matters of what it would say is checked here and raised."""
    notes = transformers.logging
    verbosity, bars = notes.get_verbosity(), notes.is_progress_bar_enabled()
    hushed = verbosity == logging.WARNING and "TUNESMITH_VERBOSE" not in os.environ
    if hushed:
        notes.set_verbosity_error()
        notes.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            if hushed:  # peft asks for what transformers has renamed
                warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
            yield
    finally:
        if hushed:
            notes.set_verbosity(verbosity)
            if bars:
                notes.enable_progress_bar()


def device() -> torch.device:
    """The device that is trained and chatted on: a CUDA GPU where there is one, of several this process's own."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


# --- tokenizer and template -------------------------------------------------------------------------------------------


def open_renderer(found: hub.LocalModel, settings: TemplateSettings) -> Renderer:
    """The model's renderer: its tokenizer with the template that `settings` choose.

    Raises ModelError when the tokenizer can not be read, TemplateError when there is no usable template.
    """
    tokenizer = load_tokenizer(found.folder)
    text, source = _chosen_template(tokenizer, found, settings)
    return Renderer(probe(tokenizer, text, source, _stop_ids(found.folder, found.alias)))


@quietly()
def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder; raises ModelError when there is none, or it is broken or hostile."""
    model_files.check(folder)
    tokenizer_trial.require_bounded(folder, _read_tokenizer)
    try:
        return _read_tokenizer(folder)
    except ModelError:
        raise
    except Exception as error:
        if absent := [part for part in hub.missing_parts(folder, weights=False) if "token" in part]:
            fix = said("Copy the tokenizer's files beside config.json.")
            raise ModelError(str(folder), said("no tokenizer"), ", ".join(absent), fix) from None
        found = said("a tokenizer that can not be read ({error})", error=_first_line(error))
        raise ModelError(
            str(folder), found, said("a tokenizer that transformers reads"), said("Fetch the model again.")
        ) from error


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return pretrained.tokenizer(folder)


def save_tokenizer(renderer: Renderer, folder: Path, texts: Sequence[str]) -> None:
    """Writes the tokenizer with the template in use, and proves that it gives the same ids when it is loaded again.

    transformers 5.23 forgets `legacy` of a Llama tokenizer when it saves it, and the copy then splits words
    differently; so other spellings of the same are tried, and ProofError is raised if all of them differ.
    """
    tokenizer, template = renderer.template.tokenizer, renderer.template
    previous = tokenizer.chat_template
    tokenizer.chat_template = template.text
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = previous
    samples = [*texts, *_HARD_TEXTS]

    def behaviour(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in samples]
        return ids, tokenizer.eos_token_id, tokenizer.pad_token_id

    expected = behaviour(tokenizer)
    config_path = folder / "tokenizer_config.json"
    written = json.loads(config_path.read_text(encoding="utf-8"))
    for amendment in ({}, {"legacy": True}, {"tokenizer_class": "TokenizersBackend"}):
        amended = json.dumps({**written, **amendment}, indent=2, ensure_ascii=False)
        config_path.write_text(amended + "\n", encoding="utf-8")
        again = _read_tokenizer(folder)
        if behaviour(again) == expected and again.chat_template == template.text:
            return
    found = said("a saved tokenizer that gives other ids than the one trained with")
    raise ProofError(str(folder), found, said("the same ids"), said("Please report this with the model's name."))


_HARD_TEXTS = (
    "Human: Hi\nAssistant: Hello",
    "<s>Human: 你好\n</s><s>Assistant: 您好",
    " leading",
    "two  spaces\t\n\nCafé 😀",
    "don't 1234 x=y;",
)


def _chosen_template(
    tokenizer: PreTrainedTokenizerBase, found: hub.LocalModel, settings: TemplateSettings
) -> tuple[str, str]:
    """A template's text and where it comes from."""
    own = tokenizer.chat_template
    if isinstance(own, dict):  # several by name
        own = own.get("default")
    if settings.path is not None:
        return _read_template(Path(settings.path)), f"file {settings.path}"
    if settings.name != "auto":
        return _shipped_template(settings.name), f"shipped {settings.name}"
    if (alias := found.alias) and alias.template and (alias.instead or not own):
        return _shipped_template(alias.template), f"alias {alias.name}"
    if own:
        return _unix_lines(own), "tokenizer"
    raise TemplateError(
        str(found.folder),
        said("a tokenizer without a chat template"),
        said("one, so that training and chat agree"),
        said(
            "Is it the chat version of the model? Else pass --set template.path=FILE.jinja or, of those that are "
            "shipped, {options}",
            options=said(" or ").join(f"--set template.name={name}" for name in _shipped_names()),
        ),
    )


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = said("no readable template ({error})", error=error)
        raise TemplateError(str(path), found, said("a Jinja file in UTF-8"), said("Check template.path.")) from None


def _shipped_template(name: str) -> str:
    if name not in _shipped_names():
        expected = said("auto or one of {names}", names=", ".join(_shipped_names()))
        raise RecipeError("template.name", repr(name), expected, said("Use template.path for a file of your own."))
    return (SHIPPED_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def _shipped_names() -> list[str]:
    return sorted(path.stem for path in SHIPPED_TEMPLATES.glob("*.jinja"))


def _unix_lines(text: str) -> str:
    """As chat_template.jinja is read back; Jinja writes \\n for each of them anyway."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _stop_ids(folder: Path, alias: hub.Alias | None) -> list[int]:
    """What the model's generation config, its config and its alias call the end of a reply."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        eos = model_files.settings(folder / name).get("eos_token_id")
        ids += [i for i in (eos if isinstance(eos, list) else [eos]) if type(i) is int]
    return [*ids, *(alias.stop_ids if alias else ())]


# --- the base model ---------------------------------------------------------------------------------------------------


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
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                if ".layers." in name and len(part.get_shape()) == 2:
                    row = part[:1]
                    return torch.equal(row.bfloat16().to(row.dtype), row)
    with suppress(OSError, ValueError, LookupError):
        return bool(reading.json_object(folder / _NUMBERS, 1 << 10)["bfloat16"])
    return config.dtype == torch.bfloat16


_NUMBERS = "numbers.json"
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
    arguments: dict[str, Any] = {"dtype": _dtype(settings.dtype, folder)}
    if settings.quantize == "nf4":
        arguments |= _nf4(arguments["dtype"])
    try:
        loaded: Any = pretrained.causal_lm(folder, use_safetensors=True, output_loading_info=True, **arguments)
    except ModelError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        found_text = said("weights that can not be read ({error})", error=_first_line(error))
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
            quantised = _is_quantised(path)
            if (wanted := pretrained.size(folder, **file).n_numbers) > 2 * held:
                raise ValueError(f"settings for {wanted:,} numbers, and {held:,} in the file")
            tokenizer = pretrained.tokenizer(folder, **file)
            loaded = pretrained.causal_lm(folder, dtype=torch.float32, **file) if weights else None
            config = pretrained.config(folder, **file) if loaded is None else loaded.config
    except Exception as error:
        found = said("a GGUF file that can not be read ({error})", error=_first_line(error))
        expected = said("an architecture and a quantization that transformers reads")
        raise ModelError(str(path), found, expected, said("Fetch it again, or use the model's safetensors.")) from error
    special = {name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    generation = GenerationConfig(**{name: i for name, i in special.items() if i is not None})
    # Numbers of a few bits stand for published ones, which are bf16 as a rule, and cheaper to multiply as such.
    if loaded is None:
        (out / _NUMBERS).write_text(json.dumps({"bfloat16": quantised}), encoding="utf-8")
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


def _is_quantised(path: Path) -> bool:
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


def _dtype(name: str, folder: Path) -> torch.dtype:
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


# --- the adapter ------------------------------------------------------------------------------------------------------


def targets(model: PreTrainedModel, settings: LoraSettings) -> list[Target]:
    """The layers that get an adapter, by name.

    Raises RecipeError for a name that matches no layer, listing the names that the model has.
    """
    layers = list(_linear_layers(model))
    present = sorted({name.rpartition(".")[2] for name, _ in layers})
    wanted = present if settings.targets == "all-linear" else list(dict.fromkeys(settings.targets))
    table = []
    for name in wanted:
        matched = [shape for path, shape in layers if path == name or path.endswith(f".{name}")]
        if not matched:
            expected = said("one of {names}", names=", ".join(present))
            raise RecipeError(
                "lora.targets",
                said("'{name}', which matches no layer", name=name),
                expected,
                _place_hint(name, present),
            )
        numbers = sum(settings.r * (rows + columns) for rows, columns in matched)
        if settings.variant == "dora":
            numbers += sum(rows for rows, _ in matched)
        table.append(Target(name, len(matched), numbers))
    return table


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
    except Exception as error:
        found = said("an adapter that does not fit ({error})", error=_first_line(error))
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


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for path, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear):
            yield path, (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            yield path, (module.nf, module.nx)


def _place_hint(name: str, present: Sequence[str]) -> str:
    for place in _SAME_PLACE:
        if name in place and (same := [other for other in present if other in place]):
            return said("This model has {names} in that place; or use all-linear.", names=said(" and ").join(same))
    near = nearest(name, present)
    return said("Did you mean {name}?", name=near) if near else said("all-linear takes them all.")


def _whole(number: float) -> Any:  # peft says int and takes any number
    return int(number) if math.isfinite(number) and number == int(number) else number


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
