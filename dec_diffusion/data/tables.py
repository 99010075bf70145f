"""Tables of numbers: text files with a delimiter, and the choice of columns of any table.

Every column of numbers is a feature, but for the label and the columns to drop. The first column
may be text that names each row, all different; it is no feature, and the examples go by it. Any
other text is refused, because numbers made of it would mean nothing.
"""

import contextlib
import csv
import gzip
import io
import itertools
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from dec_diffusion.data.config import DataConfig, suggest
from dec_diffusion.data.dataset import Dataset, from_arrays
from dec_diffusion.data.files import check_file, reading
from dec_diffusion.types import InputError

USUAL_LABELS = ("label", "labels")
_DELIMITERS = "\t;,"  # in this order, as commas may also be decimal points or stand in names
_MISSING = {"", "-", "?", "na", "n/a", "nan", "nil", "none", "null"}
_HEAD = 20  # lines that tell what the file is
_CHUNK = 4096  # rows that become numbers at a time
_COUNTED = 3  # columns above which a first row 0, 1, 2 ... counts them and is no example
_SHOWN = 10  # columns that a message lists


class Columns(NamedTuple):
    """Which columns of a table are what, by position.

    Attributes:
      features: numbers, in order.
      label: for scoring only, or None.
      identifier: text that differs from row to row, or None.
    """

    features: list[int]
    label: int | None
    identifier: int | None


class _Row(NamedTuple):
    """The fields of one row, and the line of the file that it ends on."""

    line: int
    fields: list[str]


def read_csv(config: DataConfig) -> Dataset:
    """Vectors float32 [n, d] of a text file, gzipped or not.

    Raises:
      InputError: no such file, unknown columns, text among the features, or missing values.
    """
    path = Path(str(config.path)).expanduser()
    if config.split != "all":
        raise InputError(
            f"--config.data.split={config.split}: {path} is one table without splits; use"
            " --config.data.split=all"
        )
    check_file(path)
    remedy = "save it as plain text in UTF-8, one example per line"
    with reading(path, remedy), _open_text(path) as stream:
        start = list(itertools.islice(stream, _HEAD))
        if any("\0" in line for line in start):
            raise InputError(f"{path}: is not a text file; {remedy}")
        delimiter = _delimiter(start)
        rows = _rows(itertools.chain(start, stream), delimiter)
        head = list(itertools.islice(rows, 2))
        if not head:
            raise InputError(f"{path}: holds 0 examples; give at least 2")
        has_header = _has_header(path, head)
        if has_header and len(head) == 1:
            raise InputError(f"{path}: holds 0 examples, only a line of names; give at least 2")
        first = head[0].fields
        names = [(name if has_header else "") or str(i) for i, name in enumerate(first, 1)]
        data = head[-1].fields
        texts = {i: f"'{field}'" for i, field in enumerate(data) if not _is_number(field)}
        columns = choose_columns(config, path, names, texts)
        rest = itertools.chain(head[1:] if has_header else head, rows)
        examples, labels, identifiers = _read_rows(path, names, columns, rest)
    warn_of_counts(path, names, columns, examples)
    name = path.name.removesuffix(".gz").rpartition(".")[0] or path.name
    return from_arrays(
        examples,
        labels,
        name=name,
        source=str(path),
        limit=config.limit,
        paths=identifiers,
        columns=[names[i] for i in columns.features] if has_header else None,
    )


def column_names(path: Path) -> list[str]:
    """The names of all columns, as ``read_csv`` has them; none if the file cannot be read."""
    try:
        with _open_text(path) as stream:
            start = list(itertools.islice(stream, _HEAD))
        head = list(itertools.islice(_rows(start, _delimiter(start)), 2))
        has_header = _has_header(path, head)
    except (EOFError, IndexError, InputError, OSError, ValueError, csv.Error, zlib.error):
        return []
    return [(name if has_header else "") or str(i) for i, name in enumerate(head[0].fields, 1)]


