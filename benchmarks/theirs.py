"""scikit-learn's and gmmx's side of the comparisons; this package is not imported."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from benchmarks.worker import WorkerError, little, peak_host_mib, resident_mib, samples, timed

warnings.simplefilter("ignore", ConvergenceWarning)


class Worker:
    """What the process of ``theirs`` answers to."""

    def start(self, task: str, size: dict[str, Any]) -> dict[str, float]:
        """Make data, and say how much memory the process has before the task.

        That is after the same task on little data, which starts what the libraries start but once;
        ``runtime_mib`` is what that took.
        """
        make = {"mixture": _mixture, "kmeans": _kmeans, "gmmx": _gmmx}[task]
        x, loaded = samples(size), resident_mib()
        make(samples(little(size)), size)()
        before = resident_mib()
        self.work = make(x, size)
        return {"resident_mib": before, "runtime_mib": before - loaded}

    def run(self) -> dict[str, float]:
        """The task once."""
        return timed(self.work) | {"peak_mib": peak_host_mib()}


def _mixture(x: np.ndarray, size: dict[str, Any]) -> Callable[[], float]:
    k = size["k"]
    x = x.astype(size.get("dtype", "float32"))
    model = GaussianMixture(
        k,
        covariance_type="diag",
        max_iter=size["iterations"],
        tol=0.0,
        weights_init=np.full(k, 1 / k, x.dtype),
        means_init=x[:k],
        precisions_init=np.tile(1 / x.var(0), (k, 1)),
    )
    return lambda: float(np.asarray(model.fit(x).lower_bound_))


def _kmeans(x: np.ndarray, size: dict[str, Any]) -> Callable[[], float]:
    seeds = iter(range(10**6))

    def work() -> float:
        model = KMeans(size["k"], n_init=size["restarts"], random_state=next(seeds))
        return float(model.fit(x).inertia_)

    return work


def _gmmx(x: np.ndarray, size: dict[str, Any]) -> Callable[[], float]:
    try:
        from gmmx import EMFitter, GaussianMixtureModelJax  # pyright: ignore
    except ImportError as error:
        raise WorkerError(f"gmmx cannot be imported ({error}); pip install gmmx") from error
    k = size["k"]
    start = GaussianMixtureModelJax.from_squeezed(
        means=x[:k],
        covariances=np.tile(x.var(0), (k, 1)),
        weights=np.full(k, 1 / k, x.dtype),
        covariance_type="diag",
    )
    fitter = EMFitter(tol=0.0, max_iter=size["iterations"])
    return lambda: float(fitter.fit(x=x, gmm=start).log_likelihood)
