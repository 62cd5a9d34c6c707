"""Replies that are written together are those that are written alone, whatever model, adapters and crowd they have."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from conftest import cases
from tunesmith import models
from tunesmith.engine.attention import Style
from tunesmith.recipe import LoraSettings
from tunesmith.serving import attention
from tunesmith.serving.batching import Batch, Closed, Full
from tunesmith.serving.reply import Ended, Event, Reply, Sampling, Written

STOP = 2
SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "eos_token_id": STOP, "pad_token_id": 0,
    "bos_token_id": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi3": {},
    "olmo2": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12, "moe_intermediate_size": 16,
        "first_k_dense_replace": 1, "num_key_value_heads": 4,
    },
}  # fmt: skip


def made(kind: str, **config: Any) -> PreTrainedModel:
    """A random small model whose next word depends on all it has read."""
    torch.manual_seed(3)
    settings = {**SMALL, **FAMILIES.get(kind, {}), **config}
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.0 if "embed" in name or "head" in name else parameter.shape[1] ** -0.5)
    return built.eval()


def with_adapters(base: PreTrainedModel, folder: Path, variants: Sequence[str]) -> Any:
    """The base with adapters that change a lot, saved and loaded as a run's are."""
    tuned: Any = base
    base.config.save_pretrained(folder)  # where peft looks for it
    for number, variant in enumerate(variants):
        fresh = made(base.config.model_type)
        settings = LoraSettings(r=4, alpha=8, dropout=0, variant=variant)  # type: ignore[arg-type]
        attached = models.attach(fresh, settings, seed=number, base_name=str(folder))
        start = folder / f"start{number}"
        if variant == "pissa":
            models.save_adapter(attached, start)
        torch.manual_seed(number)
        with torch.no_grad():
            for name, parameter in attached.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        saved = folder / f"adapter{number}"
        models.save_adapter(attached, saved, start if variant == "pissa" else None)
        tuned = models.load_adapter(tuned, saved, "default" if number == 0 else f"adapter{number}")
    return tuned


@dataclass
class Asked:
    """A reply with what became of it."""

    reply: Reply
    events: queue.SimpleQueue[Event]
    written: list[Written] = field(default_factory=list)

    def end(self) -> Ended:
        while isinstance(event := self.events.get(timeout=60), Written):
            self.written.append(event)
        return event

    def ids(self) -> list[int]:
        ended = self.end()
        assert ended.reason in ("stop", "length"), ended
        return [written.token_id for written in self.written]


def reply(
    prompt: Sequence[int], max_tokens: int = 12, adapter: str | None = None, number: int = 0, **sampling: Any
) -> Asked:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    config = sampling.pop("config", None) or GenerationConfig(do_sample=False)
    drawn = Sampling(config, max_tokens, **sampling)
    return Asked(Reply(tuple(prompt), adapter, drawn, frozenset({STOP}), events.put, number), events)


@contextmanager
def at_work(model: nn.Module, **settings: Any) -> Iterator[Batch]:
    batch = Batch(model, **settings)
    batch.start()
    try:
        yield batch
    finally:
        batch.end()


def together(batch: Batch, asked: Sequence[Asked]) -> list[list[int]]:
    batch.submit([one.reply for one in asked])
    return [one.ids() for one in asked]


def alone(model: Any, prompt: Sequence[int], max_tokens: int = 12, adapter: str | None = None, **config: Any) -> Any:
    """What transformers itself writes."""
    ids = torch.tensor([list(prompt)])
    greedy = {"do_sample": False, "eos_token_id": STOP, "pad_token_id": 0, "max_new_tokens": max_tokens, **config}
    with models.switched(model, adapter):
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **greedy)
    return output[0, len(prompt) :].tolist()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    chance = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, SMALL["vocab_size"], (length,), generator=chance).tolist()


PROMPTS = [prompt_of(n) for n in (1, 3, 9, 17, 40, 300, 5, 12)]  # 300 is read in two chunks


@pytest.mark.parametrize("kind", FAMILIES)
def test_replies_written_together_are_those_written_alone(kind: str) -> None:
    model = made(kind)
    with at_work(model) as batch:
        batch_reason = batch.reason
        written = together(batch, [reply(prompt) for prompt in PROMPTS])
    assert batch_reason is None
    assert written == [alone(model, prompt) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in written}) > len(PROMPTS) // 2  # they do not all say the same


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_proof_at_the_start_finds_the_same(kind: str) -> None:
    batch = Batch(made(kind))
    batch.prove()
    assert batch.reason is None


