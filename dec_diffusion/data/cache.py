"""Decoded images on disk: made once, mapped into memory from then on, and never half made.

An entry is a folder with ``images.npy`` (uint8 [n, h, w, 1 or 3]), ``rows.npy`` (int64 [n], their
places in the source) and ``info.json``. Its name ends in a checksum of the source's files (names,
sizes, times of change) and of the options they were read with, so that anything changed is another
entry; the one it replaces is removed. An entry is written in a folder beside it that is renamed
once it is complete: what a kill leaves is never used, and two processes that make the same entry
at once do no harm.

A mapped file is read by the page as it is needed and takes no memory of its own: pages count as
used while there is room, and are dropped, not swapped, when there is none.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dec_diffusion.data.config import LARGE

_VERSION = 1  # of the layout and of what decoding gives
_HEADER = 128  # bytes before the pixels; room for any shape
_BUFFER = 2**20
_MAKING = ".making-"
_ABANDONED_SECONDS = 2 * 86400.0  # after that a folder in the making belongs to no process


class CacheError(Exception):
    """Nothing can be kept, and why."""


class Entry(NamedTuple):
    """Decoded images.

    Attributes:
      images: uint8 [n, h, w, 1 or 3], mapped and read-only if they come from a file.
      rows: int64 [n], their places among all images of the source.
      broken: name and reason of each that was left out.
    """

    images: np.ndarray
    rows: np.ndarray
    broken: list[tuple[str, str]]


class Cache(NamedTuple):
    """Where the entry of one source is, or would be.

    Attributes:
      folder: of the entry.
      always: whether to make it whatever the size of the images.
    """

    folder: Path
    always: bool

    def wants(self, num_bytes: int) -> bool:
        """Whether images of this size are kept."""
        return self.always or num_bytes >= LARGE


def locate(
    option: str, source: Path, options: Iterable[Any], stamps: Iterable[tuple[str, int, int]]
) -> Cache | None:
    """The place of an entry.

    Args:
      option: ``none`` for no cache, ``auto`` for the user's cache folder, or a folder.
      source: what is read, for the name.
      options: everything else that decides what decoding gives.
      stamps: path, bytes and time of change in nanoseconds of every file, as ``stamp`` gives.
    """
    if option == "none":
        return None
    if option == "auto":
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dec_diffusion" / "images"
    else:
        root = Path(option)
    source = Path(os.path.abspath(source.expanduser()))
    which = hashlib.sha256(repr((str(source), *options)).encode())
    files = hashlib.sha256(str(_VERSION).encode())
    for found in stamps:
        files.update(repr(found).encode())
    name = re.sub(r"[^A-Za-z0-9._-]", "_", source.name)[:40].strip(".") or "images"
    entry = f"{name}-{which.hexdigest()[:12]}-{files.hexdigest()[:20]}"
    return Cache(root.expanduser() / entry, always=option != "auto")


def stamp(path: str | os.PathLike[str]) -> tuple[str, int, int]:
    """Path, size and time of change of a file; zeros if it is gone."""
    try:
        found = os.stat(path)
    except OSError:  # said in the right words when it is read
        return str(path), 0, 0
    return str(path), found.st_size, found.st_mtime_ns


def find(cache: Cache) -> Entry | None:
    """The entry, if it is there and whole."""
    try:
        info = json.loads((cache.folder / "info.json").read_bytes())
        images = np.load(cache.folder / "images.npy", mmap_mode="r", allow_pickle=False)
        rows = np.load(cache.folder / "rows.npy", allow_pickle=False)
        broken = [(str(name), str(reason)) for name, reason in info["broken"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(rows) or not len(rows):
        return None
    return Entry(images, rows, broken)


class Memory:
    """Collects images in memory; one channel until the first of three comes."""

    def __init__(self, capacity: int, size: tuple[int, int]) -> None:
        """For at most ``capacity`` images of this width and height."""
        self.count = 0
        self._images = np.empty((capacity, size[1], size[0], 1), np.uint8)

    @property
    def channels(self) -> int:
        """1 or 3."""
        return self._images.shape[-1]

    def add(self, image: np.ndarray) -> None:
        """Take in one image [h, w, 1 or 3]."""
        if image.shape[-1] > self.channels:
            self.widen()
        self._images[self.count] = image
        self.count += 1

    def widen(self) -> None:
        """Three channels from now on, and for all that came before."""
        wide = np.empty((*self._images.shape[:3], 3), np.uint8)
        wide[: self.count] = self._images[: self.count]
        self._images = wide

    def finish(self, rows: np.ndarray, broken: list[tuple[str, str]]) -> Entry:
        """The images that were added."""
        return Entry(self._images[: self.count], rows, broken)

    def close(self) -> None:
        """Nothing to clear away."""


class Writer:
    """Collects images in a file that becomes an entry; as ``Memory``, but nothing stays in memory.

    Plain writes, not a mapped file: on a full disk those raise an error, where a mapped one ends
    the process.
    """

    def __init__(self, cache: Cache, capacity: int, size: tuple[int, int]) -> None:
        """As for ``Memory``; raises CacheError if the folder cannot be written or is too full."""
        self.count, self.channels = 0, 1
        self._cache, self._size = cache, size
        root = cache.folder.parent
        with _failing(root):
            root.mkdir(parents=True, exist_ok=True)
            _clear(root)
            # A cache must never be what fills a disk.
            free, needed = shutil.disk_usage(root).free, 3 * capacity * size[0] * size[1]
            if 2 * needed > free:
                have, want = (f"{b / 2**30:.1f} GiB" for b in (free, needed))
                raise CacheError(f"{root}: {have} are free, of which {want} would be over half")
            self._folder = Path(tempfile.mkdtemp(prefix=_MAKING, dir=root))
            self._file = self._open("images.npy")

    def add(self, image: np.ndarray) -> None:
        """Take in one image [h, w, 1 or 3]; raises CacheError, say on a full disk."""
        if image.shape[-1] > self.channels:
            self.widen()
        elif image.shape[-1] < self.channels:
            image = np.repeat(image, self.channels, axis=-1)
        with _failing(self._folder):
            self._file.write(image.tobytes())
        self.count += 1

    def widen(self) -> None:
        """Three channels from now on, and for all that came before."""
        with _failing(self._folder):
            self._file.close()
            narrow = self._folder / "narrow.npy"
            (self._folder / "images.npy").rename(narrow)
            self._file = self._open("images.npy")
            with narrow.open("rb") as old:
                old.seek(_HEADER)
                while part := old.read(_BUFFER):
                    self._file.write(np.repeat(np.frombuffer(part, np.uint8), 3).tobytes())
            narrow.unlink()
        self.channels = 3

    def finish(self, rows: np.ndarray, broken: list[tuple[str, str]]) -> Entry:
        """Complete the entry and map it; raises CacheError."""
        shape = (self.count, self._size[1], self._size[0], self.channels)
        with _failing(self._folder):
            self._file.seek(0)
            self._file.write(_header(shape))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            np.save(self._folder / "rows.npy", rows, allow_pickle=False)
            info = {"version": _VERSION, "shape": shape, "broken": broken}
            (self._folder / "info.json").write_text(json.dumps(info) + "\n", encoding="utf-8")
            try:
                self._folder.rename(self._cache.folder)
            except OSError:  # another process was first, or what is there is not whole
                if find(self._cache) is None:
                    shutil.rmtree(self._cache.folder, ignore_errors=True)
                    self._folder.rename(self._cache.folder)
        _replace(self._cache.folder)
        entry = find(self._cache)
        if entry is None:
            raise CacheError(f"{self._cache.folder}: cannot be read back")
        return entry

    def close(self) -> None:
        """Clear away what did not become an entry."""
        with contextlib.suppress(OSError):
            self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _open(self, name: str) -> Any:
        file = (self._folder / name).open("wb", buffering=_BUFFER)
        file.write(bytes(_HEADER))
        return file


def warn(error: CacheError) -> None:
    """Say that nothing is kept."""
    warnings.warn(
        f"the decoded images are not kept ({error}); name another folder with"
        " --config.data.cache=FOLDER, or go without: --config.data.cache=none",
        stacklevel=2,
    )


@contextlib.contextmanager
def _failing(folder: Path) -> Any:
    try:
        yield
    except OSError as error:
        raise CacheError(f"{folder}: {error.strerror or error}") from error


def _header(shape: tuple[int, ...]) -> bytes:
    """What comes before the values in a NumPy file, in exactly ``_HEADER`` bytes."""
    about = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", _HEADER - 10) + about.ljust(117) + b"\n"


def _replace(entry: Path) -> None:
    """Remove older entries of the same source read with the same options."""
    stem = entry.name.rpartition("-")[0]
    for other in entry.parent.glob(f"{stem}-*"):
        if other != entry:
            shutil.rmtree(other, ignore_errors=True)


def _clear(root: Path) -> None:
    """Remove what killed processes left in the making."""
    for folder in root.glob(f"{_MAKING}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
