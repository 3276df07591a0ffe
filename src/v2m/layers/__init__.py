"""The parts of a model: directions, mixers, norm, block, position embedding."""

from .block import Block, RMSNorm
from .channel_gate import ChannelGate
from .cross_scan import CrossScan2d
from .directions import SCANS, Scan, get_scan
from .grid_conv import GridConv2d
from .mixer import HAND_OVERS, Mixer2d
from .pos_embed import resample_grid
from .sequence import BidirectionalMixer
from .ungated import UngatedMixer2d

__all__ = [
    "HAND_OVERS",
    "SCANS",
    "BidirectionalMixer",
    "Block",
    "ChannelGate",
    "CrossScan2d",
    "GridConv2d",
    "Mixer2d",
    "RMSNorm",
    "Scan",
    "UngatedMixer2d",
    "get_scan",
    "resample_grid",
]
