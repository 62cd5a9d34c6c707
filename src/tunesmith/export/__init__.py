"""A finished run in the form in which models are served, opened again and compared with the live adapter.

    adapter   peft's folder as it is; vLLM, SGLang and peft itself load it beside its base
    merged    one set of safetensors that plain transformers opens
    gguf      one file for llama.cpp and what is built on it
    ollama    that file and a Modelfile beside it

Nothing counts as written until it has been compared: it takes its name only then.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith import machines, models, reading, runs
from tunesmith.chat import Opened
from tunesmith.errors import ProofError, RecipeError, RunError
from tunesmith.export import gguf_file, ollama
from tunesmith.export.live import Answers, Compared, at_least
from tunesmith.export.llama import QUANTIZE, SMALLER_TYPES, contents_of, write_gguf
from tunesmith.export.merged import DTYPES, write_merged
from tunesmith.export.merging import Merged
from tunesmith.language import marked, said
from tunesmith.runs import rundir
from tunesmith.runs.rundir import RunDir
from tunesmith.training import adapter_files

Form = Literal["adapter", "merged", "gguf", "ollama"]
FORMS: tuple[Form, ...] = ("adapter", "merged", "gguf", "ollama")
_OF_WHOLE_WEIGHTS = marked(
    "Trained beside weights of 4 bits; written and compared with the base's own, so its answers differ from chat's."
)


@dataclass(frozen=True)
class Export:
    """What was written, and what it was compared with."""

    path: Path
    to: Form
    checks: tuple[Compared, ...]
    notes: tuple[str, ...] = ()
    """What was not compared, or differs within the bounds; a sentence each."""

    def as_dict(self) -> dict[str, Any]:
        checks = [asdict(check) for check in self.checks]
        return {"path": str(self.path), "to": self.to, "checks": checks, "notes": list(self.notes)}


def export(
    path: Path,
    to: Form,
    out: Path | None = None,
    dtype: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Export:
    """Writes a finished run as `to` into a new folder, opens it again and compares it.

    `dtype` None: as the base's files, float16 for llama.cpp. Raises RunError for a folder that is not empty, a disk
    that is full, or a base of 4 bits that does not fit as a whole, RecipeError for a type that the form can not have,
    ModelError for a model that the form can not express, ProofError when what was written differs by more than its
    bounds; the figures are in the message, and nothing is left.
    """
    _check_dtype(to, dtype)
    run = rundir.open_run(path)
    runs.require_finished(run)
    notes = _check_names(run.adapter)
    if not rundir.is_whole(run.adapter):
        found, fix = said("an adapter that is not as it was written"), said("Copy it again from where it came.")
        raise ProofError(str(run.adapter), found, said("the digests in files.json"), fix)
    final = out or run.path / ("exported" if to == "adapter" else to)
    rundir.check_target(final)
    tell(said("Opening the run and its base …"))
    opened = Opened.of(path)
    merged = Merged(opened.found.folder, run.adapter)
    held = opened.recipe.model
    if to != "adapter" and held.quantize != "none":
        _require_memory(merged)
        notes.append(said(_OF_WHOLE_WEIGHTS))
        held = held.model_copy(update={"quantize": "none"})
    chat = opened.chat(held)
    contents = contents_of(merged, chat, dtype, Path(held.name).name) if to in ("gguf", "ollama") else None
    modelfile = ollama.modelfile_of(chat) if to == "ollama" else None
    live = None
    if to != "adapter":
        live = Answers.of(chat, tell)
    del chat
    gc.collect()
    with rundir.commit(final) as folder:
        if live is None:
            checks = _adapter(run, folder)
        elif contents is not None:
            checks = write_gguf(contents, dtype or "float16", folder, live, tell, notes)
            if modelfile is not None:
                (folder / "Modelfile").write_text(modelfile.text, encoding="utf-8")
                checks += ollama.talks_alike(modelfile.template, live.template, notes)
        else:
            kept = DTYPES[dtype] if dtype else None
            tell(said("Writing the merged weights …"))
            rundir.require_space(final, merged.n_bytes(kept))
            checks = write_merged(merged, run, folder, kept, live, tell)
        report = {"to": to, "checks": [asdict(check) for check in checks], "notes": notes}
        rundir.write_json(folder / "export.json", report)
        if wrong := [check for check in checks if not check.ok]:
            raise ProofError(
                str(final),
                "; ".join([f"{check.name}: {check.value:.3g}" for check in wrong] + notes),
                "; ".join(f"{check.bound:.3g}" for check in wrong),
                said("Nothing was left. Please report this with the model's name."),
            )
    return Export(final, to, tuple(checks), tuple(notes))


def _require_memory(merged: Merged) -> None:
    """Raises RunError where the base, which was trained in 4 bits, does not fit as a whole."""
    device, needed = models.device(), merged.n_bytes(None)
    free = machines.free_bytes(device)
    if free < needed:
        fix = said("Use a machine with more.")
        if device.type == "cuda":
            fix = said(
                "Use a machine with more, or set CUDA_VISIBLE_DEVICES= for this command: it computes on the CPU then."
            )
        expected = said(
            "{gib:.1f} GiB for the base's weights as they are, to compare what is written with",
            gib=needed / 2**30,
        )
        raise RunError(
            said("memory"),
            said("{gib:.1f} GiB free ({device})", gib=free / 2**30, device=device.type),
            expected,
            fix,
        )


def _check_dtype(to: Form, dtype: str | None) -> None:
    if dtype is None:
        return
    if to == "adapter":
        raise RecipeError("--dtype", dtype, said("none: an adapter is copied as it is"), said("Leave it out."))
    if to == "merged" and dtype not in DTYPES:
        raise RecipeError(
            "--dtype",
            repr(dtype),
            said("one of {names}", names=", ".join(DTYPES)),
            said("Leave it out for the base's own."),
        )
    if to == "merged" or dtype in gguf_file.TYPES:
        return
    if dtype not in SMALLER_TYPES:
        expected = said("one of {names}", names=", ".join([*gguf_file.TYPES, *SMALLER_TYPES]))
        raise RecipeError("--dtype", repr(dtype), expected, said("Leave it out for float16."))
    if shutil.which(QUANTIZE) is None:
        fix = said(
            "Install llama.cpp (its releases hold the program) or choose one of {names}.",
            names=", ".join(gguf_file.TYPES),
        )
        raise RecipeError("--dtype", repr(dtype), said("llama.cpp's own {program} on the PATH", program=QUANTIZE), fix)


def _adapter(run: RunDir, folder: Path) -> list[Compared]:
    """peft's folder: adapter_config.json and adapter_model.safetensors as peft, vLLM and SGLang read them."""
    digests = json.loads((run.adapter / "files.json").read_text(encoding="utf-8"))
    names = [name for name in sorted(adapter_files.known_names() & digests.keys()) if name != "files.json"]
    for name in names:
        reading.copy(run.adapter / name, folder / name)
    same = all(rundir.sha256(folder / name) == digests[name]["sha256"] for name in names)
    return [at_least(marked("same bytes"), float(same), 1)]


def _check_names(adapter: Path) -> list[str]:
    """A sentence for what lies in adapter/ beside its own files, and stays there. Raises ProofError where one of its
    own is a link, a pipe or a device: reading it would carry out what it leads to, or never end."""
    own, others = adapter_files.known_names(), list[str]()
    for path in sorted(adapter.iterdir()):
        if path.name not in own:
            others.append(path.name)
        elif path.is_symlink() or not path.is_file():
            fix = said("Copy it again from where it came, as files.")
            raise ProofError(str(path), reading.kind(path), said("a file, as training wrote it"), fix)
    if not others:
        return []
    return [said("Not copied, for no part of an adapter is called so: {names}.", names=", ".join(others))]
