"""k-means: k-means++ seeding and Lloyd's iterations as scans.

Notation: points x_i with weight w_i, centres m_c, labels a_i.

(1) inertia       J(m, a) = sum_i w_i |x_i - m_{a_i}|^2
(2) assignment    a_i = argmin_c |x_i - m_c|^2
(3) update        m_c = sum_{i: a_i = c} w_i x_i / sum_{i: a_i = c} w_i
(4) seeding       P(next centre = x_i) proportional to w_i min_c |x_i - m_c|^2

Neither (2) nor (3) raises J (Lloyd, 1982). (4) is k-means++ (Arthur and Vassilvitskii, 2007), here
its greedy form: several candidates are drawn and the one that lowers J most is kept.

Everything works in the dtype of the data. Data are centred before products are expanded, so that
float32 stays accurate for means far from zero. Rows of weight 0 (padding) must be finite and have
no effect.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dec_diffusion import spread
from dec_diffusion.types import Array, Float, InputError, Int, PRNGKeyArray, Shaped, pytree

# Accelerators multiply float32 matrices in a shorter format unless told otherwise.
_matmul = functools.partial(jnp.matmul, precision="highest")
_BATCHED = 2**22
"""Elements n x d x k up to which restarts run as one batch."""


@pytree
class KMeansResult:
    """Centres with the evidence of their convergence.

    ``history`` holds (1) at the start of each iteration; once the iterations stop, it repeats the
    final ``inertia``. ``converged`` is False when the iterations ran out.
    """

    centers: Float[Array, "k d"]
    labels: Int[Array, " n"]
    inertia: Float[Array, ""]
    iterations: Int[Array, ""]
    converged: Shaped[Array, ""]
    history: Float[Array, " iterations"]


def distances(x: Float[Array, "n d"], centers: Float[Array, "k d"]) -> Float[Array, "n k"]:
    """Squared Euclidean distances of every point to every centre."""
    reference = jnp.mean(centers, axis=0)
    y, c = x - reference, centers - reference
    squares = jnp.sum(y * y, axis=1)[:, None] - 2 * _matmul(y, c.T) + jnp.sum(c * c, axis=1)
    return jnp.maximum(squares, 0)


def assign(x: Float[Array, "n d"], centers: Float[Array, "k d"]) -> Int[Array, " n"]:
    """The index of the nearest centre of each point (2); ties go to the lower index."""
    reference = jnp.mean(centers, axis=0)
    return jnp.argmin(_relative(x - reference, centers - reference), axis=0)


def _relative(x: Float[Array, "n d"], centers: Float[Array, "k d"]) -> Float[Array, "k n"]:
    """Squared distances less |x|^2, which is the same for every centre of a point."""
    return jnp.sum(centers * centers, axis=1)[:, None] - 2 * _matmul(centers, x.T)


@functools.partial(jax.jit, static_argnames=("k", "trials"))
def plus_plus(
    key: PRNGKeyArray,
    x: Float[Array, "n d"],
    weight: Float[Array, " n"] | None,
    k: int,
    *,
    trials: int | None = None,
) -> Float[Array, "k d"]:
    """Greedy k-means++ seeds (4), rows of ``x``.

    ``trials`` candidates are drawn without replacement at each step; the default,
    2 + floor(log k), is scikit-learn's. With fewer distinct points than ``k`` seeds repeat.
    """
    n = x.shape[0]
    trials = min(n, trials or 2 + int(math.log(k)))
    weight = jnp.ones_like(x[:, 0]) if weight is None else weight.astype(x.dtype)
    y = x - _mean(x, weight, None)
    squares = jnp.sum(y * y, axis=1)
    keys = jax.random.split(key, k)

    def to(rows: Array) -> Array:
        return jnp.maximum(_relative(y, y[rows]) + squares, 0)

    def step(closest: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        rate = closest * weight
        # Every point may already be a centre; padding must not be drawn even then.
        rate = jnp.where(jnp.any(rate > 0), rate, weight)
        drawn, candidates = largest(rate / _exponential(key, n, x.dtype), trials)
        reached = jnp.minimum(closest, to(candidates))
        potential = jnp.where(drawn > 0, _matmul(reached, weight), jnp.inf)
        best = jnp.argmin(potential)
        return reached[best], candidates[best]

    first = jnp.argmax(weight / _exponential(keys[0], n, x.dtype))
    _, rest = jax.lax.scan(step, to(first[None])[0], keys[1:])
    return x[jnp.concatenate([first[None], rest])]


def _exponential(key: PRNGKeyArray, n: int, dtype: Any) -> Float[Array, " n"]:
    """Standard exponential: the largest of rates over these is drawn in proportion to its rate."""
    return -jnp.log(jax.random.uniform(key, (n,), dtype, minval=jnp.finfo(dtype).tiny))


@functools.partial(jax.jit, static_argnames=("max_iterations", "axis_name"))
def lloyd(
    x: Float[Array, "n d"],
    centers: Float[Array, "k d"],
    weight: Float[Array, " n"] | None = None,
    *,
    max_iterations: int = 300,
    tol: float = 1e-4,
    axis_name: str | None = None,
) -> KMeansResult:
    """Lloyd's iterations (2), (3) from the given centres.

    Stops when no label changes, or when the squared shift of all centres together is at most
    ``tol`` times the mean variance of the features (scikit-learn's rule).

    Empty clusters: before each update, the e-th empty cluster receives the point that is e-th
    farthest from its own centre, taken out of the cluster it was in; this never raises (1). A
    centre that stays empty, since every point lies on some centre, keeps its place.

    ``axis_name`` names a mapped axis over which the rows of ``x`` are spread.
    """
    k = centers.shape[0]
    weight = jnp.ones_like(x[:, 0]) if weight is None else weight.astype(x.dtype)
    reference = _mean(x, weight, axis_name)
    y = x - reference
    total = _psum(jnp.sum(weight), axis_name)
    spread = _psum(_matmul(weight, y * y), axis_name) / jnp.maximum(total, 1e-30)

    squares = jnp.sum(y * y, axis=1)

    def nearest(centers: Array) -> tuple[Array, Array]:
        relative = _relative(y, centers)
        return jnp.argmin(relative, axis=0), jnp.maximum(jnp.min(relative, axis=0) + squares, 0)

    def unfinished(carry: tuple[Array, ...]) -> Array:
        iteration, *_, done = carry
        return (iteration < max_iterations) & ~done

    def body(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        iteration, centers, labels, distance, history, _ = carry
        history = history.at[iteration].set(_psum(jnp.sum(weight * distance), axis_name))
        repaired = _fill_empty(labels, distance, weight, k, axis_name)
        member = jax.nn.one_hot(repaired, k, axis=0, dtype=x.dtype) * weight
        count = _psum(jnp.sum(member, axis=1), axis_name)[:, None]
        sums = _psum(_matmul(member, y), axis_name)
        moved = jnp.where(count > 0, sums / jnp.where(count > 0, count, 1), centers)
        new, distance = nearest(moved)
        changed = _psum(jnp.sum((new != repaired) & (weight > 0)), axis_name)
        shift = jnp.sum((moved - centers) ** 2)
        done = (changed == 0) | (shift <= tol * jnp.mean(spread))
        return iteration + 1, moved, new, distance, history, done

    start = (centers - reference).astype(x.dtype)
    history = jnp.zeros(max_iterations, x.dtype)
    carry = (jnp.int32(0), start, *nearest(start), history, jnp.bool_(False))
    iteration, final, labels, _, history, done = jax.lax.while_loop(unfinished, body, carry)
    # Once more without expanding the square, which rounds where clusters are tight.
    value = _psum(jnp.sum(weight * jnp.sum((y - final[labels]) ** 2, axis=1)), axis_name)
    history = jnp.where(jnp.arange(max_iterations) < iteration, history, value)
    return KMeansResult(final + reference, labels, value, iteration, done, history)


@functools.partial(
    jax.jit, static_argnames=("k", "restarts", "max_iterations", "trials", "screening")
)
def kmeans(
    key: PRNGKeyArray,
    x: Float[Array, "n d"],
    k: int,
    *,
    weight: Float[Array, " n"] | None = None,
    restarts: int = 10,
    max_iterations: int = 300,
    tol: float = 1e-4,
    trials: int | None = None,
    screening: int | None = None,
) -> KMeansResult:
    """The run of lowest inertia among ``restarts`` seedings; of little data, all in one batch.

    With ``screening`` only the run that is best after so many iterations goes on: a batch lasts
    as long as its slowest run, so that this is several times as fast, and rarely another run.

    Raises:
      InputError: ``k`` is below 1 or above the number of rows.
    """
    check_clusters(k, x.shape[0])

    def run(key: PRNGKeyArray) -> KMeansResult:
        seeds = plus_plus(key, x, weight, k, trials=trials)
        return lloyd(x, seeds, weight, max_iterations=screening or max_iterations, tol=tol)

    keys = jax.random.split(key, restarts)
    # A batch lasts as long as its slowest run, which is worth it while a run is launches mostly.
    runs = jax.vmap(run)(keys) if x.size * k <= _BATCHED else jax.lax.map(run, keys)
    best = jnp.argmin(jnp.where(jnp.isnan(runs.inertia), jnp.inf, runs.inertia))
    found = jax.tree.map(lambda leaf: leaf[best], runs)
    if screening is None:
        return found
    rest = lloyd(x, found.centers, weight, max_iterations=max_iterations - screening, tol=tol)
    return dataclasses.replace(
        rest,
        iterations=found.iterations + rest.iterations,
        history=jnp.concatenate([found.history, rest.history]),
    )


def largest(values: Float[Array, " n"], count: int) -> tuple[Float[Array, " c"], Int[Array, " c"]]:
    """The ``count`` largest values, falling, and where they are, as ``lax.top_k``.

    Of rows that are spread over devices, the largest of each part are all that travels.
    """
    if spread.parts() == 1:
        return jax.lax.top_k(values, count)

    def of_part(values: Array, row: Array) -> tuple[Array, Array]:
        near, at = jax.lax.top_k(values, min(count, values.shape[0]))
        return near, row[at]

    near, row = spread.over_rows(of_part, values, jnp.arange(values.shape[0]))
    value, at = jax.lax.top_k(near, count)
    return value, row[at]


def check_clusters(k: int, n: int) -> None:
    """Raise ``InputError`` unless 1 <= k <= n."""
    if not 1 <= k <= n:
        raise InputError(f"clusters = {k} for {n} examples: choose a number from 1 to {n}")


def _psum(value: Array, axis_name: str | None) -> Array:
    return value if axis_name is None else jax.lax.psum(value, axis_name)


def _mean(x: Array, weight: Array, axis_name: str | None) -> Array:
    total = _psum(jnp.sum(weight), axis_name)
    return _psum(_matmul(weight, x), axis_name) / jnp.maximum(total, 1e-30)


def _fill_empty(
    labels: Array, distance: Array, weight: Array, k: int, axis_name: str | None
) -> Array:
    """Labels [n] in which empty clusters own the points farthest from their centres."""
    n = labels.shape[0]
    local = min(k, n)
    member = jax.nn.one_hot(labels, k, axis=0, dtype=weight.dtype)
    empty = _psum(_matmul(member, weight), axis_name) <= 0
    far, row = largest(jnp.where(weight > 0, distance, -1), local)
    offset = 0
    if axis_name is not None:
        far = jax.lax.all_gather(far, axis_name, tiled=True)
        offset = jax.lax.axis_index(axis_name) * local
    value, place = jax.lax.top_k(far, min(k, far.shape[0]))
    rank = jnp.clip(jnp.cumsum(empty) - 1, 0, value.shape[0] - 1)
    here = place[rank] - offset
    ours = empty & (value[rank] > 0) & (here >= 0) & (here < local)
    target = jnp.where(ours, row[jnp.clip(here, 0, local - 1)], n)
    return labels.at[target].set(jnp.arange(k, dtype=labels.dtype), mode="drop")
