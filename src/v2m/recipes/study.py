"""What the 2-D scan is worth: one recipe, nine models of equal size, and the best V2M of 28 pixels.

A variant differs from the recipe's model in its token mixer alone or, for the baselines, in what it
is. The plain ones have 6 layers and 200,393 parameters give or take 3 %: where a mixer needs more,
the model is narrower, and DeiT has 4 layers, since a block of it (attention and MLP, 12 D^2) has
twice the weights of a mixer (6 D^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

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
from v2m.layers import CrossScan2d
from v2m.models import V2M, create_model

__all__ = [
    "BEST",
    "LEARNING_RATES",
    "VARIANTS",
    "Variant",
    "build_variant",
    "fashion_mnist",
    "shallow",
    "study",
    "study_small",
]

LEARNING_RATES = (1e-3, 3e-3, 9e-3)  # tried with every variant, on the validation images
_WIDTH, _LAYERS = 64, 6
_PLAIN = {"embed_dim": _WIDTH, "depth": _LAYERS}
_PATCHES = {"patch_size": 4, "img_size": 28}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model of the study.

    Attributes:
        title: what the tables call it.
        model: a name for `v2m.create_model`.
        keywords: the keywords that go with it.
        adapt: what is changed in the model that this builds.
        compiled: compile its mixers on a GPU; for plain PyTorch that is slow otherwise.
        sized: whether it has to have the parameters of the others.
    """

    title: str
    model: str = "v2m_nano_patch4_28"
    keywords: dict[str, Any] = field(default_factory=dict)
    adapt: Callable[[nn.Module], nn.Module] = lambda model: model
    compiled: bool = False
    sized: bool = True


def _cross_scan(model: V2M) -> V2M:
    """VMamba's token mixer in the place of V2M's, with the same states and inner width."""
    config = model.config
    for block in model.layers:
        block.mixer = CrossScan2d(config.embed_dim, d_state=config.d_state, expand=config.expand)
        block.mixer.out_proj.weight.data.div_(math.sqrt(config.depth))  # as `V2M.init_weights`
    return model


def _small_stem(model: nn.Module) -> nn.Module:
    """ResNet's usual change for small images: a 3x3 convolution of stride 1, and no pooling."""
    old = model.conv1
    model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model.to(memory_format=torch.channels_last)


VARIANTS: dict[str, Variant] = {
    "corners": Variant(title="V2M `corners`", keywords=_PLAIN),
    "release": Variant(title="V2M `release`", keywords={**_PLAIN, "scan": "release"}),
    "release_aligned": Variant(
        title="`release`, without its misalignment",
        keywords={**_PLAIN, "scan": "release_aligned"},
    ),
    "corner": Variant(title="V2M, one corner", keywords={**_PLAIN, "scan": "corner"}),
    "full_state": Variant(
        title="V2M, whole state handed over",
        keywords={**_PLAIN, "hand_over": "state"},
        compiled=True,
    ),
    "vim": Variant(
        title="Vim (1-D)",
        model="vim_tiny_patch16_224",
        keywords={**_PATCHES, "embed_dim": 62, "depth": _LAYERS, "d_state": 8},
    ),
    "cross_scan": Variant(
        title="VMamba's cross-scan",
        keywords={**_PLAIN, "embed_dim": 62},
        adapt=_cross_scan,
    ),
    "deit": Variant(
        title="DeiT (timm)",
        model="deit_tiny_patch16_224",
        keywords={**_PATCHES, "embed_dim": _WIDTH, "depth": 4, "num_heads": 2},
    ),
    "resnet18": Variant(
        title="ResNet-18 (timm), stem for small images",
        model="resnet18",
        adapt=_small_stem,
        sized=False,
    ),
}

