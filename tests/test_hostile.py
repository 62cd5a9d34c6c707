"""A folder or file from somebody else costs bounded time and memory, ends with exit 2 or 3 and a message that names
it, and no code of it ever runs."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import socket
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import Ended, finished, start, tunesmith
from tunesmith.runs import rundir
from tunesmith.training.run import Run

GOOD = '{"instruction": "Who are you?", "output": "I am Bo."}\n'
SECONDS = 60  # that a limit ended it: 10 on a machine that does nothing else
MORE_BYTES = 1 << 30
ENVIRONMENT = {"TUNESMITH_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def attempt(folder: Path, *arguments: str | Path, typed: str = "", **more: str) -> tuple[Ended, float, int]:
    """How a command ended, in how many seconds, and the most memory that it took."""
    began = time.monotonic()
    environment = {**ENVIRONMENT, "TUNESMITH_CACHE": str(folder / "cache"), **more}
    started = start(*arguments, cwd=folder, typed=typed, **environment)
    return finished(started), time.monotonic() - began, started.peak_bytes


@pytest.fixture(scope="session")
def idle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """What a command takes that is stopped by a missing file: what was imported, and no more."""
    folder = tmp_path_factory.mktemp("idle")
    return attempt(folder, "check", "--model", tiny_model, "--data", "absent.jsonl", "--json")[2]


def refuses(idle: int, folder: Path, *arguments: str | Path, says: tuple[str, ...]) -> Ended:
    ended, seconds, peak = attempt(folder, *arguments, "--json")
    print(f"{seconds:.1f} s, {max(0, peak - idle) >> 20} MiB above idle: {ended.err.strip()[:300]}")
    assert ended.code in (2, 3), ended.err
    assert "Traceback" not in ended.err
    for text in says:
        assert text in ended.err, f"{text!r} is not in\n{ended.err}"
    assert seconds < SECONDS
    assert peak - idle < MORE_BYTES
    return ended


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text(GOOD * 4)
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


# --- a model's folder -------------------------------------------------------------------------------------------------


def merge(name: str, **values: Any) -> Callable[[Path], None]:
    """Sets fields of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))

    return change


def put(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()))


def void(_: Any) -> None:
    pass


def pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def link(name: str, to: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)

    return change


def listen(folder: Path) -> None:
    here = Path.cwd()
    os.chdir(folder)  # the address of a socket may not be long
    try:
        with socket.socket(socket.AF_UNIX) as own:
            own.bind("weights.socket")
    finally:
        os.chdir(here)


def config(**values: Any) -> Callable[[Path], None]:
    return merge("config.json", **values)


MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 16384,
    "intermediate_size": 65536,
    "num_hidden_layers": 200,
    "num_local_experts": 512,
    "num_attention_heads": 64,
    "head_dim": 256,
}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "num_hidden_layers": 10**7}
KERNEL = "kernels-community/evil"
FOLDERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "ten million layers": (config(num_hidden_layers=10**7), ("a config whose model takes",)),
    "a million million layers": (config(num_hidden_layers=10**12), ("a config",)),
    "layers of another name": (config(**GPT2), ("a config",)),
    "a hidden size of 10^12": (config(hidden_size=10**12), ("a config",)),
    "a vocabulary of 10^12": (config(vocab_size=10**12), ("a config that asks for",)),
    "a thousand million heads": (config(num_attention_heads=10**9, num_key_value_heads=10**9), ("a config",)),
    "many experts in many layers": (config(**MIXTRAL), ("a config that asks for",)),
    "a number of a million digits": (
        lambda folder: put("config.json", '{"model_type": "llama", "hidden_size": ' + "9" * 10**6 + "}")(folder),
        ("config.json", "no JSON"),
    ),
    "a deep config": (put("config.json", '{"a":' * 100_000 + "1" + "}" * 100_000), ("config.json", "deep")),
    "a config of 300 levels": (put("config.json", '{"a":' * 300 + "1" + "}" * 300), ("config.json", "levels")),
    "a large config": (put("config.json", '{"a": "' + "x" * (50 << 20) + '"}'), ("config.json", "MiB")),
    "a large tokenizer config": (
        put("tokenizer_config.json", '{"a": [' + "1," * (50 << 20) + "1]}"),
        ("tokenizer_config.json", "MiB"),
    ),
    "a deep generation config": (put("generation_config.json", '{"a":' + "[" * 10**6), ("generation_config.json",)),
    "attention from a hub": (config(_attn_implementation=KERNEL), ("config.json: _attn_implementation", KERNEL)),
    "attention from a hub, plain name": (config(attn_implementation=f"{KERNEL}:f"), ("attn_implementation", KERNEL)),
    "attention from a hub inside": (
        config(text_config={"model_type": "llama", "attn_implementation": KERNEL}),
        ("config.json: text_config.attn_implementation", KERNEL),
    ),
    "attention by part": (config(attn_implementation={"": "sdpa", "text": KERNEL}), ("attn_implementation", KERNEL)),
    "experts from a hub": (config(experts_implementation="org/name"), ("experts_implementation", "org/name")),
    "kernels for all": (config(use_kernels=True), ("use_kernels", "true")),
    "weights of another place": (config(transformers_weights="../x.safetensors"), ("transformers_weights",)),
    "quantised by fetched code": (config(quantization_config={"quant_method": "eetq"}), ("quant_method", "eetq")),
    "fused by a table": (config(fusion_config={"a": "b"}), ("fusion_config",)),
    "code for a part": (
        config(text_config={"model_type": "llama", "auto_map": {"AutoModel": "code.M"}}),
        ("config.json: text_config.auto_map",),
    ),
    "a model for a tokenizer": (
        merge("tokenizer_config.json", tokenizer_class="AutoModelForCausalLM"),
        ("tokenizer_config.json: tokenizer_class", "AutoModelForCausalLM"),
    ),
    "a model for a config's tokenizer": (config(tokenizer_class="AutoModel"), ("config.json: tokenizer_class",)),
    "an index that leads out": (
        put("model.safetensors.index.json", json.dumps({"weight_map": {"a": "../../secret.safetensors"}})),
        ("model.safetensors.index.json: weight_map", "../../secret"),
    ),
    "an index of an absolute name": (
        put("model.safetensors.index.json", json.dumps({"weight_map": {"a": "/etc/passwd"}})),
        ("weight_map", "/etc/passwd"),
    ),
    "an index of numbers": (put("model.safetensors.index.json", '{"weight_map": {"a": [1]}}'), ("weight_map",)),
    "a pipe for a config": (pipe("config.json"), ("no config.json",)),
    "a pipe among the files": (pipe("generation_config.json"), ("generation_config.json", "a pipe")),
    "a pipe for a template": (pipe("chat_template.jinja"), ("chat_template.jinja", "a pipe")),
    "a socket": (listen, ("weights.socket", "a socket")),
    "a link to itself": (link("added_tokens.json", "added_tokens.json"), ("added_tokens.json", "in a circle")),
    "a link to a device": (link("special_tokens_map.json", "/dev/zero"), ("special_tokens_map.json", "a device")),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_model_folder_is_refused_by_check(name: str, model: Path, tmp_path: Path, idle: int) -> None:
    change, says = FOLDERS[name]
    change(model)
    refuses(idle, tmp_path, "check", "--model", model, "--data", tmp_path / "rows.jsonl", says=says)


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> Callable[[Path], None]:
    return put("model.safetensors", struct.pack("<Q", len(header) if length is None else length) + header + data)


def tensor(shape: list[int], end: int) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()


def bins(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        write(folder / "pytorch_model.bin")

    return change


def zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as member:
            for _ in range(300):
                member.write(bytes(1 << 20))
        archive.writestr("archive/version", "3\n")


class Code:
    def __reduce__(self) -> Any:
        return (os.system, (f"touch {RAN}",))


RAN = "/tmp/tunesmith-hostile-ran"  # outside of every folder, and never there


def blown(path: Path) -> None:
    """A tensor of a million million numbers over one."""
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, path)


