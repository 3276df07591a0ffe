"""The runs: one recipe for both models of a data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from v2m.engine.config import (
    DatasetConfig,
    DetectConfig,
    EmaConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    SegmentConfig,
    TrainConfig,
)

DATA = ("trees", "nuclei", "textures")
MODELS = ("v2m", "resnet")
EPOCHS = {  # without --seconds and --epochs
    "full": {"trees": 24, "nuclei": 40, "textures": 60},
    "small": {"trees": 5, "nuclei": 8, "textures": 30},
}
SMALL = {"depths": [1, 1, 2, 1], "dims": [32, 64, 128, 256]}  # 1.5 M parameters
ANCHORS = (16, 32, 64, 128, 256)
SHORT_SIDES = {  # trees come in tiles of 312 x 345, nuclei of 128 x 128; the last is evaluated at
    "full": {"trees": (448, 576, 512), "nuclei": (288, 352, 320)},
    "small": {"trees": (288, 352, 320), "nuclei": (208, 256, 224)},
}


def config(
    data: str, model: str, scale: str, folder: Path, epochs: int, device: str = "auto"
) -> TrainConfig:
    """The run of a model on a data set: only the backbone depends on the model."""
    full = scale == "full"
    return TrainConfig(
        task="segment" if data == "textures" else "detect",
        model=_backbone(data, model, full),
        data=DatasetConfig(
            name=str(folder / data), batch_size=8 if full else 4, workers=2 if full else 0
        ),
        optim=OptimConfig(lr=3e-4 if full else 6e-4, weight_decay=0.05, clip_norm=5.0),
        schedule=ScheduleConfig(
            epochs=epochs, warmup_epochs=max(0.5, 0.06 * epochs), warmup_lr=1e-6, min_lr=1e-6
        ),
        ema=EmaConfig(decay=0.998),
        detect=_detect(data, scale),
        segment=SegmentConfig(
            crop=(256, 256) if full else (128, 128),
            ratio=(1.0, 1.5) if full else (1.6, 2.4),
            short_side=None,
            channels=256 if full else 64,
            auxiliary_channels=128 if full else 32,
        ),
        run=RunConfig(device=device),
    )


def _backbone(data: str, model: str, full: bool) -> ModelConfig:
    if model == "v2m":
        wanted = ModelConfig(name="v2m_hier_small_224", drop_path_rate=0.1)
        return wanted if full else replace(wanted, drop_path_rate=None, kwargs=SMALL)
    if not full:
        return ModelConfig(name="resnet18")
    return ModelConfig(name="resnet34" if data == "textures" else "resnet50")


def _detect(data: str, scale: str) -> DetectConfig:
    full = scale == "full"
    return DetectConfig(
        min_sizes=SHORT_SIDES[scale].get(data, (800,)),
        vertical_flip=0.5,
        distortion=0.5,
        anchor_sizes=ANCHORS,
        pyramid_channels=256 if full else 64,
        box_channels=1024 if full else 256,
        mask_channels=256 if full else 64,
        regions=512 if full else 128,
    )
