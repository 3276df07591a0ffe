"""The ranks of a run: one process alone, or several that `torchrun` started."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from v2m.errors import InputError

_GRACE = 0.2  # seconds


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the others of the run."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks to the user."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all the others."""
        if self.world > 1:
            dist.barrier()

    def largest(self, values: list[float], device: torch.device) -> list[float]:
        """Element-wise maximum over the ranks; NaN must be encoded by the caller."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64 if device.type != "mps" else None)
        tensor = tensor.to(device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def total(self, values: list[float], device: torch.device) -> list[float]:
        """Element-wise sum over the ranks."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64 if device.type != "mps" else None)
        tensor = tensor.to(device)
        dist.all_reduce(tensor)
        return tensor.tolist()


@contextmanager
def join_ranks(device: str, timeout_minutes: float = 10.0) -> Iterator[Ranks]:
    """The ranks that `torchrun` describes in the environment, connected while the block runs; one
    rank without it. A rank that waits longer than `timeout_minutes` for another fails."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    use_cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    ranks = Ranks(
        rank=int(os.environ["RANK"]), world=world, local_rank=int(os.environ["LOCAL_RANK"])
    )
    if use_cuda:
        if ranks.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"torchrun started process {ranks.local_rank} on this host, which has "
                f"{torch.cuda.device_count()} GPUs: lower --nproc-per-node."
            )
        torch.cuda.set_device(ranks.local_rank)
    dist.init_process_group(
        "nccl" if use_cuda else "gloo", timeout=timedelta(minutes=timeout_minutes)
    )
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
        # Sharded parameters keep the group, and gloo's threads, alive beyond this. Such a thread
        # may still wait for the interpreter to free the last collective's tensors, and aborts the
        # process if it meets an interpreter that is shutting down: let it come first.
        time.sleep(_GRACE)


def choose_device(name: str, ranks: Ranks) -> torch.device:
    """`auto`: CUDA, else MPS, else CPU. InputError if the one asked for is not here."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(
            kind for kind, here in available.items() if here and (kind != "mps" or ranks.world == 1)
        )
    if not available.get(name, False):
        here = ", ".join(kind for kind, there in available.items() if there)
        raise InputError(f"device {name!r} is not available on this machine; it has {here}.")
    return torch.device("cuda", ranks.local_rank) if name == "cuda" else torch.device(name)
