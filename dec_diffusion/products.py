"""The sums of an E-step over diagonal Gaussians, as matrix products over blocks of rows.

Letters as in ``gmm``. With r the mean of the components' means, y = m - r and e_c = mu_c - r:

(1)  l_c = b_c - 1/2 sum_j (y_j^2 + v_j) / s_cj + sum_j y_j e_cj / s_cj
     b_c = log pi_c - 1/2 sum_j [ log 2 pi s_cj + e_cj^2 / s_cj ]
(2)  A_c = sum_i w_i g*_ic y_i,   B_c = sum_i w_i g*_ic (y_i^2 + v_i)
(3)  moments about mu_c:  A_c - N_c e_c,   B_c - 2 e_c A_c + N_c e_c^2
(4)  kappa = max_c sum_j e_cj^2 / s_cj

(1) and (2) are products with y^2 + v and with y, which takes a sixth of the time of differences to
every mean. What is made of a block of rows stays in the cache. The price is cancellation: near
mu_c the terms of (1) are of size kappa, so that l_c is wrong by about eps kappa nats, and variances
(3) by less than eps kappa of themselves. ``holds`` says whether that matters.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dec_diffusion import spread
from dec_diffusion.types import Array, Float, Shaped

# Accelerators multiply float32 matrices in a shorter format unless told otherwise.
_matmul = functools.partial(jnp.matmul, precision="highest")
_WORST = 5e-4
"""Nats by which cancellation may falsify a log density."""
_CACHED = 2**18
"""Elements of a block's features and responsibilities that a CPU's cache holds."""

Sums = tuple[Float[Array, " k"], Float[Array, "k d"], Float[Array, "k d"], Float[Array, ""]]
"""Counts, first and second moments about the means, and the log-likelihood."""


def holds(means: Float[Array, "k d"], variances: Float[Array, "k d"]) -> Shaped[Array, ""]:
    """Whether ``sums`` is accurate for these components, by (4)."""
    kappa = jnp.max(jnp.sum((means - jnp.mean(means, axis=0)) ** 2 / variances, axis=1))
    return kappa * jnp.finfo(means.dtype).eps < _WORST


def sums(
    log_weights: Float[Array, " k"],
    means: Float[Array, "k d"],
    variances: Float[Array, "k d"],
    x: Float[Array, "n d"],
    own: Float[Array, "n d"] | None,
    weight: Float[Array, " n"],
) -> Sums:
    """What an E-step adds up over the examples; ``own`` are their variances v, None for points.

    Rows that are spread over devices stay where they are.
    """
    reference = jnp.mean(means, axis=0)
    offset, precision = means - reference, 1 / variances
    logs = jnp.log(2 * math.pi * variances) + offset**2 * precision
    factors = offset * precision, -0.5 * precision, log_weights - 0.5 * jnp.sum(logs, axis=1)

    def of_part(rows: tuple[Array, ...], whole: tuple[Any, Any]) -> tuple[Array, ...]:
        parts = _over_blocks(rows, *whole)
        return jax.tree.map(lambda part: part[None], parts)

    rows = (x, weight) if own is None else (x, weight, own)
    parts = spread.over_rows(of_part, rows, whole=((reference, factors),))
    count, first, second, log_likelihood = (jnp.sum(part, axis=0) for part in parts)
    count_of = count[:, None]
    second = second - 2 * offset * first + count_of * offset**2
    return count, first - count_of * offset, second, log_likelihood


def _over_blocks(
    rows: tuple[Array, ...], reference: Array, factors: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array, Array]:
    n, (k, d) = rows[0].shape[0], factors[0].shape
    # Elsewhere than on a CPU there is no cache to fit, and every block costs its launches.
    limit = _CACHED if jax.default_backend() == "cpu" else 2**9 * _CACHED
    # Rows spread over devices that could not be kept apart must not be cut either.
    blocks = 1 if spread.parts() > 1 else -(-n * (2 * d + k) // limit)
    size = -(-n // blocks)

    def add(total: Sums, number: Array) -> tuple[Sums, None]:
        # The last block begins early enough to be full; rows seen before count no more.
        start = jnp.minimum(number * size, n - size)
        block = [jax.lax.dynamic_slice_in_dim(part, start, size) for part in rows]
        fresh = start + jnp.arange(size) >= number * size
        block[1] = jnp.where(fresh, block[1], 0)
        return jax.tree.map(jnp.add, total, _block(block, reference, factors)), None

    if blocks == 1:
        return _block(rows, reference, factors)
    shapes = (k,), (k, d), (k, d), ()
    zero: Any = tuple(jnp.zeros(shape, rows[0].dtype) for shape in shapes)
    # Two blocks at a time, for what is not a product runs on one core each.
    return jax.lax.scan(add, zero, jnp.arange(blocks), unroll=2)[0]


def _block(
    rows: list[Array] | tuple[Array, ...], reference: Array, factors: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array, Array]:
    linear, square, bias = factors
    x, weight, *own = rows
    y = x - reference
    squares = y * y + own[0] if own else y * y
    joint = _matmul(linear, y.T) + _matmul(square, squares.T) + bias[:, None]
    top = jnp.max(joint, axis=0)
    resp = jnp.exp(joint - top)
    total = jnp.sum(resp, axis=0)
    resp = resp * (weight / total)
    log_likelihood = jnp.sum(weight * (top + jnp.log(total)))
    return jnp.sum(resp, axis=1), _matmul(resp, y), _matmul(resp, squares), log_likelihood
