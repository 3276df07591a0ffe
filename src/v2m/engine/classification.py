"""Runs of classification: one class an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

import v2m
from v2m.data import ImageDataset, Loader, create_loader, load_dataset, shuffle_patches
from v2m.data.device_augment import DeviceAugment
from v2m.engine.config import TrainConfig, to_dict
from v2m.engine.distributed import Ranks
from v2m.engine.loop import Loop
from v2m.engine.progress import Reporter
from v2m.engine.rundir import PREDICTIONS, RunDirectory
from v2m.engine.session import Session
from v2m.engine.task import Task
from v2m.errors import InputError
from v2m.evaluation import ClassificationResult, evaluate_classifier, patch_size
from v2m.ops import use_backend

__all__ = ["ClassificationTask"]

SHUFFLE_SEED = 0


class ClassificationTask(Task):
    """A classifier on a folder of images or a named data set."""

    name = "classify"
    mixup: Mixup | None = None
    augment: DeviceAugment | None = None

    def prepare(self, train_set: ImageDataset, micro_batch: int) -> None:
        self.mixup = create_mixup(self.config, len(train_set.classes), micro_batch)

    def open_dataset(self, split: str) -> ImageDataset:
        data = self.config.data
        if data.name is None:
            raise InputError(
                "no data set is named: give --data a name of `v2m data`, or a folder of images."
            )
        return load_dataset(
            data.name,
            split,
            on_error=data.on_error,
            validation_fraction=data.validation_fraction,
            seed=data.split_seed,
        )

    def build_model(self, train_set: ImageDataset) -> nn.Module:
        return build_model(self.config, train_set)

    def open_loader(
        self,
        model: nn.Module,
        dataset: ImageDataset,
        ranks: Ranks,
        *,
        batch_size: int,
        is_training: bool = False,
    ) -> Loader:
        cfg, config = model.pretrained_cfg, self.config
        if is_training and config.augment.on_device:
            self.augment = DeviceAugment(config.augment, cfg["mean"], cfg["std"])
        return create_loader(
            dataset,
            config.augment,
            is_training=is_training,
            input_size=cfg["input_size"],
            batch_size=batch_size,
            mean=cfg["mean"],
            std=cfg["std"],
            seed=config.run.seed,
            num_workers=config.data.workers,
            rank=ranks.rank,
            world_size=ranks.world,
        )

    def describe(self, model: nn.Module, train_set: ImageDataset) -> dict[str, Any]:
        return describe_model(self.config, model, train_set)

    def loss(self, loop: Loop, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy; mixed images count for their larger part."""
        images = inputs.to(loop.device, non_blocking=True)
        targets = targets.to(loop.device, non_blocking=True)
        smoothing = self.config.mix.label_smoothing
        if self.augment is not None:
            images = self.augment(images)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
            smoothing = 0.0  # the mixed targets are smoothed already
        with loop.autocast():
            logits = loop.network(images)
        logits = logits.float()  # (B, K)
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        truth = targets if targets.ndim == 1 else targets.argmax(1)
        return loss, (logits.detach().argmax(1) == truth).float().sum()

    def validate(self, session: Session, loader: Loader, **keywords: Any) -> dict[str, Any]:
        result = _evaluate(session, loader, **keywords)
        return {"loss": result.loss, "top1": result.top1}

    def test(
        self, session: Session, run: RunDirectory, loader: Loader, reporter: Reporter
    ) -> dict[str, Any]:
        result = _evaluate(session, loader, on_batch=reporter.evaluated)
        shuffled = _shuffled_accuracy(session, loader, reporter)
        if session.ranks.first:
            np.savez(
                run.path / PREDICTIONS, probabilities=result.probabilities, targets=result.targets
            )
        return {**result.summary(), "shuffled_top1": shuffled}

    def figures(self, record: dict[str, Any]) -> dict[str, Any]:
        return {key: record[key] for key in ("top1", "top5", "shuffled_top1")}

    def summary(self, record: dict[str, Any]) -> str:
        shuffled = record.get("shuffled_top1")
        ending = "" if shuffled is None else f" ({shuffled:.2%} with its patches shuffled)"
        return f"accuracy {record['top1']:.2%}{ending}"


def create_mixup(config: TrainConfig, classes: int, micro_batch: int) -> Mixup | None:
    """timm's mixup and cutmix; None when both alphas are 0."""
    mix = config.mix
    if mix.mixup == 0 and mix.cutmix == 0:
        return None
    if micro_batch % 2:
        raise InputError(
            f"mix.mixup and mix.cutmix mix pairs of images, but a micro-batch has {micro_batch}: "
            "choose data.batch_size and optim.accumulation so that it is even."
        )
    return Mixup(
        mixup_alpha=mix.mixup,
        cutmix_alpha=mix.cutmix,
        prob=mix.probability,
        label_smoothing=mix.label_smoothing,
        num_classes=classes,
    )


