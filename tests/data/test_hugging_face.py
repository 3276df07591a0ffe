"""Hugging Face image data sets on the disk, in each of the ways they are kept there."""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from v2m.data import DataConfig, create_loader, load_dataset
from v2m.errors import InputError

CLASSES = ["ant", "bee", "cat"]
FEATURES = datasets.Features(
    {"image": datasets.Image(), "caption": datasets.Value("string"), "label": None}
    | {"label": datasets.ClassLabel(names=CLASSES)}
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(count: int, first: int = 0) -> datasets.Dataset:
    """Image n is 6 x 8 pixels of the number n."""
    numbers = range(first, first + count)
    rows = {
        "image": [Image.fromarray(np.full((6, 8, 3), n, np.uint8)) for n in numbers],
        "caption": ["an image"] * count,
        "label": [n % 3 for n in numbers],
    }
    return datasets.Dataset.from_dict(rows, features=FEATURES)


def save_parquet(folder: Path) -> None:
    folder.mkdir()
    table(30).to_parquet(folder / "train-00000-of-00001.parquet")
    table(6, 100).to_parquet(folder / "validation-00000-of-00001.parquet")


def save_to_disk(folder: Path) -> None:
    datasets.DatasetDict({"train": table(30), "validation": table(6, 100)}).save_to_disk(folder)


def save_images(folder: Path) -> None:
    for split, numbers in (("train", range(30)), ("validation", range(100, 106))):
        for n in numbers:
            path = folder / split / CLASSES[n % 3] / f"{n:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((6, 8, 3), n, np.uint8)).save(path)


@pytest.mark.parametrize("save", [save_parquet, save_to_disk, save_images])
def test_each_way_to_keep_one(tmp_path: Path, save) -> None:
    save(tmp_path / "set")
    name = f"hfds:{tmp_path}/set"
    train, validation = load_dataset(name, "train"), load_dataset(name, "validation")
    assert train.classes == validation.classes == CLASSES
    assert len(load_dataset(name, "test")) == len(validation) == 6
    assert sorted(train[i][0].getpixel((7, 5))[0] for i in range(30)) == list(range(30))
    for index in range(30):
        image, target = train[index]
        assert image.size == (8, 6)
        assert target == train.targets[index] == image.getpixel((0, 0))[0] % 3
    assert train.identifier(3) == "row 3"


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_once_and_on_in_mid_epoch(tmp_path: Path, workers: int) -> None:
    table(30).save_to_disk(tmp_path / "set")
    dataset = load_dataset(f"hfds:{tmp_path}/set", validation_fraction=0)
    config = DataConfig(
        crop="center", horizontal_flip=0, random_erasing=0, color_jitter=0, auto_augment=None
    )

    def numbers(first_batch: int = 0, **keywords: int) -> list[list[int]]:
        loader = create_loader(
            dataset,
            config,
            is_training=True,
            input_size=(3, 4, 4),
            mean=(0.0,) * 3,
            std=(1 / 255,) * 3,
            batch_size=keywords.pop("batch_size", 5),
            num_workers=workers,
            **keywords,
        )
        loader.set_epoch(1, first_batch)
        return [images.mean((1, 2, 3)).round().int().tolist() for images, _ in loader]

    whole = numbers()
    assert sorted(n for batch in whole for n in batch) == list(range(30))
    assert numbers(first_batch=4) == whole[4:]
    ranks = [numbers(rank=rank, world_size=2, batch_size=5) for rank in (0, 1)]
    assert sorted(n for rank in ranks for batch in rank for n in batch) == list(range(30))


def test_splits_are_kept_aside_where_there_are_none(tmp_path: Path) -> None:
    table(60).save_to_disk(tmp_path / "set")
    splits = ("train", "validation", "test")
    assert [len(load_dataset(f"hfds:{tmp_path}/set", s)) for s in splits] == [48, 6, 6]


def test_what_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"is not a folder\. Nothing is fetched"):
        load_dataset("hfds:mnist")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty cannot be loaded by `datasets`"):
        load_dataset(f"hfds:{tmp_path}/empty")
    table(6).remove_columns("label").save_to_disk(tmp_path / "plain")
    with pytest.raises(InputError, match="has 0 columns of type ClassLabel among image, caption"):
        load_dataset(f"hfds:{tmp_path}/plain")
    datasets.DatasetDict({"odd": table(6)}).save_to_disk(tmp_path / "odd")
    with pytest.raises(InputError, match="has a split 'odd': expected train, validation or test"):
        load_dataset(f"hfds:{tmp_path}/odd")
    save_parquet(tmp_path / "card")
    card = (
        "---\nconfigs:\n- config_name: default\n  data_files: https://example.org/x.parquet\n---\n"
    )
    (tmp_path / "card" / "README.md").write_text(card + "see https://example.org")
    with pytest.raises(InputError, match=r"refers to files elsewhere in .*README\.md"):
        load_dataset(f"hfds:{tmp_path}/card")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        InputError, match=r"needs the package datasets: pip install 'v2m\[datasets\]"
    ):
        load_dataset(f"hfds:{tmp_path}/plain")


def test_a_loading_script_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    with pytest.raises(InputError, match="cannot be loaded by `datasets`"):
        load_dataset(f"hfds:{tmp_path}/set")
    assert not (tmp_path / "canary").exists()
