"""Public names are few, and here is the list: a change to it is a decision."""

import importlib
import re
import subprocess
import sys
from importlib import metadata

import pytest

import v2m

PUBLIC = {
    "v2m": {"InputError", "create_model", "from_checkpoint", "list_models", "selective_scan"},
    "v2m.errors": {"InputError", "NonFiniteLossError"},
    "v2m.ops": {"selective_scan", "use_backend"},
}


@pytest.mark.parametrize("module", list(PUBLIC))
def test_all_is_this_list(module):
    imported = importlib.import_module(module)
    assert set(imported.__all__) == PUBLIC[module]
    assert len(imported.__all__) == len(PUBLIC[module])


@pytest.mark.parametrize("module", [*PUBLIC, "v2m.layers", "v2m.models"])
def test_every_public_name_exists_and_says_what_it_is(module):
    imported = importlib.import_module(module)
    assert imported.__doc__
    for name in imported.__all__:
        thing = getattr(imported, name)
        assert callable(thing) or name.isupper()
        if callable(thing):
            assert thing.__doc__, name


def test_the_operators_signature():
    import inspect

    parameters = inspect.signature(v2m.selective_scan).parameters
    assert list(parameters) == [
        *("u", "dt", "A", "B", "C", "D", "z"),
        *("dt_bias", "softplus", "axis", "reverse", "window", "backend"),
    ]
    keyword_only = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert keyword_only == ["dt_bias", "softplus", "axis", "reverse", "window", "backend"]
    assert parameters["axis"].default is inspect.Parameter.empty
    defaults = {n: parameters[n].default for n in ("softplus", "reverse", "window", "backend")}
    assert defaults == {"softplus": True, "reverse": False, "window": None, "backend": None}


def test_models_of_the_paper_are_registered():
    assert {
        "v2m_nano_patch4_28",
        "v2m_tiny_patch16_224",
        "v2m_small_patch16_224",
        "v2m_base_patch16_224",
    } <= set(v2m.list_models())


def test_the_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+", v2m.__version__)
    assert metadata.version("v2m") == v2m.__version__


def test_the_library_is_typed():
    from pathlib import Path

    assert (Path(v2m.__file__).parent / "py.typed").exists()


def test_import_is_light():
    """`import v2m` loads no compiler, no plotting and no progress display."""
    heavy = ("triton", "numba", "matplotlib", "rich", "torchmetrics", "v2m.ops.library", "v2m.cli")
    code = f"import sys, v2m; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    baseline = subprocess.run(
        [sys.executable, "-c", code.replace("sys, v2m", "sys, timm, safetensors.torch")],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert result.stdout == baseline.stdout  # what timm itself loads is not ours to avoid
