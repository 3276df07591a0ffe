"""Checkpoints: published formats, our own, what overrides change, and what each error names."""

import argparse
import json
import re
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

import v2m
from helpers import (
    available_backends,
    device_of,
    fill_deterministically,
    images_for,
    relative_error,
    small,
)
from v2m.errors import InputError
from v2m.models import V2M, checkpoint, read_config, save_model
from v2m.ops import use_backend


@pytest.fixture(scope="module")
def golden_folder(request):
    return request.config.rootpath / "tests" / "golden"


@pytest.fixture(scope="module")
def published(golden_folder):
    """The tensors of a whole published model, 64 px, patch 16, 3 layers of 48, 10 classes."""
    golden = load_file(golden_folder / "v2m_release_model.safetensors")
    return {k.removeprefix("param/"): v for k, v in golden.items() if k.startswith("param/")}


# ----------------------------------------------------------------------------- published


@pytest.mark.parametrize("backend", available_backends())
def test_a_whole_published_model(golden_folder, published, backend):
    golden = load_file(golden_folder / "v2m_release_model.safetensors")
    device = device_of(backend)
    model = v2m.from_checkpoint(published).to(device)
    assert isinstance(model, V2M)
    assert not model.training
    config = model.config
    assert (config.scan, config.img_size, config.patch_size) == ("release", (64, 64), 16)
    assert (config.embed_dim, config.depth, config.num_classes) == (48, 3, 10)
    images = golden["input"].to(device, copy=True).requires_grad_()
    with use_backend(backend):
        logits = model(images)
        logits.backward(golden["cotangent"].to(device))
    got = {"output": logits, "grad/input": images.grad}
    got |= {f"grad/{name}": p.grad for name, p in model.named_parameters()}
    assert got.keys() == {k for k in golden if k.startswith("grad/")} | {"output"}
    errors = {key: relative_error(value, golden[key]) for key, value in got.items()}
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize(("size", "width", "millions"), [("tiny", 192, 6.85), ("small", 384, 25.2)])
def test_every_name_and_shape_of_the_full_size_published_models(
    golden_folder, size, width, millions
):
    file = golden_folder / f"v2m_{size}_release_state_dict_shapes.json"
    shapes = json.loads(file.read_text(encoding="utf-8"))
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    model = v2m.from_checkpoint(state)
    assert model.config.embed_dim == width
    assert model.config.depth == 24
    assert model.config.scan == "release"
    assert model.pretrained_cfg["architecture"] == f"v2m_{size}_patch16_224"
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


WRAPPERS = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state},
    "training": lambda state: {
        "model": state,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 299,
        "args": argparse.Namespace(model="vim", lr=5e-4, nested=argparse.Namespace(a=[1, None])),
    },
    "ddp": lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
    "compiled": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
    "compiled ddp": lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
    "ddp of compiled": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
}


@pytest.mark.parametrize("wrapper", list(WRAPPERS))
def test_training_checkpoints_are_unwrapped(published, wrapper, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(WRAPPERS[wrapper](published), path)
    for source in (path, str(path), WRAPPERS[wrapper](published)):
        loaded = v2m.from_checkpoint(source).state_dict()
        assert loaded.keys() == published.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in published.items())


def test_settings_of_yacs_are_read_as_plain_dicts(published, tmp_path, monkeypatch):
    """As in VMamba's training checkpoints; yacs itself need not be there."""

    class CfgNode(dict):
        __module__ = "yacs.config"
        __qualname__ = "CfgNode"

        def __init__(self, content):
            super().__init__(content)
            self.__dict__["__immutable__"] = True

    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    settings = CfgNode({"MODEL": CfgNode({"TYPE": "vssm"}), "TAGS": [1, 2]})
    torch.save({"model": published, "config": settings}, tmp_path / "checkpoint.pth")
    monkeypatch.undo()
    loaded = v2m.from_checkpoint(tmp_path / "checkpoint.pth").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in published.items())


def test_a_source_that_is_none():
    with pytest.raises(InputError, match="`source` must be a path or a state dict; got a None"):
        v2m.from_checkpoint(None)


