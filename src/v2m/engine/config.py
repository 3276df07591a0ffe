"""What a training run is: one frozen configuration, its sections and their ranges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from v2m.data import DataConfig
from v2m.engine.dense_config import DetectConfig, SegmentConfig
from v2m.engine.settings import apply_overrides, check_section, from_dict, setting, to_dict
from v2m.errors import InputError

__all__ = [
    "DataConfig",
    "DatasetConfig",
    "DetectConfig",
    "EmaConfig",
    "MixConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "ScheduleConfig",
    "SegmentConfig",
    "TrainConfig",
    "apply_overrides",
    "from_dict",
    "to_dict",
]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how it starts."""

    name: str | None = setting(
        None, "a name of `v2m models`, or of timm; none for the checkpoint's"
    )
    checkpoint: str | None = setting(
        None, "weights to start from: a file or folder that v2m or timm can load"
    )
    drop_path_rate: float | None = setting(None, "stochastic depth, last layer", minimum=0, below=1)
    img_size: tuple[int, ...] | None = setting(None, "image height and width", minimum=1)
    kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further keywords of the model, e.g. model.kwargs.scan=release"},
    )

    def __post_init__(self) -> None:
        check_section(self, "model")
        if self.img_size is not None and len(self.img_size) not in (1, 2):
            raise InputError(
                f"model.img_size = {self.img_size}: expected one side, or height,width."
            )


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Which images, how many at once, and who loads them."""

    name: str | None = setting(
        None, "a name of `v2m data`, a folder of images, wds:FOLDER or hfds:FOLDER"
    )
    batch_size: int = setting(128, "images per optimiser step, over all devices", minimum=1)
    workers: int | None = setting(
        None, "loader processes per device, 0 for none; none: by the cores", minimum=0, maximum=256
    )
    validation_fraction: float = setting(
        0.1, "part of the training images kept for validation", above=0, below=1
    )
    split_seed: int = setting(0, "seed of that choice", minimum=0)
    on_error: Literal["raise", "skip"] = setting("raise", "what to do with an unreadable image")

    def __post_init__(self) -> None:
        check_section(self, "data")


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """What is done to the labels, and to pairs of training images."""

    mixup: float = setting(0.0, "alpha of mixup, 0 for none", minimum=0)
    cutmix: float = setting(0.0, "alpha of cutmix, 0 for none", minimum=0)
    probability: float = setting(1.0, "part of the batches that is mixed", minimum=0, maximum=1)
    label_smoothing: float = setting(0.0, "label smoothing", minimum=0, below=1)

    def __post_init__(self) -> None:
        check_section(self, "mix")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser."""

    name: str = setting("adamw", "an optimiser of timm")
    lr: float = setting(1e-3, "peak learning rate", above=0)
    lr_batch_size: int | None = setting(
        None,
        "the batch that optim.lr is for; the rate grows linearly with data.batch_size",
        minimum=1,
    )
    weight_decay: float = setting(0.05, "weight decay of the weight matrices", minimum=0)
    betas: tuple[float, float] = setting((0.9, 0.999), "Adam's betas", minimum=0, below=1)
    momentum: float = setting(0.9, "momentum of SGD and its kin", minimum=0, below=1)
    layer_decay: float | None = setting(
        None, "learning-rate factor from layer to layer", above=0, maximum=1
    )
    clip_norm: float | None = setting(1.0, "largest gradient norm", above=0)
    accumulation: int = setting(1, "micro-batches per optimiser step", minimum=1)

    def __post_init__(self) -> None:
        check_section(self, "optim")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long, and how the learning rate goes."""

    epochs: int = setting(20, "passes over the training images", minimum=1)
    name: Literal["cosine", "multistep", "linear"] = setting(
        "cosine", "how the learning rate falls after the warm-up"
    )
    milestones: tuple[float, ...] = setting(
        (8 / 12, 11 / 12), "multistep: parts of the run after which it falls", above=0, below=1
    )
    gamma: float = setting(0.1, "multistep: what it is multiplied by there", above=0, maximum=1)
    warmup_epochs: float = setting(1.0, "linear warm-up", minimum=0)
    warmup_lr: float = setting(1e-6, "learning rate at the first step", minimum=0)
    min_lr: float = setting(1e-5, "learning rate at the end", minimum=0)

    def __post_init__(self) -> None:
        check_section(self, "schedule")
        if self.warmup_epochs > self.epochs:
            raise InputError(
                f"schedule.warmup_epochs = {self.warmup_epochs} is longer than schedule.epochs = "
                f"{self.epochs}: set schedule.warmup_epochs to less, too."
            )


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """The exponential moving average of the weights, which is what is evaluated and saved when it
    is on."""

    decay: float | None = setting(None, "decay per step, none for no average", above=0, below=1)
    warmup: bool = setting(True, "let the decay grow from 0")
    warmup_power: float = setting(
        2 / 3, "1 - (1 + step) ** -power while it grows", above=0, maximum=1
    )

    def __post_init__(self) -> None:
        check_section(self, "ema")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The machine's side of a run."""

    seed: int = setting(0, "seed of everything random", minimum=0, maximum=2**32 - 1)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting(
        "auto", "auto: CUDA, else MPS, else CPU"
    )
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "auto: bfloat16 autocast on GPUs that have it"
    )
    compile: bool = setting(False, "torch.compile the model for training")
    cuda_graph: bool = setting(
        False, "replay the model as CUDA graphs: no time is lost launching kernel by kernel"
    )
    grad_checkpointing: bool = setting(False, "recompute activations in the backward pass")
    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp", "several GPUs: each holds the whole model, or fsdp: a shard of it"
    )
    timeout_minutes: float = setting(
        10.0, "several GPUs: how long a rank waits for the others before the run fails", above=0
    )
    keep_checkpoints: int = setting(2, "how many of the last checkpoints stay", minimum=2)
    checkpoint_minutes: float | None = setting(
        30.0, "store one that often within an epoch as well; none for at its end alone", above=0
    )
    tensorboard: bool = setting(False, "write the log for TensorBoard as well")
    limit_batches: int | None = setting(
        None, "a dry run: at most so many steps an epoch and batches a validation", minimum=1
    )

    def __post_init__(self) -> None:
        check_section(self, "run")


# Keys that may differ between a run and its resumption: they do not change what is computed, or
# only its rounding.
OPERATIONAL_KEYS = frozenset(
    {
        "data.workers",
        "data.on_error",
        "run.device",
        "run.precision",
        "run.compile",
        "run.cuda_graph",
        "run.grad_checkpointing",
        "run.parallel",
        "run.timeout_minutes",
        "run.keep_checkpoints",
        "run.checkpoint_minutes",
        "run.tensorboard",
    }
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a training run depends on; `to_dict` and `from_dict` carry it to JSON and back."""

    task: Literal["classify", "detect", "segment"] = setting("classify", "what to train")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DatasetConfig = field(default_factory=DatasetConfig)
    augment: DataConfig = field(default_factory=DataConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    detect: DetectConfig = field(default_factory=DetectConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.data.batch_size % self.optim.accumulation:
            raise InputError(
                f"data.batch_size = {self.data.batch_size} cannot be split into "
                f"optim.accumulation = {self.optim.accumulation} equal micro-batches: make it a "
                "multiple."
            )
