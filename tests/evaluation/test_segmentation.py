"""Mean IoU against loops over pixels and torchmetrics; windows, scales and flips against numpy."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from v2m.data.ade20k import IGNORED
from v2m.errors import InputError
from v2m.evaluation.segmentation import (
    MULTI_SCALE,
    Inference,
    confusion_matrix,
    evaluate_segmenter,
    segment,
)

CLASSES = 4


class PixelModel(torch.nn.Module):
    """Logits that depend on the pixel alone, so that windows and views cannot matter."""

    num_classes = CLASSES

    def __init__(self, kernel: int = 1):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, CLASSES, kernel, padding=kernel // 2)
        self.sizes = []

    def forward(self, images):
        self.sizes.append(tuple(images.shape[-2:]))
        return 3 * self.layer(images)


def batches(count: int, seed: int = 0):
    """Images of several sizes with random classes, a tenth of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        size = (9 + index, 14 - index)
        classes = torch.randint(CLASSES - 1, size, generator=generator)
        classes[torch.rand(size, generator=generator) < 0.1] = IGNORED
        found.append(([torch.randn(3, *size, generator=generator)], [(index, classes)]))
    return found


def test_confusion_is_that_of_a_loop_over_pixels():
    model = PixelModel()
    expected, losses = np.zeros((CLASSES, CLASSES), int), []
    for (image,), ((_, classes),) in batches(4):
        with torch.no_grad():
            logits = model(image[None])[0]
        predicted = logits.argmax(0)
        for row in range(classes.shape[0]):
            for column in range(classes.shape[1]):
                true = int(classes[row, column])
                if true != IGNORED:
                    expected[true, int(predicted[row, column])] += 1
                    losses.append(-logits[:, row, column].log_softmax(0)[true].item())
    result = evaluate_segmenter(model, batches(4))
    assert np.array_equal(result.confusion, expected)
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)
    summary = result.summary()
    assert summary["images"] == 4
    assert summary["pixel_accuracy"] == pytest.approx(expected.trace() / expected.sum())
    hits = expected.diagonal()
    union = expected.sum(0) + expected.sum(1) - hits
    assert summary["miou"] == pytest.approx((hits / union)[union > 0].mean())


def test_miou_is_over_the_set_and_that_of_torchmetrics():
    model = PixelModel()
    metric = MulticlassJaccardIndex(CLASSES, average="none", ignore_index=IGNORED)
    per_image = []
    for (image,), ((_, classes),) in batches(5):
        with torch.no_grad():
            predicted = model(image[None]).argmax(1)
        metric.update(predicted, classes[None])
        matrix = confusion_matrix(predicted[0], classes, CLASSES).double()
        iou = matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
        per_image.append(iou.nanmean().item())
    result = evaluate_segmenter(model, batches(5))
    assert result.iou == pytest.approx(metric.compute().double().numpy(), abs=1e-6)
    assert result.miou != pytest.approx(np.mean(per_image), abs=1e-4)


def test_absent_class_is_left_out_of_the_mean():
    classes = torch.zeros(4, 4, dtype=torch.int64)
    classes[2:] = 1
    matrix = confusion_matrix(classes, classes, CLASSES)
    assert matrix.tolist() == torch.diag(torch.tensor([8, 8, 0, 0])).tolist()

    class Perfect(PixelModel):
        def forward(self, images):
            return 9.0 * F.one_hot(classes, CLASSES).permute(2, 0, 1)[None]

    result = evaluate_segmenter(Perfect(), [([torch.zeros(3, 4, 4)], [(0, classes)])])
    assert result.miou == 1
    assert np.isnan(result.iou[2:]).all()


@pytest.mark.parametrize("window", [(6, 5), (20, 4), (30, 30)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_sliding_windows(window, kernel):
    model, image = PixelModel(kernel), torch.randn(3, 13, 17)
    stride = tuple(min(3, side) for side in window)
    inference = Inference(window=window, stride=stride)
    with torch.no_grad():
        found = segment(model, image, inference)
        whole = segment(model, image, Inference())
        expected, counts = torch.zeros(CLASSES, 13, 17), torch.zeros(13, 17)
        tall, wide = min(13, window[0]), min(17, window[1])
        tops = sorted({min(t, 13 - tall) for t in range(0, 13, stride[0])})
        lefts = sorted({min(t, 17 - wide) for t in range(0, 17, stride[1])})
        for top in tops:
            for left in lefts:
                part = image[:, top : top + tall, left : left + wide]
                expected[:, top : top + tall, left : left + wide] += model(part[None])[0]
                counts[top : top + tall, left : left + wide] += 1
    assert counts.min() >= 1
    assert torch.allclose(found, (expected / counts).softmax(0), atol=1e-5)
    if kernel == 1:
        assert torch.allclose(found, whole, atol=1e-5)


def test_scales_and_flips_are_averaged():
    model, image = PixelModel(3), torch.randn(3, 12, 20)
    inference = Inference(scales=(0.5, 1.0), flip=True)
    with torch.no_grad():
        found = segment(model, image, inference)
        small = F.interpolate(image[None], size=(6, 10), mode="bilinear")
        parts = []
        for view in (small, image[None]):
            for mirrored in (False, True):
                logits = model(view.flip(-1) if mirrored else view)
                logits = F.interpolate(logits, size=(12, 20), mode="bilinear")
                parts.append((logits.flip(-1) if mirrored else logits).softmax(1)[0])
    assert torch.allclose(found, torch.stack(parts).mean(0), atol=1e-6)
    assert torch.allclose(found.sum(0), torch.ones(12, 20))


def test_short_side_and_published_scales():
    model = PixelModel()
    with torch.no_grad():
        found = segment(model, torch.randn(3, 30, 40), Inference(short_side=60), size=(15, 20))
    assert model.sizes == [(60, 80)]
    assert found.shape == (CLASSES, 15, 20)
    assert MULTI_SCALE.scales == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"scales": ()}, "`scales` must be numbers above 0"),
        ({"scales": (0.0,)}, "`scales` must be numbers above 0"),
        ({"window": (4, 4)}, "belong together"),
        ({"window": (4, 4), "stride": (5, 4)}, "`stride` must be from 1 to the window's side"),
    ],
)
def test_errors(keywords, message):
    with pytest.raises(InputError, match=message):
        Inference(**keywords)


def test_nothing_to_evaluate():
    classes = torch.full((4, 4), IGNORED)
    with pytest.raises(InputError, match="no pixel of the data set has a class"):
        evaluate_segmenter(PixelModel(), [([torch.zeros(3, 4, 4)], [(0, classes)])])
