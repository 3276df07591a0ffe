"""Vim and VMamba: the numbers of their published code, and the recognition of their files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import v2m
from helpers import available_backends, device_of, relative_error
from v2m.errors import InputError
from v2m.models import VMamba
from v2m.ops import use_backend

GOLDEN = Path(__file__).parent.parent / "golden"
SIZES = {
    "vim": {"img_size": 64, "embed_dim": 48, "depth": 3, "num_classes": 10},
    "vmamba": {"dims": (16, 32, 64, 128), "depths": (1, 1, 2, 1), "num_classes": 10},
}
NAMES = {"vim": "vim_tiny_patch16_224", "vmamba": "vmamba_tiny_224"}


def small_state(family: str) -> dict[str, torch.Tensor]:
    """The published names at the size of the golden case."""
    case = load_file(GOLDEN / f"{family}_model.safetensors")
    return {k.removeprefix("param/"): v for k, v in case.items() if k.startswith("param/")}


def published_state(family: str) -> dict[str, torch.Tensor]:
    """Random tensors of every name and shape of the published full-size model."""
    shapes = json.loads((GOLDEN / f"{family}_tiny_state_dict_shapes.json").read_text())
    return {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("family", SIZES)
def test_golden(family, backend):
    case = load_file(GOLDEN / f"{family}_model.safetensors", device=device_of(backend))
    model = v2m.create_model(NAMES[family], **SIZES[family]).to(device_of(backend)).eval()
    model.load_state_dict(small_state(family))
    images = case["input"].requires_grad_(True)
    with use_backend(backend):
        logits = model(images)
        (logits * case["cotangent"]).sum().backward()
    assert relative_error(logits, case["output"]) <= 1e-5
    assert relative_error(images.grad, case["grad/input"]) <= 1e-5
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, case[f"grad/{name}"]) <= 1e-5, name


@pytest.mark.parametrize("family", SIZES)
def test_published_file_is_recognised_and_loaded_strictly(family, tmp_path):
    state = published_state(family)
    path = tmp_path / "published.pth"
    torch.save({"model": state, "epoch": 299}, path)
    model = v2m.from_checkpoint(path)
    assert model.pretrained_cfg["architecture"] == NAMES[family]
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], state[name]) for name in state)


@pytest.mark.parametrize("family", SIZES)
def test_a_tensor_more_or_less_is_named(family):
    state = small_state(family)
    missing = next(name for name in state if name.endswith("norm.bias") or "b.bias" in name)
    del state[missing]
    state["layers.0.surprise"] = torch.zeros(1)
    with pytest.raises(InputError, match=f"missing: {missing}.*unknown: layers.0.surprise"):
        v2m.from_checkpoint(state)


def test_vmamba_releases_with_other_names_and_shapes_are_the_same():
    """1x1 convolutions for linear layers, modules for the stacked projections."""
    state = small_state("vmamba")
    other = {}
    for name, tensor in state.items():
        if name.endswith(("x_proj_weight", "dt_projs_weight")):
            name, tensor = name.replace("_weight", ".weight"), tensor.flatten(0, 1)
        elif name.endswith(("in_proj.weight", "fc1.weight")):
            tensor = tensor[..., None, None]
        other[name] = tensor
    expected = v2m.from_checkpoint(state).state_dict()
    got = v2m.from_checkpoint(other).state_dict()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("name", "parameters", "gflops"),
    [  # the published columns: Vim's are parameters alone
        ("vim_tiny_patch16_224", 7e6, None),
        ("vim_small_patch16_224", 26e6, None),
        ("vim_base_patch16_224", 98e6, None),
        ("vmamba_tiny_224", 30.2e6, 4.86e9),
        ("vmamba_small_224", 50.1e6, 8.72e9),
        ("vmamba_base_224", 88.6e6, 15.36e9),
    ],
)
def test_published_sizes(name, parameters, gflops):
    from v2m.models.table import model_row

    row = model_row(name)
    assert row.parameters == pytest.approx(parameters, rel=0.05)
    assert gflops is None or row.multiply_adds == pytest.approx(gflops, rel=0.12)


def test_vim_class_token_stands_in_the_middle():
    """Its position embedding is resampled around it, and feature maps leave it out."""
    model = v2m.create_model("vim_tiny_patch16_224", embed_dim=16, depth=1, img_size=(32, 48))
    token = model.pos_embed[:, 3].clone()
    model.set_input_size((64, 48))
    assert model.pos_embed.shape == (1, 13, 16)
    assert torch.equal(model.pos_embed[:, 6], token)
    features = model.forward_features(torch.randn(2, 3, 64, 48))
    assert features.shape == (2, 1, 13, 16)
    (feature_map,) = model.forward_intermediates(
        torch.randn(2, 3, 80, 48), indices=1, intermediates_only=True
    )
    assert feature_map.shape == (2, 16, 5, 3)


def test_vim_pools_the_token_or_the_patches():
    model = v2m.create_model("vim_tiny_patch16_224", embed_dim=16, depth=1, img_size=32).eval()
    x = torch.randn(2, 1, 5, 16)
    assert torch.equal(model.forward_head(x, pre_logits=True), x[:, 0, 2])
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model.forward_head(x), x[:, 0, [0, 1, 3, 4]].mean(1))


def test_vmamba_reads_the_columns_as_columns():
    """With one set of weights for all routes, transposing the grid swaps rows and columns."""
    mixer = v2m.layers.CrossScan2d(8)
    with torch.no_grad():
        for parameter in (mixer.x_proj_weight, mixer.dt_projs_weight, mixer.dt_projs_bias):
            parameter.copy_(parameter[:1].expand_as(parameter))
        kernel = mixer.conv2d.weight
        kernel.copy_(kernel + kernel.transpose(2, 3))
    x = torch.randn(1, 3, 5, 8)
    torch.testing.assert_close(mixer(x.transpose(1, 2)).transpose(1, 2), mixer(x))
    column = x[:, :, :1]
    by_rows = mixer._both_ways(column, 0)
    torch.testing.assert_close(mixer._both_ways(column.transpose(1, 2), 1).transpose(1, 2), by_rows)


def test_no_weights_are_downloaded():
    with pytest.raises(InputError, match=r"Vim's and VMamba's are files of their authors"):
        v2m.create_model("vmamba_tiny_224", pretrained=True)


def test_first_release_of_vmamba_is_refused():
    state = {"layers.0.blocks.0.self_attention.A_logs": torch.zeros(1)}
    with pytest.raises(InputError, match=r"no known format.*VMamba"):
        v2m.from_checkpoint(state)


def test_stages_must_agree():
    with pytest.raises(InputError, match="`depths` and `dims` must have one number a stage each"):
        VMamba(depths=(1, 1), dims=(16,))
    with pytest.raises(InputError, match="`dims` must be a list of whole numbers"):
        VMamba(dims=96)
    with pytest.raises(InputError, match="`ssm_ratio` must be a number above 0; got 0"):
        VMamba(ssm_ratio=0)
