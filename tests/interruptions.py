"""Ending a run where a test wants it."""

from __future__ import annotations

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
