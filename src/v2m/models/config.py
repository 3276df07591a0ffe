"""Checks that the configurations of all models share."""

from dataclasses import fields
from difflib import get_close_matches
from typing import TypeVar

from v2m.errors import InputError

__all__ = ["as_pair", "check_fraction", "check_whole", "from_keywords"]

Config = TypeVar("Config")


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


def check_fraction(name: str, value) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise InputError(f"`{name}` must be a number from 0 to below 1; got {value!r}.")


def as_pair(name: str, value) -> tuple[int, int]:
    """(height, width) from one number or a pair."""
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise InputError(f"`{name}` must be one number or (height, width); got {value!r}.")
    for side in pair:
        check_whole(name, side, least=1)
    return pair
