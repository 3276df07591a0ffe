"""Every registered model as a backbone: strides, sizes, gradients, and what padding does."""

import copy
from collections import OrderedDict

import pytest
import segmentation_models_pytorch as smp
import timm
import torch

import v2m
from helpers import relative_error
from v2m.errors import InputError
from v2m.heads import DenseBackbone, DetectionBackbone
from v2m.heads.backbone import STRIDES, pad_to_multiple


def test_four_strides_any_size_and_gradients_everywhere(any_model):
    name, keywords = any_model
    backbone = DenseBackbone.create(name, taps="depths", **keywords)
    images = torch.randn(2, 3, 37, 50)  # multiples of nothing
    maps = backbone(images)
    height, width = (-(-side // backbone.multiple) * backbone.multiple for side in (37, 50))
    for x, channels, stride in zip(maps, backbone.channels, STRIDES):
        assert x.shape == (2, channels, -(-height // stride), -(-width // stride))
    assert tuple(backbone.strides) == STRIDES
    sum((x * torch.randn_like(x)).sum() for x in maps).backward()
    for parameter_name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, f"{parameter_name} is not used"
        assert parameter.grad.isfinite().all(), parameter_name


def test_torchvision_contract(any_model):
    name, keywords = any_model
    backbone = DetectionBackbone(DenseBackbone.create(name, **keywords), out_channels=16)
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 32))
    assert isinstance(maps, OrderedDict)
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    assert backbone.out_channels == 16
    assert [x.shape[2] for x in maps.values()] == [16, 8, 4, 2, 1]
    assert all(x.shape[1] == 16 for x in maps.values())


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (65, 17)])
def test_any_size_is_padded_to_the_multiple(family, size):
    name, keywords = family
    backbone = DenseBackbone.create(name, **keywords).eval()
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        maps = backbone(images)
        again = backbone(pad_to_multiple(images, backbone.multiple))
    assert all(torch.equal(x, y) for x, y in zip(maps, again))
    assert all(x.isfinite().all() for x in maps)


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "test_convnext"])
def test_models_of_timm(name):
    keywords = {"dynamic_img_size": True} if "vit" in name else {}
    backbone = DenseBackbone(timm.create_model(name, num_classes=10, **keywords))
    maps = backbone(torch.randn(2, 3, 64, 96))
    assert [tuple(x.shape[2:]) for x in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [x.shape[1] for x in maps] == backbone.channels


def padded_batch() -> tuple[torch.Tensor, list[tuple[int, int]]]:
    images, sizes = torch.randn(2, 3, 96, 128), [(96, 75), (61, 128)]
    for image, (height, width) in zip(images, sizes):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return images, sizes


def test_a_hierarchical_model_does_not_see_the_padding(hierarchical):
    name, keywords = hierarchical
    backbone = DenseBackbone.create(name, **keywords).eval()
    images, sizes = padded_batch()
    with torch.no_grad():
        together, blind = backbone(images, sizes), backbone(images)
        for index, (height, width) in enumerate(sizes):
            alone = backbone(images[index : index + 1, :, :height, :width])
            for x, without, y in zip(together, blind, alone):
                h, w = y.shape[2:]
                assert relative_error(x[index, :, :h, :w], y[0]) <= 2e-6
                assert (
                    relative_error(without[index, :, :h, :w], y[0]) >= 1e-3
                )  # or it shows nothing


def test_gradients_do_not_see_the_padding_either(hierarchical):
    name, keywords = hierarchical
    backbone = DenseBackbone.create(name, **keywords)
    images, sizes = padded_batch()
    images, sizes = images[:1], sizes[:1]
    grads, cotangents = [], None
    for crop in (images[..., :75], images):
        backbone.zero_grad()
        maps = backbone(crop, None if crop.shape[-1] == 75 else sizes)
        cotangents = cotangents or [torch.randn_like(x) for x in maps]
        parts = [x[..., : c.shape[-1]] * c for x, c in zip(maps, cotangents)]
        sum(part.sum() for part in parts).backward()
        grads.append({n: p.grad.clone() for n, p in backbone.named_parameters()})
    for parameter_name in grads[0]:
        assert relative_error(grads[1][parameter_name], grads[0][parameter_name]) <= 1e-4


def test_a_plain_model_sees_the_padding_from_three_corners_of_four(plain):
    """As the documentation says: what starts beyond the lower or right edge carries it in."""
    name, keywords = plain
    backbone = DenseBackbone.create(name, **keywords).eval()
    images = torch.randn(1, 3, 64, 128)
    images[..., 64:] = 0
    with torch.no_grad():
        padded, alone = backbone(images)[2], backbone(images[..., :64])[2]
    # the position embedding is resampled to the larger grid as well
    assert relative_error(padded[..., :4], alone) >= 1e-3
    mixer = backbone.model.layers[0].mixer
    tokens = torch.randn(1, 4, 8, keywords["embed_dim"])
    with torch.no_grad():
        mixer.directions = mixer.directions[:1]  # rows from the left, then down
        assert relative_error(mixer(tokens)[:, :, :4], mixer(tokens[:, :, :4])) <= 1e-6


def test_a_copy_has_its_own_mask(hierarchical):
    name, keywords = hierarchical
    backbone = DenseBackbone.create(name, **keywords).eval()
    images, sizes = padded_batch()
    with torch.no_grad():
        expected = backbone(images, sizes)
        twin = copy.deepcopy(backbone)
        backbone(images)
        assert all(torch.equal(a, b) for a, b in zip(twin(images, sizes), expected))
    assert twin.padding is not backbone.padding


def test_errors():
    with pytest.raises(InputError, match="no forward_intermediates"):
        DenseBackbone(torch.nn.Conv2d(3, 4, 1))
    model = v2m.create_model("v2m_tiny_patch16_224", embed_dim=32, depth=3)
    with pytest.raises(InputError, match="at least 4 layers; this one has 3"):
        DenseBackbone(model, taps="depths")
    with pytest.raises(InputError, match='must be "last" or "depths"'):
        DenseBackbone(model, taps="first")
    backbone = DenseBackbone.create("v2m_hier_small_224", depths=(1,) * 4, dims=(8,) * 4)
    with pytest.raises(InputError, match="one \\(height, width\\) within 32 x 32"):
        backbone(torch.randn(1, 3, 32, 32), [(33, 20)])


def test_hierarchical_encoder_of_segmentation_models_pytorch():
    model = smp.UPerNet("tu-v2m_hier_small_224", encoder_weights=None, classes=5)
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 32, 64)).shape == (1, 5, 32, 64)


def test_plain_encoder_of_segmentation_models_pytorch():
    """One resolution only: for smp's DPT, which is made for it; its other decoders refuse."""
    name = "tu-v2m_tiny_patch16_224"
    model = smp.DPT(name, encoder_weights=None, classes=5, decoder_readout="ignore")
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 32, 64)).shape == (1, 5, 32, 64)
    with pytest.raises(ValueError, match="downsampling pattern"):
        smp.UPerNet(name, encoder_weights=None, classes=5)
