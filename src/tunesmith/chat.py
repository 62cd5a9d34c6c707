"""Talk with a base model or with one that has an adapter: same template, same tokens as in training."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tunesmith import hub, markup, models, reading, runs
from tunesmith import recipe as recipes
from tunesmith.data.render import Renderer
from tunesmith.data.writing import Text, reply_text
from tunesmith.engine.packing import longest_together
from tunesmith.errors import DataError, ModelError, ProofError, RunError, TunesmithError
from tunesmith.language import marked, said
from tunesmith.recipe import ModelSettings, Recipe, TemplateSettings
from tunesmith.runs import rundir
from tunesmith.terminal import what_is_no_text
from tunesmith.types import ChatMessage, Message

MAX_TOKENS = 512
SIDE_BY_SIDE = 128  # conversations that are answered at once
TOKENS_SIDE_BY_SIDE = 8 * 1024
"""With their replies and their padding: what the keys and values of a group are kept for. They are read for every word,
as the weights are; with more tokens than these they are the larger part of it, and of memory."""
_SHOWN = 120  # letters of a reply in a line
_LEAST_TEMPERATURE = 1e-3
"""Below it logits divided by the temperature leave the range of numbers, and the likeliest word is certain."""


@dataclass(frozen=True)
class Reply:
    """An answer and how it came about."""

    text: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """The reply with its stop token."""
    stopped_by: Literal["stop", "length"]

    def __repr__(self) -> str:
        text = repr(self.text[:_SHOWN]) + " …" * (len(self.text) > _SHOWN)
        return f"<Reply {text}; {self._how}>"

    def _repr_html_(self) -> str:
        return markup.block("", markup.paragraph(self.shown), markup.paragraph(self._how))

    @property
    def _how(self) -> str:
        by = said({"stop": marked("stop"), "length": marked("length")}[self.stopped_by])
        return said("{n:,} tokens, stopped by {by}", n=len(self.token_ids), by=by)

    @property
    def shown(self) -> str:
        """The text, with a sign after it where it was cut because it had become too long."""
        return self.text + (" …" if self.stopped_by == "length" else "")


class Chat:
    """A model that answers; made by `load`."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        renderer: Renderer,
        generation: GenerationConfig,
        system: str | None = None,
        adapter: str | None = "default",
    ) -> None:
        self.model, self.renderer, self.generation, self.system = model, renderer, generation, system
        self.adapter = adapter if isinstance(model, PeftModel) else None
        """The name of its adapter in the model, which may hold those of others too; None: the base alone answers."""

    @property
    def tuned(self) -> bool:
        """There is an adapter that can be switched off."""
        return self.adapter is not None

    @property
    def context(self) -> int:
        """How many tokens the model can read, prompt and reply together."""
        return models.context_length(self.model.config)

    def switched(self, *, base: bool) -> AbstractContextManager[Any]:
        """While it holds, the model has this chat's adapter, or is the base alone if asked for."""
        return models.switched(self.model, None if base else self.adapter)

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
        prompt = self.prompt_ids(messages)
        streamer = _Pieces(Text(self.renderer.template), on_text) if on_text else None
        stopping = StoppingCriteriaList([models.Cancelled(cancelled)]) if cancelled else None
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
        on_written: Callable[[int, int], None] | None = None,
    ) -> list[Reply]:
        """The next reply to each of several conversations, as by `reply`, side by side.

        Several times as fast as one by one, because each weight is read once for all of them; where two words are
        equally likely, rounding may decide otherwise. `on_written` is told after every step how many of the
        replies have come to their end, and how many tokens are written in all.
        """
        prompts = [self.prompt_ids(messages) for messages in conversations]
        written: dict[int, Reply] = {}
        for group in self._side_by_side([len(prompt) for prompt in prompts], max_tokens or MAX_TOKENS):
            some = [prompts[number] for number in group]
            extras = {}
            if on_written is not None:
                before = len(written), sum(len(reply.token_ids) for reply in written.values())
                counts = _Counts(self.renderer.template.stop_ids, max(map(len, some)), before, on_written)
                extras["stopping_criteria"] = StoppingCriteriaList([counts])
            written |= zip(group, self._generate(some, temperature, max_tokens, base, extras), strict=True)
            if on_written is not None:  # also those that have come to their greatest length
                on_written(len(written), sum(len(reply.token_ids) for reply in written.values()))
        return [written[number] for number in range(len(prompts))]

    def _side_by_side(self, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        """The numbers of prompts that go together: of like lengths, so that little is padded, and all with the same
        room for a reply. What only some of them could read to its end would cut the others, or change their rotary
        embeddings, so near the end of the context only prompts of one length go together."""
        readable = min(self.context, longest_together(self.model))
        groups: list[list[int]] = []
        for number in sorted(range(len(lengths)), key=lengths.__getitem__):
            whole = lengths[number] + max_tokens
            n_beside = len(groups[-1]) if groups else SIDE_BY_SIDE
            fits = n_beside < SIDE_BY_SIDE and min(whole, self.context) * (n_beside + 1) <= TOKENS_SIDE_BY_SIDE
            if fits and (whole <= readable or lengths[number] == lengths[groups[-1][0]]):
                groups[-1].append(number)
            else:
                groups.append([number])
        return groups

    def prompt_ids(self, messages: Sequence[Message | ChatMessage]) -> tuple[int, ...]:
        """What the model is given to write the next reply; raises as `reply` does."""
        prompt_ids = self.renderer.prompt_ids(_conversation(messages, self.system))
        if len(prompt_ids) >= self.context:
            raise DataError(
                said("conversation"),
                said("{n} tokens", n=len(prompt_ids)),
                said("fewer than {n}", n=self.context),
                said("Start a new conversation, or shorten it."),
            )
        return prompt_ids

    def prompt_text(self, messages: Sequence[Message | ChatMessage]) -> str:
        """The same as the template writes it; for a conversation of which `prompt_ids` has been asked."""
        return self.renderer.template.write(_conversation(messages, self.system), generation_prompt=True)

    def sampling(self, temperature: float | None) -> GenerationConfig:
        """The model's generation config with another temperature; 0, and what is as good as that, is greedy."""
        config = copy.deepcopy(self.generation)
        if temperature is not None:
            config.do_sample = temperature >= _LEAST_TEMPERATURE
            config.temperature = temperature if config.do_sample else 1.0
        if not config.do_sample:  # transformers warns about sampling settings that greedy search does not read
            config.temperature, config.top_p, config.top_k = None, None, None
        return config

    def _generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        temperature: float | None,
        max_tokens: int | None,
        base: bool,
        extras: dict[str, Any],
    ) -> list[Reply]:
        """A reply to each of some prompts, all with the room that the longest has."""
        longest = max(map(len, prompts))
        config = self.sampling(temperature)
        config.max_new_tokens = min(max_tokens or MAX_TOKENS, self.context - longest)
        # Padding stands in front, where it is masked, so its id has no effect.
        input_ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        # Into what sharded weights are collected in, a step that comes later must be able to write.
        sharded = any(hasattr(parameter, "placements") for parameter in self.model.parameters())
        with torch.inference_mode(not sharded), torch.no_grad(), self.switched(base=base):
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
        text = reply_text(self.renderer.template, token_ids)
        return Reply(text, prompt_ids, token_ids, "length" if end is None else "stop")


