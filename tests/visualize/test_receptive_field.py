"""The effective receptive field, on networks whose receptive field is known by hand."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

import v2m
from v2m.errors import InputError
from v2m.ops.backend import use_backend
from v2m.visualize import (
    center_token,
    effective_receptive_field,
    gradient_share,
    quarter_means,
    with_scan,
)


@pytest.fixture(autouse=True)
def _eager():
    with use_backend("eager"):
        yield


def nano(scan="corners", img_size=(20, 28), **keywords):
    size = {"embed_dim": 16, "depth": 1, "d_state": 4, "num_classes": 3}
    return v2m.create_model(
        "v2m_nano_patch4_28", scan=scan, img_size=img_size, **{**size, **keywords}
    )


def test_support_and_values_of_a_convolution():
    """Two 3x3 convolutions of stride 1 and 2 see 5x5 pixels, at twice the token's place."""
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.Conv2d(4, 1, 3, padding=1, stride=2, bias=False),
    )
    field = effective_receptive_field(network, torch.randn(3, 1, 12, 18))
    row, column = (2 * index for index in center_token(6, 9))
    expected = np.zeros((12, 18), dtype=bool)
    expected[row - 2 : row + 3, column - 2 : column + 3] = True
    assert np.array_equal(field > 0, expected)
    # of a linear network the gradient is the composed kernel, whatever the image
    impulse = torch.zeros(1, 1, 12, 18)
    kernel = np.zeros((5, 5))
    for y, x in np.ndindex(5, 5):
        impulse.zero_()[0, 0, row - 2 + y, column - 2 + x] = 1
        kernel[y, x] = network(impulse)[0, 0, row // 2, column // 2].abs().item()
    seen = field[row - 2 : row + 3, column - 2 : column + 3]
    np.testing.assert_allclose(seen, kernel / kernel.max(), atol=1e-6)


def test_token_can_be_chosen():
    network = nn.Conv2d(2, 3, 4, stride=4)
    field = effective_receptive_field(network, torch.randn(2, 2, 8, 16), token=(1, 3))
    assert np.array_equal(np.argwhere(field > 0).min(axis=0), [4, 12])
    assert (field > 0).sum() == 16


def test_batches_make_no_difference():
    network = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3))
    images = torch.randn(7, 1, 9, 11)
    whole, pieces = (effective_receptive_field(network, images, batch_size=n) for n in (16, 2))
    np.testing.assert_allclose(whole, pieces, rtol=1e-5)


@pytest.mark.parametrize("scan", ["corners", "corner"])
def test_of_a_mixer_in_one_layer(scan):
    """`corners` sees every patch of a grid that is not square; one corner only its quadrant."""
    model = nano(scan)
    field = effective_receptive_field(model, torch.randn(4, 1, 20, 28))
    patches = field.reshape(5, 4, 7, 4).max(axis=(1, 3)) > 0
    expected = np.ones((5, 7), dtype=bool)
    if scan == "corner":
        expected[3:], expected[:, 4:] = False, False
    assert np.array_equal(patches, expected)


def test_release_sees_little_of_the_lower_right():
    """What the report says of the two scans, on untrained weights."""
    model = nano(img_size=(28, 28), depth=2)
    images = torch.randn(8, 1, 28, 28)
    means = {}
    for scan in ("corners", "release"):
        field = effective_receptive_field(with_scan(model, scan), images)
        means[scan] = quarter_means(field, (7, 7))
    assert min(means["corners"].values()) > 0.3 * max(means["corners"].values())
    assert min(means["release"], key=means["release"].get) == "lower right"
    assert means["release"]["lower right"] < 0.1 * max(means["release"].values())


def test_with_scan_keeps_the_weights_and_the_original():
    model = nano(img_size=(16, 16)).train()
    twin = with_scan(model, "release")
    images = torch.randn(1, 1, 16, 16)
    assert twin.config.scan == "release"
    assert model.config.scan == "corners"
    assert twin.training
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(ours, theirs), name
        assert ours is not theirs
    with torch.no_grad():
        assert not torch.allclose(model.eval()(images), twin.eval()(images))
        assert torch.equal(with_scan(twin, "corners")(images), model(images))


def test_timm_transformer_and_its_mode():
    """Without the class token, and before the norm, whose sum over channels is constant."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0, img_size=64).train()
    field = effective_receptive_field(model, torch.randn(2, 3, 64, 64))
    assert field.shape == (64, 64)
    assert field.max() == 1
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert np.unravel_index(field.argmax(), field.shape) >= (32, 32)  # the middle token's patch


def test_share_of_the_gradient():
    even, point = np.ones((10, 10)), np.zeros((10, 10))
    point[3, 4] = 1
    assert gradient_share(even) == pytest.approx(0.95)
    assert gradient_share(point) == pytest.approx(0.01)
    assert gradient_share(np.zeros((4, 4))) == 0


def test_quarters_leave_out_the_tokens_own_row_and_column():
    field = np.zeros((6, 10))  # a 3 x 5 grid of 2 x 2 patches, middle token (1, 2)
    field[:2, :4], field[:2, 6:], field[4:, :4], field[4:, 6:] = 1, 2, 3, 4
    field[2:4], field[:, 4:6] = 99, 99
    assert list(quarter_means(field, (3, 5)).values()) == [1, 2, 3, 4]
    field = np.zeros((7, 10))  # 3 x 4: the middle token (1, 2) lies on pixels 2.33-4.67, 5-7.5
    field[:2, :5], field[:2, 8:], field[5:, :5], field[5:, 8:] = 1, 2, 3, 4
    field[2:5], field[:, 5:8] = 99, 99
    assert list(quarter_means(field, (3, 4)).values()) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"`images` must be a floating point batch.*got \(3, 8, 8\)"),
        (torch.zeros(0, 1, 8, 8), "with B > 0"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "got .* of torch.uint8"),
    ],
)
def test_images_that_cannot_be_used(images, message):
    with pytest.raises(InputError, match=message):
        effective_receptive_field(nn.Conv2d(1, 1, 1), images)


def test_models_that_cannot_be_used():
    images = torch.zeros(1, 1, 8, 8)
    with pytest.raises(InputError, match=r"`model` \(Flatten\) must give a feature map.*\(1, 64\)"):
        effective_receptive_field(nn.Flatten(), images)
    with pytest.raises(InputError, match="must lie in the model's 8 x 8 feature map"):
        effective_receptive_field(nn.Conv2d(1, 1, 1), images, token=(0, 8))
    with pytest.raises(InputError, match="must be a V2M, whose scan can be switched; got a Conv2d"):
        with_scan(nn.Conv2d(1, 1, 1), "release")
    with pytest.raises(InputError, match="`scan` must be one of"):
        with_scan(nano(), "spiral")
