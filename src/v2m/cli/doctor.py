"""`v2m doctor`: what is installed, which backend runs where and why, and whether it is right."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

__all__ = ["add_parser", "run"]

TOLERANCE = 1e-5  # relative error of a float32 scan against float64


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `v2m doctor` to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="show versions, devices and backends, and check them",
        description="Show versions and devices, which backend of the operator is chosen on each "
        "and why, and check each backend's numbers against a float64 reference. Exit code 1 if "
        "one is wrong or fails.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the findings; 0 if every backend that can run here is right, else 1."""
    from v2m.ops.backend import explain_backend
    from v2m.visualize.machine import describe_machine

    console = Console()
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, value in {**describe_machine(), **_compilers()}.items():
        facts.add_row(name, value)
    console.print(facts)

    findings = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    for heading in ("device", "backend", "error against float64", "why it is chosen"):
        findings.add_column(heading)
    healthy = True
    for device in _devices():
        chosen, reason = explain_backend(None, device)
        for backend in dict.fromkeys((chosen, "eager")):
            outcome, right = _check(backend, device)
            healthy = healthy and right
            findings.add_row(device, backend, outcome, reason if backend == chosen else "")
    console.print()
    console.print(findings)
    return 0 if healthy else 1


def _compilers() -> dict[str, str]:
    """Versions of what compiles the kernels, where installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("numba", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _devices() -> list[str]:
    import torch

    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def _check(backend: str, device: str) -> tuple[str, bool]:
    """How far a small scan and its gradients are off the reference, and whether that is right."""
    import torch

    from v2m.ops import selective_scan

    generator = torch.Generator().manual_seed(0)
    u, dt = (torch.randn(2, 5, 7, 32, generator=generator) for _ in range(2))
    A = -torch.rand(32, 8, generator=generator) - 0.1

    def results(dtype: torch.dtype, where: str, name: str) -> tuple[torch.Tensor, ...]:
        inputs = [x.to(where, dtype, copy=True).requires_grad_() for x in (u, dt, A)]
        y = selective_scan(*inputs, axis=1, backend=name)
        return y, *torch.autograd.grad(y.square().sum(), inputs)

    expected = results(torch.float64, "cpu", "reference")
    try:
        got = results(torch.float32, device, backend)
    except Exception as error:  # a broken installation fails in its own way; say how
        return f"failed: {type(error).__name__}: {error}".splitlines()[0], False
    worst = max(
        float((a.detach().cpu().double() - b.detach()).norm() / b.detach().norm())
        for a, b in zip(got, expected)
    )
    return f"{worst:.1e}", worst < TOLERANCE
