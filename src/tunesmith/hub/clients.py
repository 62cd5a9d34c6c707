"""Hugging Face and ModelScope, each through its own client."""

from __future__ import annotations

import glob
import os
import re
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from tunesmith.hub.network import tell_huggingface
from tunesmith.language import said

Progress = Callable[[str, int, int], None]
"""Called with what is arriving, bytes so far and bytes in all; sometimes from another thread."""


@dataclass(frozen=True)
class Listing:
    """The files of a repository with their bytes (where the hub tells them), at one commit."""

    commit: str | None
    files: dict[str, int | None]
    raw: list[dict[str, Any]] = field(default_factory=list)
    bytes_to_come: int = 0


class Refused(Exception):
    """A hub does not give a model; `said` completes "found …"."""

    def __init__(self, kind: Literal["absent", "gated", "unreachable"], said: str) -> None:
        super().__init__(said)
        self.kind, self.said = kind, said


class Hub(Protocol):
    prefix: str
    name: str

    def cache(self) -> Path:
        """Where its client keeps files."""
        ...

    def kept(self, repo: str, revision: str | None) -> tuple[Path, str | None] | None:
        """The folder and commit its client has here, whole or not; asks nobody."""
        ...

    def listing(self, repo: str, revision: str | None) -> Listing: ...

    def download(self, repo: str, revision: str | None, listing: Listing, relay: Progress | None) -> Path:
        """The folder in which all files of `listing` are now; `relay` hears of the bytes that arrive."""
        ...

    def refusal(self, error: Exception, revision: str | None) -> Refused:
        """What an error of its client means."""
        ...

    def way_in(self, repo: str) -> str:
        """What a user does who may not read a model."""
        ...


class HuggingFace:
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

    def listing(self, repo: str, revision: str | None) -> Listing:
        tell_huggingface("HF_HUB_DISABLE_TELEMETRY")
        from huggingface_hub import HfApi

        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        return Listing(info.sha, {file.rfilename: file.size for file in info.siblings or ()})

    def download(self, repo: str, revision: str | None, listing: Listing, relay: Progress | None) -> Path:
        from huggingface_hub import snapshot_download

        names = [glob.escape(name) for name in listing.files]
        bar = _bar(repo, listing.bytes_to_come, relay) if relay else None
        return Path(snapshot_download(repo, revision=listing.commit, allow_patterns=names, tqdm_class=bar))

    def refusal(self, error: Exception, revision: str | None) -> Refused:
        from huggingface_hub import errors

        status = getattr(getattr(error, "response", None), "status_code", None)
        answer = f" ({status})" if status else ""
        if isinstance(error, errors.RevisionNotFoundError):
            return Refused("absent", said("no revision {revision} at {hub}", revision=revision, hub=self.name) + answer)
        if isinstance(error, errors.GatedRepoError):  # a kind of RepositoryNotFoundError, hence first
            return Refused("gated", said("a model that {hub} shows only to some", hub=self.name) + answer)
        absent = (errors.RepositoryNotFoundError, errors.DisabledRepoError, errors.HFValidationError)
        if isinstance(error, absent) or status == 404:
            return Refused("absent", said("no such model at {hub}", hub=self.name) + answer)
        if status in (401, 403):
            return Refused("gated", said("a model that {hub} shows only to some", hub=self.name) + answer)
        return Refused("unreachable", said("no usable answer from {hub} ({error})", hub=self.name, error=_cause(error)))

    def way_in(self, repo: str) -> str:
        from huggingface_hub import constants

        return said(
            "Accept the terms at {page} and log in with `hf auth login` (or set HF_TOKEN).",
            page=f"{constants.ENDPOINT}/{repo}",
        )


class ModelScope:
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

    def listing(self, repo: str, revision: str | None) -> Listing:
        # The entries themselves, since they alone name commits and are what download_repo(file_list=…) takes.
        entries = self._api().legacy.list_repo_files(repo, "model", revision=revision or "master")
        files = [entry for entry in entries if entry.get("Type") != "tree" and entry.get("Path")]
        if _is_commit(revision):
            commit = revision
        else:  # each file names the commit that wrote it last; the latest of them is what the files are now
            latest = max(files, key=lambda entry: entry.get("CommittedDate") or 0, default={}).get("Revision")
            commit = latest if _is_commit(latest) else None
        return Listing(commit, {entry["Path"]: entry.get("Size") for entry in files}, files)

    def download(self, repo: str, revision: str | None, listing: Listing, relay: Progress | None) -> Path:
        wanted = [entry for entry in listing.raw if entry["Path"] in listing.files]
        bars = [_callback(relay)] if relay else None
        api = self._api()
        return Path(api.download_repo(repo, "model", revision=revision, file_list=wanted, progress_callbacks=bars))

    def refusal(self, error: Exception, revision: str | None) -> Refused:
        from modelscope_hub import errors

        if isinstance(error, errors.FileDownloadError) and error.failed_files:
            error = next((e for e in error.failed_files.values() if isinstance(e, Exception)), error)
        status = getattr(error, "status_code", None)
        answer = f" ({status})" if status else ""
        if isinstance(error, errors.AuthenticationError | errors.PermissionDeniedError):
            return Refused("gated", said("a model that {hub} shows only to some", hub=self.name) + answer)
        if isinstance(error, errors.NotExistError | errors.InvalidParameter):
            return Refused("absent", said("no such model at {hub}", hub=self.name) + answer)
        return Refused("unreachable", said("no usable answer from {hub} ({error})", hub=self.name, error=_cause(error)))

    def way_in(self, repo: str) -> str:
        from modelscope_hub import HubConfig

        page = f"{HubConfig().endpoint}/models/{repo}"
        return said("Ask for it at {page} and log in with `ms login` (or set MODELSCOPE_API_TOKEN).", page=page)


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


def _cause(error: Exception) -> str:
    """The first line of what stands at the bottom of an error."""
    bottom: BaseException = error
    while bottom.__cause__ is not None:
        bottom = bottom.__cause__
    lines = str(bottom).strip().splitlines() or str(error).strip().splitlines()
    return lines[0][:200] if lines else type(bottom).__name__
