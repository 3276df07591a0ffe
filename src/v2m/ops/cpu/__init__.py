"""The CPU backend, compiled by numba: `core_forward`."""
from .core import core_forward

