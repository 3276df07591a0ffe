"""Pickled training checkpoints, read without running anything they carry."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch

from v2m.errors import InputError

__all__ = ["load_pickle"]


def load_pickle(path: Path) -> Any:
    """The content of a file written by `torch.save`: tensors and plain containers only.

    `argparse.Namespace` is allowed, since training checkpoints of this family carry one.

    Raises:
        InputError: the file asks for any other class or function, or is damaged.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} was not loaded: it is damaged, or a pickle that asks for more than tensors and"
            " plain containers, and such a file can run code. Convert it to safetensors where you"
            f" trust it. ({_first_sentence(error)})"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"{path} is not a readable checkpoint: {_first_sentence(error)}."
        ) from error
    except (AttributeError, TypeError, AssertionError, UnicodeError) as error:
        raise InputError(f"{path} is damaged: {_first_sentence(error)}.") from error


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "GLOBAL" in line), lines[0] if lines else repr(error))
