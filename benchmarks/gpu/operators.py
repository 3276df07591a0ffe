"""One scan, one mixer, and the kernels of a mixer's core one by one, against their floors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch

from v2m.layers.mixer import Mixer2d
from v2m.ops import selective_scan, use_backend
from v2m.ops.core import Direction, PassWeights, Sweep, mixer_core

from .measure import (
    BYTES_PER_SECOND,
    DIM,
    EXPONENTIALS_PER_SECOND,
    INNER,
    RANK,
    STATES,
    Item,
    Row,
    Setting,
    floor_ms,
    relative_error,
    replayed,
    require,
)

GRIDS = ((128, 14, 14), (8, 64, 64), (2, 128, 128), (1, 256, 256), (1, 512, 512))
LINES = ((1, 256, 1024), (1, 64, 4096), (1, 16, 16384))  # long lines, fewer of them
CORNERS = tuple(Direction(Sweep(2, a), Sweep(1, b)) for a in (False, True) for b in (False, True))
SCANS = 6

# The least a kernel of the core can take, seconds a token: exponentials, or grids read and written.
STATE, CHANNELS = INNER * STATES / EXPONENTIALS_PER_SECOND, 2 * INNER / BYTES_PER_SECOND
FLOORS = {
    "scan_forward_kernel": SCANS * STATE,
    "scan_backward_kernel": SCANS * 2 * STATE,
    "project_kernel": (3 + 2 * SCANS) * CHANNELS,
    "project_backward_low_kernel": SCANS * CHANNELS,
    "project_backward_kernel": (3 + 3 * SCANS) * CHANNELS,
    "conv_backward_kernel": (SCANS + 3 + 3 + 4) * CHANNELS,
    "gate_kernel": 3 * CHANNELS,
}


def _size(grid) -> str:
    return "x".join(map(str, grid))


def _row(work: str, grid, time: float, floor: float) -> Row:
    return {
        "workload": work, "size": _size(grid), "batch": grid[0], "ms": time,
        "floor_ms": floor, "of_floor": floor / time,
    }  # fmt: skip


def scan_items(setting: Setting) -> Iterator[Item]:
    """One scan down the columns (long lines: along the rows), channels-last, with gate."""
    grids = ((2, 4, 4), (1, 2, 9)) if setting.tiny else (*GRIDS, *LINES)
    for grid in grids:
        yield f"scan {grid}", partial(scan, setting, grid, 2 if grid in LINES else 1)


def scan(setting: Setting, grid: tuple[int, int, int], axis: int) -> Iterator[Row]:
    def random(*shape):
        return torch.randn(*shape, device=setting.device).to(setting.dtype)

    u, dt, z, dy = (random(*grid, INNER) for _ in range(4))
    B, C = (random(*grid, STATES) for _ in range(2))
    A = -torch.rand(INNER, STATES, device=setting.device) - 0.5
    inputs = [x.requires_grad_() for x in (u, dt, A, B, C)]
    small = [x.detach()[:1, :14, :14] if x.dim() == 4 else x.detach() for x in inputs]
    found = selective_scan(*small, axis=axis)
    wanted = selective_scan(*(x.double() for x in small), axis=axis, backend="eager")
    require("scan", relative_error(found, wanted))

    def forward():
        return selective_scan(*inputs, z=z, axis=axis)

    ahead, both = device_times(setting, forward, inputs, dy)
    tokens = grid[0] * grid[1] * grid[2]
    yield _row("scan forward", grid, ahead, floor_ms(tokens, backward=False))
    yield _row("scan backward", grid, both - ahead, floor_ms(tokens, backward=True))


def device_times(setting: Setting, forward, targets, dy) -> tuple[float, float]:
    """Milliseconds of a function forwards, and with its backward, each as a CUDA graph."""

    def both_ways():
        return torch.autograd.grad(forward(), targets, dy)

    both_ways()
    captured = (lambda function: function) if setting.tiny else replayed
    with torch.no_grad():
        ahead = setting.milliseconds(captured(forward))
    return ahead, setting.milliseconds(captured(both_ways))


def mixer_items(setting: Setting) -> Iterator[Item]:
    for grid in ((2, 4, 4),) if setting.tiny else GRIDS:
        yield f"mixer {grid}", partial(mixer, setting, grid)


def mixer(setting: Setting, grid: tuple[int, int, int]) -> Iterator[Row]:
    """One mixer of V2M-T, D 192, with its in_proj and out_proj, as a CUDA graph."""
    module = Mixer2d(DIM).to(setting.device)
    x = torch.randn(*grid, DIM, device=setting.device).to(setting.dtype).requires_grad_()
    dy = torch.randn_like(x)
    autocast = torch.autocast(setting.device, setting.dtype, cache_enabled=False)
    small = x.detach()[:1, :14, :14]
    with autocast, torch.no_grad():
        found = module(small)
    with use_backend("eager"), torch.no_grad():
        wanted = module.double()(small.double())
    module.float()
    require("mixer", relative_error(found, wanted))
    targets = [x, *module.parameters()]

    def forward():
        with autocast:
            return module(x)

    ahead, both = device_times(setting, forward, targets, dy)
    tokens = grid[0] * grid[1] * grid[2]
    floor = floor_ms(tokens, backward=False, scans=SCANS)
    yield _row("mixer forward", grid, ahead, floor)
    floor += floor_ms(tokens, backward=True, scans=SCANS)
    yield _row("mixer with backward", grid, both, floor)


def random_weights(device: str) -> PassWeights:
    weights = (
        torch.randn(INNER, 4) / 2,
        torch.randn(INNER) / 10,
        torch.randn(RANK + STATES, INNER) / INNER**0.5,
        torch.randn(INNER, RANK) / RANK**0.5,
        torch.randn(INNER) - 3,
        torch.rand(INNER, STATES) * 2,
        torch.randn(INNER),
    )
    return PassWeights(*(x.to(device) for x in weights))


def core_case(setting: Setting, grid=GRIDS[0]) -> tuple[Callable, Callable]:
    """Forward and backward of the Triton core of a V2M-T layer, checked; grid (B, H, W)."""
    from v2m.ops import triton as backend

    if setting.tiny:
        raise RuntimeError("the Triton kernels need a CUDA device")
    torch.manual_seed(0)
    u, z = torch.randn(*grid, 2 * INNER, device=setting.device).to(setting.dtype).chunk(2, -1)
    dy = torch.randn(*grid, INNER, device=setting.device).to(setting.dtype)
    first, second = random_weights(setting.device), random_weights(setting.device)
    y, y1 = backend.core_forward(u, z, first, second, CORNERS)
    wide = [PassWeights(*(x.double() for x in w)) for w in (first, second)]
    exact = mixer_core(u[:2].double(), z[:2].double(), *wide, CORNERS, backend="eager")
    require("core", relative_error(y[:2], exact))
    return (
        lambda: backend.core_forward(u, z, first, second, CORNERS),
        lambda: backend.core_backward(dy, u, z, y, y1, first, second, CORNERS),
    )


def kernel_times(function: Callable, repeat: int = 5) -> list[tuple[str, float]]:
    """(kernel, microseconds a call), the longest first; what is not ours is one row."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repeat):
            function()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in trace.key_averages():
        name = event.key if event.key in FLOORS else "reductions and small kernels"
        times[name] = times.get(name, 0.0) + event.self_device_time_total / repeat
    return sorted(times.items(), key=lambda item: -item[1])


