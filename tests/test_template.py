"""What probing finds out about a chat template, on small templates with the byte tokenizer."""

from __future__ import annotations

import hashlib

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from conftest import CHATML, byte_tokenizer
from tunesmith.data.template import Refused, Template, fold, probe
from tunesmith.errors import TemplateError
from tunesmith.types import Message

END_OF_TEXT, START, END = 256, 257, 258
TALK = [Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Ho")]

TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + TURN + "{% endfor %}" + OPEN
)  # fmt: skip
DROPS_SYSTEM = "{% for m in messages if m['role'] != 'system' %}" + TURN + "{% endfor %}" + OPEN
OWN_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Bo.<|im_end|>\n{% endif %}"
    "{% for m in messages %}" + TURN + "{% endfor %}" + OPEN
)  # fmt: skip
SYSTEM_WITHOUT_MARKS = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n{% else %}"
    + TURN + "{% endif %}{% endfor %}" + OPEN
)  # fmt: skip


def probed(text: str, *more_stop_ids: int, tokenizer: PreTrainedTokenizerFast | None = None) -> Template:
    return probe(tokenizer or byte_tokenizer(None), text, "test", more_stop_ids)


# --- system texts -----------------------------------------------------------------------------------------------------


def test_a_system_text_that_the_template_takes_stays_where_it_is() -> None:
    template = probed(CHATML)
    assert not template.folds_system
    assert template.own_system is None
    assert template.write(TALK[:1] + TALK[1:2]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")


def test_a_system_text_without_marks_of_its_own_is_one_that_the_template_takes() -> None:
    template = probed(SYSTEM_WITHOUT_MARKS)
    assert not template.folds_system
    assert template.own_system is None


@pytest.mark.parametrize("text", [REFUSES_SYSTEM, DROPS_SYSTEM], ids=["refused", "dropped"])
def test_a_system_text_that_is_refused_or_dropped_goes_before_the_first_question(text: str) -> None:
    template = probed(text)
    assert template.folds_system
    assert template.write(TALK, generation_prompt=False) == (
        "<|im_start|>user\nBe brief.\n\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    )
    assert template.write(TALK[:2], generation_prompt=True) == (
        "<|im_start|>user\nBe brief.\n\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_system_text_that_a_template_writes_by_itself_is_named() -> None:
    template = probed(OWN_SYSTEM)
    assert template.own_system == "You are Bo."
    assert not template.folds_system
    assert "You are Bo." not in template.write(TALK)


def test_folding_leaves_a_talk_without_system_text_as_it_is() -> None:
    assert fold(TALK[1:]) == TALK[1:]
    assert fold([]) == []


def test_folding_joins_with_a_blank_line_and_touches_nothing_else() -> None:
    later = [*TALK, Message("user", "More"), Message("assistant", "No")]
    assert fold(later) == [Message("user", "Be brief.\n\nHi"), *later[2:]]


def test_folding_never_puts_a_system_text_into_a_reply() -> None:
    """A client may send a greeting of the assistant first; the system text belongs to the first user turn."""
    greeted = [Message("system", "S"), Message("assistant", "Hello!"), Message("user", "Hi")]
    assert fold(greeted) == [Message("assistant", "Hello!"), Message("user", "S\n\nHi")]
    assert fold(greeted[:2]) == greeted[:2]


# --- stop tokens ------------------------------------------------------------------------------------------------------


def test_the_stop_token_is_the_first_special_one_behind_a_reply() -> None:
    text = CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    assert probed(text).stop_ids == (END,)
    template = probed(text.replace("<|im_end|>", "<|endoftext|>"))
    assert template.stop_ids == (END_OF_TEXT, END)  # its own first, then the tokenizer's eos


def test_stop_ids_of_config_and_alias_follow_and_none_comes_twice() -> None:
    assert probed(CHATML, END_OF_TEXT, END, 7).stop_ids == (END, END_OF_TEXT, 7)


def test_a_stop_token_that_only_the_generation_config_names_is_found() -> None:
    tokenizer = byte_tokenizer(None)
    tokenizer.add_tokens([AddedToken("[END]", special=False, normalized=False)])
    text = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}[END]{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(TemplateError, match="no special token after a reply"):
        probed(text, tokenizer=tokenizer)
    assert probed(text, 259, tokenizer=tokenizer).stop_ids == (259, END)


def test_marks_of_a_turn_are_special_even_where_nobody_called_them_so() -> None:
    """Many fine-tuned models added <|im_start|> as an ordinary token; spelling it must not open a turn."""
    tokenizer = byte_tokenizer(None)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<turn>", "<think>", "\n", "user")])
    turn, think, line, user = range(259, 263)
    text = "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}" + (
        "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    )
    template = probed(text, tokenizer=tokenizer)
    assert turn in template.special_ids
    assert not {think, line, user} & template.special_ids


# --- what nothing can be learned with ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{% for m in messages %}{{ m['content'] ", "an error (TemplateSyntaxError"),
        ("{{ messages | no_such_filter }}", "an error (TemplateAssertionError"),
        ("{{ raise_exception('No.') }}", "an error (TemplateError: No.)"),
        ("{{ messages[0]['content'] }}{{ 1 / 0 }}", "an error (ZeroDivisionError"),
        ("{{ messages[0].content.nothing.at_all }}", "an error (UndefinedError"),
        ("{{ messages[0]['content'] }}<|im_end|>", "loses the question or the answer"),
        ("{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>{% endfor %}", "loses the"),
        ("Hello<|im_end|>", "loses the question or the answer"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "no special token after a reply"),
        ("{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}", "no special token after a reply"),
        (CHATML.replace("assistant\n{%", "model\n{%"), "which does not begin the conversation"),
        (CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}", "which does not begin the conversation"),
    ],
    ids=["syntax", "filter", "raises", "division", "undefined", "answer", "question", "both", "stop", "stop before",
         "role", "thinking"],
)  # fmt: skip
def test_a_template_that_nothing_can_be_learned_with_is_refused_in_four_parts(text: str, found: str) -> None:
    with pytest.raises(TemplateError) as caught:
        probed(text)
    assert caught.value.where == "chat template (test)"
    assert found in caught.value.found
    assert "template.path" in caught.value.fix


def test_a_template_that_always_opens_the_reply_is_fine() -> None:
    """The first Phi-3 and Phi-4 templates did: they write the reply's header behind every question."""
    template = probed(
        "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>user\n{{ m['content'] }}<|im_end|>\n"
        "<|im_start|>assistant\n{% elif m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>\n{% endif %}"
        "{% endfor %}"
    )
    assert template.stop_ids == (END,)
    assert template.folds_system
    assert template.write(TALK[1:2]) == template.write(TALK[1:2], generation_prompt=True)


def test_a_conversation_that_the_template_refuses_says_why() -> None:
    template = probed(
        "{% for m in messages %}{% if loop.index > 2 %}{{ raise_exception('One question only') }}{% endif %}"
        + TURN + "{% endfor %}" + OPEN
    )  # fmt: skip
    with pytest.raises(Refused, match="One question only"):
        template.write([*TALK[1:], Message("user", "Again")])


def test_the_digest_is_that_of_the_text() -> None:
    assert probed(CHATML).digest == hashlib.sha256(CHATML.encode()).hexdigest()
    assert probed(CHATML).digest != probed(CHATML + "{# another revision #}").digest
