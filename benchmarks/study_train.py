"""One run of the study: the images on the device, the step as one CUDA graph where there is CUDA.

It follows a `TrainConfig` as `v2m train` does, for images that fit into memory as a whole, one
device, AdamW, and crop, flip and erasing as augmentation. What differs is where the time goes: an
epoch is augmented at once on the device, and a step is one launch. No step waits for the host.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from v2m.data import DataConfig, load_dataset
from v2m.engine.classification import create_mixup
from v2m.engine.config import TrainConfig
from v2m.engine.optim import create_ema, create_schedule, parameter_groups
from v2m.engine.randomness import seed_everything
from v2m.engine.session import choose_precision
from v2m.errors import InputError, NonFiniteLossError
from v2m.recipes.study import Variant, build_variant

__all__ = ["Images", "Trainer", "augmented", "run"]

ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's random erasing
WARM_UP_STEPS = 3  # before a capture, so that every kernel is compiled
EVALUATION_BATCH = 1000


@dataclass(kw_only=True)
class Images:
    """A split on the device: images (n, C, H, W) uint8 and targets (n,)."""

    images: Tensor
    targets: Tensor
    mean: Tensor  # (C, 1, 1), as the standard deviation
    std: Tensor
    classes: int

    def normalised(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std


def load(config: TrainConfig, split: str, device: torch.device) -> Images:
    """A split of the recipe's data set; of the training split what is not validation."""
    data = config.data
    return _load(data.name, split, data.validation_fraction, data.split_seed, device)


@lru_cache(maxsize=4)  # a worker makes many runs of one study
def _load(
    name: str, split: str, validation_fraction: float, seed: int, device: torch.device
) -> Images:
    dataset = load_dataset(name, split, validation_fraction=validation_fraction, seed=seed)
    images = torch.from_numpy(np.stack([np.asarray(image) for image in dataset.images]))
    images = images.unsqueeze(1) if dataset.in_chans == 1 else images.permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (dataset.mean, dataset.std))
    return Images(
        images=images.contiguous().to(device),
        targets=torch.tensor(dataset.targets, device=device),
        mean=mean,
        std=std,
        classes=len(dataset.classes),
    )


def augmented(part: Images, config: DataConfig, chosen: Tensor, generator: torch.Generator):
    """Images `chosen` (n,) of a split: padded random crop, flip and erasing, (n, C, H, W)."""
    device, count = chosen.device, len(chosen)
    height, width = part.images.shape[2:]
    uniform = partial(torch.rand, count, 1, generator=generator, device=device)
    padded = F.pad(part.images, (config.crop_padding,) * 4)
    span = 2 * config.crop_padding + 1
    axes = []
    for side, chance in ((height, config.vertical_flip), (width, config.horizontal_flip)):
        steps = torch.arange(side, device=device)
        steps = torch.where(uniform() < chance, side - 1 - steps, steps)
        axes.append((uniform() * span).long() + steps)  # (n, side)
    rows, columns = axes
    pixels = padded[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    images = part.normalised(pixels.permute(0, 3, 1, 2))  # (n, H, W, C) -> (n, C, H, W)
    if config.random_erasing == 0:
        return images
    area = _between(ERASED_AREA, uniform()) * height * width
    aspect = _between(tuple(map(math.log, ERASED_ASPECT)), uniform()).exp()
    inside = []
    for side, length in ((height, (area * aspect).sqrt()), (width, (area / aspect).sqrt())):
        length = length.round().clamp(1, side)
        start = (uniform() * (side - length + 1)).floor()
        steps = torch.arange(side, device=device)
        inside.append((steps >= start) & (steps < start + length))
    box = inside[0][:, :, None] & inside[1][:, None, :]  # (n, H, W)
    box &= (uniform() < config.random_erasing)[:, :, None]
    noise = torch.randn(images.shape, generator=generator, device=device)
    return torch.where(box[:, None], noise, images)


def _between(limits: tuple[float, float], x: Tensor) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * x


@dataclass(kw_only=True)
class Trainer:
    """A model and everything that changes with it; `step` is what is captured."""

    config: TrainConfig
    model: nn.Module
    device: torch.device
    steps_per_epoch: int
    classes: int
    image_size: int | None = None  # side to which images are enlarged
    captured: bool = False
    sums: Tensor = field(init=False)  # loss, right answers

    def __post_init__(self) -> None:
        optim = self.config.optim
        if optim.name != "adamw" or optim.accumulation != 1 or self.config.augment.repeats != 1:
            raise InputError("the study trains by AdamW, without accumulation or repeats.")
        on_cuda = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, optim),
            lr=torch.tensor(optim.lr, device=self.device),
            betas=optim.betas,
            capturable=on_cuda,
            foreach=on_cuda,
        )
        self.rates = _rates(self.config, self.steps_per_epoch)
        self.autocast = choose_precision(self.config.run.precision, self.device)[1]
        self.ema = create_ema(self.model, self.config.ema)
        self.mixup = create_mixup(self.config, self.classes, self.config.data.batch_size)
        self.parameters = list(self.model.parameters())
        self.sums = torch.zeros(2, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.images = self.targets = None
        self.step_count = 0

    @property
    def evaluated(self) -> nn.Module:
        return self.model if self.ema is None else self.ema.module

    def step(self) -> None:
        """Forward, backward and update for `self.images` and `self.targets`."""
        self.optimizer.zero_grad(set_to_none=True)
        smoothing = 0.0 if self.targets.is_floating_point() else self.config.mix.label_smoothing
        with self.autocast():
            logits = self.model(self._enlarged(self.images))
        logits = logits.float()
        loss = F.cross_entropy(logits, self.targets, label_smoothing=smoothing)
        loss.backward()
        if self.config.optim.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip_norm, foreach=True)
        self.optimizer.step()
        truth = self.targets if self.targets.ndim == 1 else self.targets.argmax(1)
        right = (logits.detach().argmax(1) == truth).float().sum()
        self.sums += torch.stack([loss.detach() * len(logits), right])

    def _enlarged(self, images: Tensor) -> Tensor:
        size = self.image_size
        if size is None or images.shape[-1] == size:
            return images
        return F.interpolate(images, size=(size, size), mode="bilinear")

    def feed(self, images: Tensor, targets: Tensor) -> None:
        """Put a batch where the step, and its graph, reads it."""
        if self.mixup is not None:
            images, targets = self.mixup(images.clone(), targets)
        if self.images is None:
            self.images, self.targets = images.clone(), targets.clone()
        else:
            self.images.copy_(images)
            self.targets.copy_(targets)

    def take_step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"].fill_(self.rates[min(self.step_count, len(self.rates) - 1)])
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()
        self.step_count += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step_count)

    def capture(self) -> None:
        """Make the step one CUDA graph. Leaves weights and optimiser as they were."""
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self.step()
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.copy_(before[name])
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
            self.sums.zero_()
        self.graph, self.captured = graph, True

    def epoch(self, part: Images, generator: torch.Generator) -> dict[str, float]:
        """All steps of an epoch; its loss and accuracy. NonFiniteLossError if it is not finite."""
        self.model.train()
        batch = self.config.data.batch_size
        order = torch.randperm(len(part.targets), generator=generator, device=self.device)
        order = order[: self.steps_per_epoch * batch]
        images = augmented(part, self.config.augment, order, generator)
        targets = part.targets[order]
        self.sums.zero_()
        for start in range(0, len(order), batch):
            self.feed(images[start : start + batch], targets[start : start + batch])
            self.take_step()
        loss, right = (self.sums / len(order)).tolist()
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the training loss is {loss} after {self.step_count} steps.")
        return {"train_loss": loss, "train_accuracy": right}

    @torch.compiler.set_stance("force_eager")
    @torch.no_grad()
    def accuracy(self, part: Images) -> float:
        """Top-1 of the model, or of its average."""
        model, right = self.evaluated.eval(), 0
        for start in range(0, len(part.targets), EVALUATION_BATCH):
            chosen = slice(start, start + EVALUATION_BATCH)
            with self.autocast():
                logits = model(self._enlarged(part.normalised(part.images[chosen])))
            right = right + (logits.float().argmax(1) == part.targets[chosen]).sum()
        return float(right) / len(part.targets)


