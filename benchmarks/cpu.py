"""Time of V2M on a CPU: fused kernels against `eager`, and against timm's DeiT-T.

    python benchmarks/cpu.py --threads 2                      # all workloads, a table
    python benchmarks/cpu.py --threads 2 --output results.csv --workloads demo_training

Every workload first checks that the backends agree on the very model it times, then runs its
contestants in turn, round after round, so that a disturbance meets them all. Reported: the median
and the least time of a round, and both as ratios to the first contestant.
"""

import argparse
import csv
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numba
import timm
import torch

import v2m
from v2m.ops import use_backend

AGREEMENT = 1e-4  # relative difference of the logits and of the gradients between the backends


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Contestants are (model, backend); the first is what the others are compared with."""

    contestants: tuple[tuple[str, str | None], ...]
    batch: int
    training: bool
    model_args: dict
    rounds: int


TINY, DEIT, DEMO = "v2m_tiny_patch16_224", "deit_tiny_patch16_224", "v2m_nano_patch4_28"
WORKLOADS = {
    "inference_1": Workload(
        contestants=((DEIT, None), (TINY, "cpu"), (TINY, "eager")),
        batch=1, training=False, model_args={}, rounds=30,
    ),
    "inference_32": Workload(
        contestants=((DEIT, None), (TINY, "cpu")),
        batch=32, training=False, model_args={}, rounds=7,
    ),
    "training_8": Workload(
        contestants=((TINY, "eager"), (TINY, "cpu"), (DEIT, None)),
        batch=8, training=True, model_args={}, rounds=3,
    ),
    "demo_training": Workload(
        contestants=((DEMO, "eager"), (DEMO, "cpu")),
        batch=128, training=True, model_args={"num_classes": 10, "in_chans": 1}, rounds=5,
    ),
    "demo_training_32": Workload(
        contestants=((DEMO, "eager"), (DEMO, "cpu")),
        batch=32, training=True, model_args={"num_classes": 10, "in_chans": 1}, rounds=15,
    ),
}  # fmt: skip


def build(name: str, workload: Workload) -> torch.nn.Module:
    """A model with the seed's weights."""
    torch.manual_seed(0)
    create = v2m.create_model if name.startswith("v2m") else timm.create_model
    return create(name, **workload.model_args).train(workload.training)


def step_of(name: str, backend: str | None, workload: Workload) -> Callable[[], torch.Tensor]:
    """One inference or one training step, optimiser included; it returns the logits."""
    model = build(name, workload)
    size = model.pretrained_cfg["input_size"]
    images = torch.randn(workload.batch, *size, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(workload.batch) % model.num_classes
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def infer() -> torch.Tensor:
        with torch.inference_mode(), use_backend(backend):
            return model(images)

    def train() -> torch.Tensor:
        optimizer.zero_grad()
        with use_backend(backend):
            logits = model(images)
            torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        return logits.detach()

    return train if workload.training else infer


def check_agreement(name: str, workload: Workload) -> float:
    """The largest relative difference between `cpu` and `eager`, of logits and every gradient."""
    results = {}
    for backend in ("eager", "cpu"):
        model = build(name, workload).eval()
        generator = torch.Generator().manual_seed(2)
        images = torch.randn(2, *model.pretrained_cfg["input_size"], generator=generator)
        with use_backend(backend):
            logits = model(images)
            logits.square().sum().backward()
        results[backend] = [logits.detach(), *(p.grad for p in model.parameters())]
    worst = max(
        float((a - b).norm() / a.norm().clamp_min(1e-12)) for a, b in zip(*results.values())
    )
    if worst > AGREEMENT:
        raise SystemExit(f"{name}: backends 'cpu' and 'eager' differ by {worst:.1e}; not timed")
    return worst


def measure(workload: Workload) -> list[list[float]]:
    """Seconds of every round of each contestant."""
    steps = [step_of(name, backend, workload) for name, backend in workload.contestants]
    for step in steps:
        step()
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(workload.rounds):
        for step, seconds in zip(steps, times):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    return times


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def cores() -> str:
    """The cores this process may run on, where the system says."""
    if not hasattr(os, "sched_getaffinity"):
        return ""
    return " ".join(map(str, sorted(os.sched_getaffinity(0))))


def rows_of(name: str, workload: Workload) -> list[dict]:
    """The table's rows for one workload."""
    models = {model for model, backend in workload.contestants if backend}
    difference = max(check_agreement(model, workload) for model in models)
    times = measure(workload)
    return [
        {
            "workload": name,
            "model": model,
            "backend": backend or "torch",
            "batch": workload.batch,
            "median_ms": round(1e3 * statistics.median(seconds), 2),
            "least_ms": round(1e3 * min(seconds), 2),
            "median_ratio": round(statistics.median(seconds) / statistics.median(times[0]), 3),
            "least_ratio": round(min(seconds) / min(times[0]), 3),
            "rounds": workload.rounds,
            "cpu_eager_difference": f"{difference:.1e}",
            "threads": torch.get_num_threads(),
            "cores": cores(),
            "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "",
            "machine": f"{processor()}, {os.cpu_count()} cores",
            "versions": f"torch {torch.__version__}, numba {numba.__version__}",
            "command": " ".join(["python", *sys.argv]),
        }
        for (model, backend), seconds in zip(workload.contestants, times)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="a CSV file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict] = []
    for name in arguments.workloads:
        for row in rows_of(name, WORKLOADS[name]):
            rows.append(row)
            print(
                f"{name:14} {row['model']:22} {row['backend']:6}"
                f" {row['median_ms']:10.1f} ms (least {row['least_ms']:.1f})"
                f"  x {row['median_ratio']:.2f} (least {row['least_ratio']:.2f})",
                flush=True,
            )
    if arguments.output:
        with open(arguments.output, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
