"""What the configurations of all models share, and their checks."""

from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TypeVar

from v2m.errors import InputError

__all__ = [
    "BackboneConfig",
    "as_pair",
    "check_flag",
    "check_fraction",
    "check_pooling",
    "check_whole",
    "from_keywords",
]

Config = TypeVar("Config")
POOLINGS = ("avg", "max", "token", "")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The keywords that every model takes."""

    img_size: int | tuple[int, int] = 224  # pixels, (height, width)
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head
    global_pool: str = "avg"  # "avg", "max", "token" with a class token, or "" for the feature map
    drop_rate: float = 0.0  # before the head
    drop_path_rate: float = 0.0  # of the last layer; grows linearly from 0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", as_pair("img_size", self.img_size))
        check_whole("in_chans", self.in_chans, least=1)
        check_whole("num_classes", self.num_classes, least=0)
        for name in ("drop_rate", "drop_path_rate"):
            check_fraction(name, getattr(self, name))
        if not isinstance(self.norm_eps, float) or not self.norm_eps > 0:
            raise InputError(f"`norm_eps` must be a number above 0; got {self.norm_eps!r}.")
        check_pooling(self.global_pool, has_token=self.has_class_token)

    @property
    def has_class_token(self) -> bool:
        """Whether the model has a class token for `global_pool="token"` to read."""
        return False


def from_keywords(config_class: type[Config], keywords: dict) -> Config:
    """A configuration from keywords, unknown ones named with the nearest that exists."""
    known = [field.name for field in fields(config_class)]
    for name in keywords:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"unknown model keyword {name!r}.{hint} Known keywords: {', '.join(known)}."
            )
    return config_class(**keywords)


def check_whole(name: str, value, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"`{name}` must be a whole number of at least {least}; got {value!r}.")


def check_pooling(name: str, *, has_token: bool) -> None:
    if name not in POOLINGS:
        raise InputError(f"`global_pool` must be one of {POOLINGS}; got {name!r}.")
    if name == "token" and not has_token:
        raise InputError(
            '`global_pool` is "token", but the model has no class token to read; use "avg", or'
            " build a plain V2M with class_token=True."
        )


def check_fraction(name: str, value) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise InputError(f"`{name}` must be a number from 0 to below 1; got {value!r}.")


def as_pair(name: str, value) -> tuple[int, int]:
    """(height, width) from one number or a pair."""
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise InputError(f"`{name}` must be one number or (height, width); got {value!r}.")
    for side in pair:
        check_whole(name, side, least=1)
    return tuple(pair)


def check_flag(name: str, value) -> None:
    if not isinstance(value, bool):
        raise InputError(f"`{name}` must be True or False; got {value!r}.")
