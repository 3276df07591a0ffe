"""Checkpoints within an epoch, disks that fill up, and files that were tampered with."""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors import SafetensorError

from interruptions import Killed, kill, stop_at
from v2m.engine import checkpoint, saving
from v2m.engine import trainer as trainer_module
from v2m.engine.config import TrainConfig, apply_overrides
from v2m.engine.rundir import RunDirectory
from v2m.engine.saving import Timer
from v2m.engine.store import MANIFEST, CheckpointStore, verify
from v2m.engine.trainer import train
from v2m.errors import InputError


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "write_report", lambda run: None)


def test_the_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    timer, never = Timer(0.5), Timer(None)
    now[0] = 29.0
    assert not timer.due()
    now[0] = 31.0
    assert timer.due()
    assert not never.due()
    timer.restart()
    assert not timer.due()


def killed_run(tmp_path: Path, config: TrainConfig, images: Path) -> tuple[Path, TrainConfig, Path]:
    """Images of its own, a run on them that was killed in its second epoch, and its folder."""
    root, run = tmp_path / "images", tmp_path / "run"
    shutil.copytree(images, root)
    config = apply_overrides(config, [f"data.name={root}"])
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 8, kill)
        with pytest.raises(Killed):
            train(config, run)
    return root, config, run


def rename_a_class(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "left").rename(root / split / "zeft")


def remove_an_image(root: Path) -> None:
    (root / "train" / "left" / "05.png").unlink()


def add_a_class(root: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(root / split / "left", root / split / "another")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_a_class, r"class 0 is 'middle' \(then 'left'\); class 1 is 'right'"),
        (remove_an_image, r"41 images \(then 42\)\. Put it back"),
        (add_a_class, r"56 images \(then 42\); 4 classes \(then 3\)"),
    ],
)
def test_a_run_goes_on_with_its_own_images_alone(
    tmp_path: Path, config: TrainConfig, images: Path, change: Any, message: str
) -> None:
    """Other classes would get the labels of those that were, and an epoch other steps."""
    root, config, run = killed_run(tmp_path, config, images)
    before = (run / "metrics.jsonl").read_text()
    change(root)
    with pytest.raises(InputError, match=rf"--resume: the training data is not .*{message}"):
        train(config, run, resume=True)
    assert (run / "metrics.jsonl").read_text() == before


def test_a_run_may_skip_bad_images_from_now_on(
    tmp_path: Path, config: TrainConfig, images: Path
) -> None:
    root, config, run = killed_run(tmp_path, config, images)
    for name in os.listdir(root / "train" / "left"):
        (root / "train" / "left" / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"is empty.*data\.on_error=skip.* --resume"):
        train(config, run, resume=True)
    lines = io.StringIO()
    train(
        apply_overrides(config, ["data.on_error=skip"]), run, resume=True,
        console=Console(file=lines, width=200),
    )  # fmt: skip
    assert "unreadable training image" in lines.getvalue()
    assert "unreadable validation image" in lines.getvalue()
    assert RunDirectory(run).finished() is not None


