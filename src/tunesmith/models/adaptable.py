"""Which layers of a model get an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import RecipeError
from tunesmith.language import said
from tunesmith.recipe import LoraSettings
from tunesmith.spelling import nearest

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
