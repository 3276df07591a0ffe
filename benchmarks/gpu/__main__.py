"""Everything that has to be measured on a GPU, in stages: correctness, kernels, mixers, models.

    python -m benchmarks.gpu all --output DIR
    python -m benchmarks.gpu kernels scan --output DIR
    python -m benchmarks.gpu all --output DIR --device cpu     # tiny sizes: does everything run?

Stages, in order, and the most seconds each may take:
{stages}
Each runs in a process of its own, so that none can stop the next, and adds rows to DIR/STAGE.csv as
it goes: run again, it goes on with what is missing or failed. With several stages, everything is
first run once without timing, side by side with the tests, so that all is compiled when the clock
counts (--no-warm leaves that out; its logs are DIR/warm-*.log). Every workload checks the backend
it times against `eager` in float64. Ends with a summary, and with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STAGES = {  # name: (seconds, shards of its dry run; 0: no dry run)
    "tests": (240, 0),
    "kernels": (90, 2),
    "scan": (60, 1),
    "mixer": (45, 1),
    "training": (90, 4),
    "inference": (90, 4),
    "registered": (90, 2),
    "long": (90, 1),
    "large": (60, 0),
    "profile": (60, 0),
    "sanitizer": (120, 0),
}


def main() -> int:
    listing = "\n".join(f"    {name:<11}{limit:>4} s" for name, (limit, _) in STAGES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__.format(stages=listing),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="+", choices=("all", "once", "little", *STAGES))
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=560, help="for everything together (560)")
    parser.add_argument("--warm-seconds", type=float, default=170, help="of that, to compile (170)")
    parser.add_argument("--no-warm", action="store_true", help="do not compile ahead of the stages")
    parser.add_argument("--inside", action="store_true", help="run the one stage in this process")
    parser.add_argument("--dry", action="store_true", help="with --inside: time nothing")
    parser.add_argument("--shard", default="0/1", help="with --inside: i/n of the items")
    options = parser.parse_args()
    if options.inside or options.stages[0] in ("once", "little"):
        return inside(options)
    options.output.mkdir(parents=True, exist_ok=True)
    stages = list(STAGES) if "all" in options.stages else options.stages
    start, results = time.monotonic(), {}
    if len(stages) > 1 and not options.no_warm:
        results |= warm(stages, options)
    for stage in stages:
        if stage in results:
            continue
        left = options.seconds - (time.monotonic() - start)
        results[stage] = run(stage, options, min(STAGES[stage][0], left)) if left > 5 else "no time"
    print(f"\n{time.monotonic() - start:.0f} s in all")
    for stage, result in results.items():
        print(f"{stage:<12}{result}")
    return int(any(result != "done" for result in results.values()))


def command_of(stage: str, options, *more: str) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", stage, "--inside"]
    return [*command, "--output", str(options.output), "--device", options.device, *more]


def run(stage: str, options, limit: float) -> str:
    """One stage in a process of its own; what became of it."""
    print(f"\n== {stage}, at most {limit:.0f} s", flush=True)
    process = subprocess.Popen(command_of(stage, options), start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        stop(process)
        return f"stopped after {limit:.0f} s; what it measured is in {stage}.csv"
    return "done" if code == 0 else f"failed, exit status {code}; see {stage}.csv"


def stop(process: subprocess.Popen) -> None:
    """End a process and those it started: it leads a group of its own."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def warm(stages: list[str], options) -> dict[str, str]:
    """Compile what the stages need, all at once, and run the tests meanwhile."""
    print(f"== compiling ahead, at most {options.warm_seconds:.0f} s", flush=True)
    jobs = {"tests": command_of("tests", options)} if "tests" in stages else {}
    for stage in stages:
        shards = STAGES[stage][1]
        for i in range(shards):
            more = "--dry", "--shard", f"{i}/{shards}"
            jobs[f"{stage}-{i}"] = command_of(stage, options, *more)
    running = {}
    for name, command in jobs.items():
        log = (options.output / f"warm-{name}.log").open("w")
        few = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "4"}  # for each of many processes
        running[name] = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=few
        )
    end, found = time.monotonic() + options.warm_seconds, {}
    for name, process in running.items():
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            stop(process)
            print(f"{name} was still compiling", flush=True)
            continue
        if name == "tests":
            code = process.returncode
            found[name] = "done" if code == 0 else f"failed, exit status {code}; see tests.csv"
    return found


def inside(options) -> int:
    """Run one stage here."""
    import torch

    from . import checks, models, operators
    from .measure import Setting, Table, run_items

    setting = Setting(options.device, options.dry)
    (stage,) = options.stages
    torch.manual_seed(0)
    if stage in ("once", "little"):
        getattr(checks, stage)(setting)
        return 0
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    items = {
        "tests": lambda: checks.pytest_items(setting, folder, stage),
        "kernels": lambda: operators.kernel_items(setting),
        "scan": lambda: operators.scan_items(setting),
        "mixer": lambda: operators.mixer_items(setting),
        "training": lambda: models.training_items(setting),
        "inference": lambda: models.inference_items(setting),
        "registered": lambda: models.registered_items(setting),
        "long": lambda: checks.long_items(setting),
        "large": lambda: checks.pytest_items(setting, folder, stage),
        "profile": lambda: checks.profile_items(setting, folder),
        "sanitizer": lambda: checks.sanitizer_items(setting, folder),
    }[stage]()
    index, count = map(int, options.shard.split("/"))
    table = None if options.dry else Table(folder / f"{stage}.csv", setting)
    return int(run_items(items, table, (index, count)) > 0)


if __name__ == "__main__":
    sys.exit(main())
