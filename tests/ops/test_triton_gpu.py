"""The Triton backend on a CUDA device: `pytest -m gpu tests/ops/test_triton_gpu.py`."""

import numpy as np
import pytest
import torch
from torch.library import opcheck

import v2m
from triton_cases import (
    CORE_NAMES,
    CORNERS,
    assert_accurate,
    core_errors,
    core_gradients,
    make_core,
    make_weights,
    norm_errors,
    scan_errors,
    ungated_errors,
)
from v2m.ops import selective_scan
from v2m.ops.core import PassWeights, mixer_core

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ALL = ("B", "C", "D", "z", "dt_bias")
TRIFLE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.mark.parametrize("dtype", TRIFLE, ids=str)
@pytest.mark.parametrize(
    ("shape", "states", "axis", "reverse", "window", "given"),
    [
        ((2, 14, 14, 96), 16, 1, False, None, ALL),
        ((1, 1, 63, 33), 16, 2, True, None, ("B", "z")),
        ((2, 7, 1, 40), 1, 1, True, 3, ("C", "D", "dt_bias")),
        ((1, 3, 33, 64), 8, 2, False, 7, ("B", "C")),
        ((1, 5, 4, 48), 32, 1, False, None, ALL),
        ((1, 2, 300, 64), 4, 2, False, None, ()),
        # Windows of which some have more states than fit in shared memory, and some have not.
        ((2, 3, 300, 64), 16, 2, True, 130, ("B",)),
        ((2, 300, 2, 64), 16, 1, False, 130, ("C", "D")),
        ((1, 2, 300, 40), 16, 2, True, 130, ALL),
    ],
)
def test_scan(shape, states, axis, reverse, window, given, dtype):
    errors = scan_errors(shape, states, axis, reverse, window, given, dtype, "cuda")
    assert_accurate(errors, TRIFLE[dtype])


@pytest.mark.parametrize("given", [ALL, ("B", "z"), ("C", "D", "dt_bias")], ids="-".join)
@pytest.mark.parametrize("states", [1, 16])
@pytest.mark.parametrize("dtype", TRIFLE, ids=str)
def test_two_thousand_random_scans(dtype, states, given):
    """18 combinations of 112: sizes, strides, both axes and senses, windows; all gradients."""
    random = np.random.default_rng([states, len(given)])
    for _ in range(112):
        shape = tuple(int(x) for x in random.integers(1, (3, 9, 9, 70)))
        axis, reverse = int(random.integers(1, 3)), bool(random.integers(2))
        window = [None, None, 1, 2, 4, 5][random.integers(6)]
        errors = scan_errors(shape, states, axis, reverse, window, given, dtype, "cuda")
        assert_accurate(errors, 2 * TRIFLE[dtype])


@pytest.mark.parametrize("dtype", TRIFLE, ids=str)
@pytest.mark.parametrize(
    ("shape", "states", "rank", "scan"),
    [
        ((2, 14, 14, 384), 16, 12, "corners"),
        ((2, 7, 7, 96), 16, 6, "release"),
        ((1, 5, 9, 40), 3, 2, "windows"),
        ((1, 9, 6, 48), 1, 3, "one"),
    ],
)
def test_core(shape, states, rank, scan, dtype):
    assert_accurate(core_errors(shape, states, rank, scan, dtype, "cuda"), TRIFLE[dtype])


@pytest.mark.parametrize("dtype", TRIFLE, ids=str)
@pytest.mark.parametrize(
    ("shape", "states", "scan"),
    [
        ((2, 14, 14, 192), 1, "corners"),
        ((2, 7, 7, 96), 1, "release"),
        ((1, 5, 9, 40), 3, "windows"),
    ],
)
def test_core_without_gate_and_convolutions(shape, states, scan, dtype):
    errors = ungated_errors(shape, states, 6, scan, dtype, "cuda")
    assert_accurate(errors, 2 * TRIFLE[dtype])


@pytest.mark.parametrize("dtype", TRIFLE, ids=str)
@pytest.mark.parametrize("shape", [(2, 14, 14, 192), (3000, 1536), (5, 7), (1, 3)], ids=str)
def test_norm(shape, dtype):
    assert_accurate(norm_errors(shape, torch.float32, dtype, "cuda"), TRIFLE[dtype])
    assert_accurate(norm_errors(shape, dtype, dtype, "cuda"), TRIFLE[dtype])


