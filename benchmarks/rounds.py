"""Contenders in alternating rounds, and what their ratios spread over.

On a shared machine only the ratio of figures taken one right after the other means anything: every
round measures all contenders, beginning with another one each time, and ratios are taken within a
round.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.worker import WorkerError

_PAUSE = 0.3
"""Seconds before each call: threads of the contender before it may turn idly for a while and keep
a core from this one."""

Measured = dict[str, float]
"""One call: ``seconds``, ``cpu_seconds``, ``loss`` and, if known, ``peak_mib``."""

Contenders = Mapping[str, Callable[[], Measured]]
"""By name, what measures one call."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What all parts of the suite are told.

    Attributes:
        device: ``cpu`` or ``auto`` (an accelerator if JAX has one).
        torch_python: interpreter that has PyTorch; None for no PyTorch.
        repeats: rounds.
        full: sizes that take minutes on a CPU; always on an accelerator.
        tiny: sizes that only show that everything runs.
    """

    device: str = "auto"
    torch_python: str | None = sys.executable
    repeats: int = 5
    full: bool = False
    tiny: bool = False


def alternate(contenders: Contenders, repeats: int, notes: list[str]) -> dict[str, list[Measured]]:
    """Let all take turns, each time in another order; the first call of each is the warm-up.

    One that fails in its first call is left out, and ``notes`` gets the reason.
    """
    runs: dict[str, list[Measured]] = {}
    for name, call in contenders.items():
        try:
            runs[name] = [call()]
        except WorkerError as error:
            notes.append(f"{name} does not run here: {error}")
    names = list(runs)
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            time.sleep(_PAUSE)
            runs[name].append(contenders[name]())
        line = ", ".join(f"{n} {1e3 * runs[n][-1]['seconds']:.1f}" for n in names)
        say(f"round {repeat + 1} of {repeats}, ms: {line}")
    return runs


def summarise(runs: Mapping[str, list[Measured]]) -> dict[str, Any]:
    """Times of every contender, what it arrived at, and the most memory it has had."""
    summary = {}
    for name, (first, *rest) in runs.items():
        summary[name] = {
            "seconds": spread([r["seconds"] for r in rest]),
            "cpu_seconds": spread([r["cpu_seconds"] for r in rest]),
            "first_call_seconds": round(first["seconds"], 3),
            "value": rest[-1]["loss"],
        }
        if "peak_mib" in rest[-1]:
            summary[name]["process_peak_mib"] = round(rest[-1]["peak_mib"], 1)
    return summary


def compare(
    runs: Mapping[str, list[Measured]], pairs: Iterable[tuple[str, str]]
) -> dict[str, dict[str, float]]:
    """How many times faster the first of each pair is, round by round."""
    ratios = {}
    for a, b in pairs:
        if a in runs and b in runs:
            both = list(zip(runs[a], runs[b], strict=True))[1:]
            ratios[f"{a}/{b}"] = spread([y["seconds"] / x["seconds"] for x, y in both])
    return ratios


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most, of five digits."""
    summary = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.5g}") for name, value in summary.items()}


def say(line: str) -> None:
    """To standard error."""
    print(line, file=sys.stderr, flush=True)