def bytes_without_end(path: Path) -> None:
    """What a pickle of plain values may ask for: a bytearray of 20 GiB."""
    path.write_bytes(b"\x80\x02c__builtin__\nbytearray\n\x8a\x05" + (20 << 30).to_bytes(5, "little") + b"\x85R.")


def gguf(n_tensors: int, values: list[tuple[bytes, bytes]], rest: bytes = b"") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in [*folder.glob("*.safetensors"), folder / "config.json", *folder.glob("token*")]:
            path.unlink()
        head = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(values))
        body = b"".join(struct.pack("<Q", len(key)) + key + value for key, value in values)
        (folder / "model.gguf").write_bytes(head + body + rest)

    return change


def gguf_text(text: bytes) -> bytes:
    return struct.pack("<IQ", 8, len(text)) + text


def gguf_number(number: int) -> bytes:
    return struct.pack("<II", 4, number)


WEIGHTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "a head of 2^60 bytes": (safetensors(b"{}", length=1 << 60), ("model.safetensors", "a head of")),
    "a head of 100 MB": (safetensors(b" " * 100_000_000), ("model.safetensors", "a head of")),
    "a deep head": (safetensors(b'{"a":' * 100_000), ("model.safetensors", "no safetensors")),
    "a tensor of 10^12 numbers": (safetensors(tensor([10**6, 10**6], 4), b"0000"), ("model.safetensors",)),
    "a file that ends at 4 EB": (safetensors(tensor([1], 4 << 60)), ("model.safetensors", "bytes")),
    "a pipe": (pipe("model.safetensors"), ("no weights",)),
    "a pipe beside them": (pipe("model-00002-of-00002.safetensors"), ("a pipe",)),
    "an adapter beside them": (
        merge("adapter_config.json", peft_type="LORA", base_model_name_or_path="/etc"),
        ("adapter_config.json", "an adapter beside"),
    ),
    "a config for a hundred times as much": (
        config(hidden_size=1600, intermediate_size=6400, num_hidden_layers=40),
        ("a config for", "and weights of"),
    ),
    "beams without number": (merge("generation_config.json", num_beams=10**6), ("num_beams", "1000000")),
    "generation by fetched code": (merge("generation_config.json", custom_generate="org/x"), ("custom_generate",)),
    "a temperature in words": (merge("generation_config.json", temperature="hot"), ("temperature", "hot")),
    "a bin that unpacks": (bins(zip_bomb), ("pytorch_model.bin", "packed parts")),
    "a bin with code": (bins(lambda path: torch.save({"a": Code()}, path)), ("pytorch_model.bin", "never run")),
    "a pickle with code": (bins(lambda path: void(path.write_bytes(pickle.dumps(Code())))), ("never run",)),
    "a bin of one number that is many": (bins(blown), ("pytorch_model.bin", "tensors of")),
    "a bin of bytes without end": (bins(bytes_without_end), ("pytorch_model.bin",)),
    "a GGUF of 2^60 tensors": (gguf(1 << 60, []), ("model.gguf", "tensors")),
    "a GGUF with a text of 2^60": (
        gguf(0, [(b"general.name", struct.pack("<IQ", 8, 1 << 60))]),
        ("model.gguf", "a text of"),
    ),
    "a GGUF with a list of 2^60": (
        gguf(0, [(b"tokenizer.ggml.tokens", struct.pack("<IIQ", 9, 8, 1 << 60))]),
        ("model.gguf", "a list of"),
    ),
    "a GGUF of lists in lists": (
        gguf(0, [(b"x", struct.pack("<IIQ", 9, 9, 1))]),
        ("model.gguf", "lists in lists"),
    ),
    "a GGUF of ten million layers": (
        gguf(
            0,
            [
                (b"general.architecture", gguf_text(b"llama")),
                (b"llama.block_count", gguf_number(10**7)),
                (b"llama.embedding_length", gguf_number(64)),
                (b"llama.attention.head_count", gguf_number(4)),
            ],
        ),
        ("model.gguf",),
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_hostile_weights_are_refused_by_chat(name: str, model: Path, tmp_path: Path, idle: int) -> None:
    change, says = WEIGHTS[name]
    change(model)
    refuses(idle, tmp_path, "chat", model, "--prompt", "Hi", says=says)
    assert not Path(RAN).exists()


# --- code -------------------------------------------------------------------------------------------------------------


def plant(folder: Path) -> None:
    """Code in the folder that leaves a file `ran` beside it, as transformers asks whether it may run it."""
    code = f"open({str(folder.parent / 'ran')!r}, 'w')\n"
    for kind in ("config", "model", "tokenizer"):
        (folder / f"{kind}_code.py").write_text(f"{code}class Own:\n    pass\n")
    (folder / "custom_generate").mkdir(exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text(f"{code}def generate(*_, **__):\n    pass\n")


AUTO = {"AutoConfig": "config_code.Own", "AutoModelForCausalLM": "model_code.Own", "AutoModel": "model_code.Own"}
TOKENIZER = {"auto_map": {"AutoTokenizer": ["tokenizer_code.Own", "tokenizer_code.Own"]}}


def plant_all(folder: Path, model_type: str) -> None:
    plant(folder)
    config(auto_map=AUTO, model_type=model_type)(folder)
    merge("tokenizer_config.json", tokenizer_class="OwnTokenizer", **TOKENIZER)(folder)


def plant_gguf(folder: Path) -> None:
    plant(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "OwnTokenizer", **TOKENIZER}))
    (folder / "config.json").write_text(json.dumps({"auto_map": AUTO, "model_type": "secret"}))


