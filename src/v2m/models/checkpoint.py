"""Files of models: timm's Hub schema (config.json, model.safetensors), published checkpoints."""

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.models import adapt_input_conv
from torch import Tensor, nn

from v2m.errors import InputError

from .pickles import load_pickle
from .plain import Plain
from .published import describe_published, normalize_published
from .registry import MODELS, create_model
from .schema import check_depth, checked_config
from .warm_start import warm_start

__all__ = ["from_checkpoint", "hub_config", "load_strictly", "read_config", "save_model"]

WEIGHTS, CONFIG, METADATA_KEY = "model.safetensors", "config.json", "v2m_config"
_PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
_WRAPPERS = ("module.", "_orig_mod.")  # distributed training and torch.compile put these in front


@dataclass
class _Checkpoint:
    """Tensors, and what is known about the model they belong to."""

    state: dict[str, Tensor]
    architecture: str
    arguments: dict[str, Any]
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    assumes_scan: bool = False  # nothing but tensors: the scan is what published weights have


def from_checkpoint(
    source: str | os.PathLike | Mapping[str, Tensor], *, into: str | None = None, **overrides: Any
) -> nn.Module:
    """A model with the weights of a directory, a file or a state dict, loaded strictly.

    Args:
        source: a directory in timm's Hub schema (`config.json`, `model.safetensors`), a
            .safetensors file, a pickled training checkpoint of the published code, or a state dict.
            Published formats (V2M, Vim, VMamba) are recognised from names and shapes; published V2M
            weights give a model with `scan="release"`, and a warning that it was assumed.
        into: start another model from these weights instead, e.g. "v2m_tiny_patch16_224" from Vim:
            what corresponds is carried over by the rules of `v2m.models.warm_start`, and
            `model.warm_start`, a report to print, says what was and what was not.
        overrides: keywords of the model to change, e.g. `scan="corners"`, `img_size=(80, 112)` (the
            position embedding is resampled), `num_classes=5` (a fresh head), `in_chans=1`.

    Raises:
        InputError: nothing there, damaged, of no known format, a pickle that asks for more than
            tensors, or keys unknown, missing or of another shape (all named).
    """
    for key in ("features_only", "out_indices", "pretrained"):
        if key in overrides:
            raise InputError(
                f"from_checkpoint gives a whole model and takes no `{key}`; for feature maps use"
                " timm.create_model('local-dir:DIRECTORY', pretrained=True, features_only=True)."
            )
    found = _read(source)
    if into is not None:
        return _warm_start(found, into, overrides)
    arguments = {**found.arguments, **overrides}
    if found.assumes_scan and "scan" not in overrides:
        warnings.warn(
            "the tensors do not say which scan they were trained with: taking scan='release', which"
            " is what the published code computes. For weights that this library trained pass"
            " scan='corners'; what v2m.models.save_model writes says it.",
            stacklevel=2,
        )
    if found.architecture in MODELS:
        _check_sizes(found, arguments, overrides)
    model = create_model(found.architecture, **arguments)
    stated = {key: value for key, value in found.pretrained_cfg.items() if value is not None}
    cfg = {**model.pretrained_cfg, **stated}
    if overrides.keys() & {"img_size", "in_chans"} or "input_size" not in stated:
        cfg["input_size"] = _input_size(model, cfg)
    _fit_channels(cfg)
    if model.num_classes != found.arguments.get("num_classes"):
        cfg.pop("label_names", None)
    model.pretrained_cfg = model.default_cfg = {**cfg, "num_classes": model.num_classes}
    load_strictly(model, _adapt(found, model, overrides))
    return model.eval()


def _fit_channels(cfg: dict[str, Any]) -> None:
    """One mean and one standard deviation a channel: of other channels, their average."""
    channels = cfg["input_size"][0]
    for key in ("mean", "std"):
        if key in cfg and len(cfg[key]) != channels:
            cfg[key] = (sum(cfg[key]) / len(cfg[key]),) * channels


def _check_sizes(
    found: _Checkpoint, arguments: dict[str, Any], overrides: Mapping[str, Any]
) -> None:
    """Compare all shapes before any memory is taken for the sizes that a file states."""
    check_depth(arguments, len(found.state))
    try:
        with torch.device("meta"):
            model = create_model(found.architecture, **arguments)
    except (RuntimeError, OverflowError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"no model of the sizes {arguments} can be built: {first}.") from error
    _compare(model, _adapt(found, model, overrides))


