"""Directories in timm's Hub schema: what timm reads from them, and what is saved of a model."""

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import v2m
from helpers import fill_deterministically, images_for, small
from v2m.errors import InputError
from v2m.models import save_model

LABELS = [f"class {i}" for i in range(10)]


@pytest.fixture
def model():
    return fill_deterministically(small("v2m_nano_patch4_28")).eval()


def test_timm_reads_the_directory(model, tmp_path):
    save_model(model, tmp_path, label_names=LABELS, pretrained_cfg={"mean": (0.5,), "std": (0.2,)})
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = images_for(model)
    assert torch.equal(loaded(images), model(images))
    assert loaded.pretrained_cfg["mean"] == [0.5]
    assert loaded.pretrained_cfg["label_names"] == LABELS
    data = timm.data.resolve_model_data_config(loaded)
    assert data["input_size"] == (1, 16, 16)
    assert data["std"] == [0.2] or data["std"] == (0.2,)
    same = v2m.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(same(images), model(images))
    fresh = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)
    assert fresh(images).shape == (2, 3)


@pytest.mark.parametrize("name", ["v2m_nano_patch4_28", "vim_tiny_patch16_224"])
def test_timm_reads_the_directory_for_another_image_size(name, tmp_path):
    """Saved on a grid that is not square: the position embedding is resampled from it."""
    patch = small(name).config.patch_size
    model = fill_deterministically(small(name, img_size=(2 * patch, 5 * patch))).eval()
    save_model(model, tmp_path)
    size = (6 * patch, 3 * patch)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=size).eval()
    assert loaded.config.img_size == size
    images = images_for(loaded)
    torch.testing.assert_close(loaded(images), model(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, patch_size=patch // 2)


def test_a_checkpoint_gives_whole_models_only(model, tmp_path):
    save_model(model, tmp_path)
    with pytest.raises(InputError, match="takes no `features_only`; for feature maps use timm"):
        v2m.from_checkpoint(tmp_path, features_only=True)


def test_the_file_alone_says_what_it_is(model, tmp_path):
    folder = save_model(model, tmp_path / "run")
    alone = tmp_path / "alone.safetensors"
    (folder / "model.safetensors").rename(alone)
    assert v2m.from_checkpoint(alone).config == model.config
    with safe_open(alone, framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_overrides_of_our_own_format(model, tmp_path):
    save_model(model, tmp_path, label_names=LABELS)
    loaded = v2m.from_checkpoint(tmp_path, num_classes=3, img_size=(8, 20), in_chans=3)
    assert loaded(torch.randn(1, 3, 8, 20)).shape == (1, 3)
    assert "label_names" not in loaded.pretrained_cfg
    assert tuple(loaded.pretrained_cfg["input_size"]) == (3, 8, 20)
    weight = loaded.patch_embed.proj.weight
    torch.testing.assert_close(weight.sum(1, keepdim=True), model.patch_embed.proj.weight)
    # and a model with another grid of its own is saved with it
    again = v2m.from_checkpoint(save_model(loaded, tmp_path / "again"))
    assert again.config.img_size == (8, 20)
    assert torch.equal(again.pos_embed, loaded.pos_embed)


def test_a_compiled_or_lower_type_model_is_saved_as_it_is(model, tmp_path):
    compiled = torch.compile(model, backend="eager")
    loaded = v2m.from_checkpoint(save_model(compiled, tmp_path / "compiled"))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    half = v2m.from_checkpoint(save_model(model.bfloat16(), tmp_path / "half"))
    assert torch.equal(half.pos_embed, model.pos_embed.float())


def test_the_model_that_was_reset_is_saved_with_its_new_head(model, tmp_path):
    model.reset_classifier(4)
    loaded = v2m.from_checkpoint(save_model(model, tmp_path, label_names=list("abcd")))
    assert torch.equal(loaded.head.weight, model.head.weight)
    with pytest.raises(InputError, match="one name for each of the 4 classes; got 3"):
        save_model(model, tmp_path, label_names=list("abc"))


def test_other_models_of_timm_are_loaded_as_strictly(tmp_path):
    vit = v2m.create_model("test_vit", num_classes=2).eval()
    folder = save_model(vit, tmp_path, label_names=["no", "yes"])
    images = torch.randn(1, 3, 160, 160)
    assert torch.equal(v2m.from_checkpoint(folder)(images), vit(images))
    state = load_file(folder / "model.safetensors")
    del state["norm.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"missing: norm\.weight"):
        v2m.from_checkpoint(folder)
