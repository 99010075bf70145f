"""Features of a denoiser's layers, the same for an example whatever batch it is in.

(1)  x_t = alpha_t x + sigma_t eps,  h_l(x, t) the activation of layer l on x_t
(2)  averaged over fixed draws of eps, in antithetic pairs (eps, -eps) that cancel the first order
     of the noise; the same draws for every example, layer and timestep, so that differences
     between cells, and between examples, are not those of the noise
(3)  a map is averaged to at most 4 x 4, either side by itself, and flattened: where something is
     matters

Sources: (1) Ho et al. 2020; that a global average instead of (3) can hide all groups was measured
for this package (docs/diec.md), as (2) was.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from dec_diffusion import schedule, spread
from dec_diffusion.method import DataSpec
from dec_diffusion.networks import Network, diffusers
from dec_diffusion.networks.layers import average_pool, pad_to_multiple
from dec_diffusion.schedule import Prediction, Schedule
from dec_diffusion.types import Array, Float, InputError, Int, Params, PRNGKeyArray

Pool = Literal["layout", "average"]
"""Equation (3), or one average for the whole map."""

_POOLED = 4  # pixels a side
_THUMBNAIL = 14


class Denoiser(NamedTuple):
    """A denoising network and the noise it knows.

    Attributes:
        network: ``apply(params, x_t, log_snr, features=...)``.
        grid: its schedule.
        prediction: what it returns.
    """

    network: Network
    grid: Schedule
    prediction: Prediction


class Features(NamedTuple):
    """How features are made.

    Attributes:
        denoiser: whose activations.
        shape: of one example.
        layers: their names, in the order of the network.
        width: the longest pooled features; shorter ones are padded with zeros.
        pool: how maps become vectors.
        draws: of noise, an even number.
    """

    denoiser: Denoiser
    shape: tuple[int, ...]
    layers: tuple[str, ...]
    width: int
    pool: Pool
    draws: int


def describe(denoiser: Denoiser, shape: tuple[int, ...], *, pool: Pool, draws: int) -> Features:
    """The features of all layers of a denoiser for examples of ``shape``; computes nothing."""
    names: list[str] = []

    def run(key: PRNGKeyArray, x: Array) -> Any:
        params = denoiser.network.init(key, x, jnp.zeros(1))
        named = denoiser.network.apply(params, x, jnp.zeros(1), features=True)[1]
        names.extend(named)  # what eval_shape returns has its keys sorted
        return {name: pooled(h, pool) for name, h in named.items()}

    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    found = jax.eval_shape(run, jax.eval_shape(lambda: jax.random.key(0)), x)
    width = max(h.shape[1] for h in found.values())
    return Features(denoiser, shape, tuple(names), width, pool, draws)


def without_latent(
    network: Network, latent: int, grid: Schedule, prediction: Prediction
) -> Denoiser:
    """A denoiser that is given a latent, as it is where the latent is left out."""

    def none(x: Array) -> tuple[Array, Array]:
        return jnp.zeros((x.shape[0], latent)), jnp.zeros(x.shape[0])

    return Denoiser(
        Network(
            lambda key, x, log_snr: network.init(key, x, log_snr, *none(x)),
            lambda params, x, log_snr, **options: network.apply(
                params, x, log_snr, *none(x), **options
            ),
        ),
        grid,
        prediction,
    )


def pooled(h: Float[Array, "b ..."], pool: Pool) -> Float[Array, "b d"]:
    """A feature map as one vector: at most 4 x 4 averages, or one; vectors stay as they are."""
    if h.ndim == 2:
        return h
    if pool == "average":
        return h.mean((1, 2))
    # For either side its own: of a long map, one for both would leave little of the short side.
    factors = -(-h.shape[1] // _POOLED), -(-h.shape[2] // _POOLED)
    h = average_pool(pad_to_multiple(h, factors), factors)
    return h.reshape(h.shape[0], -1)


def all_layers(
    f: Features, params: Params, x_t: Float[Array, "b *s"], log_snr: Float[Array, " b"]
) -> tuple[Float[Array, "b *s"], Float[Array, "l b w"]]:
    """The denoiser's prediction, and the pooled features of every layer, by one call."""
    out, named = f.denoiser.network.apply(params, x_t, log_snr, features=True)
    flat = [pooled(named[name].astype(jnp.float32), f.pool) for name in f.layers]
    return out, jnp.stack([jnp.pad(h, ((0, 0), (0, f.width - h.shape[1]))) for h in flat])


