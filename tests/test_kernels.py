"""A layer's element-wise parts in one pass: the same as torch's, operation by operation, in fp64; and taken where they
can be."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tunesmith.engine.cpu import onepass
from tunesmith.engine.cpu.layers import Activation, Norm, add_share, put, rotate

kernels = pytest.importorskip("tunesmith.engine.cpu.kernels", reason="Numba is not installed")

CLOSE = 3e-6  # of the largest number; observed at most 7e-7


class RMSNorm(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), 1e-5


class Case:
    """Random rows of a group of layers: T tokens, H inputs, R ranks, and a mask."""

    def __init__(self, tokens: int, width: int, ranks: int, *, drops: bool, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self.tokens, self.width, self.ranks = tokens, width, ranks
        self.keep = (self.normal(tokens, width) > -1).double() * 1.25 if drops else None
        self.a = self.normal(ranks, width) if ranks else None
        self.x, self.more, self.d_x = (self.normal(tokens, width) for _ in range(3))
        self.extended = self.normal(tokens, width + ranks)
        self.weight, self.rstd = self.normal(width), self.normal(tokens, 1).abs() + 0.1
        self.gate_up = 3 * self.normal(tokens, 2 * width)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random, dtype=torch.float64)

    def norm(self, dtype: torch.dtype) -> Norm:
        return Norm(RMSNorm(self.weight.to(dtype)))


def put_(case: Case, of: Callable[[Tensor | None], Any]) -> Sequence[Tensor]:
    extended, dropped = of(case.extended), of(case.x * 0)
    put(of(case.x), extended, of(case.keep), dropped)
    return extended, dropped


def share(case: Case, of: Callable[[Tensor | None], Any]) -> Sequence[Tensor]:
    extended = of(case.extended)
    return add_share(extended, case.x.shape[1], of(case.a), of(case.keep)), extended


def norm(case: Case, of: Callable[[Tensor | None], Any]) -> Sequence[Tensor]:
    x, extended, dropped = of(case.x), of(case.extended), of(case.x * 0)
    rstd = case.norm(x.dtype).forward(x, extended, of(case.keep), dropped, more=of(case.more))
    return x, extended, dropped, rstd


def norm_backward(case: Case, of: Callable[[Tensor | None], Any]) -> Sequence[Tensor]:
    extended, d_x, dropped = of(case.extended), of(case.d_x), of(case.x * 0)
    given = of(case.a), of(case.keep), of(case.x), of(case.rstd)
    case.norm(d_x.dtype).backward(extended, *given, d_x, dropped)
    return d_x, dropped


def activation(case: Case, of: Callable[[Tensor | None], Any], module: nn.Module) -> Sequence[Tensor]:
    extended, dropped = of(case.extended), of(case.x * 0)
    Activation(module).forward(of(case.gate_up), extended, of(case.keep), dropped)
    return extended, dropped


def activation_backward(case: Case, of: Callable[[Tensor | None], Any], module: nn.Module) -> Sequence[Tensor]:
    gate_up, dropped = of(case.gate_up), of(case.x * 0)
    Activation(module).backward(of(case.extended), of(case.a), of(case.keep), gate_up, dropped)
    return gate_up, dropped


PARTS: dict[str, Callable[..., Sequence[Tensor]]] = {
    "put": put_,
    "share": share,
    "norm": norm,
    "norm backward": norm_backward,
    "silu": lambda case, of: activation(case, of, nn.SiLU()),
    "silu backward": lambda case, of: activation_backward(case, of, nn.SiLU()),
    "gelu": lambda case, of: activation(case, of, nn.GELU("tanh")),
    "gelu backward": lambda case, of: activation_backward(case, of, nn.GELU("tanh")),
}


def in_double(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.clone()


def in_single(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.float()


def distance(found: Tensor, expected: Tensor) -> float:
    assert found.dtype == torch.float32 and expected.dtype == torch.float64
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1))


@pytest.mark.parametrize("name", PARTS)
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 9), width=st.integers(1, 70), ranks=st.integers(0, 11), drops=st.booleans(),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_a_part_is_what_torch_computes(name: str, tokens: int, width: int, ranks: int, drops: bool, seed: int) -> None:
    case = Case(tokens, width, ranks, drops=drops, seed=seed)
    if not drops and name in ("put", "norm", "silu", "gelu"):  # x̃ is x itself, and not written
        pairs = list(zip(PARTS[name](case, in_single), PARTS[name](case, in_double), strict=True))
        del pairs[1 if name != "norm" else 2]
    else:
        pairs = list(zip(PARTS[name](case, in_single), PARTS[name](case, in_double), strict=True))
    # Few numbers may all be small after the sum, and then their norm magnifies its rounding; observed 4.7e-6.
    close = 10 * CLOSE if "norm" in name and width < 8 else CLOSE
    for found, expected in pairs:
        part = slice(None) if name != "norm backward" else slice(0, width)
        assert distance(found[:, part], expected[:, part]) < close


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("size", "half", "in_place"), [(64, 32, True), (64, 32, False), (10, 3, True), (10, 3, False)])
def test_a_rotation_is_what_torch_computes(sign: int, size: int, half: int, in_place: bool) -> None:
    case = Case(7, 4 * size, 0, drops=False, seed=1)
    cos, sin = case.normal(7, half), case.normal(7, half)
    found = []
    for of in (in_single, in_double):
        x, turned = of(case.x), (of(cos), of(sin))
        out, at = (x, 0) if in_place else (of(case.normal(7, 5 * size) * 0), size)
        rotate(x, size, 3, *turned, out, at, sign)
        found.append(out)
    assert distance(*found) < CLOSE
    if in_place:
        assert torch.equal(found[0][:, 3 * size :], case.x[:, 3 * size :].float())


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 3),
    length=st.integers(1, 12),
    earlier=st.integers(0, 30),
    window=st.integers(1, 50),
    seed=st.integers(0, 2**32),
)
def test_a_softmax_is_what_torch_computes(heads: int, length: int, earlier: int, window: int, seed: int) -> None:
    case = Case(1, 1, 0, drops=False, seed=seed)
    keys = earlier + length
    scores, d = 30 * case.normal(heads, length, keys), case.normal(heads, length, keys)
    visible = torch.ones(length, keys, dtype=torch.bool).tril(earlier).triu(earlier - window + 1)
    expected = torch.softmax(scores.masked_fill(~visible, -torch.inf), -1)
    found, largest, share = softmax(scores.float(), window)
    assert distance(found, expected) < CLOSE
    assert not found[:, ~visible].any()
    again, d_found, along = scores.float(), d.float(), (d * expected).sum(-1).float()
    arrays = [t.numpy() for t in (largest, share, along.flatten())]
    kernels.causal_softmax_backward(again.numpy(), d_found.numpy(), window, *arrays)
    d_expected = expected * (d - along[..., None])
    assert distance(d_found, d_expected) < CLOSE and torch.equal(again, found)
    assert not d_found[:, ~visible].any()


def softmax(scores: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities of (heads, queries, keys), and what the kernel gives for the way back."""
    largest, share = scores.new_full((2, scores[..., 0].numel()), torch.nan)
    kernels.causal_softmax(scores.numpy(), window, largest.numpy(), share.numpy())
    return scores * share.view(*scores.shape[:2], 1), largest, share


