"""The study of docs/results.md: nine models, one recipe, each learning rate chosen in the same way.

    python benchmarks/study.py all --output DIR              # all that DIR/runs.csv does not have
    python benchmarks/study.py all --recipe study_small --output DIR --at-once 3
    python benchmarks/study.py best --variant hier_112 --minutes 7 --output DIR
    python benchmarks/study_plot.py DIR                      # tables and pictures

First the speed of each model's step is measured alone (speed.csv); it gives the number of epochs,
the same for all, so that no run takes longer than --run-seconds. Then every variant is trained once
with each learning rate, for fewer epochs, and the one that is best on the validation images is its
own ("tune"). Then come the runs that count, one for each seed ("final"): after its last epoch each
evaluates the test images, once.

DIR/runs.csv has a row for every run that is done, DIR/curves.jsonl its epochs, DIR/plan.json what
was decided: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import fcntl
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from study_train import load, prepare, run

import v2m
from v2m.engine.config import TrainConfig
from v2m.errors import InputError
from v2m.models import save_model
from v2m.recipes import get_recipe
from v2m.recipes.study import BEST, LEARNING_RATES, VARIANTS, Variant, shallow
from v2m.visualize.machine import describe_machine

KEY = ("stage", "variant", "seed", "lr", "epochs")
COLUMNS = (
    *KEY,
    *("parameters", "validation_top1", "test_top1", "train_loss", "seconds", "train_seconds"),
    *("images_per_second", "peak_memory_gib", "captured", "at_once", "recipe", "device", "torch"),
    *("triton", "v2m", "date"),
)
SPEED_COLUMNS = ("variant", "way", "ms_per_step", "images_per_second", "peak_memory_gib", "error")
TUNING_SEED = 100  # no seed of the runs that count
LEAST_EPOCHS = 10
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


def circumstances(recipe: str, at_once: int) -> dict[str, Any]:
    """What a row says about where it was made."""
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


@contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Refuse a second process that would write to the same folder."""
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise InputError(f"another process is writing to {directory}: wait for it.") from error
    finally:
        os.close(handle)


# Speed --------------------------------------------------------------------------------------------


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


def measure_all(arguments: argparse.Namespace, job: Job) -> list[dict[str, Any]]:
    """speed.csv: what it has already, and what is missing. A way that fails is a row with its
    error."""
    path = arguments.output / "speed.csv"
    rows = read_rows(path)
    ways = ("eager", "captured") if torch.cuda.is_available() and arguments.graph else ("eager",)
    pool = None
    for name in arguments.variants:
        for way in ways:
            if any((row["variant"], row["way"]) == (name, way) for row in rows):
                continue
            pool = pool or workers(1)
            one = replace(job, variant=name, capture=way == "captured")
            row = dict.fromkeys(SPEED_COLUMNS, "") | {"variant": name, "way": way}
            try:
                row |= pool.submit(measure, one).result()
            except RuntimeError as error:  # also of a worker that died
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                pool.shutdown()
                pool = None  # its device may be in no state to go on
            rows.append(row)
            write_rows(path, SPEED_COLUMNS, rows)
            print(*(f"{key} {value}" for key, value in row.items() if value), flush=True)
    if pool is not None:
        pool.shutdown()
    return rows


