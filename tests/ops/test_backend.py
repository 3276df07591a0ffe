"""Which backend runs: asked, forced, or the fastest there is."""

import importlib.util
import re
import sys
import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from v2m.errors import InputError
from v2m.ops import backend as backend_module
from v2m.ops import selective_scan, use_backend
from v2m.ops.backend import choose_backend, explain_backend, is_available, recompute_as_now


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("V2M_BACKEND", raising=False)
    backend_module._find.cache_clear()
    yield
    backend_module._find.cache_clear()


def install(monkeypatch, *packages: str) -> None:
    """Pretend that of the compilers only these are installed."""

    def find_spec(name, *rest):
        return object() if name in packages else None

    monkeypatch.setattr(backend_module.importlib.util, "find_spec", find_spec)


@pytest.mark.parametrize(
    ("installed", "device", "dtype", "expected"),
    [
        (("numba", "triton"), "cpu", torch.float32, "cpu"),
        (("numba", "triton"), "cuda", torch.float32, "triton"),
        (("numba", "triton"), "cuda", torch.bfloat16, "triton"),
        (("numba", "triton"), "mps", torch.float32, "eager"),
        (("numba", "triton"), "cpu", torch.float64, "eager"),
        (("numba", "triton"), "cuda", torch.float64, "eager"),
        (("numba",), "cuda", torch.float32, "eager"),
        (("triton",), "cpu", torch.float32, "eager"),
        ((), "cpu", torch.float16, "eager"),
        ((), "cuda", torch.float16, "eager"),
    ],
)
def test_the_fastest_that_can_do_it(monkeypatch, installed, device, dtype, expected):
    install(monkeypatch, *installed)
    monkeypatch.setattr(torch.version, "hip", None)
    name, reason = explain_backend(None, device, dtype)
    assert name == expected
    assert reason


def test_triton_is_not_chosen_on_rocm(monkeypatch):
    install(monkeypatch, "triton")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert explain_backend(None, "cuda")[0] == "eager"


def test_asked_comes_before_forced_and_forced_before_the_environment(monkeypatch):
    tensor = torch.zeros(1)
    monkeypatch.setenv("V2M_BACKEND", "reference")
    assert choose_backend(None, tensor) == "reference"
    assert explain_backend(None, "cpu")[1] == "forced by the environment variable V2M_BACKEND"
    with use_backend("eager"):
        assert choose_backend(None, tensor) == "eager"
        assert explain_backend(None, "cpu")[1] == "forced by use_backend"
        assert choose_backend("reference", tensor) == "reference"
        with use_backend(None):
            assert choose_backend(None, tensor) == "reference"
        assert choose_backend(None, tensor) == "eager"
    assert choose_backend(None, tensor) == "reference"


def test_use_backend_is_undone_by_an_error_and_unseen_by_other_threads():
    before = choose_backend(None, torch.zeros(1))
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(choose_backend(None, torch.zeros(1))))
        thread.start()
        thread.join()
    assert seen == [before] == [choose_backend(None, torch.zeros(1))]


def test_use_backend_reaches_the_operator(monkeypatch):
    calls = []
    original = backend_module.explain_backend
    monkeypatch.setattr(
        backend_module, "explain_backend", lambda *a: calls.append(original(*a)) or calls[-1]
    )
    grid = torch.ones(1, 2, 2, 1)
    with use_backend("reference"):
        selective_scan(grid, grid, -torch.ones(1, 1), axis=1)
    assert calls == [("reference", "forced by use_backend")]


@pytest.mark.parametrize("name", ["gpu", "Eager", "numba"])
def test_unknown_names(monkeypatch, name):
    message = f"must be one of reference, eager, cpu, triton; got {name!r}"
    with pytest.raises(InputError, match=re.escape(message)), use_backend(name):
        pass
    monkeypatch.setenv("V2M_BACKEND", name)
    message += ", forced by the environment variable V2M_BACKEND."
    with pytest.raises(InputError, match=re.escape(message)):
        choose_backend(None, torch.zeros(1))


