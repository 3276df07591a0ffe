"""The core of a mixer: geometry by pixel ids, and the numbers against independent loops.

Here the core is made exact: with the weights of `tracing_weights` every nonlinearity is the
identity on its inputs and every scan a running sum, so that with a power of two as the id of each
pixel the result of one direction is, exactly, the set of pixels that reach each pixel.
"""

import re

import numpy as np
import pytest
import torch

from helpers import available_backends, device_of, relative_error, scan_loops
from triton_cases import make_core
from v2m.errors import InputError
from v2m.layers import SCANS, get_scan
from v2m.ops.core import Direction, PassWeights, Sweep, causal_conv, distinct_sweeps, mixer_core

LARGE = 64.0  # silu and softplus are the identity from here on, in float64 to the last bit


def tracing_weights(channel: str) -> PassWeights:
    """Two channels, ids and the constant 64, from which `channel`, B or C, is made 1."""
    zero = torch.zeros
    conv = torch.tensor([[0.0, 0, 0, 1], [0, 0, 0, 1]], dtype=torch.float64)
    x_proj = torch.tensor([[0.0, 0.0], [0.0, 1 / LARGE]], dtype=torch.float64)  # rows: dt, B or C
    assert channel in "BC"
    return PassWeights(
        conv_weight=conv,
        conv_bias=zero(2, dtype=torch.float64),
        x_proj=x_proj,
        dt_proj=zero(2, 1, dtype=torch.float64),
        dt_bias=torch.tensor([LARGE, -1e4], dtype=torch.float64),  # softplus: 64, and 0
        A_log=torch.full((2, 1), -float("inf"), dtype=torch.float64),  # A = 0: nothing decays
        D=torch.tensor([0.0, 1 / LARGE], dtype=torch.float64),  # the constant stays what it is
    )


def pixel_sets(height: int, width: int, directions, transpose=False, backend="eager") -> np.ndarray:
    """For each pixel of the result, the sum over the directions of the ids that reach it."""
    ids = 2.0 ** torch.arange(height * width, dtype=torch.float64).reshape(1, height, width)
    u = torch.stack([LARGE * ids, torch.full_like(ids, LARGE)], dim=-1)  # (1, H, W, 2)
    z = torch.full_like(u, LARGE)
    first, second = tracing_weights("B"), tracing_weights("C")
    y = mixer_core(u, z, first, second, directions, transpose=transpose, backend=backend)
    scale = LARGE * (LARGE * LARGE) ** 2 * 2 / len(directions)
    sets = (y[0, :, :, 0] / scale).numpy()
    assert (sets == np.round(sets)).all()
    return sets.astype(np.int64)


def quadrant(height, width, row, column, from_left: bool, downwards: bool) -> int:
    """The ids of the pixels between a corner and (row, column), as a bit mask, by definition."""
    return sum(
        1 << (i * width + j)
        for i in range(height)
        for j in range(width)
        if (i <= row if downwards else i >= row) and (j <= column if from_left else j >= column)
    )


def quadrants(height, width, from_left, downwards) -> np.ndarray:
    return np.array(
        [
            [quadrant(height, width, i, j, from_left, downwards) for j in range(width)]
            for i in range(height)
        ]
    )


