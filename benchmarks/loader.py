"""Images per second that the loader alone delivers: JPEG files in folders, and in tar shards.

    python benchmarks/loader.py results.csv                     # synthetic photographs
    python benchmarks/loader.py results.csv --data /data/imagenet --workers 4 8 16
    python benchmarks/loader.py results.csv --device cuda       # colour and erasing on the GPU

Without --data, 256 synthetic photographs of some 500 x 375 pixels are written to a temporary folder
first. Every way is measured several times in turn; reported are the medians. `per_core` counts the
seconds that the loader's processes really had on a core (Linux), so it holds on a busy machine too.
With `on the device`, what the loader leaves to the GPU is done there, or not at all without one.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from v2m.data import DataConfig, ImageDataset, Loader, create_loader, load_dataset
from v2m.data.device_augment import DeviceAugment
from v2m.visualize.machine import describe_machine

FULL = DataConfig()
CONFIGS = {
    "RandAugment": FULL,
    "crop and flip": DataConfig(auto_augment=None, color_jitter=0, random_erasing=0),
    "on the device": DataConfig(on_device=True),
}


def photographs(folder: Path, count: int) -> None:
    """Smooth noise, whose JPEGs are about as large as those of photographs; in two classes."""
    random = np.random.default_rng(0)
    shards = folder / "shards"
    shards.mkdir(parents=True)
    with tarfile.open(shards / "train-0.tar", "w") as archive:
        for number in range(count):
            coarse = random.integers(0, 256, (24, 32, 3), np.uint8)
            image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
            grain = random.normal(0, 12, (375, 500, 1)) + np.asarray(image)
            file = io.BytesIO()
            Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
            path = folder / "folders" / "train" / str(number % 2) / f"{number:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
            for suffix, data in (("jpg", file.getvalue()), ("cls", str(number % 2).encode())):
                header = tarfile.TarInfo(f"{number:05}.{suffix}")
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))


def measure(
    dataset: ImageDataset, config: DataConfig, workers: int, args: argparse.Namespace
) -> tuple[float, float]:
    """Images per second, and per second of the loader's processes on a core, once they run."""
    loader = create_loader(
        dataset,
        config,
        is_training=True,
        input_size=(3, args.size, args.size),
        batch_size=min(args.batch_size, len(dataset) // max(2, workers)),
        num_workers=workers,
    )
    on_gpu = args.device == "cuda"
    augment = (
        DeviceAugment(config, loader.mean, loader.std) if config.on_device and on_gpu else None
    )
    batches = endless(loader)
    for _ in range(max(2, 2 * workers)):  # what was prepared while the processes started
        next(batches)
    workers_before, images, started = core_seconds(loader), 0, time.perf_counter()
    while time.perf_counter() - started < args.seconds:
        batch, _ = next(batches)
        batch = batch.to(args.device, non_blocking=True)
        if augment is not None:
            augment(batch)
        images += len(batch)
    if on_gpu:
        torch.cuda.synchronize()
    seconds, on_a_core = time.perf_counter() - started, core_seconds(loader) - workers_before
    loader.close()
    return images / seconds, images / on_a_core if on_a_core else math.nan


def core_seconds(loader: Loader) -> float:
    """What the loader's processes have spent on a core so far; 0 where the system does not say."""
    ticks = 0
    for process in loader._source._iterator._workers:
        status = Path(f"/proc/{process.pid}/stat")
        if status.exists():
            ticks += sum(map(int, status.read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def endless(loader: Loader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Epoch after epoch."""
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="CSV to write")
    parser.add_argument("--data", nargs="*", help="data sets as of `v2m train --data`")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="loader processes")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=256, help="synthetic ones")
    args = parser.parse_args()

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        sources = args.data
        if not sources:
            photographs(Path(name), args.images)
            sources = [f"{name}/folders", f"wds:{name}/shards"]
        sets = {
            source: load_dataset(source, "train", validation_fraction=0.01) for source in sources
        }
        cases = [(s, c, w) for s in sources for c in CONFIGS for w in args.workers]
        rates: dict[tuple, list[tuple[float, float]]] = {case: [] for case in cases}
        for _ in range(args.rounds):
            for source, config, workers in cases:
                found = measure(sets[source], CONFIGS[config], workers, args)
                rates[source, config, workers].append(found)
                print(
                    f"{source} {config}, {workers} processes: {found[0]:.0f} images/s", flush=True
                )
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    rows = [
        {
            "data": source.replace(name, "synthetic"),
            "augmentation": config,
            "processes": workers,
            "images_per_second": round(statistics.median(rate for rate, _ in found), 1),
            "per_core": round(statistics.median(rate for _, rate in found), 1),
            "size": args.size,
            "device": device,
            "machine": describe_machine()["processor"],
            "torch": torch.__version__,
        }
        for (source, config, workers), found in rates.items()
    ]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(", ".join(f"{k} {v}" for k, v in list(row.items())[:5]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
