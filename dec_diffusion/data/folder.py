"""Folders of images in any format, size and mode that Pillow reads, made one array.

Headers are read first: they decide the common size. Then every file is decoded, turned upright,
put on white where it is transparent, and scaled so that it just covers the common size; what
sticks out on two sides is cut off.
"""

import itertools
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps

from dec_diffusion.data.config import DataConfig
from dec_diffusion.data.dataset import Dataset, choose_rows, from_arrays
from dec_diffusion.progress import Progress
from dec_diffusion.types import InputError

LARGEST = 64  # pixels of the longer side, unless the user asks for more
BATCH = 256  # images that are decoded before the next ones are looked for
_TOGETHER = 8  # images that a thread takes at a time
_ORIENTATION = 0x0112  # EXIF tag; from 5 on, height and width change places
_NAMED = 5  # files that a warning names
_IGNORED = {"thumbs.db", "desktop.ini", "__macosx"}  # what operating systems leave in folders
_QUIET_SECONDS = 3.0  # reading that is over by then needs no progress
_LIVE_SECONDS = 0.2  # between two states of a live line

_Size = tuple[int, int]  # width, height, as in Pillow
_T = TypeVar("_T")


class Encoded(NamedTuple):
    """An image as it is stored.

    Attributes:
      name: for messages.
      open: its bytes, as a stream.
    """

    name: str
    open: Callable[[], BinaryIO]


class Broken(NamedTuple):
    """The name of an image that cannot be used, and why."""

    name: str
    reason: str


Batches = Callable[[], Iterator[Sequence[Encoded]]]
"""All images of a source in order, a few at a time; called once for each pass over them."""


def read_folder(
    config: DataConfig, shape: tuple[int, ...] | None = None, *, verbose: int = 0
) -> Dataset:
    """All images below a folder, in the order of their paths: uint8 [n, h, w, 1 or 3].

    Args:
      config: what to read.
      shape: (h, w, c) that images get where the config leaves it open: what a trained run needs.
      verbose: 0 is silent, 1 reports progress on standard output if it takes long.

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

    def batches() -> Iterator[Sequence[Encoded]]:
        encoded = (Encoded(str(file), partial(file.open, "rb")) for file in files)
        while batch := list(itertools.islice(encoded, BATCH)):
            yield batch

    images, rows = read_images(config, batches, len(files), shape, verbose=verbose)
    paths = [files[row] for row in rows]
    return from_arrays(
        images,
        _class_names(folder, paths) if config.labels == "folders" else None,
        name=folder.resolve().name or "folder",
        source=f"--config.data.path={folder}",
        rows=rows,
        paths=[str(path) for path in paths],
    )


def read_images(
    config: DataConfig,
    batches: Batches,
    total: int,
    shape: tuple[int, ...] | None = None,
    *,
    verbose: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Encoded images of any sizes and modes as one array.

    Args:
      config: size, colour, what to do with broken ones, and the limit.
      batches: the images.
      total: how many they are.
      shape: see ``read_folder``.
      verbose: see ``read_folder``.

    Returns:
      uint8 [n, h, w, 1 or 3], and int64 [n], the places of these images among all.

    Raises:
      InputError: an image is broken (unless such are skipped), or none is left.
    """
    show = _shown(f"looking at {total:,} images", total, verbose)
    headers = list(_each(read_size, batches(), show))
    broken = [header for header in headers if isinstance(header, Broken)]
    _refuse(config, broken)
    rows = np.array([i for i, h in enumerate(headers) if not isinstance(h, Broken)], np.int64)
    # Of all images, not of the chosen ones: a limit must not change the size.
    size = common_size([h for h in headers if not isinstance(h, Broken)], config.size)
    colour = config.colour
    if shape and len(shape) == 3 and shape[2] in (1, 3):
        size = size if config.size else (shape[1], shape[0])
        colour = {1: "grey", 3: "rgb"}[shape[2]] if colour == "auto" else colour
    rows = rows[choose_rows(len(rows), config.limit)]
    mode = "L" if colour == "grey" else "RGB"
    images = np.empty((len(rows), size[1], size[0], 1 if mode == "L" else 3), np.uint8)
    whole = np.ones(len(rows), bool)
    show = _shown(f"reading {len(rows):,} images", len(rows), verbose)
    decoded = _each(lambda stream: read_image(stream, size, mode), _chosen(batches(), rows), show)
    for i, image in enumerate(decoded):
        if isinstance(image, Broken):
            broken.append(image)
            whole[i] = False
        else:
            images[i] = image
    _refuse(config, broken)
    if not whole.any():
        raise InputError(
            f"--config.data.path={config.path}: none of its {total} files is an image that can be"
            f" read, as {broken[0].name}, which {broken[0].reason}; check the path"
        )
    if broken:
        _warn(broken, total)
        images, rows = images[whole], rows[whole]
    return _channels(images, colour), rows


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


