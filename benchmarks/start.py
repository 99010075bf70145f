"""Start-up: importing the package, and the first gradient step of a run, cold and again.

``import``: new processes in turn, one importing JAX and one the package too, and everything that
training from the library imports.

``first_step``: seconds from the command to its first record in ``metrics.jsonl``, with one gradient
step an iteration, for a config that is new to the machine (an empty folder of compiled programs)
and again in another workdir. Both are then stopped.

Python's bytecode is there in all of them, as an installation leaves it.
"""

import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.rounds import Measured, Options, alternate, summarise
from benchmarks.worker import ROOT

_IMPORTS = {
    "jax": "import jax",
    "package": "import jax, dec_diffusion",
    "to_train": "import jax, dec_diffusion.train",
    "estimators": "import jax, dec_diffusion.estimator",
}
_CONFIGS = ("clusterddpm", "diec", "neural_mixture")


def imports(options: Options, platform: str) -> dict[str, Any]:
    """Seconds of a process that imports and ends, and how much more than JAX each takes."""
    with tempfile.TemporaryDirectory() as folder:
        env = _with_bytecode(folder)
        calls = {name: functools.partial(_seconds, code, env) for name, code in _IMPORTS.items()}
        if options.tiny:
            calls.pop("estimators")
        runs = alternate(calls, options.repeats, [])
    beyond = {}
    for name in set(runs) - {"jax"}:
        pairs = zip(runs[name][1:], runs["jax"][1:], strict=True)
        beyond[name] = round(statistics.median(a["seconds"] - b["seconds"] for a, b in pairs), 3)
    return {"contenders": summarise(runs), "beyond_jax_seconds": beyond}


def first_step(options: Options, platform: str) -> dict[str, Any]:
    """Seconds to the first step, first and second start, of the configs for the digits."""
    results = {}
    for name in _CONFIGS[-1:] if options.tiny else _CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            start = functools.partial(_to_first_step, name, folder, options.device)
            if not options.tiny:
                start("warm-up", "other programs")  # leaves bytecode and files in memory
            first, *later = (start(f"run{number}", "programs") for number in range(3))
        second = statistics.median(later)
        results[name] = {
            "first": round(first, 2),
            "second": [round(seconds, 2) for seconds in later],
            "ratio": round(first / second, 2),
        }
    return results


def _with_bytecode(folder: str) -> dict[str, str]:
    """An environment in which imports keep and find their bytecode in ``folder``."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return env | {"PYTHONPYCACHEPREFIX": folder}


def _seconds(code: str, env: dict[str, str]) -> Measured:
    before, cpu = time.perf_counter(), _children()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=env)
    return {"seconds": time.perf_counter() - before, "cpu_seconds": _children() - cpu, "loss": 0.0}


def _children() -> float:
    spent = os.times()
    return spent.children_user + spent.children_system


def _to_first_step(name: str, folder: str, device: str, run: str, cache: str) -> float:
    workdir, programs = Path(folder, run), Path(folder, cache)
    # The cache of the command line, in a place of its own.
    env = _with_bytecode(folder)
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    env |= {"XDG_CACHE_HOME": str(programs)} | ({"JAX_PLATFORMS": "cpu"} if device == "cpu" else {})
    command = [
        *(sys.executable, "-m", "dec_diffusion.main", f"--config=configs/{name}.py:digits"),
        *(f"--workdir={workdir}", "--config.method.steps=1"),
    ]
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL) as process:
        record = workdir / "metrics.jsonl"
        while not (record.exists() and record.stat().st_size):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        process.kill()
    return seconds
