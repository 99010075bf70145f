"""The EM loop, as pure functions: no input or output, no mesh, no clock.

Entering a phase ends with an E-step (sweep the data, update the mixture in closed form). One
iteration is an M-step (a scan of gradient steps), then an E-step. Everything random is derived
from the run's key and the step's number, never carried, so a run that resumes at any iteration
repeats itself bit by bit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dec_diffusion.method import EStage, Method, Phase
from dec_diffusion.types import (
    Array,
    Batch,
    Float,
    Int,
    Metrics,
    Params,
    PRNGKeyArray,
    Shaped,
    pytree,
)


@pytree
class TrainState:
    """Everything that training changes; arrays only, so it can be scanned, donated and saved.

    Attributes:
        step: int32, gradient steps taken in the current phase.
        params: network parameters.
        ema_params: their exponential moving average, which E-steps and prediction use.
        opt_state: state of the phase's optimiser.
        cluster: what moves in closed form.
    """

    step: Int[Array, ""]
    params: Params
    ema_params: Params
    opt_state: Any
    cluster: Any


@pytree
class Examples:
    """A data set on the device.

    Attributes:
        raw: [n, ...] in the dtype of the source; images as uint8 stay uint8.
        offset, scale: ``(raw - offset) / scale`` is what the network sees.
    """

    raw: Shaped[Array, "n *s"]
    offset: Float[Array, "..."]
    scale: Float[Array, "..."]


Fetch = Callable[[Any], Batch]
"""From one row of what is scanned over to a batch."""

Collected = tuple[Any, Float[Array, " n"]]
"""Features [n, ...] of an ordered sweep, and the weights of its rows."""

Sweep = Callable[[EStage, Params, Any, PRNGKeyArray], Collected]
"""Collect for a stage, from all the data in order: ``(stage, params, cluster, key)``."""

Constrain = Callable[[TrainState], TrainState]
"""The same state, kept where it belongs; what that means is no business of this module."""


def make_batch(
    raw: Shaped[Array, "b *s"], index: Int[Array, " b"], *, offset: Array, scale: Array
) -> Batch:
    """Scale raw examples and name the parts; an ``index`` of -1 marks padding."""
    return {
        "image": (raw.astype(jnp.float32) - offset) / scale,
        "index": jnp.maximum(index, 0),
        "weight": (index >= 0).astype(jnp.float32),
    }


def fetch_resident(examples: Examples) -> Fetch:
    """Batches gathered on the device from rows of example numbers."""

    def fetch(index: Int[Array, " b"]) -> Batch:
        raw = examples.raw[jnp.maximum(index, 0)]
        return make_batch(raw, index, offset=examples.offset, scale=examples.scale)

    return fetch


def epoch_order(
    key: PRNGKeyArray, first: Int[Array, ""], *, steps: int, batch_size: int, num_examples: int
) -> Int[Array, "steps batch"]:
    """The examples of ``steps`` consecutive training steps, addressed by step number.

    Every epoch is a fresh permutation cut into full batches; the remainder is left out, and is
    another one in the next epoch.
    """
    per_epoch = num_examples // batch_size
    epoch = first // per_epoch
    spanned = (steps + per_epoch - 2) // per_epoch + 1
    orders = jax.vmap(
        lambda e: jax.random.permutation(jax.random.fold_in(key, e), num_examples)[
            : per_epoch * batch_size
        ].reshape(per_epoch, batch_size)
    )(epoch + jnp.arange(spanned))
    position = first - epoch * per_epoch + jnp.arange(steps)
    return orders.reshape(spanned * per_epoch, batch_size)[position].astype(jnp.int32)


def sweep_order(
    *, batch_size: int, num_examples: int, first: int | Array = 0, batches: int | None = None
) -> Int[Array, "batches batch"]:
    """All examples in order, in equal batches, padded with -1.

    Args:
        batch_size: of each.
        num_examples: n.
        first: the number of the batch to begin with.
        batches: how many; as many as there are examples for if None.
    """
    batches = -(-num_examples // batch_size) if batches is None else batches
    index = first * batch_size + jnp.arange(batches * batch_size, dtype=jnp.int32)
    return jnp.where(index < num_examples, index, -1).reshape(batches, batch_size)


def init_state(method: Method, key: PRNGKeyArray, batch: Batch) -> TrainState:
    """Fresh parameters; the optimiser's state is made by ``begin_phase``.

    Compiled, because dozens of small initialisers would otherwise compile one by one, and with
    the hardware's generator, whose draws compile in a third of the time of the default's.
    """
    seed = jax.random.bits(jax.random.fold_in(key, 0), (4,))
    params, cluster = jax.jit(method.init)(jax.random.wrap_key_data(seed, impl="rbg"), batch)
    return TrainState(jnp.int32(0), params, params, (), cluster)


def state_template(method: Method, phase: Phase, key: PRNGKeyArray, batch: Batch) -> TrainState:
    """Shapes and dtypes of the state inside ``phase``, without computing anything."""

    def make() -> TrainState:
        params, cluster = method.init(key, batch)
        return TrainState(jnp.int32(0), params, params, phase.tx.init(params), cluster)

    return jax.eval_shape(make)


def collect(
    stage: EStage,
    params: Params,
    cluster: Any,
    rows: Any,
    fetch: Fetch,
    key: PRNGKeyArray,
    *,
    first: int | Array = 0,
) -> Collected:
    """Run ``stage.collect`` over an ordered sweep, or over part of it.

    Args:
        stage: what to collect.
        params: network parameters.
        cluster: what moves in closed form.
        rows: [batches, ...] to scan over.
        fetch: from a row to a batch.
        key: folded with the number of each batch.
        first: the number of the first row within the whole sweep.

    Returns:
        Features and weights with leading axis n, padding included.
    """

    def body(number: Array, row: Any) -> tuple[Array, Collected]:
        batch = fetch(row)
        out = stage.collect(params, cluster, batch, jax.random.fold_in(key, number))
        return number + 1, (out, batch["weight"])

    _, out = jax.lax.scan(body, jnp.int32(first), rows)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)


def begin_phase(
    phase: Phase, state: TrainState, collected: Collected | None, key: PRNGKeyArray
) -> tuple[TrainState, Metrics]:
    """Enter a phase: continue from the averaged weights with a fresh optimiser.

    ``collected`` is the sweep of ``phase.begin``, made with ``state.ema_params``.
    """
    params, cluster, info = state.ema_params, state.cluster, {}
    if phase.begin is not None and collected is not None:
        params, cluster, info = phase.begin.update(
            params, cluster, *collected, key, jnp.float32(0.0)
        )
    # Two copies, so that both can be donated.
    ema_params = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.int32(0), params, ema_params, phase.tx.init(params), cluster), info


def progress(phase: Phase, step: Int[Array, ""]) -> Float[Array, ""]:
    """How much of the phase lies behind, from 0 to 1."""
    return step / (phase.iterations * phase.steps)


def e_step(
    phase: Phase, state: TrainState, collected: Collected, key: PRNGKeyArray
) -> tuple[TrainState, Metrics]:
    """Recompute what moves in closed form from one sweep made with the averaged weights."""
    if phase.refresh is None:
        return state, {}
    key = jax.random.fold_in(key, state.step)
    _, cluster, info = phase.refresh.update(
        state.ema_params, state.cluster, *collected, key, progress(phase, state.step)
    )
    return dataclasses.replace(state, cluster=cluster), info


def train_step(
    phase: Phase, state: TrainState, batch: Batch, key: PRNGKeyArray
) -> tuple[TrainState, Metrics]:
    """One gradient step of the phase's loss, and the moving average of the weights."""
    gradient = jax.value_and_grad(phase.loss, has_aux=True)
    (loss, (cluster, metrics)), grads = gradient(
        state.params,
        state.cluster,
        batch,
        jax.random.fold_in(key, state.step),
        progress(phase, state.step),
    )
    updates, opt_state = phase.tx.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    # Early in a phase the average would be dominated by where it started.
    decay = jnp.minimum(phase.ema, (1.0 + state.step) / (10.0 + state.step))
    ema_params: Any = optax.incremental_update(params, state.ema_params, 1.0 - decay)
    state = TrainState(state.step + 1, params, ema_params, opt_state, cluster)
    return state, {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}


