"""What is done to an image between the file and the model."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from v2m.errors import InputError

__all__ = ["SMALL_IMAGES", "DataConfig"]

CROPS = ("resized", "padded", "center")
ERASING_MODES = ("pixel", "rand", "const")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "random")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Augmentation of the training images and preprocessing of the others.

    The defaults are those of the published ImageNet runs; `SMALL_IMAGES` suits images of some 28
    pixels.

    Attributes:
        crop: how a training image comes to its size. "resized": a random part of random shape,
            resized; "padded": the whole image, padded and cropped back at random; "center": as in
            evaluation.
        crop_scale: for "resized", the part's share of the image's area, from and to.
        crop_ratio: for "resized", the part's width over its height, from and to.
        crop_padding: for "padded", pixels added on each side.
        horizontal_flip, vertical_flip: probabilities.
        color_jitter: strength of the change of brightness, contrast and saturation; as in timm,
            without effect where `auto_augment` is given.
        auto_augment: a policy of timm ("rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original", ...) or
            None.
        random_erasing: probability that a rectangle is erased.
        erasing_mode: what it is filled with: noise ("pixel"), one random colour ("rand"), the mean
            ("const").
        repeats: how often an image comes in an epoch, each time augmented anew; an epoch keeps its
            length, so it then shows 1/repeats of the images (repeated augmentation).
        interpolation: for every resize.
        on_device: do the colour policy, normalisation and erasing of training images in batches on
            the device that trains, see `v2m.data.device_augment`.
        crop_pct: share of the resized image's side that evaluation sees in its central crop.
    """

    crop: str = "resized"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_padding: int = 4
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    color_jitter: float = 0.3
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    random_erasing: float = 0.25
    erasing_mode: str = "pixel"
    repeats: int = 1
    on_device: bool = False
    interpolation: str = "bicubic"
    crop_pct: float = 0.875

    def __post_init__(self) -> None:
        self._choice("crop", CROPS)
        self._choice("erasing_mode", ERASING_MODES)
        self._choice("interpolation", INTERPOLATIONS)
        for name in ("horizontal_flip", "vertical_flip", "random_erasing"):
            self._number(name, 0, 1)
        self._number("color_jitter", 0, math.inf)
        self._number("crop_pct", 0.01, 1)
        self._integer("crop_padding", 0)
        self._integer("repeats", 1)
        self._range("crop_scale", 1)
        self._range("crop_ratio", math.inf)
        if self.auto_augment is not None:
            check_auto_augment(self.auto_augment)

    def _refuse(self, name: str, expected: str) -> None:
        raise InputError(f"DataConfig.{name} must be {expected}; got {getattr(self, name)!r}.")

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            self._refuse(name, f"one of {', '.join(choices)}")

    def _number(self, name: str, low: float, high: float) -> None:
        if not _is_number(getattr(self, name)) or not low <= getattr(self, name) <= high:
            self._refuse(name, f"a number from {low} to {high}")

    def _integer(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            self._refuse(name, f"a whole number of at least {low}")

    def _range(self, name: str, high: float) -> None:
        value = getattr(self, name)
        pair = isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_number, value))
        if not pair or not 0 < value[0] <= value[1] <= high:
            self._refuse(
                name, f"two numbers, 0 < low <= high{'' if high == math.inf else f' <= {high}'}"
            )


def check_auto_augment(policy: str) -> None:
    """InputError unless timm understands the policy (it fails with an assertion or an odd
    error)."""
    from timm.data.auto_augment import (
        augment_and_mix_transform,
        auto_augment_transform,
        rand_augment_transform,
    )

    build: Any = auto_augment_transform
    if isinstance(policy, str) and policy.startswith("rand"):
        build = rand_augment_transform
    elif isinstance(policy, str) and policy.startswith("augmix"):
        build = augment_and_mix_transform
    try:
        for section in policy.split("-")[1:]:
            if not re.fullmatch(r"[a-z]+\d[\d.]*|t.+", section):  # timm overlooks these in silence
                raise ValueError(section)
        build(policy, {"translate_const": 10, "img_mean": (128,)})
    except Exception as error:
        raise InputError(
            f"DataConfig.auto_augment = {policy!r} is not a policy that timm knows: expected "
            "something like rand-m9-mstd0.5-inc1, augmix-m3-w3, original, v0 or 3a."
        ) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


SMALL_IMAGES = DataConfig(
    crop="padded",
    crop_padding=2,
    color_jitter=0.0,
    auto_augment=None,
    interpolation="bilinear",
    crop_pct=1.0,
)
"""For images of some 28 pixels: padded random crop, horizontal flip, random erasing."""
