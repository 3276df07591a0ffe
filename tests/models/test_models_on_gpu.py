"""Every model on a CUDA device: `pytest -m gpu tests/models/test_models_on_gpu.py`."""

import pytest
import torch

from helpers import fill_deterministically, images_for, relative_error, small, small_size
from v2m.models.registry import MODELS
from v2m.ops import use_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# One of each family goes through Inductor; for the rest one whole graph is what matters.
FAMILIES = ["v2m_tiny_patch16_224", "v2m_local_tiny_patch16_224", "v2m_hier_small_224"]
FAMILIES += ["vim_tiny_patch16_224", "vmamba_tiny_224"]


@pytest.fixture(autouse=True)
def _exact_and_deterministic_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def build(name: str):
    model = fill_deterministically(small(name, **small_size(name))).cuda().train()
    return model, images_for(model)


def gradients(run, model, images, dtype=None) -> list[torch.Tensor]:
    """Logits, then the gradients of the images and of every parameter."""
    images = images.detach().requires_grad_()
    model.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        y = run(images)
    y.float().square().sum().backward()
    return [y.detach(), images.grad, *(p.grad.clone() for p in model.parameters())]


def assert_same(found, wanted, limit: float) -> None:
    scale = wanted[1].norm()
    for got, exact in zip(found, wanted):
        difference = (got.double() - exact.double()).norm()
        assert difference <= limit * (exact.double().norm() + 1e-3 * scale.double())


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_of_float64(name):
    model, images = build(name)
    found = gradients(model, model, images)
    with use_backend("eager"):
        wide = model.double()
        wanted = gradients(wide, wide, images.double())
    assert_same(found, wanted, 2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_compiled_in_one_graph(name):
    torch._dynamo.reset()
    model, images = build(name)
    backend = "inductor" if name in FAMILIES else "aot_eager"
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_same(gradients(compiled, model, images), gradients(model, model, images), 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_captured_in_a_graph(name):
    """Inference in bfloat16, replayed on other images."""
    model, images = build(name)
    model.eval()
    still = images.clone()

    def forward():
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return model(still)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = forward()
    still.copy_(images.flip(0))
    wanted = forward()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_activations_give_the_same_gradients(name):
    model, images = build(name)
    wanted = gradients(model, model, images)
    model.set_grad_checkpointing()
    assert_same(gradients(model, model, images), wanted, 1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(name, dtype):
    model, images = build(name)
    wanted, *_ = gradients(model, model, images)
    found, *grads = gradients(model, model, images, dtype)
    assert relative_error(found.float().cpu(), wanted.cpu()) < 5e-2
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", MODELS)
def test_one_bad_image_leaves_the_others_bit_equal(name):
    model, images = build(name)
    model.eval()
    images = torch.cat([images, images + 1])
    bad = images.clone()
    bad[1] = torch.nan
    with torch.no_grad():
        good, found = model(images), model(bad)
    others = [0, 2, 3]
    assert torch.equal(found[others], good[others])
    assert found[1].isnan().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_bit_equal_from_run_to_run(name):
    model, images = build(name)
    first = gradients(model, model, images, torch.bfloat16)
    for _ in range(5):
        for a, b in zip(gradients(model, model, images, torch.bfloat16), first):
            assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", FAMILIES)
def test_on_a_device_that_is_not_the_current_one(name):
    model, images = build(name)
    wanted = gradients(model, model, images)
    found = gradients(model.to("cuda:1"), model, images.to("cuda:1"))
    assert_same([x.to("cuda:0") for x in found], wanted, 1e-5)
