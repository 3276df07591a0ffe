"""The plain models: patches, a stack of equal blocks at one resolution, a head.

V2M-T / S / B (arXiv 2410.10382): the first residual is the patches plus a learnt position
embedding; per layer residual += mixer(norm(residual)), no MLP; a final norm, mean pooling and a
linear head. Inside, grids are channels-last, (B, H, W, D).
"""

import math
from dataclasses import dataclass, replace

import torch
from timm.layers import DropPath, PatchEmbed, resample_abs_pos_embed
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from v2m.errors import InputError
from v2m.layers import Block, Mixer2d, RMSNorm, get_scan

from .config import as_pair, check_fraction, check_whole, from_keywords

__all__ = ["V2M", "PlainConfig"]

POOLINGS = ("avg", "max", "")


@dataclass(frozen=True, kw_only=True)
class PlainConfig:
    """Everything that shapes a plain model; the keywords of `v2m.create_model`."""

    img_size: int | tuple[int, int] = 224  # pixels, (height, width); the grid of the embedding
    patch_size: int = 16  # pixels
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head
    global_pool: str = "avg"  # "avg", "max", or "" for the feature map
    embed_dim: int = 192  # D
    depth: int = 24
    d_state: int = 16  # N
    d_conv: int = 4  # taps of the causal convolution
    expand: int = 2  # E = expand * D
    dt_rank: int | None = None  # R; None for ceil(D / 16)
    scan: str = "corners"  # a name from v2m.layers.SCANS
    drop_rate: float = 0.0  # before the head
    drop_path_rate: float = 0.0  # of the last layer; grows linearly from 0
    norm_eps: float = 1e-5
    dynamic_img_pad: bool = False  # pad odd sizes with zeros to a multiple of the patch

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", as_pair("img_size", self.img_size))
        for name in ("patch_size", "in_chans", "embed_dim", "depth", "d_state", "d_conv", "expand"):
            check_whole(name, getattr(self, name), least=1)
        check_whole("num_classes", self.num_classes, least=0)
        if self.dt_rank is not None:
            check_whole("dt_rank", self.dt_rank, least=1)
        for name in ("drop_rate", "drop_path_rate"):
            check_fraction(name, getattr(self, name))
        if not isinstance(self.norm_eps, float) or not self.norm_eps > 0:
            raise InputError(f"`norm_eps` must be a number above 0; got {self.norm_eps!r}.")
        get_scan(self.scan)
        check_pooling(self.global_pool)
        if not self.dynamic_img_pad:
            check_multiple("img_size", self.img_size, self.patch_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Tokens down and across."""
        return tuple(math.ceil(side / self.patch_size) for side in self.img_size)


def check_pooling(name: str) -> None:
    if name not in POOLINGS:
        raise InputError(f"`global_pool` must be one of {POOLINGS}; got {name!r}.")


def check_multiple(name: str, size: tuple[int, int], patch: int) -> None:
    if any(side % patch or side < patch for side in size):
        raise InputError(
            f"`{name}` must have a height and width that are multiples of the patch size {patch};"
            f" got {size[0]} x {size[1]}. Resize or crop, or build the model with"
            " dynamic_img_pad=True."
        )


class V2M(nn.Module):
    """Plain V2M backbone and classifier, images (B, C, H, W) -> logits (B, num_classes).

    Any image whose sides are multiples of the patch goes in, square or not: the position embedding
    is resampled to its grid. Keywords as in `PlainConfig`; timm's model interface throughout.
    """

    def __init__(self, **keywords):
        super().__init__()
        config = from_keywords(PlainConfig, keywords)
        self.config = config
        self.num_classes = config.num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = config.embed_dim
        self.global_pool = config.global_pool
        self.output_fmt = "NHWC"
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(
            config.img_size,
            config.patch_size,
            config.in_chans,
            config.embed_dim,
            output_fmt="NHWC",
            strict_img_size=False,
            dynamic_img_pad=config.dynamic_img_pad,
        )
        tokens = math.prod(config.grid_size)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, config.embed_dim))
        self.layers = nn.ModuleList(
            self._block(config, config.drop_path_rate * i / max(config.depth - 1, 1))
            for i in range(config.depth)
        )
        self.norm_f = RMSNorm(config.embed_dim, config.norm_eps)
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head = self._linear_head(config.num_classes)
        self.feature_info = [
            {"num_chs": config.embed_dim, "reduction": config.patch_size, "module": f"layers.{i}"}
            for i in range(config.depth)
        ]
        self.init_weights()

    @staticmethod
    def _block(config: PlainConfig, drop_path: float) -> Block:
        mixer = Mixer2d(
            config.embed_dim,
            d_state=config.d_state,
            d_conv=config.d_conv,
            expand=config.expand,
            dt_rank=config.dt_rank,
            scan=config.scan,
        )
        norm = RMSNorm(config.embed_dim, config.norm_eps)
        return Block(norm, mixer, DropPath(drop_path) if drop_path > 0 else nn.Identity())

    def _linear_head(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        weight = self.norm_f.weight
        return nn.Linear(self.embed_dim, num_classes, device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fresh weights, e.g. after `model.to_empty(device=...)` on a model built on `meta`."""
        projection = self.patch_embed.proj
        fan_in = projection.weight[0].numel()
        # LeCun normal; 0.8796 is the standard deviation of a unit normal cut at +-2.
        nn.init.trunc_normal_(projection.weight, std=1 / 0.8796 / fan_in**0.5, a=-1, b=1)
        nn.init.zeros_(projection.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for block in self.layers:
            block.norm.reset_parameters()
            block.mixer.reset_parameters()
            block.mixer.out_proj.weight.div_(math.sqrt(self.config.depth))
        self.norm_f.reset_parameters()
        _init_head(self.head)

    def _embed(self, images: Tensor) -> Tensor:
        """Patches plus position embedding, (B, H, W, D) in at least float32: the first residual."""
        self._check_images(images)
        x = self.patch_embed(images)  # (B, H, W, D)
        dtype = torch.promote_types(x.dtype, torch.float32)
        grid = list(x.shape[1:3])
        position = resample_abs_pos_embed(
            self.pos_embed.to(dtype), grid, list(self.patch_embed.grid_size), num_prefix_tokens=0
        )
        return x.to(dtype) + position.reshape(1, *grid, -1).to(dtype)

    def _check_images(self, images: Tensor) -> None:
        channels, patch = self.config.in_chans, self.config.patch_size
        if images.dim() != 4 or images.shape[1] != channels or not images.is_floating_point():
            raise InputError(
                f"`images` must be floating point, (B, {channels}, H, W); got"
                f" {tuple(images.shape)} of {images.dtype}. Pass in_chans={images.shape[-3]} to"
                " the model for another number of channels."
                if images.dim() >= 3
                else f"`images` must be (B, {channels}, H, W); got {tuple(images.shape)}."
            )
        height, width = images.shape[-2:]
        if not self.config.dynamic_img_pad and (
            height % patch or width % patch or height < patch or width < patch
        ):
            check_multiple("images", (int(height), int(width)), patch)

    def _run(self, block: Block, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H / patch, W / patch, D), after the final norm."""
        x = self._embed(images)
        for block in self.layers:
            x = self._run(block, x)
        return self.norm_f(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, H, W, D) -> (B, num_classes), or the pooled (B, D) with `pre_logits`."""
        if self.global_pool == "avg":
            x = x.mean(dim=(1, 2))
        elif self.global_pool == "max":
            x = x.amax(dim=(1, 2))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps after chosen layers: (B, D, H, W) each, or (B, H, W, D) for "NHWC".

        Args:
            x: images, (B, C, H, W).
            indices: the last n layers if an int, all if None, else these.
            norm: apply the final norm to each.
            stop_early: stop after the last one asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list alone, without the final features.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise InputError(f"`output_fmt` must be 'NCHW' or 'NHWC'; got {output_fmt!r}.")
        taken, last = feature_take_indices(len(self.layers), indices)
        features = []
        x = self._embed(x)
        for i, block in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = self._run(block, x)
            if i in taken:
                feature = self.norm_f(x) if norm else x
                features.append(
                    feature.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else feature
                )
        return features if intermediates_only else (self.norm_f(x), features)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers behind the last one asked for; returns the indices kept."""
        taken, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.num_classes, self.global_pool, self.head = 0, "", nn.Identity()
        return taken

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes` classes, 0 for none."""
        check_whole("num_classes", num_classes, least=0)
        if global_pool is not None:
            check_pooling(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = self._linear_head(num_classes)
        _init_head(self.head)
        self.config = replace(self.config, num_classes=num_classes, global_pool=self.global_pool)

    @torch.no_grad()
    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None
    ) -> None:
        """Make another image or patch size the model's own, resampling its embeddings to it."""
        config = replace(
            self.config,
            img_size=self.config.img_size if img_size is None else img_size,
            patch_size=patch_size or self.config.patch_size,
        )
        old_grid = self.config.grid_size
        self.patch_embed.set_input_size(config.img_size, config.patch_size)
        self.patch_embed.grid_size = config.grid_size
        self.patch_embed.num_patches = math.prod(config.grid_size)
        position = resample_abs_pos_embed(
            self.pos_embed.detach(), list(config.grid_size), list(old_grid), num_prefix_tokens=0
        )
        self.pos_embed = nn.Parameter(position.clone(), requires_grad=self.pos_embed.requires_grad)
        for info in self.feature_info:
            info["reduction"] = config.patch_size
        self.config = config

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone."""
        exempt = {"A_log", "A_2_log", "D", "D_2"}
        names = {name for name, _ in self.named_parameters() if name.rsplit(".")[-1] in exempt}
        return names | {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups by depth, for layer-wise learning rates."""
        blocks = (
            r"^layers\.(\d+)" if coarse else [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))]
        )
        return {"stem": r"^patch_embed|pos_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer in the backward instead of keeping its activations."""
        self.grad_checkpointing = enable


def _init_head(head: nn.Module) -> None:
    if isinstance(head, nn.Linear):
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
