"""What runs of detection and segmentation share."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

import v2m
from v2m.engine.config import MixConfig, to_dict
from v2m.engine.task import Task
from v2m.errors import InputError
from v2m.heads.dense import DenseModel

__all__ = ["DenseTask", "as_on_first_rank", "has_ranks", "per_channel"]


class DenseTask(Task):
    """A head on a backbone, whose weights may come from a trained classifier."""

    def prepare(self, train_set: Any, micro_batch: int) -> None:
        config = self.config
        for used, key in (
            (config.mix != MixConfig(), "mix.* (mixup, cutmix, label smoothing)"),
            (config.optim.layer_decay is not None, "optim.layer_decay"),
            (config.run.compile, "run.compile"),
            (config.run.cuda_graph, "run.cuda_graph"),
            (config.run.parallel != "ddp", "run.parallel = fsdp"),
            (config.augment.on_device, "augment.on_device"),
        ):
            if used:
                raise InputError(f"task = {self.name!r} has no use for {key}: leave it out.")

    def describe(self, model: nn.Module, train_set: Any) -> dict[str, Any]:
        return {
            "label_names": list(train_set.classes),
            "v2m": {
                "task": self.name,
                "data": train_set.name,
                "version": v2m.__version__,
                "training": to_dict(self.config),
            },
        }

    def _backbone(self, channels: int) -> tuple[nn.Module, dict[str, Any]]:
        """A new or a trained backbone, and what its head's configuration says about it."""
        wanted = self.config.model
        keywords: dict[str, Any] = dict(wanted.kwargs)
        if wanted.drop_path_rate is not None:
            keywords["drop_path_rate"] = wanted.drop_path_rate
        if wanted.img_size is not None:
            size = wanted.img_size
            keywords["img_size"] = size if len(size) == 2 else size[0]
        try:
            if wanted.checkpoint is not None:
                model = v2m.from_checkpoint(wanted.checkpoint, **keywords)
            else:
                assert wanted.name is not None, "a run has a model or a checkpoint"
                model = v2m.create_model(wanted.name, **{"in_chans": channels, **keywords})
        except TypeError as error:
            raise InputError(
                f"model {wanted.name}: it does not take these settings: {error}"
            ) from error
        architecture = model.pretrained_cfg["architecture"]
        if wanted.name not in (None, architecture):
            raise InputError(
                f"model.checkpoint = {wanted.checkpoint!r} holds a {architecture}, not the"
                f" {wanted.name} that is named: leave the name out, or name that."
            )
        return model, _description(model, {"in_chans": channels, **keywords})

    def _prepare(self, model: DenseModel) -> DenseModel:
        if self.config.run.grad_checkpointing:
            model.set_grad_checkpointing(True)
        return model.train()


def _description(model: nn.Module, keywords: dict[str, Any]) -> dict[str, Any]:
    """`DenseConfig`'s part about the backbone; taken before its head is removed."""
    own = getattr(model, "config", None)
    if own is not None and hasattr(own, "img_size"):
        keywords = {name: getattr(own, name) for name in own.__dataclass_fields__}
    keywords = {k: v for k, v in keywords.items() if k not in ("num_classes", "global_pool")}
    size = keywords.get("img_size", model.pretrained_cfg["input_size"][1:])
    cfg = model.pretrained_cfg
    channels = keywords.get("in_chans", cfg["input_size"][0])
    return {
        "backbone": cfg["architecture"],
        "backbone_kwargs": keywords,
        "in_chans": channels,
        "img_size": size,
        "mean": per_channel(cfg["mean"], channels),
        "std": per_channel(cfg["std"], channels),
    }


def per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Statistics for another number of channels: their mean."""
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels


def has_ranks() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def as_on_first_rank(model: nn.Module) -> None:
    """Running statistics of the first rank, which are stored, on all: where batch norm is not
    synchronised, as on CPUs, each rank has its own."""
    if has_ranks():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