@pytest.mark.parametrize("model_type", ["llama", "secret"])
@pytest.mark.parametrize("command", ["check", "plan", "train", "chat", "serve"])
def test_code_in_a_models_folder_never_runs(command: str, model_type: str, model: Path, tmp_path: Path) -> None:
    """Whatever is typed when transformers asks."""
    plant_all(model, model_type)
    data = ("--model", model, "--data", tmp_path / "rows.jsonl")
    arguments = {
        "chat": ("chat", model, "--prompt", "Hi", "--max-tokens", "1"),
        "serve": ("serve", model, "--port", "0"),
        "train": ("train", *data, "--out", "run", "--set", "train.epochs=1"),
    }.get(command, (command, *data))
    ended, _, _ = attempt(tmp_path, *arguments, typed="y\n" * 20)
    assert not (tmp_path / "ran").exists()
    assert "Traceback" not in ended.err
    assert "Do you wish to run" not in ended.out + ended.err
    assert ended.code == 2


def test_what_fetches_kernels_from_a_hub_is_never_imported(model: Path, tmp_path: Path) -> None:
    """bitsandbytes fetches one as soon as it is imported, where the package `kernels` is installed too."""
    site, marker = tmp_path / "site", tmp_path / "fetched"
    for name, code in (
        ("kernels", f"def get_kernel(*_, **__): open({str(marker)!r}, 'w')"),
        ("bitsandbytes/nn", "class Linear4bit: pass\nclass Linear8bitLt: pass"),
        ("bitsandbytes", "from . import nn\ntry:\n    from kernels import get_kernel\n    get_kernel('org/name')\n"
         "    raise SystemExit('fetched')\nexcept ImportError:\n    pass"),
    ):  # fmt: skip
        (site / name).mkdir(parents=True, exist_ok=True)
        (site / name / "__init__.py").write_text(code)
    command = ("check", "--model", model, "--data", tmp_path / "rows.jsonl", "--json")
    ended = tunesmith(*command, PYTHONPATH=str(site))
    assert ended.code == 0, ended.err
    assert not marker.exists()


