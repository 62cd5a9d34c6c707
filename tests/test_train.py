"""Training: a step's result, the run folder, interruption, and what must never be saved."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from conftest import largest
from plain import train_plainly
from tunesmith import chat, recipe
from tunesmith.engine.batch import pad
from tunesmith.engine.hf.losses import summed_loss
from tunesmith.errors import RecipeError, RunError
from tunesmith.runs import rundir
from tunesmith.training import rehearsed
from tunesmith.training import run as training
from tunesmith.training.checking import check, hold_out
from tunesmith.training.run import Run, train
from tunesmith.training.steps import Steps
from tunesmith.types import Message

CPU = torch.device("cpu")


def settings(model: Path, data: Path, **flags: Any) -> recipe.Recipe:
    quick = {"eval.hold_out": 0, "train.examples_per_step": 4, "train.learning_rate": 1e-2, "train.epochs": 3}
    quick |= {"lora.r": 8, "train.rehearse": 0}
    return recipe.resolve(None, {"model.name": str(model), "data.path": str(data), **quick, **flags})[0]


FLAGS = {"train.epochs": 3, "eval.hold_out": 0.1, "train.save_every": "5 steps", "train.keep_checkpoints": 2}


@pytest.fixture(scope="module")
def run(tiny_model: Path, talk: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with held-out rows and checkpoints, and replies as long as they are."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SAMPLE_TOKENS", rehearsed.ANSWER_TOKENS)
        return train(settings(tiny_model, talk, **FLAGS), out)


def test_losses_and_adapter_are_those_of_plain_transformers_and_peft(
    tiny_model: Path, talk: Path, tmp_path: Path
) -> None:
    two_epochs = settings(tiny_model, talk, **{"train.epochs": 2})
    ours = train(two_epochs, tmp_path / "run")
    losses = [line["loss"] for line in rundir.read_lines(ours.path / "metrics.jsonl")]
    expected, model = train_plainly(two_epochs)
    assert len(losses) == len(expected) == 20
    assert largest(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 2e-5  # observed 1.4e-6
    assert losses[-1] < losses[0] - 0.5  # observed 5.55 -> 4.86
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), ours.adapter
    )
    ours_state = {n: p for n, p in again.named_parameters() if "lora_" in n}
    plain_state = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert ours_state.keys() == plain_state.keys()
    worst = largest((ours_state[n] - plain_state[n]).abs().max().item() for n in plain_state)
    assert worst < 5e-6  # observed 5.4e-7, of weights up to 0.19


@pytest.mark.parametrize("budget", [1, 64, 100_000])
def test_how_a_step_is_cut_does_not_change_it(tiny_model: Path, talk: Path, tmp_path: Path, budget: int) -> None:
    whole = train(settings(tiny_model, talk), tmp_path / "whole")
    pieces = train(settings(tiny_model, talk, **{"engine.tokens_per_micro_batch": budget}), tmp_path / "cut")
    losses = [[line["loss"] for line in rundir.read_lines(r.path / "metrics.jsonl")] for r in (whole, pieces)]
    assert (
        largest(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4
    )  # observed 1.2e-5 after 30 steps of rate 1e-2


def test_recomputing_layers_does_not_change_a_step(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    kept = train(settings(tiny_model, talk), tmp_path / "kept")
    again = train(settings(tiny_model, talk, **{"engine.recompute_layers": "all"}), tmp_path / "again")
    losses = [[line["loss"] for line in rundir.read_lines(r.path / "metrics.jsonl")] for r in (kept, again)]
    assert largest(abs(a - b) for a, b in zip(*losses, strict=True)) < 2e-5  # observed 0.0


def test_a_wrong_denominator_would_be_seen(tiny_model: Path, talk: Path) -> None:
    """Negative control: the mean of micro-batch means differs from the step's mean by far more than the tolerance."""
    documents = [row.documents[0] for row in check(settings(tiny_model, talk)).rows[:4]]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        sums = [(summed_loss(model, pad([d], CPU)).item(), d.n_supervised) for d in documents]
    step = sum(s for s, _ in sums) / sum(n for _, n in sums)
    mean_of_means = sum(s / n for s, n in sums) / len(sums)
    assert abs(step - mean_of_means) > 1e-3  # observed 0.024


def test_data_order_is_a_pure_function_of_seed_epoch_and_digest() -> None:
    def order(seed: int, epoch: int, digest: str) -> list[int]:
        return Steps([None] * 50, 8, seed, digest).order(epoch)  # type: ignore[list-item]

    assert order(0, 1, "a") == order(0, 1, "a")
    assert sorted(order(0, 1, "a")) == list(range(50))
    assert len({tuple(order(*arguments)) for arguments in [(0, 1, "a"), (1, 1, "a"), (0, 2, "a"), (0, 1, "b")]}) == 4