def read_size(stream: BinaryIO) -> _Size:
    """Width and height in pixels, once upright; reads the header only."""
    with Image.open(stream) as image:
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


def read_image(stream: BinaryIO, size: _Size, mode: str) -> np.ndarray:
    """The first frame of an image as uint8 [h, w, 3], or [h, w, 1] in mode ``L``.

    Args:
      stream: its bytes. An open one, as Pillow maps the files that it opens itself, and garbles
        a TIFF that is turned so.
      size: what it gets.
      mode: ``RGB`` or ``L``.

    Raises:
      Exception: of any kind, where Pillow cannot decode the file.
      ValueError: pixels of more than 16 bits, whose range is not known.
    """
    with Image.open(stream) as image:
        # A large JPEG can be decoded at a fraction of its size, which is several times faster.
        enough = 2 * max(size)
        image.draft(None, (enough, enough))
        image.load()  # a TIFF is turned by this, and its tag gone
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        eight_bit = _on_white(ImageOps.exif_transpose(image) if turned else image)
    if eight_bit.size != size:
        eight_bit = ImageOps.fit(eight_bit, size, Image.Resampling.BICUBIC)
    pixels = np.asarray(eight_bit if eight_bit.mode == mode else eight_bit.convert(mode))
    return pixels[..., None] if mode == "L" else pixels


def _on_white(image: Image.Image) -> Image.Image:
    """An image of mode RGB or L, 8 bits per channel; the same one if it is that already."""
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
    elif image.mode == "1":
        image = image.convert("L")
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


def _each(
    read: Callable[[BinaryIO], _T],
    batches: Iterable[Sequence[Encoded]],
    show: Callable[[int], None],
) -> Iterator[_T | Broken]:
    """What ``read`` makes of each image, in order, in threads.

    Args:
      read: may raise anything.
      batches: the images.
      show: told how many are done, after each batch.
    """

    def attempt(images: Sequence[Encoded]) -> list[_T | Broken]:
        results = []
        for image in images:
            try:
                with image.open() as stream:
                    results.append(read(stream))
            except Image.UnidentifiedImageError:
                results.append(Broken(image.name, "is not an image that Pillow can read"))
            except Exception as error:  # decoders raise anything on a broken file
                reason = " ".join(str(error).split())[:120] or type(error).__name__
                results.append(Broken(image.name, f"cannot be read ({reason})"))
        return results

    done = 0
    with ThreadPoolExecutor(_threads()) as pool:
        for batch in batches:
            parts = [batch[i : i + _TOGETHER] for i in range(0, len(batch), _TOGETHER)]
            for part in pool.map(attempt, parts):
                yield from part
                done += len(part)
                show(done)


def _threads() -> int:
    """As many as there are cores for this process, which may be fewer than the machine has."""
    affinity: Any = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(16, cores)


def _chosen(batches: Iterable[Sequence[Encoded]], rows: np.ndarray) -> Iterator[Sequence[Encoded]]:
    """The images with these places, increasing, out of all."""
    start = 0
    for batch in batches:
        first, last = np.searchsorted(rows, (start, start + len(batch)))
        yield [batch[row - start] for row in rows[first:last]]
        start += len(batch)


def _shown(what: str, total: int, verbose: int) -> Callable[[int], None]:
    """A function that is told how many images are done, and says so once it takes long."""
    progress = Progress(total, 0, silent=not verbose)
    started = time.monotonic()
    last = started

    def show(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        long = now - started > _QUIET_SECONDS
        if long and (now - last > _LIVE_SECONDS or done == total):
            last = now
            progress.update(done, what, {}, done / (now - started))

    return show


def _refuse(config: DataConfig, broken: Sequence[Broken]) -> None:
    if broken and config.broken == "refuse":
        more = f" (and {len(broken) - 1} more like it)" if len(broken) > 1 else ""
        raise InputError(
            f"{broken[0].name}: {broken[0].reason}{more}; repair or remove it, or leave out what"
            " cannot be read with --config.data.broken=skip"
        )


def _warn(broken: Sequence[Broken], total: int) -> None:
    named = "; ".join(f"{name} {reason}" for name, reason in broken[:_NAMED])
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