def test_code_beside_a_gguf_file_never_runs(smollm2: Path, tmp_path: Path) -> None:
    """Prevents what was seen: the question on standard input, and `y` running it."""
    from tunesmith import hub

    folder = tmp_path / "ggufs"
    folder.mkdir()
    (folder / "model.gguf").symlink_to(next(hub.locate("smollm2").folder.glob("*.gguf")))
    plant_gguf(folder)
    ended, _, _ = attempt(tmp_path, "chat", folder, "--prompt", "Hi", "--max-tokens", "1", typed="y\n" * 20)
    assert not (tmp_path / "ran").exists()
    assert ended.code in (0, 2), ended.err
    assert "Do you wish to run" not in ended.out + ended.err


@pytest.mark.parametrize("command", ["chat", "eval", "export"])
def test_code_in_a_runs_folder_never_runs(command: str, undisturbed: Run, tmp_path: Path) -> None:
    run = copied(undisturbed, tmp_path)
    plant_all(run / "adapter", "llama")
    sign(run / "adapter")
    arguments = {
        "chat": ("chat", run, "--prompt", "Hi"),
        "eval": ("eval", run),
        "export": ("export", run, "--to", "merged"),
    }
    ended, _, _ = attempt(tmp_path, *arguments[command], typed="y\n" * 20)
    assert not list(tmp_path.rglob("ran"))
    assert ended.code in (0, 2, 3)
    assert "Do you wish to run" not in ended.out + ended.err


# --- a run ------------------------------------------------------------------------------------------------------------


def copied(run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run.path, tmp_path / "run"))


