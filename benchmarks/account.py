"""What share of the machine's peak the training step and the E-step reach.

Work is counted in the program as written: two operations for every multiplication of a product or a
convolution, and the bytes that those read and write once each; a loop counts as often as it runs,
nothing else counts, and of a condition all branches do. So a share of 1 is out of reach. The peaks
are measured in the same run; the copy is into memory newly allocated.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import jax_step
from benchmarks.images import OFFICIAL
from benchmarks.rounds import alternate, summarise
from benchmarks.worker import samples, timed
from dec_diffusion import engine, gmm


def of_both_steps(*, tiny: bool, repeats: int) -> dict[str, Any]:
    """Operations, bytes, seconds and shares of the peaks, of each part."""
    cpu = jax.default_backend() == "cpu"
    settings = dataclasses.replace(OFFICIAL, num_examples=128 if cpu else 8192)
    mixture = {"n": 70_000, "d": 32, "k": 10}
    if tiny:
        small = {"width": 4, "latent": 4, "image_size": 8, "batch_size": 8, "num_examples": 16}
        settings, mixture = dataclasses.replace(settings, **small), mixture | {"n": 5_000, "k": 30}
    side = 256 if tiny else 4096 if cpu else 16384
    parts = [
        _product("product_float32", side, "float32"),
        _product("product_bfloat16", side if not cpu else side // 4, "bfloat16"),
        _copy("copy", 2**20 if tiny else 2**26 if cpu else 2**30),
        *_training(settings, 1 if cpu else 50),
        _mixture("mixture_iteration", mixture, 10),
    ]
    runs = alternate({p.name: functools.partial(timed, p.work) for p in parts}, repeats, [])
    times = {name: v["seconds"]["median"] for name, v in summarise(runs).items()}
    result: dict[str, Any] = {}
    for part in parts:
        seconds = times[part.name] / part.repeated
        result[part.name] = {
            "gflop": round(part.flop / 1e9, 4),
            "gbyte": round(part.byte / 1e9, 4),
            "seconds": float(f"{seconds:.4g}"),
            "gflop_per_second": float(f"{part.flop / seconds / 1e9:.4g}"),
            "gbyte_per_second": float(f"{part.byte / seconds / 1e9:.4g}"),
        }
    # In bfloat16 a CPU without its instructions is slower than in float32.
    fastest = max(result[f"product_{d}"]["gflop_per_second"] for d in ("float32", "bfloat16"))
    peak = result["product_float32"]["gflop_per_second"] if cpu else fastest
    for name in ("step", "sweep", "mixture_iteration"):
        figures = result[name]
        figures["of_peak_products"] = round(figures["gflop_per_second"] / peak, 4)
        rate = figures["gbyte_per_second"] / result["copy"]["gbyte_per_second"]
        figures["of_copy_bandwidth"] = round(rate, 4)
    return result


@dataclasses.dataclass(frozen=True)
class _Part:
    """What is measured: ``work`` does ``repeated`` times the counted operations and bytes."""

    name: str
    work: Callable[[], float]
    flop: float
    byte: float
    repeated: int = 1


def _product(name: str, side: int, dtype: str) -> _Part:
    a = jnp.ones((side, side), dtype)
    multiply = jax.jit(lambda a: a @ a)
    size = 3 * side**2 * a.dtype.itemsize
    return _Part(name, lambda: _wait(multiply(a)), 2.0 * side**3, size)


def _copy(name: str, elements: int) -> _Part:
    a = jnp.ones(elements)
    shift = jax.jit(lambda a: a + 1)
    return _Part(name, lambda: _wait(shift(a)), 0.0, 8.0 * elements)


def _training(settings: Any, steps: int) -> list[_Part]:
    """A gradient step, and the sweep of the encoder over all examples."""
    worker = jax_step.Worker()
    worker.start(dataclasses.asdict(settings))
    step, n, batch_size = worker.scan(steps), settings.num_examples, settings.batch_size
    rows = engine.sweep_order(batch_size=batch_size, num_examples=n)
    refresh = worker.phase.refresh

    def encode(state: Any, examples: Any) -> Any:
        fetch = engine.fetch_resident(examples)
        return engine.collect(refresh, state.ema_params, state.cluster, rows, fetch, worker.key)

    def train() -> float:
        worker.state, loss = step(worker.state, worker.examples)
        return float(loss)

    sweep = jax.jit(encode)
    arguments = worker.state, worker.examples
    # Calls to a library hide their work: counted is the program without them.
    with _as_if_cached():
        one = worker.scan(1)
        training, encoding = (jax.make_jaxpr(f)(*arguments) for f in (one, jax.jit(encode)))
    jax.clear_caches()
    return [
        _Part("step", train, *count(training.jaxpr), steps),
        _Part("sweep", lambda: _wait(sweep(worker.state, worker.examples)), *count(encoding.jaxpr)),
    ]


def _mixture(name: str, size: dict[str, int], iterations: int) -> _Part:
    data, k = jnp.asarray(samples(size)), size["k"]
    spread = jnp.broadcast_to(jnp.var(data, axis=0), data[:k].shape)
    start = gmm.Mixture(jnp.full(k, -jnp.log(k)), data[:k], spread)
    fit = functools.partial(gmm.fit, start, data, iterations=iterations, tol=0.0)
    # (1) and (2) of ``products``: densities and moments, of values and of squares.
    flop = 2.0 * 2 * 2 * size["n"] * size["d"] * k
    return _Part(name, lambda: float(fit().log_likelihood[-1]), flop, data.nbytes, iterations)


def count(jaxpr: Any) -> tuple[float, float]:
    """Operations and bytes of the products and convolutions of a program."""
    flop = byte = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated"):
            (out,), (left, right) = equation.outvars, equation.invars
            if name == "dot_general":
                (contracted, _), _ = parameters["dimension_numbers"]
                each = math.prod(left.aval.shape[axis] for axis in contracted)
            else:
                kernel = parameters["dimension_numbers"].rhs_spec
                each = right.aval.size // right.aval.shape[kernel[0]]
            flop += 2.0 * out.aval.size * each
            byte += sum(v.aval.size * v.aval.dtype.itemsize for v in (left, right, out))
            continue
        times = parameters.get("length", 1) if name == "scan" else 1
        for more in map(count, _inner(parameters)):
            flop, byte = flop + times * more[0], byte + times * more[1]
    return flop, byte


def _inner(parameters: dict[str, Any]) -> Iterator[Any]:
    """The programs among the parameters of an operation: bodies of loops, branches, calls."""
    for value in parameters.values():
        for part in value if isinstance(value, tuple | list) else [value]:
            program = getattr(part, "jaxpr", part)
            if hasattr(program, "eqns"):
                yield program


@contextlib.contextmanager
def _as_if_cached() -> Iterator[None]:
    """Trace as where compiled programs are kept, which rules out calls to oneDNN."""
    name = "jax_compilation_cache_dir"
    before = getattr(jax.config, name)
    jax.config.update(name, "unused")
    try:
        yield
    finally:
        jax.config.update(name, before)


def _wait(value: Any) -> float:
    jax.block_until_ready(value)
    return 0.0
