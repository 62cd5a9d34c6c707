"""Replies to many conversations at once: each token of each of them goes through the weights together with the others'.

A reply joins when it is asked for and leaves when it ends; nobody waits for a batch to be full or to be done. Each has
keys and values of its own and attends alone, so only the layers' products are shared. A token is a row of its own (T
rows of one token), so peft's mixed batches can give each token the adapter of its reply, or none:

    row        0   1   2   3 … 130          the adapter of row 2 is another than that of row 0
    reply      A   B   C   D, which reads its prompt in chunks
    adapter    x   x   y   none

transformers has continuous batching of its own (`generate_batch`, 5.23). It lays all tokens out as one row of one
sequence, where peft can not tell whose token is whose, and knows no adapters; all replies are drawn from one seed; and
its pages take a fixed share of the free memory, 0.6 on a CPU.

At temperature 0 a reply is, token by token, that of `chat.Chat.reply`. Products of other shapes round differently, by
some 4e-6 of the largest logit in float32; so where the two best words are as close as that, this reply alone is
computed again as chat does it, and that decides (`_settle`). In 16 bits the two best words are often as close as
rounding, and chat itself answers differently from machine to machine; nothing is computed again.

Legend: T tokens of a step, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from tunesmith import models
from tunesmith.engine.packing import longest_together, not_packable
from tunesmith.language import said
from tunesmith.machines import free_bytes
from tunesmith.serving import attention
from tunesmith.serving.reply import Again, Ended, Reply, Sampling, Together, Written

AT_ONCE, QUEUE_LIMIT = 32, 256  # replies
# Tokens of prompts read in a step, and how long it may take while others write or read: then fewer are read.
_PROMPT_TOKENS, _FEWEST_PROMPT_TOKENS, _STEP_SECONDS = 256, 32, 0.25
_SHORT = 2048  # tokens of a request, prompts and replies together, for which some room is always kept
_KEPT_FOR_SHORT = 4  # the part of places and tokens
_AGAIN_TOKENS = 8  # computed again at once, so that the others are not kept waiting
_COUNTED_FROM_THE_PROMPT = ("min_new_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty")
# Two words are too close below so many times the type's epsilon times the largest logit. In these units two right
# computations of a logit were seen up to 34 apart (SmolLM2, 12 replies together against alone, 2 AVX2 cores, 2026-11).
_TIE = 256
# Tokens of a prompt that are computed again at once; a longer one would keep the others waiting for seconds.
_LONGEST_AGAIN = 1024
# Largest relative difference between two right computations, in 32 and in 16 bits; seen were 3e-7 and 5e-3 (twelve
# small architectures, 2026-11).
_BOUND, _BOUND_SHORT = 1e-4, 0.1
_UNLIMITED = 2**62  # tokens
_LOG = logging.getLogger(__name__)


class Full(Exception):
    """As many replies wait as may."""


class Closed(Exception):
    """No new replies are begun."""


class Batch:
    """All replies that are being written by one model, and those that wait; a thread of its own computes them.

    `budget` tokens may have keys and values at a time, and `at_once` replies be written; `queue_limit` more may wait.
    """

    def __init__(
        self, model: nn.Module, *, budget: int | None = None, at_once: int = AT_ONCE, queue_limit: int = QUEUE_LIMIT
    ) -> None:
        self._model, self._causal = model, _causal(model)
        self._device = next(model.parameters()).device
        self._budget, self._at_once, self._queue_limit = _UNLIMITED if budget is None else budget, at_once, queue_limit
        self._waiting: deque[Reply] = deque()
        self._running: list[Reply] = []
        self._changed = threading.Condition()
        self._open = True
        self._ended = False
        self.settled = 0
        """Tokens that were computed again because two words were too close."""
        self.n_prompt = self.n_written = 0
        """Tokens read and written since the start."""
        self.longest_together = longest_together(model)
        self.reason = not_packable(model)
        """Why replies are written one after the other; None where they are not."""
        self._dtype = next(model.parameters()).dtype
        self._bytes_per_token = 0
        self._by_adapter = _some_can_not_be_mixed(model)
        self._names: list[str] | None = None
        self._prompt_tokens = _PROMPT_TOKENS
        self._some_adapter = next(iter(model.peft_config)) if isinstance(model, PeftModel) else None
        for module in model.modules():  # what peft itself does, but for every step anew
            if isinstance(module, LoraLayer):
                cast("nn.Module", module).register_forward_pre_hook(self._name_adapters, with_kwargs=True)
        AttentionInterface.register(attention.INTERFACE, attention.attend)
        self._configs = list({id(c): c for m in model.modules() if (c := getattr(m, "config", None))}.values())
        self._thread = threading.Thread(target=self._work, name="batch", daemon=True)

    # --- from any thread ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def prove(self) -> None:
        """Compares a few tokens of two replies with the model alone; if they differ, `reason` says so.

        To be called before `start`.
        """
        if self.reason is not None:
            return
        n_words = models.n_words(self._model)
        prompts = [[(7 * i + 11 * k) % n_words for i in range(n)] for k, n in ((1, 9), (2, 6))]
        sampling = Sampling(GenerationConfig(do_sample=False), 1)
        replies = [Reply(tuple(ids), None, sampling, frozenset(), lambda _: None) for ids in prompts]
        first, second = replies
        with torch.inference_mode():
            with models.switched(self._model, None):
                inputs = [torch.tensor([ids], device=self._device) for ids in prompts]
                alone = [self._causal(ids, use_cache=False).logits[0, -1] for ids in inputs]
            try:
                self._forward([(first, prompts[0][:4])])
                logits = self._forward([(first, prompts[0][4:]), (second, prompts[1])])
            except Exception as error:  # a model may take its inputs in a way of its own
                found = f"{type(error).__name__}: {error}"
                self.reason = said("they can not be computed together ({error})", error=found)
                return
        expected = torch.stack(alone).float()
        difference = float((logits - expected).norm() / expected.norm())
        self._bytes_per_token = sum(t[:, :, :1].nbytes for pair in first.kept.values() for t in pair)
        self.n_prompt = 0
        if not difference < (_BOUND if logits.dtype == self._dtype else _BOUND_SHORT):
            self.reason = said(
                "together they differ from the model alone (relative difference {difference:.1e})",
                difference=difference,
            )

    def make_room(self, tokens: int | None, share: float) -> None:
        """Sets the budget: `tokens`, or what a share of the free memory holds."""
        if tokens is None and self._bytes_per_token:
            tokens = int(free_bytes(self._device) * share) // self._bytes_per_token
        self._budget = _UNLIMITED if tokens is None else tokens

    @property
    def budget(self) -> int:
        """The most tokens that have keys and values at a time."""
        return self._budget

    @property
    def share(self) -> int:
        """The most tokens that the replies to one request may come to with their prompts."""
        return self._budget - self._kept_tokens

    @property
    def _kept_places(self) -> int:
        return self._at_once // _KEPT_FOR_SHORT

    @property
    def _kept_tokens(self) -> int:
        """Of the budget, for requests that are short; they take half of that at most."""
        return self._budget // _KEPT_FOR_SHORT if self._kept_places else 0

    def _is_short(self, replies: Sequence[Reply]) -> bool:
        return sum(reply.longest for reply in replies) <= min(_SHORT, self._kept_tokens // 2)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def reserved(self) -> int:
        """Tokens of the budget that are spoken for; one that is computed again has its keys and values twice."""
        return sum(reply.reserved for reply in list(self._running))

    def submit(self, replies: Sequence[Reply]) -> None:
        """All replies to one request; they are begun as soon as there is room.

        Raises Full or Closed, and then none of them is.
        """
        asked = Together(self._is_short(replies))
        for reply in replies:
            reply.asked = asked
        with self._changed:
            if not self._open:
                raise Closed
            if len(self._waiting) + len(replies) > self._queue_limit and self._waiting:
                raise Full
            self._waiting.extend(replies)
            self._changed.notify()

    def cancel(self, reply: Reply) -> None:
        """Its place is free before the next token."""
        with self._changed:
            reply.cancelled = True
            self._changed.notify()

    def give_up(self) -> None:
        """Nothing that is there is finished."""
        with self._changed:
            for reply in [*self._running, *self._waiting]:
                reply.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """What is there is finished, and nothing new begun."""
        with self._changed:
            self._open = False
            self._changed.notify()

    def end(self) -> None:
        """The thread ends after the token it is at; what is there is cancelled."""
        self.close()
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    # --- the batch's thread ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        with torch.inference_mode():
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting or self._running or self._ended)
                    if self._ended:
                        break
                    self._leave()
                    self._join()
                self._step_or_fail()
        for reply in [*self._running, *self._waiting]:
            self._end_of(reply, Ended("cancelled"))
        self._waiting.clear()

    def _leave(self) -> None:
        for reply in [reply for reply in (*self._running, *self._waiting) if reply.cancelled]:
            if reply in self._waiting:
                self._waiting.remove(reply)
            self._end_of(reply, Ended("cancelled"))

    def _end_of(self, reply: Reply, ended: Ended) -> None:
        """Its place and its memory are free."""
        if reply in self._running:
            self._running.remove(reply)
        reply.kept.clear()
        reply.again = reply.unsettled = None
        reply.emit(ended)

    def _join(self) -> None:
        """First come, first served; a long one is overtaken only where it could not have been, or it might wait for
        ever: in the part that is kept for short ones."""
        overtaking = False
        for reply in list(self._waiting):
            if not (overtaking and not reply.asked.short) and self._has_room(reply, overtaking):
                self._waiting.remove(reply)
                self._running.append(reply)
                with self._alone_at_fault(reply):
                    reply.processors = self._processors(reply)
            elif reply.asked.short:
                return
            else:
                overtaking = True

    def _has_room(self, reply: Reply, overtaking: bool) -> bool:
        if not self._running:
            return True
        short = [one for one in self._running if one.asked.short]
        n_short, short_tokens = len(short), sum(one.reserved for one in short)
        n_long, long_tokens = len(self._running) - n_short, self.reserved - short_tokens
        if not reply.asked.short:
            n_short, short_tokens = max(n_short, self._kept_places), max(short_tokens, self._kept_tokens)
        elif overtaking and (n_short >= self._kept_places or short_tokens + reply.longest > self._kept_tokens):
            return False
        return n_long + n_short < self._at_once and long_tokens + short_tokens + reply.longest <= self._budget

    def _step_or_fail(self) -> None:
        try:
            self._step()
        except Exception as error:
            _LOG.exception("a step of the batch failed; its replies are given up")
            for reply in list(self._running):
                self._end_of(reply, Ended("failed", f"{type(error).__name__}: {error}"))

    def _step(self) -> None:
        for reply in list(self._running):
            if reply.unsettled is not None:
                with self._alone_at_fault(reply):
                    self._settle(reply, reply.unsettled)
        began, together = time.monotonic(), list(self._rows())
        groups: dict[str | None, list[tuple[Reply, Sequence[int]]]] = {}
        for reply, ids in together:
            groups.setdefault(reply.adapter if self._by_adapter else None, []).append((reply, ids))
        for rows in groups.values():
            logits = self._forward(rows)
            ready = [reply for reply, _ in rows if not reply.to_read]
            self._choose(ready, logits)
        self._pace(together, time.monotonic() - began)
        alone = next((reply for reply in self._running if self._goes_alone(reply) and not reply.cancelled), None)
        if alone is not None:
            with self._alone_at_fault(alone):
                self._write_alone(alone)

    def _pace(self, rows: Sequence[tuple[Reply, Sequence[int]]], seconds: float) -> None:
        """How many tokens of prompts the next step reads, by how long this one took."""
        if len(rows) < 2:  # nobody else waits for it
            self._prompt_tokens = _PROMPT_TOKENS
        elif seconds > _STEP_SECONDS:
            self._prompt_tokens = max(_FEWEST_PROMPT_TOKENS, self._prompt_tokens // 2)
        elif seconds < _STEP_SECONDS / 3:
            self._prompt_tokens = min(_PROMPT_TOKENS, self._prompt_tokens * 2)

    @contextmanager
    def _alone_at_fault(self, reply: Reply) -> Iterator[None]:
        """What goes wrong inside ends this reply and no other."""
        try:
            yield
        except Exception as error:
            _LOG.exception("a reply is given up")
            if reply in self._running:
                self._end_of(reply, Ended("failed", f"{type(error).__name__}: {error}"))

    def _goes_alone(self, reply: Reply) -> bool:
        return self.reason is not None or reply.longest > self.longest_together

    def _rows(self) -> Iterator[tuple[Reply, Sequence[int]]]:
        """The tokens of the next step, by reply.

        Each request has an equal part of the tokens of prompts, and what a short one leaves goes to the longer ones.
        """
        reading: dict[Together, list[Reply]] = {}
        for reply in self._running:
            if reply.unsettled is not None or self._goes_alone(reply):
                continue
            if reply.n_read == 0 and self._is_read_by_another(reply):
                continue
            if reply.n_read >= len(reply.prompt_ids):
                yield reply, reply.to_read
            else:
                reading.setdefault(reply.asked, []).append(reply)
        requests = sorted(reading.values(), key=_n_to_read)
        left = self._prompt_tokens
        for n_done, replies in enumerate(requests):
            part = -(-left // (len(requests) - n_done))
            for reply in replies:
                if part:
                    ids = reply.to_read[:part]
                    part -= len(ids)
                    left -= len(ids)
                    yield reply, ids

    def _is_read_by_another(self, reply: Reply) -> bool:
        """Whether an earlier reply to the same request is reading the same prompt; what it has read is taken over."""
        n_read = len(reply.prompt_ids) - 1  # the last token's logits say what comes first
        for other in self._running:
            if other is reply or not n_read:
                break
            same = other.asked is reply.asked and other.adapter == reply.adapter
            if same and other.prompt_ids == reply.prompt_ids:
                if other.n_read < n_read:
                    return True
                reply.kept = {
                    module: (keys[:, :, :n_read].clone(), values[:, :, :n_read].clone())
                    for module, (keys, values) in other.kept.items()
                }
                reply.n_read = n_read
                break
        return False

    def _forward(self, rows: Sequence[tuple[Reply, Sequence[int]]]) -> Tensor:
        """(n, V) logits behind the last token of each reply that has read all it has."""
        ids = [i for _, some in rows for i in some]
        positions = [reply.n_read + k for reply, some in rows for k in range(len(some))]
        slices, last, done = [], [], 0
        for reply, some in rows:
            slices.append((reply, slice(done, done + len(some))))
            done += len(some)
            if len(some) == len(reply.to_read):
                last.append(done - 1)
        input_ids, position_ids = (torch.tensor(column, device=self._device)[:, None] for column in (ids, positions))
        names = [reply.adapter for reply, some in rows for _ in some]
        uniform = self._by_adapter or (names[0] is not None and len(set(names)) == 1)
        self._names = None if uniform else [name or "__base__" for name in names]
        wanted = models.switched(self._model, names[0] if uniform else self._some_adapter)
        try:
            with wanted, attention.attending(self._configs, slices), _only(self._causal, last):
                output = self._causal(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        finally:
            self._names = None
        for reply, some in rows:
            n_new_prompt = min(len(some), max(0, len(reply.prompt_ids) - reply.n_read))
            self.n_prompt += n_new_prompt
            reply.n_read += len(some)
        return output.logits[:, 0].float()

    def _name_adapters(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Tells a layer which adapter each row has; None where all have the active one."""
        return None if self._names is None else (given, {**named, "adapter_names": self._names})

    # --- which token -------------------------------------------------------------------------------------------------

    def _choose(self, replies: Sequence[Reply], logits: Tensor) -> None:
        """The next token of each reply."""
        for reply, row in zip(replies, logits, strict=True):
            with self._alone_at_fault(reply):
                if reply.sampling.greedy and self._close_call(reply, row):
                    reply.unsettled = row
                else:
                    self._append(reply, reply.choose(row))

    def _append(self, reply: Reply, written: Written) -> None:
        reply.written.append(written.token_id)
        self.n_written += 1
        reply.emit(written)
        stopped = written.token_id in reply.stop_ids
        if stopped or len(reply.written) >= reply.sampling.max_tokens:
            self._end_of(reply, Ended("stop" if stopped else "length"))

    def _close_call(self, reply: Reply, logits: Tensor) -> bool:
        sampling, dtype = reply.sampling, self._dtype
        if dtype.itemsize < 4 or sampling.presence_penalty or sampling.frequency_penalty:
            return False
        if len(reply.prompt_ids) > _LONGEST_AGAIN:
            return False
        first, second = torch.topk(reply.scores(logits), 2).values.tolist()
        return first - second < _TIE * torch.finfo(dtype).eps * float(logits.abs().max())

    def _settle(self, reply: Reply, logits: Tensor) -> None:
        """Goes on a few tokens on the way to the next token as chat finds it: this reply alone, from its first on."""
        counted = any(getattr(reply.sampling.config, name, None) for name in _COUNTED_FROM_THE_PROMPT)
        if reply.again is None or counted:
            cache = DynamicCache(config=self._causal.config.get_text_config(decoder=True))
            reply.again = Again(list(reply.prompt_ids), cache)
        n_wanted = len(reply.prompt_ids) + len(reply.written) + 1
        config = copy.deepcopy(reply.sampling.config)
        config.max_new_tokens = n_wanted - len(reply.again.token_ids)
        if not counted:
            config.max_new_tokens = min(config.max_new_tokens, _AGAIN_TOKENS)
        self._generated(reply, config, reply.again)
        if len(reply.again.token_ids) >= n_wanted or reply.again.token_ids[-1] in reply.stop_ids:
            found = reply.again.token_ids[len(reply.prompt_ids) :]
            token = found[-1] if found[:-1] == reply.written else int(reply.scores(logits).argmax())
            self.settled += 1
            reply.unsettled = None
            self._append(reply, reply.told(logits, token))

    # --- one reply by itself -----------------------------------------------------------------------------------------

    def _write_alone(self, reply: Reply) -> None:
        """From its prompt to its end by transformers' own loop, which knows every kind of layer."""
        config = GenerationConfig(do_sample=False, eos_token_id=list(reply.stop_ids), pad_token_id=0)
        config.max_new_tokens = reply.sampling.max_tokens
        own, self._causal.generation_config = self._causal.generation_config, GenerationConfig()
        try:  # what the model's config asks for is in the reply's own processors
            self._generated(reply, config, None, LogitsProcessorList([_Choosing(self, reply)]))
        finally:
            self._causal.generation_config = own
        self.n_prompt += len(reply.prompt_ids)
        if reply in self._running:  # it was given up before its last token
            self._end_of(reply, Ended("cancelled"))

    def _generated(
        self,
        reply: Reply,
        config: GenerationConfig,
        again: Again | None,
        processors: LogitsProcessorList | None = None,
    ) -> None:
        """Runs transformers' own loop on the prompt, or from where it was left."""
        input_ids = torch.tensor([again.token_ids if again else reply.prompt_ids], device=self._device)
        generate: Any = self._model.generate
        with models.switched(self._model, reply.adapter):
            output = generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([models.Cancelled(lambda: reply.cancelled)]),
                **({"cache": again.cache} if again else {}),
            )
        if again:
            again.token_ids = output[0].tolist()

    def _processors(self, reply: Reply) -> LogitsProcessorList:
        """What `generate` itself would do to the logits with this config."""
        config, _ = self._causal._prepare_generation_config(reply.sampling.config)
        self._causal._prepare_special_tokens(config, device=self._device)
        return self._causal._get_logits_processor(
            config, input_ids_seq_length=len(reply.prompt_ids), device=str(self._device)
        )


class _Choosing(LogitsProcessor):
    """Lets `generate` write the token that was chosen here."""

    def __init__(self, batch: Batch, reply: Reply) -> None:
        self._batch, self._reply = batch, reply

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        written = self._reply.choose(scores[0].float())
        self._batch._append(self._reply, written)
        forced = torch.full_like(scores, -torch.inf)
        forced[0, written.token_id] = 0
        return forced


def _n_to_read(replies: Sequence[Reply]) -> int:
    return sum(len(reply.prompt_ids) - reply.n_read for reply in replies)


def _causal(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _some_can_not_be_mixed(model: nn.Module) -> bool:
    """Whether an adapter is of a kind that peft refuses in mixed batches (DoRA)."""
    return any(any(m.use_dora.values()) for m in model.modules() if isinstance(m, LoraLayer))


@contextmanager
def _only(causal: Any, rows: Sequence[int]) -> Iterator[None]:
    """The output layer, the widest of all, is computed for these rows alone."""
    wanted = torch.tensor(rows, dtype=torch.int64)
    handle = causal.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0][wanted],))
    try:
        yield
    finally:
        handle.remove()
