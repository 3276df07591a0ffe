"""The compiled backends as operators of PyTorch: `v2m::selective_scan` and `v2m::mixer_core`.

One definition for all backends: the schema, the fake (shapes for `torch.compile`), the gradient,
the autocast rule and the FLOP formula. What runs is a module with four functions, chosen by name:
see `_implementation`. To `torch.compile` each operator is opaque.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from v2m.errors import InputError

from .core import Direction, PassWeights, Sweep, distinct_sweeps
from .ungated import ungated_backward, ungated_forward

__all__ = ["mixer_core", "rms_norm", "selective_scan", "ungated_core"]

_SCAN = (
    "Tensor u, Tensor dt, Tensor A, Tensor? B, Tensor? C, Tensor? D, Tensor? z, Tensor? dt_bias,"
    " bool softplus, int axis, bool reverse, int? window, str backend"
)
_CORE = "Tensor[] first, Tensor[] second, int[] directions, str backend"
_EIGHT = ", ".join(["Tensor"] * 8)
_DEVICES = ("CPU", "CUDA", "XPU")
_INTEGERS = 7  # a direction in the schema: axis, reverse, window, twice, and the mirrored axes

_library = torch.library.Library("v2m", "FRAGMENT")
_library.define(f"selective_scan({_SCAN}) -> Tensor")
_library.define(f"selective_scan_backward(Tensor dy, {_SCAN}) -> ({_EIGHT})")
_library.define(f"mixer_core(Tensor u, Tensor z, {_CORE}) -> (Tensor y, Tensor y1)")
_library.define(f"ungated_core(Tensor u, {_CORE}) -> (Tensor y, Tensor y1)")
_library.define(f"ungated_core_backward(Tensor dy, Tensor u, Tensor y1, {_CORE}) -> Tensor[]")
_library.define(
    f"mixer_core_backward(Tensor dy, Tensor u, Tensor z, Tensor y, Tensor y1, {_CORE}) -> Tensor[]"
)
_library.define(
    "rms_norm(Tensor x, Tensor weight, float eps, ScalarType dtype) -> (Tensor y, Tensor scales)"
)
_library.define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor scales) -> (Tensor, Tensor)"
)


def selective_scan(
    u, dt, A, B, C, D, z, dt_bias, softplus, axis, reverse, window, backend: str
) -> Tensor:
    """`v2m.ops.selective_scan` on a compiled backend, arguments already validated."""
    return torch.ops.v2m.selective_scan(
        u, dt, A, B, C, D, z, dt_bias, softplus, axis, reverse, window, backend
    )


def mixer_core(
    u: Tensor,
    z: Tensor,
    first: PassWeights,
    second: PassWeights,
    directions: tuple[Direction, ...],
    backend: str,
) -> Tensor:
    """`v2m.ops.core.mixer_core` on a compiled backend, before the transposition."""
    return torch.ops.v2m.mixer_core(u, z, list(first), list(second), _encode(directions), backend)[
        0
    ]


def ungated_core(
    u: Tensor,
    first: PassWeights,
    second: PassWeights,
    directions: tuple[Direction, ...],
    backend: str,
) -> Tensor:
    """`mixer_core` without gate and convolutions."""
    return torch.ops.v2m.ungated_core(
        u, list(first[2:]), list(second[2:]), _encode(directions), backend
    )[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`v2m.ops.rms_norm.rms_norm` on the Triton backend."""
    return torch.ops.v2m.rms_norm(x, weight, eps, dtype)[0]


def _implementation(backend: str) -> ModuleType:
    """The module that does the work; imported here, so that only the one in use has to be there."""
    if backend == "triton":
        from . import triton as module
    elif backend == "cpu":
        from . import cpu as module
    else:
        raise InputError(
            f"`backend` must be 'cpu' or 'triton' for a compiled operator; got {backend!r}."
        )
    return module


# The scan ----------------------------------------------------------------------------------------


def _scan(*arguments) -> Tensor:
    *arguments, backend = arguments
    return _implementation(backend).scan_forward(*arguments)


def _scan_fake(u, *_) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


def _scan_backward(dy, *arguments) -> tuple[Tensor, ...]:
    *arguments, backend = arguments
    grads = _implementation(backend).scan_backward(dy, *arguments)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


def _scan_backward_fake(dy, *arguments) -> tuple[Tensor, ...]:
    return tuple(
        dy.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in arguments[:8]
    )


def _scan_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.rest = inputs[8:]


def _scan_gradient(ctx, dy):
    saved = ctx.saved_tensors
    grads = torch.ops.v2m.selective_scan_backward(dy, *saved, *ctx.rest)
    return (
        *(None if x is None else grad for x, grad in zip(saved, grads)),
        *(None for _ in ctx.rest),
    )