def test_the_proof_sees_a_window_that_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = attention._seen
    monkeypatch.setattr(
        attention, "_seen", lambda q, k, v, style, n: seen(q, k, v, Style(style.scale, None, style.softcap), n)
    )
    batch = Batch(made("mistral", sliding_window=4))
    batch.prove()
    assert batch.reason is not None and "differ from the model alone" in batch.reason


@pytest.mark.parametrize(
    "variants", [("plain", "rslora"), ("plain", "dora"), ("pissa", "plain")], ids=lambda v: "+".join(v)
)
@pytest.mark.parametrize("kind", cases(["llama", "gpt2"], ["llama"].__contains__))
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # peft's, of GPT-2's transposed layers
def test_adapters_and_base_in_one_batch_write_what_each_writes_alone(
    kind: str, variants: tuple[str, ...], tmp_path: Path
) -> None:
    if kind == "gpt2" and "pissa" in variants:
        pytest.skip("peft has no pissa for the transposed layers of GPT-2")
    model = with_adapters(made(kind), tmp_path, variants)
    named = [("default", "adapter1", None)[i % 3] for i in range(2 * len(PROMPTS))]
    asked = [reply(prompt, adapter=name) for prompt, name in zip(PROMPTS * 2, named, strict=True)]
    with at_work(model) as batch:
        written = together(batch, asked)
        again = together(batch, [reply(PROMPTS[2], adapter="adapter1")])  # one adapter for all rows
    assert written == [alone(model, prompt, adapter=name) for prompt, name in zip(PROMPTS * 2, named, strict=True)]
    three = [alone(model, PROMPTS[2], adapter=name) for name in ("default", "adapter1", None)]
    assert len({tuple(ids) for ids in three}) == 3  # none of the adapters is the identity
    assert again == [three[1]]


def test_who_comes_later_joins_and_changes_nothing() -> None:
    model = made("llama")
    first = reply(PROMPTS[2], 200)
    with at_work(model) as batch:
        batch.submit([first.reply])
        for _ in range(5):
            event = first.events.get(timeout=60)
            assert isinstance(event, Written)
            first.written.append(event)
        late = together(batch, [reply(prompt) for prompt in PROMPTS])
        assert first.ids() == alone(model, PROMPTS[2], 200)
    assert late == [alone(model, prompt) for prompt in PROMPTS]


def almost_twins(model: PreTrainedModel) -> PreTrainedModel:
    """Every word has another that is as likely but for the last bit."""
    head: Any = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[1::2] = head.weight[: len(head.weight) - 1 : 2] * (1 + 2**-22)
    return model


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_words_that_are_as_likely_as_each_other_are_settled_as_alone(kind: str) -> None:
    model = almost_twins(made(kind, tie_word_embeddings=False))
    with at_work(model) as batch:
        written = together(batch, [reply(prompt, 16) for prompt in PROMPTS])
        settled = batch.settled
    assert written == [alone(model, prompt, 16) for prompt in PROMPTS]
    assert settled > len(PROMPTS)  # it was close, and more than once


def test_a_clear_choice_is_not_computed_again() -> None:
    with at_work(made("llama")) as batch:
        together(batch, [reply(prompt) for prompt in PROMPTS])
        assert batch.settled == 0


def test_layers_that_are_not_attention_are_written_one_after_the_other() -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97, "state_size": 4, "eos_token_id": STOP}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **config), dtype=torch.float32).eval()
    with at_work(model) as batch:
        assert batch.reason is not None and "not attention" in batch.reason
        written = together(batch, [reply(prompt, 6) for prompt in PROMPTS[:4]])
    assert written == [alone(model, prompt, 6) for prompt in PROMPTS[:4]]


def test_a_length_at_which_the_model_counts_its_tokens_anew_is_written_alone() -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 32, "factor": 4.0,
    }  # fmt: skip
    model = made("phi3", rope_parameters=rope, original_max_position_embeddings=32, max_position_embeddings=128)
    with at_work(model) as batch:
        assert batch.longest_together == 32
        asked = [(prompt_of(6), 12), (prompt_of(40), 12), (prompt_of(12), 12)]
        written = together(batch, [reply(*one) for one in asked])
    assert written == [alone(model, *one) for one in asked]


# --- drawing ----------------------------------------------------------------------------------------------------------


def sampled(**settings: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=True, temperature=1.5, top_k=40, **settings)


