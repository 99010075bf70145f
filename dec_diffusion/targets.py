"""Self-training targets over soft assignments, and the adaptive-neighbour graph.

Notation: features z_i with weight w_i, centres mu_c, soft assignments q_i, targets p_i, K clusters;
x_i for n points whose k nearest others, nearest first, lie at squared distances d_i(1) <= d_i(2)...

(1) assignment   q_ic = (1 + |z_i - mu_c|^2 / alpha)^(-(alpha + 1) / 2) / sum_c' (the same)
(2) target       p_ic = (q_ic^r / f_c) / sum_c' (q_ic'^r / f_c'),  f_c = sum_i w_i q_ic,  r = 2
(3) divergence   KL_i = sum_c p_ic log(p_ic / q_ic)
(4) its slope    d KL_i / d z_i = (alpha + 1) / alpha
                     sum_c (1 + |z_i - mu_c|^2 / alpha)^-1 (p_ic - q_ic) (z_i - mu_c),
                 and minus the term of c, summed over i, for mu_c; p is held fixed
(5) transport    p_ic = u_i q_ic^(1/T) v_c  with  sum_c p_ic = 1,  sum_i w_i p_ic / sum_i w_i = b_c
(6) balance      log K - H(qbar) = KL(qbar || uniform),  qbar = sum_i w_i q_i / sum_i w_i
(7) graph        s_ij = max(d_i(k+1) - d_ij, 0) / (k d_i(k+1) - sum_{h <= k} d_i(h))
(8) smoothness   1/2 sum_ij s_ij |z_i - z_j|^2 = tr(Z' L Z),  L the Laplacian of (S + S') / 2

(1) to (4) are deep embedded clustering (Xie, Girshick and Farhadi, 2016), (1) being the kernel of
t-SNE (van der Maaten and Hinton, 2008). (5) is entropic optimal transport (Cuturi, 2013), which
keeps every cluster in use. (7) minimises sum_j d_ij s_ij + gamma_i s_ij^2 over the simplex, with
gamma_i the value that leaves k neighbours (Nie, Wang and Huang, 2014).

Everything works in the dtype of the data, float32 or wider. Rows of weight 0 (padding) must be
finite and have no effect on the others. Targets and graphs carry no gradient.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dec_diffusion import kmeans, spread
from dec_diffusion.types import Array, Float, InputError, Int

# Distances closer to each other than this many units of rounding count as equal.
_TIE = 8


def mean(values: Float[Array, "b *s"], weight: Float[Array, " b"]) -> Float[Array, "*s"]:
    """The weighted mean over the first axis; 0 if there is no weight."""
    total = jnp.sum(values * weight.reshape(weight.shape + (1,) * (values.ndim - 1)), axis=0)
    return total / jnp.maximum(jnp.sum(weight), 1e-30)


def log_student_t(
    z: Float[Array, "n d"], centers: Float[Array, "k d"], *, alpha: float = 1.0
) -> Float[Array, "n k"]:
    """The logarithm of the soft assignments (1); ``alpha`` > 0 are the degrees of freedom."""
    ratio = kmeans.distances(z, centers) / alpha
    # A squared distance may overflow; such a point is as far from one centre as from another.
    ratio = jnp.minimum(ratio, jnp.finfo(ratio.dtype).max)
    return jax.nn.log_softmax(-(alpha + 1) / 2 * jnp.log1p(ratio), axis=1)


def target_distribution(
    log_q: Float[Array, "n k"], weight: Float[Array, " n"] | None = None, *, power: float = 2.0
) -> Float[Array, "n k"]:
    """The sharpened target (2), its frequencies f taken over all rows given.

    Pass the whole set: frequencies of a mini-batch give another target. ``power`` is r.
    """
    log_q = jax.lax.stop_gradient(log_q)
    frequency = jax.nn.logsumexp(log_q + _log_weight(weight, log_q), axis=0)
    return jax.nn.softmax(power * log_q - _finite(frequency), axis=1)


def sinkhorn_target(
    log_q: Float[Array, "n k"],
    weight: Float[Array, " n"] | None = None,
    *,
    iterations: int = 20,
    temperature: float = 1.0,
    prior: Float[Array, " k"] | None = None,
) -> Float[Array, "n k"]:
    """The target (5) whose clusters have the shares ``prior``, by Sinkhorn's iterations.

    ``prior`` (b, scaled to sum to 1) is uniform if None; ``temperature`` is T. Rows are normalised
    last, so they sum to 1 however few the iterations, and the shares hold in the limit.
    """
    log_q = jax.lax.stop_gradient(log_q)
    k = log_q.shape[1]
    share = jnp.ones(k, log_q.dtype) if prior is None else prior.astype(log_q.dtype)
    log_share = jnp.log(jax.lax.stop_gradient(share / jnp.sum(share)))
    kernel = log_q / temperature
    log_weight = _log_weight(weight, log_q)
    log_weight -= _finite(jax.nn.logsumexp(log_weight))

    def step(_: int, log_v: Array) -> Array:
        rows = jax.nn.log_softmax(kernel + log_v, axis=1)
        return log_v + log_share - _finite(jax.nn.logsumexp(rows + log_weight, axis=0))

    log_v = jax.lax.fori_loop(0, iterations, step, jnp.zeros_like(log_share))
    return jax.nn.softmax(kernel + log_v, axis=1)


def kl(p: Float[Array, "n k"], log_q: Float[Array, "n k"]) -> Float[Array, " n"]:
    """The divergence KL(p || q) of each row (3), in nats; clusters with p = 0 add exactly 0."""
    inside = p > 0
    ratio = jnp.log(jnp.where(inside, p, 1)) - jnp.where(inside, log_q, 0)
    return jnp.sum(p * ratio, axis=1)


def entropy(log_q: Float[Array, "n k"]) -> Float[Array, " n"]:
    """The entropy of each row, in nats."""
    return -jnp.sum(jnp.exp(log_q) * _finite(log_q), axis=1)


def balance(
    log_q: Float[Array, "n k"], weight: Float[Array, " n"] | None = None
) -> Float[Array, ""]:
    """How far the mean assignment is from uniform (6), in nats: 0 when balanced, at most log K."""
    weight = _weight(weight, log_q)
    q = jnp.exp(jnp.where(weight[:, None] > 0, log_q, 0))
    uniform = jnp.full_like(q[:1], -math.log(q.shape[1]))
    return jnp.maximum(kl(mean(q, weight)[None], uniform)[0], 0)


@functools.partial(jax.jit, static_argnames=("k", "block"))
def neighbour_graph(
    z: Float[Array, "n d"],
    k: int,
    *,
    weight: Float[Array, " n"] | None = None,
    among: tuple[Float[Array, "a d"], Int[Array, " a"]] | None = None,
    block: int = 1024,
) -> tuple[Int[Array, "n k"], Float[Array, "n k"]]:
    """The adaptive-neighbour graph (7): for each row its ``k`` nearest others and their weights.

    Neighbours come nearest first and are neither the row itself nor padding; weights fall from left
    to right and sum to 1. Where all k + 1 distances are equal the weights are 1/k. A row with no
    more than k others shares its weight equally among those there are; in place of those that are
    missing it stands itself, at weight 0.
    With ``among``, only these rows of ``z`` and their numbers, neighbours are looked for among them
    and named by their place in it; all of them have weight, and absent ones are number 0.
    ``block`` rows are compared with all others at a time, which takes O(block n) memory.

    Raises:
      InputError: ``k`` is below 1 or above n - 1.
    """
    n = z.shape[0] if among is None else among[0].shape[0]
    if not 1 <= k < n:
        raise InputError(f"neighbours = {k} for {n} examples: choose a number from 1 to {n - 1}")
    z = jax.lax.stop_gradient(z)
    valid, rows = _weight(weight, z) > 0, jnp.arange(z.shape[0])
    center = mean(z, valid.astype(z.dtype))
    y = jnp.where(valid[:, None], z - center, 0)
    if among is None:
        points, numbers, there = y, rows, valid
    else:
        points, numbers = jax.lax.stop_gradient(among[0]) - center, among[1]
        there = jnp.ones(n, bool)

    def of_rows(y: Array, row: Array, points: Array, numbers: Array, valid: Array) -> Any:
        squares = jnp.minimum(kmeans.distances(y, points), jnp.finfo(y.dtype).max)
        others = valid & (numbers != row[:, None])
        score, index = jax.lax.top_k(jnp.where(others, -squares, -jnp.inf), k + 1)
        # Products find the neighbours; differences measure them, without cancellation.
        there = score > -jnp.inf
        index = jnp.where(there, index, row[:, None] if among is None else 0)
        exact = jnp.sum((y[:, None] - points[index]) ** 2, axis=2)
        exact = jnp.where(there, exact, jnp.inf)
        exact, index = jax.lax.sort((exact, index), num_keys=1)
        return index[:, :k].astype(jnp.int32), _simplex_weights(exact)

    def of_part(y: Array, rows: Array, *whole: Array) -> tuple[Array, Array]:
        m = rows.shape[0]
        size = min(block, m)
        blocks = jnp.pad(y, ((0, -m % size), (0, 0)), mode="edge").reshape(-1, size, y.shape[1])
        numbers = jnp.pad(rows, (0, -m % size), mode="edge").reshape(-1, size)
        index, s = jax.lax.map(lambda part: of_rows(*part, *whole), (blocks, numbers))
        return index.reshape(-1, k)[:m], s.reshape(-1, k)[:m]

    # Every part needs all the points to compare its own rows with.
    return spread.over_rows(of_part, y, rows, whole=(points, numbers, there))


def graph_loss(
    z: Float[Array, "n d"],
    neighbours: Float[Array, "n k d"],
    s: Float[Array, "n k"],
    weight: Float[Array, " n"] | None = None,
) -> Float[Array, ""]:
    """The mean over rows of (8), relative to the mean squared distance between rows of ``z``.

    The divisor, twice the total variance of ``z``, is held fixed, so the loss does not depend on
    the scale of the features while its gradient still draws neighbours together. ``neighbours``
    are the features at the graph's indices; gradients pass through them unless they are cached.
    """
    weight = _weight(weight, z)
    valid = weight[:, None] > 0
    apart = jnp.where(valid[:, :, None], z[:, None] - neighbours, 0)
    rough = mean(jnp.sum(s * jnp.sum(apart * apart, axis=2), axis=1) / 2, weight)
    fixed = jax.lax.stop_gradient(z)
    centred = jnp.where(valid, fixed - mean(fixed, weight), 0)
    scale = 2 * jnp.sum(mean(centred * centred, weight))
    return rough / jnp.where(scale > 0, scale, 1)


def label_change(
    new: Int[Array, " n"], old: Int[Array, " n"], weight: Float[Array, " n"] | None = None
) -> Float[Array, ""]:
    """The share of rows, by weight, whose label differs."""
    changed = (new != old).astype(jnp.float32 if weight is None else weight.dtype)
    return mean(changed, _weight(weight, changed))


def _weight(weight: Array | None, like: Array) -> Array:
    if weight is None:
        return jnp.ones(like.shape[0], like.dtype)
    return jax.lax.stop_gradient(weight.astype(like.dtype))


def _log_weight(weight: Array | None, like: Array) -> Array:
    return jnp.log(_weight(weight, like))[:, None]


def _finite(log: Array) -> Array:
    """``log`` with 0 for minus infinity: a factor that is absent instead of a 0 to divide by."""
    return jnp.where(log > -jnp.inf, log, 0)


def _simplex_weights(squares: Array) -> Array:
    """The weights (7) [b, k] from squared distances [b, k + 1], ascending, infinite if absent."""
    near, far = squares[:, :-1], squares[:, -1:]
    k = near.shape[1]
    gap = jnp.where(jnp.isfinite(far), far - near, 0)
    total = jnp.sum(gap, axis=1, keepdims=True)
    tie = total <= _TIE * k * jnp.finfo(squares.dtype).eps * far
    there = jnp.isfinite(near).astype(squares.dtype)
    equal = there / jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1)
    return jnp.where(tie, equal, gap / jnp.where(tie, 1, total))
