"""The host loop: load, resume, run the phases, checkpoint, report.

``fit`` is what the command line calls, and ``_run`` is the EM loop; what one iteration computes
is ``engine.iteration``, and what is done with a run afterwards is ``trained``.
"""

import contextlib
import dataclasses
import os
import time
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from dec_diffusion import config as configs
from dec_diffusion import data as sources
from dec_diffusion import (
    distributed,
    engine,
    evaluate,
    loggers,
    num_clusters,
    parallel,
    placement,
    reading,
    results,
    workdir,
)
from dec_diffusion.checkpoints import Checkpoints, NoCheckpoints
from dec_diffusion.config import Config
from dec_diffusion.data import Dataset
from dec_diffusion.engine import TrainState
from dec_diffusion.interrupt import Stop, StoppedError
from dec_diffusion.method import DataSpec, Method, Phase, Pretrained
from dec_diffusion.progress import Progress
from dec_diffusion.trained import Run, about_data, build, kept_number, prepare, read_pretrained
from dec_diffusion.types import AUTO, InputError, PRNGKeyArray


class NonFiniteLossError(FloatingPointError):
    """Training produced NaN or infinity; the message says where, and what to do."""


class EmptyClusterWarning(UserWarning):
    """Some clusters have no members: the method found fewer groups than it was asked for."""


class CollapseWarning(UserWarning):
    """Nearly all examples are in one cluster."""


_COLLAPSED = 0.9
"""Share of the examples in one cluster above which a clustering has collapsed."""


class Result(NamedTuple):
    """What ``fit`` returns; the same is in the workdir. Without one, ``summary`` is empty."""

    run: Run
    dataset: Dataset
    assignment: evaluate.Assignment
    summary: dict[str, Any]
    history: list[dict[str, Any]]


def fit(
    config: Config,
    path: str | os.PathLike[str] | None,
    *,
    dataset: Dataset | None = None,
    logger: str = "none",
    verbose: int = 1,
    stop: Stop | None = None,
) -> Result:
    """Train, or go on training, and leave everything a run leaves in its workdir.

    A run that is complete is left as it is.

    Args:
        config: the run.
        path: its workdir; one that already holds this run is resumed. None leaves nothing.
        dataset: what to cluster, if it is in memory already and not what ``config.data`` names.
        logger: what to report to beside the files of the workdir: ``none``, or ``tensorboard``,
            which needs a workdir.
        verbose: 0 is silent, 1 reports on standard output.
        stop: once one process was asked to stop, all save a checkpoint after the iteration under
            way, and end.

    Several processes that have started ``jax.distributed`` all call this, with the same arguments;
    process 0 reports and writes, and all of them need to see ``path``.

    Raises:
        InputError: bad settings, data or workdir, found before any training; later only a
            checkpoint that cannot be written.
        StoppedError: the run was asked to stop.
        NonFiniteLossError: the loss became NaN or infinite; earlier checkpoints stay.
    """
    started = time.monotonic()
    configs.check(config)
    loggers.check(logger)
    if not distributed.is_first():
        verbose, logger = 0, "none"
    with distributed.together("setup"):
        # A scan over K may begin at 1, a run of the command line has something to find.
        least = 2 if dataset is None else 1
        dataset = reading.read(config.data, verbose=verbose) if dataset is None else dataset
        # All other settings are checked before K is chosen: any K that the data allow will do.
        asked, config = config, configs.resolved(config, 2)
        sources.check_clusters(dataset, config.method.num_clusters, least=least)
        sources.warn_of_rounding(dataset)
        n = dataset.num_examples
        spec = DataSpec(dataset.example_shape, n, config.train.batch(n))
        spec = spec._replace(pretrained=read_pretrained(config, spec))
        method = build(config, spec)
    reading.check_same(dataset)
    with distributed.together("workdir"):
        place = workdir.Memory()
        if path is not None:
            place = workdir.open_workdir(path, configs.to_dict(asked), ignore=configs.RESUMABLE)
    with contextlib.ExitStack() as held:
        with distributed.together("shared"):
            if isinstance(place, workdir.Workdir):
                workdir.check_shared(place)
            held.enter_context(place.locked())
        return _fit(
            asked, spec, method, dataset, place, started, logger=logger, verbose=verbose, stop=stop
        )