def choose_columns(
    config: DataConfig, path: Path, names: Sequence[str], texts: Mapping[int, str]
) -> Columns:
    """What each column is for.

    Args:
      config: its ``label`` and ``drop`` name columns. Where ``label`` is unset, a column of that
        very name is the label.
      path: for messages.
      names: of all columns.
      texts: by position, the columns that hold no numbers, and what they hold instead.

    Raises:
      InputError: no such column or several of one name, text among the features, or no features.
    """
    for option, wanted in [("label", config.label), *(("drop", name) for name in config.drop)]:
        if wanted is not None and wanted not in names:
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            near = suggest(wanted, names).split(" known: ")[0]
            hint = f"{near} " if near.startswith("did you mean") else ""
            raise InputError(
                f"--config.data.{option}={wanted}: no such column in {path}; {hint}known: {shown}"
            )
    if config.label is not None and names.count(config.label) > 1:
        raise InputError(
            f"--config.data.label={config.label}: {path} has several columns of that name; rename"
            " all but one"
        )
    usual = [i for i, name in enumerate(names) if name.lower() in USUAL_LABELS]
    label = names.index(config.label) if config.label is not None else None
    if config.label is None and len(usual) == 1 and names[usual[0]] not in config.drop:
        label = usual[0]
    kept = [i for i, name in enumerate(names) if name not in config.drop and i != label]
    named = 0 in kept and 0 in texts and not _decimal_point(texts[0])
    identifier = 0 if named and len(kept) > 1 else None
    wrong = [i for i in kept if i in texts and i != identifier]
    if wrong:
        drop = ",".join([*config.drop, *(names[i] for i in wrong)])
        more, first = len(wrong) - 1, wrong[0]
        some = f" (and {more} more column{'s' if more > 1 else ''} like it)" if more else ""
        commas = _decimal_point(texts[first])
        if more:
            classes = "if one of them holds the classes, --config.data.label=NAME scores against it"
        else:
            classes = f"if it holds the classes, --config.data.label={names[first]} scores against"
            classes += " them"
        raise InputError(
            f"{path}: column {names[first]} holds {texts[first]}, not numbers{some}; {commas}leave"
            f" {'them' if more else 'it'} out with --config.data.drop={drop}"
            + (f"; {classes}" if label is None and not commas else "")
        )
    features = [i for i in kept if i != identifier]
    if not features:
        raise InputError(
            f"{path}: no column of numbers is left to cluster; check --config.data.drop,"
            " --config.data.label and the file"
        )
    return Columns(features, label, identifier)


def warn_of_counts(
    path: Path, names: Sequence[str], columns: Columns, examples: np.ndarray
) -> None:
    """Warn of a first column that only counts the rows, as an index saved along with the data."""
    first, values = columns.features[0], examples[:, 0]
    counts = len(values) > 2 and np.array_equal(values, values[0] + np.arange(len(values)))
    if first == 0 and len(columns.features) > 1 and counts:
        warnings.warn(
            f"{path}: column {names[0]} counts the rows and is clustered with the others; leave it"
            f" out with --config.data.drop={names[0]}",
            stacklevel=2,
        )


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    with path.open("rb") as file:
        zipped = file.peek(2)[:2] == b"\x1f\x8b"
        binary: Any = gzip.GzipFile(fileobj=file) if zipped else file
        # A byte order mark, as spreadsheets write it, is no part of the first name.
        with io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as text:
            yield text


def _rows(lines: Iterable[str], delimiter: str) -> Iterator[_Row]:
    reader = csv.reader(lines, delimiter=delimiter)
    return (_Row(reader.line_num, fields) for fields in reader if fields)


def _delimiter(start: Sequence[str]) -> str:
    """The first delimiter that divides the first two lines into equally many fields."""
    counts = {
        delimiter: [len(row.fields) for row in itertools.islice(_rows(start, delimiter), 2)]
        for delimiter in _DELIMITERS
    }
    equal = [d for d, count in counts.items() if count and min(count) > 1 and len({*count}) == 1]
    # A row that is too short or too long is found, and named, as it is read.
    return equal[0] if equal else max(counts, key=lambda d: max(counts[d], default=0))


def _is_number(field: str) -> bool:
    """Whether it is a number, or a missing one."""
    try:
        _number(field)
    except ValueError:
        return field.strip().lower() in _MISSING
    return True


def _number(field: str) -> float:
    """As ``float``, but that 1_2 is a name and not 12; raises ValueError."""
    if "_" in field:
        raise ValueError(field)
    return float(field)


