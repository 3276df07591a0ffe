"""Runs of detection: boxes, and masks where the data have them."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor, nn

from v2m.data.annotations import DetectionDataset
from v2m.data.dense_loaders import DenseLoader, create_dense_loader
from v2m.data.dense_transforms import detection_evaluation, detection_training
from v2m.data.detection import load_detection
from v2m.engine.dense import DenseTask, as_on_first_rank
from v2m.engine.distributed import Ranks
from v2m.engine.loop import Loop
from v2m.engine.progress import Reporter
from v2m.engine.rundir import DETECTIONS, RunDirectory
from v2m.errors import InputError
from v2m.evaluation.detection import DetectionResult, evaluate_detector
from v2m.heads import Detector, DetectorConfig

__all__ = ["DetectionTask"]


class DetectionTask(DenseTask):
    """Faster R-CNN or Mask R-CNN on folders of COCO's, VOC's or Roboflow's layout."""

    name = "detect"
    has_accuracy = False

    def open_dataset(self, split: str) -> DetectionDataset:
        data = self.config.data
        if data.name is None:
            raise InputError("no data set is named: give --data a folder of annotated images.")
        dataset = load_detection(
            data.name,
            split,
            on_error=data.on_error,
            validation_fraction=data.validation_fraction,
            seed=data.split_seed,
        )
        if self.config.detect.masks and not dataset.has_masks:
            raise InputError(
                f"detect.masks = true, but not every object of {dataset.name} ({split}) has a"
                ' mask ("segmentation"): leave it out to train on boxes.'
            )
        return dataset

    def build_model(self, train_set: DetectionDataset) -> nn.Module:
        if not any(image.instances for image in train_set.images):
            raise InputError(f"no training image of {train_set.name} has an object: check --data.")
        backbone, description = self._backbone(train_set.in_chans)
        wanted = self.config.detect
        shape = DetectorConfig(
            **description,
            num_classes=len(train_set.classes),
            masks=train_set.has_masks if wanted.masks is None else wanted.masks,
            min_size=wanted.min_sizes[-1],
            max_size=wanted.max_size,
            anchor_sizes=wanted.anchor_sizes,
            pyramid_channels=wanted.pyramid_channels,
            box_channels=wanted.box_channels,
            mask_channels=wanted.mask_channels,
            regions=wanted.regions,
            score_threshold=wanted.score_threshold,
            max_detections=wanted.max_detections,
        )
        return self._prepare(Detector(shape, backbone))

    def open_loader(
        self,
        model: nn.Module,
        dataset: DetectionDataset,
        ranks: Ranks,
        *,
        batch_size: int,
        is_training: bool = False,
    ) -> DenseLoader:
        wanted = self.config.detect
        transform = detection_evaluation()
        if is_training:
            transform = detection_training(
                wanted.min_sizes,
                wanted.max_size,
                horizontal_flip=wanted.horizontal_flip,
                vertical_flip=wanted.vertical_flip,
                distortion=wanted.distortion if dataset.in_chans == 3 else 0.0,
            )
        return create_dense_loader(
            dataset,
            transform,
            is_training=is_training,
            batch_size=batch_size,
            seed=self.config.run.seed,
            num_workers=self.config.data.workers,
            rank=ranks.rank,
            world_size=ranks.world,
        )

    def loss(
        self, loop: Loop, inputs: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The sum of torchvision's losses; there are no right answers to count."""
        device = loop.device
        images = [image.to(device, non_blocking=True) for image in inputs]
        wanted = [
            {key: value.to(device, non_blocking=True) for key, value in target.items()}
            for target in targets
        ]
        with loop.autocast():
            losses = loop.network(images, wanted)
        total = sum(value.float() for value in losses.values())
        return total, total.new_zeros(())

    def validate(self, session: Any, loader: DenseLoader, **keywords: Any) -> dict[str, Any]:
        return self._evaluate(session, loader, **keywords).summary()

    def test(
        self, session: Any, run: RunDirectory, loader: DenseLoader, reporter: Reporter
    ) -> dict[str, Any]:
        result = self._evaluate(session, loader, on_batch=reporter.evaluated)
        if session.ranks.first:
            (run.path / DETECTIONS).write_text(json.dumps(result.rows))
        return {**result.summary(), "classes": result.classes, "split": loader.dataset.split}

    def _evaluate(self, session: Any, loader: DenseLoader, **keywords: Any) -> DetectionResult:
        as_on_first_rank(session.state.evaluated)
        return evaluate_detector(
            session.state.evaluated,
            loader,
            loader.dataset,
            device=session.device,
            autocast=session.loop.autocast,
            limit_batches=session.config.run.limit_batches,
            **keywords,
        )

    def figures(self, record: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in record.items() if k.startswith(("box_ap", "mask_ap"))}

    def summary(self, record: dict[str, Any]) -> str:
        parts = [
            f"{kind} AP {record[f'{kind}_ap']:.1%} (AP50 {record[f'{kind}_ap50']:.1%})"
            for kind in ("box", "mask")
            if record.get(f"{kind}_ap") is not None
        ]
        return ", ".join(parts) or "no annotated object to find"
