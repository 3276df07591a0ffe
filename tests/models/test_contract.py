"""timm's whole model interface, over every registered name."""

import re

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

import v2m
from helpers import images_for, relative_error, small
from v2m.errors import InputError

# Cut down, the sizes of a family are nearly one: the default run takes one of each, `-m slow` all.
FIRST_OF_A_FAMILY = {
    "v2m_nano_patch4_28",
    "v2m_tiny_patch16_224",
    "v2m_local_tiny_patch16_224",
    "v2m_hier_small_224",
    "vim_tiny_patch16_224",
    "vmamba_tiny_224",
}
pytestmark = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FIRST_OF_A_FAMILY else pytest.mark.slow)
        for name in v2m.list_models()
    ],
)


def stretched(model) -> tuple[int, int]:
    """Half as wide again as the model's own size: never square."""
    side = model.config.img_size[0]
    return side, side + side // 2


def maps(model) -> int:
    return len(model.feature_info)


def test_timm_knows_the_name(name):
    assert timm.is_model(name)
    assert name in timm.list_models("v[2im]m*") + timm.list_models("vmamba*")
    model = small(name)
    assert model.pretrained_cfg["architecture"] == name
    assert model.default_cfg["input_size"][0] == model.config.in_chans
    first, head = model.pretrained_cfg["first_conv"], model.pretrained_cfg["classifier"]
    assert model.get_submodule(first).weight.shape[1] == model.config.in_chans
    assert isinstance(model.get_submodule(head), nn.Linear)
    with pytest.raises(InputError, match=f"there are no pretrained weights for {name!r}"):
        v2m.create_model(name, pretrained=True)


def test_checkpointing_recomputes_with_the_backend_of_the_forward(name):
    model = small(name, drop_path_rate=0.0).train()
    images = images_for(model, 2)
    with v2m.ops.use_backend("eager"):
        model(images).sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    with v2m.ops.use_backend("eager"):
        y = model(images).sum()
    y.backward()
    for gradient, parameter in zip(expected, model.parameters()):
        assert gradient is None or relative_error(parameter.grad, gradient) < 1e-6


def test_an_image_without_pixels(name):
    model = small(name).eval()
    channels = model.config.in_chans
    with pytest.raises(InputError, match="at least one pixel"):
        model(torch.zeros(1, channels, 0, 32))


def test_features_and_head(name):
    model = small(name, num_classes=7).eval()
    images = images_for(model, 3)
    features = model.forward_features(images)
    assert features.shape[0] == 3
    assert features.shape[-1] == model.num_features == model.head_hidden_size
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (3, model.num_features)
    logits = model(images)
    assert logits.shape == (3, 7)
    assert torch.equal(model.forward_head(features), logits)
    assert torch.equal(model.get_classifier()(pooled), logits)


def test_without_pooling_the_head_is_applied_everywhere(name):
    model = small(name, num_classes=0, global_pool="").eval()
    images = images_for(model)
    assert torch.equal(model(images), model.forward_features(images))


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_pooling_is_over_the_feature_map(name, pooling):
    model = small(name, global_pool=pooling).eval()
    images = images_for(model)
    final, features = model.forward_intermediates(images, indices=1, norm=True, output_fmt="NHWC")
    pooled = model.forward_head(final, pre_logits=True)
    grid = features[0]
    expected = grid.mean(dim=(1, 2)) if pooling == "avg" else grid.amax(dim=(1, 2))
    torch.testing.assert_close(pooled, expected, rtol=1e-6, atol=1e-6)


