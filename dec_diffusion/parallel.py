"""Where the engine's pure functions are compiled, and where data and state are placed.

The only file that decides what runs on which device. Data that fit are kept on the device and a
whole EM iteration is one compiled call; larger data are streamed from the host, in superbatches,
through the same functions.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dec_diffusion import engine
from dec_diffusion.engine import Collected, Examples, Fetch, TrainState
from dec_diffusion.method import EStage, Phase
from dec_diffusion.types import Array, Batch, Metrics, Params, PRNGKeyArray

_SUPERBATCH_BYTES = 64 * 2**20
_kept = functools.lru_cache(maxsize=8)
"""Of a function that makes compiled programs: those of equal arguments are made once.

A second run of the same method on data of the same shape then compiles nothing.
"""

Step = Callable[[TrainState], tuple[TrainState, dict[str, np.ndarray]]]
"""From a state, which is donated, to the next one and metrics on the host."""


class Data(NamedTuple):
    """A data set ready for the engine.

    Attributes:
        raw: numpy [n, ...], in host memory.
        examples: the same on the device, or with an empty ``raw`` if the data are streamed.
        rows: the ordered sweep [batches, batch] of example numbers, -1 on padding.
    """

    raw: np.ndarray
    examples: Examples
    rows: np.ndarray

    @property
    def resident(self) -> bool:
        """Whether the examples are on the device."""
        return self.examples.raw.shape[0] == self.raw.shape[0]


def place(raw: np.ndarray, offset: Any, scale: Any, *, sweep_size: int, resident: bool) -> Data:
    """Put a data set where the engine can reach it; arguments as for ``engine.Examples``.

    Sweeps always have batches of ``sweep_size``, padded, so that what a row is assigned does not
    depend on how many others there are.
    """
    on_device = jnp.asarray(raw if resident else raw[:0])
    examples = Examples(on_device, jnp.asarray(offset), jnp.asarray(scale))
    rows = engine.sweep_order(batch_size=sweep_size, num_examples=len(raw))
    return Data(raw, examples, np.asarray(rows))


def first_batch(data: Data) -> Batch:
    """The first batch of a sweep; networks take their shapes from it."""
    rows = next(_superbatches(data, data.rows[:1]))
    return jax.tree.map(lambda a: jnp.asarray(a[0]), jax.vmap(_fetch_streamed(data.examples))(rows))


def compile_sweep(function: Callable[..., Any], data: Data) -> Callable[..., Any]:
    """Map ``function(params, cluster, batch, key)`` over all examples, in order.

    Returns:
        A function of ``params, cluster, key`` giving numpy arrays [n, ...].
    """
    one, (offset, scale) = _mapped(function), (data.examples.offset, data.examples.scale)

    def run(params: Params, cluster: Any, key: PRNGKeyArray) -> Any:
        # A call for each batch, not a scan: one program then serves data of any size, and an
        # example gets the same result, bit by bit, whatever it comes with.
        parts = []
        for number, row in enumerate(data.rows):
            raw = data.raw[np.maximum(row, 0)]
            out = one(params, cluster, raw, row, offset, scale, key, number)
            parts.append(jax.device_get(out))
        return jax.tree.map(lambda *a: np.concatenate(a)[: len(data.raw)], *parts)

    return run


@_kept
def _mapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @jax.jit
    def one(
        params: Params,
        cluster: Any,
        raw: Array,
        index: Array,
        offset: Array,
        scale: Array,
        key: PRNGKeyArray,
        number: Array,
    ) -> Any:
        batch = engine.make_batch(raw, index, offset=offset, scale=scale)
        return function(params, cluster, batch, jax.random.fold_in(key, number))

    return one


def compile_phase(
    phase: Phase, data: Data, key: PRNGKeyArray, *, batch_size: int
) -> tuple[Step, Step]:
    """Compile entering a phase, and one of its iterations.

    Args:
        phase: the phase.
        data: the data.
        key: the phase's key.
        batch_size: of gradient steps.

    Returns:
        ``begin`` and ``iterate``, functions of the state.
    """
    # Keys are arguments, not constants of the programs, which then serve every seed.
    keys = engine.iteration_keys(key)
    # By function: a stage that begins a phase often collects what its E-steps collect.
    sweeps = {
        stage.collect: _compile_collect(stage, data)
        for stage in (phase.begin, phase.refresh)
        if stage
    }
    enter, update, iteration = _programs(phase, batch_size, data.rows.shape[1])

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

    m_step = _compile_streamed(phase, data, keys, batch_size=batch_size)

    def iterate(state: TrainState) -> tuple[TrainState, dict[str, np.ndarray]]:
        state, metrics = m_step(state)
        state, info = e_step(state)
        return _to_host((state, {**metrics, **info}))

    return begin, iterate


@_kept
def _programs(
    phase: Phase, batch_size: int, sweep_size: int
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Entering a phase, its E-step, and an iteration on resident data."""
    enter = jax.jit(lambda state, collected, k: engine.begin_phase(phase, state, collected, k))
    update = jax.jit(functools.partial(engine.e_step, phase), donate_argnums=0)
    iteration = jax.jit(
        lambda state, examples, k: engine.em_iteration(
            phase, state, examples, k, batch_size=batch_size, sweep_size=sweep_size
        ),
        donate_argnums=0,
    )
    return enter, update, iteration


