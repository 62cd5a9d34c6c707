"""The product of an fp32 matrix with one of bf16 numbers by AMX (`amx`).

x · w is the sum of the products of three parts of x with w, all of which end in the same tile of sums: weights are read
once for the three, and the parts of x exist for as many rows and columns as the cache holds. Compiled by Numba.

Legend: T rows of x and of the result, K what is summed over (one number at least), N columns of the result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from tunesmith.engine.cpu.amx import (
    BITS,
    LAYOUT,
    LEFT,
    RIGHT,
    SHORTS,
    SUMS,
    TILE,
    call,
    configure,
    instruction,
    load_sums,
    plus,
    pointer,
    release,
    split,
    store_sums,
    transpose,
    zero_sums,
)
from tunesmith.engine.cpu.kernels import compiled

__all__ = ["LAYOUT", "product"]


@instruction
def _multiply(builder: Any, upper: Any, lower: Any, left: Any, right: Any) -> None:
    """Adds to the sums what 32 columns of 2 x 16 rows of x, three parts behind each other, give with 2 x 16 columns."""
    row = ir.Constant(ir.IntType(64), 64)
    for register, place in zip(RIGHT, (left, right), strict=True):
        call(builder, "llvm.x86.tileloadd64", register, pointer(builder, place), row)
    for part in range(3):
        for register, place in zip(LEFT, (upper, lower), strict=True):
            tile = pointer(builder, plus(builder, place, part * TILE))
            call(builder, "llvm.x86.tileloadd64", register, tile, row)
        for number, register in enumerate(SUMS):
            call(builder, "llvm.x86.tdpbf16ps", register, LEFT[number // 2], RIGHT[number % 2])


@instruction
def _pair(builder: Any, given: Any, stride: Any, out: Any) -> None:
    """16 numbers of one row and those below them, side by side."""
    lower, upper = (builder.load(pointer(builder, row, SHORTS)) for row in (given, builder.add(given, stride)))
    lower.align = upper.align = 2
    raised = builder.shl(builder.zext(upper, BITS), ir.Constant(BITS, [16] * 16))
    both = builder.or_(raised, builder.zext(lower, BITS))
    builder.store(both, pointer(builder, out, BITS)).align = 4


@compiled()
def _put_rows(x_TK: Any, first: Any, n_rows: Any, start: Any, stop: Any, parts: Any) -> None:
    """Rows of x, columns `start` to `stop`, into tiles of its parts: 16 rows, then 32 columns, then the parts."""
    n_steps = (stop - start + 31) // 32
    whole = (stop - start) // 32
    row, place = x_TK.strides[0], np.int64(parts.ctypes.data)
    padded = np.zeros(32, np.float32)
    for tile in range((n_rows + 15) // 16):
        n = min(16, n_rows - 16 * tile)
        at = np.int64(x_TK.ctypes.data) + (first + 16 * tile) * row + 4 * start
        for step in range(n_steps):
            for r in range(n):
                if step < whole:
                    split(at + r * row + 128 * step, place + 64 * r)
                else:
                    for j in range(stop - start - 32 * whole):
                        padded[j] = x_TK[first + 16 * tile + r, start + 32 * whole + j]
                    split(np.int64(padded.ctypes.data), place + 64 * r)
            place += 3 * TILE


@compiled()
def _both(lower: Any, upper: Any) -> Any:
    return np.int32(np.int32(upper) << np.int32(16)) | (np.int32(lower) & np.int32(0xFFFF))


@compiled()
def _pack_rows(w_KN: Any, packed: Any) -> None:
    """The bits of weights whose rows are summed over, in pairs of them."""
    shared, columns = w_KN.shape
    row, place = w_KN.strides[0], np.int64(packed.ctypes.data)
    for tile in range(packed.shape[0]):
        n = max(0, min(16, columns - 16 * tile))
        at = np.int64(w_KN.ctypes.data) + 32 * tile
        for pair in range(16 * packed.shape[1]):
            if n == 16 and 2 * pair + 2 <= shared:
                _pair(at + 2 * pair * row, row, place)
            else:
                out = packed[tile, pair // 16, pair % 16]
                out[:] = 0
                for j in range(n):
                    if 2 * pair < shared:
                        upper = w_KN[2 * pair + 1, 16 * tile + j] if 2 * pair + 1 < shared else np.int16(0)
                        out[j] = _both(w_KN[2 * pair, 16 * tile + j], upper)
            place += 64


@compiled()
def _pack_columns(w_NK: Any, packed: Any) -> None:
    """The bits of weights whose columns are summed over, in pairs of them."""
    columns, shared = w_NK.shape
    row, place = w_NK.strides[0], np.int64(packed.ctypes.data)
    for tile in range(packed.shape[0]):
        at = np.int64(w_NK.ctypes.data) + 16 * tile * row
        for step in range(packed.shape[1]):
            if 16 * tile + 16 <= columns and 32 * step + 32 <= shared:
                transpose(at + 64 * step, row, place, 64)
            else:
                out = packed[tile, step]
                out[:] = 0
                for i in range(min(16, columns - 16 * tile)):
                    for first in range(32 * step, min(shared, 32 * step + 32), 2):
                        upper = w_NK[16 * tile + i, first + 1] if first + 1 < shared else np.int16(0)
                        out[(first - 32 * step) // 2, i] = _both(w_NK[16 * tile + i, first], upper)
            place += TILE


_FLOAT_ROWS = types.float32[:, :]
_SIGNATURE = types.void(
    _FLOAT_ROWS, types.int16[:, :], types.boolean, _FLOAT_ROWS, types.boolean, types.int16[:, :, :, :, ::1],
    types.int32[:, :, :, ::1], types.uint8[::1],
)  # fmt: skip


@compiled(_SIGNATURE)
def product(
    x_TK: Any, weight: Any, by_column: Any, out_TN: Any, add: Any, parts: Any, packed: Any, layout: Any
) -> None:
    """x · w in `out`, or added to it. The weight's bits are (K, N), or with `by_column` (N, K). Rows of all three may
    lie apart, the numbers of one row may not. There is memory for parts of x: some pairs of tiles by some steps of 32
    columns by 3 by 16 by 32; and for the weights in pairs: all pairs of tiles by all steps by 16 by 16."""
    n_rows, shared = x_TK.shape
    columns, n_tiles, n_steps = out_TN.shape[1], packed.shape[0], packed.shape[1]
    if by_column:
        _pack_columns(weight, packed)
    else:
        _pack_rows(weight, packed)
    n_blocks = (n_steps + parts.shape[1] - 1) // parts.shape[1]
    at_once = (n_steps + n_blocks - 1) // n_blocks
    row, out_row = n_steps * TILE, out_TN.strides[0]
    corner = np.empty((32, 32), np.float32)
    configure(np.int64(layout.ctypes.data))
    for first in range(0, n_rows, 16 * parts.shape[0]):
        n = min(16 * parts.shape[0], n_rows - first)
        for start in range(0, n_steps, at_once):
            n_here = min(at_once, n_steps - start)
            _put_rows(x_TK, first, n, 32 * start, min(shared, 32 * (start + n_here)), parts)
            adds = add or start > 0
            for column in range(0, 16 * n_tiles, 32):
                for r in range(0, n, 32):
                    upper = np.int64(parts.ctypes.data) + (r // 16) * n_here * 3 * TILE
                    lower = upper + n_here * 3 * TILE
                    left = np.int64(packed.ctypes.data) + (column // 16) * row + start * TILE
                    is_whole = r + 32 <= n and column + 32 <= columns
                    place = np.int64(out_TN.ctypes.data) + (first + r) * out_row + 4 * column
                    if adds and is_whole:
                        load_sums(place, out_row)
                    else:
                        zero_sums()
                    for _ in range(n_here):
                        _multiply(upper, lower, left, left + row)
                        upper += 3 * TILE
                        lower += 3 * TILE
                        left += TILE
                    if is_whole:
                        store_sums(place, out_row)
                        continue
                    store_sums(np.int64(corner.ctypes.data), 128)
                    for i in range(min(32, n - r)):
                        for j in range(min(32, columns - column)):
                            before = out_TN[first + r + i, column + j] if adds else np.float32(0)
                            out_TN[first + r + i, column + j] = before + corner[i, j]
    release()
