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

    In minutes it is passes over the images that are short, not images: a model of two stages with a
    third of the time a step was better than a deeper one. Beside that, what counted was many small
    steps, a short memory of the squared gradients, crops of one pixel rather than more, and mixing
    pairs of images, but only now and then.

    Command: `v2m train --recipe demo --output runs/demo`, or `make demo`
    Hardware: 2 CPU cores; a GPU is used if there is one.
    Time: 4 min 45 s to 5 min of training on two cores of an AMD EPYC.
    Result: 88.30 % top-1 on the 2,000 test images with seed 0 (89.6 % on the validation images).
    """
    return TrainConfig(
        model=ModelConfig(
            name="v2m_hier_small_224", img_size=(28,), kwargs={"dims": [48, 96], "depths": [1, 1]}
        ),
        data=DatasetConfig(name="fashion-mnist-small", batch_size=32),
        augment=replace(SMALL_IMAGES, crop_padding=1, random_erasing=0.0),
        mix=MixConfig(mixup=0.2, cutmix=1.0, probability=0.2),
        optim=OptimConfig(lr=4e-3, weight_decay=0.2, betas=(0.9, 0.95)),
        schedule=ScheduleConfig(epochs=30, warmup_epochs=1.0),
        ema=EmaConfig(decay=0.998),
    )