def _compile_streamed(
    phase: Phase, data: Data, keys: engine.IterationKeys, *, batch_size: int
) -> Callable[[TrainState], tuple[TrainState, Metrics]]:
    """The M-step of ``engine.em_iteration``, with data arriving in superbatches from the host."""
    fetch = _fetch_streamed(data.examples)
    order = jax.jit(
        lambda step, k: engine.epoch_order(
            k, step, steps=phase.steps, batch_size=batch_size, num_examples=len(data.raw)
        )
    )
    steps = jax.jit(
        lambda state, rows, k: engine.m_step(phase, state, rows, fetch, k), donate_argnums=0
    )

    def m_step(state: TrainState) -> tuple[TrainState, Metrics]:
        parts = []
        for rows in _superbatches(data, np.asarray(order(state.step, keys.order))):
            state, metrics = steps(state, rows, keys.m_step)
            parts.append(metrics)
        return state, jax.tree.map(lambda *a: np.concatenate([np.asarray(x) for x in a]), *parts)

    return m_step


def _compile_collect(stage: EStage, data: Data) -> Callable[[Params, Any, PRNGKeyArray], Collected]:
    if data.resident:
        resident = _collect_resident(stage)
        return lambda params, cluster, key: resident(params, cluster, key, data.examples, data.rows)
    fetch = _fetch_streamed(data.examples)
    streamed = jax.jit(
        lambda params, cluster, key, rows, first: engine.collect(
            stage, params, cluster, rows, fetch, key, first=first
        )
    )

    def run(params: Params, cluster: Any, key: PRNGKeyArray) -> Collected:
        parts, first = [], 0
        for rows in _superbatches(data, data.rows):
            parts.append(streamed(params, cluster, key, rows, first))
            first += len(rows[1])
        return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)

    return run


@_kept
def _collect_resident(stage: EStage) -> Callable[..., Collected]:
    return jax.jit(
        lambda params, cluster, key, examples, rows: engine.collect(
            stage, params, cluster, rows, engine.fetch_resident(examples), key
        )
    )


def _superbatches(data: Data, rows: np.ndarray) -> Any:
    """Cut rows [m, batch] of example numbers into parts, and gather each part's examples."""
    per_row = rows.shape[1] * data.raw[:1].nbytes
    size = max(1, min(len(rows), _SUPERBATCH_BYTES // max(1, per_row)))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield data.raw[np.maximum(part, 0)], part


def _fetch_streamed(examples: Examples) -> Fetch:
    def fetch(row: tuple[Array, Array]) -> Batch:
        raw, index = row
        return engine.make_batch(raw, index, offset=examples.offset, scale=examples.scale)

    return fetch


def _to_host(result: tuple[TrainState, Metrics]) -> tuple[TrainState, dict[str, np.ndarray]]:
    state, metrics = result
    return state, {name: np.asarray(value) for name, value in metrics.items()}
