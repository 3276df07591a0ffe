"""The published checkpoint formats, recognised from the names and shapes of their tensors alone."""

import math
from typing import Any

from torch import Tensor

from v2m.errors import InputError

__all__ = ["describe_published"]

State = dict[str, Tensor]


def describe_published(state: State) -> tuple[str, dict[str, Any]]:
    """(architecture, keywords) of the model a published state dict belongs to.

    V2M: the names of `models_mamba.py` of the published code with bimamba_type="2d"; the model is
    returned with `scan="release"`, which is what its weights were trained with.

    Raises:
        InputError: no known format has these names.
    """
    if "layers.0.mixer.A_2_log" in state and "pos_embed" in state:
        return _describe_v2m(state)
    sample = ", ".join(list(state)[:4])
    raise InputError(
        "the tensors are of no known format: expected the published V2M names"
        f" (`pos_embed`, `layers.0.mixer.A_2_log`, ...); got {len(state)} tensors ({sample}, ...)."
    )


def _describe_v2m(state: State) -> tuple[str, dict[str, Any]]:
    patches, position = _get(state, "patch_embed.proj.weight", 4), _get(state, "pos_embed", 3)
    A_log, dt_proj = _get(state, "layers.0.mixer.A_log", 2), "layers.0.mixer.dt_proj.weight"
    embed_dim, in_chans, patch, _ = patches.shape
    side = math.isqrt(position.shape[1])
    if side * side != position.shape[1]:
        raise InputError(
            f"`pos_embed` has {position.shape[1]} tokens, which is no square grid; published V2M"
            " models have square ones. Tensors written by v2m itself are read together with the"
            " config.json beside them."
        )
    size = {
        "img_size": side * patch,
        "patch_size": patch,
        "in_chans": in_chans,
        "num_classes": _get(state, "head.weight", 2).shape[0] if "head.weight" in state else 0,
        "embed_dim": embed_dim,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers.")),
        "d_state": A_log.shape[1],
        "d_conv": _get(state, "layers.0.mixer.conv1d.weight", 3).shape[2],
        "dt_rank": _get(state, dt_proj, 2).shape[1],
        "expand": A_log.shape[0] // embed_dim,
        "scan": "release",
    }
    names = {192: "tiny", 384: "small", 768: "base"}
    return f"v2m_{names.get(embed_dim, 'tiny')}_patch16_224", size


def _get(state: State, name: str, dims: int) -> Tensor:
    if name not in state:
        raise InputError(f"the checkpoint looks like a published V2M, but {name!r} is missing.")
    if state[name].dim() != dims:
        shape = tuple(state[name].shape)
        raise InputError(f"tensor {name!r} must have {dims} dimensions; got {shape}.")
    return state[name]