def _fit(
    asked: Config,
    spec: DataSpec,
    method: Method,
    dataset: Dataset,
    place: workdir.Workdir | workdir.Memory,
    started: float,
    *,
    logger: str,
    verbose: int,
    stop: Stop | None,
) -> Result:
    """``fit``, once everything that can be checked is, in a workdir that no other process uses."""
    config = asked
    if asked.method.num_clusters == AUTO:
        own = _choose(dataset, asked.seed, place, verbose=verbose) if distributed.is_first() else 0
        chosen = int(distributed.exchange("number of clusters", str(own))[0])
        config = configs.resolved(asked, chosen)
        method = build(config, spec)
    data = prepare(dataset, config)
    assign = evaluate.compile_assign(method, data, jax.random.key(config.seed))
    stop = stop or Stop()
    with (
        loggers.start(logger, None if isinstance(place, workdir.Memory) else place.path) as log,
        place.checkpoints(keep=config.train.keep_checkpoints) as checkpoints,
        stop.deferred(),
    ):
        job = _Job(config, spec, method, dataset, data, assign, place, checkpoints, log)
        state, step, trained = _run(job, verbose=verbose, stop=stop)
    offset, scale = np.asarray(dataset.offset), np.asarray(dataset.scale)
    assignment = assign(state)
    # What follows is the work of one process, on one of its devices.
    run = Run(config, spec, method, placement.local(state), offset, scale, step, dataset.columns)
    if isinstance(place, workdir.Memory):
        return Result(run, dataset, assignment, {}, place.read_metrics())
    summary: dict[str, Any] = {}
    with distributed.wait_for_results():
        if distributed.is_first():
            summary = _report(run, dataset, assignment, place, trained, started, verbose)
    return Result(run, dataset, assignment, summary, place.read_metrics())


class _Job(NamedTuple):
    """What is trained on which data, and where that leaves its traces."""

    config: Config
    spec: DataSpec
    method: Method
    dataset: Dataset
    data: parallel.Data
    assign: evaluate.Assign
    place: workdir.Workdir | workdir.Memory
    checkpoints: Checkpoints | NoCheckpoints
    log: loggers.Logger


