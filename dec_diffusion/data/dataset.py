"""The data set record, its validation and its scaling.

Scaling is affine, ``(x - offset) / scale``, and is applied where batches are made, so images stay
uint8 in memory. Images map their nominal range [low, high] to [-1, 1]:
``offset = (high + low) / 2``, ``scale = (high - low) / 2``. Vectors are standardised:
``offset`` is the mean and ``scale`` the standard deviation of each feature.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence

import numpy as np

from dec_diffusion.data.shards import Shards, chunks, each
from dec_diffusion.types import InputError, Rows

_ROUNDED = 0.01  # steps of float32, in deviations of a feature, from which on too little is left


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Examples in memory, or mapped from files: read by rows, never all at once.

    Attributes:
      name: For titles and file names.
      examples: uint8 or float32; images [n, h, w, c] or vectors [n, d]. ``Shards`` where they are
        in several files.
      labels: int64 or str [n], or None. For scoring only.
      paths: What each example is called where it has a name, else None: the path of its own file,
        or the text in the first column of a table.
      offset: float32 scalar for images, [d] for vectors.
      scale: The same shape, positive; ``(examples - offset) / scale`` is what networks see.
      rows: int64 [n], each example's row in the source, which differs from 0..n-1 under a limit.
      columns: The names of the features of a table that names them, all differently; else None.
    """

    name: str
    examples: Rows
    labels: np.ndarray | None
    paths: list[str] | None
    offset: np.ndarray | np.float32
    scale: np.ndarray | np.float32
    rows: np.ndarray
    columns: tuple[str, ...] | None = None

    @property
    def is_image(self) -> bool:
        """Whether examples are images [h, w, c] rather than vectors [d]."""
        return self.examples.ndim == 4

    @property
    def num_examples(self) -> int:
        return self.examples.shape[0]

    @property
    def example_shape(self) -> tuple[int, ...]:
        """(h, w, c) or (d,)."""
        return self.examples.shape[1:]


def from_arrays(
    examples: Rows,
    labels: np.ndarray | None = None,
    *,
    name: str = "array",
    source: str = "examples",
    nominal: tuple[float, float] | None = None,
    limit: int | None = None,
    rows: np.ndarray | None = None,
    paths: list[str] | None = None,
    columns: Sequence[str] | None = None,
) -> Dataset:
    """Validate arrays, take the subset and derive the scaling.

    Args:
      examples: Numbers; images [n, h, w] or [n, h, w, c], or vectors [n, d].
      labels: Integers or strings [n] (or [n, 1]), or None.
      name: See ``Dataset``.
      source: How messages name the examples: an option with its value, or a file.
      nominal: The range of image values. By default [0, 255] for uint8 (but [0, largest] where
        no value reaches 64, so that masks and few-level images keep their contrast) and the
        observed range for other dtypes.
      limit: See ``DataConfig``.
      rows: int [n], the rows of the source that ``examples`` already are; None for 0..n-1.
      paths: One per example, or None.
      columns: See ``Dataset``.

    Raises:
      InputError: dtype, shape, values or labels that cannot be clustered.
    """
    if isinstance(examples, np.memmap) and examples.dtype not in (np.uint8, np.float32):
        examples = Shards([examples])  # which converts rows as they are read
    examples = _with_channels(
        examples if isinstance(examples, Shards) else np.asarray(examples), source
    )
    labels = None if labels is None else _clean_labels(np.asarray(labels), len(examples), source)
    rows = np.arange(len(examples)) if rows is None else np.asarray(rows, np.int64)
    if limit is not None and limit < len(examples):
        chosen = choose_rows(len(examples), limit)
        examples, rows = examples[chosen], rows[chosen]
        labels = None if labels is None else labels[chosen]
        paths = None if paths is None else [paths[i] for i in chosen]
    if examples.dtype not in (np.uint8, np.float32):
        # An overflow becomes infinite, and is reported below.
        with np.errstate(over="ignore"):
            examples = (
                Shards(examples.parts, np.float32)
                if isinstance(examples, Shards)
                else np.asarray(examples).astype(np.float32)
            )
    _check_values(examples, rows, source)
    offset, scale = _image_scaling(examples, nominal) if examples.ndim == 4 else _moments(examples)
    return Dataset(
        name=name,
        examples=examples,
        labels=labels,
        paths=paths,
        offset=offset,
        scale=scale,
        rows=rows,
        columns=tuple(columns) if columns and len({*columns}) == len(columns) else None,
    )


