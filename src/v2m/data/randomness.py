"""Random numbers that depend on what they are for, not on who draws them or when.

Everything is a function of (seed, epoch, image, draw), so a loader gives the same images bit for
bit with any number of workers, on any number of ranks, and after a resume.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["epoch_normals", "epoch_permutation", "epoch_uniforms", "seeded", "stable_order"]

# Separate streams of one (seed, epoch): the order of the images and what is done to each.
_ORDER, _SAMPLE, _BATCH, _NOISE = 0, 1, 2, 3


def stable_order(names: Iterable[str], seed: int) -> list[int]:
    """Positions of `names` in an order that is random in `seed` but the same on every machine.

    The names are ranked by the SHA-256 of seed and name, so an image keeps its rank relative to the
    others when images are added or removed.
    """
    digests = [hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in names]
    return sorted(range(len(digests)), key=digests.__getitem__)


def _generator(*key: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(key))


def epoch_permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(size), (size,) int64, that depends on (seed, epoch) only."""
    # numpy promises the raw stream of a bit generator for good, but not Generator.permutation
    return np.argsort(_generator(seed, epoch, _ORDER).random_raw(size), kind="stable")


def epoch_uniforms(size: int, columns: int, seed: int, epoch: int, draw: int) -> np.ndarray:
    """Uniform numbers in [0, 1), (size, columns) float64; row i belongs to image i."""
    raw = _generator(seed, epoch, _BATCH, draw).random_raw((size, columns))
    return (raw >> np.uint64(11)) * 2.0**-53


def epoch_normals(shape: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
    """Standard normal numbers of the given shape, float32, that depend on (seed, epoch) only."""
    generator = np.random.Generator(_generator(seed, epoch, _NOISE))
    return generator.standard_normal(shape, dtype=np.float32)


@contextmanager
def seeded(seed: int, epoch: int, index: int, draw: int) -> Iterator[None]:
    """Seed python's, numpy's and torch's global CPU generators, which timm's and torchvision's
    transforms draw from, inside the block; put their states back after it."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    generator = torch.default_generator
    state = generator.get_state()
    words = np.random.SeedSequence((seed, epoch, _SAMPLE, index, draw)).generate_state(4)
    random.seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(int(words[2]))  # noqa: NPY002
    generator.manual_seed(int(words[3]))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        generator.set_state(state)
