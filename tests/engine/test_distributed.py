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
import json, os, signal, sys
import torch
from safetensors.torch import save_file
import v2m.engine.loop as loop_module
import v2m.engine.trainer as trainer
from v2m.engine.config import TrainConfig, from_dict
from v2m.engine.sharding import whole

torch.set_num_threads(1)
trainer.write_report = lambda run: None
compile_model = torch.compile
torch.compile = lambda model, **keywords: compile_model(model, backend="aot_eager")
clip, seen = loop_module.nn.utils.get_total_norm, []

def keep_first_gradients(gradients):
    if not seen:
        seen.append({str(i): whole(g).contiguous() for i, g in enumerate(gradients)})
        if os.environ.get("RANK", "0") == "0" and not os.path.exists(sys.argv[2] + ".gradients"):
            save_file(seen[0], sys.argv[2] + ".gradients")
    return clip(gradients)

loop_module.nn.utils.get_total_norm = keep_first_gradients
make_step = loop_module.optimiser_step

def stop_after_step(loop, group):
    make_step(loop, group)
    if str(loop.state.step) == os.environ.get("STOP_STEP"):
        signal.raise_signal(signal.SIGTERM)

loop_module.optimiser_step = stop_after_step
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


def start(
    script: Path, config: TrainConfig, output: Path, ranks: int, **environment: str
) -> subprocess.Popen[str]:
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(launcher if ranks > 1 else []), str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "V2M_BACKEND": "eager", **environment}
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


def assert_same_training(one: Path, other: Path) -> None:
    """The gradients of the first step to 1e-6, the curve, and the weights."""
    first, second = (load_file(f"{run}.gradients") for run in (one, other))
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        error = (gradient - second[name]).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 1e-6, (name, error)
    assert curve(one) == pytest.approx(curve(other), rel=1e-5)
    weights, others = (load_file(run / "model.safetensors") for run in (one, other))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert torch.allclose(value, others[name], rtol=1e-4, atol=1e-6), name
    kept, kept_too = (RunDirectory(run).store.newest(pytest.fail) for run in (one, other))
    state, state_too = (load_file(k / "training_state.safetensors") for k in (kept, kept_too))
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in state_too.items()}


WAYS = {
    "ddp": ["optim.accumulation=2"],
    "fsdp": ["run.parallel=fsdp", "optim.accumulation=2", "run.grad_checkpointing=true"],
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone") / "one"


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_as_one(tmp_path: Path, alone: Path, plain: TrainConfig, way: str) -> None:
    two = tmp_path / "two"
    processes = [start(tmp_path / "two.py", apply_overrides(plain, WAYS[way]), two, 2)]
    if not alone.exists():
        processes.append(start(tmp_path / "one.py", plain, alone, 1))
    for process in processes:
        finish(process)
    assert_same_training(alone, two)
    assert [r["kind"] for r in RunDirectory(two).records()] == ["epoch", "epoch", "test"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("way", ["run.parallel=ddp", "run.parallel=fsdp", "run.cuda_graph=true"])
def test_two_gpus_train_as_one(tmp_path: Path, plain: TrainConfig, way: str) -> None:
    config = apply_overrides(plain, ["run.device=cuda", "run.precision=float32", way])
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(tmp_path / "one.py", config, one, 1))
    finish(start(tmp_path / "two.py", config, two, 2))
    assert_same_training(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_everything_that_saves_time_and_memory_together(
    tmp_path: Path, plain: TrainConfig, parallel: str
) -> None:
    together = ["run.compile=true", "run.precision=bfloat16", "run.grad_checkpointing=true"]
    together += ["optim.accumulation=2", f"run.parallel={parallel}", "schedule.epochs=1"]
    one = start(tmp_path / "1.py", apply_overrides(plain, ["schedule.epochs=1"]), tmp_path / "a", 1)
    two = start(tmp_path / "2.py", apply_overrides(plain, together), tmp_path / "b", 2)
    finish(one)
    finish(two)
    assert curve(tmp_path / "a") == pytest.approx(curve(tmp_path / "b"), rel=0.03)


@pytest.mark.parametrize(("ranks_before", "ranks_after"), [(2, 1), (1, 2)])
def test_shards_become_whole_and_whole_becomes_shards(
    tmp_path: Path, alone: Path, plain: TrainConfig, ranks_before: int, ranks_after: int
) -> None:
    run, config = tmp_path / "run", apply_overrides(plain, ["run.parallel=fsdp"])
    if not alone.exists():
        finish(start(tmp_path / "one.py", plain, alone, 1))
    stopped = start(tmp_path / "run.py", config, run, ranks_before, STOP_STEP="7")
    stopped.communicate(timeout=240)
    assert stopped.returncode == (143 if ranks_before == 1 else 1)
    assert RunDirectory(run).store.newest(pytest.fail).name == "step-00000007"
    finish(start(tmp_path / "run.py", config, run, ranks_after))
    assert_same_training(alone, run)


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
