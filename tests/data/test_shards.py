"""Tar shards: the images of a folder, each once, and nothing that a shard should not have."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset

from v2m.data import BadImageError, DataConfig, create_loader, load_dataset
from v2m.errors import InputError

PLAIN = DataConfig(
    crop="center",
    horizontal_flip=0,
    random_erasing=0,
    color_jitter=0,
    auto_augment=None,
    crop_pct=1,
)


def encoded(number: int, image_format: str = "PNG") -> bytes:
    """Image `number`: 4 x 4 pixels of that value."""
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(file, image_format)
    return file.getvalue()


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def samples(numbers: range) -> list[tuple[str, bytes]]:
    return [
        member
        for n in numbers
        for member in (
            (f"{n:04}.cls", str(n % 3).encode()),
            (f"{n:04}.json", b'{"title": "an image"}'),
            (f"{n:04}.png", encoded(n)),
        )
    ]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """60 training images in three shards and 15 of validation in one."""
    for shard in range(3):
        numbers = range(20 * shard, 20 * shard + 20)
        write_shard(tmp_path / f"set-train-{shard}.tar", samples(numbers))
    write_shard(tmp_path / "set-validation-0.tar", samples(range(100, 115)))
    (tmp_path / "classnames.txt").write_text("ant\nbee\ncat\n")
    return tmp_path


def numbers(loader, epoch: int = 0, first_batch: int = 0) -> list[list[int]]:
    loader.set_epoch(epoch, first_batch)
    return [images.mean((1, 2, 3)).round().int().tolist() for images, _ in loader]


def open_loader(dataset, **keywords):
    options = {"is_training": True, "input_size": (3, 4, 4), "batch_size": 6, "num_workers": 0}
    statistics = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    return create_loader(dataset, PLAIN, **{**options, **statistics, **keywords})


def test_splits_classes_and_names(shards: Path) -> None:
    train = load_dataset(f"wds:{shards}", "train")
    validation = load_dataset(f"wds:{shards}", "validation")
    assert (len(train), len(validation)) == (60, 15)
    assert len(load_dataset(f"wds:{shards}", "test")) == 15
    assert train.classes == ["ant", "bee", "cat"]
    assert train.targets == [n % 3 for n in range(60)]
    assert train.identifier(41) == "set-train-2.tar/0041.png"
    image, target = train[41]
    assert (image.mode, image.size, image.getpixel((0, 0)), target) == ("RGB", (4, 4), (41,) * 3, 2)


def test_split_folders_and_no_splits_at_all(tmp_path: Path) -> None:
    write_shard(tmp_path / "a" / "train" / "0.tar", samples(range(12)))
    write_shard(tmp_path / "a" / "val" / "0.tar", samples(range(6)))
    assert len(load_dataset(f"wds:{tmp_path}/a", "validation")) == 6
    write_shard(tmp_path / "b" / "0.tar", samples(range(60)))
    sizes = [len(load_dataset(f"wds:{tmp_path}/b", s)) for s in ("train", "validation", "test")]
    assert sizes == [48, 6, 6]
    assert load_dataset(f"wds:{tmp_path}/b").classes == ["0", "1", "2"]


def test_they_hold_what_the_readers_of_timm_find(shards: Path) -> None:
    names = [p.name for p in sorted(shards.glob("*train*"))]
    streamed = create_dataset(
        "wds/set", str(shards), split=f"{'::'.join(names)}|60", num_samples=60, is_training=False
    )
    theirs = [(image.getpixel((0, 0))[0], target) for image, target in streamed]
    ours = load_dataset(f"wds:{shards}", "train")
    assert theirs == [(ours[i][0].getpixel((0, 0))[0], ours[i][1]) for i in range(60)]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_an_epoch_has_every_image_once_on_any_ranks_and_workers(
    shards: Path, workers: int, world: int
) -> None:
    dataset = load_dataset(f"wds:{shards}", "train")
    options = {"batch_size": 30 // world, "num_workers": workers, "world_size": world, "seed": 3}
    ranks = [numbers(open_loader(dataset, rank=r, **options), 1) for r in range(world)]
    whole = numbers(open_loader(dataset, batch_size=30, seed=3), 1)
    assert [len(batches) for batches in ranks] == [2] * world
    for step, batch in enumerate(whole):
        assert sorted(n for rank in ranks for n in rank[step]) == sorted(batch)
    assert sorted(n for batch in whole for n in batch) == list(range(60))


@pytest.mark.parametrize("workers", [0, 2])
def test_it_goes_on_in_mid_epoch(shards: Path, workers: int) -> None:
    dataset = load_dataset(f"wds:{shards}", "train")
    whole = numbers(open_loader(dataset, num_workers=workers), 2)
    assert numbers(open_loader(dataset, num_workers=workers), 2, first_batch=4) == whole[4:]
    assert Counter(n for batch in whole for n in batch) == Counter(range(60))


def test_a_bad_image_is_named_or_skipped(tmp_path: Path) -> None:
    members = [*samples(range(12)), ("bad.png", b"nonsense"), ("bad.cls", b"1")]
    write_shard(tmp_path / "0.tar", members)
    with pytest.raises(BadImageError, match=r"0\.tar/bad\.png of .* is not an image"):
        list(open_loader(load_dataset(f"wds:{tmp_path}", validation_fraction=0), is_training=False))
    dataset = load_dataset(f"wds:{tmp_path}", validation_fraction=0, on_error="skip")
    loader = open_loader(dataset, is_training=False)
    assert sum(len(batch) for batch in numbers(loader)) == 12
    assert list(loader.skipped) == ["0.tar/bad.png"]


# Hostile shards


def special(kind: bytes, name: str = "0001.png", target: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header


CANARY = "executed"


class Bomb:
    def __reduce__(self) -> tuple:
        return os.system, (f"touch {CANARY}",)


class Plain(tarfile.TarInfo):
    """A header that brings its content."""

    data = b""


def plain(name: str, data: bytes) -> tarfile.TarInfo:
    header = Plain(name)
    header.size = len(data)
    header.data = data
    return header


HOSTILE: dict[str, tuple[Callable[[], list[tarfile.TarInfo]], str]] = {
    "symbolic link": (lambda: [special(tarfile.SYMTYPE, target="/etc/passwd")], "is a link"),
    "hard link": (lambda: [special(tarfile.LNKTYPE, target="/etc/passwd")], "is a link"),
    "link upwards": (lambda: [special(tarfile.SYMTYPE, target="../../x.png")], "is a link"),
    "link called .cls": (lambda: [special(tarfile.SYMTYPE, "1.cls", "/etc/passwd")], "is a link"),
    "character device": (lambda: [special(tarfile.CHRTYPE)], "no plain file"),
    "block device": (lambda: [special(tarfile.BLKTYPE)], "no plain file"),
    "named pipe": (lambda: [special(tarfile.FIFOTYPE)], "no plain file"),
    "sparse file": (lambda: [special(tarfile.GNUTYPE_SPARSE)], "refused|cannot be read"),
    "absolute name": (lambda: [plain("/etc/0001.png", encoded(1))], "points outside"),
    "name with ..": (lambda: [plain("a/../../0001.png", encoded(1))], "points outside"),
    "just ..": (lambda: [plain("..", b"")], "points outside"),
    "backslashes": (lambda: [plain("..\\..\\0001.png", encoded(1))], "points outside"),
    "pickle": (lambda: [plain("0001.pkl", pickle.dumps(Bomb()))], "a pickle"),
    "pickle of webdataset": (lambda: [plain("0001.pyd", pickle.dumps(Bomb()))], "a pickle"),
    "torch pickle": (lambda: [plain("0001.pth", pickle.dumps(Bomb()))], "a pickle"),
    "pickle with two suffixes": (lambda: [plain("1.png.pyd", pickle.dumps(Bomb()))], "a pickle"),
    "the same name twice": (
        lambda: [plain("0001.png", encoded(1)), plain("0001.png", encoded(2))],
        "two images called '0001'",
    ),
    "no class": (lambda: [plain("0001.png", encoded(1))], r"no '0001\.cls' beside it"),
    "a class that is a pickle": (
        lambda: [plain("1.png", encoded(1)), plain("1.cls", pickle.dumps(Bomb()))],
        "expected the number of a class",
    ),
    "a negative class": (
        lambda: [plain("1.png", encoded(1)), plain("1.cls", b"-1")],
        "expected the number of a class",
    ),
    "a huge class": (
        lambda: [plain("1.png", encoded(1)), plain("1.cls", b"9" * 30)],
        "expected the number of a class",
    ),
    "nothing": (list, "has no images"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_members_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    build, message = HOSTILE[kind]
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as archive:
        for header in build():
            archive.addfile(header, io.BytesIO(getattr(header, "data", b"")))
    with pytest.raises(InputError, match=message):
        load_dataset(f"wds:{tmp_path}/shards", "train", validation_fraction=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shards"], "nothing ran, nothing was made"


@pytest.mark.parametrize(
    "address",
    [
        f"pipe:touch {CANARY}",
        f"pipe:touch {CANARY} #.tar",
        "http://127.0.0.1:1/0.tar",
        "https://example.org/{0..9}.tar",
        "gs://bucket/0.tar",
        "file:///etc/passwd",
        "",
    ],
)
def test_addresses_and_commands_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = "is not a folder" if address else "has no .tar files"
    with pytest.raises(InputError, match=expected):
        load_dataset(f"wds:{address}", "train")
    assert list(tmp_path.iterdir()) == []


def test_a_file_name_is_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"pipe:touch {CANARY};.tar"
    write_shard(tmp_path / "set" / name, samples(range(3)))
    assert len(load_dataset("wds:set", "train", validation_fraction=0)) == 3
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize("seed", range(40))
def test_damaged_shards_give_an_error_or_images(tmp_path: Path, seed: int) -> None:
    path = write_shard(tmp_path / "0.tar", samples(range(4)))
    random, data = np.random.default_rng(seed), bytearray(path.read_bytes())
    at = 512 * int(random.integers(len(data) // 512)) + int(random.integers(512))
    if seed % 2:
        del data[at:]
    else:
        data[at : at + 16] = random.bytes(16)
    path.write_bytes(data)
    try:
        dataset = load_dataset(f"wds:{tmp_path}", validation_fraction=0)
        for index in range(len(dataset)):
            dataset[index]
    except InputError as error:
        message = str(error)
    else:
        message = str(tmp_path)
    assert str(tmp_path) in message or "0.tar" in message


def test_sizes_that_lie_are_refused(tmp_path: Path) -> None:
    """A negative size makes a reader go back and read the same header for ever."""
    for size in (-512, -1024, 2**62):
        header = tarfile.TarInfo("0001.png")
        header.size = size
        block = header.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "0.tar").write_bytes(block + bytes(2048))
        with pytest.raises(InputError, match=r"0\.tar cannot be read as a tar file"):
            load_dataset(f"wds:{tmp_path}", validation_fraction=0)


def test_shards_that_changed_since(shards: Path) -> None:
    dataset = load_dataset(f"wds:{shards}", "train")
    os.truncate(shards / "set-train-2.tar", 600)
    with pytest.raises(BadImageError, match="shorter than when it was opened"):
        dataset[59]


def test_what_a_user_may_get_wrong(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "0.tar.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"0\.tar\.gz .* is compressed: unpack it"):
        load_dataset(f"wds:{tmp_path}/packed")
    (tmp_path / "packed" / "0.tar.gz").unlink()
    write_shard(shards / "odd.tar", samples(range(2)))
    with pytest.raises(InputError, match=r"odd\.tar, whose name says no split"):
        load_dataset(f"wds:{shards}")
    (shards / "odd.tar").unlink()
    (shards / "classnames.txt").write_text("ant\nbee\n")
    with pytest.raises(InputError, match="names 2 different classes; the shards have 3"):
        load_dataset(f"wds:{shards}")
    (shards / "classnames.txt").write_bytes("ant\nbee\nBär\n".encode("latin1"))
    with pytest.raises(InputError, match=r"classnames\.txt is not text in UTF-8: byte 0xe4"):
        load_dataset(f"wds:{shards}")
    (shards / "set-train-0.tar").write_bytes(b"not a tar file at all" * 100)
    with pytest.raises(InputError, match=r"set-train-0\.tar cannot be read as a tar file"):
        load_dataset(f"wds:{shards}")


def test_the_images_are_bit_equal_to_those_of_a_folder(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), np.uint8)
    members = []
    for n, image in enumerate(pixels):
        folder = tmp_path / "folder" / str(n % 3)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{n}.jpg")
        members += [(f"{n}.jpg", (folder / f"{n}.jpg").read_bytes()), (f"{n}.cls", b"%d" % (n % 3))]
    write_shard(tmp_path / "shards" / "0.tar", members)
    loaded = [
        next(iter(open_loader(data, is_training=False, batch_size=9)))
        for data in (
            load_dataset(f"wds:{tmp_path}/shards", validation_fraction=0),
            load_dataset(tmp_path / "folder", validation_fraction=0).subset(
                [0, 3, 6, 1, 4, 7, 2, 5, 8]
            ),
        )
    ]
    assert torch.equal(loaded[0][0], loaded[1][0])
    assert torch.equal(loaded[0][1], loaded[1][1])
