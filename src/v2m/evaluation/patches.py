"""Which patches a model sees."""

from __future__ import annotations

from torch import nn

from v2m.errors import InputError


def patch_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the model's patches, from `model.patch_embed`; InputError if it has
    none."""
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "patch_size", None)
    if size is None:
        raise InputError(
            f"{type(model).__name__} has no patch_embed.patch_size, so its patches cannot be "
            "shuffled; give the patch size."
        )
    return (size, size) if isinstance(size, int) else tuple(size)
