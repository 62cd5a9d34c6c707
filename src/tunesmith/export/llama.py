"""One file for llama.cpp: written, read again, and asked through a real llama.cpp."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tunesmith import models, system
from tunesmith.chat import Chat
from tunesmith.errors import RunError
from tunesmith.export import gguf_file, llama_cpp
from tunesmith.export.live import AWKWARD, Answers, Compared, at_least, at_most, talks
from tunesmith.export.llama_cpp import LlamaCpp
from tunesmith.export.merging import Merged
from tunesmith.language import marked, said
from tunesmith.runs import rundir
from tunesmith.types import Message

_CONTEXT = 1024  # tokens that the proof has room for, or more where its prompts are longer
QUANTIZE = "llama-quantize"
SMALLER_TYPES = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s", "q5_k_m",
    "q6_k",
)  # fmt: skip
"""What llama.cpp's own program makes of a float16 file."""


@dataclass(frozen=True)
class _GgufBounds:
    weight: float
    """Largest difference of a weight, in parts of the largest of its tensor: what rounding to the type can make."""
    same_reply: float
    gap: float | None
    """By how much the live adapter may prefer its own token, in logits, where a reply parts from it."""


# float16 keeps 11 bits, bfloat16 8; q8_0 keeps steps of 1/127 of a block's largest number, and the step in float16.
# Where two words are as good as equal, llama.cpp's rounding of what it multiplies decides: with float16, 18 to 20 of 20
# replies of six small models were the same, and the gaps at most 0.013.
_GGUF_BOUNDS = {
    "float32": _GgufBounds(0, 0.9, 0.05),
    "float16": _GgufBounds(2**-11, 0.8, 0.25),
    "bfloat16": _GgufBounds(2**-8, 0.2, 2.0),
    "q8_0": _GgufBounds(1 / 254 + 2**-11, 0.2, 2.0),
}
_SMALLER_BOUNDS = _GgufBounds(0.5, 0, None)
"""A few bits change replies; what is said then is measured, not demanded."""


def contents_of(merged: Merged, chat: Chat, dtype: str | None, name: str) -> gguf_file.Contents:
    written = "float16" if dtype is None or dtype in SMALLER_TYPES else dtype
    config = models.load_config(merged.base)
    return gguf_file.Contents(merged, config, chat.renderer.template, written, f"{name} tuned")


def write_gguf(
    contents: gguf_file.Contents,
    dtype: str,
    folder: Path,
    live: Answers,
    tell: Callable[[str], None],
    notes: list[str],
) -> list[Compared]:
    path = folder / "model.gguf"
    tell(said("Writing the file …"))
    rundir.require_space(folder, contents.n_bytes * (2 if dtype in SMALLER_TYPES else 1))
    if dtype in SMALLER_TYPES:
        whole = folder / "float16.gguf"
        gguf_file.write(whole, contents)
        _quantize(whole, path, dtype)
        whole.unlink()
    else:
        gguf_file.write(path, contents)
    if (limit := gguf_file.alike_up_to(contents.config)) is not None:
        notes.append(said("Give llama.cpp a context of at most {n} tokens: {why}.", n=limit[0], why=limit[1]))
    tell(said("Reading it again …"))
    bounds = _GGUF_BOUNDS.get(dtype, _SMALLER_BOUNDS)
    read = gguf_file.compare(path, contents)
    checks = [
        at_least(marked("same weights by name and shape"), read.tensors, 1),
        at_most(marked("largest difference of a weight"), read.difference, bounds.weight),
        at_least(marked("same tokens in the vocabulary"), read.tokens, 1),
        at_least(marked("same stop ids"), float(read.stop_ids), 1),
        at_least(marked("same chat template"), float(read.chat_template), 1),
    ]
    if not llama_cpp.is_here():
        notes.append(said("Its answers were not compared: install llama.cpp with: pip install 'tunesmith[export]'."))
        return checks
    if live.dtype == torch.bfloat16:  # what is computed in bfloat16 differs by as much
        coarse = _GGUF_BOUNDS["bfloat16"]
        gap = None if bounds.gap is None or coarse.gap is None else max(bounds.gap, coarse.gap)
        bounds = _GgufBounds(bounds.weight, min(bounds.same_reply, coarse.same_reply), gap)
    context = max(map(len, (*live.prompts, *live.awkward))) + live.reply_tokens + 1
    tell(said("Opening it with llama.cpp …"))
    return checks + _asked(LlamaCpp(path, max(_CONTEXT, context)), live, bounds, notes, tell)


def _quantize(whole: Path, path: Path, dtype: str) -> None:
    """llama.cpp's own program; it says what it did on standard error, which is kept where it fails."""
    command = [QUANTIZE, str(whole), str(path), dtype.upper(), str(system.cores())]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if ended.returncode != 0 or not path.is_file():
        last = (ended.stderr.strip().splitlines() or [said("no word")])[-1]
        fix = said("Try it by hand, or choose one of {names}.", names=", ".join(gguf_file.TYPES))
        raise RunError(
            QUANTIZE,
            said("exit code {code}: {reason}", code=ended.returncode, reason=last),
            said("a {dtype} file", dtype=dtype),
            fix,
        )


def _asked(
    llama: LlamaCpp, live: Answers, bounds: _GgufBounds, notes: list[str], tell: Callable[[str], None]
) -> list[Compared]:
    """What a real llama.cpp makes of prompts, of conversations by the file's own template, and of stop ids, and what
    it answers."""
    same_prompts = sum(llama.prompt_ids(text) == ids for text, ids in zip(live.texts, live.prompts, strict=True))
    texts = [live.template.write([Message("user", text)], generation_prompt=True) for text in AWKWARD]
    apart = [
        message
        for message, text, ids in zip(AWKWARD, texts, live.awkward, strict=True)
        if llama.prompt_ids(text) != ids
    ]
    notes += [said("llama.cpp cuts this message into other tokens: {message!r}.", message=message) for message in apart]
    asked = talks(live.template)
    same_talks = sum(llama.prompt([message.as_dict() for message in talk]) == text for talk, text in asked)
    stops = sum(llama.stops_at(stop, live.prompts[0]) for stop in live.stop_ids)
    same_replies, gap = 0, 0.0
    for number, (prompt, reply, logits) in enumerate(zip(live.prompts, live.replies, live.logits, strict=True), 1):
        tell(said("Asking llama.cpp: question {number} of {n} …", number=number, n=len(live.prompts)))
        written = llama.continued(prompt, live.reply_tokens).token_ids
        same_replies += written == reply
        for own, other, row in zip(reply, written, logits, strict=False):
            if own != other:
                gap = float(np.maximum(gap, float(row[own] - row[other])))  # NaN if one is; Python's max passes over it
                break
    n = len(live.prompts)
    checks = [
        at_least(marked("llama.cpp: same token ids of prompts"), same_prompts / n, 1),
        at_least(marked("llama.cpp: same token ids of awkward messages"), 1 - len(apart) / len(AWKWARD), 0.8),
        at_least(marked("llama.cpp: same conversations by its own template"), same_talks / len(asked), 1),
        at_least(marked("llama.cpp: stop ids that stop"), stops / len(live.stop_ids), 1),
        at_least(marked("llama.cpp: same greedy replies"), same_replies / n, bounds.same_reply),
    ]
    if bounds.gap is not None:
        checks.append(at_most(marked("llama.cpp: largest gap of logits where a reply parts"), gap, bounds.gap))
    return checks
