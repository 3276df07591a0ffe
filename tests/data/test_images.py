"""Odd and bad image files: each gives the right pixels, or an error that names it and says why."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from v2m.data import BadImageError, load_image, to_channels
from v2m.errors import InputError

# A 4 x 6 picture whose pixels are all different and far from each other.
PIXELS = np.stack(np.mgrid[0:4, 0:6], -1)
PIXELS = np.concatenate([PIXELS * 40, (PIXELS.sum(-1, keepdims=True) * 25) % 256], -1)
PIXELS = PIXELS.astype(np.uint8)  # (4, 6, 3)
GREY = PIXELS[..., 2]
RGB = Image.fromarray(PIXELS)
FLAT = np.full((16, 16, 3), (200, 60, 20), np.uint8)  # survives JPEG


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = png_chunk(b"IDAT", zlib.compress(rows))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + png_chunk(b"IHDR", header) + b"".join(extra) + data + png_chunk(b"IEND", b"")


def repeat(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, -1)


def over_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.rint(pixels * share + 255 * (1 - share)).astype(np.uint8)


def save(name: str, image: Image.Image, **options: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        image.save(folder / name, **options)
        return folder / name

    return write


def content(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


def renamed(name: str, form: str, image: Image.Image) -> Callable[[Path], Path]:
    return save(name, image, format=form)


def cut(name: str, share: float, **options: object) -> Callable[[Path], Path]:
    """A valid file of that format, cut after `share` of its bytes."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)

    def write(folder: Path) -> Path:
        path = folder / name
        Image.fromarray(noise).save(path, **options)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        return path

    return write


def oriented(name: str, orientation: int, image: Image.Image = RGB) -> Callable[[Path], Path]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(name, image, exif=exif, **({"quality": 100} if name.endswith("jpg") else {}))


def link(folder: Path) -> Path:
    RGB.save(folder / "there.png")
    (folder / "link.png").symlink_to(folder / "there.png")
    return folder / "link.png"


def sixteen_bit(scale: int) -> np.ndarray:
    return np.array([[0, 128, 129, 257], [32768, 65535, 65000, 1000]], np.uint16) // scale


SIXTEEN = sixteen_bit(1)
EIGHT = np.array([[0, 0, 1, 1], [128, 255, 253, 4]], np.uint8)
ALPHA = np.linspace(0, 255, 24).astype(np.uint8).reshape(4, 6)
RGBA = Image.fromarray(np.dstack([PIXELS, ALPHA]))
LA = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(ALPHA)))
PALETTE = RGB.quantize(24, dither=Image.Dither.NONE)
PALETTE_PIXELS = np.asarray(PALETTE.convert("RGB"))
FIRST = PALETTE.getpixel((0, 0))
PALETTE_CLEAR = np.where((np.asarray(PALETTE) == FIRST)[..., None], 255, PALETTE_PIXELS)
BITS = (GREY > 100) * np.uint8(255)
CMYK = Image.fromarray(np.full((16, 16, 4), (0, 255, 255, 0), np.uint8), "CMYK")
RED = np.full((16, 16, 3), (255, 0, 0), np.uint8)
SECOND = Image.new("RGB", RGB.size, (1, 2, 3))
RGB16 = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in PIXELS)
COLOUR_KEY = png_chunk(b"tRNS", struct.pack(">HHH", *PIXELS[0, 0]))
KEYED = b"".join(b"\0" + row.tobytes() for row in PIXELS)
KEYED_PIXELS = PIXELS.copy()
KEYED_PIXELS[0, 0] = 255
TALL = np.arange(300, dtype=np.uint32).astype(np.uint8)[:, None]

