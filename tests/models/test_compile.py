"""torch.compile without graph breaks, and how often it compiles again."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import v2m
from helpers import (
    available_backends,
    device_of,
    fill_deterministically,
    images_for,
    relative_error,
    scan_inputs,
    small,
)
from v2m.ops import selective_scan, use_backend

NAMES = ["v2m_nano_patch4_28", "v2m_tiny_patch16_224", "v2m_local_tiny_patch16_224"]
NAMES += ["v2m_hier_small_224", "vim_tiny_patch16_224", "vmamba_tiny_224"]
ON_CPU = [name for name in available_backends() if device_of(name) == "cpu"]
COMPILED = [name for name in available_backends() if name not in ("reference", "eager")]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check_compiled(name: str, compiler: str, size: dict) -> None:
    """Depth 2 at 64 px, forward and backward in one graph, the numbers of eager mode."""
    model = fill_deterministically(small(name, **size)).train()
    images = images_for(model).requires_grad_()
    expected = model(images)
    expected.square().sum().backward()
    gradients = [images.grad.clone(), *(p.grad.clone() for p in model.parameters())]
    model.zero_grad()
    images.grad = None

    y = torch.compile(model, backend=compiler, fullgraph=True)(images)
    y.square().sum().backward()
    assert relative_error(y, expected) < 1e-5
    for got, wanted in zip([images.grad, *(p.grad for p in model.parameters())], gradients):
        assert (got - wanted).norm() <= 1e-5 * (wanted.norm() + 1e-3 * gradients[0].norm())


@pytest.mark.parametrize("name", NAMES)
def test_every_family_compiles_in_one_graph(name):
    check_compiled(name, "aot_eager", {} if "patch4" in name else {"img_size": 64})


@pytest.mark.parametrize("backend", ["eager"])
def test_the_eager_backend_compiles_in_one_graph(backend):
    with use_backend(backend):
        check_compiled("v2m_tiny_patch16_224", "aot_eager", {})


@pytest.mark.slow
def test_inductor():
    check_compiled("v2m_tiny_patch16_224", "inductor", {})


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("axis", [1, 2])
def test_the_operator_compiles_in_one_graph(backend, axis):
    inputs = scan_inputs(torch.Generator().manual_seed(0), (2, 4, 5, 3), 2)
    inputs = {name: value.float().requires_grad_() for name, value in inputs.items()}

    def scan(**arguments):
        return selective_scan(**arguments, axis=axis, reverse=True, window=2, backend=backend)

    expected = scan(**inputs)
    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)(**inputs)
    assert relative_error(compiled, expected) < 1e-6
    for name, value in inputs.items():
        (wanted,) = torch.autograd.grad(expected.sum(), value, retain_graph=True)
        (got,) = torch.autograd.grad(compiled.sum(), value, retain_graph=True)
        assert relative_error(got, wanted) < 1e-5, name


SIZES = [(16, 16), (24, 32), (40, 20), (12, 28), (36, 44), (20, 24)]


@pytest.mark.parametrize("backend", [name for name in COMPILED if device_of(name) == "cpu"])
def test_dynamic_height_and_width_compile_a_bounded_number_of_times(backend):
    """On a compiled backend a layer is one operator: the loops do not depend on the size."""
    model = fill_deterministically(small("v2m_nano_patch4_28")).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    with use_backend(backend), torch.no_grad():
        for size in SIZES:
            images = images_for(model, size=size)
            assert relative_error(compiled(images), model(images)) < 1e-5
    assert counter.frame_count <= 3


def test_the_eager_backend_compiles_once_a_size():
    """Its loops are unrolled, so each size is a graph of its own, and a size seen again is not."""
    model = fill_deterministically(small("v2m_nano_patch4_28", depth=1)).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, dynamic=False, fullgraph=True)
    with use_backend("eager"), torch.no_grad():
        for size in SIZES[:3] * 2:
            images = images_for(model, size=size)
            assert relative_error(compiled(images), model(images)) < 1e-5
    assert counter.frame_count == 3


def test_batches_of_other_sizes_compile_at_most_once_more():
    model = fill_deterministically(small("v2m_nano_patch4_28")).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3, 5, 8, 13):
            images = images_for(model, batch)
            assert relative_error(compiled(images), model(images)) < 1e-5
    assert counter.frame_count <= 2


def test_registered_names_are_all_in_a_family_tested_here():
    families = {type(small(name)) for name in NAMES}
    assert {type(small(name)) for name in v2m.list_models()} == families
