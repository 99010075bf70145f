import os
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

from dec_diffusion import gmm, products
from dec_diffusion.types import InputError

TOLERANCE = {"float32": 1e-4, "float64": 1e-10}
K, D = 4, 3


def blobs(seed=0, n=400, k=K, d=D, gap=2.0, offset=0.0):
    """Overlapping, correlated clusters, so that EM needs many iterations."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(k, size=n)
    shapes = np.eye(d) + 0.5 * rng.normal(size=(k, d, d))
    noise = np.einsum("nij,nj->ni", shapes[truth], rng.normal(size=(n, d)))
    return offset + gap * rng.normal(size=(k, d))[truth] + noise, truth


def random_mixture(seed=0, k=K, d=D, covariance="diag", dtype="float64"):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(k, 3.0))
    means = 2 * rng.normal(size=(k, d))
    if covariance == "diag":
        spread = rng.uniform(0.3, 3, size=(k, d))
    else:
        root = rng.normal(size=(k, d, d))
        spread = root @ root.swapaxes(1, 2) + 0.3 * np.eye(d)
    return gmm.Mixture(
        jnp.asarray(np.log(weights), dtype), jnp.asarray(means, dtype), jnp.asarray(spread, dtype)
    )


def posterior(seed=0, n=60, d=D):
    rng = np.random.default_rng(seed)
    return 2 * rng.normal(size=(n, d)), rng.uniform(0.05, 2, size=(n, d))


def full(mixture):
    """Components as a list of (weight, mean, covariance matrix), for SciPy."""
    weights = np.exp(np.asarray(mixture.log_weights))
    spread = [np.diag(s) if s.ndim == 1 else s for s in np.asarray(mixture.covariance)]
    return list(zip(weights, np.asarray(mixture.means), spread, strict=True))


def sklearn_fit(mixture, x, iterations, tol=0.0):
    spread = np.asarray(mixture.covariance, float)
    diag = spread.ndim == 2
    weights = np.exp(np.asarray(mixture.log_weights, float))
    model = GaussianMixture(
        len(weights),
        covariance_type="diag" if diag else "full",
        max_iter=iterations,
        tol=tol,
        weights_init=weights / weights.sum(),
        means_init=np.asarray(mixture.means, float),
        precisions_init=1 / spread if diag else np.linalg.inv(spread),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x)


@pytest.mark.parametrize("covariance", ["diag", "full"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_em_equals_scikit_learn(covariance, dtype):
    """After 1, 5 and 50 iterations; and the scan equals the loop over its two halves."""
    x, _ = blobs()
    tolerance = TOLERANCE[dtype]
    with jax.enable_x64(dtype == "float64"):
        data = jnp.asarray(x, dtype)
        start = random_mixture(covariance=covariance, dtype=dtype)
        step = jax.jit(lambda mixture: gmm.update(mixture, gmm.statistics(mixture, data)))
        results = {0: start}
        for count in range(5):
            results[count + 1] = step(results[count])
        run = gmm.fit(start, data, iterations=50, tol=0.0)
        results[50] = run.mixture
    for count in (1, 5, 50):
        expected, actual = sklearn_fit(start, x, count), results[count]
        assert actual.means.dtype == actual.covariance.dtype == actual.log_weights.dtype == dtype
        np.testing.assert_allclose(
            np.exp(actual.log_weights), expected.weights_, atol=tolerance, rtol=tolerance
        )
        np.testing.assert_allclose(actual.means, expected.means_, atol=tolerance, rtol=tolerance)
        np.testing.assert_allclose(
            actual.covariance, expected.covariances_, atol=tolerance, rtol=tolerance
        )
        bound = float(run.log_likelihood[count - 1])
        np.testing.assert_allclose(bound, expected.lower_bound_, rtol=tolerance)
    assert int(run.iterations) == 50
    assert not bool(run.converged)
    assert np.all(np.diff(run.log_likelihood) > (-1e-5 if dtype == "float32" else 0))


def test_stopping_rule_and_scores_equal_scikit_learn():
    x, _ = blobs()
    with jax.enable_x64(True):
        start = random_mixture()
        expected = sklearn_fit(start, x, 100, tol=1e-3)
        result = gmm.fit(start, jnp.asarray(x), iterations=100, tol=1e-3)
        score = gmm.log_likelihood(result.mixture, jnp.asarray(x))
        assert int(result.iterations) == expected.n_iter_ < 100
        assert bool(result.converged)
        np.testing.assert_allclose(result.log_likelihood[-1], expected.lower_bound_, rtol=1e-10)
        np.testing.assert_allclose(score, expected.score(x), rtol=1e-10)
        np.testing.assert_allclose(gmm.bic(result.mixture, score, len(x)), expected.bic(x))
        labels = gmm.predict(result.mixture, jnp.asarray(x))
    np.testing.assert_array_equal(labels, expected.predict(x))


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_responsibilities_against_scipy(covariance):
    x, _ = posterior()
    with jax.enable_x64(True):
        mixture = random_mixture(covariance=covariance)
        log_resp, norm = gmm.log_responsibilities(mixture, jnp.asarray(x))
    joint = np.stack(
        [np.log(w) + scipy_stats.multivariate_normal(m, s).logpdf(x) for w, m, s in full(mixture)],
        axis=1,
    )
    expected = np.log(np.exp(joint).sum(1))
    np.testing.assert_allclose(norm, expected, rtol=1e-12)
    np.testing.assert_allclose(log_resp, joint - expected[:, None], atol=1e-12)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_kl_of_each_component_against_the_matrix_formula(covariance):
    m, v = posterior()
    with jax.enable_x64(True):
        mixture = random_mixture(covariance=covariance)
        actual = gmm.kl_to_components(mixture, jnp.asarray(m), jnp.asarray(v))
    for c, (_, mu, s) in enumerate(full(mixture)):
        inverse = np.linalg.inv(s)
        gap = mu - m
        expected = 0.5 * (
            (v * np.diag(inverse)).sum(1)
            + np.einsum("ni,ij,nj->n", gap, inverse, gap)
            - D
            + np.linalg.slogdet(s)[1]
            - np.log(v).sum(1)
        )
        np.testing.assert_allclose(actual[:, c], expected, rtol=1e-10)


def test_responsibilities_stay_exact_where_densities_overflow_or_vanish():
    # At 32 dimensions exp(log joint) is 0 or infinite in float32, the responsibilities are not.
    tight = gmm.Mixture(jnp.log(jnp.full(2, 0.5)), jnp.zeros((2, 32)), jnp.full((2, 32), 1e-4))
    log_resp, norm = gmm.log_responsibilities(tight, jnp.zeros((1, 32)))
    np.testing.assert_allclose(log_resp, np.log(0.5), rtol=1e-5)
    np.testing.assert_allclose(norm, -16 * np.log(2 * np.pi * 1e-4), rtol=1e-5)
    wide = gmm.Mixture(tight.log_weights, jnp.eye(2, 32) * 30, jnp.full((2, 32), 30.0))
    log_resp, _ = gmm.log_responsibilities(wide, wide.means)
    np.testing.assert_allclose(np.diag(log_resp), -np.log1p(np.exp(-30)), atol=1e-5)
    np.testing.assert_allclose(log_resp[0, 1], -30, rtol=1e-4)


def test_kl_terms_sum_to_the_three_term_expression():
    """T1, for any responsibilities."""
    m, v = posterior(1)
    with jax.enable_x64(True):
        mixture = random_mixture(1)
        kl = np.asarray(gmm.kl_to_components(mixture, jnp.asarray(m), jnp.asarray(v)))
    g = np.random.default_rng(2).dirichlet(np.ones(K), size=len(m))
    pi, mu, s = (
        np.asarray(a) for a in (jnp.exp(mixture.log_weights), *jax.tree.leaves(mixture)[1:])
    )
    quadratic = np.log(s) + v[:, None] / s + (m[:, None] - mu) ** 2 / s
    three = (
        0.5 * (g * quadratic.sum(-1)).sum(1)
        - (g * np.log(pi / g)).sum(1)
        - 0.5 * (1 + np.log(v)).sum(1)
    )
    np.testing.assert_allclose((g * kl).sum(1) + (g * np.log(g / pi)).sum(1), three, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_chain_of_bounds(seed):
    """T4: KL(q || mixture) <= bound <= any g's value, and g* attains the bound."""
    m, v = posterior(seed, n=20)
    with jax.enable_x64(True):
        mixture = random_mixture(seed)
        kl = np.asarray(gmm.kl_to_components(mixture, jnp.asarray(m), jnp.asarray(v)))
        bound = np.asarray(gmm.mixture_kl_bound(mixture, jnp.asarray(m), jnp.asarray(v)))
        log_g = np.asarray(gmm.log_responsibilities(mixture, jnp.asarray(m), jnp.asarray(v))[0])
        z = m + np.sqrt(v) * np.random.default_rng(seed).normal(size=(4000, 20, D))
        log_p = gmm.log_responsibilities(mixture, jnp.asarray(z.reshape(-1, D)))[1]
    log_pi = np.asarray(mixture.log_weights)

    def value(log_g):
        return (np.exp(log_g) * (kl + log_g - log_pi)).sum(1)

    np.testing.assert_allclose(bound, -np.log((np.exp(log_pi - kl)).sum(1)), rtol=1e-10)
    np.testing.assert_allclose(value(log_g), bound, rtol=1e-10)
    for draw in range(5):
        other = np.random.default_rng(draw).dirichlet(np.ones(K), size=20)
        assert np.all(value(np.log(other)) > bound)
        assert np.all(value(np.log(0.99 * np.exp(log_g) + 0.01 * other)) > bound)
    log_q = scipy_stats.norm.logpdf(z, m, np.sqrt(v)).sum(-1)
    ratio = log_q - np.asarray(log_p).reshape(4000, 20)
    assert np.all(ratio.mean(0) - 4 * ratio.std(0) / np.sqrt(4000) < bound)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_prior_update_on_posteriors_never_raises_the_bound(covariance):
    """T6, and the moments written out for the first step."""
    m, v = posterior(3, n=200)
    with jax.enable_x64(True):
        m, v = jnp.asarray(m), jnp.asarray(v)
        mixture = random_mixture(3, covariance=covariance)
        resp = np.exp(gmm.log_responsibilities(mixture, m, v)[0])
        stats = gmm.statistics(mixture, m, v)
        first = gmm.update(mixture, stats, reg_covar=0.0)
        count = resp.sum(0)
        mu = resp.T @ np.asarray(m) / count[:, None]
        gap = np.asarray(m)[:, None] - mu
        spread = np.einsum("nk,nki,nkj->kij", resp, gap, gap) / count[:, None, None]
        own = resp.T @ np.asarray(v) / count[:, None]
        spread += own[:, :, None] * np.eye(D)
        if covariance == "diag":
            spread = np.diagonal(spread, axis1=1, axis2=2)
        np.testing.assert_allclose(np.exp(first.log_weights), count / 200, rtol=1e-12)
        np.testing.assert_allclose(first.means, mu, rtol=1e-10)
        np.testing.assert_allclose(first.covariance, spread, rtol=1e-10)

        entropy = 0.5 * np.log(2 * np.pi * np.e * np.asarray(v)).sum(1).mean()
        run = gmm.fit(mixture, m, v, iterations=20, tol=0.0, reg_covar=0.0)
        bounds = -entropy - np.asarray(run.log_likelihood)
        start = np.mean(gmm.mixture_kl_bound(mixture, m, v))
        end = np.mean(gmm.mixture_kl_bound(run.mixture, m, v))
    np.testing.assert_allclose(bounds[0], start, rtol=1e-12)
    bounds = np.append(bounds, end)
    assert np.all(np.diff(bounds) < 1e-12)
    assert bounds[-1] < bounds[0] - 0.1


