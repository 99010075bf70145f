"""Mixture EM and k-means alone, on arrays, beside scikit-learn (and gmmx if it is installed).

Both sides start from the same components and iterate equally often (mixture), or draw their own
k-means++ seeds with as many candidates, restarts and the same rule to stop, other seeds in every
round (k-means). Each size and side has a process of its own, so that its peak is its own:
``working_mib`` is the most memory that the process has had less what it had before the task, with
the data and libraries loaded and the same task done on little data. What that took is
``runtime_mib``, libraries' threads and caches for example. Ours finds its programs compiled, and
``compiling_mib`` is ``working_mib`` of a process that compiles them.
"""

import contextlib
import functools
import os
import sys
import tempfile
from typing import Any
from unittest import mock

from benchmarks.rounds import Options, alternate, compare, say, summarise
from benchmarks.worker import WorkerError, connect

_MIXTURE_SIDES = {
    "ours": ("ours", "mixture", "float32"),
    "sklearn_float32": ("theirs", "mixture", "float32"),
    "sklearn_float64": ("theirs", "mixture", "float64"),
    "gmmx": ("theirs", "gmmx", "float32"),
}
_KMEANS_SIDES = {k: (k.replace("sklearn", "theirs"), "kmeans", "") for k in ("ours", "sklearn")}


def mixture(options: Options, platform: str) -> dict[str, Any]:
    """EM of K diagonal components in d = 32, K = 10 and 100."""
    sizes = [{"n": 70_000, "d": 32, "k": k, "iterations": 20} for k in (10, 100)]
    if options.full or platform != "cpu":
        sizes += [{"n": 1_000_000, "d": 32, "k": k, "iterations": 10} for k in (10, 100)]
    if options.tiny:
        sizes = [{"n": 2_000, "d": 32, "k": 70, "iterations": 3}]
    return _measure(options, sizes, _MIXTURE_SIDES)


def kmeans(options: Options, platform: str) -> dict[str, Any]:
    """k-means++ and Lloyd, 10 clusters: 70,000 x 32, and scikit-learn's digits."""
    every = [{"n": 70_000, "d": 32, "k": 10}, {"data": "digits", "k": 10}]
    counts = (1, 10)
    if options.tiny:
        every, counts = every[1:], (10,)
    sizes = [{**size, "restarts": restarts} for size in every for restarts in counts]
    return _measure(options, sizes, _KMEANS_SIDES)


def _measure(options: Options, sizes: list[Any], sides: dict[str, Any]) -> dict[str, Any]:
    return {
        "&".join(f"{k}={v}" for k, v in size.items()): _of_size(options, size, sides)
        for size in sizes
    }


def _of_size(options: Options, size: dict[str, Any], sides: dict[str, Any]) -> dict[str, Any]:
    say(f"{size}")
    notes: list[str] = []
    before, calls = {}, {}
    with contextlib.ExitStack() as stack:
        programs = stack.enter_context(tempfile.TemporaryDirectory())
        kept = {
            "JAX_COMPILATION_CACHE_DIR": programs,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        stack.enter_context(mock.patch.dict(os.environ, kept))
        with connect("ours", sys.executable, options.device) as call:
            started = call("start", task=sides["ours"][1], size=size | {"dtype": ""})
            compiling = call("run")["peak_mib"] - started["resident_mib"]
        for name, (module, task, dtype) in sides.items():
            call = stack.enter_context(connect(module, sys.executable, options.device))
            try:
                started = call("start", task=task, size=size | {"dtype": dtype})
            except WorkerError as error:
                notes.append(f"{name} does not run here: {error}")
                continue
            before[name], calls[name] = started, functools.partial(call, "run")
        runs = alternate(calls, options.repeats, notes)
    contenders = summarise(runs)
    for name, figures in contenders.items():
        working = figures["process_peak_mib"] - before[name]["resident_mib"]
        figures["working_mib"] = round(working, 1)
        figures["runtime_mib"] = round(before[name]["runtime_mib"], 1)
    contenders["ours"]["compiling_mib"] = round(compiling, 1)
    ratios = compare(runs, [("ours", name) for name in runs if name != "ours"])
    return {"contenders": contenders, "ratios": ratios, "notes": notes}
