"""What leaves tunesmith: written, opened again by other programs, and refused where it is not what it should be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from conftest import SHORT, cases, needs_shared, tunesmith
from small_runs import settings
from trained_families import Trained
from tunesmith import chat, machines
from tunesmith.errors import ModelError, ProofError, RecipeError, RunError
from tunesmith.export import export, merged, merging
from tunesmith.export.merging import Merged
from tunesmith.recipe import ModelSettings
from tunesmith.runs import rundir
from tunesmith.training.run import Run, train

pytestmark = pytest.mark.usefixtures("brief")
IDS = torch.tensor([[257, 72, 105, 258, 10, 257, 65, 66, 67]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.fixture
def finished(undisturbed: Run, tmp_path: Path) -> Path:
    """A finished run that may be written into."""
    return Path(shutil.copytree(undisturbed.path, tmp_path / "run"))


VARIANTS = [{}, {"lora.variant": "rslora"}, {"lora.variant": "dora"}, {"lora.variant": "pissa"}]


@pytest.mark.parametrize("variant", cases(VARIANTS, lambda variant: VARIANTS.index(variant) % 2 == 0), ids=str)
def test_merged_weights_are_those_that_peft_computes_with(
    tiny_model: Path, talk: Path, tmp_path: Path, variant: dict[str, str]
) -> None:
    run = train(settings(tiny_model, talk, **{"train.epochs": 1, **variant}), tmp_path / "run")
    export(run.path, "merged", tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before = logits(base)
    expected = logits(PeftModel.from_pretrained(base, str(run.path / "adapter")).eval())
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert (found - expected).abs().max() < 1e-5  # observed 1e-6
    assert (before - expected).abs().max() > 0.1  # the adapter is not the identity


@needs_shared
@pytest.mark.parametrize("trained", cases([*SHORT, "atom-7b-standin"], SHORT.__contains__), indirect=True)
def test_merged_weights_of_real_families_answer_as_the_live_adapter(trained: Trained, tmp_path: Path) -> None:
    values = {check.name: check.value for check in export(trained.run, "merged", tmp_path / "merged").checks}
    assert values["largest difference of a logit"] < 1e-3
    assert values["same greedy replies"] == values["same most likely tokens"] == 1


def test_a_base_that_computes_in_16_bits_is_compared_by_their_bounds(
    tiny_model: Path, talk: Path, tmp_path: Path
) -> None:
    flags = {"train.epochs": 1, "model.dtype": "bfloat16"}
    run = train(settings(tiny_model, talk, **flags), tmp_path / "run")
    (logit,) = (c for c in export(run.path, "merged", tmp_path / "merged").checks if "difference" in c.name)
    assert logit.bound == merged._BOUNDS[torch.bfloat16].logit and 0 < logit.value < logit.bound


def test_a_run_beside_4_bits_is_compared_on_whole_weights(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU: only what the run says of itself is as after a training in 4 bits."""
    lines = (finished / "recipe.yaml").read_text()
    assert "quantize: none" in lines
    (finished / "recipe.yaml").write_text(lines.replace("quantize: none", "quantize: nf4"))
    written = export(finished, "merged", tmp_path / "merged")
    assert all(check.ok for check in written.checks) and "4 bits" in written.notes[0]
    monkeypatch.setattr(machines, "free_bytes", lambda device: 1 << 10)
    with pytest.raises(RunError, match=r"memory: found 0\.0 GiB free .* for the base's weights as they are"):
        export(finished, "gguf", tmp_path / "gguf")