def test_aggregate_identity():
    """T7 in one dimension, by quadrature: mean KL(q || p) = mutual information + KL(q_agg || p)."""
    grid = np.linspace(-30, 30, 20001)
    m, v = posterior(5, n=8, d=1)
    density = scipy_stats.norm.pdf(grid[:, None], m[:, 0], np.sqrt(v[:, 0]))
    mixed = density.mean(1)

    def divergence(p, log_q):
        safe = np.where(p > 0, p, 1)
        return np.trapezoid(p * (np.log(safe) - log_q), grid)

    with jax.enable_x64(True):
        p = random_mixture(6, d=1)
        log_p = np.asarray(gmm.log_responsibilities(p, jnp.asarray(grid[:, None]))[1])
    information = np.mean([divergence(q, np.log(mixed)) for q in density.T])
    mean_kl = np.mean([divergence(q, log_p) for q in density.T])
    np.testing.assert_allclose(mean_kl, information + divergence(mixed, log_p), rtol=1e-8)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_statistics_of_halves_add_up(covariance):
    m, v = (jnp.asarray(a, "float32") for a in posterior(n=100))
    weight, even = jnp.linspace(0, 2, 100), np.arange(100) % 2 == 0
    mixture = random_mixture(covariance=covariance, dtype="float32")
    collect = jax.jit(gmm.statistics)
    whole = collect(mixture, m, v, weight)
    halves = [collect(mixture, m[rows], v[rows], weight[rows]) for rows in (even, ~even)]
    parts = gmm.add(*halves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), whole, parts)


