"""How data reach the devices: kept there in parts, or streamed from the host.

A batch of resident data is gathered from the parts of all devices, which takes traffic in
proportion to the batch and none to the data. A sweep stays where the examples are: each device
takes the batches of its own part. The order of examples is that of one device.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dec_diffusion import engine, placement, spread, stream
from dec_diffusion.engine import Collected, Examples, Fetch, Sweep
from dec_diffusion.method import EStage
from dec_diffusion.types import Array, Batch, Params, PRNGKeyArray, Rows

_SUPERBATCH_BYTES = 64 * 2**20


class Data(NamedTuple):
    """A data set ready for the engine.

    Attributes:
        raw: [n, ...], in host memory or mapped into it.
        examples: the same in blocks on the devices, padded, or with an empty ``raw`` if the data
            are streamed.
        rows: the ordered sweep [batches, batch] of example numbers, -1 on padding; the batches of
            the first device come first, and all devices have as many.
    """

    raw: Rows
    examples: Examples
    rows: np.ndarray

    @property
    def resident(self) -> bool:
        """Whether the examples are on the devices."""
        return self.examples.raw.shape[0] > 0


def place(raw: Rows, offset: Any, scale: Any, *, sweep_size: int, resident: bool) -> Data:
    """Put a data set where the engine can reach it; arguments as for ``engine.Examples``.

    Sweeps always have batches of ``sweep_size``, padded, so that what a row is assigned does not
    depend on how many others there are. Each process reads the blocks of its own devices.
    """
    n, count = len(raw), placement.size()
    per_device = -(-n // (sweep_size * count))
    rows = engine.sweep_order(batch_size=sweep_size, num_examples=n, batches=count * per_device)
    block = min(n, per_device * sweep_size)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        start = index[0].start or 0
        part = np.asarray(raw[start : start + block])
        missing = np.zeros((block - len(part), *raw.shape[1:]), raw.dtype)
        return np.concatenate([part, missing]) if len(missing) else part

    if resident:
        shape = (count * block, *raw.shape[1:])
        on_device = placement.spread(shape, read)
    else:
        on_device = placement.replicate(raw[:0])
    examples = Examples(on_device, *placement.replicate((np.asarray(offset), np.asarray(scale))))
    return Data(raw, examples, np.asarray(rows))


def first_batch(data: Data) -> Batch:
    """The first batch of a sweep, on one device; networks take their shapes from it."""
    raw = jnp.asarray(data.raw[np.maximum(data.rows[0], 0)])
    scaling = placement.local((data.examples.offset, data.examples.scale))
    return engine.make_batch(raw, jnp.asarray(data.rows[0]), offset=scaling[0], scale=scaling[1])


def fetch_resident(examples: Examples) -> Fetch:
    """Batches gathered from the blocks of all devices, and spread over them."""
    if placement.size() == 1:
        return engine.fetch_resident(examples)

    def take(index: Array, block: Array) -> Array:
        first = placement.number() * len(block)
        return placement.part_of_sum(spread.own_rows(block, first, index))

    def fetch(index: Array) -> Batch:
        b = index.shape[0]
        padded = jnp.pad(index, (0, -b % placement.size()), constant_values=-1)
        raw = placement.on_parts(take, 1)(padded, examples.raw)
        return engine.make_batch(raw[:b], index, offset=examples.offset, scale=examples.scale)

    return fetch


def sweep_resident(examples: Examples, *, num_examples: int, sweep_size: int) -> Sweep:
    """Every device sweeps its own block."""

    def sweep(stage: EStage, params: Params, cluster: Any, key: PRNGKeyArray) -> Collected:
        batches = -(-num_examples // (sweep_size * placement.size()))

        def own(params: Params, cluster: Any, key: PRNGKeyArray, scaling: Any, block: Array) -> Any:
            device = placement.number()
            rows = engine.sweep_order(
                batch_size=sweep_size,
                num_examples=num_examples,
                first=device * batches,
                batches=batches,
            )

            def fetch(index: Array) -> Batch:
                raw = block[jnp.maximum(index - device * len(block), 0)]
                return engine.make_batch(raw, index, offset=scaling[0], scale=scaling[1])

            return engine.collect(stage, params, cluster, rows, fetch, key, first=device * batches)

        scaling = examples.offset, examples.scale
        return placement.on_parts(own, 1)(params, cluster, key, scaling, examples.raw)

    return sweep


# -- streamed --


def to_devices(raw: Rows, rows: np.ndarray, axis: int = 0) -> tuple[Array, Array]:
    """Examples of these numbers, and the numbers, spread over the devices along ``axis``.

    Each process reads only what its own devices take; padding repeats the first example.
    """

    def read(index: tuple[slice, ...]) -> np.ndarray:
        wanted = rows[index[: rows.ndim]]
        return raw[np.maximum(wanted, 0).reshape(-1)].reshape(*wanted.shape, *raw.shape[1:])

    examples = placement.spread((*rows.shape, *raw.shape[1:]), read, axis=axis)
    return examples, placement.spread(rows.shape, rows.__getitem__, axis=axis)


def superbatches(data: Data, rows: np.ndarray, *, axis: int) -> Iterator[tuple[Array, Array]]:
    """Cut rows [m, ...] of example numbers into parts, and bring each part's examples."""
    per_row = rows[0].size * data.raw[:1].nbytes // jax.process_count()
    size = max(1, min(len(rows), _SUPERBATCH_BYTES // max(1, per_row)))
    parts = (rows[start : start + size] for start in range(0, len(rows), size))
    return stream.ahead(to_devices(data.raw, part, axis) for part in parts)


def fetch_streamed(offset: Array, scale: Array, batch_size: int) -> Fetch:
    """Batches from rows of ``superbatches``; what lies beyond ``batch_size`` is padding."""

    def fetch(row: tuple[Array, Array]) -> Batch:
        raw, index = row
        return engine.make_batch(raw[:batch_size], index[:batch_size], offset=offset, scale=scale)

    return fetch
