import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist
from scipy.special import log_softmax, rel_entr, softmax
from sklearn.neighbors import NearestNeighbors

from dec_diffusion import targets
from dec_diffusion.types import InputError

TOLERANCE = {"float32": 2e-5, "float64": 1e-11}

# Compiled whole, since operation by operation each shape would compile dozens of small programs.
log_student_t = jax.jit(targets.log_student_t)
target_distribution = jax.jit(targets.target_distribution)
sinkhorn_target = jax.jit(targets.sinkhorn_target)
kl = jax.jit(targets.kl)
entropy = jax.jit(targets.entropy)
balance = jax.jit(targets.balance)
neighbour_graph = targets.neighbour_graph
graph_loss = jax.jit(targets.graph_loss)
label_change = jax.jit(targets.label_change)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def log_assignments(n=40, k=4, *, sharpness=2.0, seed=0):
    return log_softmax(sharpness * normal(n, k, seed=seed), axis=1)


def balanced(k=5):
    """Assignments in which every row is a rotation of one row: all frequencies are equal."""
    row = softmax(normal(k, seed=3))
    return np.stack([np.roll(row, shift) for shift in range(k)])


def float32(*arrays) -> list[Any]:
    return [jnp.asarray(a, jnp.float32) for a in arrays]


# --- assignments


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_student_t_equals_numpy(dtype, alpha):
    z, centers = normal(40, 3), normal(4, 3, seed=1)
    squares = cdist(z, centers, "sqeuclidean")
    expected = (1 + squares / alpha) ** (-(alpha + 1) / 2)
    expected /= expected.sum(axis=1, keepdims=True)
    with jax.enable_x64(dtype == "float64"):
        z, centers = jnp.asarray(z, dtype), jnp.asarray(centers, dtype)
        log_q = log_student_t(z, centers, alpha=alpha)
    assert log_q.dtype == dtype
    np.testing.assert_allclose(log_q, np.log(expected), rtol=0, atol=TOLERANCE[dtype])


def test_student_t_equals_scipys_density_in_one_dimension():
    z, centers = normal(20, 1), normal(3, 1, seed=1)
    density = stats.t.logpdf((z - centers.T), df=1.0)
    log_q = log_student_t(*float32(z, centers), alpha=1.0)
    np.testing.assert_allclose(log_q, log_softmax(density, axis=1), atol=1e-5)


def test_student_t_keeps_its_accuracy_far_from_zero():
    z, centers = ((a + 1000).astype(np.float32) for a in (normal(40, 3), normal(4, 3, seed=1)))
    ratio = 1 + cdist(np.float64(z), np.float64(centers), "sqeuclidean")
    expected = log_softmax(-np.log(ratio), axis=1)
    np.testing.assert_allclose(log_student_t(z, centers), expected, atol=2e-5)


@pytest.mark.parametrize("far", [1e6, 1e15, 1e25])
def test_far_points_have_finite_assignments_targets_and_gradients(far):
    z, centers = float32(np.vstack([normal(6, 3), np.full((1, 3), far)]), normal(4, 3, seed=1))

    def loss(z, centers):
        log_q = log_student_t(z, centers)
        return jnp.sum(kl(target_distribution(log_q), log_q))

    log_q = log_student_t(z, centers)
    np.testing.assert_allclose(jnp.exp(log_q[-1]), 0.25, atol=1e-4)
    for leaf in jax.tree.leaves((log_q, jax.jit(jax.grad(loss, argnums=(0, 1)))(z, centers))):
        assert np.isfinite(leaf).all()


# --- targets


