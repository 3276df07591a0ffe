"""The log and the folder of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from v2m.engine.config import TrainConfig, apply_overrides
from v2m.engine.rundir import RunDirectory
from v2m.errors import InputError


def epoch(number: int) -> dict[str, object]:
    return {"kind": "epoch", "epoch": number, "train_loss": 1 / number}


def test_the_log_survives_a_line_cut_off(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for number in (1, 2, 3):
        run.append(epoch(number))
    with open(run.metrics, "a") as file:
        file.write('{"kind": "epoch", "epo')
    assert [r["epoch"] for r in run.records()] == [1, 2, 3]
    run.forget_after(2)
    run.append(epoch(3))
    assert run.records() == [epoch(1), epoch(2), epoch(3)]
    assert run.metrics.read_text().count("\n") == 3


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "epoch"}\nnonsense\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be read"):
        RunDirectory(tmp_path).records()


def test_an_unfinished_test_is_forgotten_on_resumption(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.finished() is None
    run.append(epoch(1))
    run.append({"kind": "test", "top1": 0.5})
    assert run.finished() == {"kind": "test", "top1": 0.5}
    run.forget_after(0)
    assert run.records() == []


def test_what_may_differ_on_resumption(tmp_path: Path, config: TrainConfig) -> None:
    run = RunDirectory(tmp_path / "run")
    assert run.check(config, resume=True, overwrite=False) is False
    run.begin(config)
    assert run.config() == config
    allowed = ["data.workers=3", "run.device=auto", "run.precision=bfloat16", "run.compile=true"]
    assert run.check(apply_overrides(config, allowed), resume=True, overwrite=False)
    for changed in ("schedule.epochs=9", "run.seed=7", "data.batch_size=4", "mix.mixup=0"):
        with pytest.raises(InputError, match=changed.partition("=")[0].replace(".", r"\.")):
            run.check(apply_overrides(config, [changed]), resume=True, overwrite=False)


def test_a_folder_that_cannot_be_made(tmp_path: Path, config: TrainConfig) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        RunDirectory(tmp_path / "file" / "run").begin(config)


def test_a_warm_up_as_long_as_the_run_is_allowed(config: TrainConfig) -> None:
    assert apply_overrides(config, ["schedule.epochs=1", "schedule.warmup_epochs=1"])
    with pytest.raises(InputError, match=r"schedule\.warmup_epochs = 2\.0 is longer than"):
        apply_overrides(config, ["schedule.epochs=1", "schedule.warmup_epochs=2"])
