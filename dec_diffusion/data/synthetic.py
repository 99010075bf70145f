"""Two-dimensional sets with known groups, drawn anew from a seed: for trials without any file.

Every set is a mixture of round Gaussians sum_k w_k N(c_k, s^2 I):

``gmm4``   four of equal weight on the corners of a square
``gmm10``  ten of equal weight on a ring
``imb3``   three of weights 0.7, 0.2 and 0.1 on a triangle, which methods that expect equal
           groups get wrong
"""

from typing import NamedTuple

import numpy as np

from dec_diffusion.data.config import DataConfig
from dec_diffusion.data.dataset import Dataset, from_arrays
from dec_diffusion.types import InputError

SIZE = 1000


class Blobs(NamedTuple):
    """A mixture of round Gaussians.

    Attributes:
      weights: [k], summing to one.
      centres: [k, d].
      deviation: s, the standard deviation in every direction.
    """

    weights: np.ndarray
    centres: np.ndarray
    deviation: float


def _ring(k: int, radius: float, turn: float = 0.0) -> np.ndarray:
    angle = 2 * np.pi * (np.arange(k) + turn) / k
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


SETS = {
    "gmm4": Blobs(np.full(4, 0.25), _ring(4, 3 * np.sqrt(2), 0.5), 0.8),
    "gmm10": Blobs(np.full(10, 0.1), _ring(10, 10.0), 0.7),
    "imb3": Blobs(np.array([0.7, 0.2, 0.1]), _ring(3, 4.0), 0.8),
}
"""By name; neighbouring centres are at least 6 standard deviations apart."""


def draw_blobs(name: str, *, n: int = SIZE, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Examples float32 [n, 2] of one of the ``SETS``, and the Gaussian int64 [n] of each.

    Weights are exact up to rounding: as many examples of each Gaussian as it weighs.
    """
    weights, centres, deviation = SETS[name]
    rng = np.random.default_rng(seed)
    bounds = np.round(np.cumsum(weights) * n).astype(int)
    labels = rng.permutation(np.searchsorted(bounds, np.arange(n), side="right"))
    noise = deviation * rng.standard_normal((n, centres.shape[1]))
    return (centres[labels] + noise).astype(np.float32), labels.astype(np.int64)


def log_posterior(name: str, x: np.ndarray) -> np.ndarray:
    """log p(k | x) [n, k] of examples [n, d] under the mixture they were drawn from."""
    weights, centres, deviation = SETS[name]
    distance = np.square(x[:, None].astype(np.float64) - centres).sum(-1)
    log_joint = np.log(weights) - 0.5 * distance / deviation**2
    return log_joint - np.logaddexp.reduce(log_joint, axis=1, keepdims=True)


def read_blobs(config: DataConfig) -> Dataset:
    """The set ``config.blobs`` (unset: ``gmm4``); ``train`` is its first 80%, ``test`` the rest.

    Raises:
      InputError: there is no such set.
    """
    name = config.blobs or "gmm4"
    if name not in SETS:
        raise InputError(
            f"--config.data.blobs={name}: no such set; choose one of {', '.join(SETS)}"
        )
    x, labels = draw_blobs(name)
    cut = SIZE * 4 // 5
    part = {"train": slice(cut), "test": slice(cut, None), "all": slice(None)}[config.split]
    return from_arrays(
        x[part],
        labels[part],
        name=name,
        source=f"--config.data.blobs={name}",
        limit=config.limit,
    )
