"""Which files make a model."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

from tunesmith.language import marked, said

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
    return missing([path.name for path in folder.iterdir() if path.is_file()], weights)


def missing(names: Iterable[str], weights: bool) -> list[str]:
    names = set(names)
    heavy = weight_files(names)
    absent = []
    if not _is_gguf(heavy):
        if "config.json" not in names:
            absent.append("config.json")
        if not any(fnmatch.filter(names, pattern) for pattern in _ANY_OF_FOR_TOKENIZER):
            absent.append(said("tokenizer files (tokenizer.json or tokenizer.model)"))
    if weights and not heavy:
        ggufs = len(fnmatch.filter(names, "*.gguf"))
        several = marked("weights (*.safetensors) but {n} GGUF files where one is needed")
        absent.append(said(several, n=ggufs) if ggufs else said("weights (*.safetensors)"))
    if weights:
        for family, ending, total in sorted({(s[1], s[4], int(s[3])) for s in map(_SHARD.fullmatch, heavy) if s}):
            wanted = [f"{family}-{number:05}-of-{total:05}{ending}" for number in range(1, total + 1)]
            absent += [name for name in [*wanted, f"{family}{ending}.index.json"] if name not in names]
    return absent


def needed(names: Iterable[str], weights: bool) -> list[str]:
    """The files of a repository that are fetched; all stand at its top."""
    top = sorted(name for name in names if "/" not in name)
    small = [name for name in top if any(fnmatch.fnmatchcase(name, pattern) for pattern in _SMALL_FILES)]
    heavy = weight_files(top)
    # Config and tokenizer are inside the GGUF file where they do not lie beside it.
    return small + heavy if weights or (_is_gguf(heavy) and missing(small, False)) else small


def _is_gguf(heavy: list[str]) -> bool:
    return bool(heavy) and heavy[0].endswith(".gguf")
