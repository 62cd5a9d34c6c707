"""Whichever library multiplies: one product, whatever lies beside the matrices, and numpy's threads as they were."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info
from torch import Tensor

from tunesmith import engine
from tunesmith.engine.cpu import memory, onepass, products
from tunesmith.engine.cpu.lanes import Lanes

by_openblas, split = pytest.mark.usefixtures("openblas"), pytest.mark.usefixtures("split")


@pytest.fixture
def openblas(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenBLAS is taken, as on an AMD processor."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(products, "_processor", lambda: "vendor_id : AuthenticAMD")
    monkeypatch.setattr(products, "_openblas", products._openblas.__wrapped__)
    if products._openblas() is None:
        pytest.skip("this numpy has no OpenBLAS")


@pytest.fixture
def alone() -> Iterator[None]:
    products.alone()
    with products.one_thread_each():
        yield
    products._thread.alone = False


def matrices(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    wide, tall = torch.randn(37, 29, dtype=dtype), torch.randn(41, 37, dtype=dtype)
    return {
        "plain": (tall, wide),
        "transposed": (wide.T, tall.T),
        "columns of a wider one": (tall[:, 3:20], wide[:17]),
        "no rows": (tall[:0], wide),
        "nothing to add up": (tall[:, :0], wide[:0]),
    }


@by_openblas
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("what", matrices(torch.float32))
def test_a_product_is_that_of_torch(alone: None, what: str, dtype: torch.dtype) -> None:
    a, b = matrices(dtype)[what]
    expected = (a.double() @ b.double()).to(dtype)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-13  # observed 4e-6, 7e-15
    assert torch.allclose(products.mm(a, b), expected, rtol=0, atol=tolerance)
    out = torch.full_like(expected, 7)
    assert products.mm(a, b, out) is out and torch.allclose(out, expected, rtol=0, atol=tolerance)


@by_openblas
def test_a_product_goes_into_columns_behind_its_own_factor(alone: None) -> None:
    """As an adapter's h does, behind x."""
    torch.manual_seed(0)
    extended, a = torch.randn(41, 48), torch.randn(40, 8)
    x, h = extended[:, :40], extended[:, 40:]
    before = x.clone()
    products.mm(x, a, h)
    assert torch.equal(x, before) and torch.allclose(h, before @ a, rtol=0, atol=2e-5)  # observed 4e-6


@by_openblas
def test_only_a_thread_that_is_alone_asks_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    matmul = np.matmul
    monkeypatch.setattr(products.np, "matmul", lambda *given, **named: (asked.append("numpy"), matmul(*given, **named)))
    square = torch.ones(4, 4)
    before = torch.get_num_threads()
    try:
        for n_threads, expected in ((4, 0), (2, 2)):
            torch.set_num_threads(n_threads)
            Lanes(2).run(lambda _: products.mm(square, square))
            assert len(asked) == expected
    finally:
        torch.set_num_threads(before)
    products.mm(square, square)
    assert len(asked) == 2


@by_openblas
def test_numpys_threads_are_as_before() -> None:
    def threads() -> list[int]:
        return [library["num_threads"] for library in threadpool_info() if library["internal_api"] == "openblas"]

    before = threads()
    inside = Lanes(2).run(lambda _: threads())
    assert inside == [[1] * len(before)] * 2 and threads() == before


@split
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(
    ("rows", "shared", "columns"),
    [
        (0, 64, 32),
        (1, 2, 1),
        (16, 32, 16),
        (37, 301, 41),
        (33, 63, 48),
        (128, 64, 96),
        (129, 1024, 33),
        (300, 2101, 70),
    ],
)
def test_a_product_of_a_split_factor_rounds_no_more_than_one_of_fp32(
    by_column: bool, add: bool, rows: int, shared: int, columns: int
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, shared + 9)[:, :shared], torch.randn(shared, columns).bfloat16()
    wide = torch.full((rows, columns + 7), 7.0)
    out = wide[:, :columns]
    take = memory.Buffers(torch.float32, x.device).take
    for name in ("parts 0", "packed 0"):
        take(name, 1 << 18).fill_(torch.nan)
    products.mm_of_split(x, weight.T.contiguous().T if by_column else weight, out, take, add=add)
    right = x.double() @ weight.double() + (7 if add else 0)
    found, plain = (float((t - right).norm()) for t in (out, x @ weight.float() + (7 if add else 0)))
    assert found <= 1.5 * plain  # observed 0.3 to 1.0 of it
    assert (wide[:, columns:] == 7).all()


