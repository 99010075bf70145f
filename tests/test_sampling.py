"""Samplers with the exact denoiser of known distributions, against their moments and against a
recursion of means and variances that needs no sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dec_diffusion import sampling, schedule
from dec_diffusion.types import InputError

GRID = schedule.zero_terminal_snr(schedule.cosine(200)).log_snr


def gaussian_denoiser(mean, std):
    """E[x0 | x_t] for x0 ~ N(mean, std^2), elementwise."""

    def denoise(x_t, log_snr):
        alpha, sigma = (a[:, None] for a in schedule.alpha_sigma(log_snr))
        return mean + alpha * std**2 / ((alpha * std) ** 2 + sigma**2) * (x_t - alpha * mean)

    return denoise


def mixture_denoiser(weights, means, std):
    """E[x0 | x_t] for a mixture of N(means[k], std^2 I)."""

    def denoise(x_t, log_snr):
        alpha, sigma = (a[:, None, None] for a in schedule.alpha_sigma(log_snr))
        variance = (alpha * std) ** 2 + sigma**2
        residual = x_t[:, None, :] - alpha * means
        log_joint = jnp.log(weights) - 0.5 * jnp.sum(residual**2, -1) / variance[..., 0]
        estimate = means + alpha * std**2 / variance * residual
        return jnp.sum(jax.nn.softmax(log_joint)[..., None] * estimate, axis=1)

    return denoise


SAMPLERS = {
    "ddpm": sampling.ddpm,
    "ddpm-forward": lambda *args, **kw: sampling.ddpm(*args, variance="forward", **kw),
    "ddim": sampling.ddim,
    "ddim-half": lambda *args, **kw: sampling.ddim(*args, eta=0.5, **kw),
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


def run(sampler, denoise, grid, seed, shape, **knobs):
    return jax.jit(lambda key: sampler(denoise, grid, key, shape, **knobs))(jax.random.key(seed))


# ---- known distributions come back ----


@every_sampler
def test_gaussian_data_come_back(sampler):
    mean, std, n = jnp.array([1.5, -0.5, 0.0]), jnp.array([0.3, 1.0, 2.0]), 20_000
    x = np.asarray(run(sampler, gaussian_denoiser(mean, std), GRID, 0, (n, 3)), np.float64)
    assert (np.abs(x.mean(0) - mean) < 5 * std / np.sqrt(n) + 0.01).all()
    # 200 steps narrow the result by up to 3 %, an error that falls with the number of steps.
    np.testing.assert_allclose(x.std(0), std, rtol=0.05)
    correlation = np.corrcoef(x.T) - np.eye(3)
    assert np.abs(correlation).max() < 5 / np.sqrt(n)


@every_sampler
def test_a_mixture_comes_back(sampler):
    weights = jnp.array([0.2, 0.5, 0.3])
    means = jnp.array([[-2.0, 0.0], [1.0, 1.5], [1.0, -1.5]])
    std, n = 0.25, 8_000
    x = np.asarray(run(sampler, mixture_denoiser(weights, means, std), GRID, 1, (n, 2)))
    nearest = np.argmin(((x[:, None] - np.asarray(means)) ** 2).sum(-1), axis=1)
    assert np.abs(np.bincount(nearest, minlength=3) / n - weights).max() < 0.025
    for k in range(3):
        inside = x[nearest == k]
        np.testing.assert_allclose(inside.mean(0), means[k], atol=0.03)
        np.testing.assert_allclose(inside.std(0), std, rtol=0.06)


@pytest.mark.parametrize(
    ("variance", "eta"), [("posterior", None), ("forward", None), (None, 0.0), (None, 0.7)]
)
def test_coarse_grids_follow_the_recursion_of_moments(variance, eta):
    """With a linear denoiser each step maps N(m, V) to N(gain m + shift, gain^2 V + noise)."""
    mean, std, n = 0.8, 0.5, 40_000
    grid = np.array([-4.0, -2.5, -0.5, 1.0, 3.0])
    abar = 1 / (1 + np.exp(-grid))
    m, spread = 0.0, 1.0
    for i, a in enumerate(abar):
        b = abar[i + 1] if i + 1 < len(abar) else 1.0
        gain0 = np.sqrt(a) * std**2 / (a * std**2 + 1 - a)  # x0_hat = shift0 + gain0 x_t
        shift0 = mean * (1 - gain0 * np.sqrt(a))
        beta = 1 - a / b
        posterior_variance = (1 - b) / (1 - a) * beta
        if variance is None:
            noise = eta**2 * posterior_variance
            eps_gain = np.sqrt((1 - b - noise) / (1 - a))
            on_x0, on_x_t = np.sqrt(b) - eps_gain * np.sqrt(a), eps_gain
        else:
            noise = posterior_variance if variance == "posterior" or b == 1.0 else beta
            on_x0, on_x_t = np.sqrt(b) * beta / (1 - a), np.sqrt(a / b) * (1 - b) / (1 - a)
        gain = on_x_t + on_x0 * gain0
        m, spread = gain * m + on_x0 * shift0, gain**2 * spread + noise
    denoise = gaussian_denoiser(mean, std)
    if variance is None:
        x = run(sampling.ddim, denoise, jnp.asarray(grid), 2, (n, 1), eta=eta)
    else:
        x = run(sampling.ddpm, denoise, jnp.asarray(grid), 2, (n, 1), variance=variance)
    result = stats.kstest(np.asarray(x)[:, 0], "norm", args=(m, np.sqrt(spread)))
    assert result.pvalue > 1e-3


@pytest.mark.parametrize(("variance", "mean", "std"), [("forward", 0, 1), ("posterior", 0.5, 0)])
def test_where_each_variance_is_exact(variance, mean, std):
    """'forward' for standard normal data, 'posterior' for a point, however few the steps."""
    grid = jnp.array([-20.0, -1.0, 3.0])
    estimate = gaussian_denoiser(mean, std)

    def denoise(x_t, log_snr):  # hands out x_t itself at the cleanest level
        return jnp.where(log_snr[:, None] == 3.0, x_t, estimate(x_t, log_snr))

    x_t = np.asarray(run(sampling.ddpm, denoise, grid, 3, (20_000, 1), variance=variance))[:, 0]
    alpha, sigma = (float(a) for a in schedule.alpha_sigma(grid[-1]))
    expected = stats.norm(alpha * mean, np.hypot(alpha * std, sigma))
    assert stats.kstest(x_t, expected.cdf).pvalue > 1e-3


# ---- laws ----


@every_sampler
def test_the_last_estimate_is_returned_exactly(sampler):
    constant = jnp.array([[0.25, -3.0, 7.0]])
    x = run(sampler, lambda x_t, log_snr: constant + 0 * x_t, GRID[::20], 4, (5, 3))
    np.testing.assert_array_equal(x, np.broadcast_to(constant, (5, 3)))


@pytest.mark.parametrize("sampler", ["ddpm", "ddpm-forward", "ddim-half"])
def test_scan_equals_a_python_loop(sampler):
    """The loop sees the same noise through the denoiser's own record of x_t."""
    denoise, shape, key = gaussian_denoiser(0.3, 0.7), (4, 2), jax.random.key(5)
    grid = jnp.sort(GRID[::25])
    final = SAMPLERS[sampler](denoise, grid, key, shape)

    start_key, step_key = jax.random.split(key)
    keys = jax.random.split(step_key, len(grid))
    x = jax.random.normal(start_key, shape)
    for i, level in enumerate(grid[:-1]):
        t, s = (jnp.full(4, v) for v in (level, grid[i + 1]))
        x0 = denoise(x, t)
        noise = jax.random.normal(keys[i], shape)
        mean, variance = schedule.posterior(x0, x, s, t)
        if sampler == "ddpm-forward":
            variance = schedule.forward_variance(s, t)[:, None]
        if sampler == "ddim-half":
            variance = 0.25 * variance
            alpha, sigma = (a[:, None] for a in schedule.alpha_sigma(s))
            eps = schedule.to_eps(x0, x, t, prediction="x0")
            mean = alpha * x0 + jnp.sqrt(sigma**2 - variance) * eps
        x = mean + jnp.sqrt(variance) * noise
    expected = denoise(x, jnp.full(4, grid[-1]))
    np.testing.assert_allclose(final, expected, rtol=2e-5, atol=2e-5)


