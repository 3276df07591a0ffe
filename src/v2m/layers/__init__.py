"""The parts of a model: directions, mixer, norm, block."""

from .block import Block, RMSNorm
from .directions import SCANS, Scan, get_scan
from .mixer import Mixer2d

__all__ = ["SCANS", "Block", "Mixer2d", "RMSNorm", "Scan", "get_scan"]
