"""K groups of a neighbour graph: communities of high modularity.

Notation: s_ij the weight of neighbour j of example i, sum_j s_ij = 1; h_ic = 1 where i is in group
c, else 0; <.> the weighted mean over examples.

(1) votes       v_ic = sum_j s_ij h_jc, the share of i's neighbours that are in c
(2) links       E_ab = <h_ia v_ib>, symmetrised; e_a = sum_b E_ab
(3) modularity  Q = sum_c E_cc - e_c^2: how much oftener neighbours share a group than by chance
(4) merging     two groups become one: Q changes by 2 (E_ab - e_a e_b)
(5) moving      i goes to argmax_c v_ic - <v_c>, where Q rises most as far as i's own neighbours go

k-means cuts the data into many small groups, each too small to hold two of the groups that are
looked for; (4) merges the pair that gains most until K are left, and (5) mends their borders. With
many examples the small groups are large, and (5) mends their borders too before they are merged.
Unlike centres, neighbours follow the curved groups of many dimensions. Where dimensions are few a
long group may be cut, for a cut there is short, and groups may differ in size, but not
several-fold: chance in (3) draws the smallest together and cuts up one that holds most of the data.

Sources: (3) Newman and Girvan 2004, for directed graphs Leicht and Newman 2008; (4) Clauset,
Newman and Moore 2004; (5) is the move of Blondel et al. 2008, here of many examples at a time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dec_diffusion import kmeans, spread, targets
from dec_diffusion.types import Array, Float, Int, PRNGKeyArray, pytree

_PIECES = 60  # small groups for each group that is looked for
_MOST_PIECES = 1000
_SMALLEST = 5  # examples in a small group, in the mean
_COARSE = 50  # the same, from which on their borders are mended
_MENDS = 20  # rounds of (5) for that
_MOVES = 50  # and for the groups that are looked for
_STAY = 1e-3  # votes by which an example prefers the group that it is in


@pytree
class Communities:
    """Groups of a graph.

    Attributes:
        labels: int32 [n].
        modularity: equation (3), from -1/2 to 1 - 1 / K; -1 if a group is empty.
    """

    labels: Int[Array, " n"]
    modularity: Float[Array, ""]


@pytree
class Graph:
    """Weighted neighbours of every example.

    Attributes:
        anchors: int32 [a], the examples among which neighbours are, by their row numbers.
        neighbours: int32 [n, g], as places among the anchors.
        similarity: s, [n, g]; every row sums to 1.
        weight: of each example, 0 for padding.
    """

    anchors: Int[Array, " a"]
    neighbours: Int[Array, "n g"]
    similarity: Float[Array, "n g"]
    weight: Float[Array, " n"]


def some(n: int, most: int) -> np.ndarray:
    """The numbers of all of ``n`` examples or, of more, of ``most`` drawn once; int [a], rising."""
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(1).permutation(n)[:most])


def partition(
    key: PRNGKeyArray,
    x: Float[Array, "n d"],
    k: int,
    *,
    weight: Float[Array, " n"],
    anchors: Int[Array, " a"],
    neighbours: int = 20,
    restarts: int = 20,
) -> Communities:
    """The partition of highest modularity among ``restarts`` of merging and moving.

    Args:
        key: of the small groups and of the order of moves.
        x: examples; those near each other should belong together.
        k: number of groups.
        weight: of each example, 0 for padding.
        anchors: numbers of the examples, of weight above 0, among which neighbours are looked for.
        neighbours: of each example in the graph, equation (7) of ``targets``; of fewer than five
            times as many examples, a fifth.
        restarts: how often to begin anew.

    Raises:
        InputError: ``k`` is below 1, or there are fewer examples or anchors than it takes.
    """
    kmeans.check_clusters(k, x.shape[0])
    near = max(1, min(neighbours, anchors.shape[0] // 5))
    points = spread.Table(x, x.shape[0]).take(anchors)
    places, similarity = targets.neighbour_graph(x, near, weight=weight, among=(points, anchors))
    graph = Graph(anchors, places, similarity, weight)
    pieces = max(k, min(_PIECES * k, _MOST_PIECES, anchors.shape[0] // _SMALLEST))
    return _best(key, x, graph, k, pieces, restarts)


@functools.partial(jax.jit, static_argnames=("k", "pieces", "restarts"))
def _best(
    key: PRNGKeyArray, x: Array, graph: Graph, k: int, pieces: int, restarts: int
) -> Communities:
    def run(key: PRNGKeyArray) -> Communities:
        cut_key, move_key = jax.random.split(key)
        small = kmeans.kmeans(
            cut_key, x, pieces, weight=graph.weight, restarts=1, max_iterations=20
        )
        labels = small.labels
        if graph.anchors.shape[0] > _COARSE * pieces:
            labels = mend(jax.random.fold_in(move_key, 1), graph, labels, pieces)
        groups = merge(links(graph, labels, pieces), k)
        return move(move_key, graph, groups[labels], k)

    found = jax.lax.map(run, jax.random.split(key, restarts))
    return jax.tree.map(lambda leaf: leaf[found.modularity.argmax()], found)


def votes(graph: Graph, labels: Int[Array, " n"], k: int) -> Float[Array, "n k"]:
    """Equation (1)."""

    def of_part(near: Array, similarity: Array, theirs: Array) -> Array:
        inside = theirs[near][..., None] == jnp.arange(k)
        return jnp.sum(jnp.where(inside, similarity[..., None], 0.0), axis=1)

    theirs = _of_anchors(graph, labels)
    return spread.over_rows(of_part, graph.neighbours, graph.similarity, whole=(theirs,))


def links(graph: Graph, labels: Int[Array, " n"], k: int) -> Float[Array, "k k"]:
    """Equation (2)."""

    def of_part(near: Array, similarity: Array, weight: Array, own: Array, theirs: Array) -> Array:
        pair = own[:, None] * k + theirs[near]
        return jnp.zeros(k * k).at[pair].add(similarity * weight[:, None])[None]

    rows = graph.neighbours, graph.similarity, graph.weight, labels
    sums = spread.over_rows(of_part, *rows, whole=(_of_anchors(graph, labels),)).sum(0)
    return _shares(sums.reshape(k, k))


def _shares(sums: Float[Array, "k k"]) -> Float[Array, "k k"]:
    table = sums / jnp.maximum(sums.sum(), 1e-30)
    return 0.5 * (table + table.T)


def _of_anchors(graph: Graph, labels: Int[Array, " n"]) -> Int[Array, " a"]:
    """All of the labels that have to travel."""
    return spread.Table(labels, labels.shape[0]).take(graph.anchors)


def modularity(links: Float[Array, "k k"]) -> Float[Array, ""]:
    """Equation (3)."""
    return jnp.trace(links) - jnp.sum(jnp.square(links.sum(1)))


def merge(links: Float[Array, "m m"], k: int) -> Int[Array, " m"]:
    """Merge m groups to k by equation (4), those without members before all others.

    Returns:
        For each of them the number, below k, of the group that it is in.
    """
    m = links.shape[0]
    place = jnp.arange(m)

    def step(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        links, group = carry
        total = links.sum(1)
        there = group == place  # a group has the number of its first member
        pairs = there[:, None] & there & (place[:, None] < place)
        empty = (total == 0)[:, None] | (total == 0)
        gain = jnp.where(empty, jnp.inf, links - total[:, None] * total)
        gain = jnp.where(pairs, gain, -jnp.inf)
        # Row by row: on a CPU the place of the largest takes eight times as long as its value.
        a = gain.max(1).argmax()
        b = gain[a].argmax()
        links = links.at[a].add(links[b]).at[b].set(0.0)
        links = links.at[:, a].add(links[:, b]).at[:, b].set(0.0)
        return links, jnp.where(group == b, a, group)

    _, group = jax.lax.fori_loop(0, m - k, step, (links, place))
    return (jnp.cumsum(group == place) - 1)[group].astype(jnp.int32)


def mend(key: PRNGKeyArray, graph: Graph, labels: Int[Array, " n"], k: int) -> Int[Array, " n"]:
    """Rounds of equation (5) among many groups: an example goes to one of its neighbours'.

    Half of the examples may move in a round, as in ``move``. Groups may end without members.
    """

    def usual(near: Array, similarity: Array, weight: Array, theirs: Array) -> Array:
        return jnp.zeros(k).at[theirs[near]].add(similarity * weight[:, None])[None]

    def step(labels: Array, key: PRNGKeyArray) -> tuple[Array, None]:
        theirs = _of_anchors(graph, labels)
        rows = graph.neighbours, graph.similarity
        chance = spread.over_rows(usual, *rows, graph.weight, whole=(theirs,)).sum(0)
        chance /= jnp.maximum(graph.weight.sum(), 1e-30)
        free = jax.random.bernoulli(key, 0.5, labels.shape)
        return spread.over_rows(_nearest_group, *rows, labels, free, whole=(theirs, chance)), None

    return jax.lax.scan(step, labels.astype(jnp.int32), jax.random.split(key, _MENDS))[0]


def _nearest_group(
    near: Array, similarity: Array, own: Array, free: Array, theirs: Array, chance: Array
) -> Array:
    """Where equation (5) sends examples that are free to move, of their neighbours' groups."""

    def votes_for(groups: Array) -> Array:
        inside = around[:, None, :] == groups[:, :, None]
        return jnp.sum(jnp.where(inside, similarity[:, None, :], 0.0), axis=2)

    around = theirs[near]
    gain = votes_for(around) - chance[around]
    stay = votes_for(own[:, None])[:, 0] - chance[own] + _STAY
    best = jnp.take_along_axis(around, gain.argmax(1)[:, None], 1)[:, 0]
    return jnp.where(free & (gain.max(1) > stay), best, own)


