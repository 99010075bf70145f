"""Folders of images in any format, size and mode that Pillow reads, made one array.

Headers are read first: they decide the common size. Then every file is decoded, turned upright,
put on white where it is transparent, and scaled so that it just covers the common size; what
sticks out on two sides is cut off.
"""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps

from dec_diffusion.data.config import DataConfig
from dec_diffusion.data.dataset import Dataset, choose_rows, from_arrays
from dec_diffusion.types import InputError

LARGEST = 64  # pixels of the longer side, unless the user asks for more
_ORIENTATION = 0x0112  # EXIF tag; from 5 on, height and width change places
_NAMED = 5  # files that a warning names
_IGNORED = {"thumbs.db", "desktop.ini", "__macosx"}  # what operating systems leave in folders

_Size = tuple[int, int]  # width, height, as in Pillow
_T = TypeVar("_T")


class Broken(NamedTuple):
    """A file that cannot be used, and why."""

    file: Path
    reason: str


def read_folder(config: DataConfig, shape: tuple[int, ...] | None = None) -> Dataset:
    """All images below a folder, in the order of their paths: uint8 [n, h, w, 1 or 3].

    Args:
      config: what to read.
      shape: (h, w, c) that images get where the config leaves it open: what a trained run needs.

    Raises:
      InputError: no folder, no images in it, a file that is none or is broken (unless such
        files are skipped), or an image outside of class folders where these are the labels.
    """
    folder = Path(str(config.path)).expanduser()
    if config.split != "all":
        raise InputError(
            f"--config.data.split={config.split}: a folder of images has no splits; point"
            " --config.data.path at the subfolder, with --config.data.split=all"
        )
    files = find_files(folder)
    headers = _each(read_size, files)
    broken = [header for header in headers if isinstance(header, Broken)]
    _refuse(config, broken)
    rows = np.array([i for i, header in enumerate(headers) if not isinstance(header, Broken)], int)
    # Of all files, not of the chosen ones: a limit must not change the size.
    size = common_size([h for h in headers if not isinstance(h, Broken)], config.size)
    colour = config.colour
    if shape and len(shape) == 3 and shape[2] in (1, 3):
        size = size if config.size else (shape[1], shape[0])
        colour = {1: "grey", 3: "rgb"}[shape[2]] if colour == "auto" else colour
    rows = rows[choose_rows(len(rows), config.limit)]
    mode = "L" if colour == "grey" else "RGB"
    images = _each(lambda file: read_image(file, size, mode), [files[row] for row in rows])
    broken += [image for image in images if isinstance(image, Broken)]
    _refuse(config, broken)
    good = [(i, image) for i, image in zip(rows, images, strict=True) if _is_whole(image)]
    if not good:
        raise InputError(
            f"--config.data.path={folder}: none of its {len(files)} files is an image that can be"
            f" read, as {broken[0].file.name}, which {broken[0].reason}; check the path"
        )
    if broken:
        _warn(broken, len(files))
    paths = [files[i] for i, _ in good]
    return from_arrays(
        _channels(np.stack([np.asarray(image) for _, image in good]), colour),
        _class_names(folder, paths) if config.labels == "folders" else None,
        name=folder.resolve().name or "folder",
        source=f"--config.data.path={folder}",
        rows=np.array([i for i, _ in good]),
        paths=[str(path) for path in paths],
    )


