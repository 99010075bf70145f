"""The mesh of all devices of all processes, and what lies where on it.

The only file that knows the name of the mesh's axis, and the only one with collectives in it.

State       the same on every device, or large arrays spread along one dimension
Examples    equal contiguous parts, one for each device; a ``spread.Table`` of a state likewise
Batches     spread along the batch
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dec_diffusion.engine import TrainState
from dec_diffusion.spread import Table, map_tables
from dec_diffusion.types import Array

_AXIS = "devices"
_SHARD_ABOVE = 2**16  # elements; spreading smaller arrays costs more than it saves


@functools.cache
def mesh() -> Mesh:
    """All devices of all processes, in a row."""
    return jax.make_mesh((jax.device_count(),), (_AXIS,), axis_types=(AxisType.Auto,))


def size() -> int:
    """How many devices there are."""
    return mesh().size


# -- from the host and back --


def replicate(tree: Any) -> Any:
    """The same arrays on every device; every process must give the same values."""

    def put(x: Any) -> Array:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(x))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        if isinstance(x, jax.Array) and len(x.sharding.device_set) == size() > 1:
            return x if x.is_fully_replicated else _gathered(x)
        return _put(x, P())

    return jax.tree.map(put, tree)


def local(tree: Any) -> Any:
    """The same arrays on one device of this process, for what it does alone."""
    return jax.tree.map(lambda x: x.addressable_data(0), replicate(whole(tree)))


def whole(tree: Any) -> Any:
    """The same arrays, tables without padding and on every device: fit for any layout."""

    def gathered(table: Table) -> Table:
        if len(table.values) == table.count:
            return table
        return Table(_gathered(table.values, count=table.count), table.count)

    return map_tables(gathered, tree)


def spread(shape: tuple[int, ...], read: Callable[..., Any], *, axis: int = 0) -> Array:
    """An array spread along one axis.

    Args:
        shape: of the whole; that axis is a multiple of the number of devices.
        read: from the slices of one part, one for each dimension, to its values; called for the
            devices of this process only.
        axis: along which it is spread.
    """
    sharding = NamedSharding(mesh(), P(*[None] * axis, _AXIS))
    return jax.make_array_from_callback(shape, sharding, read)


def place_state(state: TrainState, *, num_rows: int = 0, shard_params: bool = False) -> TrainState:
    """A state from the host, or from one device, where training wants it.

    Args:
        state: arrays; every process must give the same values.
        num_rows: of a sweep, padding included; several devices have as many in their tables.
        shard_params: spread large arrays over the devices, see ``TrainConfig``.
    """

    def padded(table: Table) -> Table:
        more = num_rows - len(table.values) if size() > 1 else 0
        host = np.asarray(table.values)
        return Table(np.pad(host, ((0, more), *[(0, 0)] * (host.ndim - 1))), table.count)  # pyright: ignore[reportArgumentType]

    state = map_tables(padded, state)
    return jax.tree.map(_put, state, _specs(state, shard_params))


def _put(x: Any, spec: P) -> Array:
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, NamedSharding(mesh(), spec), host.__getitem__)


def _gathered(x: Array, *, count: int | None = None) -> Array:
    return _first(count)(x)


@functools.cache
def _first(count: int | None) -> Callable[[Array], Array]:
    return jax.jit(lambda x: x[:count], out_shardings=NamedSharding(mesh(), P()))


def _specs(state: TrainState, shard_params: bool) -> TrainState:
    """Where each leaf of a state belongs: large ones along their largest divisible dimension."""

    def spec(x: Any) -> P:
        sizes = [n if n % size() == 0 else 0 for n in np.shape(x)]
        if not shard_params or size() == 1 or np.size(x) < _SHARD_ABOVE or not max(sizes):
            return P()
        return P(*[None] * int(np.argmax(sizes)), _AXIS)

    everywhere = jax.tree.map(lambda x: P(), state)
    return TrainState(
        everywhere.step,
        jax.tree.map(spec, state.params),
        jax.tree.map(spec, state.ema_params),
        jax.tree.map(spec, state.opt_state),
        map_tables(lambda table: Table(P(_AXIS), table.count), everywhere.cluster),  # pyright: ignore[reportArgumentType]
    )


# -- inside a compiled program --


def constrain(state: TrainState, *, shard_params: bool) -> TrainState:
    """Keep a state where ``place_state`` puts it."""
    return jax.tree.map(_pin, state, _specs(state, shard_params))


def everywhere(tree: Any) -> Any:
    """The same arrays, on every device."""
    return jax.tree.map(lambda x: _pin(x, P()), tree)


def in_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose code may ask over how many devices rows are spread; see ``spread``."""

    def run(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh().abstract_mesh):
            return function(*args)

    return run


def on_parts(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Each device applies ``function`` to its own part of the last ``count`` arguments.

    Results are spread as well, along their first axis.
    """

    def run(*args: Any) -> Any:
        specs = (P(),) * (len(args) - count) + (P(_AXIS),) * count
        # What a method does inside need not say on which devices its constants are.
        mapped = jax.shard_map(
            function, mesh=mesh(), in_specs=specs, out_specs=P(_AXIS), check_vma=False
        )
        return mapped(*args)

    return run


def number() -> Array:
    """Which device this is, inside ``on_parts``."""
    return jax.lax.axis_index(_AXIS)


def part_of_sum(x: Array) -> Array:
    """This device's part, along the first axis, of the sum over all devices, in ``on_parts``."""
    return jax.lax.psum_scatter(x, _AXIS, tiled=True)


def _pin(x: Array, spec: P) -> Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh(), spec))