def test_one_component_at_a_time_equals_all_at_once(monkeypatch):
    m, v = (jnp.asarray(a, "float32") for a in posterior())
    for covariance in ("diag", "full"):
        mixture = random_mixture(covariance=covariance, dtype="float32")
        together = gmm.statistics(mixture, m, v)
        with monkeypatch.context() as patch:
            patch.setattr(gmm, "_BROADCAST_LIMIT", 0)
            in_turn = gmm.statistics(mixture, m, v)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), together, in_turn
        )


@pytest.mark.parametrize("points", [True, False])
def test_products_equal_differences(monkeypatch, points):
    """Blocks that do not divide the rows, weights, and a mixture far from the origin."""
    m, v = posterior(n=1003)
    weight = np.linspace(0, 2, len(m))
    with jax.enable_x64(True):
        mixture = random_mixture()
        parts = mixture.log_weights, mixture.means + 100, mixture.covariance
        assert products.holds(*parts[1:])
        data = jnp.asarray(m + 100), None if points else jnp.asarray(v), jnp.asarray(weight)
        expected = gmm._sums(*parts, *data)
        whole = products.sums(*parts, *data)
        with monkeypatch.context() as patch:
            patch.setattr(products, "_CACHED", 100 * (2 * D + K))
            cut = products.sums(*parts, *data)
    for actual in (whole, cut):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), actual, expected
        )


