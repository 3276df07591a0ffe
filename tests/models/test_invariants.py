"""What holds of every registered model: gradients, batches, bad images, sizes, copies, types."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn

import v2m
from helpers import fill_deterministically, images_for, relative_error, small
from v2m.errors import InputError

NAMES = v2m.list_models()
ONE_OF_EACH = ["v2m_nano_patch4_28", "v2m_local_tiny_patch16_224", "v2m_hier_small_224"]
ONE_OF_EACH += ["vim_tiny_patch16_224", "vmamba_tiny_224"]


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(name):
    model = small(name).train()
    images = images_for(model, 4, (64, 64))  # at 32 the last of four stages has nothing to scan
    weights = torch.randn(4, model.num_classes)
    (model(images) * weights).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_dt_starts_in_its_range_in_every_pass(name):
    biases = {
        n: p
        for n, p in small(name).named_parameters()
        if n.endswith("dt_projs_bias") or ("dt_proj" in n and n.endswith("bias"))
    }
    assert biases
    if name.startswith("v2m_"):
        assert any("dt_proj_2" in n for n in biases)
    for n, bias in biases.items():
        dt = nn.functional.softplus(bias.detach().double())
        assert dt.min() >= 0.999e-3, n
        assert dt.max() <= 1.001e-1, n


@pytest.mark.parametrize("name", NAMES)
def test_an_image_alone_equals_the_image_in_a_batch(name):
    model = fill_deterministically(small(name)).eval()
    images = images_for(model, 64)
    with torch.no_grad():
        together = model(images)
        for i in (0, 31, 63):
            assert relative_error(model(images[i : i + 1]), together[i : i + 1]) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_image_leaves_the_others_bit_equal(name, bad):
    model = fill_deterministically(small(name)).eval()
    images = images_for(model, 4)
    with torch.no_grad():
        clean = model(images)
        images[2, :, 1, 3] = bad
        spoilt = model(images)
    assert not torch.isfinite(spoilt[2]).all()
    for i in (0, 1, 3):
        assert torch.equal(spoilt[i], clean[i])


# ----------------------------------------------------------------------------- sizes

SIDES = (1, 3, 4, 5, 7, 8, 12, 13, 16, 17, 20, 31)
SIZES = [(h, w) for i, h in enumerate(SIDES) for w in SIDES[i % 2 :: 2]][:60]


def sized(name, **keywords):
    patch = {} if "patch" not in name else {"patch_size": 4, "img_size": 16, "depth": 1}
    return small(name, **{**patch, **keywords}).eval()


def test_there_are_sixty_sizes():
    assert len(set(SIZES)) == 60
    assert sum(h != w for h, w in SIZES) >= 50
    assert sum(h % 4 == 0 and w % 4 == 0 for h, w in SIZES) > 10


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_sixty_sizes_run_or_say_what_to_do(name):
    model, patched = sized(name), "patch" in name
    for height, width in SIZES:
        images = torch.randn(1, model.config.in_chans, height, width)
        if patched and (height % 4 or width % 4):
            message = (
                "`images` must have a height and width that are multiples of the patch size 4; got"
                f" {height} x {width}. Resize or crop, or build the model with"
                " dynamic_img_pad=True."
            )
            with pytest.raises(InputError, match=re.escape(message)):
                model(images)
        else:
            with torch.no_grad():
                assert torch.isfinite(model(images)).all(), (height, width)


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if "patch" in name])
def test_sixty_sizes_run_with_padding(name):
    model = sized(name, dynamic_img_pad=True)
    for height, width in SIZES:
        images = torch.randn(1, model.config.in_chans, height, width)
        with torch.no_grad():
            last = model.forward_intermediates(images, 1, intermediates_only=True)[0]
            assert torch.isfinite(model(images)).all(), (height, width)
        assert last.shape[-2:] == (math.ceil(height / 4), math.ceil(width / 4))


def test_padding_is_zeros_below_and_to_the_right():
    model = sized("v2m_nano_patch4_28", dynamic_img_pad=True)
    images = torch.randn(2, 1, 13, 18)
    padded = nn.functional.pad(images, (0, 2, 0, 3))
    assert torch.equal(model(images), model(padded))


def test_an_odd_image_size_can_be_the_models_own():
    with pytest.raises(InputError, match=r"`img_size` must have .* got 30 x 30"):
        v2m.create_model("v2m_nano_patch4_28", img_size=30)
    model = v2m.create_model("v2m_nano_patch4_28", img_size=(30, 17), dynamic_img_pad=True)
    assert model.pos_embed.shape == (1, 8 * 5, 64)
    assert model(torch.randn(1, 1, 30, 17)).shape == (1, 10)


def test_the_position_embedding_follows_the_grid():
    """A constant embedding stays constant on another grid, and its own grid is left untouched."""
    model = sized("v2m_nano_patch4_28")
    nn.init.constant_(model.pos_embed, 0.7)
    zeros = torch.zeros(1, 1, 8, 20)
    nn.init.zeros_(model.patch_embed.proj.weight)
    embedded = model._embed(zeros)
    torch.testing.assert_close(embedded, torch.full((1, 2, 5, 32), 0.7))
    nn.init.normal_(model.pos_embed)
    own = model._embed(torch.zeros(1, 1, 16, 16))
    assert torch.equal(own.flatten(1, 2), model.pos_embed)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_wrong_images_are_named(name):
    model = small(name)
    channels = model.config.in_chans
    side = model.config.img_size[0]
    cases = [
        (torch.zeros(2, channels + 1, side, side), f"Pass in_chans={channels + 1} to the model"),
        (torch.zeros(channels, side, side), f"must be floating point, (B, {channels}, H, W)"),
        (torch.zeros(channels, side, side), "One image goes in as image.unsqueeze(0)."),
        (torch.zeros(2, channels, side, side, dtype=torch.uint8), "of torch.uint8. Scale them to"),
        (torch.zeros(5, 5), f"(B, {channels}, H, W); got (5, 5) of torch.float32. One image"),
        ([1, 2], f"`images` must be a torch.Tensor, (B, {channels}, H, W); got list."),
    ]
    for images, message in cases:
        with pytest.raises(InputError, match=re.escape(message)):
            model(images)


def test_release_needs_square_images():
    model = small("v2m_tiny_patch16_224", scan="release")
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 1000)
    with pytest.raises(InputError, match=r"needs a square grid, .* got 4 x 6 tokens"):
        model(torch.randn(1, 3, 64, 96))


def test_an_empty_batch():
    model = small("v2m_nano_patch4_28").eval()
    assert model(torch.zeros(0, 1, 16, 16)).shape == (0, 10)


def test_another_image_than_the_first_four_directions_flips_with_the_image():
    """Without its position embedding a corners model with a flipped image gives flipped features,
    up to the patches themselves: their content is symmetric here.
    """
    model = fill_deterministically(small("v2m_tiny_patch16_224")).double().eval()
    nn.init.zeros_(model.pos_embed)
    patches = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    images = patches.repeat_interleave(16, 2).repeat_interleave(16, 3)
    expected = model.forward_features(images)
    for axis in (1, 2):
        got = model.forward_features(images.flip(axis + 1)).flip(axis)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------- copies and types


@pytest.mark.parametrize("name", NAMES)
def test_built_on_meta_then_made_real(name):
    with torch.device("meta"):
        model = small(name)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan)
    model.init_weights()
    for tensor_name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), tensor_name
    assert torch.isfinite(model(images_for(model))).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_model(name):
    torch.manual_seed(3)
    one = small(name).state_dict()
    torch.manual_seed(3)
    two = small(name).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 5e-2), (torch.float16, 1e-2), (torch.float64, 1e-5)],
)
def test_other_types(name, dtype, tolerance):
    model = fill_deterministically(small(name)).eval()
    images = images_for(model)
    expected = model(images)
    model.to(dtype)
    y = model(images.to(dtype))
    assert y.dtype == dtype
    assert relative_error(y, expected) < tolerance
    y.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bf16_autocast(name):
    model = fill_deterministically(small(name)).train()
    images = images_for(model)
    expected = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(images)
    assert relative_error(y, expected) < 5e-2
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", ["v2m_nano_patch4_28", "vim_tiny_patch16_224"])
def test_the_residual_lies_in_one_piece(name):
    """Not with the strides of the patches' convolution: each layer would have to copy it."""
    model, seen = small(name).eval(), []
    for block in model.layers:
        block.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    model(images_for(model, 2, (64, 64)))
    assert seen
    assert all(x.is_contiguous() for x in seen)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_residual_stays_in_float32(name):
    model = small(name).to(torch.bfloat16).eval()
    seen = []
    for layer in model.layers:
        for block in getattr(layer, "blocks", [layer]):
            block.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    model(images_for(model))
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("name", NAMES)
def test_pickle_deepcopy_and_state_dict_round_trips_are_bit_equal(name):
    model = fill_deterministically(small(name)).eval()
    images = images_for(model)
    with torch.no_grad():
        expected = model(images)
        pickled = pickle.loads(pickle.dumps(model))
        copied = copy.deepcopy(model)
        loaded = small(name).eval()
        loaded.load_state_dict(model.state_dict())
        for other in (pickled, copied, loaded):
            assert torch.equal(other(images), expected)
        next(copied.parameters()).add_(1)
        assert torch.equal(model(images), expected)


# ----------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("name", ["v2m_tiny_patch16_224", "vim_tiny_patch16_224"])
def test_initial_weights_of_a_plain_model(name):
    """`out_proj`: PyTorch's default over sqrt(depth); patches LeCun normal; the rest 0.02."""
    model = small(name, embed_dim=64, depth=4, num_classes=100)
    for block in model.layers:
        out_proj, default = block.mixer.out_proj.weight, 128**-0.5  # uniform in +-fan_in^-0.5
        assert 0.9 * default / 2 < float(out_proj.detach().abs().max()) <= default / 2
        in_proj, default = block.mixer.in_proj.weight, 64**-0.5
        assert 0.9 * default < float(in_proj.detach().abs().max()) <= default
        assert torch.equal(block.norm.weight, torch.ones(64))
    projection = model.patch_embed.proj
    assert float(projection.weight.detach().std()) == pytest.approx((3 * 256) ** -0.5, rel=0.03)
    assert not projection.bias.any()
    assert float(model.head.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not model.head.bias.any()
    assert float(model.pos_embed.detach().std()) == pytest.approx(0.02, rel=0.1)
