"""Loader processes and signals: whatever stops a run is told to the main process, which ends its
loader processes when it has stored what it has to."""

from __future__ import annotations

import os
import signal
from threading import Thread

__all__ = ["start_worker"]


def start_worker(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: let Ctrl-C pass, and every SIGTERM but the main process's.

    torchrun and Slurm signal all processes of a job; a loader process that ended then would take
    away the batches that the last steps still need.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
