"""What lies in a run's adapter/ folder, so that it can be used without tunesmith: weights, tokenizer, template,
generation config, a card and a script of twenty lines."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from peft import PeftModel

from tunesmith import hub, rundir
from tunesmith import model as models
from tunesmith.checking import Checked, hold_out
from tunesmith.recipe import Recipe
from tunesmith.rundir import RunDir

_SCRIPT = '''\
"""Prints the greedy reply of this adapter: python load_and_chat.py [--base ID_OR_FOLDER] "question" """
import argparse
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

here = str(Path(__file__).resolve().parent)
parser = argparse.ArgumentParser(description="Ask this adapter.")
parser.add_argument("question")
parser.add_argument("--base", default=PeftConfig.from_pretrained(here).base_model_name_or_path, help="hub id or folder")
arguments = parser.parse_args()

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
tokenizer = AutoTokenizer.from_pretrained(here)  # with the chat template that was trained with
base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=dtype).to(device)
model = PeftModel.from_pretrained(base, here).eval()

messages = [*{system_messages}, {{"role": "user", "content": {question}}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
greedy = GenerationConfig.from_pretrained(here, do_sample=False, temperature=None, top_p=None, top_k=None)
greedy.max_new_tokens = 512
reply = model.generate(**prompt.to(device), generation_config=greedy)  # with attention mask and all stop ids
answer = reply[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip())
'''


def write(run: RunDir, model: PeftModel, checked: Checked, recipe: Recipe, pissa_start: Path | None) -> None:
    """Writes adapter/; it appears only when it is whole.

    Raises ProofError when a weight is not finite or the saved tokenizer does not give the ids of the training.
    """
    renderer = checked.renderer
    with rundir.commit(run.adapter) as folder:
        models.save_adapter(model, folder, pissa_start)
        first_rows = [renderer.template.write(row.conversation.messages) for row in checked.rows[:50]]
        models.save_tokenizer(renderer, folder, first_rows)
        models.generation_config(checked.found.folder, renderer.template).save_pretrained(folder)
        (folder / "load_and_chat.py").write_text(_script(recipe, renderer.template.folds_system), encoding="utf-8")
        rundir.write_text(folder / "README.md", _card(model, checked, recipe))


def _script(recipe: Recipe, folds_system: bool) -> str:
    system = recipe.template.system
    if system is None:
        return _SCRIPT.format(system_messages=[], question="arguments.question")
    if folds_system:
        return _SCRIPT.format(system_messages=[], question=f"{system + chr(10) * 2!r} + arguments.question")
    return _SCRIPT.format(system_messages=[{"role": "system", "content": system}], question="arguments.question")


def _card(model: PeftModel, checked: Checked, recipe: Recipe) -> str:
    template, found = checked.renderer.template, checked.found
    base = str(model.peft_config["default"].base_model_name_or_path)
    where = base if found.source == "folder" else found.source
    revision = f", revision `{found.revision}`" if found.revision else ""
    licence = f" ({found.alias.licence})" if found.alias else ""
    stops = ", ".join(f"{i} `{template.tokenizer.convert_ids_to_tokens(i)}`" for i in template.stop_ids)
    adapted = ", ".join(f"{target.name} ({target.layers} layers)" for target in checked.targets)
    system = "as the template writes it"
    if template.folds_system:
        system = "in front of the first user turn, a blank line between (the template has no place for it)"
    trained = len(hold_out(checked)[0])
    settings = json.dumps({**recipe.lora.model_dump(), **recipe.train.model_dump()}, ensure_ascii=False)
    return f"""---
{yaml.safe_dump(_front_matter(found), sort_keys=False).strip()}
---
# Adapter for {recipe.model.name}

A LoRA adapter in peft's format, trained with tunesmith on {trained} rows of `{Path(checked.data.path).name}`
(SHA-256 `{checked.data.digest[:16]}…`).

    python load_and_chat.py "your question"

| | |
|---|---|
| base | `{where}`{revision}{licence} |
| adapted | {adapted} |
| trained numbers | {sum(target.parameters for target in checked.targets):,} |
| chat template | {template.source}, in `chat_template.jinja` |
| system text | {system} |
| stop ids | {stops} (all in `generation_config.json`) |

Text is tokenised with `add_special_tokens=False`: the template writes whatever special tokens the model needs.

Settings: `{settings}`
"""


def _front_matter(found: hub.LocalModel) -> dict[str, str | list[str]]:
    """What a hub reads of a card. A base is named where it has a hub's id."""
    front: dict[str, str | list[str]] = {"library_name": "peft", "tags": ["lora", "tunesmith"]}
    at, _, name = found.source.partition(":")
    if at in ("hf", "ms"):
        front["base_model"] = name
    elif found.alias and found.alias.hf:
        front["base_model"] = found.alias.hf
    if found.alias:
        front["license"] = "other"
    return front