@split
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("columns", [1, 40, 200])
def test_threads_share_a_product(monkeypatch: pytest.MonkeyPatch, columns: int, by_column: bool) -> None:
    """Each has some columns, and every number is the same."""
    torch.manual_seed(0)
    x, weight = torch.randn(300, 70), torch.randn(70, columns).bfloat16()
    weight = weight.T.contiguous().T if by_column else weight
    found = []
    for n_threads, at_least in ((1, 1), (3, 1), (3, 10**9)):
        monkeypatch.setattr(products, "_WORTH_A_THREAD", at_least)
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        out, taken = torch.ones(300, columns), set[str]()
        buffers = memory.Buffers(torch.float32, x.device)

        def take(name: str, *shape: int, buffers: memory.Buffers = buffers, taken: set[str] = taken) -> Tensor:
            taken.add(name)
            return buffers.take(name, *shape)

        products.mm_of_split(x, weight, out, take, add=True)
        n_parts = min(n_threads, math.ceil(columns / 32)) if at_least == 1 else 1
        assert taken == {f"{what} {n}" for what in ("parts", "packed") for n in range(n_parts)}
        found.append(out)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@split
def test_numbers_of_a_row_that_lie_apart_are_refused() -> None:
    x, weight, out = torch.zeros(40, 64), torch.zeros(64, 48).bfloat16(), torch.zeros(40, 48)
    apart = {
        "x": (torch.zeros(64, 40).T, weight, out),
        "weight": (x, torch.zeros(128, 96).bfloat16()[::2, ::2], out),
        "out": (x, weight, torch.zeros(48, 40).T),
    }
    for factors in apart.values():
        with pytest.raises(AssertionError):
            products.mm_of_split(*factors, memory.Buffers(torch.float32, x.device).take)


@split
def test_weights_in_columns_that_lie_apart_are_multiplied() -> None:
    """A part of q, k and v in one matrix."""
    torch.manual_seed(0)
    x, wide, out = torch.randn(40, 64), torch.randn(64, 100).bfloat16(), torch.empty(40, 48)
    products.mm_of_split(x, wide[:, 20:68], out, memory.Buffers(torch.float32, x.device).take)
    assert torch.allclose(out, x @ wide[:, 20:68].float(), rtol=0, atol=1e-4)  # observed 8e-6


@split
@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_a_number_is_the_sum_of_three_of_bf16(numbers: list[float]) -> None:
    """Times one it is itself, down to where bf16 has no bits left: the unit knows none below 2⁻¹²⁶."""
    x = torch.zeros(1, 40)
    x[0, : len(numbers)] = torch.tensor(numbers)
    found = torch.empty(1, 40)
    products.mm_of_split(x, torch.eye(40).bfloat16(), found, memory.Buffers(torch.float32, x.device).take)
    enough = x.abs() > 2.0**-100
    assert torch.equal(found[enough], x[enough]) and ((found - x).abs() <= 2.0**-100).all()


@split
@pytest.mark.parametrize("by_column", [False, True])
def test_what_is_no_finite_number_spoils_its_row_alone(by_column: bool) -> None:
    x, weight = torch.ones(40, 64), torch.ones(64, 32).bfloat16()
    x[3, 5], x[33, 63], x[34, 0] = torch.inf, -torch.inf, torch.nan
    out = torch.empty(40, 32)
    weight = weight.T.contiguous().T if by_column else weight
    products.mm_of_split(x, weight, out, memory.Buffers(torch.float32, x.device).take)
    spoilt = out.isnan().all(1)
    assert spoilt.nonzero().flatten().tolist() == [3, 33, 34] and (out[~spoilt] == 64).all()


