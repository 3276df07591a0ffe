"""`v2m train`, `evaluate` and `predict` for detection and segmentation, end to end."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import v2m
from shapes import write_classes, write_coco
from v2m.cli.main import build_parser, main
from v2m.cli.train import configuration
from v2m.drawing import palette
from v2m.engine.config import ModelConfig
from v2m.errors import InputError
from v2m.heads import Detector, DetectorConfig, Segmenter, SegmenterConfig
from v2m.models import save_model
from v2m.recipes import get_recipe

BODY = {
    "backbone": "v2m_hier_small_224",
    "backbone_kwargs": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
}
SETTINGS = [
    "--set",
    'model.kwargs={"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}',
    "--device",
    "cpu",
]
SETTINGS += ["--set", "data.batch_size=4", "--set", "data.workers=0", "--set", "schedule.epochs=1"]
SETTINGS += ["--set", "schedule.warmup_epochs=0"]
SMALL = {
    "detect": [
        *("min_sizes=64", "max_size=64", "pyramid_channels=8", "box_channels=8"),
        *("mask_channels=8", "regions=64"),
    ],
    "segment": ["crop=32,32", "channels=8", "auxiliary_channels=8", "short_side=none"],
}


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.setenv("V2M_BACKEND", "eager")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return {"detect": write_coco(root / "a", 4), "segment": write_classes(root / "b", 4)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Untrained models, as training would leave them."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    small = {"pyramid_channels": 8, "box_channels": 8, "mask_channels": 4, "score_threshold": 0.0}
    detector = Detector(DetectorConfig(num_classes=2, min_size=64, max_size=64, **BODY, **small))
    save_model(detector, root / "detect", label_names=["disc", "square"], v2m={"task": "detect"})
    segmenter = Segmenter(SegmenterConfig(num_classes=3, channels=8, auxiliary_channels=8, **BODY))
    training = {"segment": {"short_side": None}}
    names = ["background", "disc", "square"]
    left = {"task": "segment", "training": training}
    save_model(segmenter, root / "segment", label_names=names, v2m=left)
    return root


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_train_evaluate_and_predict(task, data, tmp_path, capsys):
    run = tmp_path / "run"
    changes = [part for text in SMALL[task] for part in ("--set", f"{task}.{text}")]
    command = ["train", "--task", task, "v2m_hier_small_224", "--data", str(data[task])]
    assert main([*command, "--output", str(run), *SETTINGS, *changes]) == 0
    said = capsys.readouterr().out
    assert ("box AP" in said) if task == "detect" else ("mIoU" in said)
    assert main(["evaluate", str(run), "--data", str(data[task]), "--workers", "0", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    headline = "box_ap" if task == "detect" else "miou"
    assert figures[headline] == pytest.approx(last[headline], abs=1e-6)
    assert figures["images"] == 4
    assert main(["evaluate", str(run), "--data", str(data[task]), "--workers", "0"]) == 0
    assert headline in capsys.readouterr().out


def test_predict_objects(models, data, tmp_path, capsys):
    images, output = data["detect"] / "val", tmp_path / "found"
    command = ["predict", str(models / "detect"), str(images), "--output", str(output)]
    assert main([*command, "--score", "0.01"]) == 0
    content = json.loads((output / "detections.json").read_text())
    assert [c["name"] for c in content["categories"]] == ["disc", "square"]
    assert len(content["images"]) == 4
    assert content["annotations"]
    for row in content["annotations"]:
        assert row["category_id"] in (1, 2)
        assert row["segmentation"]["size"] == [64, 64]
    for number in range(4):
        drawn = np.asarray(Image.open(output / f"{number:03d}.png"))
        assert drawn.shape == (64, 64, 3)
        assert (drawn != np.asarray(Image.open(images / f"{number:03d}.png"))).any()
    assert "4 of 4 images" in capsys.readouterr().out


def test_predict_classes(models, data, tmp_path):
    image = data["segment"] / "images" / "validation" / "000.png"
    assert main(["predict", str(models / "segment"), str(image), "--output", str(tmp_path)]) == 0
    classes = np.asarray(Image.open(tmp_path / "000.png"))
    assert classes.shape == (64, 64)
    assert classes.max() <= 2
    drawn = np.asarray(Image.open(tmp_path / "000_drawn.png")).astype(float)
    expected = 0.5 * np.asarray(Image.open(image)) + 0.5 * np.array(palette(3))[classes]
    assert np.abs(drawn - expected).max() <= 1


def test_same_names_and_bad_images(models, data, tmp_path, capsys):
    folder = tmp_path / "images"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(folder / name / "x.png")
    (folder / "bad.png").write_bytes(b"nothing")
    command = ["predict", str(models / "segment"), str(folder), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "bad.png" in capsys.readouterr().err
    assert main([*command, "--skip-bad"]) == 0
    assert "skipped" in capsys.readouterr().err
    maps = {folder / "a" / "x.png": "x", folder / "b" / "x.png": "x-2"}
    content = json.loads((tmp_path / "out" / "maps.json").read_text())
    assert len(content["classes"]) == 3
    assert content["images"] == [
        {"file_name": str(path), "map": f"{name}.png", "drawn": f"{name}_drawn.png"}
        for path, name in maps.items()
    ]
    files = {f"{name}{end}" for name in maps.values() for end in (".png", "_drawn.png")}
    assert {p.name for p in (tmp_path / "out").iterdir()} == files | {"maps.json"}


def test_an_image_too_thin_for_a_detector(models, data, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.open(data["detect"] / "val" / "000.png").save(folder / "0.png")
    Image.new("RGB", (900, 3)).save(folder / "thin.png")
    command = ["predict", str(models / "detect"), str(folder), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"{folder / 'thin.png'}: an image of 3 x 900 pixels" in error
    assert "pass --skip-bad" in error
    assert main([*command, "--skip-bad"]) == 0
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [Path(image["file_name"]).name for image in content["images"]] == ["0.png"]


@pytest.mark.parametrize("option", [("--top", "3"), ("--format", "csv")])
def test_options_of_classifiers(models, data, tmp_path, option, capsys):
    images = str(data["detect"] / "val")
    command = ["predict", str(models / "detect"), images, "--output", str(tmp_path / "out")]
    assert main([*command, *option]) == 2
    assert f"{option[0]} is for classifiers" in capsys.readouterr().err


def test_what_is_for_classifiers_alone(models, tmp_path, capsys):
    assert main(["export", str(models / "segment"), "--output", str(tmp_path / "x.onnx")]) == 2
    assert "was trained to segment: v2m export is for classifiers" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"loaded with v2m\.heads\.from_directory"):
        v2m.from_checkpoint(models / "detect")


def test_a_detector_needs_objects(data, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(data["detect"], root)
    (file,) = (root / "annotations").glob("instances_train*.json")
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "annotations": []}))
    changes = [part for text in SMALL["detect"] for part in ("--set", f"detect.{text}")]
    command = ["train", "--task", "detect", "v2m_hier_small_224", "--data", str(root)]
    assert main([*command, "--output", str(tmp_path / "run"), *SETTINGS, *changes]) == 2
    assert "has an object" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_results_never_replace_the_images(task, models, tmp_path, capsys):
    for name in ("x.png", "x_drawn.png"):
        Image.new("RGB", (40, 30), 9).save(tmp_path / name)
    before = (tmp_path / "x.png").read_bytes()
    command = ["predict", str(models / task), str(tmp_path), "--output"]
    assert main([*command, str(tmp_path)]) == 2
    assert "holds x.png, one of the images to predict" in capsys.readouterr().err
    assert (tmp_path / "x.png").read_bytes() == before
    assert main([*command, str(tmp_path / "out")]) == 0
    written = {path.name for path in (tmp_path / "out").glob("*.png")}
    drawn = {"x_drawn.png", "x_drawn-2_drawn.png"}
    others = {"x.png", "x_drawn-2.png"}
    assert written == (drawn | others if task == "segment" else others)


def test_boxes_of_less_than_a_pixel_are_drawn(models, data, tmp_path, monkeypatch):
    def thin(self, image):
        boxes = torch.tensor([[3.0, 4, 3.2, 30], [5, 6, 40, 6.1], [60, 60, 64, 64]])
        return {"boxes": boxes, "labels": torch.zeros(3, dtype=int), "scores": torch.ones(3)}

    monkeypatch.setattr("v2m.predict_dense.DensePredictor.detect", thin)
    image = str(data["detect"] / "val" / "000.png")
    assert main(["predict", str(models / "detect"), image, "--output", str(tmp_path)]) == 0
    assert (tmp_path / "000.png").is_file()


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_without_a_recipe_a_task_has_its_own_settings(task):
    def settings(*words):
        return configuration(build_parser("train").parse_args(["train", "--task", task, *words]))

    recipe = get_recipe(f"{task}_own")
    assert settings() == recipe
    named = settings("resnet18")
    assert named.model == ModelConfig(name="resnet18")
    assert (named.data, named.optim) == (recipe.data, recipe.optim)


@pytest.mark.parametrize("extra", [["--multi-scale"], ["--window", "32"]])
def test_views_of_a_segmenter(models, data, extra, capsys):
    command = [
        "evaluate",
        str(models / "segment"),
        "--data",
        str(data["segment"]),
        "--workers",
        "0",
    ]
    assert main([*command, "--json", *extra]) == 0
    viewed = json.loads(capsys.readouterr().out)
    assert main([*command, "--json"]) == 0
    assert viewed["loss"] != json.loads(capsys.readouterr().out)["loss"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("evaluate {detect} --data {objects} --task segment", "was trained to detect"),
        ("predict {segment} {objects}/val --task detect", "was trained to segment"),
        ("evaluate {detect} --data {objects} --multi-scale", "are for models of --task segment"),
        ("evaluate {detect} --data {objects} --shuffle-patches", "is for classifiers"),
        ("evaluate {segment} --data {objects}", "has neither classes.txt"),
        ("evaluate {detect} --data {classes}", "has no annotated training images"),
        ("predict {detect} {objects}/val", "--output is missing"),
        ("predict {detect} {objects}/val --output x --score 2", "expected a number from 0 to 1"),
        ("train --task paint --data x --output y", "expected one of classify, detect, segment"),
    ],
)
def test_errors(command, message, models, data, capsys):
    words = command.format(
        detect=models / "detect",
        segment=models / "segment",
        objects=data["detect"],
        classes=data["segment"],
    )
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err


def test_other_classes_are_refused(models, data, tmp_path, capsys):
    root = write_classes(tmp_path, 2)
    (root / "classes.txt").write_text("a\nb\nc\n")
    assert main(["evaluate", str(models / "segment"), "--data", str(root)]) == 2
    assert "the same, in the same order" in capsys.readouterr().err