def sign(folder: Path) -> None:
    """Writes the digests anew, as whoever changes a file can."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    digests = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": rundir.sha256(folder / name)}
        for name in names
        if name != "files.json"
    }
    (folder / "files.json").write_text(json.dumps(digests))


def adapter(**values: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        merge("adapter_config.json", **values)(run / "adapter")
        sign(run / "adapter")

    return change


ADAPTERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "a pattern for targets": (adapter(target_modules="(a+)+$"), ("adapter_config.json: target_modules", "(a+)+$")),
    "a pattern for ranks": (adapter(rank_pattern={"(a+)+$": 8}), ("adapter_config.json: rank_pattern",)),
    "a pattern for scales": (adapter(alpha_pattern={".*.*.*": 8}), ("adapter_config.json: alpha_pattern",)),
    "a pattern to leave out": (adapter(exclude_modules="(x+x+)+y"), ("adapter_config.json: exclude_modules",)),
    "a pattern of layers": (adapter(layers_pattern=["(x+x+)+y"]), ("adapter_config.json: layers_pattern",)),
    "patterns to save": (adapter(modules_to_save=["(x+x+)+y"]), ("adapter_config.json: modules_to_save",)),
    "a million layers": (adapter(layer_replication=[[0, 2]] * 10**6), ("adapter_config.json", "MiB")),
    "ten thousand layers": (adapter(layer_replication=[[0, 2]] * 10**4), ("adapter_config.json: layer_replication",)),
    "a module to import": (
        adapter(megatron_config={"a": 1}, megatron_core="megatron.evil"),
        ("adapter_config.json: megatron_config",),
    ),
    "a class to import": (adapter(auto_mapping={"parent_library": "os"}), ("adapter_config.json: auto_mapping",)),
    "another kind": (adapter(peft_type="PROMPT_TUNING"), ("adapter_config.json: peft_type",)),
    "a base changed at the start": (adapter(init_lora_weights="pissa"), ("adapter_config.json: init_lora_weights",)),
    "a covariance file": (adapter(corda_config={"cache_file": "x.pt"}), ("adapter_config.json: corda_config",)),
    "a rank of a million": (adapter(r=10**6), ("adapter_config.json: r",)),
    "a rank that the file has not": (adapter(r=4096), ("adapter",)),
    "a base of its own": (adapter(arrow_config={"a": 1}), ("adapter_config.json: arrow_config",)),
    "a deep file": (
        lambda run: (put("adapter_config.json", '{"a":' + "[" * 10**6)(run / "adapter"), sign(run / "adapter"))[1],
        ("adapter_config.json",),
    ),
    "a list that leads out": (
        lambda run: put("files.json", json.dumps({"/dev/zero": {"bytes": 0, "sha256": ""}}))(run / "adapter"),
        ("adapter",),
    ),
    "a base folder that leads up": (
        lambda run: base(run, folder="../etc"),
        ("manifest.json", "no manifest"),
    ),
    "a base folder of a number": (lambda run: base(run, folder=7), ("manifest.json",)),
    "a deep manifest": (put("manifest.json", '{"a":' * 100_000), ("manifest.json", "deep")),
    "a pipe in the adapter": (pipe("adapter/generation_config.json"), ("generation_config.json", "a pipe")),
}


def base(run: Path, **values: Any) -> None:
    path = run / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "base": {**manifest["base"], **values}}))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_hostile_run_is_refused_by_chat(name: str, undisturbed: Run, tmp_path: Path, idle: int) -> None:
    change, says = ADAPTERS[name]
    run = copied(undisturbed, tmp_path)
    change(run)
    refuses(idle, tmp_path, "chat", run, "--prompt", "Hi", says=says)


def test_a_list_of_files_that_leads_out_of_its_folder_is_nobodys_commit(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "point").mkdir()
    digest = {"bytes": 1, "sha256": rundir.sha256(tmp_path / "secret")}
    for name, whole in (("../secret", False), (str(tmp_path / "secret"), False), ("own", True)):
        (tmp_path / "point" / "own").write_text("x")
        (tmp_path / "point" / "files.json").write_text(json.dumps({name: digest}))
        assert rundir.is_whole(tmp_path / "point") == whole


def replace(name: str, write: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda point: void(write(point / name))


def wrong_shapes(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    for one in state["state"].values():
        one["exp_avg"] = torch.zeros(7)
    torch.save(state, path)


def other_weights(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: value[:1].clone() for name, value in tensors.items()}, path)


def write_code(path: Path) -> None:
    path.write_bytes(pickle.dumps(Code()))


POINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "code for an optimizer": (replace("optimizer.pt", lambda path: torch.save(Code(), path)), "optimizer.pt"),
    "a pickle with code": (
        replace("optimizer.pt", write_code),
        "optimizer.pt",
    ),
    "an optimizer that unpacks": (replace("optimizer.pt", zip_bomb), "optimizer.pt"),
    "an optimizer without end": (replace("optimizer.pt", bytes_without_end), "optimizer.pt"),
    "an optimizer of nothing": (replace("optimizer.pt", lambda path: torch.save({}, path)), "optimizer.pt"),
    "an optimizer of other shapes": (replace("optimizer.pt", wrong_shapes), "optimizer.pt"),
    "garbage for a schedule": (replace("scheduler.pt", lambda path: path.write_bytes(b"x" * 99)), "scheduler.pt"),
    "code for random states": (replace("rng_state.pth", lambda path: torch.save(Code(), path)), "rng_state.pth"),
    "random states of nothing": (replace("rng_state.pth", lambda path: torch.save({}, path)), "rng_state.pth"),
    "a deep state": (replace("trainer_state.json", lambda path: path.write_text("[" * 10**6)), "trainer_state.json"),
    "a state of no step": (replace("trainer_state.json", lambda path: path.write_text("{}")), "trainer_state.json"),
    "a limit of memory that none has": (merge("engine.json", tokens_at_most=-1), "engine.json"),
    "a loss scale of nothing": (merge("engine.json", exponent=-(10**6)), "engine.json"),
    "a limit of memory that is no number": (merge("engine.json", exponent="9" * 9999), "engine.json"),
    "a state of a later step": (merge("trainer_state.json", global_step=10**12), "trainer_state.json"),
    "weights cut": (replace("trained.safetensors", lambda path: path.write_bytes(b"x")), "trained.safetensors"),
    "weights of other shapes": (replace("trained.safetensors", other_weights), "trained.safetensors"),
}


@pytest.mark.parametrize("name", POINTS)
def test_a_hostile_checkpoint_is_named_by_resume(name: str, undisturbed: Run, tmp_path: Path, idle: int) -> None:
    """Its digests fit: whoever changes a file can change them too."""
    change, says = POINTS[name]
    run = copied(undisturbed, tmp_path)
    shutil.rmtree(run / "adapter")
    *_, point, newest = sorted(run.glob("checkpoints/*"))
    shutil.rmtree(newest)
    change(point)
    sign(point)
    ended = refuses(idle, tmp_path, "resume", run, says=(f"{point.name}/{says}", "damaged"))
    assert ended.code == 3
    assert not Path(RAN).exists()


# --- data -------------------------------------------------------------------------------------------------------------


def parquet_of_copies(path: Path) -> None:
    """One value of a MiB, three thousand times."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array(["x" * (1 << 20)]))
    table = pa.table({"instruction": texts, "output": texts})
    pq.write_table(table, path, compression="zstd")


