"""What a person sees while a run goes on: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

# Figures of the validation that the line of an epoch shows, and what it calls them.
SHOWN = {"top1": "accuracy", "box_ap": "box AP", "mask_ap": "mask AP", "miou": "mIoU"}


def clock(seconds: float) -> str:
    """Seconds as 42s, 3m20s or 5h07m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def epoch_line(record: dict[str, Any], epochs: int, left: float) -> str:
    """One line about a finished epoch."""
    train, validation = f"loss {record['train_loss']:.4f}", ""
    if "train_accuracy" in record:
        train += f" accuracy {record['train_accuracy']:6.2%}"
    if "validation_loss" in record:
        validation = f" loss {record['validation_loss']:.4f}"
    for key, word in SHOWN.items():
        if record.get(f"validation_{key}") is not None:
            validation += f" {word} {record[f'validation_{key}']:6.2%}"
    return (
        f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}  "
        f"train {train}  validation{validation}  "
        f"lr {record['lr']:.2e}  {record['images_per_second']:,.0f} images/s  "
        f"{clock(record['seconds'])}, {clock(left)} left"
    )


class Reporter:
    """What the trainer tells whoever shows its progress. This one shows nothing and keeps the
    messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was started."""

    def start_epoch(self, epoch: int, steps: int, done: int = 0) -> None:
        """An epoch (counted from 1) of so many steps begins, `done` of them were made before."""

    def step(self, *, loss: float, accuracy: float | None, images_per_second: float) -> None:
        """One optimiser step is done; the figures are of the epoch so far."""

    def start_evaluation(self, what: str, images: int) -> None:
        """An evaluation of so many images begins."""

    def evaluated(self, images: int) -> None:
        """So many more images are evaluated."""

    def end_epoch(self, record: dict[str, Any]) -> None:
        """An epoch is trained, validated and stored; `record` is its line of metrics.jsonl."""

    def message(self, text: str) -> None:
        """A line for the user."""
        self.messages.append(text)


class Remaining:
    """Estimates the time left from the steps done in this session."""

    def __init__(self, total_steps: int) -> None:
        self.total, self.first, self.done, self.started = total_steps, None, 0, time.monotonic()

    def at(self, step: int) -> None:
        """Note that so many steps of the run are done."""
        if self.first is None:
            self.first, self.started = step, time.monotonic()
        self.done = step

    def seconds(self) -> float | None:
        """Seconds left, None while nothing has been measured."""
        if self.first is None or self.done <= self.first:
            return None
        elapsed = time.monotonic() - self.started
        return elapsed / (self.done - self.first) * (self.total - self.done)


class ConsoleReporter(Reporter):
    """Rich bars when the console is a terminal, one line an epoch (and one a `every` seconds in
    between) when it is not."""

    def __init__(self, console: Console, *, epochs: int, steps: int, every: float = 30.0) -> None:
        super().__init__()
        self.console, self.epochs, self.steps, self.every = console, epochs, steps, every
        self.live = console.is_terminal
        self.remaining = Remaining(epochs * steps)
        self.epoch, self.index, self.last_line = 0, 0, time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        self.progress = Progress(*columns, console=console, disable=not self.live, transient=True)
        self.steps_bar = self.progress.add_task("training", total=steps, figures="")
        self.images_bar = self.progress.add_task("validation", visible=False, figures="")

    def __enter__(self) -> ConsoleReporter:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def start_epoch(self, epoch: int, steps: int, done: int = 0) -> None:
        self.epoch, self.index = epoch, done
        self.remaining.at((epoch - 1) * self.steps + done)
        self.progress.update(self.images_bar, visible=False)
        description = f"epoch {epoch}/{self.epochs}"
        self.progress.reset(
            self.steps_bar, total=steps, completed=done, description=description, figures=""
        )

    def step(self, *, loss: float, accuracy: float | None, images_per_second: float) -> None:
        self.index += 1
        self.remaining.at((self.epoch - 1) * self.steps + self.index)
        left = self.remaining.seconds()
        ending = "" if left is None else f", {clock(left)} left"
        right = "" if accuracy is None else f", accuracy {accuracy:.2%}"
        figures = f"loss {loss:.4f}{right}, {images_per_second:,.0f} images/s{ending}"
        self.progress.update(self.steps_bar, advance=1, figures=figures)
        now = time.monotonic()
        if not self.live and now - self.last_line >= self.every:
            self._print(
                f"epoch {self.epoch}/{self.epochs} step {self.index}/{self.steps}: {figures}"
            )

    def start_evaluation(self, what: str, images: int) -> None:
        self.progress.reset(
            self.images_bar, total=images, visible=True, description=what, figures=""
        )

    def evaluated(self, images: int) -> None:
        self.progress.update(self.images_bar, advance=images)

    def end_epoch(self, record: dict[str, Any]) -> None:
        self.remaining.at(record["epoch"] * self.steps)
        self._print(epoch_line(record, self.epochs, self.remaining.seconds() or 0.0))

    def message(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        self.last_line = time.monotonic()
        self.console.print(Text(text), soft_wrap=True)
