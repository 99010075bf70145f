"""The suite: every comparison in one command, as JSON.

    python -m benchmarks [--only=mixture,kmeans,...] [--output=FILE] [--torch-python=PYTHON]

Parts, in the order in which they run:

    step        a gradient step of the official network, beside PyTorch (benchmarks.throughput)
    iteration   a whole EM iteration, beside a DataLoader, PyTorch and scikit-learn's mixture
    mixture     EM of a Gaussian mixture, beside scikit-learn and gmmx
    kmeans      k-means, beside scikit-learn
    sampling    DDPM-400 and DDIM-50, beside PyTorch
    search      DiEC's search, beside a loop over cells (benchmarks.search)
    growth      exponents of time and memory over n, K, image size, channels and width
    account     operations and bytes, and the share of the machine's peaks
    imports     importing the package
    first_step  first and second start of the three configs

Contenders take turns, and ratios say how many times faster the first is. What is not installed is
left out, with the reason in ``notes``; a part that cannot run has ``skipped``. Sizes follow the
device: on a CPU only what takes minutes, with ``--full`` everything.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import arrays, images, start, throughput
from benchmarks.rounds import Options, say
from benchmarks.worker import WorkerError, connect


def main(argv: list[str] | None = None) -> int:
    """Run the parts and return the exit status."""
    options, names, output = _parse(argv)
    with connect("ours", sys.executable, options.device) as ours:
        where = ours("where")
    result: dict[str, Any] = {
        "machine": throughput.describe_host() | where,
        "options": dataclasses.asdict(options),
        "load_average_before": round(os.getloadavg()[0], 2),
        "parts": {},
    }
    for name in names:
        say(f"== {name}")
        started = time.perf_counter()
        try:
            part = PARTS[name](options, where["platform"])
        except WorkerError as error:
            part = {"skipped": str(error)}
        part["seconds_in_all"] = round(time.perf_counter() - started, 1)
        result["parts"][name] = part
        if output:
            # After every part, so that what was measured survives whatever comes next.
            text = json.dumps(throughput.json_safe(result), indent=2, allow_nan=False)
            output.write_text(text + "\n", encoding="utf-8")
    print(json.dumps(throughput.json_safe(result), indent=2, allow_nan=False))
    return 0


def _step(options: Options, platform: str) -> dict[str, Any]:
    settings = dataclasses.replace(images.OFFICIAL, device=options.device)
    if options.tiny:
        small = {"width": 4, "latent": 4, "image_size": 8, "batch_size": 4, "num_examples": 16}
        settings = dataclasses.replace(settings, **small)
    elif platform == "cpu":
        settings = dataclasses.replace(settings, num_examples=1024)
    return throughput.measure(
        settings,
        steps=1 if platform == "cpu" else 0,
        repeats=options.repeats,
        torch_python=options.torch_python,
        compiled=not options.tiny,
    )


def _search(options: Options, platform: str) -> dict[str, Any]:
    sizes = {"timesteps": 4, "repeats": options.repeats}
    if options.full or platform != "cpu":
        sizes = {"timesteps": 27, "blocks": 2, "repeats": options.repeats}
    if options.tiny:
        sizes = {"examples": 64, "timesteps": 2, "width": 4, "loop_timesteps": 1, "repeats": 1}
    return _alone("search", options, sizes=sizes)


def _growth(options: Options, platform: str) -> dict[str, Any]:
    return _alone("growth", options, tiny=options.tiny, repeats=options.repeats)


def _account(options: Options, platform: str) -> dict[str, Any]:
    return _alone("account", options, tiny=options.tiny, repeats=options.repeats)


def _alone(method: str, options: Options, **arguments: Any) -> dict[str, Any]:
    """In a process of its own, so that this one never holds an accelerator."""
    with connect("ours", sys.executable, options.device) as ours:
        return ours(method, **arguments)


PARTS: dict[str, Callable[[Options, str], dict[str, Any]]] = {
    "step": _step,
    "iteration": images.iteration,
    "mixture": arrays.mixture,
    "kmeans": arrays.kmeans,
    "sampling": images.sampling,
    "search": _search,
    "growth": _growth,
    "account": _account,
    "imports": start.imports,
    "first_step": start.first_step,
}


def _parse(argv: list[str] | None) -> tuple[Options, list[str], Path | None]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    parser.add_argument("--repeats", type=throughput.positive, default=5, help="rounds (5)")
    parser.add_argument("--full", action="store_true", help="on a CPU too, what takes an hour")
    parser.add_argument("--tiny", action="store_true", help="only show that everything runs")
    parser.add_argument("--skip-torch", action="store_true")
    parser.add_argument("--torch-python", default=sys.executable, help="one that has PyTorch")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"--only={args.only}: no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    torch_python = None if args.skip_torch else args.torch_python
    options = Options(args.device, torch_python, args.repeats, args.full, args.tiny)
    return options, names, args.output


if __name__ == "__main__":
    sys.exit(main())
