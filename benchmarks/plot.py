"""Pictures and the table of docs/performance.md from the CSVs of `python -m benchmarks.gpu`.

    python benchmarks/plot.py DIR docs/images              # DIR/kernels.csv, training.csv, ...
    python benchmarks/plot.py DIR docs/images --page docs/performance.md   # fills the table too

Draws what there are figures for: each kernel against its floor; the share of its floor that a scan
reaches, by length; time and memory of a training step against the resolution. The table's rows are
in TARGETS; a row without a figure stays "not measured".
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Rows = list[dict[str, str]]
START, END = "<!-- targets: benchmarks/plot.py -->", "<!-- end of targets -->"
TINY, SMALL, HIER = "v2m_tiny_patch16_224", "v2m_small_patch16_224", "v2m_hier_small_224"
DEIT = "deit_tiny_patch16_224"


def read(path: Path) -> Rows:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [r for r in csv.DictReader(file) if not r.get("note", "").startswith("failed")]


def best(rows: Rows, column: str, **wanted: str) -> dict[str, str] | None:
    """The row that matches and has most in a column; of times, least."""
    found = [r for r in rows if r[column] and all(r[k] == v for k, v in wanted.items())]
    sign = -1 if column == "ms" else 1
    return max(found, key=lambda r: sign * float(r[column]), default=None)


def speed(work: str, name: str, size: int = 224, batch: int = 128) -> Callable[[Rows], str | None]:
    """Images a second, and the ratio to DeiT-T compiled, without and with a graph of the step."""

    def reached(rows: Rows) -> str | None:
        label = {"workload": work, "size": str(size), "batch": str(batch)}
        row = best(rows, "images_per_second", contestant=name, **label)
        if row is None:
            return None
        text = f"{float(row['images_per_second']):,.0f} images/s, {row['way']}"
        for way in ("compiled", "compiled graph"):
            yardstick = best(rows, "images_per_second", contestant=DEIT, way=way, **label)
            if yardstick:
                ratio = float(row["images_per_second"]) / float(yardstick["images_per_second"])
                text += f"; {ratio:.3f}x DeiT-T {way}"
        return text

    return reached


def memory(name: str) -> Callable[[Rows], str | None]:
    def reached(rows: Rows) -> str | None:
        found = [r for r in rows if r["workload"] == "training" and r["contestant"] == name]
        found = [r for r in found if r["size"] == "224" and r["memory_gb"]]
        row = min(found, key=lambda r: float(r["memory_gb"]), default=None)
        return row and f"{float(row['memory_gb']):.2f} GB, {row['way']}"

    return reached


def time_of(work: str, size: str) -> Callable[[Rows], str | None]:
    def reached(rows: Rows) -> str | None:
        row = best(rows, "ms", workload=work, size=size)
        return row and f"{float(row['ms']):.2f} ms, {float(row['of_floor']):.0%} of the floor"

    return reached


def least_share(work: str) -> Callable[[Rows], str | None]:
    def reached(rows: Rows) -> str | None:
        found = [r for r in rows if r["workload"] == work and r["item"].startswith("kernels")]
        found = [(float(r["of_floor"]), r["size"]) for r in found]
        if not found:
            return None
        low, high = min(found), max(found)
        return f"{low[0]:.0%} ({low[1]}) to {high[0]:.0%} ({high[1]})"

    return reached


TARGETS: tuple[tuple[str, str, str, Callable[[Rows], str | None]], ...] = (
    ("V2M-T inference, batch 128", "6,000 images/s; 0.125x DeiT-T", "12,000",
     speed("inference", TINY)),
    ("V2M-T training, batch 128", "1,600 images/s; 0.167x DeiT-T", "3,200",
     speed("training", TINY)),
    ("V2M-T training memory, batch 128", "6 GB", "4.2 GB", memory(TINY)),
    ("V2M-S inference", "3,000 images/s", "6,000", speed("inference", SMALL)),
    ("V2M-S training", "750 images/s", "1,500", speed("training", SMALL)),
    ("V2M-S* inference", "3,000 images/s", "4,500", speed("inference", HIER)),
    ("V2M-S* training", "1,100 images/s", "1,600", speed("training", HIER)),
    ("one mixer (128,14,14), forward", "0.85 ms", "0.42 ms",
     time_of("mixer forward", "128x14x14")),
    ("one mixer (128,14,14), with backward", "3.2 ms", "1.6 ms",
     time_of("mixer with backward", "128x14x14")),
    ("one mixer (1,512,512), forward", "12 ms", "6 ms", time_of("mixer forward", "1x512x512")),
    ("one mixer (1,512,512), with backward", "40 ms", "22 ms",
     time_of("mixer with backward", "1x512x512")),
    ("V2M-T at 1248 px, batch 8, training", "80 images/s", "208",
     speed("training", TINY, 1248, 8)),
    ("V2M-T at 2048 px, batch 4, training", "1x DeiT-T", "2x DeiT-T",
     speed("training", TINY, 2048, 4)),
    ("scan forward, share of its floor", "65 % at every length", "80 %",
     least_share("scan_forward_kernel")),
    ("scan backward, share of its floor", "35 %", "55 %", least_share("scan_backward_kernel")),
)  # fmt: skip


def table(rows: Rows) -> str:
    lines = ["| work | milestone | target | reached |", "|---|---|---|---|"]
    for work, milestone, target, reached in TARGETS:
        lines.append(f"| {work} | {milestone} | {target} | {reached(rows) or 'not measured'} |")
    return "\n".join(lines)


def fill(page: Path, rows: Rows) -> None:
    """Put the table between its marks."""
    text = page.read_text()
    if START not in text or END not in text:
        raise SystemExit(f"{page} has no lines {START} and {END}.")
    before, rest = text.split(START, 1)
    after = rest.split(END, 1)[1]
    page.write_text(f"{before}{START}\n{table(rows)}\n{END}{after}")


def draw_kernels(rows: Rows, target: Path) -> None:
    """Bars of a core's kernels."""
    bars = [
        (row["workload"], row["way"], 1e3 * float(row["ms"]), 1e3 * float(row["floor_ms"] or 0))
        for row in rows[::-1]
        if row["item"] == "kernels 128x14x14" and row["workload"] != "core"
    ]
    labels = [f"{kernel.removesuffix('_kernel')} ({work})" for kernel, work, *_ in bars]
    times, floors = [bar[2] for bar in bars], [bar[3] for bar in bars]
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    axes.barh(labels, times, color="#9db7d5", label="measured")
    axes.barh(labels, floors, height=0.35, color="#1f4e79", label="floor")
    for place, (time, floor) in enumerate(zip(times, floors)):
        share = f"  {floor / time:.0%} of the floor" if floor else ""
        axes.text(time, place, f" {time:.0f} us{share}", va="center", fontsize=8)
    axes.set_xlim(0, max(times) * 1.5)
    axes.set_xlabel("microseconds a layer, V2M-T core, batch 128, 224 px, bf16")
    _finish(figure, axes, rows[0]["device"], target)


