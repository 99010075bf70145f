"""How an EM iteration scales over devices and processes: measured, counted and predicted.

    python -m benchmarks.scaling [--layouts=1x1,1x8,2x4] [--config=...] [--output=scaling.json]
    python -m benchmarks.scaling --predict [--chips=256]

The first command runs EM iterations of one phase on random data in every layout, processes x
simulated CPU devices of each, several processes through ``launch/local.sh``. Strong scaling keeps
examples and batch, weak scaling keeps them per device. Simulated devices share the cores of this
machine, so their times say what sharding costs and not what it gains; the traffic, counted in the
compiled program (``collectives``), is what real devices exchange. The second command compiles
nothing and needs no device: it counts the operations of a training step and of a sweep, and
divides them, and the traffic, by published speeds; docs/scaling.md says what it assumes.

JSON goes to standard output. Options that begin with --config. change the config, as in training.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import collectives
from dec_diffusion import command, engine, options, parallel, trained
from dec_diffusion.config import Config
from dec_diffusion.method import DataSpec, Method, Phase
from dec_diffusion.placement import place_state
from dec_diffusion.types import Batch

ROOT = Path(__file__).resolve().parents[1]

# Cloud TPU v5e, https://cloud.google.com/tpu/docs/v5e: operations per second of a chip in
# bfloat16, and the bytes per second that its four links send.
PEAK, LINKS, LATENCY = 197e12, 200e9, 1e-6
UTILISATIONS = (0.4, 0.1)
IMAGENET, PIXELS, CLUSTERS = 1_281_167, (64, 64, 3), 1000


def run() -> None:
    """Read options, measure or predict, print."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("--config", default="clusterddpm:vectors")
    parser.add_argument("--layouts", default="1x1,1x2,1x4,1x8,2x4,4x2")
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--sweep-size", type=int, default=64)
    parser.add_argument("--shape", type=_sizes, default=(64,))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--chips", type=int, default=256)
    parser.add_argument("--output", type=Path)
    # What a process of a layout is started with.
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    for name in ("distributed", "coordinator", "num_processes", "process_id"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args()
    strange = [word for word in overrides if not word.startswith("--config.")]
    if strange:
        parser.error(f"{strange[0]}: no such option")
    if options.worker:
        pod = (options.coordinator, options.num_processes, options.process_id)
        work(options.worker, pod if options.distributed else None)
        return
    config = [f"--config={options.config}", *overrides]
    if options.predict:
        result = predict(load(config), chips=options.chips)
    else:
        try:
            layouts = [_sizes(x) for x in options.layouts.split(",")]
        except ValueError:
            layouts = []
        if not layouts or any(len(layout) != 2 for layout in layouts):
            parser.error(f"--layouts={options.layouts}: write PROCESSESxDEVICES, say 1x8,2x4")
        spec = {"config": config, "repeats": options.repeats} | {
            name: getattr(options, name)
            for name in ("examples", "batch_size", "sweep_size", "shape", "steps")
        }
        result = measure(spec, layouts)
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(map(int, text.split("x")))
    if min(sizes) < 1:
        raise ValueError(text)
    return sizes


def load(arguments: list[str]) -> Config:
    """The config of a command line."""
    return command.load_config(options.parse(["scaling", *arguments]))


# -- measured --


def measure(spec: dict[str, Any], layouts: list[tuple[int, ...]]) -> dict[str, Any]:
    """Times of every layout, and the traffic of the last one with a single process."""
    rows = []
    for layout in layouts:
        total = math.prod(layout)
        grown = {name: spec[name] * total for name in ("examples", "batch_size")}
        strong, weak = start(spec, layout), start(spec | grown, layout)
        name = "x".join(map(str, layout))
        rows.append({"layout": name, "devices": total, "strong": strong, "weak": weak})
    widest = max((layout for layout in layouts if layout[0] == 1), default=layouts[0])
    return {
        "spec": spec,
        "cores": len(os.sched_getaffinity(0)),
        "scaling": rows,
        "traffic": traffic(spec, widest),
    }


def traffic(spec: dict[str, Any], layout: tuple[int, ...]) -> dict[str, Any]:
    """Bytes per device: of a gradient step, and of an E-step on these and on twice the examples.

    An iteration is steps and an E-step, so programs of as many and of twice as many steps tell the
    two apart.
    """

    def sent(**changes: int) -> dict[str, Any]:
        return start(spec | {"repeats": 0} | changes, layout)["traffic"]

    steps = spec["steps"]
    base, longer = sent(), sent(steps=2 * steps)
    more = sent(examples=2 * spec["examples"])
    step = (longer["total"] - base["total"]) / steps
    return {
        "layout": "x".join(map(str, layout)),
        "iteration": base,
        "gradient_step_bytes": step,
        "e_step_bytes": base["total"] - steps * step,
        "e_step_bytes_of_twice_the_examples": more["total"] - steps * step,
    }


def start(spec: dict[str, Any], layout: tuple[int, ...]) -> dict[str, Any]:
    """Run one layout in processes of its own; what process 0 found."""
    processes, devices = layout
    with tempfile.TemporaryDirectory() as folder:
        worker = json.dumps(spec | {"folder": folder})
        arguments = [sys.executable, "-m", "benchmarks.scaling", f"--worker={worker}"]
        flag = f"--xla_force_host_platform_device_count={devices}"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        if processes > 1:
            launcher = [str(ROOT / "launch" / "local.sh"), f"--processes={processes}", "--"]
            arguments = launcher + arguments
        done = subprocess.run(arguments, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"layout {processes}x{devices} failed:\n{done.stdout}\n{done.stderr}")
        return json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))


