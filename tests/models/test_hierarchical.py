"""V2M-S* and V2M-B*: sizes, geometry, any resolution, timm's features."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

import v2m
from helpers import fill_deterministically, images_for, small
from v2m.errors import InputError
from v2m.layers import UngatedMixer2d
from v2m.models.table import model_row
from v2m.ops import selective_scan

NAMES = ("v2m_hier_small_224", "vmamba_tiny_224")


@pytest.mark.parametrize(
    ("name", "parameters", "gflops"),
    [("v2m_hier_small_224", 30e6, 5.4e9), ("v2m_hier_base_224", 50e6, 9.6e9)],
)
def test_published_sizes(name, parameters, gflops):
    row = model_row(name)
    assert row.parameters == pytest.approx(parameters, rel=0.05)
    assert row.multiply_adds == pytest.approx(gflops, rel=0.12)


def test_mixer_is_two_scans_from_each_corner():
    """The core against a composition by hand, one corner after another."""
    mixer = fill_deterministically(UngatedMixer2d(8, d_state=2, expand=2.0))
    x = torch.randn(2, 5, 4, 8)
    u = F.silu(mixer.conv2d(mixer.in_proj(x)))

    def scan(u, suffix, axis, reverse):
        x_proj, dt_proj = getattr(mixer, f"x_proj{suffix}"), getattr(mixer, f"dt_proj{suffix}")
        dt, projection = x_proj(u).split([1, 2], dim=-1)
        which = {"C" if suffix else "B": projection}
        return selective_scan(
            u,
            F.linear(dt, dt_proj.weight),
            -torch.exp(getattr(mixer, f"A{suffix}_log")),
            **which,
            D=getattr(mixer, f"D{suffix}"),
            dt_bias=dt_proj.bias,
            axis=axis,
            reverse=reverse,
        )

    corners = [
        scan(scan(u, "", 2, left), "_2", 1, up) for left in (False, True) for up in (False, True)
    ]
    expected = mixer.out_proj(mixer.out_norm(torch.stack(corners).sum(0) / 2))
    torch.testing.assert_close(mixer(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("axis", [1, 2])
def test_mixer_commutes_with_flips(axis):
    """With a convolution that is symmetric, as the 3x3 one is not by itself."""
    mixer = fill_deterministically(UngatedMixer2d(8))
    with torch.no_grad():
        weight = mixer.conv2d.weight
        weight.copy_(weight + weight.flip(2))
        weight.copy_(weight + weight.flip(3))
    x = torch.randn(1, 5, 3, 8)
    torch.testing.assert_close(mixer(x.flip(axis)).flip(axis), mixer(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(1, 1), (7, 63), (33, 64), (97, 40), (64, 64)])
def test_any_size_goes_in(name, size):
    """Each stride halves the sides, rounded up: one pixel of zero padding, nothing else."""
    model = small(name, num_classes=5).eval()
    with torch.no_grad():
        logits, features = (
            model(images_for(model, size=size)),
            model.forward_intermediates(images_for(model, size=size), intermediates_only=True),
        )
    assert logits.shape == (2, 5)
    assert torch.isfinite(logits).all()
    expected = [tuple(-(-side // stride) for side in size) for stride in (4, 8, 16, 32)]
    assert [tuple(feature.shape[2:]) for feature in features] == expected


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name):
    model = v2m.create_model(name, features_only=True, dims=(16, 24, 32, 48), depths=(1, 1, 1, 1))
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert model.feature_info.channels() == [16, 24, 32, 48]
    features = model(torch.randn(1, 3, 64, 96))
    shapes = [(1, 16, 16, 24), (1, 24, 8, 12), (1, 32, 4, 6), (1, 48, 2, 3)]
    assert [tuple(feature.shape) for feature in features] == shapes
    two = v2m.create_model(
        name,
        features_only=True,
        out_indices=(0, 2),
        dims=(16, 24, 32, 48),
        depths=(1, 1, 1, 1),
    )
    assert two.feature_info.reduction() == [4, 16]
    assert len(two.model.layers) == 3
    assert sum(p.numel() for p in two.model.layers[2].downsample.parameters()) == 0


def test_the_final_norm_is_for_the_last_map_alone():
    model = small("v2m_hier_small_224").eval()
    images = images_for(model)
    plain = model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
    final, normed = model.forward_intermediates(images, norm=True, output_fmt="NHWC")
    for before, after in zip(plain[:3], normed[:3]):
        assert torch.equal(before, after)
    assert torch.equal(normed[3], model.classifier["norm"](plain[3]))
    assert torch.equal(final, model.forward_features(images))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_copies_checkpointing(name):
    model = small(name, num_classes=5).train()
    images = images_for(model, size=(64, 96))  # a line of one token has no use for A
    torch.manual_seed(3)
    model(images).square().sum().backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters()}
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads.values())

    model.zero_grad()
    model.set_grad_checkpointing(True)
    torch.manual_seed(3)
    model(images).square().sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[key])

    model.eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), model(images))


@pytest.mark.parametrize("name", NAMES)
def test_built_on_meta_and_filled_later(name):
    with torch.device("meta"):
        model = small(name)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.init_weights()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    mixer = model.layers[2].blocks[0].op
    biases = (
        [mixer.dt_projs_bias] if "vmamba" in name else [mixer.dt_proj.bias, mixer.dt_proj_2.bias]
    )
    for bias in biases:
        dt = F.softplus(bias)
        assert dt.min() >= 0.99e-3
        assert dt.max() <= 1.01e-1


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_spares_the_state(name):
    model = small(name)
    exempt = model.no_weight_decay()
    leaves = {name.rsplit(".")[-1] for name in exempt}
    expected = {"A_logs", "Ds", "dt_projs_bias"} if "vmamba" in name else set()
    assert leaves == (expected or {"A_log", "A_2_log", "D", "D_2"})


def test_release_geometry_needs_a_square_grid():
    model = small("v2m_hier_small_224", scan="release")
    assert torch.isfinite(model(images_for(model))).all()
    with pytest.raises(InputError, match=r'scan="release" needs a square grid; got 16 x 24'):
        model(images_for(model, size=(64, 96)))


@pytest.mark.parametrize("name", NAMES)
def test_directory_round_trip(name, tmp_path):
    model = fill_deterministically(small(name, num_classes=3)).eval()
    v2m.models.save_model(model, tmp_path, label_names=["a", "b", "c"])
    again = v2m.from_checkpoint(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(images_for(model)), model(images_for(model)))


def test_compiles_whole():
    model = small("v2m_hier_small_224").eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for size in ((64, 64), (96, 64)):
        images = images_for(model, size=size)
        torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize(
    ("name", "sizes", "maps"),
    [
        ("v2m_hier_small_224", {"dims": [8, 16], "depths": [1, 1]}, 2),
        ("v2m_nano_patch4_28", {"embed_dim": 8, "depth": 1}, 1),
        ("v2m_nano_patch4_28", {"embed_dim": 8, "depth": 4}, 3),
    ],
)
def test_default_feature_maps_are_no_more_than_there_are(name, sizes, maps):
    model = v2m.create_model(name, features_only=True, in_chans=3, **sizes)
    assert len(model(torch.randn(1, 3, 28, 28))) == maps
