"""Base models, tokenizers and adapters: the thin layer over transformers and peft.

Remote code is never run. Weights come from safetensors; GGUF and `.bin` are converted to safetensors once.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import shutil
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from tunesmith import hub
from tunesmith.errors import MissingExtra, ModelError, ProofError, RecipeError, TemplateError
from tunesmith.recipe import LoraSettings, ModelSettings, TemplateSettings
from tunesmith.render import Renderer
from tunesmith.template import Template, probe

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


def device() -> torch.device:
    """The device that is trained and chatted on: a CUDA GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- tokenizer and template -------------------------------------------------------------------------------------------


def open_renderer(found: hub.LocalModel, settings: TemplateSettings) -> Renderer:
    """The model's renderer: its tokenizer with the template that `settings` choose.

    Raises ModelError when the tokenizer can not be read, TemplateError when there is no usable template.
    """
    tokenizer = load_tokenizer(found.folder)
    alias = found.alias
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    if isinstance(tokenizer.chat_template, dict):
        own = tokenizer.chat_template.get("default")
    if settings.path is not None:
        text, source = _read_template(Path(settings.path)), f"file {settings.path}"
    elif settings.name != "auto":
        text, source = _shipped_template(settings.name), f"shipped {settings.name}"
    elif own:
        text, source = own, "tokenizer"
    elif alias is not None and alias.template:
        text, source = _shipped_template(alias.template), f"alias {alias.name}"
    else:
        shipped = ", ".join(sorted(path.stem for path in SHIPPED_TEMPLATES.glob("*.jinja")))
        raise TemplateError(
            str(found.folder), "a tokenizer without a chat template", "one, so that training and chat agree",
            f"Is it the chat version of the model? Else pass --set template.path=FILE.jinja or --set template.name=NAME ({shipped}).",
        )  # fmt: skip
    return Renderer(probe(tokenizer, text, source, _stop_ids(found.folder, alias)))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder; raises ModelError when there is none or it is broken."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        if absent := [part for part in hub.missing_parts(folder, weights=False) if "token" in part]:
            raise ModelError(str(folder), "no tokenizer", ", ".join(absent), "Copy the tokenizer's files beside config.json.") from None
        raise ModelError(str(folder), f"a tokenizer that can not be read ({_first_line(error)})", "a tokenizer that transformers reads", "Fetch the model again.") from error


def save_tokenizer(renderer: Renderer, folder: Path, texts: Sequence[str]) -> None:
    """Writes the tokenizer with the template in use, and proves that it gives the same ids when it is loaded again.

    transformers 5.23 forgets `legacy` of a Llama tokenizer when it saves it, and the copy then splits words
    differently; so a second spelling is tried, and ProofError is raised if that differs too.
    """
    tokenizer, template = renderer.template.tokenizer, renderer.template
    previous = tokenizer.chat_template
    tokenizer.chat_template = template.text
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = previous
    samples = [*texts, *_HARD_TEXTS]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in samples]
    config_path = folder / "tokenizer_config.json"
    written = json.loads(config_path.read_text())
    for amendment in ({}, {"legacy": True}, {"tokenizer_class": "TokenizersBackend"}):
        config_path.write_text(json.dumps({**written, **amendment}, indent=2, ensure_ascii=False) + "\n")
        again = load_tokenizer(folder)
        if [again(text, add_special_tokens=False)["input_ids"] for text in samples] == expected:
            return
    raise ProofError(str(folder), "a saved tokenizer that gives other ids than the one trained with", "the same ids", "Please report this with the model's name.")  # fmt: skip


_HARD_TEXTS = ("Human: Hi\nAssistant: Hello", "<s>Human: 你好\n</s><s>Assistant: 您好", " leading", "two  spaces\t\n\nCafé 😀", "don't 1234 x=y;")


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(str(path), f"no readable template ({error})", "a Jinja file in UTF-8", "Check template.path.") from None


def _shipped_template(name: str) -> str:
    path = SHIPPED_TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        shipped = sorted(path.stem for path in SHIPPED_TEMPLATES.glob("*.jinja"))
        raise RecipeError("template.name", repr(name), "auto or one of " + ", ".join(shipped), "Use template.path for a file of your own.")
    return path.read_text(encoding="utf-8")


