"""CIFAR and STL-10 in their binary versions: a folder, or the archive as downloaded.

Every file is a sequence of records of fixed length, all bytes:

    CIFAR-10    label | 32 x 32 red, row by row | the same in green | in blue
    CIFAR-100   coarse label | fine label | pixels as above
    STL-10      96 x 96 red, column by column | green | blue; labels 1..10 in a file of their own
"""

import contextlib
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dec_diffusion.data.config import DataConfig
from dec_diffusion.data.dataset import Dataset, choose_rows, from_arrays
from dec_diffusion.data.files import reading
from dec_diffusion.types import InputError


class Cifar(NamedTuple):
    """One of the two CIFAR sets.

    Attributes:
      files: of each split.
      labels: in the order of the bytes before the pixels, and how many values each has.
      default: the label that scores use unless told otherwise.
      archive: the download.
      pickled: files that only the Python version has.
    """

    files: Mapping[str, Sequence[str]]
    labels: Mapping[str, int]
    default: str
    archive: str
    pickled: Sequence[str]


CIFAR = {
    "cifar10": Cifar(
        {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
        {"label": 10},
        "label",
        "cifar-10-binary.tar.gz",
        ("data_batch_1", "test_batch"),
    ),
    "cifar100": Cifar(
        {"train": ["train.bin"], "test": ["test.bin"]},
        {"coarse": 20, "fine": 100},
        "coarse",
        "cifar-100-binary.tar.gz",
        ("train", "test"),
    ),
}
_CIFAR_SIZE, _STL_SIZE = 32, 96
_STL_ARCHIVE = "stl10_binary.tar.gz"


def read_cifar(config: DataConfig, name: str) -> Dataset:
    """CIFAR-10 or CIFAR-100: images [32, 32, 3] as uint8.

    Raises:
      InputError: missing, truncated or foreign files, or the pickled Python version.
    """
    kind, path = CIFAR[name], Path(str(config.path)).expanduser()
    splits = ("train", "test") if config.split == "all" else (config.split,)
    files = [file for split in splits for file in kind.files[split]]
    first = len(kind.labels)
    parts = []
    for source, content in _open(path, files, kind.archive, kind.pickled).items():
        part = _records(source, content, first + 3 * _CIFAR_SIZE**2, kind.archive)
        for column, (label, count) in enumerate(kind.labels.items()):
            if part[:, column].max() >= count:
                raise InputError(
                    f"{source}: a {label} of {part[:, column].max()} where {count - 1} is the"
                    f" largest, so it is not a file of {kind.archive}; download that again"
                )
        parts.append(part)
    rows, records = _choose(parts, config.limit)
    column = list(kind.labels).index(config.label_key or kind.default)
    images = records[:, first:].reshape(-1, 3, _CIFAR_SIZE, _CIFAR_SIZE).transpose(0, 2, 3, 1)
    return from_arrays(
        np.ascontiguousarray(images),
        records[:, column],
        name=name,
        source=f"--config.data.path={path}",
        rows=rows,
    )


def read_stl10(config: DataConfig) -> Dataset:
    """STL-10: images [96, 96, 3] as uint8; labels 0..9, none in the split ``unlabeled``.

    Raises:
      InputError: missing, truncated or foreign files.
    """
    path = Path(str(config.path)).expanduser()
    splits = ("train", "test") if config.split == "all" else (config.split,)
    files = [f"{split}_X.bin" for split in splits]
    label_files = [f"{split}_y.bin" for split in splits if split != "unlabeled"]
    contents = _open(path, [*files, *label_files], _STL_ARCHIVE, ())
    sources = list(contents)
    parts = [
        _records(source, contents[source], 3 * _STL_SIZE**2, _STL_ARCHIVE)
        for source in sources[: len(files)]
    ]
    labels = None
    if label_files:
        for source, part in zip(sources[len(files) :], parts, strict=True):
            values = contents[source]
            if len(values) != len(part) or values.min() < 1 or values.max() > 10:
                raise InputError(
                    f"{source}: holds {len(values)} labels from {values.min()} to {values.max()}"
                    f" for {len(part)} images, not one from 1 to 10 for each; extract"
                    f" {_STL_ARCHIVE} again"
                )
        labels = np.concatenate([contents[source] for source in sources[len(files) :]]) - 1
    rows, records = _choose(parts, config.limit)
    images = records.reshape(-1, 3, _STL_SIZE, _STL_SIZE).transpose(0, 3, 2, 1)
    return from_arrays(
        np.ascontiguousarray(images),
        None if labels is None else labels[rows],
        name="stl10",
        source=f"--config.data.path={path}",
        rows=rows,
    )


def _open(
    path: Path, files: Sequence[str], archive: str, pickled: Sequence[str]
) -> dict[str, np.ndarray]:
    """The bytes of the named files, uint8 and not empty, in this order, by their full names.

    They lie in ``path`` or, as extracted archives do, in a folder of it, or in an archive.
    """
    if not path.exists():
        raise InputError(f"--config.data.path={path}: does not exist; check the spelling")
    if path.is_dir():
        folders = [path, *sorted(p for p in path.iterdir() if p.is_dir())]
        folder = next((f for f in folders if any((f / file).is_file() for file in files)), None)
        names = {p.name for f in folders for p in f.iterdir()}
        contents = {}
        if folder is not None:
            for file in (f for f in files if (folder / f).is_file()):
                with reading(folder / file, "copy the file again"):
                    # Mapped, because the largest has gigabytes of which a limit needs few.
                    empty = (folder / file).stat().st_size == 0
                    contents[file] = (
                        np.empty(0, np.uint8) if empty else np.memmap(folder / file, mode="r")
                    )
        place = f"{folder or path}/"
    else:
        with _tar(path, archive) as tar:
            contents, names = _extract(tar, files)
        place = f"{path}:"
    missing = [file for file in files if file not in contents]
    if missing and names.intersection(pickled):
        raise InputError(
            f"{path}: holds the Python version, whose pickles could run any code; download the"
            f" binary version, {archive}"
        )
    if missing:
        raise InputError(
            f"{path}: no {missing[0]} in it; point --config.data.path at {archive} or the folder"
            " extracted from it, or choose another --config.data.split"
        )
    for file in files:
        if contents[file].size == 0:
            raise InputError(f"{place}{file}: is empty; extract {archive} again")
    return {f"{place}{file}": contents[file] for file in files}


@contextlib.contextmanager
def _tar(path: Path, archive: str) -> Iterator[tarfile.TarFile]:
    remedy = f"give {archive} as downloaded, or the folder extracted from it"
    with reading(path, remedy), tarfile.open(path, "r:*") as tar:
        yield tar


def _extract(tar: tarfile.TarFile, files: Sequence[str]) -> tuple[dict[str, np.ndarray], set[str]]:
    """The wanted files and the names of all that were passed on the way."""
    contents, names = {}, set()
    for member in tar:
        name = member.name.rpartition("/")[2]
        names.add(name)
        stream = tar.extractfile(member) if name in files else None
        if stream is not None:
            contents[name] = np.frombuffer(stream.read(), np.uint8)
        if len(contents) == len(files):
            break
    return contents, names


def _records(source: str, content: np.ndarray, length: int, archive: str) -> np.ndarray:
    """The bytes as records [n, length]."""
    if content.size % length:
        raise InputError(
            f"{source}: its {content.size} bytes are no whole number of records of {length};"
            f" truncated, or not a file of {archive}: extract that again"
        )
    return content.reshape(-1, length)


def _choose(parts: Sequence[np.ndarray], limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the subset, and their records [n, length] out of the parts in order."""
    rows = choose_rows(sum(len(part) for part in parts), limit)
    chosen, start = [], 0
    for part in parts:
        here = rows[(rows >= start) & (rows < start + len(part))] - start
        chosen.append(part[here])
        start += len(part)
    return rows, np.concatenate(chosen)