def test_checkpoints_within_an_epoch(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    original = CheckpointStore.save

    def save(store: CheckpointStore, step: int, write: Any) -> Path:
        saved.append(step)
        return original(store, step, write)

    monkeypatch.setattr(CheckpointStore, "save", save)
    often = apply_overrides(config, ["run.checkpoint_minutes=1e-9"])
    with monkeypatch.context() as patch:
        stop_at(patch, 8, kill)
        with pytest.raises(Killed):
            train(often, tmp_path / "run")
    assert saved == [1, 2, 3, 4, 5, 6, 7]
    rarely = apply_overrides(config, ["run.checkpoint_minutes=none"])
    train(rarely, tmp_path / "run", resume=True)
    assert saved[7:] == [10, 15]
    train(rarely, tmp_path / "whole")
    one, two = (RunDirectory(tmp_path / name).records() for name in ("run", "whole"))
    for record, other in zip(one, two, strict=True):
        for key in ("train_loss", "gradient_norm", "validation_loss", "loss"):
            assert record.get(key) == other.get(key), key


class FullDisk:
    """Fails the n-th operation that writes: opening, flushing, renaming, serialising."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int) -> None:
        self.left, self.failed = fail_at, False
        for name in ("fsync", "replace"):
            monkeypatch.setattr(os, name, self._limited(getattr(os, name)))
        for module in (builtins, io):
            monkeypatch.setattr(module, "open", self._limited(open, only_writing=True))
        broken = SafetensorError("Error while serializing: No space left on device (os error 28)")
        monkeypatch.setattr(checkpoint, "save_file", self._limited(checkpoint.save_file, broken))

    def _limited(
        self, function: Any, error: Exception | None = None, only_writing: bool = False
    ) -> Any:
        def limited(*arguments: Any, **keywords: Any) -> Any:
            if only_writing and "r" in (*arguments, "r")[1]:
                return function(*arguments, **keywords)
            self.left -= 1
            if self.left == 0:
                self.failed = True
                raise error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments, **keywords)

        return limited


@pytest.mark.parametrize("operation", range(1, 24))  # that many in one save
def test_a_disk_that_is_full_at_any_moment_of_a_save(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, operation: int
) -> None:
    run, epochs = tmp_path / "run", apply_overrides(config, ["run.limit_batches=1"])
    original, disks = trainer_module.save, []

    def save(session: Any, directory: RunDirectory) -> None:
        if session.state.step < 2:
            original(session, directory)
            return
        with monkeypatch.context() as patch:
            disks.append(FullDisk(patch, operation))
            original(session, directory)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "save", save)
        with pytest.raises(InputError, match=r"step 2 cannot be written.*No space left.*--resume"):
            train(epochs, run)
    assert disks[0].failed
    verify(run / "checkpoints" / "step-00000001")
    assert not list((run / "checkpoints").glob(".*"))
    if operation % 8 == 0:
        train(epochs, run, resume=True)


@pytest.mark.parametrize("seed", range(4))
def test_tampered_checkpoints_are_refused_in_words(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """With a manifest that matches, so that nothing but their contents can tell."""
    run, short = tmp_path / "run", apply_overrides(config, ["run.limit_batches=2"])
    with monkeypatch.context() as patch:
        stop_at(patch, 3, kill)
        with pytest.raises(Killed):
            train(short, run)
    folder = run / "checkpoints" / "step-00000002"
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    generator, messages = random.Random(seed), []
    for _ in range(12):
        for path, data in whole.items():
            path.write_bytes(data)
        name = generator.choice(["training_state.safetensors", "training_state.json"])
        path = folder / name
        path.write_bytes(mutated(whole[path], generator))
        (folder / MANIFEST).unlink()
        CheckpointStore._seal(folder)
        with monkeypatch.context() as patch:
            stop_at(patch, 3, kill)
            try:
                train(short, run, resume=True)
            except InputError as error:
                messages.append(str(error))
            except Killed:
                pass
    assert len(messages) >= 3
    assert all("--resume: " in m and "--overwrite" in m for m in messages)


def mutated(data: bytes, generator: random.Random) -> bytes:
    data = bytearray(data)
    kind, at = generator.randrange(4), generator.randrange(min(len(data), 4000))
    if kind == 0:
        del data[at:]
    elif kind == 1:
        data[at : at + 8] = generator.randbytes(8)
    elif kind == 2:
        data[at:at] = generator.randbytes(9)
    else:
        data[:8] = generator.choice([0, 2**63, len(data)]).to_bytes(8, "little")
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_tampered_settings_are_refused_in_words(
    tmp_path: Path, config: TrainConfig, seed: int
) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.begin(config)
    path = tmp_path / "run" / "train_config.json"
    original, generator, refused = path.read_bytes(), random.Random(seed), 0
    for _ in range(100):
        path.write_bytes(mutated(original, generator))
        try:
            directory.check(config, resume=True, overwrite=False)
        except InputError:
            refused += 1
    assert refused >= 50
