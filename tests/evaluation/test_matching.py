"""Which detections are right: by hand, and as COCO's evaluation counts them."""

import numpy as np
import pytest

from shapes import noisy_answers, write_coco
from v2m.data.annotations import AnnotatedImage, Instance
from v2m.data.detection import load_detection
from v2m.evaluation.detection import average_precision, coco_rows
from v2m.evaluation.matching import Thresholds, match_data_set, match_image


def row(box, score, category=1) -> dict:
    return {"image_id": 1, "category_id": category, "bbox": list(box), "score": score}


IMAGE = AnnotatedImage(
    path="x.png",
    height=100,
    width=100,
    instances=(
        Instance(box=(10, 10, 30, 30), label=0),
        Instance(box=(12, 10, 32, 30), label=0),
        Instance(box=(50, 50, 90, 90), label=1),
        Instance(box=(0, 60, 40, 100), label=0, crowd=True),
    ),
)
ROWS = [
    row((10, 10, 20, 20), 0.5),  # the first object, which a better one has: takes the second
    row((10, 10, 20, 20), 0.9),  # the first object
    row((12, 10, 20, 20), 0.4),  # nothing is left for it
    row((50, 50, 40, 40), 0.8),  # the third object's place, the wrong class
    row((5, 65, 20, 20), 0.7),  # inside the crowd
]


def test_the_best_detection_chooses_first():
    match = match_image(IMAGE, ROWS, [1, 2])
    assert [r["score"] for r in match.rows] == [0.9, 0.8, 0.7, 0.5, 0.4]
    assert match.right.tolist() == [True, False, False, True, False]
    assert match.counted.tolist() == [True, True, False, True, True]
    assert match.found.tolist() == [0.9, 0.5, 0, 0]
    assert match.wanted.tolist() == [True, True, True, False]
    assert match.f1(0.0) == pytest.approx(2 * 2 / (4 + 3))
    assert match.f1(0.85) == pytest.approx(2 * 1 / (1 + 3))


def test_thresholds_by_hand():
    found = Thresholds.of([match_image(IMAGE, ROWS, [1, 2])], steps=11)
    assert found.recall[[0, 5, 6, 10]] == pytest.approx([2 / 3, 2 / 3, 1 / 3, 0])
    assert found.precision[[0, 5, 6, 9]] == pytest.approx([2 / 4, 2 / 3, 1 / 2, 1])
    assert np.isnan(found.precision[10])
    assert found.scores[found.best] == pytest.approx(0.5)


def test_nothing_found_or_nothing_there():
    empty = AnnotatedImage(path="x.png", height=9, width=9)
    assert match_image(empty, [], [1]).f1(0.5) == 1.0
    assert Thresholds.of([match_image(IMAGE, [], [1, 2])]).best is None
    assert Thresholds.of([match_image(empty, ROWS, [1, 2])]).best is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_average_precision_of_the_matches_is_cocos(tmp_path, seed, kind):
    dataset = load_detection(write_coco(tmp_path, 12))
    rows = [
        found
        for number, answer in enumerate(noisy_answers(dataset, seed), 1)
        for found in coco_rows(answer, number, dataset.category_ids)
    ]
    figures, _ = average_precision(dataset.coco(), rows, kind)
    if kind == "bbox":
        rows = [{k: v for k, v in r.items() if k != "segmentation"} for r in rows]
    matches = match_data_set(dataset, rows)
    by_class = []
    for number, category in enumerate(dataset.category_ids):
        pairs = [
            (r["score"], right)
            for match in matches
            for r, right in zip(match.rows, match.right)
            if r["category_id"] == category
        ]
        objects = sum(i.label == number for image in dataset.images for i in image.instances)
        hits = np.cumsum([right for _, right in sorted(pairs, key=lambda pair: -pair[0])])
        precision = hits / np.arange(1, len(hits) + 1)
        best = np.maximum.accumulate(precision[::-1])[::-1]
        places = np.searchsorted(hits / objects, np.linspace(0, 1, 101))
        by_class.append(np.append(best, 0)[np.minimum(places, len(best))].mean())
    assert np.mean(by_class) == pytest.approx(figures["ap50"], abs=1e-9)
