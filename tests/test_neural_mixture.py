"""The method's mathematics, exactly, and what it finds in sets whose groups are known.

N numbers are the properties listed in the notes the method was built from.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp, softmax
from sklearn.neighbors import NearestNeighbors

from dec_diffusion import Config, engine, fit, metrics
from dec_diffusion.config import TrainConfig
from dec_diffusion.data import DataConfig
from dec_diffusion.data import load as load_data
from dec_diffusion.data.synthetic import SETS, draw_blobs, log_posterior
from dec_diffusion.method import DataSpec
from dec_diffusion.methods import neural_mixture as nm
from dec_diffusion.methods.neural_mixture import NeuralMixture
from dec_diffusion.trained import load
from dec_diffusion.types import InputError

DENSITIES = ("S", "P", "X")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def problem(n=60, k=5, heads=(), seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    scores = jnp.asarray(scale * rng.normal(size=(n, *heads, k)))
    return scores, jnp.ones(n, scores.dtype)


def densities(scores, weight, density, **knobs):
    eps = knobs.pop("eps", 1e-5)
    norm = nm.normaliser(scores, weight, density=density, eps=eps, **knobs)
    return nm.log_density(norm, scores, density=density, **knobs)


# -- exact: densities --


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gain", [1.0, 3.0])
@pytest.mark.parametrize("density", ["P", "X"])
def test_densities_integrate_to_one_against_the_data(density, gain):
    """N2: every cluster's mean density is 1, so is the mixture's, and the likelihood is <= 0."""
    scores, weight = problem(heads=(3,))
    log_p = densities(scores, weight, density, gain=gain)
    np.testing.assert_allclose(jnp.exp(log_p).mean(0), 1.0, rtol=1e-10)
    prior = np.log(np.random.default_rng(1).dirichlet(np.ones(5)))
    np.testing.assert_allclose(jnp.exp(log_p + prior).sum(-1).mean(0), 1.0, rtol=1e-10)
    assert (nm.log_mixture(log_p + prior, weight) <= 1e-12).all()


@pytest.mark.usefixtures("x64")
def test_densities_are_their_formulas():
    scores, weight = problem()
    a = np.asarray(scores)
    s = 1 / (1 + np.exp(-1.5 * (a - a.mean(0)) / a.std(0)))
    by = {d: np.exp(densities(scores, weight, d, gain=1.5, eps=0.0)) for d in DENSITIES}
    np.testing.assert_allclose(by["S"], s / 0.5, rtol=1e-10)
    np.testing.assert_allclose(by["P"], s / s.mean(0), rtol=1e-10)
    np.testing.assert_allclose(by["X"], len(a) * softmax(a, axis=0), rtol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("density", ["S", "P"])
def test_scores_are_standardised(density):
    """N3: mean 0, variance 1; rescaling or shifting a neuron's scores changes nothing."""
    scores, weight = problem()
    norm = nm.normaliser(scores, weight, density=density, eps=0.0)
    s = (scores - norm.mean) / jnp.sqrt(norm.variance)
    np.testing.assert_allclose(s.mean(0), 0.0, atol=1e-10)
    np.testing.assert_allclose(s.var(0), 1.0, rtol=1e-10)
    rng = np.random.default_rng(1)
    other = scores * rng.uniform(0.1, 9, 5) + rng.normal(size=5)
    log_p, log_q = (densities(a, weight, density, eps=0.0) for a in (scores, other))
    np.testing.assert_allclose(log_p, log_q, atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("density", DENSITIES)
def test_neurons_and_examples_have_no_order(density):
    """N3: responsibilities permute with the neurons, the loss ignores the order of examples."""
    scores, weight = problem()
    log_p = densities(scores, weight, density)
    gamma = nm.responsibilities(log_p, 0.5)
    order = np.random.default_rng(1).permutation(5)
    np.testing.assert_allclose(
        nm.responsibilities(densities(scores[:, order], weight, density), 0.5),
        gamma[:, order],
        atol=1e-12,
    )
    rows = np.random.default_rng(2).permutation(len(scores))
    moved = densities(scores[rows], weight, density)
    loss = nm.em_loss(nm.responsibilities(moved, 0.5), moved, weight)
    np.testing.assert_allclose(loss, nm.em_loss(gamma, log_p, weight), rtol=1e-10)


@pytest.mark.parametrize("density", DENSITIES)
def test_padding_changes_nothing(density):
    """Rows of weight 0 leave statistics, losses and scores as they are."""
    scores, weight = problem(heads=(2,))
    rng = np.random.default_rng(1)
    padded = jnp.concatenate([scores, jnp.asarray(50 * rng.normal(size=(9, 2, 5)), jnp.float32)])
    zeros = jnp.concatenate([weight, jnp.zeros(9)])

    def everything(scores, weight):
        log_p = densities(scores, weight, density)
        gamma = nm.responsibilities(log_p, 0.5)
        return (
            nm.normaliser(scores, weight, density=density),
            nm.swapped_loss(log_p, log_p[..., ::-1], weight, tau=0.5),
            nm.log_mixture(log_p, weight),
            nm.information(log_p, log_p, weight),
            nm.effective_clusters(gamma, weight),
            nm.duplicates(log_p, weight),
            nm.update_prior(jnp.zeros((2, 5)), gamma, weight, rate=0.3),
        )

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5),
        everything(scores, weight),
        everything(padded, zeros),
    )


