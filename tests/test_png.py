"""PNG files without Pillow: the same pixels, and whatever is not simple or damaged left to it."""

import io
import struct
import sys
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dec_diffusion.data import decode, png

pytest.importorskip("imagecodecs")

RNG = np.random.default_rng(0)
KINDS = {"L": 0, "RGB": 2, "RGBA": 6}
CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
SIZES = [(1, 1), (1, 40), (40, 1), (9, 7), (64, 64), (130, 97), (700, 33)]


def chunk(name: bytes, content: bytes, *, harm: int = 0) -> bytes:
    checksum = zlib.crc32(name + content) ^ harm
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def lines(size: tuple[int, int], mode: str, filters: Sequence[int]) -> bytes:
    """Rows of random bytes: any are valid, whatever the filter."""
    width = size[0] * CHANNELS[mode]
    return b"".join(bytes([filters[i % len(filters)]]) + RNG.bytes(width) for i in range(size[1]))


def written(
    size: tuple[int, int],
    mode: str,
    rows: bytes,
    *,
    before: Sequence[bytes] = (),
    after: Sequence[bytes] = (),
    packed: bytes | None = None,
    harm: int = 0,
    end: bytes = chunk(b"IEND", b""),
) -> bytes:
    header = struct.pack(">IIBBBBB", *size, 8, KINDS[mode], 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows) if packed is None else packed, harm=harm)
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *before, pixels, *after, end]
    return b"".join(parts)


def by_pillow(content: bytes) -> np.ndarray | None:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image)
    except Exception:
        return None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", KINDS)
def test_pixels_are_those_of_pillow(size, mode):
    for filters in [(0,), (1,), (2,), (3,), (4,), (4, 1, 3, 0, 2)]:
        content = written(size, mode, lines(size, mode, filters))
        found = png.decode(content)
        assert found is not None and found.dtype == np.uint8
        np.testing.assert_array_equal(found, by_pillow(content))


@pytest.mark.parametrize("alpha", ["varied", "whole"])
@pytest.mark.parametrize("mode", KINDS)
def test_images_are_those_of_another_format(mode, alpha):
    # TIFF goes through Pillow alone.
    for size in SIZES:
        width, height = size
        shape = (height, width, CHANNELS[mode])
        values = RNG.integers(0, 256, shape, dtype=np.uint8).squeeze(-1 if mode == "L" else ())
        if mode == "RGBA" and alpha == "whole":
            values[..., 3] = 255
        image, files = Image.fromarray(values), (io.BytesIO(), io.BytesIO())
        for file, kind in zip(files, ("PNG", "TIFF"), strict=True):
            image.save(file, kind)
        assert png.decode(files[0].getvalue()) is not None
        for wanted in [size, (16, 16), (5, 90)]:
            for colour in ("auto", "grey", "rgb"):
                ours, theirs = (decode.read_image(f.getvalue(), wanted, colour) for f in files)
                np.testing.assert_array_equal(ours, theirs)


