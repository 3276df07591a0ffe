"""What differs between classification, detection and segmentation in a run."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from v2m.errors import InputError

if TYPE_CHECKING:
    from v2m.engine.config import TrainConfig
    from v2m.engine.distributed import Ranks
    from v2m.engine.loop import Loop
    from v2m.engine.progress import Reporter
    from v2m.engine.rundir import RunDirectory
    from v2m.engine.session import Session

__all__ = ["TASKS", "Task", "get_task"]

# Name: where its class is; imported when it is asked for.
TASKS = {
    "classify": "v2m.engine.classification:ClassificationTask",
    "detect": "v2m.engine.detection:DetectionTask",
    "segment": "v2m.engine.segmentation:SegmentationTask",
}


class Task(ABC):
    """Data, model, loss and figures of one kind of run; the trainer is the same for all.

    Args:
        config: what the run does.

    Attributes:
        name: the value of the setting `task`.
        has_accuracy: whether `loss` counts right answers.
        reports: whether a finished run gets a report.html.
    """

    name: str
    has_accuracy = True
    reports = True

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @abstractmethod
    def prepare(self, train_set: Any, micro_batch: int) -> None:
        """InputError for settings that do not fit the data or this task.

        Args:
            train_set: the training images.
            micro_batch: images per forward pass on one device.
        """

    @abstractmethod
    def open_dataset(self, split: str) -> Any:
        """One split of the run's data set."""

    @abstractmethod
    def build_model(self, train_set: Any) -> nn.Module:
        """The model for the data set's classes."""

    @abstractmethod
    def open_loader(
        self,
        model: nn.Module,
        dataset: Any,
        ranks: Ranks,
        *,
        batch_size: int,
        is_training: bool = False,
    ) -> Any:
        """This rank's batches (inputs, targets) of a data set."""

    @abstractmethod
    def describe(self, model: nn.Module, train_set: Any) -> dict[str, Any]:
        """The keywords of `save_model`."""

    @abstractmethod
    def loss(self, loop: Loop, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Mean loss and number of right answers of one micro-batch."""

    @abstractmethod
    def validate(self, session: Session, loader: Any, **keywords: Any) -> dict[str, Any]:
        """Figures of the validation images, ready for JSON; collective."""

    @abstractmethod
    def test(
        self, session: Session, run: RunDirectory, loader: Any, reporter: Reporter
    ) -> dict[str, Any]:
        """Figures of the test images, whose predictions the first rank writes; collective."""

    @abstractmethod
    def figures(self, record: dict[str, Any]) -> dict[str, Any]:
        """Those figures of the test that are kept beside the weights."""

    @abstractmethod
    def summary(self, record: dict[str, Any]) -> str:
        """The figures of the test in a few words."""


def get_task(config: TrainConfig) -> Task:
    """The task of a run; InputError names the ones there are."""
    if config.task not in TASKS:
        raise InputError(f"task = {config.task!r}: expected one of {', '.join(TASKS)}.")
    module, _, attribute = TASKS[config.task].partition(":")
    return getattr(importlib.import_module(module), attribute)(config)
