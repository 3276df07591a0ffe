"""Draws the kernels' times against their floors from the CSV of benchmarks/kernels.py.

python benchmarks/plot.py benchmarks/results/h100_kernels.csv docs/images/h100_kernels.png
"""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(source: Path, target: Path) -> None:
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))[::-1]
    labels = [f"{row['kernel'].removesuffix('_kernel')} ({row['work']})" for row in rows]
    times = [float(row["microseconds"]) for row in rows]
    floors = [float(row["floor_microseconds"] or 0) for row in rows]
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    axes.barh(labels, times, color="#9db7d5", label="measured")
    axes.barh(labels, floors, height=0.35, color="#1f4e79", label="floor")
    for place, (time, floor) in enumerate(zip(times, floors)):
        share = f"  {floor / time:.0%} of the floor" if floor else ""
        axes.text(time, place, f" {time:.0f} us{share}", va="center", fontsize=8)
    axes.set_xlim(0, max(times) * 1.5)
    axes.set_xlabel("microseconds a layer, V2M-T core, batch 128, 224 px, bf16")
    axes.set_title(rows[0]["device"], fontsize=10)
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
