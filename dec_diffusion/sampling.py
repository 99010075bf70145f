"""Samplers: from noise to data along a grid of noise levels, as one ``lax.scan``.

Letters as in ``schedule``: log-SNR ``l``, ``abar = sigmoid(l)``, step ``s`` less noisy than
step ``t``, ``c = 1 - e^(l_t - l_s)``; ``x0^`` is the denoiser's estimate of x0 given x_t, and n is
fresh standard normal noise.

(1)  DDPM:  x_s = E[x_s | x_t, x0 = x0^] + sqrt(V) n,  V the variance of that posterior,
     V = sigma_s^2 c, or that of the forward step, V = 1 - abar_t / abar_s
(2)  DDIM:  x_s = alpha_s x0^ + sigma_s sqrt(1 - eta^2 c) eps^ + eta sigma_s sqrt(c) n
     with  eps^ = (x_t - alpha_t x0^) / sigma_t
(3)  guidance:  x0^ = (1 + w) x0^(conditional) - w x0^(unconditional)

The grid is followed by clean data, ``l_s`` = infinity, where both steps reduce to x_s = x0^. So
a grid of ``steps`` levels costs ``steps`` denoiser calls, traced once, and the result is the
last estimate itself, free of noise. With ``eta = 1``, (2) is (1) with the posterior's variance.

Sources: (1) Ho et al. 2020, "Denoising Diffusion Probabilistic Models"; (2) Song et al. 2021,
"Denoising Diffusion Implicit Models"; (3) Ho and Salimans 2022, "Classifier-Free Diffusion
Guidance", there for eps, which for a given x_t is the same.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dec_diffusion.schedule import Schedule, alpha_sigma, forward_variance, posterior, to_eps
from dec_diffusion.types import Array, Float, InputError, PRNGKeyArray, Shaped

Denoise = Callable[[Float[Array, "b ..."], Float[Array, " b"]], Float[Array, "b ..."]]
"""``(x_t, log_snr) -> x0_hat``: the estimate of clean data from noisy data."""

Variance = Literal["posterior", "forward"]
"""Which variance a DDPM step adds, equation (1)."""

_Transition = Callable[[Array, Array, Array, Array], tuple[Array, Array | None]]
"""``(x0_hat, x_t, log_snr_s, log_snr_t) -> (mean, standard deviation or None)`` of x_s."""


_PART = 256
"""Examples that are drawn at once: the denoiser's activations of more would fill a memory."""