def test_same_recipe_twice_gives_the_same_bytes(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    runs = [train(settings(tiny_model, talk, **{"lora.dropout": 0.1}), tmp_path / name) for name in "ab"]
    first, second = ((r.adapter / "adapter_model.safetensors").read_bytes() for r in runs)
    assert first == second


def test_the_run_folder_holds_what_the_contract_says(run: Run) -> None:
    names = {path.name for path in run.path.iterdir()}
    files = {"recipe.yaml", "manifest.json", "ledger.jsonl", "metrics.jsonl", "held_out.jsonl", "report.html"}
    kept = {"state.json", "held_out_rows.jsonl"}
    assert names == files | kept | {"checkpoints", "adapter"}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert adapter | {"README.md", "load_and_chat.py"} <= {path.name for path in run.adapter.iterdir()}
    lines = rundir.read_lines(run.path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 28))
    wanted = {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "supervised_tokens",
        "tokens",
        "seconds",
        "peak_memory_bytes",
    }
    assert all(set(line) == wanted for line in lines)
    assert [line["learning_rate"] for line in lines[:2]] == [0, pytest.approx(1e-2)]  # transformers warms up from 0
    assert [line["step"] for line in rundir.read_lines(run.path / "held_out.jsonl")] == [0, 9, 18, 27]


