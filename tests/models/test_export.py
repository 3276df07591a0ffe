"""Exported files against the models: every family, five sizes, ONNX through onnxruntime."""

import sys

import pytest
import torch

from helpers import fill_deterministically, small
from v2m.cli.main import main
from v2m.errors import InputError
from v2m.export import export_model, parity, read_description, run_exported, sample_sizes
from v2m.models import save_model

FAMILIES = {
    "v2m_tiny_patch16_224": {"depth": 1, "img_size": 64},
    "v2m_local_tiny_patch16_224": {"depth": 1, "img_size": 64},
    "v2m_hier_small_224": {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1)},
    "vim_tiny_patch16_224": {"depth": 1, "img_size": 64},
    "vmamba_tiny_224": {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1)},
}


def build(name: str, **keywords) -> torch.nn.Module:
    size = FAMILIES.get(name, {})
    return fill_deterministically(small(name, num_classes=3, **{**size, **keywords})).eval()


def check(model, path, *, dynamic_size=True):
    export_model(model, path, dynamic_size=dynamic_size)
    sizes = sample_sizes(model, dynamic_size=dynamic_size)
    assert len(sizes) == 5
    assert len(set(sizes)) == 5
    assert parity(model, path, sizes) <= 1e-4
    return sizes


@pytest.mark.parametrize("name", FAMILIES)
def test_onnx_parity_at_five_sizes(name, tmp_path):
    sizes = check(build(name), tmp_path / "model.onnx")
    assert {batch for batch, _, _ in sizes} >= {1, 2, 3}
    assert any(height != width for _, height, width in sizes)


@pytest.mark.parametrize(
    "name",
    [
        "v2m_tiny_patch16_224",
        *(pytest.param(name, marks=pytest.mark.slow) for name in list(FAMILIES)[1:]),
    ],
)
def test_pt2_parity_at_five_sizes(name, tmp_path):
    check(build(name), tmp_path / "model.pt2")


@pytest.mark.parametrize(
    "keywords",
    [
        {"scan": "release"},
        pytest.param({"hand_over": "state", "d_state": 2}, marks=pytest.mark.slow),
        pytest.param({"class_token": True, "global_pool": "token"}, marks=pytest.mark.slow),
        pytest.param({"dynamic_img_pad": True, "img_size": (60, 70)}, marks=pytest.mark.slow),
    ],
)
def test_options_export(keywords, tmp_path):
    """Those that take one size alone have a dynamic batch and say so by `sample_sizes`."""
    model = build("v2m_tiny_patch16_224", **keywords)
    sizes = check(model, tmp_path / "model.pt2")
    fixed = "scan" in keywords or "dynamic_img_pad" in keywords
    assert (len({size[1:] for size in sizes}) == 1) == fixed


def test_parity_notices_a_difference(tmp_path):
    model = build("v2m_nano_patch4_28", img_size=8, depth=1)
    export_model(model, tmp_path / "model.pt2", dynamic_size=False)
    with torch.no_grad():
        model.head.bias.add_(0.01)
    sizes = sample_sizes(model, dynamic_size=False)
    assert parity(model, tmp_path / "model.pt2", sizes) > 1e-4


def test_command_writes_a_file_that_knows_its_classes(tmp_path, capsys):
    model = build("v2m_nano_patch4_28", img_size=8, depth=1)
    labels = ["cat", "dog", "hen"]
    save_model(model, tmp_path, label_names=labels, pretrained_cfg={"crop_pct": 0.9})
    assert main(["export", str(tmp_path), "--format", "onnx", "--fixed-size"]) == 0
    out = capsys.readouterr().out
    assert "model.onnx" in out
    assert "largest difference" in out

    description = read_description(tmp_path / "model.onnx")
    assert description["label_names"] == labels
    assert description["pretrained_cfg"]["input_size"] == [1, 8, 8]
    assert description["pretrained_cfg"]["crop_pct"] == 0.9
    assert description["pretrained_cfg"]["mean"] == [0.286]
    logits = run_exported(tmp_path / "model.onnx")(torch.zeros(4, 1, 8, 8))
    assert logits.shape == (4, 3)


def test_pt2_carries_its_description(tmp_path):
    model = build("v2m_nano_patch4_28", img_size=8, depth=1)
    export_model(model, tmp_path / "model.pt2", dynamic_size=False)
    assert read_description(tmp_path / "model.pt2")["architecture"] == "v2m_nano_patch4_28"


def test_training_goes_on_after_an_export(tmp_path):
    """The model that was exported keeps its mode, gradients and dtype."""
    model = build("v2m_nano_patch4_28", img_size=8, depth=1).train().to(torch.bfloat16)
    export_model(model, tmp_path / "model.pt2", dynamic_size=False)
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())


def test_messages(tmp_path, capsys, monkeypatch):
    model = build("v2m_nano_patch4_28")
    with pytest.raises(InputError, match="`format` must be one of onnx, pt2; got 'tflite'"):
        export_model(model, tmp_path / "model.tflite")
    with pytest.raises(InputError, match="`model` must be a model of v2m; got a Linear"):
        export_model(torch.nn.Linear(1, 1), tmp_path / "model.pt2")
    save_model(model, tmp_path)
    assert main(["export", str(tmp_path), "--format", "pt2", "--output", "m.onnx"]) == 2
    assert "the name of the file must end in .pt2" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--output", "model"]) == 2
    assert "the name of the file must end in .onnx or .pt2" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nothing")]) == 2
    capsys.readouterr()
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "file").touch()
    for output in ("folder.pt2", "file/model.pt2"):
        monkeypatch.setattr("v2m.export.export_model", lambda *_, **__: pytest.fail("too late"))
        assert main(["export", str(tmp_path), "--output", str(tmp_path / output)]) == 2
        assert "cannot be written" in capsys.readouterr().err


def test_an_export_that_is_wrong_leaves_the_old_file(tmp_path, capsys, monkeypatch):
    save_model(build("v2m_nano_patch4_28"), tmp_path)
    (tmp_path / "model.pt2").write_text("old")
    monkeypatch.setattr("v2m.export.parity", lambda *_: 1.0)
    assert main(["export", str(tmp_path), "--format", "pt2"]) == 2
    assert "differs from the model" in capsys.readouterr().err
    assert (tmp_path / "model.pt2").read_text() == "old"
    assert not list(tmp_path.glob(".*"))


def test_onnx_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"needs the packages onnx, onnxscript and onnxruntime"):
        export_model(build("v2m_nano_patch4_28"), tmp_path / "model.onnx")
