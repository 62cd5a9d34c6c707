"""Chat templates and tokenizers that would take all time or memory end in an error of the user's kind, at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import CHATML, byte_tokenizer, save_tiny_model, tunesmith
from tunesmith.confined import Ended
from tunesmith.data import cache, records, tokenizer_trial
from tunesmith.data.render import Renderer
from tunesmith.data.template import Writer, probe
from tunesmith.errors import ModelError, TemplateError
from tunesmith.models import load_tokenizer
from tunesmith.types import Conversation, Message, Origin

DOUBLING = "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
LOOPS = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
)
HOSTILE = {
    "loops": LOOPS,
    "doubling strings": DOUBLING,
    "one long string": "{{ 'x' * 3000000000 }}",
    "wide formatting": "{{ '%3000000000d' % 1 }}",
    "a deep macro": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a long answer": "{% for a in range(99999) %}{% for b in range(99) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
}


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("what", HOSTILE)
def test_a_template_that_takes_everything_is_refused(what: str) -> None:
    with pytest.raises(TemplateError) as refused:
        probe(byte_tokenizer(None), HOSTILE[what] + CHATML, "test")
    assert refused.value.where == "chat template (test)"


def test_a_template_that_waits_for_a_certain_row_is_refused_there() -> None:
    """Probes can not find it; the row is rendered within the same limits."""
    trap = "{% if 'now' in messages[0].content %}" + DOUBLING + "{% endif %}" + CHATML
    here = Renderer(probe(byte_tokenizer(None), trap, "test"))

    def row(question: str) -> Conversation:
        return Conversation((Message("user", question), Message("assistant", "Yes.")), Origin("rows.jsonl", 1))

    assert here.render(row("later"))
    with pytest.raises(TemplateError, match=r"chat template: found more than .* for one conversation"):
        here.render(row("now"))
    assert here.render(row("later"))  # and goes on with the next


def test_check_of_a_hostile_template_ends_with_one_message(tmp_path: Path, rows: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(LOOPS + CHATML)
    ended = tunesmith("check", "--model", folder, "--data", rows)
    assert (ended.code, ended.out.count("Traceback")) == (2, 0)
    assert "more than 2 seconds for one conversation" in ended.err


@pytest.mark.parametrize(
    ("trap", "found"),
    [(LOOPS, "more than 2 seconds"), (DOUBLING, "more memory than there is")],
    ids=["loops", "doubling"],
)
def test_a_trap_in_a_large_file_ends_the_process_that_steps_into_it(
    trap: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LARGE", 1000)
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"{i} {'now' if i == 700 else ''}", "output": "Yes."} for i in range(1000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "{% if 'now' in messages[0].content %}" + trap + "{% endif %}" + CHATML
    here = Renderer(probe(byte_tokenizer(None), text, "test"))
    with pytest.raises(TemplateError, match=found):
        cache.rendered(records.open_file(path), here)


def test_many_conversations_at_once_are_written_in_order() -> None:
    writer = Writer(byte_tokenizer(None), "{% if messages[0].content == '7' %}{{ raise_exception('no') }}{% endif %}"
                    "{{ messages[0].content }}")  # fmt: skip
    written = writer.write_all([([Message("user", str(i))], False) for i in range(3000)])
    assert [str(text) for text in written] == [*map(str, range(7)), "TemplateError: no", *map(str, range(8, 3000))]


# --- tokenizers -------------------------------------------------------------------------------------------------------


def tokenizer_with(folder: Path, **changes: Any) -> Path:
    byte_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


A_TO_AA = {"type": "Sequence", "normalizers": [replace({"String": "a"}, "aaaaaaaa")] * 12}
BACK_AND_FORTH = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "(a|a|aa)+$"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"normalizer": A_TO_AA}, "characters of one"),
        ({"normalizer": replace({"Regex": "."}, "x" * 10_000)}, "characters of one"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 100_000}}, "characters of one"),
        ({"pre_tokenizer": BACK_AND_FORTH}, "fails its trial"),
    ],
    ids=["doubling", "each letter a page", "a page in front", "a pattern that goes back and forth"],
)
def test_a_tokenizer_that_takes_everything_is_refused(
    changes: dict[str, Any], found: str, tmp_path: Path, fresh_cache: Path
) -> None:
    folder = tokenizer_with(tmp_path / "tokenizer", **changes)
    with pytest.raises(ModelError, match=found):
        load_tokenizer(folder)


def test_one_that_passed_is_not_tried_again_until_a_file_changes(
    tmp_path: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tokenizer_with(tmp_path / "tokenizer")
    load_tokenizer(folder)
    tried: list[int] = []

    def end(*_: Any) -> None:
        tried.append(1)
        raise Ended("more than 8 seconds")

    monkeypatch.setattr(tokenizer_trial, "confined", end)
    load_tokenizer(folder)
    assert not tried
    (folder / "added_tokens.json").write_text("{}")
    with pytest.raises(ModelError, match=r"fails its trial \(more than 8 seconds\)"):
        load_tokenizer(folder)
    assert tried


def test_what_is_broken_says_what_it_said_before(tmp_path: Path, fresh_cache: Path) -> None:
    folder = tmp_path / "tokenizer"
    byte_tokenizer().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="a tokenizer that can not be read"):
        load_tokenizer(folder)


def test_a_folder_of_words_is_tried_too(tmp_path: Path, fresh_cache: Path) -> None:
    """Added tokens by the hundred thousand: building takes minutes."""
    folder = tmp_path / "tokenizer"
    byte_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    one = whole["added_tokens"][0]
    whole["added_tokens"] += [{**one, "id": 259 + i, "content": f"<{i}>" * 40} for i in range(150_000)]
    path.write_text(json.dumps(whole))
    with pytest.raises(ModelError, match="fails its trial"):
        load_tokenizer(folder)
    shutil.rmtree(folder)
