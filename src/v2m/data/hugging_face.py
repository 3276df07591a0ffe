"""Image data sets of Hugging Face's `datasets` that are already on the disk."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

from timm.data.readers.reader import Reader

from v2m.data.readers import ReaderDataset
from v2m.errors import InputError

__all__ = ["read_hugging_face"]

_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves


class TableReader(Reader):
    """Rows of a table of `datasets` as (open file, class index).

    timm's own reader wants the names of split and columns beforehand, and cannot read what
    `save_to_disk` wrote.
    """

    def __init__(self, table: Any, image: str, label: str) -> None:
        super().__init__()
        self.table, self.image, self.label = table, image, label

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        row = self.table[index]
        image = row[self.image]
        data = image["bytes"] or Path(image["path"]).read_bytes()
        return io.BytesIO(data), row[self.label]

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f"row {index}"


def read_hugging_face(folder: Path, on_error: str = "raise") -> dict[str, ReaderDataset]:
    """Each split that `datasets` finds in a folder: parquet, Arrow or image files, or what
    `save_to_disk` wrote. Nothing is fetched.

    Raises:
        InputError: `datasets` is not installed, there is no such folder, it refers to other
            places or cannot be loaded, or it has no columns of images and of classes.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "hfds: needs the package datasets: pip install 'v2m[datasets]'."
        ) from error
    if not folder.is_dir():
        raise InputError(
            f"hfds:{folder} is not a folder. Nothing is fetched: give a folder that holds the data."
        )
    card = folder / "README.md"
    if card.is_file() and "://" in card.read_text(errors="replace").split("\n---")[0]:
        raise InputError(
            f"hfds:{folder} refers to files elsewhere in {card}, which are not fetched."
        )
    try:
        if any((folder / name).exists() for name in _SAVED):
            found = datasets.load_from_disk(str(folder))
        else:
            local = datasets.DownloadConfig(local_files_only=True)
            found = datasets.load_dataset(str(folder), download_config=local)
    except Exception as error:  # its many readers raise whatever they like
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"hfds:{folder} cannot be loaded by `datasets`: {reason}") from error
    tables = found if isinstance(found, dict) else {"train": found}
    return {name: _images(datasets, folder, table, on_error) for name, table in tables.items()}


def _images(datasets: Any, folder: Path, table: Any, on_error: str) -> ReaderDataset:
    def column(kind: type) -> str:
        names = [name for name, feature in table.features.items() if isinstance(feature, kind)]
        if len(names) != 1:
            raise InputError(
                f"hfds:{folder} has {len(names)} columns of type {kind.__name__} among "
                f"{', '.join(table.features)}; expected one of Image and one of ClassLabel."
            )
        return names[0]

    image, label = column(datasets.Image), column(datasets.ClassLabel)
    targets = list(table[label])
    if not targets or min(targets) < 0:
        raise InputError(f"hfds:{folder} has {'rows without a class' if targets else 'no rows'}.")
    return ReaderDataset(
        name=folder.resolve().name,
        reader=TableReader(table.cast_column(image, datasets.Image(decode=False)), image, label),
        indices=range(len(table)),
        targets=targets,
        classes=list(table.features[label].names),
        origin=str(folder),
        on_error=on_error,
    )
