"""Lists of names that users write."""

from __future__ import annotations

from pathlib import Path

from v2m.errors import InputError

__all__ = ["read_text"]


def read_text(path: Path) -> str:
    """The text of a file in UTF-8; InputError names the file if it cannot be read as that."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not text in UTF-8: byte {error.object[error.start]:#04x} at position"
            f" {error.start} ({error.reason}). Save it as UTF-8."
        ) from error
