"""General prompts that the base answers, trained along with the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import cases
from small_runs import assert_same, settings
from test_resume import killed
from tunesmith.chat import load
from tunesmith.engine.hf.losses import losses
from tunesmith.errors import DataError, ProofError
from tunesmith.runs import rundir
from tunesmith.training import planning, rehearsal, rehearsed
from tunesmith.training.checking import check
from tunesmith.training.run import Run, resume, train
from tunesmith.training.steps import Steps
from tunesmith.types import Message

ALONG = {"train.rehearse": 0.6}


@given(st.integers(1, 60), st.integers(1, 16), st.integers(1, 40), st.integers(0, 50), st.integers(1, 4))
def test_every_epoch_deals_the_next_prompts_out_evenly(
    n_rows: int, size: int, n_prompts: int, per_epoch: int, epochs: int
) -> None:
    rows: Any = [f"row {n}" for n in range(n_rows)]
    prompts: Any = [f"prompt {n}" for n in range(n_prompts)] if per_epoch else []
    alone = Steps(rows, size, 3, "digest")
    beside = Steps(rows, size, 3, "digest", prompts, per_epoch)
    assert len(alone) == len(beside)
    dealt: list[int] = []
    for epoch in range(epochs):
        for steps in (alone, beside):
            steps.set_epoch(epoch)
        counts = []
        for number, (own, all_) in enumerate(zip(alone.batch_sampler, beside.batch_sampler, strict=True)):
            assert all_[: len(own)] == own  # rows come as they would without
            others = [index - n_rows for index in all_[len(own) :]]
            assert others == beside.rehearsed(epoch, number)
            counts.append(len(others))
            dealt += others
        assert sum(counts) == per_epoch and max(counts) - min(counts) <= 1
    assert dealt == [n % n_prompts for n in range(len(dealt))]


@given(st.floats(0.001, 0.9), st.integers(1, 10**7))
def test_the_share_is_that_of_the_tokens_that_an_epoch_learns(share: float, n_learned: int) -> None:
    tokens = rehearsed.per_epoch(share, n_learned) * rehearsed.ANSWER_TOKENS
    assert share <= tokens / (tokens + n_learned) + 1e-9
    tokens -= rehearsed.ANSWER_TOKENS
    assert tokens / (tokens + n_learned) < share + 1e-9
    assert rehearsed.per_epoch(0, n_learned) == 0


def test_the_answers_are_the_base_s_own_greedy_ones(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    run = train(settings(tiny_model, talk, **ALONG), tmp_path / "run")
    lines = rundir.read_lines(run.path / "rehearsal.jsonl")
    base = load(tiny_model)
    assert len(lines) > 10 and [line["prompt"] for line in lines] == list(rehearsal.prompts()[: len(lines)])
    for line in lines[:10]:
        assert tuple(line["prompt_ids"]) == base.prompt_ids([Message("user", line["prompt"])])
        ids = torch.tensor([line["prompt_ids"] + line["answer_ids"]])
        with torch.inference_mode():
            written = base.model(input_ids=ids).logits[0, len(line["prompt_ids"]) - 1 : -1].argmax(-1)
        assert written.tolist() == line["answer_ids"]
    for row in rehearsed.rows_of(lines):
        (document,) = row.documents
        assert document.n_supervised <= rehearsed.ANSWER_TOKENS
        assert document.replies == ((len(document.prompt_ids), len(document.token_ids)),)


def test_what_is_rehearsed_is_kept_likely(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    """The base's answers to the prompts, whatever is learned beside them."""
    rehearsing = train(settings(tiny_model, talk, **ALONG), tmp_path / "with")
    without = train(settings(tiny_model, talk), tmp_path / "without")
    rows = rehearsed.rows_of(rundir.read_lines(rehearsing.path / "rehearsal.jsonl"))
    documents = [document for row in rows for document in row.documents][:8]
    n_learned = sum(document.n_supervised for document in documents)

    def loss(run: Run) -> float:
        return sum(losses(load(run.path).model, documents)) / n_learned

    assert loss(rehearsing) < loss(without) - 0.2  # seen: 5.21 and 5.58


@pytest.mark.parametrize("at_step", cases([1, 9], [9].__contains__))  # before any checkpoint, and after some
def test_a_killed_run_that_rehearses_ends_in_the_same_bytes(
    tiny_model: Path, talk: Path, tmp_path: Path, at_step: int
) -> None:
    whole = train(settings(tiny_model, talk, **ALONG), tmp_path / "whole")
    out = killed(tiny_model, talk, tmp_path / "run", at_step, **ALONG)
    resume(out)
    assert_same(out, whole.path)
    assert (out / "rehearsal.jsonl").read_bytes() == (whole.path / "rehearsal.jsonl").read_bytes()


