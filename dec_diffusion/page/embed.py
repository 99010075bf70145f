"""Pictures inside the page: shrunk, joined, and written as data URIs."""

import base64
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from dec_diffusion import report
from dec_diffusion.data import Dataset
from dec_diffusion.page.markup import Html, tag

if TYPE_CHECKING:
    from PIL.Image import Image

THUMB = 64
"""Longest side of a picture in a card, in pixels."""


def thumbnail(image: np.ndarray, side: int) -> "Image":
    """An image [h, w, c] in [0, 1] or uint8, shrunk so that its longest side is ``side``."""
    from PIL import Image

    picture = Image.fromarray(report.compose_grid(image[None, None]))
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
    return picture


def sprite(images: Iterable[np.ndarray], side: int) -> tuple["Image", int, int]:
    """Thumbnails of images of one shape as tiles of one picture; also its columns and rows."""
    from PIL import Image

    tiles = [thumbnail(image, side) for image in images]
    columns = int(np.ceil(np.sqrt(len(tiles))))
    rows = -(-len(tiles) // columns)
    size = max(tiles[0].size)
    canvas = Image.new("RGB", (columns * size, rows * size), "white")
    for i, tile in enumerate(tiles):
        middle = ((size - tile.width) // 2, (size - tile.height) // 2)
        canvas.paste(tile, (i % columns * size + middle[0], i // columns * size + middle[1]))
    return canvas, columns, rows


def data_uri(picture: "Image", limit: int = 1500) -> str:
    """An image as a data URI: PNG if that takes ``limit`` bytes at most, else JPEG.

    JPEG is made coarser until it fits as well, or can be no coarser.
    """
    grey = picture.convert("L")
    if grey.convert("RGB").tobytes() == picture.tobytes():
        picture = grey
    encoded = _encoded(picture, "PNG", optimize=max(picture.size) <= THUMB)
    if len(encoded) <= limit:
        return _uri(encoded, "image/png")
    # A thumbnail is too small to lose anything for a few bytes; a picture of thousands is not.
    for quality in (90, 80, 65, 50, 35, 20, 10):
        encoded = _encoded(picture, "JPEG", quality=quality)
        if len(encoded) <= limit:
            break
    return _uri(encoded, "image/jpeg")


def _encoded(picture: "Image", kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def figure(content: bytes, alt: str) -> list[Html]:
    """A PNG file as a picture as wide as the page, with its description."""
    return [tag("img", src=_uri(content, "image/png"), alt=alt, class_="figure")]


def in_unit(dataset: Dataset, examples: np.ndarray) -> np.ndarray:
    """Images in the units of the data as uint8."""
    if examples.dtype == np.uint8 and dataset.offset == dataset.scale == 127.5:
        return examples
    unit = ((examples - dataset.offset) / dataset.scale + 1) / 2
    return np.round(255 * np.clip(unit, 0, 1)).astype(np.uint8)