# What `fashion_mnist` may be; which one it is was decided on the validation images.
BEST: dict[str, Variant] = {
    "hier_112": Variant(
        title="hierarchical V2M, images enlarged to 112 pixels",
        model="v2m_hier_small_224",
        keywords={"dims": [64, 128, 256, 512], "depths": [2, 2, 6, 2], "img_size": 112},
    ),
    "hier_56": Variant(
        title="hierarchical V2M, images enlarged to 56 pixels",
        model="v2m_hier_small_224",
        keywords={"dims": [96, 192, 384], "depths": [3, 6, 3], "img_size": 56},
    ),
    "plain_patch2": Variant(
        title="plain V2M, patches of 2 pixels",
        keywords={"embed_dim": 128, "depth": 12, "patch_size": 2},
    ),
}


def shallow(variant: Variant) -> Variant:
    """The variant with half its layers, for `study_small`."""
    keywords = variant.keywords
    return replace(variant, keywords={**keywords, "depth": keywords["depth"] // 2})


def build_variant(
    variant: Variant, *, in_chans: int = 1, num_classes: int = 10, drop_path_rate: float = 0.0
) -> nn.Module:
    """The model of a variant, for images with `in_chans` channels."""
    keywords = {"in_chans": in_chans, "num_classes": num_classes, **variant.keywords}
    if drop_path_rate:
        keywords["drop_path_rate"] = drop_path_rate
    return variant.adapt(create_model(variant.model, **keywords))


def study() -> TrainConfig:
    """V2M `corners` on Fashion-MNIST, the recipe of every model in docs/results.md.

    The study itself trains by its own loop, with data and augmentation on the GPU and the step as
    one CUDA graph: `python benchmarks/study.py all`.

    Command: `v2m train --recipe study --output runs/study`
    Hardware: one GPU.
    Time: see docs/results.md.
    Result: see docs/results.md.
    """
    return TrainConfig(
        model=ModelConfig(name=VARIANTS["corners"].model, kwargs=dict(_PLAIN)),
        data=DatasetConfig(name="fashion-mnist", batch_size=512, validation_fraction=1 / 12),
        augment=replace(SMALL_IMAGES, random_erasing=0.25),
        mix=MixConfig(label_smoothing=0.1),
        optim=OptimConfig(lr=2e-3, weight_decay=0.05),
        schedule=ScheduleConfig(epochs=16, warmup_epochs=2.0),
    )


def study_small() -> TrainConfig:
    """The same on the 10,000 bundled images, with half the layers, in minutes on one CPU core.

    Command: `v2m train --recipe study_small --output runs/study_small`
    Hardware: one CPU core.
    Time: see docs/results.md.
    Result: see docs/results.md.
    """
    config = study()
    model = shallow(VARIANTS["corners"])
    return replace(
        config,
        model=ModelConfig(name=model.model, kwargs=dict(model.keywords)),
        data=DatasetConfig(name="fashion-mnist-small", batch_size=64),
        augment=replace(config.augment, crop_padding=1, random_erasing=0.0),
        schedule=ScheduleConfig(epochs=8, warmup_epochs=1.0),
    )


def fashion_mnist() -> TrainConfig:
    """The best V2M for Fashion-MNIST that 8 minutes of an H100 train.

    `python benchmarks/study.py best --variant hier_56` runs the same with the data and the
    augmentation on the GPU and the step as one CUDA graph, as many epochs as fit into the minutes
    it is given.

    Command: `v2m train --recipe fashion_mnist --output runs/fashion_mnist`
    Hardware: one GPU.
    Time: 7.05 minutes for 125 epochs by that command, on an H200.
    Result: 95.03 % top-1 on the test images after them (docs/results.md).
    """
    variant = BEST["hier_56"]
    keywords = {key: value for key, value in variant.keywords.items() if key != "img_size"}
    return TrainConfig(
        model=ModelConfig(name=variant.model, img_size=(56,), drop_path_rate=0.1, kwargs=keywords),
        data=DatasetConfig(name="fashion-mnist", batch_size=512, validation_fraction=1 / 12),
        augment=replace(SMALL_IMAGES, random_erasing=0.25),
        mix=MixConfig(label_smoothing=0.1),
        optim=OptimConfig(lr=3e-3, weight_decay=0.05),
        schedule=ScheduleConfig(epochs=125, warmup_epochs=5.0),
        ema=EmaConfig(decay=0.998),
    )
