"""The element-wise parts of a layer, each in one pass over its rows: compiled by Numba, for fp32 on a CPU.

torch goes over all rows once per operation, and the rows have left the processor's cache before the next one reads
them. Here a row is read, computed with and written while it is there, and Python's lock is free meanwhile, so lanes do
not wait for it. What is computed is said where torch computes the same (`layers`); sums are added up in another order.

Rows are contiguous. `keep` is a dropout's mask or None; `a` is an adapter's A (R, H) or None, and behind the first H
columns of a gradient stand R of dh then (`Linears.backward`). Compiled once per machine and kept in Numba's cache.

Legend: T tokens of a lane, H width, I width of the MLP, R sum of the group's ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from numba import njit

ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
# e^y = 2^n · e^r with |r| <= ln 2 / 2, and a polynomial for e^r (Cephes, expf): 1e-7 of the result at most.
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
C5, C4, C3 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
C2, C1 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1)
SMALLEST, LARGEST = np.float32(-87), np.float32(88)
ROUNDING = np.float32(3 << 22)  # added to a small number, it leaves the nearest integer in the last bits
BITS_OF_ONE, MANTISSA = np.int32(0x3F800000), np.int32(23)
LEAST_BITS, LARGEST_BITS, ALL_BUT_ONE = np.int32(-(2**31)), np.int32(2**31 - 1), np.int32(31)
GELU, CUBIC = np.float32(2 * np.sqrt(2 / np.pi)), np.float32(0.044715)
SILU = 0  # of the kinds that `Activation` knows; the other one is GELU by tanh

Kernel = Callable[..., Any]
# Code of these files stands in what is compiled from others, and Numba's cache compares a function's own file alone.
_SOURCES = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("amx.py", "kernels.py"))
_VERSION = hashlib.sha256(_SOURCES).hexdigest()[:8]


def compiled(*signatures: Any, **more: Any) -> Callable[[Kernel], Kernel]:
    """Numba's division gives inf, not an exception, which would keep loops from being vectorised. With signatures it is
    compiled at once, for these; else for whatever it is called with. What other versions of this file or of `amx` left
    in the cache is not taken."""

    given, make = [list(signatures)] if signatures else [], cast("Any", njit)

    def compile(function: Kernel) -> Kernel:
        function.__qualname__ += f"_{_VERSION}"  # names the file in the cache
        settings = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}, **more}
        try:
            return make(*given, cache=True, **settings)(function)
        except RuntimeError:  # no folder that could be written
            return make(*given, **settings)(function)

    return compile


_part = compiled(inline="always")
_sum_of = compiled(fastmath={"contract", "reassoc", "nsz"})


@_part
def _exp(y: Any) -> Any:
    """0 below -87."""
    x = SMALLEST if y < SMALLEST else y
    x = LARGEST if x > LARGEST else x
    shifted = x * LOG2_E + ROUNDING
    n = shifted - ROUNDING
    r = x - n * LN2_HIGH
    r = r - n * LN2_LOW
    p = ((((C5 * r + C4) * r + C3) * r + C2) * r + C1) * r + HALF
    p = p * r * r + r + ONE
    bits = np.int32(np.int32(np.float32(shifted).view(np.int32)) << MANTISSA)
    scale = np.int32(bits + BITS_OF_ONE).view(np.float32)
    return ZERO if y < SMALLEST else p * scale


@_part
def _sigmoid(x: Any) -> Any:
    return ONE / (ONE + _exp(-x))


@_part
def _gelu_argument(x: Any) -> Any:
    return GELU * (x + CUBIC * x * x * x)


@_sum_of
def _dot(x: Any, y: Any) -> Any:
    total = ZERO
    for j in range(len(x)):
        total += x[j] * y[j]
    return total


@_sum_of
def _dot3(x: Any, y: Any, z: Any) -> Any:
    total = ZERO
    for j in range(len(x)):
        total += x[j] * y[j] * z[j]
    return total


@_sum_of
def _sum(x: Any) -> Any:
    total = ZERO
    for j in range(len(x)):
        total += x[j]
    return total


@_part
def _turned(bits: Any) -> Any:
    return np.int32(bits ^ ((bits >> ALL_BUT_ONE) & LARGEST_BITS))


@compiled()
def _largest(x: Any) -> Any:
    """As integers, which LLVM compares side by side: the bits of floats are in order once those of negative ones are
    turned round. NaN is the largest."""
    bits, largest = x.view(np.int32), LEAST_BITS
    for j in range(len(bits)):
        largest = max(largest, _turned(bits[j]))
    return np.int32(_turned(largest)).view(np.float32)


@compiled()
def _add_share(d_x: Any, d_h: Any, a: Any, keep: Any) -> None:
    """One row: d_x += keep · (d_h · A)."""
    width, whole = len(d_x), len(d_h) // 4 * 4
    for r in range(0, whole, 4):
        f0, f1, f2, f3 = d_h[r], d_h[r + 1], d_h[r + 2], d_h[r + 3]
        a0, a1, a2, a3 = a[r], a[r + 1], a[r + 2], a[r + 3]
        if keep is None:
            for j in range(width):
                d_x[j] += f0 * a0[j] + f1 * a1[j] + f2 * a2[j] + f3 * a3[j]
        else:
            for j in range(width):
                d_x[j] += keep[j] * (f0 * a0[j] + f1 * a1[j] + f2 * a2[j] + f3 * a3[j])
    for r in range(whole, len(d_h)):
        f0, a0 = d_h[r], a[r]
        if keep is None:
            for j in range(width):
                d_x[j] += f0 * a0[j]
        else:
            for j in range(width):
                d_x[j] += keep[j] * (f0 * a0[j])


@compiled()
def add_share(d_extended_THR: Any, a: Any, keep: Any) -> None:
    width = a.shape[1]
    for t in range(len(d_extended_THR)):
        row = d_extended_THR[t]
        _add_share(row[:width], row[width : width + len(a)], a, None if keep is None else keep[t])


@compiled()
def put(x_TH: Any, extended_THR: Any, keep: Any, dropped_TH: Any) -> None:
    """x into the first columns of `extended`, and x̃."""
    for t in range(len(x_TH)):
        x, out = x_TH[t], extended_THR[t]
        for j in range(len(x)):
            out[j] = x[j]
        if keep is not None:
            kept, dropped = keep[t], dropped_TH[t]
            for j in range(len(x)):
                dropped[j] = x[j] * kept[j]


@compiled()
def norm(
    x_TH: Any, more_TH: Any, weight_H: Any, eps: Any, extended_THR: Any, keep: Any, dropped_TH: Any, rstd_T: Any
) -> None:
    width = x_TH.shape[1]
    for t in range(len(x_TH)):
        x, out = x_TH[t], extended_THR[t]
        if more_TH is not None:
            more = more_TH[t]
            for j in range(width):
                x[j] += more[j]
        rstd = ONE / np.sqrt(_dot(x, x) / np.float32(width) + eps)
        rstd_T[t] = rstd
        if keep is None:
            for j in range(width):
                out[j] = x[j] * rstd * weight_H[j]
        else:
            kept, dropped = keep[t], dropped_TH[t]
            for j in range(width):
                normed = x[j] * rstd * weight_H[j]
                out[j] = normed
                dropped[j] = normed * kept[j]


@compiled()
def norm_backward(
    d_extended_THR: Any, a: Any, keep: Any, x_TH: Any, rstd_T: Any, weight_H: Any, d_x_TH: Any, dropped_TH: Any
) -> None:
    width = x_TH.shape[1]
    for t in range(len(x_TH)):
        x, rstd, d_x, row = x_TH[t], rstd_T[t], d_x_TH[t], d_extended_THR[t]
        d_out = row[:width]
        if a is not None:
            _add_share(d_out, row[width : width + len(a)], a, None if keep is None else keep[t])
        along = -_dot3(d_out, weight_H, x) * rstd * rstd * rstd / np.float32(width)
        for j in range(width):
            d_x[j] += d_out[j] * weight_H[j] * rstd + x[j] * along
        dropped = dropped_TH[t]
        for j in range(width):
            dropped[j] = x[j] * rstd * weight_H[j]
        if keep is not None:
            kept = keep[t]
            for j in range(width):
                dropped[j] *= kept[j]


@compiled()
def activation(gate_up_T2I: Any, kind: Any, extended_TIR: Any, keep: Any, dropped_TI: Any) -> None:
    width = gate_up_T2I.shape[1] // 2
    for t in range(len(gate_up_T2I)):
        gate, up, out = gate_up_T2I[t, :width], gate_up_T2I[t, width:], extended_TIR[t]
        if kind == SILU:
            for j in range(width):
                out[j] = gate[j] * _sigmoid(gate[j]) * up[j]
        else:
            for j in range(width):
                out[j] = gate[j] * _sigmoid(_gelu_argument(gate[j])) * up[j]
        if keep is not None:
            kept, dropped = keep[t], dropped_TI[t]
            for j in range(width):
                dropped[j] = out[j] * kept[j]


@compiled()
def activation_backward(d_extended_TIR: Any, a: Any, keep: Any, gate_up_T2I: Any, kind: Any, dropped_TI: Any) -> None:
    width = dropped_TI.shape[1]
    for t in range(len(dropped_TI)):
        row, dropped = d_extended_TIR[t], dropped_TI[t]
        d_out, gate, up = row[:width], gate_up_T2I[t, :width], gate_up_T2I[t, width:]
        if a is not None:
            _add_share(d_out, row[width : width + len(a)], a, None if keep is None else keep[t])
        if kind == SILU:
            for j in range(width):
                share = _sigmoid(gate[j])
                active = gate[j] * share
                slope = share + active - active * share
                dropped[j] = active * up[j]
                gate[j] = d_out[j] * up[j] * slope
                up[j] = d_out[j] * active
        else:
            for j in range(width):
                x = gate[j]
                share = _sigmoid(_gelu_argument(x))
                active = x * share
                slope = share + active * (ONE - share) * GELU * (ONE + np.float32(3) * CUBIC * x * x)
                dropped[j] = active * up[j]
                gate[j] = d_out[j] * up[j] * slope
                up[j] = d_out[j] * active
        if keep is not None:
            kept = keep[t]
            for j in range(width):
                dropped[j] *= kept[j]


@compiled()
def rotate(x_TN: Any, size: Any, heads: Any, cos_TF: Any, sin_TF: Any, sign: Any, out_TM: Any, at: Any) -> None:
    """The first `heads` heads of `size` numbers each, into `out`, which may be x, from column `at` on."""
    half = cos_TF.shape[1]
    for t in range(len(x_TN)):
        cos, sin = cos_TF[t], sin_TF[t]
        for head in range(heads):
            x = x_TN[t, head * size : (head + 1) * size]
            out = out_TM[t, at + head * size : at + (head + 1) * size]
            for j in range(half):
                first, second = x[j], x[half + j]
                out[j] = first * cos[j] - second * sin[j] * sign
                out[half + j] = second * cos[j] + first * sin[j] * sign
            for j in range(2 * half, size):
                out[j] = x[j]


@compiled()
def causal_softmax(scores_HQK: Any, window: Any, largest_N: Any, share_N: Any) -> None:
    """Of queries that are the last ones of the keys; each sees `window` keys up to its own, and gets 0 for the rest.
    What is left is e to the power of scores less the largest; times its share it would be a probability."""
    heads, n, n_keys = scores_HQK.shape
    for head in range(heads):
        for query in range(n):
            row = scores_HQK[head, query]
            behind = n_keys - n + query + 1
            first = max(0, behind - window)
            seen = row[first:behind]
            largest = _largest(seen)
            for j in range(len(seen)):
                seen[j] = _exp(seen[j] - largest)
            largest_N[head * n + query], share_N[head * n + query] = largest, ONE / _sum(seen)
            row[:first] = ZERO
            row[behind:] = ZERO


@compiled()
def causal_softmax_backward(
    scores_HQK: Any, d_HQK: Any, window: Any, largest_N: Any, share_N: Any, along_N: Any
) -> None:
    """Scores become probabilities, and the gradient with respect to those the one with respect to scores."""
    heads, n, n_keys = scores_HQK.shape
    for head in range(heads):
        for query in range(n):
            row, d_row, number = scores_HQK[head, query], d_HQK[head, query], head * n + query
            largest, share, along = largest_N[number], share_N[number], along_N[number]
            behind = n_keys - n + query + 1
            first = max(0, behind - window)
            seen, d = row[first:behind], d_row[first:behind]
            for j in range(len(seen)):
                probability = _exp(seen[j] - largest) * share
                seen[j] = probability
                d[j] = probability * (d[j] - along)
            for part in (row, d_row):
                part[:first] = ZERO
                part[behind:] = ZERO


@compiled()
def dots(x_ND: Any, y_ND: Any, which_N: Any, out_N: Any) -> None:
    """Of each row of x with the row of y that is meant."""
    for i in range(len(which_N)):
        out_N[i] = _dot(x_ND[i], y_ND[which_N[i]])


@compiled()
def rows(given_ND: Any, which_M: Any, out_MD: Any, factor_N: Any) -> None:
    for i in range(len(which_M)):
        row, out = given_ND[which_M[i]], out_MD[i]
        factor = ONE if factor_N is None else factor_N[which_M[i]]
        for j in range(len(out)):
            out[j] = row[j] * factor


def load(kind: int, *, drops: bool) -> None:
    """Compiles all of them, or finds them in Numba's cache, for the kinds of arguments that a step will bring."""
    row, one = np.ones((1, 8), np.float32), np.float32(1)
    keep = row if drops else None
    put(row, row, keep, row)
    for more in (None, row):
        norm(row, more, row[0], one, row, keep, row, row[0, :1])
    both, behind = np.ones((1, 16), np.float32), np.ones((1, 9), np.float32)
    activation(both, kind, row, keep, row)
    activation_backward(behind, row, keep, both, kind, row)
    norm_backward(behind, row, keep, row, row[0, :1], row[0], row, row)
    add_share(behind, row, keep)
    rotate(row, 8, 1, row[:, :4].copy(), row[:, :4].copy(), one, row, 0)
    causal_softmax(row[None], 8, row[0, :1], row[0, :1])
    causal_softmax_backward(row[None], row[None], 8, *[row[0, :1]] * 3)
    first = np.zeros(1, np.int64)
    dots(row, row, first, row[0, :1])
    rows(row, first, row, None)
    rows(row, first, row, row[0, :1])