def with_scaling(
    dataset: Dataset, offset: np.ndarray | np.float32, scale: np.ndarray | np.float32
) -> Dataset:
    """The same examples under the scaling of the training data; values are left as they are.

    Raises:
      InputError: the scaling belongs to images and these are vectors, or the widths differ.
    """
    expected = () if dataset.is_image else dataset.example_shape
    if np.shape(offset) != expected or np.shape(scale) != expected:
        kind = "images" if np.ndim(offset) == 0 else f"vectors of {np.size(offset)} features"
        raise InputError(
            f"--config.data: the examples of {dataset.name} have shape {dataset.example_shape},"
            f" but the run was trained on {kind}; give data of the same kind"
        )
    return dataclasses.replace(
        dataset, offset=np.float32(offset), scale=np.float32(scale)
    )  # np.float32 keeps arrays arrays


def with_columns(dataset: Dataset, columns: Sequence[str] | None) -> Dataset:
    """A table with these columns in this order, its others left out; anything without names as is.

    Raises:
      InputError: the table lacks one of them.
    """
    if columns is None or dataset.columns is None or tuple(columns) == dataset.columns:
        return dataset
    missing = [name for name in columns if name not in dataset.columns]
    if missing:
        some = "" if len(missing) == 1 else f" (and {len(missing) - 1} more)"
        raise InputError(
            f"--config.data: {dataset.name} has no column {missing[0]}{some}, of which the run was"
            " trained; give a table with the same columns, in any order"
        )
    places = [dataset.columns.index(name) for name in columns]
    return dataclasses.replace(
        dataset,
        examples=dataset.examples[:][:, places],
        offset=np.asarray(dataset.offset)[places],
        scale=np.asarray(dataset.scale)[places],
        columns=tuple(columns),
    )


def warn_of_rounding(dataset: Dataset) -> None:
    """Warn of a feature so far from zero, as times in seconds are, that float32 blurs it.

    For data to train on: of a few rows the deviations say nothing.
    """
    if dataset.is_image:
        return
    mean, deviation = np.asarray(dataset.offset), np.asarray(dataset.scale)
    step = np.spacing(np.abs(mean))
    blurred = np.flatnonzero(step > _ROUNDED * deviation).tolist()
    lost = [j for j in blurred if varies(dataset.examples, j)]
    if lost:
        first = lost[0]
        name = dataset.columns[first] if dataset.columns else first + 1
        more = f" (and {len(lost) - 1} more like it)" if len(lost) > 1 else ""
        warnings.warn(
            f"{dataset.name}: column {name} has values around {mean[first]:.4g} in steps of"
            f" {step[first]:.2g}, as float32 rounds them{more}; subtract its smallest value first,"
            " or leave it out",
            stacklevel=3,
        )


def varies(examples: Rows, column: int | None = None) -> bool:
    """Whether values differ: all of them, or those of one column of vectors."""
    own = slice(None) if column is None else column
    first = examples[0][own].flat[0]
    return any((part[:, own] != first).any() for _, part in chunks(examples))


def choose_rows(num_examples: int, limit: int | None) -> np.ndarray:
    """The rows of a subset, int64 and increasing, the same every time; nested in ``limit``."""
    if limit is None or limit >= num_examples:
        return np.arange(num_examples)
    return np.sort(np.random.default_rng(0).permutation(num_examples)[:limit])


