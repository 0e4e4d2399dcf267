"""A numba type for a vector of sixteen float32 numbers that stays in registers; needs numba.

LLVM vectorises only the innermost loop, and keeps nothing in registers from one such loop to the next. A
value of this type is an LLVM vector: it stays in registers from `load` to `store`, in as many of them as the
processor needs for sixteen numbers. The operations are +, -, *, / and `maximum`, elementwise.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16
"""The length of a vector: its elements are computed side by side in the vector lanes of the processor."""

_intrinsic: Any = intrinsic  # numba's annotations describe the emitting function, not the one that is called

_FLOAT32S = ir.VectorType(ir.FloatType(), LANES)
_UINT16S = ir.VectorType(ir.IntType(16), LANES)
_INT32S = ir.VectorType(ir.IntType(32), LANES)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__("Float32x16")


_vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOAT32S)


def _define(function: Any, instruction: str) -> None:
    @infer_global(function)
    class _Arithmetic(AbstractTemplate):
        def generic(self, arguments: Any, keywords: Any) -> Any:
            if arguments == (_vector, _vector):
                return signature(_vector, _vector, _vector)
            return None

    @lower_builtin(function, _vector, _vector)
    def _lower(context: Any, builder: Any, kind: Any, arguments: Any) -> Any:
        return getattr(builder, instruction)(*arguments)


for _function, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define(_function, _instruction)


@_intrinsic
def maximum(context: Any, one: Any, other: Any) -> Any:
    """The larger of two vectors, elementwise; the second one's element where the first one's is NaN."""

    def emit(context: Any, builder: Any, kind: Any, arguments: Any) -> Any:
        larger = builder.fcmp_ordered(">", *arguments)
        return builder.select(larger, *arguments)

    return _vector(_vector, _vector), emit


@_intrinsic
def fill(context: Any, number: Any) -> Any:
    """A vector whose elements are all the same float32 number."""

    def emit(context: Any, builder: Any, kind: Any, arguments: Any) -> Any:
        empty = ir.Constant(_FLOAT32S, ir.Undefined)
        first = builder.insert_element(empty, arguments[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(first, empty, ir.Constant(_INT32S, None))

    return _vector(types.float32), emit


@_intrinsic
def load(context: Any, array: Any, row: Any) -> Any:
    """Row `row` of a contiguous [rows, LANES] array of float32, or of bfloat16 stored as uint16."""

    def emit(context: Any, builder: Any, kind: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, kind, arguments)
        vector = builder.load(pointer, align=array.dtype.bitwidth // 8)
        return _to_float32(builder, vector) if array.dtype == types.uint16 else vector

    return _vector(array, types.intp), emit


@_intrinsic
def store(context: Any, array: Any, row: Any, vector: Any) -> Any:
    """Write a vector to row `row`, as `load` reads it; to bfloat16 it rounds to nearest, ties to even."""

    def emit(context: Any, builder: Any, kind: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, kind, arguments)
        value = _to_bfloat16(builder, arguments[2]) if array.dtype == types.uint16 else arguments[2]
        builder.store(value, pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, _vector), emit


def _pointer(context: Any, builder: Any, kind: Any, arguments: Any) -> Any:
    array_type, row = kind.args[0], arguments[1]
    data = context.make_array(array_type)(context, builder, arguments[0]).data
    start = builder.gep(data, [builder.mul(row, ir.Constant(row.type, LANES))])
    vector_type = _UINT16S if array_type.dtype == types.uint16 else _FLOAT32S
    return builder.bitcast(start, vector_type.as_pointer())


def _constant(number: int) -> Any:
    return ir.Constant(_INT32S, [number] * LANES)


def _to_float32(builder: Any, bits: Any) -> Any:
    # A bfloat16 is the upper half of the float32 of the same value.
    return builder.bitcast(builder.shl(builder.zext(bits, _INT32S), _constant(16)), _FLOAT32S)


def _to_bfloat16(builder: Any, floats: Any) -> Any:
    bits = builder.bitcast(floats, _INT32S)
    odd = builder.and_(builder.lshr(bits, _constant(16)), _constant(1))
    rounded = builder.add(bits, builder.add(odd, _constant(0x7FFF)))
    return builder.trunc(builder.lshr(rounded, _constant(16)), _UINT16S)
