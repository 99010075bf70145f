"""Noise schedules, the forward process, its posterior, and the weights of its bound.

Noise is measured by the log signal-to-noise ratio ``l``, and a schedule is a grid of it. Step
``s`` is less noisy than step ``t``, so ``l_s > l_t``.

(1)  abar = sigmoid(l),  alpha = sqrt(abar),  sigma = sqrt(1 - abar) = sqrt(sigmoid(-l))
(2)  q(x_t | x0) = N(alpha x0, sigma^2 I),  that is  x_t = alpha x0 + sigma eps
(3)  v = alpha eps - sigma x0,  hence  x0 = alpha x_t - sigma v  and  eps = sigma x_t + alpha v
(4)  |eps error|^2 = e^l |x0 error|^2,  |v error|^2 = (1 + e^l) |x0 error|^2
(5)  q(x_t | x_s) = N((alpha_t / alpha_s) x_s, beta_ts I),  beta_ts = 1 - abar_t / abar_s
(6)  q(x_s | x_t, x0) = N(r x_t + alpha_s c x0, sigma_s^2 c I)  with  c = 1 - e^(l_t - l_s),
     r = (alpha_t / alpha_s) (sigma_s / sigma_t)^2
(7)  -log p(x0) <= const + sum_t w_t E|eps error|^2,  w_t = beta_t / (2 (1 - beta_t) sigma_t^2)
(8)  hence, with every w_t replaced by their mean, the bound plus a KL term is proportional to
     mean_t E|eps error|^2 + KL / sum_t w_t

Sources: (1, 2, 5, 7) Ho et al. 2020, "Denoising Diffusion Probabilistic Models", (7) for
reverse steps of variance beta_t; (3) Salimans and Ho 2022, "Progressive Distillation for Fast
Sampling of Diffusion Models"; (6) Kingma et al. 2021, "Variational Diffusion Models".
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dec_diffusion.types import Array, Float, InputError, Int, PRNGKeyArray, pytree

Prediction = Literal["eps", "x0", "v"]
"""What a denoising network is asked for."""

Name = Literal["linear", "cosine"]
"""What a setting calls a schedule."""

Values = Float[Array, "..."]
Levels = Float[Array, " *b"]
"""Log-SNRs [b] for the leading axis of values [b, ...], or one for all. Dtypes promote."""

MIN_LOG_SNR = -20.0
"""Stands for zero signal: finite, and a signal amplitude of 4.5e-5."""


@pytree
class Schedule:
    """Noise levels: ``log_snr`` float32 [t], decreasing, so that index 0 is the cleanest step."""

    log_snr: Float[Array, " t"]


def named(name: Name, num_steps: int) -> Schedule:
    """`linear` or `cosine` with their published constants; raises InputError as these do."""
    return {"linear": linear, "cosine": cosine}[name](num_steps)


def linear(num_steps: int, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """Betas evenly spaced from ``beta_start`` to ``beta_end`` (Ho et al. 2020).

    Raises InputError unless ``num_steps >= 2`` and both betas lie strictly within (0, 1).
    """
    for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
        _require(0 < beta < 1, f"{name} is {beta}: choose a value strictly between 0 and 1")
    _require(num_steps >= 2, f"num_steps is {num_steps}: a schedule needs at least 2")
    return _from_betas(np.linspace(beta_start, beta_end, num_steps, dtype=np.float64))


def cosine(num_steps: int, *, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """alpha_bar along a squared cosine, betas at most ``max_beta`` (Nichol and Dhariwal 2021).

    Raises InputError unless ``num_steps >= 2``, ``offset >= 0`` and ``0 < max_beta < 1``.
    """
    _require(num_steps >= 2, f"num_steps is {num_steps}: a schedule needs at least 2")
    _require(0 <= offset < np.inf, f"offset is {offset}: choose a finite value of at least 0")
    _require(0 < max_beta < 1, f"max_beta is {max_beta}: choose a value strictly between 0 and 1")
    u = np.arange(num_steps + 1, dtype=np.float64) / num_steps
    curve = np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2
    return _from_betas(np.minimum(1 - curve[1:] / curve[:-1], max_beta))


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Shift and scale sqrt(alpha_bar) so that the last step carries no signal.

    The first step is kept (Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps
    Are Flawed"). Zero signal, a log-SNR of minus infinity, is stored as ``MIN_LOG_SNR``, or lower
    where other steps come close to it. Needs concrete values: call it outside ``jit``.
    """
    log_snr = np.asarray(schedule.log_snr, dtype=np.float64)
    root = np.exp(-0.5 * np.logaddexp(0, -log_snr))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    rescaled = 2 * np.log(root[:-1]) - np.log1p(-(root[:-1] ** 2))
    return _store(np.append(rescaled, min(MIN_LOG_SNR, log_snr[-1], rescaled[-1] - 0.1)))


