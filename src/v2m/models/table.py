"""The table of models: parameters and multiply-adds, counted on the models themselves."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .registry import MODELS, create_model

__all__ = ["ModelRow", "count_multiply_adds", "model_row", "model_table"]


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One registered model.

    Attributes:
        name: What `v2m.create_model` takes.
        parameters: Number of parameters.
        multiply_adds: Per image of `input_size`, see :func:`count_multiply_adds`.
        input_size: (C, H, W).
        description: What it is, in a few words.
    """

    name: str
    parameters: int
    multiply_adds: int
    input_size: tuple[int, int, int]
    description: str


def model_table(names: Sequence[str] | None = None) -> list[ModelRow]:
    """A row for each of `names`, by default for every registered model."""
    return [model_row(name) for name in (MODELS if names is None else names)]


def model_row(name: str) -> ModelRow:
    """Build a registered model without memory for its weights, and measure it."""
    with torch.device("meta"):
        model = create_model(name)
    input_size = tuple(model.pretrained_cfg["input_size"])
    return ModelRow(
        name=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        multiply_adds=count_multiply_adds(model, input_size),
        input_size=input_size,
        description=MODELS[name][2],
    )


def count_multiply_adds(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-adds of one forward pass, the figure papers call GFLOPs (times 1e9).

    One for each multiply-add of every linear layer and convolution that runs, and two per state,
    channel, token and scan; `corners` has six scans, since directions that share their first scan
    run it once. Norms, activations, gates and sums are not counted, nor is anything a model
    computes outside these layers, such as attention. A mixer says its own figure,
    `multiply_adds(tokens)`.

    Args:
        model: A model of this library, or any model made of such layers, on any device.
        input_size: (C, H, W) of the image.
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += _multiply_adds(module, inputs[0], output)

    twin = deepcopy(model).to("meta").eval()
    mixers = [module for module in twin.modules() if hasattr(module, "multiply_adds")]
    for mixer in mixers:
        mixer.register_forward_hook(count)
        mixer.forward = lambda grid: grid  # counted as a whole: its shape suffices
    inside = {part for mixer in mixers for part in mixer.modules() if part is not mixer}
    for module in twin.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and module not in inside:
            module.register_forward_hook(count)
    dtype = next(twin.parameters()).dtype
    with torch.no_grad():
        twin(torch.zeros(1, *input_size, device="meta", dtype=dtype))
    return total


def _multiply_adds(module: nn.Module, inputs: Tensor, output: Tensor) -> int:
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return output.numel() * module.weight[0].numel()
    return module.multiply_adds(inputs.numel() // inputs.shape[-1])
