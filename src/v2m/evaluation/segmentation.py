"""Mean IoU over the confusion matrix of a whole data set; one or several scales, flips, windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from v2m.data.ade20k import IGNORED
from v2m.errors import InputError

__all__ = [
    "MULTI_SCALE",
    "Inference",
    "SegmentationResult",
    "confusion_matrix",
    "evaluate_segmenter",
    "segment",
]


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How an image is shown to a segmenter.

    Attributes:
        short_side: resize its shorter side to this, pixels; None for its own size.
        scales: factors on that size; the class probabilities of all are averaged.
        flip: average with the mirrored image as well.
        window: height and width of windows that slide over it, None for the whole image at once.
        stride: from one window to the next.
    """

    short_side: int | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.scales or not all(math.isfinite(s) and s > 0 for s in self.scales):
            raise InputError(f"`scales` must be numbers above 0; got {self.scales}.")
        if (self.window is None) != (self.stride is None):
            raise InputError("`window` and `stride` belong together: give both or none.")
        if self.window is not None and any(
            not 0 < step <= side for step, side in zip(self.stride, self.window)
        ):
            raise InputError(
                f"`stride` must be from 1 to the window's side; got window {self.window} and"
                f" stride {self.stride}."
            )


MULTI_SCALE = Inference(short_side=512, scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), flip=True)
"""The published multi-scale evaluation of ADE20K."""


@dataclass(frozen=True, kw_only=True)
class SegmentationResult:
    """Figures of one evaluation; fractions of 1.

    Attributes:
        confusion: (K, K) pixels, rows the true class, columns the predicted one.
        loss: mean cross-entropy over the pixels with a class, nats.
        images: how many were seen.
    """

    confusion: np.ndarray
    loss: float
    images: int

    @property
    def iou(self) -> np.ndarray:
        """(K,) intersection over union; NaN for a class that is neither there nor predicted."""
        hits = self.confusion.diagonal()
        union = self.confusion.sum(0) + self.confusion.sum(1) - hits
        with np.errstate(invalid="ignore"):
            return hits / union

    @property
    def miou(self) -> float:
        """Mean over the classes that are there or predicted."""
        return float(np.nanmean(self.iou))

    def summary(self) -> dict[str, Any]:
        """The scalar figures, ready for JSON."""
        counts = self.confusion.sum(1)
        with np.errstate(invalid="ignore"):
            recall = self.confusion.diagonal() / counts
        return {
            "miou": self.miou,
            "pixel_accuracy": float(self.confusion.trace() / counts.sum()),
            "mean_accuracy": float(np.nanmean(recall)),
            "loss": self.loss,
            "images": self.images,
        }


def confusion_matrix(predicted: Tensor, classes: Tensor, count: int) -> Tensor:
    """(K, K) int64 pixels by true class (row) and predicted class; pixels without one left out."""
    known = classes != IGNORED
    pairs = classes[known] * count + predicted[known]
    return torch.bincount(pairs, minlength=count**2).reshape(count, count)


def segment(
    model: nn.Module,
    image: Tensor,
    inference: Inference,
    *,
    size: tuple[int, int] | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Tensor:
    """Class probabilities (K, H, W) of one normalised image (C, H, W), averaged over its views.

    Args:
        size: height and width of the result; by default the image's.
    """
    size = tuple(size or image.shape[-2:])
    views = list(_views(image, inference))
    total = None
    for view, mirrored in views:
        with autocast():
            logits = _windows(model, view, inference)
        probabilities = _resize(logits.float(), size).softmax(1)
        probabilities = probabilities.flip(-1) if mirrored else probabilities
        total = probabilities if total is None else total + probabilities
    return total[0] / len(views)


def _views(image: Tensor, inference: Inference) -> Iterator[tuple[Tensor, bool]]:
    """(1, C, h, w) at each scale, and mirrored."""
    height, width = image.shape[-2:]
    base = 1.0 if inference.short_side is None else inference.short_side / min(height, width)
    for scale in inference.scales:
        size = tuple(max(1, round(side * base * scale)) for side in (height, width))
        view = _resize(image[None], size)
        yield view, False
        if inference.flip:
            yield view.flip(-1), True


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _windows(model: nn.Module, image: Tensor, inference: Inference) -> Tensor:
    """Logits (1, K, h, w): of the whole image, or the mean over the windows that see a pixel."""
    if inference.window is None:
        return model(image)
    sides = image.shape[-2:]
    window = [min(side, limit) for side, limit in zip(sides, inference.window)]
    rows, columns = (
        _starts(side, part, step) for side, part, step in zip(sides, window, inference.stride)
    )
    total = None
    counts = image.new_zeros(1, 1, *sides)
    for top in rows:
        for left in columns:
            here = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = model(image[here]).float()
            total = logits.new_zeros(1, logits.shape[1], *sides) if total is None else total
            total[here] += logits
            counts[here] += 1
    return total / counts


def _starts(side: int, window: int, step: int) -> list[int]:
    """Where windows begin: every `step`, the last one at the edge."""
    count = math.ceil((side - window) / step) + 1
    return [min(i * step, side - window) for i in range(count)]


@torch.inference_mode()
def evaluate_segmenter(
    model: nn.Module,
    loader: Iterable[tuple[list[Tensor], list[tuple[int, Tensor]]]],
    inference: Inference | None = None,
    *,
    device: torch.device | str | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    on_batch: Callable[[int], None] | None = None,
    limit_batches: int | None = None,
) -> SegmentationResult:
    """Run a `v2m.heads.Segmenter` over an evaluation loader, image by image.

    Args:
        loader: yields normalised images and, for each, a pair of its index and its classes.
        inference: the default shows each image once, in its own size.
        on_batch: called with the number of images after each batch.
        limit_batches: stop after so many.

    Raises:
        InputError: the loader yields nothing, or no pixel has a class.
    """
    device = torch.device(device or next(model.parameters()).device)
    inference = inference or Inference()
    was_training = model.training
    model.eval()
    count = model.num_classes
    confusion = torch.zeros(count, count, dtype=torch.int64)
    sums = torch.zeros(2, dtype=torch.float64)  # loss, images
    try:
        for number, (images, targets) in enumerate(loader):
            if limit_batches is not None and number >= limit_batches:
                break
            for image, (_, classes) in zip(images, targets):
                classes = classes.to(device)
                size = tuple(classes.shape)
                found = segment(model, image.to(device), inference, size=size, autocast=autocast)
                loss = F.nll_loss(
                    found.clamp_min(1e-12).log()[None],
                    classes[None],
                    ignore_index=IGNORED,
                    reduction="sum",
                )
                confusion += confusion_matrix(found.argmax(0), classes, count).cpu()
                sums += torch.tensor([loss.item(), 1.0], dtype=torch.float64)
            if on_batch is not None:
                on_batch(len(images))
    finally:
        model.train(was_training)
    confusion, sums = _sum_over_ranks(confusion, device), _sum_over_ranks(sums, device)
    if not confusion.sum():
        raise InputError("there is nothing to evaluate: no pixel of the data set has a class.")
    loss = sums[0].item() / int(confusion.sum())
    return SegmentationResult(confusion=confusion.numpy(), loss=loss, images=int(sums[1]))


def _sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        values = values.to(device)
        dist.all_reduce(values)
    return values.cpu()