def alpha_bar(log_snr: Values) -> Values:
    """Share of signal in the variance, equation (1)."""
    return jax.nn.sigmoid(log_snr)


def alpha_sigma(log_snr: Values) -> tuple[Values, Values]:
    """Amplitudes ``(alpha, sigma)`` of signal and noise, equation (1)."""
    # Halving the logarithm keeps gradients finite where sqrt(sigmoid) underflows.
    log_variances = jax.nn.log_sigmoid(log_snr), jax.nn.log_sigmoid(-log_snr)
    return jnp.exp(0.5 * log_variances[0]), jnp.exp(0.5 * log_variances[1])


def forward_variance(log_snr_s: Values, log_snr_t: Values) -> Values:
    """beta_ts of equation (5); an infinite ``log_snr_s`` stands for clean data."""
    return -jnp.expm1(jax.nn.log_sigmoid(log_snr_t) - jax.nn.log_sigmoid(log_snr_s))


def betas(schedule: Schedule) -> Float[Array, " t"]:
    """beta_t of every step, the first one counted from clean data, equation (5)."""
    return forward_variance(_previous(schedule), schedule.log_snr)


def add_noise(x0: Values, eps: Values, log_snr: Levels) -> Values:
    """x_t, equation (2)."""
    alpha, sigma = alpha_sigma(_expand(log_snr, x0))
    return alpha * x0 + sigma * eps


def target(x0: Values, eps: Values, log_snr: Levels, *, prediction: Prediction) -> Values:
    """What a network of this ``prediction`` should return, equation (3)."""
    alpha, sigma = alpha_sigma(_expand(log_snr, x0))
    return _pick(prediction, eps=eps, x0=x0, v=alpha * eps - sigma * x0)


def to_x0(value: Values, x_t: Values, log_snr: Levels, *, prediction: Prediction) -> Values:
    """The clean data, from what the network returned, equations (2) and (3).

    'eps' divides by alpha, which magnifies errors at low signal; 'v' is safe at both ends.
    """
    alpha, sigma = alpha_sigma(_expand(log_snr, x_t))
    return _pick(
        prediction, eps=(x_t - sigma * value) / alpha, x0=value, v=alpha * x_t - sigma * value
    )


def to_eps(value: Values, x_t: Values, log_snr: Levels, *, prediction: Prediction) -> Values:
    """The noise, from what the network returned, equations (2) and (3).

    'x0' divides by sigma, which magnifies errors at low noise; 'v' is safe at both ends.
    """
    alpha, sigma = alpha_sigma(_expand(log_snr, x_t))
    return _pick(
        prediction, eps=value, x0=(x_t - alpha * value) / sigma, v=sigma * x_t + alpha * value
    )


def posterior(
    x0: Values, x_t: Values, log_snr_s: Levels, log_snr_t: Levels
) -> tuple[Values, Values]:
    """Mean [b, ...] and variance [b, 1, ...] of q(x_s | x_t, x0), equation (6).

    ``log_snr_s`` may be plus infinity, and the posterior is then a point at ``x0``;
    ``log_snr_t`` may be minus infinity, and ``x_t`` then says nothing.
    """
    log_snr_s, log_snr_t = _expand(log_snr_s, x0), _expand(log_snr_t, x0)
    log_signal = 0.5 * (jax.nn.log_sigmoid(log_snr_t) - jax.nn.log_sigmoid(log_snr_s))
    log_noise = jax.nn.log_sigmoid(-log_snr_s) - jax.nn.log_sigmoid(-log_snr_t)
    alpha_s, sigma_s = alpha_sigma(log_snr_s)
    c = -jnp.expm1(log_snr_t - log_snr_s)
    return jnp.exp(log_signal + log_noise) * x_t + alpha_s * c * x0, sigma_s**2 * c


