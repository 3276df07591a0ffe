"""Train the runs side by side, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time

import torch

from .probes import FOLDER, probe_alone, probe_together
from .recipe import EPOCHS, config

REST = 1.35  # time of a run over that of its training steps: validation, checkpoints, the report
PATIENCE = 1.35  # of the planned time: then what still runs is told to stop


def train(args: argparse.Namespace) -> None:
    """Train the runs of `args.only`, at most `args.jobs` at a time; finished ones stay."""
    args.output.mkdir(parents=True, exist_ok=True)
    epochs = _chosen(args)
    deadline = None
    if args.seconds:
        probe_alone(args)
        epochs |= _fitting(args)
        deadline = time.monotonic() + PATIENCE * args.seconds
    print("epochs:", epochs, flush=True)
    _run_all(args, args.jobs, epochs, deadline)


def _run_all(
    args: argparse.Namespace,
    jobs: int,
    epochs: dict[str, int],
    deadline: float | None = None,
    extra: tuple[str, ...] = (),
) -> None:
    """Run `one` for each of `args.only`; after the deadline, tell what still runs to stop."""
    waiting, running = list(args.only), {}
    stopped = False
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            running[name] = _start(args, name, epochs, extra)
        for name in [name for name, process in running.items() if process.poll() is not None]:
            code = running.pop(name).returncode
            print(f"{name}: {'finished' if code == 0 else f'exit code {code}'}", flush=True)
        if deadline is not None and not stopped and time.monotonic() > deadline:
            print("the time is over; stopping", *running, flush=True)
            stopped, waiting = True, []
            for process in running.values():
                process.terminate()  # which stores a checkpoint
        time.sleep(0.2)


def _chosen(args: argparse.Namespace) -> dict[str, int]:
    given = dict(pair.split("=") for pair in args.epochs)
    return {**EPOCHS[args.scale], **{name: int(number) for name, number in given.items()}}


def _start(
    args: argparse.Namespace, name: str, epochs: dict[str, int], extra: tuple[str, ...]
) -> subprocess.Popen:
    words = ["--data", args.data, "--output", args.output, "--scale", args.scale]
    words += ["--device", args.device, "--only", name, *extra]
    words += ["--epochs", *(f"{key}={value}" for key, value in epochs.items())]
    with open(args.output / f"{name}.log", "w") as log:
        command = [sys.executable, "-m", "benchmarks.dense", "one", *map(str, words)]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def one(args: argparse.Namespace) -> None:
    """Train a single run here, or time its steps beside others."""
    if args.device == "cpu":
        torch.set_num_threads(1)
    if args.probe:
        probe_together(args, args.probe)
        return
    from rich.console import Console

    from v2m.engine.trainer import train as train_run

    (name,) = args.only
    data, model = name.split("-")
    wanted = config(data, model, args.scale, args.data, _chosen(args)[data], args.device)
    train_run(wanted, args.output / name, resume=True, console=Console(width=150))


def _fitting(args: argparse.Namespace) -> dict[str, int]:
    """Epochs of each data set, the same for its models, that take `args.seconds` side by side."""
    folder = args.output / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    count = len(args.only)
    _run_all(args, count, _chosen(args), extra=("--probe", str(count)))
    fitting: dict[str, int] = {}
    for name in args.only:
        path = folder / f"{name}.json"
        if not path.is_file():
            raise SystemExit(f"{name} could not be timed; see {args.output / name}.log")
        figures = json.loads(path.read_text())
        print(name, "beside the others:", figures, flush=True)
        fits = max(1, int(args.seconds / (REST * figures["epoch_seconds"])))
        data = name.split("-")[0]
        fitting[data] = min(fits, fitting.get(data, fits))
    waves = -(-count // args.jobs)
    return {data: max(1, number // waves) for data, number in fitting.items()}