def m_step(
    phase: Phase,
    state: TrainState,
    rows: Any,
    fetch: Fetch,
    key: PRNGKeyArray,
    *,
    constrain: Constrain = lambda state: state,
) -> tuple[TrainState, Metrics]:
    """Scan ``train_step`` over rows [steps, ...].

    Returns:
        The new state and every step's metrics, each [steps].
    """

    def body(state: TrainState, row: Any) -> tuple[TrainState, Metrics]:
        state, metrics = train_step(phase, state, fetch(row), key)
        return constrain(state), metrics

    return jax.lax.scan(body, state, rows)


def iteration(
    phase: Phase,
    state: TrainState,
    key: PRNGKeyArray,
    *,
    num_examples: int,
    batch_size: int,
    fetch: Fetch,
    sweep: Sweep,
    constrain: Constrain = lambda state: state,
) -> tuple[TrainState, Metrics]:
    """One EM iteration: M-step, then E-step, wherever the data are. A pure scan body.

    Args:
        phase: the phase; ``steps`` is the length of the M-step, ``refresh`` the E-step.
        state: the state, at a multiple of ``phase.steps``.
        key: the phase's key, the same in every iteration.
        num_examples: n.
        batch_size: of gradient steps.
        fetch: from example numbers [batch_size] to a batch.
        sweep: how the E-step collects.
        constrain: applied to the state after every step.

    Returns:
        The state; [steps] metrics of the M-step and scalars of the E-step.
    """
    keys = iteration_keys(key)
    order = epoch_order(
        keys.order, state.step, steps=phase.steps, batch_size=batch_size, num_examples=num_examples
    )
    state, metrics = m_step(phase, state, order, fetch, keys.m_step, constrain=constrain)
    if phase.refresh is None:
        return state, metrics
    sweep_key = jax.random.fold_in(keys.collect, state.step)
    collected = sweep(phase.refresh, state.ema_params, state.cluster, sweep_key)
    state, info = e_step(phase, state, collected, keys.e_step)
    return constrain(state), {**metrics, **info}


