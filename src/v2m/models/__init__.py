"""The models, timm's registry of them, and their files."""

from .checkpoint import from_checkpoint, read_config, save_model
from .hierarchical import HierarchicalConfig, HierarchicalV2M, HierarchicalV2MConfig, VMamba
from .plain import V2M, PlainConfig
from .registry import MODELS, create_model, list_models
from .vim import Vim, VimConfig

__all__ = [
    "MODELS",
    "V2M",
    "HierarchicalConfig",
    "HierarchicalV2M",
    "HierarchicalV2MConfig",
    "PlainConfig",
    "VMamba",
    "Vim",
    "VimConfig",
    "create_model",
    "from_checkpoint",
    "list_models",
    "read_config",
    "save_model",
]