def _has_header(path: Path, head: Sequence[_Row]) -> bool:
    """Whether the first row names the columns: if any field is no number, or it counts them.

    Raises:
      InputError: if this would lose an example, as the second row has text in the same places and
        the numbers beside it do not count the columns.
    """
    first, second = head[0].fields, head[-1].fields
    text = [not _is_number(field) for field in first]
    numbers = [field.strip() for field, is_text in zip(first, text, strict=True) if not is_text]
    counted = [str(i) for i in range(len(first))]
    if first == ["", *counted[:-1]]:  # as data frames without names are written
        return len(first) > 1
    # The same without their index; of few columns it could be a row.
    if len(first) > _COUNTED and first in (counted, [str(i + 1) for i in range(len(first))]):
        return True
    if not any(text) or not any(numbers):
        return any(text)
    names_of_numbers = any(numbers == [str(i + j) for j in range(len(numbers))] for i in (0, 1))
    alike = text == [not _is_number(field) for field in second]
    if len(head) > 1 and alike and not names_of_numbers:
        raise InputError(
            f"{path}: line {head[0].line} holds text and numbers as the next one does, so it cannot"
            " be told whether it names the columns; put a line of names before it"
        )
    return True


def _read_rows(
    path: Path, names: Sequence[str], columns: Columns, rows: Iterable[_Row]
) -> tuple[np.ndarray, np.ndarray | None, list[str] | None]:
    """Features float32 [n, d], labels int64 or str [n] and names of rows, where there are any."""
    parts, labels, identifiers = [], [], {}
    rows = iter(rows)
    whole = len(columns.features) == len(names)
    while chunk := list(itertools.islice(rows, _CHUNK)):
        for line, fields in chunk:
            if len(fields) != len(names):
                raise InputError(
                    f"{path}: line {line} has {len(fields)} fields where the first has"
                    f" {len(names)}; repair or remove it"
                )
            if columns.label is not None:
                label = fields[columns.label].strip()
                if label.lower() in _MISSING:
                    raise InputError(
                        f"{path}: line {line} has no label in column {names[columns.label]}; fill"
                        f" it in, or go without labels: --config.data.drop={names[columns.label]}"
                    )
                labels.append(label)
            if columns.identifier is not None:
                value = fields[columns.identifier]
                if identifiers.setdefault(value, line) != line:
                    name = names[columns.identifier]
                    raise InputError(
                        f"{path}: column {name} holds text, '{value}' in lines"
                        f" {identifiers[value]} and {line}, so it does not name the rows; leave it"
                        f" out with --config.data.drop={name}"
                    )
        used = [f if whole else [f[i] for i in columns.features] for _, f in chunk]
        parts.append(_numbers(path, [names[i] for i in columns.features], chunk, used))
    examples = np.concatenate(parts)
    found = np.array(_whole(labels)) if columns.label is not None else None
    return examples, found, list(identifiers) if columns.identifier is not None else None


def _numbers(
    path: Path, names: Sequence[str], chunk: Sequence[_Row], used: Sequence[Sequence[str]]
) -> np.ndarray:
    """float32 [rows, d]; refuses what is no finite number by line and column."""
    count = len(used) * len(names)
    try:
        with np.errstate(over="ignore"):  # an overflow becomes inf and is reported below
            fields = list(itertools.chain.from_iterable(used))
            number = _number if "_" in "".join(fields) else float  # which is faster
            values = np.fromiter(map(number, fields), np.float64, count).astype(np.float32)
    except ValueError:
        values = np.array([_finite(f) for fields in used for f in fields], np.float32)
    values = values.reshape(len(used), len(names))
    if not np.isfinite(values).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
        refuse_value(
            path, f"line {chunk[row].line}", names[column], used[row][column], "remove the line"
        )
    return values


def refuse_value(path: Path, where: str, name: str, value: str, remedy: str) -> None:
    """Refuse a value of a feature that is missing, text or too large.

    Raises:
      InputError: always.
    """
    value = value.strip()
    if value.lower() in _MISSING:
        what = f"is missing{f' ({value})' if value else ''}; fill it in"
    elif _is_number(value):
        what = f"is {value}, infinite or beyond float32; correct it"
    else:
        what = f"is '{value[:40]}', not a number; {_decimal_point(value)}correct it"
    raise InputError(
        f"{path}: {where}, column {name}: {what}, {remedy}, or leave out the column with"
        f" --config.data.drop={name}"
    )


def _decimal_point(value: str) -> str:
    """A hint where a number is written with commas, for decimals or thousands."""
    commas = re.fullmatch(r"'?-?\d+(,\d+)+(\.\d+)?'?", value.strip())
    return "write decimal points and no commas, or " if commas else ""


def _finite(field: str) -> float:
    try:
        return _number(field)
    except ValueError:
        return np.nan


def _whole(labels: Sequence[str]) -> Sequence[int] | Sequence[str]:
    """The labels as whole numbers, where all of them are."""
    try:
        values = [_number(label) for label in labels]
    except ValueError:
        return labels
    return [int(v) for v in values] if all(v.is_integer() for v in values) else labels