def test_the_exponential_is_right_everywhere() -> None:
    """Through a softmax over two keys, 0 and y: e^y / (1 + e^y)."""
    y = torch.cat([torch.linspace(-104, 0, 200_001), torch.tensor([-torch.inf, -87, -87.0001, 0.0])])
    scores = torch.stack([torch.zeros_like(y), y], -1)[:, None].contiguous()
    expected = y.double().sigmoid()
    found = softmax(scores, 2)[0][:, 0, 1]
    seen = y >= -87
    assert float(((found - expected) / expected)[seen].abs().max()) < 3e-7  # observed 1.7e-7
    assert not found[~seen].any()


@pytest.mark.parametrize("name", [name for name in PARTS if name not in ("put", "share")])
def test_what_is_not_a_number_stays_so(name: str) -> None:
    case = Case(4, 33, 4, drops=True, seed=3)
    for given_ in (case.x, case.gate_up, case.extended):
        given_[2, 5] = torch.nan
    touched = torch.zeros(4, dtype=torch.bool)
    for found in PARTS[name](case, in_single):
        touched |= found.isnan().any(-1)
    assert touched.tolist() == [False, False, True, False]


@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000])  # of either sign
def test_a_softmax_of_what_is_not_a_number_is_none(bits: int) -> None:
    scores = torch.zeros(3, 1, 40)
    scores.view(torch.int32)[1, 0, 7] = bits
    scores = softmax(scores, 40)[0]
    assert scores.isnan().all(-1).flatten().tolist() == [False, True, False]
    assert torch.allclose(scores[0], torch.tensor(1 / 40))


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_softmax_of_scores_of_one_sign_is_neither_too_large_nor_too_small(sign: int) -> None:
    """The largest is found among negative ones, too, whose bits are in the other order."""
    scores = sign * (500 + 900 * Case(1, 1, 0, drops=False, seed=1).normal(1, 1, 300).abs())
    found = softmax(scores.float(), 300)[0]
    assert distance(found, torch.softmax(scores, -1)) < 1e-3  # of a score of 2e3 fp32 keeps 1e-4


