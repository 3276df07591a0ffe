"""COCO's JSON: right boxes and masks, and every bad entry named by file and number."""

import json

import numpy as np
import pytest

from shapes import (
    CLASSES,
    box_of,
    coco_content,
    draw,
    run_lengths,
    write_coco,
    write_voc,
)
from v2m.data import coco
from v2m.data.annotations import BadAnnotationError, mask_api
from v2m.data.coco import coco_classes, read_coco
from v2m.data.detection import load_detection
from v2m.errors import InputError
from v2m.evaluation.detection import average_precision


def masked(counts) -> dict:
    return {"segmentation": {"size": [64, 64], "counts": counts}}


def test_boxes_masks_and_classes(tmp_path):
    dataset = load_detection(write_coco(tmp_path, 3), "train")
    assert dataset.classes == ["disc", "square"]
    assert dataset.category_ids == [3, 7]
    assert dataset.has_masks
    for index in range(3):
        picture, objects = draw(index)
        image, target = dataset[index]
        assert np.array_equal(np.asarray(image), picture)
        assert target["labels"].tolist() == [label for label, _ in objects]
        assert target["boxes"].tolist() == [list(box_of(mask)) for _, mask in objects]
        assert np.array_equal(target["masks"].numpy(), np.stack([m for _, m in objects]))


def test_polygons_compressed_masks_and_crowds(tmp_path):
    content, _ = coco_content(1)
    from faster_coco_eval.core import mask as api

    first, second = content["annotations"]
    first["segmentation"] = [[10, 10, 30, 10, 30, 20, 10, 20]]
    first["bbox"] = [10, 10, 20, 10]
    second["segmentation"] = api.frPyObjects(second["segmentation"], 64, 64)
    second["segmentation"]["counts"] = as_text(second["segmentation"]["counts"])
    write_coco(tmp_path, 1)
    path = tmp_path / "annotations" / "instances_train.json"
    path.write_text(json.dumps(content))
    dataset = load_detection(tmp_path)
    masks = dataset[0][1]["masks"].numpy()
    expected = np.zeros((64, 64), np.uint8)
    expected[10:20, 10:30] = 1
    assert np.array_equal(masks[0], expected)
    assert np.array_equal(masks[1], draw(0)[1][1][1])
    second["iscrowd"] = 1
    path.write_text(json.dumps(content))
    dataset = load_detection(tmp_path)
    assert len(dataset[0][1]["labels"]) == 1
    assert [a["iscrowd"] for a in dataset.coco()["annotations"]] == [0, 1]


def as_text(counts) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts


def test_what_is_written_is_what_was_read(tmp_path):
    dataset = load_detection(write_coco(tmp_path, 2))
    (tmp_path / "again.json").write_text(json.dumps(dataset.coco(), default=as_text))
    again = read_coco(tmp_path / "again.json", tmp_path / "train", name="again")
    for index in range(2):
        for key, value in dataset[index][1].items():
            assert np.array_equal(value, again[index][1][key])


