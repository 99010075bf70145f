import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score

from dec_diffusion import kmeans
from dec_diffusion.types import InputError

TOLERANCE = {"float32": 1e-4, "float64": 1e-10}


def blobs(seed=0, n=300, k=5, d=4, spread=1.0, offset=0.0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(k, size=n)
    centers = rng.normal(size=(k, d)) * 4
    return offset + centers[truth] + spread * rng.normal(size=(n, d)), truth


def oracle(x, start, *, weight=None, iterations=300):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0)
        return model.fit(x, sample_weight=weight)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_lloyd_equals_scikit_learn(dtype, weighted, spread):
    x, _ = blobs(spread=spread)
    weight = np.random.default_rng(1).uniform(0.2, 3, size=len(x)) if weighted else None
    expected = oracle(x, x[:5], weight=weight)
    with jax.enable_x64(dtype == "float64"):
        w = None if weight is None else jnp.asarray(weight, dtype)
        result = kmeans.lloyd(jnp.asarray(x, dtype), jnp.asarray(x[:5], dtype), w, tol=0.0)
        assert result.centers.dtype == result.inertia.dtype == dtype
    np.testing.assert_array_equal(result.labels, expected.labels_)
    np.testing.assert_allclose(result.centers, expected.cluster_centers_, atol=TOLERANCE[dtype])
    np.testing.assert_allclose(result.inertia, expected.inertia_, rtol=TOLERANCE[dtype])
    assert bool(result.converged)


@pytest.mark.parametrize("iterations", [1, 3])
def test_lloyd_equals_scikit_learn_when_cut_short(iterations):
    x, _ = blobs(spread=3.0)
    expected = oracle(x, x[:5], iterations=iterations)
    with jax.enable_x64(True):
        result = kmeans.lloyd(jnp.asarray(x), jnp.asarray(x[:5]), max_iterations=iterations, tol=0)
    np.testing.assert_allclose(result.centers, expected.cluster_centers_, atol=1e-10)
    np.testing.assert_array_equal(result.labels, expected.labels_)
    assert int(result.iterations) == iterations
    assert not bool(result.converged)


def test_history_falls_to_the_inertia():
    x = jnp.asarray(blobs(spread=3.0)[0], "float32")
    result = kmeans.lloyd(x, x[:5], tol=0.0)
    done = int(result.iterations)
    history = np.asarray(result.history)
    first = np.square(np.asarray(x)[:, None] - np.asarray(x[:5])).sum(-1).min(1).sum()
    np.testing.assert_allclose(history[0], first, rtol=1e-5)
    assert done > 3
    assert np.all(np.diff(history) <= 1e-5 * first)
    assert history[done - 2] > history[-1] == float(result.inertia)


def test_a_large_tolerance_stops_early():
    x = jnp.asarray(blobs(spread=3.0)[0], "float32")
    loose, tight = kmeans.lloyd(x, x[:5], tol=0.1), kmeans.lloyd(x, x[:5], tol=0.0)
    assert int(loose.iterations) < int(tight.iterations)
    assert bool(loose.converged)


