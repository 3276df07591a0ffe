"""What the launchers share: geometry of scans, block sizes, the device to launch on."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from v2m.errors import InputError

LOG2E = 1.4426950408889634
SCRATCH_BYTES = 2**31  # the most that the checkpoints of a backward may take


class Scan(NamedTuple):
    """One scan of a pass: the slab of the pass's input it reads, and where it goes."""

    source: int
    axis: int
    reverse: bool
    window: int
    mirror: tuple[int, ...] = ()


class Grid(NamedTuple):
    """A (batch, height, width) grid of tokens with E channels."""

    batch: int
    height: int
    width: int
    channels: int

    @property
    def tokens(self) -> int:
        return self.batch * self.height * self.width

    def lines(self, axis: int, window: int) -> dict[str, int]:
        """The kernel arguments that say where the lines along `axis` lie, and how many there are."""
        length = self.height if axis == 1 else self.width
        window = min(window or length, length)
        return {
            "length": length,
            "window": window,
            "inner": self.width if axis == 1 else 1,
            "outer": self.height * self.width if axis == 1 else self.width,
            "segments": self.tokens // length * triton.cdiv(length, window),
        }


def grid_of(u: Tensor) -> Grid:
    return Grid(*u.shape)


def pack(values: list[int], bits: int) -> int:
    """Small numbers in one integer, the first in the lowest bits, as the kernels read them."""
    return sum(int(value) << (bits * i) for i, value in enumerate(values))


def groups(scans: list[Scan]) -> list[tuple[Scan, list[int]]]:
    """Scans that one launch can run: same axis, window and mirror. (an example, indices) each."""
    found: dict[tuple, list[int]] = {}
    for index, scan in enumerate(scans):
        found.setdefault((scan.axis, scan.window, scan.mirror), []).append(index)
    return [(scans[indices[0]], indices) for indices in found.values()]


@dataclass(frozen=True, kw_only=True)
class ForwardConfig:
    block_e: int
    warps: int = 1

    @staticmethod
    def pick(channels: int, states: int) -> ForwardConfig:
        """Two channels a thread, with all their states, as far as the registers go."""
        return ForwardConfig(block_e=64 if channels > 32 and states <= 16 else 32)


@dataclass(frozen=True, kw_only=True)
class BackwardConfig:
    chunk: int  # steps whose states and decays are in registers at a time
    block_e: int = 32
    warps: int = 1

    @staticmethod
    def pick(channels: int, states: int) -> BackwardConfig:
        """One channel a thread; 128 registers of it for states and decays."""
        return BackwardConfig(chunk=max(1, min(4, 64 // padded(states))))


def padded(size: int, least: int = 1) -> int:
    return max(least, triton.next_power_of_2(size))


def precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: Tensor):
    """The context that launches kernels on the tensor's device, whichever is current."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if tensor.device.type == "cpu" and not interpreted():
        raise InputError(
            "backend 'triton' got a CPU tensor. Triton runs on a GPU, or slowly on a CPU where"
            " TRITON_INTERPRET=1 was set before it was imported."
        )
    return nullcontext()


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def token_rows(x: Tensor) -> tuple[Tensor, int]:
    """(B, H, W, E) with evenly spaced tokens and dense channels, copied only if it is not so."""
    batch, height, width, channels = x.shape
    step = x.stride(2) if width > 1 else x.stride(1) if height > 1 else x.stride(0)
    expected = (height * width * step, width * step, step, 1)
    spaced = all(
        size == 1 or stride == wanted
        for size, stride, wanted in zip(x.shape, x.stride(), expected)
    )
    if spaced and step >= channels and x.data_ptr() % 16 == 0:
        return x, step
    x = x.contiguous()
    return x, channels
