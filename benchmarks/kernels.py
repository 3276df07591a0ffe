"""Where the time of one mixer core goes on a CUDA device, kernel by kernel, against the floors.

    python benchmarks/kernels.py --output benchmarks/results/kernels.csv

The core of a V2M-T layer at batch 128 and 224 px: 128 x 14 x 14 tokens, E 384, N 16, R 12,
bfloat16, the four corners: two row scans and four column scans. Outputs are checked against `eager`
in float64 on two images first. Times are the device's own, from PyTorch's profiler.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import sys
from pathlib import Path

import torch
import triton
from torch.profiler import ProfilerActivity, profile

from v2m.ops import triton as backend
from v2m.ops.core import Direction, PassWeights, Sweep, mixer_core

TOKENS, INNER, STATES, RANK, SCANS = 128 * 14 * 14, 384, 16, 12, 6
SLAB = TOKENS * INNER  # elements of one grid
BYTES_PER_SECOND, EXPONENTIALS_PER_SECOND = 2.8e12, 3.7e12
FIELDS = ["work", "kernel", "microseconds", "floor_microseconds"]
FIELDS += ["device", "torch", "triton", "date", "command"]
CORNERS = tuple(Direction(Sweep(2, a), Sweep(1, b)) for a in (False, True) for b in (False, True))

# The least a kernel can take, microseconds: exponentials of the states, or grids read and written.
FLOORS = {
    "scan_forward_kernel": 1e6 * SCANS * SLAB * STATES / EXPONENTIALS_PER_SECOND,
    "scan_backward_kernel": 1e6 * SCANS * 2 * SLAB * STATES / EXPONENTIALS_PER_SECOND,
    "project_kernel": 1e6 * (3 + 2 * SCANS) * SLAB * 2 / BYTES_PER_SECOND,
    "project_backward_low_kernel": 1e6 * SCANS * SLAB * 2 / BYTES_PER_SECOND,
    "project_backward_kernel": 1e6 * (3 + 3 * SCANS) * SLAB * 2 / BYTES_PER_SECOND,
    "conv_backward_kernel": 1e6 * (SCANS + 3 + 3 + 4) * SLAB * 2 / BYTES_PER_SECOND,
    "gate_kernel": 1e6 * 3 * SLAB * 2 / BYTES_PER_SECOND,
}


def weights() -> PassWeights:
    return PassWeights(
        torch.randn(INNER, 4) / 2,
        torch.randn(INNER) / 10,
        torch.randn(RANK + STATES, INNER) / INNER**0.5,
        torch.randn(INNER, RANK) / RANK**0.5,
        torch.randn(INNER) - 3,
        torch.rand(INNER, STATES) * 2,
        torch.randn(INNER),
    )


def kernel_times(function, repeat: int = 5) -> list[tuple[str, float]]:
    """(kernel, microseconds a call), the longest first; what is not ours is one row."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    u, z = torch.randn(128, 14, 14, 2 * INNER).bfloat16().chunk(2, dim=-1)
    dy = torch.randn(128, 14, 14, INNER).bfloat16()
    first, second = weights(), weights()
    y, y1 = backend.core_forward(u, z, first, second, CORNERS)
    wide = [PassWeights(*(x.double() for x in w)) for w in (first, second)]
    exact = mixer_core(u[:2].double(), z[:2].double(), *wide, CORNERS, backend="eager")
    wrong = float((y[:2].double() - exact).norm() / exact.norm())
    if not wrong < 2e-2:
        raise SystemExit(f"relative error {wrong:.1e} against eager in float64")
    work = {
        "forward": lambda: backend.core_forward(u, z, first, second, CORNERS),
        "backward": lambda: backend.core_backward(dy, u, z, y, y1, first, second, CORNERS),
    }
    machine = [torch.cuda.get_device_name(), torch.__version__, triton.__version__]
    machine += [datetime.date.today().isoformat(), " ".join(["python", *sys.argv])]
    with options.output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        for name, function in work.items():
            for kernel, time in kernel_times(function):
                floor = FLOORS.get(kernel)
                row = [name, kernel, round(time, 1), "" if floor is None else round(floor, 1)]
                print(*row)
                writer.writerow(row + machine)


if __name__ == "__main__":
    main()
