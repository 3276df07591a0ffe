"""Resampling of position embeddings, against PyTorch's interpolation."""

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch.nn import functional as F

import v2m
from helpers import images_for, small
from v2m.layers import resample_grid

SIZES = [
    ((4, 4), (4, 4)),
    ((4, 4), (7, 5)),
    ((7, 5), (3, 11)),
    ((14, 14), (1, 2)),
    ((1, 1), (3, 2)),
]


@pytest.mark.parametrize(("old", "new"), [*SIZES, ((14, 14), (13, 24)), ((2, 3), (1, 1))])
def test_the_numbers_of_interpolate(old, new):
    grid = torch.randn(1, *old, 3, dtype=torch.float64, requires_grad=True)
    expected = F.interpolate(
        grid.permute(0, 3, 1, 2), size=new, mode="bicubic", antialias=True
    ).permute(0, 2, 3, 1)
    got = resample_grid(grid, new)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(got)
    for y in (got, expected):
        y.backward(cotangent)
        grid.grad, gradient = None, grid.grad
        if y is got:
            first = gradient
    torch.testing.assert_close(first, gradient, rtol=1e-12, atol=1e-12)


def test_the_numbers_of_timm():
    position = torch.randn(1, 14 * 14, 8)
    expected = resample_abs_pos_embed(position, [10, 24], [14, 14], num_prefix_tokens=0)
    got = resample_grid(position.reshape(1, 14, 14, 8), (10, 24)).flatten(1, 2)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_type_stays():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        grid = torch.ones(1, 3, 4, 2, dtype=dtype)
        assert resample_grid(grid, (5, 2)).dtype == dtype
        torch.testing.assert_close(resample_grid(grid, (5, 2)), torch.ones(1, 5, 2, 2, dtype=dtype))


@pytest.mark.parametrize("name", ["v2m_nano_patch4_28", "vim_tiny_patch16_224"])
def test_a_compiled_model_trains_at_several_sizes(name):
    """Two sizes at least, since the second one makes the compiler take the size for dynamic."""
    torch._dynamo.reset()
    model = small(name).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    side, patch = model.config.img_size[0], model.config.patch_size
    for size in ((side, side), (side + patch, side), (2 * side, side - patch)):
        gradients = []
        for network in (compiled, model):
            model.zero_grad()
            network(images_for(model, size=size)).square().sum().backward()
            gradients.append(model.pos_embed.grad.clone())
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_a_float64_model_is_float64_at_every_size():
    """The embedding loses nothing on the way through another grid."""
    torch.manual_seed(0)
    model = v2m.create_model("v2m_nano_patch4_28", embed_dim=8, depth=1, d_state=2).double()
    images = torch.randn(1, 1, 20, 32, dtype=torch.float64)

    def embedded(position):
        with torch.no_grad():
            model.pos_embed.copy_(position)
            return model._embed(images)

    position = torch.randn_like(model.pos_embed)
    step = 1e-12 * torch.randn_like(position)
    moved = embedded(position + step) - embedded(position)
    assert 0.1e-12 < moved.abs().max() < 1e-11