def work(spec: dict[str, Any], pod: tuple[str, str, str] | None) -> None:
    """Be one process of a layout."""
    number = int(pod[2]) if pod else 0
    if pod:
        jax.distributed.initialize(pod[0], int(pod[1]), number)
    shape, batch_size = tuple(spec["shape"]), spec["batch_size"]
    method, phase = _phase(load(spec["config"]), shape, spec["examples"], batch_size)
    phase = phase._replace(steps=spec["steps"])
    raw = np.random.default_rng(0).integers(0, 256, (spec["examples"], *shape), np.uint8)
    data = parallel.place(
        raw, np.float32(127.5), np.float32(127.5), sweep_size=spec["sweep_size"], resident=True
    )
    key = jax.random.key(0)
    state: Any = engine.init_state(method, key, parallel.first_batch(data))
    state = place_state(state, num_rows=data.rows.size)
    # The first mixture is fitted once in a run: it is left out, iterations begin with any.
    bare = phase._replace(begin=None, refresh=None)
    begin, _ = parallel.compile_phase(bare, data, key, batch_size=batch_size)
    _, iterate = parallel.compile_phase(phase, data, key, batch_size=batch_size)
    state, _ = begin(state)
    # What the first iteration compiles is what an iteration runs.
    client = jax.devices()[0].client
    before = client.live_executables()
    state, _ = iterate(state)
    programs = [p for p in client.live_executables() if p not in before]
    counted = [collectives.count(p.hlo_modules()[0].to_string()) for p in programs]
    wall, cpu = [], []
    for _ in range(spec["repeats"]):
        clocks = time.perf_counter(), time.process_time()
        state, _ = iterate(state)
        wall.append(time.perf_counter() - clocks[0])
        cpu.append(time.process_time() - clocks[1])
    result: dict[str, Any] = {
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "traffic": {
            "total": sum(c.total for c in counted),
            "sent": {k: sum(c.sent[k] for c in counted) for k in collectives.KINDS},
            "calls": {k: sum(c.calls[k] for c in counted) for k in collectives.KINDS},
            "unbounded_calls": sum(c.unbounded for c in counted),
        },
    }
    if wall:
        rate = spec["steps"] * batch_size / statistics.median(wall)
        result |= {
            "seconds": statistics.median(wall),
            "seconds_range": [min(wall), max(wall)],
            "cpu_seconds_of_process_0": statistics.median(cpu),
            "examples_per_second": rate,
        }
    if number == 0:
        (Path(spec["folder"]) / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _phase(
    config: Config, shape: tuple[int, ...], examples: int, batch_size: int
) -> tuple[Method, Phase]:
    """The method for such data, and its last phase."""
    method = trained.build(config, DataSpec(shape, examples, batch_size))
    return method, list(method.phases.values())[-1]


# -- predicted --


def predict(config: Config, *, chips: int) -> dict[str, Any]:
    """Seconds per EM iteration on ImageNet-sized data, see docs/scaling.md.

    Returns:
        Counts, and for each assumed utilisation of the chips' peak the seconds of every part.
    """
    batch_size = config.train.batch_size
    if hasattr(config.method, "dtype"):
        # What a TPU is good at; and wide float32 convolutions may be calls of a library on this
        # CPU, whose operations nobody counts.
        config = dataclasses.replace(
            config, method=dataclasses.replace(config.method, dtype="bfloat16")
        )
    method, phase = _phase(config, PIXELS, IMAGENET, batch_size)
    steps = IMAGENET // batch_size
    small = 8  # operations are proportional to the examples of a batch
    batch: Batch = {
        "image": jnp.zeros((small, *PIXELS)),
        "index": jnp.arange(small),
        "weight": jnp.ones(small),
    }
    key = jax.random.key(0)
    state = engine.state_template(method, phase, key, batch)
    assert phase.refresh is not None
    collect = phase.refresh.collect
    step = jax.jit(lambda s, b: engine.train_step(phase, s, b, key)).lower(state, batch)
    sweep = jax.jit(lambda s, b: collect(s.ema_params, s.cluster, b, key)).lower(state, batch)
    flops = {
        "step": (step.cost_analysis() or {})["flops"] / small,
        "sweep": (sweep.cost_analysis() or {})["flops"] / small,
    }
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    features = jax.tree.leaves(jax.eval_shape(collect, state.ema_params, state.cluster, batch, key))
    width = max(math.prod(x.shape[1:]) for x in features)
    # Per device: all gradients; every device's part of every batch; K (d + d + 1) statistics.
    gradients, images = 4 * params, batch_size * math.prod(PIXELS)
    statistic = 4 * config.method.num_clusters * (2 * width + 1)
    rounds = getattr(config.method, "mixture_iterations", 1)
    network = {
        "gradients": steps * _all_reduce(gradients, chips),
        "images": steps * _all_reduce(images, chips) / 2,
        "statistics": rounds * _all_reduce(statistic, chips),
    }
    counts = {
        "parameters": params,
        "flops_per_example": flops,
        "steps": steps,
        "bytes_per_step": {"gradients": gradients, "images": images},
        "bytes_per_e_step": rounds * statistic,
        "resident_bytes_per_chip": IMAGENET * math.prod(PIXELS) / chips,
    }
    seconds = []
    for used in UTILISATIONS:
        speed = chips * PEAK * used
        m_step = steps * batch_size * flops["step"] / speed
        e_step = IMAGENET * flops["sweep"] / speed
        total = m_step + e_step + sum(network.values())
        row = {"utilisation": used, "m_step_compute": m_step, "e_step_compute": e_step}
        seconds.append(row | {"network": network, "total": total})
    return {"chips": chips, "batch_size": batch_size, "counts": counts, "seconds": seconds}


def _all_reduce(size: float, chips: int) -> float:
    """Seconds in which every chip of a square torus has the sum of all chips' ``size`` bytes.

    Both directions of both axes are used, and a chip must send every byte twice but for its own.
    """
    hops = 4 * (math.isqrt(chips) // 2)
    return 2 * size * (chips - 1) / chips / LINKS + hops * LATENCY


if __name__ == "__main__":
    run()
