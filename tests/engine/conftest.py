"""A tiny data set and a tiny run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from v2m.data import DataConfig
from v2m.engine.config import (
    DatasetConfig,
    EmaConfig,
    MixConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

CLASSES = ("left", "middle", "right")
TINY_MODEL = {"patch_size": 4, "embed_dim": 8, "depth": 2, "d_state": 2, "in_chans": 1}


@pytest.fixture(autouse=True)
def small_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No compilation of kernels, and one thread, for a handful of pixels."""
    monkeypatch.setenv("V2M_BACKEND", "eager")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training and 12 test images of 8x8 whose class is where they are bright."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 4)):
        for index, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 60, (8, 8), dtype=np.uint8)
                pixels[:, 3 * index : 3 * index + 2] += 190
                Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return root


@pytest.fixture
def config(images: Path) -> TrainConfig:
    """Three epochs of five steps, with everything random switched on."""
    return TrainConfig(
        model=ModelConfig(
            name="v2m_nano_patch4_28",
            img_size=(8, 8),
            drop_path_rate=0.2,
            kwargs={**TINY_MODEL, "drop_rate": 0.1},
        ),
        data=DatasetConfig(name=str(images), batch_size=8, workers=0, validation_fraction=0.125),
        augment=DataConfig(
            crop="padded", crop_padding=1, horizontal_flip=0.2, auto_augment="rand-m3"
        ),
        mix=MixConfig(mixup=0.2, cutmix=1.0, label_smoothing=0.1, probability=0.5),
        optim=OptimConfig(lr=3e-3),
        schedule=ScheduleConfig(epochs=3, warmup_epochs=0.5),
        ema=EmaConfig(decay=0.9),
        run=RunConfig(device="cpu"),
    )
