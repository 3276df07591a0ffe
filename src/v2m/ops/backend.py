"""Which implementation of the operator runs, and why."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from v2m.errors import InputError

__all__ = [
    "BACKENDS",
    "choose_backend",
    "explain_backend",
    "is_exporting",
    "recompute_as_now",
    "use_backend",
]

BACKENDS = ("reference", "eager", "cpu", "triton")
_COMPILED = ("cpu", "triton")
_forced: ContextVar[str | None] = ContextVar("v2m_backend", default=None)


def choose_backend(asked: str | None, tensor: Tensor) -> str:
    """The backend for work on `tensor`: as asked, as forced, or the fastest that can do it."""
    return explain_backend(asked, tensor.device.type, tensor.dtype)[0]


def explain_backend(
    asked: str | None, device_type: str, dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """(backend, reason). `asked` comes before `use_backend`, and that before V2M_BACKEND."""
    for name, source in (
        (asked, "asked for by the caller"),
        (_forced_name(), "forced by use_backend"),
        (os.environ.get("V2M_BACKEND"), "forced by the environment variable V2M_BACKEND"),
    ):
        if name:
            return _check(name, source, device_type, dtype), source
    if is_exporting():
        return "eager", "an exported program can hold plain operations only"
    if dtype == torch.float64:
        return "eager", "the compiled kernels keep their state in float32"
    if _transformed():
        return "eager", "torch.func and forward-mode derivatives need plain operations"
    if device_type == "cuda" and torch.version.hip is None and is_available("triton"):
        return "triton", "the tensor is on a CUDA device and Triton is installed"
    if device_type == "cpu" and is_available("cpu"):
        return "cpu", "the tensor is on a CPU and numba is installed"
    return "eager", f"no compiled kernel is available for device type {device_type!r}"


# torch.compile runs what assumes a constant result while it traces, instead of tracing it. What it
# compiled keeps the backend that was chosen then.


@torch.compiler.assume_constant_result
def _forced_name() -> str | None:
    return _forced.get()  # PyTorch 2.11 cannot trace this


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether `torch.export` is tracing. PyTorch 2.11 takes its own for True under compile too."""
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result
def _transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is under way. Compiled
    operators have rules for neither, and would drop a tangent without a word."""
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


@torch.compiler.assume_constant_result
def is_available(name: str) -> bool:
    """Whether a backend's compiler is installed; nothing is imported to find out."""
    return _find(name)


@cache
def _find(name: str) -> bool:
    package = {"cpu": "numba", "triton": "triton"}.get(name)
    try:
        return package is None or importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # blocked from import, e.g. by `sys.modules[package] = None`
        return False


def _check(name: str, source: str, device_type: str, dtype: torch.dtype) -> str:
    """The name; InputError if that backend cannot do it. `source`: who wants it."""
    if name not in BACKENDS:
        raise InputError(f"`backend` must be one of {', '.join(BACKENDS)}; got {name!r}, {source}.")
    if not is_available(name):
        raise InputError(
            f"backend {name!r} needs the package {'numba' if name == 'cpu' else name}, which is not"
            f" installed here. Install it or use backend='eager'."
        )
    if name == "cpu" and device_type != "cpu":
        raise InputError(
            f"backend 'cpu', {source}, works on CPU tensors; got a tensor on {device_type!r}."
            " Move it with .cpu(), or let the backend be chosen."
        )
    if name in _COMPILED and dtype == torch.float64:
        raise InputError(
            f"backend {name!r}, {source}, keeps its state in float32; got float64."
            " Use backend='eager', or convert with .float()."
        )
    if name in _COMPILED and _transformed():
        raise InputError(
            f"backend {name!r}, {source}, cannot be transformed by torch.func nor differentiated"
            " forwards. Use backend='eager', or let the backend be chosen."
        )
    return name


def recompute_as_now() -> dict[str, Any]:
    """Arguments for `torch.utils.checkpoint` with which the second forward pass, in the backward
    and perhaps on another thread, has the backend that is forced now, or none."""
    if torch.compiler.is_compiling():  # what is compiled keeps its backend
        return {}
    name = _forced_name()
    return {"context_fn": lambda: (nullcontext(), use_backend(name))}


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force a backend inside a `with` block, e.g. `with use_backend("eager"): model(images)`."""
    if name is not None and name not in BACKENDS:
        raise InputError(f"`name` must be one of {', '.join(BACKENDS)}; got {name!r}.")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