BAD_ANNOTATIONS = {
    "empty box": ({"bbox": [5, 5, 0, 9]}, r"its box from \(5, 5\) to \(5, 14\) is empty"),
    "negative box": ({"bbox": [9, 9, -3, 4]}, "is empty"),
    "outside": ({"bbox": [70, 5, 5, 5]}, "leaves the image of 64 x 64 pixels"),
    "beyond the edge": ({"bbox": [50, 5, 20, 5]}, "leaves the image"),
    "three numbers": ({"bbox": [1, 2, 3]}, r"its bbox is \[1, 2, 3\]"),
    "text": ({"bbox": ["a", 2, 3, 4]}, "is not four finite numbers"),
    "not finite": ({"bbox": [1, float("nan"), 3, 4]}, "is not four finite numbers"),
    "unknown category": ({"category_id": 99}, "its category_id 99 is not among the categories"),
    "unknown image": ({"image_id": 99}, "its image_id 99 is not among the images"),
    "list as image": ({"image_id": [1]}, r"its image_id \[1\] is not among"),
    "mask of another size": (
        {"segmentation": {"size": [32, 64], "counts": [0, 2048]}},
        r"its mask has height and width \[32, 64\], and the image \[64, 64\]",
    ),
    "short mask": ({"segmentation": {"size": [64, 64], "counts": [5, 5]}}, "add up to 10, not to"),
    "two corners": ({"segmentation": [[1, 1, 5, 5]]}, "not at least three corners"),
    "empty mask": ({"segmentation": {"size": [64, 64], "counts": [4096]}}, "its mask is empty"),
    "odd mask": ({"segmentation": {"size": [64, 64]}}, "segmentation cannot be read"),
    "number as mask": ({"segmentation": 7}, "segmentation cannot be read"),
    "number as lengths": (masked(12), "counts must be text or a list of numbers, got 12"),
    "no lengths": (masked(""), "counts must be text or a list of numbers, got ''"),
    "garbage": (masked("garbage!!"), "counts have the character 'r'"),
    "other alphabet": (masked("\u00e9\u2028"), "counts have the character"),
    "cut": (masked("PPYo"), "counts end within a number"),
    "endless number": (masked("o" * 4000), "a number of more than 60 bits"),
    "too long": (masked("PPYo1000"), "add up to .*, not to the image's 4096 pixels"),
    "too short": (masked("15"), "add up to 6, not to the image's 4096 pixels"),
    "negative lengths": (masked([-10, 4106]), "are not all whole numbers from 0"),
    "negative text": (masked("F:PP4"), "are not all whole numbers from 0"),
    "fractions": (masked([0.5, 4095.5]), "are not all whole numbers from 0"),
    "truths": (masked([True, 4095]), "are not all whole numbers from 0"),
    "text in the lengths": (masked(["a", 4096]), "are not all whole numbers from 0"),
    "endless polygon": ({"segmentation": [[10**400, 0, 5, 5, 9, 9]]}, "cannot be read"),
    "endless box": ({"bbox": [10**400, 1, 2, 3]}, "is not four finite numbers"),
    "endless sum": ({"bbox": [10**400, 1, 2.5, 3]}, "is not four finite numbers"),
}


@pytest.mark.parametrize("kind", BAD_ANNOTATIONS)
def test_bad_annotation_is_named_and_skipped_on_request(tmp_path, kind):
    change, reason = BAD_ANNOTATIONS[kind]
    content, _ = coco_content(2)
    content["annotations"][1].update(change)
    write_coco(tmp_path, 2)
    path = tmp_path / "annotations" / "instances_train.json"
    path.write_text(json.dumps(content))
    with pytest.raises(BadAnnotationError, match=reason) as error:
        load_detection(tmp_path)
    assert f"{path}, annotations[1] (id 2)" in str(error.value)
    assert "data.on_error=skip" in str(error.value)
    dataset = load_detection(tmp_path, on_error="skip")
    assert [len(image.instances) for image in dataset.images] == [1, 2]
    assert len(dataset.problems) == 1


