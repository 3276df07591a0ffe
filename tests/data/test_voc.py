"""Pascal VOC's XML: boxes counted from 0, splits, and every bad entry named."""

import pytest

from shapes import box_of, draw, write_voc
from v2m.data.annotations import BadAnnotationError
from v2m.data.detection import load_detection
from v2m.data.voc import read_voc
from v2m.errors import InputError


def change(root, old: str, new: str, name: str = "001") -> None:
    path = root / "Annotations" / f"{name}.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_boxes_and_classes(tmp_path):
    dataset = read_voc(write_voc(tmp_path, 3), "train", name="voc")
    assert dataset.classes == ["disc", "square"]
    for index in range(3):
        image, target = dataset[index]
        assert image.size == (64, 64)
        objects = draw(index)[1]
        assert target["boxes"].tolist() == [list(box_of(mask)) for _, mask in objects]
        assert target["labels"].tolist() == [label for label, _ in objects]
        assert "masks" not in target


def test_difficult_objects_are_crowds(tmp_path):
    root = write_voc(tmp_path, 2)
    change(root, "<difficult>0", "<difficult>1")
    dataset = read_voc(root, "train", name="voc")
    assert [len(dataset[i][1]["labels"]) for i in range(2)] == [2, 1]
    assert sum(a["iscrowd"] for a in dataset.coco()["annotations"]) == 1


BAD = {
    "empty box": ("<xmax>", "<xmax>0</xmax><unused>", "is empty"),
    "outside": ("<ymax>", "<ymax>90</ymax><unused>", "leaves the image of 64 x 64"),
    "no number": ("<xmin>", "<xmin>left</xmin><unused>", "not four numbers"),
    "no name": ("<name>", "<name></name><unused>", "it has no name"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_object_is_named_and_skipped_on_request(tmp_path, kind):
    old, new, reason = BAD[kind]
    root = write_voc(tmp_path, 2)
    end = old.replace("<", "</")
    change(root, old, new)
    change(root, new, new)  # the element is still there
    text = (root / "Annotations" / "001.xml").read_text()
    start = text.index(new) + len(new)
    cut = text.index(end, start)
    (root / "Annotations" / "001.xml").write_text(text[:cut] + "</unused>" + text[cut + len(end) :])
    with pytest.raises(BadAnnotationError, match=reason) as error:
        read_voc(root, "train", name="voc")
    assert f"{root / 'Annotations' / '001.xml'}, object 1" in str(error.value)
    dataset = read_voc(root, "train", name="voc", on_error="skip")
    assert [len(image.instances) for image in dataset.images] == [2, 1]


def test_bad_files_are_named(tmp_path):
    root = write_voc(tmp_path, 4)
    (root / "Annotations" / "000.xml").write_text("<annotation>")
    (root / "JPEGImages" / "001.png").unlink()
    (root / "Annotations" / "002.xml").unlink()
    with pytest.raises(BadAnnotationError) as error:
        read_voc(root, "train", name="voc")
    for part in ("000.xml: it cannot be read as XML", "001.png is missing", "002.xml is missing"):
        assert part in str(error.value)
    assert len(read_voc(root, "train", name="voc", on_error="skip")) == 1


def test_entities_are_refused(tmp_path):
    root = write_voc(tmp_path, 2)
    path = root / "Annotations" / "001.xml"
    bomb = '<!DOCTYPE a [<!ENTITY b "c">]>'
    path.write_text(bomb + path.read_text())
    with pytest.raises(BadAnnotationError, match="it declares entities"):
        read_voc(root, "train", name="voc")


def test_splits(tmp_path):
    root = write_voc(tmp_path, 5)
    assert len(load_detection(root, "train", validation_fraction=0.2)) == 4
    assert len(load_detection(root, "validation", validation_fraction=0.2)) == 1
    (root / "ImageSets" / "Main" / "val.txt").write_text("000\n")
    assert len(load_detection(root, "train")) == 5
    assert len(load_detection(root, "validation")) == 1
    with pytest.raises(InputError, match="lists no test images"):
        read_voc(root, "test", name="voc")
    with pytest.raises(InputError, match="is not Pascal VOC's layout"):
        read_voc(tmp_path / "ImageSets", None, name="voc")
