"""Fifty-five faults of five tutorials, and why none of them can happen here: docs/tutorial-faults.md names for each the
test that would see it. Those that no other file tests are tested here; each docstring says which.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from conftest import CHATML, FAMILIES, ROOT, SHARED, byte_tokenizer, needs_shared, save_tiny_model, tunesmith
from tunesmith import chat, hub, recipe
from tunesmith import models as model
from tunesmith.data.render import Renderer
from tunesmith.data.template import probe
from tunesmith.engine.batch import pad
from tunesmith.engine.hf.losses import summed_loss
from tunesmith.engine.trie import lay_out
from tunesmith.errors import DataError, RecipeError
from tunesmith.models import open_renderer
from tunesmith.recipe import ModelSettings, TemplateSettings
from tunesmith.runs import rundir
from tunesmith.training.checking import check
from tunesmith.training.run import Run, train
from tunesmith.training.trainer import StepTrainer
from tunesmith.types import Conversation, Message, Origin, Rendered

CPU = torch.device("cpu")

END_OF_TEXT, START, END = 256, 257, 258
QUICK = {"lora.dropout": 0.0, "eval.hold_out": 0, "train.examples_per_step": 4, "train.learning_rate": 1e-2}


def settings(model: Path, data: Path, **flags: Any) -> recipe.Recipe:
    return recipe.resolve(None, {"model.name": str(model), "data.path": str(data), **QUICK, **flags})[0]


def write_rows(path: Path, *pairs: tuple[str, str]) -> Path:
    path.write_text("".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in pairs), encoding="utf-8")
    return path


def talk(*contents: str, system: str | None = None) -> Conversation:
    turns = [Message("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
    first = [] if system is None else [Message("system", system)]
    return Conversation((*first, *turns), Origin("rows.jsonl", 1))


def document(token_ids: list[int], *replies: tuple[int, int]) -> Rendered:
    return Rendered(tuple(token_ids), replies, Origin("rows.jsonl", 1))


@functools.cache
def renderer(family: str) -> Renderer:
    return open_renderer(hub.locate(str(SHARED / "models" / family), weights=False), TemplateSettings())


def changed(folder: Path, name: str, amend: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / name
    path.write_text(json.dumps(amend(json.loads(path.read_text()))))


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twenty rows, two held out, a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("faults")
    data = write_rows(folder / "rows.jsonl", *((f"What is {i}?", f"It is {i}.") for i in range(20)))
    flags = {"eval.hold_out": 0.1, "train.epochs": 2, "train.save_every": "5 steps", "train.seed": 7, "lora.r": 5}
    return train(settings(tiny_model, data, **flags), folder / "run")


# --- what is trained and saved ----------------------------------------------------------------------------------------


def test_only_the_adapter_is_trained_and_only_it_is_saved(run: Run, tiny_model: Path) -> None:
    """Fault 1: without get_peft_model the whole model is trained, and what is saved can not be loaded as an adapter."""
    saved = load_file(run.adapter / "adapter_model.safetensors")
    assert {"lora_A" in name or "lora_B" in name for name in saved} == {True}
    checked = check(recipe.resolve(run.path / "recipe.yaml")[0])
    assert sum(tensor.numel() for tensor in saved.values()) == sum(target.parameters for target in checked.targets)
    assert PeftConfig.from_pretrained(str(run.adapter)).peft_type == "LORA"
    before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    talk = chat.load(run.path)
    assert isinstance(talk.model, PeftModel)
    after = talk.model.unload().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_every_lora_b_moves_when_layers_are_recomputed_and_when_not(
    recompute: str, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    """Fault 4: recomputing layers over a frozen embedding once left the adapter without a gradient."""
    finished = train(settings(tiny_model, rows, **{"engine.recompute_layers": recompute}), tmp_path / "run")
    saved = load_file(finished.adapter / "adapter_model.safetensors")
    moved = {name: bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name}
    assert len(moved) == 14  # seven names in two layers
    assert all(moved.values())


def test_the_rank_is_the_one_asked_for_and_is_written_down(run: Run) -> None:
    """Fault 10: a comment swallowed `r=8`, and peft's default was taken in silence."""
    assert PeftConfig.from_pretrained(str(run.adapter)).to_dict()["r"] == 5
    saved = load_file(run.adapter / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in saved.items() if "lora_A" in name} == {5}
    assert "\n  r: 5  # " in (run.path / "recipe.yaml").read_text()


