"""However many threads share a micro-batch, and whoever is late: one gradient; and no fault leaves one waiting."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import largest, shows
from test_engine import adapted, base, distance, engine, family, ignored, take
from test_trie import batches
from tunesmith.engine import loss
from tunesmith.engine.cpu import decoder, layers, products
from tunesmith.engine.cpu.by_hand import ByHand
from tunesmith.engine.cpu.lanes import Lanes, count_for, shares
from tunesmith.types import Origin, Rendered


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """What a lane does to its own thread leaves the others as they were."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def with_lanes(count: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decoder, "count_for", lambda n_tokens: min(count, max(1, n_tokens)))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "phi3"])
def test_lanes_change_nothing(monkeypatch: pytest.MonkeyPatch, kind: str, dropout: float) -> None:
    found = []
    for count in (1, 2, 3):
        with_lanes(count, monkeypatch)
        made = engine(adapted(base(kind, num_hidden_layers=3), lora_dropout=dropout).double(), "decoder")
        torch.manual_seed(3)
        found.append(take(made))
    assert largest(distance(step, found[0]) for step in found) < 1e-12  # observed 5.4e-16
    assert largest(abs(step.loss - found[0].loss) for step in found) < 1e-12


@pytest.mark.parametrize(("n_tokens", "lanes_of_16"), [(64, 1), (600, 4), (2048, 16)])
def test_any_number_of_threads_gives_the_same_gradient(n_tokens: int, lanes_of_16: int) -> None:
    """More threads than cores, more than lanes, or one for each."""
    draw = random.Random(0)
    ids = tuple(draw.randrange(20) for _ in range(n_tokens // 8))
    documents = [Rendered((number, *ids[1:]), ((1, len(ids)),), Origin("rows", number)) for number in range(8)]
    made = engine(adapted(base("llama", num_hidden_layers=2)).double(), "decoder")
    before, found, lanes = torch.get_num_threads(), [], []
    try:
        for count in (1, 2, 16):
            torch.set_num_threads(count)
            lanes.append(count_for(n_tokens))
            found.append(take(made, documents))
    finally:
        torch.set_num_threads(before)
    assert lanes[0] == 1 and lanes[2] == lanes_of_16
    assert largest(distance(step, found[0]) for step in found) < 1e-12  # as of other lanes
    assert largest(abs(step.loss - found[0].loss) for step in found) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lanes_change_nothing_where_factors_are_split(
    monkeypatch: pytest.MonkeyPatch, split: None, dtype: torch.dtype
) -> None:
    found = []
    for count in (1, 2, 3):
        with_lanes(count, monkeypatch)
        model = family("Llama", torch.bfloat16)
        made = engine(model.float() if dtype == torch.float32 else model, "decoder", ignored)
        assert isinstance(made.at_work, ByHand)
        assert made.at_work.decoder.n_split == len(made.at_work.decoder._groups) + 1
        found.append(take(made))
    assert largest(distance(step, found[0]) for step in found) < 1e-5  # observed 2.6e-7


@settings(max_examples=25, deadline=None)
@given(batches(letters=2), st.integers(2, 5), st.sampled_from(["none", 1, "all"]))
def test_lanes_of_any_trie_add_up(documents: list[Rendered], count: int, recompute: Any) -> None:
    model = adapted(base("llama", num_hidden_layers=2)).double()
    made = engine(model, "decoder", recompute_layers=recompute)
    expected = take(made, documents)
    with pytest.MonkeyPatch.context() as patch:
        with_lanes(count, patch)
        assert distance(take(made, documents), expected) < 1e-12  # observed 3e-15


@pytest.mark.parametrize("count", [2, 3])
def test_lanes_share_an_output_layer_that_has_little_memory(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Lanes whose numbers of predicting tokens differ by one may cut them into different numbers of chunks."""
    made = engine(adapted(base("llama")).double(), "decoder")
    expected = take(made)
    assert isinstance(made.at_work, ByHand)
    n_words = len(made.at_work.decoder._model.head.weight)
    with_lanes(count, monkeypatch)
    monkeypatch.setattr(loss, "_LEAST_ROWS", 1)
    for rows in range(1, 40):
        monkeypatch.setattr(loss, "_CHUNK_BYTES", {"cpu": 4 * n_words * count * rows})
        assert distance(take(made), expected) < 1e-12  # observed 3e-16


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_late_lane_is_waited_for(monkeypatch: pytest.MonkeyPatch, late: int, recompute: str) -> None:
    """Of the same bytes, too: what lanes add to each other they add in one order."""
    made = engine(adapted(base("llama", num_hidden_layers=3)).double(), "decoder", recompute_layers=recompute)
    with_lanes(3, monkeypatch)
    expected = take(made)
    forward, backward = layers.Linears.forward, layers.Linears.backward
    draw = random.Random(late)

    def dawdle() -> None:
        if threading.current_thread().name.endswith(str(late)):
            time.sleep(draw.choice([0, 0.002, 0.005]))

    monkeypatch.setattr(layers.Linears, "forward", lambda *given, **named: (dawdle(), forward(*given, **named))[1])
    monkeypatch.setattr(layers.Linears, "backward", lambda *given: (dawdle(), backward(*given))[1])
    for _ in range(3):
        found = take(made)
        assert found.loss == expected.loss and torch.equal(found.gradient, expected.gradient)


def test_a_lane_that_does_not_wait_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(adapted(base("llama", num_hidden_layers=3)).double(), "decoder")
    with_lanes(2, monkeypatch)
    expected = take(made)
    monkeypatch.setattr(Lanes, "hear", lambda self, numbers, what: None)
    forward, others = layers.Linears.forward, list[str]()

    def dawdling(*given: Any, **named: Any) -> None:
        lane, until = threading.current_thread().name[-1], time.monotonic() + 2
        others.extend("1" * (lane == "1"))
        while lane == "0" and len(others) < 4 and time.monotonic() < until:  # the other one has seen its keys by then
            time.sleep(0.001)
        forward(*given, **named)

    monkeypatch.setattr(layers.Linears, "forward", dawdling)
    try:
        difference = distance(take(made), expected)
    except KeyError:  # the other lane's part of the gradient was not there yet
        return
    assert shows(difference, 1e-6)


@pytest.mark.parametrize("number", [0, 1])
def test_a_lane_that_fails_ends_all_and_the_next_step_is_right(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    made = engine(adapted(base("llama")).double(), "decoder")
    with_lanes(2, monkeypatch)
    expected = take(made)
    backward = layers.Linears.backward

    def failing(*given: Any) -> Any:
        if threading.current_thread().name.endswith(str(number)):
            raise ArithmeticError("no more")
        return backward(*given)

    with monkeypatch.context() as patch:
        patch.setattr(layers.Linears, "backward", failing)
        with pytest.raises(ArithmeticError, match="no more"):
            take(made)
    found = take(made)
    assert found.loss == expected.loss and torch.equal(found.gradient, expected.gradient)


def test_a_lane_is_not_held_up_by_those_it_needs_nothing_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upwards the last lane may be anywhere, downwards the first; only weights that are not kept bind all of them."""
    made = engine(adapted(base("llama", num_hidden_layers=4)).double(), "decoder")
    with_lanes(2, monkeypatch)
    take(made)
    last = {("keys", 0, 3): threading.Event(), ("key gradients", 1, 0): threading.Event()}
    held = {("keys", 1, 1): last["keys", 0, 3], ("key gradients", 0, 2): last["key gradients", 1, 0]}
    tell, ended = Lanes.tell, list[bool]()

    def telling(self: Lanes, number: int, what: Any) -> None:
        told = what[0], number, what[-1]
        if told in held:  # until the other lane has told its last
            ended.append(held[told].wait(30))
        if told in last:
            last[told].set()
        tell(self, number, what)

    monkeypatch.setattr(Lanes, "tell", telling)
    take(made)
    assert ended == [True, True]


def test_what_one_lane_tells_wakes_the_others() -> None:
    made = Lanes(3)
    order: list[int] = []

    def work(number: int) -> None:
        made.hear(range(number + 1, 3), "done")
        order.append(number)
        made.tell(number, "done")

    made.run(work)
    made.run(work)  # nothing is left of the first time
    assert order == [2, 1, 0, 2, 1, 0]


def test_ctrl_c_ends_all_lanes() -> None:
    made = Lanes(2)
    ended: list[int] = []

    def work(number: int) -> None:
        if number == 0:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        try:
            made.hear([1 - number], "never")
        finally:
            ended.append(number)

    with pytest.raises(KeyboardInterrupt):
        made.run(work)
    assert sorted(ended) == [0, 1]
    assert made.run(lambda number: number) == [0, 1]


def test_every_lane_has_its_share_of_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert Lanes(2).run(lambda _: torch.get_num_threads()) == [2, 2]
        assert torch.get_num_threads() == 4
        for split, least_of_two in ((False, 256), (True, 128)):
            monkeypatch.setattr(products, "are_split", lambda split=split: split)
            torch.set_num_threads(4)
            tokens = (1, least_of_two - 1, least_of_two, 300, 511, 512, 9999)
            assert [count_for(n) for n in tokens] == [1, 1, 2, 2, 2, 4, 4]
            torch.set_num_threads(6)
            assert count_for(512) == 3  # four would leave two threads without work
    finally:
        torch.set_num_threads(before)


def test_shares_are_all_tokens_once_and_cost_the_same() -> None:
    assert shares(torch.ones(7), 3) == [range(3), range(3, 5), range(5, 7)]
    assert shares(torch.ones(5), 1) == [range(5)]
    assert shares(torch.tensor([1.0, 1.0, 1.0, 1.0, 4.0]), 2) == [range(4), range(4, 5)]
    assert shares(torch.tensor([0.1, 0.1, 0.1, 9.0]), 3) == [range(2), range(2, 3), range(3, 4)]
    assert shares(torch.tensor([9.0, 0.1, 0.1, 0.1]), 3) == [range(1), range(1, 2), range(2, 4)]
