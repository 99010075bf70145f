"""Sweep a trained method over a data set and score the result; labels are used for nothing else."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dec_diffusion import features, metrics, parallel
from dec_diffusion.baselines import baselines, gmm_on, kmeans_on
from dec_diffusion.data import Dataset
from dec_diffusion.data.shards import flat
from dec_diffusion.engine import TrainState
from dec_diffusion.method import Method
from dec_diffusion.types import PRNGKeyArray

_BASELINE_ROWS = 100_000
"""Baselines are fitted on at most so many examples; all are assigned and scored."""

_CHUNK = 65_536


class Assignment(NamedTuple):
    """Where every example belongs.

    Attributes:
        labels: int32 [n], the most probable cluster.
        probability: float32 [n], its probability.
        responsibilities: float32 [n, k], rows sum to one.
        embedding: float32 [n, d], the space clustered in.
    """

    labels: np.ndarray
    probability: np.ndarray
    responsibilities: np.ndarray
    embedding: np.ndarray

    @property
    def entropy(self) -> np.ndarray:
        """float32 [n], of the responsibilities, in nats: 0 if sure, log K if all are alike."""
        # Late: SciPy takes longer to import than most runs to start.
        from scipy.special import entr

        out = np.empty(len(self.labels), np.float32)
        for start in range(0, len(out), _CHUNK):
            part = self.responsibilities[start : start + _CHUNK].astype(np.float64)
            out[start : start + _CHUNK] = entr(part).sum(1)
        return out


Assign = Callable[[TrainState], Assignment]


def compile_assign(method: Method, data: parallel.Data, key: PRNGKeyArray) -> Assign:
    """A function from a state to the assignment of every example, by the averaged weights."""
    sweep = parallel.compile_sweep(_both(method.predict, method.embed), data)

    def assign(state: TrainState) -> Assignment:
        log_resp, embedding = sweep(state.ema_params, state.cluster, key)
        labels = log_resp.argmax(1).astype(np.int32)
        # In its place: both are as long as the data.
        resp = log_resp if log_resp.dtype == np.float32 else log_resp.astype(np.float32)
        for start in range(0, len(resp), _CHUNK):
            part = np.exp(log_resp[start : start + _CHUNK].astype(np.float64))
            resp[start : start + _CHUNK] = part / part.sum(1, keepdims=True)
        probability = np.take_along_axis(resp, labels[:, None], 1)[:, 0]
        return Assignment(labels, probability, resp, embedding)

    return assign


@functools.lru_cache(maxsize=8)
def _both(predict: Callable[..., Any], embed: Callable[..., Any]) -> Callable[..., Any]:
    # The same function for the same method: what was compiled for it is used again.
    return lambda *args: (predict(*args), embed(*args))


def score(assignment: Assignment, num_clusters: int, truth: np.ndarray | None) -> dict[str, float]:
    """Label-free scores of an assignment, and ``acc``, ``nmi``, ``ari``... where labels exist."""
    scores = score_labels(assignment.embedding, assignment.labels, num_clusters, truth)
    return scores | {"mean_probability": float(assignment.probability.mean())}


def score_labels(
    x: np.ndarray, labels: np.ndarray, num_clusters: int, truth: np.ndarray | None
) -> dict[str, float]:
    """Label-free scores of labels [n] on features [n, d], and others where labels exist."""
    scores = metrics.internal_scores(x, labels, num_clusters=num_clusters)
    return scores if truth is None else scores | metrics.external_scores(truth, labels)


def compare(
    dataset: Dataset, assignment: Assignment, num_clusters: int, *, seed: int
) -> dict[str, Any]:
    """Shallow baselines on the same data: on the inputs, and on the learned latents.

    None on fewer examples than clusters, which can be assigned to a trained run all the same.
    """
    if dataset.num_examples < num_clusters:
        return {}
    x = flat(dataset.examples)
    scale = None if dataset.is_image else dataset.scale
    truth = dataset.labels
    knobs: dict[str, Any] = {"seed": seed, "limit": _BASELINE_ROWS}
    view = functools.partial(_thumbnails, dataset) if dataset.is_image else None
    found = dict(baselines(x, num_clusters, truth, scale=scale, view=view, **knobs))
    for name, method in (("kmeans_latents", kmeans_on), ("gmm_latents", gmm_on)):
        found[name] = method(assignment.embedding, num_clusters, truth, **knobs)
    return {
        name: {key: value for key, value in result.items() if key != "labels"}
        for name, result in found.items()
    }


def _thumbnails(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """``features.thumbnails`` of images of a data set, given as vectors [m, d]."""
    images = (rows.reshape(-1, *dataset.example_shape) - dataset.offset) / dataset.scale
    return np.asarray(features.thumbnails(jnp.asarray(images, jnp.float32)))