def test_clusters_too_tight_for_products_are_fitted_by_differences(monkeypatch):
    # Centres 2,000 standard deviations apart: in float32 an expanded square is off by about 1.
    monkeypatch.setattr(gmm, "_BROADCAST_LIMIT", 0)
    x = 1e-3 * np.random.default_rng(0).normal(size=(402, 2)) + np.arange(402)[:, None] % 2 * 2
    means = jnp.asarray([[0.0, 0], [2, 2]])
    start = gmm.Mixture(jnp.log(jnp.full(2, 0.5)), means, jnp.full((2, 2), 1e-6))
    assert not products.holds(start.means, start.covariance)
    result = gmm.fit(start, jnp.asarray(x, "float32"), iterations=3, tol=0.0, reg_covar=0.0)
    expected = np.stack([x[c::2].var(0) for c in (0, 1)])
    np.testing.assert_allclose(result.mixture.covariance, expected, rtol=1e-3)
    data = jnp.asarray(x, "float32"), None, jnp.ones(402)
    count, _, second, _ = products.sums(*jax.tree.leaves(result.mixture), *data)
    assert np.max(np.abs(second / count[:, None] / expected - 1)) > 0.02


def test_padding_and_weights():
    x = jnp.asarray(blobs()[0], "float32")
    start = random_mixture(dtype="float32")
    padded = jnp.concatenate([x, jnp.full((37, D), 1e3)])
    weight = jnp.concatenate([jnp.ones(len(x)), jnp.zeros(37)])
    plain = gmm.fit(start, x, iterations=10, tol=0.0)
    same = gmm.fit(start, padded, weight=weight, iterations=10, tol=0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), plain, same)
    # A weight of 2 is a row given twice.
    double = gmm.fit(start, x, weight=1.0 + (jnp.arange(len(x)) < 50), iterations=10, tol=0.0)
    twice = gmm.fit(start, jnp.concatenate([x, x[:50]]), iterations=10, tol=0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), double, twice)
    assert float(jnp.max(jnp.abs(double.mixture.means - plain.mixture.means))) > 1e-2


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_float32_far_from_the_origin(covariance):
    x = blobs(offset=1000.0)[0].astype("float32")
    near = random_mixture(covariance=covariance, dtype="float32")
    start = gmm.Mixture(near.log_weights, near.means + 1000, near.covariance)
    result = gmm.fit(start, jnp.asarray(x), iterations=20, tol=0.0).mixture
    expected = sklearn_fit(start, x.astype("float64"), 20)
    np.testing.assert_allclose(jnp.exp(result.log_weights), expected.weights_, atol=5e-4)
    np.testing.assert_allclose(result.means, expected.means_, atol=2e-3)
    np.testing.assert_allclose(result.covariance, expected.covariances_, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_guards(covariance):
    # All of component 0's examples coincide; the second axis is much wider than the first.
    x = np.random.default_rng(0).normal(size=(200, 2)) * [1, 100]
    x[:50] = [40, 0]
    spread = np.ones((2, 2)) if covariance == "diag" else np.stack([np.eye(2)] * 2)
    start = gmm.Mixture(
        jnp.log(jnp.full(2, 0.5)), jnp.asarray([[40.0, 0], [0, 0]]), jnp.asarray(spread) * 100
    )
    x = jnp.asarray(x, "float32")
    bare = gmm.fit(start, x, iterations=30, reg_covar=1e-3).mixture
    kept = gmm.fit(start, x, iterations=30, reg_covar=1e-3, variance_floor=0.01).mixture
    pooled = 0.01 * np.var(np.asarray(x), axis=0)

    def variances(mixture):
        s = np.asarray(mixture.covariance)
        return s if s.ndim == 2 else np.diagonal(s, axis1=1, axis2=2)

    np.testing.assert_allclose(variances(bare)[0], 1e-3, rtol=0.05)
    np.testing.assert_allclose(variances(kept)[0], pooled, rtol=0.02)
    # Component 1 is raised along the axis where the whole data are wide, and nowhere else.
    expected = [pooled[0], variances(bare)[1, 1]]
    assert expected[0] > 2 * variances(bare)[1, 0]
    np.testing.assert_allclose(variances(kept)[1], expected, rtol=0.02)


def test_weight_prior_and_empty_component():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(90, 2)), "float32")
    start = gmm.Mixture(
        jnp.log(jnp.asarray([0.5, 0.5])), jnp.asarray([[0.0, 0], [1e4, 0]]), jnp.full((2, 2), 2.0)
    )
    plain = gmm.fit(start, x, iterations=3, tol=0.0).mixture
    prior = gmm.fit(start, x, iterations=3, tol=0.0, weight_prior=6.0).mixture
    np.testing.assert_allclose(jnp.exp(plain.log_weights), [1, 0], atol=1e-6)
    np.testing.assert_allclose(jnp.exp(prior.log_weights), [0.95, 0.05], rtol=1e-4)
    for mixture in (plain, prior):
        np.testing.assert_allclose(mixture.means[1], [1e4, 0])
        assert np.all(np.asarray(mixture.covariance) > 0)
    resp, norm = gmm.log_responsibilities(plain, x)
    assert np.all(np.isfinite(norm))
    np.testing.assert_allclose(resp[:, 0], 0, atol=1e-6)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_dead_components_are_reseeded(covariance):
    mixture = random_mixture(8, k=5, covariance=covariance, dtype="float32")
    weights = jnp.asarray([0.001, 0.3, 0.649, 0.0, 0.05])
    mixture = gmm.Mixture(jnp.log(weights), mixture.means, mixture.covariance)
    revived, dead = jax.jit(gmm.reseed_dead)(mixture)
    np.testing.assert_array_equal(dead, [True, False, False, True, False])
    np.testing.assert_allclose(jnp.exp(revived.log_weights).sum(), 1, rtol=1e-5)
    # 0.649 gives half to component 0, and 0.3245 (still the heaviest) half to component 3.
    expected = np.asarray([0.3245 / 2, 0.3, 0.3245, 0.3245 / 2, 0.05]) / 0.999
    np.testing.assert_allclose(np.sort(jnp.exp(revived.log_weights)), np.sort(expected), rtol=1e-4)
    for c in (1, 4):
        np.testing.assert_array_equal(revived.means[c], mixture.means[c])
    # The parts of component 2 together keep its mean and covariance.
    parts = [full(revived)[c] for c in (0, 2, 3)]
    whole = full(mixture)[2]
    share = np.asarray([p[0] for p in parts]) / sum(p[0] for p in parts)
    mean = sum(s * p[1] for s, p in zip(share, parts, strict=True))
    np.testing.assert_allclose(mean, whole[1], atol=1e-4)
    spread = sum(
        s * (p[2] + np.outer(p[1] - mean, p[1] - mean)) for s, p in zip(share, parts, strict=True)
    )
    np.testing.assert_allclose(np.diag(spread), np.diag(whole[2]), rtol=1e-4)
    assert all(np.linalg.eigvalsh(p[2]).min() > 0 for p in parts)
    healthy, none = gmm.reseed_dead(revived)
    assert not np.any(none)
    np.testing.assert_allclose(healthy.means, revived.means)
    np.testing.assert_allclose(healthy.log_weights, revived.log_weights, atol=1e-6)


