"""Features to few dimensions: principal axes, whitened or not, and rows of one length.

Source: subspace iteration after Halko et al. 2011, "Finding structure with randomness".
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dec_diffusion.types import Array, Float, PRNGKeyArray, pytree

# Accelerators multiply float32 matrices in a shorter format unless told otherwise.
_matmul = functools.partial(jnp.matmul, precision="highest")
_OVERSAMPLE = 8  # axes of the random subspace beyond those asked for


@pytree
class Projection:
    """Principal axes: ``(x - mean) @ axes`` has the variances ``variance``, largest first."""

    mean: Float[Array, " D"]
    axes: Float[Array, "D d"]
    variance: Float[Array, " d"]


def principal(
    key: PRNGKeyArray, x: Float[Array, "m D"], dims: int, *, iterations: int = 4
) -> Projection:
    """The first ``dims`` principal axes of ``x``, by randomised subspace iteration.

    Costs 4 m D (dims + 8) operations an iteration, where an exact decomposition would take D^3.
    Axes without variance, and those beyond the columns of ``x`` if ``dims`` is more, are zero.
    """
    m, width = x.shape
    mean = x.mean(0)
    mean += (x - mean).mean(0)  # the rounding of a long sum
    centred = x - mean
    size = min(width, dims + _OVERSAMPLE)

    def power(_: Any, basis: Array) -> Array:
        return jnp.linalg.qr(_matmul(centred.T, _matmul(centred, basis)))[0]

    start = jnp.linalg.qr(jax.random.normal(key, (width, size), x.dtype))[0]
    basis = jax.lax.fori_loop(0, iterations, power, start)
    inside = _matmul(centred, basis)
    variance, turn = jnp.linalg.eigh(_matmul(inside.T, inside) / m)
    # The mean is rounded, so that even constants seem to vary.
    some = variance > jnp.square(8 * jnp.finfo(x.dtype).eps * jnp.linalg.norm(mean))
    axes = jnp.where(some, _matmul(basis, turn), 0.0)[:, ::-1]
    variance = jnp.where(some, variance, 0.0)[::-1]
    missing = max(0, dims - size)
    return Projection(
        mean,
        jnp.pad(axes[:, :dims], ((0, 0), (0, missing))),
        jnp.pad(variance[:dims], (0, missing)),
    )


def whiten(projection: Projection) -> Projection:
    """The same with axes scaled so that variances are 1; those without any variance go to 0."""
    variance = projection.variance
    some = variance > 1e-6 * variance[0]
    scale = jnp.where(some, jax.lax.rsqrt(jnp.where(some, variance, 1.0)), 0.0)
    return Projection(projection.mean, projection.axes * scale, some.astype(variance.dtype))


def project(
    projection: Projection, x: Float[Array, "... D"], *, unit: bool = False
) -> Float[Array, "... d"]:
    """Coordinates along the axes; with ``unit`` every row is scaled to the length sqrt(d)."""
    coordinates = _matmul(x - projection.mean, projection.axes)
    return same_length(coordinates) if unit else coordinates


def same_length(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Every row scaled to a mean square of 1, so that only its direction counts."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-12)


def effective_rank(variance: Float[Array, " d"]) -> Float[Array, ""]:
    """(sum variance)^2 / sum variance^2, between 1 and d; 0 if there is no variance at all."""
    return jnp.square(variance.sum()) / jnp.maximum(jnp.square(variance).sum(), 1e-30)
