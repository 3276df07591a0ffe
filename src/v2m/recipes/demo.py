"""The demo: a small V2M on the images inside the package."""

from __future__ import annotations

from dataclasses import replace

from v2m.data import SMALL_IMAGES
from v2m.engine.config import (
    DatasetConfig,
    EmaConfig,
    MixConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)


def demo() -> TrainConfig:
    """A small V2M on the 10,000 bundled Fashion-MNIST images, in minutes on a CPU.

    Light augmentation and small batches: with so few passes over so few images, what counts is the
    number of steps. Chosen on the validation split alone.

    Command: `v2m train --recipe demo --output runs/demo`
    Hardware: 2 CPU cores; a GPU is used if there is one.
    Time: TIME
    Result: RESULT
    """
    return TrainConfig(
        model=ModelConfig(name="v2m_nano_patch4_28"),
        data=DatasetConfig(name="fashion-mnist-small", batch_size=64),
        augment=replace(SMALL_IMAGES, crop_padding=1, random_erasing=0.0),
        mix=MixConfig(mixup=0.2, probability=0.5),
        optim=OptimConfig(lr=3e-3, weight_decay=0.1),
        schedule=ScheduleConfig(epochs=22, warmup_epochs=1.0),
        ema=EmaConfig(decay=0.998),
    )
