"""Which layer, at which timestep: how well features cluster, judged without labels.

A cell is the features of one layer at one timestep, [m, d] of m examples. With J the inertia of
k-means on them, TSS their total sum of squares and lambda the variances of their principal axes:

(1) CHI         [(TSS - J) / (K - 1)] / [J / (m - K)], the Calinski-Harabasz index
(2) corrected   CHI / CHI of k-means on Gaussian noise with the same variances lambda
(3) stability   adjusted Rand index of k-means on either half of the noise draws
(4) consensus   mean adjusted Rand index of a cell's labels with those of all other cells
(5) rank        sum of the ranks among all cells by (2), (3) and (4)
(6) dimensions  (sum lambda)^2 / sum lambda^2, the effective rank of the features

(1) cannot compare layers: it rises as the effective rank falls, whether there are groups or not;
hence (2), which is 1 without groups, and (3), which needs no scale. Both can favour a cell that
sees groups of its own; what many cells find, (4), is more likely to be in the data. Cells whose
rank (6) is below K / 2 are left out: one odd direction is not K groups. But below half of the
largest rank of all cells at most: noise has the largest, and would be all that is left of many K.

Sources: (1) Calinski and Harabasz 1974, the score of DiEC's first version (second-hand); (2) to
(6) are ours, (4) after the consensus of cluster ensembles (Strehl and Ghosh 2002).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dec_diffusion import pca
from dec_diffusion.kmeans import kmeans
from dec_diffusion.types import Array, Bool, Float, Int, PRNGKeyArray, pytree

Score = Literal["rank", "corrected", "stability", "consensus", "chi"]
"""By which of (1) to (5) cells are compared."""

Strategy = Literal["grid", "golden", "ternary"]
"""``grid`` tries all layers; the others narrow the timestep down for one."""

_MOST = 2**25  # elements of the memberships of all cells, and of their tables: 128 MiB


# -- scores --


@pytree
class Cell:
    """The scores (1), (2), (3) and (6) of a cell, and the k-means labels of its examples."""

    chi: Float[Array, "*c"]
    corrected: Float[Array, "*c"]
    stability: Float[Array, "*c"]
    dimensions: Float[Array, "*c"]
    labels: Int[Array, "*c m"]


def calinski_harabasz(
    inertia: Float[Array, ""], total: Float[Array, ""], *, n: int, k: int
) -> Float[Array, ""]:
    """Equation (1), from the inertia and the total sum of squares; 0 for a single cluster."""
    between = (total - inertia) / (k - 1) if k > 1 else jnp.zeros_like(total)
    return between / (jnp.maximum(inertia, 1e-30) / (n - k))


def rand_index(a: Int[Array, " m"], b: Int[Array, " m"], k: int) -> Float[Array, ""]:
    """The adjusted Rand index of two labellings with labels below ``k`` (Hubert, Arabie 1985)."""
    return _rand_index(jax.nn.one_hot(a, k).T @ jax.nn.one_hot(b, k))


def _rand_index(table: Float[Array, "*t k k"]) -> Float[Array, "*t"]:
    """The same, from the numbers of examples with either pair of labels."""

    def pairs(counts: Array, axes: int) -> Array:
        return jnp.sum(counts * (counts - 1.0) / 2.0, axis=tuple(range(-axes, 0)))

    m = table.sum((-2, -1))
    rows, columns, both = pairs(table.sum(-1), 1), pairs(table.sum(-2), 1), pairs(table, 2)
    expected, most = rows * columns / (m * (m - 1.0) / 2.0), 0.5 * (rows + columns)
    return jnp.where(most == expected, 1.0, (both - expected) / (most - expected))


def score_cell(
    key: PRNGKeyArray,
    halves: Float[Array, "2 m D"],
    k: int,
    *,
    dims: int,
    whitened: bool = True,
    unit: bool = False,
    restarts: int = 4,
) -> Cell:
    """Project a cell to ``dims`` dimensions, cluster it, and score the clusters.

    Args:
        key: of the seeds of k-means and of the Gaussian noise.
        halves: features averaged over either half of the noise draws.
        k: number of clusters.
        dims: principal axes kept.
        whitened: give all of them the same variance.
        unit: give all examples the same length.
        restarts: of k-means, of which the lowest inertia counts.
    """
    axes_key, noise_key, whole_key, *half_keys = jax.random.split(key, 5)
    whole = halves.mean(0)
    raw = pca.principal(axes_key, whole, dims, iterations=2)
    axes = pca.whiten(raw) if whitened else raw
    m = whole.shape[0]

    def chi(key: PRNGKeyArray, x: Array) -> tuple[Array, Array]:
        found = kmeans(key, x, k, restarts=restarts, max_iterations=50, screening=6)
        total = jnp.sum(jnp.square(x - x.mean(0)))
        return calinski_harabasz(found.inertia, total, n=m, k=k), found.labels

    # The noise gets these variances exactly: those of a draw would scatter and raise its CHI.
    noise = jax.random.normal(noise_key, (max(m, dims), dims))
    noise = jnp.linalg.qr(noise - noise.mean(0))[0][:m] * jnp.sqrt(m * axes.variance)
    # The four runs of k-means are one batch.
    three = pca.project(axes, jnp.concatenate([whole[None], halves]), unit=unit)
    x = jnp.concatenate([three, (pca.same_length(noise) if unit else noise)[None]])
    values, labels = jax.vmap(chi)(jnp.stack([whole_key, *half_keys, noise_key]), x)
    return Cell(
        values[0],
        values[0] / jnp.maximum(values[3], 1e-30),
        rand_index(labels[1], labels[2], k),
        pca.effective_rank(raw.variance),
        labels[0].astype(jnp.int16),
    )


def consensus(cells: Cell, k: int) -> Float[Array, "*c"]:
    """Equation (4), among the cells that are not left out; 0 if there is no other.

    With many cells and clusters, the first of the examples stand for all.
    """
    kept = _kept(cells, k).ravel()
    c, m = kept.size, min(cells.labels.shape[-1], _MOST // (kept.size * k))
    labels = cells.labels.reshape(c, -1)[:, :m]
    member = jax.nn.one_hot(labels, k)
    everyone = member.transpose(1, 0, 2).reshape(m, c * k)

    def with_others(number: Array) -> Array:
        tables = member[number].T @ everyone
        values = _rand_index(tables.reshape(k, c, k).transpose(1, 0, 2))
        others = kept & (jnp.arange(c) != number)
        return jnp.sum(jnp.where(others, values, 0)) / jnp.maximum(others.sum(), 1)

    # Several at a time, for larger products, but no more than their tables leave room for.
    values = jax.lax.map(with_others, jnp.arange(c), batch_size=_at_once(c, k))
    return values.reshape(cells.chi.shape)


def _at_once(c: int, k: int) -> int:
    """How many of c cells are compared at a time with all others, by tables [c, k, k] each."""
    return max(1, min(16, _MOST // (c * k * k)))


def comparable(cells: Cell, agreed: Float[Array, "*c"], score: Score, k: int) -> Float[Array, "*c"]:
    """The score by which cells are compared, higher is better; minus infinity for those left out.

    Those are the ones of an effective rank (6) below k / 2 and below half of the largest, and those
    without any variance.

    Args:
        cells: of a search.
        agreed: their ``consensus``.
        score: which.
        k: number of clusters.
    """
    if score == "rank":
        value = _ranks(cells.corrected) + _ranks(cells.stability) + _ranks(agreed)
    else:
        value = agreed if score == "consensus" else getattr(cells, score)
    return jnp.where(_kept(cells, k), value, -jnp.inf)


def compare(
    cells: Cell, k: int, *, score: Score, layer: int | None
) -> tuple[Float[Array, "e layers"], Float[Array, "e layers"]]:
    """``consensus`` of cells [e, layers], and what is ``comparable`` of them.

    With a layer given by its number, its cells alone; the others have a consensus of 0 and are
    left out.
    """
    if layer is None:
        agreed = consensus(cells, k)
        return agreed, comparable(cells, agreed, score, k)
    own = jax.tree.map(lambda v: v[:, layer], cells)
    agreed = consensus(own, k)
    value = comparable(own, agreed, score, k)
    return (
        jnp.zeros(cells.chi.shape).at[:, layer].set(agreed),
        jnp.full(cells.chi.shape, -jnp.inf).at[:, layer].set(value),
    )


def _kept(cells: Cell, k: int) -> Bool[Array, "*c"]:
    rank = cells.dimensions
    # Of a layer that is not a number nothing is known, but it must not leave out the others.
    return (rank > 0) & (rank >= 0.5 * jnp.minimum(k, jnp.nanmax(rank)))


def _ranks(values: Array) -> Array:
    """How many values are smaller, ties counted as half."""
    flat = values.ravel()
    less, same = flat[:, None] > flat, flat[:, None] == flat
    return (less.sum(1) + 0.5 * same.sum(1)).reshape(values.shape)


# -- searches; ``evaluate(t)`` gives any pytree for an int32 t, ``value(tree)`` its score --

Evaluate = Callable[[Int[Array, ""]], Any]


def grid(
    evaluate: Evaluate,
    value: Callable[[Any], Float[Array, " e"]],
    coarse: Int[Array, " c"],
    *,
    refine: int = 6,
) -> tuple[Int[Array, " e"], Any]:
    """Evaluate at every ``coarse`` timestep, then ``refine`` more between the best's neighbours.

    Args:
        evaluate: from a timestep to results.
        value: from stacked results [e, ...] to one score for each timestep.
        coarse: increasing timesteps.
        refine: further evaluations.

    Returns:
        Timesteps and stacked results, in the order of evaluation.
    """
    count, last = coarse.shape[0], coarse.shape[0] - 1
    lower, upper = refine // 2, refine - refine // 2
    steps = jnp.arange(1, lower + 1) / (lower + 1), jnp.arange(1, upper + 1) / (upper + 1)

    def finer(results: Any) -> Array:
        best = value(jax.tree.map(lambda v: v[:count], results)).argmax()
        below = coarse[best] - coarse[jnp.maximum(best - 1, 0)]
        above = coarse[jnp.minimum(best + 1, last)] - coarse[best]
        offsets = jnp.concatenate([-steps[0] * below, steps[1] * above])
        return coarse[best] + jnp.round(offsets).astype(coarse.dtype)

    def with_finer(timesteps: Array, results: Any) -> Array:
        return timesteps.at[count:].set(finer(results))

    # One loop for both rounds, so that ``evaluate`` is compiled once.
    def step(i: Array, carry: Any) -> Any:
        timesteps, results = carry
        timesteps = jax.lax.cond(i == count, with_finer, lambda t, _: t, timesteps, results)
        found = evaluate(timesteps[i])
        return timesteps, jax.tree.map(lambda v, new: v.at[i].set(new), results, found)

    shape = jax.eval_shape(evaluate, jax.ShapeDtypeStruct((), coarse.dtype))
    empty = jax.tree.map(lambda v: jnp.zeros((count + refine, *v.shape), v.dtype), shape)
    start = jnp.concatenate([coarse, jnp.zeros(refine, coarse.dtype)])
    return jax.lax.fori_loop(0, count + refine, step, (start, empty))


def golden_section(
    evaluate: Evaluate, value: Callable[[Any], Float[Array, ""]], low: int, high: int
) -> tuple[Int[Array, " e"], Any]:
    """Golden-section search for the largest value between two timesteps, both included.

    Right if the value has one peak; about 19 evaluations for 1,000 timesteps. Arguments and
    result as for ``grid``, but that ``value`` takes one result.
    """
    ratio = (5**0.5 - 1) / 2
    contractions = _contractions(high - low, ratio)

    def at(t: Array) -> tuple[Array, Any]:
        t = jnp.round(t).astype(jnp.int32)
        return t, evaluate(t)

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        a, b, left, right, f_left, f_right = carry
        lower = f_left >= f_right  # the peak is below `right`
        a, b = jnp.where(lower, a, left), jnp.where(lower, right, b)
        new = jnp.where(lower, b - ratio * (b - a), a + ratio * (b - a))
        seen = at(new)
        f_new = value(seen[1])
        carry = (
            a,
            b,
            jnp.where(lower, new, right),
            jnp.where(lower, left, new),
            jnp.where(lower, f_new, f_right),
            jnp.where(lower, f_left, f_new),
        )
        return carry, seen

    a, b = jnp.float32(low), jnp.float32(high)
    left, right = b - ratio * (b - a), a + ratio * (b - a)
    seen = jax.lax.map(at, jnp.stack([left, right, a, b]))
    f_left, f_right = value(_row(seen[1], 0)), value(_row(seen[1], 1))
    start = (a, b, left, right, f_left, f_right)
    _, rest = jax.lax.scan(step, start, length=contractions)
    return jax.tree.map(lambda *v: jnp.concatenate(v), seen, rest)


def ternary(
    evaluate: Evaluate, value: Callable[[Any], Float[Array, ""]], low: int, high: int
) -> tuple[Int[Array, " e"], Any]:
    """Ternary search: as ``golden_section``, less fragile under noise, about 30 evaluations."""
    contractions, width = 1, high - low
    while width > 1:
        contractions, width = contractions + 1, width - width // 3 - 1

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Any]:
        a, b = carry  # the peak is between them, or was seen already
        third = (b - a) // 3
        times = jnp.stack([a + third, b - third])
        seen = jax.lax.map(evaluate, times)
        lower = value(_row(seen, 0)) >= value(_row(seen, 1))
        return (jnp.where(lower, a, times[0] + 1), jnp.where(lower, times[1] - 1, b)), (times, seen)

    _, seen = jax.lax.scan(step, (jnp.int32(low), jnp.int32(high)), length=contractions)
    return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), seen)


def explore(
    evaluate: Callable[[Int[Array, ""]], Cell],
    coarse: Sequence[int],
    k: int,
    *,
    strategy: Strategy,
    refine: int,
    score: Score,
    layer: int | None,
) -> tuple[Int[Array, " e"], Cell]:
    """Search timesteps: all of ``coarse`` and ``refine`` more, or between the first and last.

    Args:
        evaluate: from a timestep to the cells of all layers, [layers].
        coarse: increasing timesteps; a single one is all that is tried.
        k: number of clusters.
        strategy: how to search; all but ``grid`` need a layer, and a score of single cells.
        refine: further timesteps, of ``grid`` alone.
        score: by which cells are compared.
        layer: the number of the one that may be chosen, None for any.

    Returns:
        Timesteps and their cells, [e, layers], in the order of evaluation.
    """
    if strategy == "grid" or len(coarse) == 1:
        return grid(
            evaluate,
            lambda cells: compare(cells, k, score=score, layer=layer)[1].max(-1),
            jnp.asarray(coarse),
            refine=refine if len(coarse) > 1 else 0,
        )
    return _NARROW[strategy](
        evaluate, lambda cells: getattr(cells, score)[layer], coarse[0], coarse[-1]
    )


def evaluations(coarse: Sequence[int], *, strategy: Strategy, refine: int) -> int:
    """How many timesteps ``explore`` visits."""
    if strategy == "grid" or len(coarse) == 1:
        return len(coarse) + (refine if len(coarse) > 1 else 0)
    run = jax.eval_shape(
        lambda v: _NARROW[strategy](lambda t: v, lambda f: f, coarse[0], coarse[-1])[0],
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    return run.shape[0]


_NARROW = {"golden": golden_section, "ternary": ternary}


def at_boundary(timesteps: Int[Array, " e"], best: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether the timestep with index ``best`` is the smallest or largest of several tried."""
    low, high, chosen = timesteps.min(), timesteps.max(), timesteps[best]
    return (low < high) & ((chosen == low) | (chosen == high))


def _row(results: Any, i: int) -> Any:
    return jax.tree.map(lambda v: v[i], results)


def _contractions(width: int, ratio: float) -> int:
    """How often an interval must shrink by ``ratio`` to be shorter than one timestep."""
    count = 1
    while width * ratio**count >= 1:
        count += 1
    return count
