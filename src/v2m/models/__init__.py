"""The models, timm's registry of them, and their files."""

from .checkpoint import from_checkpoint, read_config, save_model
from .plain import V2M, PlainConfig
from .registry import MODELS, create_model, list_models

__all__ = [
    "MODELS",
    "V2M",
    "PlainConfig",
    "create_model",
    "from_checkpoint",
    "list_models",
    "read_config",
    "save_model",
]
