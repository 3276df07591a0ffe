"""Typed settings: declared once as dataclass fields, checked and converted with errors that help.

A section of the configuration is a frozen, keyword-only dataclass. `setting()` attaches a help
text and the allowed range to a field; `from_dict` and `apply_overrides` convert and check every
value by the field's type, and name the dotted key, the value they got, what was expected and, for
an unknown key, the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from v2m.errors import InputError

Config = TypeVar("Config")
_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with a help text and a range: minimum <= value <= maximum, above < value <
    below."""
    limits = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    metadata = {"help": help, **{k: v for k, v in limits.items() if v is not None}}
    return dataclasses.field(default=default, metadata=metadata)


def check_section(section: Any, name: str) -> None:
    """Check the type and the range of every field of one section; to be called from
    `__post_init__`."""
    hints = get_type_hints(type(section))
    for field in dataclasses.fields(section):
        key = f"{name}.{field.name}"
        value = convert(getattr(section, field.name), hints[field.name], key)
        check_range(value, field.metadata, key)
        object.__setattr__(section, field.name, value)


def check_range(value: Any, limits: Mapping[str, Any], key: str) -> None:
    """Raise InputError unless the value (each of them, for a tuple) lies within the field's
    limits."""
    for number in value if isinstance(value, tuple) else (value,):
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            continue
        inside = (
            number >= limits.get("minimum", -math.inf)
            and number <= limits.get("maximum", math.inf)
            and ("above" not in limits or number > limits["above"])
            and ("below" not in limits or number < limits["below"])
        )
        if not inside:
            raise InputError(f"{key} = {value!r} is out of range: expected {_describe(limits)}.")


def _describe(limits: Mapping[str, Any]) -> str:
    words = {
        "minimum": "at least",
        "above": "more than",
        "maximum": "at most",
        "below": "less than",
    }
    return " and ".join(f"{words[k]} {limits[k]}" for k in words if k in limits)


