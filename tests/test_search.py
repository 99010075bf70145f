import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, calinski_harabasz_score

from dec_diffusion import pca, search
from dec_diffusion.kmeans import kmeans

K, M, D, DIMS, CELLS = 4, 256, 16, 8, 4
KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnames="whitened")
def scores(key, halves, *, whitened):
    """All cells [CELLS, 2, M, D] of a test at once: a few shapes serve the whole file."""
    one = functools.partial(search.score_cell, k=K, dims=DIMS, whitened=whitened)
    return jax.vmap(one, in_axes=(None, 0))(key, halves)


principal = jax.jit(pca.principal, static_argnames="dims")
# K-means of one shape, for the same reason.
cluster = functools.partial(kmeans, k=K, restarts=4, max_iterations=50)


def blobs(seed=0, *, m=M, width=D, apart=6.0):
    """Points [m, width] around K centres ``apart`` from the origin, and their classes [m]."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(K, size=m)
    centers = apart * np.linalg.qr(rng.normal(size=(width, K)))[0].T
    return (centers[truth] + rng.normal(size=(m, width))).astype(np.float32), truth


def gaussian(seed, shape, decay=0.0):
    """Noise whose variances fall as i^-decay along the last axis."""
    scale = np.arange(1, shape[-1] + 1) ** (-decay / 2)
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


@jax.jit
def index_of(x, found):
    """Equation (1) of what k-means found in ``x``."""
    total = jnp.sum((x - x.mean(0)) ** 2)
    return search.calinski_harabasz(found.inertia, total, n=len(x), k=K)


# -- the index and its laws --


@pytest.mark.parametrize("apart", [0.0, 1.0, 6.0])
def test_index_equals_scikit_learn(apart):
    x, _ = blobs(apart=apart)
    found = cluster(KEY, x)
    expected = calinski_harabasz_score(x.astype(np.float64), np.asarray(found.labels))
    assert found.converged
    np.testing.assert_allclose(index_of(x, found), expected, rtol=1e-4)


def test_index_is_the_ratio_of_scatters_in_double_precision():
    x, labels = blobs(apart=1.0)
    x = x.astype(np.float64)
    inertia = sum(((x[labels == c] - x[labels == c].mean(0)) ** 2).sum() for c in range(K))
    total = ((x - x.mean(0)) ** 2).sum()
    with jax.enable_x64(True):
        value = search.calinski_harabasz(jnp.asarray(inertia), jnp.asarray(total), n=M, k=K)
    np.testing.assert_allclose(value, calinski_harabasz_score(x, labels), rtol=1e-10)


def test_index_ignores_scale_rotation_and_shift():
    x, _ = blobs(apart=3.0)
    turn = np.linalg.qr(gaussian(1, (D, D)))[0]
    moved = 7.0 * x @ turn + gaussian(2, (D,)) * 5
    before, after = cluster(KEY, x), cluster(KEY, moved)
    np.testing.assert_array_equal(before.labels, after.labels)
    np.testing.assert_allclose(index_of(x, before), index_of(moved, after), rtol=1e-4)


def test_padding_with_zeros_changes_nothing():
    x, _ = blobs(width=D - 6, apart=3.0)
    padded = np.pad(x, ((0, 0), (0, 6)))
    before, after = cluster(KEY, x), cluster(KEY, padded)
    np.testing.assert_array_equal(before.labels, after.labels)
    np.testing.assert_allclose(index_of(x, before), index_of(padded, after), rtol=1e-5)


def test_no_other_labelling_of_settled_clusters_has_a_higher_index():
    x, truth = blobs(apart=3.0)
    best = index_of(x, cluster(KEY, x))
    rng = np.random.default_rng(0)
    for share in (0.0, 0.01, 0.1, 1.0):
        other = np.where(rng.random(M) < share, rng.integers(K, size=M), truth)
        assert calinski_harabasz_score(x, other) <= best * (1 + 1e-5)


def labellings():
    rng = np.random.default_rng(0)
    a, b = rng.integers(K, size=(2, M))
    near = np.where(rng.random(M) < 0.2, b, a)
    one = np.zeros(M, int)
    return {
        "random": (a, b),
        "near": (a, near),
        "equal": (a, a),
        "renamed": (a, (a + 1) % K),
        "one against several": (one, a),
        "one against one": (one, one + 1),
        "coarser": (a, a // 2),
    }


@pytest.mark.parametrize("case", labellings())
def test_rand_index_equals_scikit_learn(case):
    a, b = labellings()[case]
    value = search.rand_index(jnp.asarray(a), jnp.asarray(b), K)
    np.testing.assert_allclose(value, adjusted_rand_score(a, b), atol=2e-6)


# -- principal axes --


@pytest.mark.parametrize(
    ("m", "width", "dims", "decay", "tolerance"),
    [
        (200, 12, 6, 0.0, 1e-4),  # the subspace is everything: exact
        (200, 40, 6, 2.0, 1e-4),
        (5, 12, 8, 1.0, 1e-4),  # fewer examples than axes
    ],
)
def test_principal_axes_equal_scikit_learn(m, width, dims, decay, tolerance):
    x = gaussian(0, (m, width), decay) + 3.0
    found = principal(KEY, x, dims)
    exact = PCA(min(m, dims), svd_solver="full").fit(x.astype(np.float64))
    expected = np.zeros(dims)
    expected[: min(m, dims)] = exact.explained_variance_ * (m - 1) / m
    scale = expected[0]
    np.testing.assert_allclose(found.variance, expected, rtol=tolerance, atol=1e-6 * scale)
    np.testing.assert_allclose(found.mean, x.mean(0), atol=1e-5)
    rank = min(m - 1, dims)
    axes = np.asarray(found.axes)[:, :rank]
    np.testing.assert_allclose(axes.T @ axes, np.eye(rank), atol=1e-4)
    # Cosines of the angles between the subspaces.
    cosines = np.linalg.svd(np.asarray(exact.components_)[:rank] @ axes, compute_uv=False)
    assert cosines.min() > 1 - 5 * tolerance
    at = np.asarray(pca.project(found, x), np.float64)
    np.testing.assert_allclose(at.T @ at / m, np.diag(found.variance), atol=1e-4 * scale)


def test_projections_are_multiplied_in_full_precision():
    """Accelerators would keep 10 of 24 bits of float32, which CPUs cannot show."""

    def both(x):
        found = pca.whiten(pca.principal(KEY, x, DIMS))
        return pca.project(found, x)

    jaxpr = str(jax.make_jaxpr(both)(jnp.zeros((M, 3 * D))))
    # Twice in a power iteration; inside the subspace; its moments; its axes; the coordinates.
    assert jaxpr.count("dot_general[") == 6
    assert jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 6


def test_constant_features_have_no_variance():
    x = np.broadcast_to(gaussian(0, (D,)), (5000, D)).copy()
    found = principal(KEY, x, DIMS)
    assert not found.variance.any() and not found.axes.any()
    x[::2, 0] += 1e-3  # but a little is still seen
    found = principal(KEY, x, DIMS)
    np.testing.assert_allclose(found.variance, [0.25e-6] + [0] * (DIMS - 1), rtol=1e-2)


def test_axes_beyond_the_columns_are_zero():
    x = gaussian(0, (50, 3), 1.0)
    found = principal(KEY, x, 5)
    assert found.axes.shape == (3, 5)
    np.testing.assert_array_equal(found.axes[:, 3:], 0)
    np.testing.assert_array_equal(found.variance[3:], 0)
    expected = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2 / 50
    np.testing.assert_allclose(found.variance[:3], expected, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_whitening_gives_unit_variance_where_there_is_any(scale):
    x = scale * gaussian(0, (100, 3), 2.0) @ gaussian(1, (3, 7)) + scale
    found = pca.whiten(principal(KEY, x, 5))
    np.testing.assert_array_equal(found.variance, [1, 1, 1, 0, 0])
    at = np.asarray(pca.project(found, x))
    np.testing.assert_allclose(at.std(0), found.variance, atol=1e-3)
    np.testing.assert_array_equal(at[:, 3:], 0)


@pytest.mark.parametrize(
    ("variance", "expected"),
    [(np.ones(7), 7), ([5, 0, 0], 1), ([3, 1], 1.6), (np.zeros(3), 0), ([2e6, 2e6], 2)],
)
def test_effective_rank(variance, expected):
    value = pca.effective_rank(jnp.asarray(variance, jnp.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-6)


# -- the scores of a cell --


@pytest.mark.parametrize("whitened", [True, False])
def test_corrected_score_of_noise_is_one_whatever_the_spectrum(whitened):
    decays = [0.0, 0.5, 1.0, 2.0]
    x = np.stack([gaussian(i, (2, M, D), decay) for i, decay in enumerate(decays)])
    found = [scores(jax.random.key(i), x, whitened=whitened) for i in range(4)]
    corrected = np.mean([cells.corrected for cells in found], axis=0)
    np.testing.assert_allclose(corrected, 1, atol=0.1)
    chi, dimensions = found[0].chi, found[0].dimensions
    assert np.all(np.diff(dimensions) < 0)
    if not whitened:  # the raw index takes a steep spectrum for groups
        assert np.all(np.diff(chi) > 0) and chi[-1] > 3 * chi[0]


def test_scores_tell_groups_from_noise():
    x, truth = blobs()
    groups = x + 0.5 * gaussian(1, (2, M, D))
    noise = gaussian(2, (2, M, D))
    constant = np.full((2, M, D), 0.1, np.float32)
    halves = np.stack([groups, noise, np.stack([groups[0], noise[0]]), constant])
    cells = scores(KEY, halves, whitened=True)
    assert cells.stability[0] > 0.95 and cells.corrected[0] > 1.5
    assert adjusted_rand_score(truth, cells.labels[0]) > 0.95
    np.testing.assert_allclose(cells.stability[1:3], 0, atol=0.1)
    # A layer without any variance is finite and has no dimension: it is left out.
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(cells))
    assert cells.dimensions[3] == cells.corrected[3] == 0
    for score in ("rank", "corrected", "stability", "chi"):
        value = compared(cells, score, K)
        assert value.argmax() == 0 and value[3] == -np.inf
        # Also where the others are left out.
        value = compared(cells, score, 100)
        assert value.argmax() == 0 and value[3] == -np.inf


def test_scores_depend_on_the_key_alone_and_not_on_the_order_of_examples():
    x, _ = blobs(apart=8.0)
    halves = x + 0.3 * gaussian(1, (CELLS, 2, M, D))
    once, again = (scores(KEY, halves, whitened=True) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, again)

    order = np.random.default_rng(2).permutation(M)
    other = scores(KEY, halves[:, :, order], whitened=True)
    for name in ("chi", "corrected", "stability", "dimensions"):
        np.testing.assert_allclose(getattr(other, name), getattr(once, name), rtol=1e-3)
    for a, b in zip(other.labels, once.labels, strict=True):
        assert adjusted_rand_score(a, b[order]) == 1.0

    # Another key seeds k-means and the noise anew.
    assert np.all(scores(jax.random.key(1), halves, whitened=True).corrected != once.corrected)

    alone = jax.jit(functools.partial(search.score_cell, k=K, dims=DIMS))(KEY, halves[0])
    np.testing.assert_array_equal(alone.labels, once.labels[0])
    for name in ("chi", "corrected", "stability", "dimensions"):
        np.testing.assert_allclose(getattr(alone, name), getattr(once, name)[0], rtol=1e-5)


# -- which cells are compared, and how --


def compared(cells, score, k):
    return search.comparable(cells, search.consensus(cells, k), score, k)


def cells(dimensions):
    """Cells [3, 2] with ties."""
    return search.Cell(
        chi=jnp.array([[9.0, 1.0], [4.0, 4.0], [2.0, 3.0]]),
        corrected=jnp.array([[1.0, 2.0], [1.5, 1.5], [3.0, 0.9]]),
        stability=jnp.array([[0.1, 0.5], [0.9, 0.5], [0.5, 0.0]]),
        dimensions=jnp.asarray(dimensions, jnp.float32).reshape(3, 2),
        labels=jnp.asarray(np.random.default_rng(0).integers(0, 3, (3, 2, 12)), jnp.int16),
    )


@pytest.mark.parametrize("score", ["corrected", "stability", "chi"])
def test_plain_scores_are_compared_as_they_are(score):
    some = cells([5] * 6)
    np.testing.assert_array_equal(compared(some, score, 10), getattr(some, score))


@pytest.mark.parametrize("examples", [12, 8])
def test_consensus_is_the_mean_adjusted_rand_index_with_the_other_cells(examples, monkeypatch):
    monkeypatch.setattr(search, "_MOST", 6 * 10 * examples)  # only so many are looked at
    some = cells([5, 5, 1, 5, 5, 5])  # the third is left out
    labels, others = np.asarray(some.labels).reshape(6, -1)[:, :examples], {0, 1, 3, 4, 5}
    expected = [
        np.mean([adjusted_rand_score(labels[i], labels[j]) for j in others - {i}]) for i in range(6)
    ]
    found = search.consensus(some, 10)
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-6)
    value = compared(some, "consensus", 10).ravel()
    np.testing.assert_array_equal(value, np.where(np.arange(6) == 2, -np.inf, found.ravel()))
    alone = jax.tree.map(lambda v: v[:1, :1], some)
    assert search.consensus(alone, 10) == 0


def test_rank_adds_the_ranks_of_corrected_score_stability_and_consensus():
    some = cells([5] * 6)
    three = some.corrected, some.stability, np.round(search.consensus(some, 10), 6)
    expected = sum(rankdata(v).reshape(3, 2) - 0.5 for v in three)
    np.testing.assert_allclose(compared(some, "rank", 10), expected)


@pytest.mark.parametrize("score", ["corrected", "stability", "chi"])
@pytest.mark.parametrize(
    ("ranks", "k", "kept"),
    [
        ([4.9, 5, 10, 1, 5, 4], 10, [0, 1, 1, 0, 1, 0]),  # half of K
        ([2.9, 3, 6, 1, 5, 4], 100, [0, 1, 1, 0, 1, 1]),  # half of the largest, however many K
        ([4.9] * 6, 10, [1] * 6),
        ([0, 4, np.nan, 1, 5, 4], 10, [0, 1, 0, 0, 1, 1]),
        ([0] * 6, 10, [0] * 6),
    ],
)
def test_cells_of_low_effective_rank_are_left_out(score, ranks, k, kept):
    everything = compared(cells([5] * 6), score, 10)
    expected = np.where(np.reshape(kept, (3, 2)), everything, -np.inf)
    np.testing.assert_array_equal(compared(cells(ranks), score, k), expected)


def test_consensus_of_many_clusters_fits_into_memory():
    score, labels = jnp.zeros(189), jnp.zeros((189, 50), jnp.int16)
    some = search.Cell(score, score, score, score, labels)
    compiled = jax.jit(lambda v: search.consensus(v, 200)).lower(some).compile()
    needed = compiled.memory_analysis()
    # The tables of 16 cells alone are 460 MiB, and there are copies of them.
    assert needed is not None and needed.temp_size_in_bytes < 2**29


# -- searches --

LOW, HIGH = 0, 999
PEAKS = np.arange(LOW, HIGH + 1)
COARSE = jnp.round(jnp.linspace(LOW, HIGH, 21)).astype(jnp.int32)
SEARCHES = {
    "grid": lambda f: search.grid(f, lambda r: r["score"], COARSE),
    "golden": lambda f: search.golden_section(f, lambda r: r["score"], LOW, HIGH),
    "ternary": lambda f: search.ternary(f, lambda r: r["score"], LOW, HIGH),
}
COUNT = {"grid": 27, "golden": 19, "ternary": 30}
# How far from the peak: golden section shrinks a real interval and may round past it; the grid
# ends between two timesteps a quarter of 50 apart.
SLACK = {"grid": 12, "golden": 1, "ternary": 0}
# One peak at p, each strictly monotone on either side in float32 too.
CURVES = {
    "wide": lambda t, p: -jnp.abs(t - p),
    "narrow": lambda t, p: 1 / (1 + jnp.square((t - p) / 3)),
    "steep below": lambda t, p: -jnp.square(jnp.where(t < p, 9, 1) * (t - p)),
    "steep above": lambda t, p: -jnp.square(jnp.where(t < p, 1, 9) * (t - p)),
}


def searched(strategy, curve):
    """Timesteps [e] and results of one search of ``curve(t)``."""

    def evaluate(t):
        return {"score": curve(t.astype(jnp.float32)), "t": t}

    return SEARCHES[strategy](evaluate)


@functools.cache
def every_peak(strategy):
    """Timesteps and results, with the best and its flag, of all curves by all peaks."""

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def find(curve, p):
        def mixed(t):
            return jnp.stack([f(t, p) for f in CURVES.values()])[curve]

        times, results = searched(strategy, mixed)
        best = results["score"].argmax()
        return times, results["t"], times[best], search.at_boundary(times, best)

    found = find(jnp.arange(len(CURVES)), PEAKS.astype(np.float32))
    return tuple(np.asarray(leaf) for leaf in found)


@pytest.mark.parametrize(
    ("timesteps", "best", "boundary"),
    [
        ([0, 100, 200], 0, True),
        ([0, 100, 200], 1, False),
        ([0, 100, 200], 2, True),
        ([200], 0, False),  # not searched
    ],
)
def test_a_boundary_is_an_end_of_a_search(timesteps, best, boundary):
    assert bool(search.at_boundary(jnp.array(timesteps), jnp.int32(best))) == boundary


@pytest.mark.parametrize("strategy", SEARCHES)
def test_searches_find_every_peak(strategy):
    times, evaluated, best, boundary = every_peak(strategy)
    assert times.shape == (len(CURVES), len(PEAKS), COUNT[strategy])
    np.testing.assert_array_equal(times, evaluated)
    assert times.min() == LOW and times.max() == HIGH
    assert np.abs(best - PEAKS).max() <= SLACK[strategy]
    # A monotone curve ends at the boundary and says so; a peak well inside does not.
    np.testing.assert_array_equal(best[:, [0, -1]], [[LOW, HIGH]] * len(CURVES))
    assert boundary[:, [0, -1]].all()
    inside = slice(SLACK[strategy] + 1, -SLACK[strategy] - 1)
    assert not boundary[:, inside].any()


def test_searches_agree():
    at = np.asarray(COARSE)  # peaks that the grid can meet
    grid, golden, ternary = (every_peak(strategy)[2][:, at] for strategy in SEARCHES)
    np.testing.assert_array_equal(grid, ternary)
    np.testing.assert_allclose(golden, ternary, atol=SLACK["golden"])


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 2), (17, 250)])
def test_bracketing_works_on_any_interval(low, high):
    peaks = jnp.arange(low, high + 1)
    for narrow, slack in ((search.golden_section, 1), (search.ternary, 0)):

        @jax.jit
        @jax.vmap
        def find(p, narrow=narrow):
            times, value = narrow(lambda t: -jnp.abs(t - p), lambda v: v, low, high)
            return times[value.argmax()], times

        best, times = find(peaks)
        assert np.abs(best - peaks).max() <= slack
        assert (int(best[0]), int(best[-1])) == (low, high)
        assert low <= times.min() and times.max() <= high


@pytest.mark.parametrize("strategy", SEARCHES)
def test_results_come_in_the_order_of_evaluation(strategy):
    seen = []

    def curve(t):
        jax.debug.callback(lambda t: seen.append(int(t)), t, ordered=True)
        return -jnp.abs(t - 371.0)

    times, results = searched(strategy, curve)
    jax.effects_barrier()
    assert seen == times.tolist() == results["t"].tolist()


@pytest.mark.parametrize(
    ("refine", "expected"), [(0, []), (1, [15]), (2, [5, 15]), (3, [5, 13, 17])]
)
def test_grid_refines_between_the_neighbours_of_the_best(refine, expected):
    times, value = search.grid(
        lambda t: -jnp.square(t - 11.0),
        lambda v: v,
        jnp.array([0, 10, 20, 40]),
        refine=refine,
    )
    np.testing.assert_array_equal(times, [0, 10, 20, 40, *expected])
    np.testing.assert_array_equal(value, -np.square(np.asarray(times) - 11.0))
