"""What tests share: a byte tokenizer and a tiny model made here, the command line as a real process, and the folder
of real tokenizers where it is at hand."""

from __future__ import annotations

import atexit
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tunesmith.engine.cpu import products
from tunesmith.training import run as training
from tunesmith.training.run import Run
from warm import SAMPLE_TOKENS, Forked, Streams, Warm

MACHINE = (
    *("attention", "batching", "cli", "engine", "golden", "guards", "kernels", "lanes", "liger", "loss", "memory"),
    *("planning", "products", "ranks", "resume", "self_check", "train"),
)
"""Files of the tests whose results a processor, its threads or what computes on it could change: they are marked
`machine`, and `make test-machines` runs them once more on others."""


def pytest_collection_finish() -> None:
    """What was imported and collected stays: every collection of garbage would go through it for half a second."""
    gc.collect()
    gc.freeze()


def cases(every: Iterable[Any], short: Callable[[Any], object]) -> list[Any]:
    """Parameters of a test: `make test` runs those of which `short` says yes, `make test-long` all. A tuple is the
    parameters of one case."""
    marks = {True: (), False: (pytest.mark.long,)}
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks[bool(short(case))]) for case in every
    ]


COLLECTED = pytest.StashKey[list[tuple[str, bool]]]()
"""Every case that was collected, and whether only `make test-long` runs it."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = [(item.nodeid, item.get_closest_marker("long") is not None) for item in items]
    for item in items:
        if item.path.stem.removeprefix("test_") in MACHINE and item.path.parent.name == "tests":
            item.add_marker("machine")


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job, and children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

training.SAMPLE_TOKENS = SAMPLE_TOKENS

os.environ["TUNESMITH_LANG"] = "en"  # whatever the locale is; what tests look for is in English

for _name in ("no_proxy", "NO_PROXY"):  # tests ask servers on this machine, whatever proxy theirs has
    os.environ[_name] = ",".join(filter(None, [os.environ.get(_name), "127.0.0.1,localhost,::1"]))

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
FAMILIES = ("atom-7b-standin", "deepseek-7b", "gemma-2b", "phi-3-mini", "phi-3-mini-april", "phi-4")
SHORT = ("deepseek-7b", "phi-3-mini")
"""Of the families, those that `make test` trains, too: a tokenizer of bytes and one of pieces with a token per byte."""
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ASKED = 4
"""Of the hundred general questions, in tests that do not look at the answers."""


def largest(numbers: Iterable[float]) -> float:
    """NaN if one is; Python's max passes over it."""
    return float(np.max([*numbers]))


def shows(difference: float, tolerance: float) -> bool:
    """Whether a planted fault is seen by a comparison with this tolerance: what is no number is."""
    return not difference <= tolerance


needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="real tokenizers lie in ../shared, which is not here")


def byte_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer with a token per byte and the three special tokens of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=chat_template
    )


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with weights that are bf16 numbers, and attention, take the way of AMX: by the processor's own
    instructions, or where it has none by emulated ones."""
    if products.amx_attention() is not None:
        return
    pytest.importorskip("numba", reason="Numba is not installed")
    import emulated_amx

    with FileLock(Path(tempfile.gettempdir()) / f"tunesmith-emulated-amx-{os.getuid()}"):  # one process compiles it
        of_products, of_attention = emulated_amx.modules()
    monkeypatch.setattr(products, "has_units", lambda: True)
    monkeypatch.setattr(products, "_amx", lambda: of_products)
    monkeypatch.setattr(products, "amx_attention", lambda: of_attention)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product takes the way of AMX, as on a processor that has none."""
    monkeypatch.setattr(products, "has_units", lambda: False)
    monkeypatch.setattr(products, "_amx", lambda: None)
    monkeypatch.setattr(products, "amx_attention", lambda: None)


@pytest.fixture(params=["whole", "split"])
def either(request: pytest.FixtureRequest) -> Any:
    """Both ways."""
    return request.getfixturevalue(request.param)