def test_a_seed_gives_the_same_reply_whoever_else_is_there() -> None:
    model = made("llama")
    with at_work(model) as batch:
        crowd = [reply(prompt, 30, config=sampled()) for prompt in PROMPTS]
        seeded = [reply(PROMPTS[3], 20, config=sampled(), seed=7, number=n) for n in range(3)]
        in_crowd = together(batch, [*crowd, *seeded])[-3:]
        by_itself = [together(batch, [reply(PROMPTS[3], 20, config=sampled(), seed=7, number=n)])[0] for n in range(3)]
        other = together(batch, [reply(PROMPTS[3], 20, config=sampled(), seed=8)])[0]
    assert in_crowd == by_itself
    assert len({tuple(ids) for ids in [*in_crowd, other]}) == 4


def test_without_a_seed_replies_differ() -> None:
    with at_work(made("llama")) as batch:
        assert len({tuple(ids) for ids in together(batch, [reply(PROMPTS[3], config=sampled()) for _ in range(4)])}) > 1


def test_words_are_drawn_as_often_as_the_model_says() -> None:
    model = made("llama")
    with at_work(model) as batch:
        config = GenerationConfig(do_sample=True, temperature=2.0, top_k=3, top_p=1.0)
        drawn = together(batch, [reply(PROMPTS[2], 1, config=config, seed=n) for n in range(256)])
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[2]])).logits[0, -1]
    best = torch.topk(logits, 3)
    expected = dict(zip(best.indices.tolist(), torch.softmax(best.values / 2, -1).tolist(), strict=True))
    counted = {token: sum(ids == [token] for ids in drawn) / len(drawn) for token in expected}
    assert sum(counted.values()) == 1  # nothing but the three likeliest
    for token, share in expected.items():
        assert counted[token] == pytest.approx(share, abs=0.11)  # 3.5 standard deviations


def test_settings_of_the_generation_config_hold_at_temperature_zero_too() -> None:
    model = made("llama")
    asked = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2}
    with at_work(model) as batch:
        config = GenerationConfig(do_sample=False, **asked)  # type: ignore[arg-type]
        written = together(batch, [reply(prompt, 30, config=config) for prompt in PROMPTS])
        plain = together(batch, [reply(prompt, 30) for prompt in PROMPTS])
    assert written == [alone(model, prompt, 30, **asked) for prompt in PROMPTS]
    assert written != plain


def test_logprobs_are_those_of_the_model() -> None:
    model = made("llama")
    asked = reply(PROMPTS[3], 6, n_logprobs=4)
    with at_work(model) as batch:
        (ids,) = together(batch, [asked])
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPTS[3], *ids]])).logits[0, len(PROMPTS[3]) - 1 : -1]
    expected = torch.log_softmax(logits, -1)
    for written, row in zip(asked.written, expected, strict=True):
        assert written.logprob == pytest.approx(float(row[written.token_id]), abs=1e-4)
        assert [token for token, _ in written.likeliest] == torch.topk(row, 4).indices.tolist()
        assert written.likeliest[0] == (written.token_id, written.logprob)  # greedy


def test_penalties_are_taken_off_what_was_written() -> None:
    model = made("llama")
    with at_work(model) as batch:
        (ids,) = together(batch, [reply(PROMPTS[3], 12, frequency_penalty=1.5, presence_penalty=0.5)])
        (free,) = together(batch, [reply(PROMPTS[3], 12)])
    expected: list[int] = []
    while len(expected) < 12 and STOP not in expected:
        with torch.no_grad():
            logits = model(torch.tensor([[*PROMPTS[3], *expected]])).logits[0, -1]
        for token in set(expected):
            logits[token] -= 0.5 + 1.5 * expected.count(token)
        expected.append(int(logits.argmax()))
    assert ids == expected
    assert ids != free


# --- room -------------------------------------------------------------------------------------------------------------


def endless() -> PreTrainedModel:
    """Never writes its stop token."""
    model = made("llama", tie_word_embeddings=False)
    head: Any = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[STOP] = 0
    return model


def test_no_more_tokens_have_keys_than_there_is_room_for() -> None:
    model = endless()
    batch = Batch(model, budget=100, at_once=3)
    asked = [reply(prompt_of(n), 20) for n in (10, 20, 30, 5, 70)]
    seen: list[tuple[int, int]] = []
    step = batch._step
    batch._step = lambda: (seen.append((batch.running, batch.reserved)), step())[1]  # type: ignore[method-assign]
    batch.start()
    try:
        written = together(batch, asked)
    finally:
        batch.end()
    assert [len(ids) for ids in written] == [20] * 5
    assert max(tokens for _, tokens in seen) <= 100
    assert max(running for running, _ in seen) == 2  # 30 + 40, then 50 more would be too many
    assert batch.reserved == batch.running == batch.waiting == 0