def every_tile():
    from v2m.ops.triton.launch import TILES

    return [(kernel, i) for kernel, tiles in TILES.items() for i in range(1, len(tiles))]


@pytest.mark.parametrize(
    "shape",
    [(2, 5, 9, 96), (2, 6, 8, 128), (8, 93, 120, 32)],
    ids=["odd", "even", "many long lines"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kernel", "choice"), every_tile() if torch.cuda.is_available() else [])
def test_every_launch_that_may_be_chosen(kernel, choice, dtype, shape, monkeypatch):
    from v2m.ops.triton.launch import TILES

    monkeypatch.setitem(TILES, kernel, (TILES[kernel][choice],))
    assert_accurate(core_errors(shape, 16, 6, "corners", dtype, "cuda"), TRIFLE[dtype])


@pytest.mark.parametrize("dtype", TRIFLE, ids=str)
@pytest.mark.parametrize("shape", [(2, 78, 40, 96), (1, 66, 33, 40)], ids=["even", "odd"])
def test_long_lines(shape, dtype):
    assert_accurate(core_errors(shape, 16, 6, "corners", dtype, "cuda"), TRIFLE[dtype])


def test_a_line_of_16384_steps():
    errors = scan_errors((1, 1, 16384, 32), 4, 2, False, None, ("B", "C"), device="cuda")
    assert_accurate(errors, 1e-5)


@pytest.mark.parametrize("axis", [1, 2])
def test_tensors_past_two_to_the_31(axis):
    """The last image of a large batch equals the same image on its own."""
    shape = (2**31 // (64 * 64 * 512) + 2, 64, 64, 512)  # 2.15e9 elements
    u = torch.full(shape, 0.5, dtype=torch.bfloat16, device="cuda")
    u[-1].normal_()
    A = -torch.rand(512, 4, device="cuda") - 0.1
    with torch.no_grad():
        y = selective_scan(u, u, A, axis=axis, backend="triton")
        alone = selective_scan(u[-1:], u[-1:], A, axis=axis, backend="triton")
    assert u.numel() > 2**31
    assert torch.equal(y[-1:], alone)


def test_a_core_past_two_to_the_31():
    shape = (2**31 // (64 * 64 * 512) + 2, 64, 64, 512)
    u = torch.full(shape, 0.5, dtype=torch.bfloat16, device="cuda")
    u[-1].normal_()
    first, second = (make_weights(512, 1, 1, 4, "cuda") for _ in range(2))
    with torch.no_grad():
        y = mixer_core(u, u, first, second, CORNERS[3:])
        alone = mixer_core(u[-1:], u[-1:], first, second, CORNERS[3:])
    assert torch.equal(y[-1:], alone)


@pytest.mark.parametrize("axis", [1, 2])
def test_gradients_past_two_to_the_31(axis):
    shape = (2**31 // (64 * 64 * 512) + 2, 64, 64, 512)
    u = torch.full(shape, 0.5, dtype=torch.bfloat16, device="cuda")
    u[-1].normal_()
    A = -torch.rand(512, 1, device="cuda") - 0.1
    large, alone = (x.detach().requires_grad_() for x in (u, u[-1:].clone()))
    dy = torch.ones((), dtype=u.dtype, device="cuda")
    for leaf in (large, alone):
        dt = torch.ones_like(leaf, requires_grad=False)
        selective_scan(leaf, dt, A, axis=axis, backend="triton").backward(dy.expand_as(leaf))
    assert torch.equal(large.grad[-1:], alone.grad)


def test_gradients_are_bit_equal_from_run_to_run():
    case = make_core((4, 14, 14, 384), 16, 12, torch.bfloat16, "cuda")
    first = core_gradients(*case, CORNERS)
    for _ in range(100):
        for name, a, b in zip(("y", *CORE_NAMES), first, core_gradients(*case, CORNERS)):
            assert torch.equal(a, b), name


def test_one_bad_image_leaves_the_others_bit_equal():
    u, z, _, first, second = make_core((4, 7, 9, 96), 16, 6, torch.bfloat16, "cuda")
    good = mixer_core(u, z, first, second, CORNERS)
    u = u.clone()
    u[1] = torch.nan
    bad = mixer_core(u, z, first, second, CORNERS)
    assert torch.equal(bad[[0, 2, 3]], good[[0, 2, 3]])
    assert bad[1].isnan().all()


EXTREMES = ["u", "z", "dy", "D", "x_proj", "conv_weight", "A_log", "-A_log", "dt_bias", "-dt_bias"]


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-8, 30.0, 100.0, 1000.0])
def test_extreme_values_stay_finite(size, name):
    u, z, dy, first, second = make_core((1, 5, 6, 64), 16, 4, torch.bfloat16, "cuda")
    key, sign = name.lstrip("-"), -1 if name.startswith("-") else 1
    grids = {"u": u, "z": z, "dy": dy}
    if key in ("A_log", "dt_bias"):
        largest = 20.0 if key == "A_log" else 1000.0
        value = torch.full_like(getattr(first, key), sign * min(size, largest))
        first = first._replace(**{key: value})
    elif key in grids:
        grids[key] = grids[key] * size
    else:
        first = first._replace(**{key: getattr(first, key) * size})
    found = core_gradients(*grids.values(), first, second, CORNERS)
    for part, value in zip(("y", *CORE_NAMES), found):
        assert value.isfinite().all(), part


def test_opcheck():
    """Schema, fake and autograd registration, and tracing with dynamic shapes."""
    from v2m.ops import library

    u, z, _, first, second = make_core((1, 3, 5, 32), 4, 2, torch.float32, "cuda")
    grids = [x.detach().requires_grad_() for x in (u, z)]
    weights = [[x.requires_grad_() for x in weights] for weights in (first, second)]
    encoded = library._encode(CORNERS)
    opcheck(torch.ops.v2m.mixer_core.default, (*grids, *weights, encoded, "triton"))
    A = first.A_log.detach().neg().requires_grad_()
    rest = (None, None, None, None, None, True, 1, False, None, "triton")
    opcheck(torch.ops.v2m.selective_scan.default, (*grids, A, *rest))
    weight = torch.rand(32, device="cuda", requires_grad=True)
    opcheck(torch.ops.v2m.rms_norm.default, (grids[0], weight, 1e-5, torch.bfloat16))


def test_chosen_on_cuda_and_compiled_whole():
    """The same numbers compiled, without a graph break, at more than one size."""
    _, _, _, first, second = make_core((1, 3, 5, 32), 4, 2, torch.float32, "cuda")
    assert v2m.ops.backend.choose_backend(None, first.D) == "triton"

    def core(u, z):
        return mixer_core(u, z, first, second, CORNERS).sin()

    compiled = torch.compile(core, fullgraph=True, dynamic=True)
    for shape in ((1, 3, 5, 32), (2, 6, 4, 32), (1, 7, 7, 32)):
        u, z = (torch.randn(shape, device="cuda", requires_grad=True) for _ in "uz")
        torch.testing.assert_close(compiled(u, z), core(u, z))


def test_captured_in_a_graph():
    u, z, _, first, second = make_core((2, 7, 7, 96), 16, 6, torch.bfloat16, "cuda")
    with torch.no_grad():
        wanted = mixer_core(u, z, first, second, CORNERS)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = mixer_core(u, z, first, second, CORNERS)
        found.zero_()
        graph.replay()
    assert torch.equal(found, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_the_current_one():
    case = make_core((1, 5, 6, 64), 4, 4, torch.float32, "cuda:0")
    there = [x.to("cuda:1") for x in case[:3]]
    there += [PassWeights(*(x.to("cuda:1") for x in weights)) for weights in case[3:]]
    for a, b in zip(core_gradients(*case, CORNERS), core_gradients(*there, CORNERS)):
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("seed", range(5))
def test_training_in_bfloat16_stays_finite_and_close_to_float32(seed):
    def losses(dtype):
        torch.manual_seed(seed)
        model = v2m.create_model("v2m_nano_patch4_28", num_classes=10, in_chans=1).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        generator = torch.Generator("cuda").manual_seed(seed)
        images = torch.randn(256, 1, 28, 28, device="cuda", generator=generator)
        labels = images.mean((1, 2, 3)).argsort().argsort() * 10 // 256
        found = []
        for _ in range(500):
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        return torch.stack(found).cpu()

    low, full = losses(torch.bfloat16), losses(torch.float32)
    assert low.isfinite().all()
    assert abs(float(low[-50:].mean() - full[-50:].mean())) < 0.1
