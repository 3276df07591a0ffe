"""Detection and segmentation on small real data sets: V2M beside ResNets, from scratch.

    python -m benchmarks.dense train   --data data/dense --output runs/dense --seconds 330
    python -m benchmarks.dense collect --output runs/dense --to benchmarks/results/h100_dense
    python -m benchmarks.dense speed   --csv benchmarks/results/h100_dense_speed.csv

`train` trains both models on trees (boxes), nuclei (masks) and textures (classes), the folders of
`python -m scripts.dense_data`, side by side on one device, evaluates them on the test images and
writes each run's report. The baselines are torchvision's Faster and Mask R-CNN with a ResNet-50 and
UperNet with a ResNet-34 (both with 18 layers at `--scale small`, for a CPU). The two models of a
data set see the same images for the same steps, with one recipe. Runs that are there already go on.

`collect` writes a table, a picture a data set and the runs' logs. `speed` times Mask R-CNN at
800 x 1333 with S* and with a ResNet-50.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .recipe import DATA, MODELS


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dense",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    every = [f"{data}-{model}" for data in DATA for model in MODELS]
    for name in ("train", "one"):
        command = commands.add_parser(name, help="train the runs" if name == "train" else "one run")
        command.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
        command.add_argument("--output", type=Path, required=True)
        command.add_argument("--scale", choices=("full", "small"), default="full")
        command.add_argument("--device", default="auto")
        command.add_argument("--only", nargs="*", choices=every, default=every)
        command.add_argument("--epochs", nargs="*", default=[], metavar="DATA=N")
    commands.choices["one"].add_argument("--probe", type=int, help="time it beside so many")
    train = commands.choices["train"]
    train.add_argument("--seconds", type=float, help="choose the epochs that take that long")
    train.add_argument("--jobs", type=int, default=6, help="how many run side by side")
    collect = commands.add_parser("collect", help="the table and pictures of finished runs")
    collect.add_argument("--output", type=Path, required=True, help="where the runs are")
    collect.add_argument("--to", type=Path, required=True)
    collect.add_argument("--data", type=Path, help="where the data are now, if not where they were")
    speed = commands.add_parser("speed", help="Mask R-CNN at 800 x 1333")
    speed.add_argument("--csv", type=Path, required=True)
    speed.add_argument("--device", default="auto")
    speed.add_argument("--size", type=int, nargs=2, default=(800, 1333))
    speed.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    if args.command == "collect":
        from .results import collect as run
    elif args.command == "speed":
        from .speed import speed as run
    elif args.command == "one":
        from .training import one as run
    else:
        from .training import train as run
    run(args)


if __name__ == "__main__":
    main()