def _warm_start(found: _Checkpoint, into: str, overrides: dict[str, Any]) -> nn.Module:
    """The model `into`; classes, channels, preprocessing are the source's if not overridden."""
    shared = {
        key: found.arguments[key] for key in ("num_classes", "in_chans") if key in found.arguments
    }
    model = create_model(into, **{**shared, **overrides})
    classes = found.pretrained_cfg.get("label_names")
    if classes is not None and len(classes) == model.num_classes:
        model.pretrained_cfg["label_names"] = classes
    if found.architecture not in MODELS:
        raise InputError(f"`into` starts from models of this library; got {found.architecture!r}.")
    cfg = model.pretrained_cfg
    cfg |= {
        key: found.pretrained_cfg[key] for key in _PREPROCESSING if found.pretrained_cfg.get(key)
    }
    cfg |= {"input_size": _input_size(model, cfg), "num_classes": model.num_classes}
    _fit_channels(cfg)
    state = _with_channels(found.state, model, overrides)
    model.warm_start = warm_start(model, MODELS[found.architecture][0], found.arguments, state)
    return model.eval()


def save_model(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    label_names: list[str] | None = None,
    pretrained_cfg: Mapping[str, Any] | None = None,
    v2m: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `config.json` and `model.safetensors`, each atomically; returns the directory.

    `timm.create_model("local-dir:DIRECTORY", pretrained=True)` and `from_checkpoint` read them.

    Args:
        label_names: one name a class.
        pretrained_cfg: preprocessing to state beyond the model's own (`input_size`, `mean`, ...).
        v2m: whatever task and training want to leave behind, JSON.
        state: the weights to write in place of the model's own, which may lie in shards.
    """
    if label_names is not None and len(label_names) != model.num_classes:
        raise InputError(
            f"`label_names` must have one name for each of the {model.num_classes} classes;"
            f" got {len(label_names)}."
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = hub_config(model, label_names, pretrained_cfg, v2m)
    text = json.dumps(config, indent=2) + "\n"
    state = _state(model) if state is None else state
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(config)}
    _write(directory / WEIGHTS, save(state, metadata=metadata))
    _write(directory / CONFIG, text.encode())
    return directory


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The `config.json` of a directory in timm's Hub schema."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise InputError(f"{directory} has no {CONFIG}; expected a directory that v2m wrote.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    return checked_config(config, str(path))


def load_strictly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load every tensor, or raise an InputError that names what does not fit."""
    _compare(model, state)
    model.load_state_dict(state)


def _compare(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    problems = []
    for what, names in (
        ("missing", [name for name in own if name not in state]),
        ("unknown", [name for name in state if name not in own]),
        (
            "mis-shaped",
            [
                f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
                for name in own
                if name in state and state[name].shape != own[name].shape
            ],
        ),
    ):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            problems.append(f"{what}: {'; '.join(names[:8])}{more}")
    if problems:
        raise InputError("the checkpoint does not fit the model; " + ". ".join(problems) + ".")


def _read(source: str | os.PathLike | Mapping[str, Tensor]) -> _Checkpoint:
    if isinstance(source, Mapping):
        return _published(_unwrap(source, "the mapping"))
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"`source` must be a path or a state dict; got a {type(source).__name__}.")
    path = Path(source)
    if path.is_dir():
        config = read_config(path)
        if not (path / WEIGHTS).is_file():
            raise InputError(f"{path} has a {CONFIG} but no {WEIGHTS}.")
        state, _ = _read_safetensors(path / WEIGHTS)
        return _own(config, state)
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: no such file or directory.")
    if path.suffix != ".safetensors":
        return _published(_unwrap(load_pickle(path), str(path)))
    state, config = _read_safetensors(path)
    if config is None and (path.parent / CONFIG).is_file():
        config = read_config(path.parent)
    return _published(_unwrap(state, str(path))) if config is None else _own(config, state)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors, and the configuration that `save_model` left in the file's metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}.") from error
    return state, None if config is None else checked_config(config, str(path))


def _own(config: dict[str, Any], state: dict[str, Tensor]) -> _Checkpoint:
    cfg = dict(config.get("pretrained_cfg", {}))
    arguments = dict(config.get("model_args", {}))
    classes = config.get("num_classes", cfg.get("num_classes"))
    arguments.setdefault("num_classes", 1000 if classes is None else classes)
    names = config.get("label_names")
    if names is not None and len(names) != arguments["num_classes"]:
        raise InputError(
            f"the configuration has {len(names)} label names for"
            f" {arguments['num_classes']} classes."
        )
    if names is not None:
        cfg["label_names"] = names
    return _Checkpoint(state, config["architecture"], arguments, cfg)


def _published(state: dict[str, Tensor]) -> _Checkpoint:
    state = normalize_published(state)
    architecture, arguments = describe_published(state)
    return _Checkpoint(state, architecture, arguments, assumes_scan="scan" in arguments)


def _unwrap(content: Any, where: str) -> dict[str, Tensor]:
    """The state dict in a training checkpoint, without the prefixes of wrappers."""
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{where} holds no state dict, a mapping of names to tensors.")
    state = dict(content)
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(
                f"{where}: expected names and tensors; {name!r} is a {type(tensor).__name__}."
            )
    while prefix := next((p for p in _WRAPPERS if all(name.startswith(p) for name in state)), ""):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _adapt(found: _Checkpoint, model: nn.Module, overrides: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors changed to what the overrides ask for: another grid, channels or classes."""
    state = dict(found.state)
    config = getattr(model, "config", None)
    if "pos_embed" in state and isinstance(model, Plain) and "img_size" in overrides:
        position, grid = state["pos_embed"], config.grid_size
        old = type(config)(**found.arguments).grid_size
        if position.dim() == 3 and position.shape[1] == math.prod(old) + model.prefix_tokens:
            state["pos_embed"] = model.resample_position(position, grid, old)
    state = _with_channels(state, model, overrides)
    if overrides.get("num_classes", model.num_classes) != found.arguments.get("num_classes"):
        head = model.pretrained_cfg.get("classifier", "head") + "."
        fresh = {k: v for k, v in model.state_dict().items() if k.startswith(head)}
        state = {k: v for k, v in state.items() if not k.startswith(head)} | fresh
    return state


def _with_channels(
    state: Mapping[str, Tensor], model: nn.Module, overrides: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors with the first convolution for as many channels as `overrides` ask for."""
    state, channels = dict(state), overrides.get("in_chans")
    weight = f"{model.pretrained_cfg.get('first_conv')}.weight"
    if channels is not None and weight in state:
        state[weight] = _adapt_channels(state[weight], channels)
    return state


def _adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """(D, C, h, w) for another C: timm's rule from RGB, the mean over the channels from others."""
    if weight.shape[1] == 3:
        return adapt_input_conv(channels, weight)
    return (weight.sum(dim=1, keepdim=True) / channels).repeat(1, channels, 1, 1)


def _input_size(model: nn.Module, cfg: Mapping[str, Any]) -> tuple[int, ...]:
    config = getattr(model, "config", None)
    return tuple(cfg["input_size"]) if config is None else (config.in_chans, *config.img_size)


def hub_config(
    model: nn.Module,
    label_names: list[str] | None = None,
    pretrained_cfg: Mapping[str, Any] | None = None,
    v2m: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `config.json` says of a model: how to build it, to prepare its images, its classes."""
    config = getattr(model, "config", None)
    arguments = dict(getattr(model, "_model_args", {})) if config is None else asdict(config)
    source = {
        key: value
        for key, value in model.pretrained_cfg.items()
        if key not in ("state_dict", "url", "file", "source", "hf_hub_id") and value is not None
    }
    cfg = {**source, "input_size": _input_size(model, source), **(pretrained_cfg or {})}
    _fit_channels(cfg)
    cfg["num_classes"] = model.num_classes
    names = label_names if label_names is not None else cfg.get("label_names")
    cfg.pop("label_names", None)
    result = {
        "architecture": cfg.pop("architecture"),
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": getattr(model, "global_pool", "avg"),
        "model_args": arguments,
        "pretrained_cfg": cfg,
        "v2m": {
            "timm_version": timm.__version__,
            "torch_version": torch.__version__,
            **(v2m or {}),
        },
    }
    if names is not None:
        result["label_names"] = list(names)
    return result


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("_orig_mod."): value for name, value in model.state_dict().items()}


def _write(path: Path, data: bytes) -> None:
    """Write beside the file, then move into place: a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