def load(run_or_model: str | os.PathLike[str], *, revision: str | None = None, base: bool = False) -> Chat:
    """A chat with a run (its base and adapter), a run's adapter folder, or a model by alias, id or folder.

    Raises RunError, ModelError or TemplateError; ProofError when base or template are not those of the training.
    """
    path = runs.named_or_model(run_or_model)
    if path is not None:
        return Opened.of(path, base=base).chat()
    return _load_model(run_or_model, revision)


def load_together(runs_or_model: Sequence[str | os.PathLike[str]]) -> tuple[Chat, list[Chat], list[Opened]]:
    """Several runs of one base over one copy of its weights: a chat with the base alone, one per run, and the runs.

    A single model may stand in the place of the runs. Raises RunError for runs of different bases before any weight
    is read, and otherwise what `load` raises.
    """
    paths = [runs.named_or_model(given) for given in runs_or_model]
    plain = [given for given, path in zip(runs_or_model, paths, strict=True) if path is None]
    if plain and len(paths) > 1:
        found, fix = said("no run"), said("Name runs of one base, or one model alone.")
        raise RunError(os.fspath(plain[0]), found, said("a run's folder"), fix)
    if plain:
        return _load_model(plain[0], None), [], []
    opened = [Opened.of(path) for path in paths if path is not None]
    for other in opened[1:]:
        opened[0].check_same_base(other)
    first, model = opened[0], models.load_base(opened[0].found, opened[0].recipe.model)
    names = ["default", *(f"adapter{number}" for number in range(2, len(opened) + 1))]
    tuned: PreTrainedModel | PeftModel = model
    for run, name in zip(opened, names, strict=True):
        tuned = models.load_adapter(tuned, run.adapter, name)
    try:
        renderer = models.open_renderer(first.found, first.recipe.template)
        generation = models.generation_config(first.found.folder, renderer.template)
    except TunesmithError:  # a template that only the runs have
        renderer, generation = first.renderer, first.generation
    base = Chat(tuned, renderer, generation, adapter=None)
    chats = [
        Chat(tuned, run.renderer, run.generation, run.recipe.template.system, name)
        for run, name in zip(opened, names, strict=True)
    ]
    return base, chats, opened


