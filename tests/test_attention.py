"""Attention over trees: every backend gives what each document gives on its own, output and gradients.

Legend: T tokens, H query heads, K key heads, D head size.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import cases, largest, shows
from test_trie import batches, seen
from tunesmith.engine import attention, flex
from tunesmith.engine.attention import Backend, Style
from tunesmith.engine.cpu import gather, products
from tunesmith.engine.cpu.gather import Gather
from tunesmith.engine.trie import Tree, lay_out
from tunesmith.types import Origin, Rendered

CPU = torch.device("cpu")
HEADS = [(4, 2), (8, 1), (3, 3)]
WINDOWS = [None, 1, 3, 7]
BACKENDS: tuple[Backend, ...] = ("gather", "reference")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
STYLES: dict[str, dict[str, Any]] = {"plain": {}, "soft-capped": {"softcap": 1.5}, "sinks": {"sinks": True}}


def grow(seed: int, *lengths: tuple[int, int]) -> Tree:
    """A tree of documents, each (what it shares with the one before, its length), besides a repeated one."""
    draw = random.Random(seed)
    made: list[tuple[int, ...]] = [()]
    for shared, length in lengths:
        made.append(made[-1][:shared] + tuple(draw.randrange(1000) for _ in range(length - shared)))
    rows = [*made[1:], made[1]]
    return lay_out([Rendered((*ids, 0), ((len(ids), len(ids) + 1),), Origin("x", n)) for n, ids in enumerate(rows)])


SMALL = grow(0, (0, 20), (11, 17), (11, 30), (0, 1), (0, 9), (8, 40), (3, 12), (40, 41))
# Trunks and branches beyond the longest keys that are written out, one of them longer than a masked piece.
LONG = grow(1, (0, 330), (325, 345), (100, 400), (0, 340), (0, 5))


def tensors(tree: Tree, heads: tuple[int, int], size: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key and value, and a gradient of the result."""
    made, n = torch.Generator().manual_seed(size), len(tree.token_ids)
    shapes = [(n, heads[0], size), (n, heads[1], size), (n, heads[1], size), (n, heads[0], size)]
    return [torch.randn(shape, generator=made, dtype=torch.float64).to(dtype) for shape in shapes]


def style(heads: tuple[int, int], size: int, *, window: int | None = None, sinks: bool = False, **others: Any) -> Style:
    weights = torch.linspace(-1, 1, heads[0], dtype=torch.float64) if sinks else None
    return Style(1.3 * size**-0.5, window, sinks=weights, **others)


def results(tree: Tree, backend: Backend, given: Sequence[Tensor], style: Style) -> list[Tensor]:
    """Output and gradients with respect to query, key and value."""
    *leaves, d_out = (tensor.clone() for tensor in given)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = attention.sight(tree, backend, CPU).attend(*leaves, style)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def worst(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference; the numbers are about one."""
    return largest((a.double() - b.double()).abs().max().item() for a, b in zip(found, expected, strict=True))


# --- the reference ----------------------------------------------------------------------------------------------------


def alone(tree: Tree, given: Sequence[Tensor], style: Style) -> Tensor:
    """Attention row by row, head by head, over nothing but the keys on the way to the query."""
    query, key, value = given[:3]
    out = torch.empty_like(query)
    for q in range(len(query)):
        path = seen(tree, q)
        path = path if style.window is None else path[-style.window :]
        for head in range(query.shape[1]):
            shared = head * key.shape[1] // query.shape[1]
            scores = key[path, shared] @ query[q, head] * style.scale
            if style.softcap is not None:
                scores = style.softcap * torch.tanh(scores / style.softcap)
            weights = scores.exp()
            rest = 0.0 if style.sinks is None else style.sinks[head].exp()
            out[q, head] = weights @ value[path, shared] / (weights.sum() + rest)
    return out


@pytest.mark.parametrize("kind", STYLES)
@pytest.mark.parametrize("window", WINDOWS)
def test_the_reference_is_each_document_on_its_own(window: int | None, kind: str) -> None:
    heads, size = (4, 2), 8
    given, asked = tensors(SMALL, heads, size), style(heads, size, window=window, **STYLES[kind])
    out = attention.sight(SMALL, "reference", CPU).attend(*given[:3], asked)
    assert worst([out], [alone(SMALL, given, asked)]) < 1e-13  # observed 1.3e-15


def test_a_document_gets_what_it_gets_without_the_others() -> None:
    """torch's causal attention over one row is the truth that models were trained with."""
    given, asked = tensors(SMALL, (4, 2), 8), style((4, 2), 8)
    out = attention.sight(SMALL, "gather", CPU).attend(*given[:3], asked)
    for last in range(len(SMALL.token_ids)):
        path = seen(SMALL, last)
        query, key, value = (tensor[path].transpose(0, 1)[None] for tensor in given[:3])
        row = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=asked.scale, enable_gqa=True
        )
        assert worst([out[path]], [row[0].transpose(0, 1)]) < 1e-13  # observed 1.3e-15


