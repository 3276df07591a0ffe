"""Fashion-MNIST: the small set inside the package and the full one where it is installed.

Both are four gzipped IDX files, the format they were published in, verified by SHA-256 of their
content each time they are read. Source: https://github.com/zalandoresearch/fashion-mnist, (c) 2017
Zalando SE, MIT licence.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from v2m.data.datasets import ArrayDataset
from v2m.errors import InputError

__all__ = ["FULL", "SMALL", "IdxSet", "data_directory", "locate", "read_idx", "read_part"]

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
MEAN, STD = (0.2860,), (0.3530,)  # of the 60,000 training images, in [0, 1]
DEBIAN_DIRECTORY = Path("/usr/share/datasets/fashion-mnist")
BUNDLED_DIRECTORY = Path(__file__).parent / "bundled"


@dataclass(frozen=True, kw_only=True)
class IdxSet:
    """Images and labels in IDX files.

    Attributes:
        name: what `--data` calls it.
        files: for the parts "train" and "test", the file names (without .gz) of images and labels.
        counts: how many images each part has.
        checksums: SHA-256 of the uncompressed content of each file.
    """

    name: str
    files: dict[str, tuple[str, str]]
    counts: dict[str, int]
    checksums: dict[str, str]


def _idx_set(name: str, parts: dict[str, tuple[str, int, str, str]]) -> IdxSet:
    """From {part: (prefix of its files, images, checksum of the images, checksum of the
    labels)}."""
    files, counts, checksums = {}, {}, {}
    for part, (prefix, count, *sums) in parts.items():
        files[part] = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
        counts[part] = count
        checksums.update(zip(files[part], sums))
    return IdxSet(name=name, files=files, counts=counts, checksums=checksums)


FULL = _idx_set(
    "fashion-mnist",
    {
        "train": (
            "train",
            60_000,
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ),
        "test": (
            "t10k",
            10_000,
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    },
)
SMALL = _idx_set(
    "fashion-mnist-small",
    {
        "train": (
            "fashion-mnist-small-train",
            10_000,
            "31c4fada8710f7e8a336c1ca1734009eee5c0c9bf3242c0b730d36eb53cda217",
            "857d8361263374772fdb89acf0499e6e96885cf82cbba19e0bb7d00e14e17c55",
        ),
        "test": (
            "fashion-mnist-small-test",
            2_000,
            "31a30a66873a7292cfc3a7ef9353b7b90ca6b020a498308c2a7bad7aa16bb1dd",
            "cd8c4e634b09ece9065208a3fbf9bcbd844c4b8abe60ade094b8a4d779dda60c",
        ),
    },
)


def data_directory() -> Path:
    """Where downloads go: $V2M_DATA, else $XDG_CACHE_HOME/v2m, else ~/.cache/v2m."""
    if chosen := os.environ.get("V2M_DATA"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "v2m"


def candidates() -> tuple[Path, ...]:
    """The folders where the full set is looked for."""
    return (data_directory() / FULL.name, data_directory(), DEBIAN_DIRECTORY)


def locate() -> Path | None:
    """The first of `candidates()` that holds all four files of the full set, or None."""
    names = [name for pair in FULL.files.values() for name in pair]
    for directory in candidates():
        if all(_find(directory, name) for name in names):
            return directory
    return None


def require() -> Path:
    """`locate()`, or an InputError that says how to get the full set."""
    directory = locate()
    if directory is None:
        raise InputError(
            f"the data set {FULL.name!r} is not on this machine (looked in "
            f"{data_directory() / FULL.name} and {DEBIAN_DIRECTORY}). Get it with `v2m data "
            f"download {FULL.name}`, or on Debian with `apt-get install dataset-fashion-mnist`; or "
            f"use {SMALL.name!r}, which is part of v2m."
        )
    return directory


def read_part(dataset: IdxSet, directory: Path, part: str) -> ArrayDataset:
    """All images of `part` ("train" or "test") of a set in `directory`, verified."""
    images_name, labels_name = dataset.files[part]
    images = read_idx(directory, images_name, dataset.checksums[images_name])
    labels = read_idx(directory, labels_name, dataset.checksums[labels_name])
    return ArrayDataset(
        name=dataset.name,
        images=images,
        targets=labels.tolist(),
        classes=list(CLASSES),
        mean=MEAN,
        std=STD,
        origin=str(directory),
    )


def read_idx(directory: Path, name: str, checksum: str | None = None) -> np.ndarray:
    """The uint8 array in IDX file `name` or `name`.gz; InputError if damaged or not the one
    meant."""
    path = _find(directory, name)
    if path is None:
        raise InputError(f"{directory} has no file {name} or {name}.gz.")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}. Fetch or install it again.") from error
    if checksum is not None and hashlib.sha256(content).hexdigest() != checksum:
        raise InputError(
            f"{path} is not the published file: the SHA-256 of its content is "
            f"{hashlib.sha256(content).hexdigest()}, expected {checksum}. Fetch or install it "
            "again."
        )
    return parse_idx(content, str(path))


def parse_idx(content: bytes, name: str) -> np.ndarray:
    """The array in an IDX file of bytes: magic 00 00 08 ndim, big-endian sizes, values."""
    dimensions = content[3] if len(content) >= 4 and content[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * dimensions
    if not dimensions or len(content) < start:
        raise InputError(f"{name} is not an IDX file of bytes.")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    values = np.frombuffer(content, np.uint8, offset=start)
    if values.size != int(np.prod(shape, dtype=np.int64)):
        raise InputError(f"{name} should hold {shape} bytes but holds {values.size}.")
    return values.reshape(shape)


def format_idx(values: np.ndarray) -> bytes:
    """The bytes of the IDX file of a uint8 array, the inverse of `parse_idx`."""
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + np.ascontiguousarray(values, dtype=np.uint8).tobytes()


def _find(directory: Path, name: str) -> Path | None:
    return next((p for p in (directory / f"{name}.gz", directory / name) if p.is_file()), None)
