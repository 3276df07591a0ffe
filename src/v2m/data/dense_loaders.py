"""Batches of images with objects or classes of pixels, the same ones after a resume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from PIL.Image import Image
from torch.utils.data import DataLoader

from v2m.data.ade20k import SegmentationDataset
from v2m.data.annotations import DetectionDataset
from v2m.data.dense_transforms import Transform
from v2m.data.images import BadImageError
from v2m.data.loaders import REMEDY, Sample, Samples, worker_count
from v2m.data.samplers import BatchOrder
from v2m.data.workers import start_worker
from v2m.errors import InputError

__all__ = ["DenseLoader", "create_dense_loader"]

DenseDataset = DetectionDataset | SegmentationDataset


class DenseLoader:
    """Iterates over (images, targets): lists, or both stacked where `stacked`.

    Order and augmentation depend on (seed, epoch) only: call `set_epoch` before each epoch.

    Attributes:
        dataset: where the images come from.
        batch_size: images per batch on this rank.
        skipped: {file: why} of the unusable images met so far, with the data set's
            on_error="skip". In training another image takes the place of each; in evaluation they
            are left out.
    """

    def __init__(
        self, dataset: DenseDataset, order: BatchOrder, workers: DataLoader, stacked: bool
    ):
        self.dataset, self.order, self.stacked = dataset, order, stacked
        self.batch_size, self.skipped = order.batch_size, {}
        self._workers = workers

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return self.order.batches

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch that the next iteration shows, and the batch that it starts at."""
        self.order.set_epoch(epoch, first_batch)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        any_image = False
        for images, targets, failures in self._workers:
            for name, reason in failures:
                if self.dataset.on_error == "raise":
                    raise BadImageError(f"{reason} {REMEDY}")
                self.skipped[name] = reason
            if len(images):
                any_image = True
                yield images, targets
        if not any_image and len(self.order):
            raise InputError(
                f"not one image of {self.dataset.name} ({self.dataset.origin}) is usable."
            )


def create_dense_loader(
    dataset: DenseDataset,
    transform: Transform,
    *,
    is_training: bool,
    batch_size: int,
    stacked: bool = False,
    seed: int = 0,
    num_workers: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> DenseLoader:
    """A loader of `dataset`: for training shuffled, whole batches only; else in order, all.

    In evaluation each target is a pair of the image's index in the data set and its target.

    Args:
        transform: (PIL image, target) -> (tensor, target).
        batch_size: images per batch on this rank.
        stacked: images of one size: give (B, C, H, W) and (B, H, W) instead of lists.
        num_workers: processes that decode and augment; by default the available cores shared by
            the ranks, at most 8.
        rank, world_size: the share of this process; in evaluation rank r has images r,
            r + world_size, ..., none twice.

    Raises:
        InputError: fewer training images than one batch.
    """
    order = BatchOrder(
        len(dataset),
        batch_size,
        shuffle=is_training,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    count = worker_count(num_workers, world_size, order.batches)
    workers = DataLoader(
        _Samples(dataset, transform, is_training, seed),
        batch_sampler=order,
        num_workers=count,
        persistent_workers=count > 0,
        collate_fn=_Collate(stacked),
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # else it draws from the global one, which is the model's
    )
    return DenseLoader(dataset, order, workers, stacked)


class _Samples(Samples):
    """Transforms image and target together; in evaluation a target knows its image's index."""

    def transformed(self, index: int, image: Image, target: Any) -> tuple[Any, Any]:
        image, target = self.transform(image, target)
        return image, target if self.is_training else (index, target)


class _Collate:
    """Samples -> images, targets, failures; without those that could not be read."""

    def __init__(self, stacked: bool):
        self.stacked = stacked

    def __call__(self, samples: list[Sample]) -> tuple[Any, Any, list[tuple[str, str]]]:
        failures = [failure for sample in samples for failure in sample.failures]
        images = [sample.image for sample in samples if sample.image is not None]
        targets = [sample.target for sample in samples if sample.image is not None]
        if self.stacked and images:
            return torch.stack(images), torch.stack(targets), failures
        return images, targets, failures
