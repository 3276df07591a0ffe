"""The scripts that prepare real data sets, on packages made up here."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from v2m.data.ade20k import load_segmentation
from v2m.data.detection import load_detection

ROOT = Path(__file__).parents[2]
BOXES = {  # left, top, right, bottom
    "2019_YELL_2_528000_4978000_image_crop2": [(300, 100, 340, 150), (705, 10, 725, 30)],
    "2019_YELL_2_541000_4977000_image_crop": [(300, 340, 330, 360), (20, 20, 60, 70)],
}


def prepare(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scripts.dense_data", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def picture(folder: Path, name: str, height: int, width: int) -> np.ndarray:
    """Random pixels, so that a tile is recognised."""
    random = np.random.default_rng(len(name) + height)
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / name)
    return pixels


@pytest.fixture(scope="module")
def deepforest(tmp_path_factory):
    root = tmp_path_factory.mktemp("packages")
    photographs = {}
    for (name, boxes), width in zip(BOXES.items(), (1100, 640)):
        folder = root / "deepforest" / "data"
        photographs[name] = picture(folder, f"{name}.png", 700, width)
        objects = "".join(
            f"<object><name>Tree</name><bndbox><xmin>{left}</xmin><ymin>{top}</ymin>"
            f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
            for left, top, right, bottom in boxes
        )
        (folder / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    return root, photographs


def test_trees(deepforest, tmp_path):
    root, photographs = deepforest
    done = prepare("trees", "--package", root, "--output", tmp_path / "trees")
    assert done.returncode == 0, done.stderr
    train, val, test = (
        load_detection(tmp_path / "trees", split) for split in ("train", "validation", "test")
    )
    assert len(train) == 5 * 4  # columns at 0, 104, ..., 416 below 788 - 50; rows at 0, ..., 345
    assert [image.size for image, _ in (train[0], val[0], test[0])] == [(312, 345)] * 3
    first, second = photographs.values()
    assert (np.asarray(train[1][0]) == first[:345, 104:416]).all()
    assert (np.asarray(val[0][0]) == first[:345, 788:]).all()
    assert (np.asarray(test[3][0]) == second[345:690, 312:624]).all()
    assert train.images[0].instances[0].box == (300, 100, 312, 150)
    assert train.images[0].instances[0].crowd  # less than a third of it is there
    assert not train.images[1].instances[0].crowd
    assert train.images[1].instances[0].box == (196, 100, 236, 150)
    # no box reaches from the training part into that for validation
    assert not any(image.instances for image in val.images)
    assert [len(image.instances) for image in test.images] == [2, 1, 1, 1]
    assert [image.instances[0].crowd for image in test.images] == [True, True, True, False]
    assert "CC0" in (tmp_path / "trees" / "SOURCE.txt").read_text()


def test_nuclei(tmp_path):
    folder = tmp_path / "stardist" / "data" / "images"
    folder.mkdir(parents=True)
    image = np.random.default_rng(0).integers(0, 240, (512, 512)).astype(np.uint16)
    labels = np.zeros((512, 512), np.uint16)
    labels[30:40, 50:70] = 7
    labels[200:230, 215:235] = 8  # over the end of the training part
    labels[120:140, 300:310] = 9  # on two test tiles, 8 of 20 rows on the first
    for name, pixels in (("img2d", image), ("mask2d", labels)):
        Image.fromarray(pixels).save(folder / f"{name}.tif")
    wheel = tmp_path / "stardist.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in folder.iterdir():
            archive.write(path, f"stardist/data/images/{path.name}")
    done = prepare("nuclei", "--package", wheel, "--output", tmp_path / "nuclei")
    assert done.returncode == 0, done.stderr
    test = load_detection(tmp_path / "nuclei", "test")
    assert test.has_masks
    assert len(test) == 2 * 4
    image_there, target = test[0]
    grey = np.clip(image[:128, 256:384] / 120.0, 0, 1) * 255
    assert np.abs(np.asarray(image_there)[..., 0] - grey).max() <= 0.5
    assert target["boxes"].tolist() == [[44, 120, 54, 128]]
    assert int(target["masks"][0].sum()) == 80
    assert test.images[2].instances[0].box == (44, 0, 54, 12)
    train = load_detection(tmp_path / "nuclei", "train", validation_fraction=0.01)
    assert len(train) == 7 * 25 - 2
    content = json.loads((tmp_path / "nuclei/annotations/instances_train.json").read_text())
    cut = [a for a in content["annotations"] if a["bbox"][0] + a["bbox"][2] == 128]
    assert {a["iscrowd"] for a in cut if a["bbox"][2] == 9 and a["bbox"][3] == 30} == {0}


def test_textures(tmp_path):
    folder = tmp_path / "packages" / "skimage" / "data"
    sizes = {"brick": (512, 512), "grass": (512, 512), "gravel": (512, 512), "camera": (512, 512),
             "coffee": (400, 600)}  # fmt: skip
    for name, size in sizes.items():
        picture(folder, f"{name}.png", *size)
    done = prepare("textures", "--package", tmp_path / "packages", "--output", tmp_path / "mosaics")
    assert done.returncode == 0, done.stderr
    test = load_segmentation(tmp_path / "mosaics", "test")
    assert (len(load_segmentation(tmp_path / "mosaics", "train")), len(test)) == (160, 40)
    assert test.classes == ["brick", "grass", "gravel", "lawn", "wood"]
    shares = np.bincount(np.concatenate([np.asarray(c).ravel() for _, c in test]), minlength=5)
    assert (shares / shares.sum() > 0.1).all()
    means = [[], [], [], [], []]
    for image, classes in test:
        grey, classes = np.asarray(image)[..., 0], np.asarray(classes)
        for label in np.unique(classes):
            means[label].append(grey[classes == label].mean())
    assert np.ptp([np.mean(values) for values in means]) < 12  # brightness tells nothing


def test_what_is_missing_is_said(tmp_path):
    done = prepare("trees", "--output", tmp_path / "out", "--package", tmp_path / "deepforest.whl")
    assert done.returncode == 1
    assert "deepforest.whl is neither its wheel nor a folder that holds deepforest/" in done.stderr
    assert "pip download --no-deps deepforest" in done.stderr
    (tmp_path / "stardist").mkdir()
    done = prepare("nuclei", "--output", tmp_path / "out", "--package", tmp_path)
    assert "the package has no stardist/data/images/img2d.tif" in done.stderr
    done = prepare("nuclei", "--output", tmp_path, "--package", tmp_path)
    assert "is not empty: name another folder" in done.stderr