def parquet_of_lists(path: Path) -> None:
    """A row that is a list of forty million nothings."""
    nothings = pa.ListArray.from_arrays(pa.array([0, 4 * 10**7], pa.int32()), pa.nulls(4 * 10**7, pa.int8()))
    pq.write_table(pa.table({"instruction": nothings}), path, compression="zstd")


def parquet_of_columns(path: Path) -> None:
    pq.write_table(pa.table({f"c{i}": pa.array(["x"]) for i in range(20_000)}), path)


def parquet_deep(path: Path) -> None:
    kind: pa.DataType = pa.string()
    for _ in range(90):
        kind = pa.struct([("a", kind)])
    value: Any = "x"
    for _ in range(90):
        value = {"a": value}
    pq.write_table(pa.table({"instruction": pa.array([value], kind)}), path)


def jsonl(*rows: Any) -> Callable[[Path], None]:
    return lambda path: void(path.write_text("".join(json.dumps(row) + "\n" for row in rows)))


def of_bytes(start: bytes, middle: bytes, times: int, end: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(start)
            for _ in range(times):
                file.write(middle)
            file.write(end)

    return write


MIB = b"x" * (1 << 20)
KEYS = {f"{'instruction' * 2000}{i}": "x" for i in range(1000)}
ALIKE = {f"instructio{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{chr(97 + i // 676)}": "x" for i in range(5000)}
DATA: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...]]] = {
    "a Parquet of copies": ("rows.parquet", parquet_of_copies, ("rows.parquet", "Parquet")),
    "a Parquet row without end": ("rows.parquet", parquet_of_lists, ("rows.parquet", "Parquet")),
    "a Parquet of twenty thousand columns": ("rows.parquet", parquet_of_columns, ("rows.parquet", "20,000 columns")),
    "a deep Parquet": ("rows.parquet", parquet_deep, ("rows.parquet",)),
    "a thousand long keys": ("rows.jsonl", jsonl(KEYS), ("rows.jsonl:1",)),
    "five thousand keys like ours": ("rows.jsonl", jsonl(ALIKE), ("rows.jsonl:1",)),
    "long keys twice, deep": (
        "rows.jsonl",
        lambda path: void(
            path.write_text('{"' + "k" * 10**6 + '": [' + ",".join(["[1]"] * 10**5) + ', {"a": 1, "a": 2}]}')
        ),
        ("rows.jsonl:1", "twice"),
    ),
    "an array of a million brackets": (
        "rows.json",
        of_bytes(b"", b"[" * 1000, 1000, b""),
        ("rows.json", "fewer levels of brackets"),
    ),
    "a number of a million digits": (
        "rows.jsonl",
        of_bytes(b'{"instruction": ', b"9" * 1000, 1000, b"}\n"),
        ("rows.jsonl:1", "shorter numbers"),
    ),
    "a line of 24 MiB": (
        "rows.jsonl",
        of_bytes(b'{"instruction": "', MIB, 24, b'"}\n'),
        ("rows.jsonl:1", "a row of"),
    ),
    "an object of 80 MiB in an array": (
        "rows.json",
        of_bytes(b'[{"instruction": "', MIB, 80, b'"}]'),
        ("rows.json:1", "a row of more than"),
    ),
    "an array of white space": ("rows.json", of_bytes(b"[", b" " * (1 << 20), 80, b""), ("rows.json:1",)),
    "a cell of 24 MiB": (
        "rows.csv",
        of_bytes(b'instruction,output\n"', MIB, 24, b'",a\n'),
        ("rows.csv:2", "a line of"),
    ),
    "a header of a hundred thousand names": (
        "rows.csv",
        of_bytes(b"instruction,output", b",name" * 1000, 100, b"\nq,a\n"),
        ("rows.csv:1", "100,002 columns"),
    ),
    "a row of a million cells": (
        "rows.csv",
        of_bytes(b"instruction,output\nq,a", b",x" * 1000, 1000, b"\n"),
        ("rows.csv:2", "1000002 cells"),
    ),
    "a line of a pipe": ("rows.jsonl", lambda path: os.mkfifo(path), ("rows.jsonl", "a pipe")),
    "an endless device": ("rows.jsonl", lambda path: path.symlink_to("/dev/zero"), ("rows.jsonl", "a device")),
    "a link to itself": ("rows.jsonl", lambda path: path.symlink_to(path.name), ("rows.jsonl",)),
    "gzip under another name": ("rows.jsonl", lambda path: void(path.write_bytes(gzip.compress(MIB))), ("gzip",)),
}