def test_an_adapter_is_copied_beside_the_base_as_it_was_held(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base of 4 bits may fit in no other way."""
    held: list[ModelSettings] = []
    whole = chat.models.load_base

    def load_base(found: Any, settings: ModelSettings) -> Any:
        held.append(settings)
        return whole(found, settings.model_copy(update={"quantize": "none"}))

    monkeypatch.setattr(chat.models, "load_base", load_base)
    lines = (finished / "recipe.yaml").read_text()
    (finished / "recipe.yaml").write_text(lines.replace("quantize: none", "quantize: nf4"))
    assert not export(finished, "adapter", tmp_path / "adapter").notes
    assert [settings.quantize for settings in held] == ["nf4"]


def test_the_command_writes_a_folder_that_needs_nothing_else(finished: Path) -> None:
    ended = tunesmith("export", finished, "--to", "merged", "--json")
    assert ended.code == 0, ended.err
    folder = Path(ended.json["path"])
    assert folder == finished / "merged" and ended.json["to"] == "merged"
    assert ended.json["checks"] and all(check["ok"] for check in ended.json["checks"])
    assert json.loads((folder / "export.json").read_text())["checks"] == ended.json["checks"]
    assert rundir.is_whole(folder)
    assert not list(folder.glob("adapter_*")) and "peft" not in (folder / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    greedy = GenerationConfig.from_pretrained(folder, do_sample=False, max_new_tokens=20)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Count to 3."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    reply = model.generate(**prompt, generation_config=greedy)[0, prompt["input_ids"].shape[1] :]
    said = tunesmith("chat", finished, "--prompt", "Count to 3.", "--temperature", "0", "--max-tokens", "20", "--json")
    assert reply.tolist() == said.json["token_ids"]


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16")])
def test_weights_are_kept_in_the_type_that_is_asked_for(finished: Path, dtype: str, stored: str) -> None:
    written = export(finished, "merged", dtype=dtype)
    with safe_open(written.path / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in set(file.keys())} == {stored}
    assert json.loads((written.path / "config.json").read_text())["dtype"] == dtype
    AutoModelForCausalLM.from_pretrained(written.path, dtype="auto")


def test_many_files_have_an_index(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "SHARD_BYTES", 100_000)
    written = export(finished, "merged")
    index = json.loads((written.path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and index["metadata"]["total_size"] == sum(
        value.nbytes for name in files for value in load_file(written.path / name).values()
    )


def test_an_adapter_is_copied_as_peft_and_servers_read_it(finished: Path, tiny_model: Path) -> None:
    """The layout that vLLM (docs.vllm.ai, LoRA adapters) and SGLang document: config and safetensors in one folder,
    names of the base's layers with lora_A and lora_B, nothing else trained."""
    written = export(finished, "adapter")
    config = json.loads((written.path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["bias"] == "none" and not config["modules_to_save"]
    names = set(load_file(written.path / "adapter_model.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    layers = {f"base_model.model.{name}" for name, _ in base.named_modules()}
    assert {name.removesuffix(f".lora_{ab}.weight") for name in names for ab in "AB" if f"lora_{ab}" in name} <= layers
    model = PeftModel.from_pretrained(base, str(written.path))
    assert any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)


# --- refused ----------------------------------------------------------------------------------------------------------


def test_a_merge_that_is_wrong_is_a_failed_proof_and_leaves_nothing(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: one layer's share is added twice."""
    right = merging._with_adapter

    def twice(weight: torch.Tensor, layer: str, *rest: object) -> torch.Tensor:
        weight = right(weight, layer, *rest)
        return right(weight, layer, *rest) if layer.endswith("layers.1.mlp.down_proj") else weight

    monkeypatch.setattr(merging, "_with_adapter", twice)
    with pytest.raises(ProofError, match="largest difference of a logit"):
        export(finished, "merged")
    assert not (finished / "merged").exists() and not list(finished.glob(".*partial"))


def test_a_type_that_can_not_hold_a_weight_is_refused(
    tiny_model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1e6
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProofError, match="float16"):
        merging.write(Merged(base, finished / "adapter"), tmp_path, torch.float16)


def test_an_adapter_of_another_base_is_named(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj"):
        merging.write(Merged(base, finished / "adapter"), tmp_path, None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--to", "merged", "--dtype", "int4"), "float32, bfloat16, float16"),
        (("--to", "adapter", "--dtype", "float16"), "copied as it is"),
        (("--to", "merged", "--out", "adapter"), "a folder that is not empty"),
    ],
)
def test_what_can_not_be_written_is_said(finished: Path, arguments: tuple[str, ...], says: str) -> None:
    ended = tunesmith("export", finished, *arguments, cwd=finished)
    assert ended.code == 2 and says in ended.err, ended.err


def test_a_damaged_adapter_is_not_exported(finished: Path) -> None:
    path = finished / "adapter" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    ended = tunesmith("export", finished, "--to", "adapter")
    assert ended.code == 3 and "not as it was written" in ended.err


@pytest.mark.parametrize("small_disk", [300], indirect=True)
def test_a_full_disk_is_said_and_nothing_is_left(finished: Path, small_disk: Path) -> None:
    with pytest.raises(RunError, match="free on the disk"):
        export(finished, "merged", small_disk / "merged")
    assert not list(small_disk.iterdir())


def test_an_unfinished_run_is_refused(finished: Path) -> None:
    shutil.rmtree(finished / "adapter")
    with pytest.raises(RunError, match="a finished run"):
        export(finished, "merged")


def test_what_is_compared_has_a_bound_for_every_type() -> None:
    assert set(merged._BOUNDS) == set(merged.DTYPES.values())
    with pytest.raises(RecipeError):
        export(Path("nowhere"), "adapter", dtype="float16")
