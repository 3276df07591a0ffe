"""Long contexts against float64, the tests that need a GPU, and the hardware's own counters."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

import v2m
from v2m.layers.mixer import Mixer2d
from v2m.ops import selective_scan, use_backend
from v2m.ops.core import PassWeights, mixer_core

from .measure import DIM, INNER, STATES, Item, Row, Setting, relative_error, require
from .operators import CORNERS, core_case, random_weights

ROOT = Path(__file__).parents[2]
GPU_TESTS = ("tests/ops/test_triton_gpu.py", "tests/models/test_models_on_gpu.py")
GPU_TESTS += ("tests/cli/test_doctor.py",)
SECTIONS = ("SpeedOfLight", "SchedulerStats", "WarpStateStats", "MemoryWorkloadAnalysis")
SECTIONS += ("Occupancy", "LaunchStats", "InstructionStats")


def long_items(setting: Setting) -> Iterator[Item]:
    """Lines and images far longer than those of training: values and gradients."""
    for length in (5, 40) if setting.tiny else (1024, 4097, 16384, 65536):
        yield f"long scan {length}", partial(long_scan, setting, length)
    side = 6 if setting.tiny else 128
    yield f"long mixer {side}", partial(long_mixer, setting, side)
    yield "long model", partial(long_model, setting)


def _checked(work: str, size: int, found: float, limit: float) -> Row:
    require(work, found, limit)
    return {"workload": work, "size": size, "error": found, "limit": limit}


def long_scan(setting: Setting, length: int) -> Iterator[Row]:
    """One line of 32 channels in float32; its gradients too, up to 4097 steps."""
    torch.manual_seed(length)
    u, dt = (torch.randn(1, 1, length, 32, device=setting.device) for _ in range(2))
    B, C = (torch.randn(1, 1, length, STATES, device=setting.device) for _ in range(2))
    A = -torch.rand(32, STATES, device=setting.device) - 0.01
    inputs = [u, dt - 2, A, B, C]
    with torch.no_grad():
        found = selective_scan(*inputs, axis=2)
        wanted = selective_scan(*(x.double() for x in inputs), axis=2, backend="eager")
    yield _checked("long scan", length, relative_error(found, wanted), 1e-5)
    if length > 5000:
        return
    dy = torch.randn_like(u)
    grads = []
    for backend, dtype in ((None, torch.float32), ("eager", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        y = selective_scan(*leaves, axis=2, backend=backend)
        grads.append(torch.autograd.grad(y, leaves, dy.to(dtype)))
    for name, a, b in zip(("u", "dt", "A", "B", "C"), *grads):
        yield _checked(f"long scan d{name}", length, relative_error(a, b), 1e-4)


def long_mixer(setting: Setting, side: int) -> Iterator[Row]:
    """A mixer of V2M-T over side x side tokens, float32, with the gradient of its input."""
    torch.manual_seed(0)
    module = Mixer2d(DIM).to(setting.device)
    x = torch.randn(1, side, side, DIM, device=setting.device).requires_grad_()
    y = module(x)
    (dx,) = torch.autograd.grad(y.square().mean(), x)
    wide = x.detach().double().requires_grad_()
    with use_backend("eager"):
        exact = module.double()(wide)
        (dexact,) = torch.autograd.grad(exact.square().mean(), wide)
    yield _checked("long mixer", side, relative_error(y, exact), 1e-4)
    yield _checked("long mixer dx", side, relative_error(dx, dexact), 1e-3)


def long_model(setting: Setting) -> Iterator[Row]:
    """Logits of V2M-T at 1024 px, float32 against float64."""
    size, depth = (64, 1) if setting.tiny else (1024, 24)
    torch.backends.cudnn.allow_tf32 = False  # of the patch embedding
    torch.manual_seed(0)
    model = v2m.create_model("v2m_tiny_patch16_224", img_size=size, depth=depth)
    model = model.to(setting.device).eval()
    images = torch.randn(1, 3, size, size, device=setting.device)
    with torch.no_grad():
        found = model(images)
        with use_backend("eager"):
            wanted = model.double()(images.double())
    yield _checked("long model", size, relative_error(found, wanted), 1e-3)


def pytest_items(setting: Setting, folder: Path, stage: str) -> Iterator[Item]:
    """`pytest -m gpu`: everything but tensors past 2^31 elements (tests), or those (large)."""
    choice = {"tests": "not two_to_the_31", "large": "two_to_the_31"}[stage]
    yield f"pytest {stage}", partial(run_pytest, folder, stage, choice, setting)


def run_pytest(folder: Path, stage: str, choice: str, setting: Setting) -> Iterator[Row]:
    report = (folder / f"{stage}.xml").absolute()
    report.unlink(missing_ok=True)
    parallel = stage == "tests" and importlib.util.find_spec("xdist") is not None
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-k", choice, "-v", *GPU_TESTS]
    command += [f"--junitxml={report}", *(["-n", "6"] if parallel else [])]
    if setting.tiny:
        command.append("--collect-only")
    with (folder / f"{stage}.log").open("w") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if not report.exists():
        raise RuntimeError(f"pytest exited with {code} and wrote no report; see {stage}.log")
    suite = ET.parse(report).getroot().find("testsuite")
    for case in suite.iter("testcase"):
        bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}"
        time = 1e3 * float(case.get("time", 0))
        yield {"workload": name, "ms": time, "note": bad[0] if bad else "passed"}
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    yield {"workload": f"pytest {stage}", "note": " ".join(f"{k} {v}" for k, v in counts.items())}
    if code:
        raise RuntimeError(f"pytest exited with {code}; see {stage}.log")


def profile_items(setting: Setting, folder: Path) -> Iterator[Item]:
    """Stall reasons, pipes and caches of the core's kernels by Nsight Compute, as text."""
    yield "profile", partial(profile, folder)


