"""The sections of the configuration for detection and for segmentation."""

from __future__ import annotations

from dataclasses import dataclass

from v2m.engine.settings import check_section, setting
from v2m.errors import InputError

__all__ = ["DetectConfig", "SegmentConfig"]


@dataclass(frozen=True, kw_only=True)
class DetectConfig:
    """Faster R-CNN and Mask R-CNN, for task=detect."""

    masks: bool | None = setting(None, "predict masks; none: if all objects have one")
    min_sizes: tuple[int, ...] = setting(
        (800,),
        "shorter side in training, one of these at random; the last one elsewhere",
        minimum=1,
    )
    max_size: int = setting(1333, "longer side at most, pixels", minimum=1)
    horizontal_flip: float = setting(0.5, "probability", minimum=0, maximum=1)
    vertical_flip: float = setting(0.0, "probability", minimum=0, maximum=1)
    distortion: float = setting(
        0.0, "probability of each change of brightness, contrast, colour", minimum=0, maximum=1
    )
    anchor_sizes: tuple[int, ...] = setting(
        (32, 64, 128, 256, 512), "side of the anchors on each of the five levels", minimum=1
    )
    pyramid_channels: int = setting(256, "channels of the feature pyramid", minimum=1)
    box_channels: int = setting(1024, "width of the box head's linear layers", minimum=1)
    mask_channels: int = setting(256, "channels of the mask head's convolutions", minimum=1)
    regions: int = setting(512, "regions sampled an image in training", minimum=1)
    score_threshold: float = setting(0.05, "least score of a detection", minimum=0, below=1)
    max_detections: int = setting(100, "most detections an image", minimum=1)

    def __post_init__(self) -> None:
        check_section(self, "detect")
        if not self.min_sizes:
            raise InputError("detect.min_sizes is empty: expected at least one size.")
        if len(self.anchor_sizes) != 5:
            raise InputError(
                f"detect.anchor_sizes = {self.anchor_sizes}: expected five sizes, one a level."
            )


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """UperNet, for task=segment."""

    crop: tuple[int, int] = setting((512, 512), "height,width of a training crop", minimum=1)
    ratio: tuple[float, float] = setting(
        (0.5, 2.0), "shorter side before the crop, over the crop's: from,to", above=0
    )
    largest_class: float = setting(
        0.75, "part of a crop that one class may fill; 1 for any", above=0, maximum=1
    )
    horizontal_flip: float = setting(0.5, "probability", minimum=0, maximum=1)
    distortion: float = setting(
        0.5, "probability of each change of brightness, contrast, colour", minimum=0, maximum=1
    )
    short_side: int | None = setting(
        512, "shorter side in evaluation, none for the image's own size", minimum=1
    )
    channels: int = setting(512, "channels of the decoder", minimum=1)
    auxiliary_channels: int = setting(256, "channels of the auxiliary head", minimum=1)
    auxiliary_weight: float = setting(0.4, "weight of the auxiliary loss", minimum=0)
    dropout: float = setting(0.1, "before the last layer", minimum=0, below=1)

    def __post_init__(self) -> None:
        check_section(self, "segment")
        if self.ratio[0] > self.ratio[1]:
            raise InputError(f"segment.ratio = {self.ratio}: expected from,to with from <= to.")
