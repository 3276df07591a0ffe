"""`v2m train` and `v2m evaluate` as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import v2m
from v2m.cli.main import COMMANDS, build_parser, main
from v2m.cli.train import configuration
from v2m.engine import classification

MODEL = ["v2m_nano_patch4_28", "--device", "cpu"]
SETTINGS = (
    *("model.img_size=8", "model.kwargs.embed_dim=8", "model.kwargs.depth=1"),
    *("model.kwargs.d_state=2", "data.batch_size=8", "data.workers=0", "augment.crop=center"),
    *("augment.auto_augment=none", "augment.crop_pct=1", "schedule.epochs=2"),
)
SET = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2M_BACKEND", "eager")
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 8x8 images, 20 for training and 6 for the test of each."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for name, level in (("dark", 40), ("light", 200)):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(level, level + 50, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A finished run."""
    output = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("V2M_BACKEND", "eager")
        assert main(["train", *MODEL, "--data", str(folder), "--output", str(output), *SET]) == 0
    return output


def test_the_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n    {name} " in text
        assert main([name, "--help"]) == 0
        assert f"usage: v2m {name}" in capsys.readouterr().out
    assert "exit codes" in text


def test_help_imports_no_command() -> None:
    code = "import sys; from v2m.cli.main import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    modules = set(done.stdout.splitlines()[-1].split())
    assert "v2m.cli.main" in modules
    assert not {f"v2m.cli.{name}" for name in COMMANDS} & modules
    assert not {"v2m.engine", "v2m.data", "matplotlib", "torchmetrics"} & modules


def test_version_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"v2m {v2m.__version__}\n"
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "invalid choice" in capsys.readouterr().err


def test_a_run_leaves_its_files(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("train_config.json", "metrics.jsonl", "checkpoints", "config.json", "model.safetensors"),
        *("test_predictions.npz", "report.html"),
    }
    report = (run / "report.html").read_text()
    assert report.startswith(("<!doctype html>", "<!DOCTYPE html>"))


def test_timm_reads_the_run(run: Path) -> None:
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(images), v2m.from_checkpoint(run)(images))


def test_progress_in_plain_lines(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", *MODEL, "--data", str(folder), "--output", str(tmp_path / "r"), *SET]
    assert main([*command, "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "on 36 images of" in lines[0]
    assert lines[1].startswith("epoch 1/2  train loss ")
    assert "images/s" in lines[1]
    assert " left" in lines[1]
    assert any(line.startswith("test accuracy ") for line in lines)
    assert lines[-1] == f"report: {tmp_path / 'r' / 'report.html'}"
    assert json.loads((tmp_path / "r" / "train_config.json").read_text())["run"]["seed"] == 3


def test_evaluate_agrees_with_training(
    run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), "--data", str(folder), "--json", "--workers", "0"]) == 0
    figures = json.loads(capsys.readouterr().out)
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for key in ("top1", "top5", "loss", "images"):
        assert figures[key] == pytest.approx(record[key], rel=1e-5), key
    assert [row["class"] for row in figures["classes"]] == ["dark", "light"]
    assert sum(map(sum, figures["confusion"])) == 12


def test_evaluate_prints_a_table(
    run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(run), "--data", str(folder), "--workers", "0"]
    assert main([*command, "--split", "validation", "--shuffle-patches"]) == 0
    text = capsys.readouterr().out
    assert "top-1" in text
    assert "patches shuffled" in text
    assert "dark" in text
    assert "light" in text


def test_evaluate_takes_the_last_checkpoint_of_an_unfinished_run(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.symlink(run / "checkpoints", tmp_path / "checkpoints")
    assert main(["evaluate", str(tmp_path), "--data", str(folder), "--workers", "0"]) == 0
    assert capsys.readouterr().out.count("not finished: taking") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--data", "fashion-mnist-small"], "the same, in the same order"),
        (["--data", "{folder}", "--batch-size", "0"], "--batch-size"),
        (["--data", "{folder}", "--workers", "-1"], "--workers"),
        (["--data", "{folder}", "--device", "tpu"], "tpu"),
    ],
)
def test_evaluate_refuses(
    run: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: str,
) -> None:
    words = [word.format(folder=folder) for word in arguments]
    assert main(["evaluate", str(run), *words]) == 2
    message = capsys.readouterr().err
    assert message.startswith("v2m: error: ")
    assert named in message