def fixed_noise(f: Features) -> Float[Array, "draws *s"]:
    """The draws of equation (2), pair by pair."""
    half = jax.random.normal(jax.random.key(0), (f.draws // 2, *f.shape))
    return jnp.stack([half, -half], 1).reshape(f.draws, *f.shape)


def halves(
    f: Features,
    params: Params,
    x: Float[Array, "b *s"],
    timestep: Int[Array, ""],
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "2 ... b w"]:
    """Equation (2), averaged over either half of the draws, of all layers or of one.

    Returns:
        [2, layers, b, w], or [2, b, w] where a layer is given by its number.
    """
    eps = fixed_noise(f)[:, None]
    log_snr = f.denoiser.grid.log_snr[timestep]
    x_t = schedule.add_noise(x[None], eps, log_snr).reshape(-1, *x.shape[1:])
    h = all_layers(f, params, x_t, jnp.full(x_t.shape[0], log_snr))[1]
    h = h.reshape(h.shape[0], 2, f.draws // 2, x.shape[0], f.width).mean(2)
    return h.swapaxes(0, 1) if layer is None else h[layer]


def sketches(
    f: Features, params: Params, x: Float[Array, "b *s"], timestep: Int[Array, ""], size: int
) -> Float[Array, "layers b size"]:
    """Equation (2) of all layers, each along ``size`` fixed random directions.

    Distances are kept up to a relative error of about sqrt(2 / size) (Johnson and Lindenstrauss
    1984), by numbers few enough to be kept of every example until principal axes are found.
    """
    h = halves(f, params, x, timestep).mean(0)
    directions = jax.random.normal(jax.random.key(1), (len(f.layers), f.width, size))
    # Accelerators multiply float32 matrices in a shorter format unless told otherwise.
    return jnp.matmul(h, directions * size**-0.5, precision="highest")


def in_blocks(
    function: Callable[[Array], Array], x: Float[Array, "n *s"], *, size: int = 256
) -> Float[Array, "... n w"]:
    """``function`` [b, ...] -> [..., b, w] applied to blocks of examples, to bound memory.

    Examples that are spread over devices stay there.
    """

    def of_part(x: Array) -> Array:
        m = x.shape[0]
        b = min(size, m)
        blocks = jnp.pad(x, ((0, -m % b), *[(0, 0)] * (x.ndim - 1)))
        out = jax.lax.map(function, blocks.reshape(-1, b, *x.shape[1:]))
        out = jnp.moveaxis(out, -2, 1)  # [blocks, b, ..., w]
        return out.reshape(-1, *out.shape[2:])[:m]

    return jnp.moveaxis(spread.over_rows(of_part, x), 0, -2)


def thumbnails(x: Float[Array, "b *s"]) -> Float[Array, "b d"]:
    """What tells how alike examples look: vectors as they are, images as small ones.

    An image is smoothed and shrunk to at most 14 pixels a side, its mean taken away and its
    length made 1, so that squared distances are 2 - 2 times the correlation. Of the five nearest
    neighbours more are of the same class than by pixels (docs/neural_mixture.md).
    """
    if x.ndim != 4:
        return x.reshape(x.shape[0], -1)
    height, width = (min(side, _THUMBNAIL) for side in x.shape[1:3])
    small = jax.image.resize(x, (x.shape[0], height, width, x.shape[3]), "linear")
    small = small.reshape(x.shape[0], -1)
    small -= small.mean(1, keepdims=True)
    # What rounding leaves of an image of one colour is no direction.
    return small * jax.lax.rsqrt(jnp.sum(jnp.square(small), 1, keepdims=True) + 1e-6)


def imported(architecture: Mapping[str, Any], spec: DataSpec) -> Denoiser:
    """An imported network as a function of the log-SNR.

    Raises:
        InputError: it cannot take examples of this shape, or was trained on others than [-1, 1].
    """
    channels, levels = architecture["in_channels"], len(architecture["down_block_types"])
    sizes, multiple = spec.shape[:-1], 2 ** (levels - 1)
    if not spec.is_image or spec.shape[-1] != channels or any(v % multiple for v in sizes):
        raise InputError(
            f"--config.pretrained: takes images of {channels} channels and sides that are "
            f"multiples of {multiple}, these have shape {spec.shape}; --config.data.size resizes "
            "folders of images"
        )
    if architecture["center_input_sample"]:
        # Noise was then added to images of half the contrast: other levels, another mean.
        raise InputError(
            "--config.pretrained: was trained on images in [0, 1] (center_input_sample), which is "
            "not supported; choose a model of images in [-1, 1], as most are"
        )
    network = diffusers.network(architecture)
    grid = jnp.asarray(diffusers.log_snr_grid(architecture), jnp.float32)

    def apply(params: Params, x_t: Array, log_snr: Array, **options: Any) -> Any:
        timestep = jnp.interp(-log_snr, -grid, jnp.arange(grid.shape[0], dtype=jnp.float32))
        return network.apply(params, x_t, timestep, **options)

    names: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
    prediction = names[architecture["scheduler"]["prediction_type"]]
    return Denoiser(Network(network.init, apply), Schedule(grid), prediction)
