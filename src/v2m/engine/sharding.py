"""FSDP2: parameters, gradients and optimiser state in shards over the ranks, and whole tensors for
the checkpoint.

A checkpoint always holds whole tensors, so a run may go on with another number of ranks, sharded or
not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from v2m.engine.distributed import Ranks

__all__ = ["as_shards", "blocks", "gathered", "shard", "whole"]

_CONTAINERS = ("layers", "blocks")  # what this library and timm call their lists of blocks


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model, each called as a whole: what is gathered at once."""
    found = []
    for module in model.modules():
        for name, child in module.named_children():
            if name in _CONTAINERS and isinstance(child, nn.ModuleList | nn.Sequential):
                found += [block for block in child if not _has_blocks(block)]
    return found


def _has_blocks(module: nn.Module) -> bool:
    return any(name.rpartition(".")[2] in _CONTAINERS for name, _ in module.named_modules())


def shard(model: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Replace the parameters by shards, block by block; what is left belongs to the model itself.

    Names stay as they are, and so do marks on parameters (`_no_weight_decay`).
    """
    marks = {name: dict(vars(parameter)) for name, parameter in model.named_parameters()}
    mesh = init_device_mesh(device.type, (ranks.world,))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name, parameter in model.named_parameters():
        vars(parameter).update(marks[name])


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may lie in shards; collective if it does."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_shards(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, the same on every rank, in shards where those of `like` are."""
    return {name: _as_shard(value, like.get(name)) for name, value in values.items()}


def _as_shard(value: Tensor, like: Tensor | None) -> Tensor:
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    mesh = like.device_mesh
    value = value.to(mesh.device_type)
    return distribute_tensor(value, mesh, like.placements, src_data_rank=None)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold whole parameters on every rank while the block runs, so that ranks may call the model a
    different number of times; nothing happens to a model that is not sharded."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()
