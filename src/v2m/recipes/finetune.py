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
    """Weights of --set model.checkpoint=PATH on a folder of images of your own, 20 epochs.

    Command: `v2m train --recipe finetune --data photos/ --set model.checkpoint=runs/tiny --output
    runs/photos`
    """
    return TrainConfig(
        data=DatasetConfig(batch_size=64, workers=4),
        mix=MixConfig(label_smoothing=0.1),
        optim=OptimConfig(lr=5e-4, lr_batch_size=64, weight_decay=0.05, layer_decay=0.75),
        schedule=ScheduleConfig(epochs=20, warmup_epochs=2.0),
        ema=EmaConfig(decay=0.999),
    )
