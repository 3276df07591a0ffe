"""Whole runs: what they write, how they go on, and how they stop."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import v2m
from interruptions import (
    Killed,
    assert_resumed_exactly,
    assert_same_run,
    comparable,
    kill,
    stop_at,
)
from v2m.engine import classification, saving
from v2m.engine import loop as loop_module
from v2m.engine import trainer as trainer_module
from v2m.engine.config import TrainConfig, apply_overrides
from v2m.engine.progress import Reporter
from v2m.engine.rundir import RunDirectory
from v2m.engine.store import verify
from v2m.engine.trainer import train
from v2m.errors import InputError, NonFiniteLossError


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The report has its own tests; here it is enough that it is asked for."""
    written: list[Path] = []
    monkeypatch.setattr(trainer_module, "write_report", written.append)
    return written


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a run says without a console."""
    reporter = Reporter()
    monkeypatch.setattr(trainer_module, "Reporter", lambda: reporter)
    return reporter.messages


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference") / "run"


@pytest.fixture
def whole(reference_run: Path, config: TrainConfig) -> Path:
    """The run without any interruption, made once."""
    if not reference_run.exists():
        train(config, reference_run)
    return reference_run


def record_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are made from now on."""
    steps: list[int] = []
    original = loop_module.optimiser_step

    def optimiser_step(loop: Any, group: Any) -> None:
        original(loop, group)
        steps.append(loop.state.step)

    monkeypatch.setattr(loop_module, "optimiser_step", optimiser_step)
    return steps


