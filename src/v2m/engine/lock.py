"""One run at a time in a folder."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs apart there
    fcntl = None

from v2m.errors import InputError

__all__ = ["LOCK", "RunLock"]

LOCK = ".lock"


class RunLock:
    """Holds `folder`/.lock for this process until `release`.

    The system ends the lock with the process, however that ends, and child processes do not
    inherit it: what a dead run left behind never stands in the way of the next one.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / LOCK
        self._descriptor: int | None = None
        self._made_folder = False

    def take(self) -> None:
        """InputError, naming the process and its host, if another run holds it; OSError if the
        folder cannot be written."""
        if fcntl is None:
            return
        self._made_folder = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _is_at(descriptor, self.path):  # its owner removed it just before
                    continue
                self._descriptor = descriptor
            except (BlockingIOError, PermissionError) as error:
                owner = os.read(descriptor, 1000).decode(errors="replace").strip()
                raise InputError(
                    f"is in use by another run ({owner or 'just starting'}): wait for it, stop it, "
                    "or name another folder."
                ) from error
            finally:
                if self._descriptor != descriptor:
                    os.close(descriptor)
        owner = json.dumps({"process": os.getpid(), "host": socket.gethostname()})
        os.truncate(self._descriptor, 0)
        os.write(self._descriptor, owner.encode())

    def release(self) -> None:
        """Let others have the folder, which goes if it was made for the lock and stayed empty."""
        if self._descriptor is None:
            return
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None
        if self._made_folder and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
