"""The demo: a small V2M on the images inside the package."""

from __future__ import annotations

from v2m.data import SMALL_IMAGES
from v2m.engine.config import (
    DatasetConfig,
    EmaConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)


def demo() -> TrainConfig:
    """A small V2M on the 10,000 bundled Fashion-MNIST images, in minutes on a CPU.

    Command: `v2m train --recipe demo --output runs/demo`
    """
    return TrainConfig(
        model=ModelConfig(name="v2m_nano_patch4_28"),
        data=DatasetConfig(name="fashion-mnist-small", batch_size=128),
        augment=SMALL_IMAGES,
        optim=OptimConfig(lr=3e-3, weight_decay=0.05),
        schedule=ScheduleConfig(epochs=30, warmup_epochs=2.0),
        ema=EmaConfig(decay=0.998),
    )