@pytest.mark.parametrize("damage", ["other", "gone"])
def test_other_answers_than_those_of_the_beginning_are_refused(
    tiny_model: Path, talk: Path, tmp_path: Path, damage: str
) -> None:
    out = killed(tiny_model, talk, tmp_path / "run", 9, **ALONG)
    file = out / "rehearsal.jsonl"
    line, *others = file.read_text().splitlines()
    changed = {**json.loads(line), "answer_ids": [5, 6]}
    file.unlink() if damage == "gone" else file.write_text("\n".join([json.dumps(changed), *others]) + "\n")
    with pytest.raises(ProofError, match=r"rehearsal\.jsonl.*(no file|other answers)"):
        resume(out)


def test_a_run_does_the_tokens_that_were_planned(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    """But for what the base's answers were shorter than they may be."""
    flags = {**ALONG, "train.epochs": 2, "train.rehearse": 0.9}
    run = train(settings(tiny_model, talk, **flags), tmp_path / "run")
    manifest = rundir.read_manifest(rundir.RunDir(run.path))
    plan, per_epoch = manifest["plan"], manifest["rehearsal"]["per_epoch"]
    lines = rundir.read_lines(run.path / "rehearsal.jsonl")
    assert plan["prompts"] == len(lines) == rehearsed.n_prompts(per_epoch, 2) < 2 * per_epoch
    answers = [len(lines[turn % len(lines)]["answer_ids"]) for turn in range(2 * per_epoch)]
    shorter = rehearsed.ANSWER_TOKENS * len(answers) - sum(answers)
    assert (run.tokens, run.supervised_tokens) == (plan["tokens"] - shorter, plan["supervised_tokens"] - shorter)


@given(st.integers(0, 300), st.integers(1, 10))
def test_the_base_answers_what_an_epoch_takes_and_no_fewer_than_some(per_epoch: int, epochs: int) -> None:
    n = rehearsed.n_prompts(per_epoch, epochs)
    assert n == per_epoch * epochs or n >= max(per_epoch, rehearsed.LEAST_PROMPTS)
    assert n in (per_epoch, per_epoch * epochs, rehearsed.LEAST_PROMPTS)


def test_answers_take_their_time_in_the_plan(tiny_model: Path, talk: Path) -> None:
    def planned(share: float, *questions: str) -> planning.Times:
        return planning.plan(check(settings(tiny_model, talk, **{"train.rehearse": share})), questions=questions).times

    few, many, more = planned(0), planned(0.5), planned(0.5, *["Who are you?"] * 200)
    assert 0 < few.before < many.before and many.after == few.after < more.after
    assert 0 < few.measures < few.steps < many.steps
    assert many.total == sum((many.before, many.steps, many.measures, many.after))


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("own.txt", "\ufeffSay hi.\n\n  你好吗？  \r\n", ("Say hi.", "你好吗？")),
        (
            "own.jsonl",
            '{"prompt": "Say\\nhi."}\n"Bye?"\n{"instruction": "x", "output": "y"}',
            ("Say\nhi.", "Bye?", "x"),
        ),
    ],
)
def test_somebody_s_own_prompts_are_rehearsed_instead(
    tiny_model: Path, talk: Path, tmp_path: Path, name: str, text: str, prompts: tuple[str, ...]
) -> None:
    own = tmp_path / name
    own.write_text(text, encoding="utf-8")
    assert rehearsal.prompts(str(own)) == prompts
    run = train(settings(tiny_model, talk, **ALONG, **{"data.rehearse": str(own), "train.epochs": 1}), tmp_path / "run")
    assert tuple(line["prompt"] for line in rundir.read_lines(run.path / "rehearsal.jsonl")) == prompts


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("own.txt", b"\n \n", "own.txt: found no prompt"),
        ("own.txt", b"\xff\xfe", "not UTF-8"),
        ("own.jsonl", b'{"prompt": "x"}\n{"reply": "y"}\n', "own.jsonl:2: found no prompt"),
        ("own.jsonl", b"[" * 100_000, "own.jsonl:1"),
        ("gone.txt", None, "No such file"),
    ],
)
def test_a_file_without_prompts_is_refused_by_check(
    tiny_model: Path, talk: Path, tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        check(settings(tiny_model, talk, **{"data.rehearse": str(tmp_path / name)}))
    assert says in str(refused.value)
