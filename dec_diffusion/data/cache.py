"""Decoded images on disk: made once, mapped into memory from then on, and never half made.

An entry is a folder with ``images.npy`` (most often uint8 [n, h, w, 1 or 3]), ``rows.npy`` (int64
[n], their places in the source), perhaps ``labels.npy``, and ``info.json``. Where several processes
made it, each file is in as many parts (``shares``). The name of an entry ends in a checksum of the
source's files (names, sizes, times of change) and of the options they were read with, so that
anything changed is another entry; the one it replaces is removed. An entry is written in a folder
beside it that is renamed once it is complete: what a kill leaves is never used, and two runs that
make the same entry at once do no harm.

A mapped file is read by the page as it is needed and takes no memory of its own: pages count as
used while there is room, and are dropped, not swapped, when there is none.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import struct
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dec_diffusion.data.config import LARGE
from dec_diffusion.data.shards import Shards
from dec_diffusion.types import Rows

_VERSION = 1  # of the layout and of what decoding gives
_HEADER = 128  # bytes before the pixels; room for any shape
_BUFFER = 2**20
_MAKING = ".making-"
_ABANDONED_SECONDS = 2 * 86400.0  # after that a folder in the making belongs to no process


class CacheError(Exception):
    """Nothing can be kept, and why."""


class Entry(NamedTuple):
    """Decoded examples.

    Attributes:
      images: [n, ...], most often uint8 [n, h, w, 1 or 3]; mapped and read-only if they come from
        files.
      rows: int64 [n], their places among all of the source.
      broken: name and reason of each that was left out.
      labels: [n] if the source has labels in it.
    """

    images: Rows
    rows: np.ndarray
    broken: list[tuple[str, str]]
    labels: np.ndarray | None = None


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
    if option == "auto":
        own = user_folder()
        root = own and own / "images"
    else:
        root = None if option == "none" else Path(option)
    if root is None:
        return None
    source = Path(os.path.abspath(source.expanduser()))
    which = hashlib.sha256(repr((str(source), *options)).encode())
    files = hashlib.sha256(str(_VERSION).encode())
    for found in stamps:
        files.update(repr(found).encode())
    name = re.sub(r"[^A-Za-z0-9._-]", "_", source.name)[:40].strip(".") or "images"
    entry = f"{name}-{which.hexdigest()[:12]}-{files.hexdigest()[:20]}"
    return Cache(root.expanduser() / entry, always=option != "auto")


def user_folder() -> Path | None:
    """Where this package may keep files between commands; None for a user without a home."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if root.startswith("~") else Path(root) / "dec_diffusion"


def stamp(path: str | os.PathLike[str]) -> tuple[str, int, int]:
    """Path, size and time of change of a file; zeros if it is gone."""
    try:
        found = os.stat(path)
    except OSError:  # said in the right words when it is read
        return str(path), 0, 0
    return str(path), found.st_size, found.st_mtime_ns


def find(cache: Cache) -> Entry | None:
    """The entry, if it is there and whole."""
    folder = cache.folder
    try:
        info = json.loads((folder / "info.json").read_bytes())
        count = int(info.get("parts", 1))
        parts = [
            np.load(folder / named("images", i, count), mmap_mode="r", allow_pickle=False)
            for i in range(count)
        ]
        rows = _joined(folder, "rows", count)
        labels = _joined(folder, "labels", count) if info.get("labels") else None
        broken = [(str(name), str(reason)) for name, reason in info["broken"]]
    except Exception:  # whatever damaged files make their readers raise
        return None
    if len({(part.dtype, part.shape[1:]) for part in parts}) > 1 or not len(rows):
        return None
    images = parts[0] if count == 1 else Shards(parts)
    if [len(images), *images.shape[1:]] != list(info["shape"]) or len(rows) != len(images):
        return None
    return Entry(images, rows, broken, labels)


def _joined(folder: Path, stem: str, count: int) -> np.ndarray:
    parts = [np.load(folder / named(stem, i, count), allow_pickle=False) for i in range(count)]
    return np.concatenate(parts)


def named(stem: str, number: int, count: int) -> str:
    """The file of one part of an entry."""
    return f"{stem}.npy" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.npy"


