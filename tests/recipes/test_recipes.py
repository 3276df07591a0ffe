"""Every recipe is a valid configuration, says what it is, and fits its model."""

from __future__ import annotations

import pytest

import v2m
from v2m.engine.config import TrainConfig, from_dict, to_dict
from v2m.engine.optim import learning_rate
from v2m.engine.settings import apply_overrides
from v2m.errors import InputError
from v2m.recipes import RECIPES, get_recipe, imagenet_small, imagenet_tiny, summary


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe(name: str) -> None:
    config = get_recipe(name)
    assert from_dict(TrainConfig, to_dict(config)) == config
    assert apply_overrides(config, []) == config
    text = RECIPES[name].__doc__
    for word in ("Command: `", "Hardware: ", "Time: ", "Result: ", f"--recipe {name}", "--output"):
        assert word in text, word
    assert summary(name) == text.splitlines()[0]
    if config.model.name is not None:
        assert config.model.name in v2m.list_models()
    else:
        assert "model.checkpoint" in text


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown recipe 'imagenet_tny'.*'imagenet_tiny'"):
        get_recipe("imagenet_tny")


def test_the_published_recipe() -> None:
    tiny, small = imagenet_tiny(), imagenet_small()
    assert (tiny.model.drop_path_rate, small.model.drop_path_rate) == (0.0, 0.05)
    assert (tiny.optim.lr, small.optim.lr) == (5e-4, 1e-3)
    assert (tiny.optim.weight_decay, small.optim.weight_decay) == (0.1, 0.05)
    for config in (tiny, small):
        assert config.data.batch_size == 8 * 64
        assert learning_rate(config.optim, 1024) == 2 * config.optim.lr
        schedule = config.schedule
        assert (schedule.epochs, schedule.warmup_epochs) == (300, 5)
        assert (schedule.warmup_lr, schedule.min_lr) == (1e-6, 1e-5)
        assert config.ema.decay == 0.99996
        mix, augment = config.mix, config.augment
        assert (mix.mixup, mix.cutmix, mix.label_smoothing) == (0.8, 1.0, 0.1)
        assert augment.auto_augment == "rand-m9-mstd0.5-inc1"
        assert (augment.random_erasing, augment.color_jitter) == (0.25, 0.3)
        assert (augment.interpolation, augment.crop_pct) == ("bicubic", 0.875)
        assert augment.repeats == 3
