"""A real llama.cpp, where the package xllamacpp brings one: what it makes of a GGUF file.

Its server is asked over loopback, as its users do (https://github.com/ggml-org/llama.cpp/tree/master/tools/server).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith import loopback, system
from tunesmith.errors import ProofError
from tunesmith.language import marked, said
from tunesmith.types import ChatMessage

PACKAGE = "xllamacpp"
_REQUEST_SECONDS = 600


def is_here() -> bool:
    """Whether llama.cpp can be asked."""
    return importlib.util.find_spec(PACKAGE) is not None


@dataclass(frozen=True)
class Continuation:
    """What llama.cpp wrote behind a prompt."""

    token_ids: tuple[int, ...]
    """With the token that ended it."""
    stopped: bool
    """It ended with a token that llama.cpp takes for the end of a reply, not at the limit."""


class LlamaCpp:
    """llama.cpp with one file, on the CPU, one prompt at a time; cache and attention in fp32, so that what is seen is
    the file's: its flash attention rounds, and moved the logits of a small model by 0.02.

    Raises ProofError when the file can not be opened.
    """

    def __init__(self, path: Path, context: int = 1024) -> None:
        package: Any = importlib.import_module(PACKAGE)
        parameters = package.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = context
        parameters.n_parallel = 1
        parameters.n_gpu_layers = 0
        # A thread that waits for the others spins; without a free core it takes theirs, and hours pass.
        n_threads = max(1, system.cores() - 1)
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = n_threads
        parameters.warmup = False
        parameters.fit_params = False
        parameters.verbosity = -1
        parameters.cache_type_k = parameters.cache_type_v = package.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = package.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server: Any = package.Server(parameters)
        except (RuntimeError, ValueError) as error:
            raise ProofError(
                str(path),
                said("an error of llama.cpp ({error})", error=error),
                said("a file that it opens"),
                said(_REPORT),
            ) from error

    def token_ids(self, text: str) -> tuple[int, ...]:
        """The text's tokens, nothing added; spellings of special tokens become those."""
        answer = self._post("/tokenize", {"content": text, "add_special": False, "parse_special": True})
        return tuple(answer["tokens"])

    def prompt(self, messages: Sequence[ChatMessage]) -> str | None:
        """What the file's own chat template makes of a conversation, or None where it refuses it."""
        try:
            return str(self._post("/apply-template", {"messages": list(messages)})["prompt"])
        except urllib.error.HTTPError:
            return None

    def prompt_ids(self, text: str) -> tuple[int, ...]:
        """The tokens that llama.cpp reads when it is given a rendered prompt: with all that it adds by itself."""
        answer = self._post("/tokenize", {"content": text, "add_special": True, "parse_special": True})
        return tuple(answer["tokens"])

    def continued(self, token_ids: Sequence[int], max_tokens: int) -> Continuation:
        """The greedy continuation."""
        return self._complete(token_ids, {"n_predict": max_tokens})

    def stops_at(self, token_id: int, prompt: Sequence[int]) -> bool:
        """Whether a reply is at its end when this token is written."""
        forced = self._complete(prompt, {"n_predict": 2, "logit_bias": [[token_id, 1e6]]})
        return forced.stopped and forced.token_ids == (token_id,)

    def _complete(self, token_ids: Sequence[int], more: Mapping[str, Any]) -> Continuation:
        asked = {
            "prompt": list(token_ids), "temperature": 0, "top_k": 1, "cache_prompt": False, "return_tokens": True,
            **more,
        }  # fmt: skip
        try:
            answer = self._post("/completion", asked)
        except urllib.error.HTTPError as error:
            found = said(
                "the answer {code} to {n} tokens ({text})",
                code=error.code,
                n=len(token_ids),
                text=error.read()[:200].decode(errors="replace"),
            )
            raise ProofError("llama.cpp", found, said("a continuation"), said(_REPORT)) from error
        return Continuation(tuple(answer["tokens"]), answer["stop_type"] == "eos")

    def _post(self, path: str, value: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(value).encode(), {"Content-Type": "application/json"}
        )
        with loopback.opened(request, _REQUEST_SECONDS) as answer:
            return json.loads(answer.read())


_REPORT = marked("Nothing was left. Please report this with the model's name.")
