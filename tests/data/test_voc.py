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


def write_lists(root, **lists: str) -> None:
    """ImageSets/Main with these lists only: names as text, apart by blanks."""
    folder = root / "ImageSets" / "Main"
    for path in folder.iterdir():
        path.unlink()
    for name, images in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(images.split()) + "\n")


def split_names(root) -> dict[str, list[str]]:
    splits = ("train", "validation", "test")
    found = {s: load_detection(root, s, validation_fraction=0.25) for s in splits}
    return {s: [image.path[:3] for image in part.images] for s, part in found.items()}


def test_trainval_and_test_lists(tmp_path):
    root = write_voc(tmp_path, 6)
    write_lists(root, trainval="000 001 003 005", test="002 004")
    names = split_names(root)
    assert sorted(names["train"] + names["validation"]) == ["000", "001", "003", "005"]
    assert len(names["validation"]) == 1
    assert names["test"] == ["002", "004"]
    assert load_detection(root, "test").split == "test"


def test_trainval_with_its_validation_list(tmp_path):
    root = write_voc(tmp_path, 6)
    write_lists(root, trainval="000 001 003 005", val="001 005")
    names = split_names(root)
    assert names == {"train": ["000", "003"], "validation": ["001", "005"], "test": ["001", "005"]}


def test_train_list_comes_before_trainval(tmp_path):
    root = write_voc(tmp_path, 6)
    write_lists(root, train="000 001 000", trainval="000 001 002 003", val="002 003")
    assert split_names(root)["train"] == ["000", "001"]


def test_only_a_validation_list(tmp_path):
    root = write_voc(tmp_path, 6)
    write_lists(root, val="001 004")
    names = split_names(root)
    assert names["train"] == ["000", "002", "003", "005"]
    assert names["validation"] == names["test"] == ["001", "004"]


def test_only_a_test_list(tmp_path):
    root = write_voc(tmp_path, 6)
    write_lists(root, test="001 004")
    names = split_names(root)
    assert sorted(names["train"] + names["validation"]) == ["000", "002", "003", "005"]
    assert len(names["validation"]) == 1
    assert names["test"] == ["001", "004"]


def test_no_lists(tmp_path):
    root = write_voc(tmp_path, 6)
    write_lists(root)
    names = split_names(root)
    everything = [f"{number:03}" for number in range(6)]
    assert sorted(names["train"] + names["validation"]) == everything
    assert names["test"] == names["validation"]


def test_lists_that_leave_nothing_to_train_on(tmp_path):
    root = write_voc(tmp_path, 4)
    write_lists(root, val="000 001", test="002 003")
    with pytest.raises(InputError, match=r"no image to train on: .*val.txt and .*test.txt list"):
        load_detection(root)


def test_list_that_is_not_text(tmp_path):
    root = write_voc(tmp_path, 2)
    path = root / "ImageSets" / "Main" / "train.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not text in UTF-8: byte 0xff at position 0") as error:
        load_detection(root)
    assert str(path) in str(error.value)


def test_unknown_encoding_is_named(tmp_path):
    root = write_voc(tmp_path, 2)
    path = root / "Annotations" / "001.xml"
    path.write_text("<?xml version='1.0' encoding='no-such'?>" + path.read_text())
    with pytest.raises(BadAnnotationError, match=r"001.xml: it cannot be read as XML"):
        load_detection(root)
