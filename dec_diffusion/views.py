"""Random views of examples: small, label-preserving changes, as pure functions of a key.

All functions take a batch in network scale (about [-1, 1]) and return one of the same shape
and dtype; each example gets its own draw.
"""

import jax
import jax.numpy as jnp

from dec_diffusion.types import Array, Float, PRNGKeyArray


def affine(
    x: Float[Array, "b h w c"],
    key: PRNGKeyArray,
    *,
    rotate: float = 0.0,
    shift: float = 0.0,
    scale: float = 0.0,
    shear: float = 0.0,
) -> Float[Array, "b h w c"]:
    """Rotate, shift, scale and shear each image about its centre, with bilinear sampling.

    Args:
        x: images.
        key: source of the draws, which are uniform within plus or minus each bound.
        rotate: degrees.
        shift: fraction of the image size, vertically and horizontally.
        scale: relative change of size (0.1 is from 0.9 to 1.1 times).
        shear: horizontal shear per unit of height.

    Returns:
        Images of the same shape; pixels from outside repeat the border.
    """
    b, h, w, c = x.shape
    u = jax.random.uniform(key, (5, b), minval=-1.0, maxval=1.0)
    angle, zoom, slant = jnp.deg2rad(rotate) * u[0], 1.0 + scale * u[1], shear * u[2]
    rows = jnp.arange(h) - (h - 1) / 2
    cols = jnp.arange(w) - (w - 1) / 2
    grid_r, grid_c = (g[None] for g in jnp.meshgrid(rows, cols, indexing="ij"))

    def each(v: Array) -> Array:
        return v[:, None, None]

    cos, sin = each(jnp.cos(angle) / zoom), each(jnp.sin(angle) / zoom)
    r = cos * grid_r - sin * grid_c + each(shift * h * u[3]) + (h - 1) / 2
    q = sin * grid_r + cos * grid_c + each(slant) * grid_r + each(shift * w * u[4]) + (w - 1) / 2
    r, q = jnp.clip(r, 0, h - 1), jnp.clip(q, 0, w - 1)
    r0, q0 = jnp.floor(r), jnp.floor(q)
    r1, q1 = jnp.minimum(r0 + 1, h - 1), jnp.minimum(q0 + 1, w - 1)
    flat = x.reshape(b, h * w, c)

    def pick(row: Array, col: Array) -> Array:
        index = (row * w + col).astype(jnp.int32).reshape(b, h * w, 1)
        return jnp.take_along_axis(flat, index, axis=1)

    fr, fq = (r - r0).reshape(b, h * w, 1), (q - q0).reshape(b, h * w, 1)
    top = (1 - fq) * pick(r0, q0) + fq * pick(r0, q1)
    bottom = (1 - fq) * pick(r1, q0) + fq * pick(r1, q1)
    return ((1 - fr) * top + fr * bottom).reshape(x.shape).astype(x.dtype)


def flip(x: Float[Array, "b h w c"], key: PRNGKeyArray) -> Float[Array, "b h w c"]:
    """Mirror each image left to right with probability one half."""
    mirrored = jax.random.bernoulli(key, 0.5, (x.shape[0], 1, 1, 1))
    return jnp.where(mirrored, x[:, :, ::-1], x)


def noise(x: Float[Array, "b *s"], key: PRNGKeyArray, *, std: float) -> Float[Array, "b *s"]:
    """Add independent Gaussian noise of standard deviation ``std``."""
    return x + std * jax.random.normal(key, x.shape, x.dtype)
