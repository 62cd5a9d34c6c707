"""Base and adapter as one set of weights, made tensor by tensor: never more in memory than one of them.

    W' = W + s · B · A                                   plain LoRA (arXiv 2106.09685, section 4.1); s = alpha / r, or
                                                         alpha / √r with rslora (arXiv 2312.03732)
    W' = m · (W + s · B · A) / ‖W + s · B · A‖           DoRA (arXiv 2402.09353, equation 5), the norm by row

Sums are formed in fp32, whatever the weights are kept in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import safe_open
from torch import Tensor

from tunesmith import model_files
from tunesmith.errors import ModelError, ProofError
from tunesmith.language import said
from tunesmith.runs import rundir

_PREFIX = "base_model.model."
# safetensors' words for types
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {kind: name for name, kind in _TYPES.items()}
SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Merged:
    """The weights of a base with those of an adapter added."""

    base: Path
    adapter: Path

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Name and weight, in the type of the base's files; those that the adapter changes in fp32.

        Raises ModelError before the first one when the adapter has a layer that the base has not.
        """
        settings = model_files.check_adapter(self.adapter)
        with safe_open(self.adapter / "adapter_model.safetensors", framework="pt") as adapter:
            changed = {key.removeprefix(_PREFIX).rpartition(".lora_A.")[0] for key in _names(adapter)} - {""}
            if absent := sorted({f"{layer}.weight" for layer in changed} - self.shapes().keys()):
                found = said("an adapter for {name}", name=absent[0])
                fix = said("Use the base that it was trained on.")
                raise ModelError(str(self.base), found, said("a weight of that name"), fix)
            for path in sorted(self.base.glob("*.safetensors")):
                with safe_open(path, framework="pt") as base:
                    for name in _names(base):
                        weight, layer = base.get_tensor(name), name.removesuffix(".weight")
                        if name != layer and layer in changed:
                            # A copy: what is written into a mapped weight stays in memory until the file is closed.
                            weight = _with_adapter(weight.to(torch.float32, copy=True), layer, adapter, settings)
                        yield name, weight

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's matrices."""
        return next(kind for shape, kind in self.shapes().values() if len(shape) > 1)

    def n_bytes(self, dtype: torch.dtype | None) -> int:
        """What the weights take on disk, in their own types or in `dtype`."""
        return sum(math.prod(shape) * (dtype or kind).itemsize for shape, kind in self.shapes().values())

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every weight in the base's files, in the order in which they come."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for path in sorted(self.base.glob("*.safetensors")):
            with safe_open(path, framework="pt") as base:
                for name in _names(base):
                    part = base.get_slice(name)
                    found[name] = tuple(part.get_shape()), _TYPES[part.get_dtype()]
        return found


def _names(file: Any) -> list[str]:
    return list(file.keys())


def _with_adapter(weight: Tensor, layer: str, adapter: Any, settings: Mapping[str, Any]) -> Tensor:
    a, b = (adapter.get_tensor(f"{_PREFIX}{layer}.lora_{which}.weight").float() for which in "AB")
    scale = settings["lora_alpha"] / (math.sqrt(len(a)) if settings.get("use_rslora") else len(a))
    if settings.get("fan_in_fan_out"):  # the weight lies transposed (GPT-2)
        return weight.addmm_(a.T, b.T, alpha=scale)
    weight.addmm_(b, a, alpha=scale)
    if settings.get("use_dora"):
        magnitude = adapter.get_tensor(f"{_PREFIX}{layer}.lora_magnitude_vector").float()
        weight.mul_((magnitude / weight.norm(dim=1))[:, None])
    return weight


def write(merged: Merged, folder: Path, dtype: torch.dtype | None) -> None:
    """Writes safetensors, in several files where one would be large, with an index; weight after weight goes to disk.

    `dtype` None: each as the base keeps it. Raises ProofError for a weight that is not finite in that type.
    """
    kinds = {
        name: (shape, dtype if dtype is not None and kind.is_floating_point else kind)
        for name, (shape, kind) in merged.shapes().items()
    }
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (shape, kind) in kinds.items():
        size = math.prod(shape) * kind.itemsize
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weights = iter(merged)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        index |= dict.fromkeys(names, file_name)
        with (folder / file_name).open("wb") as file:
            _write_head(file, {name: kinds[name] for name in names})
            for name in names:
                own, weight = next(weights)
                assert own == name
                weight = weight.to(kinds[name][1]).contiguous()
                if weight.is_floating_point() and not bool(weight.isfinite().all()):
                    raise not_finite(name, str(weight.dtype))
                file.write(cast("Any", weight.flatten().view(torch.uint8).numpy()))
    if len(shards) > 1:
        total = sum(math.prod(shape) * kind.itemsize for shape, kind in kinds.values())
        rundir.write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index}
        )


def _write_head(file: BinaryIO, kinds: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """The head of a safetensors file (https://github.com/huggingface/safetensors#format); its weights follow in this
    order. The library itself writes whole files only, from weights that are all in memory."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, kind) in kinds.items():
        size = math.prod(shape) * kind.itemsize
        head[name] = {"dtype": _NAMES[kind], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def not_finite(name: str, dtype: str) -> ProofError:
    """The error of a weight that its type can not hold."""
    return ProofError(
        name,
        said("a number that is not finite in {dtype}", dtype=dtype),
        said("finite weights"),
        said("Choose another --dtype: float16 holds nothing above 65,504."),
    )
