"""Folders of images in any format, size and mode that Pillow reads, made one array.

Headers are read first: they decide the common size. Then every file is decoded, turned upright,
put on white where it is transparent, and scaled so that it just covers the common size; what
sticks out on two sides is cut off (``decode``). Large results are kept on disk (``cache``).

Notes, tables and the like that lie beside the images are told by their names and left out with a
warning; any other file that is no image is refused, or left out too where the config says so.
"""

import io
import itertools
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from dec_diffusion.data import cache, shares
from dec_diffusion.data.config import DataConfig
from dec_diffusion.data.dataset import Dataset, choose_rows, from_arrays
from dec_diffusion.data.decode import common_size, read_image, read_size
from dec_diffusion.data.png import Size
from dec_diffusion.data.shares import ALONE, Filled, Team
from dec_diffusion.progress import Progress
from dec_diffusion.types import InputError, Rows

BATCH = 256  # images that are looked for at a time
_TOGETHER = 8  # images that a thread takes at a time, or eight times as many headers
_AHEAD = 4  # such parts that wait for a thread
_SMALL = 2**16  # bytes below which a file is read whole when it is looked at
_REMEMBERED = 2**28  # bytes of such files that are remembered until they are decoded
_NAMED = 5  # files that a warning names
_IGNORED = {"thumbs.db", "desktop.ini", "__macosx"}  # what operating systems leave in folders
_OTHERS = (".txt", ".json", ".csv", ".xml", ".xmp", ".md", ".html", ".pdf", ".db", ".ini", ".log")
_OTHERS += (".py",)  # endings of what plainly is no image
_QUIET_SECONDS = 3.0  # reading that is over by then needs no progress
_LIVE_SECONDS = 0.2  # between two states of a live line

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
    config: DataConfig,
    shape: tuple[int, ...] | None = None,
    *,
    team: Team = ALONE,
    verbose: int = 0,
) -> Dataset:
    """All images below a folder, in the order of their paths: uint8 [n, h, w, 1 or 3].

    Args:
      config: what to read.
      shape: (h, w, c) that images get where the config leaves it open: what a trained run needs.
      team: processes that all call this, and share the work where the result is kept on disk.
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
    files = _without_others(folder, find_files(folder))

    def batches() -> Iterator[Sequence[Encoded]]:
        # Without a buffer, as most are read by one call.
        encoded = (Encoded(file, partial(open, file, "rb", buffering=0)) for file in files)
        while batch := list(itertools.islice(encoded, BATCH)):
            yield batch

    options = (config.size, config.colour, config.broken, config.limit, shape)
    kept = cache.locate(config.cache, folder, options, map(cache.stamp, files))
    images, rows = read_images(
        config, batches, len(files), shape, kept=kept, team=team, verbose=verbose
    )
    paths = [files[row] for row in rows]
    return from_arrays(
        images,
        _class_names(folder, paths) if config.labels == "folders" else None,
        name=folder.resolve().name or "folder",
        source=f"--config.data.path={folder}",
        rows=rows,
        paths=paths,
    )


def read_images(
    config: DataConfig,
    batches: Batches,
    total: int,
    shape: tuple[int, ...] | None = None,
    *,
    kept: cache.Cache | None = None,
    team: Team = ALONE,
    verbose: int = 0,
) -> tuple[Rows, np.ndarray]:
    """Encoded images of any sizes and modes as one array.

    Args:
      config: size, colour, what to do with broken ones, and the limit.
      batches: the images.
      total: how many they are.
      shape: see ``read_folder``.
      kept: where the result may be found, and is left if it is large; None for nowhere.
      team: see ``read_folder``.
      verbose: see ``read_folder``.

    Returns:
      uint8 [n, h, w, 1 or 3], perhaps mapped from files, and int64 [n], the places of these
      images among all.

    Raises:
      InputError: an image is broken (unless such are skipped), or none is left.
    """
    found = shares.find(kept, team)
    if found is None:
        found = _decode(config, batches, total, shape, kept, team, verbose)
    elif verbose and kept is not None:
        print(f"{len(found.rows):,} decoded images come from {kept.folder}", flush=True)
    if found.broken:
        _warn([Broken(*each) for each in found.broken], total)
    return found.images, found.rows


def _decode(
    config: DataConfig,
    batches: Batches,
    total: int,
    shape: tuple[int, ...] | None,
    kept: cache.Cache | None,
    team: Team,
    verbose: int,
) -> cache.Entry:
    """Read all images; arguments and errors are those of ``read_images``."""
    show = _shown(f"looking at {total:,} images", total, verbose)
    contents: list[bytes | None] = []
    # By every process: all must come to the same size. What one alone has read, it need not again.
    look = partial(_look, remember=team.count == 1, room=[_REMEMBERED])
    headers: list[Size | Broken] = []
    for found in _each(look, batches(), show, together=8 * _TOGETHER):
        size, content = (found, None) if isinstance(found, Broken) else found
        headers.append(size)
        contents.append(content)
    broken = [header for header in headers if isinstance(header, Broken)]
    _refuse(config, broken)
    rows = np.array([i for i, h in enumerate(headers) if not isinstance(h, Broken)], np.int64)
    # Of all images, not of the chosen ones: a limit must not change the size.
    width, height = common_size([h for h in headers if not isinstance(h, Broken)], config.size)
    colour = config.colour
    if shape and len(shape) == 3 and shape[2] in (1, 3):
        width, height = (width, height) if config.size else (shape[1], shape[0])
        colour = {1: "grey", 3: "rgb"}[shape[2]] if colour == "auto" else colour
    rows = rows[choose_rows(len(rows), config.limit)]

    def fill(store: cache.Memory | cache.Writer, first: int, last: int) -> Filled:
        own = rows[first:last]
        unreadable = [] if first else list(broken)
        readable = np.ones(len(own), bool)
        show = _shown(f"reading {len(own):,} images", len(own), verbose)

        def read(stream: BinaryIO) -> np.ndarray:
            # Once an image has a colour, it no longer matters whether others have.
            known = "rgb" if store.channels == 3 else colour
            return read_image(stream.read(), (width, height), known)

        for i, image in enumerate(_each(read, _chosen(batches(), own, contents), show)):
            if isinstance(image, Broken):
                unreadable.append(image)
                readable[i] = False
            else:
                store.add(image)
        _refuse(config, unreadable)
        return Filled(own[readable], [(e.name, e.reason) for e in unreadable])

    def refuse(unreadable: Sequence[tuple[str, str]]) -> None:
        name, reason = unreadable[0]
        raise InputError(
            f"--config.data.path={config.path}: none of its {total} files is an image that can"
            f" be read, as {name}, which {reason}; check the path"
        )

    return shares.decode(
        fill,
        len(rows),
        (height, width, 3 if colour == "rgb" else 1),
        largest=len(rows) * height * width * (1 if colour == "grey" else 3),
        kept=kept,
        team=team,
        refuse=refuse,
        verbose=verbose,
    )


def find_files(folder: Path) -> list[str]:
    """All files below a folder, sorted by path; hidden ones are left out.

    Raises:
      InputError: not a folder, or nothing in it.
    """
    if not folder.is_dir():
        what = "is a file; give the folder that holds it" if folder.exists() else "does not exist"
        raise InputError(f"--config.data.path={folder}: {what}; folder reads a folder of images")
    files: list[str] = []
    seen: set[str] = set()  # folders, as links may lead back to one
    for place, names, here in os.walk(folder, followlinks=True, onerror=_unreadable):
        real = os.path.realpath(place)
        names[:] = [] if real in seen else [name for name in names if not _is_ignored(name)]
        if real not in seen:
            files += [os.path.join(place, name) for name in here if not _is_ignored(name)]
        seen.add(real)
    if not files:
        raise InputError(f"--config.data.path={folder}: holds no files; give a folder of images")
    # Strings, as making and comparing paths takes longer than reading headers.
    start = len(os.path.join(folder, ""))
    return sorted(files, key=lambda file: file[start:].split(os.sep))


def _without_others(folder: Path, files: Sequence[str]) -> list[str]:
    """The files but for those whose ending is plainly not that of an image, which are warned of.

    Raises:
      InputError: nothing is left.
    """
    others = [file for file in files if file.lower().endswith(_OTHERS)]
    count = f"{len(others)} file{'' if len(others) == 1 else 's'}"
    if len(others) == len(files):
        raise InputError(
            f"--config.data.path={folder}: holds no images, only {count} such as {others[0]}; give"
            " a folder of images, or the file of the data itself"
        )
    if others:
        warnings.warn(
            f"{folder}: left out {count} with endings that images do not have, the first"
            f" {others[0]}",
            stacklevel=3,
        )
    return [file for file in files if not file.lower().endswith(_OTHERS)]


def _unreadable(error: OSError) -> None:
    raise InputError(
        f"{error.filename}: cannot be read ({error.strerror}); permit reading it, or give a folder "
        "without it"
    ) from error


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in _IGNORED


def _each(
    read: Callable[[BinaryIO], _T],
    batches: Iterable[Sequence[Encoded]],
    show: Callable[[int], None],
    *,
    together: int = _TOGETHER,
) -> Iterator[_T | Broken]:
    """What ``read`` makes of each image, in order, in threads.

    Args:
      read: may raise anything.
      batches: the images.
      show: told how many are done, after each batch.
      together: how many a thread takes at a time.
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

    done, threads = 0, _threads()
    waiting: deque[Future[list[_T | Broken]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for batch in itertools.chain(batches, (None,)):
            parts = range(0, len(batch or ()), together)
            waiting.extend(pool.submit(attempt, batch[i : i + together]) for i in parts if batch)
            # Some stay in hand, so that no thread idles while the next batch is looked for.
            while len(waiting) > (_AHEAD * threads if batch else 0):
                part = waiting.popleft().result()
                yield from part
                done += len(part)
                show(done)


def _threads() -> int:
    """As many as there are cores for this process, which may be fewer than the machine has."""
    affinity: Any = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(16, cores)


def _look(stream: BinaryIO, *, remember: bool, room: list[int]) -> tuple[Size, bytes | None]:
    """The size of an image, and its file if that is small and there is ``room`` for it."""
    if remember and room[0] > 0 and isinstance(stream, io.RawIOBase):
        content = stream.read(_SMALL) or b""
        if len(content) < _SMALL:
            room[0] -= len(content)
            return read_size(io.BytesIO(content)), content
        stream.seek(0)
    return read_size(stream), None


def _chosen(
    batches: Iterable[Sequence[Encoded]], rows: np.ndarray, contents: list[bytes | None]
) -> Iterator[Sequence[Encoded]]:
    """The images with these places, increasing, out of all; what was remembered is handed over."""
    start, end = 0, int(rows[-1]) if len(rows) else -1
    for batch in batches:
        if start > end:
            return
        first, last = np.searchsorted(rows, (start, start + len(batch)))
        chosen = []
        for row in rows[first:last].tolist():
            image, content = batch[row - start], contents[row]
            contents[row] = None
            chosen.append(
                image if content is None else image._replace(open=partial(io.BytesIO, content))
            )
        yield chosen
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


def _class_names(folder: Path, paths: Sequence[str]) -> np.ndarray:
    """The name of the folder that each image lies in, str [n]."""
    parents = [os.path.dirname(path) for path in paths]
    for path, parent in zip(paths, parents, strict=True):
        if parent == str(folder):
            raise InputError(
                f"{path}: lies in no class folder; with --config.data.labels=folders every image"
                " must lie in a folder named after its class"
            )
    return np.array([os.path.basename(parent) for parent in parents])
