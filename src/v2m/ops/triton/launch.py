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

SCRATCH_BYTES = 2**31  # the most that the checkpoints of a backward may take
LONG = 32  # a line of more steps than this is long
MOST_STEP = 2**28  # elements from one step of a scan's backward to the next: a few fit in 32 bits


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
        """Kernel arguments: where the lines along `axis` lie, and how many there are."""
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


@dataclass(frozen=True)
class Tile:
    """The launch of one kernel."""

    channels: int
    tokens: int = 1  # of a tile; of a scan's backward, the steps it has in registers at a time
    warps: int = 1
    stages: int = 1  # of loads in flight, where a loop ends in a matrix product
    group: int = 1  # of a scan's backward: chunks that the replay loads at a time, at most 2
    fetch: bool = False  # of a scan: rows are brought to the L2 before they are loaded
    registers: int | None = None  # the most that a thread may have

    @property
    def options(self) -> dict[str, int]:
        """What a launch is given beside the kernel's arguments."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages} | limit

    @property
    def resident(self) -> int:
        """Programs that fit on a multiprocessor at once, by their registers."""
        return 2**16 // (32 * self.warps * (self.registers or 256))

    def mask(self, steps: int) -> int:
        """What a scan's backward has to mask in lines of so many steps: see its kernel."""
        if steps % self.tokens == 0 and (steps == 0 or steps >= self.tokens * self.group):
            return 0
        return 1 if self.group == 1 and steps > self.tokens else 2


# Every launch that may be chosen; without the rules of `pick`, the usual one first, and of a scan,
# the second is that of long lines. Why, is in NOTES.md.
TILES: dict[str, tuple[Tile, ...]] = {
    "scan_forward": (Tile(64, registers=128), Tile(64, fetch=True)),
    "scan_backward": (
        Tile(32, 2, group=2),
        Tile(32, 3, fetch=True),
        Tile(32, 4),
        Tile(32, 2, registers=168),
        Tile(32, 2, group=2, fetch=True),
    ),
    "project": (Tile(64, 32, 2, 3, registers=128), Tile(64, 32, 2, 3)),
    "project_backward_low": (Tile(128, 32, 2, 3), Tile(64, 64, 4, 3)),
    "project_backward": (Tile(64, 32, 4, registers=128), Tile(128, 32, 8), Tile(32, 32, 2)),
    "conv_backward": (Tile(64, 8, 1), Tile(64, 16, 2)),
    "gate": (Tile(128, 32, 4),),
}


def pick(kernel: str, states: int = 1, steps: int = 0, walk: str = "B") -> Tile:
    """The launch for a kernel, by what fits into the registers; steps: of a line or window; walk:
    what the walk back of a scan's backward has to do with, "B", "C" or "BC" (with a gate, too)."""
    if kernel == "scan_forward" and states > 16:
        return Tile(32)
    if kernel == "scan_backward" and padded(states) != 16:
        if padded(states) < 8 and steps % 7 == 0:
            return Tile(32, 7, registers=168)
        few = 168 if padded(states) < 8 else None
        return Tile(32, max(1, min(4, 32 // padded(states))), registers=few)
    tiles = TILES[kernel]
    if len(tiles) == 1:
        return tiles[0]
    long = steps > LONG
    if kernel == "scan_backward" and walk == "C":  # without sums over channels in the walk back
        if steps % 4 == 0 and steps >= 16:
            return tiles[2]
        if steps % 2 == 0 and not long:
            return tiles[3]
    if kernel == "scan_backward" and walk == "BC" and long:  # three steps would spill
        return tiles[4]
    return tiles[long]


def padded(size: int, least: int = 1) -> int:
    return max(least, triton.next_power_of_2(size))


def precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def room_near(
    wanted: int, tile: Tile, states: int, dtype: torch.dtype, device: torch.device
) -> int:
    """States that each program of a scan's backward keeps in shared memory: see states.py.

    As few as hold all that are wanted, if they can: the L1 has the rest of that memory.
    """
    if dtype != torch.bfloat16 or (tile.channels, tile.warps, states) != (32, 1, 16):
        return 0
    if not speaks_ptx():
        return 0
    memory = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    # Of its part a program takes up to 1.5 kB for other things; a kernel's own ends at 48 kB.
    most = min(47, (memory // tile.resident - 1536) // 1024)
    return next((size for size in (8, 18) if wanted <= size < most), most)


def speaks_ptx() -> bool:
    """Whether kernels may say something in the language of NVIDIA's GPUs."""
    return torch.version.cuda is not None and not interpreted()


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
    _, height, width, channels = x.shape
    step = x.stride(2) if width > 1 else x.stride(1) if height > 1 else x.stride(0)
    expected = (height * width * step, width * step, step, 1)
    spaced = all(
        size == 1 or stride == wanted for size, stride, wanted in zip(x.shape, x.stride(), expected)
    )
    if spaced and step >= channels and x.data_ptr() % 16 == 0:
        return x, step
    x = x.contiguous()
    return x, channels
