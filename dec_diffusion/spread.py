"""Rows that are spread over devices, for code that knows of no devices.

A program compiled for a mesh says what is done to all rows, and the compiler shares the work out.
Sums it shares well. What is sorted or scanned along the rows it would rather bring to every
device, whole; ``over_rows`` keeps such work where the rows are.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


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
