"""What the CPU kernels could get wrong and the tests of every backend would not show.

Lines longer than the pieces they are worked off in, windows across the borders of these, channels
and states that fill no vector, memory full of rubbish, grids too large for 32-bit offsets.
"""

import numpy as np
import pytest
import torch

from helpers import relative_error, scan_inputs
from v2m.ops.core import PassWeights, mixer_core

pytest.importorskip("numba")
from cpu_cases import NAMES, RELEASE, by_kernels, corners, make_case
from v2m.ops import reference, selective_scan
from v2m.ops.cpu import scan_backward, scan_forward
from v2m.ops.cpu.backward import SAVED_CHUNK
from v2m.ops.cpu.jobs import token_pitch
from v2m.ops.cpu.layout import CHUNK


def by_autograd(backend, dtype, u, z, dy, first, second, directions):
    """Output and gradients of one backend, by name."""
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (u, z, *first, *second)]
    passes = PassWeights(*leaves[2:9]), PassWeights(*leaves[9:])
    y = mixer_core(leaves[0], leaves[1], *passes, directions, backend=backend)
    gradients = torch.autograd.grad(y, leaves, dy.to(dtype))
    return {"y": y.detach(), **dict(zip(NAMES, gradients))}


def assert_right(u, z, dy, first, second, directions):
    truth = by_autograd("reference", torch.float64, u, z, dy, first, second, directions)
    yardsticks = [
        by_autograd(backend, torch.float32, u, z, dy, first, second, directions)
        for backend in ("reference", "eager")
    ]
    results = by_kernels(u, z, dy, first, second, directions)
    assert results.keys() == truth.keys()
    for name, expected in truth.items():
        error = relative_error(results[name], expected)
        # A parameter's gradient is a sum over the grid, whose terms may cancel.
        trifle = 1e-6 if name in ("y", "u", "z") else 4e-6
        allowed = 2 * max(relative_error(y[name], expected) for y in yardsticks) + trifle
        assert error <= allowed, (name, error, allowed)


@pytest.mark.parametrize(
    ("first_window", "second_window"), [(0, 0), (1, 1), (30, 7), (SAVED_CHUNK, CHUNK), (999, 2)]
)
def test_lines_and_windows_across_the_pieces_of_a_line(first_window, second_window):
    case = make_case(1, CHUNK + 3, 2 * SAVED_CHUNK + 5, 3)
    assert_right(*case, corners(first_window, second_window))


@pytest.mark.parametrize("directions", [corners(), corners(3, 2), RELEASE])
@pytest.mark.parametrize("inner", [1, 15, 16, 40])
def test_any_number_of_channels(directions, inner):
    assert_right(*make_case(2, 5, 7, inner), directions)


@pytest.mark.parametrize("states", [1, 2, 3, 4, 5, 7, 8, 16, 30, 64])
def test_any_number_of_states(states):
    assert_right(*make_case(1, 3, 5, 20, states=states, rank=3), corners())


@pytest.mark.parametrize(("rank", "taps"), [(1, 1), (2, 2), (5, 3), (17, 6)])
def test_any_rank_and_width_of_convolution(rank, taps):
    assert_right(*make_case(1, 4, 4, 20, rank=rank, taps=taps), RELEASE)


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("given", [("B", "C", "D", "dt_bias", "z"), ("B",), ()], ids="-".join)
def test_the_default_dtype_is_nothing_to_the_kernels(default_dtype, given):
    inputs = scan_inputs(torch.Generator().manual_seed(0), (2, 3, 70, 20), 6)
    inputs = {k: x.float() for k, x in inputs.items() if k in ("u", "dt", "A", *given)}

    def run():
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        y = selective_scan(**leaves, axis=2, backend="cpu")
        return y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))

    expected = run()
    torch.set_default_dtype(default_dtype)
    assert all(map(torch.equal, run(), expected))


@pytest.mark.parametrize("gated", [True, False])
def test_nor_to_a_core(default_dtype, gated):
    u, z, dy, first, second = make_case(2, 5, 7, 20)
    if not gated:
        z, first, second = (
            None,
            PassWeights(None, None, *first[2:]),
            PassWeights(None, None, *second[2:]),
        )

    def run():
        leaves = [x.clone().requires_grad_() for x in (u, *first[2:], *second[2:])]
        passes = PassWeights(*first[:2], *leaves[1:6]), PassWeights(*second[:2], *leaves[6:])
        y = mixer_core(leaves[0], z, *passes, corners(), backend="cpu")
        return y, *torch.autograd.grad(y, leaves, dy)

    expected = run()
    torch.set_default_dtype(default_dtype)
    assert all(map(torch.equal, run(), expected))


def test_halves_of_a_tensor_are_read_in_place():
    u, z, *rest = make_case(2, 3, 4, 32)
    both = torch.cat([u, z], -1)
    halves = both.split(32, -1)
    assert [token_pitch(half) for half in halves] == [64, 64]
    expected, results = by_kernels(u, z, *rest, corners()), by_kernels(*halves, *rest, corners())
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_new_contiguous_tensors_of_the_arguments_types(dtype):
    u, z, dy, first, second = make_case(2, 3, 4, 20)
    u, z, dy = u.to(dtype), z.to(dtype), dy.to(dtype)
    results = by_kernels(u, z, dy, first, second, corners())
    for name, like in zip(("y", *NAMES), (u, u, z, *first, *second)):
        result = results[name]
        assert result.shape == like.shape, name
        assert result.dtype == like.dtype, name
        assert result.is_contiguous(), name
        assert torch.isfinite(result).all(), name