def test_a_checkpoint_holds_a_whole_adapter_and_the_optimizer(run: Run, tiny_model: Path) -> None:
    """Fault 42: checkpoints without adapter_config.json can not be resumed or loaded."""
    checkpoint = run.path / "checkpoints" / "step-000005"
    assert (checkpoint / "adapter" / "adapter_config.json").is_file()
    base = model.load_base(hub.locate(str(tiny_model)), ModelSettings())
    assert isinstance(model.load_adapter(base, checkpoint / "adapter"), PeftModel)
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert len(state["state"]) == 28
    assert (checkpoint / "scheduler.pt").is_file()


def test_seed_hold_out_and_every_row_are_recorded_and_the_adapter_is_saved(run: Run) -> None:
    """Fault 16: no evaluation split, no seed, and a checkpoint in the place of the final adapter."""
    assert json.loads((run.path / "manifest.json").read_text())["seed"] == 7
    states = [line["state"] for line in rundir.read_lines(run.path / "ledger.jsonl")]
    assert (states.count("trained"), states.count("held_out"), len(states)) == (18, 2, 20)
    assert run.held_out_loss is not None
    assert run.held_out_loss[1] < run.held_out_loss[0]
    last = load_file(run.adapter / "adapter_model.safetensors")
    earlier = load_file(run.path / "checkpoints" / "step-000005" / "adapter" / "adapter_model.safetensors")
    assert any(not torch.equal(last[name], earlier[name]) for name in last)


def test_steps_follow_from_rows_and_epochs(run: Run) -> None:
    """Fault 41: 120,000 steps asked for were 515 epochs. Here epochs are asked for, or chosen and said."""
    assert run.steps == math.ceil(18 / 4) * 2
    assert recipe.Recipe().train.epochs == "auto"


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_of_one_step_learns_something(epochs: int, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    """The warm-up of a very short run must not eat its only step: the learning rate begins at 0."""
    finished = train(settings(tiny_model, rows, **{"train.epochs": epochs}), tmp_path / "run")
    assert finished.steps == epochs
    chat.load(finished.path)  # refuses an adapter that changes nothing
    rates = [line["learning_rate"] for line in rundir.read_lines(finished.path / "metrics.jsonl")]
    assert max(rates) == pytest.approx(1e-2)


def test_what_is_overridden_has_trainers_own_signature() -> None:
    """Fault 34: a compute_loss without num_items_in_batch is a TypeError in today's Trainer."""
    ours = StepTrainer
    overridden = [name for name in vars(ours) if callable(getattr(ours, name)) and hasattr(Trainer, name)]
    assert {"training_step", "get_batch_samples", "get_train_dataloader"} <= set(overridden)
    assert "compute_loss" not in overridden
    for name in set(overridden) - {"__init__"}:
        parameters = [list(inspect.signature(getattr(cls, name)).parameters) for cls in (ours, Trainer)]
        assert parameters[0] == parameters[1], name


def test_the_default_precision_is_never_half(tiny_model: Path) -> None:
    """Faults 43 and 54: fp16 weights without loss scaling overflow. Fault 13: `torch.bfolat` is no dtype."""
    base = model.load_base(hub.locate(str(tiny_model)), ModelSettings())
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16 if torch.cuda.is_available() else torch.float32}
    assert ModelSettings().dtype == "auto"
    with pytest.raises(RecipeError, match="bfolat"):
        recipe.resolve(None, {"model.dtype": "bfolat"})


# --- what is learned --------------------------------------------------------------------------------------------------


def test_the_prompts_last_token_is_never_learned() -> None:
    """Fault 35: labels one position too early taught the model to write the colon of its own prompt."""
    one, two = document([10, 11, 12, 13, 14, 15], (3, 5)), document([20, 21, 22, 23, 24, 25, 26], (1, 3), (5, 7))
    batch = pad([one, two], CPU)
    # The longer row first or not, targets stand in the order of the positions that predict them.
    positions = batch.predict_from.nonzero().tolist()
    assert [batch.input_ids[row, at].item() for row, at in positions] == [12, 13, 20, 21, 24, 25]
    assert batch.labels.target.tolist() == [13, 14, 21, 22, 25, 26]
    tree = lay_out([one, two])
    assert [(tree.token_ids[at], target) for at, target, _ in tree.pairs] == [
        (12, 13), (13, 14), (20, 21), (21, 22), (24, 25), (25, 26)
    ]  # fmt: skip
    assert one.supervised == (False, False, False, True, True, False)


