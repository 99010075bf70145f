"""Schedules against published values, the forward process and posterior against Gaussian algebra,
and the identities T5 (denoising error of a Gaussian) and T8 (weights of the bound)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dec_diffusion import schedule as sch
from dec_diffusion.types import InputError

PREDICTIONS = ("eps", "x0", "v")


def _close(actual, expected, rtol=1e-5, atol=0.0):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol)


def _sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


# ---- grids ----


@pytest.mark.parametrize(
    ("num_steps", "step", "value"),
    [
        (1000, 0, 0.99989998),
        (1000, 1, 0.99978006),
        (1000, 100, 0.89514136),
        (1000, 250, 0.52142298),
        (1000, 500, 0.077796653),
        (1000, 750, 0.0033001585),
        (1000, 999, 4.0358304e-05),
        (401, 1, 0.99975026),
        (401, 200, 0.35932851),
        (401, 400, 0.01729698),
    ],
)
def test_linear_has_the_published_alpha_bar(num_steps, step, value):
    _close(sch.alpha_bar(sch.linear(num_steps).log_snr)[step], value)


@pytest.mark.parametrize("num_steps", [2, 50, 1000])
def test_cosine_equals_an_independent_product(num_steps):
    def curve(u):
        return np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2

    expected, product = [], 1.0
    for i in range(num_steps):
        beta = 1 - curve((i + 1) / num_steps) / curve(i / num_steps)
        product *= 1 - min(beta, 0.999)
        expected.append(product)
    log_snr = sch.cosine(num_steps).log_snr
    _close(sch.alpha_bar(log_snr), expected)
    # Before the last step nothing is capped, and the product telescopes.
    _close(sch.alpha_bar(log_snr[0]), curve(1 / num_steps) / curve(0))


@pytest.mark.parametrize("num_steps", [50, 400, 1000])
def test_betas_are_those_the_schedule_was_built_from(num_steps):
    _close(sch.betas(sch.linear(num_steps)), np.linspace(1e-4, 0.02, num_steps), rtol=2e-4)
    assert float(sch.betas(sch.cosine(num_steps))[-1]) == pytest.approx(0.999, abs=1e-6)


@pytest.mark.parametrize("make", [sch.linear, sch.cosine])
@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("num_steps", [2, 3, 7, 401, 4000])
def test_grids_of_any_length_fall_and_stay_finite(make, terminal, num_steps):
    schedule = sch.zero_terminal_snr(make(num_steps)) if terminal else make(num_steps)
    assert schedule.log_snr.dtype == jnp.float32
    assert schedule.log_snr.shape == (num_steps,)
    assert np.isfinite(schedule.log_snr).all()
    assert (np.diff(schedule.log_snr) < 0).all()
    assert float(sch.betas(schedule).min()) > 0 and float(sch.betas(schedule).max()) <= 1


def test_zero_terminal_snr_is_affine_in_the_amplitude():
    old = sch.linear(1000)
    new = sch.zero_terminal_snr(old)
    before, after = (np.sqrt(_sigmoid(s.log_snr)) for s in (old, new))
    slope, intercept = np.polyfit(before[:-1], after[:-1], 1)
    _close(after[:-1], slope * before[:-1] + intercept, rtol=0, atol=1e-7)
    assert slope * before[-1] + intercept == pytest.approx(0, abs=1e-6)
    _close(new.log_snr[0], old.log_snr[0], rtol=1e-6)
    assert float(new.log_snr[-1]) == sch.MIN_LOG_SNR
    assert float(sch.alpha_sigma(new.log_snr[-1])[0]) < 5e-5


def test_zero_terminal_snr_never_lowers_the_last_noise_level():
    deep = sch.cosine(4000)
    assert float(deep.log_snr[-1]) < sch.MIN_LOG_SNR
    _close(sch.zero_terminal_snr(deep).log_snr[-1], deep.log_snr[-1], rtol=0)


@pytest.mark.parametrize(
    ("call", "option"),
    [
        (lambda: sch.linear(1), "num_steps"),
        (lambda: sch.cosine(0), "num_steps"),
        (lambda: sch.linear(10, beta_start=0.0), "beta_start"),
        (lambda: sch.linear(10, beta_end=1.0), "beta_end"),
        (lambda: sch.linear(10, beta_end=float("nan")), "beta_end"),
        (lambda: sch.cosine(10, max_beta=1.0), "max_beta"),
        (lambda: sch.cosine(10, offset=-0.1), "offset"),
        (lambda: sch.kl_weight(sch.linear(10), first=10), "first"),
        (lambda: sch.sample_steps(jax.random.key(0), 4, sch.linear(10), first=-1), "first"),
        (lambda: sch.to_x0(jnp.ones(2), jnp.ones(2), jnp.ones(2), prediction="y"), "prediction"),
    ],
)
def test_bad_input_is_named_in_one_line(call, option):
    with pytest.raises(InputError, match=f"^{option} is [^\n]*$"):
        call()


# ---- forward process and predictions ----


def test_add_noise_has_the_stated_marginals():
    n, levels = 200_000, np.array([-8.0, -1.5, 0.0, 6.0], np.float32)
    x0 = jnp.array([2.0, -1.0, 0.5, 3.0])[:, None] * jnp.ones((4, n))
    x_t = sch.add_noise(x0, jax.random.normal(jax.random.key(0), (4, n)), jnp.asarray(levels))
    variance = _sigmoid(-levels)
    mean_error = np.mean(x_t, axis=1) - np.sqrt(_sigmoid(levels)) * np.asarray(x0[:, 0])
    assert (np.abs(mean_error) < 5 * np.sqrt(variance / n)).all()
    assert (np.abs(np.var(x_t, axis=1) / variance - 1) < 5 * np.sqrt(2 / n)).all()


def test_every_row_gets_its_own_level():
    keys = jax.random.split(jax.random.key(1), 2)
    x0, eps = (jax.random.normal(k, (3, 4, 4, 2)) for k in keys)
    log_snr = jnp.array([-3.0, 0.0, 5.0])
    together = sch.add_noise(x0, eps, log_snr)
    alone = np.sqrt(_sigmoid(log_snr[1])) * x0[1] + np.sqrt(_sigmoid(-log_snr[1])) * eps[1]
    _close(together[1], alone, rtol=1e-5, atol=1e-5)
    _close(jax.vmap(sch.add_noise)(x0, eps, log_snr), together, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets_invert_in_float64(prediction):
    with jax.enable_x64(True):
        log_snr = jnp.linspace(-15.0, 15.0, 61)
        x0, eps = np.random.default_rng(0).normal(size=(2, 61, 5))
        x_t = sch.add_noise(x0, eps, log_snr)
        value = sch.target(x0, eps, log_snr, prediction=prediction)
        assert value.dtype == jnp.float64
        _close(sch.to_x0(value, x_t, log_snr, prediction=prediction), x0, rtol=0, atol=1e-11)
        _close(sch.to_eps(value, x_t, log_snr, prediction=prediction), eps, rtol=0, atol=1e-11)


def test_v_is_stable_at_both_ends_in_float32():
    log_snr = jnp.linspace(-30.0, 30.0, 61)
    x0, eps = np.random.default_rng(1).normal(size=(2, 61, 5)).astype(np.float32)
    x_t = sch.add_noise(x0, eps, log_snr)
    value = sch.target(x0, eps, log_snr, prediction="v")
    _close(sch.to_x0(value, x_t, log_snr, prediction="v"), x0, rtol=0, atol=1e-5)
    _close(sch.to_eps(value, x_t, log_snr, prediction="v"), eps, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("of", "to"), list(itertools.product(PREDICTIONS, repeat=2)))
def test_error_ratio_relates_errors_of_one_estimate(of, to):
    with jax.enable_x64(True):
        log_snr = jnp.linspace(-12.0, 12.0, 13)
        x0, eps, wrong = np.random.default_rng(2).normal(size=(3, 13, 4))
        x_t = sch.add_noise(x0, eps, log_snr)
        eps_hat = sch.to_eps(x0 + wrong, x_t, log_snr, prediction="x0")

        def error(prediction):
            truth = sch.target(x0, eps, log_snr, prediction=prediction)
            estimate = sch.target(x0 + wrong, eps_hat, log_snr, prediction=prediction)
            return jnp.sum((estimate - truth) ** 2, axis=-1)

        _close(error(of) / error(to), sch.error_ratio(log_snr, of=of, to=to), rtol=1e-8)


def test_amplitudes_have_finite_gradients_far_out():
    for level in (-300.0, 300.0):
        slopes = jax.jacobian(lambda x: jnp.stack(sch.alpha_sigma(x)))(level)
        assert np.isfinite(slopes).all()


# ---- posterior ----


@pytest.mark.parametrize(("level_s", "level_t"), [(9.0, 8.9), (2.0, -1.0), (-5.0, -15.0)])
def test_posterior_is_gaussian_conditioning(level_s, level_t):
    """Condition the joint normal of (x_s, x_t) given x0, written with its covariance matrix."""
    alpha_s, alpha_t = np.sqrt(_sigmoid([level_s, level_t]))
    var_s, var_t = _sigmoid([-level_s, -level_t])
    covariance = alpha_t / alpha_s * var_s
    x0, x_t = np.random.default_rng(3).normal(size=(2, 6))
    expected_mean = alpha_s * x0 + covariance / var_t * (x_t - alpha_t * x0)
    expected_variance = var_s - covariance**2 / var_t
    with jax.enable_x64(True):
        mean, variance = sch.posterior(x0, x_t, jnp.full(6, level_s), jnp.full(6, level_t))
    _close(mean, expected_mean, rtol=1e-9, atol=1e-12)
    _close(variance, np.full(6, expected_variance), rtol=1e-7)
    mean, variance = sch.posterior(
        jnp.float32(x0), jnp.float32(x_t), jnp.float32(level_s), jnp.float32(level_t)
    )
    _close(mean, expected_mean, rtol=1e-5, atol=1e-5)
    _close(variance, expected_variance, rtol=1e-4)


def test_posterior_composes():
    """Two small steps back are one large one, and undoing (2) and (5) leads back to (2)."""
    with jax.enable_x64(True):
        u, s, t = jnp.asarray(4.0), jnp.asarray(1.0), jnp.asarray(-3.0)
        x0, x_t = np.random.default_rng(4).normal(size=(2, 5))
        near, near_variance = sch.posterior(x0, x_t, s, t)
        far, extra_variance = sch.posterior(x0, near, u, s)
        gain = sch.posterior(jnp.zeros(1), jnp.ones(1), u, s)[0]
        mean, variance = sch.posterior(x0, x_t, u, t)
        _close(far, mean, rtol=1e-12)
        _close(gain**2 * near_variance + extra_variance, variance, rtol=1e-12)

        alpha_t, sigma_t = sch.alpha_sigma(t)
        alpha_s, sigma_s = sch.alpha_sigma(s)
        gain = sch.posterior(jnp.zeros(1), jnp.ones(1), s, t)[0]
        mean = sch.posterior(x0, alpha_t * x0, s, t)[0]
        _close(mean, alpha_s * x0, rtol=1e-12)
        _close(gain**2 * sigma_t**2 + near_variance, [sigma_s**2], rtol=1e-12)
        forward = (alpha_t / alpha_s) ** 2 * sigma_s**2 + sch.forward_variance(s, t)
        _close(forward, sigma_t**2, rtol=1e-12)


def test_posterior_at_the_ends():
    x0, x_t = jnp.array([[0.3, -2.0]]), jnp.array([[1.5, 0.7]])
    mean, variance = sch.posterior(x0, x_t, jnp.array([jnp.inf]), jnp.array([-2.0]))
    assert (mean == x0).all() and (variance == 0).all() and variance.shape == (1, 1)
    mean, variance = sch.posterior(x0, x_t, jnp.array([1.0]), jnp.array([-jnp.inf]))
    _close(mean, np.sqrt(_sigmoid(1.0)) * x0)
    _close(variance, [[_sigmoid(-1.0)]])
    mean, variance = sch.posterior(x0, x_t, jnp.array([1.0]), jnp.array([1.0]))
    _close(mean, x_t, rtol=1e-6)
    assert (variance == 0).all()


# ---- the bound ----


@pytest.mark.parametrize("step", [1, 50, 200, 400])
def test_t5_least_denoising_error_of_a_gaussian(step):
    n, centre, spread = 100_000, 0.7, 0.4
    level = sch.linear(401).log_snr[step]
    keys = jax.random.split(jax.random.key(step), 2)
    x0 = centre + spread * jax.random.normal(keys[0], (n,))
    eps = jax.random.normal(keys[1], (n,))
    x_t = sch.add_noise(x0, eps, level)
    alpha, sigma = sch.alpha_sigma(level)
    share = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
    best = centre + share * (x_t - alpha * centre)
    errors = np.asarray((eps - sch.to_eps(best, x_t, level, prediction="x0")) ** 2)
    abar = float(_sigmoid(level))
    expected = abar * spread**2 / (abar * spread**2 + 1 - abar)
    assert abs(errors.mean() - expected) < 4 * errors.std() / np.sqrt(n)


def test_t8_bound_weights_of_the_official_schedule():
    schedule = sch.linear(401)
    weights = np.asarray(sch.elbo_weights(schedule))
    _close(weights[[1, 10, 100, 400]], [0.300, 0.078, 0.011, 0.010], rtol=0, atol=5e-4)
    assert weights[1:].sum() == pytest.approx(6.196, abs=5e-4)
    assert float(sch.kl_weight(schedule, first=1)) == pytest.approx(1 / 6.196, rel=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_bound_weights_come_from_the_distance_of_reverse_means(prediction):
    schedule = sch.linear(401)
    with jax.enable_x64(True):
        log_snr = schedule.log_snr[1:].astype(jnp.float64)
        before = schedule.log_snr[:-1].astype(jnp.float64)
        x0, eps, wrong = np.random.default_rng(5).normal(size=(3, 400, 3))
        x_t = sch.add_noise(x0, eps, log_snr)
        eps_hat = sch.to_eps(x0 + wrong, x_t, log_snr, prediction="x0")
        means = [sch.posterior(x, x_t, before, log_snr)[0] for x in (x0, x0 + wrong)]
        divergence = jnp.sum((means[0] - means[1]) ** 2, -1) / (
            2 * sch.forward_variance(before, log_snr)
        )
        truth = sch.target(x0, eps, log_snr, prediction=prediction)
        estimate = sch.target(x0 + wrong, eps_hat, log_snr, prediction=prediction)
        expected = divergence / jnp.sum((estimate - truth) ** 2, -1)
    _close(sch.elbo_weights(schedule, prediction=prediction)[1:], expected, rtol=3e-4)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_kl_weight_survives_zero_terminal_snr(prediction):
    schedule = sch.zero_terminal_snr(sch.linear(400))
    whole = float(sch.kl_weight(schedule, prediction=prediction))
    cut = sch.Schedule(log_snr=schedule.log_snr[:-1])
    assert whole == pytest.approx(float(sch.kl_weight(cut, prediction=prediction)), rel=1e-3)


# ---- drawing noise levels ----


@pytest.mark.parametrize("stratified", [False, True])
def test_log_snr_draws_are_normal(stratified):
    draw = jax.vmap(
        lambda key: sch.sample_log_snr(key, 16, mean=-1.5, std=2.0, stratified=stratified)
    )
    draws = np.asarray(draw(jax.random.split(jax.random.key(0), 2000)))
    for row in (0, 7, 15):  # each position of the batch alone has the whole distribution
        assert stats.kstest(draws[:, row], "norm", args=(-1.5, 2.0)).pvalue > 1e-3
    spread_of_means = draws.mean(axis=1).std()
    if stratified:
        assert spread_of_means < 0.45 * 2.0 / 4
    else:
        assert spread_of_means == pytest.approx(2.0 / 4, rel=0.1)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_step_draws_are_uniform(stratified, first):
    schedule = sch.linear(11)
    draw = jax.vmap(
        lambda key: sch.sample_steps(key, 4, schedule, first=first, stratified=stratified)
    )
    draws = np.asarray(draw(jax.random.split(jax.random.key(1), 5000)))
    assert draws.dtype == np.int32
    assert draws.min() == first and draws.max() == 10
    for row in range(4):
        counts = np.bincount(draws[:, row], minlength=11)[first:]
        assert stats.chisquare(counts).pvalue > 1e-3


def test_stratified_steps_visit_each_step_alike():
    steps = sch.sample_steps(jax.random.key(2), 1200, sch.linear(401), first=1)
    counts = np.bincount(steps, minlength=401)[1:]
    assert counts.min() >= 2 and counts.max() <= 4


# ---- transformations ----


def test_the_same_under_jit_vmap_and_pmap():
    devices = jax.local_device_count()
    keys = jax.random.split(jax.random.key(3), 2)
    x0, eps = (jax.random.normal(k, (devices, 5, 4, 3)) for k in keys)
    schedule = sch.zero_terminal_snr(sch.cosine(20))
    steps = jnp.arange(devices * 5).reshape(devices, 5) % 19 + 1

    def all_of_it(schedule, x0, eps, steps):
        level, before = schedule.log_snr[steps], schedule.log_snr[steps - 1]
        x_t = sch.add_noise(x0, eps, level)
        v = sch.target(x0, eps, level, prediction="v")
        back = sch.to_x0(v, x_t, level, prediction="v")
        mean, variance = sch.posterior(back, x_t, before, level)
        return mean, variance, sch.betas(schedule), sch.kl_weight(schedule, prediction="v")

    plain = all_of_it(schedule, x0[0], eps[0], steps[0])
    in_axes = (None, 0, 0, 0)
    mapped = jax.vmap(all_of_it, in_axes)(schedule, x0, eps, steps)
    spread = jax.pmap(all_of_it, in_axes=in_axes)(schedule, x0, eps, steps)
    compiled = jax.jit(all_of_it)(schedule, x0[0], eps[0], steps[0])
    for i, reference in enumerate(plain):
        for actual in (compiled[i], mapped[i][0], spread[i][0]):
            _close(actual, reference, rtol=2e-5, atol=1e-6)
        _close(spread[i], mapped[i], rtol=2e-5, atol=1e-6)
