"""The hierarchical models: four stages of blocks at strides 4, 8, 16 and 32.

The structure is VMamba's second release (arXiv 2401.10166): a stem of two overlapping stride-2
convolutions, blocks of norm, token mixer, norm and MLP, overlapping 3x3 stride-2 convolutions
between the stages, layer norms over channels. V2M-S* and V2M-B* (arXiv 2410.10382) put the 2-D scan
in the place of the cross-scan. Grids are channels-last, (B, H, W, D), throughout, and the names are
VMamba's.

Every convolution pads with one pixel of zeros, so any image size goes in, square or not: each
stride halves the sides, rounded up.
"""

from dataclasses import dataclass, replace

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from v2m.errors import InputError
from v2m.layers import CrossScan2d, GridConv2d, UngatedMixer2d, get_scan

from .backbone import Backbone, init_head
from .config import BackboneConfig, check_whole

__all__ = ["HierarchicalConfig", "HierarchicalV2M", "HierarchicalV2MConfig", "VMamba"]


@dataclass(frozen=True, kw_only=True)
class HierarchicalConfig(BackboneConfig):
    """Everything that shapes a hierarchical model; the keywords of `v2m.create_model`."""

    depths: tuple[int, ...] = (2, 2, 8, 2)  # blocks of each stage
    dims: tuple[int, ...] = (96, 192, 384, 768)  # D of each stage
    d_state: int = 1  # N
    ssm_ratio: float = 1.0  # E = ssm_ratio * D
    dt_rank: int | None = None  # R; None for ceil(D / 16)
    mlp_ratio: float = 4.0  # hidden width of the MLP = mlp_ratio * D

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("depths", "dims"):
            object.__setattr__(self, name, _as_row(name, getattr(self, name)))
        if len(self.depths) != len(self.dims):
            raise InputError(
                "`depths` and `dims` must have one number a stage each; got"
                f" {self.depths} and {self.dims}."
            )
        if self.dims[0] % 2:
            raise InputError(f"`dims` must begin with an even width; got {self.dims[0]}.")
        check_whole("d_state", self.d_state, least=1)
        if self.dt_rank is not None:
            check_whole("dt_rank", self.dt_rank, least=1)
        for name in ("ssm_ratio", "mlp_ratio"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise InputError(f"`{name}` must be a number above 0; got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class HierarchicalV2MConfig(HierarchicalConfig):
    """A hierarchical model whose token mixer is the 2-D scan."""

    scan: str = "corners"  # a name from v2m.layers.SCANS

    def __post_init__(self) -> None:
        super().__post_init__()
        get_scan(self.scan)


def _as_row(name: str, value) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f"`{name}` must be a list of whole numbers, one a stage; got {value!r}.")
    for number in value:
        check_whole(name, number, least=1)
    return tuple(value)


class Hierarchical(Backbone):
    """Stem, stages, classifier; a family says which token mixer."""

    config_class = HierarchicalConfig
    first_conv = "patch_embed.0"
    classifier_name = "classifier.head"
    final_norm_name = "classifier.norm"
    feature_indices = 4

    def __init__(self, **keywords):
        super().__init__(**keywords)
        config = self.config
        depths, dims = config.depths, config.dims
        self.num_features = self.head_hidden_size = dims[-1]
        self.patch_embed = _stem(config.in_chans, dims[0], config.norm_eps)
        rates = torch.linspace(0, config.drop_path_rate, sum(depths), device="cpu").tolist()
        self.layers = nn.ModuleList(
            Stage(
                [self._block(dim, rates.pop(0)) for _ in range(depth)],
                _downsample(dim, dims[i + 1], config.norm_eps) if i + 1 < len(dims) else None,
            )
            for i, (depth, dim) in enumerate(zip(depths, dims))
        )
        self.classifier = nn.ModuleDict({"norm": ResidualNorm(dims[-1], eps=config.norm_eps)})
        self.classifier["head"] = self._linear_head(config.num_classes)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"layers.{i}.blocks"}
            for i, dim in enumerate(dims)
        ]
        self.init_weights()

    def _mixer(self, dim: int) -> nn.Module:
        raise NotImplementedError

    def _block(self, dim: int, drop_path: float) -> "HierarchicalBlock":
        hidden = int(dim * self.config.mlp_ratio)
        return HierarchicalBlock(dim, self._mixer(dim), hidden, drop_path, self.config.norm_eps)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fresh weights, e.g. after `model.to_empty(device=...)` on a model built on `meta`."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.LayerNorm | CrossScan2d | UngatedMixer2d):
                module.reset_parameters()
            elif isinstance(module, Mlp):
                for layer in (module.fc1, module.fc2):
                    init_head(layer)
        init_head(self.classifier["head"])

    def _embed(self, images: Tensor) -> Tensor:
        self._check_images(images)
        x = self.patch_embed(images.permute(0, 2, 3, 1))  # (B, H / 4, W / 4, D)
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _step(self, i: int, x: Tensor) -> Tensor:
        if i > 0:
            downsample = self.layers[i - 1].downsample
            x = downsample(x.to(downsample[1].weight.dtype)).to(x.dtype)
        for block in self.layers[i].blocks:
            x = self._run(block, x)
        return x

    def _can_norm(self, i: int) -> bool:
        return i == len(self.config.dims) - 1

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.layers[-1].downsample = nn.Identity()
        return taken

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Make another image size the model's own; nothing in it depends on one."""
        if img_size is not None:
            self.config = replace(self.config, img_size=img_size)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups by depth, for layer-wise learning rates."""
        blocks = (
            r"^layers\.(\d+)"
            if coarse
            else [
                (r"^layers\.(\d+)\.blocks\.(\d+)", None),
                (r"^layers\.(\d+)\.downsample", (0,)),
                (r"^classifier\.norm", (99999,)),
            ]
        )
        return {"stem": r"^patch_embed", "blocks": blocks}


class Stage(nn.Module):
    """Blocks at one resolution, and the way to the next one."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = nn.Identity() if downsample is None else downsample


