"""What the predictions on the test images say: accuracy with its interval, confusion, examples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["Results", "wilson_interval"]


def wilson_interval(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a fraction, 95 % by default (Wilson 1927)."""
    center = (right + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * math.sqrt(right * (count - right) / count + z * z / 4)
    return max(0.0, center - half), min(1.0, center + half)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Class probabilities of the test images, and the truth.

    Attributes:
        probabilities: (n, K).
        targets: (n,) class indices.
    """

    probabilities: np.ndarray
    targets: np.ndarray

    @property
    def answers(self) -> np.ndarray:
        """(n,) the most probable class of each image."""
        return self.probabilities.argmax(axis=1)

    @property
    def right(self) -> np.ndarray:
        """(n,) whether the answer is true."""
        return self.answers == self.targets

    def accuracy(self, top: int = 1) -> float:
        """Fraction of images whose true class is among the `top` most probable."""
        best = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :top]  # (n, top)
        return float((best == self.targets[:, None]).any(axis=1).mean())

    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return wilson_interval(int(self.right.sum()), len(self.targets))

    def confidence(self) -> float:
        """Mean probability of the answers; a calibrated model's equals its accuracy."""
        return float(self.probabilities.max(axis=1).mean())

    def confusion(self) -> np.ndarray:
        """(K, K) counts, rows the true class, columns the answer."""
        classes = self.probabilities.shape[1]
        flat = np.bincount(self.targets * classes + self.answers, minlength=classes * classes)
        return flat.reshape(classes, classes)

    def surest_mistakes(self, count: int) -> list[int]:
        """Indices of the wrong answers with the highest probability, the surest first."""
        wrong = np.flatnonzero(~self.right)
        sure = self.probabilities.max(axis=1)[wrong]
        return wrong[np.argsort(-sure, kind="stable")][:count].tolist()

    def first_right(self, count: int) -> list[int]:
        """Index of the first right answer of each class, at most `count` classes."""
        right = np.flatnonzero(self.right)
        _, first = np.unique(self.targets[right], return_index=True)
        return right[first][:count].tolist()
