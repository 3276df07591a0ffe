"""Detection and segmentation in the trainer: they overfit their own images, stop and go on."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import v2m
from interruptions import Killed, kill, stop_at
from shapes import write_classes, write_coco
from v2m.engine.config import (
    DatasetConfig,
    DetectConfig,
    EmaConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    SegmentConfig,
    TrainConfig,
    apply_overrides,
)
from v2m.engine.optim import create_schedule
from v2m.engine.rundir import CONFUSION, DETECTIONS, RunDirectory
from v2m.engine.trainer import train
from v2m.errors import InputError
from v2m.heads import from_directory
from v2m.models import save_model

TINY = {"depths": [1, 1, 1, 1], "dims": [16, 24, 32, 48], "d_state": 1}


def config(task: str, data: Path, epochs: int, **changes) -> TrainConfig:
    start = TrainConfig(
        task=task,
        model=ModelConfig(name="v2m_hier_small_224", kwargs=TINY),
        data=DatasetConfig(name=str(data), batch_size=4, workers=0),
        optim=OptimConfig(lr=2e-3 if task == "detect" else 3e-3, weight_decay=0.01),
        schedule=ScheduleConfig(epochs=epochs, warmup_epochs=min(2.0, epochs / 3), min_lr=1e-5),
        detect=DetectConfig(
            min_sizes=(64,),
            max_size=64,
            horizontal_flip=0.0,
            anchor_sizes=(16, 32, 64, 128, 256),
            pyramid_channels=32,
            box_channels=64,
            mask_channels=16,
            regions=64,
            max_detections=10,
        ),
        segment=SegmentConfig(
            crop=(64, 64),
            ratio=(1.0, 1.0),
            horizontal_flip=0.0,
            distortion=0.0,
            largest_class=1.0,
            short_side=None,
            channels=64,
            auxiliary_channels=16,
            dropout=0.0,
        ),
        run=RunConfig(device="cpu"),
    )
    return replace(start, **changes)


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> Path:
    """Eight pictures to learn and to be tested on; two of them for validation, to save time."""
    root = tmp_path_factory.mktemp("objects")
    write_coco(root, 2, splits=("val",))
    return write_coco(root, 8, splits=("train", "test"))


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("classes")
    write_classes(root, 2, splits=("validation",))
    return write_classes(root, 8, splits=("training", "testing"))


def test_detection_overfits_and_its_folder_is_complete(objects, tmp_path):
    run = tmp_path / "run"
    record = train(config("detect", objects, 42), run)
    assert record["box_ap50"] > 0.9
    assert record["mask_ap50"] > 0.9
    epochs = [r for r in RunDirectory(run).records() if r["kind"] == "epoch"]
    assert epochs[-1]["train_loss"] < 0.5 * epochs[0]["train_loss"]
    assert {"validation_box_ap", "validation_mask_ap50", "lr", "gradient_norm"} <= set(epochs[0])
    assert not {"train_accuracy", "validation_loss"} & set(epochs[0])
    rows = json.loads((run / DETECTIONS).read_text())
    assert {"image_id", "category_id", "bbox", "score", "segmentation"} == set(rows[0])
    model = from_directory(run)
    assert model.pretrained_cfg["architecture"] == "mask_rcnn"
    assert model.pretrained_cfg["label_names"] == ["disc", "square"]
    stored = json.loads((run / "config.json").read_text())["v2m"]
    assert stored["task"] == "detect"
    assert stored["test"]["box_ap50"] == record["box_ap50"]


def test_segmentation_overfits_and_its_folder_is_complete(classes, tmp_path):
    run = tmp_path / "run"
    record = train(config("segment", classes, 70), run)
    assert record["miou"] > 0.9
    assert record["classes"]["square"] > 0.9
    epochs = [r for r in RunDirectory(run).records() if r["kind"] == "epoch"]
    assert {"train_accuracy", "validation_miou", "validation_loss"} <= set(epochs[0])
    assert epochs[-1]["train_accuracy"] > 0.9
    assert np.load(run / CONFUSION)["confusion"].sum() == 8 * 64 * 64
    model = from_directory(run)
    assert model.pretrained_cfg["label_names"] == ["background", "disc", "square"]
    assert json.loads((run / "config.json").read_text())["v2m"]["task"] == "segment"


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_a_stopped_run_goes_on_exactly(task, objects, classes, tmp_path, monkeypatch):
    data = objects if task == "detect" else classes
    wanted = config(task, data, 2, ema=EmaConfig(decay=0.9))
    train(wanted, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 3, kill)
        with pytest.raises(Killed):
            train(wanted, tmp_path / "run")
    train(wanted, tmp_path / "run", resume=True)
    whole, again = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "run"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_bad_annotations_stop_a_run_or_are_left_out(task, tmp_path):
    if task == "detect":
        data = write_coco(tmp_path / "data", 8)
        path = data / "annotations" / "instances_train.json"
        content = json.loads(path.read_text())
        content["annotations"][3]["bbox"] = [500, 500, 5, 5]
        path.write_text(json.dumps(content))
        message = r"annotations\[3\] \(id 4\): its box .* leaves the image"
    else:
        data = write_classes(tmp_path / "data", 8)
        (data / "annotations" / "training" / "003.png").unlink()
        message = r"003.png: its classes .* are missing"
    wanted = config(task, data, 1)
    with pytest.raises(InputError, match=message):
        train(wanted, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    skipping = apply_overrides(wanted, ["data.on_error=skip"])
    text = io.StringIO()
    train(skipping, tmp_path / "run", console=Console(file=text, width=300))
    assert re.search("left out: .*" + message, text.getvalue())


def test_a_trained_classifier_is_where_a_detector_starts(objects, tmp_path):
    model = v2m.create_model("v2m_hier_small_224", num_classes=3, **TINY)
    save_model(model, tmp_path / "classifier")
    wanted = config(
        "detect", objects, 1, model=ModelConfig(checkpoint=str(tmp_path / "classifier"))
    )
    wanted = apply_overrides(wanted, ["optim.lr=1e-30", "optim.weight_decay=0"])
    train(wanted, tmp_path / "run")
    trained = from_directory(tmp_path / "run").body.model.state_dict()
    for name, value in model.state_dict().items():
        if not name.startswith("classifier"):
            assert torch.allclose(trained[name], value, atol=1e-6), name


@pytest.mark.parametrize(
    ("task", "override", "message"),
    [
        ("detect", "mix.mixup=0.8", "task = 'detect' has no use for mix"),
        ("segment", "optim.layer_decay=0.8", "task = 'segment' has no use for optim.layer_decay"),
        ("segment", "run.compile=true", "no use for run.compile"),
        ("detect", "run.cuda_graph=true", "no use for run.cuda_graph"),
        ("segment", "optim.accumulation=4", "at least 2: raise it"),
        ("detect", "data.name=none", "no data set is named"),
        ("segment", "data.name=none", "no data set is named"),
        ("detect", "model.kwargs.depth=3", "unknown model keyword 'depth'"),
    ],
)
def test_settings_that_do_not_fit(task, override, message, objects, classes, tmp_path):
    wanted = config(task, objects if task == "detect" else classes, 1)
    with pytest.raises(InputError, match=message):
        train(apply_overrides(wanted, [override]), tmp_path / "run")


def test_masks_that_are_not_there(tmp_path):
    data = write_coco(tmp_path / "data", 4)
    path = data / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    del content["annotations"][0]["segmentation"]
    path.write_text(json.dumps(content))
    wanted = apply_overrides(config("detect", data, 1), ["detect.masks=true"])
    with pytest.raises(InputError, match=r"not every object of data .train. has a mask"):
        train(wanted, tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("detect.anchor_sizes=8,16", "expected five sizes"),
        ("detect.max_size=0", "detect.max_size = 0 is out of range"),
        ("segment.ratio=2,0.5", "expected from,to"),
        ("segment.crop=64", "segment.crop = '64': expected 2"),
        ("task=detection", "task = 'detection'"),
    ],
)
def test_values_out_of_range(override, message):
    with pytest.raises(InputError, match=message):
        apply_overrides(TrainConfig(), [override])


def test_schedules_of_the_published_recipes():
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def rates(**keywords) -> list[float]:
        settings = ScheduleConfig(epochs=12, warmup_epochs=0.5, warmup_lr=0.1, min_lr=0, **keywords)
        schedule = create_schedule(optimizer, settings, steps_per_epoch=10)
        found = []
        for step in range(120):
            schedule.step_update(step)
            found.append(optimizer.param_groups[0]["lr"])
        return found

    steps = rates(name="multistep")
    assert steps[:5] == pytest.approx([0.1, 0.28, 0.46, 0.64, 0.82])
    assert steps[5:80] == pytest.approx([1.0] * 75)
    assert steps[80:110] == pytest.approx([0.1] * 30)
    assert steps[110:] == pytest.approx([0.01] * 10)
    line = rates(name="linear")
    assert line[5:] == pytest.approx([1 - i / 115 for i in range(115)])
