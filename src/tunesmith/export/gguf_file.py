"""Merged weights, tokenizer and chat template as one GGUF file, for llama.cpp and what is built on it.

What the names mean: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and for each architecture and tokenizer
what llama.cpp does when it opens such a file. What it has no words for is refused by name: a file that is nearly right
would answer, only worse.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor
from transformers import PreTrainedConfig

from tunesmith.data.template import Template
from tunesmith.errors import ModelError
from tunesmith.export.merging import Merged, not_finite
from tunesmith.language import marked, said

TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
"""What the gguf library itself writes, by our names for it."""

_WHERE = "export --to gguf"
_MERGED = marked("Export it --to merged.")
_CONVERT = marked("Export it --to merged, and try llama.cpp's convert_hf_to_gguf.py on that folder.")


@dataclass(frozen=True)
class _Architecture:
    name: str
    """In GGUF."""
    interleaved: bool = False
    """llama.cpp turns neighbouring numbers of a query or key, transformers those half a head apart."""
    norm_offset: float = 0.0
    """What transformers' layers add to the weights of their norms."""


_ARCHITECTURES = {
    "llama": _Architecture("llama", interleaved=True),
    "gemma": _Architecture("gemma", norm_offset=1.0),
    "phi3": _Architecture("phi3"),
    "qwen2": _Architecture("qwen2"),
    "qwen3": _Architecture("qwen3"),
}


@dataclass(frozen=True)
class Contents:
    """All that a file is made of.

    Raises ModelError, when made, for an architecture, a rotary embedding or a tokenizer that llama.cpp has no words
    for.
    """

    merged: Merged
    config: PreTrainedConfig
    template: Template
    dtype: str
    """A key of `TYPES`."""
    title: str
    """What people read in lists of models."""

    def __post_init__(self) -> None:
        _ = self.architecture, self.vocabulary, self.names, list(_rope_tensors(self.config))  # all that may raise

    @cached_property
    def architecture(self) -> _Architecture:
        found = _ARCHITECTURES.get(self.config.model_type)
        if found is None:
            expected = said("one of {names}", names=", ".join(_ARCHITECTURES))
            raise ModelError(
                _WHERE, said("the architecture {name}", name=self.config.model_type), expected, said(_CONVERT)
            )
        window = getattr(self.config, "sliding_window", None)
        if found.name != "phi3" and window and getattr(self.config, "use_sliding_window", True):
            raise ModelError(
                _WHERE, said("a window of {n} tokens", n=window), said("attention over all tokens"), said(_MERGED)
            )
        return found

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self.template, int(self.config.vocab_size))

    @cached_property
    def names(self) -> dict[str, str]:
        """llama.cpp's name of every weight that it reads, by transformers' name."""
        known = gguf.get_tensor_name_map(
            next(arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == self.architecture.name),
            self.config.num_hidden_layers,
        )
        tied = bool(self.config.tie_word_embeddings)
        found: dict[str, str] = {}
        for own in self.merged.shapes():
            if own.endswith("rotary_emb.inv_freq") or (tied and own == "lm_head.weight"):
                continue
            theirs = known.get_name(own, try_suffixes=(".weight", ".bias"))
            if theirs is None:
                raise ModelError(
                    _WHERE,
                    said("the weight {name}", name=own),
                    said("one that llama.cpp has a name for"),
                    said(_CONVERT),
                )
            found[own] = theirs
        return found

    @property
    def n_bytes(self) -> int:
        """What the weights take on disk."""
        shapes = self.merged.shapes()
        return sum(_n_bytes(shapes[own][0], self._kind(shapes[own][0])) for own in self.names)

    def _kind(self, shape: Sequence[int]) -> gguf.GGMLQuantizationType:
        """Vectors stay in fp32; so do matrices whose rows do not fill whole blocks."""
        kind, _ = TYPES[self.dtype]
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        return kind if len(shape) > 1 and shape[-1] % block == 0 else gguf.GGMLQuantizationType.F32

    def _weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """llama.cpp's name and the weight as it wants it, in fp32, one after the other."""
        for own, weight in self.merged:
            if own in self.names:
                yield self.names[own], _laid_out(own, weight.float(), self.config, self.architecture).numpy()