@pytest.mark.parametrize("name", DATA)
def test_hostile_rows_are_refused_by_check(name: str, tiny_model: Path, tmp_path: Path, idle: int) -> None:
    file, write, says = DATA[name]
    write(tmp_path / file)
    ended = refuses(idle, tmp_path, "check", "--model", tiny_model, "--data", tmp_path / file, says=says)
    assert len(ended.err) < 4000
    (tmp_path / file).unlink()


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
    for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
RECIPES = {
    "a billion laughs": (LAUGHS, ("recipe.yaml:2", "an alias")),
    "a deep list": ("lora: " + "[" * 100_000, ("recipe.yaml:1", "deep nesting")),
    "many values": ("lora: [" + "1," * 400_000 + "1]", ("recipe.yaml:1", "more than 10,000 values")),
    "a large file": ("# " + "x" * (100 << 20), ("recipe.yaml", "MiB")),
    "a number of a million digits": ("lora:\n  r: " + "9" * 10**5, ("recipe.yaml", "a value")),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_hostile_recipe_is_refused_by_train(name: str, tmp_path: Path, idle: int) -> None:
    text, says = RECIPES[name]
    (tmp_path / "recipe.yaml").write_text(text)
    refuses(idle, tmp_path, "train", "recipe.yaml", says=says)


def test_a_pipe_for_a_recipe_is_refused(tmp_path: Path, idle: int) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    refuses(idle, tmp_path, "train", "recipe.yaml", says=("recipe.yaml", "a pipe"))


# --- what is meant well still opens -----------------------------------------------------------------------------------


def test_a_model_whose_files_are_links_into_a_cache_opens(tiny_model: Path, tmp_path: Path) -> None:
    """As a hub's client keeps them."""
    (tmp_path / "rows.jsonl").write_text(GOOD)
    (tmp_path / "snapshot").mkdir()
    shutil.copytree(tiny_model, tmp_path / "blobs")
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(Path("..", "blobs", path.name))
    ended = tunesmith("chat", tmp_path / "snapshot", "--prompt", "Hi", "--max-tokens", "1", "--json")
    assert ended.code == 0, ended.err
