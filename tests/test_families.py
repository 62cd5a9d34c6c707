"""Six real tokenizers and architectures through the whole line: trained by the command line until they know four rows,
then asked by everything that can ask them. The same tokens everywhere, or an answer would be wrong.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from conftest import SHORT, cases, finished, needs_shared, start, tunesmith
from trained_families import FOLDS, ROWS, Trained
from tunesmith import chat, recipe
from tunesmith.training.checking import check

pytestmark = needs_shared


@pytest.fixture(scope="module")
def talk(trained: Trained) -> chat.Chat:
    return chat.load(trained.run)


def test_four_rows_are_learned_and_answered_word_for_word(trained: Trained, talk: chat.Chat) -> None:
    assert trained.said["rows"] == {"trained": 4, "held_out": 0, "set_aside": 0}
    assert trained.said["final_loss"] < 0.5  # observed 0.01 to 0.07, and 15 to 25 before training
    replies = {question: ask(talk, question) for question in ROWS}
    assert {question: reply.text for question, reply in replies.items()} == ROWS
    assert {reply.stopped_by for reply in replies.values()} == {"stop"}
    unknown = [ask(talk, question, base=True).text for question in ROWS]
    assert not set(unknown) & set(ROWS.values())  # the base alone knows none of it


def ask(talk: chat.Chat, question: str, *, base: bool = False) -> chat.Reply:
    return talk.reply([{"role": "user", "content": question}], temperature=0, max_tokens=40, base=base)


def test_chat_is_given_and_writes_exactly_the_trained_tokens(trained: Trained, talk: chat.Chat) -> None:
    flags = {"model.name": str(trained.base), "data.path": str(trained.data), "template.system": trained.system}
    checked = check(recipe.resolve(None, flags)[0])
    saved = AutoTokenizer.from_pretrained(trained.run / "adapter")
    assert talk.renderer.template.folds_system == (trained.family in FOLDS)
    for row, question in zip(checked.rows, ROWS, strict=True):
        (document,) = row.documents
        start, stop = document.replies[-1]
        reply = ask(talk, question)
        assert reply.prompt_ids == document.prompt_ids
        assert reply.token_ids == document.token_ids[start:stop]
        plain = saved.apply_chat_template(messages(trained, question), add_generation_prompt=True, return_dict=False)
        assert tuple(plain) == document.prompt_ids


def test_the_command_line_answers_the_same_and_stops_by_itself(trained: Trained, talk: chat.Chat) -> None:
    question = "你是谁？"
    ended = tunesmith("chat", trained.run, "--prompt", question, "--temperature", "0", "--json")
    assert ended.code == 0, ended.err
    reply = ask(talk, question)
    assert ended.json == {
        "reply": ROWS[question],
        "prompt_ids": list(reply.prompt_ids),
        "token_ids": list(reply.token_ids),
        "stopped_by": "stop",
    }


def messages(trained: Trained, question: str) -> list[dict[str, str]]:
    """As a program without tunesmith has to write them."""
    if trained.system is None:
        return [{"role": "user", "content": question}]
    if trained.family in FOLDS:
        return [{"role": "user", "content": f"{trained.system}\n\n{question}"}]
    return [{"role": "system", "content": trained.system}, {"role": "user", "content": question}]


def test_plain_transformers_and_peft_answer_the_same(trained: Trained) -> None:
    adapter = trained.run / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    greedy = GenerationConfig.from_pretrained(adapter, do_sample=False, max_new_tokens=40)
    for question, answer in ROWS.items():
        prompt = tokenizer.apply_chat_template(
            messages(trained, question), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        reply = model.generate(**prompt, generation_config=greedy)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(reply, skip_special_tokens=True).strip() == answer
        assert reply[-1].item() in greedy.eos_token_id


@pytest.mark.parametrize("trained", cases(["gemma-2b", "atom-7b-standin", *SHORT], SHORT.__contains__), indirect=True)
def test_the_script_beside_the_adapter_prints_the_same(trained: Trained) -> None:
    """A template that folds the system text, one that the alias brings, and two others."""
    question = "How do you feel?"
    script = trained.run / "adapter" / "load_and_chat.py"
    asked = finished(start("--base", trained.base, question, program=script))
    assert (asked.code, asked.out) == (0, ROWS[question] + "\n"), asked.err


@pytest.mark.parametrize("trained", cases(["phi-4", "phi-3-mini"], SHORT.__contains__), indirect=True)
def test_the_script_beside_the_adapter_needs_nothing_of_ours(trained: Trained) -> None:
    question = "How do you feel?"
    script = trained.run / "adapter" / "load_and_chat.py"
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONIOENCODING": "utf-8", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), "--base", str(trained.base), question]
    fresh = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)
    assert fresh.returncode == 0, fresh.stderr
    assert fresh.stdout == ROWS[question] + "\n"
    compile(script.read_text(encoding="utf-8"), str(script), "exec")
    assert "tunesmith" not in script.read_text(encoding="utf-8")