def _load_model(name: str | os.PathLike[str], revision: str | None) -> Chat:
    path = Path(name)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ModelError(
            str(path),
            said("an adapter outside its run"),
            said("a run's folder or a model"),
            said("Name the folder that `tunesmith train` wrote, or use load_and_chat.py beside the adapter."),
        )
    found = models.prepared(hub.locate(os.fspath(name), revision))
    renderer = models.open_renderer(found, TemplateSettings())
    model = models.load_base(found, ModelSettings())
    return Chat(model, renderer, models.generation_config(found.folder, renderer.template))


@dataclass(frozen=True)
class Opened:
    """A run that has been looked at and found whole; its weights have not been read."""

    run: rundir.RunDir
    recipe: Recipe
    found: hub.LocalModel
    """Its base."""
    renderer: Renderer
    generation: GenerationConfig

    @classmethod
    def of(cls, path: Path, *, base: bool = False) -> Opened:
        """Raises RunError or ModelError for what is missing, ProofError for what is not as it was at training.

        With `base` the run need not be finished.
        """
        run = rundir.open_run(path)
        recipe, _ = recipes.resolve(run.recipe)
        manifest = rundir.read_manifest(run)
        if not base:
            runs.require_finished(run)
        folder = Path(manifest["base"]["folder"])
        source, revision = manifest["base"]["source"], manifest["base"]["revision"]
        if folder.is_dir():
            located = replace(hub.locate(str(folder)), source=source, revision=revision)
        else:
            located = models.prepared(hub.locate(recipe.model.name, revision))
        if rundir.sha256(located.folder / "config.json") != manifest["base"]["config_sha256"]:
            raise ProofError(
                str(located.folder),
                said("another config.json than at training"),
                said("the base that was trained on"),
                said("Fetch that revision again, or train again."),
            )
        before, weights = manifest["base"].get("weights"), rundir.weights_of(located.folder)
        if before is not None and before != weights:
            names = sorted(name for name in {*before, *weights} if before.get(name) != weights.get(name))
            raise ProofError(
                str(located.folder),
                said("other weights than at training ({names})", names=", ".join(names)),
                said("the base that was trained on"),
                said("Put them back or fetch that revision again; or train again."),
            )
        reader = run.adapter if run.adapter.is_dir() else located.folder
        template = recipe.template if reader is located.folder else TemplateSettings()
        renderer = models.open_renderer(replace(located, folder=reader), template)
        if renderer.template.digest != manifest["template"]["sha256"]:
            raise ProofError(
                str(reader),
                said("another chat template than at training"),
                said("the one that was trained with"),
                said("Restore chat_template.jinja, or train again."),
            )
        if run.adapter.is_dir():
            _check_adapter_digest(run.adapter)
        return cls(run, recipe, located, renderer, models.generation_config(reader, renderer.template))

    @property
    def adapter(self) -> Path:
        return self.run.adapter

    def chat(self, settings: ModelSettings | None = None) -> Chat:
        """With its base held as `settings` say, else as it was held at training; the base alone without an adapter."""
        model = models.load_base(self.found, settings or self.recipe.model)
        tuned = models.load_adapter(model, self.adapter) if self.adapter.is_dir() else model
        return Chat(tuned, self.renderer, self.generation, self.recipe.template.system)

    def check_same_base(self, other: Opened) -> None:
        """Raises RunError where another run was trained on another base, or on one that was held in other numbers."""
        mine, theirs = self._base, other._base
        if mine != theirs:
            raise RunError(
                f"{other.run.path}",
                said("a run of {base}", base=" ".join(theirs)),
                said("the base of {run}, {base}", run=self.run.path, base=" ".join(mine)),
                said("Serve runs of different bases by processes of their own, each with another --port."),
            )

    @property
    def _base(self) -> tuple[str, ...]:
        folder, settings = str(self.found.folder.resolve()), self.recipe.model
        return folder, f"({settings.dtype}, {settings.quantize})"


