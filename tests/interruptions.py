"""Ending a run where a test wants it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from v2m.engine import trainer as trainer_module


class Killed(BaseException):
    """Stands for a process that is gone."""


def kill() -> None:
    """Raise what nothing catches."""
    raise Killed


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Call `action`, which sends a signal or fails, after a step of the runs that follow."""
    original = trainer_module.train_epoch

    def train_epoch(loop: Any, batches: Any, *, reporter: Any, after_step: Any) -> None:
        def stop() -> None:
            if loop.state.step == step:
                action()
            after_step()

        original(loop, batches, reporter=reporter, after_step=stop)

    monkeypatch.setattr(trainer_module, "train_epoch", train_epoch)


def in_a_process(work: Callable[[], Any]) -> int:
    """Do `work` in a forked process; returns its exit code, -9 if it was killed.

    The imports are there already, so it takes what the work takes. What it raises counts as 1.
    """
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(timeout=300)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode


def kill_process() -> None:
    """SIGKILL, to oneself."""
    os.kill(os.getpid(), signal.SIGKILL)
