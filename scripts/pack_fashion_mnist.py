"""Pack the bundled subset of Fashion-MNIST from the original IDX files.

    python scripts/pack_fashion_mnist.py [--source DIRECTORY] [--output DIRECTORY]

The source holds the four published files (Debian: `apt-get install dataset-fashion-mnist`;
anywhere: `v2m data download fashion-mnist`). Of each class, 1,000 training and 200 test images are
chosen by the SHA-256 of "seed:part/position", and kept in the published order. Running it again
gives the same bytes (the content on any machine, its compression with any one version of zlib).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
from pathlib import Path

import numpy as np

from v2m.data.fashion_mnist import BUNDLED_DIRECTORY, FULL, SMALL, format_idx, read_idx, require
from v2m.data.randomness import stable_order

SEED = 2024
PER_CLASS = {"train": 1_000, "test": 200}


def choose(labels: np.ndarray, part: str, per_class: int) -> np.ndarray:
    """Positions, ascending, of `per_class` images of each class among `labels` (n,)."""
    order = np.array(stable_order((f"{part}/{i}" for i in range(len(labels))), SEED))
    ranked = labels[order]
    kept = [order[ranked == target][:per_class] for target in np.unique(labels)]
    return np.sort(np.concatenate(kept))


def compress(content: bytes) -> bytes:
    """gzip without a name or a time, so that equal content gives equal bytes."""
    stream = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, mtime=0, fileobj=stream) as file:
        file.write(content)
    return stream.getvalue()


def pack(source: Path, output: Path, per_class: dict[str, int], checksums: dict[str, str]) -> dict:
    """Write the subset's four files to `output`; returns {file name: SHA-256 of its content}."""
    output.mkdir(parents=True, exist_ok=True)
    written = {}
    for part, count in per_class.items():
        names = FULL.files[part]
        images, labels = (read_idx(source, name, checksums.get(name)) for name in names)
        kept = choose(labels, part, count)
        for name, values in zip(SMALL.files[part], (images[kept], labels[kept])):
            content = format_idx(values)
            written[name] = hashlib.sha256(content).hexdigest()
            (output / f"{name}.gz").write_bytes(compress(content))
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="folder of the four published files")
    parser.add_argument("--output", type=Path, default=BUNDLED_DIRECTORY)
    arguments = parser.parse_args()
    source = arguments.source or require()
    for name, checksum in pack(source, arguments.output, PER_CLASS, FULL.checksums).items():
        size = (arguments.output / f"{name}.gz").stat().st_size
        print(f"{checksum}  {name}  ({size:,} bytes as .gz)")


if __name__ == "__main__":
    main()
