"""Starting a V2M from Vim or VMamba: what is carried over, from where, and the report."""

import pytest
import torch

import v2m
from helpers import fill_deterministically, images_for, small
from v2m.errors import InputError
from v2m.models import save_model

PLAIN = {"embed_dim": 32, "depth": 2, "img_size": 64}
STAGES = {"dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1)}


@pytest.fixture(scope="module")
def vim():
    model = small("vim_tiny_patch16_224", num_classes=5, **PLAIN)
    return fill_deterministically(model).state_dict()


@pytest.fixture(scope="module")
def vmamba():
    model = small("vmamba_tiny_224", num_classes=5, **STAGES)
    return fill_deterministically(model).state_dict()


def test_vim_into_plain(vim):
    model = v2m.from_checkpoint(vim, into="v2m_tiny_patch16_224", **PLAIN)
    own, mixer, rank, states = model.state_dict(), "layers.1.mixer.", 2, 16
    assert model.config.scan == "corners"
    assert model.num_classes == 5
    for name in ("norm_f.weight", "head.weight", "patch_embed.proj.weight", "layers.0.norm.weight"):
        assert torch.equal(own[name], vim[name])
    for name in (
        "in_proj.weight",
        "out_proj.weight",
        "conv1d.weight",
        "A_log",
        "D",
        "dt_proj.bias",
    ):
        assert torch.equal(own[mixer + name], vim[mixer + name])
    assert torch.equal(own[mixer + "A_2_log"], vim[mixer + "A_b_log"])
    assert torch.equal(own[mixer + "D_2"], vim[mixer + "D_b"])
    assert torch.equal(own[mixer + "dt_proj_2.bias"], vim[mixer + "dt_proj_b.bias"])
    first, second = vim[mixer + "x_proj.weight"], vim[mixer + "x_proj_b.weight"]
    assert torch.equal(own[mixer + "x_proj.weight"], first[: rank + states])
    assert torch.equal(own[mixer + "x_proj_2.weight"][:rank], second[:rank])
    assert torch.equal(own[mixer + "x_proj_2.weight"][rank:], second[rank + states :])
    position = vim["pos_embed"]
    assert torch.equal(own["pos_embed"], torch.cat((position[:, :8], position[:, 9:]), dim=1))
    report = model.warm_start
    assert report.fresh == ()
    assert report.unused == ("cls_token",)
    assert report.carried[mixer + "x_proj_2.weight"] == mixer + "x_proj_b.weight[dt, C]"
    assert set(report.carried) == set(own)
    assert torch.isfinite(model(images_for(model))).all()


def test_class_token_keeps_its_place(vim):
    model = v2m.from_checkpoint(
        vim, into="v2m_tiny_patch16_224", **PLAIN, class_token=True, global_pool="token"
    )
    expected = vim["cls_token"] + vim["pos_embed"][:, 8:9]
    assert torch.equal(model.cls_token, expected)
    assert model.warm_start.unused == ()


def test_other_grid_depth_and_classes_are_reported(vim):
    model = v2m.from_checkpoint(
        vim,
        into="v2m_tiny_patch16_224",
        embed_dim=32,
        depth=3,
        img_size=(64, 96),
        num_classes=7,
    )
    report = model.warm_start
    assert model.pos_embed.shape == (1, 24, 32)
    assert report.carried["pos_embed"] == "pos_embed[patches][resampled]"
    assert {"head.weight", "head.bias", "layers.2.norm.weight"} <= set(report.fresh)
    assert {"head.weight", "head.bias"} <= set(report.unused)
    text = str(report)
    assert f"{len(report.carried)} tensors carried over, {len(report.fresh)} start fresh" in text
    assert "not used: " in text
    assert "layers.2.mixer.A_log" in text


def test_vmamba_into_hierarchical(vmamba):
    model = v2m.from_checkpoint(vmamba, into="v2m_hier_small_224", **STAGES)
    own, op = model.state_dict(), "layers.2.blocks.0.op."
    rows, columns = vmamba[op + "x_proj_weight"][:2]
    assert torch.equal(own[op + "x_proj.weight"], rows[:3])
    assert torch.equal(own[op + "x_proj_2.weight"], columns[[0, 1, 3]])
    assert torch.equal(own[op + "A_log"], vmamba[op + "A_logs"][:32])
    assert torch.equal(own[op + "A_2_log"], vmamba[op + "A_logs"][32:64])
    assert torch.equal(own[op + "D_2"], vmamba[op + "Ds"][32:64])
    assert torch.equal(own[op + "dt_proj_2.weight"], vmamba[op + "dt_projs_weight"][1])
    assert torch.equal(own[op + "dt_proj.bias"], vmamba[op + "dt_projs_bias"][0])
    for name in ("patch_embed.5.weight", "layers.0.downsample.1.bias", "classifier.head.weight"):
        assert torch.equal(own[name], vmamba[name])
    assert model.warm_start.fresh == ()
    assert model.warm_start.unused == ()
    assert torch.isfinite(model(images_for(model))).all()


def test_from_a_directory_with_its_class_names(vim, tmp_path):
    model = small("vim_tiny_patch16_224", num_classes=3, **PLAIN)
    save_model(model, tmp_path, label_names=["a", "b", "c"])
    started = v2m.from_checkpoint(tmp_path, into="v2m_tiny_patch16_224", **PLAIN)
    assert started.pretrained_cfg["label_names"] == ["a", "b", "c"]
    save_model(started, tmp_path / "next")
    again = v2m.from_checkpoint(tmp_path / "next")
    assert torch.equal(again(images_for(again)), started(images_for(started)))


def test_preprocessing_and_channels_of_the_source(vim, tmp_path):
    model = small("vim_tiny_patch16_224", num_classes=3, **PLAIN)
    half = {"mean": (0.4, 0.5, 0.6), "std": (0.5, 0.5, 0.5), "crop_pct": 0.9}
    save_model(model, tmp_path, pretrained_cfg=half | {"interpolation": "bilinear"})
    into = {"into": "v2m_tiny_patch16_224", **PLAIN}
    cfg = v2m.from_checkpoint(tmp_path, **into).pretrained_cfg
    assert (tuple(cfg["mean"]), tuple(cfg["std"])) == (half["mean"], half["std"])
    assert (cfg["crop_pct"], cfg["interpolation"], cfg["num_classes"]) == (0.9, "bilinear", 3)
    grey = v2m.from_checkpoint(tmp_path, in_chans=1, **into)
    assert grey.pretrained_cfg["input_size"][0] == 1
    assert tuple(grey.pretrained_cfg["mean"]) == pytest.approx((0.5,))
    weight = model.state_dict()["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(grey.state_dict()["patch_embed.proj.weight"], weight)


def test_nothing_in_common_is_an_error(vmamba):
    with pytest.raises(InputError, match="nothing in the layers of the checkpoint, a VMamba"):
        v2m.from_checkpoint(vmamba, into="v2m_tiny_patch16_224", **PLAIN)
    with pytest.raises(InputError, match="unknown model 'v2m_tinny"):
        v2m.from_checkpoint(vmamba, into="v2m_tinny_patch16_224")
