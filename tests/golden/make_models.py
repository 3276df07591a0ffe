"""Write `models.safetensors`: features and logits of every registered model at its full size.

    python tests/golden/make_models.py

Weights and images come from numpy's generators by name and seed (`helpers.fill_deterministically`),
the numbers from plain PyTorch in float64. Run it again only when a model's numbers are
meant to change, or when one is added.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

import v2m  # noqa: E402
from helpers import golden_case  # noqa: E402


def main() -> None:
    tensors = {}
    with torch.no_grad(), v2m.ops.use_backend("eager"):
        for name in v2m.list_models():
            model, images = golden_case(name, torch.float64)
            features = model.forward_features(images)
            tensors[f"{name}/features"] = features[..., ::8].float().contiguous()
            tensors[f"{name}/logits"] = model.forward_head(features)[:, ::4].float().contiguous()
            print(name, tuple(features.shape), float(features.std()))
    save_file(tensors, FOLDER / "models.safetensors")


if __name__ == "__main__":
    main()
