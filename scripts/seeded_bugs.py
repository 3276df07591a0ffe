"""Put one bug after the other into a copy of the library and see whether the tests notice.

    python scripts/seeded_bugs.py results.csv                    # all of them, two at a time
    python scripts/seeded_bugs.py results.csv --only skip_fsync  # some

A bug is a piece of source and what takes its place; the tests of what it is in are run until the
first failure. The unchanged copy must pass them all. Ends with 1 if fewer than 95 % are caught.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WANTED = 0.95


@dataclass(frozen=True)
class Bug:
    """`old`, which stands in the file exactly once, becomes `new`; `tests` are pytest arguments."""

    name: str
    file: str  # below src/v2m
    old: str
    new: str
    tests: str


EAGER, CORE, MIXER = "tests/ops/test_eager.py", "tests/ops/test_core.py", "tests/layers"
TRITON = "tests/ops/test_triton.py -k test_scan"
TRAINER, STORE = "tests/engine/test_trainer.py", "tests/engine/test_store.py"
LOADERS, SHARDS = "tests/data/test_loaders.py", "tests/data/test_shards.py"
FAULTS, SAVING = "tests/engine/test_faults.py", "tests/engine/test_saving.py"

# fmt: off
BUGS = [
    # the operator
    Bug("reverse_ignored", "ops/eager.py",
        "range(length - 1, -1, -1) if reverse else range(length)", "range(length)",
        f"{EAGER} {CORE}"),
    Bug("window_ignored", "ops/eager.py", "if window is not None and (", "if False and (",
        f"{EAGER} {CORE}"),
    Bug("wrong_gate", "ops/eager.py", "y * F.silu(z", "y * torch.sigmoid(z", f"{EAGER} {CORE}"),
    Bug("skip_of_another", "ops/eager.py", "torch.addcmul(y, u, D", "torch.addcmul(y, dt, D",
        EAGER),
    Bug("reference_decays_twice", "ops/reference.py", "torch.exp(", "torch.exp(2 * ",
        "tests/ops/test_reference.py"),
    Bug("half_the_sum", "ops/core.py", "(2 / len(directions))", "(1 / len(directions))", CORE),
    Bug("mirror_ignored", "ops/core.py", "y.flip(mirror) if mirror else y", "y", CORE),
    Bug("axes_swapped", "ops/core.py", "if axis == 2 else (0, 0, 0, 0, *before)",
        "if axis == 1 else (0, 0, 0, 0, *before)", CORE),
    Bug("convolution_looks_ahead", "ops/core.py", "(0, width - 1) if reverse else (width - 1, 0)",
        "(width - 1, 0) if reverse else (0, width - 1)", CORE),
    Bug("first_weights_twice", "ops/core.py", "_inputs(handed_over[start], second, sweep)",
        "_inputs(handed_over[start], first, sweep)", CORE),
    Bug("one_corner_twice", "layers/directions.py", "Direction(RIGHT, UP),\n        )\n    ),\n    "
        '"corner":', 'Direction(RIGHT, DOWN),\n        )\n    ),\n    "corner":', MIXER),
    Bug("transposition_forgotten", "ops/core.py", "y.transpose(1, 2) if transpose else y", "y",
        f"{CORE} {MIXER}"),
    Bug("kernel_reverse_ignored", "ops/triton/scan.py",
        "        token += (steps - 1).to(tl.int64) * inner", "        token += 0", TRITON),
    Bug("kernel_mask_dropped", "ops/triton/scan.py", "steps = tl.minimum(window, length - start)",
        "steps = window", TRITON),
    Bug("kernel_mirror_off_by_one", "ops/triton/scan.py", "width - 1 - 2 * (token % width)",
        "width - 2 * (token % width)", "tests/ops/test_triton.py -k test_core"),
    Bug("kernel_32_bit_offset", "ops/triton/scan.py", "(line // inner).to(tl.int64) * outer",
        "(line // inner).to(tl.int32) * outer", TRITON),
    # the models
    Bug("depth_not_in_initialisation", "models/plain.py",
        "block.mixer.out_proj.weight.div_(math.sqrt(self.config.depth))", "pass",
        "tests/models/test_invariants.py tests/models/test_contract.py"),
    Bug("pickles_execute", "models/pickles.py", "weights_only=True", "weights_only=False",
        "tests/models/test_pickles.py"),
    # the trainer
    Bug("skip_fsync", "engine/store.py", "            fsync(path)\n            files[",
        "            files[", STORE),
    Bug("checksum_ignored", "engine/store.py", "if sha256(path) != digest:", "if False:", STORE),
    Bug("missing_file_not_damage", "engine/store.py", "or not path.is_file()", "", STORE),
    Bug("only_one_checkpoint_kept", "engine/store.py", "[len(later) + self.keep :]",
        "[len(later) + 1 :]", STORE),
    Bug("full_disk_unnoticed", "engine/checkpoint.py", "raise OSError(str(error)) from error",
        "pass", SAVING),
    Bug("not_finite_goes_on", "engine/loop.py", "    if not anywhere:\n", "    if True:\n",
        f"{TRAINER} -k finite"),
    Bug("not_finite_elsewhere_goes_on", "engine/loop.py",
        "bool(loop.ranks.largest([float(here)], loop.device)[0])", "here",
        f"{FAULTS} -k other_rank"),
    Bug("accumulation_not_averaged", "engine/loop.py", "(loss / len(group)).backward()",
        "loss.backward()", f"{TRAINER} -k accumulation"),
    Bug("average_off", "engine/loop.py", "state.ema.update(state.model, step=state.step)", "pass",
        TRAINER),
    Bug("clipping_off", "engine/loop.py", "if loop.clip_norm is not None:", "if False:", TRAINER),
    Bug("rate_never_moves", "engine/loop.py", "    loop.schedule.step_update(state.step)\n", "",
        TRAINER),
    Bug("decay_on_A_log", "engine/optim.py", '{"A_log", "A_2_log"', '{"A_2_log"',
        "tests/engine/test_optim.py"),
    Bug("layer_decay_ignored", "engine/optim.py", "layer_decay=config.layer_decay\n",
        "layer_decay=1.0\n", "tests/engine/test_optim.py"),
    Bug("optimiser_not_restored", "engine/checkpoint.py",
        '        _load_optimizer(state, _under(tensors, "optimizer"), values["optimizer"])\n', "",
        TRAINER),
    Bug("resumed_with_other_settings", "engine/rundir.py",
        "if key not in OPERATIONAL_KEYS and before[key] != value", "if False",
        "tests/engine/test_rundir.py"),
    Bug("two_runs_in_a_folder", "engine/lock.py", "fcntl.LOCK_EX |", "fcntl.LOCK_SH |",
        "tests/engine/test_lock.py"),
    Bug("shards_do_not_stay_gathered", "engine/sharding.py",
        "part.set_reshard_after_forward(False, recurse=False)", "pass",
        "tests/engine/test_sharding.py"),
    Bug("batch_grows_with_ranks", "engine/session.py", "ranks.world * config.optim.accumulation",
        "config.optim.accumulation", "tests/engine/test_distributed.py -k batch_does_not"),
    # the data
    Bug("ranks_see_the_same", "data/samplers.py", "indices[self.rank :: self.world_size], ",
        "indices[:: self.world_size], ", LOADERS),
    Bug("resumed_at_the_first_batch", "data/samplers.py", "range(self.first_batch, self.batches)",
        "range(self.batches)", LOADERS),
    Bug("every_epoch_alike", "data/randomness.py", "_generator(seed, epoch, _ORDER)",
        "_generator(seed, 0, _ORDER)", LOADERS),
    Bug("validation_images_in_training", "data/splits.py", "            start += size\n",
        "            start += 0\n", "tests/data/test_splits.py"),
    Bug("links_in_shards", "data/shards.py", "if not member.isreg() or member.issparse():",
        "if False:", SHARDS),
    Bug("workers_end_with_the_job", "data/workers.py", "if hasattr(signal,",
        "if not hasattr(signal,", LOADERS),
    # the evaluation
    Bug("evaluated_in_training_mode", "evaluation/classification.py", "    model.eval()\n", "",
        "tests/evaluation/test_classification.py"),
]
# fmt: on


def copy(folder: Path) -> None:
    """The sources and the tests, with their caches of compiled kernels left behind."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "tests", "scripts", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)


