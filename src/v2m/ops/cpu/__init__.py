"""The CPU backend, compiled by numba."""

from .core import core_backward, core_forward
