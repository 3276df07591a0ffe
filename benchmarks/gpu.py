"""Speed and memory of V2M on a CUDA device: scans, mixers and models, against timm's DeiT-T.

    python benchmarks/gpu.py scan mixer model --output benchmarks/results/h100.csv

Every workload first checks the backend it times against `eager` in float64, then reports the median
of repeated runs by device events. Rows go to a CSV, with the machine, the versions and the command.
Floors: for a scan, the larger of its bytes at 2.8 TB/s and its exponentials at 3.7e12/s (one a
state and token forwards, two backwards); see `floor_ms`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import fcntl
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import timm
import torch
import triton
from torch.nn import functional as F
from triton.testing import do_bench

import v2m
from v2m.layers.mixer import Mixer2d
from v2m.ops import selective_scan

BYTES_PER_SECOND, EXPONENTIALS_PER_SECOND = 2.8e12, 3.7e12
DIM, INNER, STATES = 192, 384, 16  # of V2M-T
GRIDS = ((128, 14, 14), (8, 64, 64), (2, 128, 128), (1, 256, 256), (1, 512, 512))
TINY, DEIT = "v2m_tiny_patch16_224", "deit_tiny_patch16_224"
MODELS = (  # name, image size, batch for training, batch for inference
    (TINY, 224, 128, 128),
    (DEIT, 224, 128, 128),
    ("v2m_small_patch16_224", 224, 64, 64),
    (TINY, 1248, 8, 8),
    (DEIT, 1248, 8, 8),
)
LOCK = None


@contextmanager
def alone():
    """The device to ourselves, where several runs share a lock file."""
    if LOCK is None:
        yield
        return
    with open(LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def milliseconds(function, repeat: int = 100) -> float:
    function()
    torch.cuda.synchronize()
    with alone():
        return do_bench(function, warmup=20, rep=repeat, return_mode="median")


def floor_ms(tokens: int, *, backward: bool, scans: int = 1) -> float:
    slabs, exponentials = (8, 2) if backward else (4, 1)
    memory = slabs * tokens * INNER * 2 / BYTES_PER_SECOND
    states = exponentials * tokens * INNER * STATES / EXPONENTIALS_PER_SECOND
    return 1e3 * scans * max(memory, states)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def require(name: str, found: float, limit: float = 2e-2) -> None:
    if not found <= limit:
        raise SystemExit(
            f"{name}: relative error {found:.1e} against eager in float64, limit {limit}"
        )


def scan_rows():
    """One scan down the columns, channels-last, with gate: forward, and forward with backward."""
    for batch, height, width in GRIDS:
        grid = (batch, height, width)
        u, dt, z, dy = (torch.randn(*grid, INNER).bfloat16() for _ in range(4))
        B, C = (torch.randn(*grid, STATES).bfloat16() for _ in range(2))
        A = -torch.rand(INNER, STATES) - 0.5
        inputs = [x.requires_grad_() for x in (u, dt, A, B, C)]
        small = [x.detach()[:1, :14, :14] if x.dim() == 4 else x.detach() for x in inputs]
        found = selective_scan(*small, axis=1, backend="triton")
        wanted = selective_scan(*(x.double() for x in small), axis=1, backend="eager")
        require("scan", error(found, wanted))

        def forward(inputs=inputs, z=z):
            return selective_scan(*inputs, z=z, axis=1, backend="triton")

        def both(forward=forward, inputs=inputs, dy=dy):
            torch.autograd.grad(forward(), inputs, dy)

        tokens = batch * height * width
        with torch.no_grad():
            ahead = milliseconds(forward)
        back = milliseconds(both) - ahead
        for work, time, is_back in (("forward", ahead, False), ("backward", back, True)):
            floor = floor_ms(tokens, backward=is_back)
            yield {"workload": f"scan {work}", "size": "x".join(map(str, grid)), "ms": time,
                   "floor_ms": floor, "of_floor": floor / time}  # fmt: skip


def mixer_rows():
    """One mixer of V2M-T, D 192, with its in_proj and out_proj."""
    for batch, height, width in GRIDS:
        mixer = Mixer2d(DIM)
        x = torch.randn(batch, height, width, DIM).bfloat16().requires_grad_()
        dy = torch.randn(batch, height, width, DIM).bfloat16()
        small = x.detach()[:1, :14, :14]
        with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
            found = mixer(small)
        with v2m.ops.use_backend("eager"), torch.no_grad():
            wanted = mixer.double()(small.double())
        mixer.float()
        require("mixer", error(found, wanted))
        targets = [x, *mixer.parameters()]

        def forward(mixer=mixer, x=x):
            with torch.autocast("cuda", torch.bfloat16):
                return mixer(x)

        def both(forward=forward, targets=targets, dy=dy):
            torch.autograd.grad(forward(), targets, dy)

        tokens = batch * height * width
        with torch.no_grad():
            ahead = milliseconds(forward)
        for work, time, is_back in (
            ("forward", ahead, False),
            ("with backward", milliseconds(both), True),
        ):
            floor = floor_ms(tokens, backward=False, scans=6)
            floor += floor_ms(tokens, backward=True, scans=6) if is_back else 0
            yield {"workload": f"mixer {work}", "size": f"{batch}x{height}x{width}", "ms": time,
                   "floor_ms": floor, "of_floor": floor / time}  # fmt: skip


def model_rows(names, sizes, ways):
    for name, size, train_batch, batch in MODELS:
        if (names and name not in names) or (sizes and size not in sizes):
            continue
        for way in ways or ("eager", "compiled"):
            if way == "eager" and name == DEIT:
                continue
            label = {"contestant": f"{name} ({way})", "size": size}
            yield {
                "workload": "inference",
                **label,
                "batch": batch,
                **inference(name, size, batch, way),
            }
            yield {"workload": "training", **label, "batch": train_batch,
                   **training(name, size, train_batch, way)}  # fmt: skip


def build(name: str, size: int):
    kwargs = {} if size == 224 else {"img_size": size}
    create = v2m.create_model if name.startswith("v2m") else timm.create_model
    return create(name, **kwargs).cuda()


def inference(name: str, size: int, batch: int, way: str) -> dict:
    """Images a second of a CUDA graph of the eager model, or of the compiled one."""
    model = build(name, size).eval()
    images = torch.randn(batch, 3, size, size)
    run = torch.compile(model) if way == "compiled" else model

    def forward():
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return run(images)

    for _ in range(3):
        forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with alone(), torch.cuda.graph(graph):
        forward()
    return rate(batch, milliseconds(graph.replay, 300))


def training(name: str, size: int, batch: int, way: str) -> dict:
    model = build(name, size).train()
    run = torch.compile(model) if way == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch, 3, size, size)
    labels = torch.randint(1000, (batch,))

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(run(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for _ in range(3):
        loss = step()
    if not torch.isfinite(loss):
        raise SystemExit(f"{name}: the loss is {float(loss)}")
    torch.cuda.reset_peak_memory_stats()
    row = rate(batch, milliseconds(step, 500))
    return row | {"memory_gb": torch.cuda.max_memory_allocated() / 1e9}


def rate(batch: int, time: float) -> dict:
    return {"ms": time, "images_per_second": 1e3 * batch / time}


FIELDS = ["workload", "contestant", "batch", "size", "ms", "images_per_second", "memory_gb"]
FIELDS += ["floor_ms", "of_floor", "device", "torch", "triton", "timm", "date", "command"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="+", choices=("scan", "mixer", "model"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--sizes", nargs="*", type=int, default=[])
    parser.add_argument("--ways", nargs="*", default=[], choices=("eager", "compiled"))
    parser.add_argument("--lock", help="a file that runs beside each other lock while they time")
    options = parser.parse_args()
    global LOCK
    LOCK = options.lock
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    machine = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "timm": timm.__version__,
        "date": datetime.date.today().isoformat(), "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip
    models = options.models, options.sizes, options.ways
    sources = {"scan": scan_rows, "mixer": mixer_rows, "model": lambda: model_rows(*models)}
    with options.output.open("w", newline="") if options.output else nullcontext() as file:
        writer = csv.DictWriter(file, FIELDS) if file else None
        if writer:
            writer.writeheader()
        for workload in options.workloads:
            for row in sources[workload]():
                print(
                    *(f"{v:.4g}" if isinstance(v, float) else v for v in row.values()), flush=True
                )
                if writer:
                    rounded = {
                        k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()
                    }
                    writer.writerow(rounded | machine)
                    file.flush()


if __name__ == "__main__":
    main()
