"""Vim (Vision Mamba, arXiv 2401.09417): 1-D scans both ways, class token in the middle.

A baseline out of the parts of V2M, with the names and numbers of its published code, so that its
public ImageNet weights can be loaded: `v2m.from_checkpoint` recognises them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from v2m.layers import BidirectionalMixer

from .plain import PatchConfig, Plain

__all__ = ["Vim", "VimConfig", "take_out"]


@dataclass(frozen=True, kw_only=True)
class VimConfig(PatchConfig):
    """Everything that shapes a Vim; the keywords of `v2m.create_model`."""

    global_pool: str = "token"  # the class token, as published; "avg", "max": over the patches

    @property
    def has_class_token(self) -> bool:
        return True


class Vim(Plain):
    """Vim backbone and classifier, images (B, C, H, W) -> logits (B, num_classes).

    Inside, tokens are a grid with one row, (B, 1, H W + 1, D), the patches row by row and the class
    token at H W // 2 between them. The position embedding has an entry for it at that place.
    """

    config_class = VimConfig
    prefix_tokens = 1

    def _mixer(self, i: int) -> BidirectionalMixer:
        config = self.config
        return BidirectionalMixer(
            config.embed_dim,
            d_state=config.d_state,
            d_conv=config.d_conv,
            expand=config.expand,
            dt_rank=config.dt_rank,
        )

    def _embed(self, images: Tensor) -> Tensor:
        """Patches and class token plus position embedding, (B, 1, H W + 1, D)."""
        x = self._patches(images)
        grid = x.shape[1:3]
        token = self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1)
        x = _insert(x.flatten(1, 2), token) + self._position(grid, x.dtype)
        return x.unsqueeze(1)

    def resample_position(
        self, position: Tensor, grid: tuple[int, int], old: tuple[int, int]
    ) -> Tensor:
        token, patches = take_out(position)
        return _insert(super().resample_position(patches, grid, old), token)

    def _feature_map(self, x: Tensor, images: Tensor) -> Tensor:
        patch = self.config.patch_size
        height, width = (-(-side // patch) for side in images.shape[-2:])
        return take_out(x.squeeze(1))[1].reshape(x.shape[0], height, width, x.shape[-1])

    def _pool(self, x: Tensor) -> Tensor:
        token, patches = take_out(x.squeeze(1))
        if self.global_pool == "token":
            return token.squeeze(1)
        return super()._pool(patches.unsqueeze(1)) if self.global_pool else x


def _insert(sequence: Tensor, token: Tensor) -> Tensor:
    """(B, L, D) and (B, 1, D) -> (B, L + 1, D), the token at L // 2."""
    middle = sequence.shape[1] // 2
    return torch.cat((sequence[:, :middle], token, sequence[:, middle:]), dim=1)


def take_out(sequence: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L + 1, D) -> the token in the middle (B, 1, D) and the rest (B, L, D)."""
    middle = (sequence.shape[1] - 1) // 2
    rest = torch.cat((sequence[:, :middle], sequence[:, middle + 1 :]), dim=1)
    return sequence[:, middle : middle + 1], rest
