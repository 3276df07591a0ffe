"""Every backend in every type it takes, against the float64 reference: output and gradients.

The yardstick is the reference itself run in that type (inputs and output rounded to it, state in
float32): another backend may be at most twice as far from the truth, plus a trifle. 2,000 seeded
cases a backend over shapes, strides and types:

    pytest -m slow tests/ops/test_accuracy.py

The default run takes 40 of them a backend.
"""

import pytest
import torch

from helpers import SCAN_ARGUMENTS, available_backends, device_of, scan_inputs
from v2m.ops import selective_scan

CASES, DEFAULT_CASES, CHUNK = 2000, 40, 50
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
SIDES = (1, 2, 3, 5, 7, 8, 13, 16, 31)
GRIDS = ("u", "dt", "B", "C", "z")


def make_case(seed: int):
    """Float64 arguments, options, the type to try and how the grids lie in memory."""
    generator = torch.Generator().manual_seed(seed)

    def pick(choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    shape = (pick([1, 2, 3]), pick(SIDES), pick(SIDES), pick([1, 3, 8, 17]))
    options = {
        "axis": pick([1, 2]),
        "reverse": pick([False, True]),
        "window": pick([None, None, None, 1, 2, 4, 7]),
        "softplus": pick([True, True, True, False]),
    }
    left_out = tuple(name for name in ("B", "C", "D", "z", "dt_bias") if pick([0, 0, 0, 1]))
    inputs = scan_inputs(
        generator, shape, pick([1, 4, 8, 16]), without=left_out, softplus=options["softplus"]
    )
    layout = pick(["contiguous", "transposed", "strided", "offset"])
    return inputs, options, list(DTYPES)[seed % 4], layout


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values behind other strides: channels first, every other channel, an offset."""
    if layout == "transposed":
        return tensor.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    if layout == "strided":
        return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)[..., 0]
    if layout == "offset":
        return torch.cat([torch.full_like(tensor[:1], float("nan")), tensor])[1:]
    return tensor


def run(backend: str, inputs, options, dtype, layout, dy):
    """Output and gradients by name, in float64 on the CPU."""
    device = device_of(backend)
    given, used = {}, {}
    for name in SCAN_ARGUMENTS:
        if inputs[name] is not None:
            given[name] = inputs[name].to(device, dtype).requires_grad_()
            used[name] = lay_out(given[name], layout) if name in GRIDS else given[name]
    y = selective_scan(**used, **options, backend=backend)
    assert y.dtype == dtype
    assert y.shape == inputs["u"].shape
    gradients = torch.autograd.grad(y, list(given.values()), dy.to(device, dtype))
    assert all(g.dtype == dtype for g in gradients)
    results = {"y": y.detach(), **dict(zip(given, gradients))}
    return {name: value.double().cpu() for name, value in results.items()}


def check(backend: str, seed: int) -> None:
    inputs, options, dtype_name, layout = make_case(seed)
    dtype = DTYPES[dtype_name]
    if dtype == torch.float64 and backend in ("cpu", "triton"):
        dtype = torch.float32  # the compiled kernels keep their state in float32
    dy = torch.randn(inputs["u"].shape, generator=torch.Generator().manual_seed(seed)).double()
    truth = run("reference", inputs, options, torch.float64, "contiguous", dy)
    yardstick = run("reference", inputs, options, dtype, "contiguous", dy)
    results = run(backend, inputs, options, dtype, layout, dy)

    assert results.keys() == truth.keys()
    # In float64 the yardstick is the truth itself: there the trifle is all that is allowed.
    epsilon = torch.finfo(dtype).eps * (100 if dtype == torch.float64 else 1)
    for name, expected in truth.items():
        # A parameter's gradient is a sum over the grid of terms of size 1, which may cancel.
        summed = name in ("A", "D", "dt_bias")
        scale = expected.abs().max() + (4 * (dy[..., 0].numel() ** 0.5) if summed else 0)
        error, allowed = (results[name] - expected), (yardstick[name] - expected)
        where = f"{name}: seed {seed}, {dtype}, {layout}, {tuple(inputs['u'].shape)}, {options}"
        assert torch.isfinite(error).all(), where
        rms, rms_allowed = error.square().mean().sqrt(), allowed.square().mean().sqrt()
        assert rms <= 2 * rms_allowed + epsilon * scale, (where, float(rms), float(rms_allowed))
        largest, largest_allowed = error.abs().max(), allowed.abs().max()
        assert largest <= 2 * largest_allowed + 4 * epsilon * scale, (
            where,
            float(largest),
            float(largest_allowed),
        )


@pytest.mark.parametrize("seed", range(DEFAULT_CASES))
@pytest.mark.parametrize("backend", available_backends())
def test_output_and_gradients_by_name(backend, seed):
    check(backend, seed)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, CASES, CHUNK))
@pytest.mark.parametrize("backend", available_backends())
def test_output_and_gradients_by_name_2000_cases(backend, start):
    for seed in range(start, start + CHUNK):
        check(backend, seed)


def test_the_layouts_keep_the_values_and_differ_in_memory():
    tensor = torch.randn(2, 3, 4, 5)
    for layout in ("transposed", "strided", "offset"):
        other = lay_out(tensor, layout)
        assert torch.equal(other, tensor)
        assert other.stride() != tensor.stride() or other.storage_offset() > 0
