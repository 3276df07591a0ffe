"""Folders that are either complete or absent: atomic, checksummed, with the previous one to fall
back on.

A checkpoint is written into a temporary folder next to its final place, every file is fsynced, a
manifest with the size and SHA-256 of each file is written last, and the folder is renamed. It is
then read back and verified, and only after that are older ones removed. Whatever moment the
process or the machine stops at, a complete checkpoint is left.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

MANIFEST = "manifest.json"
_PREFIX, _TEMPORARY = "step-", ".writing-"


class DamagedError(Exception):
    """A stored folder is incomplete or its bytes are not the ones that were written."""


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk (folders: where the system can)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Replace a file atomically: a reader sees the old bytes or the new ones, never a part."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file atomically."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def verify(folder: Path) -> None:
    """Raise DamagedError unless the folder holds exactly what its manifest says."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        items = [(str(name), int(e["bytes"]), str(e["sha256"])) for name, e in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"its manifest cannot be read ({error})") from error
    for name, size, digest in items:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise DamagedError(f"{name} is missing")
        if path.stat().st_size != size:
            raise DamagedError(f"{name} has {path.stat().st_size} bytes instead of {size}")
        if sha256(path) != digest:
            raise DamagedError(f"{name} does not match its checksum")


def _step(folder: Path) -> int:
    return int(folder.name[len(_PREFIX) :])


class CheckpointStore:
    """The checkpoints of a run: folders `step-00000070`, `step-00000140`, ... of which the last
    `keep` stay."""

    def __init__(self, root: Path, *, keep: int = 2) -> None:
        assert keep >= 2, "the previous checkpoint stays"
        self.root, self.keep = Path(root), keep

    def folders(self) -> list[Path]:
        """Complete or damaged, newest first."""
        found = [p for p in self.root.glob(f"{_PREFIX}*") if p.name[len(_PREFIX) :].isdecimal()]
        return sorted(found, key=_step, reverse=True)

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write(folder)` fill a new checkpoint, publish and verify it, then drop the oldest.

        Raises OSError (a full disk, say) with everything stored before left as it was.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        self.clean()
        temporary, final = self.root / f"{_TEMPORARY}{step}", self.root / f"{_PREFIX}{step:08d}"
        temporary.mkdir()
        try:
            write(temporary)
            self._seal(temporary)
            if final.exists():  # damaged, or stored before the validation of its epoch
                os.replace(final, self.root / f"{_TEMPORARY}over-{step}")
            os.replace(temporary, final)
            fsync(self.root)
            verify(final)
        except DamagedError as error:
            raise OSError(f"the checkpoint {final} does not read back: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.clean()
        later = [p for p in self.folders() if _step(p) > step]  # damaged as well, then
        for old in later + self.folders()[len(later) + self.keep :]:
            shutil.rmtree(old)
        return final

    @staticmethod
    def _seal(folder: Path) -> None:
        files = {}
        for path in sorted(folder.iterdir()):
            fsync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        write_json(folder / MANIFEST, {"files": files})

    def newest(self, warn: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that verifies; each damaged one passed over is told to `warn`.
        None if there is none."""
        for folder in self.folders():
            try:
                verify(folder)
                return folder
            except DamagedError as error:
                warn(f"checkpoint {folder} is damaged: {error}; falling back to the one before")
        return None

    def clean(self) -> None:
        """Remove what an interrupted save left behind."""
        for leftover in self.root.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover)
