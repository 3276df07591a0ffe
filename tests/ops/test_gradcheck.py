"""The reference and the eager backend: numerical against analytical gradients in float64.

200 seeded cases a backend; the default run takes every tenth, `pytest -m slow` all.
"""

import pytest
import torch

from helpers import random_case
from v2m.ops import selective_scan

DIFFERENTIABLE = ["reference", "eager"]


def check_gradients(backend: str, seed: int) -> None:
    inputs, options = random_case(seed)
    given = {name: value.requires_grad_() for name, value in inputs.items() if value is not None}

    def scan(*values: torch.Tensor) -> torch.Tensor:
        return selective_scan(**dict(zip(given, values)), **options, backend=backend)

    assert torch.autograd.gradcheck(scan, tuple(given.values())), (seed, options)


@pytest.mark.parametrize("seed", range(0, 200, 10))
@pytest.mark.parametrize("backend", DIFFERENTIABLE)
def test_gradients_match_finite_differences(backend, seed):
    check_gradients(backend, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
@pytest.mark.parametrize("backend", DIFFERENTIABLE)
def test_gradients_match_finite_differences_200_cases(backend, seed):
    check_gradients(backend, seed)


@pytest.mark.parametrize("seed", range(1000, 1004))
@pytest.mark.parametrize("backend", DIFFERENTIABLE)
def test_second_derivatives_match_finite_differences(backend, seed):
    inputs, options = random_case(seed, largest=2)
    given = {name: value.requires_grad_() for name, value in inputs.items() if value is not None}

    def scan(*values: torch.Tensor) -> torch.Tensor:
        return selective_scan(**dict(zip(given, values)), **options, backend=backend)

    assert torch.autograd.gradgradcheck(scan, tuple(given.values())), (seed, options)


def test_the_cases_cover_what_they_promise():
    cases = [random_case(seed) for seed in range(0, 200, 10)]
    shapes = [inputs["u"].shape for inputs, _ in cases]
    assert any(shape[1] == 1 for shape in shapes)
    assert any(shape[2] == 1 for shape in shapes)
    assert any(shape[1] != shape[2] and 1 not in shape[1:3] for shape in shapes)
    for axis in (1, 2):
        for reverse in (False, True):
            assert any(o["axis"] == axis and o["reverse"] == reverse for _, o in cases)
    assert {o["softplus"] for _, o in cases} == {True, False}
    assert any(o["window"] in (2, 3) and i["u"].shape[o["axis"]] > o["window"] for i, o in cases)
    for name in ("B", "C", "D", "z", "dt_bias"):
        assert {inputs[name] is None for inputs, _ in cases} == {True, False}, name