class ResidualNorm(nn.LayerNorm):
    """A layer norm of a residual, which stays in float32 beside weights of a lower type."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class HierarchicalBlock(nn.Module):
    """x + drop_path(op(norm(x))), then x + drop_path(mlp(norm2(x))), (B, H, W, D)."""

    def __init__(self, dim: int, mixer: nn.Module, hidden: int, drop_path: float, eps: float):
        super().__init__()
        self.norm = ResidualNorm(dim, eps=eps)
        self.op = mixer
        self.norm2 = ResidualNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.op(self.norm(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VMamba(Hierarchical):
    """VMamba (releases s1l8, s2l15), images (B, C, H, W) -> logits (B, num_classes).

    Keywords as in `HierarchicalConfig`. A baseline with the names and numbers of its published
    code, so that its public ImageNet weights can be loaded: `v2m.from_checkpoint` recognises them.
    """

    def _mixer(self, dim: int) -> CrossScan2d:
        config = self.config
        return CrossScan2d(
            dim, d_state=config.d_state, expand=config.ssm_ratio, dt_rank=config.dt_rank
        )


class HierarchicalV2M(Hierarchical):
    """V2M-S* and V2M-B*, images (B, C, H, W) -> logits (B, num_classes).

    Keywords as in `HierarchicalV2MConfig`; timm's model interface throughout.
    """

    config_class = HierarchicalV2MConfig

    def _mixer(self, dim: int) -> UngatedMixer2d:
        config = self.config
        return UngatedMixer2d(
            dim,
            d_state=config.d_state,
            expand=config.ssm_ratio,
            dt_rank=config.dt_rank,
            scan=config.scan,
        )


def _stem(in_chans: int, dim: int, eps: float) -> nn.Sequential:
    """Two 3x3 stride-2 convolutions, each with a norm. Places without a number hold nothing."""
    return nn.Sequential(
        GridConv2d(in_chans, dim // 2, 3, stride=2, padding=1),
        nn.Identity(),
        nn.LayerNorm(dim // 2, eps=eps),
        nn.Identity(),
        nn.GELU(),
        GridConv2d(dim // 2, dim, 3, stride=2, padding=1),
        nn.Identity(),
        nn.LayerNorm(dim, eps=eps),
    )


def _downsample(dim: int, out: int, eps: float) -> nn.Sequential:
    """A 3x3 stride-2 convolution and a norm."""
    return nn.Sequential(
        nn.Identity(),
        GridConv2d(dim, out, 3, stride=2, padding=1),
        nn.Identity(),
        nn.LayerNorm(out, eps=eps),
    )
