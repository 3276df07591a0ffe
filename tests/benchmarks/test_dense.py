"""The benchmark of dense tasks from its command to its table, on made-up pictures."""

import csv
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from shapes import write_classes, write_coco

ROOT = Path(__file__).parents[2]


def run(*words) -> str:
    command = [sys.executable, "-m", "benchmarks.dense", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_from_the_command_to_the_table(tmp_path):
    write_coco(tmp_path / "data" / "trees", 9, splits=("train", "val", "test"))
    splits = ("training", "validation", "testing")
    write_classes(tmp_path / "data" / "textures", 8, splits=splits)
    names = ("trees-v2m", "textures-v2m", "textures-resnet")
    words = ["train", "--data", tmp_path / "data", "--output", tmp_path / "runs"]
    words += ["--scale", "small", "--device", "cpu", "--jobs", 2, "--only", *names]
    text = run(*words, "--epochs", "trees=1", "textures=2")
    assert all(f"{name}: finished" in text for name in names)
    again = run(*words, "--epochs", "trees=1", "textures=2")
    assert again.count("finished") == 3
    assert "finished already" in (tmp_path / "runs" / "trees-v2m.log").read_text()
    run("collect", "--output", tmp_path / "runs", "--to", tmp_path / "table")
    with open(tmp_path / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["data"], row["backbone"]) for row in rows] == [
        ("trees", "v2m_hier_small_224"),
        ("textures", "v2m_hier_small_224"),
        ("textures", "resnet18"),
    ]
    record = json.loads((tmp_path / "runs/textures-v2m/metrics.jsonl").read_text().splitlines()[-1])
    assert float(rows[1]["value"]) == pytest.approx(record["miou"], rel=1e-3)
    assert [row["steps"] for row in rows] == ["2", "4", "4"]
    assert Image.open(tmp_path / "table_textures.png").width > 4 * 64
    with tarfile.open(tmp_path / "table_logs.tar.gz") as archive:
        assert "trees-v2m/report.html" in archive.getnames()


@pytest.mark.slow
def test_speed(tmp_path):
    words = ("--device", "cpu", "--size", 64, 96, "--repeats", 1)
    run("speed", "--csv", tmp_path / "speed.csv", *words)
    with open(tmp_path / "speed.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4
    assert all(float(row["ms"]) > 0 for row in rows)
