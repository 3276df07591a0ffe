"""UperNet: the decoder against segmentation_models_pytorch's, sizes, gradients, files."""

import pytest
import torch
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

from helpers import relative_error
from v2m.heads import Segmenter, SegmenterConfig, UperNetDecoder, from_directory
from v2m.models import save_model

CHANNELS = (8, 12, 16, 24)


def segmenter(model: tuple[str, dict], **changes) -> Segmenter:
    name, keywords = model
    size = {"num_classes": 5, "channels": 16, "auxiliary_channels": 8}
    return Segmenter(
        SegmenterConfig(backbone=name, backbone_kwargs=keywords, **{**size, **changes})
    )


def copy_block(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """One convolution with its batch norm, whatever the two libraries call them."""
    ours, theirs = target.state_dict(), list(source.state_dict().values())
    assert [v.shape for v in ours.values()] == [v.shape for v in theirs]
    target.load_state_dict(dict(zip(ours, theirs)))


def as_theirs(theirs: UPerNetDecoder) -> UperNetDecoder:
    """Our decoder with the weights of theirs."""
    ours = UperNetDecoder(CHANNELS, 20)
    for block, pool in zip(theirs.psp.blocks, ours.pooling.pools):
        copy_block(block[1], pool[1])
    copy_block(theirs.psp.out_conv, ours.pooling.fuse)
    for i, block in enumerate(theirs.fpn_lateral_blocks):  # theirs begin at the coarsest
        copy_block(block.conv_norm_relu, ours.laterals[-1 - i])
    for i, block in enumerate(theirs.fpn_conv_blocks):
        copy_block(block, ours.outputs[-1 - i])
    copy_block(theirs.fusion_block, ours.fuse)
    return ours


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_decoder_is_that_of_segmentation_models_pytorch(training, size):
    theirs = UPerNetDecoder((3, 0, *CHANNELS), decoder_channels=20)
    for name, value in theirs.named_buffers():
        if "running" in name:
            value.uniform_(0.5, 1.5)
    ours = as_theirs(theirs).train(training)
    theirs.train(training)
    maps = [
        torch.randn(2, c, size[0] // s, size[1] // s, requires_grad=True)
        for c, s in zip(CHANNELS, (4, 8, 16, 32))
    ]
    normed = [norm(x) for norm, x in zip(theirs.feature_norms, maps)]  # ours are the backbone's
    expected, got = theirs([None, None, *maps]), ours(normed)
    assert relative_error(got, expected) <= 1e-6
    cotangent = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, maps, cotangent, retain_graph=True),
        torch.autograd.grad(expected, maps, cotangent),
    ):
        assert relative_error(a, b) <= 1e-5


def test_logits_and_gradients(family):
    model = segmenter(family).train()
    logits, auxiliary = model(torch.randn(2, 3, 40, 64))
    assert logits.shape == auxiliary.shape == (2, 5, 40, 64)
    (logits.square().sum() + auxiliary.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} is not used"
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("size", [(33, 47), (20, 65)])
def test_any_size(family, size):
    model = segmenter(family).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, *size))
    assert logits.shape == (1, 5, *size)
    assert logits.isfinite().all()


def test_saved_and_read_back(plain, tmp_path):
    model = segmenter(plain).eval()
    save_model(model, tmp_path, label_names=list("abcde"), v2m={"task": "segment"})
    again = from_directory(tmp_path)
    assert again.config == model.config
    images = torch.randn(1, 3, 40, 70)
    with torch.no_grad():
        assert torch.equal(model(images), again(images))
