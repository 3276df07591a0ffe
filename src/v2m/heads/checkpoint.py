"""Detectors and segmenters from the folders that `v2m.models.save_model` wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from v2m.errors import InputError
from v2m.heads.config import DetectorConfig, SegmenterConfig
from v2m.heads.dense import DenseModel
from v2m.heads.detector import Detector
from v2m.heads.upernet import Segmenter
from v2m.models.checkpoint import CONFIG, WEIGHTS, load_strictly
from v2m.models.config import from_keywords
from v2m.models.schema import check_depth, checked_config

__all__ = ["ARCHITECTURES", "from_directory", "read_dense_config"]

ARCHITECTURES = {
    "faster_rcnn": (Detector, DetectorConfig),
    "mask_rcnn": (Detector, DetectorConfig),
    "upernet": (Segmenter, SegmenterConfig),
}


def read_dense_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The `config.json` of a detector or segmenter. Its backbone is one of this library or of
    timm: nothing in it makes the backbone come from, or read, anywhere else.

    Raises:
        InputError: there is none, or it describes something else.
    """
    path = Path(directory) / CONFIG
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    kinds = {"architecture": str, "model_args": dict, "pretrained_cfg": dict}
    for key, kind in kinds.items():
        if not isinstance(stored, dict) or not isinstance(stored.get(key), kind):
            raise InputError(f"{path}: key {key!r} must be a {kind.__name__} and present.")
    if stored["architecture"] not in ARCHITECTURES:
        raise InputError(
            f"{directory} holds a {stored['architecture']}, no detector or segmenter; expected one"
            f" of {', '.join(ARCHITECTURES)}."
        )
    arguments = stored["model_args"]
    if "backbone" in arguments:
        keywords = arguments.get("backbone_kwargs", {})
        backbone = {"architecture": arguments["backbone"], "model_args": keywords}
        checked_config(backbone, f"{path}, the backbone")
    names = stored.get("label_names")
    if names is not None and (
        not isinstance(names, list)
        or not all(isinstance(name, str) for name in names)
        or len(names) != stored["model_args"].get("num_classes")
    ):
        raise InputError(f"{path}: `label_names` must be one name for each class.")
    return stored


def from_directory(directory: str | os.PathLike) -> DenseModel:
    """The detector or segmenter of a run's folder, with its weights, in evaluation mode.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    directory = Path(directory)
    stored = read_dense_config(directory)
    model_class, config_class = ARCHITECTURES[stored["architecture"]]
    try:
        config = from_keywords(config_class, stored["model_args"])
        state = load_file(directory / WEIGHTS)
        check_depth(config.backbone_kwargs, len(state))
    except TypeError as error:
        raise InputError(f"{directory / CONFIG}: {error}.") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{directory / WEIGHTS} cannot be read: {error}.") from error
    model = model_class(config)
    load_strictly(model, state)
    cfg = stored["pretrained_cfg"]
    model.pretrained_cfg = {**model.pretrained_cfg, **cfg, "label_names": stored.get("label_names")}
    return model.eval()
