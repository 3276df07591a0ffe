"""`v2m data`: the table, the download and the check, with their exit codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from v2m.cli.main import main
from v2m.data import fashion_mnist


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train/cat", "train/dog"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.full((8, 8, 3), number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("arguments", [["data"], ["data", "list"]])
def test_the_table(arguments: list[str], capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("V2M_DATA", str(tmp_path))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_DIRECTORY", tmp_path / "nowhere")
    assert main(arguments) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    small = next(row for row in rows if row[:1] == ["fashion-mnist-small"])
    full = next(row for row in rows if row[:1] == ["fashion-mnist"])
    size = ["28", "x", "28", "x", "1"]
    assert small[1:] == ["10,000", "+", "2,000", "10", *size, "part", "of", "v2m"]
    assert full[1:10] == ["60,000", "+", "10,000", "10", *size]
    assert " ".join(full[10:]) == "not here yet: v2m data download fashion-mnist"


def test_check_of_a_good_folder(folder: Path, capsys) -> None:
    assert main(["data", "check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "train: 6 images in 2 classes (3 to 3 each)" in out
    assert "every image can be read" in out


def test_check_names_what_is_wrong_and_ends_with_2(folder: Path, capsys) -> None:
    (folder / "train" / "dog" / "1.png").write_bytes(b"")
    (folder / "train" / "emu").mkdir()
    assert main(["data", "check", str(folder)]) == 2
    captured = capsys.readouterr()
    assert "1 unreadable images and 1 other problems" in captured.err
    assert f"{folder}/train/dog/1.png is empty" in captured.err
    assert "class 'emu' is empty" in captured.err
    assert "Traceback" not in captured.err + captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["check"], "folder"),
        (["download", "imagenet"], "'imagenet' cannot be downloaded"),
        (["download", "fashion-mnist-small"], "nothing to download"),
        (["upload"], "upload"),
    ],
)
def test_bad_input_ends_with_2(arguments: list[str], message: str, capsys) -> None:
    assert main(["data", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_download_without_a_network(capsys, tmp_path: Path) -> None:
    source = "http://127.0.0.1:9/closed"
    arguments = ["fashion-mnist", "--directory", str(tmp_path), "--source", source]
    assert main(["data", "download", *arguments]) == 2
    error = capsys.readouterr().err
    assert f"{source}/train-images-idx3-ubyte.gz" in error
    assert "Check the network connection" in error


@pytest.mark.parametrize("found", [True, False])
def test_download_says_where_and_how_it_is_found(capsys, tmp_path, monkeypatch, found) -> None:
    def fake(name, directory, progress, *, sources):
        progress("a.gz", 5, 10)
        progress("a.gz", 10, 10)
        return directory

    monkeypatch.setattr("v2m.data.downloads.download", fake)
    monkeypatch.setenv("V2M_DATA", str(tmp_path if found else tmp_path / "other"))
    assert main(["data", "download", "fashion-mnist", "--directory", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"fashion-mnist is in {tmp_path}" in out
    assert (f"set V2M_DATA={tmp_path}" in out) is not found
