"""A short vector type for numba, so that the kernels are vectorised by construction.

`Vector` holds `LANES` fp32 numbers. Loads and stores take plain integer addresses; arithmetic is
by operators. LLVM splits a vector into as many registers as the machine needs (AVX-512, AVX2, SSE
or NEON), so nothing here depends on the instruction set, and nothing is left to the
auto-vectoriser, which gives up on loops with as many pointers as a scan has.
"""

from __future__ import annotations

import operator

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import config, typing
from numba.core.typing.templates import ConcreteTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

__all__ = [
    "LANES",
    "atomic_increment",
    "broadcast",
    "fma",
    "load",
    "load_bfloat16",
    "load_float",
    "load_int",
    "maximum",
    "prefetch",
    "splat",
    "store",
    "store_bfloat16",
    "store_float",
    "total",
    "where_negative",
]

# What NUMBA_CPU_NAME or NUMBA_CPU_FEATURES ask for is some other machine.
AVX512 = config.CPU_NAME is None and config.CPU_FEATURES is None
AVX512 = AVX512 and bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))
LANES = 16 if AVX512 else 8

FLOAT = ir.FloatType()
FLOATS = ir.VectorType(FLOAT, LANES)
INTS = ir.VectorType(ir.IntType(32), LANES)
SHORTS = ir.VectorType(ir.IntType(16), LANES)


class VectorType(types.Type):
    """The numba type of a vector of `LANES` fp32 numbers."""

    def __init__(self):
        super().__init__(name=f"Vector{LANES}")


vector = VectorType()


@register_model(VectorType)
class VectorModel(models.PrimitiveModel):
    """A vector is one LLVM value."""

    def __init__(self, manager, frontend_type):
        super().__init__(manager, frontend_type, FLOATS)


@infer_global(operator.add)
@infer_global(operator.sub)
@infer_global(operator.mul)
@infer_global(operator.truediv)
class VectorArithmetic(ConcreteTemplate):
    """vector (+, -, *, /) vector."""

    cases = (typing.signature(vector, vector, vector),)


@lower_builtin(operator.add, vector, vector)
def _add(context, builder, signature, arguments):
    return builder.fadd(*arguments)


@lower_builtin(operator.sub, vector, vector)
def _sub(context, builder, signature, arguments):
    return builder.fsub(*arguments)


@lower_builtin(operator.mul, vector, vector)
def _mul(context, builder, signature, arguments):
    return builder.fmul(*arguments)


@lower_builtin(operator.truediv, vector, vector)
def _div(context, builder, signature, arguments):
    return builder.fdiv(*arguments)


def constant(value):
    """The same fp32 number in every lane."""
    return ir.Constant(FLOATS, [float(value)] * LANES)


def int_constant(value, kind=INTS):
    """The same integer in every lane."""
    return ir.Constant(kind, [value] * LANES)


def _pointer(builder, address, pointee):
    return builder.inttoptr(address, pointee.as_pointer())


def _splat(builder, scalar):
    one = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), scalar, ir.IntType(32)(0))
    return builder.shuffle_vector(one, ir.Constant(FLOATS, ir.Undefined), int_constant(0))


def multiply_add(builder, a, b, c):
    """a * b + c in a function being built, fused where the machine can."""
    name = f"llvm.fmuladd.v{LANES}f32"
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, [a, b, c])


@intrinsic
def load(typing_context, address):
    """The `LANES` fp32 numbers at `address`."""

    def generate(context, builder, signature, arguments):
        return builder.load(_pointer(builder, arguments[0], FLOATS), align=4, typ=FLOATS)

    return vector(types.int64), generate


