"""How many clusters the data fall into: chosen before training, without labels.

The data are cut into too many groups, and groups with no valley between them are joined again.
With N_i the example i and its nearest neighbours, in the first principal axes:

(1) graph    w_ij = |N_i and N_j| / |N_i or N_j| where i is in N_j or j in N_i, else 0
(2) groups   greatest sum_ij (w_ij - s_i s_j / S) [c_i = c_j],  s_i = sum_j w_ij,  S = sum_i s_i
(3) smooth   z_i <- (z_i + sum_j w_ij z_j) / (1 + s_i), once
(4) axis     u = (W + shrinkage)^-1 (m_b - m_a) for groups a and b with means m and common
             covariance W; found on one half of both groups, the other half is projected on it
(5) valley   v = min_t f(t) / min(max_{s<t} f(s), max_{s>t} f(s)), f the density of the projections
             between the medians of a and b: 1 without a valley, 0 if nothing lies between them
(6) merging  the two groups with the largest v become one, again and again; K is how many there are
             when the largest v first is below ``SHALLOW``

Communities alone, (2), cut one round group into several: a graph of neighbours in few dimensions
can be cut cheaply anywhere. But all projections of a Gaussian are Gaussian, so wherever it is cut,
whatever its dimension and covariance, (5) is 1 up to what the finite number of examples and (3) do.

Sources: (1) Jarvis and Patrick 1973; (2) Newman and Girvan 2004, maximised as in Blondel et al.
2008, "Fast unfolding of communities"; (3) one step of mean shift, Fukunaga and Hostetler 1975;
(4) Fisher 1936. (5), (6) and their constants are this package's, measured in docs/num_clusters.md.
"""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dec_diffusion.types import Rows

CHOICE = "num_clusters.json"
"""The file of a workdir that keeps a choice."""
EXAMPLES = 5000
"""Examples that a choice looks at; of more, so many are drawn."""
AXES = 50
"""Principal axes that are kept."""
NEIGHBOURS = 30
"""Nearest neighbours of an example; fewer for less than ten times as many examples."""
SHALLOW = 0.3
"""Valleys from here on do not part two clusters."""

Graph = Any
"""A ``scipy.sparse.csr_array`` [n, n], of whose members type checkers know nothing."""

_HALVINGS = 3  # of two groups, to average the depth of their valley
_POINTS = 41  # at which a density is computed


class Choice(NamedTuple):
    """A number of clusters and how it came about; plain values.

    Attributes:
        chosen: K, at least 2.
        found: how many groups valleys part; ``chosen`` but for 1, where there is no valley.
        runner_up: what the nearest threshold that changes K would give; None if all give the same.
        threshold: `SHALLOW`.
        holds: K is the same with thresholds above the first number, up to the second.
        clusters: numbers of groups while merging, decreasing to 2.
        valleys: for each of them the largest v between two groups, equation (5).
        shares: of the ``found`` groups in all examples, decreasing.
        examples: looked at.
    """

    chosen: int
    found: int
    runner_up: int | None
    threshold: float
    holds: tuple[float, float]
    clusters: tuple[int, ...]
    valleys: tuple[float, ...]
    shares: tuple[float, ...]
    examples: int


