"""The settings: every field with its meaning, default and bounds, once.

`--help`, docs/reference/settings.md and error messages read them from here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tunesmith.errors import RecipeError

Source = Literal["default", "file", "flag"]


def _every(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d* (steps?|minutes?|epochs?)", text):
        raise ValueError("should read like '100 steps', '10 minutes' or '1 epoch'")
    return text


def _none_is_absent(value: object) -> object:
    return None if value == "none" else value


def _words(value: object) -> object:
    return value.split(",") if isinstance(value, str) and value != "all-linear" else value


Every = Annotated[str, AfterValidator(_every)]


class Section(BaseModel):
    """A group of settings; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)


class ModelSettings(Section):
    """Which model is tuned, and how it is held in memory."""

    name: str = Field(
        "smollm2", min_length=1, description="Alias, hub id (hf:org/name, ms:org/name, org/name) or folder."
    )
    revision: Annotated[str | None, BeforeValidator(_none_is_absent)] = Field(
        None, description="Branch, tag or commit of the hub repository; the commit used is recorded."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number type of the frozen weights; auto is float32 on a CPU and bfloat16 on a GPU."
    )
    quantize: Literal["none", "nf4"] = Field(
        "none", description="Hold the frozen weights in 4 bits (needs a CUDA GPU)."
    )


class DataSettings(Section):
    """Which rows are learned from."""

    path: str = Field("", description="JSON array, JSONL, CSV or Parquet file of examples.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Other names for the fields, as field: column, e.g. output: answer."
    )
    max_length: Annotated[int, Field(ge=2)] | Literal["auto"] = Field(
        "auto", description="Longest row in tokens; longer rows are faults. auto is what the model can read."
    )
    allow_set_aside: bool = Field(False, description="Go on without the faulty rows; each is named in the ledger.")
    on_repeats: Literal["note", "fault"] = Field(
        "note", description="What a row is that says the same as an earlier one: noted, or a fault."
    )


class TemplateSettings(Section):
    """How a conversation is written for the model."""

    name: str = Field(
        "auto", description="auto (the tokenizer's own, or the alias's), or the name of a shipped template."
    )
    path: Annotated[str | None, BeforeValidator(_none_is_absent)] = Field(
        None, description="A Jinja file to use instead."
    )
    system: Annotated[str | None, BeforeValidator(_none_is_absent)] = Field(
        None, description="System text for every row that has none of its own; chat uses it too."
    )


class LoraSettings(Section):
    """The adapter: low-rank updates beside frozen linear layers (arXiv 2106.09685)."""

    r: int = Field(8, ge=1, description="Rank of the two factors; the adapter's size grows linearly with it.")
    alpha: float = Field(32, gt=0, description="Scale: the update is multiplied by alpha / r.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Share of adapter inputs dropped while training.")
    targets: Annotated[Literal["all-linear"] | list[str], BeforeValidator(_words)] = Field(
        "all-linear",
        description="Names of the layers that get an adapter; all-linear is every linear layer but the head.",
    )
    variant: Literal["plain", "rslora", "dora", "pissa"] = Field(
        "plain",
        description="rslora scales by alpha / sqrt(r); dora learns magnitudes; pissa starts from singular vectors.",
    )


class TrainSettings(Section):
    """How the adapter is trained."""

    epochs: int = Field(3, ge=1, description="How often every row is seen.")
    examples_per_step: int = Field(16, ge=1, description="Rows per optimizer step, over all devices.")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="Peak learning rate of AdamW.")
    scheduler: str = Field("cosine", description="Shape of the learning rate: any name that transformers knows.")
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="Share of the steps in which the learning rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="Decay of the adapter's weights per step.")
    max_grad_norm: float = Field(1.0, ge=0, description="Longer gradients are scaled down to this norm; 0 = never.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of initialisation, data order, hold-out and dropout.")
    save_every: Every = Field(
        "100 steps", description="How often a checkpoint is written, e.g. '100 steps', '10 minutes'."
    )
    keep_checkpoints: int = Field(3, ge=1, description="How many checkpoints stay on disk; the oldest go first.")
    report_to: Annotated[list[str], BeforeValidator(lambda value: [] if value in ("none", None) else _words(value))] = (
        Field(
            default_factory=list,
            description="Trackers: tensorboard, swanlab, wandb, trackio or any that transformers knows.",
        )
    )


class EngineSettings(Section):
    """How a step is computed; nothing here changes its result."""

    tokens_per_micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="Tokens, padding included, that go through the model at once."
    )
    recompute_layers: Literal["auto", "none", "all"] = Field(
        "auto", description="Recompute activations in the backward pass to save memory; auto is none."
    )


class EvalSettings(Section):
    """Rows that are kept out of training to measure on."""

    hold_out: float = Field(0.05, ge=0, lt=1, description="Share of the rows held out, at most 200 rows; 0 = none.")
    every: Every = Field("1 epoch", description="How often the held-out loss is measured, e.g. '1 epoch', '50 steps'.")


class Recipe(Section):
    """All settings of a run."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    template: TemplateSettings = TemplateSettings()
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    engine: EngineSettings = EngineSettings()
    eval: EvalSettings = EvalSettings()


def setting_names() -> list[str]:
    """Every setting's dotted name, in the order of the recipe."""
    return [f"{section}.{name}" for section, field in Recipe.model_fields.items() for name in _fields(field.annotation)]


