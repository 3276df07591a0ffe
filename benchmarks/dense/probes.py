"""How fast the runs train: each alone, and all side by side."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from .recipe import config

FILE, FOLDER = "speed_alone.json", "together"
WARM, TIMED = 6, 12  # steps
TOGETHER_SECONDS = 12.0  # that runs side by side are timed for
STARTED_SECONDS = 120.0  # after which they no longer wait for each other


def probe_alone(args: argparse.Namespace) -> None:
    """Images a second and memory of each run alone on the device, in turn; kept for the table."""
    path = args.output / FILE
    found = read_probes(args.output)
    for name in args.only:
        if name not in found:
            found[name] = _time(args, name, enough=lambda steps: steps >= TIMED)
            print(name, "alone:", found[name], flush=True)
            path.write_text(json.dumps(found))


def read_probes(output: Path) -> dict[str, dict[str, float]]:
    """What `probe_alone` measured, or nothing."""
    path = output / FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def probe_together(args: argparse.Namespace, runs: int) -> None:
    """In one of `runs` processes: wait for the others, then time steps while they make theirs."""
    (name,) = args.only
    folder = args.output / FOLDER
    end = None

    def wait() -> None:
        nonlocal end
        (folder / f"{name}.ready").touch()
        limit = time.monotonic() + STARTED_SECONDS
        while len(list(folder.glob("*.ready"))) < runs and time.monotonic() < limit:
            time.sleep(0.02)
        end = time.monotonic() + TOGETHER_SECONDS

    figures = _time(args, name, enough=lambda _steps: time.monotonic() > end, wait=wait)
    (folder / f"{name}.json").write_text(json.dumps(figures))


class _EnoughError(Exception):
    """Raised to leave the training loop."""


def _time(
    args: argparse.Namespace,
    name: str,
    *,
    enough: Callable[[int], bool],
    wait: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Median time of a step after the first ones, as figures."""
    from v2m.engine.distributed import Ranks
    from v2m.engine.loop import train_epoch
    from v2m.engine.progress import Reporter
    from v2m.engine.session import build_session

    wanted = config(*name.split("-"), args.scale, args.data, 2, args.device)
    session = build_session(replace(wanted, run=replace(wanted.run, seed=1)), Ranks())
    cuda = session.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    steps = 0

    def after_step() -> None:
        nonlocal steps
        if cuda:
            torch.cuda.synchronize()
        steps += 1
        if steps == WARM:
            wait()
        if steps >= WARM:
            times.append(time.perf_counter())
        if steps > WARM and enough(steps - WARM):
            raise _EnoughError

    session.train_loader.set_epoch(0)
    try:
        with Reporter() as reporter:
            train_epoch(
                session.loop, session.train_loader, reporter=reporter, after_step=after_step
            )
    except _EnoughError:
        pass
    if len(times) < 2:
        raise SystemExit(f"{name}: an epoch has too few steps to be timed")
    step = median(after - before for before, after in pairwise(times))
    images, batch = len(session.train_set), wanted.data.batch_size
    figures = {"images_per_second": batch / step, "epoch_seconds": images // batch * step}
    if cuda:
        figures["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    del session
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return figures