def test_evaluate_names_what_is_no_model(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tmp_path), "--data", str(folder)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_checkpoint_is_fine_tuned(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--recipe", "finetune", "--data", str(folder), "--device", "cpu"]
    small = ["--set", "data.batch_size=8", "--set", "data.workers=0", "--set", "schedule.epochs=3"]
    start = ["--set", f"model.checkpoint={run}", "--set", "schedule.warmup_epochs=0"]
    assert main([*command, *small, *start, "--output", str(tmp_path / "tuned")]) == 0
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert config["architecture"] == "v2m_nano_patch4_28"
    assert config["model_args"]["embed_dim"] == 8
    wrong = ["v2m_tiny_patch16_224", "--output", str(tmp_path / "other")]
    assert main([*command, *small, *start, *wrong]) == 2
    assert "holds a v2m_nano_patch4_28" in capsys.readouterr().err


def test_non_finite_loss_ends_with_3(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        classification.F, "cross_entropy", lambda x, *_, **__: x.sum() * float("nan")
    )
    command = ["train", *MODEL, "--data", str(folder), "--output", str(tmp_path / "r"), *SET]
    assert main(command) == 3
    message = capsys.readouterr().err
    assert message.startswith("v2m: error: the loss or its gradient is not finite at step 0")
    assert (tmp_path / "r" / "non_finite" / "batch.safetensors").exists()


def test_an_unreadable_image_is_named_or_skipped(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    for path in folder.rglob("*.png"):
        target = images / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    for path in (images / "train" / "dark").iterdir():
        path.write_bytes(b"not an image")
    command = ["train", *MODEL, "--data", str(images), *SET, "--output"]
    assert main([*command, str(tmp_path / "r")]) == 2
    assert ".png" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "s"), "--set", "data.on_error=skip"]) == 0
    assert "unreadable training images skipped" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "s"), "--data", str(images), "--split", "train"]) == 2
    assert "`--skip-bad` in evaluation" in capsys.readouterr().err


def test_one_class_alone_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        shutil.copytree(folder / split / "dark", tmp_path / "images" / split / "dark")
    command = ["train", *MODEL, "--data", str(tmp_path / "images"), *SET]
    assert main([*command, "--output", str(tmp_path / "r")]) == 2
    assert "images has the class 'dark' alone" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_evaluation_keeps_aside_what_the_run_kept_aside(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With other settings of the split, some of its images were trained on."""
    shutil.copytree(folder / "train", tmp_path / "images")
    output, data = str(tmp_path / "r"), ["--data", str(tmp_path / "images")]
    split = ["--set", "data.split_seed=5", "--set", "data.validation_fraction=0.3"]
    assert main(["train", *MODEL, *data, "--output", output, *SET, *split]) == 0
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").open()]
    for name, expected in (("validation", rows[-2]["validation_loss"]), ("test", rows[-1]["loss"])):
        capsys.readouterr()
        assert main(["evaluate", output, *data, "--split", name, "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["images"] == 12
        assert figures["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_with_their_code(
    folder: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    command = ["train", *MODEL, "--data", str(folder), "--output", str(tmp_path / "r"), *SET]
    process = subprocess.Popen(
        [sys.executable, "-m", "v2m", *command, "--set", "schedule.epochs=100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("epoch"):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.startswith("v2m: stopped by ")
    assert "--resume" in errors
    assert "Traceback" not in errors


def test_prediction_from_a_run_that_is_not_finished(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run / "checkpoints", unfinished / "checkpoints")
    image = str(folder / "test" / "dark" / "0.png")
    assert main(["predict", str(unfinished), image, "--format", "csv"]) == 0
    captured = capsys.readouterr()
    assert {line.split(",")[3] for line in captured.out.splitlines()[1:]} == {"dark", "light"}
    assert "the run is not finished: taking" in captured.err
    assert main(["report", str(unfinished)]) == 2
    assert "is not finished: it gets its report at the end" in capsys.readouterr().err
    exported = tmp_path / "model.pt2"
    assert main(["export", str(unfinished), "--output", str(exported), "--fixed-size"]) == 0
    assert exported.is_file()
    assert "the run is not finished: taking" in capsys.readouterr().err


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list-recipes"]) == 0
    text = capsys.readouterr().out
    for name in ("demo", "imagenet_tiny", "imagenet_small", "finetune"):
        assert name in text
    assert main(["train", "--list-settings", "--recipe", "demo"]) == 0
    text = capsys.readouterr().out
    for key in ("optim.lr", "augment.crop_padding", "mix.mixup", "run.precision"):
        assert key in text
    lines = [line for line in text.splitlines()[1:] if line.strip()]
    assert all("." in line.split()[0] or line.startswith("task") for line in lines), "a line each"
    (kwargs,) = [line for line in lines if line.startswith("model.kwargs")]
    assert str({"dims": [48, 96], "depths": [1, 1]}) in kwargs


def test_a_dry_run_is_a_flag() -> None:
    arguments = build_parser("train").parse_args(
        ["train", "--recipe", "demo", "--limit-batches", "3"]
    )
    assert configuration(arguments).run.limit_batches == 3