def choose(
    x: Rows,
    *,
    offset: np.ndarray | np.floating | float = 0.0,
    scale: np.ndarray | np.floating | float = 1.0,
    seed: int = 0,
) -> Choice:
    """Choose K.

    Args:
        x: [n, ...] finite examples, of which at least two differ.
        offset: with ``scale``, makes values alike in all columns: ``(x - offset) / scale`` is used.
        scale: see ``offset``.
        seed: of the draw of examples, and of the order in which they are visited.
    """
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(x))[:EXAMPLES])
    z = ((np.asarray(x[rows], np.float32) - offset) / scale).reshape(len(rows), -1)
    distinct = len({row.tobytes() for row in z})
    if 2 * distinct < len(z):
        warnings.warn(
            f"only {distinct:,} of {len(z):,} examples differ, as where values are whole numbers: "
            "each of them may count as a group; give --config.method.num_clusters, or add uniform "
            "noise of one step to such columns",
            stacklevel=2,
        )
    z = principal_axes(z, AXES)
    graph = shared_neighbours(z, int(np.clip(len(z) // 10, 2, NEIGHBOURS)))
    labels = communities(graph, rng)
    clusters, valleys, joined = merge(smooth(z, graph), graph, labels, rng)
    below = [i for i, v in enumerate(valleys) if v < SHALLOW]
    at = below[0] if below else len(valleys)
    for i in joined[:at]:
        labels[labels == i[1]] = i[0]
    sizes = np.sort(np.unique(labels, return_counts=True)[1])[::-1]
    runner_up, holds = _rivals(clusters, valleys, at)
    return Choice(
        chosen=max(2, min(len(sizes), distinct)),
        found=len(sizes),
        runner_up=runner_up,
        threshold=SHALLOW,
        holds=holds,
        clusters=tuple(clusters),
        valleys=tuple(valleys),
        shares=tuple((sizes / len(z)).tolist()),
        examples=len(z),
    )


def describe(choice: Choice | Mapping[str, Any]) -> str:
    """A choice, or what a file keeps of it, and how sure it is, in one line."""
    c = choice if isinstance(choice, Choice) else Choice(**choice)
    if c.found < 2:
        return "no valley parts the data, which may be one group; 2 clusters, the fewest there are"
    words = (
        f"{c.chosen} clusters, chosen without labels from {c.examples:,} examples; the same for "
    )
    words += f"thresholds from {c.holds[0]:.2f} to {c.holds[1]:.2f} ({c.threshold} is used)"
    return words + (f", runner-up {c.runner_up}" if c.runner_up else ", no runner-up")


def _rivals(
    clusters: list[int], valleys: list[float], at: int
) -> tuple[int | None, tuple[float, float]]:
    """What other thresholds give, where ``at`` merges were made: see ``Choice``."""
    low = valleys[at] if at < len(valleys) else 0.0
    high = min(valleys[:at], default=1.0)
    rivals = []
    if at:
        rivals.append((high / SHALLOW, clusters[valleys.index(high)]))
    if low > 0.01:
        deeper = (k for k, v in zip(clusters, valleys, strict=True) if v < low)
        rivals.append((SHALLOW / low, next(deeper, 1)))
    return min(rivals, default=(0.0, None))[1], (low, high)


# -- the steps --


def principal_axes(x: np.ndarray, most: int) -> np.ndarray:
    """The first ``most`` principal components of vectors [n, d]; [n, d] itself if d is no more.

    Of no more examples than that, their n - 1, which hold all distances: what comes after takes
    matrices [d, d].
    """
    if x.shape[1] <= most:
        return x - x.mean(0)
    from sklearn.decomposition import PCA

    few = len(x) <= most
    pca = PCA(min(most, len(x) - 1), svd_solver="full" if few else "randomized", random_state=0)
    return pca.fit_transform(x)


def shared_neighbours(z: np.ndarray, k: int) -> Graph:
    """The graph of equation (1) of vectors [n, d] with ``k`` neighbours each: [n, n], no loops."""
    from scipy import sparse
    from sklearn.neighbors import NearestNeighbors

    n = len(z)
    k = min(k, n - 1)
    near = sparse.csr_array(NearestNeighbors(n_neighbors=k).fit(z).kneighbors_graph())
    own = near + sparse.eye_array(n, format="csr")
    both = sparse.coo_array(own @ own.T)
    jaccard = sparse.csr_array((both.data / (2 * (k + 1) - both.data), both.coords), (n, n))
    return sparse.csr_array(jaccard.multiply(near.maximum(near.T)))


def communities(graph: Graph, rng: np.random.Generator) -> np.ndarray:
    """Labels int64 [n] of great modularity, equation (2): nodes move, then what they formed."""
    from scipy import sparse

    labels = np.arange(graph.shape[0])
    while True:
        home = _moved(graph, rng)
        labels = home[labels]
        if home.max() + 1 == graph.shape[0]:
            return labels
        member = sparse.csr_array((np.ones(len(home)), (np.arange(len(home)), home)))
        graph = sparse.csr_array(member.T @ graph @ member)


def _moved(graph: Graph, rng: np.random.Generator) -> np.ndarray:
    """The community of each node after moving them one by one, until hardly any gains by it."""
    n = graph.shape[0]
    strength = np.asarray(graph.sum(1)).ravel()
    per_total = 1 / max(strength.sum(), 1e-12)
    # Lists: their elements are read far faster than those of arrays.
    starts, ends, weights = graph.indptr.tolist(), graph.indices.tolist(), graph.data.tolist()
    own, total, home = strength.tolist(), strength.tolist(), list(range(n))
    for _ in range(50):
        moves = 0
        for i in rng.permutation(n).tolist():
            towards: dict[int, float] = {}
            for e in range(starts[i], starts[i + 1]):
                if ends[e] != i:
                    c = home[ends[e]]
                    towards[c] = towards.get(c, 0.0) + weights[e]
            old = best = home[i]
            total[old] -= own[i]
            gain = towards.get(old, 0.0) - total[old] * own[i] * per_total
            for c, weight in towards.items():
                other = weight - total[c] * own[i] * per_total
                if other > gain + 1e-12:
                    best, gain = c, other
            total[best] += own[i]
            home[i] = best
            moves += best != old
        if moves <= n // 1000:
            break
    return np.unique(home, return_inverse=True)[1]


def smooth(z: np.ndarray, graph: Graph) -> np.ndarray:
    """Equation (3)."""
    return (z + graph @ z) / (1 + np.asarray(graph.sum(1)).reshape(-1, 1))


def merge(
    z: np.ndarray, graph: Graph, labels: np.ndarray, rng: np.random.Generator
) -> tuple[list[int], list[float], list[tuple[int, int]]]:
    """Equation (6), without end.

    Args:
        z: [n, d].
        graph: [n, n]; groups that no edge joins count as parted by an empty valley.
        labels: int [n], the groups to begin with.
        rng: for the halves of groups.

    Returns:
        For every number of groups from that of ``labels`` to 2: the number, the largest v, and the
        two labels that have it, of which the second then becomes the first.
    """
    groups = {int(c): np.flatnonzero(labels == c) for c in np.unique(labels)}

    def between(i: int, j: int) -> float:
        joined = graph[groups[i]][:, groups[j]].nnz
        return valley(z[groups[i]], z[groups[j]], rng) if joined else 0.0

    pairs = {(i, j): between(i, j) for i in groups for j in groups if i < j}
    clusters, valleys, merged = [], [], []
    while pairs:
        (i, j), v = max(pairs.items(), key=lambda pair: pair[1])
        clusters.append(len(groups))
        valleys.append(v)
        merged.append((i, j))
        groups[i] = np.concatenate([groups[i], groups.pop(j)])
        pairs = {pair: v for pair, v in pairs.items() if i not in pair and j not in pair}
        pairs |= {(i, c): between(i, c) for c in groups if c != i}
    return clusters, valleys, merged


def valley(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> float:
    """Equations (4) and (5) for groups [n, d] and [m, d], in [0, 1]: the mean of some halvings."""
    if min(len(a), len(b)) < 4:
        return 1.0
    return float(np.mean([_valley(_projected(a, b, rng)) for _ in range(_HALVINGS)]))


def _projected(
    a: np.ndarray, b: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Equation (4): either half of both groups on the axis that the other halves give.

    In units of the deviation within groups, from the middle between them, so that both go together.
    """
    a, b = rng.permutation(a), rng.permutation(b)
    ends = []
    for half in (0, 1):
        axis = _fisher_axis(a[half::2], b[half::2])
        left, right = a[half::2] @ axis, b[half::2] @ axis
        middle, unit = (left.mean() + right.mean()) / 2, np.sqrt((left.var() + right.var()) / 2)
        other = slice(1 - half, None, 2)
        ends.append([(part[other] @ axis - middle) / (unit + 1e-12) for part in (a, b)])
    return np.concatenate([e[0] for e in ends]), np.concatenate([e[1] for e in ends])


def _fisher_axis(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The axis of equation (4), [d]; the fewer examples per dimension, the rounder W is made."""
    n, d = len(a) + len(b), a.shape[1]
    centred = np.concatenate([a - a.mean(0), b - b.mean(0)]).astype(np.float64)
    within, share = centred.T @ centred / n, min(1.0, d / n)
    mean_variance = max(np.trace(within) / d, 1e-12)
    within = (1 - share) * within + (share + 1e-6) * mean_variance * np.eye(d)
    return np.linalg.solve(within, (b.mean(0) - a.mean(0)).astype(np.float64))


def _valley(ends: tuple[np.ndarray, np.ndarray]) -> float:
    """Equation (5), the density by a Gaussian kernel somewhat wider than Silverman's rule says."""
    left, right = ends
    low, high = np.median(left), np.median(right)
    if low >= high:
        return 1.0
    both = np.concatenate(ends)
    deviation = (left.std() * len(left) + right.std() * len(right)) / len(both)
    width = 1.2 * max(deviation, 1e-9) * len(both) ** -0.2
    at = np.linspace(low, high, _POINTS)
    density = np.exp(-0.5 * ((at[:, None] - both) / width) ** 2).sum(1)
    before, after = np.maximum.accumulate(density), np.maximum.accumulate(density[::-1])[::-1]
    return float((density / np.minimum(before, after)).min())
