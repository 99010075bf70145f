"""Data sets prepared by TFDS, read without TensorFlow.

TFDS itself reads array_record files through NumPy alone, but its default format, tfrecord, only
through TensorFlow, so records of that format are found and read here and only their decoding is
left to TFDS. A TFRecord file is a sequence of

    uint64 length | uint32 checksum of length | length bytes | uint32 checksum of the bytes

in little-endian order; one record is one serialised ``tf.train.Example``.
"""

import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dec_diffusion.data import cache, shares
from dec_diffusion.data.cache import Memory, Writer
from dec_diffusion.data.config import DataConfig, suggest
from dec_diffusion.data.dataset import Dataset, choose_rows, from_arrays
from dec_diffusion.data.files import IMAGE_KEYS, LABEL_KEYS, reading
from dec_diffusion.data.shares import ALONE, Filled, Team
from dec_diffusion.types import InputError

_CHUNK = 2000  # examples per bulk read; one at a time costs several times more
_INFO = "dataset_info.json"


class Span(NamedTuple):
    """Where one record's bytes are."""

    path: Path
    start: int
    length: int


def read_tfds(config: DataConfig, *, team: Team = ALONE, verbose: int = 0) -> Dataset:
    """Read the chosen split of a prepared TFDS data set, into the cache on disk if it is large.

    Args:
      config: what to read.
      team: see ``sources.load``.
      verbose: likewise.

    Raises:
      InputError: nothing prepared there, an unreadable format, split or feature, broken files.
    """
    folder = find_prepared(config.path, config.tfds_name)
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f"--config.data.name=tfds: needs the package tensorflow-datasets ({error}); install it"
        ) from error
    remedy = "prepare the data set again, in array_record format"
    with reading(folder, remedy):
        builder: Any = tfds.builder_from_directory(folder)
        splits = list(builder.info.splits)
    if not splits:
        raise InputError(f"{folder}: its {_INFO} lists no splits; {remedy}")
    split = "+".join(splits) if config.split == "all" else config.split
    try:
        instructions = builder.info.splits[split].file_instructions
    except (ValueError, KeyError) as error:
        raise InputError(
            f"--config.data.split={config.split}: not a split of {folder};"
            f" {suggest(config.split, ['all', *splits])}"
        ) from error
    if not instructions:
        raise InputError(
            f"--config.data.split={config.split}: holds 0 examples of {folder}; choose a larger one"
        )
    for file in instructions:
        if not Path(file.filename).is_file():
            raise InputError(f"{file.filename}: is missing; {remedy}")
    keys = list(builder.info.features)
    image_key = _pick_key(keys, config.image_key, IMAGE_KEYS, "image_key", folder)
    label_key = _pick_key(keys, config.label_key, LABEL_KEYS, "label_key", folder)
    if image_key is None:
        raise InputError(
            f"{folder}: cannot tell which feature holds the examples; choose with"
            f" --config.data.image_key, one of {', '.join(keys)}"
        )
    file_format = builder.info.file_format.value
    source = f"{folder}[{image_key}]"
    with reading(folder, remedy):
        if file_format == "array_record":
            data = builder.as_data_source(split=split)
            total, read = len(data), partial(_bulk, data)
        elif file_format == "tfrecord":
            spans = index_tfrecords(instructions)
            decode = builder.info.features.deserialize_example_np
            total, read = len(spans), partial(_decoded, spans, decode)
        else:
            raise InputError(
                f"{folder}: is in {file_format} format, which cannot be read here; {remedy}"
            )
        # Every process learns the shape from the first example.
        first = _value(next(iter(read(np.arange(1)))), image_key, source)
    rows = choose_rows(total, config.limit)

    def values(own: np.ndarray, labels: list[Any]) -> Iterator[np.ndarray]:
        with reading(folder, remedy):
            for example in read(own):
                value = _value(example, image_key, source)
                if value.shape != first.shape:
                    raise InputError(
                        f"{source}: examples differ in size, {first.shape} and {value.shape};"
                        " resize them to one size before preparing the data set"
                    )
                if label_key is not None:
                    labels.append(example[label_key])
                yield value

    def fill(store: Memory | Writer, start: int, stop: int) -> Filled:
        labels: list[Any] = []
        for value in values(rows[start:stop], labels):
            store.add(value)
        return Filled(rows[start:stop], [], np.asarray(labels) if label_key is not None else None)

    stamps = [cache.stamp(file.filename) for file in instructions]
    options = (split, image_key, label_key, config.limit)
    kept = cache.locate(config.cache, folder, options, stamps)
    found = shares.find(kept, team)
    if found is None:
        found = shares.decode(
            fill, len(rows), first.shape, dtype=first.dtype, kept=kept, team=team, verbose=verbose
        )
    return from_arrays(found.images, found.labels, name=builder.name, source=source, rows=rows)


