"""Which pixels a token listens to: the effective receptive field of a model, by gradients."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import torch
from torch import nn

from v2m.errors import InputError
from v2m.models import create_model

__all__ = [
    "QUARTERS",
    "center_token",
    "effective_receptive_field",
    "gradient_share",
    "quarter_means",
    "with_scan",
]

QUARTERS = ("upper left", "upper right", "lower left", "lower right")


def center_token(height: int, width: int) -> tuple[int, int]:
    """Row and column of the middle of a grid; the lower right of the four where it is even."""
    return height // 2, width // 2


def effective_receptive_field(
    model: nn.Module,
    images: torch.Tensor,
    *,
    token: tuple[int, int] | None = None,
    batch_size: int = 16,
) -> np.ndarray:
    """Measure how strongly each pixel moves one token of the model's last feature map.

    The measure of Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional
    Neural Networks" (2016), with a gradient of one at every channel of the token::

        field[y, x] = mean over images and colours of |d sum_c feature[token, c] / d image[y, x]|

    The feature map is the last block's output before the final normalisation (which would tie the
    gradients of all channels to the token's own patch). The model runs in evaluation mode and is
    left in the mode it came in; its parameters get no gradient.

    Args:
        model: A model with timm's ``forward_intermediates``, or any module that maps images to a
            feature map (B, C, h, w).
        images: Normalised images, (B, C, H, W); H and W may differ.
        token: Row and column of the token in the feature map; its middle by default.
        batch_size: Images to hold in memory at a time.

    Returns:
        (H, W) float64 array, divided by its largest value; all zeros if no pixel reaches the token.

    Raises:
        InputError: The images are not a batch of floating point images, the model gives no
            feature map, or the token lies outside it.
    """
    if images.ndim != 4 or len(images) == 0 or not images.is_floating_point():
        raise InputError(
            "`images` must be a floating point batch (B, C, H, W) with B > 0; got "
            f"{tuple(images.shape)} of {images.dtype}. Stack the transformed images first."
        )
    was_training = model.training
    model.eval()
    try:
        total = torch.zeros(images.shape[-2:], dtype=torch.float64)
        for batch in images.split(batch_size):
            total += _absolute_gradient(model, batch, token).double().sum(dim=(0, 1)).cpu()
    finally:
        model.train(was_training)
    peak = total.max()
    return (total / peak if peak > 0 else total).numpy()


def gradient_share(field: np.ndarray, share: float = 0.95) -> float:
    """Smallest part of the image (0 to 1) whose pixels hold ``share`` of the field's sum.

    An even field over the whole image gives ``share`` itself, a single pixel 1 / (H W).
    """
    falling = np.sort(field, axis=None)[::-1]
    if falling[0] <= 0:
        return 0.0
    cumulated = np.cumsum(falling)
    pixels = np.searchsorted(cumulated, share * cumulated[-1] * (1 - 1e-12)) + 1
    return float(pixels / field.size)


def quarter_means(field: np.ndarray, grid: tuple[int, int]) -> dict[str, float]:
    """Mean gradient in each quarter of the image around the middle token, by `QUARTERS`.

    The token's own row and column belong to no quarter; one without pixels has NaN.

    Args:
        field: (H, W), for the middle token of the grid.
        grid: Rows and columns of tokens. Where they do not divide H and W, a pixel that is partly
            the token's is its own.
    """
    rows, columns = (
        (slice(0, token * side // tokens), slice(math.ceil((token + 1) * side / tokens), side))
        for token, side, tokens in zip(center_token(*grid), field.shape, grid)
    )
    parts = [field[vertical, horizontal] for vertical in rows for horizontal in columns]
    means = (float(part.mean()) if part.size else float("nan") for part in parts)
    return dict(zip(QUARTERS, means))


def with_scan(model: nn.Module, scan: str) -> nn.Module:
    """A V2M model with the weights of `model` and another scan, "corners" or "release".

    Raises:
        InputError: The model is no V2M, so it has no scan to switch, or there is no such scan.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "scan"):
        raise InputError(
            f"`model` must be a V2M, whose scan can be switched; got a {type(model).__name__}."
        )
    twin = create_model(model.pretrained_cfg["architecture"], **{**asdict(config), "scan": scan})
    twin.load_state_dict(model.state_dict())
    parameter = next(model.parameters())
    return twin.to(parameter.device, parameter.dtype).train(model.training)


def _absolute_gradient(
    model: nn.Module, images: torch.Tensor, token: tuple[int, int] | None
) -> torch.Tensor:
    """|d sum_c feature[token, c] / d images|, (B, C, H, W)."""
    images = images.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        features = _feature_map(model, images)  # (B, C, h, w)
        height, width = features.shape[-2:]
        row, column = center_token(height, width) if token is None else token
        if not (0 <= row < height and 0 <= column < width):
            raise InputError(
                f"`token` must lie in the model's {height} x {width} feature map; got "
                f"{(row, column)}. Rows and columns count from 0."
            )
        (gradient,) = torch.autograd.grad(features[:, :, row, column].sum(), images)
    return gradient.abs()


def _feature_map(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The last feature map before the final normalisation, (B, C, h, w)."""
    if hasattr(model, "forward_intermediates"):
        features = model.forward_intermediates(
            images, indices=1, norm=False, output_fmt="NCHW", intermediates_only=True
        )[-1]
    else:
        features = model(images)
    is_tensor = isinstance(features, torch.Tensor)
    if not is_tensor or features.ndim != 4:
        got = tuple(features.shape) if is_tensor else f"a {type(features).__name__}"
        raise InputError(
            f"`model` ({type(model).__name__}) must give a feature map (B, C, h, w); got {got}. "
            "Pass a model with timm's `forward_intermediates`, or the part of it up to the map."
        )
    return features
