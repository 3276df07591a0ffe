"""Which training images are kept aside: stratified, seeded, the same on every machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from v2m.data.datasets import ImageDataset
from v2m.data.randomness import stable_order
from v2m.errors import InputError

__all__ = ["carve"]


def carve(dataset: ImageDataset, fractions: Sequence[float], seed: int) -> list[ImageDataset]:
    """Split off one part per fraction; returns the parts and, last, the rest.

    Of each class, every part gets round(fraction * images of the class), at least one if the
    fraction is positive. The choice depends on `seed` and the images' identifiers only.
    """
    if any(fraction < 0 for fraction in fractions) or sum(fractions) >= 1:
        raise InputError(
            "validation_fraction must be at least 0 and leave something to train on; got "
            f"{fractions[0]}."
        )
    chosen: list[list[int]] = [[] for _ in range(len(fractions) + 1)]
    of_class: dict[int, list[int]] = defaultdict(list)
    names = [dataset.identifier(index) for index in range(len(dataset))]
    for index in stable_order(names, seed):
        of_class[dataset.targets[index]].append(index)
    for target, indices in sorted(of_class.items()):
        start = 0
        for part, fraction in enumerate(fractions):
            size = max(1, round(fraction * len(indices))) if fraction > 0 else 0
            chosen[part] += indices[start : start + size]
            start += size
        if start >= len(indices):
            raise InputError(
                f"class {dataset.classes[target]!r} of {dataset.name} has {len(indices)} images, "
                "too few to keep some aside for validation and test: add images, or make folders "
                "train/, validation/ and test/."
            )
        chosen[-1] += indices[start:]
    return [dataset.subset(sorted(indices)) for indices in chosen]
