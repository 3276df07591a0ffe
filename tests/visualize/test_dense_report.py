"""The report of detection and segmentation: all of it in one file, and honest about the rest."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from pages import Page
from shapes import noisy_answers, write_classes, write_coco
from v2m.cli.main import main
from v2m.data.annotations import mask_api
from v2m.data.detection import load_detection
from v2m.drawing import MISSED, RIGHT, draw_classes, draw_objects
from v2m.engine.config import DatasetConfig, TrainConfig, to_dict
from v2m.engine.rundir import CONFIG, CONFUSION, DETECTIONS, METRICS
from v2m.errors import InputError
from v2m.evaluation.detection import average_precision, coco_rows
from v2m.heads import Detector, DetectorConfig, Segmenter, SegmenterConfig
from v2m.models import save_model
from v2m.visualize import write_report
from v2m.visualize.sections import duration

BACKBONE = {
    "backbone": "v2m_hier_small_224",
    "backbone_kwargs": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]},
}


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.setenv("V2M_BACKEND", "eager")


def finish(folder, model, names, task, data, records):
    save_model(model, folder, label_names=names, v2m={"task": task})
    config = TrainConfig(task=task, data=DatasetConfig(name=str(data)))
    (folder / CONFIG).write_text(json.dumps(to_dict(config)))
    (folder / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def detection(tmp_path_factory):
    """What training of a detector leaves behind, with noisy detections of the truth."""
    data, folder = tmp_path_factory.mktemp("objects"), tmp_path_factory.mktemp("detector")
    write_coco(data, 5, splits=("train", "test"))
    dataset = load_detection(data, "test")
    rows = [
        row
        for number, answer in enumerate(noisy_answers(dataset, 0), 1)
        for row in coco_rows(answer, number, dataset.category_ids)
    ]
    (folder / DETECTIONS).write_text(json.dumps(rows))
    test = {"kind": "test", "images": 5, "split": "test", "seconds": 130.0, "machine": {}}
    classes = {name: {} for name in dataset.classes}
    for kind, of in (("bbox", "box"), ("segm", "mask")):
        figures, by_class = average_precision(dataset.coco(), rows, kind)
        test |= {f"{of}_{key}": value for key, value in figures.items()}
        for name, number in zip(dataset.classes, dataset.category_ids):
            classes[name][f"{of}_ap"] = by_class[number]
    epochs = [
        {"kind": "epoch", "epoch": n, "train_loss": 2.0 / n, "validation_box_ap": 0.1 * n,
         "validation_mask_ap": 0.08 * n, "seconds": 65.0, "images_per_second": 12.0,
         "peak_memory_gib": 3.25}
        for n in (1, 2)
    ]  # fmt: skip
    torch.manual_seed(0)
    shape = DetectorConfig(**BACKBONE, num_classes=2, pyramid_channels=8, box_channels=8)
    records = [*epochs, {**test, "classes": classes}]
    return finish(folder, Detector(shape), dataset.classes, "detect", data, records)


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory):
    data, folder = tmp_path_factory.mktemp("classes"), tmp_path_factory.mktemp("segmenter")
    write_classes(data, 4, splits=("training", "testing"))
    confusion = np.array([[900, 60, 40], [10, 80, 10], [0, 50, 50]])
    np.savez(folder / CONFUSION, confusion=confusion)
    names = ["background", "disc", "square"]
    records = [
        {"kind": "epoch", "epoch": 1, "train_loss": 1.5, "validation_loss": 1.2,
         "validation_miou": 0.3, "validation_pixel_accuracy": 0.8, "seconds": 5.0},
        {"kind": "test", "images": 4, "split": "validation", "miou": 0.512, "seconds": 5.0,
         "pixel_accuracy": 0.858, "mean_accuracy": 0.733,
         "classes": {"background": 0.89, "disc": 0.38, "square": None}},
    ]  # fmt: skip
    torch.manual_seed(0)
    shape = SegmenterConfig(**BACKBONE, num_classes=3, channels=8, auxiliary_channels=8)
    return finish(folder, Segmenter(shape), names, "segment", data, records)


def pictures(text: str) -> list[Image.Image]:
    found = re.findall(r"data:image/\w+;base64,([^\"]+)\"", text)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def check_whole(page: Page, sections: set[str]) -> None:
    assert sections <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert all(source[0] == "#" or source.startswith("data:image/") for source in page.sources)
    assert all(source[1:] in page.ids for source in page.sources if source[0] == "#")


def test_detection(detection):
    record = json.loads((detection / METRICS).read_text().splitlines()[-1])
    text = write_report(detection).read_text(encoding="utf-8")
    page = Page(text)
    check_whole(page, {"headline", "curves", "classes", "thresholds", "examples", "use", "run"})
    assert "missing" not in page.ids
    words = page.text.replace("\xa0", " ")
    assert "Mask R-CNN, v2m_hier_small_224" in words
    assert f"{100 * record['mask_ap']:.1f} %average precision of masks on 5 test images" in words
    assert f"{100 * record['box_ap']:.1f} % of boxes" in words
    assert f"{100 * record['classes']['disc']['mask_ap']:.1f} %" in words
    assert "2 epochs in 2 min 10 s, validation included; 12 training images a second" in words
    assert "3.2 GiB of memory at most" in words
    best = re.search(r"scores of at least (\d\.\d\d) both", words).group(1)
    assert f"--score {best}" in words
    assert f"Shown is what has a score of at least {best}" in words
    assert len(pictures(text)) == 2 * 5  # what is there and what was found, of all five
    assert words.count("From the start") == 3
    assert words.count("Among the worst") == 2


def test_segmentation(segmentation):
    text = write_report(segmentation, device="cpu").read_text(encoding="utf-8")
    page = Page(text)
    check_whole(page, {"headline", "curves", "classes", "examples", "use", "run"})
    assert "thresholds" not in page.ids
    words = page.text.replace("\xa0", " ")
    assert "51.2 %mean intersection over union of 3 classes on 4 validation images" in words
    assert "always the most common class83.3 %" in re.sub(r"\s*\n\s*", "", words)
    row = re.search(r"square\s*(.*)", words[words.index("most often taken for") :]).group(0)
    assert "8.3 %" in row  # of all pixels
    assert "33.3 %" in row  # its IoU: 50 of 150
    assert "disc 50.0 %" in row
    assert len(pictures(text)) == 3 * 4


def test_command_and_missing_pieces(detection, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((detection / name).read_bytes())
    assert main(["report", str(tmp_path), "--device", "cpu"]) == 0
    path = tmp_path / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    page = Page(path.read_text(encoding="utf-8"))
    assert {"use", "run", "missing"} <= set(page.ids)
    assert not {"headline", "curves", "classes", "thresholds", "examples"} & set(page.ids)
    assert "has no train_config.json" in page.text
    assert f"has no {DETECTIONS}" in page.text


def test_detections_of_other_images_are_not_shown(detection, tmp_path):
    for file in detection.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    records = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    records[-1]["images"] = 4
    (tmp_path / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "is about 4 images and the data set has 5" in page.text
    assert "examples" not in page.ids
    (tmp_path / DETECTIONS).write_text('[{"score": 1}]')
    with pytest.raises(InputError, match=rf"{DETECTIONS} cannot be read: KeyError"):
        write_report(tmp_path)


def test_damaged_confusion(segmentation, tmp_path):
    for file in segmentation.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    np.savez(tmp_path / CONFUSION, confusion=np.eye(4))
    with pytest.raises(InputError, match=r"shape \(4, 4\) for 3 classes"):
        write_report(tmp_path)
    (tmp_path / CONFUSION).write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=rf"{CONFUSION} cannot be read"):
        write_report(tmp_path)


def test_drawing_by_hand():
    grey = Image.new("L", (400, 300), 100)
    drawn = np.asarray(draw_objects(grey, [((10, 20, 50, 60), None, RIGHT)]))
    assert drawn.shape == (300, 400, 3)
    changed = (drawn != 100).any(-1)
    assert changed[20, 10:50].all()
    assert changed[59, 10:50].all()
    assert not changed[19].any()
    assert not changed[30, 20:40].any()  # the outline alone
    assert (drawn[20, 30] == RIGHT).all()
    thin = [((10, 20, 10.3, 60), None, RIGHT), ((10, 20, 60, 20.2), None, RIGHT)]
    assert (np.asarray(draw_objects(grey, thin)) != 100).any()
    mask = np.zeros((100, 100), np.uint8)
    mask[10:30, 10:40] = 1
    runs = mask_api().encode(np.asfortranarray(mask))
    small = Image.new("L", (100, 100), 100)
    drawn = np.asarray(draw_objects(small, [((0, 0, 1, 1), runs, MISSED)]))
    assert drawn.shape == (400, 400, 3)  # four times as large
    outline = (drawn == MISSED).all(-1)
    assert outline[40, 40:160].all()
    assert not outline[60:100, 60:140].any()
    assert not outline[:40].any()
    classes = np.array([[0, 1], [255, 1]], np.uint8)
    drawn = np.asarray(draw_classes(Image.new("L", (2, 2), 100), classes, [(0, 0, 0), (200, 0, 0)]))
    assert drawn.tolist() == [[[50] * 3, [150, 50, 50]], [[100] * 3, [150, 50, 50]]]


def test_durations():
    assert [duration(s) for s in (9, 195, 3900)] == ["9 s", "3 min 15 s", "1 h 05 min"]