def _check_adapter_digest(adapter: Path) -> None:
    """Raises ProofError where the weights or their settings are not those that training wrote."""
    try:
        digests = reading.json_object(adapter / "files.json", 4 << 20)
        changed = [name for name in _OF_ADAPTER if rundir.sha256(adapter / name) != digests[name]["sha256"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        found = said("no digests to hold it to ({error})", error=error)
        fix = said("Copy the run's folder again from where it came.")
        raise ProofError(str(adapter), found, said("files.json as training wrote it"), fix) from None
    if changed:
        found, fix = said("another file than training wrote"), said("Copy the run's folder again from where it came.")
        raise ProofError(str(adapter / changed[0]), found, said("the digest in files.json"), fix)


_OF_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


class _Pieces(BaseStreamer):
    """Hands out text as soon as its characters are whole."""

    def __init__(self, text: Text, on_text: Callable[[str], None]) -> None:
        self._text, self._on_text = text, on_text
        self._prompt_is_read = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_is_read:
            for token_id in value.flatten().tolist():
                self._show(self._text.add(token_id))
        self._prompt_is_read = True  # `generate` hands out the prompt first

    def end(self) -> None:
        self._show(self._text.end())

    def _show(self, piece: str) -> None:
        if piece:
            self._on_text(piece)


class _Counts(StoppingCriteria):
    """Tells after every step how many replies have ended and how many tokens are written; stops none."""

    def __init__(
        self, stop_ids: Sequence[int], n_prompt: int, before: tuple[int, int], tell: Callable[[int, int], None]
    ) -> None:
        """`before` is what other groups have ended and written."""
        self._stop_ids, self._n_prompt, self._before, self._tell = stop_ids, n_prompt, before, tell

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        written = input_ids[:, self._n_prompt :]
        stops = torch.isin(written, torch.tensor(self._stop_ids, device=written.device))
        n_ended = int(stops.any(1).sum())
        n_tokens = int((stops.cumsum(1) == 0).sum()) + n_ended
        self._tell(self._before[0] + n_ended, self._before[1] + n_tokens)
        return torch.zeros(len(input_ids), device=input_ids.device, dtype=torch.bool)


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
                said("message {number}", number=number),
                repr(message)[:80],
                said("{{'role': system, user or assistant, 'content': text}}"),
                said("Mend the message."),
            )
        if half := what_is_no_text(content):
            raise DataError(
                said("message {number}", number=number),
                half,
                said("whole characters"),
                said("Decode the text anew, as what it is."),
            )
        talk.append(Message(role, content))
    if not talk or talk[-1].role != "user":
        raise DataError(
            said("conversation"),
            said("no user turn at the end"),
            said("something to answer"),
            said("Add the question."),
        )
    if system is not None and talk[0].role != "system":
        talk.insert(0, Message("system", system))
    return talk