@pytest.mark.parametrize("power", [1.5, 2.0])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_target_equals_its_definition(dtype, power):
    log_q = log_assignments()
    weight = np.random.default_rng(1).uniform(0.1, 2, size=len(log_q))
    q = np.exp(log_q)
    expected = q**power / (weight @ q)
    expected /= expected.sum(axis=1, keepdims=True)
    with jax.enable_x64(dtype == "float64"):
        log_q, weight = jnp.asarray(log_q, dtype), jnp.asarray(weight, dtype)
        p = target_distribution(log_q, weight, power=power)
    assert p.dtype == dtype
    np.testing.assert_allclose(p, expected, atol=TOLERANCE[dtype])
    np.testing.assert_allclose(np.asarray(p).sum(axis=1), 1, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("target", [target_distribution, sinkhorn_target])
@pytest.mark.parametrize(
    "q",
    [np.eye(4), np.eye(4)[[0, 1, 1, 3, 1]], np.full((6, 4), 0.25)],
    ids=["one-hot", "one-hot, a cluster empty", "uniform"],
)
def test_target_of_one_hot_and_uniform_assignments_is_themselves(target, q):
    with np.errstate(divide="ignore"):
        log_q = jnp.asarray(np.log(q), jnp.float32)
    np.testing.assert_allclose(target(log_q), q, atol=1e-6)


def test_target_sharpens_when_clusters_are_equally_frequent():
    q = balanced()
    p = np.asarray(target_distribution(*float32(np.log(q))))
    np.testing.assert_allclose(p, q**2 / (q**2).sum(axis=1, keepdims=True), atol=1e-6)
    assert (p.max(axis=1) > q.max(axis=1)).all()


def test_target_survives_a_cluster_too_rare_for_its_dtype():
    log_q = log_assignments()
    log_q[:, 0] = -200
    (log_q,) = float32(log_softmax(log_q, axis=1))
    assert np.exp(np.float32(log_q[0, 0])) == 0
    p = target_distribution(log_q)
    rest = target_distribution(log_q[:, 1:])
    np.testing.assert_allclose(p, np.c_[np.zeros(len(p)), rest], atol=1e-6)


def sinkhorn(log_q, weight, prior, iterations):
    """Plain Sinkhorn: scale the matrix itself, columns then rows."""
    p = np.exp(log_q)
    for _ in range(iterations):
        p = p / p.sum(axis=1, keepdims=True)
        p = p * prior / (weight @ p / weight.sum())
    return p / p.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("iterations", [0, 3, 20])
@pytest.mark.parametrize("prior", [None, [0.1, 0.2, 0.3, 0.4]])
def test_sinkhorn_equals_plain_scaling(prior, iterations, temperature):
    log_q = log_assignments()
    weight = np.random.default_rng(1).uniform(0.1, 2, size=len(log_q))
    share = np.full(4, 0.25) if prior is None else np.asarray(prior)
    p = sinkhorn_target(
        *float32(log_q, weight),
        iterations=iterations,
        temperature=temperature,
        prior=None if prior is None else jnp.asarray(prior),
    )
    assert p.dtype == jnp.float32
    np.testing.assert_allclose(
        p, sinkhorn(log_q / temperature, weight, share, iterations), atol=1e-5
    )
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-6)
    if iterations == 20:
        np.testing.assert_allclose(weight @ p / weight.sum(), share, atol=1e-3)


def test_sinkhorn_scales_its_prior():
    (log_q,) = float32(log_assignments())
    prior = jnp.asarray([1.0, 2, 3, 4])
    scaled, given = (sinkhorn_target(log_q, prior=b) for b in (prior, prior / 10))
    np.testing.assert_allclose(scaled, given, atol=1e-6)
    assert abs(float(scaled[:, 3].mean()) - 0.4) < 1e-3


def test_sinkhorn_takes_assignments_too_sharp_for_the_dtype():
    log_q = log_assignments(sharpness=100.0)
    p = sinkhorn_target(*float32(log_q), iterations=500)
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(p).all()
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-6)


# --- divergence, entropy, balance


def test_divergence_equals_scipy_and_is_zero_only_between_equals():
    p, log_q = softmax(normal(40, 4, seed=5), axis=1), log_assignments()
    p[:10, 0] = 0
    p /= p.sum(axis=1, keepdims=True)
    value = np.asarray(kl(*float32(p, log_q)))
    np.testing.assert_allclose(value, rel_entr(p, np.exp(log_q)).sum(axis=1), rtol=1e-5, atol=1e-6)
    assert (value > 1e-3).all()
    np.testing.assert_allclose(kl(*float32(np.exp(log_q), log_q)), 0, atol=1e-6)


