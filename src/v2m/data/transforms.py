"""Transforms of one PIL image, from timm and torchvision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import (
    augment_and_mix_transform,
    auto_augment_transform,
    posterize,
    rand_augment_transform,
)
from timm.data.transforms import ResizeKeepRatio, str_to_pil_interp
from torch import Tensor
from torchvision import transforms

from v2m.data.config import DataConfig
from v2m.data.images import to_channels
from v2m.errors import InputError

__all__ = ["check_input_size", "evaluation_transform", "training_transform"]

Transform = Callable[[Image.Image], Tensor]


def check_input_size(
    input_size: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> tuple[int, int, int]:
    """(C, H, W) as a tuple; InputError unless C is 1 or 3 and `mean` and `std` have C numbers."""
    size = tuple(input_size)
    if len(size) != 3 or size[0] not in (1, 3) or min(size) < 1:
        raise InputError(
            f"input_size must be (C, H, W) with 1 or 3 channels; got {size}. Choose a model with "
            "in_chans 1 or 3."
        )
    if len(mean) != size[0] or len(std) != size[0] or min(std) <= 0:
        raise InputError(
            f"mean and std must have one number for each of the {size[0]} channels, std above 0; "
            f"got {tuple(mean)} and {tuple(std)}."
        )
    return size


def evaluation_transform(
    config: DataConfig,
    input_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Transform:
    """PIL image -> normalised (C, H, W) float32: resize, central crop, normalise (timm's)."""
    channels, height, width = check_input_size(input_size, mean, std)
    return transforms.Compose(
        [
            _Channels(channels),
            create_transform(
                (channels, height, width),
                interpolation=_fixed(config.interpolation),
                mean=tuple(mean),
                std=tuple(std),
                crop_pct=config.crop_pct,
            ),
        ]
    )


def training_transform(
    config: DataConfig,
    input_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Transform:
    """PIL image -> augmented, normalised (C, H, W) float32, by timm's and torchvision's transforms.

    All random numbers come from the global generators of python, numpy and torch. With
    `config.on_device` it is (C, H, W) uint8, cropped and flipped; the rest is `DeviceAugment`'s.
    """
    channels, height, width = check_input_size(input_size, mean, std)
    crop, colour, finish = create_transform(
        (channels, height, width),
        is_training=True,
        scale=config.crop_scale,
        ratio=config.crop_ratio,
        hflip=config.horizontal_flip,
        vflip=config.vertical_flip,
        color_jitter=config.color_jitter or None,
        interpolation=config.interpolation,
        mean=tuple(mean),
        std=tuple(std),
        re_prob=config.random_erasing,
        re_mode=config.erasing_mode,
        separate=True,
    )
    if config.crop != "resized":
        crop = _whole_image(config, (height, width))
    if config.on_device:
        return transforms.Compose([_Channels(channels), crop, transforms.PILToTensor()])
    if config.auto_augment is not None:
        colour = _policy(config, (height, width), mean)
    return transforms.Compose([_Channels(channels), crop, colour, finish])


class _Channels:
    """PIL image -> mode "L" or "RGB"; a class, so that workers started by spawn can unpickle it."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def __call__(self, image: Image.Image) -> Image.Image:
        return to_channels(image, self.channels)


def _whole_image(config: DataConfig, size: tuple[int, int]) -> Transform:
    """Resize and central crop, then a random crop of the padded image if so configured; flips."""
    share = config.crop_pct if config.crop == "center" else 1
    steps = [
        ResizeKeepRatio(
            tuple(int(side / share) for side in size), interpolation=_fixed(config.interpolation)
        ),
        transforms.CenterCrop(size),
        transforms.RandomHorizontalFlip(config.horizontal_flip),
        transforms.RandomVerticalFlip(config.vertical_flip),
    ]
    if config.crop == "padded":
        steps.insert(2, transforms.RandomCrop(size, padding=config.crop_padding))
    return transforms.Compose(steps)


def _policy(config: DataConfig, size: tuple[int, int], mean: Sequence[float]) -> Callable:
    """timm's AutoAugment, RandAugment or AugMix, with the parameters its factory gives them."""
    name = config.auto_augment
    parameters = {
        "translate_const": int(min(size) * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
    }
    if config.interpolation != "random":
        parameters["interpolation"] = str_to_pil_interp(config.interpolation)
    if name.startswith("rand"):
        policy = rand_augment_transform(name, parameters)
        operations = policy.ops
    elif name.startswith("augmix"):
        policy = augment_and_mix_transform(name, {**parameters, "translate_pct": 0.3})
        operations = policy.ops
    else:
        policy = auto_augment_transform(name, parameters)
        operations = [operation for group in policy.policy for operation in group]
    for operation in operations:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return policy


def _posterize(image: Image.Image, bits: int, **kwargs: object) -> Image.Image:
    """timm's `posterize` with at least one bit: its strongest level asks for none, which made
    images black in older Pillows and is an error in Pillow 13."""
    return posterize(image, max(1, bits), **kwargs)


def _fixed(interpolation: str) -> str:
    return "bicubic" if interpolation == "random" else interpolation