def em_iteration(
    phase: Phase,
    state: TrainState,
    examples: Examples,
    key: PRNGKeyArray,
    *,
    batch_size: int,
    sweep_size: int,
) -> tuple[TrainState, Metrics]:
    """``iteration`` on data that are all in one place; ``sweep_size`` is of the E-step's batches.

    The law for every other arrangement, which must give the same.
    """
    num_examples = examples.raw.shape[0]
    fetch = fetch_resident(examples)

    def sweep(stage: EStage, params: Params, cluster: Any, key: PRNGKeyArray) -> Collected:
        rows = sweep_order(batch_size=sweep_size, num_examples=num_examples)
        return collect(stage, params, cluster, rows, fetch, key)

    return iteration(
        phase,
        state,
        key,
        num_examples=num_examples,
        batch_size=batch_size,
        fetch=fetch,
        sweep=sweep,
    )


class IterationKeys(NamedTuple):
    """The streams of randomness of a phase; those of its iterations are folded with the step."""

    collect: PRNGKeyArray
    e_step: PRNGKeyArray
    order: PRNGKeyArray
    m_step: PRNGKeyArray
    begin: PRNGKeyArray


def iteration_keys(key: PRNGKeyArray) -> IterationKeys:
    """Derive the streams from a phase's key."""
    return IterationKeys(*jax.random.split(key, 5))
