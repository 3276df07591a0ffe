"""From tensors to a kernel's job: padding, packing, tables of sweeps, and the launch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numba import cfunc, types
from torch import Tensor
from torch.nn import functional as F

from . import layout as at
from .packing import padded_size
from .parallel import borrow, launch, thread_count
from .vector import LANES

__all__ = [
    "Job",
    "decay_rates",
    "gate_gradient",
    "gate_of",
    "grid",
    "group_count",
    "pack",
    "pad",
    "padded_size",
    "run",
    "sweep_row",
    "token_pitch",
    "unpack",
]

GROUPS = 64  # at most
LOG2_E = math.log2(math.e)
ALIGNMENT = 64  # bytes, of every worker's scratch


def pad(tensor: Tensor) -> Tensor:
    """The last dimension filled up with zeros to whole vectors."""
    extra = -tensor.shape[-1] % LANES
    return F.pad(tensor, (0, extra)) if extra else tensor


def grid(tensor: Tensor) -> Tensor:
    """(B, H, W, E) as the kernels want it:

    Fp32 or bfloat16, whole vectors of channels, tokens evenly spaced.
    """
    tensor = tensor.detach()
    if tensor.dtype != torch.bfloat16:
        tensor = tensor.float()
    tensor = pad(tensor)
    return tensor if token_pitch(tensor) else tensor.contiguous()


def gate_of(z: Tensor) -> Tensor:
    """silu(z), (B, H, W, E) in fp32: once for all the sweeps that it closes."""
    return F.silu(pad(z.detach().float())).contiguous()


def gate_gradient(d_gate: Tensor, z: Tensor) -> Tensor:
    """The gradient of z (B, H, W, E), in its dtype, from that of `gate_of(z)`."""
    d_gate = d_gate[..., : z.shape[-1]]
    return torch.ops.aten.silu_backward(d_gate, z.detach().float()).to(z.dtype).contiguous()


def token_pitch(grid: Tensor) -> int:
    """Elements from a token to the next in memory, or 0 where tokens are not evenly spaced."""
    _, height, width, channels = grid.shape
    pitch = grid.stride(2) if width > 1 else grid.stride(1) if height > 1 else grid.stride(0)
    pitch = max(pitch, channels)
    expected = (height * width * pitch, width * pitch, pitch, 1)
    even = all(
        n == 1 or stride == want for n, stride, want in zip(grid.shape, grid.stride(), expected)
    )
    return pitch if even else 0


def group_count(lines: int) -> int:
    """Groups of lines that sum the weights' gradients, each on its own: by shape alone."""
    return min(lines, max(16, min(lines // 8, GROUPS)))


def sweep_row(shape, source: Tensor, axis: int, reverse: bool, window: int | None, **entries: int):
    """One sweep's table over a grid of `shape` (B, H, W, E); `entries` by the names in `layout`."""
    _, height, width, _ = shape
    length, lines = (height, width) if axis == 1 else (width, height)
    row = np.zeros(at.SWEEP_SLOTS, dtype=np.int64)
    row[at.SOURCE], row[at.SOURCE_PITCH] = source.data_ptr(), token_pitch(source)
    row[at.LENGTH], row[at.IMAGE_LINES] = length, lines
    row[at.LINE_STEP], row[at.STEP] = (1, width) if axis == 1 else (width, 1)
    row[at.REVERSE], row[at.WINDOW] = reverse, window or length + 1
    for name, value in entries.items():
        row[getattr(at, name)] = value
    return row


class Job:
    """A kernel's arguments.

    `slots` by the names in `layout`; tensors and arrays go in as addresses and are kept alive.
    """

    def __init__(self, **slots):
        self.table = np.zeros(at.JOB_SLOTS, dtype=np.int64)
        self.kept: list = []
        self.set_float("ONE", 1.0)
        self.set(**slots)

    def set(self, **slots) -> None:
        """Fill slots."""
        for name, value in slots.items():
            if isinstance(value, Tensor):
                self.kept.append(value)
                value = value.data_ptr()
            elif isinstance(value, np.ndarray):
                self.kept.append(value)
                value = value.ctypes.data
            self.table[getattr(at, name)] = value

    def get(self, name: str) -> int:
        """What a slot holds."""
        return int(self.table[getattr(at, name)])

    def set_float(self, name: str, number: float) -> None:
        """Fill a slot that holds an fp32 number."""
        slot = getattr(at, name)
        self.table[slot : slot + 1].view(np.float32)[0] = number


def run(kernel_of: Callable, job: Job, sweeps: list[np.ndarray], tasks: int, scratch: int) -> None:
    """Launch a kernel over `sweeps`, with `scratch` bytes for each thread."""
    if tasks == 0:
        return
    table = np.stack(sweeps)
    threads = thread_count(tasks)
    scratch = -(-scratch // ALIGNMENT) * ALIGNMENT
    memory = borrow(scratch * threads + ALIGNMENT)
    start = -(-memory.data_ptr() // ALIGNMENT) * ALIGNMENT
    job.set(
        NEXT_TASK=0,
        NEXT_WORKER=0,
        TASKS=tasks,
        SWEEPS=table.ctypes.data,
        SWEEP_COUNT=len(sweeps),
        SCRATCH=start,
        SCRATCH_BYTES=scratch,
    )
    launch(_compiled(kernel_of), job.table.ctypes.data, threads)


@cache
def _compiled(kernel_of: Callable):
    """The kernel as machine code, from numba's cache where there is one."""
    kernel = kernel_of(_fingerprint())
    signature = types.void(types.int64)
    try:
        return cfunc(signature, cache=True, error_model="numpy")(kernel)
    except RuntimeError as error:
        if "no locator" not in str(error):
            raise
        return cfunc(signature, error_model="numpy")(kernel)  # nowhere to write: compile each time


@cache
def _fingerprint() -> str:
    """A digest of this folder's sources:

    Numba's own check covers only the file that a kernel stands in.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pack(parts: list[Tensor]) -> Tensor:
    """Parameters one after another in fp32, channels last and padded to whole vectors."""
    return torch.cat([pad(part.detach().float()).reshape(-1) for part in parts])


def decay_rates(A: Tensor) -> Tensor:
    """(N, E): what dt is multiplied with to have the decay as a power of two; finite where A is."""
    largest = torch.finfo(torch.float32).max
    return (A * LOG2_E).clamp(-largest, largest).t()


def unpack(packed: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The parts of what `pack` would have packed, without the padding."""
    sizes = [tensor.shape[:-1].numel() * padded_size(tensor.shape[-1]) for tensor in like]
    return [
        part.view(*tensor.shape[:-1], -1)[..., : tensor.shape[-1]]
        for part, tensor in zip(packed.split(sizes), like)
    ]