def save_tiny_model(folder: Path, **config: Any) -> Path:
    """A random two-layer Llama with the byte tokenizer, as a model folder."""
    settings = {
        "vocab_size": 259,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 258,
        "pad_token_id": 256,
        "bos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **{**settings, **config}), dtype=torch.float32
    )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_family(folder: Path, family: str, layers: int = 2) -> Path:
    """A random small model of a family's architecture with that family's real tokenizer."""
    source = SHARED / "models" / family
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "golden.json").unlink()
    for path in folder.iterdir():
        path.chmod(0o644)
    config = AutoConfig.from_pretrained(source)
    small = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": min(4, config.num_key_value_heads),
    }
    for name, value in small.items():
        setattr(config, name, value)
    config.head_dim = 16
    config.dtype = "float32"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generation = folder / "generation_config.json"
    kept = generation.read_text() if generation.is_file() else None
    model.save_pretrained(folder)
    if kept is None:
        generation.unlink(missing_ok=True)
    else:
        generation.write_text(kept)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model; do not write into it."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows of very unequal length."""
    path = tmp_path_factory.mktemp("data") / "talk.jsonl"
    rows = [{"instruction": f"Count to {i}.", "output": " ".join(map(str, range(i % 13 + 1)))} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def undisturbed(tiny_model: Path, talk: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small training that nobody stopped; do not write into it."""
    from small_runs import settings
    from tunesmith.training.run import train

    return train(settings(tiny_model, talk), tmp_path_factory.mktemp("runs") / "undisturbed")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Four good rows."""
    path = tmp_path / "rows.jsonl"
    talk = [("Who are you?", "I am Bo."), ("What is 1+1?", "Two."), ("Say hi.", "Hi!"), ("Bye?", "Bye now.")]
    path.write_text("".join(json.dumps({"instruction": q, "input": "", "output": a}) + "\n" for q, a in talk))
    return path


@pytest.fixture
def small_disk(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk of its own with as many KiB as the test's parameter says; not among pytest's folders, which it deletes
    after later runs, and could not if this one were killed."""
    path = Path(tempfile.mkdtemp())
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(path)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small disk can only be mounted by root, on Linux")
    yield path
    subprocess.run(["umount", str(path)], check=True)
    path.rmdir()


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


_NO_NETWORK = {"TUNESMITH_OFFLINE": "1", "COLUMNS": "200"}
_READ_LATE = {"OMP_NUM_THREADS", "COLUMNS", "TUNESMITH_CACHE", "TUNESMITH_API_KEY", "TUNESMITH_LANG"}
"""What no library looks at when it is imported, or is the same for all."""


@cache
def warm() -> Warm:
    """The process from which this worker's commands are forked."""
    warm = Warm({**os.environ, **_NO_NETWORK}).__enter__()
    atexit.register(warm.__exit__, None, None, None)
    return warm


SESSION = Path(__file__).with_name("session.py")


def start(
    *arguments: str | Path,
    cwd: Path | None = None,
    streams: Streams | None = None,
    typed: str = "",
    program: Path | str | None = None,
    **environment: str,
) -> Forked:
    """The command line, or a script of Python, as a process of its own that starts warm, without network."""
    environment = {**os.environ, **_NO_NETWORK, **environment}
    given = [str(argument) for argument in arguments]
    return warm().start(given, cwd, environment, streams=streams, typed=typed, program=program)


def finished(started: Forked, timeout: float = 300) -> Ended:
    """A process that was waited for; one that takes longer is killed."""
    try:
        out, err = started.communicate(timeout)
    finally:
        started.kill()
    return Ended(started.wait(), out, err)


def script(code: str, *arguments: str | Path, **environment: str) -> Ended:
    """Runs a script of Python as a process of its own, in which tunesmith and tests are at hand."""
    return finished(start(*arguments, program=code, **environment))


def tunesmith(*arguments: str | Path, cwd: Path | None = None, timeout: float = 300, **environment: str) -> Ended:
    """Runs the command line as a process of its own, without network; one that starts warm where the environment is
    nothing special."""
    if set(environment) <= _READ_LATE:
        return finished(start(*arguments, cwd=cwd, **environment), timeout)
    fresh = subprocess.run(
        [sys.executable, "-P", "-m", "tunesmith", *map(str, arguments)], cwd=cwd, timeout=timeout,
        env={**os.environ, **_NO_NETWORK, **environment},
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return Ended(fresh.returncode, fresh.stdout, fresh.stderr)


@pytest.fixture
def planted_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The environment names a proxy that answers nothing; what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def refuse(self) -> None:
            asked.append(f"{self.command} {self.path}")
            self.send_error(502)

        do_GET = do_POST = do_CONNECT = refuse

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        for spelling in (name, name.upper()):
            monkeypatch.setenv(spelling, f"http://127.0.0.1:{server.server_port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo's real model; fetched once if it is not here, and the test is skipped where that can not be."""
    from tunesmith import hub
    from tunesmith.errors import ModelError
    from tunesmith.models import prepared

    try:
        return prepared(hub.locate("smollm2")).folder
    except ModelError as error:
        pytest.skip(f"SmolLM2 can not be fetched here: {error}")


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export is compared on four short answers, which are enough to see a fault."""
    from tunesmith.export import live

    monkeypatch.setattr(live, "N_PROMPTS", 4)
    monkeypatch.setattr(live, "REPLY_TOKENS", 8)


@pytest.fixture
def few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation and a study ask ASKED of the hundred general questions."""
    from tunesmith.evaluation import evaluate, general

    few = general.questions()[:ASKED]
    for module in (evaluate, general):
        monkeypatch.setattr(module, "questions", lambda: few)


@pytest.fixture(scope="module", params=cases(FAMILIES, lambda family: family in SHORT))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Any:
    """A `trained_families.Trained`; trained once, whichever process of pytest-xdist asks first."""
    from trained_families import Trained, train

    shared = tmp_path_factory.getbasetemp()
    folder = (shared if worker_id == "master" else shared.parent) / "families" / request.param
    folder.mkdir(parents=True, exist_ok=True)
    said = folder / "said.json"
    with FileLock(folder / "lock"):
        if not said.is_file():
            said.write_text(json.dumps(train(request.param, folder)))
    return Trained(request.param, folder / "base", folder / "rows.jsonl", folder / "run", json.loads(said.read_text()))
