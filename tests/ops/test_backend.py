"""Which backend runs: asked, forced, or the fastest there is."""

import importlib.util
import re
import sys
import threading

import pytest
import torch

from v2m.errors import InputError
from v2m.ops import backend as backend_module
from v2m.ops import selective_scan, use_backend
from v2m.ops.backend import choose_backend, explain_backend, is_available


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
    message = f"must be one of reference, eager, cpu, triton; got {name!r}."
    with pytest.raises(InputError, match=re.escape(message)), use_backend(name):
        pass
    monkeypatch.setenv("V2M_BACKEND", name)
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
