"""Prepare a small real data set for detection or segmentation, one command each:

    python -m scripts.dense_data trees    --package deepforest-2.1.0-py3-none-any.whl --output D
    python -m scripts.dense_data nuclei   --package stardist-0.9.2-....whl            --output D
    python -m scripts.dense_data textures --package scikit_image-0.26.0-....whl       --output D

The images come out of Python packages, installed or as wheels: `pip download --no-deps NAME`
fetches one. Nothing is downloaded here, and no code of the packages is run. SOURCE.txt in the
folder says where the images come from and under which licences.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import nuclei, textures, trees

DATA = {"trees": trees.prepare, "nuclei": nuclei.prepare, "textures": textures.prepare}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=DATA)
    parser.add_argument("--output", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--package", type=Path, help="wheel or folder; default: as installed")
    args = parser.parse_args()
    if args.output.exists() and any(args.output.iterdir()):
        raise SystemExit(f"{args.output} is not empty: name another folder.")
    for line in DATA[args.name](args.package, args.output):
        print(line)


if __name__ == "__main__":
    main()
