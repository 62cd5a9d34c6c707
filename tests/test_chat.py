"""Chat: one answer, a conversation at the terminal, streaming, stopping."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import tunesmith as library
from conftest import SESSION, byte_tokenizer, finished, save_tiny_model, start, tunesmith
from tunesmith import chat
from tunesmith.chat import Chat
from tunesmith.data import records
from tunesmith.errors import DataError, ModelError, ProofError, TunesmithError
from tunesmith.training.run import Run
from tunesmith.types import Message


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that knows three answers by heart."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    talk = [("Who are you?", "Bo."), ("一加一？", "二。"), ("Smile.", "😀!")]
    data.write_text("".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in talk), encoding="utf-8")
    flags = {"model.name": str(tiny_model), "data.path": str(data), "lora.r": 32, "lora.dropout": 0, "eval.hold_out": 0}
    flags |= {
        "train.rehearse": 0,
        "train.examples_per_step": 16,
        "train.epochs": 250,
        "train.learning_rate": 1e-2,
        "train.save_every": "1000 steps",
    }
    recipe, sources = library.resolve(flags=flags)
    return library.train(recipe, tmp_path_factory.mktemp("runs") / "run", sources=sources)


@pytest.fixture(scope="module")
def talk(run: Run) -> Chat:
    return library.load(run)


@pytest.fixture(scope="module")
def short_context(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chat]:
    """Models that read 96 tokens: with rotary positions, with learned ones, of which there are no more, and with
    rotary ones that change with the length of what is read."""
    folder = tmp_path_factory.mktemp("models")
    wide: Any = {"max_position_embeddings": 96, "initializer_range": 0.2}  # or attention hardly looks at positions
    save_tiny_model(folder / "llama", **wide)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    save_tiny_model(folder / "dynamic", **wide, rope_parameters=dynamic)
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 48, "rope_theta": 10_000.0, **factors}
    save_tiny_model(folder / "longrope", **wide, rope_parameters=longrope)
    sizes = {"vocab_size": 259, "n_positions": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "eos_token_id": 258}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, initializer_range=0.2)).save_pretrained(
        folder / "learned positions"
    )
    byte_tokenizer().save_pretrained(folder / "learned positions")
    return {path.name: chat.load(path) for path in folder.iterdir()}


def test_the_library_answers_what_was_learned_and_stops(talk: Chat) -> None:
    for question, answer in [("Who are you?", "Bo."), ("一加一？", "二。"), ("Smile.", "😀!")]:
        reply = talk.reply([{"role": "user", "content": question}], temperature=0)
        assert (reply.text, reply.stopped_by) == (answer, "stop")
        assert reply.token_ids[-1] in talk.renderer.template.stop_ids


def test_side_by_side_gives_the_replies_of_one_by_one(talk: Chat) -> None:
    talks = [[Message("user", text)] for text in ("Who are you?", "Say hi.", "A much longer question than the others?")]
    alone = [talk.reply(messages, temperature=0, max_tokens=24) for messages in talks]
    assert talk.replies(talks, temperature=0, max_tokens=24) == alone
    assert len({reply.prompt_ids for reply in alone}) == 3
    assert talk.replies([]) == []


def test_what_is_written_side_by_side_is_counted(talk: Chat) -> None:
    counts: list[tuple[int, int]] = []
    talks = [[Message("user", text)] for text in ("Who are you?", "一加一？")]
    written = talk.replies(talks, temperature=0, max_tokens=24, on_written=lambda *n: counts.append(n))
    first, second = sorted(len(reply.token_ids) for reply in written)
    assert [reply.text for reply in written] == ["Bo.", "二。"] and first < second
    steps = [((n >= first) + (n >= second), min(n, first) + n) for n in range(1, second + 1)]
    assert counts == [*steps, steps[-1]]


@pytest.mark.parametrize("kind", ["llama", "learned positions", "dynamic", "longrope"])
@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])
@given(lengths=st.lists(st.integers(1, 52), min_size=1, max_size=3))
def test_each_of_a_group_gets_the_reply_that_it_gets_alone_however_near_the_end_of_the_context(
    short_context: dict[str, Chat], kind: str, lengths: list[int]
) -> None:
    asked = short_context[kind]
    talks = [[Message("user", chr(97 + number) * length)] for number, length in enumerate([52, 1, 33, *lengths])]
    alone = [asked.reply(messages, temperature=0, max_tokens=40) for messages in talks]
    assert asked.replies(talks, temperature=0, max_tokens=40) == alone
    assert len({asked.context - len(reply.prompt_ids) < 40 for reply in alone}) == 2


def test_a_long_question_does_not_cut_the_answers_to_short_ones(talk: Chat) -> None:
    for question, answer in [("Who are you?", "Bo."), ("一加一？", "二。")]:
        room = talk.context - len(talk.prompt_ids([Message("user", "")]))
        short, long = talk.replies([[Message("user", question)], [Message("user", "x" * (room - 2))]], temperature=0)
        assert (short.text, short.stopped_by) == (answer, "stop")
        assert len(long.token_ids) <= 2


def test_what_lies_side_by_side_is_bounded_in_tokens(talk: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "TOKENS_SIDE_BY_SIDE", 400)
    for lengths, most in [([30] * 40, 40), ([10, 200, 20, 180, 30], 20), ([500, 490], 100), ([500, 500], 12)]:
        groups = list(talk._side_by_side(lengths, most))
        assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
        for group in groups:
            longest = max(lengths[number] for number in group)
            assert len(group) == 1 or len(group) * min(longest + most, talk.context) <= 400


def test_streamed_pieces_are_whole_characters_and_join_to_the_reply(talk: Chat) -> None:
    for question in ("一加一？", "Smile."):
        pieces: list[str] = []
        reply = talk.reply([{"role": "user", "content": question}], temperature=0, on_text=pieces.append)
        assert "".join(pieces) == reply.text
        assert "\ufffd" not in "".join(pieces)


def test_base_switches_the_adapter_off_for_one_reply(talk: Chat, tiny_model: Path) -> None:
    question = [{"role": "user", "content": "Who are you?"}]
    tuned = talk.reply(question, temperature=0, max_tokens=8)
    base = talk.reply(question, temperature=0, max_tokens=8, base=True)
    prompt = torch.tensor([base.prompt_ids])
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 258, "pad_token_id": 256}
    expected = plain.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)
    assert base.token_ids == tuple(expected[0, prompt.shape[1] :].tolist())
    assert base.token_ids != tuned.token_ids
    assert talk.reply(question, temperature=0, max_tokens=8) == tuned


def test_a_reply_that_meets_its_limit_says_so(talk: Chat) -> None:
    reply = talk.reply([{"role": "user", "content": "Who are you?"}], temperature=0, max_tokens=2)
    assert (len(reply.token_ids), reply.stopped_by) == (2, "length")


def test_sampling_follows_the_models_generation_config_and_zero_is_greedy(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    config = {"do_sample": True, "temperature": 5.0, "eos_token_id": 258, "pad_token_id": 256}
    (folder / "generation_config.json").write_text(json.dumps(config))
    loaded = chat.load(folder)
    question = [{"role": "user", "content": "Hi"}]
    torch.manual_seed(1)
    sampled = {loaded.reply(question, max_tokens=8).token_ids for _ in range(4)}
    greedy = {loaded.reply(question, max_tokens=8, temperature=0).token_ids for _ in range(2)}
    assert len(sampled) > 1
    assert len(greedy) == 1


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "assistant", "content": "x"}],
        [{"role": "robot", "content": "x"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": "\ud83d"}],
    ],
)
def test_what_is_no_conversation_is_refused(talk: Chat, messages: list[object]) -> None:
    with pytest.raises(DataError):
        talk.reply(messages)  # type: ignore[arg-type]


def test_a_prompt_longer_than_the_model_can_read_is_refused(talk: Chat) -> None:
    with pytest.raises(DataError, match=r"\d+ tokens"):
        talk.reply([{"role": "user", "content": "x" * 600}])


def test_a_run_with_another_base_or_template_is_refused(run: Run, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    (copy / "adapter" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|im_end|>{{ 1 }}")
    with pytest.raises(TunesmithError):
        chat.load(copy)
    shutil.copy(run.adapter / "chat_template.jinja", copy / "adapter")
    manifest = json.loads((copy / "manifest.json").read_text())
    other = save_tiny_model(tmp_path / "other", hidden_size=32)
    (copy / "manifest.json").write_text(json.dumps({**manifest, "base": {**manifest["base"], "folder": str(other)}}))
    with pytest.raises(ProofError, match="config"):
        chat.load(copy)


def test_a_folder_that_is_no_run_and_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        chat.load(tmp_path)


def test_prompt_with_json_prints_one_object(run: Run) -> None:
    ended = tunesmith("chat", run.path, "--prompt", "Who are you?", "--temperature", "0", "--json")
    assert ended.code == 0, ended.err
    assert set(ended.json) == {"reply", "prompt_ids", "token_ids", "stopped_by"}
    assert ended.json["reply"] == "Bo."
    assert ended.json["stopped_by"] == "stop"


def test_commands_at_the_prompt_and_saved_talk_is_training_data(run: Run, tmp_path: Path) -> None:
    saved = tmp_path / "talk.jsonl"
    lines = ["/help", "Who are you?", f"/save {saved}", "/reset", "/system Be brief.", "/base", "/tuned", "Smile."]
    lines += [f"/save {saved}", "/quit", "never read"]
    said = finished(start("chat", run.path, "--temperature", "0", typed="\n".join(lines)))
    assert said.code == 0, said.err
    assert said.out.splitlines()[0] == "Bo."
    assert "never read" not in said.out + said.err
    first, second = records.open_file(saved).rows()
    assert [m.content for m in first.messages] == ["Who are you?", "Bo."]
    assert [m.role for m in second.messages] == ["system", "user", "assistant"]


def test_answers_are_never_saved_under_a_system_text_that_came_after_them(run: Run, tmp_path: Path) -> None:
    saved = tmp_path / "talk.jsonl"
    lines = ["Who are you?", "/system Be brief.", f"/save {saved}", "Smile.", f"/save {saved}", "/system", "/quit"]
    said = finished(start("chat", run.path, "--temperature", "0", typed="\n".join(lines)))
    assert said.code == 0, said.err
    (conversation,) = records.open_file(saved).rows()
    assert [(m.role, m.content) for m in conversation.messages[:2]] == [("system", "Be brief."), ("user", "Smile.")]
    assert "a new conversation begins" in said.err


class Terminal:
    """The chat in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.fd, theirs = os.openpty()
        look = {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
        self.process = start(*arguments, streams=(theirs,) * 3, program=SESSION, **look)
        os.close(theirs)
        self.seen = ""

    def wait_for(self, pattern: str, seconds: float = 90) -> str:
        """Reads until the pattern stands in what was printed since the last call."""
        until, start = time.monotonic() + seconds, len(self.seen)
        while time.monotonic() < until:
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    piece = os.read(self.fd, 65536).decode("utf-8", "replace")
                except OSError:
                    break
                if "\x1b[6n" in piece:  # a terminal answers where its cursor is
                    os.write(self.fd, b"\x1b[1;1R")
                self.seen += piece
            if re.search(pattern, self.seen[start:]):
                return self.seen[start:]
        raise AssertionError(f"{pattern!r} not in {self.seen[start:]!r}")

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def exit_code(self) -> int:
        return self.process.wait(60)


def test_several_pasted_lines_are_one_turn(run: Run, tmp_path: Path) -> None:
    terminal = Terminal("chat", str(run.path), "--temperature", "0", "--max-tokens", "4")
    terminal.wait_for("you.*›")
    terminal.type("\x1b[200~one\ntwo\nthree\x1b[201~")
    terminal.wait_for("three")
    terminal.type("\r")
    terminal.wait_for("you.*›")
    terminal.type(f"/save {tmp_path / 'pasted.jsonl'}\r")
    terminal.wait_for("Added|Usage")
    terminal.type("/quit\r")
    assert terminal.exit_code() == 0
    (conversation,) = records.open_file(tmp_path / "pasted.jsonl").rows()
    assert conversation.messages[0].content == "one\ntwo\nthree"


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    endless = save_tiny_model(tmp_path / "model", max_position_embeddings=200_000, eos_token_id=257)
    terminal = Terminal("chat", str(endless), "--temperature", "0", "--max-tokens", "100000")
    terminal.wait_for("you.*›")
    terminal.type("Go on for ever.\r")
    time.sleep(2)  # it writes now
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("Stopped")
    terminal.wait_for("you.*›", 20)
    terminal.type("/quit\r")
    assert terminal.exit_code() == 0
