"""Run a compiled kernel on as many threads as torch may use.

On Linux the threads are torch's own: the kernel is handed to the OpenMP runtime that torch has
loaded, so that no second set of threads competes with the one that spins between two of torch's
operators, and a launch costs microseconds. Elsewhere a pool of Python threads runs it, without the
interpreter's lock. Kernels take their tasks from a counter that they share; no result depends on
the number of threads or on who did what.
"""

from __future__ import annotations

import ctypes
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

__all__ = ["borrow", "launch", "thread_count"]

KEPT_BYTES = 1 << 28  # more scratch than this is given back after the call

_forked = False
_memory = threading.local()
_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _after_fork() -> None:
    """A forked child has none of its parent's threads; its OpenMP runtime does not know that."""
    global _forked, _pool, _pool_lock
    _forked, _pool, _pool_lock = True, None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@cache
def _openmp():
    """`GOMP_parallel` of the OpenMP runtime in this process, or None."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    try:
        function = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
    except (OSError, AttributeError):  # torch was built on another runtime
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


def _threads() -> ThreadPoolExecutor:
    """The pool of Python threads, made when first wanted."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="v2m")
        return _pool


def thread_count(tasks: int) -> int:
    """Threads for so many tasks:

    Torch's setting; one in a forked child, as a data loader's worker is.
    """
    return 1 if _forked else max(1, min(torch.get_num_threads(), tasks))


def launch(kernel, job: int, threads: int) -> None:
    """Run `kernel(job)` on each of `threads` threads and wait for all.

    `kernel` is a numba `CFunc`.
    """
    openmp = _openmp()
    if threads > 1 and openmp is not None:
        openmp(kernel.address, job, threads, 0)
        return
    others = [_threads().submit(kernel.ctypes, job) for _ in range(threads - 1)]
    kernel.ctypes(job)
    for other in others:
        other.result()


def borrow(size: int) -> Tensor:
    """Memory of at least `size` bytes, the calling thread's until its next call."""
    kept = getattr(_memory, "block", None)
    if kept is None or kept.numel() < size:
        kept = torch.empty(size, dtype=torch.uint8)
        if size <= KEPT_BYTES:
            _memory.block = kept
    return kept
