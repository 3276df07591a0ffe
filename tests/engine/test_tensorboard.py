"""The log for TensorBoard has the figures of metrics.jsonl, also after a resumption."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from interruptions import Killed, kill, stop_at
from v2m.engine import trainer as trainer_module
from v2m.engine.config import TrainConfig, apply_overrides
from v2m.engine.rundir import RunDirectory
from v2m.engine.trainer import train
from v2m.errors import InputError


def test_the_figures_of_each_epoch_are_logged_once(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "write_report", lambda run: None)
    logged = apply_overrides(config, ["run.tensorboard=true"])
    with monkeypatch.context() as patch:
        stop_at(patch, 12, kill)
        with pytest.raises(Killed):
            train(logged, tmp_path / "run")
    train(logged, tmp_path / "run", resume=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    records = [r for r in RunDirectory(tmp_path / "run").records() if r["kind"] == "epoch"]
    tags = {"train/loss", "validation/top1", "run/lr", "run/gradient_norm", "run/peak_memory_gib"}
    assert tags <= set(events.Tags()["scalars"])
    points = events.Scalars("train/loss")
    assert [point.step for point in points] == [5, 10, 15]
    assert [p.value for p in points] == pytest.approx([r["train_loss"] for r in records], rel=1e-6)


def test_without_the_package_it_says_what_to_install(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    logged = apply_overrides(config, ["run.tensorboard=true"])
    with pytest.raises(
        InputError, match=r"needs the package tensorboard: pip install 'v2m\[logs\]"
    ):
        train(logged, tmp_path / "run")