@pytest.mark.parametrize(("balance", "shares"), [(0.0, (0.8, 0.2)), (1.0, (0.5, 0.5))])
def test_balance_decides_how_the_data_are_shared(balance, shares):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(800, 1)), 4 + rng.normal(size=(200, 1))])
    start = gmm.Mixture(
        jnp.log(jnp.full(2, 0.5)), jnp.asarray([[0.0], [4.0]]), jnp.full((2, 1), 1.0)
    )
    data = jnp.asarray(x, "float32")
    fitted = gmm.fit(start, data, iterations=200, tol=0.0, balance=balance).mixture
    log_resp, _ = gmm.log_responsibilities(fitted, data)
    np.testing.assert_allclose(jnp.exp(log_resp).mean(0), shares, atol=0.02)
    np.testing.assert_allclose(jnp.exp(fitted.log_weights).sum(), 1.0, rtol=1e-5)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_init_finds_the_clusters(covariance):
    x, truth = blobs(seed=2, k=6, n=600, gap=8.0)
    result = gmm.init(jax.random.key(0), jnp.asarray(x, "float32"), 6, covariance=covariance)
    labels = gmm.predict(result.mixture, jnp.asarray(x, "float32"))
    assert adjusted_rand_score(truth, labels) > 0.95
    oracle = GaussianMixture(6, covariance_type=covariance, n_init=3, random_state=0).fit(x)
    assert float(result.log_likelihood[-1]) > oracle.lower_bound_ - 0.01
    one = gmm.init(
        jax.random.key(0), jnp.asarray(x, "float32"), 6, covariance=covariance, restarts=1
    )
    assert float(one.log_likelihood[-1]) <= float(result.log_likelihood[-1]) + 1e-4


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_samples_have_the_moments_of_the_mixture(covariance):
    mixture = random_mixture(4, covariance=covariance, dtype="float32")
    n = 40_000
    z, labels = gmm.sample(mixture, jax.random.key(0), n)
    np.testing.assert_allclose(np.bincount(labels) / n, np.exp(mixture.log_weights), atol=0.012)
    z, labels = gmm.sample(mixture, jax.random.key(1), n, component=2, temperature=0.5)
    assert set(np.asarray(labels).tolist()) == {2}
    _, mean, spread = full(mixture)[2]
    np.testing.assert_allclose(z.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(np.cov(np.asarray(z).T), 0.25 * spread, atol=0.05 * spread.max())
    each = jnp.arange(n) % K
    np.testing.assert_array_equal(
        gmm.sample(mixture, jax.random.key(1), n, component=each)[1], each
    )


def test_under_vmap_and_pmap_and_without_recompiling():
    x = jnp.stack([jnp.asarray(blobs(seed)[0], "float32") for seed in range(2)])
    start = random_mixture(dtype="float32")
    single = [gmm.fit(start, one, iterations=30, tol=3e-3) for one in x]
    batched = jax.vmap(lambda one: gmm.fit(start, one, iterations=30, tol=3e-3))(x)
    mapped = jax.pmap(
        lambda one: gmm.fit(start, one, iterations=30, tol=3e-3, axis_name="i"), axis_name="i"
    )(x[:1])
    assert int(single[0].iterations) != int(single[1].iterations)
    for i, one in enumerate(single):
        assert int(batched.iterations[i]) == int(one.iterations)
        np.testing.assert_allclose(batched.mixture.means[i], one.mixture.means, atol=1e-4)
    np.testing.assert_allclose(mapped.mixture.means[0], single[0].mixture.means, atol=1e-4)
    before = gmm.fit._cache_size()
    gmm.fit(single[0].mixture, x[1] + 1, iterations=30, tol=0.5)
    assert gmm.fit._cache_size() == before


def test_gradient_of_the_bound_is_that_of_fixed_responsibilities():
    m, v = posterior(9, n=10)
    with jax.enable_x64(True):
        m, v = jnp.asarray(m), jnp.asarray(v)
        mixture = random_mixture(9)
        g = jnp.exp(gmm.log_responsibilities(mixture, m, v)[0])
        tight = jax.grad(lambda m: gmm.mixture_kl_bound(mixture, m, v).sum())(m)
        fixed = jax.grad(lambda m: (g * gmm.kl_to_components(mixture, m, v)).sum())(m)
    np.testing.assert_allclose(tight, fixed, rtol=1e-10)


def test_rows_spread_over_devices():
    """On four simulated devices, pmap and shard_map give what one device gives."""
    program = """
        import jax, jax.numpy as jnp, numpy as np
        from functools import partial
        from jax.sharding import AxisType, PartitionSpec as P
        from dec_diffusion import gmm, kmeans
        x = jax.random.normal(jax.random.key(0), (400, 3)) + 4 * (jnp.arange(400) % 4)[:, None]
        far = jnp.asarray([[50.0, 0, 0], [-60.0, 0, 0]])
        centers = jnp.concatenate([x[:3], far])
        start = gmm.Mixture(jnp.full(4, -jnp.log(4.0)), x[:4], jnp.full((4, 3), 2.0))
        mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
        def em(x, axis_name=None):
            return gmm.fit(start, x, iterations=10, axis_name=axis_name).mixture
        def centroids(x, axis_name=None):
            return kmeans.lloyd(x, centers, axis_name=axis_name).centers
        for f in (em, centroids):
            one, inside = f(x), partial(f, axis_name="i")
            shard = partial(jax.shard_map, inside, mesh=mesh, in_specs=P("i"), out_specs=P())
            others = [jax.jit(shard(check_vma=False))(x)]
            mapped = jax.pmap(inside, axis_name="i")(x.reshape(4, 100, 3))
            others += [jax.tree.map(lambda leaf: leaf[0], mapped)]
            for other in others:
                jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one, other)
        print("agree on", jax.device_count())
    """
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "agree on 4", done.stderr


def test_bad_input():
    x = jnp.zeros((10, 2))
    with pytest.raises(InputError, match="clusters = 11"):
        gmm.init(jax.random.key(0), x, 11)
    with pytest.raises(InputError, match="'tied' is unknown"):
        gmm.init(jax.random.key(0), x, 2, covariance="tied")
