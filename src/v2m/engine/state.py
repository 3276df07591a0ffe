"""What a training step changes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from v2m.engine.distributed import Ranks


@dataclass
class Meter:
    """Sums over the epoch so far. Those of `loss`, `right` and `images` are this rank's part."""

    loss: float = 0.0
    right: float = 0.0
    images: int = 0
    gradient_norm: float = 0.0
    steps: int = 0
    seconds: float = 0.0

    def add(self, *, loss: float, right: float, images: int, gradient_norm: float) -> None:
        """Count one step; `loss` is the sum over its images."""
        self.loss += loss
        self.right += right
        self.images += images
        self.gradient_norm += gradient_norm
        self.steps += 1

    def together(self, ranks: Ranks, device: torch.device) -> Meter:
        """The sums over all ranks."""
        loss, right, images = ranks.total([self.loss, self.right, self.images], device)
        return Meter(loss, right, int(images), self.gradient_norm, self.steps, self.seconds)

    def figures(self, *, accuracy: bool = True) -> dict[str, float]:
        """Means over the images and steps counted; without `accuracy` where nothing counts it."""
        right = {"train_accuracy": self.right / self.images} if accuracy else {}
        return {
            "train_loss": self.loss / self.images,
            **right,
            "gradient_norm": self.gradient_norm / self.steps,
            "images_per_second": self.images / max(self.seconds, 1e-9),
        }


@dataclass
class TrainingState:
    """The objects a step changes, and how far they are."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps_per_epoch: int
    ema: ModelEmaV3 | None = None
    step: int = 0  # optimiser steps completed
    seconds: float = 0.0  # of training and validation in the epochs completed
    meter: Meter = field(default_factory=Meter)  # of the epoch that is under way

    @property
    def step_in_epoch(self) -> int:
        """Steps of the epoch under way; all of them until it is validated."""
        return self.meter.steps

    @property
    def epoch(self) -> int:
        """Epochs trained and validated."""
        return (self.step - self.meter.steps) // self.steps_per_epoch

    @property
    def evaluated(self) -> nn.Module:
        """The model to validate, test and keep: the average if there is one."""
        return self.model if self.ema is None else self.ema.module

    def position(self, meter: Meter) -> dict[str, Any]:
        """How far it is, JSON-able; `meter` holds the sums of all ranks."""
        return {"step": self.step, "seconds": self.seconds, "meter": asdict(meter)}

    def move_to(self, position: dict[str, Any], *, first_rank: bool) -> None:
        """Take up a `position`. The sums over all ranks go to the first."""
        meter = Meter(**position["meter"])
        if not first_rank:
            meter.loss, meter.right, meter.images = 0.0, 0.0, 0
        self.step, self.seconds, self.meter = position["step"], position["seconds"], meter