def test_ddim_with_eta_one_is_ddpm():
    denoise = gaussian_denoiser(0.3, 0.7)
    first = run(sampling.ddpm, denoise, GRID[::10], 6, (8, 2))
    second = run(sampling.ddim, denoise, GRID[::10], 6, (8, 2), eta=1.0)
    np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-3)


def test_ddim_is_a_deterministic_map_of_its_start():
    """For N(mean, std^2) data the exact flow is affine: x0 = mean + std x_T at zero SNR."""
    mean, std, key = 0.4, 0.6, jax.random.key(7)
    x = run(sampling.ddim, gaussian_denoiser(mean, std), GRID, 7, (64, 1))
    start = jax.random.normal(jax.random.split(key)[0], (64, 1))
    slope, intercept, r, *_ = stats.linregress(start[:, 0], x[:, 0])
    assert r > 1 - 1e-6
    assert (slope, intercept) == (pytest.approx(std, rel=0.02), pytest.approx(mean, abs=0.02))


@every_sampler
def test_the_key_decides_and_the_order_of_the_grid_does_not(sampler):
    denoise = gaussian_denoiser(0.0, 1.0)
    x = run(sampler, denoise, GRID[::20], 8, (6, 2))
    np.testing.assert_array_equal(x, run(sampler, denoise, GRID[::20][::-1], 8, (6, 2)))
    assert np.abs(x - run(sampler, denoise, GRID[::20], 9, (6, 2))).min() > 0


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_one_denoiser_call_per_level_and_one_trace(steps):
    seen, traces = [], []

    def denoise(x_t, log_snr):
        traces.append(x_t.shape)
        jax.debug.callback(lambda level: seen.append(np.asarray(level)), log_snr, ordered=True)
        return 0.5 * x_t

    grid = sampling.subsample(schedule.linear(50), steps)
    run(sampling.ddpm, denoise, grid, 10, (3, 2)).block_until_ready()
    jax.effects_barrier()
    assert len(set(traces)) == 1 and len(traces) <= 2  # scan may trace its body to fix types
    np.testing.assert_array_equal(seen, np.repeat(np.sort(grid)[:, None], 3, axis=1))


