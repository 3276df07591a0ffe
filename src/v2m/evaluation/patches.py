"""Which patches a model sees."""

from __future__ import annotations

from torch import nn


def patch_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of the model's patches, from `model.patch_embed`; None if it has none."""
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "patch_size", None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else tuple(size)
