"""The optimiser with its weight-decay groups, the learning-rate schedule and the average of the
weights, all from timm."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from v2m.engine.config import EmaConfig, OptimConfig, ScheduleConfig
from v2m.errors import InputError

# Never decayed, whatever a model's `no_weight_decay` says: the state matrices, skips and positions
# of this family.
UNDECAYED_NAMES = frozenset({"A_log", "A_2_log", "D", "D_2", "dt_bias", "pos_embed", "cls_token"})


def undecayed_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters without weight decay.

    These are the ones of one dimension or none (norms, biases), the ones the model names in
    `no_weight_decay()`, the ones marked with an attribute `_no_weight_decay`, and those with a
    name in `UNDECAYED_NAMES`.
    """
    declared = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    names = set()
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if (
            parameter.ndim <= 1
            or name in declared
            or last in UNDECAYED_NAMES
            or last == "bias"
            or getattr(parameter, "_no_weight_decay", False)
        ):
            names.add(name)
    return names


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Parameter groups with and without weight decay and, with `layer_decay`, one learning-rate
    scale a layer."""
    undecayed = undecayed_parameters(model)
    if config.layer_decay is None:
        return param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=undecayed)
    return param_groups_layer_decay(
        model, config.weight_decay, no_weight_decay_list=undecayed, layer_decay=config.layer_decay
    )


def learning_rate(config: OptimConfig, global_batch: int) -> float:
    """The peak learning rate: `optim.lr`, times global batch / `optim.lr_batch_size` when that is
    set."""
    return config.lr * (global_batch / config.lr_batch_size if config.lr_batch_size else 1.0)


def create_optimizer(
    model: nn.Module, config: OptimConfig, *, global_batch: int
) -> torch.optim.Optimizer:
    """timm's optimiser of that name over the model's parameter groups. Raises InputError for an
    unknown name."""
    known = list_optimizers()
    if config.name not in known:
        near = get_close_matches(config.name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(
            f"optim.name = {config.name!r} is not an optimiser timm knows{hint} "
            f"(there are {', '.join(n for n in known if not n.startswith('bnb'))})."
        )
    arguments = {"betas": config.betas} if "adam" in config.name or "lamb" in config.name else {}
    if config.name == "adamw" and _are_plain_on_cpu(model):
        arguments["fused"] = True  # torch's loop over the tensors takes six times as long
    try:
        return create_optimizer_v2(
            model,
            opt=config.name,
            lr=learning_rate(config, global_batch),
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            param_group_fn=lambda m: parameter_groups(m, config),
            **arguments,
        )
    except (ImportError, AssertionError) as error:
        raise InputError(f"optim.name = {config.name!r} cannot be used here: {error}") from error


def _are_plain_on_cpu(model: nn.Module) -> bool:
    """Whether all parameters are ordinary tensors on the CPU, not shards."""
    return all(type(p) is nn.Parameter and p.device.type == "cpu" for p in model.parameters())


def create_schedule(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, *, steps_per_epoch: int
) -> Scheduler:
    """Linear warm-up, then a cosine, steps or a straight line down; one value per optimiser step.
    `step_update(t)` sets the rate for step t."""
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)
    shape, keywords = _shape(config, total, warmup)
    schedule = shape(
        optimizer,
        warmup_t=warmup,
        warmup_lr_init=config.warmup_lr,
        t_in_epochs=False,
        **keywords,
    )
    schedule.step_update(0)
    return schedule


def _shape(
    config: ScheduleConfig, total: int, warmup: int
) -> tuple[type[Scheduler], dict[str, Any]]:
    """timm's class for what follows the warm-up, and its own settings."""
    if config.name == "multistep":  # counted from the first step of the run, as in mmdetection
        steps = [round(part * total) + 1 for part in config.milestones]  # timm is one step early
        keywords = {"decay_t": steps, "decay_rate": config.gamma, "warmup_prefix": False}
        return MultiStepLRScheduler, keywords
    steps = max(2, total - warmup)  # of one, timm warns that it falls nowhere
    keywords = {"t_initial": steps, "lr_min": config.min_lr, "warmup_prefix": True}
    if config.name == "linear":
        return PolyLRScheduler, {**keywords, "power": 1.0}
    return CosineLRScheduler, keywords


def create_ema(model: nn.Module, config: EmaConfig) -> ModelEmaV3 | None:
    """The exponential moving average of the weights, None when `ema.decay` is none."""
    if config.decay is None:
        return None
    has_buffers = next(model.buffers(), None) is not None
    return ModelEmaV3(
        model,
        decay=config.decay,
        use_warmup=config.warmup,
        warmup_power=config.warmup_power,
        exclude_buffers=not has_buffers,  # or two state dicts are made for each step
    )
