"""Features and logits of every registered model at its full size, against committed numbers."""

import pytest
import torch
from safetensors.torch import load_file

import v2m
from helpers import golden_case, relative_error


@pytest.fixture(scope="module")
def golden(request):
    return load_file(request.config.rootpath / "tests" / "golden" / "models.safetensors")


def test_every_registered_model_has_its_numbers(golden):
    assert {key.split("/")[0] for key in golden} == set(v2m.list_models())


@pytest.mark.parametrize("name", v2m.list_models())
def test_features_and_logits(golden, name):
    model, images = golden_case(name, torch.float32)
    with torch.no_grad():
        features = model.forward_features(images)
        logits = model.forward_head(features)
    assert relative_error(features[..., ::8], golden[f"{name}/features"]) <= 1e-5
    assert relative_error(logits[:, ::4], golden[f"{name}/logits"]) <= 1e-5
