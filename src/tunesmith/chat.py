"""Talk with a base model or with one that has an adapter: same template, same tokens as in training."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tunesmith import hub, rundir
from tunesmith import model as models
from tunesmith import recipe as recipes
from tunesmith.errors import DataError, ModelError, ProofError
from tunesmith.recipe import ModelSettings, TemplateSettings
from tunesmith.render import Renderer
from tunesmith.types import ChatMessage, Message

MAX_TOKENS = 512
_SIDE_BY_SIDE = 32  # conversations


@dataclass(frozen=True)
class Reply:
    """An answer and how it came about."""

    text: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """The reply with its stop token."""
    stopped_by: Literal["stop", "length"]


class Chat:
    """A model that answers; made by `load`."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        renderer: Renderer,
        generation: GenerationConfig,
        system: str | None = None,
    ) -> None:
        self.model, self.renderer, self.generation, self.system = model, renderer, generation, system

    @property
    def tuned(self) -> bool:
        """There is an adapter that can be switched off."""
        return isinstance(self.model, PeftModel)

    def switched(self, *, base: bool) -> AbstractContextManager[Any]:
        """While it holds, the model is the base alone if asked for."""
        return self.model.disable_adapter() if base and isinstance(self.model, PeftModel) else nullcontext()

    def reply(
        self,
        messages: Sequence[Message | ChatMessage],
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
        base: bool = False,
        on_text: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Reply:
        """The next reply to a conversation that ends with a user turn.

        Samples as the model's generation config says; `temperature` 0 is greedy. `base` switches the adapter off.
        `on_text` is given the reply piece by piece as it is written. Raises TemplateError where the template refuses
        the conversation, DataError when it is not one, or longer than the model can read.
        """
        prompt = self._prompt(messages)
        streamer = _Pieces(self, len(prompt), on_text) if on_text else None
        stopping = StoppingCriteriaList([_Cancelled(cancelled)]) if cancelled else None
        (reply,) = self._generate(
            [prompt], temperature, max_tokens, base, {"streamer": streamer, "stopping_criteria": stopping}
        )
        return reply

    def replies(
        self,
        conversations: Sequence[Sequence[Message | ChatMessage]],
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
        base: bool = False,
    ) -> list[Reply]:
        """The next reply to each of several conversations, as by `reply`, side by side.

        Several times as fast as one by one, because each weight is read once for all of them; where two words are
        equally likely, rounding may decide otherwise.
        """
        prompts = [self._prompt(messages) for messages in conversations]
        groups = (prompts[i : i + _SIDE_BY_SIDE] for i in range(0, len(prompts), _SIDE_BY_SIDE))
        return [reply for group in groups for reply in self._generate(group, temperature, max_tokens, base, {})]

    def _prompt(self, messages: Sequence[Message | ChatMessage]) -> tuple[int, ...]:
        prompt_ids = self.renderer.prompt_ids(_conversation(messages, self.system))
        readable = models.context_length(self.model.config)
        if len(prompt_ids) >= readable:
            raise DataError(
                "conversation",
                f"{len(prompt_ids)} tokens",
                f"fewer than {readable}",
                "Start a new conversation, or shorten it.",
            )
        return prompt_ids

    def _generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        temperature: float | None,
        max_tokens: int | None,
        base: bool,
        extras: dict[str, Any],
    ) -> list[Reply]:
        longest = max(map(len, prompts))
        config = copy.deepcopy(self.generation)
        config.max_new_tokens = min(max_tokens or MAX_TOKENS, models.context_length(self.model.config) - longest)
        if temperature is not None:
            config.do_sample = temperature > 0
            config.temperature = temperature if temperature > 0 else 1.0
        if not config.do_sample:  # transformers warns about sampling settings that greedy search does not read
            config.temperature, config.top_p, config.top_k = None, None, None
        # Padding stands in front, where it is masked, so its id has no effect.
        input_ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode(), self.switched(base=base):
            generate: Any = self.model.generate
            output = generate(
                input_ids=input_ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=config,
                **extras,
            )
        return [
            self._reply(prompt, written) for prompt, written in zip(prompts, output[:, longest:].tolist(), strict=True)
        ]

    def _reply(self, prompt_ids: tuple[int, ...], written: Sequence[int]) -> Reply:
        stops = self.renderer.template.stop_ids
        end = next((i + 1 for i, token in enumerate(written) if token in stops), None)
        token_ids = tuple(written[:end])
        return Reply(self.text(token_ids), prompt_ids, token_ids, "length" if end is None else "stop")

    def text(self, token_ids: Sequence[int]) -> str:
        """Reply ids as text, without stop tokens and without white space around."""
        stops = self.renderer.template.stop_ids
        end = next((i for i, token in enumerate(token_ids) if token in stops), len(token_ids))
        decode = self.renderer.template.tokenizer.decode
        return str(decode(list(token_ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


def load(run_or_model: str | os.PathLike[str], *, revision: str | None = None, base: bool = False) -> Chat:
    """A chat with a run (its base and adapter), a run's adapter folder, or a model by alias, id or folder.

    Raises RunError, ModelError or TemplateError; ProofError when base or template are not those of the training.
    """
    path = Path(run_or_model)
    if path.name == "adapter" and (path.parent / "manifest.json").is_file():
        path = path.parent
    if (path / "manifest.json").is_file():
        return _load_run(path, base)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ModelError(
            str(path),
            "an adapter outside its run",
            "a run's folder or a model",
            "Name the folder that `tunesmith train` wrote, or use load_and_chat.py beside the adapter.",
        )
    found = models.prepared(hub.locate(os.fspath(run_or_model), revision))
    renderer = models.open_renderer(found, TemplateSettings())
    model = models.load_base(found, ModelSettings())
    return Chat(model, renderer, models.generation_config(found.folder, renderer.template))


def _load_run(path: Path, base: bool) -> Chat:
    run = rundir.open_run(path)
    recipe, _ = recipes.resolve(run.recipe)
    manifest = json.loads(run.manifest.read_text(encoding="utf-8"))
    if not run.adapter.is_dir() and not base:
        raise ModelError(str(path), "no adapter/ (the run was interrupted)", "a finished run", "Train it to the end.")
    folder = Path(manifest["base"]["folder"])
    source, revision = manifest["base"]["source"], manifest["base"]["revision"]
    if folder.is_dir():
        found = replace(hub.locate(str(folder)), source=source, revision=revision)
    else:
        found = models.prepared(hub.locate(recipe.model.name, revision))
    if rundir.sha256(found.folder / "config.json") != manifest["base"]["config_sha256"]:
        raise ProofError(
            str(found.folder),
            "another config.json than at training",
            "the base that was trained on",
            "Fetch that revision again, or train again.",
        )
    reader = run.adapter if run.adapter.is_dir() else found.folder
    template = recipe.template if reader is found.folder else TemplateSettings()
    renderer = models.open_renderer(replace(found, folder=reader), template)
    if renderer.template.digest != manifest["template"]["sha256"]:
        raise ProofError(
            str(reader),
            "another chat template than at training",
            "the one that was trained with",
            "Restore chat_template.jinja, or train again.",
        )
    model = models.load_base(found, recipe.model)
    generation = models.generation_config(reader, renderer.template)
    tuned = models.load_adapter(model, run.adapter) if run.adapter.is_dir() else model
    return Chat(tuned, renderer, generation, recipe.template.system)


class _Pieces(BaseStreamer):
    """Hands out text as soon as its characters are whole."""

    def __init__(self, chat: Chat, n_prompt: int, on_text: Callable[[str], None]) -> None:
        self._chat, self._left, self._on_text = chat, n_prompt, on_text
        self._ids: list[int] = []
        self._shown = ""

    def put(self, value: torch.Tensor) -> None:
        ids = value.flatten().tolist()
        if self._left:  # the prompt comes first
            self._left = 0
            return
        self._ids += ids
        text = self._chat.text(self._ids)
        if not text.endswith("\ufffd"):  # half of a character
            self._show(text)

    def end(self) -> None:
        self._show(self._chat.text(self._ids))

    def _show(self, text: str) -> None:
        if len(text) > len(self._shown):
            self._on_text(text[len(self._shown) :])
            self._shown = text


class _Cancelled(StoppingCriteria):
    def __init__(self, cancelled: Callable[[], bool]) -> None:
        self._cancelled = cancelled

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._cancelled(), device=input_ids.device, dtype=torch.bool)


def _conversation(messages: Sequence[Message | ChatMessage], system: str | None) -> list[Message]:
    talk = []
    for number, message in enumerate(messages, 1):
        role, content = (
            (message.role, message.content)
            if isinstance(message, Message)
            else (message.get("role"), message.get("content"))
        )
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise DataError(
                f"message {number}",
                repr(message)[:80],
                "{'role': system, user or assistant, 'content': text}",
                "Mend the message.",
            )
        talk.append(Message(role, content))
    if not talk or talk[-1].role != "user":
        raise DataError("conversation", "no user turn at the end", "something to answer", "Add the question.")
    if system is not None and talk[0].role != "system":
        talk.insert(0, Message("system", system))
    return talk
