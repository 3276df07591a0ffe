"""Train the runs side by side, each in a process of its own."""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from .recipe import EPOCHS, config

PROBES = "speed_alone.json"
OVERLAP = 2.0  # how much faster runs side by side on a GPU are taken to be than one after another
PATIENCE = 1.35  # of the planned time: then what still runs is told to stop
WARM, TIMED = 6, 12  # steps


def train(args: argparse.Namespace) -> None:
    """Train the runs of `args.only`, at most `args.jobs` at a time; finished ones stay."""
    args.output.mkdir(parents=True, exist_ok=True)
    epochs = _chosen(args)
    deadline = None
    if args.seconds:
        epochs |= _fitting(args, _probe(args))
        deadline = time.monotonic() + PATIENCE * args.seconds
    print("epochs:", epochs, flush=True)
    waiting, running = list(args.only), {}
    stopped = False
    while waiting or running:
        while waiting and len(running) < args.jobs and not stopped:
            name = waiting.pop(0)
            running[name] = _start(args, name, epochs)
        for name in [name for name, process in running.items() if process.poll() is not None]:
            code = running.pop(name).returncode
            print(f"{name}: {'finished' if code == 0 else f'exit code {code}'}", flush=True)
        if deadline is not None and not stopped and time.monotonic() > deadline:
            print("the time is over; stopping", *running, flush=True)
            stopped, waiting = True, []
            for process in running.values():
                process.terminate()  # which stores a checkpoint
        time.sleep(0.5)


def _chosen(args: argparse.Namespace) -> dict[str, int]:
    given = dict(pair.split("=") for pair in args.epochs)
    return {**EPOCHS[args.scale], **{name: int(number) for name, number in given.items()}}


def _start(args: argparse.Namespace, name: str, epochs: dict[str, int]) -> subprocess.Popen:
    words = ["--data", args.data, "--output", args.output, "--scale", args.scale]
    words += ["--device", args.device, "--only", name]
    words += ["--epochs", *(f"{key}={value}" for key, value in epochs.items())]
    with open(args.output / f"{name}.log", "w") as log:
        command = [sys.executable, "-m", "benchmarks.dense", "one", *map(str, words)]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def one(args: argparse.Namespace) -> None:
    """Train a single run here."""
    from rich.console import Console

    from v2m.engine.trainer import train as train_run

    if args.device == "cpu":
        torch.set_num_threads(1)
    (name,) = args.only
    data, model = name.split("-")
    wanted = config(data, model, args.scale, args.data, _chosen(args)[data], args.device)
    train_run(wanted, args.output / name, resume=True, console=Console(width=150))


def _probe(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Training images a second and memory of each run alone, in turn; kept for the table."""
    path = args.output / PROBES
    found = json.loads(path.read_text()) if path.is_file() else {}
    for name in args.only:
        if name not in found:
            found[name] = _alone(args, *name.split("-"))
            print(name, "alone:", found[name], flush=True)
            path.write_text(json.dumps(found))
    return found


def _alone(args: argparse.Namespace, data: str, model: str) -> dict[str, float]:
    from v2m.engine.distributed import Ranks
    from v2m.engine.loop import train_epoch
    from v2m.engine.progress import Reporter
    from v2m.engine.session import build_session

    wanted = config(data, model, args.scale, args.data, 2, args.device)
    wanted = replace(wanted, run=replace(wanted.run, limit_batches=WARM + TIMED))
    session = build_session(wanted, Ranks())
    cuda = session.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    ends: list[float] = []

    def after_step() -> None:
        if cuda:
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    session.train_loader.set_epoch(0)
    with Reporter() as reporter:
        train_epoch(session.loop, session.train_loader, reporter=reporter, after_step=after_step)
    times = [after - before for before, after in zip(ends[WARM - 1 :], ends[WARM:])]
    images, batch = len(session.train_set), wanted.data.batch_size
    figures = {
        "images_per_second": batch / median(times),
        "epoch_seconds": images // batch * median(times),
    }
    if cuda:
        figures["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    del session
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return figures


def _fitting(args: argparse.Namespace, alone: dict[str, dict[str, float]]) -> dict[str, int]:
    """Epochs of each data set, the same for its models, so that each gets an equal share."""
    datas = list(dict.fromkeys(name.split("-")[0] for name in args.only))
    share = args.seconds * (OVERLAP if args.jobs > 1 else 1.0) / len(datas)
    fitting = {}
    for data in datas:
        names = [name for name in args.only if name.startswith(f"{data}-")]
        epoch = sum(alone[name]["epoch_seconds"] for name in names)
        fitting[data] = max(2, int(share / (1.25 * epoch)))  # a fifth of it validates and stores
    return fitting


def read_probes(output: Path) -> dict[str, dict[str, float]]:
    """What `train --seconds` measured, or nothing."""
    path = output / PROBES
    return json.loads(path.read_text()) if path.is_file() else {}
