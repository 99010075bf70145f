"""Where the engine's pure functions are compiled.

Programs are compiled in the global view: they say what is computed as if there were one device,
``placement`` says what lies where, and ``feed`` brings the data. Features of a sweep stay on the
device that made them, in the order of the data, for the closed-form update that sums over them.
All draws are those of one device, so results do not depend on how many there are, but for the
rounding of sums.

With data kept on the devices a whole EM iteration is one compiled call; streamed data go, in
superbatches, through the same functions.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dec_diffusion import engine, feed, placement, spread
from dec_diffusion.engine import Collected, Examples, TrainState
from dec_diffusion.feed import Data, first_batch, place
from dec_diffusion.method import EStage, Phase
from dec_diffusion.types import Array, Metrics, Params, PRNGKeyArray

_kept = functools.lru_cache(maxsize=8)
"""Of a function that makes compiled programs: those of equal arguments are made once.

A second run of the same method on data of the same shape then compiles nothing.
"""

Step = Callable[[TrainState], tuple[TrainState, dict[str, np.ndarray]]]
"""From a state, which is donated, to the next one and metrics on the host."""

__all__ = ["Data", "Step", "compile_phase", "compile_sweep", "first_batch", "place"]


def compile_sweep(function: Callable[..., Any], data: Data) -> Callable[..., Any]:
    """Map ``function(params, cluster, batch, key)`` over all examples, in order.

    Returns:
        A function of ``params, cluster, key`` giving numpy arrays [n, ...], in every process.
    """
    one, scaling = _mapped(function), (data.examples.offset, data.examples.scale)
    n, count, size = len(data.raw), placement.size(), data.rows.shape[1]

    def run(params: Params, cluster: Any, key: PRNGKeyArray) -> Any:
        own = params, spread.without_tables(cluster), key
        params, cluster, key = placement.replicate(own)
        # A call for each batch of every device, not a scan: one program then serves data of any
        # size, and an example gets the same result, bit by bit, whatever it comes with.
        out, done = None, 0
        for first in range(0, -(-n // size), count):
            rows = data.rows[first : first + count].reshape(-1)
            raw, index = feed.to_devices(data.raw, rows)
            part = jax.device_get(one(params, cluster, key, scaling, first, raw, index))
            if out is None:
                # At once and only once: results are as long as the data.
                out = jax.tree.map(lambda a: np.empty((n, *a.shape[1:]), a.dtype), part)
            m = min(len(rows), n - done)
            for whole, a in zip(jax.tree.leaves(out), jax.tree.leaves(part), strict=True):
                whole[done : done + m] = a[:m]
            done += m
        return out

    return run


@_kept
def _mapped(function: Callable[..., Any]) -> Callable[..., Any]:
    def own(
        params: Params,
        cluster: Any,
        key: PRNGKeyArray,
        scaling: Any,
        first: Array,
        raw: Array,
        index: Array,
    ) -> Any:
        batch = engine.make_batch(raw, index, offset=scaling[0], scale=scaling[1])
        number = first + placement.number()
        return function(params, cluster, batch, jax.random.fold_in(key, number))

    mapped = placement.on_parts(own, 2)
    # Other processes cannot be read from the host, their results come over the network.
    return jax.jit(lambda *args: placement.everywhere(mapped(*args)) if _many() else mapped(*args))


def _many() -> bool:
    return jax.process_count() > 1


def compile_phase(
    phase: Phase, data: Data, key: PRNGKeyArray, *, batch_size: int, shard_params: bool = False
) -> tuple[Step, Step]:
    """Compile entering a phase, and one of its iterations.

    Args:
        phase: the phase.
        data: the data.
        key: the phase's key.
        batch_size: of gradient steps.
        shard_params: as for ``place_state``.

    Returns:
        ``begin`` and ``iterate``, functions of the state.
    """
    # Keys are arguments, not constants of the programs, which then serve every seed.
    key = placement.replicate(key)
    keys = engine.iteration_keys(key)
    # By function: a stage that begins a phase often collects what its E-steps collect.
    sweeps = {
        stage.collect: _compile_collect(stage, data)
        for stage in (phase.begin, phase.refresh)
        if stage
    }
    n, sweep_size = len(data.raw), data.rows.shape[1]
    enter, update, iteration = _programs(phase, n, batch_size, sweep_size, shard_params)

    def e_step(state: TrainState) -> tuple[TrainState, Metrics]:
        if phase.refresh is None:
            return state, {}
        sweep_key = jax.random.fold_in(keys.collect, state.step)
        collected = sweeps[phase.refresh.collect](state.ema_params, state.cluster, sweep_key)
        return update(state, collected, keys.e_step)

    def begin(state: TrainState) -> tuple[TrainState, dict[str, np.ndarray]]:
        sweep = phase.begin and sweeps[phase.begin.collect]
        collected = sweep and sweep(state.ema_params, state.cluster, keys.begin)
        state, begun = enter(state, collected, key)
        state, info = e_step(state)
        return _to_host((state, {**begun, **info}))

    if data.resident:
        return begin, lambda state: _to_host(iteration(state, data.examples, key))

    m_step = _compile_streamed(phase, data, keys, batch_size=batch_size, shard_params=shard_params)

    def iterate(state: TrainState) -> tuple[TrainState, dict[str, np.ndarray]]:
        state, metrics = m_step(state)
        state, info = e_step(state)
        return _to_host((state, {**metrics, **info}))

    return begin, iterate


@_kept
def _programs(
    phase: Phase, num_examples: int, batch_size: int, sweep_size: int, shard_params: bool
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Entering a phase, its E-step, and an iteration on resident data."""
    constrain = functools.partial(placement.constrain, shard_params=shard_params)

    def placed(result: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        return constrain(result[0]), placement.everywhere(result[1])

    def iteration(state: TrainState, examples: Examples, key: PRNGKeyArray) -> Any:
        sweep = _sweep(examples, num_examples, sweep_size)
        return placed(
            engine.iteration(
                phase,
                state,
                key,
                num_examples=num_examples,
                batch_size=batch_size,
                fetch=feed.fetch_resident(examples),
                sweep=sweep,
                constrain=constrain,
            )
        )

    def enter(state: TrainState, collected: Collected | None, key: PRNGKeyArray) -> Any:
        return placed(engine.begin_phase(phase, state, collected, key))

    def update(state: TrainState, collected: Collected, key: PRNGKeyArray) -> Any:
        return placed(engine.e_step(phase, state, collected, key))

    return (
        jax.jit(placement.in_mesh(enter)),
        jax.jit(placement.in_mesh(update), donate_argnums=0),
        jax.jit(placement.in_mesh(iteration), donate_argnums=0),
    )


def _compile_collect(stage: EStage, data: Data) -> Callable[[Params, Any, PRNGKeyArray], Collected]:
    if data.resident:
        resident = _collect_resident(stage, len(data.raw), data.rows.shape[1])
        return lambda params, cluster, key: resident(params, cluster, key, data.examples)
    return _collect_streamed(stage, data)


@_kept
def _collect_resident(stage: EStage, num_examples: int, sweep_size: int) -> Callable[..., Any]:
    def run(params: Params, cluster: Any, key: PRNGKeyArray, examples: Examples) -> Collected:
        return _sweep(examples, num_examples, sweep_size)(stage, params, cluster, key)

    return jax.jit(run)


def _sweep(examples: Examples, num_examples: int, sweep_size: int) -> engine.Sweep:
    """Of resident data, by every device its own part."""
    sweep = feed.sweep_resident(examples, num_examples=num_examples, sweep_size=sweep_size)
    return lambda stage, params, cluster, key: sweep(
        stage, params, spread.without_tables(cluster), key
    )


# -- streaming --


def _compile_streamed(
    phase: Phase, data: Data, keys: engine.IterationKeys, *, batch_size: int, shard_params: bool
) -> Callable[[TrainState], tuple[TrainState, Metrics]]:
    """The M-step of ``engine.iteration``, with data arriving in superbatches from the host."""
    constrain = functools.partial(placement.constrain, shard_params=shard_params)
    order = jax.jit(
        lambda step, k: placement.everywhere(
            engine.epoch_order(
                k, step, steps=phase.steps, batch_size=batch_size, num_examples=len(data.raw)
            )
        )
    )

    def steps(state: TrainState, rows: Any, scaling: Any, key: PRNGKeyArray) -> Any:
        fetch = feed.fetch_streamed(scaling[0], scaling[1], batch_size)
        state, metrics = engine.m_step(phase, state, rows, fetch, key, constrain=constrain)
        return constrain(state), placement.everywhere(metrics)

    compiled = jax.jit(placement.in_mesh(steps), donate_argnums=0)
    scaling = data.examples.offset, data.examples.scale

    def m_step(state: TrainState) -> tuple[TrainState, Metrics]:
        rows = np.asarray(order(state.step, keys.order))
        rows = np.pad(rows, ((0, 0), (0, -batch_size % placement.size())), constant_values=-1)
        parts = []
        for superbatch in feed.superbatches(data, rows, axis=1):
            state, metrics = compiled(state, superbatch, scaling, keys.m_step)
            # Read at once: collectives of too many calls in flight can lock each other out.
            parts.append(jax.tree.map(np.asarray, metrics))
        return state, jax.tree.map(lambda *a: np.concatenate(a), *parts)

    return m_step


def _collect_streamed(
    stage: EStage, data: Data
) -> Callable[[Params, Any, PRNGKeyArray], Collected]:
    count = placement.size()
    per_device = len(data.rows) // count
    batch_size = data.rows.shape[1]

    def own(
        params: Params, cluster: Any, key: PRNGKeyArray, scaling: Any, first: Array, *rows: Array
    ) -> Any:
        number = placement.number() * per_device + first
        rows = jax.tree.map(lambda a: a[0], rows)
        fetch = feed.fetch_streamed(scaling[0], scaling[1], batch_size)
        out = engine.collect(stage, params, cluster, rows, fetch, key, first=number)
        return jax.tree.map(lambda a: a[None], out)

    part = jax.jit(placement.on_parts(own, 2))

    @jax.jit
    def join(*parts: Collected) -> Collected:
        # Each device joins its own; the first axis counts devices.
        return jax.tree.map(
            lambda *a: jnp.concatenate(a, axis=1).reshape(-1, *a[0].shape[2:]), *parts
        )

    def run(params: Params, cluster: Any, key: PRNGKeyArray) -> Collected:
        params, parts, first = placement.replicate(params), [], 0
        cluster = spread.without_tables(cluster)
        scaling = data.examples.offset, data.examples.scale
        rows = data.rows.reshape(count, per_device, -1).swapaxes(0, 1)
        for raw, index in feed.superbatches(data, rows, axis=1):
            swapped = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (raw, index))
            parts.append(part(params, cluster, key, scaling, first, *swapped))
            first += len(index)
            jax.block_until_ready(parts[-1])
        return join(*parts)

    return run


def _to_host(result: tuple[TrainState, Metrics]) -> tuple[TrainState, dict[str, np.ndarray]]:
    state, metrics = result
    return state, {name: np.asarray(value) for name, value in metrics.items()}
