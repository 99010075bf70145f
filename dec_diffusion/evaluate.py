"""Sweep a trained method over a data set and score the result; labels are used for nothing else."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.special import entr

from dec_diffusion import metrics, parallel
from dec_diffusion.baselines import baselines, kmeans_on
from dec_diffusion.data import Dataset
from dec_diffusion.data.dataset import choose_rows
from dec_diffusion.engine import TrainState
from dec_diffusion.method import Method
from dec_diffusion.types import PRNGKeyArray

_BASELINE_ROWS = 100_000
"""Baselines are fitted on at most so many examples; all are assigned and scored."""

EMBEDDED = 100_000
"""Of how many examples a run of the command line keeps the embedding, so that memory is bounded."""

_CHUNK = 65_536


class Assignment(NamedTuple):
    """Where every example belongs.

    Attributes:
        labels: int32 [n], the most probable cluster.
        probability: float32 [n], its probability.
        responsibilities: float32 [n, k], rows sum to one.
        embedding: float32 [m, d], the space clustered in.
        embedded: int64 [m], increasing, the examples that the embedding is of; None for all.
    """

    labels: np.ndarray
    probability: np.ndarray
    responsibilities: np.ndarray
    embedding: np.ndarray
    embedded: np.ndarray | None = None

    def of_embedded(self, values: np.ndarray) -> np.ndarray:
        """Of values [n, ...] those that belong to the embedding, [m, ...]."""
        return values if self.embedded is None else values[self.embedded]

    @property
    def entropy(self) -> np.ndarray:
        """float32 [n], of the responsibilities, in nats: 0 if sure, log K if all are alike."""
        return entr(self.responsibilities.astype(np.float64)).sum(1).astype(np.float32)


Assign = Callable[[TrainState], Assignment]


def compile_assign(
    method: Method, data: parallel.Data, key: PRNGKeyArray, *, embedded: int | None = None
) -> Assign:
    """A function from a state to the assignment of every example, by the averaged weights.

    Args:
        method: whose ``predict`` and ``embed`` are swept over the data.
        data: the examples.
        key: for methods that draw.
        embedded: of how many examples, drawn once, the embedding is kept; None for all.
    """
    num_examples = len(data.raw)
    if embedded is None or num_examples <= embedded:
        kept, both = None, parallel.compile_sweep(_both(method.predict, method.embed), data)
    else:
        kept = choose_rows(num_examples, embedded)
        size = data.rows.shape[1]
        order = np.full((-(-embedded // size), size), -1, data.rows.dtype)
        order.flat[:embedded] = kept
        predict = parallel.compile_sweep(method.predict, data)
        embed = parallel.compile_sweep(method.embed, data._replace(rows=order))

        def both(*args: Any) -> tuple[np.ndarray, np.ndarray]:
            return predict(*args), embed(*args)[:embedded]

    def assign(state: TrainState) -> Assignment:
        log_resp, embedding = both(state.ema_params, state.cluster, key)
        labels = log_resp.argmax(1).astype(np.int32)
        resp = np.empty(log_resp.shape, np.float32)
        for start in range(0, num_examples, _CHUNK):
            part = np.exp(log_resp[start : start + _CHUNK].astype(np.float64))
            resp[start : start + _CHUNK] = part / part.sum(1, keepdims=True)
        probability = np.take_along_axis(resp, labels[:, None], 1)[:, 0]
        return Assignment(labels, probability, resp, embedding, kept)

    return assign


@functools.lru_cache(maxsize=8)
def _both(predict: Callable[..., Any], embed: Callable[..., Any]) -> Callable[..., Any]:
    # The same function for the same method: what was compiled for it is used again.
    return lambda *args: (predict(*args), embed(*args))


def score(assignment: Assignment, num_clusters: int, truth: np.ndarray | None) -> dict[str, float]:
    """Label-free scores of an assignment, and ``acc``, ``nmi``, ``ari``... where labels exist."""
    scores = score_labels(assignment, assignment.labels, num_clusters, truth)
    return scores | {"mean_probability": float(assignment.probability.mean())}


def score_labels(
    assignment: Assignment, labels: np.ndarray, num_clusters: int, truth: np.ndarray | None
) -> dict[str, float]:
    """Label-free scores of labels [n] in the embedding, and others where labels exist."""
    embedded = assignment.of_embedded(labels)
    scores = metrics.internal_scores(assignment.embedding, embedded, num_clusters=num_clusters)
    scores |= metrics.occupancy(labels, num_clusters=num_clusters)
    return scores if truth is None else scores | metrics.external_scores(truth, labels)


def compare(
    dataset: Dataset, assignment: Assignment, num_clusters: int, *, seed: int
) -> dict[str, Any]:
    """Shallow baselines on the same data: on the inputs, and k-means on the learned latents."""
    flat = dataset.examples.reshape(dataset.num_examples, -1)
    scale = None if dataset.is_image else dataset.scale
    truth = dataset.labels
    found = dict(baselines(flat, num_clusters, truth, seed=seed, limit=_BASELINE_ROWS, scale=scale))
    found["kmeans_latents"] = kmeans_on(
        assignment.embedding,
        num_clusters,
        None if truth is None else assignment.of_embedded(truth),
        seed=seed,
        limit=_BASELINE_ROWS,
    )
    return {
        name: {key: value for key, value in result.items() if key != "labels"}
        for name, result in found.items()
    }
