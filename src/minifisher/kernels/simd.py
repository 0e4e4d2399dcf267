"""Sixteen float32 numbers side by side as one value that compiled loops compute with; needs numba.

LLVM vectorises the innermost loop alone and keeps nothing in registers from one such loop to the next. A
value of this type *is* a vector: what is loaded stays in a register until it is stored, in as many registers
as the processor needs for sixteen numbers. Arithmetic is +, -, *, / and `maximum`, lane by lane.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16

_emitted: Any = intrinsic  # numba's types describe the function that emits, not the one that is called

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)
_BITS = ir.VectorType(ir.IntType(32), LANES)


class _Lanes(types.Type):
    def __init__(self) -> None:
        super().__init__("Lanes")


_lanes = _Lanes()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


def _define(function: Any, instruction: str) -> None:
    @infer_global(function)
    class _Arithmetic(AbstractTemplate):
        def generic(self, arguments: Any, keywords: Any) -> Any:
            if arguments == (_lanes, _lanes):
                return signature(_lanes, _lanes, _lanes)
            return None

    @lower_builtin(function, _lanes, _lanes)
    def _lower(context: Any, builder: Any, kind: Any, arguments: Any) -> Any:
        return getattr(builder, instruction)(*arguments)


for _function, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define(_function, _instruction)


@_emitted
def maximum(context: Any, one: Any, other: Any) -> Any:
    """The larger of two in every lane; the second one where the first is NaN."""

    def emit(context: Any, builder: Any, kind: Any, arguments: Any) -> Any:
        larger = builder.fcmp_ordered(">", *arguments)
        return builder.select(larger, *arguments)

    return _lanes(_lanes, _lanes), emit


@_emitted
def fill(context: Any, number: Any) -> Any:
    """One float32 number in every lane."""

    def emit(context: Any, builder: Any, kind: Any, arguments: Any) -> Any:
        empty = ir.Constant(_FLOATS, ir.Undefined)
        first = builder.insert_element(empty, arguments[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(first, empty, ir.Constant(_BITS, None))

    return _lanes(types.float32), emit


@_emitted
def load(context: Any, array: Any, row: Any) -> Any:
    """Row `row` of a contiguous [rows, LANES] array: float32, or bfloat16 as its bits in uint16."""

    def emit(context: Any, builder: Any, kind: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, kind, arguments)
        vector = builder.load(pointer, align=array.dtype.bitwidth // 8)
        return _widened(builder, vector) if array.dtype == types.uint16 else vector

    return _lanes(array, types.intp), emit


@_emitted
def store(context: Any, array: Any, row: Any, lanes: Any) -> Any:
    """The inverse of `load`; bfloat16 is rounded to nearest, ties to even."""

    def emit(context: Any, builder: Any, kind: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, kind, arguments)
        value = _narrowed(builder, arguments[2]) if array.dtype == types.uint16 else arguments[2]
        builder.store(value, pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, _lanes), emit


def _pointer(context: Any, builder: Any, kind: Any, arguments: Any) -> Any:
    array_type, row = kind.args[0], arguments[1]
    data = context.make_array(array_type)(context, builder, arguments[0]).data
    start = builder.gep(data, [builder.mul(row, ir.Constant(row.type, LANES))])
    vector = _HALVES if array_type.dtype == types.uint16 else _FLOATS
    return builder.bitcast(start, vector.as_pointer())


def _each(number: int) -> Any:
    return ir.Constant(_BITS, [number] * LANES)


def _widened(builder: Any, halves: Any) -> Any:
    """A bfloat16 is the upper half of the float32 of the same value."""
    return builder.bitcast(builder.shl(builder.zext(halves, _BITS), _each(16)), _FLOATS)


def _narrowed(builder: Any, floats: Any) -> Any:
    bits = builder.bitcast(floats, _BITS)
    odd = builder.and_(builder.lshr(bits, _each(16)), _each(1))
    rounded = builder.add(bits, builder.add(odd, _each(0x7FFF)))
    return builder.trunc(builder.lshr(rounded, _each(16)), _HALVES)
