"""Training throughput of ClusterDDPM's M-step, here and in PyTorch, side by side.

    python -m benchmarks.throughput [--network=official|unet] [--batch-size=128] [--output=F]

Four contenders take the same gradient step: this package with the steps scanned in one compiled
call (``ours_scan``, what training does) or as one compiled call each (``ours_loop``), and PyTorch
run eagerly (``torch_eager``) or compiled (``torch_compile``). A step is: gather a batch from
uint8 images resident on the device, encode it, draw one z per example, predict eps with the
conditional denoiser, add the closed-form KL to a mixture of 10 Gaussians, differentiate, clip,
Adam, moving average of the weights.

Each framework lives in a process of its own that waits while others are measured, so that neither
threads nor CUDA libraries meet. Every repeat measures all contenders one after the other, and a
ratio is taken within a repeat, so that the load of the machine hits both sides of it. Before
that, the PyTorch step is shown to be the same function: with our weights and our noise it must
reproduce our encoder, denoiser, loss and gradient.

JSON goes to standard output (and to ``--output``), progress to standard error. Exit status 1
means that the implementations differ or that a loss became NaN or infinite (null in the JSON).
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.rounds import alternate, compare, say, spread
from benchmarks.worker import Settings, WorkerError, connect, usable_cpus

RATIOS = [("ours_scan", "torch_eager"), ("ours_scan", "torch_compile"), ("ours_scan", "ours_loop")]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    args = _parse(argv)
    settings = Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})
    result = measure(
        settings,
        steps=args.steps,
        repeats=args.repeats,
        torch_python=None if args.skip_torch else args.torch_python,
        compiled=not args.skip_compile,
    )
    text = json.dumps(json_safe(result), indent=2, allow_nan=False)
    if args.output:
        Path(args.output).write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if result["valid"] else 1


def measure(
    settings: Settings, *, steps: int, repeats: int, torch_python: str | None, compiled: bool
) -> dict[str, Any]:
    """Measure every contender that can run here.

    Args:
        settings: what to measure.
        steps: gradient steps per measurement; 0 chooses 4 on a CPU and 200 elsewhere.
        repeats: measurements of each contender.
        torch_python: interpreter for PyTorch's process, None for no such process.
        compiled: whether to try ``torch.compile``.

    Returns:
        What is printed.
    """
    load = os.getloadavg()[0]
    options = dataclasses.asdict(settings)
    notes: list[str] = []
    check = None
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        ours = stack.enter_context(connect("jax_step", sys.executable, settings.device))
        machine = describe_host() | {"jax": ours("start", settings=options)}
        where = machine["jax"]["platform"]
        steps = steps or (4 if where == "cpu" else 200)
        say(f"{steps} steps of {settings.batch_size} on {machine['jax']['device']}")
        contenders: dict[str, Any] = {"ours_scan": ours, "ours_loop": ours}
        if torch_python:
            theirs = stack.enter_context(connect("torch_step", torch_python, settings.device))
            try:
                theirs("probe", platform=where)
            except WorkerError as error:
                notes.append(f"no PyTorch figures: {error}")
            else:
                path = str(Path(folder, "ours.npz"))
                ours("export", path=path)
                machine["torch"] = theirs("start", path=path, platform=where, settings=options)
                check = theirs("check", path=path)
                contenders |= {"torch_eager": theirs}
                contenders |= {"torch_compile": theirs} if compiled else {}
        else:
            notes.append("no PyTorch figures: not asked for")
        calls = {
            name: functools.partial(worker, "run", contender=name, steps=steps)
            for name, worker in contenders.items()
        }
        runs = alternate(calls, repeats, notes)
    broken = [name for name, measured in runs.items() if not math.isfinite(measured[-1]["loss"])]
    notes += [f"{name}: the loss is not finite, its figures mean nothing" for name in broken]
    same = check is None or check["passed"]
    if not same:
        notes.append("the two implementations differ, see `check`")
    for note in notes:
        say(note)
    return {
        "benchmark": "throughput",
        "settings": options | {"steps": steps, "repeats": repeats},
        "machine": machine,
        "load_average_before": round(load, 2),
        "valid": same and not broken,
        "check": check,
        "contenders": {name: _summarise(r, steps, settings.batch_size) for name, r in runs.items()},
        "ratios": compare(runs, RATIOS),
        "notes": notes,
    }


def _summarise(runs: list[dict[str, float]], steps: int, batch_size: int) -> dict[str, Any]:
    first, *rest = runs
    return {
        "images_per_second": spread([steps * batch_size / r["seconds"] for r in rest]),
        "ms_per_step": spread([1e3 * r["seconds"] / steps for r in rest]),
        "process_cpu_ms_per_step": spread([1e3 * r["cpu_seconds"] / steps for r in rest]),
        "first_call_seconds": round(first["seconds"], 3),
        "loss_first": first["loss"],
        "loss_last": rest[-1]["loss"],
        "process_peak_mib": round(rest[-1]["peak_mib"], 1),
    }


def json_safe(value: Any) -> Any:
    """Null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: json_safe(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe_host() -> dict[str, Any]:
    """The processor, how much of it is ours, and the interpreter."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    return {"cpu": model, "cpus_usable": usable_cpus(), "python": platform.python_version()}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description="Images per second of a ClusterDDPM gradient step, beside PyTorch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )

    def number(flag: str, default: int, text: str) -> None:
        parser.add_argument(flag, type=positive, default=default, help=text)

    def choice(flag: str, options: str, text: str) -> None:
        names = options.split()
        parser.add_argument(flag, choices=names, default=names[0], help=text)

    choice("--network", "official unet", "the paper's, or ours")
    number("--batch-size", 128, "of a gradient step")
    number("--width", 64, "channels of the first level")
    number("--latent", 32, "dimensions of z")
    number("--image-size", 28, "height and width")
    number("--channels", 1, "of the images")
    number("--num-examples", 8192, "resident on the device")
    choice("--dtype", "float32 bfloat16", "of activations")
    choice("--device", "auto cpu", "auto is an accelerator if JAX has one")
    parser.add_argument("--compile-mode", default="default", help="mode of torch.compile")
    parser.add_argument("--steps", type=int, default=0, help="per measurement, 0 for automatic")
    number("--repeats", 5, "measurements of each")
    parser.add_argument("--output", help="also write the JSON to this file")
    parser.add_argument("--skip-torch", action="store_true", help="only our own figures")
    parser.add_argument("--skip-compile", action="store_true", help="no torch.compile")
    parser.add_argument(
        "--torch-python", default=sys.executable, help="interpreter that has PyTorch"
    )
    args = parser.parse_args(argv)
    if args.num_examples < args.batch_size:
        parser.error(f"--num-examples={args.num_examples}: must not be below --batch-size")
    if args.steps < 0:
        parser.error(f"--steps={args.steps}: must not be negative")
    return args


def positive(text: str) -> int:
    """An option's number."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
