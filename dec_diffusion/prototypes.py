"""A few training examples that stand for each cluster, and which of them a new example is like.

The prototypes of a cluster are the members it is surest of and, among those it is equally sure of,
the ones nearest to the mean of its members: probabilities saturate, so that often many are 1.
"""

from typing import NamedTuple

import numpy as np

from dec_diffusion.data import Dataset
from dec_diffusion.evaluate import Assignment

PER_CLUSTER = 10
_ROWS = 16384  # members that are compared at a time
_EQUAL = 3  # decimals in which probabilities must differ to count as different


class Prototypes(NamedTuple):
    """Members of clusters, the best of each cluster first.

    Attributes:
        cluster: int32 [m], which they stand for.
        name: str [m], their files or names or, where they have none, their rows in the source.
        embedding: float32 [m, d], where they lie in the space clustered in.
    """

    cluster: np.ndarray
    name: np.ndarray
    embedding: np.ndarray


def choose(
    dataset: Dataset, assignment: Assignment, *, per_cluster: int = PER_CLUSTER
) -> Prototypes:
    """The prototypes of every cluster that has members.

    Args:
        dataset: the training data.
        assignment: of that data set.
        per_cluster: how many of each cluster, or all members of a smaller one.
    """
    clusters = np.unique(assignment.labels)
    rows = np.concatenate([ranked(assignment, k)[:per_cluster] for k in clusters])
    names = [dataset.paths[i] if dataset.paths else str(dataset.rows[i]) for i in rows]
    return Prototypes(assignment.labels[rows], np.array(names), assignment.embedding[rows])


def ranked(assignment: Assignment, cluster: int) -> np.ndarray:
    """The members of a cluster, int [m], from the one that stands for it best to the last."""
    members = np.flatnonzero(assignment.labels == cluster)
    if not len(members):
        return members
    parts = [members[i : i + _ROWS] for i in range(0, len(members), _ROWS)]
    embedding = assignment.embedding
    total = np.sum([embedding[part].sum(axis=0, dtype=np.float64) for part in parts], axis=0)
    mean = total / len(members)
    distance = np.concatenate([_square(embedding[part], mean) for part in parts])
    sure = np.round(assignment.probability[members], _EQUAL)
    return members[np.lexsort((distance, -sure))]


def closest(prototypes: Prototypes, assignment: Assignment) -> list[str]:
    """The name of the closest prototype of each example's cluster; "" if it has none."""
    # References to a few strings, not as many strings.
    names, known = np.full(len(assignment.labels), "", object), prototypes.name.astype(object)
    for k in np.unique(prototypes.cluster):
        members = np.flatnonzero(assignment.labels == k)
        own = prototypes.cluster == k
        for start in range(0, len(members), _ROWS):
            part = members[start : start + _ROWS]
            distance = [_square(assignment.embedding[part], z) for z in prototypes.embedding[own]]
            names[part] = known[own][np.argmin(distance, axis=0)]
    return names.tolist()


def _square(z: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Squared distances float64 [n] of rows [n, d] from a point [d]."""
    return np.square(z.astype(np.float64) - point).sum(axis=1)