def test_intermediates(name):
    model = small(name).eval()
    images = images_for(model, size=stretched(model))
    final, everything = model.forward_intermediates(images)
    assert len(everything) == maps(model)
    assert torch.equal(final, model.forward_features(images))
    for info, feature in zip(model.feature_info, everything):
        expected = (
            2,
            info["num_chs"],
            *(-(-side // info["reduction"]) for side in images.shape[-2:]),
        )
        assert feature.shape == expected
        assert feature.is_contiguous()

    channels_last = model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
    for feature, other in zip(everything, channels_last):
        assert torch.equal(feature, other.permute(0, 3, 1, 2))

    for indices, kept in (([0], [0]), ([0, -1], [0, -1]), (1, [-1]), (2, [-2, -1])):
        some = model.forward_intermediates(images, indices=indices, intermediates_only=True)
        assert len(some) == len(kept)
        for feature, index in zip(some, kept):
            assert torch.equal(feature, everything[index])

    stopped = model.forward_intermediates(images, [0], stop_early=True, intermediates_only=True)
    assert torch.equal(stopped[0], everything[0])
    calls = []
    hook = model.layers[-1].register_forward_hook(lambda *_: calls.append(1))
    hooks = [b.register_forward_hook(lambda *_: calls.append(1)) for b in blocks_of(model)[-1:]]
    model.forward_intermediates(images, [0], stop_early=True, intermediates_only=True)
    assert not calls
    model.forward_intermediates(images, [0], intermediates_only=False)
    assert calls
    for handle in (hook, *hooks):
        handle.remove()


def blocks_of(model) -> list[nn.Module]:
    return [b for layer in model.layers for b in getattr(layer, "blocks", [layer])]


def test_the_final_norm_of_the_last_map(name):
    model = small(name).eval()
    images = images_for(model)
    plain, normed = (
        model.forward_intermediates(
            images, 1, norm=norm, output_fmt="NHWC", intermediates_only=True
        )[0]
        for norm in (False, True)
    )
    final_norm = model.get_submodule(model.final_norm_name)
    torch.testing.assert_close(final_norm(plain), normed, rtol=1e-5, atol=1e-6)
    assert relative_error(plain, normed) > 1e-3


def test_intermediates_refuse_other_formats_and_indices(name):
    model = small(name)
    with pytest.raises(InputError, match="`output_fmt` must be 'NCHW' or 'NHWC'; got 'NLC'"):
        model.forward_intermediates(images_for(model), output_fmt="NLC")
    message = r"`indices` \(timm's `out_indices`\) must be .* got \[99\]"
    with pytest.raises(InputError, match=message):
        model.forward_intermediates(images_for(model), indices=[99])


def test_features_only(name):
    whole = small(name).eval()
    count = maps(whole)
    for out_indices in (None, (0, count - 1), (-1,)):
        keywords = {} if out_indices is None else {"out_indices": out_indices}
        if out_indices is None and count < 3:
            keywords = {"out_indices": (0, 1)}
        backbone = small(name, features_only=True, **keywords).eval()
        images = images_for(whole)
        features = backbone(images)
        assert [f.shape[1] for f in features] == backbone.feature_info.channels()
        reductions = backbone.feature_info.reduction()
        sides = [-(-images.shape[-1] // reduction) for reduction in reductions]
        assert [f.shape[-1] for f in features] == sides
    backbone.load_state_dict(whole.state_dict(), strict=False)
    inner = next(m for m in backbone.modules() if type(m) is type(whole))
    expected = whole.forward_intermediates(images, 1, intermediates_only=True)[0]
    missing = inner.load_state_dict(whole.state_dict(), strict=False).missing_keys
    assert not missing
    assert torch.equal(backbone(images)[0], expected)


def test_features_of_the_full_depth_by_default(name):
    with torch.device("meta"):
        backbone = v2m.create_model(name, features_only=True)
    assert len(backbone.feature_info.channels()) in (3, 4)


def test_reset_classifier(name):
    model = small(name, num_classes=7).eval()
    images = images_for(model)
    model.reset_classifier(5)
    assert model(images).shape == (2, 5)
    assert model.num_classes == model.config.num_classes == 5
    assert float(model.get_classifier().weight.detach().std()) == pytest.approx(0.02, rel=0.3)
    assert not model.get_classifier().bias.any()
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(images).shape == (2, model.num_features)
    model.reset_classifier(3, "max")
    assert model.global_pool == model.config.global_pool == "max"
    assert model(images).shape == (2, 3)
    for wrong, message in (
        (-1, "`num_classes` must be a whole number of at least 0; got -1."),
        (2.5, "`num_classes` must be a whole number of at least 0; got 2.5."),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            model.reset_classifier(wrong)
    with pytest.raises(InputError, match="`global_pool` must be one of"):
        model.reset_classifier(3, "median")
    assert model.num_classes == 3


def test_reset_classifier_keeps_device_and_type(name):
    model = small(name).to(torch.bfloat16)
    model.reset_classifier(4)
    assert model.get_classifier().weight.dtype == torch.bfloat16
    assert model(images_for(model)).dtype == torch.bfloat16


def test_what_weight_decay_leaves_alone(name):
    model = small(name)
    exempt = model.no_weight_decay()
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=exempt)
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {named[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    spared = {named[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
    assert decayed | spared == set(named.values())
    left_alone = re.compile(
        r"(^|\.)(A\w*_log|A_logs|D|D_2|D_b|Ds|dt_projs_bias|bias|pos_embed|cls_token)$"
        r"|norm\w*\.weight$|^patch_embed\.[27]\.|downsample\.3\."
    )
    for parameter in decayed | spared:
        assert (parameter in spared) == bool(left_alone.search(parameter)), parameter
    assert any("A" in n for n in spared)
    assert any("in_proj.weight" in n for n in decayed)


@pytest.mark.parametrize("coarse", [False, True])
def test_groups_cover_every_parameter_in_order_of_depth(name, coarse):
    model = small(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    of = {parameter: group for group, members in groups.items() for parameter in members}
    assert of.keys() == {n for n, _ in model.named_parameters()}
    assert sorted(groups) == list(range(len(groups)))
    assert all(of[n] == 0 for n in of if n.startswith(("patch_embed", "pos_embed", "cls_token")))
    last = max(groups)
    head = model.pretrained_cfg["classifier"]
    assert of[f"{head}.weight"] == of[f"{head}.bias"] == last
    block_groups = []
    for layer, _ in enumerate(model.layers):
        members = {of[n] for n in of if n.startswith(f"layers.{layer}.") and "downsample" not in n}
        assert 0 < min(members) <= max(members) < last
        assert not block_groups or min(members) > block_groups[-1]
        block_groups.append(max(members))
        assert len(members) == (1 if coarse else len(getattr(model.layers[layer], "blocks", "1")))


def test_layer_wise_learning_rates(name):
    groups = param_groups_layer_decay(small(name), layer_decay=0.5)
    assert max(group["lr_scale"] for group in groups) == 1
    assert min(group["lr_scale"] for group in groups) < 0.5


def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = small(name).train()
    images = images_for(model).requires_grad_()
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        images.grad = None
        torch.manual_seed(0)
        model(images).square().sum().backward()
        results.append([images.grad, *(p.grad for p in model.parameters())])
    for expected, got in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_gradient_checkpointing_recomputes_each_block(name):
    model = small(name).train()
    calls = []
    for block in blocks_of(model):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    model.set_grad_checkpointing()
    model(images_for(model)).sum().backward()
    assert len(calls) == 2 * len(blocks_of(model))


def test_set_input_size(name):
    model = small(name).eval()
    size, side = stretched(model), model.config.img_size[0]
    before = model(images_for(model, size=size))
    model.set_input_size(size)
    assert model.config.img_size == size
    # The embedding resampled once and for all, or at every call: the same.
    torch.testing.assert_close(model(images_for(model, size=size)), before, rtol=1e-4, atol=1e-5)
    model.set_input_size(2 * side)
    assert model(images_for(model)).shape == before.shape
    assert model.config.img_size == (2 * side, 2 * side)


def test_prune_intermediate_layers(name):
    model = small(name).eval()
    images = images_for(model)
    expected = model.forward_intermediates(images, [0], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([0], prune_norm=True) == [0]
    assert len(model.layers) == 1
    assert model.num_classes == 0
    assert isinstance(model.get_classifier(), nn.Identity)
    assert isinstance(model.get_submodule(model.final_norm_name), nn.Identity)
    got = model.forward_intermediates(images, [0], intermediates_only=True)[0]
    assert torch.equal(got, expected)
    other = small(name)
    other.prune_intermediate_layers(1, prune_head=False)
    assert len(other.layers) == maps(model)
    assert other(images).shape[1] == other.num_classes


def test_drop_path_grows_linearly_and_acts_in_training_only(name):
    model = small(name, drop_path_rate=0.5)
    rates = [
        next((m.drop_prob for m in block.modules() if isinstance(m, DropPath)), 0.0)
        for block in blocks_of(model)
    ]
    expected = [0.5 * i / (len(rates) - 1) for i in range(len(rates))]
    assert rates == pytest.approx(expected)
    images = images_for(model, 8)
    model.eval()
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_drop_rate_acts_before_the_head(name):
    model = small(name, drop_rate=0.5).train()
    images = images_for(model)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    zeros = (features == 0).float().mean()
    assert 0.2 < zeros < 0.8
    model.eval()
    assert torch.equal(model(images), model(images))


def test_a_classification_step_lowers_the_loss(name):
    model = small(name, num_classes=3).train()
    images, targets = images_for(model, 6), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
