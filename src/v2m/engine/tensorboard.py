"""The log of a run for TensorBoard, beside metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from v2m.errors import InputError

__all__ = ["FOLDER", "TensorBoardLog"]

FOLDER = "tensorboard"


class TensorBoardLog:
    """Writes the numbers of each epoch's record at its step; `run.tensorboard`.

    Args:
        folder: the run's folder.
        step: where the run begins or goes on; what an earlier process logged after it is dropped.

    Raises:
        InputError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                "run.tensorboard = True needs the package tensorboard: pip install 'v2m[logs]', or "
                "leave it out; metrics.jsonl has the same figures."
            ) from error
        self._writer = SummaryWriter(str(folder / FOLDER), purge_step=step + 1)

    def add(self, record: dict[str, Any]) -> None:
        """Log the numbers of a line of metrics.jsonl: train_* and validation_* in groups."""
        for name, value in record.items():
            if isinstance(value, int | float) and name not in ("step", "epoch"):
                group, _, rest = name.partition("_")
                tag = f"{group}/{rest}" if group in ("train", "validation") else f"run/{name}"
                self._writer.add_scalar(tag, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
