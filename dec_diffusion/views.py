"""Random views of examples: small, label-preserving changes, as pure functions of a key.

All functions take a batch in network scale (about [-1, 1]) and return one of the same shape
and dtype; each example gets its own draw. ``apply`` composes them as a ``View`` says.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dec_diffusion.types import Array, Float, PRNGKeyArray

_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601


@dataclasses.dataclass
class View:
    """Bounds of a random view; 0 switches a change off, and the default changes nothing.

    Attributes:
        rotate: degrees to either side.
        shift: fraction of the image size.
        scale: relative change of size.
        shear: horizontal shear per unit of height.
        crop: the largest share of the area that a crop cuts away, below 1.
        flip: whether images may be mirrored left to right.
        jitter: relative change of brightness, contrast and saturation; hue turns by a quarter
            of it (0.4 is 0.1 of the colour circle).
        jitter_probability: share of images whose colours are changed at all.
        grey: share of colour images that lose their colour.
        noise: standard deviation of Gaussian noise, the only change that vectors know.
    """

    rotate: float = 0.0
    shift: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    crop: float = 0.0
    flip: bool = False
    jitter: float = 0.0
    jitter_probability: float = 0.8
    grey: float = 0.0
    noise: float = 0.0


def apply(x: Float[Array, "b *s"], key: PRNGKeyArray, view: View) -> Float[Array, "b *s"]:
    """One random view of each example, leaving out what has no meaning for this kind of data.

    Images [b, h, w, c] are moved, cropped and mirrored, then their colours are changed (of
    images without three channels only brightness and contrast); noise comes last. Vectors
    [b, d] only get noise.
    """
    affine_key, flip_key, noise_key = jax.random.split(key, 3)
    crop_key, colour_key, grey_key = jax.random.split(jax.random.fold_in(flip_key, 1), 3)
    if x.ndim == 4:
        if any((view.rotate, view.shift, view.scale, view.shear)):
            x = affine(
                x,
                affine_key,
                rotate=view.rotate,
                shift=view.shift,
                scale=view.scale,
                shear=view.shear,
            )
        if view.crop:
            x = crop(x, crop_key, min_area=1.0 - view.crop)
        if view.flip:
            x = flip(x, flip_key)
        if view.jitter:
            x = colour(
                x,
                colour_key,
                brightness=view.jitter,
                contrast=view.jitter,
                saturation=view.jitter,
                hue=view.jitter / 4,
                probability=view.jitter_probability,
            )
        if view.grey:
            x = grey(x, grey_key, probability=view.grey)
    return noise(x, noise_key, std=view.noise) if view.noise else x


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
    b, h, w, _ = x.shape
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
    return _bilinear(x, r, q)


def crop(
    x: Float[Array, "b h w c"], key: PRNGKeyArray, *, min_area: float, aspect: float = 4 / 3
) -> Float[Array, "b h w c"]:
    """Cut a random rectangle out of each image and enlarge it to the image's size, bilinearly.

    Args:
        x: images.
        key: source of the draws.
        min_area: the rectangle's least share of the image's area, in (0, 1]; shares are uniform
            from there to 1, and 1 changes nothing.
        aspect: the largest ratio of the rectangle's relative height and width, log-uniform; less
            where the rectangle would not fit into the image.
    """
    b, h, w, _ = x.shape
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    area = jax.random.uniform(area_key, (b,), minval=min_area, maxval=1.0)
    reach = jnp.minimum(jnp.log(aspect), -jnp.log(area))
    ratio = jnp.exp(reach * jax.random.uniform(ratio_key, (b,), minval=-1.0, maxval=1.0))
    height, width = jnp.sqrt(area * ratio), jnp.sqrt(area / ratio)
    place = jax.random.uniform(place_key, (2, b))

    def coordinates(part: Array, place: Array, size: int) -> Array:
        start = (1.0 - part) * place * size
        return start[:, None] + (jnp.arange(size) + 0.5) * part[:, None] - 0.5

    r = coordinates(height, place[0], h)[:, :, None]
    q = coordinates(width, place[1], w)[:, None, :]
    return _bilinear(x, jnp.broadcast_to(r, (b, h, w)), jnp.broadcast_to(q, (b, h, w)))


def _bilinear(
    x: Float[Array, "b h w c"], r: Float[Array, "b h w"], q: Float[Array, "b h w"]
) -> Float[Array, "b h w c"]:
    """Read each image at fractional rows ``r`` and columns ``q``; outside, the border repeats."""
    b, h, w, c = x.shape
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


def colour(
    x: Float[Array, "b h w c"],
    key: PRNGKeyArray,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    probability: float = 1.0,
) -> Float[Array, "b h w c"]:
    """Change brightness, contrast, saturation and hue, in this order, within [-1, 1].

    Args:
        x: images; those without three channels have no saturation and no hue to change.
        key: source of the draws.
        brightness: values, counted from black (-1), are multiplied by a factor uniform in
            1 plus or minus this (never negative), and clipped.
        contrast: the same about the image's mean luminance.
        saturation: the same about each pixel's luminance.
        hue: turn of the colour circle, uniform in plus or minus this; 0.5 is half a turn.
        probability: share of images that are changed at all.
    """
    b, c = x.shape[0], x.shape[-1]
    factor_key, hue_key, choice_key = jax.random.split(key, 3)
    u = jax.random.uniform(factor_key, (3, b, 1, 1, 1), minval=-1.0, maxval=1.0)
    bounds = jnp.array([brightness, contrast, saturation])
    factors = jnp.maximum(1.0 + bounds[:, None, None, None, None] * u, 0.0)
    y = 0.5 * (x.astype(jnp.float32) + 1.0)
    y = jnp.clip(factors[0] * y, 0.0, 1.0)
    middle = _luminance(y).mean((1, 2, 3), keepdims=True)
    y = jnp.clip(middle + factors[1] * (y - middle), 0.0, 1.0)
    if c == 3:
        middle = _luminance(y)
        y = jnp.clip(middle + factors[2] * (y - middle), 0.0, 1.0)
        if hue:
            y = _turn_hue(y, hue * jax.random.uniform(hue_key, (b, 1, 1), minval=-1.0, maxval=1.0))
    chosen = jax.random.bernoulli(choice_key, probability, (b, 1, 1, 1))
    return jnp.where(chosen, (2.0 * y - 1.0).astype(x.dtype), x)


def grey(
    x: Float[Array, "b h w c"], key: PRNGKeyArray, *, probability: float
) -> Float[Array, "b h w c"]:
    """Give all three channels the luminance, for this share of images; others stay as they are."""
    if x.shape[-1] != 3:
        return x
    chosen = jax.random.bernoulli(key, probability, (x.shape[0], 1, 1, 1))
    return jnp.where(chosen, _luminance(x).astype(x.dtype), x)


def _luminance(x: Float[Array, "b h w c"]) -> Float[Array, "b h w 1"]:
    """Weighted mean of red, green and blue; of other numbers of channels the plain mean."""
    if x.shape[-1] != 3:
        return x.mean(-1, keepdims=True)
    return jnp.sum(x * jnp.array(_LUMA), axis=-1, keepdims=True)


def _turn_hue(y: Float[Array, "b h w 3"], turn: Float[Array, "b 1 1"]) -> Float[Array, "b h w 3"]:
    """Turn the hue of colours in [0, 1] by a fraction of the circle, at fixed HSV otherwise."""
    red, green, blue = y[..., 0], y[..., 1], y[..., 2]
    value, chroma = y.max(-1), y.max(-1) - y.min(-1)
    safe = jnp.where(chroma > 0, chroma, 1.0)
    # In sixths of the circle: red is 0, green 2, blue 4.
    sector = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    k = (jnp.array([5.0, 3.0, 1.0]) + (sector + 6.0 * turn)[..., None]) % 6.0
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)


def noise(x: Float[Array, "b *s"], key: PRNGKeyArray, *, std: float) -> Float[Array, "b *s"]:
    """Add independent Gaussian noise of standard deviation ``std``."""
    return x + std * jax.random.normal(key, x.shape, x.dtype)
