"""Recipes: functions that return a `TrainConfig`, and say their command, hardware, time and
expected result."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from v2m.engine.config import TrainConfig
from v2m.errors import InputError
from v2m.recipes.demo import demo
from v2m.recipes.detection import (
    coco_hier_base_1x,
    coco_hier_base_3x,
    coco_hier_small_1x,
    coco_hier_small_3x,
    detect_own,
)
from v2m.recipes.finetune import finetune
from v2m.recipes.imagenet import (
    imagenet_hier_base,
    imagenet_hier_small,
    imagenet_local_small,
    imagenet_local_tiny,
    imagenet_small,
    imagenet_tiny,
)
from v2m.recipes.segmentation import (
    ade20k_hier_base,
    ade20k_hier_small,
    ade20k_local_small,
    ade20k_local_tiny,
    segment_own,
)
from v2m.recipes.study import fashion_mnist, study, study_small

__all__ = [
    "RECIPES",
    "ade20k_hier_base",
    "ade20k_hier_small",
    "ade20k_local_small",
    "ade20k_local_tiny",
    "coco_hier_base_1x",
    "coco_hier_base_3x",
    "coco_hier_small_1x",
    "coco_hier_small_3x",
    "demo",
    "detect_own",
    "fashion_mnist",
    "finetune",
    "get_recipe",
    "imagenet_hier_base",
    "imagenet_hier_small",
    "imagenet_local_small",
    "imagenet_local_tiny",
    "imagenet_small",
    "imagenet_tiny",
    "segment_own",
    "study",
    "study_small",
    "summary",
]

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        *(demo, imagenet_tiny, imagenet_small, imagenet_local_tiny, imagenet_local_small),
        *(imagenet_hier_small, imagenet_hier_base, finetune),
        *(coco_hier_small_1x, coco_hier_base_1x, coco_hier_small_3x, coco_hier_base_3x),
        *(ade20k_local_tiny, ade20k_local_small, ade20k_hier_small, ade20k_hier_base),
        *(detect_own, segment_own),
        *(study, study_small, fashion_mnist),
    )
}


def get_recipe(name: str) -> TrainConfig:
    """The configuration of a recipe by its name; InputError names the ones there are."""
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"unknown recipe {name!r}.{hint} There are: {', '.join(RECIPES)}.")
    return RECIPES[name]()


def summary(name: str) -> str:
    """The first line of a recipe's docstring."""
    return (RECIPES[name].__doc__ or "").strip().splitlines()[0]