@pytest.mark.parametrize(("name", "package"), [("cpu", "numba"), ("triton", "triton")])
def test_a_compiler_that_is_not_installed(monkeypatch, name, package):
    install(monkeypatch)
    message = f"backend {name!r} needs the package {package}, which is not installed here."
    with pytest.raises(InputError, match=message):
        explain_backend(name, "cuda" if name == "triton" else "cpu")


def test_the_cpu_backend_on_another_device(monkeypatch):
    install(monkeypatch, "numba")
    with pytest.raises(InputError, match="works on CPU tensors; got a tensor on 'cuda'"):
        explain_backend("cpu", "cuda")


@pytest.mark.parametrize("package", ["numba", "triton"])
def test_a_package_blocked_from_import_counts_as_missing(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert not is_available({"numba": "cpu", "triton": "triton"}[package])


def test_a_finder_that_refuses_counts_as_missing(monkeypatch):
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name == "numba":
                raise ImportError(name)

    monkeypatch.delitem(sys.modules, "numba", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Blocker(), *sys.meta_path])
    with pytest.raises(ImportError):
        importlib.util.find_spec("numba")
    assert not is_available("cpu")


def test_exported_programs_hold_plain_operations(monkeypatch):
    install(monkeypatch, "numba", "triton")
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    name, reason = explain_backend(None, "cpu")
    assert name == "eager"
    assert "exported" in reason


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_compiled_backends_refuse_double_precision(monkeypatch, name):
    install(monkeypatch, "numba", "triton")
    grid = torch.zeros(1, 1, 2, 1, dtype=torch.float64)
    with pytest.raises(InputError, match="keeps its state in float32; got float64"):
        selective_scan(grid, grid, -torch.ones(1, 1), axis=2, backend=name)


def scan_of(backend):
    generator = torch.Generator().manual_seed(0)
    A = -torch.rand(8, 4, generator=generator)
    u = torch.randn(2, 3, 4, 8, generator=generator)
    return u, lambda u: selective_scan(u, u, A, axis=1, backend=backend)


def tangent(f, u):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(u, u.cos()))).tangent


TRANSFORMS = {
    "jvp": lambda f, u: torch.func.jvp(f, (u,), (u.cos(),))[1],
    "dual": tangent,
    "grad": lambda f, u: torch.func.grad(lambda x: f(x).square().sum())(u),
    "gradients of each image": lambda f, u: torch.func.vmap(
        torch.func.grad(lambda x: f(x[None]).square().sum())
    )(u),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_run_in_plain_operations(name):
    """A compiled operator would lose the tangent and say nothing."""
    transform = TRANSFORMS[name]
    u, chosen = scan_of(None)
    expected = transform(scan_of("eager")[1], u)
    assert expected.abs().max() > 0.1
    assert torch.equal(transform(chosen, u), expected)
    assert torch.allclose(transform(scan_of("reference")[1], u), expected, atol=1e-5)
    pytest.importorskip("numba")
    with pytest.raises(InputError, match="cannot be transformed by"):
        transform(scan_of("cpu")[1], u)


@pytest.mark.parametrize("forward", [None, "eager", "reference"])
@pytest.mark.parametrize("backward", [None, "eager", "reference"])
def test_what_is_computed_again_has_the_backend_of_the_first_time(monkeypatch, forward, backward):
    used = []
    original = backend_module.explain_backend
    monkeypatch.setattr(
        backend_module, "explain_backend", lambda *a: used.append(original(*a)) or used[-1]
    )
    u, f = scan_of(None)
    u.requires_grad_()
    with use_backend(forward):
        y = checkpoint(f, u, use_reentrant=False, **recompute_as_now())
    with use_backend(backward):
        y.sum().backward()
    assert len(used) == 2
    assert used[0] == used[1]
