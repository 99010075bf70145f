"""Prototypes of clusters, and which of them an example is like."""

import numpy as np
import pytest
from scipy.stats import entropy
from sklearn.metrics import pairwise_distances_argmin

from dec_diffusion import prototypes
from dec_diffusion.data import from_arrays
from dec_diffusion.evaluate import Assignment
from dec_diffusion.prototypes import Prototypes


def assignment(labels, probability, embedding) -> Assignment:
    labels, probability = np.asarray(labels, np.int32), np.asarray(probability, np.float32)
    responsibilities = np.stack([probability, 1 - probability], 1)
    return Assignment(labels, probability, responsibilities, np.asarray(embedding, np.float32))


@pytest.fixture
def saturated() -> Assignment:
    """Two clusters, of which most members have a probability of 1, as neural mixtures give it."""
    z = [[0.0], [9.0], [4.0], [5.0], [6.0], [50.0], [52.0], [51.0]]
    sure = [1.0, 1.0, 1.0, 0.9, 0.99999994, 1.0, 0.6, 1.0]
    return assignment([0] * 5 + [2] * 3, sure, z)


def test_the_surest_come_first_and_of_those_the_most_central(saturated):
    dataset = from_arrays(np.arange(16.0).reshape(8, 2), rows=np.arange(8) * 10)
    found = prototypes.choose(dataset, saturated, per_cluster=4)
    # The mean of cluster 0 is 4.8; what rounding takes from 1 is no doubt; 0.9 is one.
    assert found.name.tolist() == ["20", "40", "10", "0", "70", "50", "60"]
    assert found.cluster.tolist() == [0, 0, 0, 0, 2, 2, 2]
    np.testing.assert_array_equal(found.embedding[:, 0], [4, 6, 9, 0, 51, 50, 52])


def test_they_go_by_their_files_where_there_are_any(saturated):
    paths = [f"{c}.png" for c in "abcdefgh"]
    dataset = from_arrays(np.arange(16.0).reshape(8, 2), paths=paths)
    found = prototypes.choose(dataset, saturated, per_cluster=1)
    assert found.name.tolist() == ["c.png", "h.png"]
    new = assignment([2, 0, 1], [1, 1, 1], [[0.0], [0.0], [0.0]])
    # Of its own cluster, however far; none where the cluster had no members.
    assert prototypes.closest(found, new) == ["h.png", "c.png", ""]


def test_the_closest_is_the_closest():
    rng = np.random.default_rng(0)
    known = Prototypes(
        np.repeat([0, 1, 2], 7), np.arange(21).astype(str), rng.normal(size=(21, 5)) + 1000
    )
    labels, z = rng.integers(0, 3, 200), rng.normal(size=(200, 5)) + 1000
    found = np.array(prototypes.closest(known, assignment(labels, np.ones(200), z))).astype(int)
    for k in range(3):
        z_k = z[labels == k].astype(np.float32)
        expected = pairwise_distances_argmin(z_k, known.embedding[known.cluster == k]) + 7 * k
        np.testing.assert_array_equal(found[labels == k], expected)


def test_entropy_is_that_of_scipy():
    p = np.random.default_rng(0).dirichlet(np.ones(5) / 3, 50).astype(np.float32)
    p[:2] = [[1, 0, 0, 0, 0], [0.2] * 5]
    a = Assignment(p.argmax(1), p.max(1), p, p)
    assert a.entropy.dtype == np.float32
    np.testing.assert_allclose(a.entropy, entropy(p.astype(float), axis=1), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(a.entropy[:2], [0, np.log(5)], rtol=1e-6)
