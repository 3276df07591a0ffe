"""The runs of the study: what a worker does, and the table of what is done."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from study_train import load, prepare, run

import v2m
from v2m.engine.config import TrainConfig
from v2m.recipes import get_recipe
from v2m.recipes.study import VARIANTS, Variant, shallow
from v2m.visualize.machine import describe_machine

KEY = ("stage", "variant", "seed", "lr", "epochs")
COLUMNS = (
    *KEY,
    *("parameters", "validation_top1", "test_top1", "train_loss", "seconds", "train_seconds"),
    *("images_per_second", "peak_memory_gib", "captured", "at_once", "recipe", "device", "torch"),
    *("triton", "v2m", "date", "settings"),
)
WARM_UP, TIMED = 5, 20  # steps of a measurement of speed


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run, as it goes to a worker."""

    stage: str
    variant: str
    seed: int
    lr: float
    epochs: int
    recipe: str
    limit_batches: int | None
    capture: bool
    threads: int | None
    at_once: int

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(getattr(self, name)) for name in KEY)

    @property
    def model(self) -> Variant:
        variant = VARIANTS[self.variant]
        return shallow(variant) if self.recipe == "study_small" and variant.sized else variant

    @property
    def config(self) -> TrainConfig:
        config = get_recipe(self.recipe)
        warmup = min(config.schedule.warmup_epochs, self.epochs / 4)
        return replace(
            config,
            optim=replace(config.optim, lr=self.lr),
            schedule=replace(config.schedule, epochs=self.epochs, warmup_epochs=warmup),
            run=replace(config.run, seed=self.seed, limit_batches=self.limit_batches),
        )


def perform(job: Job) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run, in a worker: its row and its epochs."""
    if job.threads:
        torch.set_num_threads(job.threads)
    figures, curve, _ = run(job.config, job.model, capture=job.capture, test=job.stage == "final")
    return {**dict(zip(KEY, job.key)), **figures, **circumstances(job.recipe, job.at_once)}, curve


def circumstances(recipe: str, at_once: int, settings: Sequence[str] = ()) -> dict[str, Any]:
    """What a row says about where it was made, and with which settings instead of the recipe's."""
    on_cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_cuda else describe_machine()["processor"]
    return {
        "at_once": at_once,
        "recipe": recipe,
        "device": device,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if on_cuda else "",
        "v2m": v2m.__version__,
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "settings": " ".join(settings),
    }


class Table:
    """DIR/runs.csv and DIR/curves.jsonl. One process at a time writes them."""

    def __init__(self, directory: Path) -> None:
        self.runs, self.curves = directory / "runs.csv", directory / "curves.jsonl"
        self.rows = read_rows(self.runs)

    @property
    def done(self) -> set[tuple[str, ...]]:
        return {tuple(row[name] for name in KEY) for row in self.rows}

    def add(self, row: dict[str, Any], curve: list[dict[str, Any]]) -> None:
        """The row comes last and all at once: a run is done when it is there."""
        with open(self.curves, "a", encoding="utf-8") as file:
            file.write(json.dumps({**{name: row[name] for name in KEY}, "curve": curve}) + "\n")
        self.rows.append({name: "" if row[name] is None else str(row[name]) for name in COLUMNS})
        write_rows(self.runs, COLUMNS, self.rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, columns: Iterable[str], rows: list[dict[str, Any]]) -> None:
    """The whole file under another name, then in its place."""
    draft = path.with_suffix(".tmp")
    with open(draft, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def measure(job: Job) -> dict[str, Any]:
    """The step of one variant, alone on the device: its time, and the memory it takes."""
    if job.threads:
        torch.set_num_threads(job.threads)
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    synchronize = torch.cuda.synchronize if on_cuda else lambda: None
    config = replace(job.config, run=replace(job.config.run, limit_batches=None))
    part = load(config, "validation", device)
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    trainer = prepare(config, job.model, part, device, capture=job.capture)
    trainer.model.train()
    batch = slice(0, config.data.batch_size)
    trainer.feed(part.normalised(part.images[batch]), part.targets[batch])
    warm_up, timed = (WARM_UP, TIMED) if job.limit_batches is None else (1, 1)
    for _ in range(warm_up):
        trainer.take_step()
    synchronize()
    started = time.perf_counter()
    for _ in range(timed):
        trainer.take_step()
    synchronize()
    seconds = (time.perf_counter() - started) / timed
    return {
        "ms_per_step": f"{1e3 * seconds:.2f}",
        "images_per_second": f"{config.data.batch_size / seconds:.0f}",
        "peak_memory_gib": (
            f"{(torch.cuda.max_memory_allocated() - held) / 2**30:.3f}" if on_cuda else ""
        ),
    }


def workers(count: int) -> ProcessPoolExecutor:
    """Processes that share the GPUs there are between them."""
    context = get_context("spawn")
    places = context.SimpleQueue()
    for index in range(count):
        places.put(index % max(1, torch.cuda.device_count()))
    return ProcessPoolExecutor(count, context, _take_device, (places,))


def _take_device(places) -> None:
    place = places.get()
    if torch.cuda.is_available():
        torch.cuda.set_device(place)


def run_jobs(jobs: list[Job], table: Table, *, at_once: int, until: float) -> list[str]:
    """All jobs that are not done, `at_once` at a time, none started after `until`; what failed."""
    waiting = [job for job in jobs if job.key not in table.done]
    running: dict[Future, Job] = {}
    failures, started = [], time.monotonic()
    if not waiting:
        return []
    with workers(min(at_once, len(waiting))) as pool:
        while (waiting and time.monotonic() < until) or running:
            while waiting and len(running) < at_once and time.monotonic() < until:
                job = waiting.pop(0)
                running[pool.submit(perform, job)] = job
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                if error := future.exception():
                    failures.append(f"{' '.join(job.key)}: {type(error).__name__}: {error}")
                    print(f"FAILED {failures[-1]}", flush=True)
                    continue
                row, curve = future.result()
                table.add(row, curve)
                clock = time.monotonic() - started
                print(
                    f"{clock:6.0f} s  {' '.join(job.key)}: validation "
                    f"{row['validation_top1']:.4f}, {row['seconds']:.1f} s, "
                    f"{row['images_per_second']:.0f} images/s; {len(waiting)} waiting",
                    flush=True,
                )
    return failures + [f"{' '.join(job.key)}: not started, out of time" for job in waiting]