# name: (writer, pixels (H, W, 3), tolerance)
GOOD = {
    "png": (save("a.png", RGB), PIXELS, 0),
    "one pixel": (save("a.png", RGB.crop((2, 1, 3, 2))), PIXELS[1:2, 2:3], 0),
    "one column": (save("a.png", Image.fromarray(TALL)), repeat(TALL), 0),
    "grey": (save("a.png", Image.fromarray(GREY)), repeat(GREY), 0),
    "one bit": (save("a.png", Image.fromarray(BITS).convert("1")), repeat(BITS), 0),
    "palette": (save("a.png", PALETTE), PALETTE_PIXELS, 0),
    "palette, transparent": (save("a.png", PALETTE, transparency=FIRST), PALETTE_CLEAR, 0),
    "alpha": (save("a.png", RGBA), over_white(PIXELS, ALPHA), 1),
    "grey and alpha": (save("a.png", LA), over_white(repeat(GREY), ALPHA), 1),
    "colour key": (content("a.png", png(6, 4, 8, 2, KEYED, COLOUR_KEY)), KEYED_PIXELS, 0),
    "16-bit grey": (save("a.png", Image.fromarray(SIXTEEN)), repeat(EIGHT), 0),
    "16-bit tiff": (save("a.tif", Image.fromarray(SIXTEEN)), repeat(EIGHT), 0),
    "16-bit pgm": (save("a.pgm", Image.fromarray(SIXTEEN)), repeat(EIGHT), 0),
    "16 bits in 32": (
        save("a.tif", Image.fromarray(SIXTEEN.astype(np.int32))),
        repeat(EIGHT),
        0,
    ),
    "16-bit colour": (content("a.png", png(6, 4, 16, 2, RGB16)), PIXELS, 0),
    "jpeg": (save("a.jpg", Image.fromarray(FLAT), quality=95), FLAT, 3),
    "progressive jpeg": (save("a.jpg", Image.fromarray(FLAT), progressive=True), FLAT, 3),
    "grey jpeg": (save("a.jpeg", Image.fromarray(FLAT[..., 0])), repeat(FLAT[..., 0]), 2),
    "cmyk jpeg": (save("a.jpg", CMYK, quality=95), RED, 4),
    "cmyk tiff": (save("a.tif", CMYK), RED, 0),
    "ycbcr tiff": (save("a.tif", Image.fromarray(FLAT).convert("YCbCr")), FLAT, 3),
    "mpo": (
        save(
            "a.jpg",
            Image.fromarray(FLAT),
            format="MPO",
            save_all=True,
            append_images=[SECOND.copy()],
        ),
        FLAT,
        4,
    ),
    "exif mirrored": (oriented("a.png", 2), PIXELS[:, ::-1], 0),
    "exif upside down": (oriented("a.png", 3), PIXELS[::-1, ::-1], 0),
    "exif transposed": (oriented("a.png", 5), PIXELS.transpose(1, 0, 2), 0),
    "exif on its right": (oriented("a.png", 6), np.rot90(PIXELS, -1), 0),
    "exif on its left": (oriented("a.webp", 8, Image.fromarray(FLAT[:8])), FLAT[:, :8], 4),
    "exif jpeg": (oriented("a.jpg", 6, Image.fromarray(FLAT[:8])), FLAT[:, :8], 3),
    "exif nonsense": (oriented("a.png", 77), PIXELS, 0),
    "gif": (save("a.gif", PALETTE), PALETTE_PIXELS, 0),
    "animated gif": (
        save("a.gif", PALETTE, save_all=True, append_images=[SECOND.copy()]),
        PALETTE_PIXELS,
        0,
    ),
    "transparent gif": (save("a.gif", PALETTE, transparency=FIRST), PALETTE_CLEAR, 0),
    "webp": (save("a.webp", RGB, lossless=True), PIXELS, 0),
    "animated webp": (
        save("a.webp", RGB, lossless=True, save_all=True, append_images=[SECOND.copy()]),
        PIXELS,
        0,
    ),
    "webp with alpha": (
        save("a.webp", RGBA, lossless=True, exact=True),
        over_white(PIXELS, ALPHA),
        1,
    ),
    "bmp": (save("a.bmp", RGB), PIXELS, 0),
    "tiff, lzw": (save("a.tiff", RGB, compression="tiff_lzw"), PIXELS, 0),
    "tiff of two pages": (
        save("a.tif", RGB, save_all=True, append_images=[SECOND.copy()]),
        PIXELS,
        0,
    ),
    "ppm": (save("a.ppm", RGB), PIXELS, 0),
    "pbm": (save("a.pbm", Image.fromarray(BITS).convert("1")), repeat(BITS), 0),
    "png called jpg": (renamed("a.jpg", "PNG", RGB), PIXELS, 0),
    "jpeg called png": (renamed("a.png", "JPEG", Image.fromarray(FLAT)), FLAT, 3),
    "no suffix": (renamed("picture", "PNG", RGB), PIXELS, 0),
    "odd name": (save("a b ü [1] %s.png", RGB), PIXELS, 0),
    "a link": (link, PIXELS, 0),
}