def _run(job: _Job, *, verbose: int, stop: Stop) -> tuple[TrainState, int, bool]:
    """Run all phases, from wherever the last checkpoint left off.

    Returns:
        The state, its step, and whether there was anything left to do.

    Raises:
        StoppedError: the run was asked to stop; a checkpoint has been saved.
    """
    spec, method, data, settings = job.spec, job.method, job.data, job.config.train
    key, shard = jax.random.key(job.config.seed), settings.shard_params
    dataset = job.dataset
    # The checksum of some where there are too many to read them all at every start.
    crc32 = reading.checksum(dataset.examples, sampled=not data.resident)
    about = about_data(spec, dataset.offset, dataset.scale, dataset.columns, crc32=crc32)
    state, step, after = _start(method, key, parallel.first_batch(data), job.checkpoints, about)
    if after is None and spec.pretrained:
        state = _begin_with(state, spec.pretrained)
    state = placement.place_state(state, num_rows=data.rows.size, shard_params=shard)
    job.place.truncate_metrics(step)
    job.log.replay(job.place.read_metrics())
    resumed_at = step
    total = sum(phase.iterations * phase.steps for phase in method.phases.values())
    progress = Progress(total, step, silent=not verbose)
    complete = next(_remaining(method, after), None) is None
    progress.note(_opening(job, step, total, complete=complete))

    for number, name, phase, first in _remaining(method, after):
        phase_key = jax.random.fold_in(key, number + 1)
        begin, iterate = parallel.compile_phase(
            phase, data, phase_key, batch_size=spec.batch_size, shard_params=shard
        )
        begun: dict[str, np.ndarray] = {}
        if first == 0:
            if phase.begin is not None:
                # It looks at all examples, which can take as long as the phase before.
                progress.note(f"{name}: looking at all examples to begin with ...")
            state, begun = begin(state)
            begun.pop("converged", None)
        scores: dict[str, float] = {}
        for iteration in range(first + 1, phase.iterations + 1):
            start = time.monotonic()
            state, metrics = iterate(state)
            seconds = time.monotonic() - start
            _check_finite(metrics, state, name, step, job.checkpoints)
            step += phase.steps
            settled = bool(metrics.pop("converged", 0))
            last, fresh = settled or iteration == phase.iterations, {}
            if phase.assigns and (last or iteration % settings.evaluate_every == 0):
                scores = fresh = _scores(job, state, step)
            rate = phase.steps * spec.batch_size / seconds
            # What was found on entering the phase stands in its first record.
            record = {k: float(np.mean(v)) for k, v in (begun | metrics).items()} | fresh
            begun = {}
            record = {"step": step, "phase": name, "iteration": iteration} | record
            record |= {"seconds": seconds, "examples_per_second": rate}
            job.place.append_metrics(record)
            job.log.write(record)
            stopping = distributed.any_process(stop.asked())
            if last or stopping or iteration % settings.checkpoint_every == 0:
                # A phase that ended early has nothing left to resume.
                at = {"phase": name, "iteration": phase.iterations if last else iteration}
                job.checkpoints.save(step, placement.whole(state), at | about)
            where = f"{name} {iteration}/{phase.iterations}" + ", settled" * settled
            progress.update(step, where, record | scores, rate)
            if stopping and step < total:
                job.checkpoints.wait()
                raise StoppedError(
                    f"stopped at step {step:,} of {total:,}, as asked; the same command goes on"
                )
            if last:
                break
    return state, step, step > resumed_at


def _scores(job: _Job, state: TrainState, step: int) -> dict[str, float]:
    """How the data are clustered now: a sweep by all processes, figures in the first."""
    assignment, k = job.assign(state), job.config.method.num_clusters
    if not distributed.is_first():
        return {}
    scores = evaluate.score(assignment, k, job.dataset.labels)
    _warn_of_sizes(scores, k, step)
    return scores


def _start(
    method: Method,
    key: PRNGKeyArray,
    batch: Any,
    checkpoints: Checkpoints | NoCheckpoints,
    about: dict[str, Any],
) -> tuple[TrainState, int, tuple[str, int] | None]:
    """A fresh state, or the newest checkpoint with its step and (phase, iteration).

    Raises:
        InputError: the data are not those that the checkpoint was trained on.
    """

    def template(meta: dict[str, Any]) -> Any:
        return engine.state_template(method, method.phases[meta["phase"]], key, batch)

    restored = checkpoints.restore_latest(template)
    if restored is None:
        return engine.init_state(method, key, batch), 0, None
    if restored.meta["crc32"] != about["crc32"]:
        raise InputError(
            "--config.data: the examples are not those that this run was trained on (their "
            "checksum differs); restore them, or train in a new --workdir"
        )
    return restored.state, restored.step, (restored.meta["phase"], restored.meta["iteration"])


def _begin_with(state: TrainState, pretrained: Pretrained) -> TrainState:
    """A fresh state with the parameters that are given.

    Raises:
        InputError: they have other shapes than the method's.
    """

    def shapes(tree: Any) -> Any:
        return jax.tree.map(np.shape, tree)

    for name, given in pretrained.params.items():
        if shapes(given) != shapes(state.params[name]):
            raise InputError("--config.pretrained: its weights do not fit these data and settings")
    given = jax.tree.map(jax.numpy.asarray, dict(pretrained.params))
    params = {**state.params, **given}
    return dataclasses.replace(state, params=params, ema_params=params)