def build_model(config: TrainConfig, train_set: ImageDataset) -> nn.Module:
    """The model for the data set's classes, with `pretrained_cfg` saying how its images are
    prepared.

    A model from a checkpoint keeps its own channels, mean and standard deviation; a new one has
    the data set's.
    """
    if len(train_set.classes) < 2:
        raise InputError(
            f"{train_set.name} has the class {train_set.classes[0]!r} alone, and a classifier needs"
            " two to tell apart: add the folder of another class."
        )
    wanted = config.model
    keywords: dict[str, Any] = {"num_classes": len(train_set.classes)}
    if wanted.drop_path_rate is not None:
        keywords["drop_path_rate"] = wanted.drop_path_rate
    if wanted.img_size is not None:
        keywords["img_size"] = wanted.img_size if len(wanted.img_size) == 2 else wanted.img_size[0]
    if wanted.checkpoint is None:
        keywords["in_chans"] = train_set.in_chans
    keywords |= wanted.kwargs
    try:
        if wanted.checkpoint is not None:
            model = v2m.from_checkpoint(wanted.checkpoint, **keywords)
        else:
            assert wanted.name is not None, "a run has a model or a checkpoint"
            model = v2m.create_model(wanted.name, **keywords)
    except TypeError as error:
        raise InputError(
            f"model {wanted.name}: it does not take these settings: {error}"
        ) from error
    _check_architecture(config, model)
    if config.run.grad_checkpointing:
        model.set_grad_checkpointing(True)
    model.pretrained_cfg = model.pretrained_cfg | _preprocessing(config, model, train_set, keywords)
    _check_output(config, model, len(train_set.classes))
    return model


def _check_output(config: TrainConfig, model: nn.Module, classes: int) -> None:
    """Classify one empty image, so that a model that cannot is refused before anything starts."""
    name, size = model.pretrained_cfg["architecture"], tuple(model.pretrained_cfg["input_size"])
    try:
        with torch.inference_mode(), use_backend("eager"):  # nothing to compile for one image
            output = model.eval()(torch.zeros(1, *size))
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(
            f"{name} does not take images of {' x '.join(map(str, size))} with model.kwargs = "
            f"{config.model.kwargs}: {error}"
        ) from error
    if not isinstance(output, Tensor) or output.shape != (1, classes):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(
            f"{name} with model.kwargs = {config.model.kwargs} is no classifier of the data set's "
            f"{classes} classes: for one image it gives {shape} instead of (1, {classes})."
        )


def _check_architecture(config: TrainConfig, model: nn.Module) -> None:
    name, found = config.model.name, model.pretrained_cfg["architecture"]
    if config.model.checkpoint is not None and name not in (None, found):
        raise InputError(
            f"model.checkpoint = {config.model.checkpoint!r} holds a {found}, not the {name} that "
            "is named: leave the name out, or name that."
        )


def _preprocessing(
    config: TrainConfig, model: nn.Module, train_set: ImageDataset, keywords: dict[str, Any]
) -> dict[str, Any]:
    """What `pretrained_cfg` has to say about images of this run."""
    cfg = model.pretrained_cfg
    channels, height, width = cfg["input_size"]
    if config.model.checkpoint is None:
        channels = keywords["in_chans"]
    if config.model.img_size is not None:
        height, width = config.model.img_size[0], config.model.img_size[-1]
    own = train_set if config.model.checkpoint is None else None
    statistics = {
        "mean": tuple(own.mean if own else cfg["mean"]),
        "std": tuple(own.std if own else cfg["std"]),
    }
    for name, values in statistics.items():
        if len(values) != channels:
            statistics[name] = (sum(values) / len(values),) * channels
    return {
        **statistics,
        "input_size": (channels, height, width),
        "crop_pct": config.augment.crop_pct,
        "interpolation": config.augment.interpolation.replace("random", "bicubic"),
    }


def describe_model(
    config: TrainConfig, model: nn.Module, train_set: ImageDataset
) -> dict[str, Any]:
    """The keywords of `save_model`: class names, preprocessing, and what it was trained on and
    how."""
    keys = ("input_size", "mean", "std", "crop_pct", "interpolation")
    return {
        "label_names": list(train_set.classes),
        "pretrained_cfg": {key: model.pretrained_cfg[key] for key in keys},
        "v2m": {
            "task": "classification",
            "data": train_set.name,
            "version": v2m.__version__,
            "training": to_dict(config),
        },
    }


def _evaluate(session: Session, loader: Loader, **keywords: Any) -> ClassificationResult:
    return evaluate_classifier(
        session.state.evaluated,
        loader,
        device=session.device,
        autocast=session.loop.autocast,
        limit_batches=session.config.run.limit_batches,
        **keywords,
    )


def _shuffled_accuracy(session: Session, loader: Loader, reporter: Reporter) -> float | None:
    """Top-1 with the patches of each image in random order; None for a model without patches."""
    size = patch_size(session.state.evaluated)
    _, height, width = loader.input_size
    if size is None or height % size[0] or width % size[1]:
        return None
    generator = torch.Generator().manual_seed(SHUFFLE_SEED)
    reporter.start_evaluation("test, patches shuffled", len(loader.dataset))
    result = _evaluate(
        session,
        loader,
        on_batch=reporter.evaluated,
        transform=lambda images: shuffle_patches(images, size, generator),
    )
    return result.top1
