"""The CPU backend: fused kernels, compiled by numba when first used and kept in its cache.

`scan_*` is `v2m.ops.selective_scan`, `scans_*` are those of a pass of `v2m.ops.ungated`,
`core_*` is `v2m.ops.core.mixer_core`: forward and backward, on CPU tensors in fp32,
bfloat16 or fp16 (the latter computed in fp32). How it works is in `README.md` next to this file.
"""

from .core import core_backward, core_forward
from .scan import scan_backward, scan_forward, scans_backward, scans_forward

__all__ = [
    "core_backward",
    "core_forward",
    "scan_backward",
    "scan_forward",
    "scans_backward",
    "scans_forward",
]