def draw_shares(rows: Rows, target: Path) -> None:
    """Share of its floor that a mixer's scans reach, by the length of their lines."""
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for way, color in (("forward", "#1f4e79"), ("backward", "#c05a2e")):
        points = [
            (int(row["size"].split("x")[2]), 100 * float(row["of_floor"]))
            for row in rows
            if row["workload"] == f"scan_{way}_kernel" and row["item"].startswith("kernels")
        ]
        axes.plot(*zip(*sorted(points)), "o-", color=color, label=f"the six scans, {way}")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 100)
    axes.set_xlabel("steps of a line")
    axes.set_ylabel("% of the floor")
    _finish(figure, axes, rows[0]["device"], target)


def draw_resolutions(rows: Rows, target: Path) -> None:
    """Milliseconds and memory of a training step, an image, against the side of the image."""
    figure, both = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for name, color in ((TINY, "#1f4e79"), (DEIT, "#c05a2e")):
        for axes, column, label in zip(both, ("ms", "memory_gb"), ("ms", "GB")):
            points: dict[int, float] = {}
            for row in rows:
                if row["workload"] == "training" and row["contestant"] == name and row[column]:
                    value = float(row[column]) / float(row["batch"])
                    size = int(row["size"])
                    points[size] = min(value, points.get(size, value))
            if points:
                axes.plot(*zip(*sorted(points.items())), "o-", color=color, label=name)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel("side of the image, pixels")
            axes.set_ylabel(f"{label} an image, training")
    _finish(figure, both[0], rows[0]["device"], target)


def _finish(figure, axes, title: str, target: Path) -> None:
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False)
    for each in figure.axes:
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=130)
    plt.close(figure)
    print(target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a folder of CSVs")
    parser.add_argument("target", type=Path, help="a folder for the pictures")
    parser.add_argument("--page", type=Path, help="a page whose table is to be filled")
    options = parser.parse_args()
    pictures = {
        "gpu_kernels": ("kernels", draw_kernels),
        "gpu_scan": ("kernels", draw_shares),
        "gpu_training": ("training", draw_resolutions),
    }
    for name, (stage, draw) in pictures.items():
        rows = read(options.source / f"{stage}.csv")
        if rows:
            draw(rows, options.target / f"{name}.png")
    if options.page:
        stages = ("kernels", "mixer", "training", "inference")
        rows = [row for stage in stages for row in read(options.source / f"{stage}.csv")]
        fill(options.page, rows)


if __name__ == "__main__":
    main()