def _scan_autocast(dtype, u, dt, A, B, C, D, z, *rest):
    """Grids in the autocast type; A, D and the bias of dt stay as they are."""
    u, dt, B, C, z = (_lower(x, dtype) for x in (u, dt, B, C, z))
    return torch.ops.v2m.selective_scan(u, dt, A, B, C, D, z, *rest)


# The core of a mixer -----------------------------------------------------------------------------


def _core(u, z, first, second, directions, backend) -> tuple[Tensor, Tensor]:
    return _implementation(backend).core_forward(
        u, z, PassWeights(*first), PassWeights(*second), _decode(directions)
    )


def _core_fake(u, z, first, second, directions, backend) -> tuple[Tensor, Tensor]:
    sweeps = len(distinct_sweeps(_decode(directions)))
    return u.new_empty(u.shape), u.new_empty((sweeps, *u.shape))


def _core_backward(dy, u, z, y, y1, first, second, directions, backend) -> list[Tensor]:
    saved = (y, y1) if backend == "triton" else (y1,)  # its gradient of the gate starts from y
    du, dz, dfirst, dsecond = _implementation(backend).core_backward(
        dy, u, z, *saved, PassWeights(*first), PassWeights(*second), _decode(directions)
    )
    return [du, dz, *dfirst, *dsecond]


def _core_backward_fake(dy, u, z, y, y1, first, second, directions, backend) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (u, z, *first, *second)]


def _core_setup(ctx, inputs, output) -> None:
    u, z, first, second, directions, backend = inputs
    ctx.save_for_backward(u, z, *output, *first, *second)
    ctx.rest = directions, backend
    ctx.set_materialize_grads(False)  # y1 is for the backward alone


def _core_gradient(ctx, dy, _):
    u, z, y, y1, *weights = ctx.saved_tensors
    if dy is None:
        return (None,) * 6
    half = len(weights) // 2
    du, dz, *grads = torch.ops.v2m.mixer_core_backward(
        dy, u, z, y, y1, weights[:half], weights[half:], *ctx.rest
    )
    return du, dz, grads[:half], grads[half:], None, None


def _core_autocast(dtype, u, z, *rest):
    """The grids in the autocast type; the weights stay, each kernel casts what it multiplies."""
    return torch.ops.v2m.mixer_core(_lower(u, dtype), _lower(z, dtype), *rest)


# The core without gate and convolutions -----------------------------------------------------------


def _without_convolution(weights: list[Tensor]) -> PassWeights:
    return PassWeights(None, None, *weights)


def _ungated(u, first, second, directions, backend) -> tuple[Tensor, Tensor]:
    weights = _without_convolution(first), _without_convolution(second)
    with torch.autocast(u.device.type, enabled=False):  # for the products inside
        return ungated_forward(_implementation(backend), u, *weights, _decode(directions))


def _ungated_fake(u, first, second, directions, backend) -> tuple[Tensor, Tensor]:
    return _core_fake(u, None, first, second, directions, backend)


def _ungated_backward(dy, u, y1, first, second, directions, backend) -> list[Tensor]:
    weights = _without_convolution(first), _without_convolution(second)
    with torch.autocast(u.device.type, enabled=False):
        du, dfirst, dsecond = ungated_backward(
            _implementation(backend), dy, u, y1, *weights, _decode(directions)
        )
    return [du, *dfirst[2:], *dsecond[2:]]


def _ungated_backward_fake(dy, u, y1, first, second, directions, backend) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (u, *first, *second)]


def _ungated_setup(ctx, inputs, output) -> None:
    u, first, second, directions, backend = inputs
    ctx.save_for_backward(u, output[1], *first, *second)
    ctx.rest = directions, backend
    ctx.set_materialize_grads(False)  # y1 is for the backward alone


def _ungated_gradient(ctx, dy, _):
    u, y1, *weights = ctx.saved_tensors
    if dy is None:
        return (None,) * 5
    half = len(weights) // 2
    du, *grads = torch.ops.v2m.ungated_core_backward(
        dy, u, y1, weights[:half], weights[half:], *ctx.rest
    )
    return du, grads[:half], grads[half:], None, None


def _ungated_autocast(dtype, u, *rest):
    return torch.ops.v2m.ungated_core(_lower(u, dtype), *rest)


# The norm -----------------------------------------------------------------------------------------


def _norm(x, weight, eps, dtype) -> tuple[Tensor, Tensor]:
    return _implementation("triton").rms_norm_forward(x, weight, eps, dtype)


