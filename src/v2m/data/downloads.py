"""Fetching a data set from where its authors publish it, when asked."""

from __future__ import annotations

import gzip
import hashlib
import os
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path

from v2m.data.fashion_mnist import FULL, SMALL, data_directory
from v2m.errors import InputError

__all__ = ["SOURCES", "download"]

# The authors' repository, then their bucket; both serve the files that the checksums are of.
SOURCES = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
)
Progress = Callable[[str, int, int | None], None]
_TIMEOUT_SECONDS = 30
_BLOCK_BYTES = 1 << 18
_MAX_BYTES = {"compressed": 64 << 20, "content": 64 << 20}


class _FetchError(Exception):
    """One source did not give one file; the message says why."""


def download(
    name: str,
    directory: str | os.PathLike | None = None,
    progress: Progress | None = None,
    *,
    sources: Sequence[str] = SOURCES,
) -> Path:
    """Fetch the data set `name` into `directory` and return that folder.

    Files that are there and intact are kept, so a broken-off download goes on where it stopped,
    file by file. Each file appears under its name only once its checksum was verified.

    Args:
        name: "fashion-mnist".
        directory: by default the folder that `load_dataset(name)` looks in,
            `$V2M_DATA/fashion-mnist` or `~/.cache/v2m/fashion-mnist`.
        progress: called with (file name, bytes so far, bytes in all or None).
        sources: addresses of folders to fetch from, tried in order.

    Raises:
        InputError: if the name is not known, or no source gave an intact file, with the reason of
            each.
    """
    if name == SMALL.name:
        raise InputError(f"{name!r} is part of v2m: there is nothing to download.")
    if name != FULL.name:
        raise InputError(f"{name!r} cannot be downloaded; {FULL.name!r} can.")
    target = Path(directory).expanduser() if directory else data_directory() / FULL.name
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file_name, checksum in FULL.checksums.items():
            path = target / f"{file_name}.gz"
            if not _is_intact(path, checksum):
                _fetch_from_any(path, checksum, sources, progress or (lambda *_: None))
    except OSError as error:
        raise InputError(f"cannot write to {target}: {error.strerror or error}.") from error
    return target


def _fetch_from_any(path: Path, checksum: str, sources: Sequence[str], progress: Progress) -> None:
    reasons = []
    for source in sources:
        url = f"{source.rstrip('/')}/{path.name}"
        try:
            return _fetch(url, path, checksum, progress)
        except _FetchError as error:
            reasons.append(f"  {url}: {error}")
    raise InputError(
        f"could not download {path.name}:\n"
        + "\n".join(reasons)
        + "\nCheck the network connection (and "
        "HTTPS_PROXY) and run it again; or copy the four files of "
        f"https://github.com/zalandoresearch/fashion-mnist into {path.parent}; or on Debian "
        "`apt-get install dataset-fashion-mnist`."
    )


def _fetch(url: str, path: Path, checksum: str, progress: Progress) -> None:
    """Download to a file beside `path`, verify, and only then give it its name."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            _copy(url, file, path.name, progress)
            file.flush()
            os.fsync(file.fileno())
        if not _is_intact(Path(temporary), checksum):
            raise _FetchError("the file it sent is damaged (wrong checksum)")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _copy(url: str, file, name: str, progress: Progress) -> None:
    try:
        response = urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        raise _FetchError(f"the server answered {error.code} {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise _FetchError(str(getattr(error, "reason", error))) from error
    with response:
        header = response.headers.get("Content-Length", "")
        total = int(header) if header.isdigit() else None
        done = 0
        progress(name, done, total)
        while block := _read(response):
            file.write(block)  # an OSError from here is the disk's, not the network's
            done += len(block)
            if done > _MAX_BYTES["compressed"]:
                raise _FetchError(f"it sends more than {_MAX_BYTES['compressed']:,} bytes")
            progress(name, done, total)
        if total is not None and done != total:
            raise _FetchError(f"the connection ended after {done:,} of {total:,} bytes")


def _read(response) -> bytes:
    try:
        return response.read(_BLOCK_BYTES)
    except (OSError, HTTPException) as error:
        raise _FetchError(f"the connection broke: {error}") from error


def _is_intact(path: Path, checksum: str) -> bool:
    """Whether the gzip file is there and its content has that SHA-256."""
    if not path.is_file():
        return False
    digest, size = hashlib.sha256(), 0
    try:
        with gzip.open(path) as file:
            while block := file.read(_BLOCK_BYTES):
                size += len(block)
                if size > _MAX_BYTES["content"]:
                    return False
                digest.update(block)
    except (OSError, EOFError, zlib.error):
        return False
    return digest.hexdigest() == checksum
