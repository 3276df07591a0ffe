"""Detection and segmentation on two ranks: each image counts once, and the figures are of all."""

import json
import os
import subprocess
import sys

import pytest

from shapes import write_classes, write_coco
from v2m.engine.rundir import DETECTIONS, RunDirectory
from v2m.evaluation.dense_run import evaluate_dense

SETTINGS = {
    "detect": [
        *("min_sizes=64", "max_size=64", "pyramid_channels=8", "box_channels=8"),
        *("mask_channels=8", "regions=32", "score_threshold=0"),
    ],
    "segment": ["crop=32,32", "channels=8", "auxiliary_channels=8", "short_side=none"],
}


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_two_ranks(task, tmp_path):
    write = write_coco if task == "detect" else write_classes
    data, run = write(tmp_path / "data", 5), tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "v2m", "train", "v2m_hier_small_224", "--task", task, "--device", "cpu"]
    command += ["--data", str(data), "--output", str(run)]
    settings = [f"{task}.{text}" for text in SETTINGS[task]]
    settings += ['model.kwargs={"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}']
    settings += ["data.batch_size=4", "data.workers=0"]
    settings += ["schedule.epochs=2", "schedule.warmup_epochs=0"]
    command += [word for text in settings for word in ("--set", text)]
    environment = {**os.environ, "V2M_BACKEND": "eager", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = RunDirectory(run).records()
    assert [record["kind"] for record in records] == ["epoch", "epoch", "test"]
    assert records[-1]["images"] == 5  # three on one rank, two on the other
    assert (run / "report.html").is_file()
    alone = evaluate_dense(run, str(data), device="cpu", workers=0)
    if task == "detect":
        assert {row["image_id"] for row in json.loads((run / DETECTIONS).read_text())} == set(
            range(1, 6)
        )
    for key, value in alone.items():
        if key.startswith(("box_", "mask_")) or key in ("miou", "loss", "pixel_accuracy"):
            assert records[-1][key] == pytest.approx(value, abs=1e-6), key
