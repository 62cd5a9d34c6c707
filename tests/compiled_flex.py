"""What the kernels of flex attention take of a card's shared memory, compiled for cards that are not here.

    python compiled_flex.py CARD:H/KxD:DTYPE:LENGTH[:softcap=S][:window=W][:sinks] …

Attention of H heads of queries and K of keys, of size D, over a tree of so many tokens and some. Prints a line of JSON
for each kernel. Run by `test_cards.py` and `benchmarks/card_kernels.py`: what it tells torch stays for the whole
process.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_ALWAYS_COMPILE"] = "1"

import no_card  # before torch
from no_card import CARDS, Card

# isort: split
import torch
import torch._functorch.config as functorch
import triton
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch.nn.attention import flex_attention
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tunesmith.engine import flex, trie
from tunesmith.engine.attention import Style
from tunesmith.types import Origin, Rendered


def nothing(*_: Any) -> None: ...


class Written(Exception):
    """The code stands; nothing is run."""


def rows(length: int) -> trie.Tree:
    """Two rows that share a beginning."""
    ids = [tuple(range(8)) + tuple(range(100 * n, 100 * n + length - 8)) for n in (1, 2)]
    return trie.lay_out([Rendered(row, ((4, length),), Origin("rows", n)) for n, row in enumerate(ids)])


def written_for(card: Card, heads: tuple[int, int], size: int, dtype: torch.dtype, **style: Any) -> list[str]:
    """The code that inductor writes of attention over a tree on this card, forward and backward."""
    codes: list[str] = []

    def keep(graph: GraphLowering) -> Any:
        wrapper, _ = graph.codegen()
        codes.append(wrapper.value)
        module = mock.MagicMock()
        module.__file__ = "none"
        return module

    def backend(graph: Any, _: Any) -> Any:
        with (
            mock.patch.object(GraphLowering, "compile_to_module", keep),
            mock.patch.object(GraphLowering, "save_output_code", nothing, create=True),
            functorch.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False),
            torch._inductor.config.patch(force_disable_caches=True, compile_threads=1),
        ):
            compile_fx(graph, on_card(graph))
        raise Written

    torch._dynamo.reset()
    tree = rows(style.pop("length"))
    n = len(tree.token_ids)
    given = [torch.randn(n, count, size, dtype=dtype).requires_grad_() for count in (heads[0], heads[1], heads[1])]
    compiled = torch.compile(flex_attention.flex_attention, dynamic=True, backend=backend, fullgraph=True)
    with (
        no_card.told_of(card),
        mock.patch.object(flex, "_flex", compiled),
        mock.patch.object(flex, "shared_memory", return_value=card.shared_bytes),
        mock.patch.object(flex_attention, "_validate_device", nothing),
    ):
        try:
            flex.Flex(tree, torch.device("cpu")).attend(*given, Style(size**-0.5, **style))
        except Exception as error:  # dynamo wraps what its backend raises, differently in each version
            if not any(isinstance(each, Written) or "Written" in str(each) for each in causes(error)):
                raise
    return codes


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def on_card(graph: Any) -> list[Any]:
    """A graph's inputs, laid onto the card."""
    made = []
    for node in graph.graph.find_nodes(op="placeholder"):
        value = node.meta["example_value"]
        if isinstance(value, torch.Tensor):
            with value.fake_mode:
                moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")
            value = node.meta["example_value"] = moved.requires_grad_(value.requires_grad)
        made.append(value)
    return made


def kernels(code: str) -> Iterator[tuple[str, str]]:
    """Name and text of each of Triton's kernels."""
    for found in re.finditer(r"async_compile\.triton\('([^']+)', '''(.*?)''', device_str", code, re.DOTALL):
        yield found[1], found[2].replace("\\\\", "\\")


def compiled(name: str, text: str, card: Card, folder: Path) -> dict[str, Any] | None:
    """What a kernel takes; None of one that is no template of attention."""
    taken: dict[str, Any] = {}

    def template(**said: Any) -> Any:
        def take(function: Any) -> Any:
            taken.update(said, function=function)
            return function

        return take

    def other(*_: Any, **__: Any) -> Any:
        return lambda function: function

    path = folder / f"{name}.py"
    path.write_text(text)
    names = ("pointwise", "reduction", "persistent_reduction")
    with (
        mock.patch.multiple(triton_heuristics, template=template, **dict.fromkeys(names, other)),
        mock.patch.object(triton_helpers, "set_driver_to_gpu", nothing),  # it looks for a card's driver
    ):
        exec(compile(text, str(path), "exec"), {"__file__": str(path), "__name__": name})
    if not taken:
        return None
    meta = taken["triton_meta"]
    (divisible,) = meta["configs"]  # by 16: what is not can not be fetched in advance, and takes less
    source = ASTSource(taken["function"], dict(meta["signature"]), dict(meta["constants"]), dict(divisible))
    options = {"num_warps": taken["num_warps"], "num_stages": taken["num_stages"]}
    made = triton.compile(source, target=GPUTarget("cuda", card.arch, 32), options=options)
    return {"kernel": name, **no_card.taken_by(made), "limit": card.shared_bytes, **options}


def style_of(words: Sequence[str], n_heads: int) -> dict[str, Any]:
    said = dict(word.partition("=")[::2] for word in words)
    style: dict[str, Any] = {"sinks": torch.linspace(-1, 1, n_heads)} if "sinks" in said else {}
    kinds = {"softcap": float, "window": int}
    return style | {name: kinds[name](value) for name, value in said.items() if name in kinds}


def main() -> None:
    # What these look at before the first compilation asks a card.
    for module in (joint_graph, post_grad):
        module.lazy_init(torch.device("cpu"))
        module.lazy_init = nothing
    by_name = {card.name: card for card in CARDS}
    for asked in sys.argv[1:]:
        name, shape, dtype, length, *more = asked.split(":")
        card, (heads, _, size) = by_name[name], shape.partition("x")
        n_heads, n_keys = map(int, heads.split("/"))
        style = style_of(more, n_heads)
        try:
            codes = written_for(card, (n_heads, n_keys), int(size), getattr(torch, dtype), length=int(length), **style)
            with tempfile.TemporaryDirectory() as folder, no_card.told_of(card):
                each = [compiled(*kernel, card, Path(folder)) for code in codes for kernel in kernels(code)]
            for found in filter(None, each):
                print(json.dumps({"asked": asked, **found}), flush=True)
        except Exception as error:  # said of this one kernel, for which its test fails; the others are still tried
            print(json.dumps({"asked": asked, "error": f"{type(error).__name__}: {str(error)[:300]}"}), flush=True)


if __name__ == "__main__":
    main()
