"""Attention of a segment's queries by AMX (`amx`).

Both factors of a product are any numbers of fp32 here, each the sum of three of bf16, and of the nine products of parts
the six largest are taken. Parts are cut off, not rounded: the other three have the product's sign, are at most 2⁻²¹ of
it, and on average about what fp32 rounds. Some rows at a time (a row is a query's head; those that share a key head lie
behind each other) meet all keys that they see: scores, the softmax, and the product with the values or, on the way
back, four more products. Scores of a row of 2,000 tokens stay in a cache of 2 MB.

Legend: T tokens, H query heads, K key heads, D head size, a multiple of 32; P positions of the longest path, rounded up
to a multiple of 32; A numbers between two rows of scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from tunesmith.engine.cpu.amx import (
    BITS,
    FLOATS,
    LAYOUT,
    LEFT,
    RIGHT,
    SUMS,
    TILE,
    call,
    configure,
    instruction,
    load_sums,
    parts_of,
    plus,
    pointer,
    release,
    split,
    store_sums,
    transpose,
    zero_sums,
)
from tunesmith.engine.cpu.kernels import ONE, ZERO, _dot, _exp, _largest, _sum, compiled

__all__ = ["LAYOUT", "backward", "enter", "forward", "leave"]
_PARTS = 3 * TILE


# --- instructions -----------------------------------------------------------------------------------------------------


@instruction
def _multiply(builder: Any, upper: Any, lower: Any, left: Any, right: Any) -> None:
    """Adds to the sums what 32 columns of 2 x 16 rows give with 2 x 16 columns, each in three parts."""
    row = ir.Constant(ir.IntType(64), 64)
    for part in range(3):
        for register, place in zip(RIGHT, (left, right), strict=True):
            tile = pointer(builder, plus(builder, place, part * TILE))
            call(builder, "llvm.x86.tileloadd64", register, tile, row)
        for other in range(2 - part, 3):  # the smallest part meets the largest one alone
            for register, place in zip(LEFT, (upper, lower), strict=True):
                tile = pointer(builder, plus(builder, place, other * TILE))
                call(builder, "llvm.x86.tileloadd64", register, tile, row)
            for number, register in enumerate(SUMS):
                call(builder, "llvm.x86.tdpbf16ps", register, LEFT[number // 2], RIGHT[number % 2])


@instruction
def _pair(builder: Any, given: Any, below: Any, out: Any) -> None:
    """16 numbers of one row and those of another one, side by side, in three parts."""
    upper, behind = ir.Constant(BITS, [-(1 << 16)] * 16), ir.Constant(BITS, [16] * 16)
    both = zip(*(parts_of(builder, address) for address in (given, below)), strict=True)
    for number, (one, other) in enumerate(both):
        pairs = builder.or_(builder.and_(other, upper), builder.lshr(one, behind))
        builder.store(pairs, pointer(builder, plus(builder, out, number * TILE), BITS)).align = 4


@instruction
def _copy(builder: Any, given: Any, out: Any) -> None:
    """16 numbers."""
    numbers = builder.load(pointer(builder, given, FLOATS))
    numbers.align = 4
    builder.store(numbers, pointer(builder, out, FLOATS)).align = 4


# --- tiles ------------------------------------------------------------------------------------------------------------
#
# Of three parts each. What is summed over stands in the columns of a left factor's tiles, 32 of them, and in those of a
# right one in pairs: 16 rows of 16 pairs. One is the other one turned.


@compiled()
def _turn(given: Any, out: Any, n: Any) -> None:
    for tile in range(3 * n):
        transpose(given + TILE * tile, 64, out + TILE * tile, 64)


@compiled()
def _left_of_rows(rows: Any, n: Any, n_steps: Any, out: Any) -> None:
    """Left tiles of rows that lie anywhere, 16 by 16, for what is summed over their columns."""
    for i in range(n):
        place = out + (i // 16) * n_steps * _PARTS + 64 * (i % 16)
        for step in range(n_steps):
            split(rows[i] + 128 * step, place + step * _PARTS)


@compiled()
def _right_of_rows(rows: Any, n_steps: Any, n_tiles: Any, out: Any) -> None:
    """Right tiles of rows that lie anywhere, 32 by 32, for what is summed over the rows."""
    for tile in range(n_tiles):
        for step in range(n_steps):
            place = out + (tile * n_steps + step) * _PARTS
            for i in range(16):
                row = 32 * step + 2 * i
                _pair(rows[row] + 64 * tile, rows[row + 1] + 64 * tile, place + 64 * i)


@compiled()
def _products(
    left: Any, n_rows: Any, right: Any, right_row: Any, n_columns: Any, n_steps: Any, out: Any, row: Any
) -> None:
    """32 rows by 32 columns at a time."""
    for column in range(n_columns):
        for r in range(n_rows):
            upper, one = left + 2 * r * n_steps * _PARTS, right + 2 * column * right_row
            lower = upper + n_steps * _PARTS
            zero_sums()
            for _ in range(n_steps):
                _multiply(upper, lower, one, one + right_row)
                upper += _PARTS
                lower += _PARTS
                one += _PARTS
            store_sums(out + 32 * r * row + 128 * column, row)


@compiled()
def _add_up(left: Any, n_rows: Any, right: Any, n_columns: Any, n_steps: Any, out: Any, row: Any) -> None:
    for column in range(n_columns):
        for r in range(n_rows):
            upper, one = left + 2 * r * n_steps * _PARTS, right + 2 * column * n_steps * _PARTS
            lower, other = upper + n_steps * _PARTS, one + n_steps * _PARTS
            place = out + 32 * r * row + 128 * column
            load_sums(place, row)
            for _ in range(n_steps):
                _multiply(upper, lower, one, other)
                upper += _PARTS
                lower += _PARTS
                one += _PARTS
                other += _PARTS
            store_sums(place, row)


# --- a segment --------------------------------------------------------------------------------------------------------
#
# `paths` (2, K, P, D) are the keys and values of the path; `by_column` and `by_row` the same as right tiles, with keys
# in their columns (2, K, P / 16, D / 32, 3, 16, 16) and in their rows (2, K, D / 16, P / 32, 3, 16, 16).


_ROWS_OF_HEADS, _HEADS = types.float32[:, :, :], types.float32[:, :, ::1]
_PATHS, _TILES = types.float32[:, :, :, ::1], types.int32[:, :, :, :, :, :, ::1]
_ROOM, _SCORES, _LAYOUT = types.int16[::1], types.float32[:, ::1], types.uint8[::1]
_ZEROS = types.float32[::1]
_WHERE = [types.int64] * 3
_QUERIES = [_ROWS_OF_HEADS, *_WHERE, types.float32, types.int64, _TILES, _TILES, _HEADS, types.int64, _SCORES, _SCORES]


@compiled(types.void(_ROWS_OF_HEADS, _ROWS_OF_HEADS, *_WHERE, _PATHS, _TILES, _TILES, _ROOM, types.boolean))
def enter(
    key_TKD: Any, value_TKD: Any, first: Any, n: Any, position: Any, paths: Any, by_column: Any, by_row: Any, room: Any,
    backwards: Any,
) -> None:  # fmt: skip
    """Puts the keys and values of `n` tokens from `first` on onto the path, from `position` on, and makes those tiles
    again that `forward` wants, or `backward`. `room` is for 16 rows as left tiles."""
    size, steps, n_blocks = paths.shape[3], paths.shape[3] // 32, by_row.shape[3]
    begin, stop = position // 32, position + n
    end = (stop + 31) // 32
    rows = np.empty(32, np.int64)
    for which in range(2):
        given, row = (key_TKD, key_TKD.strides[0]) if which == 0 else (value_TKD, value_TKD.strides[0])
        for head in range(paths.shape[1]):
            path = paths[which, head]
            at = np.int64(path.ctypes.data)
            source = np.int64(given.ctypes.data) + first * row + head * given.strides[1]
            for i in range(n):
                for j in range(0, 4 * size, 64):
                    _copy(source + i * row + j, at + 4 * (position + i) * size + j)
            path[stop : 32 * end] = ZERO
            columns, blocks = np.int64(by_column[which, head].ctypes.data), np.int64(by_row[which, head].ctypes.data)
            for block in range(begin, end):
                for i in range(32):
                    rows[i] = at + 4 * (32 * block + i) * size
                if backwards or which == 0:
                    for half in range(2):
                        _left_of_rows(rows[16 * half :], 16, steps, np.int64(room.ctypes.data))
                        _turn(np.int64(room.ctypes.data), columns + (2 * block + half) * steps * _PARTS, steps)
                if backwards != (which == 1):
                    for tile in range(size // 16):
                        place = blocks + (tile * n_blocks + block) * _PARTS
                        for i in range(16):
                            _pair(rows[2 * i] + 64 * tile, rows[2 * i + 1] + 64 * tile, place + 64 * i)


@compiled()
def _whose(row: Any, head: Any, group: Any) -> Any:
    """Of the rows that share the key head: which query's, and which of its heads."""
    return row // group, head * group + row % group


