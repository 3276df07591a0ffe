"""What a run survives, with real processes and real signals: kill -9 at any step, SIGTERM, a rank
that is gone, a gradient that is not finite on one of them, a disk that is full.

The long ones are marked slow: `pytest -m slow tests/engine/test_faults.py`; their figures are in
docs/training.md.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from interruptions import in_a_process, kill_process, stop_at
from v2m.engine import loop as loop_module
from v2m.engine import trainer as trainer_module
from v2m.engine.config import TrainConfig, apply_overrides
from v2m.engine.rundir import RunDirectory
from v2m.engine.trainer import train
from v2m.errors import InputError, NonFiniteLossError

TIMES = ("seconds", "images_per_second", "machine", "peak_memory_gib")
OFTEN, NEVER = "run.checkpoint_minutes=1e-9", "run.checkpoint_minutes=none"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="SIGKILL and fork are POSIX")


def spoil_loss(loop: Any, kind: str) -> None:
    """A loss that is not finite from now on; "alone": the gradients, which the ranks share, are."""
    if kind == "gradient":
        loop.state.model.head.register_forward_hook(lambda *a: a[-1] * float("nan"))
        return
    original = loop.loss

    def loss(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        value, right = original(*arguments)
        return value + float("inf"), right

    loop.loss = loss


def rank_of_a_job(config: TrainConfig, run: Path, spoil: tuple[int, int, str]) -> None:
    """What each process of a job does; it notes its number, its steps, and how it ended."""
    rank, note = int(os.environ.get("RANK", "0")), Path(f"{run}.rank")
    make_step = loop_module.optimiser_step
    note.with_suffix(f".{rank}").write_text(str(os.getpid()))

    def optimiser_step(loop: Any, group: Any) -> None:
        if (loop.state.step, loop.ranks.rank) == spoil[:2]:
            spoil_loss(loop, spoil[2])
        make_step(loop, group)
        with open(f"{run}.steps.{rank}", "a") as file:
            file.write(f"{loop.state.step}\n")

    loop_module.optimiser_step = optimiser_step
    try:
        train(config, run, resume=True)
    except NonFiniteLossError as error:
        note.with_suffix(f".{rank}").write_text(str(error))
        sys.exit(3)
    except SystemExit as stop:
        note.with_suffix(f".{rank}").write_text(f"ends with {stop.code}")
        raise


def start(
    config: TrainConfig, run: Path, *, ranks: int = 1, spoil: tuple[int, int, str] = (-1, -1, "")
) -> BaseProcess:
    """A job in processes of its own: one, or several under torchrun's launcher. They are forked,
    which spares them the imports."""
    work = partial(rank_of_a_job, config, run, spoil)
    if ranks > 1:
        launch = LaunchConfig(
            *(1, 1, ranks),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id=run.name,
            start_method="fork",
            max_restarts=0,
            monitor_interval=0.1,
        )
        work = partial(elastic_launch(launch, rank_of_a_job), config, run, spoil)
    process = get_context("fork").Process(target=work)
    process.start()
    return process


def wait_for_steps(process: BaseProcess, run: Path, count: int) -> None:
    log, deadline = Path(f"{run}.steps.0"), time.monotonic() + 120
    while not log.exists() or len(log.read_text().split()) < count:
        assert process.is_alive(), "it ended before it was to be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "write_report", lambda run: None)


def comparable(run: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in record.items() if k not in TIMES}
        for record in RunDirectory(run).records()
    ]


def assert_same_run(one: Path, two: Path) -> None:
    assert comparable(one) == comparable(two)
    weights, others = (load_file(run / "model.safetensors") for run in (one, two))
    assert weights.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference") / "run"


@pytest.fixture
def whole(reference: Path, config: TrainConfig) -> Path:
    """The run that nothing happened to."""
    if not reference.exists():
        train(config, reference)
    return reference


def killed(config: TrainConfig, run: Path, step: int) -> int:
    """The exit code of a run in a process of its own that kills itself after a step."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step, kill_process)
        return in_a_process(lambda: train(config, run, resume=True))


# T1


def kill_and_resume(config: TrainConfig, run: Path, steps: list[int], frequency: str) -> None:
    config = apply_overrides(config, [frequency])
    for step in steps:
        assert killed(config, run, step) == -signal.SIGKILL
    assert in_a_process(lambda: train(config, run, resume=True)) == 0


