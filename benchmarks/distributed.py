"""Training speed of one GPU alone and of all together: scaling efficiency through NCCL.

    torchrun --nproc-per-node 2 benchmarks/distributed.py scaling.csv
    V2M_BACKEND=eager torchrun --nproc-per-node 2 benchmarks/distributed.py scaling.csv \\
        --device cpu --model v2m_nano_patch4_28 --batch-size 8 --steps 3    # to try it, by gloo

First rank 0 trains alone while the others wait, then all do, each with the same batch: DDP, and
FSDP2. Whole training steps (forward, backward, exchange, AdamW) on images that are there already.
Efficiency is images/s of all over the number of GPUs times images/s of one. Before anything is
timed, the gradients of all together are compared with those of one with all the images.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import v2m
from v2m.engine.distributed import Ranks, choose_device, join_ranks
from v2m.engine.sharding import shard, whole
from v2m.visualize.machine import describe_machine

WAYS = ("alone", "ddp", "fsdp")


def build(args: argparse.Namespace, way: str, ranks: Ranks, device: torch.device) -> nn.Module:
    """The model, the same on every rank, made ready for one way to train."""
    torch.manual_seed(0)
    model = v2m.create_model(args.model).to(device).train()
    if way == "fsdp":
        shard(model, ranks, device)
    if way == "ddp":
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)
    return model


def batch(args: argparse.Namespace, model: nn.Module, rank: int, device: torch.device):
    """A rank's images and targets."""
    module = getattr(model, "module", model)
    generator = torch.Generator().manual_seed(rank)
    size = module.pretrained_cfg["input_size"]
    images = torch.randn(args.batch_size, *size, generator=generator)
    targets = torch.randint(module.num_classes, (args.batch_size,), generator=generator)
    return images.to(device), targets.to(device)


def loss_of(model: nn.Module, images: Tensor, targets: Tensor, precision: str) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(images)
    return F.cross_entropy(logits.float(), targets)


def gradient_error(args: argparse.Namespace, way: str, ranks: Ranks, device: torch.device) -> float:
    """||a - b|| / ||b|| of all gradients, a of all ranks together, b of one with all images;
    in float32."""
    model = build(args, way, ranks, device)
    loss_of(model, *batch(args, model, ranks.rank, device), "float32").backward()
    single = build(args, "alone", ranks, device)
    parts = [batch(args, single, rank, device) for rank in range(ranks.world)]
    for images, targets in parts:
        (loss_of(single, images, targets, "float32") / len(parts)).backward()
    pairs = zip(model.parameters(), single.parameters())
    squares = [((whole(p.grad) - q.grad).square().sum(), q.grad.square().sum()) for p, q in pairs]
    difference, norm = (torch.stack(column).sum().sqrt() for column in zip(*squares))
    return float(difference / norm)


def timed_steps(args: argparse.Namespace, way: str, ranks: Ranks, device: torch.device) -> float:
    """Median seconds of a training step."""
    model = build(args, way, ranks, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images, targets = batch(args, model, ranks.rank, device)
    synchronize: Callable[[], None] = lambda: None  # noqa: E731
    if device.type == "cuda":
        synchronize = torch.cuda.synchronize
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(args.warmup + args.steps):
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, images, targets, args.precision).backward()
        optimizer.step()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[args.warmup :])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="CSV to write")
    parser.add_argument("--model", default="v2m_tiny_patch16_224")
    parser.add_argument("--batch-size", type=int, default=64, help="images per GPU")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2, help="how often each way is measured")
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    args = parser.parse_args()
    with join_ranks(args.device) as ranks:
        device = choose_device(args.device, ranks)
        ways = WAYS if ranks.world > 1 else WAYS[:1]
        rows = measure(args, ways, ranks, device)
        if ranks.first:
            write(args.output, rows)
    return 0


def measure(
    args: argparse.Namespace, ways: tuple[str, ...], ranks: Ranks, device: torch.device
) -> list[dict[str, object]]:
    errors = {way: gradient_error(args, way, ranks, device) for way in ways if way != "alone"}
    for way, error in errors.items():
        if error > 1e-4:  # TF32 and the order of sums; a wrong exchange gives some 1
            sys.exit(f"{way}: the gradients differ from those of one GPU by {error:.1e}")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way in ways:
            if way != "alone" or ranks.first:
                seconds[way].append(timed_steps(args, way, ranks, device))
            ranks.barrier()
    if not ranks.first:
        return []
    gpus = {way: 1 if way == "alone" else ranks.world for way in ways}
    rates = {way: args.batch_size * gpus[way] / min(found) for way, found in seconds.items()}
    return [
        {
            "way": way,
            "gpus": gpus[way],
            "images_per_second": round(rates[way], 1),
            "efficiency": round(
                rates[way] / rates["alone"] / (ranks.world if way != "alone" else 1), 4
            ),
            "gradient_error": f"{errors.get(way, 0.0):.1e}",
            "model": args.model,
            "batch_per_gpu": args.batch_size,
            "precision": args.precision,
            "exchange": dist.get_backend() if ranks.world > 1 else "none",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": describe_machine()["torch"],
        }
        for way in ways
    ]


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(", ".join(f"{key} {row[key]}" for key in list(row)[:5]))


if __name__ == "__main__":
    sys.exit(main())
