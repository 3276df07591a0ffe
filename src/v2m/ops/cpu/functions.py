"""Functions of vectors, each right to about one unit in the last place of fp32."""

from __future__ import annotations

from numba import float32, njit

from .layout import FLOAT
from .powers import exp
from .vector import (
    fma,
    load,
    load_bfloat16,
    maximum,
    splat,
    store,
    store_bfloat16,
    where_negative,
)

__all__ = ["device", "load_token", "sigmoid", "softplus", "softplus_and_slope", "store_token"]

device = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)

ONE, TWO, ZERO = float32(1), float32(2), float32(0)
# 2 atanh(s) / s in s^2 on [0, 1/9]; relative error 4.5e-9
LOG1P = tuple(
    float32(c)
    for c in (
        0.2801198661327362,
        0.28001806139945984,
        0.4002152681350708,
        0.666664183139801,
        2.0,
    )
)
L4, L3, L2, L1, L0 = LOG1P


@device
def load_token(base, index, bfloat16):
    """The vector at element `index` of a grid."""
    if bfloat16:
        return load_bfloat16(base + 2 * index)
    return load(base + FLOAT * index)


@device
def store_token(base, index, value, bfloat16):
    """Write a vector at element `index` of a grid."""
    if bfloat16:
        store_bfloat16(base + 2 * index, value)
    else:
        store(base + FLOAT * index, value)


@device
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return splat(ONE) / (splat(ONE) + exp(splat(ZERO) - x))


@device
def softplus(x):
    """log(1 + exp(x)), relatively exact for very negative x as well."""
    return _softplus(x, _power(x))


@device
def softplus_and_slope(x):
    """The same, and its derivative sigmoid(x)."""
    p = _power(x)
    share = splat(ONE) / (splat(ONE) + p)
    return _softplus(x, p), where_negative(x, p * share, share)


@device
def _power(x):
    """exp(-|x|)."""
    zero = splat(ZERO)
    return exp(zero - maximum(x, zero - x))


@device
def _softplus(x, p):
    """max(x, 0) + log(1 + p), where log(1 + p) = 2 atanh(p / (2 + p))."""
    zero = splat(ZERO)
    s = p / (splat(TWO) + p)
    w = s * s
    series = fma(fma(fma(fma(splat(L4), w, splat(L3)), w, splat(L2)), w, splat(L1)), w, splat(L0))
    return fma(s, series, maximum(x, zero))
