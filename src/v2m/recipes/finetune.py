"""Fine-tuning: weights that exist, on images of your own."""

from __future__ import annotations

from v2m.engine.config import (
    DatasetConfig,
    EmaConfig,
    MixConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)


def finetune() -> TrainConfig:
    """Weights that exist, on a folder of images of your own: 20 epochs.

    The weights are the folder of a run, a checkpoint, or a published one: whatever
    `v2m.from_checkpoint` reads. Earlier layers learn more slowly (layer-wise decay 0.75); another
    resolution is `--set model.img_size=160`.

    Command: `v2m train --recipe finetune --data photos/ --set model.checkpoint=runs/imagenet_tiny
        --output runs/photos`
    Hardware: one GPU, or a CPU for small images and models.
    Time: depends on the model and the images; `--limit-batches 20` makes a dry run.
    Result: depends on the images.
    """
    return TrainConfig(
        data=DatasetConfig(batch_size=64, workers=4),
        mix=MixConfig(label_smoothing=0.1),
        optim=OptimConfig(lr=5e-4, lr_batch_size=64, weight_decay=0.05, layer_decay=0.75),
        schedule=ScheduleConfig(epochs=20, warmup_epochs=2.0),
        ema=EmaConfig(decay=0.999),
    )
