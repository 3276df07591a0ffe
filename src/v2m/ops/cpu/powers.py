"""Powers of 2 and of e, right to about one unit in the last place of fp32."""

from __future__ import annotations

import math

from llvmlite import ir
from numba.extending import intrinsic

from .vector import AVX512, FLOATS, INTS, constant, int_constant, multiply_add, vector

__all__ = ["exp", "exp2"]

# 2^f on [-1/2, 1/2], least relative error (2.0e-9) among polynomials with 2^0 = 1 exactly. A degree
# less has 9e-8, no more than rounding, but as a bias that sums over many tokens would show.
SERIES = (
    1.0,
    0.6931471824645996,
    0.24022647738456726,
    0.055503323674201965,
    0.00961843691766262,
    0.0013398873852565885,
    0.00015353361959569156,
)
# With AVX-512 sixteen of its values lie in a register, and 2^f is wanted on [-1/32, 1/32] only:
# (2^f - 1) / f, such that the error of 2^f is least (1.6e-9).
SIXTEENTHS = [2 ** (k / 16) for k in range(16)]
SHORT_SERIES = (0.69314718, 0.24023429, 0.05550214)
LOG2_E = 1.4426950216293335  # in fp32
LOG2_E_REST = 1.9259629911266175e-08
SMALLEST, LARGEST = -87.3, 88.3  # exponents whose power of e is surely a normal fp32 number
ROUND = 1.5 * 2.0**23  # adding it leaves the nearest integer in the low bits
ROUND_16 = 1.5 * 2.0**19  # and this one sixteenths


def _clamp(builder, x, low, high):
    """`x` kept within bounds; a NaN stays one."""
    for compare, bound in (("<", low), (">", high)):
        beyond = builder.fcmp_ordered(compare, x, constant(bound))
        x = builder.select(beyond, constant(bound), x)
    return x


def _polynomial(builder, series, x):
    value = constant(series[-1])
    for coefficient in series[-2::-1]:
        value = multiply_add(builder, value, x, constant(coefficient))
    return value


def _power_of_two(builder, fraction, shifted, whole):
    """2^(whole + fraction), where `shifted` is `whole` + ROUND.

    Without AVX-512 the result must be a normal number.
    """
    power = _polynomial(builder, SERIES, fraction)
    return _scale(builder, power, shifted, whole)


def _scale(builder, power, shifted, whole):
    """power * 2^whole."""
    if AVX512:
        lanes, rounding = ir.IntType(16)(-1), ir.IntType(32)(4)  # all; as it is set
        return _avx512(builder, "mask.scalef.ps", power, whole, power, lanes, rounding)
    exponent = builder.shl(builder.bitcast(shifted, INTS), int_constant(23))
    return builder.bitcast(builder.add(builder.bitcast(power, INTS), exponent), FLOATS)


def _near_power(builder, x):
    """2^x from a table of sixteen."""
    shifted = builder.fadd(x, constant(ROUND_16))
    whole = builder.fsub(shifted, constant(ROUND_16))
    fraction = builder.fsub(x, whole)
    table = ir.Constant(FLOATS, SIXTEENTHS)
    near = _avx512(builder, "permvar.sf", table, builder.bitcast(shifted, INTS))
    slope = _polynomial(builder, SHORT_SERIES, fraction)
    power = multiply_add(builder, builder.fmul(near, fraction), slope, near)
    return _scale(builder, power, None, whole)


def _avx512(builder, name, *arguments):
    """An instruction of AVX-512."""
    name = f"llvm.x86.avx512.{name}.512"
    kind = ir.FunctionType(FLOATS, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, arguments)


@intrinsic
def exp2(typing_context, exponent):
    """2^exponent; from 128 on infinite, and zero where fp32 has no number, or no normal one."""

    def generate(context, builder, signature, arguments):
        if AVX512:
            return _near_power(builder, arguments[0])
        x = _clamp(builder, arguments[0], -127.0, 128.0)
        shifted = builder.fadd(x, constant(ROUND))
        whole = builder.fsub(shifted, constant(ROUND))
        return _power_of_two(builder, builder.fsub(x, whole), shifted, whole)

    return vector(vector), generate


@intrinsic
def exp(typing_context, exponent):
    """e^exponent, as exact for large exponents; zero below -104, infinite above 89 at last."""

    def generate(context, builder, signature, arguments):
        bounds = (-110.0, 90.0) if AVX512 else (SMALLEST, LARGEST)
        x = _clamp(builder, arguments[0], *bounds)
        shifted = multiply_add(builder, x, constant(LOG2_E), constant(ROUND))
        whole = builder.fsub(shifted, constant(ROUND))
        fraction = multiply_add(builder, x, constant(LOG2_E), builder.fneg(whole))
        fraction = multiply_add(builder, x, constant(LOG2_E_REST), fraction)
        power = _power_of_two(builder, fraction, shifted, whole)
        if AVX512:
            return power
        for compare, bound, limit in (("<", SMALLEST, 0.0), (">", LARGEST, math.inf)):
            beyond = builder.fcmp_ordered(compare, arguments[0], constant(bound))
            power = builder.select(beyond, constant(limit), power)
        return power

    return vector(vector), generate
