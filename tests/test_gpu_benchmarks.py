"""The benchmarks of the GPU, as far as a CPU goes: every stage runs, and none stops the next."""

import csv
import sys
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import __main__ as runner  # noqa: E402
from benchmarks.gpu import checks, models, operators  # noqa: E402
from benchmarks.gpu.measure import Setting, Table, floor_ms, require, run_items  # noqa: E402

CPU = Setting("cpu")
STAGES = {
    "scan": operators.scan_items,
    "mixer": operators.mixer_items,
    "training": models.training_items,
    "inference": models.inference_items,
    "registered": models.registered_items,
    "long": checks.long_items,
}


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs(stage, tmp_path):
    items = list(STAGES[stage](CPU))
    assert run_items(iter(items), Table(tmp_path / "rows.csv", CPU), (0, 1)) == 0
    rows = rows_of(tmp_path / "rows.csv")
    assert {row["item"] for row in rows} == {name for name, _ in items}
    if stage == "long":
        assert all(float(row["error"]) <= float(row["limit"]) for row in rows)
    else:
        assert all(float(row["ms"]) > 0 for row in rows if row["workload"] != "scan backward")


def test_what_fails_is_a_row_and_runs_again(tmp_path):
    """The kernels need a GPU; what comes after them is measured, and what is there is not again."""
    calls = []

    def good():
        calls.append(1)
        yield {"workload": "good", "ms": 1.0}

    path = tmp_path / "rows.csv"
    items = [next(operators.kernel_items(CPU)), ("good", good)]
    for _ in range(2):
        assert run_items(iter(items), Table(path, CPU), (0, 1)) == 1
    rows = rows_of(path)
    assert [row["item"] for row in rows] == ["good", "kernels 128x14x14"]
    assert rows[1]["note"] == "failed: RuntimeError: the Triton kernels need a CUDA device"
    assert len(calls) == 1


def test_shards_share_the_items(tmp_path):
    seen = []
    items = [(str(i), lambda i=i: seen.append(i) or []) for i in range(5)]
    for i in range(2):
        run_items(iter(items), None, (i, 2))
    assert seen == [0, 2, 4, 1, 3]


def test_a_stage_that_dies_or_hangs_is_named(monkeypatch):
    programs = {"dies": "import sys; sys.exit(3)", "hangs": "import time; time.sleep(60)"}
    programs["works"] = ""
    monkeypatch.setattr(
        runner, "command_of", lambda stage, _: [sys.executable, "-c", programs[stage]]
    )
    found = {
        stage: runner.run(stage, Namespace(), 1 if stage == "hangs" else 60) for stage in programs
    }
    assert found["works"] == "done"
    assert found["dies"].startswith("failed, exit status 3")
    assert found["hangs"].startswith("stopped after 1 s")


def test_wrong_numbers_are_not_timed():
    with pytest.raises(ArithmeticError, match=r"scan: relative error 3\.0e-01, limit 2e-02"):
        require("scan", 0.3)
    with pytest.raises(ArithmeticError):
        require("scan", float("nan"))


def test_the_floor_is_the_larger_of_memory_and_exponentials():
    tokens = 128 * 14 * 14
    assert floor_ms(tokens, backward=False) == pytest.approx(0.0417, rel=0.01)
    assert floor_ms(tokens, backward=True) == pytest.approx(0.0833, rel=0.01)
