"""What a detector and a segmenter share: their backbone, and what training asks of a model."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

import v2m
from v2m.errors import InputError
from v2m.heads.backbone import DenseBackbone
from v2m.heads.config import DenseConfig

__all__ = ["DenseModel", "build_body"]


def build_body(
    config: DenseConfig, model: nn.Module | None, taps: Literal["last", "depths"]
) -> DenseBackbone:
    """The backbone that a configuration asks for: `model` with its weights, or a new one."""
    if model is None:
        keywords = {"in_chans": config.in_chans, "num_classes": 0, **config.backbone_kwargs}
        model = v2m.create_model(config.backbone, **keywords)
    channels = model.pretrained_cfg.get("input_size", (config.in_chans,))[0]
    if hasattr(model, "config"):
        channels = model.config.in_chans
    if channels != config.in_chans and hasattr(model, "config"):
        raise InputError(
            f"the backbone takes images of {channels} channels and `in_chans` is"
            f" {config.in_chans}: make them the same."
        )
    return DenseBackbone(model, taps=taps)


class DenseModel(nn.Module):
    """A backbone with a head. A task sets `architecture` and the modules."""

    architecture: str

    def __init__(self, config: DenseConfig):
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.pretrained_cfg: dict[str, Any] = {
            "architecture": self.architecture,
            "input_size": (config.in_chans, *config.img_size),
            "mean": config.mean,
            "std": config.std,
        }

    @property
    def body(self) -> DenseBackbone:
        raise NotImplementedError

    @property
    def num_features(self) -> int:
        """Channels of the coarsest map of the backbone."""
        return self.body.channels[-1]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone."""
        exempt = self.body.no_weight_decay()
        kept = {id(p) for name, p in self.body.named_parameters() if name in exempt}
        return {name for name, p in self.named_parameters() if id(p) in kept}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block of the backbone in the backward."""
        self.body.set_grad_checkpointing(enable)