def test_clusters_without_target_mass_add_exactly_nothing():
    p, log_q = jnp.asarray([[0.0, 1.0], [0.0, 1.0]]), jnp.asarray([[-jnp.inf, 0.0], [-3e38, 0.0]])
    assert kl(p, log_q).tolist() == [0, 0]
    gradient = jax.grad(lambda p, log_q: kl(p, log_q).sum(), argnums=(0, 1))(p, log_q)
    assert all(np.isfinite(g).all() for g in gradient)
    assert np.isinf(kl(p[:, ::-1], log_q)[0])


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_gradient_equals_the_closed_form(alpha):
    z, centers = normal(40, 3), normal(4, 3, seed=1)
    p = np.asarray(target_distribution(log_student_t(*float32(z, centers))))

    def loss(z, centers):
        return jnp.sum(kl(jnp.asarray(p), log_student_t(z, centers, alpha=alpha)))

    pull = 1 / (1 + cdist(z, centers, "sqeuclidean") / alpha)
    q = pull ** ((alpha + 1) / 2)
    q /= q.sum(axis=1, keepdims=True)
    force = (alpha + 1) / alpha * (pull * (p - q))[:, :, None] * (z[:, None] - centers)
    by_z, by_centers = jax.jit(jax.grad(loss, argnums=(0, 1)))(*float32(z, centers))
    np.testing.assert_allclose(by_z, force.sum(axis=1), atol=1e-5)
    np.testing.assert_allclose(by_centers, -force.sum(axis=0), atol=1e-5)


@pytest.mark.parametrize("target", [target_distribution, sinkhorn_target])
def test_no_gradient_passes_a_target(target):
    z, centers = float32(normal(40, 3), normal(4, 3, seed=1))

    def loss(z, centers, fixed):
        log_q = log_student_t(z, centers)
        return jnp.sum(kl(target(log_q) if fixed is None else fixed, log_q))

    @jax.jit
    def gradients(z, centers):
        gradient = jax.grad(loss, argnums=(0, 1))
        fixed = target(log_student_t(z, centers))
        through = jax.grad(lambda z: jnp.sum(target(log_student_t(z, centers)) ** 3))
        return gradient(z, centers, None), gradient(z, centers, fixed), through(z)

    live, held, through = gradients(z, centers)
    for got, expected in zip(live, held, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)
    np.testing.assert_array_equal(through, 0)


def test_entropy_equals_scipy_and_lies_between_its_bounds():
    log_q = np.vstack([log_assignments(), np.full((1, 4), -np.log(4)), [0, -200, -200, -200]])
    value = np.asarray(entropy(*float32(log_q)))
    np.testing.assert_allclose(value, stats.entropy(np.exp(log_q), axis=1), atol=1e-6)
    np.testing.assert_allclose(value[-2:], [np.log(4), 0], atol=1e-6)
    one_hot = jnp.asarray([[0.0, -jnp.inf]])
    assert entropy(one_hot)[0] == 0
    assert np.isfinite(jax.grad(lambda q: entropy(q).sum())(one_hot)).all()


def test_balance_is_the_entropy_missing_from_the_mean():
    log_q = log_assignments()
    weight = np.random.default_rng(1).uniform(0.1, 2, size=len(log_q))
    missing = np.log(4) - stats.entropy(weight @ np.exp(log_q))
    np.testing.assert_allclose(balance(*float32(log_q, weight)), missing, atol=1e-6)
    assert 0 <= balance(*float32(np.log(balanced()))) < 1e-6
    collapsed = jnp.asarray([[0.0, -jnp.inf, -jnp.inf]] * 3)
    np.testing.assert_allclose(balance(collapsed), np.log(3), atol=1e-6)


def test_following_its_gradient_lowers_balance():
    logits = jnp.asarray(normal(40, 4) + np.arange(4), jnp.float32)

    def loss(logits):
        return balance(jax.nn.log_softmax(logits, axis=1))

    moved, gradient = logits, jax.jit(jax.grad(loss))
    for _ in range(200):
        moved = moved - 20 * gradient(moved)
    assert loss(moved) < 1e-3 < 1e-1 < loss(logits)


def test_loss_ignores_the_order_of_clusters_and_rigid_motion():
    z, centers = normal(40, 3), normal(4, 3, seed=1)
    rotation, _ = np.linalg.qr(normal(3, 3, seed=2))
    order = np.random.default_rng(3).permutation(4)

    def assignments_and_losses(z, centers):
        log_q = log_student_t(*float32(z, centers))
        both = target_distribution(log_q), sinkhorn_target(log_q)
        return log_q, *both, *(kl(p, log_q) for p in both), balance(log_q)

    base = assignments_and_losses(z, centers)
    moved = assignments_and_losses(z @ rotation + 7, centers @ rotation + 7)
    permuted = assignments_and_losses(z, centers[order])
    for i, (a, b, c) in enumerate(zip(base, moved, permuted, strict=True)):
        np.testing.assert_allclose(b, a, atol=3e-5)
        np.testing.assert_allclose(c, a[:, order] if i < 3 else a, atol=1e-5)


