"""Ending a run where a test wants it, and comparing it with one that was not."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from v2m.engine import trainer as trainer_module
from v2m.engine.config import TrainConfig
from v2m.engine.rundir import RunDirectory

# How long things take is not the same twice.
TIMES = ("seconds", "images_per_second", "machine", "peak_memory_gib")


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


def assert_resumed_exactly(
    folder: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """A run that SIGTERM stops after a step and that is resumed, beside one that is not stopped."""
    train = trainer_module.train
    train(config, folder / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, step, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            train(config, folder / "run")
    train(config, folder / "run", resume=True)
    assert_same_run(folder / "run", folder / "whole")


def comparable(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMES} for x in lines]


def assert_same_run(one: Path, two: Path) -> None:
    """Bit for bit: every figure, the weights, and the state of the last checkpoint."""
    assert comparable(one) == comparable(two)
    newest = [RunDirectory(run).store.newest(pytest.fail) for run in (one, two)]
    pairs = [
        (a / "training_state.safetensors", b / "training_state.safetensors") for a, b in [newest]
    ]
    for pair in [*pairs, (one / "model.safetensors", two / "model.safetensors")]:
        a, b = map(load_file, pair)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key
