"""The loss over pairs of a position and a target is torch's cross entropy over every supervised token, each on its own.

Legend: U predicting positions, N pairs, H width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import largest, shows
from tunesmith.engine import loss
from tunesmith.engine.cpu import memory
from tunesmith.engine.loss import HeadLoss, Labels, chunk_rows, loss_and_gradient, summed_cross_entropy

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A micro-batch's last hidden states, an output layer, and what is learned."""

    hidden: Tensor
    weight: Tensor
    labels: Labels

    def to(self, dtype: torch.dtype) -> Case:
        return Case(self.hidden.to(dtype), self.weight.to(dtype), self.labels)


def case(n_positions: int, width: int, vocabulary: int) -> Case:
    """Random numbers; a position has up to four targets, each up to seven times."""
    draw = torch.Generator().manual_seed(n_positions + vocabulary)
    rows, targets = [], []
    for row in range(n_positions):
        n = 1 + row % min(4, vocabulary)
        rows += [row] * n
        targets += torch.randperm(vocabulary, generator=draw)[:n].sort().values.tolist()
    count = torch.randint(1, 8, (len(rows),), generator=draw).float()
    row = torch.tensor(rows)
    labels = Labels.of(row, torch.tensor(targets), count, n_positions)
    hidden = torch.randn(n_positions, width, generator=draw, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=draw, dtype=torch.float64) * 3 * width**-0.5
    return Case(hidden, weight, labels)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def expected(case: Case, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the hidden states: every supervised token a row of its own, by torch."""
    each = torch.repeat_interleave(torch.arange(len(case.labels.row)), case.labels.count.long())
    hidden = case.hidden.clone().requires_grad_()
    logits = capped(hidden @ case.weight.T, softcap)[case.labels.row[each]]
    value = F.cross_entropy(logits, case.labels.target[each], reduction="sum")
    return value.detach(), torch.autograd.grad(value, hidden)[0]


def off(found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> float:
    """The larger relative difference of loss and gradient."""
    return largest(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, right, strict=True))


def in_chunks(monkeypatch: pytest.MonkeyPatch, rows: int, vocabulary: int) -> None:
    monkeypatch.setattr(loss, "_LEAST_ROWS", 1)
    monkeypatch.setitem(loss._CHUNK_BYTES, "cpu", 4 * vocabulary * rows)


SHAPES = [(1, 1, 2), (7, 5, 11), (33, 17, 101), (130, 24, 259)]


@pytest.mark.parametrize("softcap", [None, 2.0, 30.0])
@pytest.mark.parametrize("rows", [1, 2, 5, 64, 10_000])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_are_those_of_torchs_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], rows: int, softcap: float | None
) -> None:
    in_chunks(monkeypatch, rows, shape[2])
    given = case(*shape)
    found = loss_and_gradient(given.hidden, given.weight, given.labels, softcap)
    assert found[0].dtype == found[1].dtype == torch.float64
    assert off(found, expected(given, softcap)) < 1e-12  # observed 8.6e-16


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_head_loss_is_differentiated_like_any_other_function(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None
) -> None:
    in_chunks(monkeypatch, 4, 101)
    given = case(33, 17, 101)
    hidden = given.hidden.clone().requires_grad_()
    value = HeadLoss.apply(hidden.sin(), given.weight, given.labels, softcap)
    (value / 7).backward()
    right = expected(replace(given, hidden=given.hidden.sin()), softcap)
    chained = right[0], right[1] * given.hidden.cos() / 7
    assert hidden.grad is not None
    assert off((value.detach(), hidden.grad), chained) < 1e-12  # observed 5.6e-16


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_products_of_many_words_may_be_split(split: None, softcap: float | None) -> None:
    """The vocabulary is looked at in three parts."""
    given = case(130, 40, 5000)
    given = replace(given, weight=given.weight.bfloat16().double())
    few = given.to(torch.float32)
    take = memory.Buffers(torch.float32, CPU).take
    for weight in (few.weight, few.weight.bfloat16()):
        found = loss_and_gradient(few.hidden, weight, few.labels, softcap, take=take, split=True)
        assert off(found, expected(replace(few.to(torch.float64), labels=few.labels), softcap)) < 1e-6  # seen 4.0e-7


def test_the_loss_with_a_graph_is_torchs_cross_entropy() -> None:
    given = case(33, 17, 101)
    hidden = given.hidden.clone().requires_grad_()
    value = summed_cross_entropy(hidden @ given.weight.T, given.labels)
    assert off((value.detach(), torch.autograd.grad(value, hidden)[0]), expected(given)) < 1e-12  # observed 2.9e-16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_it_rounds_no_more_than_torch_in_fewer_bits(dtype: torch.dtype, softcap: float | None) -> None:
    """The loss of bf16 numbers is a sum in fp32; only the product with the output layer is in bf16."""
    few = case(130, 24, 259).to(dtype)
    exact = expected(few.to(torch.float64), softcap)
    found = loss_and_gradient(few.hidden, few.weight, few.labels, softcap)
    each = torch.repeat_interleave(torch.arange(len(few.labels.row)), few.labels.count.long())
    hidden = few.hidden.clone().requires_grad_()
    logits = capped((hidden @ few.weight.T).float(), softcap)[few.labels.row[each]]
    value = F.cross_entropy(logits, few.labels.target[each], reduction="sum")
    torchs = value.detach(), torch.autograd.grad(value, hidden)[0]
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    assert off(found, exact) < 2 * off(torchs, exact)  # observed 1.0 to 1.2 times


def test_without_a_gradient_the_loss_is_the_same() -> None:
    given = case(33, 17, 101)
    value, nothing = loss_and_gradient(given.hidden, given.weight, given.labels, 2.0, with_gradient=False)
    assert nothing.numel() == 0
    assert value.item() == pytest.approx(expected(given, 2.0)[0].item(), rel=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_what_stood_in_the_given_space_does_not_matter(monkeypatch: pytest.MonkeyPatch, softcap: float | None) -> None:
    in_chunks(monkeypatch, 5, 101)
    given = case(33, 17, 101)
    buffers = memory.Buffers(given.hidden.dtype, CPU)
    buffers.take("logits", chunk_rows(33, 101, CPU), 101).fill_(torch.nan)
    for _ in range(2):
        found = loss_and_gradient(given.hidden, given.weight, given.labels, softcap, take=buffers.take)
        assert off(found, expected(given, softcap)) < 1e-12  # observed 5.9e-16


def test_where_no_gradient_is_wanted_none_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a held-out loss would take the time of a step."""
    given = case(33, 17, 101)
    with torch.enable_grad():
        asked = given.hidden.clone().requires_grad_()
        value = HeadLoss.apply(asked, given.weight, given.labels, None)
    monkeypatch.setattr(loss, "_back", lambda *_: pytest.fail("formed"))
    with torch.no_grad():
        assert torch.equal(HeadLoss.apply(given.hidden, given.weight, given.labels, None), value.detach())
    with pytest.raises(pytest.fail.Exception, match="formed"):
        HeadLoss.apply(asked, given.weight, given.labels, None)


def test_what_is_given_is_left_as_it_was() -> None:
    given, again = case(33, 17, 101), case(33, 17, 101)
    loss_and_gradient(given.hidden, given.weight, given.labels, 2.0)
    assert torch.equal(given.hidden, again.hidden) and torch.equal(given.weight, again.weight)
    labels = zip(vars(given.labels).values(), vars(again.labels).values(), strict=True)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in labels)


