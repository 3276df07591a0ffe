"""Keywords of the models: each wrong one is named."""

import re

import pytest
import timm
import torch

import v2m
from v2m.errors import InputError
from v2m.models import PlainConfig

WRONG = [
    ({"embed_dims": 32}, "unknown model keyword 'embed_dims'. Did you mean 'embed_dim'? Known key"),
    ({"qkv_bias": True}, "unknown model keyword 'qkv_bias'."),
    ({"embed_dim": 0}, "`embed_dim` must be a whole number of at least 1; got 0."),
    ({"embed_dim": 32.0}, "`embed_dim` must be a whole number of at least 1; got 32.0."),
    ({"depth": True}, "`depth` must be a whole number of at least 1; got True."),
    ({"depth": -1}, "`depth` must be a whole number"),
    ({"patch_size": 0}, "`patch_size` must be a whole number"),
    ({"in_chans": 0}, "`in_chans` must be a whole number of at least 1; got 0."),
    ({"num_classes": -1}, "`num_classes` must be a whole number of at least 0; got -1."),
    ({"num_classes": "10"}, "`num_classes` must be a whole number of at least 0; got '10'."),
    ({"d_state": 0}, "`d_state` must be a whole number"),
    ({"d_conv": 0}, "`d_conv` must be a whole number"),
    ({"expand": 0}, "`expand` must be a whole number"),
    ({"dt_rank": 0}, "`dt_rank` must be a whole number"),
    ({"drop_rate": 1.0}, "`drop_rate` must be a number from 0 to below 1; got 1.0."),
    ({"drop_path_rate": -0.1}, "`drop_path_rate` must be a number from 0 to below 1; got -0.1."),
    ({"drop_path_rate": float("nan")}, "`drop_path_rate` must be a number"),
    ({"drop_path_rate": "0.1"}, "`drop_path_rate` must be a number"),
    ({"norm_eps": 0.0}, "`norm_eps` must be a number above 0; got 0.0."),
    ({"norm_eps": "1e-5"}, "`norm_eps` must be a number above 0; got '1e-5'."),
    ({"scan": "zigzag"}, "`scan` must be one of corners, corner, opposite_corners"),
    ({"scan": ["corners"]}, "`scan` must be one of corners"),
    ({"global_pool": "median"}, "`global_pool` must be one of"),
    ({"img_size": (64, 64, 64)}, "`img_size` must be one number or (height, width); got (64, 64,"),
    ({"img_size": 0}, "`img_size` must be a whole number of at least 1; got 0."),
    ({"img_size": 64.0}, "`img_size` must be one number or (height, width); got 64.0."),
    ({"img_size": "64"}, "`img_size` must be"),
    ({"img_size": 65}, "`img_size` must have a height and width that are multiples of the patch"),
    ({"img_size": (64, 72)}, "got 64 x 72. Resize or crop, or build the model with dynamic_img_pa"),
    (
        {"windows": 7},
        "`windows` must have a row for each layer (repeated over the depth) of 4 whole",
    ),
    ({"windows": ((0, 7),)}, "one a direction, 0 for the whole grid; got ((0, 7),)."),
    ({"dynamic_img_pad": "yes"}, "`dynamic_img_pad` must be True or False; got 'yes'."),
]


@pytest.mark.parametrize(("keywords", "message"), WRONG)
def test_each_wrong_keyword_is_named(keywords, message):
    with pytest.raises(InputError, match=re.escape(message)):
        v2m.create_model("v2m_tiny_patch16_224", **{"depth": 1, **keywords})


def test_unknown_models_get_the_nearest_name():
    message = "unknown model 'v2m_tiny_patch16'. Did you mean 'v2m_tiny_patch16_224'? Known models:"
    with pytest.raises(InputError, match=re.escape(message)):
        v2m.create_model("v2m_tiny_patch16")


def test_what_create_model_is_asked_for():
    with pytest.raises(InputError, match="`name` must be the name of a model; got 5"):
        v2m.create_model(5)
    with pytest.raises(InputError, match="`out_indices` chooses feature maps: pass features_only"):
        v2m.create_model("v2m_nano_patch4_28", out_indices=(0, 1))
    with pytest.raises(InputError, match="got 'a'"):
        v2m.create_model("v2m_nano_patch4_28", features_only=True, out_indices="a")


def test_configurations_are_frozen_and_by_keyword():
    config = PlainConfig()
    with pytest.raises(AttributeError):
        config.depth = 3
    with pytest.raises(TypeError):
        PlainConfig(224)
    assert config.img_size == (224, 224)
    assert config.grid_size == (14, 14)


def test_timm_and_v2m_build_the_same():
    keywords = {"embed_dim": 32, "depth": 2, "img_size": (32, 64), "num_classes": 3, "in_chans": 4}
    models = []
    for create in (timm.create_model, v2m.create_model):
        torch.manual_seed(0)
        models.append(create("v2m_small_patch16_224", **keywords))
    images = torch.randn(2, 4, 32, 64)
    assert torch.equal(models[0](images), models[1](images))
    assert models[0].config == models[1].config


def test_other_models_of_timm_can_be_made_too():
    assert v2m.create_model("test_vit", num_classes=2)(torch.randn(1, 3, 160, 160)).shape == (1, 2)


PARAMETERS = {
    "v2m_tiny_patch16_224": 6.85,
    "v2m_small_patch16_224": 25.2,
}


@pytest.mark.parametrize(("name", "millions"), PARAMETERS.items())
def test_parameter_counts_of_the_published_code(name, millions):
    with torch.device("meta"):
        model = v2m.create_model(name)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.05)


def test_the_nano_model_mixes_positions_with_the_scan_alone():
    """One strided patch convolution without overlap, then nothing spatial but the mixers."""
    model = v2m.create_model("v2m_nano_patch4_28")
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 1
    assert convolutions[0].kernel_size == convolutions[0].stride == (4, 4)
    assert len(model.layers) == 4
    assert model.embed_dim == 64
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