GRIDS = [(1, 1), (1, 6), (6, 1), (4, 6), (5, 7), (7, 3)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("from_left", [True, False])
@pytest.mark.parametrize("downwards", [True, False])
@pytest.mark.parametrize("columns_first", [False, True])
def test_each_direction_sees_exactly_its_quadrant(
    grid, backend, from_left, downwards, columns_first
):
    along_row, along_column = Sweep(2, not from_left), Sweep(1, not downwards)
    sweeps = (along_column, along_row) if columns_first else (along_row, along_column)
    sets = pixel_sets(*grid, (Direction(*sweeps),), backend=backend)
    assert (sets == quadrants(*grid, from_left, downwards)).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_corners_are_the_four_quadrants_mapped_back(grid):
    scan = get_scan("corners")
    assert len(set(scan.directions)) == 4
    assert not scan.transpose
    expected = sum(quadrants(*grid, left, down) for left in (True, False) for down in (True, False))
    assert (pixel_sets(*grid, scan.directions) == expected).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_the_scans_for_ablations(grid):
    top_left, bottom_right = quadrants(*grid, True, True), quadrants(*grid, False, False)
    assert (pixel_sets(*grid, get_scan("corner").directions) == top_left).all()
    both = pixel_sets(*grid, get_scan("opposite_corners").directions)
    assert (both == top_left + bottom_right).all()
    expected = 2 * top_left + quadrants(*grid, False, True) + quadrants(*grid, True, False)
    assert (pixel_sets(*grid, get_scan("release_aligned").directions) == expected).all()
    for name in ("corner", "opposite_corners", "release_aligned"):
        assert not get_scan(name).transpose


@pytest.mark.parametrize("side", [1, 2, 5])
def test_release_is_the_published_misalignment_exactly(side):
    """T(y1 + y2 + flipH y3 + flipW y4): two reversed directions mirrored, the sum transposed."""
    left_down = quadrants(side, side, True, True)  # y1, and y2: column down, then row from left
    right_down = quadrants(side, side, False, True)  # y3: row from right, column down
    left_up = quadrants(side, side, True, False)  # y4: column up, row from left
    expected = (2 * left_down + right_down[::-1, :] + left_up[:, ::-1]).T
    scan = get_scan("release")
    assert scan.transpose
    assert (pixel_sets(side, side, scan.directions, transpose=True) == expected).all()


def test_release_never_starts_at_the_bottom_right():
    assert Sweep(2, True) not in [
        d.first for d in SCANS["release"].directions if d.second == Sweep(1, True)
    ]
    for direction in SCANS["release"].directions:
        assert not (direction.first.reverse and direction.second.reverse)


def test_a_core_with_transpose_swaps_height_and_width():
    sets = pixel_sets(2, 3, get_scan("corner").directions)
    swapped = pixel_sets(2, 3, get_scan("corner").directions, transpose=True)
    assert (swapped == sets.T).all()


def test_windows_of_a_sweep_bound_what_a_direction_sees():
    """Rows in windows of 2, columns in windows of 3, aligned to the grid."""
    height, width = 4, 5
    direction = Direction(Sweep(2, False, 2), Sweep(1, True, 3))
    expected = np.array(
        [
            [
                sum(
                    1 << (i * width + j)
                    for i in range(row, min(height, (row // 3 + 1) * 3))
                    for j in range((column // 2) * 2, column + 1)
                )
                for column in range(width)
            ]
            for row in range(height)
        ]
    )
    assert (pixel_sets(height, width, (direction,)) == expected).all()


def test_shared_first_sweeps_run_once():
    directions = get_scan("corners").directions
    assert distinct_sweeps(directions) == (Sweep(2), Sweep(2, True))
    assert len(distinct_sweeps(get_scan("release").directions)) == 4


# ----------------------------------------------------------------------------- numbers


def random_weights(generator, inner: int, states: int, rank: int, width: int) -> PassWeights:
    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    return PassWeights(
        normal(inner, width, scale=0.5),
        normal(inner, scale=0.3),
        normal(rank + states, inner, scale=inner**-0.5),
        normal(inner, rank),
        normal(inner, scale=0.5) - 2,
        normal(inner, states, scale=0.3),
        normal(inner),
    )


def convolution_loops(u, weight, bias, axis, reverse):
    """y[p] = bias + sum_k weight[last - k] u[p - k in scan order], one pixel after another."""
    y, width = np.zeros(u.shape), weight.shape[1]
    for b, i, j in np.ndindex(u.shape[:3]):
        y[b, i, j] = bias
        for back in range(width):
            p = (i if axis == 1 else j) + (back if reverse else -back)
            if 0 <= p < u.shape[axis]:
                at = (b, p, j) if axis == 1 else (b, i, p)
                y[b, i, j] += weight[:, width - 1 - back] * u[at]
    return y


def core_loops(u, z, first, second, directions, transpose):
    """The equations of a mixer in numpy, direction by direction, nothing shared."""

    def one_pass(x, w, sweep, is_first):
        x = convolution_loops(x, w.conv_weight, w.conv_bias, sweep.axis, sweep.reverse)
        x = x / (1 + np.exp(-x))
        rank = w.dt_proj.shape[1]
        projected = x @ w.x_proj.T
        dt, free = projected[..., :rank] @ w.dt_proj.T, projected[..., rank:]
        B, C = (free, None) if is_first else (None, free)
        A, window = -np.exp(w.A_log), sweep.window or None
        arguments = (x, dt, A, B, C, w.D, z, w.dt_bias, True, sweep.axis, sweep.reverse, window)
        return scan_loops(*arguments)

    total = 0
    for direction in directions:
        y = one_pass(one_pass(u, first, direction.first, True), second, direction.second, False)
        total = total + np.flip(y, direction.mirror)
    total = total * 2 / len(directions)
    return total.transpose(0, 2, 1, 3) if transpose else total


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("name", list(SCANS))
@pytest.mark.parametrize("grid", [(1, 5), (4, 1), (3, 6), (4, 4)])
def test_equals_the_equations_in_loops(backend, name, grid):
    scan = get_scan(name)
    generator = torch.Generator().manual_seed(5)
    u = torch.randn(2, *grid, 6, generator=generator, dtype=torch.float64)
    z = torch.randn(2, *grid, 6, generator=generator, dtype=torch.float64)
    first, second = (random_weights(generator, 6, 4, 2, 4) for _ in range(2))
    y = mixer_core(u, z, first, second, scan.directions, transpose=scan.transpose, backend=backend)
    as_numpy = [PassWeights(*(w.numpy() for w in weights)) for weights in (first, second)]
    expected = core_loops(u.numpy(), z.numpy(), *as_numpy, scan.directions, scan.transpose)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-11, atol=1e-12)


WINDOWS = (
    Direction(Sweep(2, True, 2), Sweep(1, False, 3)),
    Direction(Sweep(2), Sweep(1, True, 3), (1, 2)),
    Direction(Sweep(2, True), Sweep(1, True)),
)


@pytest.mark.parametrize("directions", [*(s.directions for s in SCANS.values()), WINDOWS])
@pytest.mark.parametrize("gated", [False, True])
def test_what_an_exported_program_computes_side_by_side(directions, gated):
    from v2m.ops.exported import compose

    generator = torch.Generator().manual_seed(5)
    u, z = torch.randn(2, 2, 5, 5, 6, generator=generator, dtype=torch.float64)
    first, second = (random_weights(generator, 6, 4, 2, 4) for _ in range(2))
    inputs = (u, z if gated else None, first, second, directions)
    torch.testing.assert_close(compose(*inputs), mixer_core(*inputs, backend="eager"))


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_convolution_is_causal_in_scan_order(axis, reverse, width):
    generator = torch.Generator().manual_seed(6)
    u = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    y = causal_conv(u, weight, bias, axis, reverse)
    expected = convolution_loops(u.numpy(), weight.numpy(), bias.numpy(), axis, reverse)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-13, atol=1e-14)


CORE_CASES = [
    ("corners", (5, 7)),
    ("corners", (1, 6)),
    ("corners", (6, 1)),
    ("corner", (3, 4)),
    ("opposite_corners", (4, 3)),
    ("release_aligned", (4, 5)),
    ("release", (5, 5)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "grid"), CORE_CASES)
@pytest.mark.parametrize("backend", available_backends()[1:])
def test_output_and_every_gradient_by_name(backend, name, grid, dtype):
    """At most twice as far from the float64 truth as the reference in that type.

    Parameters stay in float32, as under autocast. The weights' gradients are rounded to bfloat16
    between matrix products, in an order that is the backend's own: the allowance is per tensor.
    """
    scan, inner, states, rank = get_scan(name), 16, 8, 2
    generator = torch.Generator().manual_seed(7)
    u, z, dy = (
        torch.randn(2, *grid, inner, generator=generator, dtype=torch.float64).to(dtype).double()
        for _ in range(3)
    )  # rounded first: what the type costs the inputs is nobody's error
    weights = [random_weights(generator, inner, states, rank, 4) for _ in range(2)]
    dy = dy.transpose(1, 2) if scan.transpose else dy

    def gradients(which: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        device = device_of(which)
        parameter_dtype = torch.promote_types(dtype, torch.float32)
        grids = [x.to(device, dtype).requires_grad_() for x in (u, z)]
        passes = [
            PassWeights(*(w.to(device, parameter_dtype).requires_grad_() for w in one))
            for one in weights
        ]
        y = mixer_core(*grids, *passes, scan.directions, transpose=scan.transpose, backend=which)
        assert y.dtype == dtype
        names = ["u", "z", *(f"{p}.{n}" for p in ("first", "second") for n in PassWeights._fields)]
        inputs = [*grids, *passes[0], *passes[1]]
        got = torch.autograd.grad(y, inputs, dy.to(device, dtype))
        assert [g.dtype for g in got] == [x.dtype for x in inputs]
        return {"y": y.detach().cpu(), **{n: g.cpu() for n, g in zip(names, got)}}

    truth = gradients("reference", torch.float64)
    yardstick = gradients("reference", dtype)
    results = gradients(backend, dtype)
    assert len(results) == 1 + 2 + 2 * 7
    trifle = max(torch.finfo(dtype).eps / 4, 4 * torch.finfo(torch.float32).eps)
    for key, expected in truth.items():
        error = relative_error(results[key], expected)
        allowed = 2 * relative_error(yardstick[key], expected) + trifle
        assert error <= allowed, (key, error, allowed)


WRONG = {
    "u of three dimensions": ({"u": torch.zeros(2, 3, 8)}, "`u` and `z` must both be (B, H, W, E)"),
    "another z": ({"z": torch.zeros(1, 2, 2, 8)}, "got (1, 3, 4, 8) and (1, 2, 2, 8)."),
    "more channels": (
        {"u": torch.zeros(1, 3, 4, 24), "z": None},
        "`conv_weight` of the first pass must be of shape (24, 4); got (8, 4).",
    ),
    "x_proj": (
        {"x_proj": torch.zeros(12, 8)},
        "`x_proj` of the second pass must be of shape (5, 8); got (12, 8).",
    ),
    "A_log": ({"A_log": torch.zeros(9, 2)}, "must be of shape (8, 2); got (9, 2)."),
    "D": ({"D": torch.zeros(7)}, "`D` of the second pass must be of shape (8,); got (7,)."),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("backend", [None, "eager"])
def test_shapes_that_do_not_fit(case, backend):
    u, z, _, first, second = make_core((1, 3, 4, 8), 2, 3, torch.float32, "cpu")
    changes, message = WRONG[case]
    grids = {"u": u, "z": z, **{k: v for k, v in changes.items() if k in "uz"}}
    second = second._replace(**{k: v for k, v in changes.items() if k not in "uz"})
    with pytest.raises(InputError, match=re.escape(message)):
        mixer_core(
            grids["u"], grids["z"], first, second, (Direction(Sweep(2), Sweep(1)),),
            backend=backend,
        )  # fmt: skip
