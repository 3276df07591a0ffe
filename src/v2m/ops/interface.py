"""The public operator: validation, then the backend."""

from torch import Tensor

from v2m.errors import InputError

from . import eager, reference
from .backend import choose_backend

__all__ = ["selective_scan"]


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    softplus: bool = True,
    axis: int,
    reverse: bool = False,
    window: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Selective scan of a channels-last grid along one of its axes.

    Per line along `axis`, channel e and state n, with dt_i = softplus(dt_i + dt_bias):

        h_i = exp(dt_i A) h_{i-1} + dt_i B_i u_i
        y_i = (sum_n C_i h_i + D u_i) * silu(z_i)

    (Mamba, arXiv 2312.00752; one of the two passes of V2M, arXiv 2410.10382.) A 1-D sequence is a
    grid with H = 1 and `axis=2`.

    Args:
        u: input, (B, H, W, E), floating point.
        dt: step sizes before bias and softplus, (B, H, W, E).
        A: decay rates, (E, N), negative for a stable state.
        B: input projection, (B, H, W, N), or None for the constant 1.
        C: output projection, (B, H, W, N), or None for the constant 1.
        D: skip connection, (E,), or None for none.
        z: gate, (B, H, W, E), applied as silu(z), or None for none.
        dt_bias: added to dt, (E,).
        softplus: pass dt (bias added) through softplus.
        axis: 1 scans down the columns (along H), 2 along the rows (along W).
        reverse: scan from the far end of the axis.
        window: restart the state at every multiple of `window` on the axis; None for never.
        backend: "reference", "eager", "cpu" or "triton"; None chooses the fastest that can do it.

    Returns:
        y, (B, H, W, E) in the dtype of u; under autocast the compiled backends compute and return
        grids in its dtype. The state is float32 (float64 if u is, which "cpu" and "triton" refuse).

        Finite arguments with A <= 0 give finite results, however extreme, as long as the state and
        the result fit in their types; where they do not (A > 0 over many steps, products past the
        largest float), they become infinite or NaN. A NaN or infinite value in u, dt, B, C or z
        reaches the steps at and after it on its own line, and no other line or image.

    Raises:
        InputError (a ValueError): a shape, dtype, device or option does not fit.
    """
    axis = _check(u, dt, A, B, C, D, z, dt_bias, axis, window)
    for option, value in (("reverse", reverse), ("softplus", softplus)):
        if type(value) is not bool:
            raise InputError(f"`{option}` must be True or False; got {value!r}.")
    name = choose_backend(backend, u)
    arguments = (u, dt, A, B, C, D, z, dt_bias, softplus, axis, reverse, window)
    if name == "reference":
        return reference.selective_scan(*arguments).to(u.dtype)
    if name == "eager":
        return eager.selective_scan(*arguments).to(u.dtype)
    from . import library  # registers the compiled operators, so only where one is wanted

    return library.selective_scan(*arguments, name)


def _check(u, dt, A, B, C, D, z, dt_bias, axis, window) -> int:
    """Raise an InputError that names the argument; returns the axis as 1 or 2."""
    for name, tensor in (("u", u), ("A", A)):
        if not isinstance(tensor, Tensor):
            raise InputError(f"`{name}` must be a torch.Tensor; got {type(tensor).__name__}.")
    if u.dim() != 4 or not u.is_floating_point() or 0 in u.shape[1:]:
        raise InputError(
            "`u` must be a floating-point grid (B, H, W, E), none of H, W, E zero;"
            f" got {_describe(u)}. A sequence (B, L, E) goes in as u.unsqueeze(1) with axis=2."
        )
    batch, height, width, channels = u.shape
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise InputError(
            f"`A` must be (E, N) with E = {channels}, the channels of `u`, and N > 0;"
            f" got {_describe(A)}."
        )
    states = (batch, height, width, A.shape[1])
    expected = {
        "dt": (dt, u.shape, "the shape of `u`"),
        "B": (B, states, "(B, H, W, N); None stands for the constant 1"),
        "C": (C, states, "(B, H, W, N); None stands for the constant 1"),
        "D": (D, (channels,), "(E,)"),
        "z": (z, u.shape, "the shape of `u`"),
        "dt_bias": (dt_bias, (channels,), "(E,)"),
        "A": (A, A.shape, "(E, N)"),
    }
    for name, (tensor, shape, meaning) in expected.items():
        if tensor is None and name not in ("dt", "A"):
            continue
        if not isinstance(tensor, Tensor):
            raise InputError(f"`{name}` must be a torch.Tensor; got {type(tensor).__name__}.")
        if tensor.shape != shape or not tensor.is_floating_point():
            raise InputError(
                f"`{name}` must be floating point of shape {tuple(shape)}, {meaning};"
                f" got {_describe(tensor)}."
            )
        if tensor.device != u.device:
            raise InputError(
                f"`{name}` is on {tensor.device} and `u` on {u.device}; move both to one device."
            )
    if type(axis) is not int or axis not in (1, 2, -3, -2):
        raise InputError(
            f"`axis` must be 1 (along H) or 2 (along W) of (B, H, W, E); got {axis!r}."
        )
    if window is not None and (type(window) is bool or not isinstance(window, int) or window < 1):
        raise InputError(f"`window` must be a whole number of at least 1, or None; got {window!r}.")
    return axis % 4


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}"
