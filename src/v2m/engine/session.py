"""From a configuration to the objects of a run: data, model, optimiser, and how they are wired."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.data import Mixup
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import v2m
from v2m.data import ImageDataset, Loader, create_loader, load_dataset
from v2m.engine.config import TrainConfig, to_dict
from v2m.engine.distributed import Ranks, choose_device
from v2m.engine.loop import Loop
from v2m.engine.optim import create_ema, create_optimizer, create_schedule
from v2m.engine.randomness import seed_everything
from v2m.engine.state import TrainingState
from v2m.errors import InputError


@dataclass(kw_only=True)
class Session:
    """Everything a run works with; `loop.state` is what it changes."""

    config: TrainConfig
    ranks: Ranks
    device: torch.device
    train_set: ImageDataset
    train_loader: Loader
    validation_loader: Loader
    loop: Loop
    precision: str
    description: dict[str, Any]  # save_model's keywords

    @property
    def state(self) -> TrainingState:
        return self.loop.state


def build_session(config: TrainConfig, ranks: Ranks) -> Session:
    """Load the data and make the model, its optimiser and the loop. InputError for what does not
    fit."""
    device = choose_device(config.run.device, ranks)
    data = config.data
    train_set = open_dataset(config, "train")
    validation_set = open_dataset(config, "validation")
    micro_batch = micro_batch_size(config, ranks)
    if len(train_set) < data.batch_size:
        raise InputError(
            f"data.batch_size = {data.batch_size} is more than the {len(train_set)} training "
            f"images of "
            f"{train_set.name}: set data.batch_size to at most that."
        )
    seed_everything(config.run.seed)
    model = build_model(config, train_set)
    model.to(device)
    steps = len(train_set) // data.batch_size
    steps = min(steps, config.run.limit_batches or steps)
    optimizer = create_optimizer(model, config.optim, global_batch=data.batch_size)
    state = TrainingState(
        model=model,
        optimizer=optimizer,
        steps_per_epoch=steps,
        ema=create_ema(model, config.ema),
    )
    precision, autocast = choose_precision(config.run.precision, device)
    loop = Loop(
        state=state,
        network=_network(config, model, device, ranks),
        schedule=create_schedule(optimizer, config.schedule, steps_per_epoch=steps),
        device=device,
        seed=config.run.seed,
        ranks=ranks,
        autocast=autocast,
        mixup=create_mixup(config, len(train_set.classes), micro_batch),
        label_smoothing=config.mix.label_smoothing,
        clip_norm=config.optim.clip_norm,
        accumulation=config.optim.accumulation,
    )
    return Session(
        config=config,
        ranks=ranks,
        device=device,
        train_set=train_set,
        train_loader=open_loader(config, model, train_set, ranks, is_training=True),
        validation_loader=open_loader(config, model, validation_set, ranks),
        loop=loop,
        precision=precision,
        description=describe_model(config, model, train_set),
    )


def micro_batch_size(config: TrainConfig, ranks: Ranks) -> int:
    """Images per forward pass on one device: the global batch over ranks and micro-batches."""
    parts = ranks.world * config.optim.accumulation
    if config.data.batch_size % parts:
        raise InputError(
            f"data.batch_size = {config.data.batch_size} cannot be split evenly over "
            f"{ranks.world} processes x "
            f"optim.accumulation = {config.optim.accumulation}: make it a multiple of {parts}."
        )
    return config.data.batch_size // parts


def create_mixup(config: TrainConfig, classes: int, micro_batch: int) -> Mixup | None:
    """timm's mixup and cutmix; None when both alphas are 0."""
    mix = config.mix
    if mix.mixup == 0 and mix.cutmix == 0:
        return None
    if micro_batch % 2:
        raise InputError(
            f"mix.mixup and mix.cutmix mix pairs of images, but a micro-batch has {micro_batch}: "
            "choose data.batch_size and optim.accumulation so that it is even."
        )
    return Mixup(
        mixup_alpha=mix.mixup,
        cutmix_alpha=mix.cutmix,
        prob=mix.probability,
        label_smoothing=mix.label_smoothing,
        num_classes=classes,
    )


def choose_precision(
    name: str, device: torch.device
) -> tuple[str, Callable[[], AbstractContextManager]]:
    """The precision's name and what makes its context. `auto`: bfloat16 on GPUs that have it."""
    if name == "auto":
        has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if has_it else "float32"
    if name == "float32":
        return name, nullcontext
    return name, partial(torch.autocast, device.type, dtype=torch.bfloat16)


