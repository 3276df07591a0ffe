"""Speed and memory of Mask R-CNN at COCO's size, with S* and with a ResNet-50."""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor

from v2m.engine.distributed import Ranks, choose_device
from v2m.heads import DenseBackbone, Detector, DetectorConfig

BACKBONES = ("v2m_hier_small_224", "resnet50")
CLASSES, OBJECTS = 80, 10  # COCO's; objects an image, generated
TRAIN_BATCH = 2  # images per GPU of the published recipe
Workload = tuple[str, int, Callable[[], Any]]  # what, images, a function that does it once
FIELDS = ("workload", "backbone", "batch", "size", "ms", "images_per_second", "peak_memory_gib")
MACHINE = ("precision", "device", "torch", "date", "command")


def speed(args: argparse.Namespace) -> None:
    """Time training steps, detection and the backbone alone; rows go to `args.csv`."""
    device = choose_device(args.device, Ranks())
    cuda = device.type == "cuda"
    machine = {
        "precision": "bfloat16" if cuda else "float32",
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.dense", *sys.argv[1:]]),
    }
    size = tuple(args.size)
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with open(args.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, (*FIELDS, *MACHINE))
        writer.writeheader()
        for name in BACKBONES:
            for work, batch, run in _workloads(name, size, device):
                ms, peak = _measure(run, device, args.repeats)
                row: dict[str, Any] = {
                    "workload": work,
                    "backbone": name,
                    "batch": batch,
                    "size": f"{size[0]}x{size[1]}",
                    "ms": f"{ms:.4g}",
                    "images_per_second": f"{1e3 * batch / ms:.4g}",
                    "peak_memory_gib": f"{peak:.3g}" if cuda else "",
                }
                print(*row.values(), flush=True)
                writer.writerow(row | machine)
                file.flush()


def _workloads(name: str, size: tuple[int, int], device: torch.device) -> Iterator[Workload]:
    """What is timed, one after the other."""
    for workloads in (_detector, _backbone):
        torch.manual_seed(0)
        yield from workloads(name, size, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _autocast(device: torch.device) -> AbstractContextManager:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _detector(name: str, size: tuple[int, int], device: torch.device) -> Iterator[Workload]:
    shape = DetectorConfig(
        backbone=name, num_classes=CLASSES, min_size=min(size), max_size=max(size)
    )
    model = Detector(shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images, targets = _batch(TRAIN_BATCH, size, device)

    def step() -> None:
        with _autocast(device):
            losses = model(images, targets)
        sum(value.float() for value in losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def detect() -> None:
        with _autocast(device), torch.inference_mode():
            model(images[:1])

    yield "Mask R-CNN, training step", TRAIN_BATCH, step
    model.eval()
    yield "Mask R-CNN, boxes alone", 1, detect  # untrained, it finds nothing to mask


def _backbone(name: str, size: tuple[int, int], device: torch.device) -> Iterator[Workload]:
    body = DenseBackbone.create(name).to(device)
    images = torch.randn(TRAIN_BATCH, 3, *size, device=device)

    def forward() -> list[Tensor]:
        with _autocast(device):
            return body(images)

    def both() -> None:
        sum(x.float().mean() for x in forward()).backward()
        body.zero_grad(set_to_none=True)

    yield "backbone, forward and backward", TRAIN_BATCH, both
    body.eval()
    yield "backbone, forward", TRAIN_BATCH, torch.no_grad()(forward)


def _batch(
    count: int, size: tuple[int, int], device: torch.device
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images of noise with objects of 100 pixels' side."""
    height, width = size
    side = min(100, height // 2)
    images = [torch.rand(3, height, width, device=device) for _ in range(count)]
    targets = []
    for _ in range(count):
        corners = torch.rand(OBJECTS, 2) * torch.tensor([width - side, height - side])
        boxes = torch.cat([corners, corners + side], dim=1)
        masks = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
            mask[top:bottom, left:right] = 1
        labels = torch.randint(CLASSES, (OBJECTS,))
        target = {"boxes": boxes, "labels": labels, "masks": masks}
        targets.append({key: value.to(device) for key, value in target.items()})
    return images, targets


def _measure(run: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, float]:
    """Median milliseconds of `run` and its peak memory, GiB."""
    cuda = device.type == "cuda"
    for _ in range(3 if cuda else 1):
        run()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return 1e3 * median(times), peak