@every_sampler
def test_clip_bounds_the_estimate(sampler):
    denoise = gaussian_denoiser(0.0, 3.0)
    free = run(sampler, denoise, GRID[::10], 11, (500, 1))
    held = run(sampler, denoise, GRID[::10], 11, (500, 1), clip=1.0)
    assert np.abs(free).max() > 3
    assert np.abs(held).max() == 1.0


@every_sampler
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtype_holds_from_noise_to_sample(sampler, dtype):
    def denoise(x_t, log_snr):
        assert x_t.dtype == dtype and log_snr.dtype == jnp.float32
        return (0.5 * x_t).astype(jnp.float32)

    x = run(sampler, denoise, GRID[::20], 12, (3, 2), dtype=dtype)
    assert x.dtype == dtype and np.isfinite(x.astype(jnp.float32)).all()


# ---- grids and guidance ----


@pytest.mark.parametrize(("steps", "first"), [(1, 0), (2, 0), (9, 1), (37, 0), (50, 0), (49, 1)])
def test_subsample_keeps_both_ends_and_even_gaps(steps, first):
    full = schedule.linear(50)
    grid = np.asarray(sampling.subsample(full, steps, first=first))
    index = np.searchsorted(-np.asarray(full.log_snr), -grid)
    np.testing.assert_array_equal(np.asarray(full.log_snr)[index], grid)
    assert len(index) == steps and index[0] == 49
    if steps > 1:
        gaps = -np.diff(index)
        assert index[-1] == first
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_guidance_is_linear_and_free_at_zero():
    x_t, log_snr = jnp.array([[1.0, 2.0]]), jnp.array([0.0])

    def conditional(x_t, log_snr):
        return 3 * x_t

    def unconditional(x_t, log_snr):
        return x_t + log_snr[:, None] - 1

    def never(x_t, log_snr):
        raise AssertionError("the unconditional call is not needed")

    for weight in (0.5, jnp.float32(2.0), jnp.float32(0.0), -1.0):
        guided = sampling.guide(conditional, unconditional, weight)(x_t, log_snr)
        expected = conditional(x_t, log_snr) + weight * (2 * x_t + 1)
        np.testing.assert_allclose(guided, expected, rtol=1e-6)
    np.testing.assert_array_equal(sampling.guide(conditional, never, 0.0)(x_t, log_snr), 3 * x_t)


