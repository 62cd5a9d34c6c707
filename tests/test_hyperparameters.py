"""What `auto` is in the settings that decide how well a model learns."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from conftest import tunesmith
from small_runs import assert_same, settings
from test_resume import killed
from tunesmith import recipe
from tunesmith.training import checking, hyperparameters
from tunesmith.training.checking import check, hold_out
from tunesmith.training.run import resume, train


@dataclass(frozen=True)
class SomeRows:
    """So many rows that teach so many tokens each, as far as a choice looks at them."""

    n_rows: int
    n_tokens: int = 40

    def __len__(self) -> int:
        return self.n_rows

    @property
    def n_supervised(self) -> np.ndarray:
        return np.full(self.n_rows, self.n_tokens)


def chosen(rows: SomeRows, width: int = 576) -> dict[str, Any]:
    config = LlamaConfig(hidden_size=width)
    return {c.setting: c.value for c in hyperparameters.chosen(recipe.Recipe(), config, cast("Any", rows))}


OPEN = dict.fromkeys(("train.examples_per_step", "train.epochs", "train.learning_rate", "train.rehearse"), "auto")


@given(st.integers(1, 400_000), st.integers(1, 500), st.integers(1, 256))
def test_every_number_of_rows_and_every_width_get_sensible_settings(n_rows: int, n_tokens: int, width: int) -> None:
    found = chosen(SomeRows(n_rows, n_tokens), 64 * width)
    assert set(found) == set(OPEN)
    assert 5e-5 <= found["train.learning_rate"] <= 1e-2
    assert 1 <= found["train.epochs"] <= 10
    assert 1 <= found["train.examples_per_step"] <= 64
    assert 0 <= found["train.rehearse"] <= 0.5
    recipe.resolve(None, found)  # allowed as settings


@given(st.integers(1, 400_000), st.integers(1, 400_000), st.sampled_from([2, 40]))
def test_more_rows_are_seen_less_often_but_never_for_fewer_steps_by_half(few: int, many: int, n_tokens: int) -> None:
    few, many = sorted((few, many))

    def of(n_rows: int) -> tuple[int, float]:
        found = chosen(SomeRows(n_rows, n_tokens))
        return found["train.epochs"], found["train.epochs"] * n_rows / found["train.examples_per_step"]

    assert of(many)[0] <= of(few)[0]
    assert of(many)[1] >= of(few)[1] / 2


@given(st.integers(1, 400_000))
def test_rows_that_teach_little_are_seen_up_to_twice_as_often(n_rows: int) -> None:
    labels, texts = (chosen(SomeRows(n_rows, n_tokens))["train.epochs"] for n_tokens in (2, 40))
    assert texts <= labels <= 2 * texts + 1
    assert n_rows != 200 or (labels, texts) == (5, 2)


def test_what_is_given_is_not_chosen(tiny_model: Path, talk: Path) -> None:
    given_all = settings(tiny_model, talk, **{"train.rehearse": 0.1})
    rows = hold_out(check(given_all))[0]
    assert not list(hyperparameters.chosen(given_all, LlamaConfig(), rows))
    one = settings(tiny_model, talk, **{**OPEN, "train.epochs": 3})
    assert "train.epochs" not in [c.setting for c in hyperparameters.chosen(one, LlamaConfig(), rows)]


def test_the_plan_says_why_and_the_run_keeps_it(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    sets = [part for name, value in OPEN.items() for part in ("--set", f"{name}={value}")]
    common = ("--model", tiny_model, "--data", talk, *sets)
    said = tunesmith("plan", *common)
    made = {c["setting"]: c for c in tunesmith("plan", *common, "--json").json["choices"]}
    for name in OPEN:
        assert name in said.out and made[name]["why"]
    ended = tunesmith("train", *common, "--out", tmp_path / "run", "--json")
    assert ended.code == 0, ended.err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    kept = {c["setting"]: c["value"] for c in manifest["plan"]["choices"]}
    assert {name: kept[name] for name in OPEN} == {name: made[name]["value"] for name in OPEN}
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["train"]["learning_rate"] == "auto"
    lines = (tmp_path / "run" / "recipe.yaml").read_text().splitlines()
    assert f"  epochs: auto  # flag; {kept['train.epochs']}, {made['train.epochs']['why']}" in lines
    assert all("; " in line for line in lines if ": auto  # " in line)  # what was chosen
    rates = [
        json.loads(line)["learning_rate"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert max(rates) == pytest.approx(kept["train.learning_rate"], rel=0.05)  # a peak between two steps
    assert f'"learning_rate": {kept["train.learning_rate"]}' in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_a_killed_run_goes_on_with_what_was_chosen(
    tiny_model: Path, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(settings(tiny_model, talk, **OPEN), tmp_path / "whole")
    out = killed(tiny_model, talk, tmp_path / "run", 5, **OPEN)
    monkeypatch.setattr(hyperparameters, "RATE", 1e-5)  # a later version with another rule
    monkeypatch.setattr(hyperparameters, "MOST_EPOCHS", 1)
    resume(out)
    assert_same(out, whole.path)


def test_a_run_whose_epochs_were_chosen_goes_on_for_longer(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    run = train(settings(tiny_model, talk, **{**OPEN, "train.rehearse": 0}), tmp_path / "run")
    began = {c["setting"]: c["value"] for c in json.loads((run.path / "manifest.json").read_text())["plan"]["choices"]}
    epochs = began["train.epochs"]
    assert tunesmith("resume", run.path, "--set", f"train.epochs={epochs - 1}", "--json").code == 2
    assert tunesmith("resume", run.path, "--set", "train.epochs=auto", "--json").code == 2
    longer = resume(run.path, epochs=epochs + 1)
    assert longer.steps == run.steps // epochs * (epochs + 1)
    assert resume(run.path).steps == longer.steps  # done, and it knows


@given(st.integers(0, 10_000))
def test_enough_rows_are_held_out_to_judge_by_and_never_most(n_rows: int) -> None:
    count = checking._n_held_out(n_rows, "auto")  # what a file of each number of rows would take minutes to show
    assert count <= min(n_rows // 5, 200)
    assert n_rows < 50 or count >= 10
    assert n_rows < 100 or count >= 20
    assert n_rows < 400 or count >= n_rows // 20 or count == 200
