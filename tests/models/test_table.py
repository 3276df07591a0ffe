"""The table of models: the published sizes, and the count against an independent one."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import v2m
from v2m.models.table import count_multiply_adds, model_row, model_table
from v2m.ops.backend import use_backend

TINY = {"embed_dim": 16, "depth": 2, "img_size": 16, "d_state": 4, "num_classes": 3}


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        ("v2m_tiny_patch16_224", 6.85e6, 1.893e9),
        ("v2m_small_patch16_224", 25.2e6, 6.388e9),
    ],
)
def test_published_sizes(name, parameters, multiply_adds):
    row = model_row(name)
    assert row.parameters == pytest.approx(parameters, rel=1e-3)
    assert row.multiply_adds == pytest.approx(multiply_adds, rel=1e-3)
    assert row.input_size == (3, 224, 224)


def test_every_model_has_a_row():
    rows = model_table()
    assert [row.name for row in rows] == v2m.list_models()
    assert all(row.parameters > 0 and row.multiply_adds > 0 and row.description for row in rows)


@pytest.mark.parametrize(("scan", "scans"), [("corners", 6), ("release", 8), ("corner", 2)])
def test_count_equals_torch_count_plus_scans(scan, scans):
    """PyTorch counts matrix products; the depthwise taps and the states come on top by hand."""
    model = v2m.create_model("v2m_nano_patch4_28", scan=scan, **TINY)
    with use_backend("eager"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 16, 16))
    matrix_products = counter.get_total_flops() // 2
    tokens, inner, states, taps = 4 * 4, 2 * 16, 4, 4
    by_hand = 2 * tokens * scans * inner * (taps + 2 * states)  # 2 layers
    assert count_multiply_adds(model, (1, 16, 16)) == matrix_products + by_hand


def test_count_leaves_the_model_alone():
    model = v2m.create_model("v2m_nano_patch4_28", **TINY).train()
    images = torch.randn(2, 1, 16, 16)
    with use_backend("eager"):
        before = model(images)
        count_multiply_adds(model, (1, 16, 16))
        after = model(images)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_count_grows_with_the_image():
    model = v2m.create_model("v2m_nano_patch4_28", **TINY)
    head = 16 * 3
    one, twelve = (count_multiply_adds(model, (1, *size)) for size in ((4, 4), (12, 16)))
    assert twelve - head == 12 * (one - head)


def test_convolutions_with_groups_and_stride():
    network = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, stride=2, groups=2), nn.Flatten(), nn.Linear(8 * 16, 5)
    )
    assert count_multiply_adds(network, (4, 8, 8)) == 8 * 16 * (2 * 9) + 8 * 16 * 5