def open_dataset(config: TrainConfig, split: str) -> ImageDataset:
    """One split of the run's data set."""
    data = config.data
    if data.name is None:
        raise InputError(
            "no data set is named: give --data a name of `v2m data`, or a folder of images."
        )
    return load_dataset(
        data.name,
        split,
        on_error=data.on_error,
        validation_fraction=data.validation_fraction,
        seed=data.split_seed,
    )


def open_loader(
    config: TrainConfig,
    model: nn.Module,
    dataset: ImageDataset,
    ranks: Ranks,
    *,
    is_training: bool = False,
) -> Loader:
    """This rank's micro-batches of a data set, as the model wants its images."""
    cfg = model.pretrained_cfg
    return create_loader(
        dataset,
        config.augment,
        is_training=is_training,
        input_size=cfg["input_size"],
        batch_size=micro_batch_size(config, ranks),
        mean=cfg["mean"],
        std=cfg["std"],
        seed=config.run.seed,
        num_workers=config.data.workers,
        rank=ranks.rank,
        world_size=ranks.world,
    )


def build_model(config: TrainConfig, train_set: ImageDataset) -> nn.Module:
    """The model for the data set's classes, with `pretrained_cfg` saying how its images are
    prepared.

    A model from a checkpoint keeps its own channels, mean and standard deviation; a new one has
    the data set's.
    """
    wanted = config.model
    keywords: dict[str, Any] = {"num_classes": len(train_set.classes)}
    if wanted.drop_path_rate is not None:
        keywords["drop_path_rate"] = wanted.drop_path_rate
    if wanted.img_size is not None:
        keywords["img_size"] = wanted.img_size if len(wanted.img_size) == 2 else wanted.img_size[0]
    if wanted.checkpoint is None:
        keywords["in_chans"] = train_set.in_chans
    keywords |= wanted.kwargs
    try:
        if wanted.checkpoint is not None:
            model = v2m.from_checkpoint(wanted.checkpoint, **keywords)
        else:
            assert wanted.name is not None, "a run has a model or a checkpoint"
            model = v2m.create_model(wanted.name, **keywords)
    except TypeError as error:
        raise InputError(
            f"model {wanted.name}: it does not take these settings: {error}"
        ) from error
    _check_architecture(config, model)
    if config.run.grad_checkpointing:
        model.set_grad_checkpointing(True)
    model.pretrained_cfg = model.pretrained_cfg | _preprocessing(config, model, train_set, keywords)
    return model


def _check_architecture(config: TrainConfig, model: nn.Module) -> None:
    name, found = config.model.name, model.pretrained_cfg["architecture"]
    if config.model.checkpoint is not None and name not in (None, found):
        raise InputError(
            f"model.checkpoint = {config.model.checkpoint!r} holds a {found}, not the {name} that "
            f"is named: "
            "leave the name out, or name that."
        )


def _preprocessing(
    config: TrainConfig, model: nn.Module, train_set: ImageDataset, keywords: dict[str, Any]
) -> dict[str, Any]:
    """What `pretrained_cfg` has to say about images of this run."""
    cfg = model.pretrained_cfg
    channels, height, width = cfg["input_size"]
    if config.model.checkpoint is None:
        channels = keywords["in_chans"]
    if config.model.img_size is not None:
        height, width = config.model.img_size[0], config.model.img_size[-1]
    own = train_set if config.model.checkpoint is None else None
    statistics = {
        "mean": tuple(own.mean if own else cfg["mean"]),
        "std": tuple(own.std if own else cfg["std"]),
    }
    for name, values in statistics.items():
        if len(values) != channels:
            statistics[name] = (sum(values) / len(values),) * channels
    return {
        **statistics,
        "input_size": (channels, height, width),
        "crop_pct": config.augment.crop_pct,
        "interpolation": config.augment.interpolation.replace("random", "bicubic"),
    }


def describe_model(
    config: TrainConfig, model: nn.Module, train_set: ImageDataset
) -> dict[str, Any]:
    """The keywords of `save_model`: class names, preprocessing, and what it was trained on and
    how."""
    keys = ("input_size", "mean", "std", "crop_pct", "interpolation")
    return {
        "label_names": list(train_set.classes),
        "pretrained_cfg": {key: model.pretrained_cfg[key] for key in keys},
        "v2m": {
            "task": "classification",
            "data": train_set.name,
            "version": v2m.__version__,
            "training": to_dict(config),
        },
    }


def _network(
    config: TrainConfig, model: nn.Module, device: torch.device, ranks: Ranks
) -> nn.Module:
    network = model
    if ranks.world > 1:
        network = DistributedDataParallel(
            network, device_ids=[device.index] if device.type == "cuda" else None
        )
    return torch.compile(network) if config.run.compile else network