def _n_bytes(shape: Sequence[int], kind: gguf.GGMLQuantizationType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def _laid_out(name: str, weight: Tensor, config: PreTrainedConfig, architecture: _Architecture) -> Tensor:
    if architecture.norm_offset and name.endswith("norm.weight"):
        return weight + architecture.norm_offset
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    layer = name.split(".")[-2]
    if architecture.interleaved and layer in heads:
        halves = weight.reshape(heads[layer], 2, -1, *weight.shape[1:])
        return halves.transpose(1, 2).reshape(weight.shape)
    return weight


def write(path: Path, contents: Contents) -> None:
    """Writes the file, weight after weight.

    Raises ProofError for a weight that is not finite in the file's type.
    """
    _, file_type = TYPES[contents.dtype]
    writer = gguf.GGUFWriter(path, contents.architecture.name)
    writer.add_name(contents.vocabulary.named(contents.title))
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_settings(writer, contents.config, contents.architecture)
    contents.vocabulary.write(writer)
    rope = dict(_rope_tensors(contents.config))
    for name, tensor in rope.items():
        writer.add_tensor_info(name, tensor.shape, tensor.dtype, tensor.nbytes)
    shapes = contents.merged.shapes()
    for own, theirs in contents.names.items():
        _announce(writer, theirs, shapes[own][0], contents._kind(shapes[own][0]))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in rope.values():
            writer.write_tensor_data(tensor)
        for name, weight in contents._weights():
            if not np.isfinite(weight).all() or (contents.dtype == "float16" and np.abs(weight).max() > 65504):
                raise not_finite(name, contents.dtype)
            writer.write_tensor_data(quantize(weight, contents._kind(weight.shape)))
    finally:
        writer.close()


def _announce(writer: gguf.GGUFWriter, name: str, shape: Sequence[int], kind: gguf.GGMLQuantizationType) -> None:
    """A tensor's entry in the head of the file. The library takes plain numbers by numpy's type and all else as
    bytes."""
    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    if kind in plain:
        writer.add_tensor_info(name, shape, np.dtype(plain[kind]), _n_bytes(shape, kind))
    else:
        stored = gguf.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), _n_bytes(shape, kind), kind)


# --- what the model is ------------------------------------------------------------------------------------------------


