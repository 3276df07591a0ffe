"""Several ranks on one CPU: the same training as one, the same files, the same way to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from interruptions import Killed, kill, stop_at
from v2m.engine.config import TrainConfig, apply_overrides, to_dict
from v2m.engine.distributed import Ranks, choose_device
from v2m.engine.rundir import RunDirectory
from v2m.engine.session import micro_batch_size
from v2m.engine.trainer import train
from v2m.errors import InputError

SCRIPT = """
import json, sys
import torch
import v2m.engine.trainer as trainer
from v2m.engine.config import TrainConfig, from_dict
torch.set_num_threads(1)
trainer.write_report = lambda run: None
config = from_dict(TrainConfig, json.loads(sys.argv[1]))
trainer.train(config, sys.argv[2], resume=True)
"""


@pytest.fixture
def plain(config: TrainConfig) -> TrainConfig:
    """Nothing is random but order, crops and flips, which the loader draws for each image by
    itself."""
    return apply_overrides(
        config,
        [
            "mix.mixup=0",
            "mix.cutmix=0",
            "model.drop_path_rate=0",
            "model.kwargs.drop_rate=0",
            "schedule.epochs=2",
        ],
    )


def start(script: Path, config: TrainConfig, output: Path, ranks: int) -> subprocess.Popen[str]:
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(launcher if ranks > 1 else []), str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "V2M_BACKEND": "eager"}
    return subprocess.Popen(
        [*command, json.dumps(to_dict(config)), str(output)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors


def curve(run: Path) -> list[float]:
    records = RunDirectory(run).records()
    keys = ("train_loss", "train_accuracy", "gradient_norm", "validation_loss", "loss", "top1")
    return [record[key] for record in records for key in keys if key in record]


def test_two_ranks_train_as_one(tmp_path: Path, plain: TrainConfig) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    processes = [start(tmp_path / f"{n}.py", plain, run, n) for n, run in enumerate(runs, 1)]
    for process in processes:
        finish(process)
    assert curve(runs[0]) == pytest.approx(curve(runs[1]), rel=1e-5)
    one, two = (load_file(run / "model.safetensors") for run in runs)
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=1e-4, atol=1e-6), name
    assert [r["kind"] for r in RunDirectory(runs[1]).records()] == ["epoch", "epoch", "test"]


def test_terminated_on_two_ranks_and_resumed_on_one(
    tmp_path: Path, plain: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = apply_overrides(plain, ["schedule.epochs=400"])
    run = tmp_path / "run"
    process = start(tmp_path / "two.py", long, run, 2)
    deadline = time.monotonic() + 120
    while not RunDirectory(run).records() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on to both
    process.communicate(timeout=60)
    assert process.returncode != 0
    store = RunDirectory(run).store
    newest = store.newest(pytest.fail)
    assert newest is not None
    step = int(newest.name.removeprefix("step-"))
    position = json.loads((newest / "training_state.json").read_text())["position"]
    assert position["step"] == step
    assert position["meter"]["images"] == position["meter"]["steps"] * 8

    last = step + 10
    for folder in (run, tmp_path / "whole"):
        with monkeypatch.context() as patch:
            stop_at(patch, last, kill)
            with pytest.raises(Killed):
                train(long, folder, resume=True)
    resumed, whole = (RunDirectory(folder).records() for folder in (run, tmp_path / "whole"))
    assert len(resumed) == len(whole) > step // 5
    for record, other in zip(resumed, whole):
        for key in ("train_loss", "validation_loss", "gradient_norm"):
            assert record[key] == pytest.approx(other[key], rel=1e-3), (record["epoch"], key)


def test_the_batch_does_not_depend_on_the_ranks(plain: TrainConfig) -> None:
    accumulating = apply_overrides(plain, ["optim.accumulation=2"])
    assert micro_batch_size(plain, Ranks()) == 8
    assert micro_batch_size(plain, Ranks(world=4)) == 2
    assert micro_batch_size(accumulating, Ranks(world=4)) == 1
    with pytest.raises(InputError, match=r"data\.batch_size = 8 cannot be split evenly over 3"):
        micro_batch_size(plain, Ranks(world=3))


def test_devices() -> None:
    assert choose_device("cpu", Ranks()).type == "cpu"
    assert choose_device("auto", Ranks()).type in ("cpu", "cuda", "mps")
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(InputError, match=rf"device '{absent}' is not available .*cpu"):
        choose_device(absent, Ranks())