@pytest.mark.parametrize("n_rows", [1, 2, 63, 64, 65, 1000, 4097])
@pytest.mark.parametrize("vocabulary", [2, 259, 151_936, 10**9])
def test_chunks_are_of_about_equal_size_and_fit(n_rows: int, vocabulary: int) -> None:
    rows = chunk_rows(n_rows, vocabulary, CPU)
    n_chunks = -(-n_rows // rows)
    assert 1 <= rows <= max(64, (1 << 27) // (4 * vocabulary))
    assert n_rows - rows * (n_chunks - 1) > 0
    assert rows * n_chunks - n_rows < n_chunks  # no chunk is filled up by more than one row


def test_a_part_of_the_labels_is_those_of_its_positions() -> None:
    labels = case(33, 17, 101).labels
    parts = [labels.part(start, stop) for start, stop in [(0, 1), (1, 1), (1, 20), (20, 33)]]
    starts = [0, 1, 1, 20]
    assert torch.equal(torch.cat([p.row + s for p, s in zip(parts, starts, strict=True)]), labels.row)
    for name in ("target", "count", "row_count"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(labels, name))
    assert all(len(part.row) == 0 or int(part.row.max()) < len(part.row_count) for part in parts)


def test_a_missing_target_is_seen() -> None:
    """Negative control: one target of hundreds, or a count, changes the result by far more than the tolerance."""
    given = case(130, 24, 259)
    labels = given.labels
    missing = Labels.of(labels.row[:-1], labels.target[:-1], labels.count[:-1], len(given.hidden))
    once = replace(labels, count=labels.count.clamp(max=6), row_count=labels.row_count)
    for wrong in (missing, once):
        found = loss_and_gradient(given.hidden, given.weight, wrong)
        assert shows(off(found, expected(given)), 1e-3)  # observed 0.066
