"""Batches of a data set, the same ones whatever the number of workers, and after a resume."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from v2m.data.array_batches import ArrayBatches, can_batch
from v2m.data.config import DataConfig
from v2m.data.datasets import ImageDataset
from v2m.data.images import BadImageError
from v2m.data.randomness import seeded
from v2m.data.samplers import BatchOrder, SampleKey
from v2m.data.transforms import (
    check_input_size,
    evaluation_transform,
    training_transform,
)
from v2m.data.workers import start_worker
from v2m.errors import InputError

__all__ = ["Loader", "create_loader"]

MAX_REPLACEMENTS = 100
REMEDY = (
    "Correct it, or skip bad images: `--set data.on_error=skip` in training, also when it goes on"
    ' with --resume; `--skip-bad` in evaluation; on_error="skip" in Python.'
)


class Loader:
    """Iterates over (images (B, C, H, W) float32 normalised, targets (B,) int64).

    Order and augmentation depend on (seed, epoch) only: call `set_epoch` before each epoch.

    Attributes:
        dataset: where the images come from.
        input_size: (C, H, W).
        batch_size: images per batch on this rank.
        mean, std: what the images were normalised with.
        skipped: {file: why} of the unreadable images met so far, with the data set's
            on_error="skip". In training another image takes the place of each; in evaluation they
            are left out.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        order: BatchOrder,
        input_size: tuple[int, int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        source: ArrayBatches | DataLoader,
        pin_memory: bool,
    ) -> None:
        self.dataset, self.order = dataset, order
        self.input_size, self.mean, self.std = input_size, mean, std
        self.batch_size, self.skipped = order.batch_size, {}
        self._source, self._pin_memory = source, pin_memory

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return self.order.batches

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch that the next iteration shows, and the batch that it starts at."""
        self.order.set_epoch(epoch, first_batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self._source, ArrayBatches):
            yield from self._iterate_arrays()
            return
        try:
            yield from self._iterate_workers()
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """End the worker processes at once; iterating again starts new ones."""
        iterator = getattr(self._source, "_iterator", None)  # DataLoader has no public way
        if iterator is not None:
            iterator._shutdown_workers()
            self._source._iterator = None

    def _iterate_workers(self) -> Iterator[tuple[Tensor, Tensor]]:
        any_image = False
        for images, targets, failures in self._source:
            for name, reason in failures:
                if self.dataset.on_error == "raise":
                    raise BadImageError(f"{reason} {REMEDY}")
                self.skipped[name] = reason
            if len(targets):
                any_image = True
                yield images, targets
        if not any_image and len(self.order):
            raise InputError(
                f"not one image of {self.dataset.name} ({self.dataset.origin}) is readable."
            )

    def _iterate_arrays(self) -> Iterator[tuple[Tensor, Tensor]]:
        for keys in self.order:
            _, indices, draws = np.asarray(keys, dtype=np.int64).T
            batch = self._source(keys[0].epoch, indices, draws)
            yield tuple(t.pin_memory() for t in batch) if self._pin_memory else batch


def create_loader(
    dataset: ImageDataset,
    config: DataConfig | None = None,
    *,
    is_training: bool,
    input_size: Sequence[int],
    batch_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    num_workers: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool | None = None,
) -> Loader:
    """A loader of `dataset`.

    For training it is shuffled, augmented and has whole batches only; else it is all, in order.

    Args:
        config: transforms; the default is `DataConfig()`.
        input_size: (C, H, W) of the model; images are converted to grey (C = 1) or RGB (C = 3).
        batch_size: images per batch on this rank.
        mean, std: per channel, for normalisation; the defaults are the data set's.
        seed: of the order and of the augmentation.
        num_workers: processes that decode and augment; by default the available cores shared by the
            ranks, at most 8. A data set in memory whose transforms are crop, flip and erasing needs
            and starts none.
        rank, world_size: the share of this process. In training the ranks' batches together are the
            batches that one rank with batch_size * world_size would see; in evaluation rank r has
            images r, r + world_size, ..., none twice, so shares may differ by one.
        pin_memory: by default where there is CUDA.

    Raises:
        InputError: for sizes that do not fit, or fewer training images than one batch.
    """
    config = config or DataConfig()
    mean, std = _statistics(dataset, input_size, mean, std)
    size = check_input_size(input_size, mean, std)
    order = BatchOrder(
        len(dataset),
        batch_size,
        shuffle=is_training,
        repeats=config.repeats if is_training else 1,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    count = worker_count(num_workers, world_size, order.batches)
    pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
    if can_batch(dataset, config, is_training, size):
        source = ArrayBatches(
            dataset, config, is_training=is_training, mean=mean, std=std, seed=seed
        )
    else:
        build = training_transform if is_training else evaluation_transform
        samples = Samples(dataset, build(config, size, mean, std), is_training, seed)
        source = _open_workers(samples, order, size, count, pin_memory)
    return Loader(dataset, order, size, mean, std, source, pin_memory)


def _open_workers(
    samples: Samples, order: BatchOrder, size: tuple[int, int, int], count: int, pin_memory: bool
) -> DataLoader:
    return DataLoader(
        samples,
        batch_sampler=order,
        num_workers=count,
        persistent_workers=count > 0,
        pin_memory=pin_memory,
        collate_fn=_Collate(size),
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # else it draws from the global one, which is the model's
    )


class Sample(NamedTuple):
    """One image of a batch, or the reason that there is none."""

    image: Tensor | None
    target: Any
    failures: list[tuple[str, str]]


class Samples(Dataset):
    """What the workers index by SampleKey: decode, transform with the key's own random numbers."""

    def __init__(self, dataset: Any, transform: Callable[..., Any], is_training: bool, seed: int):
        self.dataset, self.transform = dataset, transform
        self.is_training, self.seed = is_training, seed

    def __getitem__(self, key: SampleKey) -> Sample:
        failures = []
        replace = self.is_training and self.dataset.on_error == "skip"
        for step in range(min(MAX_REPLACEMENTS, len(self.dataset)) if replace else 1):
            index = (key.index + step) % len(self.dataset)
            try:
                image, target = self.dataset[index]
                with seeded(self.seed, *key):
                    return Sample(*self.transformed(index, image, target), failures)
            except BadImageError as error:
                failures.append((self.dataset.identifier(index), str(error)))
        return Sample(None, None, failures)

    def transformed(self, index: int, image: Image, target: Any) -> tuple[Tensor, Any]:
        """Image `index` and its target as the model takes them."""
        return self.transform(image), target


