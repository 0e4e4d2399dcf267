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
from numba.core import cgutils
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
        return _filled(builder, arguments[0])

    return _vector(types.float32), emit


def _filled(builder: Any, number: Any) -> Any:
    empty = ir.Constant(_FLOAT32S, ir.Undefined)
    first = builder.insert_element(empty, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, empty, ir.Constant(_INT32S, None))


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


# ---- products of matrices ----


def multiply_rows(rows: int, vectors: int) -> Any:
    """A function that computes so many rows, and `vectors` times `LANES` columns, of a product in registers.

    f(left, row, right, column, out, depth) writes out[i, j] = sum_k left[i, k] right[k, j], k < depth, for
    rows i from `row` on and columns j from `column` on. All three are contiguous float32 arrays of two
    dimensions. The terms of a sum are added one by one, each with one rounding where the processor can.
    """

    @_intrinsic
    def multiply(context: Any, left: Any, row: Any, right: Any, column: Any, out: Any, depth: Any) -> Any:
        def emit(context: Any, builder: Any, kind: Any, arguments: Any) -> Any:
            _, row, _, column, _, depth = arguments

            def row_of(which: int, index: Any) -> _Row:
                array = context.make_array(kind.args[which])(context, builder, arguments[which])
                return _Row(builder, array, index)

            lefts = [row_of(0, _plus(builder, row, i)) for i in range(rows)]
            outs = [row_of(4, _plus(builder, row, i)) for i in range(rows)]
            columns = [_plus(builder, column, LANES * j) for j in range(vectors)]
            zero = ir.Constant(_FLOAT32S, [0.0] * LANES)
            # Memory that LLVM turns into registers.
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in columns] for _ in lefts]
            with cgutils.for_range(builder, depth) as loop:
                of_right = row_of(2, loop.index)
                loaded = [of_right.vector(position) for position in columns]
                for of_left, of_row in zip(lefts, sums, strict=True):
                    factor = _filled(builder, of_left.number(loop.index))
                    for vector, total in zip(loaded, of_row, strict=True):
                        terms = factor, vector, builder.load(total)
                        builder.store(builder.call(_fused_multiply_add(builder), terms), total)
            for of_out, of_row in zip(outs, sums, strict=True):
                for position, total in zip(columns, of_row, strict=True):
                    of_out.write(position, builder.load(total))
            return context.get_dummy_value()

        return types.void(left, types.intp, right, types.intp, out, types.intp), emit

    return multiply


class _Row:
    """A row of a contiguous array of two dimensions, while code is emitted."""

    def __init__(self, builder: Any, array: Any, index: Any) -> None:
        length = cgutils.unpack_tuple(builder, array.shape)[1]
        self._builder, self._start = builder, builder.gep(array.data, [builder.mul(index, length)])

    def number(self, position: Any) -> Any:
        return self._builder.load(self._builder.gep(self._start, [position]))

    def vector(self, position: Any) -> Any:
        return self._builder.load(self._pointer(position), align=4)

    def write(self, position: Any, vector: Any) -> None:
        self._builder.store(vector, self._pointer(position), align=4)

    def _pointer(self, position: Any) -> Any:
        start = self._builder.gep(self._start, [position])
        return self._builder.bitcast(start, _FLOAT32S.as_pointer())


def _plus(builder: Any, index: Any, number: int) -> Any:
    return builder.add(index, ir.Constant(index.type, number))


def _fused_multiply_add(builder: Any) -> Any:
    kind = ir.FunctionType(_FLOAT32S, [_FLOAT32S] * 3)
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
