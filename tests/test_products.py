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

if products._openblas() is None:
    pytest.skip("no processor or numpy on which OpenBLAS is taken", allow_module_level=True)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("what", matrices(torch.float32))
def test_a_product_is_that_of_torch(alone: None, what: str, dtype: torch.dtype) -> None:
    a, b = matrices(dtype)[what]
    expected = (a.double() @ b.double()).to(dtype)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-13  # observed 4e-6, 7e-15
    assert torch.allclose(products.mm(a, b), expected, rtol=0, atol=tolerance)
    out = torch.full_like(expected, 7)
    assert products.mm(a, b, out) is out and torch.allclose(out, expected, rtol=0, atol=tolerance)


def test_a_product_goes_into_columns_behind_its_own_factor(alone: None) -> None:
    """As an adapter's h does, behind x."""
    torch.manual_seed(0)
    extended, a = torch.randn(41, 48), torch.randn(40, 8)
    x, h = extended[:, :40], extended[:, 40:]
    before = x.clone()
    products.mm(x, a, h)
    assert torch.equal(x, before) and torch.allclose(h, before @ a, rtol=0, atol=2e-5)  # observed 4e-6


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


def test_numpys_threads_are_as_before() -> None:
    def threads() -> list[int]:
        return [library["num_threads"] for library in threadpool_info() if library["internal_api"] == "openblas"]

    before = threads()
    inside = Lanes(2).run(lambda _: threads())
    assert inside == [[1] * len(before)] * 2 and threads() == before