# --- graph


def dense(index, s):
    graph = np.zeros((len(s), len(s)))
    np.put_along_axis(graph, np.asarray(index), np.asarray(s, np.float64), axis=1)
    return graph


def simplex_projection(v):
    """The point of the simplex nearest to ``v``."""
    descending = np.sort(v)[::-1]
    excess = (np.cumsum(descending) - 1) / np.arange(1, len(v) + 1)
    return np.maximum(v - excess[np.flatnonzero(descending > excess)[-1]], 0)


@pytest.mark.parametrize("k", [1, 6])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_graph_has_k_neighbours_and_minimises_its_objective(dtype, k):
    z = normal(50, 3)
    with jax.enable_x64(dtype == "float64"):
        index, s = neighbour_graph(jnp.asarray(z, dtype), k)
    assert s.dtype == dtype and index.dtype == jnp.int32
    graph = dense(index, s)
    np.testing.assert_allclose(graph.sum(axis=1), 1, atol=1e-6)
    assert ((graph > 0).sum(axis=1) == k).all()
    assert not graph.diagonal().any()
    squares = cdist(z, z, "sqeuclidean")
    for i in range(len(z)):
        others = np.arange(len(z)) != i
        d = np.sort(squares[i, others])
        gamma = (k * d[k] - d[:k].sum()) / 2
        closest = simplex_projection(-squares[i, others] / (2 * gamma))
        np.testing.assert_allclose(graph[i, others], closest, atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_neighbours_equal_scikit_learn(offset):
    z = (normal(300, 8) + offset).astype(np.float32)
    index, s = neighbour_graph(jnp.asarray(z), 7)
    distance, expected = NearestNeighbors(n_neighbors=9).fit(np.float64(z)).kneighbors()
    np.testing.assert_array_equal(index, expected[:, :7])
    squares = distance[:, :8] ** 2
    gap = squares[:, 7:] - squares[:, :7]
    np.testing.assert_allclose(s, gap / gap.sum(axis=1, keepdims=True), atol=1e-4)


def test_close_neighbours_of_spread_data_keep_their_weights():
    # Products of these coordinates are about 1e8 times the squared distances inside a pair.
    z = np.repeat(normal(20, 4) * 30, 3, axis=0) + 0.01 * normal(60, 4, seed=1)
    z = z.astype(np.float32)
    index, s = neighbour_graph(jnp.asarray(z), 1)
    assert (np.asarray(index)[:, 0] // 3 == np.arange(60) // 3).all()
    index, s = neighbour_graph(jnp.asarray(z), 2)
    squares = cdist(np.float64(z), np.float64(z), "sqeuclidean")
    d = np.sort(squares, axis=1)[:, 1:4]
    gap = d[:, 2:] - d[:, :2]
    np.testing.assert_allclose(s, gap / gap.sum(axis=1, keepdims=True), atol=1e-4)
    near = np.take_along_axis(squares, np.asarray(index), axis=1)
    np.testing.assert_allclose(near, d[:, :2])


@pytest.mark.parametrize("block", [1, 32, 96])
def test_block_size_does_not_matter(block):
    (z,) = float32(normal(97, 5))
    index, s = neighbour_graph(z, 5, block=block)
    expected_index, expected = neighbour_graph(z, 5)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(s, expected, atol=1e-6)


def test_equal_distances_share_equally():
    # The corners of a simplex, and one point many times over; then each corner twice.
    for z in (np.eye(6), np.full((6, 6), 0.1)):
        _, s = neighbour_graph(jnp.asarray(z, jnp.float32), 3)
        np.testing.assert_allclose(s, 1 / 3, rtol=1e-6)
    index, s = neighbour_graph(jnp.asarray(np.repeat(np.eye(6), 2, axis=0)), 3)
    np.testing.assert_array_equal(index[:, 0], np.arange(12) ^ 1)
    np.testing.assert_allclose(s, np.tile([1, 0, 0], (12, 1)), atol=1e-6)


def test_rows_with_few_others_use_those_there_are():
    z = jnp.asarray(normal(6, 2), jnp.float32)
    index, s = neighbour_graph(z, 5)
    np.testing.assert_allclose(s, 0.2, rtol=1e-6)
    assert (np.sort(np.c_[index, np.arange(6)], axis=1) == np.arange(6)).all()
    index, s = neighbour_graph(z, 4, weight=jnp.asarray([1.0, 1, 1, 0, 0, 0]))
    np.testing.assert_allclose(s[:3], np.tile([0.5, 0.5, 0, 0], (3, 1)))
    np.testing.assert_array_equal(index[:3, 2:], [[0, 0], [1, 1], [2, 2]])
    _, s = neighbour_graph(z, 4, weight=jnp.asarray([1.0, 0, 0, 0, 0, 0]))
    np.testing.assert_array_equal(s[0], 0)


@pytest.mark.parametrize("k", [0, 5, 6])
def test_impossible_numbers_of_neighbours_are_refused(k):
    with pytest.raises(InputError, match=rf"neighbours = {k} for 5 examples.* 1 to 4"):
        neighbour_graph(jnp.zeros((5, 2)), k)


def relative_spread(z):
    return cdist(z, z, "sqeuclidean").mean()


def test_graph_loss_is_the_laplacians_trace_over_the_spread():
    z = normal(50, 3)
    index, s = neighbour_graph(*float32(z), 6)
    graph = dense(index, s)
    mutual = (graph + graph.T) / 2
    laplacian = np.diag(mutual.sum(axis=1)) - mutual
    trace = np.trace(z.T @ laplacian @ z)
    np.testing.assert_allclose(trace, (graph * cdist(z, z, "sqeuclidean")).sum() / 2, rtol=1e-10)
    loss = graph_loss(*float32(z, z[index]), s)
    np.testing.assert_allclose(loss, trace / len(z) / relative_spread(z), rtol=1e-5)


@pytest.mark.parametrize(("scale", "offset"), [(1e-3, 0.0), (1e4, 0.0), (1.0, 1000.0)])
def test_graph_loss_has_neither_scale_nor_origin(scale, offset):
    z = normal(50, 3).astype(np.float32)
    moved = (scale * z + offset).astype(np.float32)
    index, s = neighbour_graph(jnp.asarray(z), 6)
    base, same = (graph_loss(*float32(y, y[index]), s) for y in (z, moved))
    np.testing.assert_allclose(same, base, rtol=1e-3 if offset else 1e-5)


def test_graph_loss_is_zero_only_when_connected_points_coincide():
    z = np.repeat(normal(10, 3), 4, axis=0)
    index, s = neighbour_graph(*float32(z), 3)
    assert graph_loss(*float32(z, z[index]), s) == 0
    z[0] += 0.1
    assert graph_loss(*float32(z, z[index]), s) > 1e-5
    still = jnp.ones((4, 2))
    gradient = jax.jit(jax.grad(graph_loss))(still, still[:, None], jnp.ones((4, 1)))
    np.testing.assert_array_equal(gradient, 0)


def test_gradient_of_graph_loss_draws_neighbours_together():
    z = normal(50, 3).astype(np.float32)
    index, s = neighbour_graph(jnp.asarray(z), 6)
    gradient = jax.jit(jax.grad(graph_loss))(jnp.asarray(z), jnp.asarray(z[index]), s)
    pull = (np.asarray(s)[:, :, None] * (z[:, None] - z[index])).sum(axis=1)
    np.testing.assert_allclose(gradient, pull / 50 / relative_spread(z), atol=1e-6)

    def through_graph(z):
        _, s = neighbour_graph(z, 6)
        return jnp.sum(s**2)

    np.testing.assert_array_equal(jax.jit(jax.grad(through_graph))(jnp.asarray(z)), 0)


# --- all


def test_label_change_counts_weighted_rows():
    new, old = jnp.asarray([0, 1, 2, 3]), jnp.asarray([0, 2, 2, 1])
    assert label_change(new, old) == 0.5
    assert label_change(new, new) == 0
    assert label_change(new, old, jnp.asarray([1.0, 1, 2, 0])) == 0.25


@jax.jit
def everything(z, centers, weight, labels):
    """Every function of the module: per-row results in a list, and results over all rows."""
    log_q = log_student_t(z, centers)
    p = target_distribution(log_q, weight)
    transported = sinkhorn_target(log_q, weight)
    index, s = neighbour_graph(z, 4, weight=weight, block=16)
    rows = [log_q, p, transported, index, s, kl(p, log_q), entropy(log_q)]
    total = [
        balance(log_q, weight),
        graph_loss(z, z[index], s, weight),
        label_change(labels, labels[::-1] * 0, weight),
    ]
    return rows, total


def case(n=40):
    z, centers = float32(normal(n, 3), normal(4, 3, seed=1))
    return z, centers, jnp.arange(n) % 3


@jax.jit
@functools.partial(jax.grad, has_aux=True)
def slope(z, centers, weight, labels):
    """The gradient by ``z`` of the sum of all losses, and ``everything``."""
    rows, total = everything(z, centers, weight, labels)
    return sum(total) + jnp.sum(jnp.where(weight > 0, rows[5] + rows[6], 0)), (rows, total)


@pytest.mark.parametrize("value", [0.0, 3.0, 1e12, -1e30])
def test_padding_changes_nothing(value):
    z, centers, labels = case()
    padded = jnp.concatenate([z, jnp.full((9, 3), value)])
    weight = jnp.concatenate([jnp.ones(40), jnp.zeros(9)])
    expected_slope, (expected_rows, expected_total) = slope(z, centers, jnp.ones(40), labels)
    gradient, (rows, total) = slope(padded, centers, weight, jnp.pad(labels, (0, 9)))
    for got, expected in zip(rows, expected_rows, strict=True):
        np.testing.assert_allclose(got[:40], expected, atol=1e-5)
        assert np.isfinite(got).all()
    np.testing.assert_allclose(total, expected_total, atol=1e-6)
    np.testing.assert_allclose(gradient[:40], expected_slope, atol=1e-5)
    np.testing.assert_array_equal(gradient[40:], 0)


@jax.jit
def from_log_assignments(log_q, weight):
    missing, gradient = jax.value_and_grad(balance)(log_q, weight)
    return target_distribution(log_q, weight), sinkhorn_target(log_q, weight), gradient, missing


@pytest.mark.parametrize("value", [-1e4, 50.0, 1e4])
def test_log_assignments_of_padding_may_be_any_number(value):
    (log_q,) = float32(log_assignments())
    padded = jnp.concatenate([log_q, jnp.full((5, 4), value)])
    weight = jnp.concatenate([jnp.ones(40), jnp.zeros(5)])
    *rows, missing = from_log_assignments(padded, weight)
    *expected_rows, expected_missing = from_log_assignments(log_q, jnp.ones(40))
    np.testing.assert_allclose(missing, expected_missing, atol=1e-6)
    for got, expected in zip(rows, expected_rows, strict=True):
        np.testing.assert_allclose(got[:40], expected, atol=1e-6)
    np.testing.assert_array_equal(rows[-1][40:], 0)


def test_a_batch_of_padding_alone_is_finite():
    z, centers, labels = case()
    gradient, (rows, total) = slope(z, centers, jnp.zeros(40), labels)
    assert all(np.isfinite(leaf).all() for leaf in rows)
    np.testing.assert_array_equal(total, 0)
    np.testing.assert_array_equal(gradient, 0)


def test_batched_equals_plain_and_no_weights_equal_weights_of_one():
    z, centers, labels = case()
    _, plain = slope(z, centers, jnp.ones(40), labels)
    batched = jax.vmap(everything, in_axes=(0, None, None, None))
    second = jax.tree.map(lambda leaf: leaf[1], batched(jnp.stack([-z, z]), centers, None, labels))
    for got, expected in zip(jax.tree.leaves(second), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_results_keep_the_dtype_of_the_data(dtype, weighted):
    with jax.enable_x64(True):
        z, centers = (jax.ShapeDtypeStruct((rows, 3), dtype) for rows in (20, 4))
        weight = jax.ShapeDtypeStruct((20,), dtype) if weighted else None
        labels = jax.ShapeDtypeStruct((20,), jnp.int64)
        rows, total = jax.eval_shape(everything, z, centers, weight, labels)
    *total, change = total
    kinds = [leaf.dtype.name for leaf in [*rows, *total]]
    assert kinds == [*[dtype] * 3, "int32", *[dtype] * 5]
    assert change.dtype.name == (dtype if weighted else "float32")