def resolve(path: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> tuple[Recipe, dict[str, Source]]:
    """The recipe of a file (if any) with `flags` (dotted name → value) laid over it, and where each value came from.

    Raises RecipeError when the file can not be read, a key is unknown or a value impossible; all problems are named.
    """
    tree: dict[str, dict[str, Any]] = {}
    sources: dict[str, Source] = dict.fromkeys(setting_names(), "default")
    given: list[tuple[str, Any, Source, str]] = [(name, value, "file", str(path)) for name, value in _from_file(path)]
    given += [(name, value, "flag", f"--set {name}") for name, value in (flags or {}).items()]
    unknown = [_unknown(name, where) for name, _, _, where in given if _base(name) not in sources]
    if unknown:
        raise RecipeError(*unknown[0]) if len(unknown) == 1 else _several(unknown)
    for name, value, source, _ in given:
        base = _base(name)
        section, _, field = base.partition(".")
        if name == base:
            tree.setdefault(section, {})[field] = value
        else:  # data.columns.output=answer adds one entry
            entries = tree.setdefault(section, {}).setdefault(field, {})
            if not isinstance(entries, dict):
                raise RecipeError(name, f"{base} given as {entries!r} too", "one form", "Leave one of the two out.")
            entries[name.removeprefix(base + ".")] = value
        sources[base] = source
    wheres = {_base(name): where for name, _, _, where in given}
    try:
        return Recipe.model_validate(tree), sources
    except ValidationError as error:
        raise _invalid(error, wheres) from None


def parse_flag(text: str) -> tuple[str, Any]:
    """`key=value` of a `--set`; the value is read as YAML, so lists and numbers work.

    >>> parse_flag("lora.r=16")
    ('lora.r', 16)
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise RecipeError(f"--set {text}", "no '='", "key=value", "Write for instance --set lora.r=16.")
    try:
        return name.strip(), _number(yaml.safe_load(value) if value.strip() else value)
    except yaml.YAMLError:
        return name.strip(), value


def write(recipe: Recipe, sources: Mapping[str, Source]) -> str:
    """The recipe as YAML, every setting with where it came from as a comment; `resolve` reads it back."""
    lines = ["# Every setting as used. Train again with: tunesmith train recipe.yaml --out DIR"]
    for section, fields in recipe.model_dump().items():
        lines.append(f"{section}:")
        for name, value in fields.items():
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=2**20).strip()
            lines.append(f"  {name}: {text.removesuffix('...').strip()}  # {sources[f'{section}.{name}']}")
    return "\n".join(lines) + "\n"


def _fields(section: Any) -> list[str]:
    return list(section.model_fields)


def _base(name: str) -> str:
    return "data.columns" if name.startswith("data.columns.") else name


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-4 as text; everybody who writes it means the number.
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def _from_file(path: str | Path | None) -> list[tuple[str, Any]]:
    if path is None:
        return []
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            str(path),
            f"no readable recipe ({error})",
            "a YAML file in UTF-8",
            "Check the name, or leave it out and use --set.",
        ) from None
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        problem = getattr(error, "problem", None) or "text that is not YAML"
        raise RecipeError(
            f"{path}:{line}", str(problem), "YAML", "Mend the line; two spaces indent a section."
        ) from None
    if not isinstance(tree, dict):
        raise RecipeError(
            str(path), f"a {type(tree).__name__}", "sections with settings", "Start with for instance 'lora:'."
        )
    given: list[tuple[str, Any]] = []
    for section, fields in tree.items():
        if section not in Recipe.model_fields:
            raise RecipeError(*_unknown(str(section), str(path)))
        if fields is None:
            continue
        if not isinstance(fields, dict):
            raise RecipeError(
                f"{path}: {section}", repr(fields), "settings below it", f"Write '{section}:' and indent its settings."
            )
        given += [(f"{section}.{name}", _number(value)) for name, value in fields.items()]
    return given


def _unknown(name: str, where: str) -> tuple[str, str, str, str]:
    known = setting_names()
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:  # lr, rank: the last part alone may be close to a setting's own name
        last = name.rpartition(".")[2]
        tails = {setting.rpartition(".")[2]: setting for setting in known}
        near = [tails[tail] for tail in difflib.get_close_matches(last, tails, n=1, cutoff=0.6)]
    fix = f"Did you mean {near[0]}?" if near else "Settings: " + ", ".join(known) + "."
    return where, f"the unknown setting '{name}'", "one of the settings of docs/reference/settings.md", fix


def _several(problems: Sequence[tuple[str, str, str, str]]) -> RecipeError:
    wheres, founds, _, fixes = zip(*problems, strict=True)
    return RecipeError(", ".join(dict.fromkeys(wheres)), " and ".join(founds), problems[0][2], " ".join(fixes))


def _invalid(error: ValidationError, wheres: Mapping[str, str]) -> RecipeError:
    problems: dict[str, tuple[str, str, str, str]] = {}
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"][:2])
        expected = item["msg"].removeprefix("Value error, ").removeprefix("Input ").removeprefix("should be ")
        section, _, field = name.partition(".")
        description = Recipe.model_fields[section].annotation.model_fields[field].description  # type: ignore[union-attr]
        if name in problems:  # one value that fits none of several types
            expected = f"{problems[name][2]}, or {expected}"
        problems[name] = (
            f"{wheres.get(name, 'recipe')}: {name}",
            repr(item["input"]),
            expected,
            f"{name}: {description}",
        )
    found = list(problems.values())
    return (
        RecipeError(*found[0])
        if len(found) == 1
        else RecipeError(
            ", ".join(p[0] for p in found),
            " and ".join(p[1] for p in found),
            "; ".join(p[2] for p in found),
            " ".join(p[3] for p in found),
        )
    )
