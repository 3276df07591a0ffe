"""What a `config.json` may say: checked before anything is built from it.

A configuration comes with weights from elsewhere, so it names a model and its sizes and nothing
more: no other place to fetch from, no other file to read.
"""

from collections.abc import Mapping
from typing import Any

import timm

from v2m.errors import InputError

from .config import check_whole, from_keywords
from .registry import MODELS

__all__ = ["check_depth", "checked_config"]

_LARGEST_SIDE = 2**20

# Keywords of timm.create_model that fetch, read or change what kind of object comes back.
_RESERVED = {
    "model_name",
    "name",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "pretrained_filter_fn",
    "checkpoint_path",
    "cache_dir",
    "features_only",
    "feature_cfg",
    "out_indices",
}


def checked_config(config: Any, where: str) -> dict[str, Any]:
    """`config` as it is, once it is known to describe a model.

    Raises:
        InputError: a key is missing, of another kind, or asks for something else than a model.
    """
    if not isinstance(config, dict):
        raise InputError(f"{where} must hold a JSON object; got {type(config).__name__}.")
    for key, kind in {"architecture": str, "model_args": dict, "pretrained_cfg": dict}.items():
        if not isinstance(config.get(key, kind()), kind) or "architecture" not in config:
            raise InputError(f"{where}: key {key!r} must be a {kind.__name__} and present.")
    try:
        _check_model(config["architecture"], config.get("model_args", {}))
        for number in (config, config.get("pretrained_cfg", {})):
            if number.get("num_classes") is not None:
                check_whole("num_classes", number["num_classes"], least=0)
        _check_preprocessing(config.get("pretrained_cfg", {}))
        for names in (
            config.get("label_names"),
            config.get("pretrained_cfg", {}).get("label_names"),
        ):
            _check_names(names)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return config


def _check_model(name: str, arguments: Mapping[str, Any]) -> None:
    if name in MODELS:
        model_class, size, _ = MODELS[name]
        from_keywords(model_class.config_class, {**size, **arguments})
        return
    if ":" in name or not timm.is_model(name):
        raise InputError(
            f"unknown model {name!r}; expected the name of a model of v2m or timm (detectors and"
            " segmenters are loaded with v2m.heads.from_directory)."
        )
    for key in arguments:
        if key in _RESERVED:
            raise InputError(f"`model_args` must describe the model alone; got the key {key!r}.")


def check_depth(arguments: Mapping[str, Any], tensors: int) -> None:
    """A model cannot have more layers than there are tensors: said before it is built."""
    depths = arguments.get("depths", arguments.get("depth", 0))
    layers = sum(depths) if isinstance(depths, list | tuple) else depths
    if isinstance(layers, int) and layers > tensors:
        raise InputError(f"a model of {layers} layers cannot come out of {tensors} tensors.")


def _check_preprocessing(cfg: Mapping[str, Any]) -> None:
    for key, length in (("mean", None), ("std", None), ("input_size", 3)):
        values = cfg.get(key)
        if values is None:
            continue
        fits = isinstance(values, list | tuple) and all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in values
        )
        if not fits or not values or (length is not None and len(values) != length):
            raise InputError(f"`pretrained_cfg.{key}` must be a list of numbers; got {values!r}.")
    for value in cfg.get("input_size") or ():
        check_whole("pretrained_cfg.input_size", value, least=1)
        if value > _LARGEST_SIDE:
            raise InputError(f"`pretrained_cfg.input_size` has a side of {value} pixels.")


def _check_names(names: Any) -> None:
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise InputError(f"`label_names` must be a list of names; got {names!r}.")
