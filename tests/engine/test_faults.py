"""What a run survives: killed again and again, killed in its saves, a rank with a bad gradient.

Each case starts real processes, so the long ones are marked slow: `pytest -m slow tests/engine`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from v2m.engine.config import TrainConfig, apply_overrides, to_dict
from v2m.engine.rundir import RunDirectory

TIMES = ("seconds", "images_per_second", "machine", "peak_memory_gib")

SCRIPT = """
import json, os, sys
import torch
import v2m.engine.trainer as trainer
from v2m.engine.config import TrainConfig, from_dict
from v2m.errors import NonFiniteLossError

torch.set_num_threads(1)
trainer.write_report = lambda run: None
train_epoch = trainer.train_epoch
spoil = int(os.environ.get("SPOIL_STEP", "-1"))

def spoiled(loop, batches, **keywords):
    def nan(_module, _inputs, output):
        if loop.state.step == spoil and loop.ranks.rank == 1:
            return output * float("nan")
    loop.state.model.head.register_forward_hook(nan)
    train_epoch(loop, batches, **keywords)

trainer.train_epoch = spoiled
config = from_dict(TrainConfig, json.loads(sys.argv[1]))
print("started", flush=True)
try:
    trainer.train(config, sys.argv[2], resume=True)
except NonFiniteLossError as error:
    print("rank", os.environ.get("RANK", "0"), error, flush=True)
    sys.exit(3)
"""


def start(
    config: TrainConfig, output: Path, *, ranks: int = 1, **environment: str
) -> subprocess.Popen[str]:
    """A training process, or two under torchrun."""
    script = output.with_suffix(".py")
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [
            *(sys.executable, *(launcher if ranks > 1 else ()), str(script)),
            *(json.dumps(to_dict(config)), str(output)),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "V2M_BACKEND": "eager", **environment},
    )


def comparable(run: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in record.items() if k not in TIMES}
        for record in RunDirectory(run).records()
    ]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_killed_fifty_times(tmp_path: Path, config: TrainConfig) -> None:
    long = apply_overrides(config, ["schedule.epochs=150"])
    generator = random.Random(0)
    run, kills, resumed = tmp_path / "run", 0, 0
    while kills < 50:
        process = start(long, run)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(generator.uniform(0.0, 0.8))
        assert process.poll() is None, "too short a run to kill it fifty times"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if (run / "train_config.json").exists():
            resumed += RunDirectory(run).store.newest(pytest.fail) is not None
    assert start(long, run).wait(timeout=300) == 0
    assert start(long, tmp_path / "whole").wait(timeout=300) == 0
    assert comparable(run) == comparable(tmp_path / "whole")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("run", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert resumed >= 25, f"only {resumed} of {kills} kills came after a checkpoint"


@pytest.mark.slow
def test_a_rank_with_a_bad_gradient_stops_all(tmp_path: Path, config: TrainConfig) -> None:
    for case, step in enumerate((0, 3, 7)):
        run = tmp_path / f"run{case}"
        process = start(config, run, ranks=2, SPOIL_STEP=str(step))
        output, _ = process.communicate(timeout=120)
        assert process.returncode != 0
        for rank in (0, 1):
            message = next(x for x in output.splitlines() if x.startswith(f"rank {rank} "))
            assert f"not finite at step {step} " in message
        kept = load_file(run / "non_finite" / "training_state.safetensors")
        assert all(value.isfinite().all() for key, value in kept.items() if "model/" in key)
