"""What lies in a run's adapter/ folder, so that it can be used without tunesmith: weights, tokenizer, template,
generation config, a card and a script of twenty lines.

People upload this folder: it says the names of files and folders and not where they lie on this machine.
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from peft import PeftModel

from tunesmith import hub, language, models, places
from tunesmith.recipe import Recipe
from tunesmith.runs import rundir
from tunesmith.runs.rundir import RunDir
from tunesmith.training.checking import Checked, hold_out

_OF_PEFT = ("adapter_config.json", "adapter_model.safetensors", "files.json", "README.md", "load_and_chat.py")
_FOR_ANY_READER = (
    "generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
    "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


def known_names(*, merged: bool = False) -> frozenset[str]:
    """What files may be called that lie in adapter/; of them, with `merged`, those that go with merged weights too."""
    return frozenset(_FOR_ANY_READER if merged else (*_FOR_ANY_READER, *_OF_PEFT))


_SCRIPT = '''\
"""Prints the greedy reply of this adapter: python load_and_chat.py {base_usage} "question" """
import argparse
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, logging

warnings.simplefilter("ignore", FutureWarning)  # what libraries have to say to each other
logging.set_verbosity_error()
logging.disable_progress_bar()
here = str(Path(__file__).resolve().parent)
parser = argparse.ArgumentParser(description="Ask this adapter.")
parser.add_argument("question")
parser.add_argument("--base", default={base}, help="hub id or folder")
arguments = parser.parse_args()
if arguments.base is None:
    parser.error({no_base})
no_code = {{"trust_remote_code": False}}  # of a folder or a hub is ever run

device, dtype = "cpu", torch.float32
if torch.cuda.is_available():  # cards before Ampere only pretend to multiply in bf16
    device, bf16 = "cuda", torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if bf16 else torch.{without_bf16}
tokenizer = AutoTokenizer.from_pretrained(here, **no_code)  # with the chat template that was trained with
base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=dtype, **no_code).to(device)
model = PeftModel.from_pretrained(base, here).eval()

messages = [*{system_messages}, {{"role": "user", "content": {question}}}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt",
    sanitize_control_tokens=True,  # a question that spells a mark of the template forges no turn
)
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
    with rundir.commit(run.adapter, readers="all") as folder:
        models.save_adapter(model, folder, pissa_start)
        first_rows = [renderer.template.write(row.conversation.messages) for row in checked.rows[:50]]
        models.save_tokenizer(renderer, folder, first_rows)
        models.generation_config(checked.found.folder, renderer.template).save_pretrained(folder)
        _name_base(folder / "adapter_config.json", checked.found)
        for path in (folder / "tokenizer_config.json", folder / "generation_config.json"):
            rundir.write_json(path, places.stripped(json.loads(path.read_text(encoding="utf-8"))))
        (folder / "load_and_chat.py").write_text(_script(checked, recipe), encoding="utf-8")
        rundir.write_text(folder / "README.md", _card(checked, recipe))


def _hub_id(found: hub.LocalModel) -> str | None:
    """Of a base, as plain transformers finds it."""
    at, _, name = found.source.partition(":")
    return name if at == "hf" else found.alias.hf if at == "ms" and found.alias else None


def _name_base(config: Path, found: hub.LocalModel) -> None:
    """What the adapter's config says of its base: the hub's id, or the folder's name."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = _hub_id(found) or _plain_name(found)
    rundir.write_json(config, settings)


def _plain_name(found: hub.LocalModel) -> str:
    return found.folder.resolve().name if found.source == "folder" else found.source.partition(":")[2]


def _script(checked: Checked, recipe: Recipe) -> str:
    system = recipe.template.system
    base = _hub_id(checked.found)
    no_base = f"name the base that this adapter was trained on, {_plain_name(checked.found)}: --base FOLDER"
    filled = {
        "base": repr(base),
        "without_bf16": models.card_dtype("float16", checked.config),
        "no_base": repr(no_base),
        "base_usage": "[--base ID_OR_FOLDER]" if base else "--base FOLDER",
        "system_messages": [],
        "question": "arguments.question",
    }
    if system is not None and checked.renderer.template.folds_system:
        filled["question"] = f"{system + chr(10) * 2!r} + arguments.question"
    elif system is not None:
        filled["system_messages"] = [{"role": "system", "content": system}]
    return _SCRIPT.format(**filled)


def _card(checked: Checked, recipe: Recipe) -> str:
    template, found = checked.renderer.template, checked.found
    where = f"`{found.source}`"
    if found.source == "folder":
        where = f"`{_plain_name(found)}`, a folder where it was trained"
    revision = f", revision `{found.revision}`" if found.revision else ""
    licence = f" ({found.alias.licence})" if found.alias else ""
    stops = ", ".join(f"{i} `{template.tokenizer.convert_ids_to_tokens(i)}`" for i in template.stop_ids)
    adapted = ", ".join(f"{target.name} ({target.layers} layers)" for target in checked.targets)
    source = " ".join(map(places.named, template.source.split(" ", 1)))
    with language.speaking("en"):  # as the rest of the card, which is for whoever finds it
        system = " ".join(checked.system_text.split()).replace("|", "\\|")
    trained = len(hold_out(checked)[0])
    used = {**recipe.lora.model_dump(), **recipe.train.model_dump()}
    settings = json.dumps(used, ensure_ascii=False)
    settings = places.without(settings, places.paths_in(used))
    ask = "python load_and_chat.py" + ("" if _hub_id(found) else " --base FOLDER")
    return f"""---
{yaml.safe_dump(_front_matter(found), sort_keys=False).strip()}
---
# Adapter for {places.named(recipe.model.name)}

A LoRA adapter in peft's format, trained with tunesmith on {trained} rows of `{Path(checked.data.path).name}`
(SHA-256 `{checked.data.digest[:16]}…`).

    {ask} "your question"

| | |
|---|---|
| base | {where}{revision}{licence} |
| adapted | {adapted} |
| trained numbers | {sum(target.parameters for target in checked.targets):,} |
| chat template | {source}, in `chat_template.jinja` |
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