def error_ratio(log_snr: Values, *, of: Prediction, to: Prediction) -> Values:
    """Squared error of prediction ``of`` over that of ``to``, for one x0 error, equation (4)."""
    log_scale = {"eps": log_snr, "x0": jnp.zeros_like(log_snr), "v": jax.nn.softplus(log_snr)}
    return jnp.exp(_pick(of, **log_scale) - _pick(to, **log_scale))


def elbo_weights(schedule: Schedule, *, prediction: Prediction = "eps") -> Float[Array, " t"]:
    """Weight w_t of the summed squared error of ``prediction`` in the bound, equation (7).

    At zero terminal SNR eps hardly depends on x0, so the last weight for 'eps' is enormous:
    ask for 'v' or 'x0' there.
    """
    log_snr = schedule.log_snr
    gap = jax.nn.log_sigmoid(_previous(schedule)) - jax.nn.log_sigmoid(log_snr)
    weights = jnp.expm1(gap) / (2 * jax.nn.sigmoid(-log_snr))
    return weights * error_ratio(log_snr, of="eps", to=prediction)


def kl_weight(
    schedule: Schedule, *, prediction: Prediction = "eps", first: int = 0
) -> Float[Array, ""]:
    """Weight of a KL term beside an unweighted denoising loss, 1 / sum_t w_t, equation (8).

    The loss is the squared error of ``prediction``, summed over dimensions and averaged over
    the steps ``first .. t-1``, as ``sample_steps`` draws them.
    """
    _check_first(first, schedule)
    return 1 / jnp.sum(elbo_weights(schedule, prediction=prediction)[first:])


def sample_log_snr(
    key: PRNGKeyArray, n: int, *, mean: float, std: float, stratified: bool = True
) -> Float[Array, " n"]:
    """Draw ``n`` normal log-SNRs; ``stratified`` as in ``sample_steps``."""
    return mean + std * jax.scipy.special.ndtri(_uniform(key, n, stratified=stratified))


def sample_steps(
    key: PRNGKeyArray, n: int, schedule: Schedule, *, first: int = 0, stratified: bool = True
) -> Int[Array, " n"]:
    """Draw ``n`` steps (int32), each uniform over ``first .. t-1``.

    ``stratified`` spreads the batch evenly over the range, behind one shared random shift: the
    loss varies less and each draw alone keeps its distribution (Kingma et al. 2021). Raises
    InputError if ``first`` is not a step.
    """
    _check_first(first, schedule)
    last = schedule.log_snr.shape[0] - 1
    u = _uniform(key, n, stratified=stratified)
    return jnp.minimum(first + (u * (last + 1 - first)).astype(jnp.int32), last)


def _uniform(key: PRNGKeyArray, n: int, *, stratified: bool) -> Float[Array, " n"]:
    u = jax.random.uniform(key, () if stratified else (n,))
    u = (u + jnp.arange(n) / n) % 1 if stratified else u
    return jnp.clip(u, 1e-7, 1 - 1e-7)  # the normal quantile is infinite at 0 and 1


def _from_betas(beta: np.ndarray) -> Schedule:
    log_alpha_bar = np.cumsum(np.log1p(-beta))
    return _store(log_alpha_bar - np.log(-np.expm1(log_alpha_bar)))


def _store(log_snr: np.ndarray) -> Schedule:
    return Schedule(log_snr=jnp.asarray(log_snr.astype(np.float32)))


def _previous(schedule: Schedule) -> Float[Array, " t"]:
    """log_snr of the step before each step; before the first, clean data."""
    return jnp.concatenate([jnp.full_like(schedule.log_snr[:1], jnp.inf), schedule.log_snr[:-1]])


def _expand(log_snr: Levels, like: Values) -> Values:
    log_snr = jnp.asarray(log_snr)
    return log_snr.reshape(log_snr.shape + (1,) * (like.ndim - log_snr.ndim))


def _pick(prediction: Prediction, *, eps: Array, x0: Array, v: Array) -> Array:
    # All three are built; whatever is not picked is dead code that the compiler drops.
    choices = {"eps": eps, "x0": x0, "v": v}
    _require(prediction in choices, f"prediction is {prediction!r}: choose 'eps', 'x0' or 'v'")
    return choices[prediction]


def _check_first(first: int, schedule: Schedule) -> None:
    last = schedule.log_snr.shape[0] - 1
    _require(0 <= first <= last, f"first is {first}: choose a step from 0 to {last}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)
