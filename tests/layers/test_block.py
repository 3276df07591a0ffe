"""The norm and the residual block."""

import pytest
import torch
from torch import nn

from helpers import relative_error
from v2m.layers import Block, RMSNorm


def test_rms_norm_is_its_formula():
    norm = RMSNorm(6, eps=0.1).double()
    nn.init.uniform_(norm.weight)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=1e-14, atol=1e-14)
    assert RMSNorm(4).eps == 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_of_large_values_is_computed_in_float32(dtype):
    """300^2 overflows float16; the result has the dtype of the weight, not of the residual."""
    norm = RMSNorm(8).to(dtype)
    y = norm(torch.full((1, 8), 300.0))
    assert y.dtype == dtype
    assert torch.allclose(y.float(), torch.ones(1, 8), atol=1e-2)
    assert RMSNorm(8)(torch.full((1, 8), 300.0, dtype=dtype)).dtype == torch.float32


def test_rms_norm_lowered_is_what_a_linear_layer_makes_of_it():
    norm, lowered = RMSNorm(8), RMSNorm(8, lower=True)
    x = torch.randn(3, 8)
    assert torch.equal(lowered(x), norm(x))
    assert lowered.to("meta")(x.to("meta")).dtype == torch.float32
    lowered = RMSNorm(8, lower=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lowered(x), norm(x).bfloat16())
        assert lowered.double()(x.double()).dtype == torch.float64


def test_reset_gives_ones():
    norm = RMSNorm(8)
    nn.init.zeros_(norm.weight)
    norm.reset_parameters()
    assert torch.equal(norm.weight, torch.ones(8))


def test_the_block_adds_the_mixers_result_to_a_float32_residual():
    mixer = nn.Linear(8, 8, bias=False)
    block = Block(RMSNorm(8), mixer, nn.Identity()).bfloat16()
    residual = 1000 + torch.randn(1, 2, 3, 8)
    y = block(residual)
    assert y.dtype == torch.float32
    expected = residual + mixer(block.norm(residual)).float()
    assert relative_error(y, expected) == 0


def test_drop_path_drops_the_branch_and_keeps_the_residual():
    class Dropped(nn.Module):
        def forward(self, x):
            return 0 * x

    residual = torch.randn(1, 2, 3, 8)
    assert torch.equal(Block(RMSNorm(8), nn.Linear(8, 8), Dropped())(residual), residual)
