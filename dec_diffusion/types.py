"""The few types that every other module shares.

Axis letters used in shape annotations throughout the package: ``b`` batch, ``n`` examples,
``k`` clusters, ``d`` latent (or feature) dimensions, ``h w c`` image height, width, channels,
``t`` time steps.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Protocol, TypeVar, dataclass_transform

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

Params = Mapping[str, Any]
"""Network parameters: nested dictionaries of arrays."""

Batch = Mapping[str, Array]
"""``image`` float32 [b, h, w, c] (or [b, d] for vectors), scaled to about [-1, 1]; ``index``
int32 [b], the row in the data set; ``weight`` float32 [b], 0 on padding and 1 elsewhere.
A batch never carries labels."""

Metrics = Mapping[str, Array]
"""Scalars worth logging, by name."""

AUTO = "auto"
Count = Annotated[int, AUTO]
"""A whole number, or the word ``auto`` in the settings of a run that has yet to choose it."""

_T = TypeVar("_T")


class Rows(Protocol):
    """Examples [n, ...] on the host, read by rows: a NumPy array, or several taken as one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class InputError(ValueError):
    """The user gave something that cannot work.

    The message is one line that names the option or file and the remedy; the command line
    prints it alone and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an error says, at most 200 characters, to be quoted in one line."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


@dataclass_transform(frozen_default=True)
def pytree(cls: type[_T]) -> type[_T]:
    """Make ``cls`` a frozen dataclass that JAX treats as a pytree of its fields.

    A field declared with ``static()`` is part of the tree's structure instead of a leaf, so
    changing it recompiles.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    return jax.tree_util.register_dataclass(
        cls,
        data_fields=[f.name for f in fields if not f.metadata.get("static")],
        meta_fields=[f.name for f in fields if f.metadata.get("static")],
    )


def static(**kwargs: Any) -> Any:
    """A dataclass field that is part of a pytree's structure, not a leaf."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


__all__ = [
    "AUTO",
    "Array",
    "Batch",
    "Bool",
    "Count",
    "Float",
    "InputError",
    "Int",
    "Metrics",
    "PRNGKeyArray",
    "Params",
    "Rows",
    "Shaped",
    "first_line",
    "pytree",
    "static",
]