def test_the_unit_multiplies_and_adds_up_as_its_manual_says(split: None) -> None:
    """Bit by bit: two sums of fused multiplications, then their sum, then what was there. Tiny numbers are nothing."""
    import numba
    from llvmlite import ir

    found = products._amx()
    assert found is not None
    row = ir.Constant(ir.IntType(64), 64)

    @found.instruction
    def multiply(builder: Any, left: Any, right: Any, sums: Any) -> None:
        tiles = {0: sums, 4: left, 6: right}
        for register, place in tiles.items():
            found.call(builder, "llvm.x86.tileloadd64", register, found.pointer(builder, place), row)
        found.call(builder, "llvm.x86.tdpbf16ps", 0, 4, 6)
        found.call(builder, "llvm.x86.tilestored64", 0, found.pointer(builder, sums), row)

    configure, release = found.configure, found.release

    @numba.njit
    def once(layout: Any, left: Any, right: Any, sums: Any) -> None:
        configure(layout.ctypes.data)
        multiply(left.ctypes.data, right.ctypes.data, sums.ctypes.data)
        release()

    def normal(numbers: Tensor) -> Tensor:
        return torch.where(numbers.abs() < 2.0**-126, torch.copysign(torch.zeros(()), numbers), numbers)

    torch.manual_seed(0)
    left, right, sums = torch.randn(16, 32).bfloat16(), torch.randn(32, 16).bfloat16(), torch.randn(16, 16)
    left[3, 4], left[5, :], right[7, 9], sums[1, 1] = torch.inf, 2.0**-130, torch.nan, 2.0**-140
    left[1], left[9], right[:, 2] = 0, 2.0**-70, 2.0**-60
    totals = [torch.zeros(16, 16), torch.zeros(16, 16)]
    for k in range(32):
        a, b = normal(left[:, k].float()), normal(right[k].float())
        totals[k % 2] = normal((totals[k % 2].double() + a[:, None].double() * b.double()).float())
    expected = normal(normal(sums) + normal(totals[0] + totals[1]))
    pairs = right.view(16, 2, 16).transpose(1, 2).contiguous()
    given = [tensor.view(torch.int16).numpy() for tensor in (left, pairs)]
    once(found.LAYOUT, *given, sums.numpy())
    assert torch.equal(sums.isnan(), expected.isnan()) and sums.isnan().any()
    assert torch.equal(sums.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("way", ["split", "whole"])
def test_products_are_split_for_fp32_and_bfloat16_on_a_cpu(request: pytest.FixtureRequest, way: str) -> None:
    request.getfixturevalue(way)
    may = way == "split"
    assert products.splits(torch.ones(4, 6)) is may and products.splits(torch.ones(4, 6).bfloat16()) is may
    assert not products.splits(torch.ones(4, 6).double()) and not products.splits(torch.ones(4, 6).half())
    assert not products.splits(torch.ones(4, 6, device="meta"))


@pytest.mark.parametrize(
    "missing", [None, "units", "oneDNN's leave", "Numba", "permission", "the compiler's knowledge"]
)
def test_without_all_that_it_needs_nothing_is_split(
    monkeypatch: pytest.MonkeyPatch, split: None, missing: str | None
) -> None:
    """On a processor that has it, as far as Linux, Numba and its compiler say."""
    from numba.core.registry import cpu_target

    there, codegen = products._amx(), cpu_target.target_context.codegen()
    monkeypatch.undo()
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setitem(sys.modules, "tunesmith.engine.cpu.amx_products", there)
    monkeypatch.setattr(engine, "amx_products", there, raising=False)
    flags = "flags : avx2" + " amx_bf16 amx_tile" * (missing != "units")
    monkeypatch.setattr(products, "_processor", lambda: flags)
    monkeypatch.setattr(codegen, "_tm_features", "+avx2" + ",+amx-bf16" * (missing != "the compiler's knowledge"))
    if missing == "permission":
        monkeypatch.setattr(products, "_PERMISSION", (158, 0x1023, 63))  # of a feature that no processor has
    else:
        monkeypatch.setattr(products, "_permitted", lambda: True)
    if missing == "Numba":
        monkeypatch.setattr(onepass, "version", lambda: None)
    if missing == "oneDNN's leave":
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert products._amx.__wrapped__() is (None if missing else there)
    assert products.has_units() is (missing in (None, "Numba", "the compiler's knowledge"))


@pytest.mark.parametrize("most", ["AVX512_CORE_AMX", "avx512_core_amx_fp16", "ALL", "default", ""])
def test_onednns_own_bound_may_leave_the_units_as_they_are(monkeypatch: pytest.MonkeyPatch, most: str) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    monkeypatch.setattr(products, "_processor", lambda: "flags : amx_bf16")
    monkeypatch.setattr(products, "_permitted", lambda: True)
    assert products.has_units()
