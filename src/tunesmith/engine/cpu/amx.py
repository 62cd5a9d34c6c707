"""AMX's instructions for Numba: products of tiles of bf16 with sums in fp32, and what puts numbers into tiles.

A tile has 16 rows of 64 bytes; eight of them are the unit's registers. A number of fp32 is the sum of three of bf16,
its parts, which lie in tiles behind each other, the smallest first. The instructions are LLVM's intrinsics (Intel 64
and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18). Addresses and strides are bytes, int64.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

TILE = 1024  # bytes
SUMS, LEFT, RIGHT = (0, 1, 2, 3), (4, 5), (6, 7)  # registers: 2 x 2 tiles of sums, two of each factor
FLOATS, BITS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(32), 16)
SHORTS = ir.VectorType(ir.IntType(16), 16)


def _whole() -> Any:
    """What tells the unit that all tiles are whole: palette, bytes per row, rows."""
    layout = np.zeros(64, np.uint8)
    layout[0], layout[16:32:2], layout[48:56] = 1, 64, 16
    return layout


LAYOUT = _whole()


def instruction(emit: Callable[..., None]) -> Any:
    """For Numba: a function of addresses and strides, in bytes, whose code `emit` writes. Returns nothing."""

    def typed(_: Any, *given: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            emit(builder, *arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * len(given)), generate

    # `intrinsic` copies what stands here.
    vars(typed).update(__name__=emit.__name__, __signature__=inspect.signature(emit))
    return intrinsic(typed)


def call(builder: Any, name: str, *arguments: Any) -> None:
    values = [ir.Constant(ir.IntType(8), given) if isinstance(given, int) else given for given in arguments]
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [v.type for v in values]), name)
    builder.call(function, values)


def pointer(builder: Any, address: Any, of: Any = None) -> Any:
    return builder.inttoptr(address, (of or ir.IntType(8)).as_pointer())


def plus(builder: Any, address: Any, n_bytes: int) -> Any:
    return builder.add(address, ir.Constant(ir.IntType(64), n_bytes))


@instruction
def configure(builder: Any, layout: Any) -> None:
    call(builder, "llvm.x86.ldtilecfg", pointer(builder, layout))


@instruction
def release(builder: Any) -> None:
    call(builder, "llvm.x86.tilerelease")


@instruction
def zero_sums(builder: Any) -> None:
    for register in SUMS:
        call(builder, "llvm.x86.tilezero", register)


def _each_sum(builder: Any, name: str, address: Any, stride: Any) -> None:
    below = builder.add(address, builder.mul(stride, ir.Constant(ir.IntType(64), 16)))
    places = address, plus(builder, address, 64), below, plus(builder, below, 64)
    for register, place in zip(SUMS, places, strict=True):
        call(builder, name, register, pointer(builder, place), stride)


@instruction
def load_sums(builder: Any, address: Any, stride: Any) -> None:
    """Sums of 32 rows and columns."""
    _each_sum(builder, "llvm.x86.tileloadd64", address, stride)


@instruction
def store_sums(builder: Any, address: Any, stride: Any) -> None:
    _each_sum(builder, "llvm.x86.tilestored64", address, stride)


def parts_of(builder: Any, address: Any) -> tuple[Any, Any, Any]:
    """16 numbers of fp32 as three of bf16 each, in the upper halves of their bits, the smallest first. What is infinite
    becomes NaN."""
    upper = ir.Constant(BITS, [-(1 << 16)] * 16)

    def rest(bits: Any) -> Any:
        whole = builder.bitcast(builder.and_(bits, upper), FLOATS)
        return builder.bitcast(builder.fsub(builder.bitcast(bits, FLOATS), whole), BITS)

    first = builder.load(pointer(builder, address, BITS))
    first.align = 4
    second = rest(first)
    return rest(second), second, first


@instruction
def split(builder: Any, given: Any, out: Any) -> None:
    """32 numbers as a row of each of three tiles."""
    behind = ir.Constant(BITS, [16] * 16)
    for half in range(2):
        for number, bits in enumerate(parts_of(builder, plus(builder, given, 64 * half))):
            place = pointer(builder, plus(builder, out, number * TILE + 32 * half), SHORTS)
            builder.store(builder.trunc(builder.lshr(bits, behind), SHORTS), place).align = 2


@instruction
def transpose(builder: Any, given: Any, stride: Any, out: Any, out_stride: Any) -> None:
    """16 rows of 16 numbers of 32 bits."""
    rows = []
    for number in range(16):
        offset = builder.mul(stride, ir.Constant(ir.IntType(64), number))
        rows.append(builder.load(pointer(builder, builder.add(given, offset), BITS)))
        rows[-1].align = 2
    halves = [[i // 2 + 16 * (i % 2) + first for i in range(16)] for first in (0, 8)]
    places = [ir.Constant(BITS, half) for half in halves]
    for _ in range(4):  # rows 0 and 8, 1 and 9, … as two rows that hold them by turns
        pairs = zip(rows[:8], rows[8:], strict=True)
        rows = [builder.shuffle_vector(*pair, place) for pair in pairs for place in places]
    for number, row in enumerate(rows):
        offset = builder.mul(out_stride, ir.Constant(ir.IntType(64), number))
        builder.store(row, pointer(builder, builder.add(out, offset), BITS)).align = 4
