"""The settings: every field with its meaning, default and bounds, once.

`--help`, docs/reference/settings.md and error messages read them from here.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from yaml.composer import ComposerError

from tunesmith import reading
from tunesmith.data.records import FIELDS
from tunesmith.errors import RecipeError
from tunesmith.language import marked, said
from tunesmith.spelling import nearest

Source = Literal["default", "file", "flag"]

# What other tools call our settings, for hints.
OTHER_NAMES = {
    "model.name": "model_name_or_path model_name model_id base_model base_model_name pretrained_model_name_or_path",
    "model.dtype": "torch_dtype precision bf16 fp16",
    "model.quantize": "load_in_4bit qlora quantization quantization_bit quant_bits",
    "data.path": "dataset datasets dataset_path dataset_name data_path data_file train_file train_data train_path",
    "data.max_length": (
        "max_seq_length max_seq_len max_sequence_length seq_len seq_length sequence_len cutoff_len max_len "
        "model_max_length"
    ),
    "template.path": "chat_template template_path jinja",
    "template.system": "system_prompt default_system system_message",
    "lora.r": "rank lora_r lora_rank",
    "lora.alpha": "lora_alpha scale scaling",
    "lora.dropout": "lora_dropout",
    "lora.targets": "target_modules lora_target lora_targets lora_target_modules target lora_target_linear modules",
    "lora.variant": "use_dora use_rslora init_lora_weights peft_type",
    "train.epochs": "epoch num_epochs n_epochs num_train_epochs max_epochs",
    "train.examples_per_step": (
        "batch_size train_batch_size per_device_train_batch_size gradient_accumulation_steps global_batch_size "
        "effective_batch_size grad_accum"
    ),
    "train.learning_rate": "lr peak_lr max_lr base_lr",
    "train.scheduler": "lr_scheduler lr_scheduler_type lr_schedule",
    "train.warmup_ratio": "warmup warmup_steps num_warmup_steps",
    "train.weight_decay": "wd decay",
    "train.max_grad_norm": "grad_clip clip_grad gradient_clipping gradient_clip_val max_gradient_norm",
    "train.seed": "random_seed random_state data_seed",
    "train.save_every": "save_steps save_strategy checkpoint_every checkpoint_interval save_interval",
    "train.keep_checkpoints": "save_total_limit max_checkpoints",
    "train.report_to": "logger loggers trackers tracker use_wandb",
    "engine.tokens_per_micro_batch": "micro_batch_size max_tokens_per_batch",
    "engine.recompute_layers": "gradient_checkpointing use_gradient_checkpointing activation_checkpointing",
    "eval.hold_out": (
        "val_size val_set_size val_split eval_size eval_split test_size validation_split split_dataset_ratio"
    ),
    "eval.every": "eval_steps eval_strategy evaluation_strategy eval_every eval_interval",
    "--out": "output_dir out output output_path save_dir",
}


def _every(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d* (steps?|minutes?|epochs?)", text):
        raise ValueError(said("something like '100 steps', '10 minutes' or '1 epoch'"))
    return text


def _none_is_absent(value: object) -> object:
    return None if isinstance(value, str) and value.lower() in ("none", "null") else value


def _words(value: object) -> object:
    """A list of words; one text may hold several, with commas between."""
    if not isinstance(value, str) or value == "all-linear":
        return value
    return [word.strip() for word in value.split(",") if word.strip()]


def _trackers(value: object) -> object:
    return [] if _none_is_absent(value) is None else _words(value)


def _field_names(columns: dict[str, str]) -> dict[str, str]:
    for name in columns:
        if name not in FIELDS:
            near = nearest(name, FIELDS)
            expected = said("one of {names} before the colon", names=", ".join(FIELDS))
            raise ValueError(expected + (f" ({near}?)" if near else ""))
    return columns


Every = Annotated[str, AfterValidator(_every)]
Names = Annotated[list[str], Field(min_length=1)]
_Number = TypeVar("_Number", int, float)


class Section(BaseModel):
    """A group of settings; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: object, info: Any) -> object:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError(said("something else than a truth value"))  # Python would take true for 1
        return value


