"""Tar shards in webdataset's layout: NAME.jpg and NAME.cls, and so on, one after the other.

The headers are read once, then images by their place in the file. So an epoch has every image
exactly once, on any number of ranks and workers, and a run goes on in its middle, which streaming
(timm's `wds` reader among others) cannot promise. Nothing is unpacked, unpickled, fetched or run.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from timm.data.readers.reader import Reader

from v2m.data.folders import SPLIT_FOLDERS
from v2m.data.images import IMAGE_SUFFIXES
from v2m.data.readers import ReaderDataset
from v2m.data.text import read_text
from v2m.errors import InputError

__all__ = ["CLASS_NAMES", "ShardReader", "find_shards", "read_shards"]

CLASS_NAMES = "classnames.txt"  # one a line; without it classes are called by their numbers
_CODE = (".pyd", ".pickle", ".pkl", ".pth", ".pt")  # what a reader could be made to unpickle
_LARGEST_CLASS_FILE = 32  # bytes


class Sample(NamedTuple):
    """Where an image lies."""

    shard: int
    offset: int  # bytes
    size: int  # bytes
    name: str
    target: int


class ShardReader(Reader):
    """Images of shards by number, as (open file, class index), for any process.

    The places are held in arrays, which the loader's processes share, as they would not share a
    million objects.
    """

    def __init__(self, shards: list[Path], samples: list[Sample]) -> None:
        super().__init__()
        self.shards = shards
        self.places = np.array([sample[:3] for sample in samples], dtype=np.int64)  # (n, 3)
        self.names = np.array([sample.name.encode() for sample in samples])
        self.targets = np.array([sample.target for sample in samples], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        shard, offset, size = self.places[index].tolist()
        with open(self.shards[shard], "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise OSError("the shard is shorter than when it was opened first")
        return io.BytesIO(data), int(self.targets[index])

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f"{self.shards[self.places[index, 0]].name}/{self.names[index].decode()}"


def find_shards(folder: Path) -> dict[str, list[Path]]:
    """{split: its shards, sorted}: by folders (train/, val/, ...) or by a word of the file name
    (imagenet-train-0001.tar); {"train": all} where neither says anything.

    Raises:
        InputError: no folder, no shards in it, or shards that are compressed.
    """
    if not folder.is_dir():
        raise InputError(
            f"wds:{folder} is not a folder. Shards are read from a folder of .tar files; addresses "
            "and commands (pipe:, http:, ...) are not."
        )
    packed = [p.name for p in sorted(folder.rglob("*.tar.*")) + sorted(folder.rglob("*.tgz"))]
    if packed:
        raise InputError(f"{packed[0]} in wds:{folder} is compressed: unpack it to a plain .tar.")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.tar")) + sorted(folder.glob("*/*.tar")):
        words = {path.parent.name} if path.parent != folder else set(re.split(r"[-_.]", path.stem))
        splits = [split for split, names in SPLIT_FOLDERS.items() if words & set(names)]
        found.setdefault(splits[0] if splits else "", []).append(path)
    if not found:
        raise InputError(f"wds:{folder} has no .tar files.")
    if "" in found and len(found) > 1:
        raise InputError(
            f"wds:{folder} has {found[''][0].name}, whose name says no split, beside shards of "
            f"{', '.join(filter(None, found))}: put train, val or test into it."
        )
    return {split or "train": shards for split, shards in found.items()}


def read_shards(folder: Path, shards: list[Path], *, on_error: str = "raise") -> ReaderDataset:
    """The images of some shards; their class is the whole number in NAME.cls.

    Raises:
        InputError: a shard is damaged, or has what it must not: links, devices, absolute names or
            `..`, pickles, names twice, images without a class.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        parts = pool.map(lambda item: list(_samples(*item)), enumerate(shards))
        samples = [sample for part in parts for sample in part]
    if not samples:
        raise InputError(f"wds:{folder} has no images in its {len(shards)} shards.")
    targets = [sample.target for sample in samples]
    return ReaderDataset(
        name=folder.resolve().name,
        reader=ShardReader(shards, samples),
        indices=range(len(samples)),
        targets=targets,
        classes=_class_names(folder, max(targets) + 1),
        origin=str(folder),
        on_error=on_error,
    )


def _class_names(folder: Path, count: int) -> list[str]:
    path = folder / CLASS_NAMES
    if not path.is_file():
        return [str(number) for number in range(count)]
    names = read_text(path).split("\n")
    names = names[:-1] if names[-1] == "" else names
    if len(names) < count or len(set(names)) != len(names):
        raise InputError(
            f"{path} names {len(set(names))} different classes; the shards have {count}: expected "
            "one name a line."
        )
    return names


def _samples(number: int, shard: Path) -> Iterator[Sample]:
    """The images of one shard, in order. Members of a sample follow each other."""
    images: dict[str, tuple[int, int, str]] = {}
    classes: dict[str, int] = {}
    for member, data in _members(shard):
        key, dot, suffix = _split(member.name)
        suffix = (dot + suffix).lower()
        if suffix.endswith(_CODE):
            raise InputError(f"{shard} has {member.name!r}, a pickle: it is not read at all.")
        if suffix == ".cls":
            classes[key] = _class_number(shard, member, data)
        elif suffix in IMAGE_SUFFIXES:
            if key in images:
                raise InputError(f"{shard} has two images called {key!r}.")
            images[key] = (member.offset_data, member.size, key + suffix)
    for key, (offset, size, name) in images.items():
        if key not in classes:
            raise InputError(f"{shard} has an image {name!r} but no {key + '.cls'!r} beside it.")
        yield Sample(number, offset, size, name, classes[key])


def _split(name: str) -> tuple[str, str, str]:
    """folder/a.b.jpg -> folder/a, ".", b.jpg: webdataset cuts at the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return folder + slash + stem, dot, suffix


def _members(shard: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Each regular file's header, with its content if it is small; InputError for other kinds."""
    end, length = 0, shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as archive, open(shard, "rb") as file:
            for member in archive:
                if member.isdir():
                    continue
                _check(shard, member)
                if member.offset_data < end or member.size < 0:
                    raise tarfile.ReadError("its files overlap")
                end = member.offset_data + member.size
                if end > length:
                    raise tarfile.ReadError("it is cut off")
                data = b""
                if member.size <= _LARGEST_CLASS_FILE:
                    file.seek(member.offset_data)
                    data = file.read(member.size)
                yield member, data
                archive.members = []  # else it keeps every header
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{shard} cannot be read as a tar file: {error}.") from error


def _check(shard: Path, member: tarfile.TarInfo) -> None:
    if not member.isreg() or member.issparse():
        kind = "a link" if member.islnk() or member.issym() else "no plain file"
        raise InputError(f"{shard} has {member.name!r}, which is {kind}: it is refused.")
    if member.name.startswith("/") or ".." in member.name.split("/") or "\\" in member.name:
        raise InputError(f"{shard} has {member.name!r}, which points outside: it is refused.")


def _class_number(shard: Path, member: tarfile.TarInfo, data: bytes) -> int:
    text = data.decode("ascii", errors="replace").strip()
    if member.size > _LARGEST_CLASS_FILE or not re.fullmatch(r"\d{1,6}", text):
        raise InputError(
            f"{shard} has {member.name!r} with {text[:20]!r}: expected the number of a class."
        )
    return int(text)