def test_a_document_has_one_flag_per_token_and_a_batch_one_mask_per_id() -> None:
    """Fault 28: an attention mask one longer than its ids went through collator and model unseen."""
    rendered = document([1, 2, 3, 4], (2, 4))
    assert len(rendered.supervised) == len(rendered.token_ids)
    batch = pad([rendered, document([5, 6], (1, 2))], CPU)
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.predict_from.shape == (2, 3)
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    for wrong in ((0, 2), (2, 5), (3, 3)):  # nothing predicts token 0; behind the end; empty
        with pytest.raises(ValueError, match="reply span"):
            document([1, 2, 3, 4], wrong)
    with pytest.raises(ValueError, match="nothing to learn"):
        document([1, 2, 3, 4])


@pytest.mark.parametrize("pad_token", ["<|im_end|>", "<|endoftext|>", None])
def test_a_pad_token_that_ends_replies_does_not_blank_the_end_marker(pad_token: str | None) -> None:
    """Faults 7, 8, 18 and 47: labels made from pad_token_id lose the end marker, or teach to write padding."""
    tokenizer = byte_tokenizer(None)
    tokenizer.pad_token = pad_token
    here = Renderer(probe(tokenizer, CHATML, "test"))
    rows = [talk("Hi", "Yes."), talk("Hi there, who are you?", "I am Bo.")]
    documents = [row for conversation in rows for row in here.render(conversation)]
    targets = pad(documents, CPU).labels.target.tolist()
    assert targets.count(END) == 2
    assert END_OF_TEXT not in targets
    assert len(targets) == len(b"Yes." + b"I am Bo.") + 2


def test_a_tokenizer_without_pad_token_trains(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    """Fault 18: the misspelt `tokenizer.eos_toke` was there for a pad token that nothing here needs."""
    bare = save_tiny_model(tmp_path / "bare", pad_token_id=None)
    changed(bare, "tokenizer_config.json", lambda config: {k: v for k, v in config.items() if k != "pad_token"})
    assert model.load_tokenizer(bare).pad_token is None
    assert train(settings(bare, rows), tmp_path / "a").final_loss == pytest.approx(
        train(settings(tiny_model, rows), tmp_path / "b").final_loss, abs=0
    )


def test_padding_changes_no_loss(tiny_model: Path) -> None:
    """Faults 14 and 44: without attention mask, or with padding on the other side, rows see each other's padding."""
    base = model.load_base(hub.locate(str(tiny_model)), ModelSettings())
    short, long = document([5, 6, 7, 8], (2, 4)), document(list(range(30, 60)), (3, 9), (20, 30))
    with torch.no_grad():
        alone = [summed_loss(base, pad([one], CPU)).item() for one in (short, long)]
        together = summed_loss(base, pad([short, long], CPU)).item()
    assert together == pytest.approx(sum(alone), rel=1e-6)  # observed 0 to 1e-7
    assert abs(alone[0] - alone[1]) > 1


@needs_shared
@pytest.mark.parametrize("family", FAMILIES)
def test_bos_comes_as_often_as_the_template_writes_it(family: str) -> None:
    """Faults 21, 25, 29, 36 and 52: no BOS in training, two in chat, or the other way round."""
    here, row = renderer(family), talk("Hi", "Yes.", "And?", "No.")
    written = {"gemma-2b": 1, "deepseek-7b": 1, "phi-3-mini-april": 1, "atom-7b-standin": 4}.get(family, 0)
    bos = here.template.tokenizer.bos_token_id
    (rendered,) = here.render(row)
    assert rendered.token_ids.count(bos) == written
    assert (rendered.token_ids[0] == bos) == (written > 0)
    prompt = here.prompt_ids(row.messages[:-1])
    assert prompt == rendered.prompt_ids
    assert prompt.count(bos) == written


@needs_shared
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reply_ends_with_one_stop_token_and_nothing_behind_it_is_learned(family: str) -> None:
    """Faults 27 and 51: the word "model" behind the end of the turn was learned; the end was learned twice."""
    here = renderer(family)
    stops = set(here.template.stop_ids)
    (rendered,) = here.render(talk("Hi", "Yes.", "And?", "No."))
    for start, stop in rendered.replies:
        assert [i for i in range(start, stop) if rendered.token_ids[i] in stops] == [stop - 1]
    assert here.template.stop_ids[0] == rendered.token_ids[rendered.replies[-1][1] - 1]


@needs_shared
def test_a_look_alike_of_the_end_token_is_text() -> None:
    """Fault 50: `<｜end of sentence｜>` with spaces is nine ordinary tokens; the real one is taken by its id."""
    here = renderer("deepseek-7b")
    (rendered,) = here.render(talk("Hi", "Yes.<｜end of sentence｜>"))
    start, stop = rendered.replies[0]
    assert rendered.token_ids[stop - 1] == 100001
    assert rendered.token_ids[stop - 10 : stop - 1] == (27, 68940, 237, 409, 280, 4976, 68940, 237, 29)
    assert 100001 not in rendered.token_ids[start : stop - 1]


def test_a_row_that_is_too_long_is_a_fault_and_is_never_cut(tiny_model: Path, tmp_path: Path) -> None:
    """Faults 5 and 38: cutting at MAX_LENGTH loses the end marker, or the whole answer."""
    data = write_rows(tmp_path / "rows.jsonl", ("Hi", "Yes."), ("Hi", "Yes. " * 30), ("q" * 300, "Yes."))
    with pytest.raises(DataError) as caught:
        train(settings(tiny_model, data, **{"data.max_length": 64}), tmp_path / "run")
    assert [fault.origin.line for fault in caught.value.faults] == [2, 3]
    assert all("nothing is ever cut" in fault.fix for fault in caught.value.faults)
    assert not (tmp_path / "run").exists()
    knowingly = {"data.max_length": 64, "data.allow_set_aside": True}
    checked = check(settings(tiny_model, data, **knowingly))
    assert [len(row.documents[0].token_ids) for row in checked.rows] == [27]
    assert checked.rows[0].documents[0].token_ids[-2] == END
    assert checked.n_set_aside == 2


# --- data and settings ------------------------------------------------------------------------------------------------


def test_instruction_and_input_do_not_melt_into_each_other(tiny_model: Path, tmp_path: Path) -> None:
    """Fault 6: "…the answer.What is 1+1?"."""
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"instruction": "Answer.", "input": "What is 1+1?", "output": "2"}) + "\n")
    (row,) = check(settings(tiny_model, data)).rows
    assert row.conversation.messages[0].content == "Answer.\nWhat is 1+1?"


