"""The Triton kernels in Triton's interpreter: every kernel, every gradient by its name.

They run in a process of their own, where the interpreter is on before Triton is imported.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from v2m.errors import InputError
from v2m.ops import selective_scan
from v2m.ops.backend import is_available

import triton_cases  # isort: skip

pytestmark = pytest.mark.skipif(not is_available("triton"), reason="Triton is not installed")


@pytest.fixture(scope="module")
def interpreter():
    """Calls a function of `triton_cases` where Triton interprets its kernels."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()
    if before is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = before


@pytest.mark.parametrize(
    ("shape", "states", "axis", "reverse", "window", "given"),
    [
        ((2, 3, 5, 8), 4, 2, False, None, ("B", "C", "D", "z", "dt_bias")),
        ((2, 3, 5, 40), 3, 1, True, None, ("B", "C", "D", "z", "dt_bias")),
        ((1, 9, 2, 7), 1, 1, False, 4, ("B",)),
        ((1, 2, 7, 33), 16, 2, True, 4, ("C", "z")),
        ((1, 1, 1, 5), 2, 2, True, None, ()),
        ((1, 1, 17, 4), 2, 2, False, 5, ("D", "dt_bias")),
    ],
)
def test_scan(interpreter, shape, states, axis, reverse, window, given):
    errors = interpreter(triton_cases.scan_errors, shape, states, axis, reverse, window, given)
    triton_cases.assert_accurate(errors)


def test_scan_without_softplus(interpreter):
    errors = interpreter(
        triton_cases.scan_errors, (1, 2, 5, 6), 2, 1, True, None, ("B", "C"), softplus=False
    )
    triton_cases.assert_accurate(errors)


def test_scan_in_half_precision(interpreter):
    given = ("B", "C", "D", "z", "dt_bias")
    errors = interpreter(
        triton_cases.scan_errors, (1, 2, 5, 33), 16, 2, True, 3, given, torch.float16
    )
    triton_cases.assert_accurate(errors, trifle=1e-4)


@pytest.mark.parametrize("scan", sorted(triton_cases.DIRECTIONS))
def test_core(interpreter, scan):
    shape = (1, 4, 4, 12) if scan == "release" else (1, 3, 5, 12)
    errors = interpreter(triton_cases.core_errors, shape, 2, 3, scan)
    triton_cases.assert_accurate(errors)


def test_core_in_half_precision(interpreter):
    errors = interpreter(triton_cases.core_errors, (1, 2, 3, 24), 16, 3, "corners", torch.float16)
    triton_cases.assert_accurate(errors, trifle=2e-3)


def test_core_with_another_convolution(interpreter):
    errors = interpreter(triton_cases.core_errors, (2, 3, 2, 8), 1, 1, "corners", width=3)
    triton_cases.assert_accurate(errors)


@pytest.mark.parametrize("scan", sorted(triton_cases.DIRECTIONS))
def test_core_without_gate_and_convolutions(interpreter, scan):
    shape = (1, 4, 4, 12) if scan == "release" else (2, 3, 5, 12)
    errors = interpreter(triton_cases.ungated_errors, shape, 1, 3, scan)
    triton_cases.assert_accurate(errors)


@pytest.mark.parametrize(
    ("shape", "window"),
    [((1, 4, 1, 32), None), ((1, 10, 2, 64), 6), ((1, 7, 1, 33), 5)],
    ids=["even", "even_windows", "odd"],
)
def test_every_launch_of_the_backward(interpreter, shape, window):
    """16 states in 16 bits; with nothing to mask, and where chunks or channels are not whole."""
    for choice in range(interpreter(triton_cases.count_launches, "scan_backward")):
        errors = interpreter(
            triton_cases.forced, "scan_backward", choice, triton_cases.scan_errors,
            shape, 16, 1, choice % 2 == 1, window, ("B", "C", "D"), torch.float16,
        )  # fmt: skip
        triton_cases.assert_accurate(errors, trifle=1e-3)


@pytest.mark.parametrize(
    ("shape", "window"),
    [((1, 20, 1, 32), None), ((1, 37, 2, 33), None), ((1, 23, 1, 32), 13)],
    ids=["even", "odd", "windows"],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_lines_of_many_chunks(interpreter, shape, window, reverse):
    given = ("B", "C", "D", "z", "dt_bias")
    errors = interpreter(triton_cases.scan_errors, shape, 16, 1, reverse, window, given)
    triton_cases.assert_accurate(errors)


def test_rows_whose_strides_pass_32_bits_are_refused(interpreter):
    message = interpreter(triton_cases.rows_too_long, 24)
    assert "fewer than 2^28 elements in a row; got 6 tokens of 4 channels" in message


def test_few_states_and_lines_of_seven(interpreter):
    errors = interpreter(triton_cases.scan_errors, (2, 7, 2, 32), 1, 1, True, None, ("C", "D"))
    triton_cases.assert_accurate(errors)


def test_gates_that_are_closed_or_wide_open(interpreter):
    triton_cases.assert_accurate(interpreter(triton_cases.closed_gate), trifle=2e-6)


@pytest.mark.parametrize("shape", [(2, 3, 5, 12), (700, 96), (1, 3), (0, 8)], ids=str)
def test_norm(interpreter, shape):
    if shape[0]:
        triton_cases.assert_accurate(interpreter(triton_cases.norm_errors, shape), trifle=1e-6)
    else:
        assert interpreter(triton_cases.norm_errors, shape)["y"][0] == 0


def test_norm_into_half_precision(interpreter):
    errors = interpreter(triton_cases.norm_errors, (3, 7, 40), torch.float32, torch.float16)
    triton_cases.assert_accurate(errors, trifle=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU for Triton")
def test_a_cpu_tensor_is_refused_where_nothing_interprets(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    u = torch.randn(1, 2, 3, 4)
    with pytest.raises(InputError, match=r"(?s)CPU tensor.*TRITON_INTERPRET=1"):
        selective_scan(u, u, -torch.rand(4, 2), axis=1, backend="triton")


def test_every_launch_of_the_backward_is_chosen_for_something():
    from v2m.ops.triton.launch import TILES, pick

    chosen = {
        pick("scan_backward", 16, steps, walk)
        for steps in range(1, 200)
        for walk in ("B", "C", "BC")
    }
    assert chosen == set(TILES["scan_backward"])


@pytest.mark.parametrize("kilobytes", [64, 100, 164, 228], ids="{} kB".format)
def test_states_fit_into_shared_memory(kilobytes, monkeypatch):
    """On each kind of GPU all programs that registers allow are there at once; a line that has more
    states than places needs two of them."""
    from v2m.ops.triton import launch

    memory = SimpleNamespace(shared_memory_per_multiprocessor=1024 * kilobytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    monkeypatch.setattr(launch, "speaks_ptx", lambda: True)
    for tile in launch.TILES["scan_backward"]:
        room = [launch.room_near(n, tile, 16, torch.bfloat16, None) for n in range(1, 1000)]
        most = max(room)
        assert 2 <= most <= 47
        assert tile.resident * (1024 * most + 1536) <= 1024 * kilobytes
        assert room == sorted(room)
        assert all(places >= n for n, places in enumerate(room, 1) if n <= most)
        assert len(set(room)) <= 3, "each is a kernel to compile"
        assert launch.room_near(8, tile, 16, torch.float16, None) == 0
        assert launch.room_near(8, tile, 8, torch.bfloat16, None) == 0
