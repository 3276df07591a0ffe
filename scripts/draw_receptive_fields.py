"""Draw the README's picture: what the middle token of an untrained V2M sees under either scan.

    python scripts/draw_receptive_fields.py docs/receptive-fields.png

The same fresh weights (V2M-T's width and depth on a 14 x 14 grid) with scan="corners" and with
scan="release", averaged over images of noise. Takes some minutes on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import v2m
from v2m.visualize import (
    draw_receptive_fields,
    effective_receptive_field,
    quarter_means,
    with_scan,
)

TITLES = {"corners": 'scan="corners"', "release": 'scan="release", as published'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="picture to write, .png or .svg")
    parser.add_argument("--model", default="v2m_tiny_patch16_224")
    parser.add_argument("--images", type=int, default=8, help="images of noise to average over")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = v2m.create_model(args.model)
    images = torch.randn(args.images, model.config.in_chans, *model.config.img_size)
    fields = {}
    for scan, title in TITLES.items():
        fields[title] = effective_receptive_field(with_scan(model, scan), images, batch_size=2)
        means = quarter_means(fields[title], model.config.grid_size)
        print(scan, {name: f"{mean:.1e}" for name, mean in means.items()})
    side, patch = model.config.img_size[0], model.config.patch_size
    middle = (side // patch // 2 + 0.5) * patch - 0.5
    figure = draw_receptive_fields([fields], [""], mark=(middle, middle), width=7.2)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=200, facecolor="white")


if __name__ == "__main__":
    main()