BAD_IMAGES = {
    "missing file": ({"file_name": "no.png"}, "no.png is missing"),
    "no file": ({"file_name": None}, "it has no file_name"),
    "same id": ({"id": 10}, "its id is there twice"),
    "endless height": ({"height": 10**400}, "its height and width are 1000"),
    "no height": ({"height": 0}, "its height and width are 0 and 64"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_image_entry_is_named_and_skipped_on_request(tmp_path, kind):
    change, reason = BAD_IMAGES[kind]
    content, _ = coco_content(2)
    content["images"][1].update(change)
    write_coco(tmp_path, 2)
    path = tmp_path / "annotations" / "instances_train.json"
    path.write_text(json.dumps(content))
    with pytest.raises(BadAnnotationError, match=reason) as error:
        load_detection(tmp_path)
    assert f"{path}, images[1]" in str(error.value)
    assert len(load_detection(tmp_path, on_error="skip")) == 1


def test_image_of_another_size_is_named(tmp_path):
    content, _ = coco_content(1)
    content["images"][0].update(height=70)
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    write_coco(tmp_path, 1)
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
    dataset = load_detection(tmp_path)
    with pytest.raises(BadAnnotationError, match=r"000.png has 64 x 64 pixels, .* says 64 x 70"):
        dataset[0]


def test_area_that_no_float_holds_is_that_of_the_mask(tmp_path):
    content, _ = coco_content(1)
    expected = content["annotations"][0]["area"]
    content["annotations"][0]["area"] = 10**400
    write_coco(tmp_path, 1)
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
    assert load_detection(tmp_path).images[0].instances[0].area == expected


def test_box_over_the_edge_by_rounding_is_cut(tmp_path):
    content, _ = coco_content(1)
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    content["annotations"][0]["bbox"] = [-0.5, 3, 65, 10]
    write_coco(tmp_path, 1)
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
    dataset = load_detection(tmp_path)
    assert dataset[0][1]["boxes"][0].tolist() == [0, 3, 64, 13]
    assert not dataset.has_masks
    assert dataset.problems == []


def test_one_object_without_a_mask_is_named(tmp_path):
    content, _ = coco_content(1)
    assert len(content["annotations"]) > 1
    del content["annotations"][1]["segmentation"]
    write_coco(tmp_path, 1)
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
    dataset = load_detection(tmp_path)
    assert not dataset.has_masks
    (problem,) = dataset.problems
    count = len(content["annotations"])
    assert problem.startswith(f"masks: 1 of {count} objects of ")
    assert problem.endswith("have none, the first of them annotations[1]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not COCO's JSON"),
        ('{"images": [], "annotations": []}', "'categories' is missing"),
        ('{"images": [], "annotations": [], "categories": []}', "has no categories"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
            "lists no images",
        ),
    ],
)
def test_files_of_another_kind(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_coco(path, tmp_path, name="x")


def test_splits(tmp_path):
    root = write_coco(tmp_path / "both", 4)
    assert [len(load_detection(root, split)) for split in ("train", "validation", "test")] == [
        4
    ] * 3
    assert load_detection(root, "test").split == "validation"
    root = write_coco(tmp_path / "one", 10, splits=("train",))
    parts = {s: load_detection(root, s, validation_fraction=0.2) for s in ("train", "validation")}
    names = {s: {image.path for image in part.images} for s, part in parts.items()}
    assert len(names["train"]) == 8
    assert len(names["validation"]) == 2
    assert not names["train"] & names["validation"]
    with pytest.raises(InputError, match="has no annotated training images"):
        load_detection(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        load_detection(tmp_path / "nowhere")
    root = write_coco(tmp_path / "tiny", 1, splits=("train",))
    with pytest.raises(InputError, match="too few to set"):
        load_detection(root, "validation")


def test_one_folder_a_split(tmp_path):
    content, _ = coco_content(2)
    root = write_coco(tmp_path, 2, splits=("train",))
    (root / "annotations" / "instances_train.json").unlink()
    (root / "train" / "_annotations.coco.json").write_text(json.dumps(content))
    assert len(load_detection(root, validation_fraction=0.5)) == 1
    assert len(load_detection(root, "validation", validation_fraction=0.5)) == 1


def write_categories(root, split: str, names: dict[int, str]):
    """Replace the categories; the objects of a name that is still there take its new number."""
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    old = {entry["id"]: entry["name"] for entry in content["categories"]}
    new = {name: number for number, name in names.items()}
    content["categories"] = [{"id": number, "name": name} for number, name in names.items()]
    for annotation in content["annotations"]:
        number = annotation["category_id"]
        annotation["category_id"] = new.get(old[number], number)
    path.write_text(json.dumps(content))
    return path


def named_labels(dataset) -> list[list[str]]:
    targets = [dataset.target(index) for index in range(len(dataset))]
    return [[dataset.classes[label] for label in t["labels"].tolist()] for t in targets]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_another_order_of_the_categories_is_that_of_training(tmp_path, split):
    root = write_coco(tmp_path, 4, splits=("train", "val", "test"))
    write_categories(root, {"validation": "val"}.get(split, split), {1: "square", 5: "disc"})
    train, dataset = load_detection(root), load_detection(root, split)
    assert dataset.classes == train.classes == ["disc", "square"]
    assert dataset.category_ids == [5, 1]
    for index in range(4):
        expected = train.target(index)["labels"].tolist()
        assert dataset.target(index)["labels"].tolist() == expected
    assert {i.label for image in dataset.images for i in image.instances} == {0, 1}
    rows = [
        {**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": 1.0}
        for a in dataset.coco()["annotations"]
    ]
    figures, by_class = average_precision(dataset.coco(), rows, "bbox")
    assert figures["ap"] == pytest.approx(1)
    assert set(by_class) == {1, 5}


def test_categories_that_training_lacks_are_refused(tmp_path):
    root = write_coco(tmp_path, 4)
    path = write_categories(root, "val", {3: "circle", 7: "square"})
    for on_error in ("raise", "skip"):
        with pytest.raises(InputError, match="has objects of the categories 'circle'") as error:
            load_detection(root, "validation", on_error=on_error)
        message = str(error.value)
        assert str(path) in message
        assert f"{path.with_name('instances_train.json')} do not list" in message
        assert "and lacks 'disc'" in message
    with pytest.raises(InputError, match="'circle'"):
        load_detection(root, "test")


def test_more_and_fewer_categories(tmp_path):
    root = write_coco(tmp_path, 4)
    before = named_labels(load_detection(root, "validation"))
    write_categories(root, "val", {0: "unused", 3: "disc", 7: "square"})
    assert load_detection(root, "validation").classes == ["disc", "square"]
    assert load_detection(root, "validation").category_ids == [3, 7]
    write_categories(root, "train", {2: "apple", 3: "disc", 7: "square", 8: "pear"})
    dataset = load_detection(root, "validation")
    assert dataset.classes == load_detection(root).classes == ["apple", "disc", "square", "pear"]
    assert dataset.category_ids == [8, 3, 7, 9]  # the file's own, and new ones for the rest
    assert named_labels(dataset) == before


def test_categories_of_a_training_file_that_changes(tmp_path):
    root = write_coco(tmp_path, 2)
    path = tmp_path / "annotations" / "instances_train.json"
    assert coco_classes(path) == ["disc", "square"]
    write_categories(root, "train", {3: "square", 7: "disc", 99: "pear"})
    assert coco_classes(path) == ["square", "disc", "pear"]
    assert load_detection(root, "validation").classes == ["square", "disc", "pear"]


def test_coco_and_voc_in_one_folder(tmp_path):
    root = write_voc(write_coco(tmp_path, 3, splits=("train",)), 3)
    (root / "ImageSets" / "Main" / "val.txt").write_text("000\n")
    write_categories(root, "train", {3: "square", 7: "disc"})
    dataset = load_detection(root, "validation")
    assert dataset.root.name == "JPEGImages"
    assert dataset.classes == ["square", "disc"]
    assert dataset.target(0)["labels"].tolist() == [1 - label for label, _ in draw(0)[1]]
    (root / "train").rename(root / "val")
    path = root / "annotations" / "instances_train.json"
    path.rename(path.with_name("instances_val.json"))
    dataset = load_detection(root, "validation")
    assert dataset.root.name != "JPEGImages"
    assert dataset.classes == ["disc", "square"]
    assert named_labels(dataset)[0] == [CLASSES[label] for label, _ in draw(0)[1]]


@pytest.mark.parametrize("seed", range(20))
def test_compressed_run_lengths(tmp_path, seed):
    """The text that faster-coco-eval writes is read as the lengths, and is accepted."""
    random = np.random.default_rng(seed)
    mask = np.asfortranarray(random.random((37, 53)) < random.random() ** 3, np.uint8)
    mask[random.integers(37), random.integers(53)] = 1
    text = as_text(mask_api().encode(mask)["counts"])
    assert coco._run_lengths(text) == run_lengths(mask > 0)["counts"]