def move(key: PRNGKeyArray, graph: Graph, labels: Int[Array, " n"], k: int) -> Communities:
    """Rounds of equation (5); the labels of highest modularity on the way.

    Half of the examples, drawn at random, may move in a round: two neighbours that both would
    join each other's group would otherwise swap for ever.
    """
    total = jnp.maximum(graph.weight.sum(), 1e-30)

    def look(labels: Array) -> tuple[Array, Array]:
        """Votes and modularity, with (2) taken from the votes at hand."""
        vote = votes(graph, labels, k)
        member = jax.nn.one_hot(labels, k) * graph.weight[:, None]
        table = _shares(jnp.matmul(member.T, vote, precision="highest"))
        return vote, jnp.where(table.sum(1).min() > 0, modularity(table), -1.0)

    def step(carry: tuple[Array, Array, Communities], key: PRNGKeyArray) -> Any:
        labels, vote, best = carry
        usual = graph.weight @ vote / total
        stay = jnp.where(labels[:, None] == jnp.arange(k), _STAY, 0.0)
        free = jax.random.bernoulli(key, 0.5, labels.shape)
        labels = jnp.where(free, (vote - usual + stay).argmax(1), labels).astype(jnp.int32)
        vote, value = look(labels)
        better = value > best.modularity
        best = jax.tree.map(
            lambda new, old: jnp.where(better, new, old), Communities(labels, value), best
        )
        return (labels, vote, best), None

    labels = labels.astype(jnp.int32)
    vote, value = look(labels)
    start = (labels, vote, Communities(labels, value))
    return jax.lax.scan(step, start, jax.random.split(key, _MOVES))[0][2]
