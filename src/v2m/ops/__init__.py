"""The selective scan over a 2-D grid, and its backends."""

from .backend import use_backend
from .interface import selective_scan

__all__ = ["selective_scan", "use_backend"]