def _write_settings(writer: gguf.GGUFWriter, config: PreTrainedConfig, architecture: _Architecture) -> None:
    size = _head_size(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    rope = config.rope_parameters
    writer.add_rope_dimension_count(int(size * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture.name == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "longrope":
        before = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        scale = rope.get("factor") or config.max_position_embeddings / before
        own = math.sqrt(1 + math.log(scale) / math.log(before)) if scale > 1 else 1.0
        writer.add_rope_scaling_orig_ctx_len(before)
        writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or own)


def alike_up_to(config: PreTrainedConfig) -> tuple[int, str] | None:
    """The context in tokens up to which llama.cpp computes what transformers does, and why not beyond; None where it
    always does."""
    rope, longest = config.rope_parameters, config.max_position_embeddings
    limits = []
    window = getattr(config, "sliding_window", None)
    if config.model_type == "phi3" and window and window < longest:
        limits.append((window, said("it attends to all tokens, the model to the last {n}", n=window)))
    if rope.get("rope_type") == "longrope":
        before = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        reason = said("with a larger one it turns short texts as long ones, the model only texts that are longer")
        limits.append((before, reason))
    return min(limits, default=None)


def _head_size(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope_tensors(config: PreTrainedConfig) -> Iterator[tuple[str, np.ndarray]]:
    """By how much each pair of numbers turns more slowly (arXiv 2402.13753, section 3; Llama 3.1's own)."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "longrope"):
        raise ModelError(
            _WHERE,
            said("the rotary embedding {kind}", kind=kind),
            said("default, linear, llama3 or longrope"),
            said(_MERGED),
        )
    if kind == "longrope":
        for which in ("long", "short"):
            yield f"rope_factors_{which}.weight", np.array(rope[f"{which}_factor"], dtype=np.float32)
    if kind == "llama3":
        size = _head_size(config)
        wave = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
        before, factor = rope["original_max_position_embeddings"], rope["factor"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = ((before / wave - low) / (high - low)).clamp(0, 1)
        yield "rope_freqs.weight", (1 / ((1 - smooth) / factor + smooth)).float().numpy()


# --- what it reads ----------------------------------------------------------------------------------------------------

_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
_CJK = "[一-龥ࠀ-一가-\ud7ff]+"
_LETTERS = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ"
"""How the pattern of all letters that have two cases begins; 500 characters."""
_CUTS: dict[tuple[tuple[str, ...], bool], str] = {
    (("bytes",), False): "gpt-2",
    (("digits", "bytes"), False): "smollm",
    (("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, "digits"), False): "deepseek-coder",
    (("[\r\n]", _LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, "digits"), False): "deepseek-llm",
    ((_CL100K,), False): "dbrx",
    ((_CL100K,), True): "llama-bpe",
    ((_QWEN2,), False): "qwen2",
}
"""How a tokenizer cuts text, and whether a word of the vocabulary is taken before any merge: llama.cpp's name for it
(`tokenizer.ggml.pre`)."""

_UNREACHED = -1e9

# Texts that llama.cpp takes for the end of a reply wherever it finds them in a vocabulary (src/llama-vocab.cpp,
# special_eog_ids); ids beyond the three that have a key of their own must be among these.
_KNOWN_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<eos>",
    "<|end_of_text|>", "<｜end▁of▁sentence｜>",
)  # fmt: skip

# llama.cpp lets a token swallow the white space behind it only in files whose name holds "phi-3" or "phi3", and then
# lets all added tokens but these do so (src/llama-vocab.cpp); it looks up the last three, so they must be there.
_NEVER_SWALLOWS = ("<unk>", "<s>", "<|endoftext|>")
_PHI3 = re.compile("phi-?3", re.IGNORECASE)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llama.cpp's words; made by `of`."""

    tokens: tuple[str, ...]
    types: tuple[gguf.TokenType, ...]
    scores: tuple[float, ...] | None
    """Of a tokenizer of pieces (SentencePiece): which neighbours are joined first. None for one of bytes."""
    merges: tuple[str, ...]
    cut: str
    puts_space_first: bool
    swallows: bool
    """Added tokens swallow the white space behind them."""
    bos: int | None
    pad: int | None
    unknown: int | None
    ends: tuple[int, ...]
    chat_template: str

    @classmethod
    def of(cls, template: Template, n_tokens: int) -> Vocabulary:
        """Raises ModelError for a tokenizer that llama.cpp can not imitate."""
        tokenizer: Any = template.tokenizer
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ModelError(_WHERE, said("a tokenizer without tokenizer.json"), said("one that has it"), said(_MERGED))
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        model = spec["model"]
        if model["type"] != "BPE":
            raise ModelError(_WHERE, said("a {kind} tokenizer", kind=model["type"]), said("byte pairs"), said(_CONVERT))
        pieces = bool(model.get("byte_fallback"))
        merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
        if not merges:
            raise ModelError(
                _WHERE, said("a tokenizer that merges nothing"), said("byte pairs with merges"), said(_MERGED)
            )
        tokens, types = _tokens(spec, n_tokens, pieces)
        if pieces and tokenizer.unk_token_id is not None:
            types[tokenizer.unk_token_id] = gguf.TokenType.UNKNOWN
        _check_normalizer(spec, pieces)
        return cls(
            tokens=tuple(tokens),
            types=tuple(types),
            scores=tuple(_scores(model["vocab"], merges, n_tokens)) if pieces else None,
            merges=() if pieces else tuple(" ".join(merge) for merge in merges),
            cut="default" if pieces else _cut(spec),
            puts_space_first=pieces and _puts_space_first(spec),
            swallows=_swallows(spec),
            bos=_id(tokenizer.bos_token_id),
            pad=_id(tokenizer.pad_token_id),
            unknown=_id(tokenizer.unk_token_id) if pieces else None,
            ends=_ends(template, tokens),
            chat_template=chat_template(template),
        )

    def named(self, title: str) -> str:
        """The title as the file's name; it decides about white space (see `_NEVER_SWALLOWS`)."""
        if self.swallows:
            return title if _PHI3.search(title) else f"{title} (tokens as phi-3)"
        return _PHI3.sub("phi 3", title)

    def write(self, writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2" if self.scores is None else "llama")
        writer.add_tokenizer_pre(self.cut)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types([int(kind) for kind in self.types])
        if self.scores is None:
            writer.add_token_merges(list(self.merges))
        else:
            writer.add_token_scores(list(self.scores))
            writer.add_add_space_prefix(self.puts_space_first)
        if self.bos is not None:
            writer.add_bos_token_id(self.bos)
        if self.pad is not None:
            writer.add_pad_token_id(self.pad)
        if self.unknown is not None:
            writer.add_unk_token_id(self.unknown)
        # The template writes whatever stands in front.
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(False)
        keys = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
        for add, i in zip(keys, self.ends, strict=False):
            add(i)
        # Ollama's own engine reads all of them here (model/models, tokenizer.ggml.eos_token_ids).
        writer.add_array("tokenizer.ggml.eos_token_ids", list(self.ends))
        writer.add_chat_template(self.chat_template)


_FOLD = (
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% set told = namespace(system=messages[0]['content'], rest=[]) %}"
    "{% for message in messages[1:] %}"
    "{% if told.system is not none and message['role'] == 'user' %}"
    "{% set told.rest = told.rest + [{'role': 'user', 'content': told.system + '\\n\\n' + message['content']}] %}"
    "{% set told.system = none %}"
    "{% else %}{% set told.rest = told.rest + [message] %}{% endif %}"
    "{% endfor %}"
    "{% if told.system is none %}{% set messages = told.rest %}{% endif %}"
    "{% endif %}"
)


def chat_template(template: Template) -> str:
    """The trained template; one that has no place for a system text is given it in front of the first user turn, as in
    training."""
    return _FOLD + template.text if template.folds_system else template.text


def _id(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _tokens(spec: Mapping[str, Any], n_tokens: int, pieces: bool) -> tuple[list[str], list[gguf.TokenType]]:
    vocab: dict[str, int] = spec["model"]["vocab"]
    highest = max([*vocab.values(), *(added["id"] for added in spec["added_tokens"])])
    if highest >= n_tokens:
        found = said("a token {highest} and weights for {n}", highest=highest, n=n_tokens)
        raise ModelError(_WHERE, found, said("a row of the embedding for every token"), said(_MERGED))
    tokens = [f"[PAD{i}]" for i in range(n_tokens)]
    types = [gguf.TokenType.UNUSED] * n_tokens
    for text, i in vocab.items():
        is_byte = pieces and re.fullmatch("<0x[0-9A-F]{2}>", text) is not None
        tokens[i], types[i] = text, gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL
    for added in spec["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    return tokens, types


def _scores(vocab: Mapping[str, int], merges: Sequence[Sequence[str]], n_tokens: int) -> list[float]:
    """llama.cpp joins the neighbours whose piece has the highest score: the piece that is made first."""
    scores = [_UNREACHED] * n_tokens
    for rank, (left, right) in enumerate(merges):
        i = vocab[left + right]
        scores[i] = max(scores[i], -float(rank))
    return scores


def _ends(template: Template, tokens: Sequence[str]) -> tuple[int, ...]:
    """The stop ids; the tokenizer's eos first, because chat templates write it by that name."""
    stops = list(template.stop_ids)
    eos = template.tokenizer.eos_token_id
    if eos in stops:
        stops.remove(eos)
        stops.insert(0, eos)
    first, rest = stops[:1], sorted(stops[1:], key=lambda i: tokens[i] in _KNOWN_ENDS)
    if unknown := [tokens[i] for i in rest[2:] if tokens[i] not in _KNOWN_ENDS]:
        found = said("{n} stop tokens, {token} among them", n=len(stops), token=unknown[0])
        raise ModelError(_WHERE, found, said("three, or others that llama.cpp knows by their text"), said(_MERGED))
    return tuple(first + rest)


def _swallows(spec: Mapping[str, Any]) -> bool:
    """Whether llama.cpp can be told, and must be, that added tokens swallow the white space behind them."""
    added = {token["content"]: token for token in spec["added_tokens"]}
    swallowing = [token["rstrip"] for text, token in added.items() if text not in _NEVER_SWALLOWS]
    known = {*added, *spec["model"]["vocab"]}
    return bool(swallowing) and all(swallowing) and known.issuperset((*_NEVER_SWALLOWS, "</s>"))


def _parts(step: Mapping[str, Any] | None, inside: str) -> list[Mapping[str, Any]]:
    """The steps of a sequence, or the one step."""
    if step is None:
        return []
    return list(step[inside]) if step["type"] == "Sequence" else [step]


def _check_normalizer(spec: Mapping[str, Any], pieces: bool) -> None:
    """llama.cpp's pieces know a space written as ▁, with or without one in front; its bytes know nothing, and NFC
    leaves what is commonly typed as it is."""
    known = ("Prepend", "Replace") if pieces else ("NFC",)
    for step in _parts(spec["normalizer"], "normalizers"):
        space = step["type"] != "Replace" or (step["pattern"].get("String"), step["content"]) == (" ", "▁")
        if step["type"] not in known or not space:
            raise ModelError(
                _WHERE,
                said("a tokenizer that rewrites text ({how})", how=step["type"]),
                said("one that does not"),
                said(_CONVERT),
            )


def _puts_space_first(spec: Mapping[str, Any]) -> bool:
    """Whether text behind a special token begins with a space that nobody wrote."""
    if any(step["type"] == "Prepend" for step in _parts(spec["normalizer"], "normalizers")):
        return True
    steps = _parts(spec["pre_tokenizer"], "pretokenizers")
    return any(step.get("prepend_scheme") == "always" for step in steps)


def _cut(spec: Mapping[str, Any]) -> str:
    """llama.cpp's name for how text is cut before it is merged."""
    steps = []
    for step in _parts(spec["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Split":
            pattern = step["pattern"].get("Regex", str(step["pattern"]))
            steps.append(_LETTERS if pattern.startswith(_LETTERS) else pattern)
        elif step["type"] == "Digits" and step["individual_digits"]:
            steps.append("digits")
        elif step["type"] != "ByteLevel":
            steps.append(step["type"])
        elif step.get("add_prefix_space"):
            steps.append("a space in front")
        elif step.get("use_regex", True):
            steps.append("bytes")
    found = _CUTS.get((tuple(steps), bool(spec["model"].get("ignore_merges"))))
    if found is None:
        expected = said("the way of {names}", names=", ".join(_CUTS.values()))
        raise ModelError(
            _WHERE, said("a tokenizer that cuts text by {how!r}", how=" ".join(steps)[:200]), expected, said(_CONVERT)
        )
    return found


# --- opened again -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    """What the gguf library's reader found in a file, held against what should be there."""

    tensors: float
    """Share of the weights that are there by name and shape, with nothing else beside them."""
    difference: float
    """Largest difference of a number from the merged weights, in parts of the largest number of its tensor."""
    tokens: float
    """Share of ids whose text and kind are the tokenizer's."""
    stop_ids: bool
    chat_template: bool


class _Reader(gguf.GGUFReader):
    """The library's reader; it cuts every token of a vocabulary out of the file's map, and does so here by one call of
    numpy's instead of five: a third of the time where there are 256,000."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *_: Any, **__: Any) -> np.ndarray:
        return np.frombuffer(self.data, np.dtype(dtype).newbyteorder("<"), int(count), int(offset))


def compare(path: Path, contents: Contents) -> Read:
    """Opens a file again and compares it with the merged weights and the tokenizer, weight after weight."""
    reader = _Reader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    rope = dict(_rope_tensors(contents.config))
    same, difference = 0, 0.0
    for name, weight in contents._weights():
        tensor = found.pop(name, None)
        if tensor is not None and tuple(tensor.shape.tolist()[::-1]) == weight.shape:
            same += 1
            read = dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape)
            apart = np.abs(read - weight).max() / max(np.abs(weight).max(), 1e-30)
            difference = float(np.maximum(difference, apart))  # NaN if one is; Python's max passes over it
    unexpected = len(found.keys() ^ rope.keys())
    return Read(
        tensors=same / (len(contents.names) + unexpected),
        difference=difference,
        tokens=_same_tokens(reader, contents.template, int(contents.config.vocab_size)),
        stop_ids=_value(reader, "tokenizer.ggml.eos_token_ids") == list(contents.vocabulary.ends)
        and sorted(contents.vocabulary.ends) == sorted(contents.template.stop_ids),
        chat_template=_value(reader, "tokenizer.chat_template") == contents.vocabulary.chat_template,
    )


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _same_tokens(reader: gguf.GGUFReader, template: Template, n_tokens: int) -> float:
    """Share of ids whose text and kind are the tokenizer's; asked of the tokenizer itself, not of its file."""
    tokenizer: Any = template.tokenizer
    texts, kinds = _value(reader, "tokenizer.ggml.tokens"), _value(reader, "tokenizer.ggml.token_type")
    if len(texts) != n_tokens or len(kinds) != n_tokens:
        return 0.0
    n_known = len(tokenizer)
    expected = tokenizer.convert_ids_to_tokens(list(range(n_known)))
    added = tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special}
    marks = {int(gguf.TokenType.CONTROL), int(gguf.TokenType.UNKNOWN)}
    same = 0
    for i, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        if i >= n_known or expected[i] is None:
            same += kind == gguf.TokenType.UNUSED
        elif i in special:
            same += text == expected[i] and kind in marks
        elif i in added:
            same += text == expected[i] and kind == gguf.TokenType.USER_DEFINED
        else:
            same += text == expected[i] and kind in (gguf.TokenType.NORMAL, gguf.TokenType.BYTE)
    return same / n_tokens
