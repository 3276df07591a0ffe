"""From a configuration to the objects of a run: data, model, optimiser, and how they are wired."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from v2m.engine.config import TrainConfig
from v2m.engine.distributed import Ranks, choose_device
from v2m.engine.graphs import check_graphs, graphed
from v2m.engine.loop import Loop
from v2m.engine.optim import create_ema, create_optimizer, create_schedule
from v2m.engine.randomness import seed_everything
from v2m.engine.sharding import blocks, shard
from v2m.engine.state import TrainingState
from v2m.engine.task import Task, get_task
from v2m.errors import InputError
from v2m.ops.backend import explain_backend


@dataclass(kw_only=True)
class Session:
    """Everything a run works with; `loop.state` is what it changes."""

    config: TrainConfig
    ranks: Ranks
    device: torch.device
    task: Task
    train_set: Any  # what the task says, as are the loaders
    train_loader: Any
    validation_loader: Any
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
    task = get_task(config)
    train_set = task.open_dataset("train")
    validation_set = task.open_dataset("validation")
    micro_batch = micro_batch_size(config, ranks)
    if len(train_set) < data.batch_size:
        raise InputError(
            f"data.batch_size = {data.batch_size} is more than the {len(train_set)} training "
            f"images of {train_set.name}: set data.batch_size to at most that."
        )
    task.prepare(train_set, micro_batch)
    seed_everything(config.run.seed)
    model = task.build_model(train_set)
    model.to(device)
    steps = len(train_set) // data.batch_size
    steps = min(steps, config.run.limit_batches or steps)
    ema = create_ema(model, config.ema)
    precision, autocast = choose_precision(config.run.precision, device)
    network = _network(config, model, ema, device, ranks, micro_batch, autocast)
    optimizer = create_optimizer(model, config.optim, global_batch=data.batch_size)
    state = TrainingState(
        model=model,
        optimizer=optimizer,
        steps_per_epoch=steps,
        ema=ema,
    )
    loop = Loop(
        state=state,
        network=network,
        schedule=create_schedule(optimizer, config.schedule, steps_per_epoch=steps),
        device=device,
        seed=config.run.seed,
        ranks=ranks,
        autocast=autocast,
        loss=task.loss,
        has_accuracy=task.has_accuracy,
        clip_norm=config.optim.clip_norm,
        accumulation=config.optim.accumulation,
    )
    return Session(
        config=config,
        ranks=ranks,
        device=device,
        task=task,
        train_set=train_set,
        train_loader=task.open_loader(
            model, train_set, ranks, batch_size=micro_batch, is_training=True
        ),
        validation_loader=task.open_loader(model, validation_set, ranks, batch_size=micro_batch),
        loop=loop,
        precision=precision,
        description=task.describe(model, train_set),
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


def _network(
    config: TrainConfig,
    model: nn.Module,
    ema: ModelEmaV3 | None,
    device: torch.device,
    ranks: Ranks,
    micro_batch: int,
    autocast: Callable[[], AbstractContextManager],
) -> nn.Module:
    """What the loop calls: the model, for several ranks wrapped (ddp) or, as its average is,
    changed into shards (fsdp), and compiled or captured if that is wanted."""
    if config.run.cuda_graph:
        check_graphs(config, device)
    if ranks.world > 1 and config.run.parallel == "fsdp":
        if explain_backend(None, device.type)[0] == "cpu":
            raise InputError(
                "run.parallel = fsdp is for GPUs; on a CPU it works with V2M_BACKEND=eager alone, "
                "since the compiled kernels hold on to the memory that shards give back. Set that, "
                "or run.parallel=ddp."
            )
        if config.run.compile:  # block by block: a graph cannot reach across the gathering
            for block in blocks(model):
                block.compile()
        for part in (model, *([ema.module] if ema is not None else [])):
            shard(part, ranks, device)
        return model
    network = model
    if config.run.cuda_graph:  # ranks exchange gradients outside the graphs
        network = torch.compile(network) if config.run.compile else network
        shape = micro_batch, *model.pretrained_cfg["input_size"]
        network = graphed(network, shape, device, autocast)
    if ranks.world > 1:
        network = DistributedDataParallel(
            network, device_ids=[device.index] if device.type == "cuda" else None
        )
    if config.run.compile and not config.run.cuda_graph:
        network = torch.compile(network)
    return network
