"""The bundled subset of Fashion-MNIST, the full set, and the script that packs it."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from v2m.data import describe, fashion_mnist, load_dataset
from v2m.data.fashion_mnist import BUNDLED_DIRECTORY, FULL, SMALL, format_idx, parse_idx, read_idx
from v2m.errors import InputError

SCRIPT = Path(__file__).parents[2] / "scripts" / "pack_fashion_mnist.py"


@pytest.fixture(scope="module")
def packer():
    spec = importlib.util.spec_from_file_location("pack_fashion_mnist", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def full_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the full set, 300 and 100 random images, where v2m looks for it."""
    random = np.random.default_rng(0)
    directory = tmp_path / "cache" / "fashion-mnist"
    directory.mkdir(parents=True)
    checksums = {}
    for part, count in (("train", 300), ("test", 100)):
        arrays = (
            random.integers(0, 256, (count, 28, 28), np.uint8),
            np.arange(count, dtype=np.uint8) % 10,
        )
        for name, values in zip(FULL.files[part], arrays):
            content = format_idx(values)
            checksums[name] = hashlib.sha256(content).hexdigest()
            (directory / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setenv("V2M_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_DIRECTORY", tmp_path / "nowhere")
    for name, checksum in checksums.items():
        monkeypatch.setitem(FULL.checksums, name, checksum)
    return directory


def test_the_bundled_files_are_those_that_are_documented() -> None:
    text = (BUNDLED_DIRECTORY / "README.md").read_text()
    for name, checksum in SMALL.checksums.items():
        content = gzip.decompress((BUNDLED_DIRECTORY / f"{name}.gz").read_bytes())
        assert hashlib.sha256(content).hexdigest() == checksum
        assert f"| {name} | {checksum} |" in text
    assert "MIT License" in (BUNDLED_DIRECTORY / "LICENSE-fashion-mnist.txt").read_text()
    size = sum(path.stat().st_size for path in BUNDLED_DIRECTORY.iterdir())
    assert size < 6_000_000


def test_the_bundled_set_is_class_balanced_and_has_the_published_statistics() -> None:
    train = load_dataset("fashion-mnist-small", "train")
    validation = load_dataset("fashion-mnist-small", "validation")
    test = load_dataset("fashion-mnist-small", "test")
    assert Counter(train.targets) == dict.fromkeys(range(10), 900)
    assert Counter(validation.targets) == dict.fromkeys(range(10), 100)
    assert Counter(test.targets) == dict.fromkeys(range(10), 200)
    assert (train.in_chans, train.image_size, len(train.classes)) == (1, (28, 28), 10)
    assert train.classes[9] == "Ankle boot"
    assert np.mean(train.images) / 255 == pytest.approx(train.mean[0], abs=0.003)
    assert np.std(train.images) / 255 == pytest.approx(train.std[0], abs=0.003)
    image, target = test[0]
    assert (image.mode, image.size, target) == ("L", (28, 28), test.targets[0])


def test_no_image_is_in_two_splits() -> None:
    seen = [
        {image.tobytes() for image in load_dataset("fashion-mnist-small", split).images}
        for split in ("train", "validation", "test")
    ]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def test_damage_is_found_on_load(tmp_path: Path) -> None:
    name = SMALL.files["test"][0]
    content = bytearray(gzip.decompress((BUNDLED_DIRECTORY / f"{name}.gz").read_bytes()))
    content[1000] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} is not the published file.*SHA-256.*expected"):
        read_idx(tmp_path, name, SMALL.checksums[name])
    packed = (BUNDLED_DIRECTORY / f"{name}.gz").read_bytes()
    (tmp_path / f"{name}.gz").write_bytes(packed[:-1000])
    with pytest.raises(InputError, match=r"cannot be read.*Fetch or install it again"):
        read_idx(tmp_path, name, SMALL.checksums[name])
    with pytest.raises(InputError, match="has no file nothing"):
        read_idx(tmp_path, "nothing")


@pytest.mark.parametrize("shape", [(7,), (3, 4, 5), (0, 2)])
def test_idx_goes_there_and_back(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert (parse_idx(format_idx(values), "x") == values).all()
    assert parse_idx(format_idx(values), "x").shape == shape


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\0", "not an IDX file"),
        (b"\0\0\x08\x02\0\0\0\x02", "not an IDX file"),
        (b"\0\0\x08\x01\0\0\0\x02ab c", r"should hold \(2,\) bytes but holds 4"),
    ],
)
def test_other_files_are_not_taken_for_idx(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_idx(content, "x")


def test_the_full_set_is_found_and_split(full_set: Path) -> None:
    assert {info.name: info.location for info in describe()}["fashion-mnist"] == full_set
    train = load_dataset("fashion-mnist", "train")
    assert (len(train), train.origin) == (270, str(full_set))
    assert len(load_dataset("fashion-mnist", "validation")) == 30
    assert len(load_dataset("fashion-mnist", "test")) == 100


def test_without_the_full_set_it_says_how_to_get_it(full_set: Path) -> None:
    next(full_set.iterdir()).unlink()
    assert {info.name: info.location for info in describe()}["fashion-mnist"] is None
    with pytest.raises(InputError, match=re.escape(str(full_set))) as caught:
        load_dataset("fashion-mnist")
    for hint in ("v2m data download fashion-mnist", "apt-get install", "fashion-mnist-small"):
        assert hint in str(caught.value)


def test_packing_is_reproducible_and_balanced(packer, full_set: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    counts = {"train": 12, "test": 4}
    checksums = [packer.pack(full_set, folder, counts, FULL.checksums) for folder in folders]
    assert checksums[0] == checksums[1]
    for name, checksum in checksums[0].items():
        packed = [(folder / f"{name}.gz").read_bytes() for folder in folders]
        assert packed[0] == packed[1]
        assert hashlib.sha256(gzip.decompress(packed[0])).hexdigest() == checksum
    for part, count in counts.items():
        images, labels = (read_idx(folders[0], name) for name in SMALL.files[part])
        assert Counter(labels.tolist()) == dict.fromkeys(range(10), count)
        source = [read_idx(full_set, name) for name in FULL.files[part]]
        pairs = [
            {(i.tobytes(), int(t)) for i, t in zip(*arrays)}
            for arrays in ((images, labels), source)
        ]
        assert len(pairs[0]) == len(labels)
        assert pairs[0] <= pairs[1]


def test_the_choice_of_images_never_changes(packer) -> None:
    labels = np.arange(1000, dtype=np.uint8) % 10
    chosen = packer.choose(labels, "train", 2)
    assert chosen.tolist() == CHOSEN


CHOSEN = [
    35,
    59,
    116,
    147,
    193,
    259,
    297,
    387,
    431,
    442,
    456,
    569,
    606,
    614,
    636,
    672,
    760,
    886,
    960,
    977,
]


@pytest.mark.skipif(fashion_mnist.locate() is None, reason="needs the full Fashion-MNIST")
def test_the_bundled_files_come_from_the_published_ones(packer, tmp_path: Path) -> None:
    written = packer.pack(fashion_mnist.require(), tmp_path, packer.PER_CLASS, FULL.checksums)
    assert written == SMALL.checksums
