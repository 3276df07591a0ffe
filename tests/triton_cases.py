"""Cases of the Triton backend, measured against float64: on a GPU, or in Triton's interpreter.

Everything here can be called in another process, since the interpreter has to be switched on before
Triton is imported. Memory the backend allocates is full of NaN before it is written.
"""

from contextlib import contextmanager

import torch

from v2m.errors import InputError
from v2m.ops import eager, reference, use_backend
from v2m.ops.core import Direction, PassWeights, Sweep, mixer_core
from v2m.ops.rms_norm import rms_norm

SCAN_NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
CORE_NAMES = ("u", "z", *(f"{p}.{n}" for p in ("first", "second") for n in PassWeights._fields))
CORNERS = tuple(
    Direction(Sweep(2, left), Sweep(1, up)) for left in (False, True) for up in (False, True)
)
DIRECTIONS = {
    "corners": CORNERS,
    "one": CORNERS[3:],
    "release": (
        Direction(Sweep(2), Sweep(1)),
        Direction(Sweep(1), Sweep(2)),
        Direction(Sweep(2, True), Sweep(1), (1,)),
        Direction(Sweep(1, True), Sweep(2), (2,)),
    ),
    "windows": (
        Direction(Sweep(2, False, 2), Sweep(1, False, 3)),
        Direction(Sweep(2, True), Sweep(1, True)),
        Direction(Sweep(1, True, 2), Sweep(2, False, 2), (1, 2)),
    ),
}