class ModelSettings(Section):
    """Which model is tuned, and how it is held in memory."""

    name: str = Field(
        default="smollm2", min_length=1, description="Alias, hub id (hf:org/name, ms:org/name, org/name) or folder."
    )
    revision: Annotated[str | None, BeforeValidator(_none_is_absent)] = Field(
        default=None, description="Branch, tag or commit of the hub repository; the commit used is recorded."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number type of the frozen weights; auto is float32 on a CPU, bfloat16 on a GPU, and float16 on "
        "one from before Ampere. On a CPU layers written by hand (the Llama family, Phi-3, Gemma) compute in 32 bits "
        "whatever the weights have.",
    )
    quantize: Literal["none", "nf4"] = Field(
        default="none", description="Hold the frozen weights in 4 bits (needs a CUDA GPU)."
    )


class DataSettings(Section):
    """Which rows are learned from."""

    path: str = Field(default="", description="JSON array, JSONL, CSV or Parquet file of examples.")
    columns: Annotated[dict[str, str], AfterValidator(_field_names)] = Field(
        default_factory=dict, description="Other names for the fields, as field: column, e.g. output: answer."
    )
    rehearse: Annotated[str | None, BeforeValidator(_none_is_absent)] = Field(
        default=None,
        description="File of general prompts to rehearse instead of the shipped ones: a prompt a line, or JSONL.",
    )
    max_length: Annotated[int, Field(ge=2)] | Literal["auto"] = Field(
        default="auto", description="Longest row in tokens; longer rows are faults. auto is what the model can read."
    )
    allow_set_aside: bool = Field(
        default=False, description="Go on without the faulty rows; each is named in the ledger."
    )
    on_repeats: Literal["note", "fault"] = Field(
        default="note", description="What a row is that says the same as an earlier one: noted, or a fault."
    )


class TemplateSettings(Section):
    """How a conversation is written for the model."""

    name: str = Field(
        default="auto", description="auto (the tokenizer's own, or the alias's), or the name of a shipped template."
    )
    path: Annotated[str | None, BeforeValidator(_none_is_absent)] = Field(
        default=None, description="A Jinja file to use instead."
    )
    system: Annotated[str | None, BeforeValidator(_none_is_absent)] = Field(
        default=None, description="System text for every row that has none of its own; chat uses it too."
    )


class LoraSettings(Section):
    """The adapter: low-rank updates beside frozen linear layers (arXiv 2106.09685)."""

    r: int = Field(default=16, ge=1, description="Rank of the two factors; the adapter's size grows linearly with it.")
    alpha: float = Field(default=32, gt=0, description="Scale: the update is multiplied by alpha / r.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of adapter inputs dropped while training.")
    targets: Annotated[Literal["all-linear"] | Names, BeforeValidator(_words)] = Field(
        default="all-linear",
        description="Names of the layers that get an adapter; all-linear is every linear layer but the head.",
    )
    variant: Literal["plain", "rslora", "dora", "pissa"] = Field(
        default="plain",
        description="rslora scales by alpha / sqrt(r); dora learns magnitudes; pissa starts from singular vectors.",
    )


class TrainSettings(Section):
    """How the adapter is trained."""

    epochs: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="How often every row is seen; auto is more often where there are few rows."
    )
    examples_per_step: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="Rows per optimizer step, over all devices; auto is more where there are many rows."
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = Field(
        default="auto", description="Peak learning rate of AdamW; auto is lower for a wider model."
    )
    scheduler: str = Field(
        default="cosine", description="Shape of the learning rate: any name that transformers knows."
    )
    warmup_ratio: float = Field(
        default=0.03, ge=0, le=1, description="Share of the steps in which the learning rate rises."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Decay of the adapter's weights per step.")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Longer gradients are scaled down to this norm; 0 = never."
    )
    seed: int = Field(
        default=0, ge=0, le=2**32 - 1, description="Seed of initialisation, data order, hold-out and dropout."
    )
    save_every: Every = Field(
        default="100 steps", description="How often a checkpoint is written, e.g. '100 steps', '10 minutes'."
    )
    keep_checkpoints: int = Field(
        default=3, ge=1, description="How many checkpoints stay on disk; the oldest go first."
    )
    rehearse: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = Field(
        default="auto",
        description="Share of the learned tokens that are the base's own answers to general prompts, trained along so "
        "that nothing is forgotten; 0 = none.",
    )
    report_to: Annotated[list[str], BeforeValidator(_trackers)] = Field(
        default_factory=list,
        description="Trackers: tensorboard, swanlab, wandb, trackio or any that transformers knows.",
    )


