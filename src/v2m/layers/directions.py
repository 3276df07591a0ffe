"""Where each direction of a mixer starts, in which order it scans, and how it maps back.

`corners` is what the V2M paper (arXiv 2410.10382) describes and draws; `release` is what its
published code computes (`mamba_simple.py`, bimamba_type="2d"), kept for its weights. The others
stand between the two, for ablations.
"""

from typing import NamedTuple

from v2m.errors import InputError
from v2m.ops.core import Direction, Sweep

__all__ = ["DOWN", "LEFT", "RIGHT", "SCANS", "UP", "Scan", "get_scan", "in_windows"]

LEFT = Sweep(axis=2)  # along the row, from the left
RIGHT = Sweep(axis=2, reverse=True)  # along the row, from the right
DOWN = Sweep(axis=1)  # along the column, from the top
UP = Sweep(axis=1, reverse=True)  # along the column, from the bottom


class Scan(NamedTuple):
    """The directions whose results a mixer sums, and whether it transposes the sum."""

    directions: tuple[Direction, ...]
    transpose: bool = False


# Every direction maps back to the pixel it came from, but for `release`: there the two reversed
# directions come out mirrored (the input is flipped along one axis, the output along the whole
# flattened sequence), and the sum is transposed with respect to the residual it is added to.
SCANS: dict[str, Scan] = {
    "corners": Scan(
        (
            Direction(LEFT, DOWN),
            Direction(LEFT, UP),
            Direction(RIGHT, DOWN),
            Direction(RIGHT, UP),
        )
    ),
    "corner": Scan((Direction(LEFT, DOWN),)),
    "opposite_corners": Scan((Direction(LEFT, DOWN), Direction(RIGHT, UP))),
    "release_aligned": Scan(
        (
            Direction(LEFT, DOWN),
            Direction(DOWN, LEFT),
            Direction(RIGHT, DOWN),
            Direction(UP, LEFT),
        )
    ),
    "release": Scan(
        (
            Direction(LEFT, DOWN),
            Direction(DOWN, LEFT),
            Direction(RIGHT, DOWN, mirror=(1,)),
            Direction(UP, LEFT, mirror=(2,)),
        ),
        transpose=True,
    ),
}


def get_scan(name: str) -> Scan:
    """The scan of that name.

    Raises:
        InputError: there is none.
    """
    if not isinstance(name, str) or name not in SCANS:
        raise InputError(f"`scan` must be one of {', '.join(SCANS)}; got {name!r}.")
    return SCANS[name]


def in_windows(direction: Direction, width: int) -> Direction:
    """The direction with its state confined to windows of the grid, 0 for the whole of it."""
    return direction._replace(
        first=direction.first._replace(window=width),
        second=direction.second._replace(window=width),
    )