def test_saved_preprocessing_has_a_mean_for_each_channel(tmp_path):
    model = v2m.create_model("v2m_tiny_patch16_224", in_chans=1, img_size=32, depth=1)
    save_model(model, tmp_path)
    cfg = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["input_size"], len(cfg["mean"]), len(cfg["std"])) == ([1, 32, 32], 1, 1)


def test_published_tensors_as_safetensors(published, tmp_path):
    save_file(published, tmp_path / "weights.safetensors")
    model = v2m.from_checkpoint(tmp_path / "weights.safetensors")
    assert model.config.scan == "release"
    assert torch.equal(model.pos_embed, published["pos_embed"])


def test_scan_and_image_size_can_be_overridden(published):
    model = v2m.from_checkpoint(published, scan="corners", img_size=(80, 112))
    assert model.config.scan == "corners"
    assert model.config.img_size == (80, 112)
    assert model.pretrained_cfg["input_size"] == (3, 80, 112)
    expected = resample_abs_pos_embed(published["pos_embed"], [5, 7], [4, 4], num_prefix_tokens=0)
    torch.testing.assert_close(model.pos_embed.detach(), expected, rtol=1e-5, atol=1e-6)
    assert model(torch.randn(1, 3, 80, 112)).shape == (1, 10)
    for name, tensor in model.state_dict().items():
        if name != "pos_embed":
            assert torch.equal(tensor, published[name]), name
    # what a model reads at every call on that grid is what is read once here
    images = torch.randn(2, 3, 80, 112)
    other = v2m.from_checkpoint(published, scan="corners")
    assert relative_error(other(images), model(images)) < 1e-6


def test_another_number_of_classes_gets_a_fresh_head(published):
    model = v2m.from_checkpoint(published, num_classes=5)
    assert model.head.weight.shape == (5, 48)
    assert 0.01 < float(model.head.weight.detach().std()) < 0.03
    assert not model.head.bias.any()
    assert model.pretrained_cfg["num_classes"] == 5
    assert torch.equal(model.pos_embed, published["pos_embed"])
    headless = v2m.from_checkpoint(published, num_classes=0)
    assert headless(torch.randn(1, 3, 64, 64)).shape == (1, 48)


def test_another_number_of_channels(published):
    weight = published["patch_embed.proj.weight"]
    grey = v2m.from_checkpoint(published, in_chans=1)
    expected = weight.sum(1, keepdim=True)
    torch.testing.assert_close(grey.patch_embed.proj.weight, expected, rtol=1e-6, atol=1e-7)
    assert grey.pretrained_cfg["input_size"] == (1, 64, 64)
    assert len(grey.pretrained_cfg["mean"]) == len(grey.pretrained_cfg["std"]) == 1
    # a grey image, repeated over the channels or not, gives the same
    images = torch.randn(2, 1, 64, 64)
    colour = v2m.from_checkpoint(published)
    assert relative_error(grey(images), colour(images.expand(-1, 3, -1, -1))) < 1e-5
    six = v2m.from_checkpoint(published, in_chans=6)
    assert six(torch.randn(1, 6, 64, 64)).shape == (1, 10)


def test_a_model_without_a_head(published):
    state = {k: v for k, v in published.items() if not k.startswith("head.")}
    model = v2m.from_checkpoint(state)
    assert model.num_classes == 0
    assert v2m.from_checkpoint(state, num_classes=4)(torch.randn(1, 3, 64, 64)).shape == (1, 4)


def test_other_keywords_are_honoured_or_named(published):
    model = v2m.from_checkpoint(published, drop_path_rate=0.2, global_pool="max")
    assert model.layers[2].drop_path.drop_prob == 0.2
    assert model.global_pool == "max"
    with pytest.raises(InputError, match="unknown model keyword 'dropout'"):
        v2m.from_checkpoint(published, dropout=0.1)


def changed(state, **changes):
    state = dict(state)
    for name, tensor in changes.items():
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    return state