def test_a_misspelt_field_is_a_fault_that_names_the_right_one(tiny_model: Path, tmp_path: Path) -> None:
    """Fault 15: "instrution" in the sample file, a KeyError in the code."""
    data = tmp_path / "rows.jsonl"
    data.write_text('{"instrution": "Who are you?", "input": "", "output": "Bo"}\n')
    checked = check(settings(tiny_model, data))
    (fault,) = checked.faults
    assert not checked.ok
    assert "instrution" in str(fault)
    assert "data.columns.instruction" in fault.fix


def test_a_misspelt_setting_is_an_error_that_names_the_right_one() -> None:
    """Fault 33: `check_point` for `checkpoint`, found only when it is read."""
    with pytest.raises(RecipeError, match=r"train\.keep_checkpoints"):
        recipe.resolve(None, {"train.keep_check_points": 2})


def test_a_comment_in_a_recipe_is_a_comment(tmp_path: Path) -> None:
    """Fault 39: comments behind the backslashes of train.sh cut the command in two."""
    path = tmp_path / "recipe.yaml"
    path.write_text("lora:\n  r: 16  # rank\n  # alpha: 64\ntrain:\n  epochs: 2 # twice\n")
    read, _ = recipe.resolve(path)
    assert (read.lora.r, read.lora.alpha, read.train.epochs) == (16, 32, 2)


def test_the_versions_asked_for_exist_and_are_the_ones_tested() -> None:
    """Faults 24 and 40: pins that were never released, and packages that nothing uses."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.M | re.S)
    assert block is not None
    asked = [Requirement(found) for found in re.findall(r'^ *"([^"]+)"', block[1], re.M)]
    assert len(asked) >= 15
    for requirement in asked:
        assert requirement.specifier.contains(importlib.metadata.version(requirement.name)), requirement


# --- chat -------------------------------------------------------------------------------------------------------------


def spied(talk: chat.Chat, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `generate` is called with from now on."""
    calls: list[dict[str, Any]] = []
    generate: Any = talk.model.generate

    def spy(**arguments: Any) -> Any:
        calls.append(arguments)
        return generate(**arguments)

    monkeypatch.setattr(talk.model, "generate", spy, raising=False)
    return calls


def test_generation_gets_the_attention_mask_and_every_stop_id(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults 14 and 20: no attention mask with pad == eos; `eos_token_id=` in the place of the model's three."""
    folder = save_tiny_model(tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 65]}))
    talk = chat.load(folder)
    calls = spied(talk, monkeypatch)
    talk.reply([{"role": "user", "content": "Hi"}], temperature=0, max_tokens=3)
    (call,) = calls
    assert call["attention_mask"].shape == call["input_ids"].shape
    assert bool(call["attention_mask"].all())
    assert call["generation_config"].eos_token_id == [END, 256, 65]


