"""The verdict on a run: what is counted, the rules, the page, and the judge."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import script, tunesmith
from small_runs import settings
from tunesmith import extras
from tunesmith.chat import load
from tunesmith.engine.hf.losses import losses
from tunesmith.errors import MissingExtra, ModelError, RunError
from tunesmith.evaluation import evaluate as evaluations
from tunesmith.evaluation import general, scores
from tunesmith.evaluation.evaluate import Answer, evaluate
from tunesmith.evaluation.general import General, Kept, questions
from tunesmith.evaluation.judging import judge_at
from tunesmith.evaluation.verdict import Compared, Side, advice, conclude
from tunesmith.training.run import Run, train
from tunesmith.types import Origin, Rendered

# --- counting ---------------------------------------------------------------------------------------------------------


def test_words_are_words_or_signs_of_scripts_without_spaces() -> None:
    assert scores.words("Hello, 世界! It's 10 o'clock.") == ["hello", "世", "界", "it", "s", "10", "o", "clock"]


@pytest.mark.parametrize(
    ("reply", "share"),
    [("", 0), ("one two three", 0), ("a b c d e f g h", 0), ("a b c d a b c d", 1 / 5), ("la la la la la la", 2 / 3)],
)
def test_repetition_is_the_share_of_runs_that_were_there_before(reply: str, share: float) -> None:
    assert scores.repetition(reply) == pytest.approx(share)


def test_copied_is_what_stands_in_training_rows_and_not_in_the_own_answer() -> None:
    text = "the quick brown fox jumps over the lazy dog and runs"
    known = scores.long_runs([text])
    assert scores.copied(text, "something else", known) == 1
    assert scores.copied(text, text, known) is None  # right, whoever else says it
    assert scores.copied("too short", "", known) is None
    assert scores.copied("the quick brown fox jumps over the lazy cat today ok", "", known) == pytest.approx(1 / 4)


def test_likeness_is_1_for_the_same_text_and_0_for_one_without_a_common_letter() -> None:
    assert scores.likeness("Hello there", "Hello there") == pytest.approx(1)
    assert scores.likeness("xyz", "abc") == 0
    assert scores.same("Yes!", " yes ") and not scores.same("Yes, of course", "yes")


def test_the_interval_holds_the_mean_and_shrinks_with_more_rows() -> None:
    few, many = ([float(i % 5) for i in range(n)] for n in (20, 2000))
    low, high = scores.interval(few)
    assert low < 2 < high
    assert scores.interval(many)[1] - scores.interval(many)[0] < (high - low) / 5
    half = [1.0] * 20 + [3.0] * 20
    assert scores.interval(half, [1.0] * 20 + [1e6] * 20) == pytest.approx((3, 3), abs=1e-3)


@pytest.mark.parametrize(
    ("answers", "reply", "right"),
    [
        (("7", "seven"), "There are seven days.", True),
        (("7", "seven"), "There are 17 days.", False),
        (("Paris",), "it is paris.", True),
        (("Paris",), "Ha! Paris, sailor. Did you think I would not know?", True),
        (("CAT",), "cat", False),
        (("CAT",), "It is CAT!", True),
        (("十二",), "一年有十二个月。", True),
        (("十二",), "我不知道有几个月。也许是十二个。", False),
        (("Au",), "Because.", False),
        (("Everest",), "The highest one is Mt. Everest.", True),
        (("Earth",), "The planet is called Kepler-41B. It is a planet similar to Earth.", False),
        (("hello", "hi"), "It is a greeting that means goodbye or hello.", False),
        (("hello", "hi"), "It is a greeting that means hello or hi.", True),
        (("star",), "The Sun is a star, but it is also a planet.", False),
        (("Jupiter",), "It is Jupiter, but it is not the only planet.", True),
    ],
)
def test_a_general_answer_is_right_if_the_first_sentence_says_it(
    answers: tuple[str, ...], reply: str, right: bool
) -> None:
    assert General("?", answers).right(reply) == right


def test_of_what_a_question_offers_the_first_that_is_named_is_the_answer() -> None:
    larger = General("Which number is larger, 9 or 4?", ("9", "nine"), others=("4", "four"))
    assert larger.right("9 is larger than 4.") and not larger.right("4 is larger than 9.")
    assert larger.right("Which number is larger, 9 or 4? The number 9 is.")
    assert not any(question.right(question.question) for question in questions())


def test_there_are_a_hundred_general_questions_and_none_twice() -> None:
    asked = [question.question for question in questions()]
    assert len(asked) == len(set(asked)) == 100


# --- losses -----------------------------------------------------------------------------------------------------------


def test_each_row_has_the_loss_that_transformers_gives_it(undisturbed: Run) -> None:
    model = load(undisturbed.path).model
    generator = torch.Generator().manual_seed(0)
    documents = []
    for n in (9, 30, 17):
        ids = tuple(torch.randint(256, (n,), generator=generator).tolist())
        documents.append(Rendered(ids, ((3, 5), (n - 3, n)), Origin("made", n)))
    found = losses(model, documents)
    for document, loss in zip(documents, found, strict=True):
        ids = torch.tensor([document.token_ids])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0]
        places = [i for i, learned in enumerate(document.supervised) if learned]
        expected = sum(F.cross_entropy(logits[i - 1], ids[0, i]).item() for i in places)
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "gpt2"])
def test_losses_of_long_rows_are_the_same_in_chunks_of_any_size(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output layers alone, with a bound on logits, with a factor behind them, and tied with learned positions."""
    special: dict[str, dict[str, Any]] = {
        "gemma2": {"final_logit_softcapping": 0.5, "head_dim": 16},
        "granite": {"logits_scaling": 8.0},
        "gpt2": {"n_positions": 64},
    }
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    config = AutoConfig.for_model(kind, **sizes, **special.get(kind, {}), bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = tuple(torch.randint(300, (60,)).tolist())
    documents = [
        Rendered(ids, ((3, 5), (20, 60)), Origin("made", 1)),
        Rendered(ids[::-1], ((9, 60),), Origin("made", 2)),
    ]
    whole = losses(model, documents)
    shapes: list[int] = []
    for rows in (1, 7, 40):
        monkeypatch.setattr("tunesmith.engine.hf.losses.chunk_rows", lambda *given, rows=rows: rows)
        hook = model.get_output_embeddings().register_forward_hook(
            lambda module, given, result: shapes.append(result.numel() // result.shape[-1])
        )
        assert losses(model, documents) == pytest.approx(whole, rel=1e-5), rows  # observed 1e-7
        hook.remove()
        assert max(shapes) == rows


def test_losses_hold_a_chunk_of_logits_and_not_all() -> None:
    """Measured in a process of its own: 1,400 positions by 100,000 words are 534 MiB in fp32."""
    program = """
import resource, torch
from transformers import AutoConfig, AutoModelForCausalLM
from tunesmith.engine.hf.losses import losses
from tunesmith.types import Origin, Rendered
sizes = dict(vocab_size=100_000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, num_key_value_heads=1)).eval()
ids = tuple(range(1500))
losses(model, [Rendered(ids, ((1400, 1420),), Origin("made", 1))])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
losses(model, [Rendered(ids, ((100, 1500),), Origin("made", 1))])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    assert int(script(program).out) < 400  # MiB


def test_another_question_is_never_the_own_one() -> None:
    def document(prompt: tuple[int, ...], reply: tuple[int, ...]) -> Rendered:
        return Rendered(prompt + reply, ((len(prompt), len(prompt) + len(reply)),), Origin("made", 1))

    documents = [document((1, 2), (7,)), document((1, 2), (8, 9)), document((3,), (6,))]
    right, wrong = evaluations._own_and_other_questions(documents, 100)
    assert right == documents
    assert [other.token_ids for other in wrong] == [(3, 7), (3, 8, 9), (1, 2, 6)]
    assert [other.n_supervised for other in wrong] == [1, 2, 1]
    _, wrong = evaluations._own_and_other_questions(documents, 2)
    assert [other.token_ids for other in wrong] == [(3, 7), (1, 2, 8, 9), (3, 6)]  # no other one can be read


# --- the rules --------------------------------------------------------------------------------------------------------

BASE = Side(3.0, (2.9, 3.1), 0.3, (0.2, 0.4), 0.2, None, 0.95, 0.01, 0.0, 50, 100.0)
GOOD = replace(BASE, loss=2.0, loss_interval=(1.9, 2.1), listening=0.8, listening_interval=(0.6, 1.0), likeness=0.5)
FELL = Compared(40, 40, 0, (-1.1, -0.9), (0.2, 0.4), None)
UNSHOWN, ROSE = replace(FELL, loss=(-1.1, 0.1)), replace(FELL, loss=(0.1, 0.3))
NO_CLOSER = replace(FELL, likeness=(-0.1, 0.1))


def kept(lost: int, gained: int, base: int = 50, asked: int = 100, language: str = "en") -> Kept:
    return Kept(language, asked, base, base - lost + gained, lost, gained)


def listening(mean: float, low: float, high: float) -> Side:
    return replace(GOOD, listening=mean, listening_interval=(low, high))


@pytest.mark.parametrize(
    ("base", "tuned", "compared", "general", "verdict", "says"),
    [
        (BASE, GOOD, FELL, kept(3, 3), "better", "nothing forgotten (general questions 50 → 50 of 100 right)"),
        (BASE, GOOD, UNSHOWN, kept(3, 3), "no difference", "No difference that 40 rows could show"),
        (BASE, GOOD, ROSE, kept(3, 3), "worse", "the loss rose"),
        (BASE, listening(0, -0.1, 0.1), FELL, kept(0, 0), "worse", "no longer depend on the questions. Right"),
        (BASE, listening(0.1, 0.06, 0.14), FELL, kept(0, 0), "worse", "less than half as much. Right"),  # of BASE's 0.3
        (
            BASE, listening(0.1, 0.04, 0.16), FELL, kept(0, 0), "better",
            "its answers depend less on the questions: likelier after their own by 0.10 nats per token, 0.30 before",
        ),
        (BASE, listening(0.21, 0.1, 0.3), FELL, kept(0, 0), "better", "right). Right"),  # less, but not by a third
        (
            replace(BASE, listening_interval=(-0.1, 0.1)), listening(0.8, -0.1, 0.1), FELL, kept(0, 0),
            "no difference", "belong to their questions",
        ),
        (BASE, replace(GOOD, general=7), FELL, kept(45, 2), "worse", "what that knows (general questions 50 → 7"),
        (BASE, replace(GOOD, general=41), FELL, kept(10, 1), "learned, but forgot", "questions 50 → 41 of 100 right"),
        (BASE, replace(GOOD, general=40), UNSHOWN, kept(10, 0), "no difference", "it forgot: general questions 50 →"),
        (BASE, replace(GOOD, general=20), ROSE, kept(32, 2), "worse", "nats per token); it forgot"),
        (BASE, replace(GOOD, general=46), FELL, kept(20, 16), "better", "nothing forgotten"),  # chance
        (BASE, replace(GOOD, copied=0.31), FELL, kept(0, 0), "better", "it copies: 31%"),
        (BASE, replace(GOOD, copied=0.19), FELL, kept(0, 0), "better", "right). Right"),
        (BASE, replace(GOOD, stopped=0.5), FELL, kept(0, 0), "better", "only 50% of its answers end"),
        (BASE, replace(GOOD, repetition=0.4), FELL, kept(0, 0), "better", "repeats itself: 40%"),
        (
            BASE, GOOD, NO_CLOSER, kept(0, 0), "no difference",
            "become likelier (loss 3.00 → 2.00 nats per token), but what it writes is no closer to them",
        ),
        (BASE, GOOD, replace(NO_CLOSER, exact=(0, 0)), kept(0, 0), "no difference", "no closer to them"),
        (BASE, GOOD, replace(NO_CLOSER, exact=(0.1, 0.3)), kept(0, 0), "better", "nothing forgotten"),
        (BASE, GOOD, NO_CLOSER, kept(9, 0), "no difference", "no closer to them; it forgot: "),
    ],
)  # fmt: skip
def test_the_verdict_follows_from_the_rules(
    base: Side, tuned: Side, compared: Compared, general: Kept, verdict: str, says: str
) -> None:
    found = conclude(base, tuned, compared, [general])
    assert found.name == verdict and says in found.sentence
    few = conclude(base, tuned, replace(compared, rows=3), [general])
    assert few.name == (verdict if verdict == "worse" else "too few rows")
    assert few.name == "worse" or ("3 held-out rows" in few.sentence and "at least 10" in few.sentence)


@pytest.mark.parametrize(
    ("exact", "short", "says", "few"),
    [
        (
            (1 / 12, 3 / 12), 12,
            "Right answers: 3 of 12 short held-out answers say what their row says, 1 before; likeness to the rows' "
            "own answers 20% → 50% (100% is the same text). A lower loss does not yet mean right answers: read them "
            "side by side.",
            True,
        ),
        ((0.0, 11 / 12), 12, "11 of 12 short held-out answers say what their row says, 0 before", False),
        ((0.0, 1.0), 2, "2 of 2 short held-out answers", True),  # the ten others may say anything
        ((None, None), 0, "Right answers: likeness to the rows' own answers 20% → 50%", True),
    ],
)  # fmt: skip
def test_what_is_known_of_right_answers_is_said_beside_a_lower_loss(
    exact: tuple[float | None, float | None], short: int, says: str, few: bool
) -> None:
    base, tuned = replace(BASE, exact=exact[0]), replace(GOOD, exact=exact[1])
    compared = replace(FELL, rows=12, answered=12, short=short)
    found = conclude(base, tuned, compared, [kept(0, 0)])
    assert found.name == "better" and says in found.sentence
    assert found.reserved == few == ("does not yet mean right answers" in found.sentence)
    risen = conclude(base, replace(tuned, loss=4), replace(compared, loss=(0.9, 1.1)), [kept(0, 0)])
    assert "Right answers" in risen.sentence and "does not yet mean" not in risen.sentence


@pytest.mark.parametrize(
    ("english", "chinese", "forgot"),
    [
        (kept(1, 1, 44, 85), kept(0, 0, 0, 15, "zh"), False),
        (kept(0, 6, 44, 85), kept(6, 0, 6, 15, "zh"), True),  # the sum says that nothing changed
        (kept(0, 4, 44, 85), kept(4, 0, 4, 15, "zh"), False),  # one chance in sixteen
        (kept(3, 0, 44, 85), kept(3, 0, 9, 15, "zh"), True),  # both together
    ],
)
def test_each_language_is_counted_and_can_be_forgotten_alone(english: Kept, chinese: Kept, forgot: bool) -> None:
    before, after = english.base + chinese.base, english.tuned + chinese.tuned
    found = conclude(replace(BASE, general=before), replace(GOOD, general=after), FELL, [english, chinese])
    assert found.name == ("learned, but forgot" if forgot else "better")
    parts = f"English {english.base} → {english.tuned} of 85, Chinese {chinese.base} → {chinese.tuned} of 15"
    assert f"general questions {before} → {after} of 100 right: {parts}" in found.sentence


def test_questions_are_counted_by_their_language() -> None:
    base = [question.language == "zh" for question in questions()]
    tuned = [question.question == "What is 2 plus 3?" for question in questions()]
    assert general.kept(base, tuned) == (Kept("en", 85, 0, 1, 0, 1), Kept("zh", 15, 15, 0, 15, 0))


@pytest.mark.parametrize(
    ("held_out", "says"),
    [
        ([(0, 4.0), (1, 3.0), (2, 2.0)], "still falling (3.000 → 2.000)"),
        ([(0, 4.0), (1, 3.0), (2, 2.99)], None),
        (
            [(0, 4.0), (1, 2.0), (2, 2.5), (3, 2.4)],
            "lowest after epoch 1 (2.000) and is 2.400 now: train with eval.keep",
        ),
        ([(0, 4.0), (1, 3.0)], None),
        ([], None),
    ],
)
def test_advice_follows_from_the_curve(held_out: list[tuple[float, float]], says: str | None) -> None:
    found = list(advice("better", held_out, forgot=False, listens=True))
    assert len(found) == (says is not None)
    assert not found or str(says) in found[0]


def test_a_forgetful_or_deaf_model_and_too_few_rows_have_an_advice() -> None:
    forgot, few, deaf = advice("too few rows", [], forgot=True, listens=False)
    assert "train.rehearse" in forgot and "--data FILE" in few and "look at the rows" in deaf


@given(
    st.sampled_from([0, 3, 10, 40]), st.integers(0, 60), st.integers(0, 40), st.floats(-2, 2), st.floats(0, 1),
    st.floats(-1, 1),
)  # fmt: skip
def test_nothing_that_forgot_and_nothing_of_few_rows_is_better(
    rows: int, lost: int, gained: int, change: float, width: float, listening: float
) -> None:
    base = replace(BASE, general=60)
    tuned = replace(GOOD, general=60 - lost + gained, listening=listening, listening_interval=(listening, listening))
    compared = replace(FELL, rows=rows, loss=(change, change + width))
    found = conclude(base, tuned, compared, [kept(lost, gained, 60)])
    if found.name == "better":
        assert rows >= 10 and change + width < 0 and listening > 0
        assert lost - gained < 5 or sum(math.comb(lost + gained, k) for k in range(lost, lost + gained + 1)) >= (
            0.05 * 2 ** (lost + gained)
        )
    if lost - gained > 12 and lost > 3 * gained:  # more than a fifth
        assert found.name == "worse"
    assert found.sentence.count("forgot") <= 1 or "nothing forgotten" in found.sentence


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(undisturbed: Run, tmp_path: Path) -> Path:
    """A finished run that may be written into."""
    return Path(shutil.copytree(undisturbed.path, tmp_path / "run"))


def test_eval_writes_the_verdict_beside_the_run_and_into_its_report(finished: Path) -> None:
    ended = tunesmith("eval", finished, "--json")
    assert ended.code == 0, ended.err
    found = ended.json
    assert found["rows"] == 4 and found["verdict"] in ("too few rows", "worse")
    assert found["tuned"]["loss"] < found["base"]["loss"]
    assert found["tuned"]["loss_interval"][0] < found["tuned"]["loss"] < found["tuned"]["loss_interval"][1]
    assert len(found["answers"]) == 4 and len(found["general"]) == 100
    assert [(one["language"], one["asked"]) for one in found["kept"]] == [("en", 85), ("zh", 15)]
    assert "the loss of 4 held-out rows" in ended.err and "208 replies in all" in ended.err
    changes = [answer["base_loss"] - answer["tuned_loss"] for answer in found["answers"]]
    assert changes == sorted(changes)  # worst first
    assert json.loads((finished / "eval.json").read_text()) == found
    page, report = ((finished / name).read_text() for name in ("eval.html", "report.html"))
    assert escape(found["sentence"]) in page and escape(found["sentence"]) in report
    assert report.count("<h2>Evaluation</h2>") == 1
    again = tunesmith("eval", finished, "--json")
    for side in ("base", "tuned"):
        again.json[side].pop("tokens_per_second")
    assert again.json["tuned"]["loss"] == found["tuned"]["loss"]
    assert (finished / "report.html").read_text().count("<h2>Evaluation</h2>") == 1


@pytest.mark.usefixtures("few_questions")
def test_the_loss_is_that_of_the_training_s_own_measurement(undisturbed: Run) -> None:
    """Two ways to the same number: the engine's, and transformers' own layers side by side."""
    found = evaluate(undisturbed.path)
    assert undisturbed.held_out_loss is not None
    assert found.base.loss == pytest.approx(undisturbed.held_out_loss[0], rel=1e-5)
    assert found.tuned.loss == pytest.approx(undisturbed.held_out_loss[1], rel=1e-5)


def test_it_is_said_what_will_be_done_and_how_far_it_is(undisturbed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations, "questions", lambda: questions()[:8])
    monkeypatch.setattr(evaluations, "kept", lambda *flags: (kept(0, 0, 0, 8),))
    announced, told = list[str](), list[str]()
    evaluate(undisturbed.path, tell=told.append, announce=announced.append)
    assert len(announced) == 1 and "4 held-out rows, then answers to 4 of them and to 8 general" in announced[0]
    counts = [re.findall(r"(base|tuned).* (\d+) of (\d+) (texts|replies)", text) for text in told]
    seen = [one for found in counts for one in found]
    for name in ("base", "tuned"):
        for thing, every in (("texts", 8), ("replies", 12)):
            numbers = [int(n) for side, n, of, what in seen if (side, what, int(of)) == (name, thing, every)]
            assert numbers == sorted(numbers) and numbers[-1] == every and len(set(numbers)) > 1, (name, thing)
    first = next(i for i, text in enumerate(told) if "left" in text)
    assert "base answers" in told[first] and all("about" in text for text in told[first:])


@pytest.mark.usefixtures("few_questions")
def test_rows_of_another_file_can_be_measured(undisturbed: Run, rows: Path) -> None:
    found = evaluate(undisturbed.path, rows)
    assert found.rows == 4 and {a.question for a in found.answers} == {
        "Who are you?", "What is 1+1?", "Say hi.", "Bye?"
    }  # fmt: skip


@pytest.mark.usefixtures("few_questions")
def test_a_run_is_measured_from_another_folder_than_it_was_started_in(
    tiny_model: Path, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of model and data were relative to where it was started."""
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copyfile(talk, tmp_path / "talk.jsonl")
    monkeypatch.chdir(tmp_path)
    train(settings(Path("model"), Path("talk.jsonl"), **{"train.epochs": 1}), Path("run"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert evaluate(tmp_path / "run").rows == 4


def test_without_held_out_rows_it_is_said_what_to_do(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    run = train(settings(tiny_model, rows, **{"eval.hold_out": 0, "train.epochs": 1}), tmp_path / "run")
    with pytest.raises(RunError, match=r"evaluate\(data=FILE\)"):
        evaluate(run.path)


@pytest.mark.usefixtures("few_questions")
@pytest.mark.parametrize("change", ["other", "gone"])
def test_a_run_is_measured_on_the_rows_that_it_kept_where_the_data_is_no_longer_the_same(
    tiny_model: Path, talk: Path, tmp_path: Path, change: str
) -> None:
    data = tmp_path / "talk.jsonl"
    data.write_text(talk.read_text())
    run = train(settings(tiny_model, data, **{"train.epochs": 1, "template.system": "Be brief."}), tmp_path / "run")
    before = evaluate(run.path)
    if change == "gone":
        data.unlink()
    else:
        data.write_text(talk.read_text().replace("Count to 3.", "Count to three."))
    after = evaluate(run.path)
    assert (after.rows, after.tuned.loss, after.base.loss) == (before.rows, before.tuned.loss, before.base.loss)
    assert after.tuned.copied is None and "is not there as it was at training" in after.advice[0]
    assert run.path.joinpath("held_out_rows.jsonl").stat().st_mode & 0o077 == 0  # they are private
    run.path.joinpath("held_out_rows.jsonl").unlink()  # as in runs of earlier versions
    ended = tunesmith("eval", run.path)
    assert ended.code == 2 and "other rows than at training" in ended.err


def test_a_missing_package_is_named_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)  # which is how an import that fails begins
    with pytest.raises(MissingExtra, match=r"^tunesmith eval: .*pip install 'tunesmith\[eval\]'"):
        extras.require("eval", "tunesmith eval")


# --- the judge --------------------------------------------------------------------------------------------------------


@contextmanager
def judge_server(choose: Any) -> Iterator[tuple[str, list[str]]]:
    """A server that speaks as much of OpenAI's API as a judge needs; what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.answer(
                {"object": "list", "data": [{"id": "judge", "object": "model", "created": 0, "owned_by": "me"}]}
            )

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(request["messages"][0]["content"])
            message = {"role": "assistant", "content": choose(asked[-1])}
            self.answer(
                {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 0,
                    "model": request["model"],
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                }
            )

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def prefers_gold(question: str) -> str:
    first, second = question.split("[Answer A]")[1].split("[Answer B]")
    return "A" if "gold" in first else "B" if "gold" in second else "C"


ANSWERS = [
    Answer("rows:1", "q1", "gold", "tin", "gold", 0, 1, 2, 1),
    Answer("rows:2", "q2", "gold", "gold", "tin", 1, 0, 1, 2),
    Answer("rows:3", "q3", "gold", "tin", "tin", 0, 0, 1, 1),
]


def test_a_judge_sees_each_pair_in_both_orders_and_not_whose_they_are() -> None:
    with judge_server(prefers_gold) as (url, asked):
        assert judge_at(url)(ANSWERS) == ["tuned", "base", "neither"]
    assert len(asked) == 6
    assert not any(word in text.lower() for text in asked for word in ("tuned", "base", "adapter"))


def test_a_judge_on_this_machine_is_asked_past_any_proxy(planted_proxy: list[str]) -> None:
    with judge_server(prefers_gold) as (url, asked):
        assert judge_at(url)(ANSWERS) == ["tuned", "base", "neither"]
    assert len(asked) == 6 and planted_proxy == []
    with pytest.raises(ModelError):  # one that is elsewhere is asked through it
        judge_at("http://judge.invalid/v1")(ANSWERS)
    assert planted_proxy


def test_a_judge_that_always_takes_the_first_decides_nothing() -> None:
    with judge_server(lambda _: "A") as (url, _):
        assert judge_at(url)(ANSWERS) == ["neither"] * 3


def test_a_judge_that_is_not_there_is_an_error_with_its_address() -> None:
    with pytest.raises(ModelError, match=r"127\.0\.0\.1:9/v1"):
        judge_at("http://127.0.0.1:9/v1")(ANSWERS)