def workers(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"))


# The plan and the runs ----------------------------------------------------------------------------


def make_plan(arguments: argparse.Namespace, speed: list[dict[str, Any]]) -> dict[str, Any]:
    """The number of epochs, and which variants run captured; DIR/plan.json if there is one."""
    path = arguments.output / "plan.json"
    if path.exists():
        plan = json.loads(path.read_text(encoding="utf-8"))
        if plan["recipe"] != arguments.recipe:
            raise InputError(
                f"{arguments.output} holds the study of recipe {plan['recipe']!r}, not of "
                f"{arguments.recipe!r}: give another --output."
            )
        return plan
    config = get_recipe(arguments.recipe)
    epochs = arguments.epochs or config.schedule.epochs
    captured = [r["variant"] for r in speed if r["way"] == "captured" and not r["error"]]
    if arguments.run_seconds:
        steps = config_images(config) // config.data.batch_size
        way = {name: "captured" if name in captured else "eager" for name in arguments.variants}
        slowest = max(
            float(row["ms_per_step"]) / 1e3
            for row in speed
            if not row["error"] and way.get(row["variant"]) == row["way"]
        )
        fit = int(0.9 * arguments.run_seconds / (slowest * steps))
        epochs = max(min(epochs, fit), min(epochs, LEAST_EPOCHS))
    plan = {
        "recipe": arguments.recipe,
        "epochs": epochs,
        "tuning_epochs": max(1, round(0.25 * epochs)),
        "captured": captured,
    }
    path.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    return plan


def config_images(config: TrainConfig) -> int:
    return len(load(config, "train", torch.device("cpu")).targets)


def own_rates(
    arguments: argparse.Namespace, table: Table, plan: dict[str, Any]
) -> dict[str, float]:
    """For each variant whose tuning is done the learning rate that is best on the validation
    images."""
    rates = arguments.learning_rates
    if len(rates) == 1:
        return dict.fromkeys(arguments.variants, rates[0])
    chosen = {}
    for name in arguments.variants:
        found = {
            float(row["lr"]): float(row["validation_top1"])
            for row in table.rows
            if row["stage"] == "tune"
            and row["variant"] == name
            and row["epochs"] == str(plan["tuning_epochs"])
        }
        if set(rates) <= set(found):
            chosen[name] = max(sorted(rates), key=found.__getitem__)
    return chosen


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


def run_all(arguments: argparse.Namespace) -> int:
    until = time.monotonic() + 60 * arguments.minutes
    at_once = arguments.at_once
    common = {
        "recipe": arguments.recipe,
        "limit_batches": arguments.limit_batches,
        "threads": arguments.threads,
        "at_once": at_once,
    }
    probe = Job(stage="speed", variant="", seed=0, lr=1e-3, epochs=1, capture=False, **common)
    plan = make_plan(arguments, measure_all(arguments, probe))
    print(f"plan: {plan}", flush=True)
    table = Table(arguments.output)

    def job(stage: str, variant: str, seed: int, lr: float, epochs: int) -> Job:
        capture = variant in plan["captured"] and arguments.graph
        return Job(
            stage=stage, variant=variant, seed=seed, lr=lr, epochs=epochs, capture=capture, **common
        )

    failures = []
    if len(arguments.learning_rates) > 1:
        jobs = [
            job("tune", variant, TUNING_SEED, lr, plan["tuning_epochs"])
            for variant in arguments.variants
            for lr in arguments.learning_rates
        ]
        failures += run_jobs(jobs, table, at_once=at_once, until=until)
    rates = own_rates(arguments, table, plan)
    print(f"learning rates: {rates}", flush=True)
    jobs = [
        job("final", variant, seed, rate, plan["epochs"])
        for seed in range(arguments.seeds)
        for variant, rate in rates.items()
    ]
    failures += run_jobs(jobs, table, at_once=at_once, until=until)
    for failure in failures:
        print(f"missing: {failure}")
    return 1 if failures else 0


def run_best(arguments: argparse.Namespace) -> int:
    """Train a variant of BEST for as many epochs as fit, and save it; one row of runs.csv."""
    variant, config = BEST[arguments.variant], get_recipe("fashion_mnist")
    config = replace(config, run=replace(config.run, limit_batches=arguments.limit_batches))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    capture = device.type == "cuda" and arguments.graph
    if arguments.epochs is None:
        epochs = epochs_that_fit(config, variant, device, 60 * arguments.minutes, capture=capture)
    else:
        epochs = arguments.epochs
    warmup = min(config.schedule.warmup_epochs, epochs / 4)
    schedule = replace(config.schedule, epochs=epochs, warmup_epochs=warmup)
    lr = arguments.lr or config.optim.lr
    config = replace(config, schedule=schedule, optim=replace(config.optim, lr=lr))
    print(f"{arguments.variant}: {epochs} epochs", flush=True)
    stage = "trial" if arguments.no_test else "best"
    figures, curve, model = run(
        config,
        variant,
        capture=capture,
        test=not arguments.no_test,
        finished_epoch=lambda record: print(record, flush=True),
    )
    row = dict(zip(KEY, (stage, arguments.variant, config.run.seed, lr, epochs)))
    row |= {**figures, **circumstances("fashion_mnist", 1)}
    Table(arguments.output).add(row, curve)
    if not arguments.no_test:
        save_model(model, arguments.output, v2m={"task": "classification", "data": "fashion-mnist"})
    print(json.dumps(row, indent=2))
    return 0


def epochs_that_fit(config, variant, device, seconds: float, *, capture: bool) -> int:
    """From the time of two short epochs, the first of which compiles."""
    part = load(config, "train", device)
    trainer = prepare(config, variant, part, device, capture=capture)
    whole = trainer.steps_per_epoch
    trainer.steps_per_epoch = max(1, whole // 4)
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(2):
        started = time.perf_counter()
        trainer.epoch(part, generator)
        took = time.perf_counter() - started
    per_epoch = took * whole / trainer.steps_per_epoch
    return max(1, int(0.93 * seconds / per_epoch))  # the rest is for the validation images


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    everything = commands.add_parser("all", help="speed, tuning and the runs that count")
    everything.set_defaults(run=run_all)
    add = everything.add_argument
    add("--recipe", default="study", choices=("study", "study_small"))
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    add("--seeds", type=int, default=3, help="runs that count of each variant")
    add("--learning-rates", type=float, nargs="+", default=list(LEARNING_RATES), metavar="LR")
    add("--run-seconds", type=float, default=0.0, help="the most a run may train, 0 for no limit")
    add("--at-once", type=int, default=1, help="runs at the same time")
    add("--threads", type=int, help="threads of each run, on a CPU")
    best = commands.add_parser("best", help="the best V2M, in a given time")
    best.set_defaults(run=run_best)
    add = best.add_argument
    add("--variant", choices=BEST, default="hier_112")
    add("--lr", type=float, help="another learning rate than the recipe's")
    add("--no-test", action="store_true", help="a trial: validation images only, nothing saved")
    for command, minutes in ((everything, 1e6), (best, 7.0)):
        add = command.add_argument
        add("--output", type=Path, required=True, metavar="DIR")
        add("--epochs", type=int, help="another number than the recipe's")
        add("--minutes", type=float, default=minutes, help="no run starts later; best: its length")
        add("--limit-batches", type=int, help="a dry run: at most so many steps an epoch")
        add("--no-graph", dest="graph", action="store_false", help="no CUDA graphs")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    arguments = parse(words)
    try:
        with only_one(arguments.output):
            return arguments.run(arguments)
    except InputError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
