"""How time and memory of ours grow: every size doubled twice, the others held.

The exponent is the slope of log time (log memory) over log size: 1 is proportional, 0 no growth.
``temporary_mib`` is what the compiled program needs beside its inputs and outputs, by XLA's count.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import jax_step
from benchmarks.rounds import alternate, summarise
from benchmarks.worker import Settings, samples, timed
from dec_diffusion import gmm

_MIXTURE = {"n": 35_000, "d": 32, "k": 16}
_STEP = Settings("official", 16, 16, 32, 16, 1, 16, "float32", "auto", "default")
_TRIED = {
    "n": (_MIXTURE, (17_500, 35_000, 70_000)),
    "k": (_MIXTURE, (16, 32, 64)),
    "image_size": (_STEP, (16, 32, 64)),
    "channels": (_STEP, (1, 2, 4)),
    "width": (_STEP, (16, 32, 64)),
}
_TINY = {
    "n": (_MIXTURE, (5_000, 10_000)),
    "channels": (dataclasses.replace(_STEP, width=4), (1, 2)),
}


def of_everything(*, tiny: bool, repeats: int) -> dict[str, Any]:
    """Seconds and memory by size, and exponents: EM over n and K, a gradient step over the rest."""
    return {
        f"{'mixture' if base is _MIXTURE else 'step'}/{name}": _over(name, base, sizes, repeats)
        for name, (base, sizes) in (_TINY if tiny else _TRIED).items()
    }


def _over(name: str, base: Any, sizes: tuple[int, ...], repeats: int) -> dict[str, Any]:
    calls, memory = {}, []
    for size in sizes:
        if base is _MIXTURE:
            work, needed = _mixture(base | {name: size})
        else:
            work, needed = _step(dataclasses.replace(base, **{name: size}))
        calls[str(size)] = functools.partial(timed, work)
        memory.append(needed / 2**20)
    times = {k: v["seconds"] for k, v in summarise(alternate(calls, repeats, [])).items()}
    medians = [v["median"] for v in times.values()]
    return {
        "seconds": times,
        "temporary_mib": dict(zip(times, np.round(memory, 2).tolist(), strict=True)),
        "exponent_of_time": _slope(sizes, medians),
        "exponent_of_memory": _slope(sizes, memory),
    }


def _slope(sizes: tuple[int, ...], values: list[float]) -> float:
    logs = np.log(np.maximum(values, 1e-9))
    return round(float(np.polyfit(np.log(sizes), logs, 1)[0]), 2)


def _mixture(size: dict[str, int]) -> tuple[Callable[[], float], int]:
    data, k = jnp.asarray(samples(size)), size["k"]
    spread = jnp.broadcast_to(jnp.var(data, axis=0), data[:k].shape)
    start = gmm.Mixture(jnp.full(k, -jnp.log(k)), data[:k], spread)
    fit = gmm.fit.lower(start, data, iterations=10, tol=0.0).compile()
    work = functools.partial(fit, start, data, tol=0.0)
    return lambda: float(work().log_likelihood[-1]), _needed(fit)


def _step(settings: Settings) -> tuple[Callable[[], float], int]:
    worker = jax_step.Worker()
    worker.start(dataclasses.asdict(settings))
    step = worker.scan(4).lower(worker.state, worker.examples).compile()

    def work() -> float:
        worker.state, loss = step(worker.state, worker.examples)
        return float(loss)

    return work, _needed(step)


def _needed(compiled: Any) -> int:
    return compiled.memory_analysis().temp_size_in_bytes
