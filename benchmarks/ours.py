"""This package's side of the comparisons with scikit-learn, and what is measured of it alone."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import account, growth, search
from benchmarks.worker import little, peak_host_mib, resident_mib, samples, timed
from dec_diffusion import gmm, kmeans


class Worker:
    """What the process of ``ours`` answers to."""

    def where(self) -> dict[str, Any]:
        """The device that JAX uses."""
        device = jax.devices()[0]
        version = {"jax": jax.__version__}
        return {"platform": device.platform, "device": device.device_kind, **version}

    def start(self, task: str, size: dict[str, Any]) -> dict[str, float]:
        """Make data, and say how much memory the process has before the task.

        That is after the same task on little data, which starts what the libraries start but once;
        ``runtime_mib`` is what that took.
        """
        make = {"mixture": _mixture, "kmeans": _kmeans}[task]
        x, loaded = samples(size), resident_mib()
        make(samples(little(size)), size)()
        before = resident_mib()
        self.work = make(x, size)
        return {"resident_mib": before, "runtime_mib": before - loaded}

    def run(self) -> dict[str, float]:
        """The task once."""
        return timed(self.work) | {"peak_mib": peak_host_mib()}

    def search(self, sizes: dict[str, int]) -> dict[str, Any]:
        """DiEC's search, see ``search``."""
        return search.measure(**sizes)

    def growth(self, tiny: bool, repeats: int) -> dict[str, Any]:
        """See ``growth``."""
        return growth.of_everything(tiny=tiny, repeats=repeats)

    def account(self, tiny: bool, repeats: int) -> dict[str, Any]:
        """See ``account``."""
        return account.of_both_steps(tiny=tiny, repeats=repeats)


def _mixture(x: np.ndarray, size: dict[str, Any]) -> Callable[[], float]:
    k = size["k"]
    data = jnp.asarray(x)
    start = gmm.Mixture(
        jnp.full(k, -jnp.log(k)), data[:k], jnp.broadcast_to(jnp.var(data, axis=0), data[:k].shape)
    )
    # Never stopped by a tolerance, nor is scikit-learn, so that both iterate as often.
    fit = functools.partial(gmm.fit, start, data, iterations=size["iterations"], tol=0.0)
    return lambda: float(fit().log_likelihood[-1])


def _kmeans(x: np.ndarray, size: dict[str, Any]) -> Callable[[], float]:
    data, keys = jnp.asarray(x), iter(range(10**6))

    def work() -> float:
        key = jax.random.key(next(keys))
        return float(kmeans.kmeans(key, data, size["k"], restarts=size["restarts"]).inertia)

    return work
