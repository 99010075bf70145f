"""Data sets in plain files: scikit-learn's digits, IDX, NumPy, USPS."""

import contextlib
import gzip
import importlib.util
import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dec_diffusion.data.config import LARGE, DataConfig, suggest
from dec_diffusion.data.dataset import Dataset, from_arrays
from dec_diffusion.data.shards import files_of_shards, open_shards
from dec_diffusion.types import InputError

IMAGE_KEYS = ("image", "images", "x", "X", "data", "examples", "features")
LABEL_KEYS = ("label", "labels", "y", "Y", "target", "targets")

_IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_IDX_PREFIX = {"train": "train", "test": "t10k"}
_NPZ_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


class _Part(NamedTuple):
    """One split: examples [n, ...] and labels [n] or None."""

    examples: np.ndarray
    labels: np.ndarray | None


@contextlib.contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Turn whatever a decoder raises on a broken file into one line that names the file."""
    try:
        yield
    except InputError:
        raise
    except ImportError as error:  # TFDS decodes images with Pillow or OpenCV
        raise InputError(f"{path}: needs a package that is not installed ({error})") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{path}: cannot be read ({reason}); {remedy}") from error


def read_digits(config: DataConfig) -> Dataset:
    """scikit-learn's digits: 1,797 images [8, 8, 1], values 0..16 as uint8."""
    rows = _rows_of_digits()
    images, labels = rows[:, :-1].reshape(-1, 8, 8).astype(np.uint8), rows[:, -1]
    cut = len(images) * 4 // 5
    part = {"train": slice(cut), "test": slice(cut, None), "all": slice(None)}[config.split]
    return from_arrays(
        images[part],
        labels[part],
        name="digits",
        source="--config.data.name=digits",
        nominal=(0.0, 16.0),
        limit=config.limit,
    )


def _rows_of_digits() -> np.ndarray:
    """int64 [1797, 65]: pixels, then the label."""
    # Importing scikit-learn for this took a third of the time to the first step of a run.
    package = importlib.util.find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or ():
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            return np.loadtxt(path, delimiter=",", dtype=np.int64)
    from sklearn.datasets import load_digits  # a release that keeps the file elsewhere

    bunch: Any = load_digits()
    return np.column_stack([bunch.data, bunch.target]).astype(np.int64)


def read_idx(config: DataConfig, name: str) -> Dataset:
    """MNIST-style IDX files: a folder of the four, or one file of images.

    The labels of a single file are looked for beside it, under the same name with ``images-idx3``
    replaced by ``labels-idx1``.
    """
    path = Path(str(config.path)).expanduser()
    if path.is_dir():
        splits = ("train", "test") if config.split == "all" else (config.split,)
        parts = [_idx_split(path, split) for split in splits]
        source = f"--config.data.path={path}"
        examples, labels = _concatenate(parts, source)
    else:
        _refuse_split(config, f"{path}: a single IDX file has no splits")
        examples = parse_idx(path)
        beside = path.with_name(
            path.name.replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1")
        )
        labels = parse_idx(beside) if beside != path and beside.is_file() else None
        source = str(path)
    return from_arrays(examples, labels, name=name, source=source, limit=config.limit)


def _idx_split(folder: Path, split: str) -> _Part:
    images = _find_idx(folder, f"{_IDX_PREFIX[split]}-images", 3)
    if images is None:
        raise InputError(
            f"{folder}: no {_IDX_PREFIX[split]}-images-idx3-ubyte or .gz in this folder; point"
            " --config.data.path at the IDX files, or choose another --config.data.split"
        )
    labels_file = _find_idx(folder, f"{_IDX_PREFIX[split]}-labels", 1)
    examples = parse_idx(images)
    labels = None if labels_file is None else parse_idx(labels_file)
    if examples.ndim not in (3, 4):
        raise InputError(
            f"{images}: holds an array of shape {examples.shape}, not images; is it the wrong file?"
        )
    if labels is not None and labels.shape != examples.shape[:1]:
        raise InputError(
            f"{labels_file}: labels of shape {labels.shape} for {len(examples)} images; use the"
            f" file that belongs to {images.name}, or remove it to go without labels"
        )
    return _Part(examples, labels)


