"""Validation of the public operator, and what it says of extreme values."""

import math
import re

import numpy as np
import pytest
import torch

from helpers import available_backends, device_of, scan_inputs
from v2m.errors import InputError
from v2m.ops import selective_scan


def arguments(**changes):
    inputs = scan_inputs(torch.Generator().manual_seed(0), (2, 3, 4, 5), 6)
    inputs = {name: value.float() for name, value in inputs.items()}
    return {**inputs, "axis": 1, "backend": "eager", **changes}


ZEROS = torch.zeros
WRONG = {
    "u of three dimensions": (
        {"u": ZEROS(2, 3, 5)},
        "`u` must be a floating-point grid (B, H, W, E), none of H, W, E zero; got (2, 3, 5) of"
        " torch.float32. A sequence (B, L, E) goes in as u.unsqueeze(1) with axis=2.",
    ),
    "u of integers": (
        {"u": ZEROS(2, 3, 4, 5, dtype=torch.long)},
        "got (2, 3, 4, 5) of torch.int64",
    ),
    "reverse in words": ({"reverse": "no"}, "`reverse` must be True or False; got 'no'."),
    "softplus a number": ({"softplus": 1}, "`softplus` must be True or False; got 1."),
    "u without rows": ({"u": ZEROS(2, 0, 4, 5)}, "none of H, W, E zero; got (2, 0, 4, 5)"),
    "u an array": ({"u": np.zeros((2, 3, 4, 5))}, "`u` must be a torch.Tensor; got ndarray."),
    "A of one dimension": ({"A": ZEROS(5)}, "`A` must be (E, N) with E = 5, the channels of `u`"),
    "A of other channels": ({"A": ZEROS(4, 6)}, "and N > 0; got (4, 6) of torch.float32."),
    "A without states": ({"A": ZEROS(5, 0)}, "got (5, 0) of torch.float32."),
    "A a number": ({"A": -1.0}, "`A` must be a torch.Tensor; got float."),
    "A of integers": (
        {"A": ZEROS(5, 6, dtype=torch.int32)},
        "`A` must be floating point of shape (5, 6), (E, N); got (5, 6) of torch.int32.",
    ),
    "dt of another shape": (
        {"dt": ZEROS(2, 3, 4, 1)},
        "`dt` must be floating point of shape (2, 3, 4, 5), the shape of `u`; got (2, 3, 4, 1)",
    ),
    "dt missing": ({"dt": None}, "`dt` must be a torch.Tensor; got NoneType."),
    "B of other states": (
        {"B": ZEROS(2, 3, 4, 7)},
        "`B` must be floating point of shape (2, 3, 4, 6), (B, H, W, N); None stands for the"
        " constant 1; got (2, 3, 4, 7) of torch.float32.",
    ),
    "C of another grid": ({"C": ZEROS(2, 4, 3, 6)}, "`C` must be floating point of shape (2, 3, 4"),
    "C a list": ({"C": [1.0]}, "`C` must be a torch.Tensor; got list."),
    "D of two dimensions": ({"D": ZEROS(5, 1)}, "`D` must be floating point of shape (5,), (E,)"),
    "z of another batch": ({"z": ZEROS(1, 3, 4, 5)}, "`z` must be floating point of shape (2, 3"),
    "dt_bias of another width": (
        {"dt_bias": ZEROS(4)},
        "`dt_bias` must be floating point of shape",
    ),
    "another device": (
        {"z": ZEROS(2, 3, 4, 5, device="meta")},
        "`z` is on meta and `u` on cpu; move both to one device.",
    ),
    "axis 2.0": ({"axis": 2.0}, "of (B, H, W, E); got 2.0."),
    "axis True": ({"axis": True}, "of (B, H, W, E); got True."),
    "window True": ({"window": True}, "at least 1, or None; got True."),
    "axis 0": ({"axis": 0}, "`axis` must be 1 (along H) or 2 (along W) of (B, H, W, E); got 0."),
    "axis 3": ({"axis": 3}, "got 3."),
    "window 0": ({"window": 0}, "`window` must be a whole number of at least 1, or None; got 0."),
    "window of 1.5": ({"window": 1.5}, "or None; got 1.5."),
    "backend unknown": (
        {"backend": "cuda"},
        "`backend` must be one of reference, eager, cpu, triton; got 'cuda', asked for by the"
        " caller.",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_each_error_names_the_argument_what_it_got_and_what_was_expected(case):
    changes, message = WRONG[case]
    with pytest.raises(InputError, match=re.escape(message)):
        selective_scan(**arguments(**changes))


def test_an_input_error_is_a_value_error():
    with pytest.raises(ValueError, match="`axis` must be"):
        selective_scan(**arguments(axis=7))


@pytest.mark.parametrize(("negative", "positive"), [(-3, 1), (-2, 2)])
def test_negative_axes(negative, positive):
    y, expected = (selective_scan(**arguments(axis=axis)) for axis in (negative, positive))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("backend", available_backends())
def test_an_empty_batch_gives_an_empty_result(backend):
    empty = {
        name: value[:0] if value.dim() == 4 else value
        for name, value in arguments().items()
        if isinstance(value, torch.Tensor)
    }
    empty = {name: value.to(device_of(backend)) for name, value in empty.items()}
    assert selective_scan(**empty, axis=2, backend=backend).shape == (0, 3, 4, 5)


# ----------------------------------------------------------------------------- extreme values

HUGE, TINY, SUBNORMAL = 1e30, 1e-30, 1e-42
EVERYWHERE = [
    *[("u", value) for value in (0.0, HUGE, -HUGE, TINY, SUBNORMAL)],
    *[("dt", value) for value in (0.0, 20.0, 20.5, 1e4, HUGE, -20.0, -88.0, -104.0, -1e4, -HUGE)],
    *[("A", value) for value in (0.0, -0.0, -TINY, -SUBNORMAL, -100.0, -1e4, -HUGE, -3e38)],
    *[("B", value) for value in (0.0, HUGE, -HUGE, TINY)],
    *[("C", value) for value in (0.0, HUGE, -HUGE, SUBNORMAL)],
    *[("D", value) for value in (0.0, HUGE, -HUGE)],
    *[("z", value) for value in (0.0, 88.0, 1e4, HUGE, -88.0, -104.0, -1e4, -HUGE)],
    *[("dt_bias", value) for value in (0.0, 88.0, HUGE, -88.0, -HUGE)],
]
# One value of the grid, in the middle of a line.
AT_ONE_PIXEL = [
    (name, value)
    for name in ("u", "dt", "B", "C", "z")
    for value in (math.nan, math.inf, -math.inf)
]
GROWING = [("A", 1.0), ("A", 100.0), ("A", HUGE)]


def test_there_are_at_least_sixty_kinds():
    assert len(EVERYWHERE) + len(AT_ONE_PIXEL) + len(GROWING) >= 60


def extreme_inputs(backend):
    inputs = scan_inputs(torch.Generator().manual_seed(8), (2, 3, 9, 4), 5)
    return {name: value.float().to(device_of(backend)) for name, value in inputs.items()}


@pytest.mark.parametrize(("name", "value"), EVERYWHERE)
@pytest.mark.parametrize("backend", available_backends())
def test_extreme_values_give_what_float64_gives(backend, name, value):
    """Finite, output and gradients, wherever the float64 result fits in float32."""
    inputs = extreme_inputs(backend)
    inputs[name] = torch.full_like(inputs[name], value)
    results = {}
    for which, dtype in (("reference", torch.float64), (backend, torch.float32)):
        given = {n: x.to(dtype).requires_grad_() for n, x in inputs.items()}
        y = selective_scan(**given, axis=2, backend=which)
        gradients = torch.autograd.grad(y, list(given.values()), torch.ones_like(y))
        results[dtype] = {"y": y.detach(), **dict(zip(given, gradients))}
    for key, truth in results[torch.float64].items():
        got = results[torch.float32][key].double()
        assert torch.isfinite(truth).all(), key
        fits = truth.abs() < 1e37
        assert torch.isfinite(got[fits]).all(), key
        error = (got - truth)[fits].abs().max() if fits.any() else torch.zeros(())
        scale = truth[fits].abs().max() if fits.any() else 0
        assert error <= 1e-4 * scale + 1e-30, (key, float(error), float(scale))


@pytest.mark.parametrize(("name", "value"), AT_ONE_PIXEL)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backend", available_backends())
def test_a_bad_value_stays_on_its_line_and_behind_itself(backend, name, value, reverse):
    inputs = extreme_inputs(backend)
    clean = selective_scan(**inputs, axis=2, reverse=reverse, backend=backend)
    bad = {**inputs, name: inputs[name].clone()}
    bad[name][1, 1, 4] = value
    y = selective_scan(**bad, axis=2, reverse=reverse, backend=backend)
    untouched = torch.ones(y.shape, dtype=torch.bool)
    untouched[1, 1, slice(None, 5) if reverse else slice(4, None)] = False
    assert torch.equal(y.cpu()[untouched], clean.cpu()[untouched])
    if math.isnan(value):
        assert torch.isnan(y[1, 1, 4]).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backend", available_backends())
def test_nothing_passes_the_border_of_a_window(backend, value, reverse):
    """A bad input or gradient in the middle one of three windows leaves the others as they were."""
    inputs, inside = extreme_inputs(backend), slice(4, 8)

    def run(given, dy):
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
        y = selective_scan(**leaves, axis=2, reverse=reverse, window=4, backend=backend)
        gradients = torch.autograd.grad(
            y, [leaves[name] for name in ("u", "dt", "B", "C", "z")], dy
        )
        return [x.detach().cpu() for x in (y, *gradients)]

    dy = torch.ones_like(inputs["u"])
    clean = run(inputs, dy)
    for name in ("u", "B", "C", "z", None):
        bad, bad_dy = {**inputs}, dy.clone()
        if name is None:
            bad_dy[1, 1, 5] = value
        else:
            bad[name] = inputs[name].clone()
            bad[name][1, 1, 5] = value
        pairs = zip(run(bad, bad_dy), clean)
        changed = torch.stack([(got != wanted).any(-1) for got, wanted in pairs])  # (6, B, H, W)
        assert changed[:, 1, 1, inside].any()
        changed[:, 1, 1, inside] = False
        assert not changed.any(), name


@pytest.mark.parametrize(("name", "value"), GROWING)
@pytest.mark.parametrize("backend", available_backends())
def test_a_positive_A_grows_as_documented(backend, name, value):
    """Right as long as the state fits in float32, then infinite or NaN, never a wrong number."""
    inputs = extreme_inputs(backend)
    inputs[name] = torch.full_like(inputs[name], value)
    y = selective_scan(**inputs, axis=2, backend=backend).double().cpu()
    double = {n: x.double() for n, x in inputs.items()}
    truth = selective_scan(**double, axis=2, backend="eager").cpu()
    fits = torch.isfinite(y)
    torch.testing.assert_close(y[fits], truth[fits], rtol=1e-3, atol=1e-3)
    if value == 1:
        assert fits.all()
    else:
        assert not fits[:, :, -1].all()
