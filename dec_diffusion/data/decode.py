"""One encoded image of any format, size and mode that Pillow reads, as pixels of a wanted size.

An image is turned upright, put on white where it is transparent, and scaled so that it just covers
the wanted size; what sticks out on two sides is cut off.

Most of the time goes into unpacking and scaling, during which other threads run. So
the work is kept small: a grey image is scaled as one channel, an alpha channel that hides nothing
is dropped first, and images are scaled down by whole numbers before they are filtered.
"""

import io
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from dec_diffusion.data import png
from dec_diffusion.data.png import Size

_DARK = 8192  # an eighth of what 16 bits hold
_HEAD = 4096  # bytes that hold the header of most images
LARGEST = 64  # pixels of the longer side, unless the user asks for more
_ORIENTATION = 0x0112  # EXIF tag; from 5 on, height and width change places


def read_size(stream: BinaryIO) -> Size:
    """Width and height in pixels, once upright; reads the header only.

    ``stream`` may be without a buffer.
    """
    if size := png.size_of(stream.read(_HEAD)):
        return size
    stream.seek(0)
    # Pillow reads a byte at a time.
    buffered = io.BufferedReader(stream) if isinstance(stream, io.RawIOBase) else stream
    with buffered, Image.open(buffered) as image:
        width, height = image.size
        # Pillow turns TIFF by itself, and asked for EXIF that a PNG's header lacks it decodes all.
        known = image.format not in ("PNG", "TIFF") or "exif" in image.info
        turned = known and image.getexif().get(_ORIENTATION, 1) >= 5
    return (height, width) if turned else (width, height)


def common_size(sizes: Sequence[Size], wanted: int | None) -> Size:
    """The size that all images get.

    Args:
      sizes: of the images, at least one unless ``wanted`` is given.
      wanted: side of a square; None for the size that most images have, or, where no size has
        a majority, a square of the median of the shorter sides, at most ``LARGEST``.
    """
    if wanted is not None or not sizes:
        side = wanted or LARGEST
        return side, side
    (size, count), *_ = Counter(sizes).most_common(1)
    if 2 * count <= len(sizes):
        side = int(np.median([min(size) for size in sizes]))
        size = side, side
    factor = min(1.0, LARGEST / max(size))
    return max(1, round(factor * size[0])), max(1, round(factor * size[1]))


def read_image(content: bytes, size: Size, colour: str) -> np.ndarray:
    """The first frame of an image as uint8 [h, w, 3], or [h, w, 1] where it is stored as grey.

    Args:
      content: the file. Its bytes, as Pillow asks for little at a time; and it maps files that it
        opens itself, and garbles a TIFF that is turned so.
      size: what it gets.
      colour: ``grey`` for one channel always, ``auto`` for one where no pixel has a colour either,
        ``rgb`` to leave out that check.

    Raises:
      Exception: of any kind, where Pillow cannot decode the file.
      ValueError: pixels of more than 16 bits, whose range is not known.
    """
    simple = png.decode(content)
    eight_bit = _opened(content, size) if simple is None else _from_pixels(simple)
    if colour == "grey" and eight_bit.mode != "L":
        eight_bit = eight_bit.convert("L")
    if eight_bit.size != size:
        eight_bit = _fit(eight_bit, size)
    if eight_bit.mode == "RGBX":
        eight_bit = eight_bit.convert("RGB")
    pixels = np.asarray(eight_bit)
    if pixels.ndim == 2:
        return pixels[..., None]
    if colour == "auto" and not (pixels != pixels[..., :1]).any():
        return pixels[..., :1]
    return pixels


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    """Grey, RGB or RGBA, 8 bits, as ``_on_white`` gives it, or as RGBX: with a channel unused."""
    if pixels.ndim == 3 and pixels.shape[2] == 4 and pixels[..., 3].min() == 255:
        size = pixels.shape[1], pixels.shape[0]
        # As Pillow lays out RGB in memory, so that nothing is copied before it is scaled.
        return Image.frombuffer("RGBX", size, pixels, "raw", "RGBX", 0, 1)
    return _on_white(Image.fromarray(pixels))


def _opened(content: bytes, size: Size) -> Image.Image:
    """What Pillow reads from a file: upright, 8 bits, a JPEG at no less than twice ``size``."""
    with Image.open(io.BytesIO(content)) as image:
        # A large JPEG can be decoded at a fraction of its size, which is several times faster.
        enough = 2 * max(size)
        image.draft(None, (enough, enough))
        image.load()  # a TIFF is turned by this, and its tag gone
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        return _on_white(ImageOps.exif_transpose(image) if turned else image)


def _fit(image: Image.Image, size: Size) -> Image.Image:
    """Scaled to cover ``size`` and cut to it in the centre."""
    factor = min(have / want for have, want in zip(image.size, size, strict=True))
    # Never beyond the image, whatever the rounding.
    inner = [min(have, factor * want) for have, want in zip(image.size, size, strict=True)]
    left, top = ((have - part) / 2 for have, part in zip(image.size, inner, strict=True))
    box = (left, top, left + inner[0], top + inner[1])
    if factor < 1:
        return image.resize(size, Image.Resampling.BICUBIC, box)
    # Averages over whole blocks first; the filter, half as wide as the bicubic one, does the rest.
    return image.resize(size, Image.Resampling.HAMMING, box, reducing_gap=1.0)


def _on_white(image: Image.Image) -> Image.Image:
    """An image of mode RGB or L, 8 bits per channel; the same one if it is that already."""
    if image.mode == "F":
        raise ValueError("its pixels are real numbers without a known range; save 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow itself would clip 16 bits to 8 instead of scaling them.
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels have more than 16 bits; save 8 or 16 bits")
        if 0 < values.max() < _DARK:
            warnings.warn(
                "16-bit images are read as 0 (black) to 65535 (white), and some hold nothing above "
                f"{_DARK}: most of their grey levels are lost; if they have fewer bits in truth, "
                "save them as a .npy array",
                stacklevel=2,
            )
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode == "1":
        image = image.convert("L")
    return image if image.mode in ("RGB", "L") else image.convert("RGB")