def _kernel_row(way: str, kernel: str, grid, time: float, note: str = "") -> Row:
    row = {"workload": kernel, "way": way, "size": _size(grid), "batch": grid[0], "ms": time / 1e3}
    if kernel in FLOORS:
        floor = 1e6 * grid[0] * grid[1] * grid[2] * FLOORS[kernel]  # microseconds
        row |= {"floor_ms": floor / 1e3, "of_floor": floor / time}
    return row | {"note": note}


def kernel_items(setting: Setting) -> Iterator[Item]:
    """The kernels of the core as they are launched, then every launch that may be chosen."""
    for grid in GRIDS:
        yield f"kernels {_size(grid)}", partial(kernels, setting, grid)
    if setting.tiny:
        return
    from v2m.ops.triton.launch import TILES

    for grid in GRIDS[:2]:
        for kernel, tiles in TILES.items():
            for choice in range(1, len(tiles)):
                name = f"{kernel} {_size(grid)} {tiles[choice]}"
                yield name, partial(variant, setting, grid, kernel, choice)


def kernels(setting: Setting, grid) -> Iterator[Row]:
    for way, function in zip(("forward", "backward"), core_case(setting, grid)):
        if setting.dry:
            function()
            continue
        times = kernel_times(function)
        for kernel, time in times:
            yield _kernel_row(way, kernel, grid, time)
        yield _kernel_row(way, "core", grid, sum(time for _, time in times))


@cache
def usual_results(setting: Setting, grid) -> tuple:
    """Forward and backward of a core and what they give as they are usually launched."""
    functions = core_case(setting, grid)
    return functions, [list(_tensors(function())) for function in functions]


def variant(setting: Setting, grid, kernel: str, choice: int) -> Iterator[Row]:
    """Another launch of one kernel: its results against the usual one's, and its time."""
    from v2m.ops.triton.launch import TILES

    functions, wanted = usual_results(setting, grid)
    usual = TILES[kernel]
    TILES[kernel] = (usual[choice],)
    try:
        for way, function, exact in zip(("forward", "backward"), functions, wanted):
            for found, other in zip(_tensors(function()), exact):
                require(kernel, relative_error(found, other), 1e-2)
            for name, time in [] if setting.dry else kernel_times(function):
                if name == f"{kernel}_kernel":
                    yield _kernel_row(way, name, grid, time, str(usual[choice]))
    finally:
        TILES[kernel] = usual


def _tensors(results) -> Iterator[torch.Tensor]:
    for result in results:
        yield from [result] if isinstance(result, torch.Tensor) else result
