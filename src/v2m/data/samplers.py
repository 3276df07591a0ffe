"""Which images, in which order, on which rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from v2m.data.randomness import epoch_permutation
from v2m.errors import InputError

__all__ = ["BatchOrder", "SampleKey"]


class SampleKey(NamedTuple):
    """One appearance of an image: everything its augmentation may depend on, next to the seed."""

    epoch: int
    index: int
    draw: int


class BatchOrder(Sampler[list[SampleKey]]):
    """The batches of an epoch on one rank.

    Shuffled, with repeated augmentation, and whole batches only if `shuffle`; the batches of all
    ranks together are then the batches that one rank with `batch_size * world_size` would see.
    Otherwise in order and complete, rank r having images r, r + world_size, ...

    Attributes:
        batches: batches of a whole epoch. (`len` counts those still to come after `first_batch`.)
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        *,
        shuffle: bool,
        repeats: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(
                f"batch_size must be a whole number of at least 1; got {batch_size!r}."
            )
        if not 0 <= rank < world_size:
            raise InputError(
                f"rank must be from 0 to world_size - 1 = {world_size - 1}; got {rank}."
            )
        if images == 0:
            raise InputError("there are no images to load.")
        if shuffle and images < batch_size * world_size:
            raise InputError(
                f"batch_size {batch_size}{f' on {world_size} ranks' if world_size > 1 else ''} is "
                f"more than the {images} training images: make it at most "
                f"{max(1, images // world_size)}."
            )
        self.images, self.batch_size, self.shuffle = images, batch_size, shuffle
        self.repeats, self.seed = repeats, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first_batch = 0
        if shuffle:
            self.batches = images // (batch_size * world_size)
        else:
            self.batches = -(-len(range(rank, images, world_size)) // batch_size)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch of the next iteration, and the batch that it starts at."""
        if epoch < 0 or not 0 <= first_batch <= self.batches:
            raise InputError(
                f"epoch must be at least 0 and first_batch from 0 to {self.batches}; got {epoch} "
                f"and {first_batch}."
            )
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        return self.batches - self.first_batch

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch = self.epoch
        indices, draws = self._epoch(epoch)
        for batch in range(self.first_batch, self.batches):
            part = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            keys = zip(indices[part].tolist(), draws[part].tolist())
            yield [SampleKey(epoch, index, draw) for index, draw in keys]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices and draws of this rank's images, in order."""
        if not self.shuffle:
            mine = np.arange(self.rank, self.images, self.world_size)
            return mine, np.zeros_like(mine)
        shown = -(-self.images // self.repeats)
        order = epoch_permutation(self.images, self.seed, epoch)[:shown]
        indices = np.repeat(order, self.repeats)[: self.images]
        draws = np.tile(np.arange(self.repeats), shown)[: self.images]
        return indices[self.rank :: self.world_size], draws[self.rank :: self.world_size]