def test_rows_are_those_asked_for() -> None:
    given_, which = torch.randn(9, 5), torch.tensor([8, 0, 3, 3])
    out = torch.empty(4, 5)
    kernels.rows(given_.numpy(), which.numpy(), out.numpy(), None)
    assert torch.equal(out, given_[which])
    factor = torch.randn(9)
    kernels.rows(given_.numpy(), which.numpy(), out.numpy(), factor.numpy())
    assert torch.equal(out, (given_ * factor[:, None])[which])


def test_dots_are_those_of_the_rows_that_are_meant() -> None:
    x, y, which, out = torch.randn(3, 40), torch.randn(9, 40), torch.tensor([8, 0, 3]), torch.empty(3)
    kernels.dots(x.numpy(), y.numpy(), which.numpy(), out.numpy())
    assert torch.allclose(out, (x * y[which]).sum(-1), rtol=1e-4, atol=1e-5)  # observed 2e-6


def test_they_are_taken_for_fp32_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 3)
    assert onepass.kernels(x) is kernels
    assert onepass.kernels(x, x.double()) is onepass.kernels(x.T) is None
    monkeypatch.setattr(onepass, "_kernels", lambda: None)
    assert onepass.kernels(x) is None


@pytest.mark.parametrize("name", PARTS)
def test_the_parts_call_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Called(Exception): ...

    def called(*_: Any) -> None:
        raise Called

    for kernel in ("put", "add_share", "norm", "norm_backward", "activation", "activation_backward"):
        monkeypatch.setattr(kernels, kernel, called)
    case = Case(3, 8, 4, drops=True, seed=5)
    PARTS[name](case, in_double)
    with pytest.raises(Called):
        PARTS[name](case, in_single)


def test_a_kernel_whose_file_has_no_place_for_a_cache_is_compiled_all_the_same() -> None:
    written: dict[str, Any] = {}
    exec("def twice(x):\n    return x + x", written)
    assert kernels.compiled()(written["twice"])(4) == 8


def test_a_kernel_is_compiled_again_when_what_stands_in_it_has_changed(tmp_path: Path) -> None:
    """Although its own file is the same."""
    package = tmp_path / "package"
    package.mkdir()
    for name in ("amx.py", "kernels.py"):
        shutil.copy(Path(kernels.__file__).with_name(name), package)
    (package / "other.py").write_text(
        "from package.kernels import ONE, _exp, compiled\n\n\n"
        "@compiled()\ndef e(x):\n    return _exp(x)\n\n\n"
        "print(round(e(ONE), 3), *e.stats.cache_hits.values())\n"
    )

    def run() -> str:
        return subprocess.check_output([sys.executable, "-m", "package.other"], cwd=tmp_path, text=True).strip()

    assert [run(), run()] == ["2.718", "2.718 1"]
    file = package / "kernels.py"
    changed = re.sub(r"else p \* scale$", "else p * scale + ONE", file.read_text(), flags=re.MULTILINE)
    file.write_text(changed)
    assert run() == "3.718"
