"""The prompts to rehearse with: many, mixed, each once, and none that the measures ask as well."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from tunesmith.cli import demo
from tunesmith.evaluation import general, scores
from tunesmith.evaluation.general import General
from tunesmith.training import rehearsal

ALIKE = 0.5
"""From this likeness on two prompts are the same one in other words."""
# Words, and signs of Chinese, that most questions have.
STOCK = frozenset(
    scores.words(
        "a an and are at be by called can do does for from give have how i in into is it many me my of on one or s "
        "should t than that the there they this to used was we what which who with you your "
        "的是什么哪座叫吗有几个多少怎样了在请"
    )
)
_FILE = Path(rehearsal.__file__).with_suffix(".jsonl")
TASKS = Path(__file__).parent.parent / "benchmarks" / "tasks"
LANGUAGES = [json.loads(line)["language"] for line in _FILE.read_text(encoding="utf-8").splitlines()]


def content(text: str) -> frozenset[str]:
    """What a text is about: its words without those of `STOCK`, singular and plural as one."""
    return frozenset(word.rstrip("s") if len(word) > 2 else word for word in scores.words(text)) - STOCK


def likeness(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


def alike(prompts: Iterable[str], others: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs of a prompt and another text that are alike."""
    theirs = [(other, content(other)) for other in others]
    return [
        (prompt, other)
        for prompt, ours in ((prompt, content(prompt)) for prompt in prompts)
        for other, about in theirs
        if likeness(ours, about) >= ALIKE
    ]


def asks_the_same(prompt: str, question: General) -> bool:
    """Whether all that a question is about stands in the prompt, or the name that answers it."""
    names = [a for a in question.answers if a[0].isupper() or (len(a) > 1 and not a.isascii())]
    return content(question.question) <= content(prompt) or General("", tuple(names)).right(prompt)


def persona() -> list[str]:
    asked = [question.question for language in ("en", "zh") for question in demo.questions(language)]
    files = [demo.PERSONA / f"hester.{language}.jsonl" for language in ("en", "zh")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return asked + [json.loads(line)["instruction"] for line in lines]


def tasks() -> list[str]:
    ferry, desk = (json.loads((TASKS / name).read_text(encoding="utf-8")) for name in ("ferry.json", "desk.json"))
    asked = [text for fact in ferry["facts"] for text in fact["asked"] + fact["tested"]]
    return asked + [text for kind in desk["desks"].values() for text in kind["learned"] + kind["tested"]]


def test_there_are_about_six_hundred_prompts_and_a_third_of_them_is_chinese() -> None:
    assert len(rehearsal.prompts()) == len(LANGUAGES)
    assert 380 <= LANGUAGES.count("en") <= 420 and 190 <= LANGUAGES.count("zh") <= 210
    assert set(LANGUAGES) == {"en", "zh"}


def test_a_prompt_has_the_language_that_it_is_said_to_have() -> None:
    for prompt, language in zip(rehearsal.prompts(), LANGUAGES, strict=True):
        chinese, latin = len(re.findall("[一-鿿]", prompt)), len(re.findall("[A-Za-z]", prompt))
        assert chinese >= 2 if language == "zh" else chinese <= latin, prompt


def test_prompts_are_mostly_short_and_some_are_paragraphs() -> None:
    lengths = sorted(map(len, rehearsal.prompts()))
    assert lengths[-1] <= 800  # observed 438
    assert lengths[len(lengths) // 2] <= 60 and lengths[-20] >= 200  # observed 38 and 245
    assert all(prompt == prompt.strip() != "" for prompt in rehearsal.prompts())


@pytest.mark.parametrize("n", [8, 16, 32, 64, 128, 256, 512])
def test_a_beginning_is_as_mixed_as_the_whole(n: int) -> None:
    first = rehearsal.prompts()[:n]
    assert abs(LANGUAGES[:n].count("zh") - n * LANGUAGES.count("zh") / len(LANGUAGES)) <= 1
    openings = Counter(scores.words(prompt)[0] for prompt in first)
    assert max(openings.values()) <= max(2, n / 5), openings.most_common(1)  # "what": 85 of 612
    assert any(len(prompt) > 100 for prompt in first) and any(len(prompt) < 30 for prompt in first)


def test_no_prompt_is_there_twice_in_other_words() -> None:
    about = [(prompt, content(prompt)) for prompt in rehearsal.prompts()]
    assert all(words for _, words in about)
    pairs = itertools.combinations(about, 2)
    assert [(one, other) for (one, a), (other, b) in pairs if likeness(a, b) >= ALIKE] == []  # observed up to 0.40


def test_no_prompt_asks_what_measures_forgetting() -> None:
    asked = [question.question for question in general.questions()]
    assert alike(rehearsal.prompts(), asked) == []  # observed up to 0.38
    pairs = itertools.product(rehearsal.prompts(), general.questions())
    assert [(prompt, question) for prompt, question in pairs if asks_the_same(prompt, question)] == []


def test_no_prompt_is_like_one_of_the_persona_or_of_the_tasks_that_settings_are_compared_by() -> None:
    assert alike(rehearsal.prompts(), persona()) == []  # observed up to 0.44
    assert alike(rehearsal.prompts(), tasks()) == []  # 0.29


@pytest.mark.parametrize(
    "prompt",
    [
        "Tell me the capital of France, please.",
        "Name the largest ocean that there is on Earth.",
        "Which work of Leonardo hangs in the Louvre?",
        "How much is 6 times 7? Answer with one number.",
        "I have a question for my homework: what do bees make, and why do they make it?",
        "请问法国的首都是哪一座城市？",
        "长江流经哪些省？",
    ],
)
def test_the_check_sees_a_general_question_in_other_words(prompt: str) -> None:
    assert any(asks_the_same(prompt, question) for question in general.questions())


def test_the_check_sees_likeness() -> None:
    assert alike(["And what is the capital of Italy called?"], [q.question for q in general.questions()])
    assert alike(["Which town did you come from?", "灯光隔几秒才亮一回？"], persona())
    assert alike(["What is the name of that ferry?"], tasks())
    assert alike(["Write a haiku about the rain, please."], rehearsal.prompts())
