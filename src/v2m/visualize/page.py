"""A report's HTML: from what its sections say to one file."""

from __future__ import annotations

import datetime
from functools import partial
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined

import v2m
from v2m.errors import InputError

__all__ = ["write_page", "written"]


def write_page(template: str, path: Path, **context: object) -> None:
    """Fill a template of this folder and write the page; InputError if it cannot be written."""
    folder = files("v2m.visualize")
    read = partial(_read, folder)
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(read),
    )
    page = environment.get_template(template).render(
        style=read("report.css"),
        version=v2m.__version__,
        date=datetime.datetime.now().strftime("%d %B %Y, %H:%M"),
        **context,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the report to {path}: {error.strerror}.") from error


def _read(folder, name: str) -> str:
    return (folder / name).read_text(encoding="utf-8")


def written(value: object) -> str:
    """A setting's value as `--set` takes it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
