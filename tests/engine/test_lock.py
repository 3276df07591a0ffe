"""Two runs never write to one folder; what a dead one left does not stand in the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from v2m.engine import lock as lock_module
from v2m.engine.config import TrainConfig, apply_overrides
from v2m.engine.lock import LOCK, RunLock
from v2m.engine.trainer import train
from v2m.errors import InputError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="there are no POSIX locks")

HOLD = """
import runpy, sys, time
lock = runpy.run_path(sys.argv[2])["RunLock"](sys.argv[1])
lock.take()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path):
    """Another process that holds the folder's lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run"), lock_module.__file__],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path, other, config: TrainConfig) -> None:
    message = rf"run is in use by another run \(.*\"process\": {other.pid}.*another folder"
    for keywords in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match=message):
            train(config, tmp_path / "run", **keywords)
    assert [p.name for p in (tmp_path / "run").iterdir()] == [LOCK], "nothing was touched"


def test_the_lock_of_a_dead_run_is_taken_over(tmp_path: Path, other, config: TrainConfig) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "run" / LOCK).exists()
    short = apply_overrides(config, ["schedule.epochs=1", "run.limit_batches=1"])
    train(short, tmp_path / "run")
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_lock_is_not_inherited_by_children(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.take()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lock.release()
    again = RunLock(tmp_path)
    again.take()
    again.release()
    child.communicate(b"\n")


def test_a_released_lock_leaves_no_trace(tmp_path: Path) -> None:
    for folder in (tmp_path / "new", tmp_path):
        lock = RunLock(folder)
        lock.take()
        assert (folder / LOCK).exists()
        lock.release()
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_locked(tmp_path: Path, config: TrainConfig) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output .*run cannot be used: .*Not a directory"):
        train(config, tmp_path / "file" / "run")
