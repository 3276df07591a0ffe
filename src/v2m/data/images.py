"""Reading one image file: any common format in, an upright 8-bit grey or RGB picture out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from v2m.errors import InputError

__all__ = ["IMAGE_SUFFIXES", "BadImageError", "decode_image", "load_image", "to_channels"]

# Decoders that may run. The content decides, not the suffix; formats that start other programs
# (EPS) or that are not pictures of one size stay out.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".gif", ".bmp", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
)
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")


class BadImageError(InputError):
    """An image file that cannot be read; the message names the file and says why."""


def load_image(path: str | os.PathLike, channels: int = 3) -> Image.Image:
    """Read an image file as mode "RGB" (`channels` = 3) or "L" (`channels` = 1).

    The EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8
    bits, CMYK and palettes are converted, and of an animation the first frame is taken.

    Raises:
        BadImageError: for anything that is not a complete image of at most
            2 x `PIL.Image.MAX_IMAGE_PIXELS` (179 million) pixels.
    """
    path = Path(path)
    try:
        if not path.is_file():
            path.stat()  # says why: missing, a loop of links, no permission
            raise InputError("it is not a file.")
    except Exception as error:
        raise BadImageError(f"{path} cannot be read as an image: {error}") from error
    return decode_image(path, str(path), channels)


def decode_image(source: str | os.PathLike | BinaryIO, name: str, channels: int = 3) -> Image.Image:
    """`load_image` of a path or an open file; `name` is what messages call it."""
    try:
        with Image.open(source, formats=FORMATS) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return to_channels(image, channels)
    except Image.UnidentifiedImageError as error:
        unknown = f"is not an image of a known format ({', '.join(FORMATS)})"
        raise BadImageError(f"{name} {'is empty' if _is_empty(source) else unknown}.") from error
    except Exception as error:  # decoders raise almost anything on damaged files
        reason = str(error) or type(error).__name__
        raise BadImageError(f"{name} cannot be read as an image: {reason.rstrip('.')}.") from error


def _is_empty(source: str | os.PathLike | BinaryIO) -> bool:
    if isinstance(source, str | os.PathLike):
        return os.path.getsize(source) == 0
    return source.seek(0, os.SEEK_END) == 0


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """`image` as mode "RGB" (`channels` = 3) or "L" (`channels` = 1), see `load_image`."""
    if channels not in (1, 3):
        raise InputError(f"images have 1 (grey) or 3 (RGB) channels; got {channels}.")
    mode = "L" if channels == 1 else "RGB"
    transparent = image.mode in _TRANSPARENT or "transparency" in image.info
    if image.mode == mode and not transparent:
        return image
    if image.mode in (*_SIXTEEN_BIT, "I"):
        image = _eight_bit(image)
    elif image.mode == "F":
        raise InputError(
            "it has floating-point pixels, whose range is unknown; save it with 8 or 16 bits a "
            "channel."
        )
    if transparent:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey (also when stored in 32 bits) as mode "L": 0..65535 -> 0..255, rounded."""
    values = np.asarray(image).astype(np.int64)  # (H, W)
    if values.min() < 0 or values.max() > 65535:
        raise InputError(
            f"it has 32-bit pixels from {values.min()} to {values.max()}; save it with 8 or 16 "
            "bits a channel."
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
