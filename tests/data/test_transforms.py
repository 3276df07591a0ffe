"""Transforms: sizes, grey, every policy, and the settings that are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from v2m.data import SMALL_IMAGES, DataConfig, evaluation_transform, training_transform
from v2m.errors import InputError

MEAN, STD = {1: (0.3,), 3: (0.5, 0.4, 0.3)}, {1: (0.4,), 3: (0.2, 0.3, 0.4)}


def picture(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("crop", ["resized", "padded", "center"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(28, 28), (32, 48), (17, 5)])
def test_every_crop_gives_the_size(crop: str, channels: int, size: tuple[int, int]) -> None:
    config = DataConfig(crop=crop)
    for build in (training_transform, evaluation_transform):
        transform = build(config, (channels, *size), MEAN[channels], STD[channels])
        for image in (picture(), picture(200, 9, "L"), picture(1, 1)):
            tensor = transform(image)
            assert (tensor.shape, tensor.dtype) == ((channels, *size), torch.float32)
            assert tensor.isfinite().all()


POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m10-n3", "augmix-m3-w3", "original", "v0", "3a"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_works_for_grey_and_colour(policy: str, channels: int) -> None:
    config = DataConfig(auto_augment=policy, crop="padded")
    transform = training_transform(config, (channels, 28, 28), MEAN[channels], STD[channels])
    image = picture(28, 28, "L" if channels == 1 else "RGB")
    results = {transform(image).numpy().tobytes() for _ in range(100)}
    assert len(results) > 50


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("increasing", [True, False])
def test_every_operation_of_randaugment_at_every_strength(mode: str, increasing: bool) -> None:
    channels = 1 if mode == "L" else 3
    name = f"rand-m9{'-inc1' if increasing else ''}"
    transform = training_transform(
        DataConfig(auto_augment=name), (channels, 28, 28), MEAN[channels], STD[channels]
    )
    operations = transform.transforms[2].ops
    assert len(operations) == 15
    for operation in operations:
        operation.prob = 1.0
        for magnitude in (0, 5, 10):
            operation.magnitude = magnitude
            image = operation(picture(28, 28, mode))
            assert (image.mode, image.size) == (mode, (28, 28)), operation.name


def test_evaluation_is_timms() -> None:
    config = DataConfig(crop_pct=0.9, interpolation="bilinear")
    ours = evaluation_transform(config, (3, 32, 48), MEAN[3], STD[3])
    theirs = create_transform(
        (3, 32, 48), interpolation="bilinear", mean=MEAN[3], std=STD[3], crop_pct=0.9
    )
    assert torch.equal(ours(picture()), theirs(picture()))


def test_without_augmentation_training_is_evaluation() -> None:
    config = DataConfig(
        crop="center", horizontal_flip=0, random_erasing=0, color_jitter=0, auto_augment=None
    )
    for size in ((32, 32), (20, 36)):
        training, evaluation = (
            build(config, (3, *size), MEAN[3], STD[3])(picture())
            for build in (training_transform, evaluation_transform)
        )
        assert torch.equal(training, evaluation)


def test_the_defaults_are_the_published_recipe() -> None:
    config = DataConfig()
    assert config.auto_augment == "rand-m9-mstd0.5-inc1"
    assert (config.random_erasing, config.erasing_mode, config.color_jitter) == (0.25, "pixel", 0.3)
    assert (config.interpolation, config.crop_pct, config.crop) == ("bicubic", 0.875, "resized")


def test_each_augmentation_happens_as_often_as_it_should() -> None:
    still = replace(SMALL_IMAGES, crop_padding=0, horizontal_flip=0, random_erasing=0)
    image = picture(28, 28)
    plain = training_transform(still, (3, 28, 28), MEAN[3], STD[3])(image)
    for name, expected in (("horizontal_flip", plain.flip(2)), ("vertical_flip", plain.flip(1))):
        transform = training_transform(replace(still, **{name: 0.3}), (3, 28, 28), MEAN[3], STD[3])
        count = 0
        for _ in range(300):
            result = transform(image)
            count += torch.equal(result, expected)
            assert torch.equal(result, expected) or torch.equal(result, plain)
        assert 60 < count < 120
    transform = training_transform(replace(still, random_erasing=0.3), (3, 28, 28), MEAN[3], STD[3])
    erased = sum(not torch.equal(transform(image), plain) for _ in range(300))
    assert 60 < erased < 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "middle"}, "crop must be one of resized, padded, center; got 'middle'"),
        ({"erasing_mode": "black"}, "erasing_mode must be one of pixel, rand, const"),
        ({"interpolation": "cubic"}, "interpolation must be one of nearest"),
        ({"horizontal_flip": 1.5}, "horizontal_flip must be a number from 0 to 1; got 1.5"),
        ({"vertical_flip": -1}, "vertical_flip must be"),
        ({"random_erasing": "often"}, "random_erasing must be a number from 0 to 1; got 'often'"),
        ({"random_erasing": float("nan")}, "random_erasing must be"),
        ({"color_jitter": -0.1}, "color_jitter must be"),
        ({"crop_pct": 0}, "crop_pct must be"),
        ({"crop_padding": -1}, "crop_padding must be a whole number of at least 0; got -1"),
        ({"crop_padding": 1.5}, "crop_padding must be a whole number"),
        ({"repeats": 0}, "repeats must be a whole number of at least 1"),
        ({"repeats": True}, "repeats must be a whole number"),
        ({"crop_scale": (0.5,)}, "crop_scale must be two numbers, 0 < low <= high <= 1"),
        ({"crop_scale": (0.5, 2)}, "crop_scale must be"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale must be"),
        ({"crop_ratio": (0, 1)}, "crop_ratio must be two numbers, 0 < low <= high;"),
        ({"auto_augment": "ran-m9"}, "auto_augment = 'ran-m9' is not a policy that timm knows"),
        ({"auto_augment": "rand-mfoo"}, "is not a policy that timm knows"),
        ({"auto_augment": "rand-q9"}, "is not a policy that timm knows"),
        ({"auto_augment": 9}, "is not a policy that timm knows"),
    ],
)
def test_settings_that_cannot_be_used(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DataConfig(**options)


def test_unknown_settings_are_errors() -> None:
    with pytest.raises(TypeError, match="flip"):
        DataConfig(flip=0.5)
