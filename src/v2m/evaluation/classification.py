"""Top-1, top-5, per-class accuracy and the confusion matrix of a classifier over a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from v2m.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ClassificationResult:
    """Figures of one evaluation; accuracies are fractions of 1.

    Attributes:
        top1, top5: overall accuracy (top5 counts among min(5, K) classes).
        loss: mean cross-entropy in nats.
        count: images seen.
        confusion: (K, K) counts, rows the true class, columns the predicted one.
        probabilities: (n, K) float32, and targets: (n,) int64, in the loader's order.
    """

    top1: float
    top5: float
    loss: float
    count: int
    confusion: np.ndarray
    probabilities: np.ndarray
    targets: np.ndarray

    @property
    def per_class(self) -> np.ndarray:
        """(K,) accuracy within each true class; NaN for a class without images."""
        counts = self.confusion.sum(1)
        with np.errstate(invalid="ignore"):
            return self.confusion.diagonal() / counts

    def summary(self) -> dict[str, Any]:
        """The scalar figures, ready for JSON."""
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss, "images": self.count}


def _metrics(classes: int) -> MetricCollection:
    arguments: dict[str, Any] = {"num_classes": classes, "validate_args": False}
    metrics = {
        "top5": MulticlassAccuracy(average="micro", top_k=min(5, classes), **arguments),
        "confusion": MulticlassConfusionMatrix(**arguments),
    }
    return MetricCollection(metrics, compute_groups=False)


@torch.inference_mode()
def evaluate_classifier(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    on_batch: Callable[[int], None] | None = None,
    limit_batches: int | None = None,
) -> ClassificationResult:
    """Run the model in eval mode over a loader of (images (B, C, H, W), targets (B,)).

    Args:
        model: its output is (B, K) logits; its training mode is restored afterwards.
        device: where to evaluate; by default where the model's parameters are.
        transform: applied to each batch of images on the device, e.g. shuffling of patches.
        autocast: makes the context of the forward pass.
        on_batch: called with the number of images after each batch.
        limit_batches: stop after so many.

    Raises:
        InputError: if the loader yields nothing, or a target is outside the model's classes.
    """
    device = torch.device(device or next(model.parameters()).device)
    was_training = model.training
    model.eval()
    metrics, mean_loss = None, MeanMetric().to(device)
    probabilities, targets = [], []
    try:
        for index, (images, batch_targets) in enumerate(loader):
            if limit_batches is not None and index >= limit_batches:
                break
            images = images.to(device, non_blocking=True)
            batch_targets = batch_targets.to(device, non_blocking=True)
            with autocast():
                logits = model(images if transform is None else transform(images))
            logits = logits.float()
            _check_targets(batch_targets, logits.shape[1])
            metrics = metrics or _metrics(logits.shape[1]).to(device)
            metrics.update(logits, batch_targets)
            mean_loss.update(F.cross_entropy(logits, batch_targets), weight=len(images))
            probabilities.append(logits.softmax(1).cpu())
            targets.append(batch_targets.cpu())
            if on_batch is not None:
                on_batch(len(images))
    finally:
        model.train(was_training)
    if metrics is None:
        raise InputError("there is nothing to evaluate: the data set yields no images.")
    figures = metrics.compute()
    confusion = np.atleast_2d(figures["confusion"].cpu().numpy())  # of one class, a number
    return ClassificationResult(
        top1=float(confusion.trace() / confusion.sum()),
        top5=figures["top5"].item(),
        loss=mean_loss.compute().item(),
        count=int(confusion.sum()),
        confusion=confusion,
        probabilities=_from_all_ranks(torch.cat(probabilities).numpy()),
        targets=_from_all_ranks(torch.cat(targets).numpy()),
    )


def _from_all_ranks(part: np.ndarray) -> np.ndarray:
    """Rank r of R has rows r, r + R, ... of the whole, as evaluation loaders deal them out."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return part
    parts: list[np.ndarray] = [part] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    whole = np.concatenate(parts)
    lengths = [len(range(rank, len(whole), len(parts))) for rank in range(len(parts))]
    if lengths == [len(p) for p in parts]:  # else unreadable images were left out on some rank
        for rank, rows in enumerate(parts):
            whole[rank :: len(parts)] = rows
    return whole


def _check_targets(targets: Tensor, classes: int) -> None:
    largest = int(targets.max())
    if largest >= classes:
        raise InputError(
            f"the data set has a class number {largest} but the model has {classes} classes: "
            "evaluate on the data set it was trained for, or give the model num_classes."
        )