ROWS = lines((7, 9), "RGB", (4, 1, 3, 0, 2))
PACKED = zlib.compress(ROWS)
GAMMA = struct.pack(">I", 45455)
SECOND = [chunk(b"IDAT", PACKED[:20])]
READ = {  # by libspng, though some are odd
    "gamma": {"before": [chunk(b"gAMA", GAMMA), chunk(b"sBIT", bytes([5, 5, 5]))]},
    "background": {"before": [chunk(b"bKGD", bytes(6))]},
    "text": {"before": [chunk(b"tEXt", b"Software\0x")], "after": [chunk(b"tEXt", b"date:a\0b")]},
    "in parts": {"before": SECOND, "packed": PACKED[20:]},
    "an empty part": {"before": [chunk(b"IDAT", b"")]},
    "checksum of pixels": {"harm": 1},
    "bytes after the pixels": {"packed": PACKED + b"more"},
    "too many rows": {"packed": zlib.compress(ROWS + ROWS)},
    "bytes after the end": {"end": chunk(b"IEND", b"") + b"more"},
}
LEFT = {  # to Pillow
    "checksum of gamma": {"before": [chunk(b"gAMA", GAMMA, harm=1)]},
    "short gamma": {"before": [chunk(b"gAMA", b"12")]},
    "short resolution": {"before": [chunk(b"pHYs", b"123")]},
    "transparent colour": {"before": [chunk(b"tRNS", bytes(6))]},
    "exif": {"before": [chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0\0\0\0\0")]},
    "exif after": {"after": [chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0\0\0\0\0")]},
    "exif in a text": {"before": [chunk(b"tEXt", b"Raw profile type exif\0x")]},
    "animated": {"before": [chunk(b"acTL", struct.pack(">II", 1, 0))]},
    "no end": {"end": b""},
    "cut": {"packed": PACKED[:-30]},
    "too few rows": {"packed": zlib.compress(ROWS[:-5])},
    "sum of all pixels": {"packed": PACKED[:-1] + bytes([PACKED[-1] ^ 1])},
    "unknown filter": {"packed": zlib.compress(ROWS[:22] + b"\5" + ROWS[23:])},
    "pixels apart": {"before": [*SECOND, chunk(b"tIME", bytes(7))], "packed": PACKED[20:]},
    "unknown chunk": {"after": [chunk(b"ABCD", b"")]},
}


@pytest.mark.parametrize("case", READ)
def test_odd_files_give_the_same_pixels(case):
    content = written((7, 9), "RGB", ROWS, **READ[case])
    np.testing.assert_array_equal(png.decode(content), by_pillow(content))


@pytest.mark.parametrize("case", LEFT)
def test_what_is_not_simple_or_damaged_is_left_to_pillow(case):
    content = written((7, 9), "RGB", ROWS, **LEFT[case])
    assert png.decode(content) is None
    expected = by_pillow(content)
    if expected is None:
        with pytest.raises((OSError, ValueError, SyntaxError)):
            decode.read_image(content, (7, 9), "rgb")
    elif case != "transparent colour":
        np.testing.assert_array_equal(decode.read_image(content, (7, 9), "rgb"), expected)


def test_wherever_a_file_is_damaged_what_comes_out_is_what_pillow_makes_of_it():
    content, found = written((7, 9), "RGB", ROWS, before=[chunk(b"gAMA", GAMMA)]), 0
    for at in range(len(content)):
        for harmed in (content[:at], content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]):
            pixels = png.decode(harmed)
            if pixels is not None:
                np.testing.assert_array_equal(pixels, by_pillow(harmed), err_msg=str(at))
                found += 1
    assert 0 < found < len(content) // 4


@pytest.mark.parametrize("mode", ["1", "P", "LA", "I;16"])
def test_other_kinds_are_left_to_pillow(mode):
    image = Image.fromarray(np.arange(63, dtype=np.uint16).reshape(9, 7) * 900)
    out = io.BytesIO()
    (image if mode == "I;16" else image.convert("L").convert(mode)).save(out, "PNG")
    assert png.decode(out.getvalue()) is None and png.size_of(out.getvalue()) == (7, 9)


def test_more_pixels_than_pillow_takes_are_left_to_it(monkeypatch):
    content = written((7, 9), "RGB", ROWS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 62)
    assert png.decode(content) is None
    with pytest.warns(Image.DecompressionBombWarning):
        decode.read_image(content, (7, 9), "rgb")


def test_without_the_faster_decoder_images_are_the_same(run_python):
    code = """
import sys, zlib
sys.modules["imagecodecs"] = None  # as where it is not installed
from dec_diffusion.data import decode, png
content = bytes.fromhex(sys.argv[1])
assert png.decode(content) is None
print(zlib.crc32(decode.read_image(content, (7, 9), "rgb").tobytes()))
"""
    content = written((7, 9), "RGB", ROWS)
    expected = zlib.crc32(decode.read_image(content, (7, 9), "rgb").tobytes())
    assert run_python(code, content.hex()).stdout.split() == [str(expected)]
    assert "imagecodecs" in sys.modules


@pytest.mark.parametrize("kind", ["L", "P", "text", "exif", "gamma"])
def test_sizes_are_those_that_pillow_finds(tmp_path, kind):
    image = Image.fromarray(RNG.integers(0, 256, (12, 7), dtype=np.uint8))
    about = {}
    if kind == "P":
        image = image.convert("P")
    elif kind == "text":
        about["pnginfo"] = PngImagePlugin.PngInfo()
        about["pnginfo"].add_text("Comment", "in spring")
    elif kind == "exif":
        about["exif"] = Image.Exif()
        about["exif"][0x0112] = 6
    elif kind == "gamma":
        about["pnginfo"] = PngImagePlugin.PngInfo()
        about["pnginfo"].add(b"gAMA", b"\0\0\xb1\x8f")
    image.save(tmp_path / "a.png", **about)
    with (tmp_path / "a.png").open("rb") as stream:
        assert decode.read_size(stream) == ((12, 7) if kind == "exif" else (7, 12))
