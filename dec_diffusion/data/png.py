"""PNG files of the common kinds, without Pillow: their sizes, and their pixels.

A file is a signature and then chunks: length, name, content, checksum of name and content; IHDR
comes first, the pixels are in one or more IDAT, and IEND is the last. Pillow reads headers one byte
at a time with every other thread waiting, and undoes the filters of rows a byte at a time. libspng
(in the package imagecodecs) gives the same pixels in two thirds of the time. Whatever is less than
simple here, or damaged, is left to Pillow, so that one library decides what can be read and says
what is wrong.
"""

import functools
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

Size = tuple[int, int]
"""Width and height in pixels, as in Pillow."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ANY = -1
# Chunks that change neither the pixels nor where is up, and how long they are: Pillow refuses files
# in which they are shorter.
_LENGTHS = {
    b"IHDR": 13,
    b"PLTE": _ANY,
    b"tRNS": _ANY,
    b"gAMA": 4,
    b"cHRM": 32,
    b"sRGB": 1,
    b"pHYs": 9,
    b"sBIT": _ANY,
    b"bKGD": _ANY,
    b"tIME": 7,
}
# Of the texts, which may hold EXIF in an older manner of writing it, these hold none.
_TEXTS = (b"Software\0", b"Comment\0", b"date:")
# Bit depth, colour type (grey, RGB, RGBA), compression, filter, interlace.
_SIMPLE = {bytes((8, kind, 0, 0, 0)) for kind in (0, 2, 6)}


def size_of(head: bytes) -> Size | None:
    """The size that the first bytes of a PNG tell, unless they are of something less simple."""
    if not _pixels_at(head):
        return None
    width, height = struct.unpack(">II", head[16:24])
    return (width, height) if width and height else None


def decode(content: bytes) -> np.ndarray | None:
    """The pixels of a simple PNG: uint8 [h, w], [h, w, 3] or [h, w, 4].

    None where it is not simple, or damaged, or no decoder but Pillow is installed.
    """
    size, first = size_of(content), _pixels_at(content)
    if not size or content[24:29] not in _SIMPLE or b"tRNS" in content[:first]:
        return None
    # What is more, Pillow warns of, or refuses.
    if Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
        return None
    unpack = _unpack()
    if unpack is None or not _ends_well(content, first):
        return None
    try:
        return unpack(content)
    except (RuntimeError, ValueError):
        return None


@functools.cache
def _unpack() -> Callable[[bytes], np.ndarray] | None:
    # Late, for those who read no images; and there are machines without wheels for it.
    try:
        from imagecodecs import spng_decode
    except ImportError:
        return None
    return spng_decode


def _pixels_at(head: bytes) -> int:
    """Where the first IDAT begins; 0 if not all before it is simple and intact."""
    if head[:8] != _SIGNATURE or head[12:16] != b"IHDR":
        return 0
    at = 8
    while head[at + 4 : at + 8] != b"IDAT":
        if not _harmless(head, at):
            return 0
        end = at + 8 + int.from_bytes(head[at : at + 4], "big")
        # libspng passes over damage in these, Pillow does not.
        if head[end : end + 4] != zlib.crc32(head[at + 4 : end]).to_bytes(4, "big"):
            return 0
        at = end + 4
    return at


def _ends_well(content: bytes, at: int) -> bool:
    """Whether nothing but simple chunks comes from here to the end."""
    while (name := content[at + 4 : at + 8]) != b"IEND":
        if name != b"IDAT" and not _harmless(content, at):
            return False
        at += 12 + int.from_bytes(content[at : at + 4], "big")
    return True


def _harmless(content: bytes, at: int) -> bool:
    name = content[at + 4 : at + 8]
    if name == b"tEXt":
        return content.startswith(_TEXTS, at + 8)
    length = _LENGTHS.get(name)
    return length == _ANY or length == int.from_bytes(content[at : at + 4], "big")
