"""Classify images with a trained model: what `v2m predict` does, from Python."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import (
    ImageNetInfo,
    create_transform,
    infer_imagenet_subset,
    resolve_model_data_config,
)
from torch import Tensor, nn

from v2m.data.images import IMAGE_SUFFIXES, BadImageError, load_image, to_channels
from v2m.errors import InputError
from v2m.models import MODELS, from_checkpoint, read_config

__all__ = ["Prediction", "Predictor", "find_images", "load_model", "predict"]

REMEDY = "Remove it, or pass --skip-bad (in Python `skipped=[]`) to go on without it."


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The most probable classes of one image, the best first.

    Attributes:
        path: The image's file.
        classes: Indices of the classes in the model's output.
        labels: Their names, "class 7" for a class without one.
        probabilities: Softmax of the model's output at these classes.
    """

    path: Path
    classes: tuple[int, ...]
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]


class Predictor:
    """A model with its own preprocessing and class names.

    Args:
        model: A classifier of timm's interface; `pretrained_cfg` says how images are prepared.
        label_names: Class names; by default those of `pretrained_cfg`, or ImageNet's where the
            number of classes says which ImageNet it is.
        device: "cpu", "cuda", "mps", ..., or "auto" for the fastest there is.

    Attributes:
        input_size: (C, H, W) of a prepared image.
        label_names: Names by class index.
        transform: From a PIL image to a normalised (C, H, W) tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        label_names: Sequence[str] | None = None,
        device: str | torch.device = "auto",
    ):
        self.device = _device(device)
        self.model = model.to(self.device).eval()
        preparation = resolve_model_data_config(model)
        self.input_size = tuple(preparation["input_size"])
        self.transform = create_transform(**preparation, is_training=False)
        self.label_names = list(label_names or _label_names(model))

    @classmethod
    def load(cls, source: str | Path, *, device: str | torch.device = "auto") -> Predictor:
        """From a directory in timm's Hub schema, as training leaves it, or a published checkpoint.

        Raises:
            InputError: There is no model at `source` that can be read.
        """
        return cls(load_model(source), device=device)

    def prepare(self, image: Image.Image) -> Tensor:
        """A PIL image of any size and mode as the model's input, (C, H, W)."""
        return self.transform(to_channels(image, self.input_size[0]))

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Prepared images (B, C, H, W) to class probabilities (B, K), float64 on the CPU."""
        logits = self.model(images.to(self.device))
        return logits.double().cpu().softmax(dim=-1)

    def predict(
        self,
        paths: Iterable[str | Path],
        *,
        top: int = 5,
        batch_size: int = 32,
        skipped: list[tuple[Path, str]] | None = None,
    ) -> Iterator[Prediction]:
        """Classify image files one after the other, holding one batch in memory.

        Args:
            paths: Image files.
            top: How many classes to give; at most the model's number of classes.
            batch_size: Images per forward pass.
            skipped: Receives (path, reason) of each image that cannot be read. Without it, such
                an image is an error.

        Raises:
            InputError: An image cannot be read, or the model gives something that is not finite.
        """
        for name, value in (("top", top), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"`{name}` must be at least 1; got {value}.")
        batch: list[tuple[Path, Tensor]] = []
        for path in map(Path, paths):
            try:
                image = load_image(path, self.input_size[0])
            except BadImageError as error:
                if skipped is None:
                    raise BadImageError(f"{error} {REMEDY}") from error
                skipped.append((path, str(error)))
                continue
            batch.append((path, self.prepare(image)))
            if len(batch) == batch_size:
                yield from self._classify(batch, top)
                batch = []
        if batch:
            yield from self._classify(batch, top)

    def _classify(self, batch: list[tuple[Path, Tensor]], top: int) -> Iterator[Prediction]:
        paths, images = zip(*batch)
        probabilities = self.probabilities(torch.stack(images))  # (B, K)
        best = probabilities.topk(min(top, probabilities.shape[1]), dim=-1)
        for path, values, classes in zip(paths, best.values.tolist(), best.indices.tolist()):
            if not all(map(math.isfinite, values)):
                raise InputError(
                    f"the model's output for {path} is not finite: its weights are damaged, or do "
                    "not suit this device's precision. Evaluate the checkpoint before using it."
                )
            yield Prediction(
                path=path,
                classes=tuple(classes),
                labels=tuple(map(self.label, classes)),
                probabilities=tuple(values),
            )

    def label(self, index: int) -> str:
        """The name of a class, "class 7" where it has none."""
        return self.label_names[index] if index < len(self.label_names) else f"class {index}"


def predict(
    source: str | Path,
    images: str | Path | Iterable[str | Path],
    *,
    top: int = 5,
    batch_size: int = 32,
    device: str | torch.device = "auto",
) -> list[Prediction]:
    """Classify an image, the images of a folder, or a list of images with the model at `source`.

    >>> for prediction in predict("runs/demo", "photos"):           # doctest: +SKIP
    ...     print(prediction.path, prediction.labels[0], prediction.probabilities[0])

    Raises:
        InputError: The model or an image cannot be read, or there is no image.
    """
    paths = find_images(images) if isinstance(images, str | Path) else list(images)
    predictor = Predictor.load(source, device=device)
    return list(predictor.predict(paths, top=top, batch_size=batch_size))


def find_images(source: str | Path) -> list[Path]:
    """An image file, or all image files of a folder and the folders in it, sorted.

    Raises:
        InputError: There is nothing at `source`, or no image in it.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise InputError(f"no image or folder at {source}. Check the path.")
    found = (path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    paths = sorted(path for path in found if not path.is_dir())  # links to nothing are reported
    if not paths:
        raise InputError(
            f"no image in {source} or the folders in it; looked for {', '.join(IMAGE_SUFFIXES)}."
        )
    return paths


def load_model(source: str | Path) -> nn.Module:
    """The model of a directory in timm's Hub schema, whatever its architecture, or of a checkpoint.

    Raises:
        InputError: There is none, or it cannot be read.
    """
    source = Path(source)
    if not source.exists():
        raise InputError(f"no model at {source}: expected a directory with config.json, or a file.")
    if source.is_dir():
        architecture = read_config(source).get("architecture")
        if architecture not in MODELS and timm.is_model(architecture):
            return _load_timm(source)
    return from_checkpoint(source)


def _load_timm(directory: Path) -> nn.Module:
    """A model that timm itself can build."""
    try:
        return timm.create_model(f"local-dir:{directory}", pretrained=True)
    except Exception as error:  # timm, safetensors and torch each raise their own
        raise InputError(f"timm cannot load the model in {directory}: {error}") from error


def _label_names(model: nn.Module) -> Sequence[str]:
    """The model's class names, or those of the ImageNet with as many classes, or none."""
    names = model.pretrained_cfg.get("label_names")
    if names:
        return names
    subset = infer_imagenet_subset(model)
    if subset is None:
        return []
    imagenet = ImageNetInfo(subset)
    return [imagenet.index_to_description(index) for index in range(imagenet.num_classes())]


def _device(name: str | torch.device) -> torch.device:
    if name == "auto":
        accelerators = (("cuda", torch.cuda.is_available), ("mps", torch.backends.mps.is_available))
        return torch.device(next((kind for kind, there in accelerators if there()), "cpu"))
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if reason.startswith("Expected one of"):  # all of torch's kinds
            reason = "expected cpu, cuda, cuda:1, ..., mps or auto"
        raise InputError(f"cannot use device {str(name)!r}: {reason}. Try --device cpu.") from error
    return device