def find_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted by path; hidden ones are left out.

    Raises:
      InputError: not a folder, or nothing in it.
    """
    if not folder.is_dir():
        what = "is a file; give the folder that holds it" if folder.exists() else "does not exist"
        raise InputError(f"--config.data.path={folder}: {what}; folder reads a folder of images")
    files: list[Path] = []
    seen: set[str] = set()  # folders, as links may lead back to one
    for place, names, here in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        names[:] = [] if real in seen else [name for name in names if not _is_ignored(name)]
        if real not in seen:
            files += [Path(place, name) for name in here if not _is_ignored(name)]
        seen.add(real)
    if not files:
        raise InputError(f"--config.data.path={folder}: holds no files; give a folder of images")
    return sorted(files, key=lambda file: file.relative_to(folder).parts)


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in _IGNORED


def read_size(file: Path) -> _Size:
    """Width and height in pixels, once upright; reads the header only."""
    with Image.open(file) as image:
        width, height = image.size
        # Pillow turns TIFF by itself, and asked for EXIF that a PNG's header lacks it decodes all.
        known = image.format not in ("PNG", "TIFF") or "exif" in image.info
        turned = known and image.getexif().get(_ORIENTATION, 1) >= 5
    return (height, width) if turned else (width, height)


def common_size(sizes: Sequence[_Size], wanted: int | None) -> _Size:
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


def read_image(file: Path, size: _Size, mode: str) -> np.ndarray:
    """The first frame of a file as uint8 [h, w, 3], or [h, w, 1] in mode ``L``.

    Raises:
      Exception: of any kind, where Pillow cannot decode the file.
      ValueError: pixels of more than 16 bits, whose range is not known.
    """
    # Opened here, because Pillow maps what it opens itself, and garbles a TIFF that is turned so.
    with file.open("rb") as stream, Image.open(stream) as image:
        # A large JPEG can be decoded at a fraction of its size, which is several times faster.
        enough = 2 * max(size)
        image.draft(None, (enough, enough))
        eight_bit = _on_white(ImageOps.exif_transpose(image))
    if eight_bit.size != size:
        eight_bit = ImageOps.fit(eight_bit, size, Image.Resampling.BICUBIC)
    pixels = np.asarray(eight_bit.convert(mode))
    return pixels[..., None] if mode == "L" else pixels


def _on_white(image: Image.Image) -> Image.Image:
    """An image of mode RGB with 8 bits per channel."""
    if image.mode == "F":
        raise ValueError("its pixels are real numbers without a known range; save 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow itself would clip 16 bits to 8 instead of scaling them.
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels have more than 16 bits; save 8 or 16 bits")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _each(read: Callable[[Path], _T], files: Sequence[Path]) -> list[_T | Broken]:
    """What ``read`` makes of each file, in threads."""

    def attempt(file: Path) -> _T | Broken:
        try:
            return read(file)
        except Image.UnidentifiedImageError:
            return Broken(file, "is not an image that Pillow can read")
        except Exception as error:  # decoders raise anything on a broken file
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            return Broken(file, f"cannot be read ({reason})")

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(attempt, files))


def _is_whole(image: object) -> bool:
    return not isinstance(image, Broken)


def _refuse(config: DataConfig, broken: Sequence[Broken]) -> None:
    if broken and config.broken == "refuse":
        more = f" (and {len(broken) - 1} more like it)" if len(broken) > 1 else ""
        raise InputError(
            f"{broken[0].file}: {broken[0].reason}{more}; repair or remove it, or leave out what"
            " cannot be read with --config.data.broken=skip"
        )


def _warn(broken: Sequence[Broken], total: int) -> None:
    named = "; ".join(f"{file} {reason}" for file, reason in broken[:_NAMED])
    more = f"; and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
    warnings.warn(f"left out {len(broken)} of {total} files: {named}{more}", stacklevel=2)


def _channels(images: np.ndarray, colour: str) -> np.ndarray:
    """One channel where ``colour`` is ``auto`` and no pixel of any image has a colour."""
    if colour != "auto" or any((image != image[..., :1]).any() for image in images):
        return images
    return np.ascontiguousarray(images[..., :1])


def _class_names(folder: Path, paths: Sequence[Path]) -> np.ndarray:
    """The name of the folder that each image lies in, str [n]."""
    for path in paths:
        if path.parent == folder:
            raise InputError(
                f"{path}: lies in no class folder; with --config.data.labels=folders every image"
                " must lie in a folder named after its class"
            )
    return np.array([path.parent.name for path in paths])