def few_rows(dataset: Dataset, *, elements: int = 2**25) -> np.ndarray:
    """All rows, or as many as hold ``elements`` values: a copy of those in float64 is small."""
    return choose_rows(dataset.num_examples, max(1, elements // math.prod(dataset.example_shape)))


def check_clusters(dataset: Dataset, num_clusters: int, *, least: int = 2) -> None:
    """Check that the data can form ``num_clusters`` clusters.

    Raises:
      InputError: fewer than 2 examples or all of them identical, fewer than ``least`` clusters,
        or more clusters than distinct examples.
    """
    if dataset.num_examples < 2:
        raise InputError(f"--config.data: {dataset.name} holds only 1 example; give at least 2")
    if num_clusters < least:
        raise InputError(f"--config.method.num_clusters={num_clusters}: must be at least {least}")
    distinct: set[bytes] = set()
    for example in dataset.examples:
        distinct.add(example.tobytes())
        if len(distinct) >= num_clusters:
            break
    else:
        if len(distinct) == 1:
            raise InputError(
                f"--config.data: all {dataset.num_examples} examples of {dataset.name} are"
                " identical, so there is nothing to cluster; check how the data were written"
            )
        raise InputError(
            f"--config.method.num_clusters={num_clusters}: {dataset.name} has only"
            f" {len(distinct)} distinct examples; ask for at most that many clusters"
        )


def _with_channels(examples: Rows, source: str) -> Rows:
    """Check dtype and shape; give images their channel axis."""
    if examples.dtype.kind not in "biuf":
        raise InputError(
            f"{source}: values of dtype {examples.dtype} are not real numbers; save the pixels or"
            " features as an integer or float array"
        )
    shape = examples.shape
    if examples.ndim not in (2, 3, 4):
        raise InputError(
            f"{source}: an array of shape {shape} is neither images [n, h, w] or [n, h, w, c]"
            " nor vectors [n, d]; reshape it"
        )
    if examples.size == 0:
        raise InputError(f"{source}: an array of shape {shape} holds 0 examples; give at least 2")
    if examples.ndim == 4 and shape[1] in (1, 3) and shape[3] > 4:
        raise InputError(
            f"{source}: an array of shape {shape} seems to have channels first; transpose it to"
            " [n, h, w, c]"
        )
    return each(examples, lambda part: part[..., None]) if examples.ndim == 3 else examples


def _clean_labels(labels: np.ndarray, num_examples: int, source: str) -> np.ndarray:
    """Labels as int64 or str [n]."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise InputError(
            f"{source}: labels of shape {labels.shape} are not one label per example; for one-hot"
            " labels save labels.argmax(1)"
        )
    if len(labels) != num_examples:
        raise InputError(
            f"{source}: {len(labels)} labels for {num_examples} examples; give one label per"
            " example, or none at all"
        )
    if labels.dtype.kind == "S":
        return np.char.decode(labels, "utf-8", "replace")
    if labels.dtype.kind == "U":
        return labels
    whole = labels.dtype.kind in "biu" or (
        labels.dtype.kind == "f" and np.isfinite(labels).all() and (labels == labels.round()).all()
    )
    if not whole:
        raise InputError(
            f"{source}: labels of dtype {labels.dtype} are neither whole numbers nor strings;"
            " convert them, or leave them out"
        )
    return labels.astype(np.int64)


def _check_values(examples: Rows, rows: np.ndarray, source: str) -> None:
    """Refuse values that are not finite in float32."""
    if examples.dtype == np.uint8:
        return
    count, first = 0, -1
    for start, part in chunks(examples):
        finite = np.isfinite(part)
        if not finite.all():
            count += finite.size - np.count_nonzero(finite)
            if first < 0:
                first = start + int(np.argmin(finite.reshape(len(finite), -1).all(axis=1)))
    if count:
        raise InputError(
            f"{source}: {count} values are NaN, infinite or beyond float32, the first in"
            f" example {rows[first]}; repair or drop those examples"
        )


def _image_scaling(
    images: Rows, nominal: tuple[float, float] | None
) -> tuple[np.float32, np.float32]:
    """Offset and scale that map the nominal range to [-1, 1]."""
    if nominal is None:
        ranges = [(part.min(), part.max()) for _, part in chunks(images)]
        low, high = float(min(r[0] for r in ranges)), float(max(r[1] for r in ranges))
        if images.dtype == np.uint8:
            low, high = 0.0, high if high < 64 else 255.0
    else:
        low, high = nominal
    # A single flat image has no range, and may still be assigned under another scaling.
    return np.float32((high + low) / 2), np.float32((high - low) / 2 or 1.0)


def _moments(vectors: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [d] of each feature; 1 in place of a zero deviation."""
    n = len(vectors)
    total = sum(part.sum(axis=0, dtype=np.float64) for _, part in chunks(vectors))
    mean = np.asarray(total / n)
    # About the mean and in float64, because E[x^2] - E[x]^2 cancels for features far from zero.
    variance = sum(np.square(part - mean).sum(axis=0) for _, part in chunks(vectors))
    # Rounding leaves a constant feature a tiny variance, so compare values instead.
    low = np.min([part.min(axis=0) for _, part in chunks(vectors)], axis=0)
    high = np.max([part.max(axis=0) for _, part in chunks(vectors)], axis=0)
    deviation = np.where(low == high, 1.0, np.sqrt(variance / n)).astype(np.float32)
    tiny = np.finfo(np.float32).tiny
    return mean.astype(np.float32), np.maximum(deviation, tiny)
