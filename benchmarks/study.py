"""The study of docs/results.md: nine models, one recipe, each learning rate chosen in the same way.

    python benchmarks/study.py all --output DIR              # all that DIR/runs.csv does not have
    python benchmarks/study.py all --recipe study_small --output DIR --at-once 3
    python benchmarks/study.py best --variant hier_56 --minutes 7 --output DIR
    python benchmarks/study.py best --no-test --set optim.lr=3e-3 --minutes 2 --output DIR
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
import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from study_runs import (
    KEY,
    Job,
    Table,
    circumstances,
    measure,
    read_rows,
    run_jobs,
    workers,
    write_rows,
)
from study_train import load, prepare, run

from v2m.engine.config import TrainConfig
from v2m.engine.settings import apply_overrides
from v2m.errors import InputError
from v2m.models import save_model
from v2m.recipes import get_recipe
from v2m.recipes.study import BEST, LEARNING_RATES, VARIANTS

SPEED_COLUMNS = ("variant", "way", "ms_per_step", "images_per_second", "peak_memory_gib", "error")
TUNING_SEED = 100  # no seed of the runs that count
LEAST_EPOCHS = 10


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
    left_out: list[str] = []
    if limit := arguments.run_seconds:
        steps = config_images(config) // config.data.batch_size
        per_epoch = dict.fromkeys(arguments.variants, math.inf)  # that of a variant that fails
        for row in speed:  # the captured step, where there is one, comes after the other
            if row["variant"] in per_epoch and not row["error"]:
                per_epoch[row["variant"]] = float(row["ms_per_step"]) / 1e3 * steps
        least = min(epochs, LEAST_EPOCHS)
        left_out = [name for name, time in per_epoch.items() if time * least > limit]
        slowest = max((t for name, t in per_epoch.items() if name not in left_out), default=0.0)
        epochs = max(least, min(epochs, int(0.9 * limit / slowest))) if slowest else epochs
    plan = {
        "recipe": arguments.recipe,
        "epochs": epochs,
        "tuning_epochs": max(1, round(0.25 * epochs)),
        "captured": captured,
        "left_out": left_out,  # too slow for --run-seconds even with the fewest epochs
    }
    path.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    return plan


def config_images(config: TrainConfig) -> int:
    return len(load(config, "train", torch.device("cpu")).targets)


def own_rates(
    variants: list[str], rates: list[float], table: Table, plan: dict[str, Any]
) -> dict[str, float]:
    """For each variant whose tuning is done the learning rate that is best on the validation
    images."""
    if len(rates) == 1:
        return dict.fromkeys(variants, rates[0])
    chosen = {}
    for name in variants:
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
    variants = [name for name in arguments.variants if name not in plan["left_out"]]

    def job(stage: str, variant: str, seed: int, lr: float, epochs: int) -> Job:
        capture = variant in plan["captured"] and arguments.graph
        return Job(
            stage=stage, variant=variant, seed=seed, lr=lr, epochs=epochs, capture=capture, **common
        )

    failures = []
    if len(arguments.learning_rates) > 1:
        jobs = [
            job("tune", variant, TUNING_SEED, lr, plan["tuning_epochs"])
            for variant in variants
            for lr in arguments.learning_rates
        ]
        failures += run_jobs(jobs, table, at_once=at_once, until=until)
    rates = own_rates(variants, arguments.learning_rates, table, plan)
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
    config = apply_overrides(config, arguments.set)
    config = replace(config, run=replace(config.run, limit_batches=arguments.limit_batches))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    capture = device.type == "cuda" and arguments.graph
    if arguments.epochs is None:
        epochs = epochs_that_fit(config, variant, device, 60 * arguments.minutes, capture=capture)
    else:
        epochs = arguments.epochs
    warmup = min(config.schedule.warmup_epochs, epochs / 4)
    schedule = replace(config.schedule, epochs=epochs, warmup_epochs=warmup)
    lr = config.optim.lr
    config = replace(config, schedule=schedule)
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
    row |= {**figures, **circumstances("fashion_mnist", 1, arguments.set)}
    Table(arguments.output).add(row, curve)
    if not arguments.no_test:
        save_model(model, arguments.output, v2m={"task": "classification", "data": "fashion-mnist"})
    print(json.dumps(row, indent=2))
    return 0


def epochs_that_fit(config, variant, device, seconds: float, *, capture: bool) -> int:
    """From a quarter of an epoch and a validation, each the second time: the first compiles."""
    part, validation = (load(config, split, device) for split in ("train", "validation"))
    trainer = prepare(config, variant, part, device, capture=capture)
    whole = trainer.steps_per_epoch
    trainer.steps_per_epoch = max(1, whole // 4)
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(2):
        times = [time.perf_counter()]
        trainer.epoch(part, generator)
        times.append(time.perf_counter())
        trainer.accuracy(validation)
        times.append(time.perf_counter())
    training, evaluation = times[1] - times[0], times[2] - times[1]
    per_epoch = training * whole / trainer.steps_per_epoch + evaluation
    return max(1, int(0.97 * seconds / per_epoch))


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
    add("--variant", choices=BEST, default="hier_56")
    add(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="other settings than the recipe's"
    )
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
