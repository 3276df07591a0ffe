"""Accuracy against what can be counted by hand."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import v2m
from v2m.errors import InputError
from v2m.evaluation import evaluate_classifier, patch_size


class Lookup(nn.Module):
    """Returns what the images hold: logits in their first pixels."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.weight = nn.Parameter(torch.ones(()))
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append(self.training)
        return images.flatten(1)[:, : self.classes] * self.weight


def batches(logits: Tensor, targets: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    images = logits[:, None, None, :]
    return list(zip(images.split(size), targets.split(size)))


@pytest.mark.parametrize("size", [1, 3, 50])
@pytest.mark.parametrize("classes", [1, 2, 7])
def test_against_numpy(size: int, classes: int) -> None:
    logits, targets = torch.randn(50, classes), torch.randint(classes, (50,))
    result = evaluate_classifier(Lookup(classes), batches(logits, targets, size))
    scores, truth = logits.numpy(), targets.numpy()
    answers = scores.argmax(1)
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (truth, answers), 1)
    assert np.array_equal(result.confusion, confusion)
    assert result.top1 == (answers == truth).mean()
    best = np.argsort(-scores, axis=1)[:, : min(5, classes)]
    assert result.top5 == pytest.approx((best == truth[:, None]).any(1).mean())
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item())
    assert result.count == 50
    assert np.array_equal(result.targets, truth)
    assert np.allclose(result.probabilities, logits.softmax(1).numpy())
    for index in range(classes):
        if (truth == index).any():
            right = (answers[truth == index] == index).mean()
            assert result.per_class[index] == pytest.approx(right)


def test_a_class_without_images_has_no_accuracy() -> None:
    result = evaluate_classifier(Lookup(3), batches(torch.eye(3)[:2], torch.tensor([0, 1]), 2))
    assert result.per_class[:2].tolist() == [1, 1]
    assert np.isnan(result.per_class[2])


def test_the_mode_is_eval_inside_and_restored_outside() -> None:
    model = Lookup(3).train()
    evaluate_classifier(model, batches(torch.randn(4, 3), torch.zeros(4).long(), 2))
    assert model.modes == [False, False]
    assert model.training
    with pytest.raises(InputError):
        evaluate_classifier(model, [])
    assert model.training


def test_transform_limit_progress_and_context() -> None:
    seen: list[int] = []
    entered: list[bool] = []

    @contextmanager
    def context():
        entered.append(True)
        yield

    result = evaluate_classifier(
        Lookup(3),
        batches(torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4), 3),
        transform=lambda images: -images,
        autocast=context,
        on_batch=seen.append,
        limit_batches=2,
    )
    assert seen == [3, 3]
    assert entered == [True, True]
    assert result.count == 6
    assert result.top1 == 0


def test_nothing_to_evaluate_and_a_strange_class() -> None:
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate_classifier(Lookup(3), [])
    with pytest.raises(InputError, match="class number 5 but the model has 3 classes"):
        evaluate_classifier(Lookup(3), batches(torch.randn(2, 3), torch.tensor([1, 5]), 2))


def test_patch_size_of_models() -> None:
    assert patch_size(v2m.create_model("v2m_nano_patch4_28")) == (4, 4)
    embed = SimpleNamespace(patch_size=(2, 8))
    assert patch_size(SimpleNamespace(patch_embed=embed)) == (2, 8)
    assert patch_size(nn.Linear(1, 1)) is None
