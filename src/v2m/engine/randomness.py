"""Seeds, and the states of every random number generator as tensors and JSON."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_everything(*parts: int) -> None:
    """Seed python, numpy and torch (all devices) from a few integers, e.g. (seed, epoch, rank)."""
    state = np.random.SeedSequence(parts).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))  # noqa: NPY002 - timm's mixup draws from numpy's global generator
    torch.manual_seed(int(state[2]))


def random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of all generators: (tensors, JSON-able values)."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    tensors = {
        "rng/python": torch.tensor(internal, dtype=torch.int64),
        "rng/numpy": torch.from_numpy(keys.astype(np.int64)),
        "rng/torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"rng/cuda{index}"] = state
    values = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {"name": name, "position": position, "has_gauss": has_gauss, "cached": cached},
    }
    return tensors, values


def restore_random_states(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Set all generators to states from `random_states`; a device that is not here is left out."""
    python, numpy = values["python"], values["numpy"]
    random.setstate((python["version"], tuple(tensors["rng/python"].tolist()), python["gauss"]))
    keys = tensors["rng/numpy"].numpy().astype(np.uint32)
    np.random.set_state(  # noqa: NPY002
        (numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"])
    )
    torch.set_rng_state(tensors["rng/torch"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"rng/cuda{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"rng/cuda{index}"], index)