def test_what_does_not_fit_is_named(published):
    state = changed(
        published,
        **{
            "layers.1.mixer.D_2": None,
            "layers.2.norm.weight": torch.zeros(47),
            "layers.0.mixer.extra": torch.zeros(1),
        },
    )
    with pytest.raises(InputError) as error:
        v2m.from_checkpoint(state)
    message = str(error.value)
    assert "missing: layers.1.mixer.D_2" in message
    assert "unknown: layers.0.mixer.extra" in message
    assert "mis-shaped: layers.2.norm.weight is (47,), expected (48,)" in message


def test_a_long_list_of_what_does_not_fit_is_cut(published):
    state = dict(published) | {f"extra.{i}": torch.zeros(1) for i in range(20)}
    with pytest.raises(InputError, match=r"extra\.7 and 12 more"):
        v2m.from_checkpoint(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_embed.proj.weight": None}, "'patch_embed.proj.weight' is missing"),
        ({"layers.0.mixer.A_log": None}, "'layers.0.mixer.A_log' is missing"),
        ({"layers.0.mixer.A_log": torch.zeros(4)}, "must have 2 dimensions; got (4,)"),
        ({"pos_embed": torch.zeros(1, 15, 48)}, "`pos_embed` has 15 tokens, which is no square"),
        ({"pos_embed": torch.zeros(16, 48)}, "'pos_embed' must have 3 dimensions; got (16, 48)"),
        ({"pos_embed": torch.zeros(1, 0, 48)}, "tensor 'pos_embed' is empty, (1, 0, 48)."),
        ({"layers.0.mixer.dt_proj.weight": torch.zeros(96, 0)}, "dt_proj.weight' is empty"),
        ({"patch_embed.proj.weight": torch.zeros(0, 3, 16, 16)}, "is empty, (0, 3, 16, 16)."),
        ({"patch_embed.proj.weight": torch.zeros(48, 3, 16, 8)}, "mis-shaped: patch_embed"),
        ({"layers.5000.norm.weight": torch.zeros(48)}, "a model of 5001 layers cannot come out of"),
        ({"layers.x.norm.weight": torch.zeros(48)}, "unknown: layers.x.norm.weight"),
    ],
)
def test_published_names_with_other_shapes(published, changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        v2m.from_checkpoint(changed(published, **changes))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "the mapping holds no state dict, a mapping of names to tensors."),
        ({"a": torch.zeros(1)}, "of no known format: expected the published names of V2M"),
        ({"a": 1}, "the mapping: expected names and tensors; 'a' is a int."),
        ({3: torch.zeros(1)}, "the mapping: expected names and tensors; 3 is a Tensor."),
        ({"model": {}}, "holds no state dict"),
        ({"model": [1]}, "expected names and tensors; 'model' is a list"),
    ],
)
def test_mappings_that_are_no_checkpoint(state, message):
    with pytest.raises(InputError, match=re.escape(message)):
        v2m.from_checkpoint(state)


# ----------------------------------------------------------------------------- our own


@pytest.fixture
def model():
    return fill_deterministically(small("v2m_nano_patch4_28")).eval()


LABELS = [f"class {i}" for i in range(10)]


def test_round_trip_through_a_directory(model, tmp_path):
    folder = save_model(model, tmp_path / "a" / "b", label_names=LABELS, v2m={"task": "classify"})
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    images = images_for(model)
    for source in (folder, str(folder), folder / "model.safetensors"):
        loaded = v2m.from_checkpoint(source)
        assert loaded.config == model.config
        assert torch.equal(loaded(images), model(images))
        assert loaded.pretrained_cfg["label_names"] == LABELS
        assert tuple(loaded.pretrained_cfg["input_size"]) == (1, 16, 16)
    config = read_config(folder)
    assert config["architecture"] == "v2m_nano_patch4_28"
    assert config["label_names"] == LABELS
    assert config["num_classes"] == 10
    assert config["num_features"] == 32
    assert config["model_args"]["depth"] == 2
    assert config["v2m"]["task"] == "classify"
    assert config["pretrained_cfg"]["mean"] == [0.286]


@pytest.mark.parametrize("name", v2m.list_models())
def test_every_registered_model_round_trips(name, tmp_path):
    model = fill_deterministically(small(name)).eval()
    loaded = v2m.from_checkpoint(save_model(model, tmp_path))
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert loaded.pretrained_cfg["architecture"] == name
    state = model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())