def _find_idx(folder: Path, stem: str, ndim: int) -> Path | None:
    names = [f"{stem}{dot}idx{ndim}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def parse_idx(path: Path) -> np.ndarray:
    """The array in one IDX file, gzipped or not (told by its first bytes, not by its name).

    Layout: two zero bytes, a type code, the number of axes, each axis length as a big-endian
    uint32, then the values, big-endian, last axis fastest.

    Raises:
      InputError: missing, empty or truncated file, wrong magic bytes, or surplus bytes.
    """
    remedy = "copy or download the file again"
    check_file(path)
    with reading(path, remedy):
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_DTYPES:
        raise InputError(
            f"{path}: is not an IDX file (it starts with {content[:4].hex(' ') or 'nothing'});"
            " expected MNIST-style images such as train-images-idx3-ubyte.gz"
        )
    dtype, ndim = np.dtype(_IDX_DTYPES[content[2]]), content[3]
    start = 4 + 4 * ndim
    shape = struct.unpack(f">{ndim}I", content[4:start].ljust(4 * ndim, b"\0"))
    promised = start + math.prod(shape) * dtype.itemsize
    if len(content) != promised:
        state = "truncated" if len(content) < promised else "too long"
        raise InputError(
            f"{path}: {state}, its header promises {promised} bytes and there are {len(content)};"
            f" {remedy}"
        )
    values = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return values.astype(dtype.newbyteorder("="), copy=False)


def read_array(config: DataConfig) -> Dataset:
    """A ``.npy`` file of examples, a folder of such, or an ``.npz``, perhaps with labels."""
    path = Path(str(config.path)).expanduser()
    if path.is_dir() and files_of_shards(path):
        _refuse_named(config, path)
        source = f"--config.data.path={path}"
        examples, labels = open_shards(path)
        name = path.resolve().name
        return from_arrays(examples, labels, name=name, source=source, limit=config.limit)
    check_file(path)
    with reading(path, "copy or write the file again"), path.open("rb") as file:
        magic = file.read(6)
    if magic[:6] != b"\x93NUMPY" and magic[:4] not in (b"PK\x03\x04", b"PK\x05\x06"):
        raise InputError(
            f"{path}: is not a .npy or .npz file (it starts with {magic[:4].hex(' ')}); write it"
            " with np.save or np.savez"
        )
    # Never unpickle: a pickle in a data file can run any code.
    with reading(path, "write plain numeric arrays (and string labels) with np.save or np.savez"):
        # A large file is mapped: its rows are read as they are needed.
        mode = "r" if path.suffix == ".npy" and path.stat().st_size >= LARGE else None
        loaded = np.load(path, mmap_mode=mode, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            part, source = _npy_part(config, loaded, path), str(path)
        else:
            with loaded:
                part, source = _npz_part(config, loaded, path)
    return from_arrays(*part, name=path.stem, source=source, limit=config.limit)


def _npy_part(config: DataConfig, examples: np.ndarray, path: Path) -> _Part:
    _refuse_named(config, path)
    return _Part(examples, None)


def _refuse_named(config: DataConfig, path: Path) -> None:
    """Refuse options that choose among the arrays of an ``.npz``."""
    what = "a folder of .npy files" if path.is_dir() else "a .npy file"
    _refuse_split(config, f"{path}: {what} has no splits")
    for option in ("image_key", "label_key"):
        if getattr(config, option) is not None:
            raise InputError(
                f"--config.data.{option}: {path} is {what}, one array without a name; use an"
                " .npz, or leave the option unset"
            )


def _npz_part(config: DataConfig, archive: np.lib.npyio.NpzFile, path: Path) -> tuple[_Part, str]:
    """The examples and labels that the config's keys and split choose, and their description."""
    keys = archive.files
    parts = {split: _split_keys(keys, words) for split, words in _NPZ_SPLITS.items()}
    parts = {split: pair for split, pair in parts.items() if pair is not None}
    image_key = config.image_key or next((k for k in IMAGE_KEYS if k in keys), None)
    if image_key is None and not parts and len(keys) == 1:
        image_key = keys[0]
    if config.split != "all" and (config.image_key or config.split not in parts):
        _refuse_split(config, f"{path}: no arrays named for splits, as x_train (it has {keys})")
    if image_key is not None and config.split == "all":
        if image_key not in keys:
            raise InputError(
                f"--config.data.image_key={image_key}: no such array in {path};"
                f" {suggest(image_key, keys)}"
            )
        label_key = next((k for k in LABEL_KEYS if k in keys), None)
        part = _Part(archive[image_key], None if label_key is None else archive[label_key])
        source = f"{path}[{image_key}]"
    elif parts:
        chosen = list(parts) if config.split == "all" else [config.split]
        read = [
            _Part(archive[image], None if label is None else archive[label])
            for image, label in (parts[split] for split in chosen)
        ]
        source = f"{path}[{'+'.join(parts[split][0] for split in chosen)}]"
        part = _concatenate(read, source)
    else:
        raise InputError(
            f"{path}: cannot tell which of its arrays holds the examples; choose with"
            f" --config.data.image_key, one of {', '.join(keys) or '(it is empty)'}"
        )
    if config.label_key is not None:
        if config.label_key not in keys:
            raise InputError(
                f"--config.data.label_key={config.label_key}: no such array in {path};"
                f" {suggest(config.label_key, keys)}"
            )
        part = part._replace(labels=archive[config.label_key])
    return part, source


def _split_keys(keys: Sequence[str], words: Sequence[str]) -> tuple[str, str | None] | None:
    """The names of one split's examples and labels, as x_train/y_train or train_images/..."""
    patterns = (("x_{}", "y_{}"), ("X_{}", "y_{}"), ("{}_images", "{}_labels"), ("{}_x", "{}_y"))
    for word in words:
        for image, label in patterns:
            if image.format(word) in keys:
                wanted = label.format(word)
                return image.format(word), wanted if wanted in keys else None
    return None


def read_usps(config: DataConfig) -> Dataset:
    """USPS from HDF5: 7,291 + 2,007 images [16, 16, 1] in [0, 1]."""
    path = Path(str(config.path)).expanduser()
    check_file(path)
    try:
        import h5py
    except ImportError as error:
        raise InputError(
            "--config.data.name=usps: reading .h5 files needs h5py; pip install h5py"
        ) from error
    remedy = "expected groups train and test, each with data [n, 256] and target [n]"
    splits = ("train", "test") if config.split == "all" else (config.split,)
    with reading(path, remedy), h5py.File(path, "r") as file:
        parts = [
            _Part(np.asarray(file[f"{split}/data"]), np.asarray(file[f"{split}/target"]))
            for split in splits
        ]
    for split, part in zip(splits, parts, strict=True):
        if part.examples.ndim != 2 or part.examples.shape[1] != 256:
            raise InputError(f"{path}[{split}/data]: has shape {part.examples.shape}; {remedy}")
    examples, labels = _concatenate(parts, str(path))
    return from_arrays(
        examples.reshape(-1, 16, 16, 1),
        labels,
        name="usps",
        source=str(path),
        nominal=(0.0, 1.0),
        limit=config.limit,
    )


def check_file(path: Path) -> None:
    """Refuse a path that is missing, a folder or empty."""
    if path.is_dir():
        raise InputError(f"--config.data.path={path}: is a folder; give the file itself")
    if not path.exists():
        raise InputError(f"--config.data.path={path}: does not exist; check the spelling")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: is empty; copy or download the file again")


def _refuse_split(config: DataConfig, reason: str) -> None:
    if config.split != "all":
        raise InputError(
            f"--config.data.split={config.split}: {reason}; use --config.data.split=all"
        )


def _concatenate(parts: Sequence[_Part], source: str) -> _Part:
    """The splits one after the other; labels only where every split has them."""
    if len(parts) == 1:
        return parts[0]
    shapes = sorted({part.examples.shape[1:] for part in parts})
    if len(shapes) > 1:
        raise InputError(
            f"{source}: the splits hold examples of different shapes {shapes}; choose one with"
            " --config.data.split"
        )
    labels = [part.labels for part in parts if part.labels is not None]
    if labels and len(labels) < len(parts):
        raise InputError(
            f"{source}: some splits have labels and some have none; choose one with"
            " --config.data.split, or remove the labels"
        )
    examples = np.concatenate([part.examples for part in parts])
    return _Part(examples, np.concatenate(labels) if labels else None)
