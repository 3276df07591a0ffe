"""The plain models: patches, a stack of equal blocks at one resolution, a head.

V2M-T / S / B (arXiv 2410.10382): the first residual is the patches plus a learnt position
embedding; per layer residual += mixer(norm(residual)), no MLP; a final norm, mean pooling and a
linear head. Inside, grids are channels-last, (B, H, W, D).
"""

import math
from dataclasses import dataclass, replace

import torch
from timm.layers import DropPath, PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from v2m.errors import InputError
from v2m.layers import HAND_OVERS, Block, Mixer2d, RMSNorm, get_scan, resample_grid
from v2m.ops.backend import is_exporting

from .backbone import Backbone, init_head
from .config import BackboneConfig, check_flag, check_whole

__all__ = ["V2M", "PatchConfig", "Plain", "PlainConfig"]


@dataclass(frozen=True, kw_only=True)
class PatchConfig(BackboneConfig):
    """What shapes any model of equal blocks over patches; `img_size` is that of its embedding."""

    patch_size: int = 16  # pixels
    embed_dim: int = 192  # D
    depth: int = 24
    d_state: int = 16  # N
    d_conv: int = 4  # taps of the causal convolution
    expand: int = 2  # E = expand * D
    dt_rank: int | None = None  # R; None for ceil(D / 16)
    dynamic_img_pad: bool = False  # pad odd sizes with zeros to a multiple of the patch

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patch_size", "embed_dim", "depth", "d_state", "d_conv", "expand"):
            check_whole(name, getattr(self, name), least=1)
        if self.dt_rank is not None:
            check_whole("dt_rank", self.dt_rank, least=1)
        check_flag("dynamic_img_pad", self.dynamic_img_pad)
        if not self.dynamic_img_pad:
            check_multiple("img_size", self.img_size, self.patch_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Tokens down and across."""
        return tuple(math.ceil(side / self.patch_size) for side in self.img_size)


@dataclass(frozen=True, kw_only=True)
class PlainConfig(PatchConfig):
    """Everything that shapes a plain V2M; the keywords of `v2m.create_model`."""

    scan: str = "corners"  # a name from v2m.layers.SCANS
    hand_over: str = "sum"  # "state" carries all N states from pass 1 to pass 2
    # For each layer the width of each direction's windows, 0 for the whole grid; the rows are
    # repeated over the depth. None for no windows at all.
    windows: tuple[tuple[int, ...], ...] | None = None
    channel_gate: bool = False  # merge the directions through a gate over channels
    class_token: bool = False  # a row of class tokens in the middle of the grid

    def __post_init__(self) -> None:
        super().__post_init__()
        scan = get_scan(self.scan)
        if self.hand_over not in HAND_OVERS:
            raise InputError(
                f"`hand_over` must be one of {', '.join(HAND_OVERS)}; got {self.hand_over!r}."
            )
        check_flag("channel_gate", self.channel_gate)
        check_flag("class_token", self.class_token)
        if self.class_token and scan.transpose:
            raise InputError(
                f"class_token=True puts a row into the grid, and scan={self.scan!r} needs a square"
                ' one; use scan="corners".'
            )
        if self.windows is not None:
            object.__setattr__(self, "windows", _check_windows(self.windows, len(scan.directions)))

    @property
    def has_class_token(self) -> bool:
        return self.class_token


def _check_windows(windows, directions: int) -> tuple[tuple[int, ...], ...]:
    rows = windows if isinstance(windows, list | tuple) else []
    rows = [list(row) if isinstance(row, list | tuple) else row for row in rows]
    fits = rows and all(
        isinstance(row, list)
        and len(row) == directions
        and all(isinstance(w, int) and not isinstance(w, bool) and w >= 0 for w in row)
        for row in rows
    )
    if not fits:
        raise InputError(
            f"`windows` must have a row for each layer (repeated over the depth) of {directions}"
            f" whole numbers, one a direction, 0 for the whole grid; got {windows!r}."
        )
    return tuple(tuple(row) for row in rows)


def check_multiple(name: str, size: tuple[int, int], patch: int) -> None:
    if any(side % patch or side < patch for side in size):
        raise InputError(
            f"`{name}` must have a height and width that are multiples of the patch size {patch};"
            f" got {size[0]} x {size[1]}. Resize or crop, or build the model with"
            " dynamic_img_pad=True."
        )


class Plain(Backbone):
    """Patches, position embedding, equal blocks; a family says which mixer and which tokens.

    Any image whose sides are multiples of the patch goes in, square or not: the position embedding
    is resampled to its grid.
    """

    config_class = PatchConfig
    prefix_tokens = 0  # entries of the position embedding beside those of the patches

    def __init__(self, **keywords):
        super().__init__(**keywords)
        config = self.config
        self.num_features = self.head_hidden_size = self.embed_dim = config.embed_dim
        self.patch_embed = PatchEmbed(
            config.img_size,
            config.patch_size,
            config.in_chans,
            config.embed_dim,
            output_fmt="NHWC",
            strict_img_size=False,
            dynamic_img_pad=config.dynamic_img_pad,
        )
        tokens = math.prod(config.grid_size) + self.prefix_tokens
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, config.embed_dim))
        if config.has_class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.layers = nn.ModuleList(self._block(i) for i in range(config.depth))
        self.norm_f = RMSNorm(config.embed_dim, config.norm_eps)
        self.head = self._linear_head(config.num_classes)
        self.feature_info = [
            {"num_chs": config.embed_dim, "reduction": config.patch_size, "module": f"layers.{i}"}
            for i in range(config.depth)
        ]
        self.init_weights()

    def _mixer(self, i: int) -> nn.Module:
        raise NotImplementedError

    def _block(self, i: int) -> Block:
        config = self.config
        drop_path = config.drop_path_rate * i / max(config.depth - 1, 1)
        norm = RMSNorm(config.embed_dim, config.norm_eps, lower=True)
        return Block(norm, self._mixer(i), DropPath(drop_path) if drop_path > 0 else nn.Identity())

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fresh weights, e.g. after `model.to_empty(device=...)` on a model built on `meta`."""
        projection = self.patch_embed.proj
        fan_in = projection.weight[0].numel()
        # LeCun normal; 0.8796 is the standard deviation of a unit normal cut at +-2.
        std = 1 / 0.8796 / fan_in**0.5
        nn.init.trunc_normal_(projection.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(projection.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.config.has_class_token:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        for block in self.layers:
            block.norm.reset_parameters()
            block.mixer.reset_parameters()
            block.mixer.out_proj.weight.div_(math.sqrt(self.config.depth))
        self.norm_f.reset_parameters()
        init_head(self.head)

    def _patches(self, images: Tensor) -> Tensor:
        """The patches, (B, H, W, D) in at least float32."""
        self._check_images(images)
        patch = self.config.patch_size
        if self.config.dynamic_img_pad:
            images = F.pad(images, (0, -images.shape[-1] % patch, 0, -images.shape[-2] % patch))
        # Not patch_embed(images): the messages it prepares at every call tie a compiled graph to
        # one image size.
        # Contiguous, or every layer would inherit the strides of the convolution, and copy.
        x = self.patch_embed.proj(images).permute(0, 2, 3, 1).contiguous()
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _position(self, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The position embedding of the grid, (1, H W + prefix_tokens, D)."""
        position = self.pos_embed.to(torch.promote_types(self.pos_embed.dtype, torch.float32))
        return self.resample_position(position, grid, self.config.grid_size).to(dtype)

    def resample_position(
        self, position: Tensor, grid: tuple[int, int], old: tuple[int, int]
    ) -> Tensor:
        """(1, old tokens, D) -> (1, new tokens, D), bicubic over the grid of patches."""
        if not is_exporting() and tuple(grid) == tuple(old):
            return position  # an exported program is not tied to the size it was traced with
        return resample_grid(position.reshape(1, *old, -1), grid).flatten(1, 2)

    def _check_images(self, images: Tensor) -> None:
        super()._check_images(images)
        height, width = images.shape[-2:]
        patch = self.config.patch_size
        if not self.config.dynamic_img_pad and (
            height % patch or width % patch or height < patch or width < patch
        ):
            check_multiple("images", (int(height), int(width)), patch)

    def _step(self, i: int, x: Tensor) -> Tensor:
        return self._run(self.layers[i], x)

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
        position = self.resample_position(self.pos_embed.detach(), config.grid_size, old_grid)
        self.pos_embed = nn.Parameter(position.clone(), requires_grad=self.pos_embed.requires_grad)
        for info in self.feature_info:
            info["reduction"] = config.patch_size
        self.config = config

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups by depth, for layer-wise learning rates."""
        blocks = (
            r"^layers\.(\d+)" if coarse else [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))]
        )
        return {"stem": r"^patch_embed|pos_embed|cls_token", "blocks": blocks}


class V2M(Plain):
    """Plain V2M backbone and classifier, images (B, C, H, W) -> logits (B, num_classes).

    Keywords as in `PlainConfig`; timm's model interface throughout. With `class_token` one learnt
    token, repeated along a row, stands as row H // 2 of the grid and goes through all layers, and
    `global_pool="token"` reads the mean of that row. (A sequence has room for one token; a grid
    has room for a row. The published code has flags for a class token that do nothing.)
    """

    config_class = PlainConfig

    def _mixer(self, i: int) -> Mixer2d:
        config = self.config
        return Mixer2d(
            config.embed_dim,
            d_state=config.d_state,
            d_conv=config.d_conv,
            expand=config.expand,
            dt_rank=config.dt_rank,
            scan=config.scan,
            windows=config.windows and config.windows[i % len(config.windows)],
            channel_gate=config.channel_gate,
            hand_over=config.hand_over,
        )

    def _embed(self, images: Tensor) -> Tensor:
        """Patches plus position embedding, (B, H, W, D): the first residual."""
        x = self._patches(images)
        grid = x.shape[1:3]
        x = x + self._position(grid, x.dtype).reshape(1, *grid, -1)
        if not self.config.class_token:
            return x
        row = self.cls_token.to(x.dtype).unsqueeze(1).expand(x.shape[0], 1, grid[1], -1)
        middle = grid[0] // 2
        return torch.cat((x[:, :middle], row, x[:, middle:]), dim=1)  # (B, H + 1, W, D)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The row of class tokens (B, W, D) and the grid of patches (B, H, W, D)."""
        middle = (x.shape[1] - 1) // 2
        return x[:, middle], torch.cat((x[:, :middle], x[:, middle + 1 :]), dim=1)

    def _feature_map(self, x: Tensor, images: Tensor) -> Tensor:
        return self._split(x)[1] if self.config.class_token else x

    def _pool(self, x: Tensor) -> Tensor:
        if not self.config.class_token:
            return super()._pool(x)
        row, grid = self._split(x)
        return row.mean(dim=1) if self.global_pool == "token" else super()._pool(grid)
