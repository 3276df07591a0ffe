"""ADE20K's folders: classes of pixels, ignored ones, and every bad file named."""

import numpy as np
import pytest
from PIL import Image

from shapes import draw, write_classes
from v2m.data.ade20k import IGNORED, load_segmentation
from v2m.data.annotations import BadAnnotationError
from v2m.errors import InputError

LABEL = "annotations/training/001.png"


def test_images_and_classes(tmp_path):
    dataset = load_segmentation(write_classes(tmp_path, 3))
    assert dataset.classes == ["background", "disc", "square"]
    for index in range(3):
        picture, objects = draw(index)
        image, classes = dataset[index]
        expected = np.zeros((64, 64))
        for label, mask in objects:
            expected[mask] = label + 1
        assert np.array_equal(np.asarray(image), picture)
        assert np.array_equal(classes.numpy(), expected)


def test_ade20k_ignores_number_zero(tmp_path):
    root = write_classes(tmp_path, 2)
    (root / "classes.txt").unlink()
    rows = ["Idx\tRatio\tTrain\tVal\tName", "1\t0.5\t9\t8\tdisc, plate", "2\t0.5\t9\t8\tsquare"]
    (root / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    dataset = load_segmentation(root)
    assert dataset.classes == ["disc", "square"]
    classes = dataset[0][1].numpy()
    labels = np.asarray(Image.open(root / "annotations/training/000.png")).astype(int)
    assert (classes[labels == 0] == IGNORED).all()
    assert (classes[labels > 0] == labels[labels > 0] - 1).all()


def spoil(root, kind: str) -> None:
    path = root / LABEL
    labels = np.array(Image.open(path))
    if kind == "another size":
        Image.fromarray(labels[:40]).save(path)
    elif kind == "unknown class":
        labels[5, 7] = 9
        Image.fromarray(labels).save(path)
    elif kind == "colours":
        Image.fromarray(np.stack([labels] * 3, -1)).save(path)
    elif kind == "no image":
        path.write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("another size", "has 64 x 40 pixels, and its image images/training/001.png has 64 x 64"),
        (
            "unknown class",
            "has the number 9 at row 5, column 7, and the 3 classes are the numbers 0",
        ),
        ("colours", "must have one whole number a pixel"),
        ("no image", "cannot be read as a map of classes"),
    ],
)
def test_bad_labels_are_named(tmp_path, kind, message):
    root = write_classes(tmp_path, 2)
    spoil(root, kind)
    with pytest.raises(BadAnnotationError, match=message) as error:
        load_segmentation(root)[1]
    assert str(root / LABEL) in str(error.value)


def test_missing_labels_are_named_and_skipped_on_request(tmp_path):
    root = write_classes(tmp_path, 3)
    (root / LABEL).unlink()
    with pytest.raises(BadAnnotationError, match=r"001.png: its classes .* are missing"):
        load_segmentation(root)
    assert len(load_segmentation(root, on_error="skip")) == 2


def test_255_is_ignored(tmp_path):
    root = write_classes(tmp_path, 2)
    labels = np.array(Image.open(root / LABEL))
    labels[:3] = 255
    Image.fromarray(labels).save(root / LABEL)
    assert (load_segmentation(root)[1][1][:3] == IGNORED).all()


def test_splits_and_errors(tmp_path):
    root = write_classes(tmp_path / "both", 4)
    assert [len(load_segmentation(root, s)) for s in ("train", "validation", "test")] == [4] * 3
    assert load_segmentation(root, "test").split == "validation"
    root = write_classes(tmp_path / "one", 10, splits=("training",))
    train, validation = (load_segmentation(root, s) for s in ("train", "validation"))
    assert len(train) == 9
    assert not set(train.images) & set(validation.images)
    (root / "classes.txt").write_text("a\na\n")
    with pytest.raises(InputError, match="one name a line, each once"):
        load_segmentation(root)
    (root / "classes.txt").unlink()
    with pytest.raises(InputError, match=r"has neither classes.txt nor objectInfo150.txt"):
        load_segmentation(root)
    with pytest.raises(InputError, match="does not exist"):
        load_segmentation(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["classes.txt", "objectInfo150.txt"])
def test_names_that_are_not_text(tmp_path, name):
    root = write_classes(tmp_path, 2)
    (root / "classes.txt").unlink()
    (root / name).write_bytes("Bär\n".encode("latin1"))
    with pytest.raises(InputError, match="is not text in UTF-8: byte 0xe4 at position 1") as error:
        load_segmentation(root)
    assert str(root / name) in str(error.value)
