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
import importlib.metadata
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
INSTALL = "pip install torch==2.13.0"
TOLERANCE = 1e-4
NUM_CLUSTERS = 10
CHECK_BATCH = 4

Tensors = dict[str, Any]
"""PyTorch tensors by name; parameters carry the path that they have in our tree."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        network: ``official`` (the paper's) or ``unet`` (ours).
        batch_size: of a gradient step.
        width: channels of the first level.
        latent: dimensions of z.
        num_steps: T of the linear noise schedule.
        image_size: height and width.
        channels: of the images.
        num_examples: resident on the device.
        dtype: of activations, ``float32`` or ``bfloat16``. On a GPU float32 means TF32 matrix
            products on both sides.
        device: ``cpu`` or ``auto`` (an accelerator if JAX has one).
        compile_mode: ``mode`` of ``torch.compile``.
        layout: of PyTorch's activations, ``nchw``, ``nhwc``, or ``best`` of a short trial.
    """

    network: str = "official"
    batch_size: int = 128
    width: int = 64
    latent: int = 32
    num_steps: int = 400
    image_size: int = 28
    channels: int = 1
    num_examples: int = 8192
    dtype: str = "float32"
    device: str = "auto"
    compile_mode: str = "default"
    layout: str = "best"


# The measurement.


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, or one of its workers, and return the exit status."""
    args = _parse(argv)
    if args.worker:
        return _serve({"jax": JaxWorker, "torch": TorchWorker}[args.worker])
    settings = Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})
    result = measure(
        settings,
        steps=args.steps,
        repeats=args.repeats,
        torch_python=None if args.skip_torch else args.torch_python,
        compiled=not args.skip_compile,
    )
    text = json.dumps(_json_safe(result), indent=2, allow_nan=False)
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
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ours = stack.enter_context(_worker("jax", sys.executable, settings))
        machine = _describe_host() | {"jax": ours("start", **dataclasses.asdict(settings))}
        where = machine["jax"]["platform"]
        steps = steps or (4 if where == "cpu" else 200)
        _say(f"{steps} steps of {settings.batch_size} on {machine['jax']['device']}")
        contenders = {"ours_scan": ours, "ours_loop": ours}
        check = None
        if torch_python:
            theirs = stack.enter_context(_worker("torch", torch_python, settings))
            try:
                theirs("probe", platform=where)
            except WorkerError as error:
                notes.append(f"no PyTorch figures: {error}")
            else:
                path = str(folder / "ours.npz")
                ours("export", path=path)
                options = dataclasses.asdict(settings) | {"device": where}
                machine["torch"] = theirs("start", path=path, **options)
                check = theirs("check", path=path)
                contenders |= {"torch_eager": theirs}
                contenders |= {"torch_compile": theirs} if compiled else {}
        else:
            notes.append("no PyTorch figures: not asked for")
        runs = _interleave(contenders, steps, repeats, notes)
    for name, measured in runs.items():
        if not math.isfinite(measured[-1]["loss"]):
            notes.append(f"{name}: the loss is not finite, its figures mean nothing")
    if check is not None and not check["passed"]:
        notes.append("the two implementations differ, see `check`")
    finite = all(math.isfinite(measured[-1]["loss"]) for measured in runs.values())
    for note in notes:
        _say(note)
    return {
        "benchmark": "throughput",
        "settings": dataclasses.asdict(settings) | {"steps": steps, "repeats": repeats},
        "machine": machine,
        "load_average_before": round(load, 2),
        "valid": finite and (check is None or check["passed"]),
        "check": check,
        "contenders": {name: _summarise(r, steps, settings.batch_size) for name, r in runs.items()},
        "ratios": _ratios(runs),
        "notes": notes,
    }


def _interleave(
    contenders: dict[str, Any], steps: int, repeats: int, notes: list[str]
) -> dict[str, list[dict[str, float]]]:
    """Let all take turns, each time in another order; the first run of each is the warm-up."""
    runs: dict[str, list[dict[str, float]]] = {}
    for name, worker in contenders.items():
        try:
            runs[name] = [worker("run", contender=name, steps=steps)]
        except WorkerError as error:
            notes.append(f"{name} does not run here: {error}")
    names = list(runs)
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            runs[name].append(contenders[name]("run", contender=name, steps=steps))
        line = ", ".join(f"{n} {1e3 * runs[n][-1]['seconds'] / steps:.1f}" for n in names)
        _say(f"repeat {repeat + 1} of {repeats}, ms per step: {line}")
    return runs


def _summarise(runs: list[dict[str, float]], steps: int, batch_size: int) -> dict[str, Any]:
    first, *rest = runs
    return {
        "images_per_second": _spread([steps * batch_size / r["seconds"] for r in rest]),
        "ms_per_step": _spread([1e3 * r["seconds"] / steps for r in rest]),
        "process_cpu_ms_per_step": _spread([1e3 * r["cpu_seconds"] / steps for r in rest]),
        "first_call_seconds": round(first["seconds"], 3),
        "loss_first": first["loss"],
        "loss_last": rest[-1]["loss"],
        "process_peak_mib": round(rest[-1]["peak_mib"], 1),
    }


def _ratios(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """How many times faster the first named is, repeat by repeat."""
    pairs = [
        ("ours_scan", "torch_eager"),
        ("ours_scan", "torch_compile"),
        ("ours_scan", "ours_loop"),
    ]
    ratios = {}
    for a, b in pairs:
        if a in runs and b in runs:
            both = list(zip(runs[a], runs[b], strict=True))[1:]
            ratios[f"{a}/{b}"] = _spread([y["seconds"] / x["seconds"] for x, y in both])
    return ratios


def _spread(values: list[float]) -> dict[str, float]:
    summary = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.5g}") for name, value in summary.items()}


def _json_safe(value: Any) -> Any:
    """Null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _json_safe(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _describe_host() -> dict[str, Any]:
    model = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    return {"cpu": model, "cpus_usable": _cpus(), "python": platform.python_version()}


def _cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _peak_host_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description="Images per second of a ClusterDDPM gradient step, beside PyTorch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    choices = {
        "network": ("official", "unet"),
        "dtype": ("float32", "bfloat16"),
        "device": ("auto", "cpu"),
        "layout": ("best", "nchw", "nhwc"),
    }
    positive = "batch_size width latent num_steps image_size channels num_examples".split()
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        kind = _positive if field.name in positive else str
        parser.add_argument(
            flag, type=kind, default=field.default, choices=choices.get(field.name), help=" "
        )
    parser.add_argument("--steps", type=int, default=0, help="per measurement, 0 for automatic")
    parser.add_argument("--repeats", type=_positive, default=5, help="measurements of each")
    parser.add_argument("--output", help="also write the JSON to this file")
    parser.add_argument("--skip-torch", action="store_true", help="only our own figures")
    parser.add_argument("--skip-compile", action="store_true", help="no torch.compile")
    parser.add_argument(
        "--torch-python", default=sys.executable, help="interpreter that has PyTorch"
    )
    parser.add_argument("--worker", choices=("jax", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.num_examples < args.batch_size:
        parser.error(f"--num-examples={args.num_examples}: must not be below --batch-size")
    if args.steps < 0:
        parser.error(f"--steps={args.steps}: must not be negative")
    return args


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


# The processes: lines of JSON in, lines of JSON out.


class WorkerError(RuntimeError):
    """A worker could not do what it was asked."""


@contextlib.contextmanager
def _worker(kind: str, python: str, settings: Settings) -> Iterator[Callable[..., Any]]:
    """A process that holds one framework; call it with the name of a method and arguments."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # Two frameworks share the accelerator, so neither may take most of its memory.
    env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")
    if settings.device == "cpu":
        env["JAX_PLATFORMS"] = "cpu"
    command = [python, "-m", "benchmarks.throughput", f"--worker={kind}"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, cwd=ROOT, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        to, back = process.stdin, process.stdout

        def call(method: str, **kwargs: Any) -> Any:
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps([method, kwargs]), file=to, flush=True)
            line = back.readline()
            if not line:
                raise WorkerError(f"the {kind} process ended with status {process.wait()}")
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


def _serve(make: Callable[[], Any]) -> int:
    """Answer calls on standard input until it ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    # Whatever a library prints must not get between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = make()
    for line in sys.stdin:
        method, kwargs = json.loads(line)
        try:
            answer = {"result": getattr(worker, method)(**kwargs)}
        except Exception as error:
            if not isinstance(error, WorkerError):
                traceback.print_exc()
            reason = str(error).strip().splitlines() or [""]
            named = "" if isinstance(error, WorkerError) else f"{type(error).__name__}: "
            answer = {"error": f"{named}{reason[0]}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def _timed(work: Callable[[], float]) -> dict[str, float]:
    """Wall and CPU time of ``work``, which must not return before the device is done."""
    cpu, wall = time.process_time(), time.perf_counter()
    loss = work()
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "loss": float(f"{loss:.6g}"),
    }


def _images(settings: dict[str, Any]) -> np.ndarray:
    """Noise as uint8 [n, h, w, c]; without flat areas, where max pooling has no unique gradient."""
    size, n, c = (settings[name] for name in ("image_size", "num_examples", "channels"))
    return np.random.default_rng(0).integers(0, 256, (n, size, size, c), dtype=np.uint8)


# Our side.


class JaxWorker:
    """The M-step of this package, through the functions that training calls."""

    def start(self, **settings: Any) -> dict[str, Any]:
        """Build the method, and a state in its EM phase."""
        import jax
        import jax.numpy as jnp

        from dec_diffusion import engine

        self.settings = settings
        self.key = jax.random.key(0)
        method = _build_ours(settings)
        self.phase = method.phases["em"]
        raw = jnp.asarray(_images(settings))
        self.examples = engine.Examples(raw, jnp.float32(127.5), jnp.float32(127.5))
        params, cluster = _initialise_ours(method, self._batch(2), settings["latent"])
        state = engine.TrainState(jnp.int32(0), params, params, (), cluster)
        # As a run enters the phase, less the first mixture, which is random here.
        self.state, _ = jax.jit(lambda s: engine.begin_phase(self.phase, s, None, self.key))(state)
        self.compiled: dict[tuple[str, int], Any] = {}
        device = jax.devices()[0]
        versions = {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax", "optax")}
        return {
            "platform": device.platform,
            "device": device.device_kind,
            "devices_used": 1,
            "parameters": sum(p.size for p in jax.tree.leaves(params)),
            **versions,
        }

    def run(self, contender: str, steps: int) -> dict[str, float]:
        """Take ``steps`` gradient steps."""
        import jax

        if (contender, steps) not in self.compiled:
            make = {"ours_scan": self._compile_scan, "ours_loop": self._compile_loop}[contender]
            self.compiled[contender, steps] = make(steps)
        take = self.compiled[contender, steps]

        def work() -> float:
            self.state, loss = take(self.state)
            jax.block_until_ready(self.state)
            return float(loss)

        memory = jax.devices()[0].memory_stats() or {}
        peak = memory.get("peak_bytes_in_use", 2**20 * _peak_host_mib()) / 2**20
        return _timed(work) | {"peak_mib": peak}

    def export(self, path: str) -> None:
        """Write weights, inputs, noise, and all that our step makes of them, in full precision."""
        import jax
        import jax.numpy as jnp

        from dec_diffusion import schedule
        from dec_diffusion.methods import clusterddpm

        seen: dict[str, Any] = {}
        make_networks, add_noise = clusterddpm.clusterddpm_networks, schedule.add_noise

        def watch(name: str, network: Any) -> Any:
            def apply(params: Any, *inputs: Any, **options: Any) -> Any:
                out = network.apply(params, *inputs, **options)
                seen[name] = (inputs, out)
                return out

            return network._replace(apply=apply)

        def watched_networks(*args: Any, **kwargs: Any) -> Any:
            encoder, denoiser = make_networks(*args, **kwargs)
            return watch("encoder", encoder), watch("denoiser", denoiser)

        def watched_noise(x: Any, eps: Any, log_snr: Any) -> Any:
            seen["noise"] = (eps, log_snr)
            return add_noise(x, eps, log_snr)

        # The loss draws its noise inside; watching it from outside leaves it as it is, and
        # asks nothing about how it derives its keys.
        with (
            mock.patch.object(clusterddpm, "clusterddpm_networks", watched_networks),
            mock.patch.object(schedule, "add_noise", watched_noise),
            jax.default_matmul_precision("highest"),
        ):
            loss_of = _build_ours(self.settings | {"dtype": "float32"}).phases["em"].loss
            batch, cluster = self._batch(CHECK_BATCH), self.state.cluster

            def spied(params: Any) -> tuple[Any, Any]:
                loss, (_, metrics) = loss_of(params, cluster, batch, self.key, jnp.float32(1))
                return loss, (metrics, dict(seen))

            gradient = jax.jit(jax.value_and_grad(spied, has_aux=True))
            (loss, (metrics, records)), grads = gradient(self.state.params)
        _, (mean, log_variance) = records["encoder"]
        (_, level, z, keep), prediction = records["denoiser"]
        eps, log_snr = records["noise"]
        arrays: dict[str, Any] = {
            "x": batch["image"],
            "mean": mean,
            "log_variance": log_variance,
            "z": z,
            "level": level,
            "keep": keep,
            "eps": eps,
            "log_snr": log_snr,
            "prediction": prediction,
            "loss": loss,
            "kl_weight": metrics["kl_weight"],
            "mixture/log_weights": cluster.log_weights,
            "mixture/means": cluster.means,
            "mixture/variances": cluster.covariance,
            **_flatten("params", self.state.params),
            **_flatten("grads", grads),
        }
        np.savez(path, **arrays)

    def _batch(self, n: int) -> Any:
        import jax.numpy as jnp

        from dec_diffusion import engine

        return engine.fetch_resident(self.examples)(jnp.arange(n) % len(self.examples.raw))

    def _order(self, step: Any, steps: int) -> Any:
        from dec_diffusion import engine

        return engine.epoch_order(
            self.key,
            step,
            steps=steps,
            batch_size=self.settings["batch_size"],
            num_examples=self.settings["num_examples"],
        )

    def _compile_scan(self, steps: int) -> Callable[[Any], tuple[Any, Any]]:
        import jax

        from dec_diffusion import engine

        def m_step(state: Any, examples: Any) -> tuple[Any, Any]:
            rows = self._order(state.step, steps)
            fetch = engine.fetch_resident(examples)
            state, metrics = engine.m_step(self.phase, state, rows, fetch, self.key)
            return state, metrics["loss"][-1]

        compiled = jax.jit(m_step, donate_argnums=0)
        return lambda state: compiled(state, self.examples)

    def _compile_loop(self, steps: int) -> Callable[[Any], tuple[Any, Any]]:
        import jax

        from dec_diffusion import engine

        def one(state: Any, examples: Any, row: Any) -> tuple[Any, Any]:
            batch = engine.fetch_resident(examples)(row)
            state, metrics = engine.train_step(self.phase, state, batch, self.key)
            return state, metrics["loss"]

        order = jax.jit(lambda step: self._order(step, steps))
        compiled = jax.jit(one, donate_argnums=0)

        def loop(state: Any) -> tuple[Any, Any]:
            loss = None
            for row in np.asarray(order(state.step)):
                state, loss = compiled(state, self.examples, row)
            return state, loss

        return loop


def _build_ours(settings: dict[str, Any]) -> Any:
    from dec_diffusion.method import DataSpec
    from dec_diffusion.methods.clusterddpm import ClusterDDPM

    size, channels = settings["image_size"], settings["channels"]
    return ClusterDDPM(
        num_clusters=NUM_CLUSTERS,
        latent=settings["latent"],
        network=settings["network"],
        width=settings["width"],
        dtype=settings["dtype"],
        noise_schedule="linear",
        num_steps=settings["num_steps"],
        zero_terminal=False,
        prediction="eps",
        uniform_noise=1.0,
        drop_latent=0.1,
        responsibilities="closed_form",
        kl_weight=1.0,
        kl_warmup=0.0,
        rotate=0.0,
        shift=0.0,
        scale=0.0,
        shear=0.0,
        noise=0.0,
        flip=False,
        target_view=False,
        learning_rate=1e-4,
        decay=False,
        clip=1000.0,
        ema=0.99,
    ).build(DataSpec((size, size, channels), settings["num_examples"]))


def _initialise_ours(method: Any, batch: Any, latent: int) -> tuple[Any, Any]:
    """Weights and a mixture without zeros or ones where they would make a term vanish.

    Drawn by numpy, because compiling the methods' own ``init`` takes longer than all the rest.
    """
    import jax
    import jax.numpy as jnp

    from dec_diffusion.gmm import Mixture

    random = np.random.default_rng(1)

    def draw(path: Any, leaf: Any) -> Any:
        name = path[-1].key
        fan_in = np.prod(leaf.shape[:-1]) if "BlockUpsample" not in str(path) else leaf.shape[0]
        std = (2 / fan_in) ** 0.5 if name == "kernel" else 0.02
        value = (name == "scale") + std * random.standard_normal(leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    shapes, _ = jax.eval_shape(method.init, jax.random.key(0), batch)
    log_weights = random.standard_normal(NUM_CLUSTERS)
    log_weights -= np.log(np.exp(log_weights).sum())
    means, log_variances = random.standard_normal((2, NUM_CLUSTERS, latent))
    mixture = [log_weights, means, np.exp(0.5 * log_variances)]
    return (
        jax.tree_util.tree_map_with_path(draw, shapes),
        Mixture(*(jnp.asarray(part, jnp.float32) for part in mixture)),
    )


def _flatten(prefix: str, tree: Any) -> dict[str, Any]:
    if not hasattr(tree, "items"):
        return {prefix: tree}
    parts = [_flatten(f"{prefix}/{name}", value) for name, value in tree.items()]
    return {name: value for part in parts for name, value in part.items()}


# PyTorch's side: the same step as it is best written there.


class TorchWorker:
    """The same step in PyTorch: fused Adam, multi-tensor clipping and averaging, no host syncs."""

    def probe(self, platform: str) -> None:
        """Import PyTorch.

        Raises:
            WorkerError: there is none, or not for this platform; says what to do.
        """
        _import_torch()
        if platform not in ("cpu", "gpu"):
            raise WorkerError(f"nothing to compare on a {platform}; use --device=cpu")
        if platform == "gpu" and not torch.cuda.is_available():
            raise WorkerError("its build sees no GPU; install one for CUDA, or use --device=cpu")

    def start(self, path: str, **settings: Any) -> dict[str, Any]:
        """Take over our weights, and choose the memory layout."""
        device = {"cpu": "cpu", "gpu": "cuda"}[settings["device"]]
        torch.set_num_threads(_cpus())
        torch.backends.cudnn.benchmark = True
        self.settings, self.device = settings, torch.device(device)
        self.dtype = getattr(torch, settings["dtype"])
        layouts = {"best": ["nchw", "nhwc"]}.get(settings["layout"], [settings["layout"]])
        with np.load(path) as file:
            arrays = dict(file)
        # The first trial of a layout also warms it up.
        trials = {x: [self._prepare(x, arrays) or self._eager(2) for _ in "ab"] for x in layouts}
        seconds = {layout: trial[-1]["seconds"] for layout, trial in trials.items()}
        self.layout = min(seconds, key=lambda layout: seconds[layout])
        self._prepare(self.layout, arrays)
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        return {
            "platform": "gpu" if device == "cuda" else "cpu",
            "device": name,
            "layout": self.layout,
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in self.params.values()),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }

    def check(self, path: str) -> dict[str, Any]:
        """Compare with what ``JaxWorker.export`` wrote: errors, each relative to the largest value.

        The error of ``gradient`` is the norm of the difference over the norm, for all parameters
        together.
        """
        with np.load(path) as file:
            ours = dict(file)
        convert = self._converter()
        std = np.exp(0.5 * ours["log_variance"])
        steps = np.argmin(
            np.abs(ours["log_snr"][:, None] - self.levels["log_snr"].cpu().numpy()), 1
        )
        noise = {
            "z": convert((ours["z"] - ours["mean"]) / std),
            "eps": convert(ours["eps"]),
            "keep": convert(ours["keep"]),
            "step": torch.as_tensor(steps, device=self.device),
        }
        x = convert(ours["x"])
        with _full_precision():
            loss, seen = self._loss(self.params, x, noise, torch.float32)
            grads = torch.autograd.grad(loss, list(self.params.values()))
        theirs = {name: value.detach().cpu().numpy() for name, value in seen.items()}
        theirs["prediction"] = theirs["prediction"].transpose(0, 2, 3, 1)
        theirs["loss"] = loss.detach().cpu().numpy()
        errors = {
            name: float(np.abs(theirs[name] - ours[name]).max() / np.abs(ours[name]).max())
            for name in ("mean", "log_variance", "level", "prediction", "loss")
        }
        expected = [convert(ours[f"grads/{name}"], name).double() for name in self.params]
        difference = sum(((a - b) ** 2).sum() for a, b in zip(grads, expected, strict=True))
        errors["gradient"] = float((difference / sum((b**2).sum() for b in expected)) ** 0.5)
        passed = all(error <= TOLERANCE for error in errors.values())
        return {"passed": passed, "tolerance": TOLERANCE, "relative_errors": errors}

    def run(self, contender: str, steps: int) -> dict[str, float]:
        """Take ``steps`` gradient steps."""
        if contender == "torch_eager":
            return self._eager(steps)
        if self.compiled is None:
            self.compiled = torch.compile(self._training_loss, mode=self.settings["compile_mode"])
        return self._take(self.compiled, steps)

    def _eager(self, steps: int) -> dict[str, float]:
        return self._take(self._training_loss, steps)

    def _take(self, loss_of: Callable[..., Any], steps: int) -> dict[str, float]:
        def work() -> float:
            loss = None
            for index in self._order(steps):
                self.optimizer.zero_grad(set_to_none=True)
                loss = loss_of(self.params, index)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.leaves, 1000.0, foreach=True)
                self.optimizer.step()
                decay = min(0.99, (1 + self.step) / (10 + self.step))
                with torch.no_grad():
                    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                        self.averages, self.leaves, 1 - decay
                    )
                self.step += 1
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            assert loss is not None
            return float(loss.detach())

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        timing = _timed(work)
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else _peak_host_mib()
        return timing | {"peak_mib": peak}

    def _prepare(self, layout: str, arrays: dict[str, np.ndarray]) -> None:
        """Our weights and data in this layout, and a fresh optimiser."""
        self.layout = layout
        convert = self._converter()
        names = [name for name in arrays if name.startswith("params/")]
        self.params = {
            (short := name.removeprefix("params/")): convert(arrays[name], short).requires_grad_()
            for name in names
        }
        self.leaves = list(self.params.values())
        self.averages = [p.detach().clone() for p in self.leaves]
        self.optimizer = torch.optim.Adam(self.leaves, lr=1e-4, betas=(0.9, 0.99), fused=True)
        self.raw = convert(_images(self.settings))
        self.mixture = {
            name.removeprefix("mixture/"): convert(value)
            for name, value in arrays.items()
            if name.startswith("mixture/")
        }
        self.kl_weight = float(arrays["kl_weight"])
        self.levels = _linear_schedule(self.settings["num_steps"], self.device)
        self.pending: list[Any] = []
        self.step, self.compiled = 0, None

    def _converter(self) -> Callable[..., Any]:
        """From an array of ours to a tensor in this layout."""

        def convert(array: np.ndarray, name: str = "") -> Any:
            if name.endswith("kernel"):
                # Ours: HWIO, for block upsampling IHWO, and [in, out].
                block = (0, 3, 1, 2) if "BlockUpsample" in name else (3, 2, 0, 1)
                array = array.transpose(block if array.ndim == 4 else (1, 0))
            elif array.ndim == 4:
                array = array.transpose(0, 3, 1, 2)
            # A copy, for training must not write into the arrays that it started from.
            tensor = torch.tensor(np.ascontiguousarray(array), device=self.device)
            if tensor.ndim == 4 and self.layout == "nhwc":
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            return tensor

        return convert

    def _order(self, steps: int) -> Iterator[Any]:
        """Batches of example numbers, from a new permutation in every epoch."""
        n, batch_size = self.settings["num_examples"], self.settings["batch_size"]
        for _ in range(steps):
            if not self.pending:
                order = torch.randperm(n, device=self.device)[: n // batch_size * batch_size]
                self.pending = list(order.split(batch_size))
            yield self.pending.pop()

    def _training_loss(self, params: Tensors, index: Any) -> Any:
        x = (self.raw[index].float() - 127.5) / 127.5
        b = x.shape[0]
        noise = {
            "z": torch.randn(b, self.settings["latent"], device=x.device),
            "eps": torch.randn_like(x),
            "keep": (torch.rand(b, device=x.device) < 0.9).float(),
            "step": torch.randint(1, self.settings["num_steps"] + 1, (b,), device=x.device),
        }
        return self._loss(params, x, noise, self.dtype)[0]

    def _loss(self, params: Tensors, x: Any, noise: Tensors, dtype: Any) -> tuple[Any, Tensors]:
        encode, denoise = {
            "official": (_official_encoder, _official_unet),
            "unet": (_encoder, _unet),
        }[self.settings["network"]]
        mean, log_variance = encode(params, x, dtype)
        z = mean + torch.exp(0.5 * log_variance) * noise["z"]
        step = noise["step"]
        alpha, sigma = (self.levels[n][step][:, None, None, None] for n in ("alpha", "sigma"))
        x_t = alpha * x + sigma * noise["eps"]
        name = "position" if self.settings["network"] == "official" else "log_snr"
        level = self.levels[name][step]
        prediction = denoise(params, x_t, level, z, noise["keep"], dtype)
        error = (noise["eps"] - prediction).square().sum((1, 2, 3))
        kl = _mixture_kl(self.mixture, mean, log_variance)
        loss = error.mean() + self.kl_weight * kl.mean()
        seen = {"mean": mean, "log_variance": log_variance, "level": level}
        return loss, seen | {"prediction": prediction}


def _import_torch() -> None:
    """Bind ``torch`` in this module: only in the process that is to use it.

    Raises:
        WorkerError: there is none; says how to install it.
    """
    global torch
    try:
        import torch
    except ImportError as error:
        raise WorkerError(f"PyTorch cannot be imported ({error}); {INSTALL}") from error


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 inside; outside, matrix products use it as our side does by default."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True


def _linear_schedule(num_steps: int, device: Any) -> Tensors:
    """Amplitudes of step t at index t, for betas 1e-4 to 0.02."""
    betas = torch.linspace(1e-4, 0.02, num_steps + 1, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - betas, 0)
    levels = {
        "alpha": alpha_bar.sqrt(),
        "sigma": (1 - alpha_bar).sqrt(),
        "log_snr": torch.logit(alpha_bar),
        "position": torch.linspace(0, 1, num_steps + 1),
    }
    return {name: value.float().to(device) for name, value in levels.items()}


def _mixture_kl(mixture: Tensors, mean: Any, log_variance: Any) -> Any:
    """-log sum_c pi_c exp(-KL(q | N_c)) for each example, in nats."""
    ratio = log_variance[:, None] - mixture["variances"].log()
    distance = (mean[:, None] - mixture["means"]).square() / mixture["variances"]
    kl = 0.5 * (ratio.exp() + distance - 1 - ratio).sum(-1)
    return -torch.logsumexp(mixture["log_weights"] - kl, -1)


def _dense(p: Tensors, name: str, x: Any, dtype: Any = None) -> Any:
    dtype = dtype or x.dtype
    weight, bias = p[f"{name}/kernel"].to(dtype), p[f"{name}/bias"].to(dtype)
    return torch.nn.functional.linear(x.to(dtype), weight, bias)


def _conv(p: Tensors, name: str, x: Any, dtype: Any, stride: int = 1) -> Any:
    weight, bias = p[f"{name}/kernel"].to(dtype), p[f"{name}/bias"].to(dtype)
    padding = weight.shape[-1] // 2
    return torch.nn.functional.conv2d(x.to(dtype), weight, bias, stride=stride, padding=padding)


def _block_upsample(p: Tensors, name: str, x: Any, dtype: Any) -> Any:
    weight, bias = p[f"{name}/kernel"].to(dtype), p[f"{name}/bias"].to(dtype)
    return torch.nn.functional.conv_transpose2d(x.to(dtype), weight, bias, stride=weight.shape[-1])


def _norm(p: Tensors, name: str, x: Any, condition: Any = None) -> Any:
    channels = x.shape[1]
    groups = max(g for g in range(1, 9) if channels % g == 0)
    scale, shift = (p[f"{name}/{part}"].to(x.dtype) for part in ("scale", "bias"))
    y = torch.nn.functional.group_norm(x, groups, scale, shift, 1e-6)
    if condition is None:
        return y
    affine = _dense(p, f"{name}/Dense_0", condition)[:, :, None, None].to(x.dtype)
    extra_scale, extra_shift = affine.chunk(2, 1)
    return y * (1 + extra_scale) + extra_shift


def _gelu(x: Any) -> Any:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _pad(x: Any, height: int, width: int) -> Any:
    pads = (0, width - x.shape[3], 0, height - x.shape[2])
    return torch.nn.functional.pad(x, pads, mode="replicate") if any(pads) else x


def _block(p: Tensors, name: str, x: Any, dtype: Any, residual: bool = False) -> Any:
    first = _gelu(_norm(p, f"{name}/Norm_0", _conv(p, f"{name}/Conv_0", x, dtype)))
    second = _gelu(_norm(p, f"{name}/Norm_1", _conv(p, f"{name}/Conv_1", first, dtype)))
    if not residual:
        return second
    return ((x if x.shape[1] == second.shape[1] else first) + second) / 1.414


def _trunk(p: Tensors, name: str, x: Any, dtype: Any) -> tuple[Any, Any, Any]:
    size = -(-max(x.shape[2:]) // 4) * 4
    pool = torch.nn.functional.max_pool2d
    x = _block(p, f"{name}/_Block_0", _pad(x, size, size), dtype, residual=True)
    down1 = pool(_block(p, f"{name}/_Block_1", x, dtype), 2)
    down2 = pool(_block(p, f"{name}/_Block_2", down1, dtype), 2)
    return x, down1, down2


def _embedding(p: Tensors, name: str, x: Any, dtype: Any) -> Any:
    y = _dense(p, f"{name}/Dense_0", _gelu(_dense(p, f"{name}/Dense_1", x)))
    return y[:, :, None, None].to(dtype)


def _official_encoder(p: Tensors, x: Any, dtype: Any) -> tuple[Any, Any]:
    _, _, down2 = _trunk(p, "encoder/_Trunk_0", x, dtype)
    hidden = _gelu(down2.mean((2, 3))).float()
    return _dense(p, "encoder/Dense_0", hidden), _dense(p, "encoder/Dense_1", hidden)


def _official_unet(p: Tensors, x_t: Any, level: Any, z: Any, keep: Any, dtype: Any) -> Any:
    root = "denoiser"
    height, width = x_t.shape[2:]
    z, t = z * keep[:, None], level[:, None]
    x, down1, down2 = _trunk(p, f"{root}/_Trunk_0", x_t, dtype)
    up = _block_upsample(
        p, f"{root}/BlockUpsample_0", _gelu(down2.mean((2, 3), keepdim=True)), dtype
    )
    up = torch.relu(_norm(p, f"{root}/Norm_0", up))
    for level_number, skip in enumerate((down2, down1)):
        scale = _embedding(p, f"{root}/_Embedding_{2 * level_number}", z, dtype)
        shift = _embedding(p, f"{root}/_Embedding_{2 * level_number + 1}", t, dtype)
        up = torch.cat([scale * up + shift, skip], 1)
        up = _block_upsample(p, f"{root}/BlockUpsample_{level_number + 1}", up, dtype)
        for number in (2 * level_number, 2 * level_number + 1):
            up = _block(p, f"{root}/_Block_{number}", up, dtype)
    out = _conv(p, f"{root}/Conv_0", torch.cat([up, x], 1), dtype)
    out = _conv(p, f"{root}/Conv_1", torch.relu(_norm(p, f"{root}/Norm_1", out)), dtype)
    return out[:, :, :height, :width].float()


def _silu(x: Any) -> Any:
    return torch.nn.functional.silu(x)


def _res_block(p: Tensors, name: str, x: Any, dtype: Any, condition: Any = None) -> Any:
    y = _conv(p, f"{name}/Conv_0", _silu(_norm(p, f"{name}/Norm_0", x)), dtype)
    y = _conv(p, f"{name}/Conv_1", _silu(_norm(p, f"{name}/Norm_1", y, condition)), dtype)
    return (_conv(p, f"{name}/Conv_2", x, dtype) if x.shape[1] != y.shape[1] else x) + y


def _encoder(p: Tensors, x: Any, dtype: Any) -> tuple[Any, Any]:
    levels = sum(f"encoder/down_{n}_0/Conv_0/kernel" in p for n in range(8))
    height, width = (-(-s // 2 ** (levels - 1)) * 2 ** (levels - 1) for s in x.shape[2:])
    x = _conv(p, "encoder/input", _pad(x, height, width), dtype)
    for level in range(levels):
        x = _res_block(p, f"encoder/down_{level}_0", x, dtype)
        if level + 1 < levels:
            x = _conv(p, f"encoder/halve_{level}", x, dtype, stride=2)
    x = _silu(_norm(p, "encoder/Norm_0", x)).permute(0, 2, 3, 1).flatten(1)
    x = _silu(_dense(p, "encoder/Dense_0", x, dtype)).float()
    log_variance = _dense(p, "encoder/Gaussian_0/Dense_0", x).clamp(-10.0, 4.0)
    return _dense(p, "encoder/Gaussian_0/mean", x), log_variance


def _condition(p: Tensors, name: str, log_snr: Any, z: Any, keep: Any) -> Any:
    wavelength = 4.0 * 20.0 ** (torch.arange(16, device=z.device) / 15)
    angle = log_snr[:, None] * (2 * torch.pi / wavelength)
    features = torch.cat([angle.sin(), angle.cos()], 1)
    level = _dense(p, f"{name}/Dense_0", _silu(_dense(p, f"{name}/Dense_1", features)))
    latent = _dense(p, f"{name}/Dense_2", _silu(_dense(p, f"{name}/Dense_3", z)))
    return _silu(level + torch.where(keep[:, None] > 0, latent, p[f"{name}/null"]))


def _unet(p: Tensors, x_t: Any, level: Any, z: Any, keep: Any, dtype: Any) -> Any:
    root = "denoiser"
    condition = _condition(p, f"{root}/condition", level, z, keep)
    levels = sum(f"{root}/down_{n}_0/Conv_0/kernel" in p for n in range(8))
    height, width = x_t.shape[2:]
    multiple = 2 ** (levels - 1)
    x = _pad(x_t, *(-(-s // multiple) * multiple for s in (height, width)))
    x = _conv(p, f"{root}/input", x, dtype)
    skips = []
    for number in range(levels):
        x = _res_block(p, f"{root}/down_{number}_0", x, dtype, condition)
        skips.append(x)
        if number + 1 < levels:
            x = _conv(p, f"{root}/halve_{number}", x, dtype, stride=2)
    for number in range(2):
        x = _res_block(p, f"{root}/middle_{number}", x, dtype, condition)
    for number in reversed(range(levels)):
        x = torch.cat([x, skips.pop()], 1)
        x = _res_block(p, f"{root}/up_{number}_0", x, dtype, condition)
        if number > 0:
            x = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")
            x = _conv(p, f"{root}/double_{number}", x, dtype)
    x = _silu(_norm(p, f"{root}/output_norm", x))
    return _conv(p, f"{root}/output", x, dtype)[:, :, :height, :width].float()


if __name__ == "__main__":
    sys.exit(main())
