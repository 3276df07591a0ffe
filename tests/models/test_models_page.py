"""docs/models.md says what the models measure."""

import re
from pathlib import Path

import pytest

import v2m
from v2m.models.table import model_row

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
NUMBER = r"(\d+\.\d+)"
ROWS = re.findall(
    rf"^\|[^|]*\| `(\w+)` \|[^|]*\| {NUMBER} M[^|]*\|[^|]*\| {NUMBER}[^|]*\|$", PAGE, re.MULTILINE
)


def test_every_model_is_on_the_page():
    assert len(ROWS) == 12
    assert all(f"`{name}`" in PAGE for name in v2m.list_models())


@pytest.mark.parametrize(("name", "parameters", "gflops"), ROWS)
def test_figures_are_those_of_the_model(name, parameters, gflops):
    row = model_row(name)
    assert f"{row.parameters / 1e6:.2f}" == parameters
    assert f"{row.multiply_adds / 1e9:.2f}" == gflops
