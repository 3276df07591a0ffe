"""What a training checkpoint holds, as safetensors and JSON: everything needed to go on as if
nothing had happened.

config.json, model.safetensors    the model to use: the averaged weights when there is an average
training_state.safetensors        the weights being trained, the optimiser's state, the generators'
states training_state.json               the position, the optimiser's numbers, the configuration,
the last epoch's figures manifest.json                     sizes and checksums of the above,
written last
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from v2m.engine.randomness import random_states, restore_random_states
from v2m.engine.state import TrainingState
from v2m.engine.store import DamagedError, write_json
from v2m.models.checkpoint import save_model

TENSORS, VALUES = "training_state.safetensors", "training_state.json"


def _parameter_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of the parameters in the order of the optimiser's own numbering."""
    names = {id(p): n for n, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _clone(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}/{k}": v.detach().cpu().contiguous().clone() for k, v in tensors.items()}


def state_tensors(state: TrainingState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All of the state as named tensors and JSON-able values."""
    names = _parameter_names(state.model, state.optimizer)
    stored = state.optimizer.state_dict()
    tensors = _clone(state.model.state_dict(), "model")
    if state.ema is not None:
        tensors |= _clone(state.ema.module.state_dict(), "ema")
    numbers: dict[str, dict[str, Any]] = {}
    for index, entries in stored["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors |= _clone({f"{names[index]}/{key}": value}, "optimizer")
            else:
                numbers.setdefault(names[index], {})[key] = value
    generators, generator_values = random_states()
    groups = [{k: v for k, v in g.items() if k != "params"} for g in stored["param_groups"]]
    group_names = [[names[i] for i in g["params"]] for g in stored["param_groups"]]
    values = {
        "optimizer": {"groups": groups, "parameters": group_names, "numbers": numbers},
        "rng": generator_values,
    }
    return tensors | generators, values


def write_state(
    folder: Path, state: TrainingState, *, description: dict[str, Any], extra: dict[str, Any]
) -> None:
    """Write a checkpoint's files into an empty folder.

    Args:
        description: `save_model`'s keywords.
        extra: joins the JSON: the position, the configuration, the last epoch's figures.
    """
    save_model(state.evaluated, folder, **description)
    tensors, values = state_tensors(state)
    save_file(tensors, folder / TENSORS)
    write_json(folder / VALUES, values | extra)


def read_state(folder: Path, state: TrainingState) -> dict[str, Any]:
    """Put a checkpoint's contents into `state`, strictly, and return its JSON. DamagedError if it
    does not fit."""
    try:
        values = json.loads((folder / VALUES).read_bytes())
        tensors = load_file(folder / TENSORS)
        state.model.load_state_dict(_under(tensors, "model"))
        if state.ema is not None:
            state.ema.module.load_state_dict(_under(tensors, "ema"))
        _load_optimizer(state, _under(tensors, "optimizer"), values["optimizer"])
        restore_random_states(tensors, values["rng"])
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise DamagedError(f"{folder} does not fit this run: {error}") from error
    return values


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{prefix}/")}


def _load_optimizer(
    state: TrainingState, tensors: dict[str, Tensor], stored: dict[str, Any]
) -> None:
    names = _parameter_names(state.model, state.optimizer)
    index = {name: i for i, name in enumerate(names)}
    if [n for group in stored["parameters"] for n in group] != names:
        raise ValueError("its optimiser has other parameters, or in another order")
    entries: dict[int, dict[str, Any]] = {
        index[name]: dict(numbers) for name, numbers in stored["numbers"].items()
    }
    for key, value in tensors.items():
        name, _, what = key.rpartition("/")
        entries.setdefault(index[name], {})[what] = value
    groups = [
        {**group, "params": [index[n] for n in members]}
        for group, members in zip(stored["groups"], stored["parameters"])
    ]
    state.optimizer.load_state_dict({"state": entries, "param_groups": groups})
