"""COCO's average precision, against pycocotools and torchmetrics on the same detections."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchmetrics.detection import MeanAveragePrecision

from shapes import noisy_answers, write_coco
from v2m.data.annotations import mask_api
from v2m.data.dense_loaders import create_dense_loader
from v2m.data.dense_transforms import detection_evaluation
from v2m.data.detection import load_detection
from v2m.errors import InputError
from v2m.evaluation.detection import FIGURES, average_precision, coco_rows, evaluate_detector


class Oracle(torch.nn.Module):
    """A detector that gives what it is told, image after image."""

    def __init__(self, answers: list[dict], masks: bool = True):
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1))
        self.answers, self.config = iter(answers), type("Config", (), {"masks": masks})

    def forward(self, images):
        return [next(self.answers) for _ in images]


def evaluated(dataset, answers: list[dict], **keywords):
    loader = create_dense_loader(
        dataset, detection_evaluation(), is_training=False, batch_size=3, num_workers=0
    )
    return evaluate_detector(Oracle(answers), loader, dataset, **keywords)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return load_detection(write_coco(tmp_path_factory.mktemp("coco"), 12))


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_those_of_pycocotools(dataset, seed):
    result = evaluated(dataset, noisy_answers(dataset, seed))
    for kind, figures in (("bbox", result.box), ("segm", result.mask)):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = dataset.coco()
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes([dict(row) for row in result.rows]), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        expected = [None if value < 0 else value for value in evaluation.stats]
        assert [figures[name] for name in FIGURES] == pytest.approx(expected, abs=1e-9)
        assert 0 < figures["ap"] < 1


@pytest.mark.parametrize("seed", range(2))
def test_figures_are_those_of_torchmetrics(dataset, seed):
    answers = noisy_answers(dataset, seed)
    result = evaluated(dataset, answers)
    metric = MeanAveragePrecision(iou_type=("bbox", "segm"), backend="faster_coco_eval")
    for index, answer in enumerate(answers):
        target = {k: v.as_subclass(torch.Tensor) for k, v in dataset.target(index).items()}
        target["masks"] = target["masks"].bool()
        metric.update([{**answer, "masks": answer["masks"][:, 0] >= 0.5}], [target])
    expected = metric.compute()
    for ours, theirs in (("ap", "map"), ("ap50", "map_50"), ("ap75", "map_75")):
        assert result.box[ours] == pytest.approx(expected[f"bbox_{theirs}"].item(), abs=1e-6)
        assert result.mask[ours] == pytest.approx(expected[f"segm_{theirs}"].item(), abs=1e-6)


def perfect(dataset) -> list[dict]:
    answers = []
    for index in range(len(dataset)):
        target = dataset.target(index)
        masks = target["masks"].as_subclass(torch.Tensor).float()[:, None]
        answers.append({**target, "masks": masks, "scores": torch.ones(len(target["labels"]))})
    return answers


def test_perfect_none_and_limited(dataset):
    result = evaluated(dataset, perfect(dataset))
    assert result.box["ap"] == result.mask["ap"] == pytest.approx(1)
    assert result.classes["disc"] == {"box_ap": pytest.approx(1), "mask_ap": pytest.approx(1)}
    assert result.summary()["images"] == 12
    empty = [{k: v[:0] for k, v in answer.items()} for answer in perfect(dataset)]
    result = evaluated(dataset, empty)
    assert result.box["ap"] == result.mask["ap"] == 0
    limited = evaluated(dataset, perfect(dataset), limit_batches=2)
    assert limited.images == 6
    assert limited.box["ap"] == pytest.approx(1)
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluated(dataset, [], limit_batches=0)


def test_nothing_to_find_is_no_figure(dataset):
    truth = dataset.coco()
    for annotation in truth["annotations"]:
        annotation["iscrowd"] = 1
    figures, by_class = average_precision(truth, [], "bbox")
    assert set(figures.values()) == {None}
    assert by_class == {3: None, 7: None}


def test_masks_survive_the_run_lengths():
    masks = torch.zeros(2, 1, 7, 9)
    masks[0, 0, 2:5, 3:8], masks[1, 0, :, 0] = 0.9, 0.6
    detections = {
        "boxes": torch.tensor([[3.0, 2, 8, 5], [0, 0, 1, 7]]),
        "labels": torch.tensor([0, 1]),
        "scores": torch.tensor([0.9, 0.8]),
        "masks": masks,
    }
    rows = coco_rows(detections, 5, [3, 7])
    assert [row["category_id"] for row in rows] == [3, 7]
    assert rows[0]["bbox"] == [3, 2, 5, 3]
    decoded = mask_api().decode([row["segmentation"] for row in rows])
    assert np.array_equal(decoded.transpose(2, 0, 1), (masks[:, 0] >= 0.5).numpy())
