"""Token ids become text while they are written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import pytest
from transformers import AutoTokenizer

from conftest import CHATML, SHARED, byte_tokenizer, needs_shared
from tunesmith.data.template import Template, probe
from tunesmith.data.writing import Text, reply_text, token_bytes

WITH_TEMPLATES = ["phi-3-mini", "deepseek-7b", "gemma-2b", "phi-4"]


@pytest.fixture(scope="module")
def template() -> Template:
    return probe(byte_tokenizer(), CHATML, "test")


def test_every_token_is_told_by_its_bytes(template: Template) -> None:
    assert sorted(token_bytes(template, i) for i in range(256)) == [bytes([i]) for i in range(256)]
    assert token_bytes(template, 258) == b"<|im_end|>"


def test_text_is_shown_when_it_can_not_change_any_more(template: Template) -> None:
    encode = cast("Any", template.tokenizer).backend_tokenizer.encode

    def pieces(text: str, **settings: Any) -> list[str]:
        shown = Text(template, **settings)
        return [*(shown.add(i) for i in encode(text, add_special_tokens=False).ids), shown.end()]

    assert pieces(" a b ", strip=True) == ["", "a", "", " b", "", ""]
    assert pieces(" a b ", strip=False) == [" ", "a", " ", "b", " ", ""]
    assert pieces("é", strip=True) == ["", "é", ""]
    assert pieces("ab--c", stops=["--"]) == ["a", "b", "", "", "", ""]
    assert pieces("a-b", stops=["--"]) == ["a", "", "-b", ""]
    assert pieces("a-", stops=["--"]) == ["a", "", "-"]


def places(shown: Text, tokens: Iterable[int]) -> list[int]:
    """Where each token begins."""
    found = []
    for token in tokens:
        found.append(shown.n_certain)
        shown.add(token)
    return found


def test_places_are_those_of_the_shown_text(template: Template) -> None:
    by_byte = {token_bytes(template, i): i for i in range(256)}
    ids = [by_byte[bytes([byte])] for byte in "a当b".encode()]
    assert places(Text(template), ids) == [0, 1, 1, 1, 2]
    assert places(Text(template), [ids[0], 257, *ids[1:]]) == [0, 1, 1, 1, 1, 2]  # a special token shows nothing
    assert reply_text(template, [*ids[:3], ids[0]]) == "a\ufffda" and reply_text(template, [257]) == ""


@needs_shared
@pytest.mark.parametrize("family", WITH_TEMPLATES)
@pytest.mark.parametrize("goes_on", [False, True])
def test_places_are_those_of_the_shown_text_for_every_decoder(family: str, goes_on: bool) -> None:
    """Some take the space in front of the first word away."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / family)
    template = probe(tokenizer, tokenizer.chat_template, "test")
    words = "The sea is wide"
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    before, ids = (ids[:1], ids[1:]) if goes_on else ([], ids)
    shown = Text(template, strip=False, before=before)
    found = places(shown, ids)
    shown.end()
    starts = [shown.whole.index(word) for word in words.split()[len(before) :]]
    assert [shown.whole[place:].lstrip() for place in found] == [shown.whole[start:] for start in starts]


@needs_shared
@pytest.mark.parametrize("family", WITH_TEMPLATES)
def test_a_text_goes_on_with_the_space_before_its_next_word(family: str) -> None:
    """Decoders of pieces take the space in front of the first word for one of their own."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / family)
    first, rest = "The capital of France is", " Paris and not Lyon."
    ids = tokenizer(first + rest, add_special_tokens=False)["input_ids"]
    before = tokenizer(first, add_special_tokens=False)["input_ids"]
    assert ids[: len(before)] == before
    template = probe(tokenizer, tokenizer.chat_template, "test")
    shown = Text(template, strip=False, before=before)
    assert "".join([*(shown.add(i) for i in ids[len(before) :]), shown.end()]) == rest == shown.whole


@needs_shared
@pytest.mark.parametrize("family", WITH_TEMPLATES)
def test_pieces_join_to_the_text_that_is_decoded_at_once(family: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / family)
    template = probe(tokenizer, tokenizer.chat_template, "test")
    for text in ("Bo, of the sea.", "  a  b ", "é 😀😀 当b。", "👩‍👩‍👧‍👦" * 3, "x\n\n\ty\n", "\ufffd a", "a\ufffd"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for end in range(len(ids) + 1):  # wherever a reply meets its limit
            shown = Text(template)
            pieces = [*(shown.add(i) for i in ids[:end]), shown.end()]
            assert "".join(pieces) == shown.whole == reply_text(template, ids[:end])
        assert shown.whole == tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()


@needs_shared
@pytest.mark.parametrize("family", WITH_TEMPLATES)
def test_half_a_character_at_the_end_leaves_the_one_before_it_whole(family: str) -> None:
    """Decoders of single bytes give up a whole run of them for one that is missing."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / family)
    template = probe(tokenizer, tokenizer.chat_template, "test")
    ids = tokenizer("a 😀😀", add_special_tokens=False)["input_ids"]
    assert reply_text(template, ids[:-1]).startswith("a 😀")
