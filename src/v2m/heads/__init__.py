"""Detectors and segmenters on the backbones of this library."""

from v2m.heads.backbone import DenseBackbone
from v2m.heads.checkpoint import from_directory
from v2m.heads.config import DetectorConfig, SegmenterConfig
from v2m.heads.detector import Detector
from v2m.heads.pyramid import DetectionBackbone
from v2m.heads.upernet import Segmenter, UperNetDecoder

__all__ = [
    "DenseBackbone",
    "DetectionBackbone",
    "Detector",
    "DetectorConfig",
    "Segmenter",
    "SegmenterConfig",
    "UperNetDecoder",
    "from_directory",
]