@contextmanager
def poisoned():
    """Uninitialised floating-point memory is NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    torch.empty = lambda *args, **kwargs: fill(empty(*args, **kwargs))
    torch.empty_like = lambda *args, **kwargs: fill(empty_like(*args, **kwargs))
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like


def relative_error(found, wanted) -> float:
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-300))


def scan_errors(
    shape, states, axis, reverse, window, given, dtype=torch.float32, device="cpu", softplus=True
) -> dict[str, tuple[float, float]]:
    """(error, PyTorch's own error in that dtype) of y and of each gradient. given: names of inputs.

    Every grid is a slice of a larger tensor, not contiguous.
    """
    from v2m.ops import triton as backend

    *grid, channels = shape
    torch.manual_seed(channels + states + axis)
    sizes = {"u": channels, "dt": channels, "z": channels, "B": states, "C": states}
    inputs = {
        name: torch.randn(*grid, 2 * size, device=device)[..., size:]
        for name, size in sizes.items()
    }
    inputs["A"] = -torch.rand(channels, states, device=device) - 0.1
    inputs["D"], inputs["dt_bias"] = torch.randn(2, channels, device=device)
    if not softplus:
        inputs["dt"] = inputs["dt"].abs()
    inputs = {
        name: x.to(dtype) if name in sizes else x
        for name, x in inputs.items()
        if name in ("u", "dt", "A") or name in given
    }
    rest = (softplus, axis, reverse, window)
    dy = torch.randn(shape, device=device).to(dtype)

    def by_autograd(scan, dtype=None):
        leaves = {k: (x if dtype is None else x.to(dtype)).detach() for k, x in inputs.items()}
        leaves = {k: x.requires_grad_() for k, x in leaves.items()}
        y = scan(*(leaves.get(name) for name in SCAN_NAMES), *rest)
        return [y, *torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))]

    exact = by_autograd(reference.selective_scan, torch.float64)
    own = by_autograd(lambda u, *more: eager.selective_scan(u, *more).to(u.dtype))
    arguments = [inputs.get(name) for name in SCAN_NAMES]
    with poisoned():
        found = backend.scan_forward(*arguments, *rest)
        grads = dict(zip(SCAN_NAMES, backend.scan_backward(dy, *arguments, *rest)))
    assert {name for name, grad in grads.items() if grad is not None} == set(inputs)
    results = [found, *(grads[name] for name in inputs)]
    return {
        name: (relative_error(a, x), relative_error(b, x))
        for name, a, b, x in zip(["y", *inputs], results, own, exact)
    }


def make_weights(channels, states, rank, width, device) -> PassWeights:
    rates = torch.linspace(-3, 2, states).expand(channels, states)
    return PassWeights(
        *(
            x.to(device)
            for x in (
                torch.randn(channels, width) / width**0.5,
                0.3 * torch.randn(channels),
                torch.randn(rank + states, channels) / channels**0.5,
                torch.randn(channels, rank) / rank**0.5,
                torch.randn(channels) - 2,
                rates + 0.1 * torch.randn(channels, states),
                torch.randn(channels),
            )
        )
    )


def make_core(shape, states, rank, dtype, device, width=4):
    """u and z, the two halves of one tensor, the gradient of y, and the weights of both passes."""
    *grid, channels = shape
    torch.manual_seed(channels + states)
    u, z = torch.randn(*grid, 2 * channels, device=device).to(dtype).chunk(2, dim=-1)
    dy = torch.randn(shape, device=device).to(dtype)
    return u, z, dy, *(make_weights(channels, states, rank, width, device) for _ in range(2))


def core_gradients(u, z, dy, first, second, directions) -> list[torch.Tensor]:
    """y and the gradients in the order of CORE_NAMES, from the backend's own functions."""
    from v2m.ops import triton as backend

    y, y1 = backend.core_forward(u, z, first, second, directions)
    du, dz, dfirst, dsecond = backend.core_backward(dy, u, z, y, y1, first, second, directions)
    return [y, du, dz, *dfirst, *dsecond]


def core_errors(
    shape, states, rank, scan, dtype=torch.float32, device="cpu", width=4
) -> dict[str, tuple[float, float]]:
    """(error, PyTorch's own error in that dtype) of y and of each gradient of the mixer core."""
    u, z, dy, first, second = make_core(shape, states, rank, dtype, device, width)
    directions = DIRECTIONS[scan]

    def by_autograd(to=lambda x: x):
        leaves = [to(x).detach().requires_grad_() for x in (u, z, *first, *second)]
        passes = PassWeights(*leaves[2:9]), PassWeights(*leaves[9:])
        y = mixer_core(*leaves[:2], *passes, directions, backend="eager")
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    exact = by_autograd(lambda x: x.double())
    own = by_autograd()
    with poisoned():
        found = core_gradients(u, z, dy, first, second, directions)
    return {
        name: (relative_error(a, x), relative_error(b, x))
        for name, a, b, x in zip(("y", *CORE_NAMES), found, own, exact)
    }


UNGATED_NAMES = ("u", *(f"{p}.{n}" for p in ("first", "second") for n in PassWeights._fields[2:]))


def ungated_errors(
    shape, states, rank, scan, dtype=torch.float32, device="cpu", backend="triton"
) -> dict[str, tuple[float, float]]:
    """(error, PyTorch's own error in that dtype) of a core without gate and convolutions."""
    u, _, dy, first, second = make_core(shape, states, rank, dtype, device)
    directions = DIRECTIONS[scan]

    def by_autograd(name, to=lambda x: x):
        leaves = [to(x).detach().requires_grad_() for x in (u, *first[2:], *second[2:])]
        passes = [PassWeights(None, None, *x) for x in (leaves[1:6], leaves[6:])]
        y = mixer_core(leaves[0], None, *passes, directions, backend=name)
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    exact = by_autograd("eager", lambda x: x.double())
    own = by_autograd("eager")
    with poisoned():
        found = by_autograd(backend)
    return {
        name: (relative_error(a, x), relative_error(b, x))
        for name, a, b, x in zip(("y", *UNGATED_NAMES), found, own, exact)
    }


def forced(kernel: str, choice: int, function, *args, **kwargs):
    """Call a function of this module with another of a kernel's launches chosen."""
    from v2m.ops.triton.launch import TILES

    usual = TILES[kernel]
    TILES[kernel] = (usual[choice],)
    try:
        return function(*args, **kwargs)
    finally:
        TILES[kernel] = usual


def count_launches(kernel: str) -> int:
    from v2m.ops.triton.launch import TILES

    return len(TILES[kernel])


def rows_too_long(most: int) -> str:
    """What the backward says of a grid with rows of `most` elements, if that were too many."""
    from v2m.ops.triton import launchers

    usual, launchers.MOST_STEP = launchers.MOST_STEP, most
    try:
        scan_errors((1, 3, most // 4, 4), 2, 2, False, None, ("B", "C"))  # along the rows
        scan_errors((1, 3, most // 4, 4), 2, 1, False, None, ("B", "C"))
    except InputError as error:
        return str(error)
    finally:
        launchers.MOST_STEP = usual
    return ""


def norm_errors(shape, dtype=torch.float32, result=None, device="cpu") -> dict[str, tuple]:
    """Of the norm's result (in `result`, or dtype) and gradients, as `scan_errors`."""
    torch.manual_seed(0)
    result = result or dtype
    x, dy = (torch.randn(shape, device=device) for _ in range(2))
    x, dy, weight = 3 * x.to(dtype), dy.to(result), torch.rand(shape[-1], device=device) + 0.5
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    with poisoned(), use_backend("triton"):
        y = rms_norm(*inputs, 1e-5, result)
        found = [y, *torch.autograd.grad(y, inputs, dy)]
    assert y.dtype == result
    wide = [t.detach().double().requires_grad_() for t in inputs]
    y = rms_norm(*wide, 1e-5)
    wanted = [y, *torch.autograd.grad(y, wide, dy.double())]
    return {
        name: (relative_error(a, b), 0.0) for name, a, b in zip(("y", "x", "weight"), found, wanted)
    }


def closed_gate() -> dict[str, tuple[float, float]]:
    """Gates of exactly zero and far from it: their gradient comes from the gated result."""
    u, z, dy, first, second = make_core((1, 3, 4, 8), 2, 1, torch.float32, "cpu")
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-12, 60.0, -60.0, -1000.0, 1000.0])
    z = z * 0 + special

    def by_autograd(dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (u, z, *first, *second)]
        passes = PassWeights(*leaves[2:9]), PassWeights(*leaves[9:])
        y = mixer_core(*leaves[:2], *passes, CORNERS, backend="eager")
        return [y, *torch.autograd.grad(y, leaves, dy.to(dtype))]

    found = core_gradients(u, z, dy, first, second, CORNERS)
    return {
        name: (relative_error(a, x), relative_error(b, x))
        for name, a, b, x in zip(
            ("y", *CORE_NAMES), found, by_autograd(torch.float32), by_autograd(torch.float64)
        )
    }


def assert_accurate(errors, trifle=2e-6) -> None:
    """At most twice PyTorch's own error, for every name."""
    wrong = {name: pair for name, pair in errors.items() if not pair[0] <= 2 * pair[1] + trifle}
    assert not wrong, wrong
