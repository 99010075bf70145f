"""Parquet files: tables of numbers, and data sets of encoded images as the Hugging Face hub has.

Images are stored as a struct of ``bytes`` and ``path``, or as plain bytes. They are read batch by
batch, twice: for their sizes and to decode them. So only decoded images stay in memory, or, where
these are large, in the cache on disk.
"""

import io
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dec_diffusion.data import cache
from dec_diffusion.data.config import DataConfig, files_of_parquet, suggest
from dec_diffusion.data.dataset import Dataset, from_arrays
from dec_diffusion.data.files import check_file, reading
from dec_diffusion.data.folder import Encoded, read_images
from dec_diffusion.data.shares import ALONE, Team
from dec_diffusion.data.tables import (
    USUAL_LABELS,
    Columns,
    choose_columns,
    refuse_value,
    warn_of_counts,
)
from dec_diffusion.types import InputError

_REMEDY = "copy or download the file again"
_IMAGES = ("image", "img")
_INDEX = "__index_level_"  # how a data frame's index without a name is called in a file
_BATCH = 128  # rows of encoded images
_ROWS = 16384  # rows of numbers


def read_parquet(
    config: DataConfig,
    shape: tuple[int, ...] | None = None,
    *,
    team: Team = ALONE,
    verbose: int = 0,
) -> Dataset:
    """Images uint8 [n, h, w, 1 or 3] or vectors float32 [n, d], of one file or of all its parts.

    Args:
      config: what to read.
      shape: of images, see ``folder.read_folder``.
      team: likewise.
      verbose: likewise.

    Raises:
      InputError: pyarrow is missing, no such file or split, parts with other columns, unknown
        columns, text among the features, missing values, or broken images.
    """
    path = Path(str(config.path)).expanduser()
    try:
        import pyarrow  # noqa: F401
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(
            f"--config.data.path={path}: reading parquet needs pyarrow;"
            " pip install 'dec_diffusion[parquet]'"
        ) from error
    paths = _find(path, config.split)
    files: list[Any] = []
    for part in paths:
        with reading(part, _REMEDY):
            files.append(pq.ParquetFile(part))
    schema = files[0].schema_arrow
    for part, file in zip(paths, files, strict=True):
        if file.schema_arrow.names != schema.names or file.schema_arrow.types != schema.types:
            raise InputError(
                f"{part}: its columns are not those of {paths[0].name}; point --config.data.path"
                " at files of one data set"
            )
    total = sum(file.metadata.num_rows for file in files)
    if total == 0:
        raise InputError(f"{path}: holds 0 examples; give at least 2")
    column = _image_column(config, path, schema)
    if column is None:
        return _table(config, path, paths, files)
    label = config.label
    for option, name in [("label", label), *(("drop", name) for name in config.drop)]:
        if name is not None and name not in schema.names:
            raise InputError(
                f"--config.data.{option}={name}: no such column in {path};"
                f" {suggest(name, schema.names)}"
            )
    usual = [name for name in USUAL_LABELS if name in schema.names and name not in config.drop]
    label = label or next(iter(usual), None)
    labels = None if label is None else _labels(paths, files, label)
    options = (column, config.size, config.colour, config.broken, config.limit, shape)
    images, rows = read_images(
        config,
        partial(_encoded, paths, files, column),
        total,
        shape,
        kept=cache.locate(config.cache, path, options, map(cache.stamp, paths)),
        team=team,
        verbose=verbose,
    )
    return from_arrays(
        images,
        None if labels is None else labels[rows],
        name=_name(path),
        source=f"--config.data.path={path}",
        rows=rows,
    )


def column_names(path: Path) -> list[str]:
    """The names of all columns; none if they cannot be read."""
    try:
        import pyarrow.parquet as pq

        return list(pq.read_schema(_find(path, "all")[0]).names)
    except (ImportError, InputError, OSError, ValueError):
        return []


def _name(path: Path) -> str:
    return path.resolve().name if path.is_dir() else path.stem


def _find(path: Path, split: str) -> list[Path]:
    """The files of a split; of all of them train first."""
    if not path.is_dir():
        check_file(path)
        if split != "all":
            raise InputError(
                f"--config.data.split={split}: {path} is a single file without splits; use"
                " --config.data.split=all"
            )
        return [path]
    files = files_of_parquet(path)
    if not files:
        raise InputError(f"--config.data.path={path}: holds no *.parquet files; check the path")
    chosen = [file for file in files if split == "all" or file.name.startswith(split)]
    if not chosen:
        raise InputError(
            f"--config.data.split={split}: no file in {files[0].parent} has a name that begins with"
            f" {split}, as {split}-00000-of-00001.parquet; use --config.data.split=all"
        )
    return sorted(chosen, key=lambda file: (not file.name.startswith("train"), file.name))


def _image_column(config: DataConfig, path: Path, schema: Any) -> str | None:
    """The column of encoded images, if there is one."""
    names: list[str] = schema.names
    if config.image_key is not None and config.image_key not in names:
        raise InputError(
            f"--config.data.image_key={config.image_key}: no such column in {path};"
            f" {suggest(config.image_key, names)}"
        )
    found = [name for name in names if _holds_images(schema.field(name).type)]
    if config.image_key is not None:
        if config.image_key not in found:
            raise InputError(
                f"--config.data.image_key={config.image_key}: holds"
                f" {_kind(schema.field(config.image_key).type)}, not encoded images; leave it unset"
            )
        return config.image_key
    usual = [name for name in _IMAGES if name in found]
    if len(found) > 1 and not usual:
        raise InputError(
            f"{path}: cannot tell which of its columns holds the images; choose with"
            f" --config.data.image_key, one of {', '.join(found)}"
        )
    if not found:
        unset = DataConfig()
        for option in ("size", "colour", "broken"):
            if getattr(config, option) != getattr(unset, option):
                raise InputError(
                    f"--config.data.{option}: has no meaning with {path}, which holds no images;"
                    " leave it unset"
                )
    return next(iter([*usual, *found]), None)


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        inner = {field.name: field.type for field in kind}
        return "bytes" in inner and _holds_images(inner["bytes"])
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _kind(kind: Any) -> str:
    """A type of pyarrow in few words."""
    import pyarrow as pa

    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return "text" if text or pa.types.is_dictionary(kind) else f"values of type {kind}"[:60]


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
    )


