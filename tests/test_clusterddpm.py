"""The method's own mathematics; the mixture's is in test_gmm, the schedule's in test_schedule.

T numbers: T1 sampled and closed forms of the KL, T2 its Monte Carlo meaning, T3 the Q-bound of a
linear-Gaussian decoder, T5b information and denoising error, T8 the weight of the KL.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import pdist
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.metrics import adjusted_rand_score

from dec_diffusion import engine, features, gmm, schedule
from dec_diffusion.method import DataSpec, Method
from dec_diffusion.methods import clusterddpm
from dec_diffusion.methods.clusterddpm import ClusterDDPM
from dec_diffusion.networks import denoiser_network
from dec_diffusion.spread import Table
from dec_diffusion.types import InputError

TINY = {
    "num_clusters": 3,
    "latent": 3,
    "width": 4,
    "multipliers": (1,),
    "encoder_multipliers": (1,),
    "steps": 3,
    "pretrain_iterations": 1,
    "balance_iterations": 0,
    "em_iterations": 2,
    "sample_steps": 4,
}


def begun(mixture: gmm.Mixture, groups=(0,) * 40) -> clusterddpm.Clusters:
    return clusterddpm.Clusters(mixture, Table(jnp.asarray(groups, jnp.int32), len(groups)))


def problem(k=5, d=6, n=7, seed=0):
    rng = np.random.default_rng(seed)
    mixture = gmm.Mixture(
        jnp.asarray(np.log(rng.dirichlet(np.ones(k)))),
        jnp.asarray(rng.normal(size=(k, d))),
        jnp.asarray(rng.uniform(0.3, 1.5, (k, d))),
    )
    return mixture, jnp.asarray(rng.normal(size=(n, d))), jnp.asarray(rng.uniform(0.1, 1, (n, d)))


def test_sampled_kl_is_the_official_expression_where_its_floor_does_not_act():
    """T1: sum_c g_c KL_c + KL(g | pi) equals the three terms of the official loss."""
    with jax.enable_x64(True):
        mixture, mean, variance = problem()
        z = mean + 0.1
        ours = clusterddpm.sampled_kl(mixture, mean, variance, z)
        m, v, z = (np.asarray(a) for a in (mean, variance, z))
        pi, mu, s2 = (np.asarray(a) for a in (jnp.exp(mixture.log_weights), *_rest(mixture)))
        density = np.stack([multivariate_normal(mu[c], np.diag(s2[c])).pdf(z) for c in range(5)], 1)
        g = pi * density
        g = g / g.sum(1, keepdims=True)
        quadratic = np.log(s2) + v[:, None] / s2 + (m[:, None] - mu) ** 2 / s2
        official = (
            0.5 * (g * quadratic.sum(-1)).sum(1)
            - (g * np.log(pi / g)).sum(1)
            - 0.5 * (1 + np.log(v)).sum(1)
        )
    np.testing.assert_allclose(ours, official, rtol=1e-10)


def _rest(mixture):
    return mixture.means, mixture.covariance


def test_a_component_of_weight_zero_adds_nothing_to_the_sampled_kl():
    with jax.enable_x64(True):
        mixture, mean, variance = problem(k=4)
        dead = gmm.Mixture(
            jnp.append(mixture.log_weights, -jnp.inf),
            jnp.concatenate([mixture.means, mean[:1]]),
            jnp.concatenate([mixture.covariance, variance[:1]]),
        )

        def total(mean, mixture):
            return clusterddpm.sampled_kl(mixture, mean, variance, mean + 0.1).sum()

        both = [jax.value_and_grad(total)(mean, some) for some in (dead, mixture)]
    for found, expected in zip(*both, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_sampled_kl_means_what_its_monte_carlo_does():
    """T2: it is E over z ~ q, c ~ g of log q(z) g_c / (pi_c N_c(z))."""
    with jax.enable_x64(True):
        mixture, mean, variance = problem(n=1)
        anchor = mean + 0.2
        expected = float(clusterddpm.sampled_kl(mixture, mean, variance, anchor)[0])
        log_g = np.asarray(gmm.log_responsibilities(mixture, anchor)[0][0])
        rng = np.random.default_rng(1)
        n = 400_000
        z = np.asarray(mean) + np.sqrt(np.asarray(variance)) * rng.normal(size=(n, 6))
        joint = np.asarray(gmm.log_joint(mixture, jnp.asarray(z)))
        log_q = multivariate_normal(np.asarray(mean)[0], np.diag(np.asarray(variance)[0])).logpdf(z)
        c = rng.choice(5, n, p=np.exp(log_g))
        terms = log_q + log_g[c] - joint[np.arange(n), c]
    assert abs(terms.mean() - expected) < 5 * terms.std() / np.sqrt(n)


def test_closed_form_kl_is_never_above_the_sampled_one_and_has_its_gradient_at_the_best_g():
    with jax.enable_x64(True):
        mixture, mean, variance = problem()
        closed = gmm.mixture_kl_bound(mixture, mean, variance)
        for seed in range(5):
            z = mean + jnp.sqrt(variance) * jax.random.normal(jax.random.key(seed), mean.shape)
            assert (closed <= clusterddpm.sampled_kl(mixture, mean, variance, z) + 1e-9).all()
        log_g, _ = gmm.log_responsibilities(mixture, mean, variance)

        def fixed(mean):
            kl = gmm.kl_to_components(mixture, mean, variance)
            return jnp.sum(jnp.exp(log_g) * (kl + log_g - mixture.log_weights))

        gradient = jax.grad(lambda m: gmm.mixture_kl_bound(mixture, m, variance).sum())(mean)
        np.testing.assert_allclose(gradient, jax.grad(fixed)(mean), rtol=1e-9)


def test_lower_bound_of_q_for_a_linear_gaussian_decoder():
    """T3 and T3b: the gaps of Q and of log p(x) are the divergences the theory names."""
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        mixture, mean, variance = problem(n=1)
        kl = np.asarray(gmm.kl_to_components(mixture, mean, variance))[0]
    pi = np.exp(np.asarray(mixture.log_weights))
    mu, s2 = np.asarray(mixture.means), np.asarray(mixture.covariance)
    m, v = np.asarray(mean)[0], np.asarray(variance)[0]
    w, b, noise = rng.normal(size=(9, 6)), rng.normal(size=9), 0.7
    x = rng.normal(size=9)
    g = rng.dirichlet(np.ones(5))

    log_x_c = np.array(
        [
            multivariate_normal(w @ mu[c] + b, w @ np.diag(s2[c]) @ w.T + noise * np.eye(9)).logpdf(
                x
            )
            for c in range(5)
        ]
    )
    residual = x - w @ m - b
    expected_log_x = (
        -0.5 * 9 * np.log(2 * np.pi * noise)
        - 0.5 * (residual @ residual + np.trace(w @ np.diag(v) @ w.T)) / noise
    )
    lower = expected_log_x - g @ kl + g @ np.log(pi)

    def posterior_kl(c):
        precision = np.diag(1 / s2[c]) + w.T @ w / noise
        cov = np.linalg.inv(precision)
        centre = cov @ (mu[c] / s2[c] + w.T @ (x - b) / noise)
        delta = centre - m
        return 0.5 * (
            np.trace(precision @ np.diag(v))
            + delta @ precision @ delta
            - 6
            + np.linalg.slogdet(cov)[1]
            - np.log(v).sum()
        )

    gap = g @ np.array([posterior_kl(c) for c in range(5)])
    assert gap > 0
    np.testing.assert_allclose(g @ (np.log(pi) + log_x_c) - lower, gap, rtol=1e-9)
    log_x = logsumexp(np.log(pi) + log_x_c)
    responsibilities = np.exp(np.log(pi) + log_x_c - log_x)
    entropy = -(g * np.log(g)).sum()
    np.testing.assert_allclose(
        log_x - (lower + entropy), gap + (g * np.log(g / responsibilities)).sum(), rtol=1e-9
    )


def test_denoising_can_only_improve_by_information_in_z():
    """T5b: half the integral over SNR of the gain in MMSE is the mutual information of x0 and z."""
    total, noise = 1.7, 0.6  # x0 = z + e, variances of z and e
    snr = np.geomspace(1e-6, 1e6, 200_001)
    without = (total + noise) / (1 + snr * (total + noise))
    with_z = noise / (1 + snr * noise)
    information = 0.5 * np.trapezoid(without - with_z, snr)
    np.testing.assert_allclose(information, 0.5 * np.log((total + noise) / noise), rtol=1e-4)


def test_kl_scale():
    """T8: for the official schedule the ELBO's weight is 1 / 6.196, and the code's 0.1 is 0.62."""
    paper = ClusterDDPM(
        noise_schedule="linear",
        num_steps=400,
        zero_terminal=False,
        prediction="eps",
        uniform_noise=1.0,
    )
    noise = clusterddpm.Noise(-1.5, 1.0)
    scale = clusterddpm.kl_scale(paper, clusterddpm._schedule(paper), noise)
    np.testing.assert_allclose(scale, 1 / 6.196, rtol=1e-3)
    normal = ClusterDDPM()
    scale = clusterddpm.kl_scale(normal, clusterddpm._schedule(normal), noise)
    # 1/2 the integral of sigmoid from -3.5 to 0.5, in closed form.
    exact = 0.5 * (np.log1p(np.exp(0.5)) - np.log1p(np.exp(-3.5)))
    np.testing.assert_allclose(scale, 1 / exact, rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((8, 8, 1), -1.5), ((28, 28, 1), -1.5 - 2 * np.log(3.5)), ((16, 4, 3), -1.5), ((7,), -1.5)],
)
def test_larger_images_are_shown_with_more_noise(shape, expected):
    """Averaging over k x k pixels divides the variance of the noise by k^2."""
    spec = DataSpec(shape, 100)
    np.testing.assert_allclose(clusterddpm.log_snr_mean(ClusterDDPM(), spec), expected)
    assert clusterddpm.log_snr_mean(ClusterDDPM(log_snr_mean=0.5), spec) == 0.5


def test_the_sampler_stays_where_training_has_seen_noise():
    """Beyond, at log-SNRs that it has never seen, a denoiser leaves grain on the images."""
    noise = clusterddpm.Noise(-4.0, 0.5)
    settings = ClusterDDPM(sample_steps=5)
    grid = clusterddpm._schedule(settings)
    levels = clusterddpm._levels(settings, grid, noise)
    np.testing.assert_allclose(levels, [-6.0, -5.25, -4.5, -3.75, -3.0])
    # A share of all levels in training: the sampler goes to the cleanest of the schedule.
    levels = clusterddpm._levels(dataclasses.replace(settings, uniform_noise=0.1), grid, noise)
    assert levels[-1] == grid.log_snr[1] > 5.0


def examples(n=40, shape=(8, 8, 1), seed=0):
    raw = np.random.default_rng(seed).integers(0, 256, (n, *shape)).astype(np.uint8)
    return engine.Examples(jnp.asarray(raw), jnp.float32(127.5), jnp.float32(127.5))


VARIANTS = {
    "default": ((8, 8, 1), {}),
    "layers": ((8, 8, 1), {"start": "layers"}),
    "colour, odd size, attention": ((7, 5, 3), {"multipliers": (1, 2), "attention": (1,)}),
    "bfloat16": ((8, 8, 1), {"dtype": "bfloat16"}),
    "no views": ((8, 8, 1), {"rotate": 0.0, "shift": 0.0, "scale": 0.0, "shear": 0.0}),
    "flips": ((8, 8, 1), {"flip": True}),
    "vectors": ((6,), {"noise": 0.1}),
    "as the official code": (
        (8, 8, 1),
        {
            "network": "official",
            "unit_range": True,
            "noise_schedule": "linear",
            "zero_terminal": False,
            "prediction": "eps",
            "uniform_noise": 1.0,
            "responsibilities": "sampled",
            "sampled_latents": True,
            "kl_warmup": 0.0,
            "ema": 0.0,
            "decay": False,
        },
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("default", "layers", "as the official code", "vectors")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in VARIANTS
    ],
)
def test_every_variant_trains_predicts_and_samples(name):
    shape, settings = VARIANTS[name]
    data = examples(shape=shape)
    method = ClusterDDPM(**{**TINY, **settings}).build(DataSpec(shape, 40))
    key = jax.random.key(0)
    fetch = engine.fetch_resident(data)
    rows = engine.sweep_order(batch_size=20, num_examples=40)
    state = engine.init_state(method, key, fetch(rows[0]))
    phase = method.phases["em"]
    assert phase.begin is not None

    @jax.jit
    def train(state):
        collected = engine.collect(phase.begin, state.ema_params, state.cluster, rows, fetch, key)
        state, _ = engine.begin_phase(phase, state, collected, key)
        return engine.em_iteration(phase, state, data, key, batch_size=8, sweep_size=20)

    after, metrics = train(state)
    assert np.isfinite(metrics["loss"]).all()
    for part in ("encoder", "denoiser"):
        same = jax.tree.map(
            lambda a, b: bool(jnp.all(a == b)), state.params[part], after.params[part]
        )
        assert not all(jax.tree.leaves(same)), part

    @jax.jit
    def use(state, key):
        batch = fetch(rows[0])
        return (
            method.predict(state.ema_params, state.cluster, batch, key),
            method.embed(state.ema_params, state.cluster, batch, key),
        )

    log_resp, z = use(after, key)
    assert log_resp.shape == (20, 3) and z.shape == (20, 3)
    np.testing.assert_allclose(jnp.exp(log_resp).sum(1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(log_resp, use(after, jax.random.key(9))[0])
    sample = method.sample
    assert sample is not None
    draw = jax.jit(lambda s: sample(s.ema_params, s.cluster, key, jnp.asarray([0, 2, 1, 1])))
    x = draw(after)
    assert x.shape == (4, *shape) and x.dtype == jnp.float32
    assert np.isfinite(x).all()
    if len(shape) == 3:
        assert float(jnp.abs(x).max()) <= (3.0 if settings.get("unit_range") else 1.0)


def test_noise_predicted_for_vectors_keeps_samples_within_the_data():
    settings = {**TINY, "prediction": "eps", "uniform_noise": 0.5, "sample_steps": 2}
    method = ClusterDDPM(**settings).build(DataSpec((3,), 40))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 3)) * [1, 2, 0], jnp.float32)
    first, second = (
        {"image": rows, "index": jnp.arange(20), "weight": jnp.ones(20)}
        for rows in (x[:20], x[20:])
    )
    key, start = jax.random.key(0), jnp.float32(0)
    params, cluster = jax.jit(method.init)(key, first)
    # Either phase keeps what it has seen.
    _, (cluster, _) = jax.jit(method.phases["pretrain"].loss)(params, cluster, first, key, start)
    np.testing.assert_array_equal(cluster.reach, jnp.abs(x[:20]).max(0))
    _, (cluster, _) = jax.jit(method.phases["em"].loss)(params, cluster, second, key, start)
    np.testing.assert_array_equal(cluster.reach, jnp.abs(x).max(0))
    assert method.sample is not None
    drawn = jax.jit(method.sample)(params, cluster, key, jnp.full(30, -1))
    assert (jnp.abs(drawn) <= cluster.reach).all() and float(jnp.abs(drawn).max()) > 0.5


def test_pretraining_loss_is_the_weighted_sum_of_its_parts():
    method = ClusterDDPM(**TINY, pretrain_kl=0.25).build(DataSpec((8, 8, 1), 40))
    batch = engine.fetch_resident(examples())(jnp.arange(16))
    key = jax.random.key(0)
    params, cluster = jax.jit(method.init)(key, batch)
    loss = jax.jit(method.phases["pretrain"].loss)
    value, (same, metrics) = loss(params, cluster, batch, key, jnp.float32(0))
    np.testing.assert_allclose(value, metrics["denoising"] + 0.25 * metrics["kl"], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, same, cluster)


def test_kl_weight_rises_from_zero():
    method = ClusterDDPM(**TINY, kl_weight=0.5, kl_warmup=0.2).build(DataSpec((8, 8, 1), 40))
    settings = ClusterDDPM(kl_weight=0.5)
    full = 0.5 * clusterddpm.kl_scale(
        settings, clusterddpm._schedule(settings), clusterddpm.Noise(-1.5, 1.0)
    )
    batch = engine.fetch_resident(examples())(jnp.arange(16))
    key = jax.random.key(0)
    params, cluster = jax.jit(method.init)(key, batch)
    loss = jax.jit(method.phases["em"].loss)
    for progress, share in ((0.0, 0.0), (0.1, 0.5), (0.2, 1.0), (0.9, 1.0)):
        value, (_, m) = loss(params, cluster, batch, key, jnp.float32(progress))
        np.testing.assert_allclose(m["kl_weight"], share * full, rtol=1e-5)
        np.testing.assert_allclose(value, m["denoising"] + share * full * m["kl"], rtol=1e-5)


def test_mixture_is_fitted_to_everything_and_padding_has_no_effect():
    method = ClusterDDPM(**TINY).build(DataSpec((8, 8, 1), 40))
    stage = method.phases["em"].refresh
    assert stage is not None
    key = jax.random.key(1)
    rng = np.random.default_rng(0)
    mean = jnp.asarray(rng.normal(size=(40, 3)), jnp.float32)
    variance = jnp.full((40, 3), 0.1)
    start = begun(gmm.Mixture(jnp.log(jnp.full(3, 1 / 3)), mean[:3], jnp.ones((3, 3))))
    padded = jnp.concatenate([mean, 1e3 * jnp.ones((9, 3))]), jnp.ones((49, 3))
    weight = jnp.concatenate([jnp.ones(40), jnp.zeros(9)])
    _, one, info = stage.update({}, start, (mean, variance), jnp.ones(40), key, 1.0)
    variance_padded = jnp.concatenate([variance, padded[1][40:]])
    _, two, _ = stage.update({}, start, (padded[0], variance_padded), weight, key, 1.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, two)
    assert 0 < info["smallest_weight"] <= info["largest_weight"] < 1


@pytest.mark.parametrize(
    ("start", "clearer"),
    [
        ("graph", ""),
        ("layers", "layers"),
        ("layers", "thumbnails"),
        ("layers", "neither"),
        ("likelihood", ""),
    ],
)
def test_the_first_mixture_has_the_moments_of_the_groups(start: str, clearer: str):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 120)
    # Where the denoiser's layers are looked at the latents overlap.
    apart = 0.5 if start == "layers" else 5.0
    mean = (apart * np.eye(3)[truth] + 0.5 * rng.normal(size=(120, 3))).astype(np.float32)
    variance = np.full((120, 3), 0.1, np.float32)
    layers = np.stack([5 * np.eye(4)[truth], 5 * np.eye(4)[(truth + 1) % 3]], 1)
    layers += (9.0 if clearer == "thumbnails" else 0.5) * rng.normal(size=layers.shape)
    # Where neither is clearer the thumbnails have groups of their own, which must not be taken.
    theirs = rng.permutation(truth) if clearer == "neither" else truth
    small = 5 * np.eye(5)[theirs] + (9.0 if clearer == "layers" else 0.5) * rng.normal(
        size=(120, 5)
    )
    method = ClusterDDPM(**TINY, start=start).build(DataSpec((8, 8, 1), 120))
    stage = method.phases["em"].begin
    assert stage is not None
    empty = begun(gmm.Mixture(jnp.zeros(3), jnp.zeros((3, 3)), jnp.ones((3, 3))), np.zeros(120))

    def padded(a: np.ndarray) -> jax.Array:
        return jnp.asarray(np.concatenate([a, np.full((8, *a.shape[1:]), 1e3)]), jnp.float32)

    seen: Any = padded(mean), padded(variance)
    if start == "layers":
        seen = seen, padded(layers), padded(small)
    weight = jnp.asarray(np.arange(128) < 120, jnp.float32)
    _, found, info = stage.update({}, empty, seen, weight, jax.random.key(2), 0.0)
    both = {"modularity_thumbnails"} if start == "layers" else set()
    assert set(info) == both | {"mixture_log_likelihood" if start == "likelihood" else "modularity"}
    if start == "layers":
        ahead = float(info["modularity_thumbnails"] - info["modularity"])
        assert {"layers": ahead < -0.1, "thumbnails": ahead > 0.1}.get(clearer, abs(ahead) < 0.01)
        assert adjusted_rand_score(found.start.values, truth) == 1
    found = found.mixture
    order = np.asarray(found.means).argmax(1).argsort()
    for c, i in enumerate(order):
        own = mean[truth == c]
        np.testing.assert_allclose(found.means[i], own.mean(0), atol=1e-3)
        np.testing.assert_allclose(found.covariance[i], own.var(0) + 0.1, rtol=1e-2)
        assert float(jnp.exp(found.log_weights[i])) == pytest.approx(len(own) / 120, abs=1e-3)


def test_the_groups_of_the_graph_are_held_until_the_latents_have_learnt_them():
    rng = np.random.default_rng(0)
    # One group is so small that a component of its size would be given up.
    n, groups = 40, np.r_[rng.integers(0, 2, 39), 2]
    mean, variance = jnp.asarray(rng.normal(size=(n, 3)), jnp.float32), jnp.full((n, 3), 0.1)
    log_weights = jnp.log(jnp.asarray([0.5, 0.3, 0.2]))
    cluster = begun(gmm.Mixture(log_weights, mean[:3], jnp.ones((3, 3))), groups)
    settings = {**TINY, "start": "layers", "kl_warmup": 0.0}

    def built(hold: float) -> Method:
        return ClusterDDPM(**settings, hold=hold).build(DataSpec((8, 8, 1), n))

    def after(progress: float, hold: float = 0.3) -> clusterddpm.Clusters:
        refresh = built(hold).phases["em"].refresh
        assert refresh is not None
        update = jax.jit(refresh.update)
        return update({}, cluster, (mean, variance), jnp.ones(n), jax.random.key(0), progress)[1]

    held, free = after(0.2), after(0.4)
    for a, b in zip(jax.tree.leaves(after(1.0, hold=1.0)), jax.tree.leaves(held), strict=True):
        np.testing.assert_array_equal(a, b)
    for c in range(3):
        np.testing.assert_allclose(
            held.mixture.means[c], np.asarray(mean)[groups == c].mean(0), atol=1e-5
        )
    assert np.abs(free.mixture.means - held.mixture.means).max() > 0.1
    assert np.abs(after(0.0, hold=0.0).mixture.means - held.mixture.means).max() > 0.1
    np.testing.assert_array_equal(free.start.values, groups)
    # The loss draws posteriors to their own component first, to the mixture later.
    batch = engine.fetch_resident(examples())(jnp.arange(16))
    params, _ = built(0.3).init(jax.random.key(1), batch)
    loss = jax.jit(built(0.3).phases["em"].loss)
    kls = [
        float(loss(params, cluster, batch, jax.random.key(2), progress)[1][1]["kl"])
        for progress in (0.2, 0.4)
    ]
    assert kls[0] > kls[1] + 0.1


def test_layers_are_sketched_without_the_latent_and_by_the_example_alone():
    x = jax.random.normal(jax.random.key(0), (40, 8, 8, 1))
    batch = {"image": x, "index": jnp.arange(40), "weight": jnp.ones(40)}
    method = ClusterDDPM(**TINY, start="layers").build(DataSpec((8, 8, 1), 40))
    stage = method.phases["em"].begin
    assert stage is not None
    params, cluster = method.init(jax.random.key(1), batch)
    # As drawn, no layer depends on what conditions it.
    moved = jax.tree.map(lambda a: a + 0.1, params["denoiser"])
    params = {**params, "denoiser": moved}
    collect = jax.jit(stage.collect)
    (mean, _), layers, small = collect(params, cluster, batch, jax.random.key(2))
    assert layers.shape == (40, 3, 64)
    np.testing.assert_allclose(small, features.thumbnails(x), atol=1e-5)
    part = jax.tree.map(lambda a: a[5:9], batch)
    np.testing.assert_allclose(
        collect(params, cluster, part, jax.random.key(3))[1], layers[5:9], atol=1e-4
    )
    other = {**params, "encoder": jax.tree.map(lambda a: a + 0.1, params["encoder"])}
    (others, _), same, _ = collect(other, cluster, batch, jax.random.key(2))
    assert np.abs(others - mean).max() > 1e-3
    np.testing.assert_array_equal(same, layers)


def test_thumbnails_tell_correlation_from_brightness_and_contrast():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(6, 28, 20, 3)), jnp.float32)
    small = np.asarray(features.thumbnails(x))
    assert small.shape == (6, 14 * 14 * 3)
    np.testing.assert_allclose((small**2).sum(1), 1, atol=1e-5)
    squares = ((small[:, None] - small) ** 2).sum(2)
    np.testing.assert_allclose(squares, 2 - 2 * np.corrcoef(small), atol=1e-5)
    np.testing.assert_allclose(features.thumbnails(0.3 * x - 0.5), small, atol=1e-5)
    # As large as they are: nothing is lost; a constant image has no direction.
    tiny = rng.normal(size=(4, 8, 8, 1)).astype(np.float32)
    flat = (tiny - tiny.mean((1, 2, 3), keepdims=True)).reshape(4, -1)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(features.thumbnails(jnp.asarray(tiny)), flat, atol=1e-5)
    np.testing.assert_allclose(features.thumbnails(jnp.ones((1, 30, 30, 1))), 0, atol=1e-2)
    np.testing.assert_array_equal(
        features.thumbnails(jnp.arange(6.0).reshape(2, 3)), [[0, 1, 2], [3, 4, 5]]
    )


def test_sketches_keep_distances():
    denoiser = features.Denoiser(
        denoiser_network((8, 8, 1), width=4, multipliers=(1, 2)), schedule.cosine(100), "v"
    )
    extract = features.describe(denoiser, (8, 8, 1), pool="layout", draws=2)
    x = jax.random.normal(jax.random.key(0), (30, 8, 8, 1))
    params, t = denoiser.network.init(jax.random.key(1), x, jnp.zeros(30)), jnp.int32(40)
    h = np.asarray(features.halves(extract, params, x, t).mean(0))
    sketch = np.asarray(features.sketches(extract, params, x, t, 64))
    for one, short in zip(h, sketch, strict=True):
        ratio = pdist(short, "sqeuclidean") / pdist(one, "sqeuclidean")
        assert 0.75 < ratio.mean() < 1.25 and ratio.min() > 0.2 and ratio.max() < 2.5


def test_the_first_e_steps_balance_the_components():
    settings = {**TINY, "balance_iterations": 2, "em_iterations": 3}
    method = ClusterDDPM(**settings).build(DataSpec((8, 8, 1), 40))
    assert list(method.phases) == ["pretrain", "em"] and method.phases["em"].iterations == 5
    stage = method.phases["em"].refresh
    assert stage is not None
    key = jax.random.key(1)
    mean = jnp.asarray(np.random.default_rng(0).normal(size=(40, 3)), jnp.float32)
    start = begun(gmm.Mixture(jnp.log(jnp.full(3, 1 / 3)), mean[:3], jnp.ones((3, 3))))
    update = jax.jit(stage.update)
    spread = []
    for iteration in range(6):
        progress = jnp.float32(iteration) / 5
        features = mean, jnp.full((40, 3), 0.1)
        info = update({}, start, features, jnp.ones(40), key, progress)[2]
        spread.append(float(info["largest_weight"] - info["smallest_weight"]))
    assert max(spread[:2]) < 0.02 < min(spread[2:])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"network": "resnet"}, "network=resnet"),
        ({"latent": 0}, "latent=0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"kl_weight": -0.1}, "kl_weight=-0.1"),
        ({"drop_latent": 1.5}, "drop_latent=1.5"),
        ({"weight_prior": 0.5}, "weight_prior=0.5"),
        ({"sample_steps": 2000}, "sample_steps=2000"),
        ({"multipliers": ()}, "multipliers"),
        ({"attention": (-1,)}, "attention"),
        ({"anchors": 1}, "anchors=1"),
        ({"scale": 1.5}, "scale=1.5"),
        ({"reseed_below": 1.0}, "reseed_below=1.0"),
        ({"adam_b2": 1.0}, "adam_b2=1.0"),
        # 98% of the weights are those of the last step; 3% with the linear schedule.
        ({"prediction": "eps", "uniform_noise": 1.0}, "prediction=eps: .* 98% .*=linear"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(InputError, match=named):
        ClusterDDPM(**settings).build(DataSpec((8, 8, 1), 100))


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [({"network": "official"}, "network=unet"), ({"drop_latent": 0.0}, "drop_latent above 0")],
)
def test_layers_need_a_network_that_shows_them(settings, remedy):
    with pytest.raises(InputError, match=f"start=layers: needs .*method.{remedy}, or .*=graph"):
        ClusterDDPM(start="layers", **settings).build(DataSpec((28, 28, 1), 100))
