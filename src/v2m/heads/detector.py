"""Faster R-CNN and Mask R-CNN: torchvision's, on any backbone of this library or of timm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from v2m.errors import InputError
from v2m.heads.backbone import DenseBackbone
from v2m.heads.config import DetectorConfig
from v2m.heads.dense import DenseModel, build_body
from v2m.heads.pyramid import DetectionBackbone

__all__ = ["Detector"]

ASPECT_RATIOS = (0.5, 1.0, 2.0)
REGION, MASK_REGION = 7, 14  # cells of a region's side, for its class and for its mask


class Detector(DenseModel):
    """Boxes, classes and, with `masks`, masks of the objects in images.

    In training mode `detector(images, targets)` gives torchvision's losses by name, and images
    come in the size they are trained at. In evaluation mode `detector(images)` resizes each to
    `min_size` and `max_size` and gives, per image, "boxes" (n, 4) as left, top, right, bottom in
    the pixels of the image given, "labels" (n,) class indices from 0, "scores" (n,) and "masks"
    (n, 1, H, W) probabilities, best first.

    Args:
        config: its shape.
        backbone: a model with weights to build on; a new one of `config.backbone` without.
    """

    def __init__(self, config: DetectorConfig, backbone: nn.Module | None = None):
        self.architecture = "mask_rcnn" if config.masks else "faster_rcnn"
        super().__init__(config)
        if len(config.anchor_sizes) != 5:
            raise InputError(
                "`anchor_sizes` must have one size for each of 5 levels; got"
                f" {config.anchor_sizes}."
            )
        body = build_body(config, backbone, "last")
        pyramid = DetectionBackbone(body, out_channels=config.pyramid_channels)
        self.network = _network(config, pyramid)
        self.network.transform.register_forward_hook(self._tell_sizes)

    def _tell_sizes(self, _module: nn.Module, _inputs: Any, output: tuple[ImageList, Any]) -> None:
        """The backbone learns where the images of the batch end."""
        self.network.backbone.set_sizes(output[0].image_sizes)

    @property
    def body(self) -> DenseBackbone:
        return self.network.backbone.body

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Images (C, H, W) in [0, 1] of any sizes, and in training their targets.

        Args:
            targets: per image "boxes" (n, 4), "labels" (n,) from 0 and, for masks, "masks"
                (n, H, W) of 0 and 1; n may be 0.

        Raises:
            InputError: in evaluation mode, an image that is too long for its width.
        """
        if targets is not None:
            targets = [{**target, "labels": target["labels"] + 1} for target in targets]
        if not self.training:
            for image in images:
                self._check_shape(*image.shape[-2:])
        result = self.network(list(images), targets)
        if self.training:
            return result
        return [{**found, "labels": found["labels"] - 1} for found in result]

    def _check_shape(self, height: int, width: int) -> None:
        """InputError for an image of which nothing would be left at the size it is resized to."""
        short, long = sorted((height, width))
        scale = min(self.config.min_size / max(short, 1), self.config.max_size / max(long, 1))
        if short * scale < 1:
            raise InputError(
                f"an image of {height} x {width} pixels would be less than a pixel wide at the"
                f" size it is looked at, `max_size` {self.config.max_size} for its longer side: cut"
                " it into pieces."
            )


def _network(config: DetectorConfig, backbone: DetectionBackbone) -> FasterRCNN:
    """torchvision's model, where class 0 is the background."""
    classes, channels = config.num_classes + 1, config.pyramid_channels
    sizes = tuple((size,) for size in config.anchor_sizes)
    anchors = _Anchors(sizes, (ASPECT_RATIOS,) * len(sizes))
    keywords: dict[str, Any] = {
        "min_size": config.min_size,
        "max_size": config.max_size,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        "rpn_anchor_generator": anchors,
        "rpn_head": _ProposalHead(channels, anchors.num_anchors_per_location()[0]),
        "box_head": TwoMLPHead(channels * REGION**2, config.box_channels),
        "box_predictor": _BoxPredictor(config.box_channels, classes),
        "box_batch_size_per_image": config.regions,
        "box_score_thresh": config.score_threshold,
        "box_detections_per_img": config.max_detections,
        "_skip_resize": True,  # in training, where the data pipeline does it
    }
    if not config.masks:
        return FasterRCNN(backbone, **keywords)
    width = config.mask_channels
    return MaskRCNN(
        backbone,
        mask_head=MaskRCNNHeads(channels, (width,) * 4, 1),
        mask_predictor=_MaskPredictor(width, width, classes),
        **keywords,
    )


# torchvision computes boxes in the precision of what its heads give. In bfloat16, which autocast
# makes of it, a coordinate of 500 pixels is rounded to a multiple of 2, and so are the annotated
# boxes that it is compared with. Hence anchors and what the heads say are float32 always.


class _Anchors(AnchorGenerator):
    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.float32, device)


class _ProposalHead(RPNHead):
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps (B, channels, H, W) -> scores (B, A, H, W) and offsets (B, 4 A, H, W) of each."""
        scores, offsets = super().forward(x)
        return [score.float() for score in scores], [offset.float() for offset in offsets]


class _MaskPredictor(MaskRCNNPredictor):
    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, H, W) -> (n, classes, 2 H, 2 W)."""
        return super().forward(x).float()


class _BoxPredictor(nn.Module):
    """Class scores and box offsets of a region, with the small initial weights of the paper's code.

    torchvision's own leaves PyTorch's default, with which a new detector is sure of nonsense.
    """

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.cls_score = nn.Linear(channels, classes)
        self.bbox_pred = nn.Linear(channels, 4 * classes)
        for layer, deviation in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, channels) -> (n, classes), (n, 4 * classes)."""
        return self.cls_score(x).float(), self.bbox_pred(x).float()