def test_densities_are_float32_under_bfloat16():
    scores, weight = problem()
    half = scores.astype(jnp.bfloat16)
    for density in DENSITIES:
        log_p = densities(half, weight, density)
        assert log_p.dtype == jnp.float32
        np.testing.assert_array_equal(log_p, densities(half.astype(jnp.float32), weight, density))


# -- exact: E-step and M-step --


@pytest.mark.parametrize("tau", [1.0, 0.5, 0.05, 1e-3, 0.0])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("density", DENSITIES)
def test_responsibilities_are_probabilities(density, scale, tau):
    """N1, also for scores of size 1e4 and tiny temperatures."""
    scores, weight = problem(scale=scale)
    gamma = np.asarray(nm.responsibilities(densities(scores, weight, density), tau))
    assert np.isfinite(gamma).all() and (gamma >= 0).all()
    np.testing.assert_allclose(gamma.sum(1), 1.0, atol=2e-6)


def test_a_temperature_sharpens_until_one_takes_all():
    log_joint, _ = problem()
    warm, cold, hard = (np.asarray(nm.responsibilities(log_joint, t)) for t in (1.0, 0.3, 0.0))
    np.testing.assert_allclose(warm, softmax(log_joint, axis=1), rtol=1e-5)
    assert (cold.max(1) > warm.max(1)).all()
    np.testing.assert_array_equal(hard, np.eye(5)[np.argmax(log_joint, 1)])
    np.testing.assert_allclose(nm.responsibilities(log_joint, 1e-5), hard, atol=1e-6)
    # Within a compiled step the temperature is an array.
    np.testing.assert_allclose(jax.jit(nm.responsibilities)(log_joint, 0.3), cold, rtol=1e-5)
    np.testing.assert_array_equal(jax.jit(nm.responsibilities)(log_joint, 0.0), hard)


@pytest.mark.usefixtures("x64")
def test_a_shared_constant_cancels():
    """N4: the constant of S plays no part in assignments."""
    scores, weight = problem()
    norm = nm.normaliser(scores, weight, density="S")
    log_p = nm.log_density(norm, scores, density="S")
    for constant in (1e-3, 1.0, 40.0):
        other = dataclasses.replace(norm, log_constant=jnp.full(5, np.log(constant)))
        np.testing.assert_allclose(
            nm.responsibilities(nm.log_density(other, scores, density="S"), 0.7),
            nm.responsibilities(log_p, 0.7),
            atol=1e-12,
        )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("density", DENSITIES)
def test_the_gradient_is_that_of_the_likelihood(density):
    """N5: holding the responsibilities constant turns EM's bound into the likelihood's gradient."""
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(50, 3))), jnp.asarray(rng.normal(size=(3, 4)))
    prior, weight = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1])), jnp.ones(50)

    def joint(w):
        return prior + densities(jnp.tanh(x @ w), weight, density)

    bound = jax.grad(lambda w: nm.em_loss(nm.responsibilities(joint(w), 1.0), joint(w), weight))(w)
    likelihood = jax.grad(lambda w: -nm.log_mixture(joint(w), weight))(w)
    np.testing.assert_allclose(bound, likelihood, atol=1e-12)
    assert np.abs(likelihood).max() > 1e-4
    sharpened = jax.grad(lambda w: nm.em_loss(nm.responsibilities(joint(w), 0.3), joint(w), weight))
    assert np.abs(sharpened(w) - likelihood).max() > 1e-3, "a temperature is what makes it differ"


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("density", DENSITIES)
def test_em_raises_the_likelihood(density):
    """N6: at least as much as its bound; gradient steps on the whole batch never lower it."""
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(80, 3))), jnp.asarray(rng.normal(size=(3, 4)))
    weight = jnp.ones(80)

    def joint(w):
        return densities(jnp.tanh(x @ w), weight, density) - jnp.log(4.0)

    gamma = nm.responsibilities(joint(w), 1.0)
    before = nm.em_loss(gamma, joint(w), weight), nm.log_mixture(joint(w), weight)
    for other in (w + 0.1 * rng.normal(size=w.shape) for _ in range(20)):
        gain_of_bound = before[0] - nm.em_loss(gamma, joint(other), weight)
        gain = nm.log_mixture(joint(other), weight) - before[1]
        assert gain >= gain_of_bound - 1e-12

    loss = jax.jit(lambda w: nm.em_loss(nm.responsibilities(joint(w), 1.0), joint(w), weight))
    slope, seen = jax.jit(jax.grad(loss)), []
    for _ in range(50):
        seen.append(nm.log_mixture(joint(w), weight))
        w = w - 0.05 * slope(w)
    assert np.diff(seen).min() >= -1e-12 and seen[-1] > seen[0] + 1e-5