def profile(folder: Path) -> Iterator[Row]:
    tool = shutil.which("ncu")
    if tool is None:
        yield {"workload": "profile", "note": "no Nsight Compute (ncu) on this machine"}
        return
    command = [tool, "--target-processes", "all", "--kernel-name", "regex:scan_|project_|conv_"]
    command += ["--launch-skip", "4", "--launch-count", "14"]  # after the check: once each way
    command += [word for section in SECTIONS for word in ("--section", section)]
    command += [sys.executable, "-m", "benchmarks.gpu", "once"]
    target = folder / "profile.txt"
    with target.open("w") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise RuntimeError(f"ncu exited with {code}; see {target.name}")
    yield {"workload": "profile", "note": f"see {target.name}"}


def sanitizer_items(setting: Setting, folder: Path) -> Iterator[Item]:
    """Out-of-bounds and racing accesses of the kernels on a small core."""
    for tool in ("memcheck", "racecheck"):
        yield f"sanitizer {tool}", partial(sanitize, tool, folder)


def sanitize(tool: str, folder: Path) -> Iterator[Row]:
    program = shutil.which("compute-sanitizer")
    if program is None:
        yield {"workload": tool, "note": "no compute-sanitizer on this machine"}
        return
    command = [program, "--tool", tool, "--error-exitcode", "9", "--kernel-regex"]
    command += ["kns=_kernel", sys.executable, "-m", "benchmarks.gpu", "little"]
    log = folder / f"{tool}.txt"
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with log.open("w") as file:
        code = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if code:
        raise RuntimeError(f"compute-sanitizer exited with {code}; see {log.name}")
    yield {"workload": tool, "note": log.read_text().strip().splitlines()[-1]}


def little(setting: Setting) -> None:
    """What the sanitizer looks at: every kernel once, where sizes are whole and where not."""
    for grid in ((1, 4, 6), (1, 5, 3)):
        for channels in (64, 40):
            small_core(grid, channels, setting.device)
    torch.cuda.synchronize()


def small_core(grid: tuple[int, int, int], channels: int, device: str) -> None:
    weights = [
        PassWeights(*(x[:channels] if x.shape[0] == INNER else x[:, :channels] for x in w))
        for w in (random_weights(device), random_weights(device))
    ]
    u, z = (torch.randn(*grid, channels, device=device).bfloat16() for _ in "uz")
    y = mixer_core(u.requires_grad_(), z.requires_grad_(), *weights, CORNERS)
    torch.autograd.grad(y, (u, z), torch.ones_like(y))


def once(setting: Setting) -> None:
    """What Nsight Compute looks at: the core, forwards and backwards, twice."""
    for function in core_case(setting) * 2:
        function()
    torch.cuda.synchronize()