def begin(cache: Cache, num_bytes: int) -> Path:
    """A folder in which an entry of so many bytes can be made; raises CacheError if it cannot."""
    root = cache.folder.parent
    with failing(root):
        root.mkdir(parents=True, exist_ok=True)
        _clear(root)
        # A cache must never be what fills a disk.
        free = shutil.disk_usage(root).free
        if 2 * num_bytes > free:
            have, want = (f"{b / 2**30:.1f} GiB" for b in (free, num_bytes))
            raise CacheError(f"{root}: {have} are free, of which {want} would be over half")
        return Path(tempfile.mkdtemp(prefix=_MAKING, dir=root))


def complete(
    cache: Cache,
    folder: Path,
    shape: tuple[int, ...],
    broken: list[tuple[str, str]],
    *,
    parts: int,
    labels: bool,
) -> None:
    """Make a folder with all files of its parts the entry; raises CacheError."""
    about = {"parts": parts, "labels": labels, "shape": shape, "broken": broken}
    with failing(folder):
        text = json.dumps({"version": _VERSION, **about}) + "\n"
        (folder / "info.json").write_text(text, encoding="utf-8")
        # Whoever may use the folder of the cache may use the entry; only its owner could so far.
        folder.chmod(stat.S_IMODE(folder.parent.stat().st_mode))
        try:
            folder.rename(cache.folder)
        except OSError:  # another process was first, or what is there is not whole
            if find(cache) is None:
                shutil.rmtree(cache.folder, ignore_errors=True)
                folder.rename(cache.folder)
    _replace(cache.folder)


class Memory:
    """Collects examples in memory; images have one channel until the first of three comes."""

    def __init__(self, capacity: int, shape: tuple[int, ...], dtype: Any = np.uint8) -> None:
        """For at most ``capacity`` examples of this shape."""
        self.count = 0
        self._images = np.empty((capacity, *shape), dtype)

    @property
    def channels(self) -> int:
        """The last number of the shape."""
        return self._images.shape[-1]

    def add(self, image: np.ndarray) -> None:
        """Take in one example; an image [h, w, 1] among those of three channels is widened."""
        if image.shape[-1] > self.channels:
            self.widen()
        self._images[self.count] = image
        self.count += 1

    def widen(self) -> None:
        """Three channels from now on, and for all that came before."""
        wide = np.empty((*self._images.shape[:-1], 3), np.uint8)
        wide[: self.count] = self._images[: self.count]
        self._images = wide

    def images(self) -> np.ndarray:
        """What was added."""
        return self._images[: self.count]


class Writer:
    """Collects examples in a NumPy file; as ``Memory``, but nothing stays in memory.

    Plain writes, not a mapped file: on a full disk those raise an error, where a mapped one ends
    the process.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any = np.uint8) -> None:
        """As for ``Memory``; raises CacheError if the file cannot be written."""
        self.count, self.shape, self._dtype = 0, shape, np.dtype(dtype)
        self._path = path
        with failing(path.parent):
            self._file = self._open()

    @property
    def channels(self) -> int:
        """The last number of the shape."""
        return self.shape[-1]

    def add(self, image: np.ndarray) -> None:
        """As for ``Memory``; raises CacheError."""
        if image.shape[-1] > self.channels:
            self.widen()
        elif image.shape[-1] < self.channels:
            image = np.repeat(image, 3, axis=-1)
        with failing(self._path.parent):
            self._file.write(image.tobytes())
        self.count += 1

    def widen(self) -> None:
        """Three channels from now on, and for all that came before."""
        with failing(self._path.parent):
            self._file.close()
            narrow = self._path.with_name(f"narrow-{self._path.name}")
            self._path.rename(narrow)
            self._file = self._open()
            with narrow.open("rb") as old:
                old.seek(_HEADER)
                while part := old.read(_BUFFER):
                    self._file.write(np.repeat(np.frombuffer(part, np.uint8), 3).tobytes())
            narrow.unlink()
        self.shape = (*self.shape[:-1], 3)

    def finish(self) -> None:
        """Complete the file; raises CacheError."""
        with failing(self._path.parent):
            self._file.seek(0)
            self._file.write(_header((self.count, *self.shape), self._dtype))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def close(self) -> None:
        """Let go of the file, whether it is complete or not."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _open(self) -> Any:
        file = self._path.open("wb", buffering=_BUFFER)
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
def failing(folder: Path) -> Any:
    """Say of a failure of the system where it was, as CacheError."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"{folder}: {error.strerror or error}") from error


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """What comes before the values in a NumPy file, in exactly ``_HEADER`` bytes."""
    about = repr({"descr": dtype.str, "fortran_order": False, "shape": shape}).encode()
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