def test_an_empty_cluster_gets_the_farthest_point():
    x = np.concatenate([np.linspace(0, 1, 10), [5.0, 50.0]])[:, None].astype("float32")
    start = jnp.asarray([[0.5], [1000.0], [-1000.0]], "float32")
    once = kmeans.lloyd(jnp.asarray(x), start, max_iterations=1)
    expected = oracle(x, np.asarray(start), iterations=1)
    np.testing.assert_allclose(
        np.sort(once.centers[:, 0]), np.sort(expected.cluster_centers_[:, 0]), rtol=1e-6
    )
    np.testing.assert_allclose(np.sort(once.centers[:, 0]), [0.5, 5.0, 50.0], rtol=1e-6)
    assert set(np.asarray(once.labels).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("first_weight", [1.0, 0.1])
def test_fewer_distinct_points_than_clusters(first_weight):
    x = np.repeat([[0.0, 1.0], [2.0, 3.0], [7.0, 7.0]], 4, axis=0).astype("float32")
    weight = jnp.ones(12).at[0].set(first_weight)
    result = kmeans.kmeans(jax.random.key(0), jnp.asarray(x), 6, weight=weight, restarts=3)
    assert np.all(np.isfinite(result.centers))
    assert np.all(np.isfinite(result.history))
    np.testing.assert_allclose(result.inertia, 0, atol=1e-6)
    np.testing.assert_allclose(np.asarray(result.centers)[result.labels], x, atol=1e-6)


def test_far_from_the_origin_in_float32():
    x, _ = blobs(spread=0.8)
    far = (x + 1000).astype("float32")
    expected = oracle(far.astype("float64"), far[:5].astype("float64"))
    result = kmeans.lloyd(jnp.asarray(far), jnp.asarray(far[:5]), tol=0.0)
    np.testing.assert_array_equal(result.labels, expected.labels_)
    np.testing.assert_allclose(result.centers, expected.cluster_centers_, atol=2e-4)
    np.testing.assert_allclose(result.inertia, expected.inertia_, rtol=1e-4)


def test_padding_has_no_effect():
    x = jnp.asarray(blobs()[0], "float32")
    padded = jnp.concatenate([x, jnp.full((50, 4), 300.0)])
    weight = jnp.concatenate([jnp.ones(300), jnp.zeros(50)])
    plain, same = kmeans.lloyd(x, x[:5], tol=0.0), kmeans.lloyd(padded, x[:5], weight, tol=0.0)
    np.testing.assert_allclose(plain.centers, same.centers, atol=1e-5)
    np.testing.assert_array_equal(plain.labels, same.labels[:300])
    assert int(plain.iterations) == int(same.iterations)
    # Padding is never a seed, however far away, even when seeds outnumber the real points.
    few = jnp.concatenate([x[:3], jnp.full((50, 4), 300.0)])
    weight = jnp.concatenate([jnp.ones(3), jnp.zeros(50)])
    seeds = kmeans.plus_plus(jax.random.key(1), few, weight, 8)
    assert float(jnp.max(jnp.abs(seeds))) < 100


def test_seeds_are_rows_and_reach_separate_blobs():
    x, truth = blobs(spread=0.05, k=12, n=600)
    x = jnp.asarray(x, "float32")
    keys = jax.random.split(jax.random.key(3), 20)
    seeds = jax.jit(jax.vmap(lambda key: kmeans.plus_plus(key, x, None, 12)))(keys)
    rows = np.asarray(jax.vmap(lambda s: kmeans.assign(s, x))(seeds))
    np.testing.assert_array_equal(np.asarray(x)[rows], seeds)
    assert all(len(set(truth[row])) == 12 for row in rows)


def test_first_seed_follows_the_weights():
    x = jnp.asarray([[0.0], [1.0], [2.0]])
    weight = jnp.asarray([1.0, 2.0, 5.0])
    keys = jax.random.split(jax.random.key(0), 4000)
    first = jax.vmap(lambda key: kmeans.plus_plus(key, x, weight, 1)[0, 0])(keys)
    share = np.bincount(np.asarray(first).astype(int), minlength=3) / 4000
    np.testing.assert_allclose(share, np.asarray(weight) / 8, atol=4 * np.sqrt(0.25 / 4000))


def test_restarts_keep_the_best_run():
    x, truth = blobs(seed=4, k=8, n=400, spread=0.7)
    data = jnp.asarray(x, "float32")
    key = jax.random.key(7)
    best = kmeans.kmeans(key, data, 8, restarts=10, trials=1)
    single = [
        float(kmeans.lloyd(data, kmeans.plus_plus(one, data, None, 8, trials=1)).inertia)
        for one in jax.random.split(key, 10)
    ]
    assert max(single) > 1.1 * min(single)
    np.testing.assert_allclose(best.inertia, min(single), rtol=1e-5)
    np.testing.assert_allclose(best.inertia, KMeans(8, n_init=10).fit(x).inertia_, rtol=1e-3)
    assert adjusted_rand_score(truth, best.labels) > 0.95


def test_distances_against_brute_force():
    x, _ = blobs(offset=1000.0)
    x = x.astype("float32")
    expected = np.square(x[:, None].astype(float) - x[:7].astype(float)).sum(-1)
    actual = kmeans.distances(jnp.asarray(x), jnp.asarray(x[:7]))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(kmeans.assign(x, x[:7]), expected.argmin(1))


def test_under_vmap_and_pmap_and_without_recompiling():
    data = jnp.stack([jnp.asarray(blobs(seed)[0], "float32") for seed in range(3)])
    batched = jax.vmap(lambda x: kmeans.lloyd(x, x[:5], tol=0.0))(data)
    mapped = jax.pmap(lambda x: kmeans.lloyd(x, x[:5], tol=0.0))(data[:1])
    single = [kmeans.lloyd(x, x[:5], tol=0.0) for x in data]
    for i, one in enumerate(single):
        np.testing.assert_array_equal(batched.labels[i], one.labels)
        assert int(batched.iterations[i]) == int(one.iterations)
    np.testing.assert_array_equal(mapped.labels[0], single[0].labels)
    before = kmeans.lloyd._cache_size()
    kmeans.lloyd(data[1] + 1, data[2, :5], tol=0.5)
    assert kmeans.lloyd._cache_size() == before


@pytest.mark.parametrize("k", [0, 21])
def test_impossible_number_of_clusters(k):
    with pytest.raises(InputError, match=f"clusters = {k} for 20 examples"):
        kmeans.kmeans(jax.random.key(0), jnp.zeros((20, 2)), k)
