"""Timing, floors and tables of the benchmarks on a GPU."""

from __future__ import annotations

import csv
import datetime
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

BYTES_PER_SECOND, EXPONENTIALS_PER_SECOND = 2.8e12, 3.7e12
DIM, INNER, STATES, RANK = 192, 384, 16, 12  # of V2M-T
FIELDS = ["item", "workload", "contestant", "way", "batch", "size", "ms", "images_per_second"]
FIELDS += ["memory_gb", "floor_ms", "of_floor", "error", "limit", "note"]
FIELDS += ["device", "torch", "triton", "timm", "date", "command"]

Row = dict[str, object]
Item = tuple[str, Callable[[], Iterable[Row]]]  # its name, and what measures it


@dataclass(frozen=True)
class Setting:
    """What to measure on: a device, or tiny sizes on a CPU, to see that everything runs."""

    device: str = "cuda"
    dry: bool = False  # run everything once, to have it compiled; times are not numbers

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def milliseconds(self, function: Callable[[], object], repeat: int = 100) -> float:
        """The median of repeated runs: by device events, on a CPU by the clock."""
        function()
        if self.dry:
            return math.nan
        if self.device == "cpu":
            times = []
            for _ in range(2):
                start = time.perf_counter()
                function()
                times.append(1e3 * (time.perf_counter() - start))
            return min(times)
        from triton.testing import do_bench

        torch.cuda.synchronize()
        return do_bench(function, warmup=20, rep=repeat, return_mode="median")

    def machine(self) -> Row:
        try:
            import triton

            version = triton.__version__
        except ImportError:
            version = "-"
        name = "CPU" if self.device == "cpu" else torch.cuda.get_device_name(self.device)
        return {
            "device": name, "torch": torch.__version__, "triton": version,
            "timm": timm.__version__, "date": datetime.date.today().isoformat(),
            "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        }  # fmt: skip


def replayed(function: Callable[[], object]) -> Callable[[], None]:
    """The function as a CUDA graph. It has run before, so that all is compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def floor_ms(tokens: int, *, backward: bool, scans: int = 1) -> float:
    """The larger of the bytes of a scan and its exponentials, E 384 and N 16, 16 bits.

    Forwards four grids are moved and one exponential is taken a state, backwards eight and two.
    """
    slabs, exponentials = (8, 2) if backward else (4, 1)
    memory = slabs * tokens * INNER * 2 / BYTES_PER_SECOND
    states = exponentials * tokens * INNER * STATES / EXPONENTIALS_PER_SECOND
    return 1e3 * scans * max(memory, states)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-300))


def require(name: str, found: float, limit: float = 2e-2) -> None:
    if not found <= limit:
        raise ArithmeticError(f"{name}: relative error {found:.1e}, limit {limit:.0e}")


class Table:
    """A CSV that grows a row at a time; items that are in it already are not run again."""

    def __init__(self, path: Path, setting: Setting):
        self.path, self.machine = path, setting.machine()
        rows = []
        if path.exists():
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        failed = {row["item"] for row in rows if row["note"].startswith("failed")}
        rows = [row for row in rows if row["item"] not in failed]
        self.done = {row["item"] for row in rows}
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)

    def write(self, row: Row) -> None:
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS).writerow(rounded | self.machine)
        print(*(f"{k}={v}" for k, v in rounded.items() if v != ""), flush=True)


def run_items(items: Iterator[Item], table: Table | None, shard: tuple[int, int]) -> int:
    """Run items one by one; one that fails becomes a row that says so. Returns how many did."""
    failures = 0
    for number, (name, measure) in enumerate(items):
        if number % shard[1] != shard[0] or (table and name in table.done):
            continue
        try:
            for row in measure():
                _put(name, row, table)
        except Exception as error:  # the next items are still worth having
            failures += 1
            line = str(error).strip().splitlines() or [""]
            _put(name, {"note": f"failed: {type(error).__name__}: {line[0]}"}, table)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return failures


def _put(name: str, row: Row, table: Table | None) -> None:
    if table:
        table.write({"item": name} | row)
    else:
        print(name, row.get("note", ""), flush=True)
