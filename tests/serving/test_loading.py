"""Several runs over one copy of the weights: what is no run, or not as it was trained, is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import save_tiny_model
from served import copied, trained
from tunesmith import chat
from tunesmith.errors import ModelError, ProofError, RecipeError, RunError, TunesmithError
from tunesmith.runs import rundir
from tunesmith.serving.server import Serving


def with_weights(run: Path, change: Any) -> None:
    """Changes the adapter's weights, and the digests with them."""
    path = run / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    files = run / "adapter" / "files.json"
    digests = json.loads(files.read_text())
    digests[path.name]["sha256"] = rundir.sha256(path)
    files.write_text(json.dumps(digests))


def test_runs_of_another_base_are_refused_before_weights_are_read(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_tiny_model(tmp_path / "other", num_hidden_layers=1)
    run = trained(other, tmp_path / "mia", **{"train.epochs": 1})
    monkeypatch.setattr(chat.models, "load_base", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(RunError) as caught:
        chat.load_together([runs["bo"], run])
    assert str(other) in str(caught.value) and str(runs["base"]) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda w: {k: v * 0 if "lora_B" in k else v for k, v in w.items()}, ModelError, "lora_B is all zero"),
        (lambda w: dict(list(w.items())[1:]), ModelError, "an adapter that does not fit"),
        (lambda w: {**w, "base_model.model.x.lora_A.weight": torch.ones(1)}, ModelError, "layers that are not there"),
    ],
    ids=["it would change nothing", "missing keys", "keys of elsewhere"],
)
@pytest.mark.parametrize("first", [True, False])
def test_an_adapter_that_is_not_one_is_refused(
    change: Any, error: type[TunesmithError], told: str, first: bool, runs: dict[str, Path], tmp_path: Path
) -> None:
    broken = copied(runs["mia"], tmp_path / "broken")
    with_weights(broken, change)
    with pytest.raises(error, match=told):
        chat.load_together([broken, runs["bo"]] if first else [runs["bo"], broken])


@pytest.mark.parametrize("load", [lambda run: chat.load(run), lambda run: chat.load_together([run])])
def test_an_adapter_with_another_digest_is_refused(load: Any, runs: dict[str, Path], tmp_path: Path) -> None:
    broken = copied(runs["mia"], tmp_path / "broken")
    path = broken / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ProofError, match="another file than training wrote"):
        load(broken)
    (broken / "adapter" / "files.json").unlink()
    with pytest.raises(ProofError, match="no digests"):
        load(broken)


def test_what_is_no_run_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing of that name"):
        chat.load_together([tmp_path / "nothing"])
    with pytest.raises(RunError, match="no run"):
        chat.load_together([runs["bo"], runs["base"]])
    with pytest.raises(RecipeError, match="no run"):
        Serving([])
