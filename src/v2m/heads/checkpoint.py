"""Detectors and segmenters from the folders that `v2m.models.save_model` wrote."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from v2m.errors import InputError
from v2m.heads.config import DetectorConfig, SegmenterConfig
from v2m.heads.dense import DenseModel
from v2m.heads.detector import Detector
from v2m.heads.upernet import Segmenter
from v2m.models.checkpoint import CONFIG, WEIGHTS, load_strictly, read_config
from v2m.models.config import from_keywords

__all__ = ["ARCHITECTURES", "from_directory"]

ARCHITECTURES = {
    "faster_rcnn": (Detector, DetectorConfig),
    "mask_rcnn": (Detector, DetectorConfig),
    "upernet": (Segmenter, SegmenterConfig),
}


def from_directory(directory: str | os.PathLike) -> DenseModel:
    """The detector or segmenter of a run's folder, with its weights, in evaluation mode.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    directory = Path(directory)
    stored = read_config(directory)
    if stored["architecture"] not in ARCHITECTURES:
        raise InputError(
            f"{directory} holds a {stored['architecture']}, no detector or segmenter; expected one"
            f" of {', '.join(ARCHITECTURES)}."
        )
    model_class, config_class = ARCHITECTURES[stored["architecture"]]
    try:
        config = from_keywords(config_class, stored.get("model_args", {}))
        state = load_file(directory / WEIGHTS)
    except TypeError as error:
        raise InputError(f"{directory / CONFIG}: {error}.") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{directory / WEIGHTS} cannot be read: {error}.") from error
    model = model_class(config)
    load_strictly(model, state)
    cfg = stored.get("pretrained_cfg", {})
    model.pretrained_cfg = {**model.pretrained_cfg, **cfg, "label_names": stored.get("label_names")}
    return model.eval()
