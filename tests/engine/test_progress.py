"""What a person sees of a run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from v2m.engine import progress
from v2m.engine.progress import ConsoleReporter, Remaining, Reporter, clock, epoch_line

RECORD = {
    "epoch": 2,
    "train_loss": 0.5,
    "train_accuracy": 0.25,
    "validation_loss": 0.75,
    "validation_top1": 0.5,
    "lr": 1e-3,
    "images_per_second": 1234.0,
    "seconds": 65.0,
}


class Clock:
    """Time that goes by when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    replaced = Clock()
    monkeypatch.setattr(progress, "time", replaced)
    return replaced


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (200, "3m20s"), (18420, "5h07m")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_the_line_of_an_epoch() -> None:
    line = epoch_line(RECORD, 10, 130)
    for part in ("epoch  2/10", "0.5000", "25.00%", "0.7500", "50.00%", "1,234 images/s", "2m10s"):
        assert part in line


def test_time_left_counts_this_session_only(time: Clock) -> None:
    remaining = Remaining(100)
    assert remaining.seconds() is None
    remaining.at(40)
    assert remaining.seconds() is None
    time.now += 20
    remaining.at(50)
    assert remaining.seconds() == pytest.approx(100)


def drive(reporter: ConsoleReporter, time: Clock) -> None:
    with reporter:
        for epoch in (1, 2):
            reporter.start_epoch(epoch, 3)
            for _ in range(3):
                time.now += 20
                reporter.step(loss=1.5, accuracy=0.25, images_per_second=100)
            reporter.start_evaluation("validation", 10)
            reporter.evaluated(10)
            reporter.end_epoch({**RECORD, "epoch": epoch})
        reporter.message("[done] in runs/[x]")


def test_plain_lines_where_there_is_no_terminal(time: Clock) -> None:
    stream = io.StringIO()
    drive(ConsoleReporter(Console(file=stream, width=60), epochs=2, steps=3), time)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("epoch 1/2 step 2/3: loss 1.5000, accuracy 25.00%, 100 images/s, ")
    assert lines[0].endswith("1m20s left")
    assert lines[1].startswith("epoch 1/2  train loss")
    assert lines[-1] == "[done] in runs/[x]"
    assert len(lines) == 5
    assert "\x1b" not in stream.getvalue()


def test_bars_on_a_terminal(time: Clock) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=120, force_terminal=True)
    drive(ConsoleReporter(console, epochs=2, steps=3), time)
    text = stream.getvalue()
    assert "epoch 2/2" in text
    assert "3/3" in text
    assert "\x1b[?25h" in text, "the cursor is shown again"


def test_the_silent_one_keeps_its_messages() -> None:
    reporter = Reporter()
    with reporter:
        reporter.start_epoch(1, 3)
        reporter.step(loss=1, accuracy=0, images_per_second=1)
        reporter.message("hello")
    assert reporter.messages == ["hello"]
