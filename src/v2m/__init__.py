"""Visual 2-Dimensional Mamba: image backbones with a selective scan over the 2-D grid.

Importing this package registers its models with timm.
"""

from .errors import InputError
from .models import create_model, from_checkpoint, list_models
from .ops import selective_scan

__version__ = "0.1.0"
__all__ = ["InputError", "create_model", "from_checkpoint", "list_models", "selective_scan"]
