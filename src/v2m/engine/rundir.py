"""The folder of a run: what is in it, whether it may be written to, and its log."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from v2m.engine.config import OPERATIONAL_KEYS, TrainConfig, from_dict, to_dict
from v2m.engine.lock import LOCK
from v2m.engine.settings import leaves
from v2m.engine.store import CheckpointStore, write_file, write_json
from v2m.engine.tensorboard import FOLDER as TENSORBOARD
from v2m.errors import InputError

CONFIG, METRICS, CHECKPOINTS = "train_config.json", "metrics.jsonl", "checkpoints"
NON_FINITE, PREDICTIONS, REPORT = "non_finite", "test_predictions.npz", "report.html"
DETECTIONS, CONFUSION = "test_detections.json", "test_confusion.npz"
_OWN_FILES = (
    CONFIG,
    METRICS,
    PREDICTIONS,
    DETECTIONS,
    CONFUSION,
    REPORT,
    "config.json",
    "model.safetensors",
)
_OWN_FOLDERS = (CHECKPOINTS, NON_FINITE, TENSORBOARD)


class RunDirectory:
    """One run's folder.

    train_config.json is the configuration, metrics.jsonl the log (one JSON object a line, `kind`
    "epoch" or "test"), checkpoints/ the last checkpoints; a finished run adds config.json and
    model.safetensors, test_predictions.npz (test_detections.json or test_confusion.npz for dense
    tasks) and report.html.
    """

    def __init__(self, path: str | os.PathLike, *, keep: int = 2) -> None:
        self.path = Path(path)
        self.store = CheckpointStore(self.path / CHECKPOINTS, keep=keep)

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    def config(self) -> TrainConfig | None:
        """The configuration stored here, None if there is none; InputError if it cannot be read."""
        path = self.path / CONFIG
        if not path.exists():
            return None
        try:
            return from_dict(TrainConfig, json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read: {error}. Pass --overwrite to start anew."
            ) from error

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that was cut off is left out."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text().split("\n")
        complete = lines[:-1]  # what follows the last newline was not written to its end
        try:
            return [json.loads(line) for line in complete if line]
        except ValueError as error:
            raise InputError(
                f"{self.metrics} cannot be read: {error}. Repair it, or pass --overwrite."
            ) from error

    def finished(self) -> dict[str, Any] | None:
        """The figures of the test images if the run is finished."""
        return next((r for r in self.records() if r["kind"] == "test"), None)

    def append(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl and flush it to the disk."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def forget_after(self, epoch: int) -> None:
        """Drop the log's lines about epochs after this one: they will be made again."""
        kept = [r for r in self.records() if r["kind"] == "epoch" and r["epoch"] <= epoch]
        if kept or self.metrics.exists():
            write_file(self.metrics, "".join(json.dumps(r) + "\n" for r in kept).encode())

    def check(self, config: TrainConfig, *, resume: bool, overwrite: bool) -> bool:
        """Whether a run stored here goes on (True) or a new one may begin (False). Nothing is
        changed.

        Raises:
            InputError: if something is here already that neither `resume` nor `overwrite` covers,
                or `resume` finds a run with another configuration.
        """
        if resume and overwrite:
            raise InputError("--resume and --overwrite exclude each other: pass one of them.")
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--output {self.path} is a file: name a folder.")
        here = (self.path / CONFIG).exists()
        if not here and self.path.is_dir() and {p.name for p in self.path.iterdir()} - {LOCK}:
            raise InputError(
                f"--output {self.path} is not empty and holds no run of v2m: name another folder."
            )
        if not here or overwrite:
            return False
        stored = self.config()
        assert stored is not None, "the configuration is here"
        if not resume:
            raise InputError(
                f"--output {self.path} holds a run already ({self._status(stored)}). Pass "
                "--resume to go on with it, --overwrite to replace it, or another --output."
            )
        self._check_same(stored, config)
        return True

    def begin(self, config: TrainConfig) -> None:
        """Make the folder ready for a new run; what an earlier run left is removed."""
        try:
            self._clear()
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / CONFIG, to_dict(config))
        except OSError as error:
            raise InputError(f"--output {self.path} cannot be written: {error}") from error

    def _status(self, stored: TrainConfig) -> str:
        if self.finished():
            return "finished"
        done = max((r["epoch"] for r in self.records()), default=0)
        return f"stopped after epoch {done} of {stored.schedule.epochs}"

    def _check_same(self, stored: TrainConfig, config: TrainConfig) -> None:
        before = {key: value for key, value, _, _ in leaves(stored)}
        changed = [
            f"{key} = {value!r} (there: {before[key]!r})"
            for key, value, _, _ in leaves(config)
            if key not in OPERATIONAL_KEYS and before[key] != value
        ]
        if changed:
            raise InputError(
                f"--resume: the run in {self.path} has another configuration: "
                f"{'; '.join(changed)}. Give the same settings, or another --output."
            )

    def _clear(self) -> None:
        """Remove the files of a run, and only those. The configuration goes last: it says that
        this is a run's folder."""
        if not (self.path / CONFIG).exists():
            return
        for name in _OWN_FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (*_OWN_FILES[1:], CONFIG):
            (self.path / name).unlink(missing_ok=True)
