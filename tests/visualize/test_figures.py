"""The pictures: what is drawn where, and that an inline SVG follows its page."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from v2m.errors import InputError
from v2m.visualize import draw_curves, draw_receptive_field, draw_receptive_fields
from v2m.visualize.figures import COLORS, themed_svg


def field(height=6, width=10):
    values = np.random.default_rng(0).random((height, width)) ** 6
    return values / values.max()


@pytest.mark.parametrize("scale", ["log", "sqrt", "linear"])
def test_field_and_its_middle(scale):
    axes = Figure().subplots()
    image = draw_receptive_field(field(), axes, scale=scale)
    assert image.norm(1.0) == pytest.approx(1)
    assert image.norm(0.25) > image.norm(0.01) >= 0
    across, down = axes.lines[0], axes.lines[1]
    assert np.mean(across.get_xdata()) == 4.5
    assert np.mean(down.get_ydata()) == 2.5


def test_unknown_scale():
    with pytest.raises(InputError, match="`scale` must be one of log, sqrt, linear; got 'cubic'"):
        draw_receptive_field(field(), Figure().subplots(), scale="cubic")


def test_panels_share_one_scale_and_may_be_missing():
    figure = draw_receptive_fields(
        [{"corners": field(), "release": field()}, {"corners": field()}], ["trained", "fresh"]
    )
    panels, bar = figure.axes[:4], figure.axes[4:]
    assert [axes.get_title() for axes in panels] == ["corners", "release", "", ""]
    assert [len(axes.images) for axes in panels] == [1, 1, 1, 0]
    assert len({axes.images[0].norm.vmin for axes in panels[:3]}) == 1
    assert len(bar) == 1


def test_floor_follows_the_fields():
    faint = np.full((5, 5), 3e-6)
    faint[2, 2] = 1
    figure = draw_receptive_fields([{"corners": faint}], [""])
    assert figure.axes[0].images[0].norm.vmin == pytest.approx(1e-6)
    empty = draw_receptive_fields([{"corners": np.zeros((5, 5))}], [""])
    assert empty.axes[0].images[0].norm.vmin == pytest.approx(1e-4)


def test_curves_leave_out_what_is_missing():
    figure = draw_curves(
        [1, 2, 3], {"training": [3.0, 2.0, 1.0], "validation": [None, 0.5, 0.25]}, percent=True
    )
    training, validation = figure.axes[0].lines
    assert list(training.get_xdata()) == [1, 2, 3]
    assert list(validation.get_xdata()) == [2, 3]


def test_svg_takes_the_colours_and_the_font_of_the_page():
    figure = draw_curves([1, 2], {"training": [2.0, 1.0], "validation": [2.1, 1.5]})
    first, second = (themed_svg(figure, name) for name in ("loss", "again"))
    for svg in (first, second):
        ElementTree.fromstring(svg.replace("xlink:", ""))
        assert "font-family" not in svg
        assert "<style" not in svg
        assert not any(drawn in svg for drawn, _ in COLORS.values())
        assert {"var(--first)", "var(--second)", "var(--faint)"} <= set(
            re.findall(r"var\(.*?\)", svg)
        )
        assert ">training<" in svg

    def ids(svg):
        return set(re.findall(r'\bid="(.*?)"', svg))

    assert ids(first)
    assert not ids(first) & ids(second)  # both stand in one page
    assert {name.strip("#") for name in re.findall(r"#\w+", first)} <= ids(first)
