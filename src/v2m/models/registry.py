"""The registered models: a size is a row of the table, and a name in timm's registry."""

import math
from difflib import get_close_matches
from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from v2m.errors import InputError

from .hierarchical import HierarchicalV2M, VMamba
from .plain import V2M, Plain
from .vim import Vim

__all__ = ["MODELS", "create_model", "list_models"]

_NANO = {"patch_size": 4, "img_size": 28, "in_chans": 1, "num_classes": 10, "d_state": 8}

# One row a layer, repeated over the depth: the windows of the corners upper left, lower left, upper
# right and lower right. One diagonal of corners scans the whole grid, the other
# one inside windows; the next layer swaps them, and after two layers so do the widths 7 and 2.
_LOCAL = {
    "depth": 20,
    "windows": ((0, 7, 7, 0), (7, 0, 0, 7), (0, 2, 2, 0), (2, 0, 0, 2)),
    "channel_gate": True,
}
_BASE_STAGES = {"depths": (2, 2, 15, 2), "ssm_ratio": 2.0}

# name: (class, keywords of its configuration, what it is)
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any], str]] = {
    "v2m_nano_patch4_28": (
        V2M,
        {"embed_dim": 64, "depth": 4, **_NANO},
        "small enough to train on a CPU, for 28-pixel grey images",
    ),
    "v2m_tiny_patch16_224": (V2M, {"embed_dim": 192, "depth": 24}, "V2M-T of the paper"),
    "v2m_small_patch16_224": (V2M, {"embed_dim": 384, "depth": 24}, "V2M-S of the paper"),
    "v2m_base_patch16_224": (V2M, {"embed_dim": 768, "depth": 24}, "the same structure, wider"),
    "v2m_local_tiny_patch16_224": (
        V2M,
        {"embed_dim": 192, **_LOCAL},
        "V2M-T with local windows of the paper",
    ),
    "v2m_local_small_patch16_224": (
        V2M,
        {"embed_dim": 384, **_LOCAL},
        "V2M-S with local windows of the paper",
    ),
    "v2m_hier_small_224": (HierarchicalV2M, {}, "V2M-S* of the paper, in VMamba's stages"),
    "v2m_hier_base_224": (HierarchicalV2M, _BASE_STAGES, "V2M-B* of the paper, likewise"),
    "vim_tiny_patch16_224": (Vim, {"embed_dim": 192}, "baseline: Vim-T, 1-D both ways"),
    "vim_small_patch16_224": (Vim, {"embed_dim": 384}, "baseline: Vim-S"),
    "vim_base_patch16_224": (Vim, {"embed_dim": 768}, "baseline: Vim-B"),
    "vmamba_tiny_224": (VMamba, {}, "baseline: VMamba-T, cross-scan (release s1l8)"),
    "vmamba_small_224": (VMamba, _BASE_STAGES, "baseline: VMamba-S (release s2l15)"),
    "vmamba_base_224": (
        VMamba,
        {**_BASE_STAGES, "dims": (128, 256, 512, 1024)},
        "baseline: VMamba-B (release s2l15)",
    ),
}


def _default_cfg(model_class: type[nn.Module], keywords: dict[str, Any]) -> dict[str, Any]:
    """timm's description of the input and the head; there are no weights to download."""
    size, channels = keywords.get("img_size", 224), keywords.get("in_chans", 3)
    grey = channels == 1
    return {
        "url": "",
        "num_classes": keywords.get("num_classes", 1000),
        "input_size": (channels, size, size),
        "pool_size": None,
        "crop_pct": 1.0 if grey else 0.875,
        "interpolation": "bicubic",
        "mean": (0.2860,) if grey else (0.485, 0.456, 0.406),
        "std": (0.3530,) if grey else (0.229, 0.224, 0.225),
        "first_conv": model_class.first_conv,
        "classifier": model_class.classifier_name,
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs({name: _default_cfg(*row[:2]) for name, row in MODELS.items()})


def _fit_position(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What timm loads with `pretrained=True`, its position embedding on the grid of the model."""
    position = state.get("pos_embed")
    if position is None or not isinstance(model, Plain) or position.shape == model.pos_embed.shape:
        return state
    patch, stored = model.config.patch_size, model.pretrained_cfg["input_size"][1:]
    old = tuple(-(-side // patch) for side in stored)
    if position.shape[1] != math.prod(old) + model.prefix_tokens:
        return state  # of other patches: loading names what does not fit
    grid = model.config.grid_size
    return {**state, "pos_embed": model.resample_position(position, grid, old)}


def _maps(model_class: type, arguments: dict[str, Any]) -> int | tuple[int, ...]:
    """What `features_only` returns by default: no more maps than there are."""
    wanted = model_class.feature_indices
    depths = arguments.get("depths")
    count = len(depths) if isinstance(depths, list | tuple) else arguments.get("depth")
    if isinstance(wanted, int) and isinstance(count, int) and count > 0:
        return min(wanted, count)
    return wanted


def _register(name: str) -> None:
    model_class, size, description = MODELS[name]

    def build(pretrained: bool = False, **keywords: Any) -> nn.Module:
        arguments = {**size, **keywords}
        return build_model_with_cfg(
            model_class,
            name,
            pretrained,
            pretrained_filter_fn=_fit_position,
            feature_cfg={"out_indices": _maps(model_class, arguments), "feature_cls": "getter"},
            **arguments,
        )

    build.__name__ = build.__qualname__ = name
    build.__module__ = __name__
    build.__doc__ = f"{name}: {description}."
    globals()[name] = register_model(build)


for _name in MODELS:
    _register(_name)


def list_models() -> list[str]:
    """Names of the models of this library, all of them in timm's registry too."""
    return list(MODELS)


def create_model(name: str, pretrained: bool = False, **keywords: Any) -> nn.Module:
    """A model by name, as `timm.create_model` with clearer errors.

    Args:
        name: one of `v2m.list_models()`, or anything timm takes ("local-dir:...", "hf-hub:...").
        pretrained: load weights; only for names that have some (a directory, a Hub repository).
        keywords: what the model's configuration has (`num_classes`, `in_chans`, `img_size`,
            `drop_path_rate`, `scan`, ...), and timm's `features_only` and `out_indices`.

    Raises:
        InputError: unknown name or keyword, a value that does not fit, or weights that do not
            exist.
    """
    if not isinstance(name, str):
        raise InputError(f"`name` must be the name of a model; got {name!r}.")
    if name not in MODELS and not timm.is_model(name) and ":" not in name:
        near = get_close_matches(name, MODELS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"unknown model {name!r}.{hint} Known models: {', '.join(MODELS)}.")
    if pretrained and name in MODELS:
        raise InputError(
            f"there are no pretrained weights for {name!r} to download: no trained V2M weights were"
            " ever published, and Vim's and VMamba's are files of their authors. Train with `v2m"
            " train`, or load a file with v2m.from_checkpoint."
        )
    if "out_indices" in keywords and not keywords.get("features_only"):
        raise InputError("`out_indices` chooses feature maps: pass features_only=True with it.")
    return timm.create_model(name, pretrained=pretrained, **keywords)