def of_one(n_replies: int, n_prompt: int, max_tokens: int, seed: int = 0) -> list[Asked]:
    """Several replies to one prompt."""
    prompt = tuple(prompt_of(n_prompt, seed))
    return [reply(prompt, max_tokens, number=number) for number in range(n_replies)]


def steps_of(batch: Batch) -> list[tuple[list[Reply], int]]:
    """Fills as the batch goes on: who is running in a step, and how many tokens have been read before it."""
    steps: list[tuple[list[Reply], int]] = []
    step = batch._step
    batch._step = lambda: (steps.append((list(batch._running), batch.n_prompt)), step())[1]  # type: ignore[method-assign]
    return steps


def test_a_short_prompt_is_read_beside_long_ones_at_once() -> None:
    batch = Batch(endless())
    long, short = [of_one(2, 900, 20, seed) for seed in range(3)], of_one(1, 60, 1)
    for asked in [*long, short]:
        batch.submit([one.reply for one in asked])
    steps = steps_of(batch)
    batch.start()
    try:
        written = [[one.ids() for one in asked] for asked in [*long, short]]
    finally:
        batch.end()
    n_steps = sum(short[0].reply in running for running, _ in steps)
    assert n_steps == 1  # 64 tokens are a quarter of a step's
    assert [[len(ids) for ids in asked] for asked in written] == [[20] * 2] * 3 + [[1]]


def test_the_prompt_of_several_replies_is_read_once() -> None:
    model = made("llama")
    with at_work(model) as batch:
        asked = of_one(6, 300, 8)
        assert together(batch, asked) == [alone(model, asked[0].reply.prompt_ids, 8)] * 6
        assert batch.n_prompt == 300 + 5  # and the last token of each


def test_room_is_kept_for_short_requests() -> None:
    """Long ones take three of four places and three quarters of the tokens; a short one comes in between."""
    batch = Batch(endless(), at_once=4, budget=4000)
    assert batch.share == 3000
    long = [of_one(2, 250, 50, seed) for seed in range(5)]  # 600 tokens each
    short = of_one(1, 20, 2)
    for asked in [*long, short]:
        batch.submit([one.reply for one in asked])
    steps = steps_of(batch)
    batch.start()
    try:
        written = [[len(one.ids()) for one in asked] for asked in [*long, short]]
    finally:
        batch.end()
    assert written == [[50, 50]] * 5 + [[2]]
    assert short[0].reply in steps[0][0]
    assert max(sum(not one.asked.short for one in running) for running, _ in steps) == 3


def test_whoever_waits_is_begun_in_the_end_and_the_room_is_kept_to() -> None:
    """Short ones without end do not keep a long one out, nor long ones a short one, whatever comes in which order."""
    for seed in range(8):
        chance = torch.Generator().manual_seed(seed)
        drawn: list[int] = torch.randint(0, 4, (24,), generator=chance).tolist()
        requests = [of_one((1, 1, 2, 4)[kind], (5, 40, 90, 30)[kind], (3, 10, 30, 20)[kind], kind) for kind in drawn]
        batch = Batch(endless(), at_once=4, budget=400)
        for asked in requests:
            batch.submit([one.reply for one in asked])
        steps = steps_of(batch)
        batch.start()
        try:
            for asked in requests:
                for one in asked:
                    assert one.end().reason == "length"
        finally:
            batch.end()
        for running, _ in steps:
            assert len(running) <= 4
            assert sum(one.longest for one in running) <= 400
        begun: list[Reply] = []
        for running, _ in steps:
            begun += [one for one in running if one not in begun]
        for short in (True, False):  # each kind in the order in which it came
            came = [one.reply for asked in requests for one in asked if one.reply.asked.short is short]
            assert [one for one in begun if one.asked.short is short] == came


def test_a_queue_that_is_full_takes_nobody_and_goes_on() -> None:
    with at_work(endless(), at_once=1, queue_limit=2) as batch:
        running = reply(PROMPTS[1], 900)
        batch.submit([running.reply])
        assert isinstance(running.events.get(timeout=60), Written)  # it has left the queue
        waiting = [reply(PROMPTS[2], 4), reply(PROMPTS[3], 4)]
        batch.submit([one.reply for one in waiting])
        with pytest.raises(Full):
            batch.submit([reply(PROMPTS[4]).reply])
        batch.cancel(running.reply)
        assert [len(one.ids()) for one in waiting] == [4, 4]


