"""AMX's instructions in ordinary ones, so that the code that is made of them runs, as it is, on any processor.

`engine.amx` writes every instruction through its function `call`. Here that function calls a few routines instead, of
the same effect number by number (Intel Architecture Instruction Set Extensions, "TDPBF16PS": two sums, one of the even
and one of the odd numbers, each by fused multiplications; what is below 2⁻¹²⁶ counts as nothing). The eight registers
are memory of the function that uses them; nothing is left in them for another one, and no function of ours wants that.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from llvmlite import ir
from numba.core import cgutils

from tunesmith.engine.cpu import kernels

ROWS, FLOATS, BITS = 16, ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(32), 16)
BYTE, WORD, SIZE = ir.IntType(8), ir.IntType(32), ir.IntType(64)
REGISTERS = ir.ArrayType(ir.ArrayType(BITS, ROWS), 8)
NAME = "registers of AMX"


def _each(value: int) -> ir.Constant:
    return ir.Constant(BITS, [value] * 16)


def _registers(builder: Any) -> Any:
    """Of the function that is being compiled: zeroed where it begins."""
    entry = builder.function.entry_basic_block
    for made in entry.instructions:
        if made.opname == "alloca" and made.name.startswith(NAME):
            return made
    with builder.goto_entry_block():
        made = builder.alloca(REGISTERS, name=NAME)
        made.align = 64
        builder.store(ir.Constant(REGISTERS, None), made)
    return made


def _register(builder: Any, number: ir.Constant) -> Any:
    return builder.gep(_registers(builder), [WORD(0), WORD(number.constant)], inbounds=True)


def _flushed(builder: Any, values: Any) -> Any:
    """Numbers below the smallest normal one are nothing, with their sign."""
    bits = builder.bitcast(values, BITS)
    tiny = builder.icmp_unsigned("==", builder.and_(bits, _each(0x7F800000)), _each(0))
    return builder.bitcast(builder.select(tiny, builder.and_(bits, _each(-(1 << 31))), bits), FLOATS)


def _zero(builder: Any, tile: Any) -> None:
    builder.store(ir.Constant(tile.type.pointee, None), tile)


def _move(builder: Any, tile: Any, address: Any, stride: Any, *, into: bool) -> None:
    start = builder.ptrtoint(address, SIZE)
    with cgutils.for_range(builder, SIZE(ROWS)) as loop:
        place = builder.inttoptr(builder.add(start, builder.mul(stride, loop.index)), BITS.as_pointer())
        row = builder.gep(tile, [SIZE(0), loop.index], inbounds=True)
        builder.store(builder.load(place, align=1), row) if into else builder.store(builder.load(row), place, align=1)


def _multiply(builder: Any, sums: Any, left: Any, right: Any) -> None:
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    fused, odd = cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32"), _each(-(1 << 16))

    def halves(pairs: Any) -> list[Any]:
        both = builder.shl(pairs, _each(16)), builder.and_(pairs, odd)
        return [_flushed(builder, builder.bitcast(bits, FLOATS)) for bits in both]

    with cgutils.for_range(builder, SIZE(ROWS)) as rows:
        of_left, of_sums = (builder.gep(t, [SIZE(0), rows.index], inbounds=True) for t in (left, sums))
        numbers = builder.bitcast(of_left, WORD.as_pointer())
        totals = [cgutils.alloca_once_value(builder, ir.Constant(FLOATS, [0.0] * 16)) for _ in range(2)]
        for total in totals:
            builder.store(ir.Constant(FLOATS, [0.0] * 16), total)
        with cgutils.for_range(builder, SIZE(ROWS)) as pairs:
            one = builder.load(builder.gep(numbers, [pairs.index], inbounds=True))
            first = builder.insert_element(ir.Constant(BITS, ir.Undefined), one, WORD(0))
            everywhere = builder.shuffle_vector(first, ir.Constant(BITS, ir.Undefined), _each(0))
            other = builder.load(builder.gep(right, [SIZE(0), pairs.index], inbounds=True))
            for total, a, b in zip(totals, halves(everywhere), halves(other), strict=True):
                builder.store(_flushed(builder, builder.call(fused, [a, b, builder.load(total)])), total)
        sum_of_both = _flushed(builder, builder.fadd(*(builder.load(total) for total in totals)))
        before = _flushed(builder, builder.bitcast(builder.load(of_sums), FLOATS))
        builder.store(builder.bitcast(_flushed(builder, builder.fadd(before, sum_of_both)), BITS), of_sums)


ROUTINES: dict[str, Callable[..., None]] = {
    "llvm.x86.tilezero": _zero,
    "llvm.x86.tileloadd64": functools.partial(_move, into=True),
    "llvm.x86.tilestored64": functools.partial(_move, into=False),
    "llvm.x86.tdpbf16ps": _multiply,
}
NOTHING = ("llvm.x86.ldtilecfg", "llvm.x86.tilerelease")


def call(builder: Any, name: str, *arguments: Any) -> None:
    """For `engine.amx.call`."""
    if name in NOTHING:
        return
    given = [_register(builder, BYTE(a)) if isinstance(a, int) else a for a in arguments]
    module, own = builder.module, name.replace("llvm.x86.", "emulated.")
    routine = module.globals.get(own)
    if routine is None:
        routine = ir.Function(module, ir.FunctionType(ir.VoidType(), [value.type for value in given]), own)
        routine.linkage = "linkonce_odr"
        inside = ir.IRBuilder(routine.append_basic_block("entry"))
        ROUTINES[name](inside, *routine.args)
        inside.ret_void()
    builder.call(routine, given)


@functools.cache
def modules() -> tuple[ModuleType, ModuleType]:
    """`engine.amx_products` and `engine.amx_attention`, made once more of these instructions; the real ones stay what
    they are, also in Numba's cache."""
    version = hashlib.sha256(Path(__file__).read_bytes() + kernels._VERSION.encode()).hexdigest()[:8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_VERSION", f"emulated_{version}")
        instructions = _again("amx")
        instructions.call = call  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "tunesmith.engine.cpu.amx", instructions)
        return _again("amx_products"), _again("amx_attention")


def _again(name: str) -> ModuleType:
    """A module of `engine` under another name, by which Numba finds it when it reads its cache."""
    of_engine = importlib.util.find_spec(f"tunesmith.engine.cpu.{name}")
    assert of_engine is not None and of_engine.origin is not None
    spec = importlib.util.spec_from_file_location(f"{name}_emulated", of_engine.origin)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