@pytest.mark.parametrize("stop", [END, END_OF_TEXT, 65])
def test_generation_stops_at_whichever_stop_id_comes(stop: int, tmp_path: Path) -> None:
    """Fault 20: the end of the turn did not stop the model, and pages of noise followed the answer."""
    folder = save_tiny_model(tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 65]}))
    talk = chat.load(folder)
    always = torch.zeros(259)
    always[stop] = 1e6
    head: Any = talk.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, logits: logits + always)
    reply = talk.reply([{"role": "user", "content": "Hi"}], temperature=0, max_tokens=9)
    assert (reply.token_ids, reply.stopped_by, reply.text) == ((stop,), "stop", "")


def test_temperature_0_is_greedy_and_the_limit_counts_the_reply_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults 49 and 55: `max_length` counts the prompt, `do_sample=True, top_k=1` is greedy in disguise."""
    folder = save_tiny_model(tmp_path / "m", eos_token_id=None)
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 20}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    talk = chat.load(folder)
    calls = spied(talk, monkeypatch)
    question = [{"role": "user", "content": "A question that is much longer than twenty tokens"}]
    replies = [talk.reply(question, temperature=0, max_tokens=7) for _ in range(2)]  # type: ignore[arg-type]
    assert replies[0] == replies[1]
    assert len(replies[0].token_ids) == 7
    assert [call["generation_config"].do_sample for call in calls] == [False, False]
    torch.manual_seed(0)
    talk.reply(question, max_tokens=3)  # type: ignore[arg-type]
    assert calls[-1]["generation_config"].do_sample
    assert calls[-1]["generation_config"].temperature == 0.6


def test_an_answer_is_the_answer_alone(run: Run) -> None:
    """Fault 55: the prompt was printed with the answer."""
    ended = tunesmith("chat", run.path, "--prompt", "What is 3?", "--temperature", "0", "--max-tokens", "20", "--json")
    assert ended.code == 0, ended.err
    assert "What is 3?" not in ended.json["reply"]
    assert "assistant" not in ended.json["reply"]
    decoded = byte_tokenizer().decode(ended.json["token_ids"], skip_special_tokens=True)
    assert ended.json["reply"] == str(decoded).strip()


def test_the_card_says_base_licence_template_and_stop_ids(run: Run) -> None:
    """Fault 31: a re-upload of unknown origin, its licence not mentioned."""
    card = (run.adapter / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "peft"
    assert "base_model" not in front  # a folder is no hub's id
    assert "trained with tunesmith on 18 rows" in card
    assert "258 `<|im_end|>`" in card
    assert all(alias.licence for alias in hub.aliases().values())


# --- the table --------------------------------------------------------------------------------------------------------

TABLE = ROOT / "docs" / "tutorial-faults.md"


def lines_of_the_table() -> list[list[str]]:
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if re.match(r"\| *\d+ *\|", line)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]] for line in lines]


def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def named_tests(text: str) -> list[tuple[str, str]]:
    return re.findall(r"`(test_\w+\.py)::(\w+)`", text)


def test_the_table_has_every_fault_and_every_test_that_it_names_exists() -> None:
    lines = lines_of_the_table()
    assert [int(line[0]) for line in lines] == list(range(1, 56))
    for number, fault, guard, proof in lines:
        assert fault and guard, number
        named = named_tests(proof)
        assert named or proof.startswith("No test: "), f"fault {number} has neither a test nor a reason"
        for file, name in named:
            assert name in functions_of(file), f"fault {number}: {file} has no {name}"
    assert sum(proof.startswith("No test: ") for *_, proof in lines) <= 3


def test_every_test_here_stands_in_the_table_and_says_its_fault() -> None:
    """A test whose docstring names fault 5 is named in line 5."""
    by_number = {int(line[0]): line[3] for line in lines_of_the_table()}
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            said = re.findall(r"Faults? ((?:\d+(?:, | and )?)+)", ast.get_docstring(node) or "")
            for number in re.findall(r"\d+", " ".join(said)):
                assert f"test_tutorial_faults.py::{node.name}`" in by_number[int(number)], f"fault {number}"


def test_a_test_that_does_not_exist_would_be_seen() -> None:
    """Negative control."""
    assert named_tests("`test_golden.py::test_nothing`") == [("test_golden.py", "test_nothing")]
    assert "test_nothing" not in functions_of("test_golden.py")
    assert "test_every_golden_case_matches" in functions_of("test_golden.py")