def _norm_fake(x, weight, eps, dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _norm_backward(dy, x, weight, scales) -> tuple[Tensor, Tensor]:
    return _implementation("triton").rms_norm_backward(dy, x, weight, scales)


def _norm_backward_fake(dy, x, weight, scales) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


def _norm_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.mark_non_differentiable(output[1])


def _norm_gradient(ctx, dy, _):
    return *torch.ops.v2m.rms_norm_backward(dy, *ctx.saved_tensors), None, None


def _encode(directions: tuple[Direction, ...]) -> list[int]:
    return [
        int(value)
        for first, second, mirror in directions
        for value in (*first, *second, sum(1 << axis for axis in mirror))
    ]


def _decode(integers: list[int]) -> tuple[Direction, ...]:
    directions = []
    for start in range(0, len(integers), _INTEGERS):
        axis1, reverse1, window1, axis2, reverse2, window2, mirror = integers[start:][:_INTEGERS]
        directions.append(
            Direction(
                Sweep(axis1, bool(reverse1), window1),
                Sweep(axis2, bool(reverse2), window2),
                tuple(axis for axis in (1, 2) if mirror >> axis & 1),
            )
        )
    return tuple(directions)


# Registration ------------------------------------------------------------------------------------


def _lower(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    wide = x is not None and x.is_floating_point() and x.dtype != torch.float64
    return x.to(dtype) if wide else x


def _register_autocast(name: str, rule, device: str) -> None:
    key = f"Autocast{device}"
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def lowered(*arguments):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return rule(torch.get_autocast_dtype(device.lower()), *arguments)

    _library.impl(name, lowered, key)


def _once_only(ctx, *_):
    raise InputError(
        "the compiled backends have no second derivative. Use backend='eager' for it, or"
        " `with v2m.ops.use_backend('eager')` around the forward pass."
    )


def _register(name, function, fake, gradient=_once_only, setup=None, autocast=None) -> None:
    for device in _DEVICES:
        _library.impl(name, function, device)
        if autocast is not None:
            _register_autocast(name, autocast, device)
    torch.library.register_fake(f"v2m::{name}", fake, lib=_library)
    torch.library.register_autograd(f"v2m::{name}", gradient, setup_context=setup, lib=_library)


_register("selective_scan", _scan, _scan_fake, _scan_gradient, _scan_setup, _scan_autocast)
_register("selective_scan_backward", _scan_backward, _scan_backward_fake)
_register("mixer_core", _core, _core_fake, _core_gradient, _core_setup, _core_autocast)
_register("mixer_core_backward", _core_backward, _core_backward_fake)
_register(
    "ungated_core", _ungated, _ungated_fake, _ungated_gradient, _ungated_setup, _ungated_autocast
)
_register("ungated_core_backward", _ungated_backward, _ungated_backward_fake)
_register("rms_norm", _norm, _norm_fake, _norm_gradient, _norm_setup)
_register("rms_norm_backward", _norm_backward, _norm_backward_fake)


# Floating-point operations, 2 a multiply-add; of a scan, 2 multiply-adds a state ------------------


@register_flop_formula(torch.ops.v2m.selective_scan)
def _scan_flops(u_shape, dt_shape, A_shape, *_, **__) -> int:
    return 4 * _product(u_shape) * A_shape[1]


@register_flop_formula(torch.ops.v2m.selective_scan_backward)
def _scan_backward_flops(dy_shape, u_shape, dt_shape, A_shape, *_, **__) -> int:
    return 2 * _scan_flops(u_shape, dt_shape, A_shape)


@register_flop_formula(torch.ops.v2m.mixer_core)
def _core_flops(u_shape, z_shape, first, second, directions, *_, **__) -> int:
    decoded = _decode(directions)
    scans = len(distinct_sweeps(decoded)), len(decoded)
    total = 0
    for weights, count in zip((first, second), scans):
        shapes = PassWeights(*weights)
        per_channel = (
            shapes.conv_weight[1] + shapes.x_proj[0] + shapes.dt_proj[1] + 2 * shapes.A_log[1]
        )
        total += 2 * count * _product(u_shape) * per_channel
    return total


@register_flop_formula(torch.ops.v2m.mixer_core_backward)
def _core_backward_flops(dy_shape, u_shape, z_shape, y_shape, y1_shape, *rest, **__) -> int:
    return 2 * _core_flops(u_shape, z_shape, *rest)


@register_flop_formula(torch.ops.v2m.ungated_core)
def _ungated_flops(u_shape, first, second, directions, *_, **__) -> int:
    decoded = _decode(directions)
    grids = 1, len(distinct_sweeps(decoded))  # those of a pass, and below its scans
    scans = grids[1], len(decoded)
    total = 0
    for shapes, count, scanned in zip((first, second), grids, scans):
        x_proj, dt_proj, _, A_log, _ = shapes
        per_channel = count * (x_proj[0] + dt_proj[1]) + scanned * 2 * A_log[1]
        total += 2 * _product(u_shape) * per_channel
    return total


@register_flop_formula(torch.ops.v2m.ungated_core_backward)
def _ungated_backward_flops(dy_shape, u_shape, y1_shape, *rest, **__) -> int:
    return 2 * _ungated_flops(u_shape, *rest)


def _product(shape) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