def _rates(config: TrainConfig, steps_per_epoch: int) -> list[float]:
    """The learning rate of every step, as `v2m train` would have it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=config.optim.lr)
    schedule = create_schedule(optimizer, config.schedule, steps_per_epoch=steps_per_epoch)
    rates = []
    for step in range(config.schedule.epochs * steps_per_epoch):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def prepare(
    config: TrainConfig, variant: Variant, part: Images, device: torch.device, *, capture: bool
) -> Trainer:
    """A trainer of a fresh model, its step captured."""
    seed_everything(config.run.seed)
    model = build_variant(
        variant,
        in_chans=part.images.shape[1],
        num_classes=part.classes,
        drop_path_rate=config.model.drop_path_rate or 0.0,
    ).to(device)
    if variant.compiled and device.type == "cuda":
        for block in model.layers:
            block.mixer.compile()
    count = len(part.targets)
    if config.run.limit_batches:
        count = min(count, config.run.limit_batches * config.data.batch_size)
    steps = count // config.data.batch_size
    if steps == 0:
        raise InputError(f"data.batch_size = {config.data.batch_size} is more than {count} images.")
    trainer = Trainer(
        config=config,
        model=model,
        device=device,
        steps_per_epoch=steps,
        classes=part.classes,
        image_size=variant.keywords.get("img_size"),
    )
    if capture:
        batch = slice(0, config.data.batch_size)
        model.train()
        trainer.feed(part.normalised(part.images[batch]), part.targets[batch])
        trainer.capture()
    return trainer


def run(
    config: TrainConfig,
    variant: Variant,
    *,
    capture: bool,
    test: bool,
    finished_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
) -> tuple[dict[str, Any], list[dict[str, Any]], nn.Module]:
    """Train a variant by a recipe: its figures, a record of each epoch, and the model.

    The test images are loaded only with `test`, after the last epoch.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    part, validation = (load(config, split, device) for split in ("train", "validation"))
    on_cuda = device.type == "cuda"
    if on_cuda:
        gc.collect()  # the run before, whose graph holds its memory
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    trainer = prepare(config, variant, part, device, capture=capture)
    generator = torch.Generator(device).manual_seed(config.run.seed)
    seed_everything(config.run.seed)
    curve, seconds = [], 0.0
    started = time.perf_counter()
    for epoch in range(config.schedule.epochs):
        before = time.perf_counter()
        record = trainer.epoch(part, generator)  # ends by reading its sums, so the device is done
        seconds += time.perf_counter() - before
        record = {"epoch": epoch + 1, **record, "validation_top1": trainer.accuracy(validation)}
        curve.append(record)
        finished_epoch(record)
    images = config.schedule.epochs * trainer.steps_per_epoch * config.data.batch_size
    figures = {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "validation_top1": curve[-1]["validation_top1"],
        "test_top1": trainer.accuracy(load(config, "test", device)) if test else None,
        "train_loss": curve[-1]["train_loss"],
        "seconds": time.perf_counter() - started,
        "train_seconds": seconds,
        "images_per_second": images / seconds,
        "peak_memory_gib": (torch.cuda.max_memory_allocated() - held) / 2**30 if on_cuda else None,
        "captured": trainer.captured,
    }
    return figures, curve, trainer.evaluated