def in_parts(
    function: Callable[[PRNGKeyArray, Array], Array], key: PRNGKeyArray, rows: Shaped[Array, "b *s"]
) -> Array:
    """``function(key, rows)`` [b, ...], of many rows part by part, each with a key of its own."""
    n = rows.shape[0]
    parts = -(-n // _PART)
    if parts == 1:
        return function(key, rows)
    size = -(-n // parts)
    filled = jnp.pad(rows, [(0, parts * size - n)] + [(0, 0)] * (rows.ndim - 1), mode="edge")
    cut = filled.reshape(parts, size, *rows.shape[1:])
    found = jax.lax.map(lambda part: function(*part), (jax.random.split(key, parts), cut))
    return found.reshape(-1, *found.shape[2:])[:n]


def subsample(schedule: Schedule, steps: int, *, first: int = 0) -> Float[Array, " steps"]:
    """A grid of ``steps`` noise levels, evenly spaced in step index, noisiest first.

    Both ends of ``first .. t-1`` are included; a single step is the noisiest. Raises InputError
    unless ``1 <= steps <= t - first``.
    """
    available = schedule.log_snr.shape[0] - first
    if not 0 <= first < schedule.log_snr.shape[0]:
        raise InputError(f"first is {first}: choose a step of the schedule, from 0")
    if not 1 <= steps <= available:
        raise InputError(f"steps is {steps}: choose 1 to {available}, what the schedule has")
    index = np.round(np.linspace(first + available - 1, first, steps)).astype(np.int32)
    return schedule.log_snr[index]


def ddpm(
    denoise: Denoise,
    log_snr_grid: Float[Array, " steps"],
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    *,
    variance: Variance = "posterior",
    clip: float | Array | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b ..."]:
    """Draw ``shape`` [b, ...] samples by ancestral sampling, equation (1).

    Args:
      denoise: the estimate of x0; called once per level, with log_snr [b] all equal.
      log_snr_grid: finite noise levels in any order (``subsample`` makes one); visited from the
        noisiest. Sampling starts from N(0, I) there, which is exact only at zero SNR. Where
        x_t has no signal a network that predicts eps cannot tell x0: predict v or x0.
      key: randomness of the start and of every step.
      shape: batch axis first.
      variance: 'posterior' is exact for data at a single point, 'forward' (the wider; beta_t on
        a full grid, as in the ClusterDDPM code) for data ~ N(0, I); on fine grids they agree.
      clip: bound x0_hat to ``[-clip, clip]`` before each use; one for all, or one for each value.
      dtype: of the samples, and of the x_t that ``denoise`` sees.

    Raises InputError for an unknown ``variance`` or a grid that is not one non-empty axis.
    """
    if variance not in ("posterior", "forward"):
        raise InputError(f"variance is {variance!r}: choose 'posterior' or 'forward'")

    def transition(x0: Array, x_t: Array, s: Array, t: Array) -> tuple[Array, Array]:
        mean, var = posterior(x0, x_t, s, t)
        if variance == "forward":
            var = jnp.where(jnp.isinf(s), 0.0, forward_variance(s, t))
        return mean, jnp.sqrt(var)

    return _reverse(transition, denoise, log_snr_grid, key, shape, clip=clip, dtype=dtype)


def ddim(
    denoise: Denoise,
    log_snr_grid: Float[Array, " steps"],
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    *,
    eta: float = 0.0,
    clip: float | Array | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b ..."]:
    """Draw ``shape`` [b, ...] samples by DDIM, equation (2); arguments as for ``ddpm``.

    ``eta`` in [0, 1] scales the fresh noise. At 0 only the start is random, so nearby starts
    give nearby samples; at 1 this is ``ddpm``. Raises InputError for an ``eta`` outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta is {eta}: choose a value from 0 to 1")

    def transition(x0: Array, x_t: Array, s: Array, t: Array) -> tuple[Array, Array | None]:
        alpha_s, sigma_s = alpha_sigma(s)
        fresh = -(eta**2) * jnp.expm1(t - s)
        eps = to_eps(x0, x_t, t, prediction="x0")
        mean = alpha_s * x0 + sigma_s * jnp.sqrt(1 - fresh) * eps
        return mean, sigma_s * jnp.sqrt(fresh) if eta > 0 else None

    return _reverse(transition, denoise, log_snr_grid, key, shape, clip=clip, dtype=dtype)


def guide(
    denoise_conditional: Denoise, denoise_unconditional: Denoise, weight: float | Array
) -> Denoise:
    """Classifier-free guidance, equation (3), with ``weight`` w.

    ``weight`` 0 is plain conditional sampling; as a Python number it also spares the
    unconditional call. Larger weights give purer and less varied samples.
    """
    if isinstance(weight, int | float) and weight == 0:
        return denoise_conditional

    def guided(x_t: Float[Array, "b ..."], log_snr: Float[Array, " b"]) -> Float[Array, "b ..."]:
        conditional = denoise_conditional(x_t, log_snr)
        unconditional = denoise_unconditional(x_t, log_snr)
        return (1 + weight) * conditional - weight * unconditional

    return guided


def _reverse(
    transition: _Transition,
    denoise: Denoise,
    log_snr_grid: Float[Array, " steps"],
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    *,
    clip: float | Array | None,
    dtype: DTypeLike,
) -> Float[Array, "b ..."]:
    if log_snr_grid.ndim != 1 or log_snr_grid.shape[0] == 0:
        raise InputError(f"log_snr_grid has shape {log_snr_grid.shape}: give one or more levels")
    grid = jnp.sort(log_snr_grid)
    after = jnp.append(grid[1:], jnp.inf)
    start_key, step_key = jax.random.split(key)

    def step(x_t: Array, levels: tuple[Array, Array, Array]) -> tuple[Array, None]:
        t, s, noise_key = levels
        x0 = denoise(x_t, jnp.full(shape[:1], t))
        if clip is not None:
            x0 = jnp.clip(x0, -clip, clip)
        x_s, std = transition(x0, x_t, s, t)
        if std is not None:
            x_s = x_s + std * jax.random.normal(noise_key, shape, dtype)
        return x_s.astype(dtype), None

    start = jax.random.normal(start_key, shape, dtype)
    keys = jax.random.split(step_key, grid.shape[0])
    return jax.lax.scan(step, start, (grid, after, keys))[0]
