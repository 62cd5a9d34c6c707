"""How far the engine's gradient is from the true one, beside how far that of plain transformers + peft is.

    python benchmarks/exactness.py [--out benchmarks/results]

Small random models of twelve kinds, adapters that are not the identity, rows that share beginnings, no dropout; the
relative error of the gradient of all adapters, the worst of every way and cut. "lifted" is float64 with transformers'
fp32 parts (norms, rotary tables, the loss) computed in float64 too, on both sides; "as it is" leaves them. For fp32 and
bf16 the truth is the lifted gradient of the same weights, and of several seeds the worst is shown. "fp32, split" is an
fp32 model whose weights are bf16 numbers, by the layers written by hand, on a processor where products are split.
Writes a JSON, and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import test_engine as cases
from conftest import largest
from tunesmith.engine.cpu import products

SEEDS = 3
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def ways(name: str) -> list[str]:
    return [way for family, way in cases.WAYS if family == name]


def in_float64(name: str) -> dict[str, float]:
    """The worst error of all ways and cuts with and without the parts that transformers computes in fp32."""
    worst = {"lifted": 0.0, "as it is": 0.0}
    for way in ways(name):
        for asked in cases.SETTINGS[: 2 if way == "padded" else 4]:
            model = cases.family(name)
            with cases.Doubles():
                found = cases.take(cases.engine(model, way, cases.ignored, **asked))
            worst["lifted"] = largest([worst["lifted"], cases.distance(found, cases.truth(name, lifted=True))])
        unpadded = {"tokens_per_micro_batch": 1} if way == "padded" else {}
        found = cases.take(cases.engine(cases.family(name), way, cases.ignored, **unpadded))
        worst["as it is"] = largest([worst["as it is"], cases.distance(found, cases.truth(name, lifted=False))])
    return worst


def in_fewer_bits(name: str, dtype: torch.dtype) -> dict[str, float]:
    """The worst error of all ways, that of plain transformers + peft, and the median of their ratios."""
    ours, theirs, ratios = [], [], []
    for seed in range(SEEDS):
        right, plain = cases.rounded(name, dtype, seed)
        theirs.append(plain)
        for way in ways(name):
            if way == "decoder" and dtype == torch.bfloat16:
                continue
            model = cases.family(name, dtype, seed)
            found = cases.take(cases.engine(model, way, cases.ignored, **cases.SETTINGS[seed]), cases.FEW)
            ours.append(cases.distance(found, right))
            ratios.append(ours[-1] / plain)
    return {"ours": largest(ours), "plain": largest(theirs), "median_ratio": float(np.median(ratios))}


def split(name: str) -> dict[str, float] | None:
    """As `in_fewer_bits`, where factors of products are split; None where they are not."""
    if "decoder" not in ways(name) or not products.splits(torch.ones(1, 1)):
        return None
    ours, theirs = [], []
    for seed in range(SEEDS):
        model = cases.of_bfloat16_numbers(name, seed)
        with cases.Doubles():
            right = cases.plain(copy.deepcopy(model).double(), cases.FEW)
        theirs.append(cases.distance(cases.plain(model, cases.FEW), right))
        made = cases.engine(model, "decoder", cases.ignored, **cases.SETTINGS[seed])
        ours.append(cases.distance(cases.take(made, cases.FEW), right))
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    return {"ours": largest(ours), "plain": largest(theirs), "median_ratio": float(np.median(ratios))}


def table(result: dict[str, Any]) -> str:
    lines = [
        "| | float64, lifted | float64, as it is | fp32 | plain fp32 | ratio | bf16 | plain bf16 | ratio |"
        " fp32, split | plain | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, errors in result["families"].items():
        cells = [f"{errors['float64'][kind]:.1e}" for kind in ("lifted", "as it is")]
        for found in (*(errors[bits] for bits in NAMES.values()), errors["split"]):
            if found is None:
                continue
            cells += [f"{found['ours']:.1e}", f"{found['plain']:.1e}", f"{found['median_ratio']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    packages = ("tunesmith", "torch", "transformers", "peft")
    families = {
        name: {
            "float64": in_float64(name),
            **{bits: in_fewer_bits(name, dtype) for dtype, bits in NAMES.items()},
            "split": split(name),
        }
        for name in cases.FAMILIES
    }
    result = {
        "what": "relative error of the adapter's gradient",
        "date": datetime.date.today().isoformat(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "families": families,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"exactness-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    print(f"Written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
