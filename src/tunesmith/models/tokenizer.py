"""A model's tokenizer, and which chat template is taken for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tunesmith import hub, model_files
from tunesmith.data import tokenizer_trial
from tunesmith.data.render import Renderer
from tunesmith.data.template import probe
from tunesmith.errors import ModelError, ProofError, RecipeError, TemplateError, first_line
from tunesmith.language import said
from tunesmith.models import pretrained
from tunesmith.models.quiet import quietly
from tunesmith.recipe import TemplateSettings

SHIPPED_TEMPLATES = Path(__file__).parent / "templates"


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
    except Exception as error:  # transformers and tokenizers raise what they like
        if absent := [part for part in hub.missing_parts(folder, weights=False) if "token" in part]:
            fix = said("Copy the tokenizer's files beside config.json.")
            raise ModelError(str(folder), said("no tokenizer"), ", ".join(absent), fix) from None
        found = said("a tokenizer that can not be read ({error})", error=first_line(error))
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