def _remaining(
    method: Method, after: tuple[str, int] | None
) -> Iterator[tuple[int, str, Phase, int]]:
    """The phases still to run: their number, name, record, and iterations already done."""
    names = list(method.phases)
    at = names.index(after[0]) if after else -1
    for number, (name, phase) in enumerate(method.phases.items()):
        if number > at:
            yield number, name, phase, 0
        elif number == at and after and after[1] < phase.iterations:
            yield number, name, phase, after[1]


def _choose(
    dataset: Dataset, seed: int, place: workdir.Workdir | workdir.Memory, *, verbose: int
) -> int:
    """The number of clusters that the workdir holds, or a choice that is then kept there."""
    kept = place.read_json(num_clusters.CHOICE)
    if kept is not None:
        return kept_number(kept, place.path)
    if verbose:
        print("choosing the number of clusters ...", flush=True)
    choice = num_clusters.choose(
        dataset.examples, offset=dataset.offset, scale=dataset.scale, seed=seed
    )
    place.write_json(num_clusters.CHOICE, choice._asdict())
    if verbose:
        print(num_clusters.describe(choice), flush=True)
    return choice.chosen


def _check_finite(
    metrics: dict[str, np.ndarray],
    state: TrainState,
    phase: str,
    step: int,
    checkpoints: Checkpoints | NoCheckpoints,
) -> None:
    finite = np.isfinite(metrics["loss"]) & np.isfinite(metrics["grad_norm"])
    if finite.all():
        # The last step may have broken the weights after its loss was computed.
        if _all_finite((state.params, state.ema_params)):
            return
        finite[-1] = False
    checkpoints.wait()
    good = checkpoints.steps()
    last = f"the last good checkpoint is step {good[-1]}" if good else "there is no checkpoint yet"
    raise NonFiniteLossError(
        f"loss, gradient or weights are not finite at step {step + int(np.argmin(finite)) + 1} "
        f"(phase {phase}); {last}; lower --config.method.learning_rate or --config.method.clip, "
        "or look for extreme values in the data, and train in a new --workdir"
    )


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    # One long vector compiles six times sooner than a reduction for every leaf.
    return jax.numpy.isfinite(ravel_pytree(tree)[0]).all()


def _warn_of_sizes(scores: dict[str, float], num_clusters: int, step: int) -> None:
    found, largest = int(scores["clusters_nonempty"]), scores["largest_share"]
    if num_clusters > 1 and largest > _COLLAPSED:
        warnings.warn(
            f"step {step}: one of {num_clusters} clusters holds {largest:.0%} of the examples; if "
            "it stays so, try another --config.seed, or look for extreme examples in the data",
            CollapseWarning,
            stacklevel=2,
        )
    if found < num_clusters:
        warnings.warn(
            f"step {step}: {num_clusters - found} of {num_clusters} clusters are empty; if they "
            "stay so, ask for fewer with --config.method.num_clusters, or train longer",
            EmptyClusterWarning,
            stacklevel=2,
        )


def _opening(job: _Job, step: int, total: int, *, complete: bool) -> str:
    device, dataset = jax.devices()[0], job.dataset
    shape = "x".join(map(str, dataset.example_shape))
    where = "on the device" if job.data.resident else "streamed from the host"
    start = f"resuming at step {step:,} of {total:,}" if step else f"{total:,} steps"
    if complete:
        start = f"complete after {step:,} steps"
    return (
        f"{job.config.name}: {dataset.num_examples:,} examples of {shape} ({dataset.name}, "
        f"{where}), {job.config.method.num_clusters} clusters, "
        f"{len(jax.devices())} {device.platform} device(s)\n"
        f"workdir {job.place.path}: {start}"
    )


def _report(
    run: Run,
    dataset: Dataset,
    assignment: evaluate.Assignment,
    place: workdir.Workdir,
    trained: bool,
    started: float,
    verbose: int,
) -> dict[str, Any]:
    """Write the results, unless they are there, and print them."""
    summary = None if trained else results.read(place)
    if summary is None:
        if verbose:
            print("comparing with baselines and drawing pictures ...", flush=True)
        summary = results.write(run, dataset, assignment, place, home=place, started=started)
    if verbose:
        print(results.describe(summary, place.path), flush=True)
    return summary
