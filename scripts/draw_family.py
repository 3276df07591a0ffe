"""Draw what one token of each family member sees in an image that is not square.

    python scripts/draw_family.py docs/images/family_receptive_fields.png

Fresh weights, averaged over images of noise, the last feature map. A few minutes on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import v2m
from v2m.visualize import draw_receptive_fields, effective_receptive_field

MEMBERS = {
    "V2M-T": "v2m_tiny_patch16_224",
    "V2M-T, local windows": "v2m_local_tiny_patch16_224",
    "V2M-S*": "v2m_hier_small_224",
    "Vim-T": "vim_tiny_patch16_224",
    "VMamba-T": "vmamba_tiny_224",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="picture to write, .png or .svg")
    parser.add_argument("--size", type=int, nargs=2, default=(160, 256), metavar=("H", "W"))
    parser.add_argument("--pixel", type=int, nargs=2, default=(75, 75), metavar=("ROW", "COLUMN"))
    parser.add_argument("--images", type=int, default=4, help="images of noise to average over")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    fields = {}
    for title, name in MEMBERS.items():
        torch.manual_seed(args.seed)
        model = v2m.create_model(name, img_size=tuple(args.size))
        stride = model.feature_info[-1]["reduction"]
        images = torch.randn(args.images, 3, *args.size)
        token = tuple(place // stride for place in args.pixel)
        fields[title] = effective_receptive_field(model, images, token=token, batch_size=1)
    figure = draw_receptive_fields([fields], [""], mark=tuple(args.pixel), width=14.0)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