def test_a_failed_save_leaves_the_old_files(model, tmp_path, monkeypatch):
    save_model(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_model(model, tmp_path, v2m={"other": 1})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_files_and_folders_that_are_not_there(model, tmp_path):
    with pytest.raises(InputError, match=r"no checkpoint at .*nothing: no such file or dir"):
        v2m.from_checkpoint(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"has no config\.json; expected a directory that v2m"):
        v2m.from_checkpoint(tmp_path)
    save_model(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has a config\.json but no model\.safetensors"):
        v2m.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "must hold a JSON object; got list"),
        ("{}", "'architecture'"),
        ('{"architecture": 3}', "'architecture' must be a str"),
        ('{"architecture": "v2m_nano_patch4_28", "model_args": 3}', "'model_args' must be a dict"),
        ('{"architecture": "v2m_nano_patch4_28", "pretrained_cfg": []}', "'pretrained_cfg' must"),
        ('{"architecture": "no_such_model"}', "unknown model 'no_such_model'"),
    ],
)
def test_damaged_configurations(model, tmp_path, text, message):
    save_model(model, tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(message)):
        v2m.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "hf-hub:someone/model"},
        {"architecture": "local-dir:/tmp"},
        {"model_args": {"pretrained": True}},
        {"architecture": "test_vit", "model_args": {"pretrained": True}},
        {"architecture": "test_vit", "model_args": {"checkpoint_path": "/etc/passwd"}},
        {"architecture": "test_vit", "model_args": {"pretrained_cfg_overlay": {"url": "http://a"}}},
        {"model_args": {"features_only": True}},
        {"model_args": {"name": "test_vit"}},
        {"model_args": {"depth": 10**9}},
        {"model_args": {"embed_dim": 10**9}},
        {"model_args": {"embed_dim": 10**30}},
        {"model_args": {"scan": []}},
        {"num_classes": "ten", "model_args": {}},
        {"label_names": 5},
        {"label_names": ["only one"]},
        {"pretrained_cfg": {"mean": 0.5}},
        {"pretrained_cfg": {"input_size": "large"}},
        {"pretrained_cfg": {"std": ["a"]}},
    ],
)
def test_configurations_that_ask_for_something_else(model, tmp_path, changes, monkeypatch):
    """Each is an InputError, and nothing is downloaded or read elsewhere."""

    def refuse(*args, **keywords):
        raise AssertionError("a checkpoint made us look elsewhere")

    monkeypatch.setattr("socket.socket.connect", refuse)
    save_model(model, tmp_path)
    config = read_config(tmp_path)
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) and value else value
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError):
        v2m.from_checkpoint(tmp_path)


def test_a_safetensors_file_that_is_none(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not at all")
    with pytest.raises(InputError, match="is not a readable safetensors file"):
        v2m.from_checkpoint(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="of no known format"):
        v2m.from_checkpoint(path)


def test_numpy_scalars_do_not_matter(published):
    """State dicts straight from numpy files: tensors only, said clearly."""
    with pytest.raises(InputError, match="'pos_embed' is a ndarray"):
        v2m.from_checkpoint({"pos_embed": np.zeros((1, 16, 48))})


def test_a_state_dict_loads_strictly_or_not_at_all(model):
    """What does not fit is named, and nothing is loaded by halves."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    del state["norm_f.weight"]
    with pytest.raises(InputError, match=r"missing: norm_f\.weight"):
        checkpoint.load_strictly(model, state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_state_dict_warns_that_its_scan_is_assumed(recwarn):
    """The names are the published code's, whose geometry is not this library's default."""
    model = small("v2m_tiny_patch16_224")
    assert model.config.scan == "corners"
    with pytest.warns(UserWarning, match="taking scan='release'.*pass scan='corners'"):
        assert v2m.from_checkpoint(model.state_dict()).config.scan == "release"
    recwarn.clear()
    assert v2m.from_checkpoint(model.state_dict(), scan="corners").config.scan == "corners"
    assert not [w for w in recwarn if "scan" in str(w.message)]
