"""Communities of a neighbour graph, against definitions written out in NumPy."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score

from dec_diffusion import communities
from dec_diffusion.communities import Graph
from dec_diffusion.types import InputError

KEY = jax.random.key(0)


def random_graph(n: int, g: int, seed: int = 0) -> Graph:
    rng = np.random.default_rng(seed)
    near = np.stack([rng.permutation([j for j in range(n) if j != i])[:g] for i in range(n)])
    s = rng.dirichlet(np.ones(g), n)
    return Graph(jnp.arange(n), jnp.asarray(near), jnp.asarray(s, jnp.float32), jnp.ones(n))


def block_graph(y: np.ndarray, rng: np.random.Generator) -> Graph:
    """Five neighbours of each example, all of its own class."""
    near = np.stack(
        [
            rng.permutation(np.flatnonzero((y == c) & (np.arange(len(y)) != i)))[:5]
            for i, c in enumerate(y)
        ]
    )
    s = jnp.full(near.shape, 0.2)
    return Graph(jnp.arange(len(y)), jnp.asarray(near), s, jnp.ones(len(y)))


def dense(graph: Graph) -> np.ndarray:
    """The symmetrised graph as a matrix that sums to 1."""
    n = len(graph.weight)
    matrix = np.zeros((n, n))
    np.add.at(
        matrix,
        (np.arange(n)[:, None], np.asarray(graph.neighbours)),
        np.asarray(graph.similarity) * np.asarray(graph.weight)[:, None],
    )
    return (matrix + matrix.T) / (2 * matrix.sum())


def newman(matrix: np.ndarray, labels: np.ndarray) -> float:
    """Modularity by its definition: a sum over all pairs of examples of one group."""
    degree = matrix.sum(1)
    same = labels[:, None] == labels
    return float(((matrix - np.outer(degree, degree)) * same).sum())


def parted(x: np.ndarray, k: int, *, padding: int = 0, **options: int) -> communities.Communities:
    rows = np.pad(x.astype(np.float32), ((0, padding), (0, 0)))
    weight = jnp.asarray(np.arange(len(rows)) < len(x), jnp.float32)
    anchors = jnp.arange(len(x))
    return communities.partition(
        KEY, jnp.asarray(rows), k, weight=weight, anchors=anchors, **options
    )


def test_votes_are_shares_of_neighbours():
    graph = random_graph(30, 4)
    labels = np.random.default_rng(1).integers(0, 3, 30)
    found = np.asarray(communities.votes(graph, jnp.asarray(labels), 3))
    for i in range(30):
        for c in range(3):
            inside = labels[np.asarray(graph.neighbours)[i]] == c
            assert found[i, c] == pytest.approx(
                np.asarray(graph.similarity)[i][inside].sum(), abs=1e-6
            )
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_modularity_is_newmans(seed: int):
    graph = random_graph(40, 5, seed)
    weight = jnp.asarray(np.random.default_rng(seed).integers(0, 3, 40), jnp.float32)
    graph = dataclasses.replace(graph, weight=weight)
    labels = np.random.default_rng(seed + 9).integers(0, 4, 40)
    found = communities.modularity(communities.links(graph, jnp.asarray(labels), 4))
    assert float(found) == pytest.approx(newman(dense(graph), labels), abs=1e-6)


def test_each_merge_is_the_one_that_gains_most():
    graph = random_graph(24, 3)
    matrix, labels = dense(graph), np.arange(24) % 8
    links = communities.links(graph, jnp.asarray(labels), 8)
    for k in range(7, 2, -1):
        best = max(
            (newman(matrix, np.where(labels == b, a, labels)), a, b)
            for a, b in itertools.combinations(np.unique(labels), 2)
        )
        labels = np.where(labels == best[2], best[1], labels)
        groups = np.asarray(communities.merge(links, k))[np.arange(24) % 8]
        assert set(groups) == set(range(k))
        assert adjusted_rand_score(labels, groups) == 1


def test_groups_without_members_are_merged_first():
    graph = random_graph(24, 3)
    labels = np.arange(24) % 4 * 2  # 0, 2, 4, 6 of eight
    groups = np.asarray(communities.merge(communities.links(graph, jnp.asarray(labels), 8), 4))
    assert sorted(groups[::2]) == [0, 1, 2, 3]


def test_small_groups_are_mended_at_their_borders():
    rng = np.random.default_rng(0)
    y = np.arange(400) // 20  # 20 groups, each cut in two by 40 pieces of which some straddle
    graph = block_graph(y, rng)
    pieces = np.where(rng.random(400) < 0.3, (2 * y + 3) % 40, 2 * y + np.arange(400) % 2)
    mended = np.asarray(communities.mend(KEY, graph, jnp.asarray(pieces), 40))
    inside = [len(np.unique(y[mended == c])) for c in np.unique(mended)]
    assert max(len(np.unique(y[pieces == c])) for c in range(40)) > 1
    assert max(inside) == 1
    assert newman(dense(graph), mended) > newman(dense(graph), pieces) + 0.2


def test_every_move_is_to_the_group_that_equation_5_names():
    graph = random_graph(50, 49)  # everyone is a neighbour, so every group is a choice
    labels = jnp.asarray(np.random.default_rng(3).integers(0, 6, 50), jnp.int32)
    vote = np.asarray(communities.votes(graph, labels, 6))
    chance = vote.mean(0)
    stay = 1e-3 * np.eye(6)[np.asarray(labels)]
    found = communities._nearest_group(
        graph.neighbours, graph.similarity, labels, jnp.ones(50, bool), labels, jnp.asarray(chance)
    )
    np.testing.assert_array_equal(found, (vote - chance + stay).argmax(1))
    held = communities._nearest_group(
        graph.neighbours, graph.similarity, labels, jnp.zeros(50, bool), labels, jnp.asarray(chance)
    )
    np.testing.assert_array_equal(held, labels)


def test_moves_never_end_below_their_start():
    for seed in range(5):
        graph = random_graph(60, 4, seed)
        labels = np.random.default_rng(seed).integers(0, 3, 60)
        found = communities.move(KEY, graph, jnp.asarray(labels), 3)
        before, after = newman(dense(graph), labels), newman(dense(graph), np.asarray(found.labels))
        assert after > before + 0.1
        assert float(found.modularity) == pytest.approx(after, abs=1e-6)


def test_separate_groups_of_different_shapes_are_found():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 400)
    spread = np.array([0.3, 0.6, 1.0, 1.5])[y, None]
    x = 8 * np.eye(4, 6)[y] + spread * rng.normal(size=(400, 6))
    found = parted(x, 4, restarts=3)
    assert adjusted_rand_score(y, found.labels) == 1
    assert 0.72 < float(found.modularity) <= 0.75


def test_digits_by_their_pixels():
    x, y = load_digits(return_X_y=True)
    found = parted(x, 10, restarts=5)
    assert adjusted_rand_score(y, found.labels) > 0.8
    assert adjusted_rand_score(y, KMeans(10, n_init=10, random_state=0).fit_predict(x)) < 0.7


def test_padding_does_not_count():
    x, _ = load_digits(return_X_y=True)
    x = x[:300]
    whole, padded = parted(x, 5, restarts=2), parted(x, 5, restarts=2, padding=44)
    np.testing.assert_array_equal(whole.labels, padded.labels[:300])
    assert float(whole.modularity) == pytest.approx(float(padded.modularity), abs=1e-6)


def test_few_anchors_stand_for_all():
    x, y = load_digits(return_X_y=True)
    anchors = communities.some(len(x), 600)
    assert len(anchors) == 600
    assert (np.diff(anchors) > 0).all()
    found = communities.partition(
        KEY,
        jnp.asarray(x, jnp.float32),
        10,
        weight=jnp.ones(len(x)),
        anchors=jnp.asarray(anchors),
        restarts=5,
    )
    assert adjusted_rand_score(y, found.labels) > 0.72


@pytest.mark.parametrize("k", [1, 2, 5])
def test_few_examples(k: int):
    x = np.repeat(np.eye(5) * 10, 2, axis=0) + np.arange(10)[:, None] * 0.01
    found = parted(x, k)
    assert set(np.asarray(found.labels)) == set(range(k))


def test_more_groups_than_examples_are_refused():
    with pytest.raises(InputError, match="clusters = 7 for 6 examples"):
        parted(np.eye(6), 7)
