"""Rows that are spread over devices, for code that knows of no devices.

A program compiled for a mesh says what is done to all rows, and the compiler shares the work out.
Sums it shares well. What is sorted or scanned along the rows it would rather bring to every
device, whole; ``over_rows`` keeps such work where the rows are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dec_diffusion.types import Array, Int, Shaped, pytree, static


@pytree
class Table:
    """A table with a row for every example, which lies where the examples lie.

    A method's losses and updates may use one; its sweeps and ``predict`` find it empty, for they
    also see examples that have no row.

    Attributes:
        values: [n, ...]; while training on several devices more, so that all have equal parts.
        count: n.
    """

    values: Shaped[Array, "n *s"]
    count: int = static()

    def take(self, index: Int[Array, " b"]) -> Shaped[Array, "b *s"]:
        """The rows of these examples, on every device: traffic in proportion to their number."""
        size = self.values.shape[0] // parts()

        def of_part(values: Array, first: Array, index: Array) -> Array:
            return own_rows(values, first[0], index)[None]

        if parts() == 1:
            return self.values[index]
        # All parts but one give zeros.
        found = over_rows(of_part, self.values, jnp.arange(parts()) * size, whole=(index,))
        return found.sum(0, dtype=self.values.dtype)


def own_rows(part: Array, first: Array, index: Int[Array, " b"]) -> Array:
    """Rows of these numbers, [b, ...], from the part that begins with row ``first``; else zeros."""
    row = index - first
    mine = ((row >= 0) & (row < len(part))).reshape(-1, *[1] * (part.ndim - 1))
    return jnp.where(mine, part[jnp.clip(row, 0, len(part) - 1)], 0)


def map_tables(function: Callable[[Table], Any], tree: Any) -> Any:
    """The same tree, but for its tables."""

    def one(leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, Table) else leaf

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, Table))


def without_tables(tree: Any) -> Any:
    """The same tree, its tables empty."""
    return map_tables(lambda table: Table(table.values[:0], table.count), tree)


def trimmed(tree: Any, count: int) -> Any:
    """Without padding, but where rows are spread over devices: there it keeps parts equal."""
    return tree if parts() > 1 else jax.tree.map(lambda rows: rows[:count], tree)


def parts() -> int:
    """Into how many equal contiguous parts the rows of data are spread here; 1 if they are not."""
    mesh = jax.sharding.get_abstract_mesh()
    apart = not mesh.empty and all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh.size if apart else 1


def over_rows(function: Callable[..., Any], *rows: Any, whole: tuple[Any, ...] = ()) -> Any:
    """``function(*rows, *whole)``, each part of the rows by itself, on its own device.

    Args:
        function: from arrays [m, ...], and ``whole``, to arrays [c, ...] of any c.
        rows: arrays [n, ...].
        whole: what every part needs.

    Returns:
        Results of all parts joined along their first axis; all at once where rows are not spread
        or not in equal parts.
    """
    count = parts()
    if count == 1 or jax.tree.leaves(rows)[0].shape[0] % count:
        return function(*rows, *whole)
    here = P(jax.sharding.get_abstract_mesh().axis_names)
    specs = (here,) * len(rows) + (P(),) * len(whole)
    mapped = jax.shard_map(function, in_specs=specs, out_specs=here, check_vma=False)
    return mapped(*rows, *whole)