class _Collate:
    """Samples -> images (B, C, H, W), targets (B,), failures; B counts the readable ones."""

    def __init__(self, input_size: tuple[int, int, int]) -> None:
        self.input_size = input_size

    def __call__(self, samples: list[Sample]) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
        read = [sample for sample in samples if sample.image is not None]
        images = [sample.image for sample in read]
        stacked = torch.stack(images) if images else torch.empty(0, *self.input_size)
        targets = torch.tensor([sample.target for sample in read], dtype=torch.int64)
        return stacked, targets, [failure for sample in samples for failure in sample.failures]


def _statistics(
    dataset: ImageDataset,
    input_size: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Given or the data set's mean and std; those of grey and RGB are turned into each other."""
    pair = []
    for given, own in ((mean, dataset.mean), (std, dataset.std)):
        values = tuple(own if given is None else given)
        channels = input_size[0]
        if given is None and len(values) != channels:
            values = (sum(values) / len(values),) * channels
        pair.append(values)
    return tuple(pair)


def worker_count(given: int | None, world_size: int, batches: int) -> int:
    if given is not None:
        if not isinstance(given, int) or isinstance(given, bool) or given < 0:
            raise InputError(f"num_workers must be a whole number of at least 0; got {given!r}.")
        return min(given, batches)
    here = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if here else os.cpu_count() or 1
    return max(1, min(8, cores // world_size, batches))
