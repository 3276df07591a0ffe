"""What a result was made with: versions and machine, for reports."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

import v2m

__all__ = ["describe_machine"]


def describe_machine() -> dict[str, str]:
    """Versions, processor and accelerator of this process, ready to be shown."""
    facts = {
        "Python": platform.python_version(),
        "v2m": v2m.__version__,
        **{name: version(name) for name in ("torch", "torchvision", "timm", "numpy")},
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["accelerator"] = f"{', '.join(names)}, CUDA {torch.version.cuda}"
    elif torch.backends.mps.is_available():
        facts["accelerator"] = "Apple GPU (MPS)"
    else:
        facts["accelerator"] = "none"
    return facts


def _processor() -> str:
    """The processor's name: what Linux says, else what Python knows."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
