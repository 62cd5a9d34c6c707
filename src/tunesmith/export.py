"""A finished run in the form in which models are served, opened again and compared with the live adapter.

    adapter   peft's folder as it is; vLLM, SGLang and peft itself load it beside its base
    merged    one set of safetensors that plain transformers opens

Nothing counts as written until it has been compared: it takes its name only then.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tunesmith import chat as chats
from tunesmith import merging, rundir
from tunesmith import model as models
from tunesmith.chat import Chat
from tunesmith.errors import ProofError, RecipeError, RunError
from tunesmith.general import questions
from tunesmith.merging import Merged
from tunesmith.rundir import RunDir
from tunesmith.types import Message

Form = Literal["adapter", "merged"]
FORMS: tuple[Form, ...] = ("adapter", "merged")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
N_PROMPTS = 20
"""General questions whose greedy replies are compared token by token."""

_REPLY_TOKENS = 32


@dataclass(frozen=True)
class _Bounds:
    """What weights rounded to a type may differ by; the logits of a small model span about 30."""

    logit: float
    same_token: float
    same_reply: float


_COARSENESS = (torch.float32, torch.float16, torch.bfloat16)
_BOUNDS = {
    torch.float32: _Bounds(1e-3, 0.99, 0.9),
    torch.float16: _Bounds(0.25, 0.97, 0.6),
    torch.bfloat16: _Bounds(2.0, 0.9, 0.2),
}


@dataclass(frozen=True)
class Compared:
    """One thing that must hold of what was written."""

    name: str
    value: float
    bound: float
    ok: bool


@dataclass(frozen=True)
class Export:
    """What was written, and what it was compared with."""

    path: Path
    to: Form
    checks: tuple[Compared, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "to": self.to, "checks": [asdict(check) for check in self.checks]}


def export(
    path: Path,
    to: Form,
    out: Path | None = None,
    dtype: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Export:
    """Writes a finished run as `to` into a new folder, opens it again and compares it.

    `dtype` None: as the base's files. Raises RunError for a folder that is not empty or a disk that is full,
    RecipeError for a type that the form can not have, ProofError when what was written differs by more than its
    bounds; the figures are in the message, and nothing is left.
    """
    if to == "adapter" and dtype is not None:
        raise RecipeError("--dtype", dtype, "none: an adapter is copied as it is", "Leave it out.")
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError("--dtype", repr(dtype), f"one of {', '.join(DTYPES)}", "Leave it out for the base's own.")
    run = rundir.open_run(path)
    if not run.adapter.is_dir():
        raise RunError(str(path), "no adapter/", "a finished run", "Train it to the end: tunesmith resume.")
    if not rundir.is_whole(run.adapter):
        found, fix = "an adapter that is not as it was written", "Copy it again from where it came."
        raise ProofError(str(run.adapter), found, "the digests in files.json", fix)
    final = out or run.path / ("exported" if to == "adapter" else to)
    rundir.check_target(final)
    tell("Asking the live adapter …")
    chat = chats.load(path)
    live = _Answers.of(chat)
    base = Path(json.loads(run.manifest.read_text(encoding="utf-8"))["base"]["folder"])
    del chat
    gc.collect()
    with rundir.commit(final) as folder:
        if to == "adapter":
            checks = _adapter(run, folder)
        else:
            tell("Writing the merged weights …")
            merged = Merged(base, run.adapter)
            rundir.require_space(final, merged.n_bytes(DTYPES[dtype] if dtype else None))
            checks = _merged(merged, run, folder, DTYPES[dtype] if dtype else None, live, tell)
        rundir.write_json(folder / "export.json", {"to": to, "checks": [asdict(check) for check in checks]})
        if wrong := [check for check in checks if not check.ok]:
            raise ProofError(
                str(final),
                "; ".join(f"{check.name}: {check.value:.3g}" for check in wrong),
                "; ".join(f"{check.bound:.3g}" for check in wrong),
                "Nothing was left. Please report this with the model's name.",
            )
    return Export(final, to, tuple(checks))


@dataclass(frozen=True)
class _Answers:
    """What the live adapter says to some prompts."""

    prompts: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    replies: tuple[tuple[int, ...], ...]
    logits: tuple[Tensor, ...]
    """Per prompt, of each token of its reply (tokens, V) fp32, given all before it."""
    stop_ids: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, chat: Chat) -> _Answers:
        asked = [Message("user", question.question) for question in questions()[:: 100 // N_PROMPTS]]
        system = [] if chat.system is None else [Message("system", chat.system)]
        template = chat.renderer.template
        replies = [chat.reply([message], temperature=0, max_tokens=_REPLY_TOKENS) for message in asked]
        return cls(
            prompts=tuple(reply.prompt_ids for reply in replies),
            texts=tuple(template.write([*system, message], generation_prompt=True) for message in asked),
            replies=tuple(reply.token_ids for reply in replies),
            logits=tuple(_logits(chat.model, reply.prompt_ids, reply.token_ids) for reply in replies),
            stop_ids=template.stop_ids,
            dtype=next(chat.model.parameters()).dtype,
        )


def _logits(model: Any, prompt: Sequence[int], reply: Sequence[int]) -> Tensor:
    ids = torch.tensor([[*prompt, *reply]], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return logits.float().cpu()


# --- merged -----------------------------------------------------------------------------------------------------------

# Of a run's adapter folder, what belongs to peft and to that folder alone.
_OF_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "files.json", "README.md", "load_and_chat.py")


def _merged(
    merged: Merged, run: RunDir, folder: Path, dtype: torch.dtype | None, live: _Answers, tell: Callable[[str], None]
) -> list[Compared]:
    kept = dtype or merged.dtype
    merging.write(merged, folder, dtype)
    config = json.loads((merged.base / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    rundir.write_json(folder / "config.json", {**config, "dtype": str(kept).removeprefix("torch.")})
    for path in run.adapter.iterdir():
        if path.name not in _OF_ADAPTER:
            shutil.copyfile(path, folder / path.name)
    card = (run.adapter / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(_merged_card(card), encoding="utf-8")
    tell("Opening them with plain transformers …")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=live.dtype, local_files_only=True)
    model.to(models.device()).eval()
    generation = GenerationConfig.from_pretrained(
        folder, do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=_REPLY_TOKENS
    )
    same_prompts = sum(
        tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) == ids
        for text, ids in zip(live.texts, live.prompts, strict=True)
    )
    largest, same_tokens, n_tokens, same_replies = 0.0, 0, 0, 0
    for prompt, reply, expected in zip(live.prompts, live.replies, live.logits, strict=True):
        logits = _logits(model, prompt, reply)
        largest = max(largest, float((logits - expected).abs().max()))
        same_tokens += int((logits.argmax(-1) == expected.argmax(-1)).sum())
        n_tokens += len(reply)
        ids = torch.tensor([prompt], device=model.device)
        with torch.inference_mode():
            written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=generation)
        same_replies += tuple(written[0, len(prompt) :].tolist()) == reply
    bounds = _BOUNDS[max(kept, live.dtype, key=_COARSENESS.index)]  # what is computed in bfloat16 differs by as much
    n = len(live.prompts)
    return [
        _at_least("same token ids of prompts", same_prompts / n, 1),
        _at_least("same stop ids", float(sorted(generation.eos_token_id) == sorted(live.stop_ids)), 1),
        Compared("largest difference of a logit", largest, bounds.logit, largest <= bounds.logit),
        _at_least("same most likely tokens", same_tokens / n_tokens, bounds.same_token),
        _at_least("same greedy replies", same_replies / n, bounds.same_reply),
    ]


def _merged_card(card: str) -> str:
    """The adapter's card for weights that hold it."""
    return (
        card.replace("library_name: peft", "library_name: transformers")
        .replace("# Adapter for", "# Merged from an adapter for")
        .replace("A LoRA adapter in peft's format, trained", "A base with a LoRA adapter added to its weights, trained")
        .replace('    python load_and_chat.py "your question"\n\n', "")
    )


# --- adapter ----------------------------------------------------------------------------------------------------------


def _adapter(run: RunDir, folder: Path) -> list[Compared]:
    """peft's folder: adapter_config.json and adapter_model.safetensors as peft, vLLM and SGLang read them."""
    for path in run.adapter.iterdir():
        if path.name != "files.json":
            shutil.copyfile(path, folder / path.name)
    digests = json.loads((run.adapter / "files.json").read_text(encoding="utf-8"))
    same = all(rundir.sha256(folder / name) == entry["sha256"] for name, entry in digests.items())
    return [_at_least("same bytes", float(same), 1)]


def _at_least(name: str, value: float, bound: float) -> Compared:
    return Compared(name, value, bound, value >= bound)
