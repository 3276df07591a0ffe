"""A pass's parameters as the core's kernels read them, and the gradients back.

One table of fp32 numbers, channels last and padded to whole vectors: a row for each tap, then the
convolution's bias, x_proj, dt_proj, dt_bias, the decay rates and D. NumPy does it, for so small
tensors in a third of torch's time.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..core import PassWeights
from .vector import LANES

__all__ = ["pack_columns", "pack_pass", "padded_size", "unpack_pass"]

LOG2_E = np.float32(math.log2(math.e))
LARGEST = np.finfo(np.float32).max


def padded_size(size: int) -> int:
    """`size` rounded up to whole vectors."""
    return -(-size // LANES) * LANES


def array(tensor: Tensor) -> np.ndarray:
    """The tensor's numbers in fp32."""
    return tensor.detach().float().numpy()


def pack_pass(weights: PassWeights) -> np.ndarray:
    """The table, (rows, padded E); A_log as decay rates of powers of two, finite where A is."""
    conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, skip = map(array, weights)
    with np.errstate(over="ignore"):
        rates = np.exp(A_log) * -LOG2_E
    np.clip(rates, -LARGEST, LARGEST, out=rates)
    parts = conv_weight.T, conv_bias, x_proj, dt_proj.T, dt_bias, rates.T, skip
    channels = len(skip)
    table = np.zeros((_ends(weights)[-1], padded_size(channels)), np.float32)
    start = 0
    for part, end in zip(parts, _ends(weights)):
        table[start:end, :channels] = part
        start = end
    return table


def pack_columns(x_proj: Tensor) -> np.ndarray:
    """x_proj once more, (padded E, padded columns)."""
    columns, channels = x_proj.shape
    table = np.zeros((padded_size(channels), padded_size(columns)), np.float32)
    table[:channels, :columns] = array(x_proj).T
    return table


def unpack_pass(table: np.ndarray, weights: PassWeights) -> PassWeights:
    """The parameters' gradients in their dtypes, out of a table (rows, padded E) of gradients."""
    table = table[:, : len(weights.D)]
    conv_weight, conv_bias, x_proj, dt_proj, dt_bias, rates, skip = np.split(
        table, _ends(weights)[:-1]
    )
    with np.errstate(over="ignore", invalid="ignore"):
        d_log = rates.T * -np.exp(array(weights.A_log))
    parts = conv_weight.T, conv_bias[0], x_proj, dt_proj.T, dt_bias[0], d_log, skip[0]
    return PassWeights(
        *(
            torch.from_numpy(np.array(part, order="C")).to(weight.dtype)  # a copy: no views
            for part, weight in zip(parts, weights)
        )
    )


def _ends(weights: PassWeights) -> list[int]:
    """The row after each parameter's last."""
    taps, columns = weights.conv_weight.shape[1], weights.x_proj.shape[0]
    rank, states = weights.dt_proj.shape[1], weights.A_log.shape[1]
    ends, end = [], 0
    for rows in (taps, 1, columns, rank, 1, states, 1):
        end += rows
        ends.append(end)
    return ends
