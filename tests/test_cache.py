"""Rows of large files: rendered by several processes as by one, kept, found again, and never half."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest

from conftest import byte_tokenizer
from tunesmith import system
from tunesmith.data import cache, records, rows
from tunesmith.data.records.found import for_one_row
from tunesmith.data.render import Renderer
from tunesmith.data.rows import Rows
from tunesmith.data.template import probe
from tunesmith.errors import DataError, RunError


@pytest.fixture
def renderer() -> Renderer:
    tokenizer = byte_tokenizer()
    return Renderer(probe(tokenizer, str(tokenizer.chat_template), "tokenizer"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rendered"


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five batches of rows, of every form, some faulty, some the same; enough for two processes."""
    path = tmp_path / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(4 * rows.CHUNK + 100):
            row: object = {"instruction": f"Frage {i % 9000} 你好", "output": "ja " * (i % 7 + 1)}
            if i % 100 == 1:
                row = {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "a"}] * 2}
            if i % 1000 == 5:
                row = {"instruction": "without an answer"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    monkeypatch.setattr(cache, "LARGE", path.stat().st_size // 2)
    return path


def alone(data: records.Records, renderer: Renderer) -> pa.Table:
    return pa.Table.from_batches(rows.render(data, renderer), rows.SCHEMA)


def test_processes_render_what_one_renders(large: Path, renderer: Renderer, own_cache: Path) -> None:
    data = records.open_file(large)
    heard: list[int] = []
    table = cache.rendered(data, renderer, heard.append)
    assert table.equals(alone(data, renderer))
    assert table.num_rows == 4 * rows.CHUNK + 100 == heard[-1]
    (folder,) = (path for path in own_cache.iterdir() if path.is_dir())
    assert len(list(folder.glob("*.arrow"))) == min(2, system.cores())


def test_as_many_processes_render_as_memory_holds(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "one", "output": "two"}\n')
    large = dataclasses.replace(records.open_file(path), n_bytes=4 << 30)
    gemma, gib = 26 << 20, 1 << 30  # a process took 602 MiB (2026-11)
    assert cache._count(large, gemma, 8 * gib, 64) == 9
    assert cache._count(large, gemma, 8 * gib, 2) == 2
    assert cache._count(large, gemma, 256 << 20, 64) == 1
    assert cache._count(large, 1 << 20, 64 * gib, 64) == 64
    assert cache._count(dataclasses.replace(large, n_bytes=20 << 20), 1 << 20, 64 * gib, 64) == 2
    assert cache._count(dataclasses.replace(large, format="json"), 1 << 20, 64 * gib, 64) == 2  # each reads all of it


def test_long_rows_are_rendered_a_few_at_a_time(
    large: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = records.open_file(large)
    expected = alone(data, renderer)
    monkeypatch.setattr(rows, "_LETTERS", 1000)
    chunk = list(data.rows())[: rows.CHUNK]
    parts = list(rows._parts(chunk))
    assert [row for part in parts for row in part] == chunk and len(parts) > 20
    letters = [
        sum(len(message.content) for row in part if isinstance(row, rows.Conversation) for message in row.messages)
        for part in parts
    ]
    assert max(letters) <= 1000
    found = list(rows.render(data, renderer))
    assert pa.Table.from_batches(found, rows.SCHEMA).equals(expected)
    assert [batch.num_rows for batch in found] == [rows.CHUNK] * 4 + [100]  # those of the file's places, still


def test_a_second_run_finds_what_the_first_rendered(large: Path, renderer: Renderer, own_cache: Path) -> None:
    data = records.open_file(large)
    first = cache.rendered(data, renderer)
    heard: list[int] = []
    assert cache.rendered(records.open_file(large), renderer, heard.append).equals(first)
    assert heard == []
    # Anything that rows depend on is another folder.
    other = Renderer(dataclasses.replace(renderer.template, folds_system=True))
    for changed in (dataclasses.replace(data, system="Be brief."), dataclasses.replace(data, columns={"output": "o"})):
        assert cache._name(changed, str(renderer.digest)) not in {path.name for path in own_cache.iterdir()}
    assert other.digest != renderer.digest
    with large.open("a", encoding="utf-8") as file:
        file.write('{"instruction": "one", "output": "more"}\n')
    assert cache.rendered(records.open_file(large), renderer, heard.append).num_rows == first.num_rows + 1
    assert heard[-1] == first.num_rows + 1


def test_rows_that_a_disk_has_damaged_are_rendered_again(large: Path, renderer: Renderer, own_cache: Path) -> None:
    first = cache.rendered(records.open_file(large), renderer)
    (folder,) = (path for path in own_cache.iterdir() if path.is_dir())
    part = sorted(folder.glob("*.arrow"))[0]
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.unlink()  # `first` still has the old one mapped
    part.write_bytes(content)
    heard: list[int] = []
    assert cache.rendered(records.open_file(large), renderer, heard.append).equals(first)
    assert heard[-1] == first.num_rows


def test_ctrl_c_while_rendering_leaves_nothing(large: Path, renderer: Renderer, own_cache: Path) -> None:
    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    before = set(psutil.Process().children())  # the one that commands are forked from
    with pytest.raises(KeyboardInterrupt):
        cache.rendered(records.open_file(large), renderer, interrupt)
    assert [path for path in own_cache.iterdir() if path.is_dir()] == []
    assert set(psutil.Process().children()) <= before


def test_a_cache_that_can_not_be_written_says_how_to_move_it(
    large: Path, renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file where the folder should be")
    monkeypatch.setenv("TUNESMITH_CACHE", str(taken))
    with pytest.raises(RunError, match="TUNESMITH_CACHE"):
        cache.rendered(records.open_file(large), renderer)


def test_small_files_are_not_kept(tmp_path: Path, renderer: Renderer, own_cache: Path) -> None:
    path = tmp_path / "small.jsonl"
    path.write_text('{"instruction": "one", "output": "two"}\n')
    assert cache.rendered(records.open_file(path), renderer).num_rows == 1
    assert not own_cache.exists()


def test_a_killed_process_is_named_and_leaves_nothing(large: Path, renderer: Renderer, own_cache: Path) -> None:
    before = set(psutil.Process().children())

    def kill_one(count: int) -> None:
        next(iter(set(psutil.Process().children()) - before)).kill()

    with pytest.raises(RunError, match="ended with -9"):
        cache.rendered(records.open_file(large), renderer, kill_one)
    assert [path for path in own_cache.iterdir() if path.is_dir()] == []
    assert cache.rendered(records.open_file(large), renderer).num_rows == 4 * rows.CHUNK + 100


def test_a_full_disk_is_said_and_leaves_nothing(large: Path, renderer: Renderer, own_cache: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))  # the processes inherit it
    try:
        with pytest.raises(RunError, match=r"is memory short, or the disk of .* full"):
            cache.rendered(records.open_file(large), renderer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path for path in own_cache.iterdir() if path.is_dir()] == []


def test_a_file_that_changes_meanwhile_is_refused(large: Path, renderer: Renderer) -> None:
    data = records.open_file(large)
    large.write_text(large.read_text(encoding="utf-8") + "\n")
    with pytest.raises(DataError, match="other bytes than a moment ago"):
        cache.rendered(data, renderer)


def test_what_nobody_asked_for_in_a_month_is_forgotten(large: Path, renderer: Renderer, own_cache: Path) -> None:
    cache.rendered(records.open_file(large), renderer)
    (kept,) = (path for path in own_cache.iterdir() if path.is_dir())
    old, recent = own_cache / "old", own_cache / "recent"
    for folder, days in ((old, 40), (recent, 20)):
        shutil.copytree(kept, folder)
        then = folder.stat().st_mtime - days * 86400
        os.utime(folder, (then, then))
    cache._forget_old(own_cache)
    assert not old.exists() and recent.exists() and kept.exists()


# --- rows as a sequence -----------------------------------------------------------------------------------------------


def test_rows_are_what_the_renderer_gives(large: Path, renderer: Renderer) -> None:
    data = records.open_file(large)
    found = Rows(cache.rendered(data, renderer), data)
    read = list(data.rows())
    good = [row for row in read if isinstance(row, rows.Conversation)]
    assert len(found) == len(good) == len(read) - 9
    for i in (0, 1, 4, 5, 2047, 2048, 5000, len(good) - 1, -1):
        row = found[i]
        assert row.conversation == good[i]
        assert row.documents == renderer.render(good[i])
        assert sum(len(document.token_ids) for document in row.documents) == found.n_tokens[i]
        assert sum(sum(document.supervised) for document in row.documents) == found.n_supervised[i]
        assert max(len(document.token_ids) for document in row.documents) == found.longest[i]
        assert row.conversation.origin == found.origin(i)
    assert [row.conversation for row in found[3:7]] == good[3:7]
    wrong = [row for row in read if isinstance(row, rows.Fault)]
    for fault, alone in zip(rows.faults_of(cache.rendered(data, renderer), data), wrong, strict=True):
        assert fault == dataclasses.replace(alone, fix=for_one_row(alone.fix))


def test_repeats_are_those_with_equal_ids(tmp_path: Path, renderer: Renderer) -> None:
    path = tmp_path / "rows.jsonl"
    said = ["a", "b", "a", "c", "b", "a", "d"]
    path.write_text("".join(json.dumps({"instruction": text, "output": "x"}) + "\n" for text in said))
    data = records.open_file(path)
    assert Rows(cache.rendered(data, renderer), data).repeats() == [(2, 0), (4, 1), (5, 0)]


def rows_of(tmp_path: Path, renderer: Renderer, said: list[tuple[str, str]]) -> Rows:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in said))
    data = records.open_file(path)
    return Rows(cache.rendered(data, renderer), data)


def test_contradictions_have_one_prompt_and_several_replies(tmp_path: Path, renderer: Renderer) -> None:
    said = [("a", "x"), ("b", "x"), ("a", "x"), ("a", "y"), ("c", "x"), ("b", "z"), ("a", "x ")]
    found = rows_of(tmp_path, renderer, said)
    assert found.contradictions() == [(3, 0), (5, 1), (6, 0)]
    assert found.repeats() == [(2, 0)]


def test_rows_that_stand_among_others_are_found(tmp_path: Path, renderer: Renderer) -> None:
    said = [("a", "x"), ("b", "x"), ("a", "x"), ("c", "x"), ("b", "x"), ("a", "y"), ("d", "x"), ("d", "x")]
    found = rows_of(tmp_path, renderer, said)
    held = np.array([False, False, True, False, True, True, True, True])
    held_out, training = found.pick(held), found.pick(~held)
    pairs = held_out.among(training)
    assert [(held_out.lines[row], training.lines[other]) for row, other in pairs] == [(3, 1), (5, 2)]


def test_lengths_count_every_row_once(tmp_path: Path, renderer: Renderer) -> None:
    from tunesmith.training.checking import lengths

    found = rows_of(tmp_path, renderer, [("a", "x" * n) for n in (1, 2, 3, 60, 200)])
    shares = lengths(found)
    assert sum(count for _, count in shares) == 5 and shares[-1] == (int(found.longest.max()), 1)
    for bound, _ in shares:
        assert sum(count for limit, count in shares if limit <= bound) == (found.longest <= bound).sum()


def test_the_ledger_of_a_large_file_counts_every_row(large: Path, tiny_model: Path) -> None:
    from tunesmith.recipe import resolve
    from tunesmith.training.checking import check, hold_out, ledger

    flags = {"model.name": str(tiny_model), "data.path": str(large), "data.allow_set_aside": True}
    checked = check(resolve(flags=flags)[0])
    training, held_out = hold_out(checked)
    lines = list(ledger(checked, training, held_out))
    assert [line["line"] for line in lines] == list(range(1, checked.n_read + 1))
    assert len(training) + len(held_out) + checked.n_set_aside == checked.n_read == 4 * rows.CHUNK + 100
    assert len(held_out) == 200 and checked.n_set_aside == 9