@pytest.mark.usefixtures("x64")
def test_balanced_assignments_are_fixed_points():
    """N7: as densities, K times a doubly balanced assignment gives itself back."""
    rng = np.random.default_rng(0)
    gamma = rng.uniform(size=(40, 4))
    for _ in range(2000):  # Sinkhorn
        gamma /= gamma.sum(0) * 4 / 40
        gamma /= gamma.sum(1, keepdims=True)
    scores = jnp.log(jnp.asarray(gamma))
    log_p = densities(scores, jnp.ones(40), "X")
    np.testing.assert_allclose(nm.responsibilities(log_p, 1.0), gamma, atol=1e-12)
    np.testing.assert_allclose(nm.log_mixture(log_p - np.log(4), jnp.ones(40)), 0.0, atol=1e-12)


@pytest.mark.parametrize(
    ("k", "gain", "expected"),
    [(2, 1, 0.731), (4, 1, 0.4409), (4, 3, 0.688), (10, 1, 0.2025), (10, 3, 0.292), (20, 1, 0.105)],
)
@pytest.mark.parametrize("density", ["S", "P"])
def test_confidence_is_capped(density, k, gain, expected):
    """N8: even on a perfect partition into K equal groups; the cap has a closed form."""
    scores, weight = jnp.tile(jnp.eye(k), (7, 1)), jnp.ones(7 * k)
    gamma = nm.responsibilities(densities(scores, weight, density, gain=gain), 1.0)
    own, rest = (1 / (1 + np.exp(-gain * z)) for z in (np.sqrt(k - 1), -1 / np.sqrt(k - 1)))
    np.testing.assert_allclose(gamma.max(1), own / (own + (k - 1) * rest), atol=2e-5)
    np.testing.assert_allclose(gamma.max(1), expected, atol=6e-4)


@pytest.mark.usefixtures("x64")
def test_copies_of_one_split_are_noticed():
    """N9: pairs (u, -u) give an exactly constant mixture, 2 clusters that look like 10."""
    u = np.random.default_rng(0).normal(size=200)
    u = np.concatenate([u, -u])
    scores, weight = jnp.asarray(np.tile(np.stack([u, -u], 1), 5)), jnp.ones(400)
    for density in ("S", "P"):
        log_p = densities(scores, weight, density)
        mixture = jnp.exp(log_p).mean(1)
        np.testing.assert_allclose(mixture, 1.0, rtol=1e-10)
        assert nm.duplicates(log_p, weight) == 8
        gamma = nm.responsibilities(log_p, 0.0)
        np.testing.assert_allclose(nm.effective_clusters(gamma, weight), 2.0, rtol=1e-2)
    split = jnp.asarray(np.tile(np.stack([u > 0, u < 0], 1), 5).astype(float))
    gamma = nm.responsibilities(densities(split, weight, "P"), 1.0)
    np.testing.assert_allclose(gamma.max(1), 2 * 0.731 / 10, atol=1e-4)


def test_clusters_that_differ_are_not_called_copies():
    scores = jnp.tile(jnp.eye(6), (20, 1))
    weight = jnp.ones(120)
    for density in DENSITIES:
        log_p = densities(scores, weight, density)
        assert nm.duplicates(log_p, weight) == 0
        gamma = nm.responsibilities(log_p, 0.0)
        np.testing.assert_allclose(nm.effective_clusters(gamma, weight), 6.0, rtol=1e-5)
    # Two clusters are each other's negative and all there is.
    log_p = densities(jnp.tile(jnp.eye(2), (20, 1)), jnp.ones(40), "P")
    assert nm.duplicates(log_p, jnp.ones(40)) == 0