class EngineSettings(Section):
    """How a step is computed; nothing here changes its result."""

    tokens_per_micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Tokens that go through the model at once, beside those that all of their rows begin with; a "
        "longer row goes alone.",
    )
    share_prefix: bool = Field(
        default=True,
        description="What rows of a step have in common from their first token on is computed once; with dropout such "
        "tokens share one mask.",
    )
    attention: Literal["auto", "reference", "gather", "flex"] = Field(
        default="auto", description="How attention is computed; auto is flex on a GPU and gather on a CPU."
    )
    recompute_layers: Annotated[int, Field(ge=0)] | Literal["auto", "none", "all"] = Field(
        default="auto",
        description="How many layers recompute their activations in the backward pass to save memory; auto is none.",
    )
    self_check: bool = Field(
        default=True,
        description="Before the first step of a new model, compare a few tokens with plain transformers and peft.",
    )


class EvalSettings(Section):
    """Rows that are kept out of training to measure on."""

    hold_out: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = Field(
        default="auto",
        description="Share of the rows held out, at most 200 rows; 0 = none; auto is a twentieth, but 20 rows of 100 "
        "to 400, 10 of 50 to 99 and a fifth of fewer.",
    )
    every: Every = Field(
        default="1 epoch", description="How often the held-out loss is measured, e.g. '1 epoch', '50 steps'."
    )
    keep: Literal["last", "best"] = Field(
        default="last", description="The adapter that is kept: of the last step, or of the lowest held-out loss."
    )
    patience: int = Field(
        default=0,
        ge=0,
        description="Stop when the held-out loss was measured so many times without a new lowest; 0 = never.",
    )


class Recipe(Section):
    """All settings of a run."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    template: TemplateSettings = TemplateSettings()
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    engine: EngineSettings = EngineSettings()
    eval: EvalSettings = EvalSettings()


LIKE: Mapping[str, Mapping[str, Any]] = {
    "tutorial": {
        "lora.r": 8,
        "lora.alpha": 32,
        "lora.dropout": 0.1,
        "train.epochs": 3,
        "train.examples_per_step": 16,
        "train.learning_rate": 1e-4,
        "train.rehearse": 0.0,
    },
}
"""Sets of settings by name: what notebooks copied per model have."""


def settled(value: _Number | Literal["auto"]) -> _Number:
    """The value of a setting that may be `auto`, of a recipe to which the plan's choices have been applied."""
    if isinstance(value, str):
        raise ValueError("the plan's choices have not been applied to this recipe")
    return value


def setting_names() -> list[str]:
    """Every setting's dotted name, in the order of the recipe."""
    return list(_settings())


def resolve(
    path: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    *,
    like: str | None = None,
    as_written: bool = False,
) -> tuple[Recipe, dict[str, Source]]:
    """The recipe of a file (if any) with `flags` (dotted name → value) laid over it, and where each value came from.
    Below both lie the settings of `LIKE[like]`.

    A file or folder that the recipe names, and that is not there from the folder at hand, is looked for beside the
    recipe, and where the run was started whose recipe it is; unless all is wanted `as_written`.

    Raises RecipeError when the file can not be read, a key is unknown or a value impossible; all problems are named.
    """
    if like is not None and like not in LIKE:
        names = ", ".join(LIKE)
        raise RecipeError(
            f"--like {like}",
            said("an unknown name"),
            said("one of {names}", names=names),
            said("Use {option}.", option=f"--like {next(iter(LIKE))}"),
        )
    given = [
        *(_Given(name, value, "flag", f"--like {like}") for name, value in LIKE.get(like or "", {}).items()),
        *_from_file(path, as_written),
        *(_Given(name, value, "flag", f"--set {name}") for name, value in (flags or {}).items()),
    ]
    sources: dict[str, Source] = dict.fromkeys(setting_names(), "default")
    problems = [_unknown(item) for item in given if _base(item.name) not in sources]
    tree: dict[str, dict[str, Any]] = {}
    places: dict[str, str] = {}
    for name, value, source, where in given:
        base = _base(name)
        if base not in sources:
            continue
        section, _, field = base.partition(".")
        if name == base:
            tree.setdefault(section, {})[field] = value
        else:  # data.columns.output=answer adds one entry
            entries = tree.setdefault(section, {}).get(field) or {}
            if not isinstance(entries, dict):
                found = said("{name} given as {value!r} too", name=base, value=entries)
                problems.append(_Problem(where, name, found, said("one form"), said("Leave one of the two out.")))
                continue
            tree[section][field] = {**entries, name.removeprefix(base + "."): value}
        sources[base], places[base] = source, where
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise _joined([*problems, *_impossible(error, places)]) from None
    if recipe.lora.variant == "pissa" and recipe.model.quantize == "nf4":
        problems.append(
            _Problem(
                places.get("lora.variant", "recipe"),
                "lora.variant",
                said("pissa with weights of 4 bits, whose singular vectors it can not take out"),
                said("plain, rslora or dora"),
                said("Or leave model.quantize at none."),
            )
        )
    if problems:
        raise _joined(problems)
    return recipe, sources


