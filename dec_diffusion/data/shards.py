"""Examples in several arrays, most often mapped files, that are read as if they were one."""

import contextlib
import errno
import itertools
import mmap
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dec_diffusion.types import InputError, Rows

_CHUNK_BYTES = 2**22
_TAKEN_BYTES = 2**24
_OTHER_FILES = 512  # that a process may have open beside its data
_AROUND = 2**20  # bytes that may be mapped with every byte that is read
_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)\.npy")


class Shards:
    """Arrays [n_i, ...] of one dtype, one after the other along the first axis, never joined.

    What is taken out by an index is a copy of those rows, after which the pages of mapped files
    that held them are given back: they would count as memory of the process, up to the whole file.
    ``np.asarray`` joins all in memory. What does not fit into ``dtype`` becomes infinite.
    """

    def __init__(self, parts: Sequence[np.ndarray], dtype: Any = None) -> None:
        """For at least one array; their shapes differ in the first axis only.

        ``dtype`` is what rows are converted to as they are read; None is that of the arrays.
        """
        self.parts = tuple(part for part in parts if len(part)) or tuple(parts[:1])
        self._ends = np.cumsum([len(part) for part in self.parts])
        self.dtype: np.dtype[Any] = np.dtype(dtype or self.parts[0].dtype)
        self.shape: tuple[int, ...] = (int(self._ends[-1]), *self.parts[0].shape[1:])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        rows = itertools.chain.from_iterable(self.parts)
        return (_converted(row, self.dtype) for row in rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        """The rows of an integer, a slice, or integers or a mask along the first axis."""
        n = len(self)
        if isinstance(index, slice):
            start, stop, step = index.indices(n)
            return (
                self._range(start, stop) if step == 1 else self._take(np.arange(start, stop, step))
            )
        rows = np.asarray(index)
        if rows.dtype == bool:
            if rows.shape != (n,):
                raise IndexError(f"a mask of shape {rows.shape} for {n} rows")
            rows = np.flatnonzero(rows)
        if rows.size and not (-n <= rows.min() and rows.max() < n):
            raise IndexError(f"index out of range for {n} rows")
        return self._take(np.where(rows < 0, rows + n, rows).astype(np.int64))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return _converted(np.concatenate(self.parts), np.dtype(dtype or self.dtype))

    def _range(self, start: int, stop: int) -> np.ndarray:
        found, begin = [], 0
        for part, end in zip(self.parts, self._ends.tolist(), strict=True):
            if start < end and begin < stop:
                rows = np.array(part[max(0, start - begin) : stop - begin])
                found.append(_converted(rows, self.dtype))
                give_back(part)
            begin = end
        if len(found) < 2:
            return found[0] if found else np.empty((0, *self.shape[1:]), self.dtype)
        return np.concatenate(found)

    def _take(self, rows: np.ndarray) -> np.ndarray:
        which = np.searchsorted(self._ends, rows, side="right")
        starts = np.concatenate([[0], self._ends])
        if rows.ndim == 0:
            return _converted(np.array(self.parts[which][rows - starts[which]]), self.dtype)
        out = np.empty((rows.size, *self.shape[1:]), self.dtype)
        which, flat = which.reshape(-1), rows.reshape(-1)
        # A few at a time: with every row that is read the system maps pages around it.
        size = max(1, _TAKEN_BYTES // max(_AROUND, out[:1].nbytes))
        for number in np.unique(which):
            own = np.flatnonzero(which == number)
            for block in np.split(own, range(size, len(own), size)):
                taken = self.parts[number][flat[block] - starts[number]]
                out[block] = _converted(taken, self.dtype)
                give_back(self.parts[number])
        return out.reshape(*rows.shape, *self.shape[1:])


def _converted(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(dtype, copy=False)


def give_back(part: np.ndarray) -> None:
    """Let the system have the pages of a file mapped to be read; they are read again if needed."""
    base: Any = part
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    if base is not None and not part.flags.writeable and hasattr(base, "madvise"):
        base.madvise(mmap.MADV_DONTNEED)


def bounded(examples: Rows) -> Rows:
    """The same examples, but that reading them leaves nothing of mapped files in memory."""
    return examples if isinstance(examples, Shards) else Shards([np.asarray(examples)])


def chunks(examples: Rows) -> Iterator[tuple[int, np.ndarray]]:
    """A few rows at a time with the number of the first, so that copies of them stay small."""
    examples = bounded(examples)
    size = max(1, _CHUNK_BYTES // max(1, examples.nbytes // max(1, len(examples))))
    for start in range(0, len(examples), size):
        yield start, examples[start : start + size]


def flat(examples: Rows) -> Rows:
    """The same examples as vectors [n, d], read as ``bounded`` ones."""
    return each(bounded(examples), lambda part: part.reshape(len(part), -1))


def each(examples: Rows, function: Callable[[np.ndarray], np.ndarray]) -> Rows:
    """``function``, which keeps axis 0 and the dtype, of all examples or of each shard."""
    if isinstance(examples, Shards):
        return Shards([function(part) for part in examples.parts], examples.dtype)
    return function(np.asanyarray(examples))


def files_of_shards(folder: Path) -> list[Path]:
    """The ``.npy`` files in a folder, by name; hidden ones are left out."""
    return sorted(p for p in folder.glob("*.npy") if not p.name.startswith("."))


def open_shards(folder: Path) -> tuple[Shards, np.ndarray | None]:
    """Map all ``.npy`` files of a folder as one array; those called ``labels*`` are its labels.

    Raises:
      InputError: none there, one missing by the number in its name, unlike the first in shape or
        dtype, or no plain NumPy file.
    """
    files = files_of_shards(folder)
    named = [file for file in files if file.name.startswith("labels")]
    files = [file for file in files if file not in named]
    if not files:
        raise InputError(
            f"--config.data.path={folder}: holds no *.npy files of examples; check the path"
        )
    examples = Shards(_mapped(files))
    labels = np.concatenate(_mapped(named, alike=lambda x: x.dtype.kind)) if named else None
    return examples, labels


def _mapped(
    files: Sequence[Path], alike: Callable[[np.ndarray], Any] = lambda x: x.dtype
) -> list[np.ndarray]:
    """The arrays of all files, which must be ``alike`` in their type, and in their shape."""
    _check_numbers(files)
    _permit_open(len(files))
    parts: list[np.ndarray] = []
    for file in files:
        try:
            # Never unpickle: a pickle in a data file can run any code.
            part = np.load(file, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # whatever a file that is something else makes NumPy raise
            many = isinstance(error, OSError) and error.errno == errno.EMFILE
            remedy = "permit more with 'ulimit -n'" if many else "write plain arrays with np.save"
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise InputError(f"{file}: cannot be read ({reason}); {remedy}") from error
        if not isinstance(part, np.ndarray) or part.ndim == 0:
            raise InputError(f"{file}: is not an array of examples; write it with np.save")
        first = parts[0] if parts else part
        if (alike(part), part.shape[1:]) != (alike(first), first.shape[1:]):
            raise InputError(
                f"{file}: holds {part.dtype} of shape {part.shape[1:]}, {files[0].name}"
                f" {first.dtype} of shape {first.shape[1:]}; all files of a folder must be alike"
            )
        parts.append(part)
    return parts


def _permit_open(count: int) -> None:
    """Let this process hold so many files more than usual, as far as the system allows it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = count + _OTHER_FILES
        if resource.RLIM_INFINITY != soft < wanted:
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _check_numbers(files: Sequence[Path]) -> None:
    """Refuse a set of files named ``NAME-00000-of-00016.npy`` of which one is missing."""
    names = {file.name for file in files}
    for file in files:
        match = _NUMBERED.fullmatch(file.name)
        if match is None:
            continue
        stem, number, count = match.groups()
        for i in range(int(count)):
            wanted = f"{stem}-{i:0{len(number)}d}-of-{count}.npy"
            if wanted not in names:
                raise InputError(f"{file.parent / wanted}: is missing; copy it there, too")