@pytest.mark.parametrize(("steps", "frequency"), [([3], OFTEN), ([7, 13], NEVER)])
def test_killed_and_resumed_ends_the_same(
    tmp_path: Path, whole: Path, config: TrainConfig, steps: list[int], frequency: str
) -> None:
    kill_and_resume(config, tmp_path / "run", steps, frequency)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("case", range(50))
def test_killed_at_a_random_step(
    tmp_path: Path, whole: Path, config: TrainConfig, case: int
) -> None:
    generator = random.Random(case)
    steps = sorted(generator.sample(range(1, 15), generator.choice([1, 1, 2, 3])))
    kill_and_resume(config, tmp_path / "run", steps, generator.choice([OFTEN, NEVER]))
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_killed_fifty_times_at_any_moment(tmp_path: Path, config: TrainConfig) -> None:
    long = apply_overrides(config, ["schedule.epochs=150"])
    generator = random.Random(0)
    run, kills, resumed = tmp_path / "run", 0, 0
    while kills < 50:
        process = start(long, run)
        time.sleep(generator.uniform(0.0, 0.8))
        assert process.is_alive(), "too short a run to kill it fifty times"
        process.kill()
        process.join()
        kills += 1
        if (run / "train_config.json").exists():
            resumed += RunDirectory(run).store.newest(pytest.fail) is not None
    for name in ("run", "whole"):
        assert in_a_process(partial(train, long, tmp_path / name, resume=True)) == 0
    assert_same_run(run, tmp_path / "whole")
    assert resumed >= 25, f"only {resumed} of {kills} kills came after a checkpoint"


# T3


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", range(10))
def test_terminated_in_time_with_everything_saved(
    tmp_path: Path, config: TrainConfig, ranks: int, case: int
) -> None:
    run = tmp_path / "run"
    long = apply_overrides(config, ["schedule.epochs=4000", "data.workers=1"])
    process = start(long, run, ranks=ranks)
    wait_for_steps(process, run, random.Random(case).randrange(1, 60))
    os.kill(process.pid, signal.SIGTERM)
    began = time.monotonic()
    process.join(timeout=30)
    print(f"ended after {time.monotonic() - began:.1f} s")
    assert process.exitcode == (143 if ranks == 1 else 1)
    for rank in range(ranks):
        assert Path(f"{run}.{rank}").read_text() == "ends with 143"
        last = Path(f"{run}.steps.{rank}").read_text().split()[-1]
        newest = RunDirectory(run).store.newest(pytest.fail)
        assert newest.name == f"step-{int(last):08d}"


