"""The images kept aside: stratified, disjoint, the same for ever."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from v2m.data import load_dataset
from v2m.data.randomness import stable_order
from v2m.data.splits import carve
from v2m.errors import InputError


def test_parts_are_stratified_disjoint_and_complete(arrays) -> None:
    parts = carve(arrays, [0.25, 0.1], seed=3)
    assert [Counter(part.targets) for part in parts] == [
        dict.fromkeys(range(3), count) for count in (5, 2, 13)
    ]
    rows = [image.tobytes() for part in parts for image in part.images]
    assert len(set(rows)) == 60


def test_a_positive_fraction_keeps_at_least_one(arrays) -> None:
    assert len(carve(arrays, [0.001], seed=0)[0]) == 3


def test_the_choice_follows_the_seed(arrays) -> None:
    chosen = [carve(arrays, [0.25], seed=seed)[0].images.tobytes() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_fractions_that_leave_nothing(arrays) -> None:
    with pytest.raises(InputError, match="must be at least 0 and leave something to train on"):
        carve(arrays, [0.5, 0.5], seed=0)


def test_the_order_is_the_same_on_every_machine() -> None:
    names = [f"cat/{i}.jpg" for i in range(10)]
    assert stable_order(names, 0) == ORDER
    # an image keeps its rank relative to the others when some are taken away
    kept = [i for i in ORDER if i % 2]
    assert [1 + 2 * i for i in stable_order(names[1::2], 0)] == kept


def test_the_validation_images_of_the_bundled_set_are_fixed() -> None:
    images = load_dataset("fashion-mnist-small", "validation").images
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == VALIDATION


ORDER = [8, 5, 4, 7, 0, 1, 3, 6, 9, 2]
VALIDATION = "5139907ecaac8b53"
