"""Weight-decay groups, the schedule, the learning-rate rule and the optimiser's errors."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

import v2m
from v2m.engine.config import EmaConfig, OptimConfig, ScheduleConfig
from v2m.engine.optim import (
    create_ema,
    create_optimizer,
    create_schedule,
    learning_rate,
    undecayed_parameters,
)
from v2m.errors import InputError


def tiny() -> nn.Module:
    return v2m.create_model(
        "v2m_nano_patch4_28", img_size=8, embed_dim=8, depth=3, d_state=2, num_classes=3
    )


def decays(model: nn.Module, config: OptimConfig) -> dict[str, float]:
    optimizer = create_optimizer(model, config, global_batch=8)
    by_id = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(by_id) == len(list(model.parameters())), "each parameter is in one group"
    return {name: by_id[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_which_parameters_decay(layer_decay: float | None) -> None:
    found = decays(tiny(), OptimConfig(weight_decay=0.1, layer_decay=layer_decay))
    decayed = {name for name, value in found.items() if value}
    assert {found[name] for name in decayed} == {0.1}
    for name in found:
        last = name.rpartition(".")[2]
        exempt = last in ("A_log", "A_2_log", "D", "D_2", "bias", "pos_embed") or "norm" in name
        assert (name in decayed) is not exempt, name
    kinds = {"in_proj.weight", "out_proj.weight", "x_proj.weight", "dt_proj.weight", "head.weight"}
    for kind in kinds:
        assert any(name.endswith(kind) for name in decayed), kind
    assert any(name.endswith("A_log") for name in found)


def test_names_and_marks_count_where_a_model_declares_nothing() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A_log = nn.Parameter(torch.ones(2, 2))
            self.pos_embed = nn.Parameter(torch.ones(1, 2, 2))
            self.weight = nn.Parameter(torch.ones(2, 2))
            self.marked = nn.Parameter(torch.ones(2, 2))
            self.marked._no_weight_decay = True
            self.wide = nn.Module()
            self.wide.bias = nn.Parameter(torch.ones(1, 2, 2))

    assert undecayed_parameters(Plain()) == {"A_log", "pos_embed", "marked", "wide.bias"}


def test_a_model_of_timm() -> None:
    model = timm.create_model("test_vit", num_classes=3)
    found = decays(model, OptimConfig(weight_decay=0.1))
    assert found["pos_embed"] == found["cls_token"] == found["norm.weight"] == 0
    assert found["blocks.0.attn.qkv.weight"] == 0.1


def test_layer_decay_scales_the_learning_rate() -> None:
    model = tiny()
    optimizer = create_optimizer(model, OptimConfig(lr=1.0, layer_decay=0.5), global_batch=8)
    create_schedule(
        optimizer, ScheduleConfig(epochs=2, warmup_epochs=0, min_lr=0), steps_per_epoch=5
    )
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    order = [
        rates[id(p)]
        for p in (
            model.patch_embed.proj.weight,
            model.layers[0].mixer.in_proj.weight,
            model.layers[1].mixer.in_proj.weight,
            model.layers[2].mixer.in_proj.weight,
            model.head.weight,
        )
    ]
    assert order == sorted(order)
    assert order[-1] == 1.0
    assert order[2] == 2 * order[1]


def test_the_schedule_warms_up_and_goes_down() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.4)
    config = ScheduleConfig(epochs=10, warmup_epochs=2, warmup_lr=0.1, min_lr=0.01)
    schedule = create_schedule(optimizer, config, steps_per_epoch=10)
    rates = []
    for step in range(101):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == 0.1
    assert rates[10] == pytest.approx(0.25)
    assert rates[20] == pytest.approx(0.4)
    assert rates[60] == pytest.approx((0.4 + 0.01) / 2)
    assert rates[100] == pytest.approx(0.01)
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)


@pytest.mark.parametrize("epochs", [1, 2])
def test_short_schedules(epochs: int) -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.4)
    config = ScheduleConfig(epochs=epochs, warmup_epochs=0)
    schedule = create_schedule(optimizer, config, steps_per_epoch=1)
    schedule.step_update(epochs)
    assert math.isfinite(optimizer.param_groups[0]["lr"])


def test_the_learning_rate_follows_the_global_batch() -> None:
    assert learning_rate(OptimConfig(lr=0.1), 512) == 0.1
    assert learning_rate(OptimConfig(lr=0.1, lr_batch_size=256), 512) == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lamb"])
def test_optimisers_by_name(name: str) -> None:
    optimizer = create_optimizer(tiny(), OptimConfig(name=name, lr=0.01), global_batch=8)
    assert {g["lr"] for g in optimizer.param_groups} == {0.01}


def test_an_unknown_optimiser_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"optim\.name = 'adamv' is not an optimiser .*did you mean 'adam.*adamw"
    ):
        create_optimizer(tiny(), OptimConfig(name="adamv"), global_batch=8)


def test_the_average_starts_with_the_weights_and_follows_them() -> None:
    model = nn.Linear(2, 2)
    ema = create_ema(model, EmaConfig(decay=0.5, warmup=False))
    assert create_ema(model, EmaConfig(decay=None)) is None
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema.update(model, step=1)
    assert torch.equal(ema.module.weight, model.weight)
    with torch.no_grad():
        model.weight.fill_(3.0)
    ema.update(model, step=2)
    assert torch.equal(ema.module.weight, torch.full((2, 2), 2.0))
