"""`v2m models`, as a user runs it."""

import csv
import io
import json

import pytest

import v2m
from v2m.cli.main import main


def test_table_names_every_model(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in v2m.list_models())
    tiny = next(line for line in text.splitlines() if "v2m_tiny_patch16_224" in line)
    assert "6.85 M" in tiny
    assert "1.89" in tiny
    assert "224 x 224 x 3" in tiny


@pytest.mark.parametrize("pattern", ["V2M_tiny", "v2m_tiny*"])
def test_json_of_a_filter(pattern, capsys):
    assert main(["models", pattern, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["v2m_tiny_patch16_224"]
    assert rows[0]["input_size"] == [3, 224, 224]
    assert rows[0]["parameters"] == 6_852_712


def test_csv(capsys):
    assert main(["models", "nano", "--csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["name"] == "v2m_nano_patch4_28"
    assert row["input_size"] == "1x28x28"
    assert int(row["multiply_adds"]) > 1e6


def test_no_match_is_bad_input(capsys):
    assert main(["models", "resnet"]) == 2
    message = capsys.readouterr().err
    assert "no model matches 'resnet'; there are v2m_nano_patch4_28" in message
    assert "Traceback" not in message
