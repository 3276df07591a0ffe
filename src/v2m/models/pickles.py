"""Pickled training checkpoints, read without running anything they carry."""

import argparse
import pickle
import re
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from v2m.errors import InputError

__all__ = ["load_pickle"]

_SETTINGS = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
_DAMAGED = (
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    AssertionError,
    UnicodeError,
)


def load_pickle(path: Path) -> Any:
    """The content of a file written by `torch.save`: tensors and plain containers only.

    Training checkpoints of this family carry their settings too: `argparse.Namespace` is allowed,
    and so is yacs' `CfgNode` (VMamba), which is read as a plain dict.

    Raises:
        InputError: the file asks for any other class or function, or is damaged.
    """
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty: copy or download it again.")
    try:
        with torch.serialization.safe_globals(_SETTINGS), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the protocol, which is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} was not loaded: it is damaged, or a pickle that asks for more than tensors and"
            " plain containers, and such a file can run code. Convert it to safetensors where you"
            f" trust it. ({_reason(error)})"
        ) from error
    except (OSError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(f"{path} is not a readable checkpoint: {first}.") from error
    except _DAMAGED as error:
        raise InputError(
            f"{path} is damaged, or no file of torch.save: reading it ended in"
            f" {type(error).__name__} ({error})."
        ) from error


def _reason(error: pickle.UnpicklingError) -> str:
    """What was refused, without torch's advice on how to load it nevertheless."""
    text = str(error)
    if asked_for := re.search(r"GLOBAL (\S+)", text):
        return f"It asks for {asked_for[1]}."
    lines = text.partition("WeightsUnpickler error:")[2].split("\n")
    return next((f"{line.strip()}." for line in lines if line.strip()), "Its content is no pickle.")