def find_prepared(path: str | None, name: str | None) -> Path:
    """The folder of one prepared data set: given itself, or below a data directory.

    Args:
      path: See ``DataConfig``.
      name: ``tfds_name`` of ``DataConfig``. Without a version the newest is taken.

    Raises:
      InputError: no folder, nothing prepared in it, or several data sets to choose from.
    """
    given = path or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = Path(given).expanduser()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise InputError(
            f"--config.data.path={given}: {what}; give the folder of a data set that TFDS has"
            f" prepared, the one with {_INFO}, or the data directory above it"
        )
    if (root / _INFO).is_file():
        return root
    base = root / name.replace(":", "/") if name else root
    depths = ("", "*/", "*/*/", "*/*/*/")  # of name/config/version, what is not given yet
    found = sorted(info.parent for depth in depths for info in base.glob(depth + _INFO))
    found = [folder for folder in found if re.fullmatch(r"\d+(\.\d+)*", folder.name)]
    if not found:
        wanted = name or "NAME"
        raise InputError(
            f"--config.data.path={given}: holds no prepared TFDS data set"
            f"{f' {name}' if name else ''}; prepare one with `tfds build {wanted}"
            f" --data_dir={given} --file_format=array_record`, or point at the folder that holds"
            f" {_INFO}"
        )
    datasets = sorted({folder.parent for folder in found})
    if len(datasets) > 1:
        names = ", ".join(str(folder.relative_to(root)) for folder in datasets)
        raise InputError(
            f"--config.data.path={given}: holds several data sets; choose one with"
            f" --config.data.tfds_name, of {names}"
        )
    return max(found, key=lambda folder: [int(part) for part in folder.name.split(".")])


def index_tfrecords(instructions: Iterable[Any]) -> list[Span]:
    """Locate the records of a split, reading only their lengths.

    Args:
      instructions: TFDS file instructions: ``filename``, ``examples_in_shard``, and the part of
        the shard to use as ``skip`` and ``take``.

    Raises:
      InputError: a file is truncated, or holds another number of records than promised.
    """
    spans: list[Span] = []
    for part in instructions:
        path, shard, start = Path(part.filename), [], 0
        size = path.stat().st_size
        with path.open("rb") as file:
            while start < size:
                file.seek(start)
                header = file.read(8)
                length = struct.unpack("<Q", header)[0] if len(header) == 8 else size
                if start + 16 + length > size:
                    raise InputError(
                        f"{path}: truncated or not a TFRecord file, record {len(shard)} does not"
                        " fit into it; copy the file again"
                    )
                shard.append(Span(path, start + 12, length))
                start += 16 + length
        if len(shard) != part.examples_in_shard:
            raise InputError(
                f"{path}: holds {len(shard)} records where {_INFO} promises"
                f" {part.examples_in_shard}; copy the file again"
            )
        spans += shard[part.skip : part.skip + part.take]
    return spans


def read_spans(spans: Iterable[Span]) -> Iterator[bytes]:
    """The bytes of each record, keeping a file open as long as records come from it."""
    file = None
    try:
        for span in spans:
            if file is None or file.name != str(span.path):
                if file is not None:
                    file.close()
                file = span.path.open("rb")
            file.seek(span.start)
            yield file.read(span.length)
    finally:
        if file is not None:
            file.close()


def _bulk(data: Any, rows: np.ndarray) -> Iterator[Mapping[str, Any]]:
    for i in range(0, len(rows), _CHUNK):
        yield from data.__getitems__(rows[i : i + _CHUNK].tolist())


def _decoded(
    spans: Sequence[Span], decode: Callable[[bytes], Mapping[str, Any]], rows: np.ndarray
) -> Iterator[Mapping[str, Any]]:
    return map(decode, read_spans(spans[row] for row in rows))


def _pick_key(
    keys: Sequence[str], wanted: str | None, usual: Sequence[str], option: str, folder: Path
) -> str | None:
    """The feature the user named, or the first with a usual name."""
    if wanted is not None and wanted not in keys:
        raise InputError(
            f"--config.data.{option}={wanted}: no such feature in {folder}; {suggest(wanted, keys)}"
        )
    return wanted or next((key for key in usual if key in keys), None)


def _value(example: Mapping[str, Any], image_key: str, source: str) -> np.ndarray:
    """One example as uint8 or float32."""
    value = np.asarray(example[image_key])
    if value.dtype.kind not in "biuf" or value.ndim == 0:
        raise InputError(
            f"{source}: the feature is neither an image nor a vector (dtype {value.dtype},"
            f" shape {value.shape}); choose another with --config.data.image_key"
        )
    if value.dtype in (np.uint8, np.float32):
        return value
    with np.errstate(over="ignore"):  # an overflow becomes inf and is reported later
        return value.astype(np.float32)
