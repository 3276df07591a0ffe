"""Every example of the README that is marked as Python or bash runs, in one folder, in order."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(README.read_text(encoding="utf-8"))
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    line.split("  #")[0].strip()
    for language, text in BLOCKS
    if language == "bash"
    for line in text.splitlines()
    if line.startswith("v2m ")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


def run(command: list[str], folder: Path) -> str:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_there_are_examples():
    assert len(PYTHON) >= 3
    assert len(COMMANDS) >= 3
    for word in ("create_model", "selective_scan", "timm.create_model"):
        assert any(word in text for text in PYTHON), word


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_examples(folder, number):
    run([sys.executable, "-c", PYTHON[number]], folder)


def run_commands(commands: list[str], folder: Path) -> None:
    for command in commands:
        arguments = shlex.split(command)[1:]
        assert run([sys.executable, "-m", "v2m", *arguments], folder).strip(), command


def test_commands_that_do_not_train(folder):
    needs_a_run = ("v2m train", "v2m evaluate", "v2m predict")
    commands = [command for command in COMMANDS if not command.startswith(needs_a_run)]
    assert len(commands) >= 2
    run_commands(commands, folder)


@pytest.mark.slow
def test_all_commands_in_order(tmp_path):
    run_commands(COMMANDS, tmp_path)
    assert (tmp_path / "runs" / "mine" / "model.safetensors").exists()


def test_shapes_in_comments_are_true():
    """`logits = model(...)  # (2, 10)`: run the first example and compare."""
    import torch

    torch.manual_seed(0)
    for text in PYTHON:
        scope: dict = {}
        claims = re.findall(r"^(\w+) = .*# (\(\d+(?:, \d+)+\))$", text, re.MULTILINE)
        if claims:
            exec(compile(text, "README.md", "exec"), scope)
            for name, shape in claims[-1:]:
                assert str(tuple(scope[name].shape)) == shape


def test_pictures_and_pages_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (README.parent / link).exists(), link