@compiled()
def _sight(position: Any, first: Any, last: Any, window: Any) -> Any:
    """The blocks of 32 keys that queries from `first` to `last` of a segment at `position` see some of."""
    return max(0, position + first - window + 1) // 32, (position + last) // 32 + 1


@compiled(types.void(*_QUERIES, _ROOM, _SCORES, _ROOM, _SCORES, _LAYOUT))
def forward(
    query_THD: Any, first: Any, n: Any, position: Any, scale: Any, window: Any, by_column: Any, by_row: Any,
    out_RHD: Any, first_out: Any, largest_RH: Any, share_RH: Any, left: Any, scores: Any, of_scores: Any, found: Any,
    layout: Any,
) -> None:  # fmt: skip
    """The result for `n` queries from `first` on, which stand from `position` on, in `out` from `first_out` on, with
    the largest score of each, and the share of one in the sum of e to the power of all less that.

    There is memory for scores (rows at a time, a multiple of 32; A), for rows as left tiles (`left`), for scores as
    tiles of either kind (`of_scores`), and for sums (`found`)."""
    heads, size = query_THD.shape[1], query_THD.shape[2]
    steps, n_blocks, group = size // 32, by_row.shape[3], heads // by_row.shape[1]
    row, one, head_at = query_THD.strides[0], query_THD.strides[1], np.int64(query_THD.ctypes.data)
    left_at, of_scores_at = np.int64(left.ctypes.data), np.int64(of_scores.ctypes.data)
    scores_at, across = np.int64(scores.ctypes.data), scores.strides[0]
    at_once, found_at = len(scores), np.int64(found.ctypes.data)
    rows = np.empty(at_once, np.int64)
    configure(np.int64(layout.ctypes.data))
    for head in range(by_row.shape[1]):
        keys, values = np.int64(by_column[0, head].ctypes.data), np.int64(by_row[1, head].ctypes.data)
        for start in range(0, n * group, at_once):
            here = min(at_once, n * group - start)
            pairs = (here + 31) // 32
            low, high = _sight(position, start // group, (start + here - 1) // group, window)
            for i in range(here):
                token, number = _whose(start + i, head, group)
                rows[i] = head_at + (first + token) * row + number * one
            _left_of_rows(rows, here, steps, left_at)
            in_sight = keys + 2 * low * steps * _PARTS
            _products(left_at, pairs, in_sight, steps * _PARTS, high - low, steps, scores_at, across)
            for i in range(here):
                token, number = _whose(start + i, head, group)
                begin, behind = max(0, position + token - window + 1) - 32 * low, position + token + 1 - 32 * low
                seen = scores[i, begin:behind]
                largest = _largest(seen) * scale
                for j in range(len(seen)):
                    seen[j] = _exp(seen[j] * scale - largest)
                largest_RH[first_out + token, number], share_RH[first_out + token, number] = largest, ONE / _sum(seen)
                scores[i, :begin] = ZERO
                scores[i, behind : 32 * (high - low)] = ZERO
                rows[i] = scores_at + i * across
            _left_of_rows(rows, here, high - low, of_scores_at)
            in_sight = values + low * _PARTS
            _products(of_scores_at, pairs, in_sight, n_blocks * _PARTS, steps, high - low, found_at, 4 * size)
            for i in range(here):
                token, number = _whose(start + i, head, group)
                share, out = share_RH[first_out + token, number], out_RHD[first_out + token, number]
                for j in range(size):
                    out[j] = found[i, j] * share
    release()


@compiled(
    types.void(*_QUERIES, _ROWS_OF_HEADS, _HEADS, _PATHS, _ROOM, _SCORES, _SCORES, _ROOM, _SCORES, _ZEROS, _LAYOUT)
)
def backward(
    query_THD: Any, first: Any, n: Any, position: Any, scale: Any, window: Any, by_column: Any, by_row: Any,
    out_RHD: Any, first_out: Any, largest_RH: Any, share_RH: Any, d_out_RHD: Any, d_query_RHD: Any, d_paths: Any,
    left: Any, scores: Any, d_scores: Any, of_scores: Any, found: Any, nothing: Any, layout: Any,
) -> None:  # fmt: skip
    """The gradient of these queries, in `d_query`, and their share of those of the keys and values that they see, added
    to `d_paths` (2, K, D, A). `nothing` is a row of D zeros."""
    heads, size = query_THD.shape[1], query_THD.shape[2]
    steps, n_blocks, group = size // 32, by_row.shape[3], heads // by_row.shape[1]
    row, one, head_at = query_THD.strides[0], query_THD.strides[1], np.int64(query_THD.ctypes.data)
    d_row, d_one, d_head_at = d_out_RHD.strides[0], d_out_RHD.strides[1], np.int64(d_out_RHD.ctypes.data)
    left_at, of_scores_at = np.int64(left.ctypes.data), np.int64(of_scores.ctypes.data)
    scores_at, d_scores_at, across = np.int64(scores.ctypes.data), np.int64(d_scores.ctypes.data), scores.strides[0]
    at_once = len(scores)
    rows, d_rows = np.empty(at_once, np.int64), np.empty(at_once, np.int64)
    on_scores, on_d_scores = np.empty(at_once, np.int64), np.empty(at_once, np.int64)
    for i in range(at_once):
        on_scores[i], on_d_scores[i] = scores_at + i * across, d_scores_at + i * across
    nowhere, found_at = np.int64(nothing.ctypes.data), np.int64(found.ctypes.data)
    configure(np.int64(layout.ctypes.data))
    for head in range(by_row.shape[1]):
        keys, values = np.int64(by_column[0, head].ctypes.data), np.int64(by_column[1, head].ctypes.data)
        keys_by_row = np.int64(by_row[0, head].ctypes.data)
        d_key, d_value = np.int64(d_paths[0, head].ctypes.data), np.int64(d_paths[1, head].ctypes.data)
        for start in range(0, n * group, at_once):
            here = min(at_once, n * group - start)
            pairs = (here + 31) // 32
            low, high = _sight(position, start // group, (start + here - 1) // group, window)
            for i in range(32 * pairs):
                token, number = _whose(start + i, head, group)
                rows[i] = head_at + (first + token) * row + number * one if i < here else nowhere
                d_rows[i] = d_head_at + (first_out + token) * d_row + number * d_one if i < here else nowhere
            # scores, and the gradient with respect to probabilities
            for of_path, given, place in ((keys, rows, scores_at), (values, d_rows, d_scores_at)):
                _left_of_rows(given, here, steps, left_at)
                in_sight = of_path + 2 * low * steps * _PARTS
                _products(left_at, pairs, in_sight, steps * _PARTS, high - low, steps, place, across)
            for i in range(here, 32 * pairs):
                scores[i, : 32 * (high - low)] = ZERO
                d_scores[i, : 32 * (high - low)] = ZERO
            for i in range(here):
                token, number = _whose(start + i, head, group)
                begin, behind = max(0, position + token - window + 1) - 32 * low, position + token + 1 - 32 * low
                seen, d = scores[i, begin:behind], d_scores[i, begin:behind]
                largest, share = largest_RH[first_out + token, number], share_RH[first_out + token, number]
                # The sum over all keys of probability times its gradient: the same over the numbers of the result.
                for j in range(0, 4 * size, 64):
                    _copy(d_rows[i] + j, found_at + j)
                along = _dot(found[0], out_RHD[first_out + token, number])
                for j in range(len(seen)):
                    probability = _exp(seen[j] * scale - largest) * share
                    seen[j] = probability
                    d[j] = probability * (d[j] - along) * scale
                for part in (scores[i], d_scores[i]):
                    part[:begin] = ZERO
                    part[behind : 32 * (high - low)] = ZERO
            # values: d_outᵀ · probabilities; keys: queriesᵀ · d_scores; D rows each
            for d_path, given, of_given in ((d_value, d_rows, on_scores), (d_key, rows, on_d_scores)):
                _right_of_rows(given, pairs, size // 16, of_scores_at)
                _turn(of_scores_at, left_at, size // 16 * pairs)
                _right_of_rows(of_given, pairs, 2 * (high - low), of_scores_at)
                place = d_path + 128 * low
                _add_up(left_at, steps, of_scores_at, high - low, pairs, place, d_paths.strides[2])
            _left_of_rows(on_d_scores, here, high - low, of_scores_at)
            in_sight = keys_by_row + low * _PARTS
            _products(of_scores_at, pairs, in_sight, n_blocks * _PARTS, steps, high - low, found_at, 4 * size)
            for i in range(here):
                token, number = _whose(start + i, head, group)
                out = d_query_RHD[first_out + token, number]
                for j in range(size):
                    out[j] = found[i, j]
    release()


@compiled(types.void(_PATHS, *_WHERE, _HEADS, _HEADS))
def leave(d_paths: Any, position: Any, n: Any, first: Any, d_key_TKD: Any, d_value_TKD: Any) -> None:
    """The gradients of `n` keys and values of the path, from `position` on, to their tokens."""
    size, across = d_paths.shape[2], d_paths.strides[2]
    whole = n // 16 * 16
    for which in range(2):
        d_given = d_value_TKD if which else d_key_TKD
        row = d_given.strides[0]
        for head in range(d_paths.shape[1]):
            path = d_paths[which, head]
            source = np.int64(path.ctypes.data) + 4 * position
            place = np.int64(d_given.ctypes.data) + first * row + head * d_given.strides[1]
            for i in range(0, whole, 16):
                for j in range(0, size, 16):
                    transpose(source + 4 * i + j * across, across, place + i * row + 4 * j, row)
            for i in range(whole, n):
                for j in range(size):
                    d_given[first + i, head, j] = path[j, position + i]