def test_memory_is_written_before_it_is_read():
    """Fresh memory is filled with NaN; the kernels' own scratch as well, by a call before."""
    case = make_case(2, 5, 7, 20)
    expected = by_kernels(*case, corners(3, 2))
    nan = torch.full_like(case[0], float("nan"))
    by_kernels(nan, nan, nan, *case[3:], corners())
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        results = by_kernels(*case, corners(3, 2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


@pytest.mark.parametrize("name", ["u", "z", "dy"])
def test_a_bad_image_leaves_the_others_bit_equal(name):
    u, z, dy, first, second = make_case(3, 4, 5, 16)
    expected = by_kernels(u, z, dy, first, second, corners())
    bad = {"u": u.clone(), "z": z.clone(), "dy": dy.clone()}
    bad[name][1, 2, 3] = float("nan")
    results = by_kernels(**bad, first=first, second=second, directions=corners())
    assert results["u"][1].isnan().any()
    for key in ("y", "u", "z"):
        for image in (0, 2):
            assert torch.equal(results[key][image], expected[key][image]), key


def test_an_empty_batch():
    results = by_kernels(*make_case(0, 3, 4, 16), corners())
    assert results["y"].shape == (0, 3, 4, 16)
    assert not any(results[name].any() for name in NAMES)
    y = scan_forward(
        torch.empty(0, 2, 3, 8), torch.empty(0, 2, 3, 8), -torch.ones(8, 4), None, None, None, None,
        None, True, 2, False, None,
    )  # fmt: skip
    assert y.shape == (0, 2, 3, 8)


@pytest.mark.parametrize("softplus", [True, False])
def test_extreme_step_sizes_stay_finite_and_right(softplus):
    """From steps that change nothing to steps that forget everything; no overflow on the way."""
    dt = torch.tensor([-200.0, -80.0, -20.0, -1.0, 0.0, 1.0, 20.0, 80.0, 1e4, 1e30])
    dt = (
        (dt if softplus else dt.abs()).repeat(2).view(1, 1, 20, 1).expand(1, 1, 20, 16).contiguous()
    )
    u = torch.randn(1, 1, 20, 16) * 1e-6
    A = -torch.logspace(-3, 3, 5).expand(16, 5)
    arguments = (u, dt, A, None, None, None, None, None, softplus, 2, False, None)
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in arguments]
    expected = reference.selective_scan(*wide)
    y = scan_forward(*arguments)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=1e-20)
    gradients = scan_backward(torch.ones_like(y), *arguments)
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)


def test_offsets_beyond_two_to_the_31():
    """Tokens half a gigabyte apart: all but a few pages of the memory are never there."""
    pitch, tokens = 1 << 28, 10
    memory = torch.from_numpy(np.empty(pitch * tokens, np.int16)).view(torch.bfloat16)
    u = memory.as_strided((1, 2, tokens // 2, 16), (pitch * tokens, pitch * tokens // 2, pitch, 1))
    assert token_pitch(u) == pitch
    assert (tokens - 1) * pitch > 2**31
    u.copy_(torch.randn(u.shape))
    near = u.clone()
    dt = torch.rand(u.shape).bfloat16()
    rest = (-torch.ones(16, 2), None, None, None)
    far_y = scan_forward(u, dt, *rest, u, None, True, 1, True, None)
    near_y = scan_forward(near, dt, *rest, near, None, True, 1, True, None)
    assert torch.equal(far_y, near_y)
    assert far_y.float().std() > 0.1


def test_functions_are_right_to_the_last_bits():
    from numba import njit

    from v2m.ops.cpu import functions, powers, vector

    x = np.r_[np.linspace(-60, 60, 100001), np.linspace(-1, 1, 9999), -(10.0 ** np.arange(-30, 2))]
    x = np.resize(x, -(-x.size // vector.LANES) * vector.LANES).astype(np.float32)
    exact = x.astype(np.float64)
    lanes, names = vector.LANES, {"exp2": powers.exp2, "exp": powers.exp}
    names.update(sigmoid=functions.sigmoid, softplus=functions.softplus)
    expected = {
        "exp2": np.exp2(exact),
        "exp": np.exp(exact),
        "sigmoid": 1 / (1 + np.exp(-exact)),
        "softplus": np.logaddexp(0, exact),
    }
    for name, function in names.items():

        @njit
        def apply(source, target, count, function=None, run=function):
            for i in range(0, count, lanes):
                vector.store(target + 4 * i, run(vector.load(source + 4 * i)))

        result = np.empty_like(x)
        apply(x.ctypes.data, result.ctypes.data, x.size)
        error = np.abs(result - expected[name]) / expected[name]
        assert error.max() < 3e-7, (name, error.max(), x[error.argmax()])
        assert np.sqrt((error**2).mean()) < 1e-7, name
