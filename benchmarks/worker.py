"""Processes that hold one side of a comparison each: lines of JSON in, lines of JSON out.

Neither JAX nor PyTorch is imported here, for either may be missing where the other one is.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS = 400
"""T of the linear noise schedule."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        network: ``official`` (the paper's) or ``unet`` (ours).
        batch_size: of a gradient step.
        width: channels of the first level.
        latent: dimensions of z.
        image_size: height and width.
        channels: of the images.
        num_examples: resident on the device.
        dtype: of activations, ``float32`` or ``bfloat16``. On a GPU float32 means TF32 matrix
            products on both sides.
        device: ``cpu`` or ``auto`` (an accelerator if JAX has one).
        compile_mode: ``mode`` of ``torch.compile``.
    """

    network: Literal["official", "unet"]
    batch_size: int
    width: int
    latent: int
    image_size: int
    channels: int
    num_examples: int
    dtype: Literal["float32", "bfloat16"]
    device: Literal["auto", "cpu"]
    compile_mode: str


class WorkerError(RuntimeError):
    """A worker could not do what it was asked."""


@contextlib.contextmanager
def connect(module: str, python: str, device: str) -> Iterator[Callable[..., Any]]:
    """Start a process for the ``Worker`` of a module of this package.

    Yields:
        ``call(method, **kwargs)``, which calls a method of the ``Worker`` over there. It raises
        WorkerError with one line if that fails or the process ends.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # Two frameworks share the accelerator, so neither may take most of its memory.
    env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")
    if device == "cpu":
        env["JAX_PLATFORMS"] = "cpu"
    command = [python, "-c", f"from benchmarks import worker; worker.serve({module!r})"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, cwd=ROOT, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        to, back = process.stdin, process.stdout

        def call(method: str, **kwargs: Any) -> Any:
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps([method, kwargs]), file=to, flush=True)
            line = back.readline()
            if not line:
                raise WorkerError(f"the process of {module} ended with status {process.wait()}")
            answer = json.loads(line)
            if "error" in answer:
                raise WorkerError(answer["error"])
            return answer["result"]

        try:
            yield call
        finally:
            # The end of its input ends the worker.
            with contextlib.suppress(BrokenPipeError):
                to.close()


def serve(module: str) -> None:
    """Answer calls on standard input until it ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    # Whatever a library prints must not get between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = None
    for line in sys.stdin:
        method, kwargs = json.loads(line)
        try:
            # Imported only now, so that a framework that is missing is an answer too.
            if worker is None:
                worker = importlib.import_module(f"benchmarks.{module}").Worker()
            answer = {"result": getattr(worker, method)(**kwargs)}
        except WorkerError as error:
            answer = {"error": str(error)}
        except Exception as error:
            traceback.print_exc()
            reason = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {reason[0]}"}
        print(json.dumps(answer), file=answers, flush=True)


def timed(work: Callable[[], float]) -> dict[str, float]:
    """Wall and CPU time of ``work``, which must not return before the device is done."""
    cpu, wall = time.process_time(), time.perf_counter()
    loss = work()
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "loss": float(f"{loss:.6g}"),
    }


def images(settings: Settings) -> np.ndarray:
    """Noise as uint8 [n, h, w, c]; without flat areas, where max pooling has no unique gradient."""
    size = settings.image_size
    shape = (settings.num_examples, size, size, settings.channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def usable_cpus() -> int:
    """How many this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def samples(size: dict[str, Any]) -> np.ndarray:
    """float32 [n, d]: n, d and k of ``size`` are of overlapping clusters; or scikit-learn's digits.

    The first k rows belong to one cluster each.
    """
    if size.get("data") == "digits":
        from sklearn.datasets import load_digits

        return np.asarray(load_digits(return_X_y=True)[0], np.float32)
    n, d, k = size["n"], size["d"], size["k"]
    random = np.random.default_rng(0)
    centers, widths = 2 * random.normal(size=(k, d)), random.uniform(0.5, 2, (k, d))
    label = np.concatenate([np.arange(k), random.integers(k, size=n - k)])
    x = random.standard_normal((n, d), dtype=np.float32)
    # In parts, lest making the data take more memory than what is measured.
    for rows in np.array_split(np.arange(n), -(-n // 10_000)):
        x[rows] = x[rows] * widths[label[rows]] + centers[label[rows]]
    return x


def little(size: dict[str, Any]) -> dict[str, Any]:
    """The same with 20 examples for each cluster, if n is free."""
    return size | {"n": 20 * size["k"]} if "n" in size else size


def resident_mib() -> float:
    """The memory that this process has now; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        return pages * resource.getpagesize() / 2**20
    return 0.0


def peak_host_mib() -> float:
    """The most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