def test_a_run_is_its_owners_alone_but_for_the_adapter(run: Run) -> None:
    modes = {path: path.stat().st_mode & 0o777 for path in (run.path, *run.path.rglob("*"))}
    assert modes.pop(run.path) == 0o711  # others can pass, and can not list it
    for path, mode in modes.items():
        readable = path.relative_to(run.path).parts[0] == "adapter"
        assert mode == (0o755 if path.is_dir() else 0o644) & (0o777 if readable else 0o700), path


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_no_umask_changes_who_reads_a_run(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        run = rundir.create(tmp_path / "run")
        run.append(run.metrics, {"step": 1})
        rundir.write_json(run.manifest, {})
        for final in (run.adapter, run.checkpoint(1), run.path / "merged"):
            readers = {"adapter": "all", "merged": "as usual"}.get(final.name, "owner")
            with rundir.commit(final, readers=cast("Any", readers)) as folder:
                (folder / "sub").mkdir()
                (folder / "sub" / "x").touch(0o600)
    finally:
        os.umask(before)

    def mode(path: Path) -> int:
        return path.stat().st_mode & 0o777

    assert [mode(path) for path in (run.path, run.metrics, run.manifest)] == [0o711, 0o600, 0o600]
    for folder, expected in ((run.adapter, 0o755), (run.checkpoint(1), 0o700), (run.path / "merged", 0o777 & ~umask)):
        assert mode(folder) == mode(folder / "sub") == expected
        assert mode(folder / "sub" / "x") == mode(folder / "files.json") == expected & 0o666


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_somebody_else_reads_the_adapter_and_nothing_beside_it(run: Run) -> None:
    with tempfile.TemporaryDirectory() as shared:
        Path(shared).chmod(0o755)
        out = Path(shared) / "run"
        shutil.copytree(run.path, out)
        private = [out / name for name in ("ledger.jsonl", "report.html", "state.json", "recipe.yaml", "checkpoints")]
        child = os.fork()
        if not child:
            seen = []
            try:
                os.setuid(65534)
                for path in (out, *private, out / "adapter" / "adapter_model.safetensors", out / "adapter"):
                    with suppress(PermissionError):
                        seen += [(path.name, bool(os.listdir(path) if path.is_dir() else path.read_bytes()))]
                with suppress(RunError):
                    seen += [rundir.open_run(out)]
            finally:
                os._exit(0 if seen == [("adapter_model.safetensors", True), ("adapter", True)] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_check_of_another_recipe_is_refused(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    checked = check(settings(tiny_model, talk))
    other = settings(tiny_model, talk, **{"lora.r": 4, "train.epochs": 1})
    with pytest.raises(RecipeError, match=r"another lora\.r, train\.epochs"):
        train(other, tmp_path / "run", checked=checked)
    assert not (tmp_path / "run").exists()


def test_rows_read_are_trained_or_held_out_or_set_aside(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    data = tmp_path / "with-faults.jsonl"
    data.write_text(talk.read_text() + '{"instruction": "x"}\n{broken\n')
    flags = {"data.allow_set_aside": True, "eval.hold_out": 0.2}
    result = train(settings(tiny_model, data, **flags), tmp_path / "run")
    ledger = rundir.read_lines(result.path / "ledger.jsonl")
    states = [line["state"] for line in ledger]
    assert (states.count("trained"), states.count("held_out"), states.count("set_aside")) == (32, 8, 2)
    assert (result.rows_trained, result.rows_held_out, result.rows_set_aside) == (32, 8, 2)
    assert [line["line"] for line in ledger] == list(range(1, 43))
    assert "output" in ledger[40]["reason"]


def test_held_out_rows_are_never_trained_on(run: Run, tiny_model: Path, talk: Path) -> None:
    checked = check(settings(tiny_model, talk, **{"eval.hold_out": 0.1}))
    training, held_out = hold_out(checked)
    assert len(held_out) == 4 and len(training) == 36
    assert not set(training.lines) & set(held_out.lines)
    trained = [line["line"] for line in rundir.read_lines(run.path / "ledger.jsonl") if line["state"] == "trained"]
    assert trained == [row.conversation.origin.line for row in training]


def test_checkpoints_are_whole_and_thinned_out(run: Run) -> None:
    points = sorted((run.path / "checkpoints").iterdir())
    assert [point.name for point in points] == ["step-000025", "step-000027"]
    digests = json.loads((points[-1] / "files.json").read_text())
    state = {
        "trained.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "engine.json",
    }
    assert state | {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= set(digests)
    assert all(rundir.sha256(points[-1] / name) == entry["sha256"] for name, entry in digests.items())


def test_recipe_of_a_run_trains_it_again(run: Run, tiny_model: Path, talk: Path) -> None:
    again, sources = recipe.resolve(run.path / "recipe.yaml")
    assert again == settings(tiny_model, talk, **FLAGS)
    assert sources["lora.r"] == "file"


def test_saved_adapter_answers_like_the_live_one(run: Run) -> None:
    loaded = chat.load(run.path)
    talks: list[list[Message]] = [[Message("user", sample.question)] for sample in run.samples]
    replies = loaded.replies(talks, temperature=0, max_tokens=64)
    assert [reply.shown for reply in replies] == [sample.after for sample in run.samples]
    base = loaded.replies(talks, temperature=0, max_tokens=64, base=True)
    assert [reply.shown for reply in base] == [sample.before for sample in run.samples]
    assert [sample.before.endswith(" …") for sample in run.samples] == [r.stopped_by == "length" for r in base]
    assert any(reply.stopped_by == "length" for reply in base)


def test_questions_are_answered_before_and_after(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    asked = ["Who are you?", "你好吗？"]
    run = train(settings(tiny_model, talk, **{"train.epochs": 1}), tmp_path / "run", questions=asked)
    loaded = chat.load(run.path)
    talks: list[list[Message]] = [[Message("user", question)] for question in asked]
    for base, replies in zip((True, False), zip(*run.answers, strict=True), strict=True):
        assert list(replies) == loaded.replies(talks, temperature=0, max_tokens=training.SAMPLE_TOKENS, base=base)


@pytest.mark.parametrize("variant", ["rslora", "dora", "pissa"])
def test_every_variant_saves_an_adapter_for_the_unchanged_base(
    tiny_model: Path, talk: Path, tmp_path: Path, variant: str
) -> None:
    result = train(
        settings(tiny_model, talk, **{"lora.variant": variant, "train.learning_rate": 3e-3}), tmp_path / "run"
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    documents = [row.documents[0] for row in check(settings(tiny_model, talk)).rows[:8]]
    count = sum(document.n_supervised for document in documents)
    with torch.no_grad():
        before = summed_loss(base, pad(documents, CPU)).item() / count
        tuned = PeftModel.from_pretrained(base, result.adapter)
        after = summed_loss(tuned, pad(documents, CPU)).item() / count
    assert after < before - 0.3  # observed 5.55 -> 4.82 to 4.85
    assert abs(after - result.final_loss) < 0.3  # observed 0.04: other rows than those of the live model's last step


def test_the_report_is_one_page_without_outside_parts(run: Run) -> None:
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=|@import|url\(""", page)
    assert page.count("<svg") == 2 and page.count("<polyline") == 4  # loss twice, held-out, learning rate
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert page.count('class="tokens"') == 3
    for sample in run.samples:
        assert sample.question in page
    assert "40 read = 36 trained + 4 held out + 0 set aside" in page


def test_the_smoothed_curve_of_the_report_does_not_begin_at_the_first_value(run: Run) -> None:
    """Prevents a curve that takes the first loss for many; here it is worked out once more, from the drawn one."""
    page = (run.path / "report.html").read_text(encoding="utf-8")

    def heights(kind: str) -> list[float]:
        points = re.search(rf'<polyline class="{kind}" points="([^"]*)"', page)
        return [float(point.split(",")[1]) for point in points[1].split()] if points else []

    drawn = heights("train")
    weights = 0.8 ** np.arange(len(drawn))[::-1]
    means = [np.average(drawn[: n + 1], weights=weights[-n - 1 :]) for n in range(len(drawn))]
    assert np.abs(np.subtract(heights("smooth"), means)).max() < 0.11  # drawn to a tenth of a pixel


def test_a_question_with_markup_does_not_become_markup_in_the_report(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"instruction": "<script>alert(1)</script>", "output": "<b>no</b>"}) + "\n")
    result = train(settings(tiny_model, data), tmp_path / "run")
    page = (result.path / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "<b>no</b>" not in page
    assert "&lt;script&gt;" in page


def test_trackers_get_every_step(tiny_model: Path, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    result = train(settings(tiny_model, talk, **{"train.report_to": "tensorboard"}), tmp_path / "run")
    (folder,) = {path.parent for path in result.path.rglob("events.out.*")}
    events = accumulator.EventAccumulator(str(folder)).Reload()
    assert len(events.Scalars("train/loss")) == result.steps
