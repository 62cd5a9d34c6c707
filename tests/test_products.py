"""Whichever library multiplies: one product, whatever lies beside the matrices, and numpy's threads as they were."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info
from torch import Tensor

from tunesmith.engine import products
from tunesmith.engine.lanes import Lanes

by_openblas = pytest.mark.skipif(
    products._openblas() is None, reason="no processor or numpy on which OpenBLAS is taken"
)
split = pytest.mark.skipif(products._product_of_bfloat16() is None, reason="no MKL in this torch")


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
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_a_product_of_a_split_factor_rounds_less_than_one_of_fp32(by_column: bool, add: bool, rows: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 300), torch.randn(300, 41).bfloat16()
    wide = torch.full((rows, 50), 7.0)
    out = wide[:, :41]
    parts, rest = torch.empty(3, rows, 300, dtype=torch.bfloat16), x
    for part in parts:
        part.copy_(rest)
        rest = rest - part
    assert not rest.any()
    products.mm_of_split(parts, weight.T.contiguous().T if by_column else weight, out, add=add)
    right = x.double() @ weight.double() + (7 if add else 0)
    found, plain = (float((t - right).norm()) for t in (out, x @ weight.float() + (7 if add else 0)))
    assert found <= 2 * plain  # observed 0.3 to 0.6 of it
    assert (wide[:, 41:] == 7).all()