@pytest.mark.usefixtures("x64")
def test_the_prior_is_the_mean_assignment():
    """N10, its moving average, its floor and its Dirichlet."""
    scores, weight = problem(heads=(2,))
    gamma = nm.responsibilities(3 * scores, 1.0)
    old = jnp.log(jnp.asarray([[0.5, 0.2, 0.1, 0.1, 0.1]] * 2))
    share = gamma.mean(0)

    def updated(**knobs):
        return jnp.exp(nm.update_prior(old, gamma, weight, **knobs))

    np.testing.assert_allclose(updated(rate=1.0), share, atol=1e-12)
    np.testing.assert_allclose(updated(rate=0.0), jnp.exp(old), atol=1e-12)
    np.testing.assert_allclose(updated(rate=0.3), 0.7 * jnp.exp(old) + 0.3 * share, atol=1e-12)
    np.testing.assert_allclose(updated(rate=1.0, strength=1.0), 0.2, atol=1e-12)
    np.testing.assert_allclose(updated(rate=1.0, floor=1.0).min(-1) > 0.15, True)
    # A cluster without members keeps its floor, and nothing passes a gradient.
    none = jnp.zeros_like(gamma).at[..., 0].set(1.0)
    prior = jnp.exp(nm.update_prior(old, none, weight, rate=1.0, floor=0.2))
    np.testing.assert_allclose(prior[:, 1:], 0.04 / 1.16, atol=1e-12)
    starved = nm.update_prior(old, none, weight, rate=1.0)
    assert jnp.isfinite(nm.em_loss(none, starved + jnp.zeros_like(none), weight)).all()
    slope = jax.grad(lambda p: nm.update_prior(p, gamma, weight, rate=0.3).sum())(old)
    assert (slope == 0).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tau", [1.0, 0.4])
