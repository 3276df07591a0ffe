"""Draw the README's picture: what one token of an untrained V2M sees under either scan.

    python scripts/draw_receptive_fields.py docs/images/receptive_fields.png

The same fresh weights of V2M-T with scan="corners" and with scan="release", averaged over images
of noise. The token is off the middle, because the middle of a square is where a transposition and
mirrors change the least. A minute or two on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import v2m
from v2m.visualize import (
    draw_receptive_fields,
    effective_receptive_field,
    with_scan,
)

TITLES = {"corners": 'scan="corners"', "release": 'scan="release", as published'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="picture to write, .png or .svg")
    parser.add_argument("--model", default="v2m_tiny_patch16_224")
    parser.add_argument("--size", type=int, default=240, help="side of the image in pixels")
    parser.add_argument("--images", type=int, default=8, help="images of noise to average over")
    parser.add_argument("--token", type=int, nargs=2, default=(3, 10), metavar=("ROW", "COLUMN"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = v2m.create_model(args.model, img_size=args.size)
    images = torch.randn(args.images, model.config.in_chans, *model.config.img_size)
    fields = {}
    for scan, title in TITLES.items():
        fields[title] = effective_receptive_field(
            with_scan(model, scan), images, token=tuple(args.token), batch_size=2
        )
    mark = tuple((place + 0.5) * model.config.patch_size - 0.5 for place in args.token)
    figure = draw_receptive_fields([fields], [""], mark=mark, width=7.2)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=150, facecolor="white")


if __name__ == "__main__":
    main()
