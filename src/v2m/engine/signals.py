"""Stopping in good order: Ctrl-C and SIGTERM end a run at the next step, not in the middle of
one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(SystemExit):
    """SIGTERM ended the run; the exit code is 143."""

    def __init__(self, message: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = message


class StopRequest:
    """Which signal asked the run to stop, if any; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def handle(self, number: int, _frame: object) -> None:
        """A signal handler."""
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    @property
    def name(self) -> str:
        """What asked, for a message."""
        names = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
        return names.get(self.signal, "another process")

    def error(self, message: str) -> BaseException:
        """The exception to raise: KeyboardInterrupt or Terminated, with a message for the user."""
        return KeyboardInterrupt(message) if self.signal == signal.SIGINT else Terminated(message)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request while the block runs (in the main thread; elsewhere
    signals stay as they are)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, request.handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