def parse_flag(text: str) -> tuple[str, Any]:
    """`key=value` of a `--set`. Text is taken as it stands; other values are read as YAML, so lists and numbers work.

    >>> parse_flag("lora.r=16")
    ('lora.r', 16)
    >>> parse_flag("template.system=You are number #1: be brief.")
    ('template.system', 'You are number #1: be brief.')
    """
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not name:
        fix = said("Write for instance --set lora.r=16.")
        raise RecipeError(f"--set {text}", said("no '='"), said("key=value"), fix)
    try:
        read = yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: the 45th of a month, a number of 5000 digits
        return name, value
    if _is_text(name):
        quoted = value[:1] in ("'", '"') and isinstance(read, str)
        return name, read if quoted else value
    return name, _number(read) if value.strip() else value


def sources_of(recipe: Recipe) -> dict[str, Source]:
    """Where the values of a recipe made in Python come from: what differs from the default was given."""
    given, default = recipe.model_dump(), Recipe().model_dump()
    names = (name.partition(".") for name in setting_names())
    return {
        f"{section}.{field}": "default" if given[section][field] == default[section][field] else "flag"
        for section, _, field in names
    }


def write(recipe: Recipe, sources: Mapping[str, Source], chosen: Mapping[str, str] = MappingProxyType({})) -> str:
    """The recipe as YAML, every setting with where it came from as a comment, and beside `auto` what was `chosen`;
    `resolve` reads it back, `auto` as `auto`."""
    lines = ["# Every setting; beside auto, what was chosen. Train again with: tunesmith train recipe.yaml --out DIR"]
    for section, fields in recipe.model_dump().items():
        lines.append(f"{section}:")
        for name, value in fields.items():
            dotted = f"{section}.{name}"
            here = f"; {chosen[dotted]}" if value == "auto" and dotted in chosen else ""
            lines.append(f"  {name}: {_yaml(value)}  # {sources[dotted]}{here}")
    return "\n".join(lines) + "\n"


def _yaml(value: object) -> str:
    """The value on one line; a text with line breaks fits on one only in double quotes."""
    for style in (None, '"'):
        text = yaml.safe_dump(
            value, default_flow_style=True, default_style=style, allow_unicode=True, width=float("inf")
        )
        text = text.removesuffix("\n").removesuffix("\n...")
        if not re.search("[\n\x85\u2028\u2029]", text):
            break
    return text


@cache
def _settings() -> Mapping[str, FieldInfo]:
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return {
        f"{section}.{name}": field
        for section, settings in sections.items()
        if isinstance(settings, type) and issubclass(settings, Section)
        for name, field in settings.model_fields.items()
    }


def _base(name: str) -> str:
    return "data.columns" if name.startswith("data.columns.") else name


def _is_text(name: str) -> bool:
    if name != _base(name):
        return True
    setting = _settings().get(name)
    return setting is not None and setting.annotation in (str, str | None)


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-4 as text; everybody who writes it means the number.
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value):
        return float(value)
    return value


# --- a recipe's file --------------------------------------------------------------------------------------------------


class _Given(NamedTuple):
    """A setting that somebody set, and where."""

    name: str
    value: Any
    source: Source
    where: str