def test_a_run_writes_what_it_promises(whole: Path, config: TrainConfig) -> None:
    records = RunDirectory(whole).records()
    assert [r["kind"] for r in records] == ["epoch"] * 3 + ["test"]
    assert [r["epoch"] for r in records] == [1, 2, 3, 3]
    for record in records[:3]:
        for key in ("train_loss", "train_accuracy", "validation_loss", "validation_top1"):
            assert math.isfinite(record[key]), key
        for key in ("lr", "images_per_second", "seconds", "gradient_norm"):
            assert record[key] > 0, key
    test = records[3]
    assert test["images"] == 12
    assert {"top1", "top5", "loss", "shuffled_top1", "machine"} <= test.keys()
    with np.load(whole / "test_predictions.npz") as stored:
        assert stored["probabilities"].shape == (12, 3)
        assert stored["targets"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert (stored["probabilities"].argmax(1) == stored["targets"]).mean() == test["top1"]
    assert RunDirectory(whole).config() == config
    assert not list(whole.glob(".*"))
    model = v2m.from_checkpoint(whole)
    assert model.pretrained_cfg["label_names"] == ["left", "middle", "right"]
    assert tuple(model.pretrained_cfg["input_size"]) == (1, 8, 8)
    assert json.loads((whole / "config.json").read_text())["v2m"]["test"]["top1"] == test["top1"]


def test_the_average_of_the_weights_is_what_is_kept(whole: Path) -> None:
    newest = RunDirectory(whole).store.newest(pytest.fail)
    state, model = (
        load_file(newest / "training_state.safetensors"),
        load_file(newest / "model.safetensors"),
    )
    for name, value in model.items():
        assert torch.equal(value, state[f"ema/{name}"]), name
    assert not torch.equal(state["model/head.weight"], state["ema/head.weight"])
    assert torch.equal(load_file(whole / "model.safetensors")["head.weight"], model["head.weight"])


@pytest.mark.parametrize("step", [1, 4, 5, 7, 10, 14])
def test_killed_and_resumed_is_the_same_run(
    tmp_path: Path, whole: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, step, kill)
        with pytest.raises(Killed):
            train(config, tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("step", [2, 5, 13])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_store_the_moment_and_resume_from_it(
    tmp_path: Path,
    whole: Path,
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    number: signal.Signals,
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, step, lambda: signal.raise_signal(number))
        expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
        with pytest.raises(expected) as stopped:
            train(config, run)
    if number == signal.SIGTERM:
        assert stopped.value.code == 143
        message = stopped.value.message
    else:
        message = str(stopped.value)
    assert "--resume goes on from there" in message
    newest = RunDirectory(run).store.newest(pytest.fail)
    assert newest.name == f"step-{step:08d}"
    steps = record_steps(monkeypatch)
    train(config, run, resume=True)
    assert steps == list(range(step + 1, 16))
    assert_same_run(run, whole)


def test_a_stop_during_validation_is_exact_too(
    tmp_path: Path, whole: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        original = classification.evaluate_classifier

        def evaluate(*arguments: Any, **keywords: Any) -> Any:
            signal.raise_signal(signal.SIGTERM)
            return original(*arguments, **keywords)

        patch.setattr(classification, "evaluate_classifier", evaluate)
        with pytest.raises(SystemExit):
            train(config, run)
    assert RunDirectory(run).records() == []
    train(config, run, resume=True)
    assert_same_run(run, whole)


def test_a_damaged_checkpoint_falls_back_and_ends_the_same(
    tmp_path: Path,
    whole: Path,
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    spoken: list[str],
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 12, kill)
        with pytest.raises(Killed):
            train(config, run)
    newest = run / "checkpoints" / "step-00000010" / "training_state.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    train(config, run, resume=True)
    assert any("step-00000010 is damaged" in m and "falling back" in m for m in spoken)
    assert any("going on after epoch 1" in m for m in spoken)
    assert_same_run(run, whole)
    for folder in RunDirectory(run).store.folders():
        verify(folder)


def test_every_checkpoint_damaged_starts_anew(
    tmp_path: Path,
    whole: Path,
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    spoken: list[str],
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 7, kill)
        with pytest.raises(Killed):
            train(config, run)
    (run / "checkpoints" / "step-00000005" / "manifest.json").unlink()
    train(config, run, resume=True)
    assert any("starting at the first epoch" in m for m in spoken)
    assert_same_run(run, whole)


def test_workers_do_not_change_the_run(tmp_path: Path, whole: Path, config: TrainConfig) -> None:
    train(apply_overrides(config, ["data.workers=2"]), tmp_path / "run")
    assert comparable(tmp_path / "run") == comparable(whole)


def test_a_finished_run_is_not_trained_again(
    whole: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = comparable(whole)
    monkeypatch.setattr(trainer_module, "train_epoch", pytest.fail)
    assert train(config, whole, resume=True)["top1"] == before[-1]["top1"]
    assert comparable(whole) == before


def test_a_run_is_not_replaced_silently(whole: Path, config: TrainConfig) -> None:
    with pytest.raises(InputError, match=r"finished.*--resume.*--overwrite"):
        train(config, whole)
    other = replace(config, optim=replace(config.optim, lr=1e-4))
    with pytest.raises(InputError, match=r"optim\.lr = 0\.0001 \(there: 0\.003\)"):
        train(other, whole, resume=True)
    with pytest.raises(InputError, match="exclude each other"):
        train(config, whole, resume=True, overwrite=True)


def test_a_strange_folder_is_left_alone(tmp_path: Path, config: TrainConfig) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="holds no run"):
            train(config, tmp_path, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="is a file"):
        train(config, tmp_path / "thesis.tex")


def test_overwrite_removes_the_run_and_nothing_else(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    short = apply_overrides(config, ["schedule.epochs=1", "run.limit_batches=1"])
    train(short, run)
    (run / "notes.txt").write_text("mine")
    record = train(apply_overrides(short, ["run.seed=1"]), run, overwrite=True)
    assert (run / "notes.txt").read_text() == "mine"
    assert [r["kind"] for r in RunDirectory(run).records()] == ["epoch", "test"]
    assert record["images"] == 8
    assert len(RunDirectory(run).store.folders()) == 1


@pytest.mark.parametrize("culprit", ["loss", "gradient"])
def test_a_non_finite_step_changes_nothing_and_is_kept(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, culprit: str
) -> None:
    run = tmp_path / "run"
    weights: dict[str, torch.Tensor] = {}
    original = trainer_module.train_epoch

    def train_epoch(loop: Any, batches: Any, **keywords: Any) -> None:
        model = loop.state.model

        def spoil(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
            if loop.state.step != 3:
                return None
            weights.update({k: v.clone() for k, v in model.state_dict().items()})
            if culprit == "loss":
                return output * float("nan")
            output.register_hook(lambda gradient: gradient * float("inf"))
            return output

        model.head.register_forward_hook(spoil)
        original(loop, batches, **keywords)

    monkeypatch.setattr(trainer_module, "train_epoch", train_epoch)
    with pytest.raises(
        NonFiniteLossError, match=r"step 3 \(epoch 1\).*not finite: pos_embed"
    ) as raised:
        train(config, run)
    assert "weights were not changed" in str(raised.value)
    kept = load_file(run / "non_finite" / "training_state.safetensors")
    for name, value in weights.items():
        assert torch.equal(kept[f"model/{name}"], value), name
    batch = load_file(run / "non_finite" / "batch.safetensors")
    assert batch["images/0"].shape == (8, 1, 8, 8)
    assert batch["targets/0"].shape == (8,)
    values = json.loads((run / "non_finite" / "training_state.json").read_text())
    assert values["position"]["step"] == 3
    assert "not finite" in values["message"]


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_whole(
    tmp_path: Path, whole: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    original = saving.write_state

    def write_state(folder: Path, state: Any, contents: Any, **keywords: Any) -> None:
        original(folder, state, contents, **keywords)
        if state.step == 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_state", write_state)
        with pytest.raises(InputError, match=r"step 10 cannot be written.*No space left.*--resume"):
            train(config, run)
    assert [f.name for f in RunDirectory(run).store.folders()] == ["step-00000005"]
    train(config, run, resume=True)
    assert_same_run(run, whole)


@pytest.mark.parametrize(
    "setting",
    ["run.grad_checkpointing=true", pytest.param("run.compile=true", marks=pytest.mark.slow)],
)
def test_other_ways_to_compute_the_same(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    compiled: list[Any] = []
    original = torch.compile

    def compile_model(model: torch.nn.Module) -> Any:
        compiled.append(model)
        return original(model, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_model)
    short = apply_overrides(config, ["model.kwargs.depth=1", "run.limit_batches=3"])
    train(short, tmp_path / "plain")
    train(apply_overrides(short, [setting]), tmp_path / "other")
    assert len(compiled) == (setting == "run.compile=true")
    plain, other = (RunDirectory(tmp_path / n).records() for n in ("plain", "other"))
    for one, two in zip(plain[:-1], other[:-1]):
        for key in ("train_loss", "gradient_norm", "validation_loss"):
            assert one[key] == pytest.approx(two[key], rel=1e-4), key


def test_gradients_do_not_depend_on_the_accumulation(tmp_path: Path, config: TrainConfig) -> None:
    plain = apply_overrides(
        config,
        [
            "mix.mixup=0",
            "mix.cutmix=0",
            "model.drop_path_rate=0",
            "model.kwargs.drop_rate=0",
            "schedule.epochs=1",
        ],
    )
    train(plain, tmp_path / "one")
    train(apply_overrides(plain, ["optim.accumulation=4"]), tmp_path / "four")
    one, four = (RunDirectory(tmp_path / n).records()[0] for n in ("one", "four"))
    for key in ("train_loss", "gradient_norm", "validation_loss"):
        assert one[key] == pytest.approx(four[key], rel=1e-5), key
    assert one["step"] == four["step"] == 5


def test_augmentation_on_the_device_is_resumed_exactly(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = apply_overrides(config, ["augment.on_device=true", "schedule.epochs=2"])
    assert_resumed_exactly(tmp_path, config, monkeypatch, step=7)


def test_finetuning_at_another_resolution_with_layer_decay(
    tmp_path: Path, whole: Path, config: TrainConfig
) -> None:
    """From a run's folder: its classes get a fresh head where they differ, positions are resampled,
    and the first layers learn most slowly."""
    start = [f"model.checkpoint={whole}", "model.name=none", "model.kwargs={}", "ema.decay=none"]
    slowly = [*start, "model.img_size=12,16", "optim.layer_decay=0.1", "optim.name=sgd"]
    config = apply_overrides(config, [*slowly, "optim.weight_decay=0", "run.limit_batches=1"])
    train(apply_overrides(config, ["schedule.epochs=1", "optim.lr=1"]), tmp_path / "run")
    model = v2m.from_checkpoint(tmp_path / "run")
    assert tuple(model.pretrained_cfg["input_size"]) == (1, 12, 16)
    assert model.pos_embed.shape[1] == 12
    before = load_file(whole / "model.safetensors")
    names = ("layers.0.mixer.in_proj.weight", "layers.1.mixer.in_proj.weight", "head.weight")
    after = model.state_dict()
    moved = [float((after[n] - before[n]).norm() / before[n].norm()) for n in names]
    assert 0 < moved[0] < moved[1] < moved[2]


def test_gradients_are_clipped(tmp_path: Path, config: TrainConfig) -> None:
    plain = ["optim.name=sgd", "optim.weight_decay=0", "run.limit_batches=1", "schedule.epochs=1"]
    plain += ["ema.decay=none", "schedule.warmup_epochs=0", "optim.lr=1"]
    norms = {"none": "none", "small": "1e-3", "smaller": "1e-6"}
    weights = {}
    for name, norm in norms.items():
        train(apply_overrides(config, [*plain, f"optim.clip_norm={norm}"]), tmp_path / name)
        weights[name] = load_file(tmp_path / name / "model.safetensors")["head.weight"]
    moved = {name: (weights[name] - weights["smaller"]).norm() for name in ("none", "small")}
    assert 0 < moved["small"] < 2e-3 < moved["none"]  # Nesterov: 1.9 times the gradient


def test_without_an_average_the_weights_themselves_are_kept(
    tmp_path: Path, config: TrainConfig
) -> None:
    train(apply_overrides(config, ["ema.decay=none", "schedule.epochs=1"]), tmp_path)
    newest = RunDirectory(tmp_path).store.newest(pytest.fail)
    state = load_file(newest / "training_state.safetensors")
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(value, state[f"model/{name}"]), name
    assert not [key for key in state if key.startswith("ema/")]


def test_it_learns(tmp_path: Path, config: TrainConfig) -> None:
    easy = apply_overrides(
        config,
        [
            "mix.mixup=0",
            "mix.cutmix=0",
            "augment.auto_augment=none",
            "augment.random_erasing=0",
            "augment.horizontal_flip=0",
            "augment.color_jitter=0",
            "schedule.epochs=12",
            "optim.lr=0.02",
        ],
    )
    record = train(easy, tmp_path)
    assert record["top1"] >= 0.9