def _encoded(paths: Sequence[Path], files: Sequence[Any], column: str) -> Iterator[list[Encoded]]:
    """The images of all parts, a batch at a time."""
    for path, file in zip(paths, files, strict=True):
        row = 0
        with reading(path, _REMEDY):
            for batch in file.iter_batches(batch_size=_BATCH, columns=[column]):
                values = batch.column(0).to_pylist()
                yield [
                    Encoded(f"{path}, row {row + i}", partial(_open, value))
                    for i, value in enumerate(values, 1)
                ]
                row += len(values)


def _open(value: Any) -> BinaryIO:
    content = value.get("bytes") if isinstance(value, dict) else value
    if content is None:
        link = isinstance(value, dict) and value.get("path")
        raise ValueError("only a path is stored, not the image" if link else "it is missing")
    return io.BytesIO(content)


def _labels(paths: Sequence[Path], files: Sequence[Any], label: str) -> np.ndarray:
    """Labels of all parts, int64 or str [n]."""
    values = []
    for path, file in zip(paths, files, strict=True):
        with reading(path, _REMEDY):
            part = file.read(columns=[label]).column(0).to_pylist()
        if None in part:
            raise InputError(
                f"{path}: row {part.index(None) + 1} has no label in column {label}; fill it in, or"
                f" go without labels: --config.data.drop={label}"
            )
        values += part
    return np.array(values)


def _table(config: DataConfig, path: Path, paths: Sequence[Path], files: Sequence[Any]) -> Dataset:
    """Columns of numbers as vectors."""
    schema = files[0].schema_arrow
    index = [name for name in _index(schema) if name not in (config.label, *config.drop)]
    names = [name for name in schema.names if name not in index]
    kinds = {i: schema.field(name).type for i, name in enumerate(names)}
    texts = {i: _kind(kind) for i, kind in kinds.items() if not _is_number(kind)}
    columns = choose_columns(config, path, names, texts)
    examples = _features(paths, files, names, columns)
    identifiers = None
    if columns.identifier is None and len(index) == 1:
        values = _names(files, index[0])
        identifiers = values if len(set(values)) == len(values) else None
    elif columns.identifier is not None:
        name = names[columns.identifier]
        values = _names(files, name)
        if len(set(values)) < len(values):
            raise InputError(
                f"{path}: column {name} holds {texts[columns.identifier]} that does not differ from"
                f" row to row, so it does not name the rows; leave it out with"
                f" --config.data.drop={name}"
            )
        identifiers = values
    labels = None
    if columns.label is not None:
        labels = _labels(paths, files, names[columns.label])
    warn_of_counts(path, names, columns, examples)
    return from_arrays(
        examples,
        labels,
        name=_name(path),
        source=str(path),
        limit=config.limit,
        paths=identifiers,
        columns=[names[i] for i in columns.features],
    )


def _index(schema: Any) -> list[str]:
    """The columns that were the index of a pandas data frame: names of rows, and no features."""
    try:
        stored = (schema.pandas_metadata or {}).get("index_columns", [])
    except ValueError:  # damaged
        stored = []
    return [name for name in schema.names if name in stored or name.startswith(_INDEX)]


def _names(files: Sequence[Any], column: str) -> list[str]:
    """A column of all parts as text, [n]."""
    return [str(v) for f in files for v in f.read(columns=[column]).column(0).to_pylist()]


def _features(
    paths: Sequence[Path], files: Sequence[Any], names: Sequence[str], columns: Columns
) -> np.ndarray:
    """float32 [n, d]; refuses what is no finite number by row and column."""
    chosen = [names[i] for i in columns.features]
    examples = np.empty((sum(file.metadata.num_rows for file in files), len(chosen)), np.float32)
    done = 0
    for path, file in zip(paths, files, strict=True):
        row = 0
        with reading(path, _REMEDY):
            for batch in file.iter_batches(batch_size=_ROWS, columns=chosen):
                for name in chosen:  # a missing one among truth values is no number at all
                    if batch.column(name).null_count:
                        missing = row + batch.column(name).is_null().index(True).as_py() + 1
                        refuse_value(path, f"row {missing}", name, "", "remove the row")
                with np.errstate(over="ignore"):  # an overflow becomes inf and is reported below
                    values = [
                        np.asarray(batch.column(name).to_numpy(zero_copy_only=False), np.float64)
                        for name in chosen
                    ]
                    part = np.stack(values, axis=1).astype(np.float32)
                if not np.isfinite(part).all():
                    i, j = (int(k) for k in np.argwhere(~np.isfinite(part))[0])
                    found = batch.column(chosen[j])[i].as_py()
                    value = "" if found is None else str(found)
                    where = f"row {row + i + 1}"
                    refuse_value(path, where, chosen[j], value, "remove the row")
                examples[done : done + len(part)] = part
                row, done = row + len(part), done + len(part)
    return examples
