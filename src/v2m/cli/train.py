"""`v2m train`: train a model."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from v2m.errors import InputError

__all__ = ["add_parser", "configuration", "run"]

DESCRIPTION = """\
Train a model and write a folder with the weights, the log, the test figures and a report.

A recipe gives all settings; MODEL, --data and --set change them. --set takes any key of
--list-settings.
"""

EPILOG = """\
examples:
  v2m train --recipe demo --output runs/demo
  v2m train v2m_nano_patch4_28 --data fashion-mnist-small --output runs/nano --set schedule.epochs=5
  v2m train v2m_tiny_patch16_224 --data /data/imagenet --recipe imagenet_tiny --output runs/tiny
  v2m train --recipe finetune --data photos/ --set model.checkpoint=runs/tiny --output runs/photos
  v2m train --recipe imagenet_tiny --data /data/imagenet --output runs/tiny --resume
  v2m train --recipe detect_own --data photos/ --output runs/found
  v2m train --task segment v2m_hier_small_224 --data /data/ade20k --output runs/scenes

Ctrl-C or SIGTERM ends a run after the current step; --resume goes on from its last checkpoint,
exactly.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `v2m train` to the command line."""
    parser = subparsers.add_parser(
        "train",
        help="train a model on a folder of images or a named data set",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a name of `v2m models`, or of timm")
    add("--data", metavar="D", help="a name of `v2m data`, a folder, wds:FOLDER or hfds:FOLDER")
    add("--task", metavar="T", help="classify (default), detect or segment")
    add("--recipe", metavar="R", help="where the settings start from; see --list-recipes")
    add("--output", metavar="DIR", type=Path, help="the folder to write")
    add(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="change a setting, e.g. --set optim.lr=1e-3 (as often as wanted)",
    )
    add(
        "--limit-batches",
        metavar="N",
        help="a dry run: at most N steps an epoch and N batches a validation",
    )
    add("--resume", action="store_true", help="go on with the run in --output, if there is one")
    add("--overwrite", action="store_true", help="replace the run in --output")
    add("--device", metavar="DEVICE", help="auto (default), cpu, cuda or mps")
    add("--seed", metavar="N", help="seed of everything random (default: the recipe's, 0)")
    add("--list-recipes", action="store_true", help="list the recipes and exit")
    add("--list-settings", action="store_true", help="list all settings and their values, and exit")


# Without a recipe, dense tasks begin with this one's settings: those of classification fit nothing.
OWN = {"detect": "detect_own", "segment": "segment_own"}


def configuration(arguments: argparse.Namespace) -> Any:
    """The TrainConfig that a command line asks for."""
    from v2m.engine.config import ModelConfig, TrainConfig, apply_overrides
    from v2m.recipes import get_recipe

    if arguments.recipe:
        config = get_recipe(arguments.recipe)
    elif arguments.task in OWN:
        config = get_recipe(OWN[arguments.task])
        if arguments.model is not None:
            config = replace(config, model=ModelConfig())
    else:
        config = TrainConfig()
    named = {
        "task": arguments.task,
        "model.name": arguments.model,
        "data.name": arguments.data,
        "run.device": arguments.device,
        "run.seed": arguments.seed,
        "run.limit_batches": arguments.limit_batches,
    }
    flags = [f"{key}={value}" for key, value in named.items() if value is not None]
    return apply_overrides(config, [*flags, *arguments.overrides])


def run(arguments: argparse.Namespace) -> int:
    """Train, and say where the result lies."""
    console = Console()
    if arguments.list_recipes:
        return _list_recipes(console)
    config = configuration(arguments)
    if arguments.list_settings:
        return _list_settings(console, config)
    if arguments.output is None:
        raise InputError("--output is missing: name the folder to write, e.g. --output runs/first.")
    if config.model.name is None and config.model.checkpoint is None:
        raise InputError(
            "no model is named: give MODEL (see `v2m models`), or a --recipe that has one, or "
            "--set model.checkpoint=PATH."
        )
    from v2m.engine.trainer import train

    train(
        config,
        arguments.output,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        console=console,
    )
    return 0


def _list_recipes(console: Console) -> int:
    from v2m.recipes import RECIPES, summary

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for name in RECIPES:
        table.add_row(name, escape(summary(name)))
    console.print(table)
    return 0


def _list_settings(console: Console, config: Any) -> int:
    from v2m.engine.settings import leaves, type_name

    if not console.is_terminal:
        console = Console(width=400)  # a line a setting, for other programs
    table = Table(box=None, pad_edge=False)
    for title in ("key", "value", "what", "expected"):
        table.add_column(title, overflow="fold", no_wrap=title == "key")
    section = None
    for key, value, field, kind in leaves(config):
        head = key.partition(".")[0]
        if section not in (None, head):
            table.add_section()
        section = head
        shown = "none" if value is None else str(value)
        table.add_row(key, escape(shown), field.metadata.get("help", ""), type_name(kind))
    console.print(table)
    return 0
