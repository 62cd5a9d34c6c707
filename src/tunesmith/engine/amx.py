"""The product of an fp32 matrix with one of bf16 numbers, by a processor's units for products of bf16 tiles (AMX).

A number of fp32 is the sum of three of bf16, so x · w is the sum of three products, all of which end in the same tile
of sums: weights are read once for the three, and the parts of x exist for as many rows and columns as the cache holds.
Compiled by Numba; AMX's instructions are LLVM's intrinsics (Intel 64 and IA-32 Architectures Software Developer's
Manual, volume 1, chapter 18). A tile has 16 rows of 64 bytes; eight of them are the unit's registers.

Legend: T rows of x and of the result, K what is summed over, N columns of the result.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tunesmith.engine.kernels import compiled

_TILE = 1024  # bytes
_PERMISSION = 158, 0x1023, 18  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), on x86-64
_SUMS, _LEFT, _RIGHT = (0, 1, 2, 3), (4, 5), (6, 7)  # registers: 2 x 2 tiles of sums, two of x, two of w
_FLOATS, _BITS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(32), 16)
_UPPER = ir.VectorType(ir.IntType(16), 16)


def permitted() -> bool:
    """Asks Linux to let this process use tiles; threads that it has already may use them too."""
    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    return bool(call(*_PERMISSION) == 0)


def _whole() -> Any:
    """What tells the unit that all tiles are whole: palette, bytes per row, rows."""
    layout = np.zeros(64, np.uint8)
    layout[0], layout[16:32:2], layout[48:56] = 1, 64, 16
    return layout


LAYOUT = _whole()


# --- instructions -----------------------------------------------------------------------------------------------------


def _instruction(emit: Callable[..., None]) -> Any:
    """For Numba: a function of addresses and strides, in bytes, whose code `emit` writes. Returns nothing."""

    def typed(_: Any, *given: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            emit(builder, *arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * len(given)), generate

    vars(typed).update(__name__=emit.__name__, __signature__=inspect.signature(emit))
    return intrinsic(typed)


def _call(builder: Any, name: str, *arguments: Any) -> None:
    values = [ir.Constant(ir.IntType(8), given) if isinstance(given, int) else given for given in arguments]
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [v.type for v in values]), name)
    builder.call(function, values)


def _pointer(builder: Any, address: Any, of: Any = None) -> Any:
    return builder.inttoptr(address, (of or ir.IntType(8)).as_pointer())


def _plus(builder: Any, address: Any, n_bytes: int) -> Any:
    return builder.add(address, ir.Constant(ir.IntType(64), n_bytes))


@_instruction
def _configure(builder: Any, layout: Any) -> None:
    _call(builder, "llvm.x86.ldtilecfg", _pointer(builder, layout))


@_instruction
def _release(builder: Any) -> None:
    _call(builder, "llvm.x86.tilerelease")


@_instruction
def _zero(builder: Any) -> None:
    for register in _SUMS:
        _call(builder, "llvm.x86.tilezero", register)


def _each_sum(builder: Any, name: str, address: Any, stride: Any) -> None:
    below = builder.add(address, builder.mul(stride, ir.Constant(ir.IntType(64), 16)))
    places = address, _plus(builder, address, 64), below, _plus(builder, below, 64)
    for register, place in zip(_SUMS, places, strict=True):
        _call(builder, name, register, _pointer(builder, place), stride)


@_instruction
def _load(builder: Any, address: Any, stride: Any) -> None:
    """Sums of 32 rows and columns."""
    _each_sum(builder, "llvm.x86.tileloadd64", address, stride)


@_instruction
def _store(builder: Any, address: Any, stride: Any) -> None:
    _each_sum(builder, "llvm.x86.tilestored64", address, stride)


@_instruction
def _multiply(builder: Any, upper: Any, lower: Any, left: Any, right: Any) -> None:
    """Adds to the sums what 32 columns of 2 x 16 rows of x, three parts behind each other, give with 2 x 16 columns."""
    row = ir.Constant(ir.IntType(64), 64)
    for register, place in zip(_RIGHT, (left, right), strict=True):
        _call(builder, "llvm.x86.tileloadd64", register, _pointer(builder, place), row)
    for part in range(3):
        for register, place in zip(_LEFT, (upper, lower), strict=True):
            tile = _pointer(builder, _plus(builder, place, part * _TILE))
            _call(builder, "llvm.x86.tileloadd64", register, tile, row)
        for number, register in enumerate(_SUMS):
            _call(builder, "llvm.x86.tdpbf16ps", register, _LEFT[number // 2], _RIGHT[number % 2])


@_instruction
def _split(builder: Any, given: Any, parts: Any) -> None:
    """32 numbers of fp32 as three rows of bf16 in tiles behind each other, the smallest first. What is infinite becomes
    NaN."""
    upper, behind = ir.Constant(_BITS, [-(1 << 16)] * 16), ir.Constant(_BITS, [16] * 16)

    def rest(bits: Any) -> Any:
        whole = builder.bitcast(builder.and_(bits, upper), _FLOATS)
        return builder.bitcast(builder.fsub(builder.bitcast(bits, _FLOATS), whole), _BITS)

    for half in range(2):
        first = builder.load(_pointer(builder, _plus(builder, given, 64 * half), _BITS))
        first.align = 4
        second = rest(first)
        for number, bits in enumerate((rest(second), second, first)):
            place = _pointer(builder, _plus(builder, parts, number * _TILE + 32 * half), _UPPER)
            builder.store(builder.trunc(builder.lshr(bits, behind), _UPPER), place).align = 2


@_instruction
def _pair(builder: Any, given: Any, stride: Any, out: Any) -> None:
    """16 numbers of one row and those below them, side by side."""
    lower, upper = (builder.load(_pointer(builder, row, _UPPER)) for row in (given, builder.add(given, stride)))
    lower.align = upper.align = 2
    raised = builder.shl(builder.zext(upper, _BITS), ir.Constant(_BITS, [16] * 16))
    both = builder.or_(raised, builder.zext(lower, _BITS))
    builder.store(both, _pointer(builder, out, _BITS)).align = 4


@_instruction
def _transpose(builder: Any, given: Any, stride: Any, out: Any) -> None:
    """A tile of 16 rows of 16 pairs."""
    rows = []
    for number in range(16):
        offset = builder.mul(stride, ir.Constant(ir.IntType(64), number))
        rows.append(builder.load(_pointer(builder, builder.add(given, offset), _BITS)))
        rows[-1].align = 2
    halves = [[i // 2 + 16 * (i % 2) + first for i in range(16)] for first in (0, 8)]
    places = [ir.Constant(_BITS, half) for half in halves]
    for _ in range(4):  # rows 0 and 8, 1 and 9, … as two rows that hold them by turns
        rows = [
            builder.shuffle_vector(*pair, place) for pair in zip(rows[:8], rows[8:], strict=True) for place in places
        ]
    for number, row in enumerate(rows):
        builder.store(row, _pointer(builder, _plus(builder, out, 64 * number), _BITS)).align = 4


# --- the product ------------------------------------------------------------------------------------------------------


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
                    _split(at + r * row + 128 * step, place + 64 * r)
                else:
                    for j in range(stop - start - 32 * whole):
                        padded[j] = x_TK[first + 16 * tile + r, start + 32 * whole + j]
                    _split(np.int64(padded.ctypes.data), place + 64 * r)
            place += 3 * _TILE


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
                _transpose(at + 64 * step, row, place)
            else:
                out = packed[tile, step]
                out[:] = 0
                for i in range(min(16, columns - 16 * tile)):
                    for first in range(32 * step, min(shared, 32 * step + 32), 2):
                        upper = w_NK[16 * tile + i, first + 1] if first + 1 < shared else np.int16(0)
                        out[(first - 32 * step) // 2, i] = _both(w_NK[16 * tile + i, first], upper)
            place += _TILE


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
    at_once = (n_steps + max(1, n_blocks) - 1) // max(1, n_blocks)
    row, out_row = n_steps * _TILE, out_TN.strides[0]
    corner = np.empty((32, 32), np.float32)
    _configure(np.int64(layout.ctypes.data))
    for first in range(0, n_rows, 16 * parts.shape[0]):
        n = min(16 * parts.shape[0], n_rows - first)
        for start in range(0, n_steps, at_once):
            n_here = min(at_once, n_steps - start)
            _put_rows(x_TK, first, n, 32 * start, min(shared, 32 * (start + n_here)), parts)
            adds = add or start > 0
            for column in range(0, 16 * n_tiles, 32):
                for r in range(0, n, 32):
                    upper = np.int64(parts.ctypes.data) + (r // 16) * n_here * 3 * _TILE
                    lower = upper + n_here * 3 * _TILE
                    left = np.int64(packed.ctypes.data) + (column // 16) * row + start * _TILE
                    is_whole = r + 32 <= n and column + 32 <= columns
                    place = np.int64(out_TN.ctypes.data) + (first + r) * out_row + 4 * column
                    if adds and is_whole:
                        _load(place, out_row)
                    else:
                        _zero()
                    for _ in range(n_here):
                        _multiply(upper, lower, left, left + row)
                        upper += 3 * _TILE
                        lower += 3 * _TILE
                        left += _TILE
                    if is_whole:
                        _store(place, out_row)
                        continue
                    _store(np.int64(corner.ctypes.data), 128)
                    for i in range(min(32, n - r)):
                        for j in range(min(32, columns - column)):
                            before = out_TN[first + r + i, column + j] if adds else np.float32(0)
                            out_TN[first + r + i, column + j] = before + corner[i, j]
    _release()