def _stop_ids(folder: Path, alias: hub.Alias | None) -> list[int]:
    """What the model's generation config, its config and its alias call the end of a reply."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        ids += eos if isinstance(eos, list) else [eos] if isinstance(eos, int) else []
    return [*ids, *(alias.stop_ids if alias else ())]


# --- the base model ---------------------------------------------------------------------------------------------------


def load_config(folder: Path) -> PreTrainedConfig:
    """The model's config; raises ModelError when transformers does not build this architecture itself."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(str(folder), f"a config that can not be read ({_first_line(error)})", f"an architecture that transformers {transformers.__version__} builds itself", "Remote code is never run; a newer transformers may know the model.") from error  # fmt: skip


def context_length(config: PreTrainedConfig) -> int:
    """How many tokens the model can read."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31)


def generation_config(folder: Path, template: Template) -> GenerationConfig:
    """The model's own sampling settings with all stop ids of the template."""
    try:
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        config = GenerationConfig()
    config.eos_token_id = list(template.stop_ids)
    pad = template.tokenizer.pad_token_id
    config.pad_token_id = pad if isinstance(pad, int) else template.stop_ids[0]
    config.max_length = None  # counts the prompt too; chat bounds the reply instead
    return config


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights (meta device)."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_base(found: hub.LocalModel, settings: ModelSettings) -> PreTrainedModel:
    """The frozen base model on this machine's device, in evaluation mode.

    Raises ModelError when weights are missing, truncated or do not belong to the config.
    """
    folder = found.folder
    if absent := hub.missing_parts(folder, weights=True):
        raise ModelError(str(folder), "no " + ", ".join(absent), "a whole model", "Fetch it again, or name the right folder.")
    for path in sorted(folder.glob("*.safetensors")):
        _check_safetensors(path)
    arguments: dict[str, Any] = {"dtype": _dtype(settings.dtype)}
    if settings.quantize == "nf4":
        arguments |= _nf4(arguments["dtype"])
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, use_safetensors=True, output_loading_info=True, **arguments
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(str(folder), f"weights that can not be read ({_first_line(error)})", "weights of the config's shape", "Fetch the model again.") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(str(folder), f"no weights for {len(missing)} parts ({', '.join(missing[:3])} …)", "weights for every part", "transformers would make them up at random; fetch the model again.")  # fmt: skip
    model.requires_grad_(False)
    if settings.quantize == "none":
        model.to(device())
    return model.eval()


def needs_preparing(found: hub.LocalModel) -> bool:
    """The folder holds weights, but none in safetensors."""
    if any(found.folder.glob("*.safetensors")):
        return False
    return any(found.folder.glob("*.gguf")) or any(found.folder.glob("pytorch_model*.bin"))