def run_tests(folder: Path, tests: str) -> tuple[int, str, float]:
    """pytest's exit code, the first failure's name, and the seconds it took."""
    command = [*(sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider")]
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    started = time.monotonic()
    done = subprocess.run(
        [*command, *tests.split()], cwd=folder, env=environment, capture_output=True, text=True
    )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    first = failed[0].split(" - ")[0].split(" ", 1)[1] if failed else ""
    return done.returncode, first, time.monotonic() - started


def seed(bug: Bug, original: Path) -> dict[str, object]:
    """The outcome of one bug in a copy of `original`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(original, name, dirs_exist_ok=True))
        path = folder / "src" / "v2m" / bug.file
        source = path.read_text()
        assert source.count(bug.old) == 1, (
            f"{bug.name}: {bug.file} has it {source.count(bug.old)} x"
        )
        path.write_text(source.replace(bug.old, bug.new))
        code, first, seconds = run_tests(folder, bug.tests)
    outcome = {0: "missed", 1: "caught"}.get(code, f"pytest ended with {code}")
    print(f"{outcome:7} {bug.name} {first}", flush=True)
    return {
        "bug": bug.name,
        "file": bug.file,
        "outcome": outcome,
        "test": first,
        "seconds": round(seconds, 1),
        "tests": bug.tests,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="CSV to write")
    parser.add_argument("--only", nargs="*", metavar="BUG", help="names of bugs (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    args = parser.parse_args()

    bugs = [bug for bug in BUGS if not args.only or bug.name in args.only]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.jobs) as pool:
        original = Path(name)
        copy(original)
        needed = sorted({bug.tests for bug in bugs})
        for code, first, _ in pool.map(lambda tests: run_tests(original, tests), needed):
            if code != 0:
                print(f"without any bug, {first or code} fails", file=sys.stderr)
                return 2
        rows = list(pool.map(lambda bug: seed(bug, original), bugs))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    caught = sum(row["outcome"] == "caught" for row in rows)
    print(f"{caught} of {len(rows)} caught ({caught / len(rows):.1%})")
    return int(caught < WANTED * len(rows))


if __name__ == "__main__":
    sys.exit(main())