# --- gather -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 2**18])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("size", [8, 64, 256])
@pytest.mark.parametrize("heads", HEADS)
def test_gather_is_the_reference(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], size: int, window: int | None, tile: int
) -> None:
    monkeypatch.setattr(gather, "_TILE", tile)
    given = tensors(SMALL, heads, size)
    for kind in STYLES:
        asked = style(heads, size, window=window, **STYLES[kind])
        difference = worst(results(SMALL, "gather", given, asked), results(SMALL, "reference", given, asked))
        assert difference < 1e-12, kind  # observed 2.5e-14


@pytest.mark.parametrize("kind", STYLES)
@pytest.mark.parametrize("window", [None, 7, 300])
def test_gather_is_the_reference_on_rows_of_many_tiles(window: int | None, kind: str) -> None:
    heads, size = (4, 2), 8
    given, asked = tensors(LONG, heads, size), style(heads, size, window=window, **STYLES[kind])
    assert (
        worst(results(LONG, "gather", given, asked), results(LONG, "reference", given, asked)) < 1e-12
    )  # observed 1.2e-14


def test_a_tile_has_no_more_scores_than_are_planned() -> None:
    tree = grow(3, (0, 9000), (0, 700), (300, 350), (0, 3))
    for heads in (1, 9, 64):
        for rows in (range(len(tree.token_ids)), range(5000, 9400)):
            cuts = list(tiles(tree, rows, heads))
            assert [query for queries, _ in cuts for query in queries] == list(rows)
            most = gather.most_scores(heads, 9000)
            assert max(heads * len(queries) * (seen.stop - seen.start) for queries, seen in cuts) <= most


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("heads", "size"), [((4, 2), 64), ((2, 2), 96), ((8, 1), 256)])
@pytest.mark.parametrize("length", [1, 70, 3000])
def test_a_walk_takes_the_memory_that_is_said(
    request: pytest.FixtureRequest, split: bool, heads: tuple[int, int], size: int, length: int
) -> None:
    if split:
        request.getfixturevalue("split")
    tree = grow(0, (0, length), (length // 2, length // 2 + 30))
    rows, given = (
        range(len(tree.token_ids)),
        tuple(torch.empty(len(tree.token_ids), n, size) for n in (*heads, heads[1])),
    )
    taken = list[int]()

    def take(_: str, *shape: int) -> Tensor:
        taken.append(math.prod(shape))
        return torch.empty(shape)

    visits = list(gather._visits(tree, rows))
    (gather.SplitWalk if split else gather.Walk)(visits, rows, (given[0], given[1], given[2]), None, take)
    said = gather.space(len(rows), *heads, size, max(tree.position) + 1, split=split)
    assert sum(taken) == said if split else 0.3 < sum(taken) / said <= 1  # fewer scores where rows are short


def tiles(tree: Tree, rows: range, heads: int) -> Iterator[tuple[range, slice]]:
    for visit in gather._visits(tree, rows):
        yield from gather._cut(visit, heads, None)


@settings(max_examples=60, deadline=None)
@given(
    batches(letters=2),
    st.sampled_from(WINDOWS),
    st.sampled_from(sorted(STYLES)),
    st.sampled_from([1, 40, 2**18]),
    st.integers(1, 6),
    st.integers(0, 6),
    st.booleans(),
)
def test_however_gather_cuts_it_is_the_reference(
    documents: list[Rendered], window: int | None, kind: str, tile: int, fewest: int, more: int, share: bool
) -> None:
    heads, size = (2, 1), 2
    tree, asked = lay_out(documents, share_prefix=share), style(heads, size, window=window, **STYLES[kind])
    given = tensors(tree, heads, size)
    expected = results(tree, "reference", given, asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "_TILE", tile)
        patch.setattr(gather, "_FEWEST_QUERIES", fewest)
        patch.setattr(gather, "_MOST_QUERIES", fewest + more)
        assert worst(results(tree, "gather", given, asked), expected) < 1e-12  # observed 1.1e-15


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches(letters=2),
    st.sampled_from(WINDOWS),
    st.lists(st.floats(0, 1), max_size=3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([((4, 2), 2), ((4, 2), 32), ((6, 1), 64), ((3, 3), 96)]),
)
def test_queries_can_be_dealt_out(
    either: None,
    documents: list[Rendered],
    window: int | None,
    cuts: list[float],
    apart: bool,
    kept: bool,
    dtype: torch.dtype,
    sizes: tuple[tuple[int, int], int],
) -> None:
    """fp32 is computed by kernels, and where heads have multiples of 32 numbers by AMX, with it. Memory that is kept
    has anything in it."""
    heads, size = sizes
    tree, asked = lay_out(documents), style(heads, size, window=window)
    given, n = tensors(tree, heads, size, dtype), len(tree.token_ids)
    expected = results(tree, "reference", [tensor.double() for tensor in given], asked)
    if apart:  # as they lie in the output of one product
        joined = torch.cat([tensor.flatten(1) for tensor in given[:3]], 1)
        widths = [tensor[0].numel() for tensor in given[:3]]
        given[:3] = [part.unflatten(1, (-1, size)) for part in joined.split(widths, 1)]
    bounds = [0, *sorted(round(cut * n) for cut in cuts), n]
    found = dealt_out(tree, given, asked, bounds, kept=kept)
    assert worst(found, expected) < (1e-12 if dtype == torch.float64 else 1e-5)  # observed 4e-16, 9e-7


def dealt_out(tree: Tree, given: Sequence[Tensor], style: Style, bounds: Sequence[int], *, kept: bool) -> list[Tensor]:
    """As `results`, by a walk for the queries between each two bounds; memory that is kept has anything in it."""
    query, key, value, d_out = given
    take = (lambda _, *shape: torch.full(shape, torch.nan, dtype=query.dtype)) if kept else None
    sight, outs, gradients = Gather(tree, CPU), [], []
    for start, stop in itertools.pairwise(bounds):
        if start == stop:
            continue
        out, backward = attention.by_hand(sight, (query, key, value), style, range(start, stop), take=take)
        outs.append(out.clone())
        *found, again = backward(d_out[start:stop])
        gradients.append(found)
        assert torch.equal(again, outs[-1])
    summed = [torch.stack([g[i] for g in gradients]).sum(0) for i in (1, 2)]
    return [torch.cat(outs), torch.cat([g[0] for g in gradients]), *summed]


@functools.cache
def long_reference(heads: tuple[int, int], size: int, window: int | None) -> list[Tensor]:
    """Of rows in fp32, in float64."""
    given = [tensor.double() for tensor in tensors(LONG, heads, size, torch.float32)]
    return results(LONG, "reference", given, style(heads, size, window=window))


@pytest.mark.parametrize("kept", cases([False, True], bool))
@pytest.mark.parametrize("window", cases([None, 7, 100, 300], lambda window: window in (None, 100)))
@pytest.mark.parametrize(("heads", "size"), [((4, 2), 32), ((6, 1), 64), ((3, 3), 96)])
def test_rows_of_many_blocks_in_fp32(
    either: None, heads: tuple[int, int], size: int, window: int | None, kept: bool
) -> None:
    """By AMX and without: more rows and keys than are worked on together, and bounds where no block ends."""
    given, asked = tensors(LONG, heads, size, torch.float32), style(heads, size, window=window)
    n, (query, key, value, _) = len(LONG.token_ids), given
    kind = gather.Walk if products.amx_attention() is None else gather.SplitWalk
    assert type(Gather(LONG, CPU).walk(range(n), (query, key, value), asked)) is kind
    found = dealt_out(LONG, given, asked, [0, 37, 333, 701, n], kept=kept)
    assert worst(found, long_reference(heads, size, window)) < 1e-5  # observed 4.8e-6


@pytest.mark.parametrize("reason", ["soft-capped", "sinks", "fp64", "48 numbers", "longer values", "numbers apart"])
def test_what_amx_does_not_attend_to(split: None, reason: str) -> None:
    heads, size = (4, 2), 48 if reason == "48 numbers" else 32
    dtype = torch.float64 if reason == "fp64" else torch.float32
    query, key, value, _ = tensors(SMALL, heads, size, dtype)
    if reason == "longer values":
        value = torch.cat([value, value], 2)
    if reason == "numbers apart":
        key = key.transpose(1, 2).contiguous().transpose(1, 2)
    asked = style(heads, size, **STYLES.get(reason, {}))
    walk = Gather(SMALL, CPU).walk(range(len(SMALL.token_ids)), (query, key, value), asked)
    assert type(walk) is gather.Walk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", STYLES)
def test_gather_rounds_no_more_than_the_reference(kind: str, dtype: torch.dtype) -> None:
    heads, size = (4, 2), 64
    given, asked = tensors(SMALL, heads, size, dtype), style(heads, size, **STYLES[kind])
    exact = results(SMALL, "reference", [tensor.double() for tensor in given], asked)
    gather, reference = (worst(results(SMALL, backend, given, asked), exact) for backend in BACKENDS)
    assert gather < 2 * reference  # observed 0.6 to 1.2 times


def test_gather_computes_few_scores_that_nobody_needs() -> None:
    """What it is for: with 300 documents behind one prompt, a dense mask is many times as much."""
    tree = grow(2, (0, 64), *[(60, 60 + 4 + n % 9) for n in range(300)])
    needed = sum(position + 1 for position in tree.position)
    cuts = list(tiles(tree, range(len(tree.token_ids)), 1))
    computed = sum(len(queries) * (seen.stop - seen.start) for queries, seen in cuts)
    assert computed < 1.1 * needed  # observed 1.05
    assert len(tree.token_ids) ** 2 > 20 * needed  # observed 38


# --- flex -------------------------------------------------------------------------------------------------------------


@st.composite
def long_trees(draw: st.DrawFn) -> Tree:
    """Of up to some nine blocks of the mask."""
    lengths, before = [], 0
    for _ in range(draw(st.integers(1, 6))):
        shared = draw(st.integers(0, before))
        before = shared + draw(st.integers(1, 300))
        lengths.append((shared, before))
    return grow(draw(st.integers(0, 9)), *lengths)


@given(long_trees(), st.sampled_from([None, 1, 64, 200]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_block_of_the_mask_is_passed_over_where_nobody_sees_and_whole_where_all_do(
    tree: Tree, window: int | None
) -> None:
    n, size = len(tree.end), flex.BLOCK
    n_blocks = -(-n // size)
    each = torch.zeros(n_blocks * size, n_blocks * size, dtype=torch.bool)
    each[:n, :n] = attention.Dense(tree, CPU).visible(window)
    pairs = each.view(n_blocks, size, n_blocks, size).transpose(1, 2).flatten(2)
    asked, whole = flex.blocks(tree, window)
    assert not (asked & whole).any()
    assert not (pairs.any(2) & ~(asked | whole)).any() and not (whole & ~pairs.all(2)).any()
    if window is None:
        assert torch.equal(asked | whole, pairs.any(2)) and torch.equal(whole, pairs.all(2))


def test_the_mask_in_blocks_is_what_torch_finds_by_looking_at_each_pair() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    for tree in (SMALL, LONG):
        mine = flex.Flex(tree, CPU)._in_blocks(None)  # what it gives to the kernel is seen nowhere else on a CPU
        theirs = create_block_mask(mine.mask_mod, None, None, len(tree.end), len(tree.end), device="cpu")
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        assert torch.equal(mine.to_dense(), theirs.to_dense())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", STYLES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS[:2])
def test_flex_is_the_reference(heads: tuple[int, int], window: int | None, kind: str) -> None:
    """Forward only: without a GPU it runs written out, and then knows no backward pass."""
    given, asked = tensors(SMALL, heads, 64)[:3], style(heads, 64, window=window, **STYLES[kind])
    try:
        out = attention.sight(SMALL, "flex", CPU).attend(*given, asked)
    except NotImplementedError as reason:
        pytest.skip(f"this torch has no flex attention here: {reason}")
    assert worst([out], [attention.sight(SMALL, "reference", CPU).attend(*given, asked)]) < 1e-12  # observed 1.3e-15


@pytest.fixture(scope="module")
def compiled() -> Iterator[CompileCounterWithBackend]:
    """Flex attention as it is compiled for a card, forward and backward, but for the card's own kernels: torch's
    formulas of both passes stand in their place. Counts the graphs that are made."""
    from torch.nn.attention import flex_attention

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "_validate_device", lambda *_: None)  # there is no backward pass on a CPU
        patch.setattr(flex, "_flex", flex.compiled(counter))
        yield counter
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which dynamo asks for
@pytest.mark.parametrize("kind", STYLES)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", cases([(heads,) for heads in (*HEADS, (12, 1))], lambda case: case[0][1] == 1))
def test_flex_compiled_is_the_reference_in_both_passes(
    compiled: CompileCounterWithBackend, heads: tuple[int, int], window: int | None, kind: str
) -> None:
    given, asked = tensors(SMALL, heads, 16), style(heads, 16, window=window, **STYLES[kind])
    assert worst(results(SMALL, "flex", given, asked), results(SMALL, "reference", given, asked)) < 1e-12


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which dynamo asks for
def test_lengths_of_all_kinds_make_few_graphs(compiled: CompileCounterWithBackend) -> None:
    """Or each would be compiled for seconds on a card, and beyond a limit torch falls back to a form that is not fused
    and keeps all scores."""
    before, asked = compiled.frame_count, style((4, 2), 16)
    for n in range(200):
        tree = grow(n, (0, 20 + 7 * n % 391), (9, 30 + 5 * n % 97), (11, 40 + n))
        given = tensors(tree, (4, 2), 16, torch.float32)
        if n % 10:
            with torch.no_grad():
                attention.sight(tree, "flex", CPU).attend(*given[:3], asked)
        else:
            results(tree, "flex", given, asked)
    assert compiled.frame_count - before <= 6  # observed 5


# --- negative controls ------------------------------------------------------------------------------------------------


def forked() -> int:
    """The first token of a segment that hangs at the one before it."""
    return next(segment.start for segment in SMALL.segments if SMALL.position[segment.start] > 0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["reference", "flex"])
def test_an_end_that_is_off_by_one_is_seen(backend: Backend) -> None:
    """Negative control: one token sees, or does not see, one key, and the comparison is far beyond its tolerance."""
    heads, size = (4, 2), 8
    given, asked = tensors(SMALL, heads, size)[:3], style(heads, size)
    right = attention.sight(SMALL, "gather", CPU).attend(*given, asked)
    fork = forked() - 1
    for wrong in (SMALL.end[fork] - 1, SMALL.end[fork] + 1):
        moved = replace(SMALL, end=(*SMALL.end[:fork], wrong, *SMALL.end[fork + 1 :]))
        found = attention.sight(moved, backend, CPU).attend(*given, asked)
        assert shows(worst([found], [right]), 1e-2)  # observed 0.36 at least


def test_a_segment_at_the_wrong_position_is_seen() -> None:
    heads, size = (4, 2), 8
    given, asked = tensors(SMALL, heads, size), style(heads, size)
    start = forked()
    moved = replace(SMALL, position=(*SMALL.position[:start], SMALL.position[start] - 1, *SMALL.position[start + 1 :]))
    found, expected = results(moved, "gather", given, asked), results(SMALL, "reference", given, asked)
    assert shows(worst(found, expected), 1e-2)  # observed 4.7, or NaN, by what lay in the memory


def test_a_window_counted_along_the_layout_is_seen() -> None:
    """A sibling's tokens stand between a branch and its trunk, but not in its document."""
    heads, size = (4, 2), 8
    given, asked = tensors(SMALL, heads, size), style(heads, size, window=3)
    moved = replace(SMALL, position=tuple(range(len(SMALL.position))))
    found, expected = results(moved, "reference", given, asked), results(SMALL, "gather", given, asked)
    assert shows(worst(found, expected), 1e-2)  # observed 3.1


# --- transformers -----------------------------------------------------------------------------------------------------


def tiny(kind: str, **config: Any) -> Any:
    """A random model of a kind whose scores are soft-capped or have sinks, in transformers' own eager attention."""
    common = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "pad_token_id": 0, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**common, **config}), attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {}),
        ("gemma2", {"attn_logit_softcapping": 2.0}),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": ROPE}),
    ],
)
def test_a_model_that_looks_through_a_tree_says_what_it_says_without(kind: str, config: dict[str, Any]) -> None:
    """Afterwards it is as it was: it chats, and is what the self-check takes for the truth."""
    model, ids = tiny(kind, **config), torch.randint(0, 61, (1, 24), generator=torch.Generator().manual_seed(0))
    tree = lay_out([Rendered((*ids[0].tolist(), 0), ((24, 25),), Origin("x", 1))])
    attention.register()
    with torch.no_grad():
        expected = model(ids).logits
        with attention.looking_through(attention.sight(tree, "gather", CPU), model):
            found = model(ids, position_ids=torch.arange(24)[None]).logits
        assert worst([found], [expected]) < 1e-4  # observed 6.5e-6, of logits up to ten
        assert torch.equal(model(ids).logits, expected)


def test_a_model_is_as_it_was_after_an_error() -> None:
    model, ids = tiny("gemma2"), torch.arange(24)[None]
    expected = model(ids).logits
    attention.register()
    with pytest.raises(ZeroDivisionError), attention.looking_through(attention.sight(SMALL, "gather", CPU), model):
        raise ZeroDivisionError
    assert torch.equal(model(ids).logits, expected)
    assert attention._current is None
