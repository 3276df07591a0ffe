"""What every model is: images to a channels-last feature map to logits, behind timm's interface."""

from dataclasses import replace

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from v2m.errors import InputError
from v2m.ops.backend import recompute_as_now

from .config import BackboneConfig, check_pooling, check_whole, from_keywords

__all__ = ["Backbone", "init_head"]

# Leaf names of parameters that weight decay would pull away from what they mean.
UNDECAYED = {"A_log", "A_2_log", "A_b_log", "A_logs", "D", "D_2", "D_b", "Ds", "dt_projs_bias"}


class Backbone(nn.Module):
    """Backbone and classifier, images (B, C, H, W) -> logits (B, num_classes).

    A family says how images become a first grid (`_embed`), how the i-th feature map follows from
    the one before (`_step`), and which norm and head end it; everything else is here. Attributes a
    family sets: `config`, `layers` (as many as there are feature maps), `head_drop`,
    `feature_info`, and in the class where the first convolution, the last norm and the head are.
    """

    config_class = BackboneConfig
    first_conv = "patch_embed.proj"
    classifier_name = "head"
    final_norm_name = "norm_f"
    feature_indices: int | tuple[int, ...] = 3  # what `features_only` returns, by default

    def __init__(self, **keywords):
        super().__init__()
        config = from_keywords(self.config_class, keywords)
        self.config = config
        self.num_classes = config.num_classes
        self.global_pool = config.global_pool
        self.output_fmt = "NHWC"
        self.grad_checkpointing = False
        self.head_drop = nn.Dropout(config.drop_rate)

    def _embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> the first grid, in at least float32."""
        raise NotImplementedError

    def _step(self, i: int, x: Tensor) -> Tensor:
        """The i-th feature map from the one before it."""
        raise NotImplementedError

    def _feature_map(self, x: Tensor, images: Tensor) -> Tensor:
        """(B, H, W, D) without whatever else travels with the grid."""
        return x

    def _can_norm(self, i: int) -> bool:
        """Whether the final norm fits the i-th feature map."""
        return True

    def _pool(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, D), or as it is for `global_pool=""`."""
        if self.global_pool == "avg":
            return x.mean(dim=(1, 2))
        return x.amax(dim=(1, 2)) if self.global_pool == "max" else x

    def _linear_head(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        like = next(self.parameters())
        return nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)

    def _final_norm(self) -> nn.Module:
        return self.get_submodule(self.final_norm_name)

    def _take(self, indices: int | list[int] | None) -> tuple[list[int], int]:
        """The feature maps asked for, and the last of them."""
        count = len(self.layers)
        try:
            return feature_take_indices(count, indices)
        except (AssertionError, TypeError) as error:
            raise InputError(
                f"`indices` (timm's `out_indices`) must be a number of maps from 1 to {count} or"
                f" indices from -{count} to {count - 1}; got {indices!r}."
            ) from error

    def _check_images(self, images: Tensor) -> None:
        channels = self.config.in_chans
        if not isinstance(images, Tensor):
            raise InputError(
                f"`images` must be a torch.Tensor, (B, {channels}, H, W);"
                f" got {type(images).__name__}."
            )
        fits = images.dim() == 4 and images.shape[1] == channels and images.is_floating_point()
        if fits and 0 not in images.shape[2:]:
            return
        if fits:
            advice = "An image has at least one pixel."
        elif images.dim() != 4:
            advice = "One image goes in as image.unsqueeze(0)."
        elif images.shape[1] != channels:
            advice = f"Pass in_chans={images.shape[1]} to the model for another number of channels."
        else:
            advice = "Scale them to floats first: images.float() / 255, then mean and deviation."
        raise InputError(
            f"`images` must be floating point, (B, {channels}, H, W); got {tuple(images.shape)} of"
            f" {images.dtype}. {advice}"
        )

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **recompute_as_now())
        return block(x)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> the last feature map after the final norm, (B, H', W', D).

        A class token travels with it: see the family.
        """
        x = self._embed(images)
        for i in range(len(self.layers)):
            x = self._step(i, x)
        return self._final_norm()(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, H, W, D) -> (B, num_classes), or the pooled (B, D) with `pre_logits`."""
        x = self.head_drop(self._pool(x))
        return x if pre_logits else self.get_classifier()(x)

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
        """Chosen feature maps: (B, D, H, W) each, or (B, H, W, D) for "NHWC".

        Args:
            x: images, (B, C, H, W).
            indices: the last n maps if an int, all if None, else these.
            norm: apply the final norm to each that has its width.
            stop_early: stop after the last one asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list alone, without the final features.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise InputError(f"`output_fmt` must be 'NCHW' or 'NHWC'; got {output_fmt!r}.")
        taken, last = self._take(indices)
        final_norm, features, images = self._final_norm(), [], x
        x = self._embed(images)
        for i in range(last + 1 if stop_early else len(self.layers)):
            x = self._step(i, x)
            if i in taken:
                feature = final_norm(x) if norm and self._can_norm(i) else x
                feature = self._feature_map(feature, images)
                features.append(
                    feature.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else feature
                )
        if intermediates_only:
            return features
        return (final_norm(x) if self._can_norm(i) else x), features

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers behind the last one asked for; returns the indices kept."""
        taken, last = self._take(indices)
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.set_submodule(self.final_norm_name, nn.Identity())
        if prune_head:
            self.num_classes, self.global_pool = 0, ""
            self.set_submodule(self.classifier_name, nn.Identity())
        return taken

    def get_classifier(self) -> nn.Module:
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes` classes, 0 for none."""
        check_whole("num_classes", num_classes, least=0)
        if global_pool is not None:
            check_pooling(global_pool, has_token=self.config.has_class_token)
            self.global_pool = global_pool
        self.num_classes = num_classes
        head = self._linear_head(num_classes)
        init_head(head)
        self.set_submodule(self.classifier_name, head)
        self.config = replace(self.config, num_classes=num_classes, global_pool=self.global_pool)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone."""
        exempt = UNDECAYED | {"pos_embed", "cls_token"}
        return {name for name, _ in self.named_parameters() if name.rsplit(".")[-1] in exempt}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward instead of keeping its activations."""
        self.grad_checkpointing = enable


def init_head(head: nn.Module) -> None:
    if isinstance(head, nn.Linear):
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
