"""Runs of semantic segmentation: a class for each pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn import functional as F

from v2m.data.ade20k import IGNORED, SegmentationDataset, load_segmentation
from v2m.data.dense_loaders import DenseLoader, create_dense_loader
from v2m.data.dense_transforms import segmentation_evaluation, segmentation_training
from v2m.engine.dense import DenseTask, as_on_first_rank, has_ranks
from v2m.engine.distributed import Ranks
from v2m.engine.loop import Loop
from v2m.engine.progress import Reporter
from v2m.engine.rundir import CONFUSION, RunDirectory
from v2m.errors import InputError
from v2m.evaluation.segmentation import Inference, SegmentationResult, evaluate_segmenter
from v2m.heads import Segmenter, SegmenterConfig

__all__ = ["SegmentationTask"]


class SegmentationTask(DenseTask):
    """UperNet on folders of ADE20K's layout."""

    name = "segment"

    def prepare(self, train_set: SegmentationDataset, micro_batch: int) -> None:
        super().prepare(train_set, micro_batch)
        if micro_batch < 2:
            raise InputError(
                f"data.batch_size = {self.config.data.batch_size} leaves {micro_batch} image for a"
                " forward pass on one device, and batch norm after pooling the whole image needs"
                " at least 2: raise it, or lower optim.accumulation."
            )

    def open_dataset(self, split: str) -> SegmentationDataset:
        data = self.config.data
        if data.name is None:
            raise InputError("no data set is named: give --data a folder of images and classes.")
        return load_segmentation(
            data.name,
            split,
            on_error=data.on_error,
            validation_fraction=data.validation_fraction,
            seed=data.split_seed,
        )

    def build_model(self, train_set: SegmentationDataset) -> nn.Module:
        backbone, description = self._backbone(train_set.in_chans)
        wanted = self.config.segment
        shape = SegmenterConfig(
            **description,
            num_classes=len(train_set.classes),
            channels=wanted.channels,
            auxiliary_channels=wanted.auxiliary_channels,
            dropout=wanted.dropout,
        )
        model = self._prepare(Segmenter(shape, backbone))
        if has_ranks() and torch.cuda.is_available():
            model = convert_sync_batchnorm(model)
        return model

    def open_loader(
        self,
        model: nn.Module,
        dataset: SegmentationDataset,
        ranks: Ranks,
        *,
        batch_size: int,
        is_training: bool = False,
    ) -> DenseLoader:
        wanted, cfg = self.config.segment, model.pretrained_cfg
        transform = segmentation_evaluation(cfg["mean"], cfg["std"])
        if is_training:
            transform = segmentation_training(
                wanted.crop,
                mean=cfg["mean"],
                std=cfg["std"],
                ratio=wanted.ratio,
                largest_class=wanted.largest_class,
                horizontal_flip=wanted.horizontal_flip,
                distortion=wanted.distortion,
            )
        return create_dense_loader(
            dataset,
            transform,
            is_training=is_training,
            batch_size=batch_size,
            stacked=is_training,
            seed=self.config.run.seed,
            num_workers=self.config.data.workers,
            rank=ranks.rank,
            world_size=ranks.world,
        )

    def loss(self, loop: Loop, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of both heads; the accuracy is over the pixels with a class."""
        images = inputs.to(loop.device, non_blocking=True)  # (B, C, H, W)
        classes = targets.to(loop.device, non_blocking=True)  # (B, H, W)
        with loop.autocast():
            logits, auxiliary = loop.network(images)
        known = (classes != IGNORED).sum().clamp_min(1)
        main, second = (
            F.cross_entropy(x.float(), classes, ignore_index=IGNORED, reduction="sum") / known
            for x in (logits, auxiliary)
        )
        right = (logits.detach().argmax(1) == classes).sum() / known * len(images)
        return main + self.config.segment.auxiliary_weight * second, right.float()

    def validate(self, session: Any, loader: DenseLoader, **keywords: Any) -> dict[str, Any]:
        return self._evaluate(session, loader, **keywords).summary()

    def test(
        self, session: Any, run: RunDirectory, loader: DenseLoader, reporter: Reporter
    ) -> dict[str, Any]:
        result = self._evaluate(session, loader, on_batch=reporter.evaluated)
        if session.ranks.first:
            np.savez(run.path / CONFUSION, confusion=result.confusion)
        iou = [None if np.isnan(value) else float(value) for value in result.iou]
        classes = dict(zip(loader.dataset.classes, iou))
        return {**result.summary(), "classes": classes, "split": loader.dataset.split}

    def _evaluate(self, session: Any, loader: DenseLoader, **keywords: Any) -> SegmentationResult:
        as_on_first_rank(session.state.evaluated)
        return evaluate_segmenter(
            session.state.evaluated,
            loader,
            Inference(short_side=session.config.segment.short_side),
            device=session.device,
            autocast=session.loop.autocast,
            limit_batches=session.config.run.limit_batches,
            **keywords,
        )

    def figures(self, record: dict[str, Any]) -> dict[str, Any]:
        return {key: record[key] for key in ("miou", "pixel_accuracy", "mean_accuracy")}

    def summary(self, record: dict[str, Any]) -> str:
        return f"mIoU {record['miou']:.2%}, pixel accuracy {record['pixel_accuracy']:.2%}"