def type_name(kind: Any) -> str:
    """What a user is told to write for a field of this type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(a) for a in arguments)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"a comma-separated list, each {type_name(arguments[0])}"
        return f"{len(arguments)} comma-separated values, each {type_name(arguments[0])}"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        types.NoneType: "none",
    }
    return names.get(kind, "a JSON object" if origin is dict or kind is dict else str(kind))


def convert(value: Any, kind: Any, key: str) -> Any:
    """`value` (from JSON, Python or the text of an override) as the field's type; InputError if it
    is not one."""
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        try:
            return value if isinstance(value, kind) else from_dict(kind, value, key)
        except InputError as error:  # a class that does not know which section it is
            raise InputError(str(error).replace(f"{kind.__name__}.", f"{key}.")) from error
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, kind, key)
    if origin is Literal:
        if value in arguments:
            return value
        near = difflib.get_close_matches(str(value), [str(a) for a in arguments], 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{key} = {value!r}: expected {type_name(kind)}.{hint}")
    converted = _convert_plain(value, kind, origin, arguments, key)
    if converted is _REFUSED:
        raise InputError(f"{key} = {value!r}: expected {type_name(kind)}.")
    return converted


_REFUSED = object()


def _convert_union(value: Any, arguments: tuple, kind: Any, key: str) -> Any:
    if types.NoneType in arguments and (
        value is None or (isinstance(value, str) and value.lower() in ("none", "null"))
    ):
        return None
    for choice in (a for a in arguments if a is not types.NoneType):
        try:
            return convert(value, choice, key)
        except InputError:
            continue
    raise InputError(f"{key} = {value!r}: expected {type_name(kind)}.")


def _convert_plain(value: Any, kind: Any, origin: Any, arguments: tuple, key: str) -> Any:
    if origin is tuple:
        return _convert_tuple(value, arguments, key)
    if kind is dict or origin is dict:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                return _REFUSED
        return dict(value) if isinstance(value, Mapping) else _REFUSED
    if kind is bool:
        if isinstance(value, bool):
            return value
        text = value.lower() if isinstance(value, str) else None
        return True if text in _TRUE else False if text in _FALSE else _REFUSED
    if kind in (int, float):
        return _convert_number(value, kind)
    if kind is str:
        return value if isinstance(value, str) and value else _REFUSED
    raise AssertionError(f"{key}: settings of type {kind} are not supported")


def _convert_number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return _REFUSED
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        return _REFUSED
    if not math.isfinite(number) or (kind is int and isinstance(value, float) and value != number):
        return _REFUSED
    return number


def _convert_tuple(value: Any, arguments: tuple, key: str) -> Any:
    if isinstance(value, str):
        value = [part.strip() for part in value.strip("()[] ").split(",") if part.strip()]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return _REFUSED
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        return _REFUSED
    return tuple(convert(v, a, key) for v, a in zip(value, arguments))


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain dicts, lists, numbers and text, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[Config], values: Any, prefix: str = "") -> Config:
    """Build `cls` from nested dicts. Unknown keys, wrong types and values out of range raise
    InputError."""
    if not isinstance(values, Mapping):
        raise InputError(
            f"{prefix or 'the configuration'} = {values!r}: expected a section with keys "
            f"{', '.join(f.name for f in dataclasses.fields(cls))}."
        )
    hints = get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls) if f.init}
    start = f"{prefix}." if prefix else ""
    for name in values:
        if name not in names:
            raise InputError(_unknown_key(f"{start}{name}", [f"{start}{n}" for n in sorted(names)]))
    return cls(**{n: convert(v, hints[n], f"{start}{n}") for n, v in values.items()})


def _unknown_key(key: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(key, valid, 1, cutoff=0.5)
    if near:
        return f"unknown key {key!r}; did you mean {near[0]!r}? (valid here: {', '.join(valid)})"
    return f"unknown key {key!r}; valid here: {', '.join(valid)}"


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field, Any]]:
    """(dotted key, value, field, type) of every setting, section by section."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value, field, hints[field.name]


def apply_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """A copy of `config` with `section.key=value` texts applied, e.g. ["optim.lr=1e-3",
    "ema.decay=none"].

    Keys below a setting that is a JSON object are allowed: `model.kwargs.d_state=8` (its value is
    read as JSON, else as text).
    """
    values = dataclasses.asdict(config)
    known = {key: kind for key, _, _, kind in leaves(config)}
    for override in overrides:
        key, equals, text = override.partition("=")
        key, text = key.strip(), text.strip()
        if not equals or not key:
            raise InputError(f"{override!r} is not an override: write section.key=value.")
        parent = next((k for k in known if key.startswith(f"{k}.") and _is_dict(known[k])), None)
        if key not in known and parent is None:
            raise InputError(_unknown_override(key, known))
        target, *path = (parent or key).split(".")
        section = values
        for step in (target, *path)[:-1]:
            section = section[step]
        name = (target, *path)[-1]
        if parent is None:
            section[name] = convert(text, known[key], key)
        else:
            section[name] = {**section[name], key[len(parent) + 1 :]: _literal(text)}
    return from_dict(type(config), values)


def _unknown_override(key: str, known: Mapping[str, Any]) -> str:
    sections = {k.partition(".")[0] for k in known}
    if key in sections:
        inside = [k for k in known if k.startswith(f"{key}.")]
        return f"{key!r} is a section, not a key: set one of {', '.join(inside)}."
    head = key.partition(".")[0]
    same_section = [k for k in known if k.startswith(f"{head}.")]
    by_name = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near = by_name or difflib.get_close_matches(key, list(known), 1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown key {key!r}{hint} (valid: {', '.join(same_section or sorted(known))})"


def _is_dict(kind: Any) -> bool:
    return kind is dict or get_origin(kind) is dict


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"none": None, "True": True, "False": False}.get(text, text)