@pytest.mark.parametrize("kind", GOOD)
def test_odd_images_give_the_right_pixels(kind: str, tmp_path: Path) -> None:
    write, expected, tolerance = GOOD[kind]
    image = load_image(write(tmp_path))
    assert image.mode == "RGB"
    pixels = np.asarray(image).astype(int)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= tolerance


@pytest.mark.parametrize("kind", GOOD)
def test_odd_images_give_the_right_grey(kind: str, tmp_path: Path) -> None:
    write, expected, tolerance = GOOD[kind]
    image = load_image(write(tmp_path), channels=1)
    assert image.mode == "L"
    luma = expected.astype(int) @ np.array([19595, 38470, 7471]) / 65536  # Rec. 601
    assert np.abs(np.asarray(image) - luma).max() <= tolerance + 1


def huge_rows(width: int, height: int) -> bytes:
    """A complete 1-bit PNG of one colour, some hundred kB for any number of pixels."""
    return png(width, height, 1, 0, bytes((width // 8 + 1) * height))


def folder_called_image(folder: Path) -> Path:
    (folder / "a.jpg").mkdir()
    return folder / "a.jpg"


def loop(folder: Path) -> Path:
    (folder / "a.jpg").symlink_to(folder / "b.jpg")
    (folder / "b.jpg").symlink_to(folder / "a.jpg")
    return folder / "a.jpg"


def dangling(folder: Path) -> Path:
    (folder / "a.jpg").symlink_to(folder / "gone.jpg")
    return folder / "a.jpg"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "a.jpg")
    return folder / "a.jpg"


def archive(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.png", "w") as file:
        file.writestr("picture.png", b"not one")
    return folder / "a.png"


def flipped_byte(folder: Path) -> Path:
    path = cut("a.png", 1.0)(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    return path


def text_bomb(folder: Path) -> Path:
    text = PngInfo()
    text.add_text("comment", "x" * 70_000_000, zip=True)
    RGB.save(folder / "a.png", pnginfo=text)
    return folder / "a.png"


def unreadable(folder: Path) -> Path:
    RGB.save(folder / "a.png")
    (folder / "a.png").chmod(0)
    return folder / "a.png"


GIF_HUGE = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6)
GIF_HUGE += b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x44\x01\x00;"
BMP_HUGE = b"BM" + struct.pack("<IHHIIiiHHIIIIII", 60, 0, 0, 54, 40, 2**30, 2**30, 1, 24, *[0] * 6)
JPEG_HEAD = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
JPEG_HUGE = JPEG_HEAD + b"\xff\xc0\x00\x0b\x08\xff\xff\xff\xff\x01\x01\x11\x00"
FLOAT = Image.fromarray(np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 6))
WIDE = Image.fromarray(np.array([[0, 1 << 20]], np.int32))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>'

# name: (writer, what the message says)
BAD = {
    "empty": (content("a.jpg", b""), "is empty"),
    "text": (content("a.jpg", b"just some words\n"), "not an image of a known format"),
    "web page": (content("a.jpg", b"<!DOCTYPE html><html>404</html>"), "not an image of a known"),
    "svg": (content("a.png", SVG), "not an image of a known"),
    "eps": (content("a.jpg", EPS), "not an image of a known"),
    "pdf": (content("a.jpg", b"%PDF-1.7\n"), "not an image of a known"),
    "zip": (archive, "not an image of a known"),
    "pickle": (content("a.png", pickle.dumps({"a": 1})), "not an image of a known"),
    "random bytes": (
        content("a.jpg", np.random.default_rng(1).bytes(5000)),
        "not an image of a known",
    ),
    "zeros": (content("a.jpg", bytes(5000)), "not an image of a known"),
    "truncated jpeg": (cut("a.jpg", 0.6), "truncated"),
    "jpeg without its end": (cut("a.jpg", 0.97), "truncated"),
    "jpeg header": (content("a.jpg", JPEG_HEAD), "a.jpg"),
    "jpeg, two bytes": (content("a.jpg", b"\xff\xd8"), "a.jpg"),
    "truncated png": (cut("a.png", 0.6), "truncated"),
    "png header": (cut("a.png", 0.002), "a.png"),
    "png, a byte flipped": (flipped_byte, "a.png"),
    "png of no size": (content("a.png", png(0, 0, 8, 2, b"")), "a.png"),
    "png, too little data": (content("a.png", png(6, 4, 8, 2, KEYED[:30])), "a.png"),
    "png, text bomb": (text_bomb, "too large|MAX_TEXT"),
    "truncated gif": (cut("a.gif", 0.5), "a.gif"),
    "truncated webp": (cut("a.webp", 0.5), "a.webp"),
    "truncated tiff": (cut("a.tif", 0.5), "a.tif"),
    "truncated tiff, lzw": (cut("a.tif", 0.5, compression="tiff_lzw"), "a.tif"),
    "truncated bmp": (cut("a.bmp", 0.5), "truncated"),
    "truncated ppm": (cut("a.ppm", 0.5), "truncated"),
    "png bomb": (content("a.png", huge_rows(20_000, 20_000)), "decompression bomb"),
    "png, huge header": (content("a.png", png(2**31 - 1, 2**31 - 1, 8, 2, b"")), "bomb"),
    "gif, huge header": (content("a.gif", GIF_HUGE), "bomb"),
    "bmp, huge header": (content("a.bmp", BMP_HUGE), "bomb"),
    "jpeg, huge header": (content("a.jpg", JPEG_HUGE), "bomb"),
    "ppm, huge header": (content("a.ppm", b"P6 99999 99999 255\n"), "bomb"),
    "ppm, not a number": (content("a.ppm", b"P6 six four 255\n"), "a.ppm"),
    "float pixels": (save("a.tif", FLOAT), "floating-point"),
    "32-bit pixels": (save("a.tif", WIDE), "32-bit pixels from 0 to 1048576"),
    "folder": (folder_called_image, "it is not a file"),
    "loop of links": (loop, "links"),
    "link to nothing": (dangling, "No such file"),
    "missing": (lambda folder: folder / "a.jpg", "No such file"),
    "named pipe": (pipe, "it is not a file"),
    "null in its name": (lambda folder: folder / "a\0.jpg", "null"),
    "name too long": (lambda folder: folder / ("a" * 300 + ".jpg"), "too long"),
}


@pytest.mark.filterwarnings("ignore:Image size .* could be decompression bomb")
@pytest.mark.parametrize("kind", BAD)
def test_bad_images_are_named_with_the_reason(kind: str, tmp_path: Path) -> None:
    write, reason = BAD[kind]
    path = write(tmp_path)
    with pytest.raises(BadImageError, match=reason) as caught:
        load_image(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, InputError)


def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = unreadable(tmp_path)
    if os.geteuid() == 0:  # root reads everything: become nobody for a moment
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_uid == 0 and folder.owner() == "root" and folder != Path("/"):
                folder.chmod(folder.stat().st_mode | 0o111)
            if folder.name.startswith("pytest-of"):
                break
        os.seteuid(65534)
    try:
        with pytest.raises(BadImageError, match=r"a\.png cannot be read as an image.*ermission"):
            load_image(path)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_mutated_files_are_read_or_refused(form: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    random = np.random.default_rng(0)
    path = tmp_path / "image"
    Image.fromarray(random.integers(0, 256, (24, 31, 3), np.uint8)).save(path, form)
    whole, refused = path.read_bytes(), 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(random.integers(1, 6)):  # the header, mostly
            data[random.integers(len(data) if random.random() < 0.4 else 120)] = random.integers(
                256
            )
        if random.random() < 0.2:
            data = data[: random.integers(len(data))]
        path.write_bytes(data)
        try:
            image = load_image(path)
        except BadImageError:
            refused += 1
        else:
            assert image.mode == "RGB"
    assert refused > 5


def test_there_are_enough_kinds() -> None:
    assert len(GOOD) + len(BAD) >= 40


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_numbers_of_channels_are_refused(channels: int) -> None:
    with pytest.raises(InputError, match=rf"1 \(grey\) or 3 \(RGB\) channels; got {channels}"):
        to_channels(RGB, channels)


def test_grey_to_colour_and_back_is_exact() -> None:
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert (np.asarray(to_channels(to_channels(grey, 3), 1)) == np.asarray(grey)).all()
