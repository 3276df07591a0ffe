"""Settings: conversion, ranges, overrides, and the round trip to JSON."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v2m.engine.settings import (
    apply_overrides,
    check_section,
    from_dict,
    leaves,
    setting,
    to_dict,
    type_name,
)
from v2m.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Section:
    whole: int = setting(3, "a whole number", minimum=1, maximum=9)
    number: float = setting(0.5, "a number", above=0, below=1)
    flag: bool = setting(False, "a flag")
    text: str = setting("a", "a text")
    maybe: float | None = setting(None, "a number or none", minimum=0)
    choice: Literal["red", "green"] = setting("red", "a colour")
    pair: tuple[float, float] = setting((0.1, 0.2), "two numbers", maximum=1)
    many: tuple[int, ...] = setting((1,), "numbers")
    anything: dict[str, Any] = field(default_factory=dict, metadata={"help": "more"})

    def __post_init__(self) -> None:
        check_section(self, "section")


@dataclass(frozen=True, kw_only=True)
class Config:
    section: Section = field(default_factory=Section)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("whole=7", 7),
        ("number=1e-3", 1e-3),
        ("number = 0.25", 0.25),
        ("flag=true", True),
        ("flag=off", False),
        ("text=a=b", "a=b"),
        ("maybe=2", 2.0),
        ("maybe=none", None),
        ("choice=green", "green"),
        ("pair=0.3,0.4", (0.3, 0.4)),
        ("pair=[0.3, 0.4]", (0.3, 0.4)),
        ("many=4,5,6", (4, 5, 6)),
        ("many=4", (4,)),
        ('anything={"a": 1}', {"a": 1}),
    ],
)
def test_overrides_convert_by_type(override: str, value: Any) -> None:
    config = apply_overrides(Config(), [f"section.{override}"])
    found = getattr(config.section, override.partition("=")[0].strip())
    assert found == value
    assert type(found) is type(value)


def test_overrides_reach_into_objects_and_later_ones_win() -> None:
    overrides = [
        "anything.depth=2",
        "anything.scan=release",
        "anything.flag=True",
        "whole=4",
        "whole=5",
    ]
    section = apply_overrides(Config(), [f"section.{o}" for o in overrides]).section
    assert section.anything == {"depth": 2, "scan": "release", "flag": True}
    assert section.whole == 5
    assert Config().section.anything == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("section.whole=3.5", "section.whole = '3.5': expected a whole number"),
        ("section.whole=ten", "section.whole = 'ten': expected a whole number"),
        ("section.whole=0", "section.whole = 0 is out of range: expected at least 1 and at most 9"),
        (
            "section.number=0",
            "section.number = 0.0 is out of range: expected more than 0 and less than 1",
        ),
        ("section.number=nan", "section.number = 'nan': expected a number"),
        ("section.number=inf", "section.number = 'inf': expected a number"),
        ("section.flag=maybe", "section.flag = 'maybe': expected true or false"),
        ("section.text=", "section.text = '': expected text"),
        ("section.maybe=x", "section.maybe = 'x': expected a number or none"),
        ("section.maybe=-1", "section.maybe = -1.0 is out of range: expected at least 0"),
        ("section.choice=gren", "expected one of red, green. Did you mean 'green'?"),
        ("section.pair=1", "section.pair = '1': expected 2 comma-separated values, each a number"),
        ("section.pair=0.1,2", "section.pair = (0.1, 2.0) is out of range: expected at most 1"),
        ("section.many=1,b", "section.many = 'b': expected a whole number"),
        ("section.anything=7", "section.anything = '7': expected a JSON object"),
        ("section.anything={", "section.anything = '{': expected a JSON object"),
        ("section.wohle=1", "unknown key 'section.wohle'; did you mean 'section.whole'?"),
        ("whole=1", "unknown key 'whole'; did you mean 'section.whole'?"),
        ("section=1", "'section' is a section, not a key: set one of section.whole"),
        ("section.whole", "'section.whole' is not an override: write section.key=value"),
        ("=1", "is not an override"),
        ("section.whole.deeper=1", "unknown key 'section.whole.deeper'"),
    ],
)
def test_errors_name_key_value_and_expectation(override: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        apply_overrides(Config(), [override])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sektion": {}}, "unknown key 'sektion'; did you mean 'section'?"),
        ({"section": 3}, "section = 3: expected a section with keys whole"),
        ({"section": {"whole": True}}, "section.whole = True: expected a whole number"),
        ({"section": {"whole": 2.5}}, "section.whole = 2.5: expected a whole number"),
        ({"section": {"number": "x"}}, "section.number = 'x': expected a number"),
        (
            {"section": {"many": {"a": 1}}},
            "section.many = {'a': 1}: expected a comma-separated list",
        ),
        ([], "the configuration = []: expected a section with keys section"),
    ],
)
def test_errors_of_stored_configurations(values: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        from_dict(Config, values)


def test_python_values_are_checked_as_well() -> None:
    with pytest.raises(InputError, match=r"section\.whole = 'x'"):
        Section(whole="x")  # type: ignore[arg-type]
    assert Section(number=0.5, whole=2).whole == 2


@given(
    st.builds(
        Section,
        whole=st.integers(1, 9),
        number=st.floats(0.001, 0.999),
        flag=st.booleans(),
        text=st.text(min_size=1, max_size=5),
        maybe=st.none() | st.floats(0, 1e6),
        choice=st.sampled_from(["red", "green"]),
        many=st.lists(st.integers(-5, 5), max_size=3).map(tuple),
    )
)
def test_json_round_trip(section: Section) -> None:
    config = Config(section=section)
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_leaves_and_type_names() -> None:
    found = {key: type_name(kind) for key, _, _, kind in leaves(Config())}
    assert next(iter(found)) == "section.whole"
    assert found["section.maybe"] == "a number or none"
    assert found["section.many"] == "a comma-separated list, each a whole number"
    assert all(f.metadata["help"] for _, _, f, _ in leaves(Config()))