_MOST_BYTES = 1 << 20
_MOST_NODES = 10_000
_DEPTH = 32


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML's own loader keeps the last without a word, and what lets a small
    file become a large value."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._n_nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        self._n_nodes += 1
        self._depth += 1
        if self.check_event(yaml.AliasEvent):
            problem = said("an alias (*name); write the value itself")
        elif self._n_nodes > _MOST_NODES:
            problem = said("more than {n:,} values", n=_MOST_NODES)
        elif self._depth > _DEPTH:
            problem = said("very deep nesting")
        else:
            node = super().compose_node(parent, index)
            self._depth -= 1
            return node
        raise ComposerError(None, None, problem, mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in _pairs(node):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, said("'{key}' twice", key=key.value), key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> tuple[Any, dict[tuple[Any, ...], int]]:
    """The file's content, and the line of every section and setting in it; raises RecipeError."""
    if Path(path).suffix.lower() in (".jsonl", ".csv", ".parquet"):
        fix = said("Pass it as --data {file}", file=shlex.quote(str(path)))
        raise RecipeError(str(path), said("a data file"), said("a recipe (YAML)"), fix)
    try:
        text = reading.content(Path(path), _MOST_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = said("not UTF-8")
        if not isinstance(error, UnicodeDecodeError):
            reason = reading.reason(error)
        found, fix = (
            said("no readable recipe ({why})", why=reason),
            said("Check the name, or leave it out and use --set."),
        )
        raise RecipeError(str(path), found, said("a YAML file in UTF-8"), fix) from None
    return _load(text, path)


def _from_file(path: str | Path | None, as_written: bool) -> list[_Given]:
    if path is None:
        return []
    tree, lines = read_yaml(path)
    if not isinstance(tree, dict):
        found = said("a list at the top") if isinstance(tree, list) else said("one value at the top")
        raise RecipeError(str(path), found, said("sections with settings"), said("Start with for instance 'lora:'."))
    given: list[_Given] = []
    for section, fields in tree.items():
        where = f"{path}:{lines.get((section,), 1)}"
        if section not in Recipe.model_fields:
            given.append(_Given(str(section), fields, "file", where))
        elif isinstance(fields, dict):
            for name, value in fields.items():
                setting, line = f"{section}.{name}", lines.get((section, name), 1)
                given.append(_Given(setting, value if _is_text(setting) else _number(value), "file", f"{path}:{line}"))
        elif fields is not None:
            fix = said("Write '{section}:' and indent its settings.", section=section)
            raise RecipeError(f"{where}: {section}", repr(fields), said("settings below it"), fix)
    return given if as_written else [item._replace(value=_found(item, Path(path))) for item in given]


_OF_FILES = {
    "data.path": ("data", "path"),
    "data.rehearse": ("data", "rehearse"),
    "model.name": ("base", "path"),
    "template.path": ("template", "path"),
}
"""Settings that may name a file, with the place in a run's manifest that says in full which was meant."""
_MANIFEST_BYTES = 64 << 20


def _found(item: _Given, recipe: Path) -> Any:
    """The value, or the same file as it is found from the recipe's folder or by the manifest that lies there."""
    value = item.value
    if item.name not in _OF_FILES or not isinstance(value, str) or not value or os.path.exists(value):
        return value
    places = [str(recipe.parent / value)]
    with suppress(OSError, ValueError, KeyError, TypeError):
        manifest = reading.json_object(recipe.parent / "manifest.json", _MANIFEST_BYTES)
        section, _, field = item.name.partition(".")
        if manifest["recipe"][section][field] == value:
            there, name = _OF_FILES[item.name]
            places.append(str(manifest[there][name]))
    return next(filter(os.path.exists, places), value)


def _pairs(node: yaml.Node) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """The entries of a mapping whose keys are plain words; none where the node is no mapping."""
    if not isinstance(node, yaml.MappingNode):
        return []
    return [(key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]


def _load(text: str, path: str | Path) -> tuple[Any, dict[tuple[Any, ...], int]]:
    """The file's content, and the line of every section and setting in it."""
    lines: dict[tuple[Any, ...], int] = {}
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return {}, lines
        for section, fields in _pairs(root):
            lines[(section.value,)] = section.start_mark.line + 1
            for name, _ in _pairs(fields):
                lines[(section.value, name.value)] = name.start_mark.line + 1
        return loader.construct_document(root), lines
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = re.sub(r"^(but )?found ", "", error.problem or said("text that is not YAML"))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = said("the character U+{code:04X}", code=ord(text[error.position]))
    except RecursionError:
        line, problem = 1, said("very deep nesting")
    except ValueError as error:  # the 45th of a month, a number of 5000 digits
        line, problem = 1, said("a value that can not be read ({error})", error=error)
    raise RecipeError(f"{path}:{line}", problem, "YAML", said("Mend the line; two spaces indent a section."))


# --- what is wrong ----------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    where: str
    name: str
    """The setting; empty when there is none of that name."""
    found: str
    expected: str
    fix: str


_EXPECTED = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float", "int_parsing_size"), marked("a whole number")),
    **dict.fromkeys(("float_parsing", "float_type"), marked("a number")),
    **dict.fromkeys(("bool_parsing", "bool_type"), marked("true or false")),
    "finite_number": marked("a finite number"),
    "string_type": marked("text (put it in quotes)"),
    "string_too_short": marked("at least {min_length} character"),
    "list_type": marked("a list"),
    "dict_type": marked("names with columns, like {{output: answer}}"),
    "too_short": marked("at least one name"),
    "greater_than_equal": marked("at least {ge:.15g}"),
    "less_than_equal": marked("at most {le:.15g}"),
    "greater_than": marked("more than {gt:.15g}"),
    "less_than": marked("less than {lt:.15g}"),
}
"""What is expected where pydantic finds an error of a kind, with the values that it gives."""


def expected(item: ErrorDetails) -> str:
    """What was expected where pydantic finds an error, in words."""
    context = item.get("ctx", {})
    if message := _EXPECTED.get(item["type"]):
        return said(message, **context)
    if item["type"] == "literal_error":
        return said(" or ").join(context["expected"].rsplit(" or ", 1))
    return str(context.get("error", item["msg"]))


def _unknown(item: _Given) -> _Problem:
    known = setting_names()
    last = item.name.rpartition(".")[2].lower().replace("-", "_")
    near = next((setting for setting, names in OTHER_NAMES.items() if last in names.split()), None)
    if near is None:
        same = [setting for setting in known if setting.endswith(f".{last}")]
        near = nearest(item.name, same, cutoff=0) or nearest(item.name, known)
    if isinstance(item.value, dict) and "." not in item.name:
        near = nearest(item.name, Recipe.model_fields)
        fix = said("Did you mean {name}?", name=near) if near else said("Move its settings.")
        found = said("the unknown section '{name}'", name=item.name)
        return _Problem(item.where, "", found, said("one of {names}", names=", ".join(Recipe.model_fields)), fix)
    fix = said("Did you mean {name}?", name=near) if near else said("Settings: {names}.", names=", ".join(known))
    expected = said("a setting that `tunesmith train --help` lists")
    return _Problem(item.where, "", said("the unknown setting '{name}'", name=item.name), expected, fix)


def _impossible(error: ValidationError, places: Mapping[str, str]) -> list[_Problem]:
    problems: dict[str, _Problem] = {}
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"][:2])
        wanted = expected(item)
        if name in problems:  # one value that fits none of several types
            wanted = said("{one}, or {other}", one=problems[name].expected, other=wanted)
        value = item["input"]
        found = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
        found = found if len(found) <= 80 else found[:80] + "…"
        fix = f"{name}: {said(_settings()[name].description or '')}"
        problems[name] = _Problem(places.get(name, "recipe"), name, found, wanted, fix)
    return list(problems.values())


def _joined(problems: Sequence[_Problem]) -> RecipeError:
    """One error that names all problems."""
    if len(problems) == 1:
        (one,) = problems
        where = one.where if one.name in one.where else f"{one.where}: {one.name}"
        return RecipeError(where, one.found, one.expected, one.fix)
    where, found, expected, fix = (
        between.join(dict.fromkeys(parts))
        for between, parts in (
            (", ", [problem.where for problem in problems]),
            ("; ", [f"{problem.name} = {problem.found}".removeprefix(" = ") for problem in problems]),
            ("; ", [f"{problem.name} {problem.expected}".strip() for problem in problems]),
            (" ", [problem.fix for problem in problems]),
        )
    )
    return RecipeError(where, found, expected, fix)
