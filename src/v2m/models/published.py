"""The published checkpoint formats, recognised from the names and shapes of their tensors alone."""

import math
import re
from typing import Any

from torch import Tensor

from v2m.errors import InputError

__all__ = ["describe_published", "normalize_published"]

State = dict[str, Tensor]


def describe_published(state: State) -> tuple[str, dict[str, Any]]:
    """(architecture, keywords) of the model a published state dict belongs to.

    V2M: the names of `models_mamba.py` of the published code with bimamba_type="2d"; the model is
    returned with `scan="release"`, which is what its weights were trained with. Vim: those of its
    `models_mamba.py`, class token in the middle. VMamba: those of its second release without a gate
    (`v05_noz`; s1l8, s2l15 and their like).

    Raises:
        InputError: no known format has these names.
    """
    if "layers.0.mixer.A_2_log" in state and "pos_embed" in state:
        size = _describe_patches(state, "V2M", class_tokens=0)
        return f"v2m_{_size_name(size)}_patch16_224", {**size, "scan": "release"}
    if "layers.0.mixer.A_b_log" in state and "cls_token" in state:
        size = _describe_patches(state, "Vim", class_tokens=1)
        return f"vim_{_size_name(size)}_patch16_224", size
    if "layers.0.blocks.0.op.A_logs" in state and "patch_embed.5.weight" in state:
        return _describe_vmamba(state)
    sample = ", ".join(list(state)[:4])
    raise InputError(
        "the tensors are of no known format: expected the published names of V2M (`pos_embed`,"
        " `layers.0.mixer.A_2_log`, ...), Vim (`cls_token`, `layers.0.mixer.A_b_log`, ...) or"
        " VMamba (`patch_embed.5.weight`, `layers.0.blocks.0.op.A_logs`, ...); got"
        f" {len(state)} tensors ({sample}, ...)."
    )


def normalize_published(state: State) -> State:
    """The names and shapes that VMamba's releases agree on; other formats as they are.

    Its 1x1 convolutions became linear layers between releases, `(out, in, 1, 1)` to `(out, in)`,
    and the projections of the scans modules, `x_proj.weight` for `x_proj_weight`.
    """
    if "layers.0.blocks.0.op.A_logs" not in state:
        return dict(state)
    routes = {"op.x_proj.weight": "op.x_proj_weight", "op.dt_projs.weight": "op.dt_projs_weight"}
    result = {}
    for name, tensor in state.items():
        for new, old in routes.items():
            if name.endswith(new):
                name = name.removesuffix(new) + old
                tensor = tensor.reshape(4, -1, tensor.shape[1])
        linear = name.endswith(("_proj.weight", "fc1.weight", "fc2.weight")) and tensor.dim() == 4
        result[name] = tensor.flatten(1) if linear else tensor
    return result


def _describe_patches(state: State, family: str, *, class_tokens: int) -> dict[str, Any]:
    patches, position = _get(state, "patch_embed.proj.weight", 4), _get(state, "pos_embed", 3)
    A_log, dt_proj = _get(state, "layers.0.mixer.A_log", 2), "layers.0.mixer.dt_proj.weight"
    embed_dim, in_chans, patch, _ = patches.shape
    tokens = position.shape[1] - class_tokens
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise InputError(
            f"`pos_embed` has {tokens} tokens, which is no square grid; published {family}"
            " models have square ones. Tensors written by v2m itself are read together with the"
            " config.json beside them."
        )
    return {
        "img_size": side * patch,
        "patch_size": patch,
        "in_chans": in_chans,
        "num_classes": _get(state, "head.weight", 2).shape[0] if "head.weight" in state else 0,
        "embed_dim": embed_dim,
        "depth": _count(state, r"layers\.(\d+)\."),
        "d_state": A_log.shape[1],
        "d_conv": _get(state, "layers.0.mixer.conv1d.weight", 3).shape[2],
        "dt_rank": _get(state, dt_proj, 2).shape[1],
        "expand": A_log.shape[0] // embed_dim,
    }


def _size_name(size: dict[str, Any]) -> str:
    """The registered size of that width; any will do, since every keyword is given."""
    return {192: "tiny", 384: "small", 768: "base"}.get(size["embed_dim"], "tiny")


def _describe_vmamba(state: State) -> tuple[str, dict[str, Any]]:
    stages = _count(state, r"layers\.(\d+)\.blocks\.")
    block, norm = "layers.{}.blocks.0.", "layers.{}.blocks.0.norm.weight"
    dims = [_get(state, norm.format(i), 1).shape[0] for i in range(stages)]
    inner, d_state = _get(state, block.format(0) + "op.A_logs", 2).shape
    head = "classifier.head.weight"
    size = {
        "in_chans": _get(state, "patch_embed.0.weight", 4).shape[1],
        "num_classes": _get(state, head, 2).shape[0] if head in state else 0,
        "depths": tuple(_count(state, rf"layers\.{i}\.blocks\.(\d+)\.") for i in range(stages)),
        "dims": tuple(dims),
        "d_state": d_state,
        "ssm_ratio": inner / 4 / dims[0],
        "mlp_ratio": _get(state, block.format(0) + "mlp.fc1.weight", 2).shape[0] / dims[0],
    }
    narrow = "tiny" if size["ssm_ratio"] == 1 else "small"
    return f"vmamba_{'base' if dims[0] == 128 else narrow}_224", size


def _count(state: State, pattern: str) -> int:
    """One more than the largest number that the names have in that place."""
    found = [int(match[1]) for name in state if (match := re.match(pattern, name))]
    if not found or max(found) >= 10_000:
        raise InputError(
            f"the checkpoint looks like a published model, but no names fit {pattern!r}."
        )
    return 1 + max(found)


def _get(state: State, name: str, dims: int) -> Tensor:
    if name not in state:
        raise InputError(f"the checkpoint looks like a published model, but {name!r} is missing.")
    if state[name].dim() != dims:
        shape = tuple(state[name].shape)
        raise InputError(f"tensor {name!r} must have {dims} dimensions; got {shape}.")
    if state[name].numel() == 0:
        raise InputError(f"tensor {name!r} is empty, {tuple(state[name].shape)}.")
    return state[name]