@pytest.mark.parametrize("density", DENSITIES)
def test_swapped_loss_is_entropy_and_divergence_minus_likelihood(density, tau):
    """N11, equation (6); with one view twice it is the plain loss."""
    (a, weight), (b, _) = problem(seed=0), problem(seed=1)
    u, v = (densities(s, weight, density) - np.log(5) for s in (a, b))

    def one_way(u, v):
        g, h = np.asarray(nm.responsibilities(u, tau)), softmax(np.asarray(v), axis=1)
        entropy = -(g * np.log(g)).sum(1)
        divergence = (g * np.log(g / h)).sum(1)
        return (entropy + divergence - logsumexp(np.asarray(v), axis=1)).mean()

    np.testing.assert_allclose(
        nm.swapped_loss(u, v, weight, tau=tau), 0.5 * (one_way(u, v) + one_way(v, u)), rtol=1e-10
    )
    plain = nm.em_loss(nm.responsibilities(u, tau), u, weight)
    np.testing.assert_allclose(nm.swapped_loss(u, u, weight, tau=tau), plain, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("density", ["P", "X"])
def test_information_is_a_lower_bound(density):
    """Equation (8): of I(cluster; view) = H(cluster) where a view tells its cluster surely."""
    groups = np.repeat(np.arange(4), [40, 30, 20, 10])
    share = np.bincount(groups) / 100
    truth = -(share * np.log(share)).sum()
    weight, values = jnp.ones(100), []
    for strength in (1.0, 5.0, 50.0):
        scores = strength * jnp.eye(4)[groups] + 1e-9 * problem(100, 4)[0]
        log_p = densities(scores, weight, density)
        values.append(float(nm.information(log_p, log_p, weight)))
        assert values[-1] <= truth + 1e-9
    if density == "X":
        assert values == sorted(values)
        np.testing.assert_allclose(values[-1], truth, rtol=1e-6)
    # An assignment that has nothing to do with the other view tells nothing.
    other = densities(50 * jnp.eye(4)[np.random.default_rng(0).permutation(groups)], weight, "X")
    log_p = densities(50 * jnp.eye(4)[groups], weight, "X")
    assert nm.information(log_p, other, weight) < 0


@pytest.mark.parametrize("target", [0.3, 0.6, 0.95])
def test_the_temperature_makes_confidence_what_it_should_be(target):
    scores, weight = problem(200, 5)
    log_joint = jnp.stack([scores, 0.1 * scores], axis=1)  # two heads
    t = nm.temperature(log_joint, jnp.full(2, target), weight)
    largest = jax.nn.softmax(log_joint / t[:, None], axis=-1).max(-1)
    mean = (weight[:, None] * largest).sum(0) / weight.sum()
    np.testing.assert_allclose(mean, target, atol=1e-4)
    np.testing.assert_allclose(t[1], 0.1 * t[0], rtol=1e-4)


def test_agreement_is_the_share_that_keeps_its_cluster():
    u = jnp.eye(3)[jnp.array([0, 1, 2, 2])]
    v = jnp.eye(3)[jnp.array([0, 1, 1, 2])]
    np.testing.assert_allclose(nm.agreement(u, v, jnp.ones(4)), 0.75)
    np.testing.assert_allclose(nm.agreement(u, v, jnp.array([1.0, 0, 1, 0])), 0.5)


def test_neighbours_take_their_part():
    """Equation (10), and what is left to the example itself where clusters are not known."""
    rng = np.random.default_rng(0)
    gamma = rng.dirichlet(np.ones(3), (6, 2))  # two heads
    near = rng.integers(-1, 3, (6, 5, 2))
    found = np.asarray(nm.with_neighbours(jnp.asarray(gamma), jnp.asarray(near), 0.4))
    for i in range(6):
        for h in range(2):
            known = near[i, near[i, :, h] >= 0, h]
            theirs = np.bincount(known, minlength=3) / 5
            expected = (1 - 0.4 * len(known) / 5) * gamma[i, h] + 0.4 * theirs
            np.testing.assert_allclose(found[i, h], expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
    nobody = nm.with_neighbours(jnp.asarray(gamma), jnp.full((6, 5, 2), -1), 0.4)
    np.testing.assert_allclose(nobody, gamma, rtol=1e-6)


# -- the method through the engine --


def tiny(**knobs):
    return NeuralMixture(
        **{
            "num_clusters": 4,
            "network": "mlp",
            "width": 16,
            "hidden": 16,
            "heads": 2,
            "iterations": 2,
            "steps": 3,
            "noise": 0.2,
            "density": "X",
            "tau": 0.5,
            "tau_start": 0.5,
        }
        | knobs
    )


def examples_of(x, scaled):
    x = np.asarray(x, np.float32)
    offset, scale = (0.0, 1.0) if scaled else (x.mean(0), x.std(0))
    return engine.Examples(jnp.asarray(x), jnp.asarray(offset), jnp.asarray(scale))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("density", "Z"),
        ("prior", "flat"),
        ("network", "unet"),
        ("dtype", "float16"),
        ("num_clusters", 0),
        ("over_clusters", 1),
        ("heads", 0),
        ("iterations", 0),
        ("gain", 0.0),
        ("learning_rate", -1.0),
        ("tau", -0.1),
        ("over_heads", -1),
        ("neighbours", -1),
        ("neighbours", 100),
        ("neighbour_share", 1.2),
        ("anchors", 0),
        ("noise", -1.0),
        ("prior_floor", 1.5),
        ("crop", 1.0),
        ("grey", 2.0),
        ("ema", 1.1),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(InputError, match=f"^--config.method.{name}=") as caught:
        NeuralMixture(**{name: value}).build(DataSpec((8, 8, 1), 100))
    assert "\n" not in str(caught.value)


def trained(x, method, *, batch_size=256, seed=0, scaled=False):
    """Run the whole of a method: its parts, state, last metrics, and the data as one batch.

    Vectors are standardised first, unless they are ``scaled`` as the network shall see them.
    """
    examples = examples_of(x, scaled)
    built = method.build(DataSpec(x.shape[1:], len(x), batch_size))
    phase, key = built.phases["em"], jax.random.key(seed)
    first = engine.fetch_resident(examples)(jnp.arange(1))
    state = engine.init_state(built, key, first)
    rows = engine.sweep_order(batch_size=min(1000, len(x)), num_examples=len(x))
    swept = None
    if phase.begin is not None:
        fetch = engine.fetch_resident(examples)
        swept = engine.collect(phase.begin, state.params, state.cluster, rows, fetch, key)
    state, _ = engine.begin_phase(phase, state, swept, key)
    iterate = jax.jit(
        lambda state: engine.em_iteration(
            phase, state, examples, key, batch_size=batch_size, sweep_size=min(1000, len(x))
        )
    )
    for _ in range(phase.iterations):
        state, info = iterate(state)
    return built, state, info, engine.fetch_resident(examples)(jnp.arange(len(x)))


def of_every_head(method, built, state, batch):
    """Hard assignments [h, n] of every head, not only of the best."""
    predict = jax.jit(built.predict)

    def by(head):
        cluster = dataclasses.replace(state.cluster, best=jnp.int32(head))
        return predict(state.ema_params, cluster, batch, jax.random.key(0)).argmax(1)

    return np.stack([by(head) for head in range(method.networks * method.heads)])


def seeds(k, **knobs):
    """Five networks of one head each are five seeds of the method."""
    common = {
        "num_clusters": k,
        "network": "mlp",
        "width": 64,
        "hidden": 64,
        "networks": 5,
        "heads": 1,
        "iterations": 5,
        "steps": 100,
        "learning_rate": 3e-3,
        "noise": 0.2,
        "density": "X",
        "tau": 0.5,
        "tau_start": 0.5,
    }
    return NeuralMixture(**common | knobs)


HARD = {"tau": 0.0, "tau_start": 0.0}
SOFT = {"tau": 1.0, "tau_start": 1.0}
ONE_VIEW = {"consistency": False, "noise": 0.0}


def accuracies(name_or_data, method, **knobs):
    x, labels = draw_blobs(name_or_data) if isinstance(name_or_data, str) else name_or_data
    built, state, info, batch = trained(x, method, **knobs)
    found = of_every_head(method, built, state, batch)
    return np.array([metrics.clustering_accuracy(labels, f) for f in found]), state, info


@pytest.mark.parametrize(
    "knobs", [{"density": "P", **HARD}, {"density": "X", "tau": 0.7, "tau_start": 0.7}]
)
def test_four_groups_are_found_from_every_start(knobs):
    """N13 and N12: all seeds, in agreement with Bayes; held-out examples by running statistics."""
    x, labels = draw_blobs("gmm4", seed=1)
    method = seeds(4, **knobs)
    built, state, info, batch = trained(x, method)
    bayes = log_posterior("gmm4", x).argmax(1)
    for found in of_every_head(method, built, state, batch):
        assert metrics.clustering_accuracy(labels, found) >= 0.99
        assert metrics.clustering_accuracy(bayes, found) >= 0.99
        assert len(np.unique(found)) == 4
    assert info["effective_clusters"] > 3.9
    assert info["duplicates"] == 0

    held_out = (draw_blobs("gmm4", seed=2, n=4000)[0] - x.mean(0)) / x.std(0)
    fresh = {"image": jnp.asarray(held_out), "weight": jnp.ones(4000)}
    running = built.predict(state.ema_params, state.cluster, fresh, jax.random.key(0))
    np.testing.assert_allclose(jnp.exp(running).sum(1), 1.0, atol=1e-5)
    features = built.embed(state.ema_params, state.cluster, fresh, jax.random.key(0))
    assert features.shape == (4000, 64)
    own: Any = built.phases["em"].refresh
    collected = own.collect(state.ema_params, state.cluster, fresh, jax.random.key(0))
    _, of_batch, _ = own.update(
        state.ema_params, state.cluster, collected, fresh["weight"], jax.random.key(0), 1.0
    )
    of_batch = dataclasses.replace(of_batch, best=state.cluster.best)
    by_batch = built.predict(state.ema_params, of_batch, fresh, jax.random.key(0))
    assert np.mean(running.argmax(1) == by_batch.argmax(1)) > 0.99


def test_ten_groups_on_a_ring():
    """N14."""
    found, *_ = accuracies("gmm10", seeds(10, tau=0.7, tau_start=0.7))
    assert (found >= 0.98).all()


def test_a_learned_prior_finds_unequal_groups():
    """N15: and hard assignments under a uniform prior do not, because they expect equal ones."""
    x, labels = draw_blobs("imb3")
    found, state, _ = accuracies((x, labels), seeds(3, prior="learned"))
    assert found.mean() >= 0.93
    # Of five starts the one that the bound prefers, which no label had a part in.
    best = int(state.cluster.best)
    assert found[best] >= 0.99
    prior = np.sort(np.exp(state.cluster.log_prior[best]))[::-1]
    np.testing.assert_allclose(prior, [0.7, 0.2, 0.1], atol=0.08)
    biased, *_ = accuracies((x, labels), seeds(3, density="P", **HARD))
    assert biased.mean() < 0.85


@pytest.mark.parametrize(
    "knobs", [{"density": "P", **SOFT}, {"density": "X", "tau": 0.7, "tau_start": 0.7}]
)
def test_two_moons(knobs):
    """N16: more than the 0.847 of k-means."""
    from sklearn.datasets import make_moons

    data = make_moons(1000, noise=0.05, random_state=0)
    found, *_ = accuracies(data, seeds(2, iterations=10, decay=False, **knobs))
    assert found.mean() >= 0.87


def test_consistency_helps():
    """N18: four groups by soft assignments, with two noisy views and with one as it is."""
    both, *_ = accuracies("gmm4", seeds(4, density="P", decay=False, **SOFT))
    alone, *_ = accuracies("gmm4", seeds(4, density="P", decay=False, **SOFT | ONE_VIEW))
    assert both.mean() - alone.mean() >= 0.1


def test_without_sharpening_the_likelihood_misleads():
    """N17: S rises above 0 without clusters; P settles on copies of one split of the data."""
    found, _, info = accuracies("gmm4", seeds(4, density="S", **SOFT | ONE_VIEW))
    assert info["log_mixture"][-1] > 0
    assert found.mean() < 0.9
    found, _, info = accuracies("gmm10", seeds(10, density="P", **SOFT | ONE_VIEW))
    assert found.mean() < 0.8
    assert info["confidence"][-1] < 0.2025, "the cap of ten equal groups"


def test_without_any_normalisation_everything_collapses():
    """N17: sigmoids that nothing normalises all go to one, and no cluster differs from another."""
    import optax

    from dec_diffusion.networks import classifier_network

    x = jnp.asarray(draw_blobs("gmm4")[0]) / 3
    network = classifier_network("mlp", (2,), outputs=4, width=32, hidden=32)
    tx, weight = optax.adam(3e-3), jnp.ones(len(x))

    def joint(params):
        return jax.nn.log_sigmoid(network.apply(params, x)[1]) - jnp.log(4.0)

    def step(carry, _):
        params, state = carry
        slope = jax.grad(
            lambda p: nm.em_loss(nm.responsibilities(joint(p), 1.0), joint(p), weight)
        )(params)
        updates, state = tx.update(slope, state)
        return (optax.apply_updates(params, updates), state), None

    params = network.init(jax.random.key(0), x[:1])
    (params, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=300))(params)
    confidence = nm.responsibilities(joint(params), 1.0).max(1).mean()
    np.testing.assert_allclose(confidence, 0.25, atol=0.01)


@pytest.mark.parametrize(
    "knobs",
    [
        {"density": "S"},
        {"density": "P", **HARD},
        {"prior": "learned"},
        {"networks": 3, "over_heads": 2, "over_clusters": 7},
        {**ONE_VIEW, "tau_start": 1.0, "weight_decay": 1e-3, "decay": False},
        {"dtype": "bfloat16", "steps": 0},
    ],
)
def test_every_option_trains(knobs):
    """Finite, right shapes, and the statistics kept are those of the averaged weights."""
    x, _ = draw_blobs("gmm4", n=96)
    method = tiny(**knobs)
    built, state, info, batch = trained(x, method, batch_size=32)
    assert np.isfinite(info["loss"]).all()
    total, params, cluster = method.networks * method.heads, state.ema_params, state.cluster
    assert cluster.log_prior.shape == cluster.norm.mean.shape == (total, 4)
    np.testing.assert_allclose(np.exp(cluster.log_prior).sum(-1), 1.0, rtol=1e-5)
    if method.prior == "uniform":
        np.testing.assert_allclose(cluster.log_prior, -np.log(4), rtol=1e-6)
    assert cluster.best == np.argmax(cluster.score)
    predicted = built.predict(params, cluster, batch, jax.random.key(0))
    assert predicted.shape == (96, 4) and predicted.dtype == jnp.float32
    again = built.predict(params, cluster, batch, jax.random.key(1))
    np.testing.assert_array_equal(predicted, again)
    if method.density != "S":
        density = predicted_density(built, params, cluster, batch)
        np.testing.assert_allclose(density.mean(0), 1.0, rtol=1e-3)


@pytest.mark.parametrize("over_heads", [0, 1])
def test_neighbours_are_the_nearest_and_known_by_their_clusters(over_heads):
    x, _ = draw_blobs("gmm4", n=90)
    method = tiny(neighbours=4, networks=2, over_heads=over_heads, over_clusters=7)
    built, state, _, batch = trained(x, method, batch_size=32)
    scaled = (x - x.mean(0)) / x.std(0)
    _, nearest = NearestNeighbors(n_neighbors=4).fit(scaled).kneighbors()
    around = state.cluster.around
    np.testing.assert_array_equal(
        np.sort(around.neighbours.values, 1), np.sort(nearest.astype(np.int32), 1)
    )
    assert around.labels.values.shape == (90, 4 + 2 * over_heads)
    found = of_every_head(method, built, state, batch)
    np.testing.assert_array_equal(around.labels.values[:, :4], found.T)
    assert np.ptp(np.asarray(around.labels.values), axis=0).min() > 0


def predicted_density(built, params, cluster, batch):
    """p_ik of the head that predicts, recovered from what refresh collects."""
    clean, *_ = built.phases["em"].refresh.collect(params, cluster, batch, jax.random.key(0))
    norm = jax.tree.map(lambda a: a[cluster.best], cluster.norm)
    scores = clean[:, cluster.best]
    kind = "X" if float(jnp.abs(cluster.norm.mean).max()) == 0.0 else "P"
    return jnp.exp(nm.log_density(norm, scores, density=kind))


def test_an_ensemble_is_its_networks_side_by_side():
    from dec_diffusion.networks import classifier_network

    network = classifier_network("mlp", (2,), outputs=6, width=8, hidden=5)
    x = jnp.asarray(draw_blobs("gmm4", n=12)[0])
    both = nm.ensemble(network, 3)
    params = both.init(jax.random.key(0), x)
    features, scores = both.apply(params, x)
    assert features.shape == (12, 3, 5) and scores.shape == (12, 3, 6)
    for member in range(3):
        own = jax.tree.map(lambda a, m=member: a[m], params)
        for together, alone in zip((features, scores), network.apply(own, x), strict=True):
            np.testing.assert_allclose(together[:, member], alone, atol=1e-5)
    assert np.abs(scores[:, 0] - scores[:, 1]).max() > 1e-2, "each has weights of its own"


def test_one_device_or_eight(run_python):
    """Batch statistics are those of the whole batch when it is spread over devices."""
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from dec_diffusion.method import DataSpec
from dec_diffusion.methods.neural_mixture import NeuralMixture
from dec_diffusion.trained import load

for density in "SPX":
    method = NeuralMixture(num_clusters=4, density=density, network="mlp", width=8, hidden=8,
                           heads=2, prior="learned", noise=0.2).build(DataSpec((2,), 64))
    rng = np.random.default_rng(0)
    batch = {"image": jnp.asarray(rng.normal(size=(64, 2)), jnp.float32),
             "index": jnp.arange(64), "weight": jnp.ones(64).at[-5:].set(0.0)}
    params, cluster = method.init(jax.random.key(0), batch)
    step = jax.jit(jax.value_and_grad(method.phases["em"].loss, has_aux=True))
    one = step(params, cluster, batch, jax.random.key(1), 0.3)
    mesh = jax.make_mesh((8,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(batch, NamedSharding(mesh, P("b")))
    whole = jax.device_put((params, cluster), NamedSharding(mesh, P()))
    many = step(*whole, spread, jax.random.key(1), 0.3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, many)
print("same", jax.device_count())
"""
    assert run_python(code, devices=8).stdout.split() == ["same", "8"]


def test_a_run_from_config_to_workdir(tmp_path):
    """``fit`` on blobs without a file: the workdir has all its parts, and can be loaded."""
    config = Config(
        name="blobs",
        method=seeds(4, networks=2, heads=2, tau=0.7, tau_start=0.7, iterations=3),
        data=DataConfig(name="blobs"),
        train=TrainConfig(batch_size=256, evaluate_every=1),
    )
    result = fit(config, tmp_path, verbose=0)
    assert result.summary["scores"]["acc"] >= 0.99
    assert {"summary.json", "assignments.csv", "clusters.png"} <= {
        p.name for p in pathlib.Path(tmp_path).iterdir()
    }
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    np.testing.assert_allclose(last["mean_probability"], last["agreement"], atol=1e-3)
    # Even where all keep their cluster in another view, some are surer of it than others.
    assert last["mean_probability"] < 1
    assert len(np.unique(result.assignment.probability)) > 10
    loaded = load(tmp_path)
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded.state, result.run.state)


# -- data --


@pytest.mark.parametrize("name", sorted(SETS))
def test_blobs_are_the_mixtures_they_say(name):
    weights, centres, deviation = SETS[name]
    x, labels = draw_blobs(name, n=20_000, seed=3)
    assert x.dtype == np.float32 and x.shape == (20_000, 2)
    np.testing.assert_allclose(np.bincount(labels) / 20_000, weights, atol=1e-3)
    for k, centre in enumerate(centres):
        own = x[labels == k]
        np.testing.assert_allclose(own.mean(0), centre, atol=5 * deviation / np.sqrt(len(own)))
        np.testing.assert_allclose(own.std(0), deviation, rtol=0.05)
    again, other = draw_blobs(name, n=50, seed=3)[0], draw_blobs(name, n=50, seed=4)[0]
    np.testing.assert_array_equal(again, draw_blobs(name, n=50, seed=3)[0])
    assert (again != other).any()
    posterior = log_posterior(name, x)
    np.testing.assert_allclose(np.exp(posterior).sum(1), 1.0, rtol=1e-9)
    assert (posterior.argmax(1) == labels).mean() > 0.99


def test_a_set_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"^--config.data.blobs=gmm5: no such set; choose one of"):
        load_data(DataConfig(name="blobs", blobs="gmm5"))
    with pytest.raises(InputError, match=r"^--config.data.blobs: has no meaning"):
        load_data(DataConfig(blobs="gmm4"))
    whole, train, test = (
        load_data(DataConfig(name="blobs", blobs="imb3", split=s)) for s in ("all", "train", "test")
    )
    np.testing.assert_array_equal(whole.examples, np.concatenate([train.examples, test.examples]))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    "DEC_DIFFUSION_TEST_DATA" not in os.environ, reason="needs the folder that holds mnist"
)
def test_small_mnist():
    """N19: 14x14, hard assignments, 800 steps."""
    folder = pathlib.Path(os.environ["DEC_DIFFUSION_TEST_DATA"]) / "mnist"
    dataset = load_data(DataConfig(name="mnist", path=str(folder), split="train"))
    x = dataset.examples.astype(np.float32).reshape(-1, 14, 2, 14, 2, 1).mean((2, 4)) / 127.5 - 1
    method = NeuralMixture(width=16, networks=2, heads=3, iterations=8, steps=100)
    built, state, _, _ = trained(x, method, scaled=True)
    predict = jax.jit(built.predict)
    found = np.concatenate(
        [
            predict(
                state.ema_params,
                state.cluster,
                {"image": jnp.asarray(part), "weight": jnp.ones(len(part))},
                jax.random.key(0),
            ).argmax(1)
            for part in np.split(x, 60)
        ]
    )
    assert dataset.labels is not None
    assert metrics.clustering_accuracy(dataset.labels, found) >= 0.90