def test_guidance_on_x0_is_guidance_on_eps():
    x_t, level = jnp.array([[1.0, -2.0]]), jnp.array([0.7])
    a, b = gaussian_denoiser(1.0, 0.5), gaussian_denoiser(0.0, 1.0)
    eps_a, eps_b = (schedule.to_eps(d(x_t, level), x_t, level, prediction="x0") for d in (a, b))
    expected = schedule.to_x0(2.5 * eps_a - 1.5 * eps_b, x_t, level, prediction="eps")
    np.testing.assert_allclose(sampling.guide(a, b, 1.5)(x_t, level), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "option"),
    [
        (lambda d, k: sampling.ddpm(d, GRID, k, (1, 1), variance="none"), "variance"),
        (lambda d, k: sampling.ddpm(d, GRID[0], k, (1, 1)), "log_snr_grid"),
        (lambda d, k: sampling.ddim(d, GRID[:0], k, (1, 1)), "log_snr_grid"),
        (lambda d, k: sampling.ddim(d, GRID, k, (1, 1), eta=1.5), "eta"),
        (lambda d, k: sampling.subsample(schedule.linear(10), 11), "steps"),
        (lambda d, k: sampling.subsample(schedule.linear(10), 10, first=1), "steps"),
        (lambda d, k: sampling.subsample(schedule.linear(10), 0), "steps"),
        (lambda d, k: sampling.subsample(schedule.linear(10), 1, first=10), "first"),
    ],
)
def test_bad_input_is_named_in_one_line(call, option):
    with pytest.raises(InputError, match=f"^{option} [^\n]*$"):
        call(gaussian_denoiser(0.0, 1.0), jax.random.key(0))


# ---- transformations ----


@every_sampler
def test_the_same_under_jit_vmap_and_pmap(sampler):
    devices = jax.local_device_count()
    keys = jax.random.split(jax.random.key(13), devices)
    means = jnp.linspace(-1.0, 1.0, devices)

    def draw(key, mean):
        return sampler(gaussian_denoiser(mean, 0.5), GRID[::20], key, (4, 2))

    plain = np.stack([draw(k, m) for k, m in zip(keys, means, strict=True)])
    for mapped in (jax.vmap(draw), jax.jit(jax.vmap(draw)), jax.pmap(draw)):
        np.testing.assert_allclose(mapped(keys, means), plain, rtol=2e-5, atol=2e-5)


def test_gradients_pass_through_the_sampler():
    """DDIM of N(mean, std^2) data moves one for one with the mean."""
    slope = jax.grad(
        lambda mean: jnp.mean(
            sampling.ddim(gaussian_denoiser(mean, 0.5), GRID[::4], jax.random.key(14), (8, 1))
        )
    )(0.3)
    assert float(slope) == pytest.approx(1.0, abs=0.02)


# ---- many at once ----


@pytest.mark.parametrize("n", [1, 256, 257, 700])
def test_parts_are_drawn_for_the_rows_that_are_theirs(n):
    sizes = []

    def function(key, rows):
        sizes.append(rows.shape[0])
        return rows[:, None] + jnp.array([0.0, 0.5]) + 0 * jax.random.normal(key)

    found = sampling.in_parts(function, jax.random.key(0), jnp.arange(n))
    np.testing.assert_array_equal(found, np.arange(n)[:, None] + [0, 0.5])
    assert max(sizes) <= 256


def test_parts_have_noise_of_their_own():
    def function(key, rows):
        return jax.random.normal(key, rows.shape)

    few = sampling.in_parts(function, jax.random.key(0), jnp.zeros(9))
    np.testing.assert_array_equal(few, function(jax.random.key(0), jnp.zeros(9)))
    many = np.asarray(sampling.in_parts(function, jax.random.key(0), jnp.zeros(1000)))
    assert len(np.unique(many)) == 1000
