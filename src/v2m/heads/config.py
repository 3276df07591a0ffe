"""What shapes a detector or a segmenter; stored in its config.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from v2m.models.config import as_pair, check_flag, check_fraction, check_whole

__all__ = ["DenseConfig", "DetectorConfig", "SegmenterConfig"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """What detectors and segmenters share."""

    backbone: str  # a name of `v2m models`, or of timm
    backbone_kwargs: dict[str, Any] = field(default_factory=dict)
    num_classes: int
    in_chans: int = 3
    img_size: int | tuple[int, int] = 224  # pixels that the position embedding is for
    mean: tuple[float, ...] = IMAGENET_MEAN  # of the images in [0, 1], per channel
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", as_pair("img_size", self.img_size))
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_whole("num_classes", self.num_classes, least=1)
        check_whole("in_chans", self.in_chans, least=1)


@dataclass(frozen=True, kw_only=True)
class DetectorConfig(DenseConfig):
    """Faster R-CNN, or Mask R-CNN with `masks`."""

    masks: bool = True
    min_size: int = 800  # the shorter side when it is used, pixels
    max_size: int = 1333  # the longer side at most
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)  # one a level, pixels
    pyramid_channels: int = 256
    box_channels: int = 1024  # of the two linear layers over a region
    mask_channels: int = 256  # of the four convolutions over a region
    regions: int = 512  # sampled an image in training, for its classes and boxes
    score_threshold: float = 0.05
    max_detections: int = 100  # an image

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("masks", self.masks)
        object.__setattr__(self, "anchor_sizes", tuple(self.anchor_sizes))
        whole = ("min_size", "max_size", "pyramid_channels", "box_channels", "mask_channels")
        for name in (*whole, "regions", "max_detections"):
            check_whole(name, getattr(self, name), least=1)
        check_fraction("score_threshold", self.score_threshold)


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig(DenseConfig):
    """UperNet."""

    channels: int = 512  # of the decoder
    auxiliary_channels: int = 256  # of the head on stride 16 that helps in training
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("channels", self.channels, least=1)
        check_whole("auxiliary_channels", self.auxiliary_channels, least=1)
        check_fraction("dropout", self.dropout)