# T4


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root mounts a small disk"
)
@pytest.mark.parametrize("case", range(20))
def test_a_real_disk_that_is_full(
    tmp_path: Path, whole: Path, config: TrainConfig, case: int
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    one = sum(p.stat().st_size for p in (whole / "checkpoints").glob("step-00000005/*"))
    pages = 3 + int(one * random.Random(case).uniform(0.3, 2.9)) // 4096
    mount = ["mount", "-t", "tmpfs", "-o", f"size={4096 * pages}", "none", str(disk)]
    subprocess.run(mount, check=True)
    try:
        with pytest.raises(InputError, match=r"cannot be written.*No space left"):
            train(config, disk / "run")
        for folder in RunDirectory(disk / "run").store.folders():
            assert RunDirectory(disk / "run").store.newest(pytest.fail) >= folder
        grow = ["mount", "-o", "remount,size=64m", str(disk)]
        subprocess.run(grow, check=True)
        train(config, disk / "run", resume=True)
        assert_same_run(disk / "run", whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# T6


def assert_all_ranks_stop(
    config: TrainConfig, run: Path, step: int, rank: int, kind: str = "gradient"
) -> None:
    process = start(config, run, ranks=2, spoil=(step, rank, kind))
    process.join(timeout=60)
    process.terminate()
    assert process.exitcode == 1
    for each in (0, 1):
        assert f"not finite at step {step} " in Path(f"{run}.{each}").read_text()
    kept = load_file(run / "non_finite" / "training_state.safetensors")
    assert all(value.isfinite().all() for key, value in kept.items() if "model/" in key)


@pytest.mark.slow
@pytest.mark.parametrize("case", range(20))
def test_a_rank_with_a_bad_gradient_stops_all(
    tmp_path: Path, config: TrainConfig, case: int
) -> None:
    generator = random.Random(case)
    config = apply_overrides(config, [f"run.parallel={generator.choice(['ddp', 'fsdp'])}"])
    assert_all_ranks_stop(config, tmp_path / "run", generator.randrange(14), case % 2)


@pytest.mark.parametrize("kind", ["gradient", "alone"])
def test_a_bad_loss_on_the_other_rank_stops_both(
    tmp_path: Path, config: TrainConfig, kind: str
) -> None:
    quick = apply_overrides(config, ["run.timeout_minutes=0.2"])
    assert_all_ranks_stop(quick, tmp_path / "run", step=3, rank=1, kind=kind)


# T7


def note_images(run: Path) -> Callable[[], None]:
    """Let the steps of this process write down which images they saw."""
    original = loop_module.optimiser_step

    def optimiser_step(loop: Any, group: Any) -> None:
        names = [sha256(image.numpy().tobytes()).hexdigest() for x, _ in group for image in x]
        with open(f"{run}.images", "a") as file:
            file.write(json.dumps([loop.state.step, names]) + "\n")
        original(loop, group)

    loop_module.optimiser_step = optimiser_step
    return partial(setattr, loop_module, "optimiser_step", original)


def images_seen(run: Path) -> dict[int, list[str]]:
    """Of each step the images; where a step was made again, those of the last time."""
    return dict(map(json.loads, Path(f"{run}.images").read_text().splitlines()))


def assert_every_image_once(config: TrainConfig, folder: Path, workers: int, step: int) -> None:
    plain = apply_overrides(
        config,
        [
            *("augment.crop=center", "augment.crop_pct=1", "augment.horizontal_flip=0"),
            *("augment.auto_augment=none", "augment.random_erasing=0", "augment.color_jitter=0"),
            *("mix.mixup=0", "mix.cutmix=0", "schedule.epochs=2", f"data.workers={workers}"),
            OFTEN,
        ],
    )
    for name in ("run", "whole"):
        undo = note_images(folder / name)
        try:
            if name == "run":
                assert killed(plain, folder / name, step) == -signal.SIGKILL
            assert in_a_process(partial(train, plain, folder / name, resume=True)) == 0
        finally:
            undo()
    run, whole = images_seen(folder / "run"), images_seen(folder / "whole")
    assert run == whole
    lines = Path(f"{folder / 'run'}.images").read_text().splitlines()
    assert len(lines) == 11, "one step was made twice: the one that was killed"
    for epoch in (range(5), range(5, 10)):
        names = [name for s in epoch for name in run[s]]
        assert len(names) == len(set(names)) == 40


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_is_seen_once(tmp_path: Path, config: TrainConfig, workers: int) -> None:
    assert_every_image_once(config, tmp_path, workers, step=8)


@pytest.mark.slow
@pytest.mark.parametrize("workers", range(5))
@pytest.mark.parametrize("step", [2, 4, 7, 9])
def test_every_image_is_seen_once_killed_anywhere(
    tmp_path: Path, config: TrainConfig, workers: int, step: int
) -> None:
    assert_every_image_once(config, tmp_path, workers, step)


# T9


def descendants(pid: int) -> set[int]:
    """The processes that a process started, and those that they started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # gone by now
            continue
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def alive(processes: set[int]) -> set[int]:
    """Those that run; one that nobody waited for is dead all the same."""
    states = {p: Path(f"/proc/{p}/stat") for p in processes if Path(f"/proc/{p}/stat").exists()}
    return {p for p, s in states.items() if s.read_text().rpartition(")")[2].split()[0] != "Z"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks into /proc")
@pytest.mark.parametrize("case", range(10))
def test_a_killed_rank_ends_the_job_and_leaves_no_orphan(
    tmp_path: Path, config: TrainConfig, case: int
) -> None:
    run, generator = tmp_path / "run", random.Random(case)
    long = apply_overrides(
        config,
        [
            *("schedule.epochs=4000", "data.workers=2", "run.timeout_minutes=0.5"),
            f"run.parallel={generator.choice(['ddp', 'fsdp'])}",
        ],
    )
    process = start(long, run, ranks=2)
    wait_for_steps(process, run, generator.randrange(1, 40))
    family = descendants(process.pid)
    assert len(family) >= 6, "two ranks with two loader processes each"
    os.kill(int(Path(f"{run}.{case % 2}").read_text()), signal.SIGKILL)
    began = time.monotonic()
    process.join(timeout=60)
    ended = time.monotonic() - began
    assert process.exitcode == 1
    while alive(family) and time.monotonic() - began < 60:
        time.sleep(0.1)  # loader processes look after their parent every few seconds
    print(f"the job ended after {ended:.1f} s, the last process {time.monotonic() - began:.1f} s")
    assert not alive(family)
    RunDirectory(run).store.newest(pytest.fail)  # which a damaged checkpoint calls
