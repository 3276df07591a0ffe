"""The wheel builds without a network and works in an environment that has only its dependencies."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, **keywords) -> str:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=600, **keywords
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what is tracked or new, so that the tree stays as it is."""
    source = tmp_path_factory.mktemp("source")
    for name in ("src", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        run("cp", "-r", ROOT / name, source / name)
    run("rm", "-rf", *source.glob("src/*.egg-info"))
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source)
    (built,) = out.glob("*.whl")
    return built


def test_what_is_inside(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    package = ROOT / "src" / "v2m"
    for path in package.rglob("*.py"):
        assert f"v2m/{path.relative_to(package).as_posix()}" in names
    assert "v2m/py.typed" in names
    images = "v2m/data/bundled/fashion-mnist-small-train-images-idx3-ubyte.gz"
    assert images in names
    for path in (package / "data" / "bundled").iterdir():
        assert f"v2m/data/bundled/{path.name}" in names
    assert not [n for n in names if "test" in n.split("/")[0] or "__pycache__" in n]
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert any(n.endswith("licenses/NOTICE") for n in names)
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.11" in text
    assert "# v2m" in text  # the README is its description


def test_installed_into_an_empty_environment(wheel, tmp_path):
    """Nothing but the wheel in it; its dependencies are those of this interpreter."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel)
    # Dependencies from here, but not this checkout: its editable install is a .pth file, unread.
    dependencies = [p for p in sys.path if p.endswith("site-packages")]
    keywords = {
        "cwd": tmp_path,
        "env": {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [site, *dependencies]))},
    }
    code = (
        "import v2m, v2m.data; print(v2m.__file__);"
        "data = v2m.data.load_dataset('fashion-mnist-small', 'test'); print(len(data));"
        "import torch; model = v2m.create_model('v2m_nano_patch4_28');"
        "print(tuple(model(torch.zeros(1, 1, 28, 28)).shape))"
    )
    location, count, shape = run(python, "-c", code, **keywords).strip().splitlines()
    assert Path(location).is_relative_to(site)
    assert int(count) == 2000
    assert shape == "(1, 10)"
    table = run(python, "-m", "v2m", "models", **keywords)
    assert "v2m_tiny_patch16_224" in table