def test_a_reply_that_is_given_up_frees_its_place_within_a_token() -> None:
    with at_work(endless(), at_once=1) as batch:
        first, second = reply(PROMPTS[1], 900), reply(PROMPTS[2], 3)
        batch.submit([first.reply, second.reply])
        assert isinstance(first.events.get(timeout=60), Written)
        batch.cancel(first.reply)
        n_before = len(first.reply.written)
        assert first.end().reason == "cancelled"
        assert len(first.reply.written) - n_before <= 1
        assert len(second.ids()) == 3
        assert batch.running == batch.reserved == 0


def test_who_waits_can_be_given_up_too() -> None:
    with at_work(endless(), at_once=1) as batch:
        first, second = reply(PROMPTS[1], 900), reply(PROMPTS[2], 3)
        batch.submit([first.reply, second.reply])
        assert isinstance(first.events.get(timeout=60), Written)
        batch.cancel(second.reply)
        assert second.end() == Ended("cancelled")
        assert batch.waiting == 0
        batch.cancel(first.reply)


def test_a_closed_batch_finishes_what_it_has_and_begins_nothing() -> None:
    model = endless()
    with at_work(model, at_once=1) as batch:
        asked = [reply(PROMPTS[1], 30), reply(PROMPTS[2], 5)]
        batch.submit([one.reply for one in asked])
        batch.close()
        with pytest.raises(Closed):
            batch.submit([reply(PROMPTS[3]).reply])
        assert [len(one.ids()) for one in asked] == [30, 5]


def test_an_end_leaves_nobody_waiting() -> None:
    batch = Batch(endless(), at_once=1)
    batch.start()
    asked = [reply(PROMPTS[1], 900), reply(PROMPTS[2], 5)]
    batch.submit([one.reply for one in asked])
    assert isinstance(asked[0].events.get(timeout=60), Written)
    batch.end()
    assert [one.end().reason for one in asked] == ["cancelled", "cancelled"]


def test_a_step_that_fails_is_told_and_the_next_reply_is_written(caplog: pytest.LogCaptureFixture) -> None:
    model = made("llama")
    with at_work(model) as batch:
        wrong = reply([10_000])  # no such word
        batch.submit([wrong.reply])
        ended = wrong.end()
        assert ended.reason == "failed" and "index out of range" in ended.problem
        assert together(batch, [reply(PROMPTS[2])]) == [alone(model, PROMPTS[2])]
    assert "a step of the batch failed" in caplog.text


def test_a_model_that_gives_no_numbers_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = made("llama", tie_word_embeddings=False)
    head: Any = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[5] = torch.nan
    with at_work(model) as batch:
        asked = [reply(PROMPTS[2]), reply(PROMPTS[3], config=sampled())]
        batch.submit([one.reply for one in asked])
        assert {one.end().problem for one in asked} == {"ArithmeticError: the model's logits are not numbers"}
        assert batch.running == 0
    assert caplog.text.count("a reply is given up") == 2


def test_what_goes_wrong_with_one_reply_harms_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """One whose logits become infinite beside one that is drawn as it is alone."""
    model = made("llama")

    class Endless(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return scores / 0 if len(input_ids[0]) > len(PROMPTS[1]) + 2 else scores

    with at_work(model) as batch:
        wrong, right = reply(PROMPTS[1], config=sampled()), reply(PROMPTS[2])
        made_by = batch._processors
        batch._processors = lambda one: LogitsProcessorList([Endless()]) if one is wrong.reply else made_by(one)  # type: ignore[method-assign]
        batch.submit([wrong.reply, right.reply])
        assert wrong.end().reason == "failed" and len(wrong.written) == 3
        assert right.ids() == alone(model, PROMPTS[2])
        assert batch.running == 0
    assert caplog.text.count("a reply is given up") == 1


def test_who_has_ended_holds_no_memory() -> None:
    with at_work(almost_twins(made("llama", tie_word_embeddings=False))) as batch:
        asked = reply(PROMPTS[2])
        together(batch, [asked])
        assert batch.settled
    assert not asked.reply.kept and asked.reply.again is None and asked.reply.unsettled is None


def test_a_model_that_can_not_be_computed_together_is_written_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    monkeypatch.setattr(attention, "attend", lambda *_, **__: 1 / 0)
    batch = Batch(model)
    batch.prove()
    assert batch.reason is not None and "ZeroDivisionError" in batch.reason
    batch.start()
    try:
        assert together(batch, [reply(prompt) for prompt in PROMPTS[:3]]) == [
            alone(model, prompt) for prompt in PROMPTS[:3]
        ]
    finally:
        batch.end()
