"""What a training checkpoint holds, as safetensors and JSON: everything needed to go on as if
nothing had happened.

config.json, model.safetensors    the model to use: the averaged weights when there is an average
training_state.safetensors        the weights being trained, the optimiser's state, the generators'
                                  states
training_state.json               the position, the optimiser's numbers, the configuration
manifest.json                     sizes and checksums of the above, written last

Tensors are whole, whatever the number of ranks and the way they share the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from v2m.engine.randomness import random_states, restore_random_states
from v2m.engine.sharding import as_shards, whole
from v2m.engine.state import TrainingState
from v2m.engine.store import DamagedError, write_json
from v2m.models.checkpoint import save_model

# What files that are no checkpoint of this run make the readers raise.
_UNREADABLE = (
    *(OSError, SafetensorError, LookupError, ValueError, TypeError),
    *(AttributeError, ArithmeticError, RuntimeError),
)
TENSORS, VALUES = "training_state.safetensors", "training_state.json"


def _parameter_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of the parameters in the order of the optimiser's own numbering."""
    names = {id(p): n for n, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def gather_state(
    state: TrainingState, *, keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All of the state as named tensors on the CPU and JSON-able values.

    Collective where the model is sharded; the ranks that do not `keep` it get nothing.
    """
    names = _parameter_names(state.model, state.optimizer)
    stored = state.optimizer.state_dict()
    found = {f"model/{name}": value for name, value in state.model.state_dict().items()}
    if state.ema is not None:
        averaged = state.ema.module.state_dict()
        found |= {f"ema/{name}": value for name, value in averaged.items()}
    numbers: dict[str, dict[str, Any]] = {}
    for index, entries in stored["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                found[f"optimizer/{names[index]}/{key}"] = value
            else:
                numbers.setdefault(names[index], {})[key] = value
    tensors = {}
    for name, value in found.items():
        complete = whole(value)
        if keep:
            tensors[name] = complete.detach().cpu().contiguous().clone()
    if not keep:
        return {}, {}
    generators, generator_values = random_states()
    groups = [{k: v for k, v in g.items() if k != "params"} for g in stored["param_groups"]]
    group_names = [[names[i] for i in g["params"]] for g in stored["param_groups"]]
    values = {
        "optimizer": {"groups": groups, "parameters": group_names, "numbers": numbers},
        "rng": generator_values,
    }
    return tensors | generators, values


def write_state(
    folder: Path,
    state: TrainingState,
    contents: tuple[dict[str, Tensor], dict[str, Any]],
    *,
    description: dict[str, Any],
    extra: dict[str, Any],
) -> None:
    """Write a checkpoint's files into an empty folder; OSError if the disk does not take them.

    Args:
        contents: what `gather_state` gave.
        description: `save_model`'s keywords.
        extra: joins the JSON: the position, the configuration.
    """
    tensors, values = contents
    save_model(state.evaluated, folder, state=evaluated_weights(tensors), **description)
    try:
        save_file(tensors, folder / TENSORS)
    except SafetensorError as error:  # which is no OSError, whatever its cause
        raise OSError(str(error)) from error
    write_json(folder / VALUES, values | extra)


def evaluated_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights to use among those of `gather_state`: the average if there is one."""
    return _under(tensors, "ema") or _under(tensors, "model")


def read_state(folder: Path, state: TrainingState) -> dict[str, Any]:
    """Put a checkpoint's contents into `state`, strictly, and return its JSON. DamagedError if it
    does not fit."""
    values = read_values(folder)
    try:
        tensors = load_file(folder / TENSORS)
        _load(state.model, _under(tensors, "model"))
        if state.ema is not None:
            _load(state.ema.module, _under(tensors, "ema"))
        _load_optimizer(state, _under(tensors, "optimizer"), values["optimizer"])
        restore_random_states(tensors, values["rng"])
    except _UNREADABLE as error:
        raise DamagedError(f"{folder} does not fit this run: {error}") from error
    return values


def read_values(folder: Path) -> dict[str, Any]:
    """A checkpoint's JSON. DamagedError if it cannot be read."""
    try:
        return dict(json.loads((folder / VALUES).read_bytes()))
    except _UNREADABLE as error:
        raise DamagedError(f"{folder} does not fit this run: {error}") from error


def _load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    model.load_state_dict(as_shards(tensors, model.state_dict()))


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
    parameters = dict(state.model.named_parameters())
    for key, value in tensors.items():
        name, _, what = key.rpartition("/")
        entries.setdefault(index[name], {}).update(
            as_shards({what: value}, {what: parameters[name]})
        )
    groups = [
        {**group, "params": [index[n] for n in members]}
        for group, members in zip(stored["groups"], stored["parameters"])
    ]
    state.optimizer.load_state_dict({"state": entries, "param_groups": groups})