def prepared(found: hub.LocalModel) -> hub.LocalModel:
    """The model in a folder with safetensors: itself, or a conversion of its GGUF or `.bin` weights made once."""
    if not needs_preparing(found):
        return found
    folder = found.folder
    ggufs, bins = sorted(folder.glob("*.gguf")), sorted(folder.glob("pytorch_model*.bin"))
    sources = ggufs[:1] if ggufs and not bins else bins
    key = "-".join(str(path.stat().st_size) for path in sources)
    ready = hub.cache_dir() / "converted" / f"{folder.name}-{key}"
    if not (ready / "config.json").is_file():
        partial = ready.with_name(f".{ready.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        try:
            _convert_gguf(folder, sources[0], partial) if sources[0].suffix == ".gguf" else _convert_bins(folder, bins, partial)
            try:
                partial.rename(ready)
            except OSError:  # another process was faster
                if not ready.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return hub.LocalModel(ready, found.source, found.revision, found.alias)


def _convert_gguf(folder: Path, gguf: Path, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name, local_files_only=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True)
    # A model read from GGUF keeps a quantizer that refuses to save or train; its numbers go into a fresh one.
    config = AutoConfig.for_model(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
    config.dtype = "float32"
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = GenerationConfig(**{k: v for k, v in {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}.items() if v is not None})  # fmt: skip
    fresh.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _convert_bins(folder: Path, bins: Sequence[Path], out: Path) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for number, path in enumerate(bins, 1):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise ModelError(str(path), f"no plain weights ({_first_line(error)})", "tensors and nothing else", "Pickles that hold code are never run.") from None
        name = f"model-{number:05}-of-{len(bins):05}.safetensors" if len(bins) > 1 else "model.safetensors"
        tensors = {key: value.detach().clone().contiguous() for key, value in state.items() if isinstance(value, torch.Tensor)}
        save_file(tensors, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(value.numel() * value.element_size() for value in tensors.values())
    if len(bins) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in folder.iterdir():
        if path.is_file() and path.suffix in (".json", ".model", ".jinja", ".txt") and "pytorch_model" not in path.name:
            shutil.copyfile(path, out / path.name)


def _check_safetensors(path: Path) -> None:
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size)) if size < path.stat().st_size else {}
        expected = 8 + size + max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
        found = path.stat().st_size
        if found != expected:
            raise ModelError(str(path), f"{found:,} bytes", f"{expected:,}", "The file is cut or damaged; fetch the model again.")
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, struct.error, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(str(path), f"no safetensors ({_first_line(error)})", "a whole safetensors file", "The file is cut or damaged; fetch the model again.") from None


def _dtype(name: str) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device().type == "cuda" else torch.float32
    return getattr(torch, name)


def _nf4(compute: torch.dtype) -> dict[str, Any]:
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtra("model.quantize=nf4", "gpu") from None
    if device().type != "cuda":
        raise RecipeError("model.quantize", "nf4 on a CPU", "a CUDA GPU", "Leave it at none.")
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute)  # fmt: skip
    return {"quantization_config": quantization, "device_map": {"": 0}}


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
        matched = [(rows, columns) for path, (rows, columns) in layers if path == name or path.endswith(f".{name}")]
        if not matched:
            raise RecipeError("lora.targets", f"'{name}', which matches no layer", f"one of {', '.join(present)}", _place_hint(name, present))
        per_layer = [settings.r * (rows + columns) + (rows if settings.variant == "dora" else 0) for rows, columns in matched]
        table.append(Target(name, len(matched), sum(per_layer)))
    return table


def attach(base: PreTrainedModel, settings: LoraSettings, seed: int, base_name: str) -> PeftModel:
    """The base with a fresh adapter; the adapter alone is trainable and kept in fp32.

    `base_name` is what the adapter's config says it belongs to: a hub id or a folder.
    """
    names = [target.name for target in targets(base, settings)]
    config = LoraConfig(
        task_type="CAUSAL_LM", r=settings.r, lora_alpha=_whole(settings.alpha), lora_dropout=settings.dropout, target_modules=names,
        use_rslora=settings.variant == "rslora", use_dora=settings.variant == "dora",
        init_lora_weights="pissa" if settings.variant == "pissa" else True,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    model.peft_config["default"].base_model_name_or_path = base_name
    return model


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The base with a saved adapter, not trainable, in evaluation mode.

    Raises ModelError when the adapter's tensors do not fit the base, or when it would change nothing.
    """
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ModelError(str(folder), "no adapter_model.safetensors", "a peft adapter", "Name a run's folder or its adapter/ folder.")
    _check_safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base, str(folder), is_trainable=False, local_files_only=True)
    except Exception as error:
        raise ModelError(str(folder), f"an adapter that does not fit ({_first_line(error)})", f"one made for {base.config.model_type} of this shape", "Use the base that it was trained on.") from error
    if all(not bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name) and model.peft_config["default"].init_lora_weights is True:
        raise ModelError(str(folder), "an adapter whose lora_B is all zero", "one that changes the base", "It was saved before training; use another checkpoint.")
    return model.eval()


def save_adapter(model: PeftModel, folder: Path, pissa_start: Path | None = None) -> None:
    """Writes the adapter in peft's format and proves that the file holds finite numbers.

    A pissa adapter changes its base when it starts; `pissa_start` is the folder of the adapter as it was then, and
    what is written fits the unchanged base. Raises ProofError for a number that is not finite; nothing is left then.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise ProofError(name, "a number that is not finite", "finite adapter weights", "Lower train.learning_rate; nothing was saved.")
    extra = {"path_initial_model_for_weight_conversion": str(pissa_start)} if pissa_start else {}
    model.save_pretrained(str(folder), safe_serialization=True, **extra)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card; a run writes its own


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
            return f"This model has {' and '.join(same)} in that place; or use all-linear."
    near = difflib.get_close_matches(name, present, 1)
    return f"Did you mean {near[0]}?" if near else "all-linear takes them all."


def _whole(number: float) -> float:
    return int(number) if math.isfinite(number) and number == int(number) else number


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