@intrinsic
def store(typing_context, address, value):
    """Write a vector to `address`."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[1], _pointer(builder, arguments[0], FLOATS), align=4)
        return context.get_dummy_value()

    return types.none(types.int64, vector), generate


@intrinsic
def load_bfloat16(typing_context, address):
    """`LANES` bfloat16 numbers at `address`, as fp32."""

    def generate(context, builder, signature, arguments):
        pointer = _pointer(builder, arguments[0], SHORTS)
        bits = builder.zext(builder.load(pointer, align=2, typ=SHORTS), INTS)
        return builder.bitcast(builder.shl(bits, int_constant(16)), FLOATS)

    return vector(types.int64), generate


@intrinsic
def store_bfloat16(typing_context, address, value):
    """Write a vector as bfloat16, rounded to nearest even; a NaN stays one."""

    def generate(context, builder, signature, arguments):
        value = arguments[1]
        bits = builder.bitcast(value, INTS)
        last = builder.and_(builder.lshr(bits, int_constant(16)), int_constant(1))
        rounded = builder.add(bits, builder.add(last, int_constant(0x7FFF)))
        nan = builder.fcmp_unordered("uno", value, value)
        kept = builder.select(nan, int_constant(0x7FC00000), rounded)
        short = builder.trunc(builder.lshr(kept, int_constant(16)), SHORTS)
        builder.store(short, _pointer(builder, arguments[0], SHORTS), align=2)
        return context.get_dummy_value()

    return types.none(types.int64, vector), generate


@intrinsic
def broadcast(typing_context, address):
    """The fp32 number at `address` in every lane."""

    def generate(context, builder, signature, arguments):
        scalar = builder.load(_pointer(builder, arguments[0], FLOAT), align=4, typ=FLOAT)
        return _splat(builder, scalar)

    return vector(types.int64), generate


@intrinsic
def splat(typing_context, number):
    """The same fp32 number in every lane."""

    def generate(context, builder, signature, arguments):
        return _splat(builder, arguments[0])

    return vector(types.float32), generate


@intrinsic
def fma(typing_context, a, b, c):
    """a * b + c, fused where the machine can."""

    def generate(context, builder, signature, arguments):
        return multiply_add(builder, *arguments)

    return vector(vector, vector, vector), generate


@intrinsic
def maximum(typing_context, a, b):
    """The larger of `a` and `b`; where `a` is NaN, NaN."""

    def generate(context, builder, signature, arguments):
        a, b = arguments
        return builder.select(builder.fcmp_ordered("<", a, b), b, a)

    return vector(vector, vector), generate


@intrinsic
def where_negative(typing_context, x, a, b):
    """`a` where x < 0, else `b`."""

    def generate(context, builder, signature, arguments):
        x, a, b = arguments
        return builder.select(builder.fcmp_ordered("<", x, constant(0)), a, b)

    return vector(vector, vector, vector), generate


@intrinsic
def prefetch(typing_context, address):
    """Ask for the memory at `address`, which need not exist, in the second cache."""

    def generate(context, builder, signature, arguments):
        pointer = _pointer(builder, arguments[0], ir.IntType(8))
        name, number = "llvm.prefetch.p0", ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        builder.call(function, [pointer, number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.none(types.int64), generate


@intrinsic
def total(typing_context, value):
    """The sum over the lanes, halving: always in the same order."""

    def generate(context, builder, signature, arguments):
        value, width = arguments[0], LANES
        undefined = ir.Constant(FLOATS, ir.Undefined)
        while width > 1:
            width //= 2
            order = [min(lane + width, LANES - 1) for lane in range(LANES)]
            mask = ir.Constant(INTS, order)
            value = builder.fadd(value, builder.shuffle_vector(value, undefined, mask))
        return builder.extract_element(value, ir.IntType(32)(0))

    return types.float32(vector), generate


@intrinsic
def load_int(typing_context, address):
    """The 64-bit integer at `address`."""

    def generate(context, builder, signature, arguments):
        kind = ir.IntType(64)
        return builder.load(_pointer(builder, arguments[0], kind), align=8, typ=kind)

    return types.int64(types.int64), generate


@intrinsic
def load_float(typing_context, address):
    """The fp32 number at `address`."""

    def generate(context, builder, signature, arguments):
        return builder.load(_pointer(builder, arguments[0], FLOAT), align=4, typ=FLOAT)

    return types.float32(types.int64), generate


@intrinsic
def store_float(typing_context, address, number):
    """Write one fp32 number to `address`."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[1], _pointer(builder, arguments[0], FLOAT), align=4)
        return context.get_dummy_value()

    return types.none(types.int64, types.float32), generate


@intrinsic
def atomic_increment(typing_context, address):
    """Add one to the 64-bit integer at `address`, safely between threads; returns what it was."""

    def generate(context, builder, signature, arguments):
        kind = ir.IntType(64)
        pointer = _pointer(builder, arguments[0], kind)
        return builder.atomic_rmw("add", pointer, kind(1), "seq_cst")

    return types.int64(types.int64), generate
