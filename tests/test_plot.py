"""Pictures and the table of the performance page, from small CSVs."""

import csv
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.measure import FIELDS  # noqa: E402

from benchmarks import plot  # noqa: E402

TINY, DEIT = plot.TINY, plot.DEIT


def write(path: Path, *rows: dict) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows({"device": "a GPU", **row} for row in rows)


@pytest.fixture
def measured(tmp_path):
    def model(work, name, way, size, batch, rate, memory):
        return {
            "workload": work, "contestant": name, "way": way, "size": size, "batch": batch,
            "images_per_second": rate, "memory_gb": memory, "ms": 1e3 * batch / rate,
        }  # fmt: skip

    write(
        tmp_path / "training.csv",
        model("training", TINY, "eager", 224, 128, 1500.0, 4.5),
        model("training", TINY, "compiled", 224, 128, 1700.0, 4.25),
        model("training", DEIT, "compiled", 224, 128, 8500.0, 2.3),
        model("training", DEIT, "compiled graph", 224, 128, 10000.0, ""),
        model("training", TINY, "eager", 1248, 8, 90.0, 9.0),
        {"workload": "training", "note": "failed: OutOfMemoryError"},
    )

    def kernel(name, way, size, share):
        return {
            "item": f"kernels {size}", "workload": f"{name}_kernel", "way": way, "size": size,
            "ms": 0.1 / share, "floor_ms": 0.1, "of_floor": share,
        }  # fmt: skip

    write(
        tmp_path / "kernels.csv",
        kernel("scan_forward", "forward", "128x14x14", 0.7),
        kernel("scan_forward", "forward", "1x512x512", 0.25),
        kernel("scan_backward", "backward", "128x14x14", 0.4),
        kernel("gate", "backward", "128x14x14", 0.9),
        {**kernel("scan_forward", "forward", "128x14x14", 0.8), "item": "another launch"},
    )
    return tmp_path


def test_the_table_takes_the_best_way_and_names_it(measured, monkeypatch):
    page = measured / "page.md"
    page.write_text(f"before\n{plot.START}\nold\n{plot.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["plot.py", str(measured), str(measured), "--page", str(page)])
    plot.main()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{plot.END}\nafter\n")
    assert "old" not in text
    rows = {line.split(" | ")[0][2:]: line for line in text.splitlines() if line[:2] == "| "}
    assert (
        "| 1,700 images/s, compiled; 0.200x DeiT-T compiled; 0.170x DeiT-T compiled graph |"
        in rows["V2M-T training, batch 128"]
    )
    assert "| 4.25 GB, compiled |" in rows["V2M-T training memory, batch 128"]
    assert "| 90 images/s, eager |" in rows["V2M-T at 1248 px, batch 8, training"]
    assert "| 25% (1x512x512) to 70% (128x14x14) |" in rows["scan forward, share of its floor"]
    assert "| not measured |" in rows["V2M-S inference"]
    for stage in ("training", "scan", "kernels"):
        assert (measured / f"gpu_{stage}.png").stat().st_size > 1000


def test_a_page_without_marks_is_refused(measured):
    page = measured / "page.md"
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="has no lines"):
        plot.fill(page, [])


def test_the_pages_own_table_is_up_to_date_with_the_targets():
    """Every row of the targets stands in the page, measured or not."""
    text = (ROOT / "docs" / "performance.md").read_text()
    for work, milestone, target, _ in plot.TARGETS:
        assert f"| {work} | {milestone} | {target} |" in text
