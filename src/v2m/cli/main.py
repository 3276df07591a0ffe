"""The entry point `v2m`: finds the subcommand, and turns errors into one clear message and an exit
code.

Exit codes: 0 done, 2 bad input, 3 non-finite loss, 130 interrupted (Ctrl-C), 143 terminated
(SIGTERM).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from v2m.errors import InputError, NonFiniteLossError

# Subcommand: its line of `v2m --help`. Its module `v2m.cli.<name>` is imported only when it is
# asked for.
COMMANDS = {
    "train": "train a model on a folder of images or a named data set",
    "evaluate": "measure a trained model on a data set",
    "predict": "classify images with a trained model",
    "export": "write a trained model as an ONNX or torch.export file",
    "report": "write the report of a training run again",
    "models": "list the models: parameters, GFLOPs, input size",
    "data": "list the data sets, or fetch one",
    "benchmark": "time models on this machine",
    "doctor": "show versions, devices and backends, and check them",
}

EPILOG = """\
examples:
  v2m train --recipe demo --output runs/demo
  v2m evaluate runs/demo --data fashion-mnist-small
  v2m predict runs/demo picture.png
  v2m train --help

exit codes: 0 done, 2 bad input, 3 non-finite loss, 130 interrupted, 143 terminated
"""


class _Commands(argparse.Action):
    """Prints the version without importing torch."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"v2m {version('v2m')}")
        parser.exit()


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves room for the longest subcommand, whose indentation argparse does not count."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        self._action_max_length = max(self._action_max_length, 4 + max(map(len, COMMANDS)))


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser with every subcommand's line, and with the options of `command` alone."""
    parser = argparse.ArgumentParser(
        prog="v2m",
        description="Visual 2-Dimensional Mamba: train, evaluate and use image models.",
        epilog=EPILOG,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action=_Commands, nargs=0, help="show the version and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, line in COMMANDS.items():
        if name == command:
            importlib.import_module(f"v2m.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=line, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if word in COMMANDS), None)
    try:
        arguments = build_parser(command).parse_args(argv)
        return importlib.import_module(f"v2m.cli.{arguments.command}").run(arguments)
    except SystemExit as stop:
        message = getattr(stop, "message", None)
        return _say(message, int(stop.code or 0)) if message else int(stop.code or 0)
    except InputError as error:
        return _failed(error, 2, argv)
    except NonFiniteLossError as error:
        return _failed(error, 3, argv)
    except KeyboardInterrupt as interrupt:
        return _say(str(interrupt) or "interrupted", 130)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _say(message: str, code: int) -> int:
    print(f"v2m: {message}", file=sys.stderr)
    return code


def _failed(error: Exception, code: int, argv: Sequence[str]) -> int:
    if "--debug" in argv:
        raise error
    return _say(f"error: {error}", code)
