"""Folders of images: every layout, every fault by its message."""

from __future__ import annotations

from pathlib import Path

import pytest

from v2m.data import load_dataset
from v2m.data.check import check_folder
from v2m.errors import InputError


def sizes(directory: Path, **options: object) -> list[int]:
    splits = ("train", "validation", "test")
    return [len(load_dataset(directory, split, **options)) for split in splits]


def names(directory: Path, split: str, **options: object) -> set[str]:
    dataset = load_dataset(directory, split, **options)
    return {str(dataset.root / path) for path in dataset.paths}


def test_all_three_splits(make_folder) -> None:
    counts = {"train/b": 3, "train/a": 2, "validation/a": 1, "validation/b": 1}
    folder = make_folder({**counts, "test/a": 1, "test/b": 2})
    assert sizes(folder) == [5, 2, 3]
    train = load_dataset(folder)
    assert train.classes == ["a", "b"]
    assert train.targets == [0, 0, 1, 1, 1]
    assert train.paths[0] == "a/000.png"
    image, target = train[4]
    assert (image.mode, image.size, target) == ("RGB", (24, 20), 1)
    assert (train.in_chans, train.image_size) == (3, None)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_train_and_validation_alone_test_on_the_validation_images(make_folder, name: str) -> None:
    folder = make_folder({"train/a": 4, "train/b": 4, f"{name}/a": 1, f"{name}/b": 1})
    assert sizes(folder) == [8, 2, 2]
    assert load_dataset(folder, "test").origin == str(folder / name)


def test_train_and_test_alone_keep_validation_images_aside(make_folder) -> None:
    folder = make_folder({"train/a": 10, "train/b": 20, "test/a": 1, "test/b": 1})
    assert sizes(folder) == [27, 3, 2]
    assert sizes(folder, validation_fraction=0.5) == [15, 15, 2]
    assert len(load_dataset(folder, "train", validation_fraction=0)) == 30


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_images_without_other_splits_are_split_in_three(make_folder, prefix: str) -> None:
    folder = make_folder({f"{prefix}a": 10, f"{prefix}b": 20})
    assert sizes(folder) == [24, 3, 3]
    parts = [names(folder, split) for split in ("train", "validation", "test")]
    assert len(set.union(*parts)) == 30
    assert parts == [names(folder, split) for split in ("train", "validation", "test")]
    assert parts[1] != names(folder, "validation", seed=1)


def test_only_the_split_that_is_asked_for_must_exist(make_folder) -> None:
    folder = make_folder({"test/a": 1, "test/b": 1})
    assert len(load_dataset(folder, "test")) == 2
    with pytest.raises(InputError, match=r"has test/ but no train/, so there are no train images"):
        load_dataset(folder, "train")


def test_a_class_may_be_called_like_a_split(make_folder) -> None:
    folder = make_folder({"train": 10, "car": 10})
    assert load_dataset(folder).classes == ["car", "train"]


def test_hidden_files_other_files_and_nested_folders(make_folder) -> None:
    folder = make_folder({"a": 10, "a/deeper/still": 2, "b": 10, ".cache": 3, "b/.thumbs": 2})
    (folder / "a" / "notes.txt").write_text("not an image")
    (folder / "a" / "._000.png").write_bytes(b"resource fork")
    (folder / "README.md").write_text("about")
    report = check_folder(folder)
    assert report.images == {"all": {"a": 12, "b": 10}}
    assert (report.problems, report.bad) == ([], [])


def test_loops_of_links_end_and_count_nothing_twice(make_folder) -> None:
    folder = make_folder({"a": 3, "b": 3})
    (folder / "a" / "again").symlink_to(folder / "a", target_is_directory=True)
    (folder / "a" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "self").symlink_to(folder / "self")
    found = check_folder(folder).images["all"]
    assert list(found) == ["a", "b"]
    assert found["b"] == 3
    assert found["a"] == 6  # its own three, and by way of `up` those of b


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"a": 3, "empty": 0, "hollow": 0}, r"no images of class 'empty', 'hollow': add some or"),
        ({"a": 0, "b": 0}, r"has no images in its 2 subfolders \(looked for \.jpg"),
        ({}, r"has no class folders: put the images of each class into a subfolder"),
        ({".": 2}, r"has no class folders, only loose images"),
        ({"train/a": 2, "training/a": 2}, r"has both train/ and training/: keep one"),
        ({"a": 2, "b": 20}, r"class 'a' of .* has 2 images, too few to keep some aside"),
    ],
)
def test_folders_that_cannot_be_used(make_folder, counts, message: str, tmp_path: Path) -> None:
    if counts == {".": 2}:
        folder = make_folder({"x": 2}) / "x"
    else:
        folder = make_folder(counts)
    with pytest.raises(InputError, match=message) as caught:
        load_dataset(folder)
    assert str(tmp_path) in str(caught.value) or tmp_path.name in str(caught.value)


def test_splits_with_other_classes(make_folder) -> None:
    folder = make_folder({"train/a": 4, "train/b": 4, "val/b": 1, "val/c": 1})
    with pytest.raises(InputError, match=r"classes of .*val differ .*it lacks a and adds c"):
        load_dataset(folder, "validation")


def test_names_that_are_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'fashon' is neither a data set \(fashion-mnist-small"):
        load_dataset("fashon")
    with pytest.raises(InputError, match="nowhere does not exist"):
        load_dataset(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is not a folder"):
        load_dataset(tmp_path / "file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split must be one of train, validation, test; got 'dev'"),
        ({"on_error": "ignore"}, "on_error must be raise or skip; got 'ignore'"),
        ({"validation_fraction": 1.0}, "validation_fraction must be at least 0 and below 1; got 1"),
        ({"validation_fraction": -0.1}, "validation_fraction must be at least 0"),
        ({"split": "validation", "validation_fraction": 0}, "has no validation images"),
    ],
)
def test_options_that_cannot_be_used(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_dataset("fashion-mnist-small", **options)


def test_check_names_everything_that_is_wrong(make_folder) -> None:
    folder = make_folder({"train/a": 3, "train/b": 2, "train/none": 0, "val/a": 1, "val/c": 1})
    (folder / "train" / "a" / "001.png").write_bytes(b"")
    (folder / "val" / "c" / "000.png").write_text("text")
    calls = []
    report = check_folder(folder, lambda *counts: calls.append(counts))
    assert report.images["train"] == {"a": 3, "b": 2, "none": 0}
    assert len(report.problems) == 2
    assert "class 'none' is empty" in report.problems[0]
    assert "val lacks b, none and adds c" in report.problems[1]
    assert len(report.bad) == 2
    assert str(folder / "train" / "a" / "001.png") + " is empty" in report.bad[0]
    assert str(folder / "val" / "c" / "000.png") in report.bad[1]
    assert (calls[0], calls[-1]) == ((0, 7), (7, 7))


def test_check_names_images_of_no_class(make_folder) -> None:
    folder = make_folder({"train/a": 3, "train/b": 2, "val/a": 1, "val/b": 1})
    (folder / "train" / "a" / "000.png").rename(folder / "train" / "loose.png")
    (folder / "train" / "notes.txt").write_text("no image")
    (problem,) = check_folder(folder).problems
    assert f"{folder / 'train'} has images outside of the class folders (1)" in problem
    assert problem.endswith("loose.png.")
