"""A trained run: its method, built, loaded, saved, and applied to data.

What `train.fit` ends with, and all that prediction, sampling and another training that starts from
it need; nothing here trains.
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dec_diffusion import config as configs
from dec_diffusion import data as sources
from dec_diffusion import engine, evaluate, num_clusters, parallel, workdir
from dec_diffusion.checkpoints import Checkpoints
from dec_diffusion.config import Config
from dec_diffusion.data import Dataset
from dec_diffusion.data.shards import bounded
from dec_diffusion.engine import TrainState
from dec_diffusion.method import DataSpec, Method, Pretrained
from dec_diffusion.networks import diffusers
from dec_diffusion.types import AUTO, InputError

_UNITS = 2.0
"""How many times wider or narrower values must range to be taken for other units."""
_UNITS_OF_FEW = 8.0
"""How many times narrower those of a few images, which may all be dim."""
_FEW = 100


class Run(NamedTuple):
    """A trained method, ready to predict and to sample.

    Attributes:
        config: as it was trained.
        spec: shape and number of the training examples.
        method: the method built for that shape.
        state: weights (``ema_params`` are the ones to use) and mixture.
        offset: of the training data; new data go through the same scaling.
        scale: likewise.
        step: gradient steps taken.
        columns: the names of the features, where it was trained on a table that names them.
    """

    config: Config
    spec: DataSpec
    method: Method
    state: TrainState
    offset: np.ndarray
    scale: np.ndarray
    step: int
    columns: tuple[str, ...] | None = None


def build(config: Config, spec: DataSpec) -> Method:
    """The method; the same one for the same settings and shapes, with its compiled programs."""
    if spec.pretrained:
        return config.method.build(spec)
    return _built(type(config.method), tuple(configs.flatten(config.method).items()), spec)


@functools.lru_cache(maxsize=4)
def _built(kind: type[Any], settings: tuple[tuple[str, Any], ...], spec: DataSpec) -> Method:
    return kind(**dict(settings)).build(spec)


def load(path: str | os.PathLike[str], *, clusters: bool = True) -> Run:
    """The trained method of a workdir, from its newest intact checkpoint.

    Args:
        path: the workdir.
        clusters: whether the run must have clusters already, and a warning is due where its
            training is not complete; without them it is of use for its denoiser alone.

    Raises:
        InputError: there is no run in ``path``, no checkpoint, none that is intact, or no clusters.
    """
    config = configs.from_dict(workdir.read_config(path))
    place = workdir.Workdir(workdir.locate(path))
    if config.method.num_clusters == AUTO:
        config = configs.resolved(config, kept_number(place.read_json(num_clusters.CHOICE), path))
    folder = place.path / workdir.CHECKPOINTS
    built: dict[str, Any] = {}

    def template(meta: dict[str, Any]) -> Any:
        shape, num_examples = tuple(meta["shape"]), meta["num_examples"]
        spec = DataSpec(shape, num_examples, config.train.batch(num_examples))
        if config.pretrained:
            spec = spec._replace(pretrained=Pretrained({}, meta["architecture"]))
        built.update(spec=spec, method=build(config, spec))
        batch = {
            "image": np.zeros((1, *spec.shape), np.float32),
            "index": np.zeros(1, np.int32),
            "weight": np.ones(1, np.float32),
        }
        phase = built["method"].phases[meta["phase"]]
        return engine.state_template(built["method"], phase, jax.random.key(config.seed), batch)

    with Checkpoints(folder, read_only=True) as checkpoints:
        restored = checkpoints.restore_latest(template)
    if restored is None:
        raise InputError(f"--workdir={path} has no checkpoint yet; let its run reach one first")
    if clusters:
        _check_complete(path, built["method"], restored.meta["phase"], restored.meta["iteration"])
    offset, scale = (np.asarray(restored.meta[name], np.float32) for name in ("offset", "scale"))
    state = jax.tree.map(jax.numpy.asarray, restored.state)
    columns = restored.meta.get("columns")
    columns = None if columns is None else tuple(columns)
    return Run(config, built["spec"], built["method"], state, offset, scale, restored.step, columns)


def _check_complete(path: Any, method: Method, name: str, iteration: int) -> None:
    """Refuse a checkpoint that is older than the first clusters; warn of unfinished training."""
    phase = method.phases[name]
    if not phase.assigns:
        raise InputError(
            f"--workdir={path}: its training stopped in {name}, before it had any clusters; give "
            "the command that began it again, which goes on from there"
        )
    if name != list(method.phases)[-1] or iteration < phase.iterations:
        warnings.warn(
            f"{path}: its training stopped after iteration {iteration} of {phase.iterations} of "
            f"{name}; the command that began it goes on from there",
            stacklevel=3,
        )


def save(run: Run, path: str | os.PathLike[str]) -> workdir.Workdir:
    """Write a trained method to a new workdir, for ``load`` and for prediction, not for training.

    Raises:
        InputError: ``path`` is in use or cannot be written.
    """
    if (Path(path).expanduser() / workdir.CONFIG).exists():
        raise InputError(f"--workdir={path}: holds a run already; give a new folder")
    place = workdir.open_workdir(path, configs.to_dict(run.config))
    phase, last = list(run.method.phases.items())[-1]
    params = run.state.ema_params
    state = dataclasses.replace(run.state, params=params, opt_state=last.tx.init(params))
    about = about_data(run.spec, run.offset, run.scale, run.columns, crc32=None)
    with place.checkpoints() as checkpoints:
        at = {"phase": phase, "iteration": last.iterations}
        checkpoints.save(run.step, state, at | about)
    return place


def about_data(
    spec: DataSpec, offset: Any, scale: Any, columns: Sequence[str] | None, *, crc32: int | None
) -> dict[str, Any]:
    """What a checkpoint must know of its data: to predict on others, and to resume on these.

    Args:
        spec: their shape and number, and the architecture of a denoiser that was imported.
        offset: of the data, as ``Run`` has it.
        scale: likewise.
        columns: likewise.
        crc32: checksum of the examples; None for a run that is not to be resumed.
    """
    return {
        "architecture": spec.pretrained and spec.pretrained.architecture,
        "shape": spec.shape,
        "num_examples": spec.num_examples,
        "offset": np.asarray(offset),
        "scale": np.asarray(scale),
        "columns": columns,
        "crc32": crc32,
    }


def prepare(dataset: Dataset, config: Config) -> parallel.Data:
    """Put a data set where the engine can reach it, on the device if it fits."""
    resident = dataset.examples.nbytes <= config.train.resident_gib * 2**30
    return parallel.place(
        dataset.examples if resident else bounded(dataset.examples),
        dataset.offset,
        dataset.scale,
        sweep_size=config.train.sweep_size,
        resident=resident,
    )


def assign(run: Run, dataset: Dataset) -> evaluate.Assignment:
    """Assign the examples of a data set, new or not, under the scaling of the training data.

    Raises:
        InputError: its examples have another shape than those of the run.
    """
    dataset = rescaled(run, dataset)
    data = prepare(dataset, run.config)
    return evaluate.compile_assign(run.method, data, jax.random.key(run.config.seed))(run.state)


def rescaled(run: Run, dataset: Dataset) -> Dataset:
    """A data set under the scaling of the training data; raises as ``assign`` does.

    Warns of images whose values seem to be in other units.
    """
    own = sources.with_columns(dataset, run.columns)
    dataset = sources.with_scaling(own, run.offset, run.scale)
    if dataset.example_shape != run.spec.shape:
        raise InputError(
            f"--config.data: examples of {dataset.name} have shape {dataset.example_shape}, the "
            f"run was trained on {run.spec.shape}; give data of that shape"
        )
    apart = float(np.max(own.scale / np.max(run.scale))) if own.is_image else 1.0
    # A constant has no range, whatever its units.
    narrower = _UNITS_OF_FEW if own.num_examples < _FEW else _UNITS
    if not 1 / narrower <= apart <= _UNITS and sources.varies(own.examples):
        warnings.warn(
            f"{own.name}: its values span {_span(own.offset, own.scale)}, those of the "
            f"training data {_span(run.offset, run.scale)}; give data in the same units",
            stacklevel=3,
        )
    return dataset


def _span(offset: Any, scale: Any) -> str:
    return f"{np.min(offset - scale):g} to {np.max(offset + scale):g}"


def read_pretrained(config: Config, spec: DataSpec) -> Pretrained | None:
    """The denoiser that the config names.

    Raises:
        InputError: there is none, or it is for other data or settings.
    """
    path = config.pretrained
    if not path:
        return None
    option = f"--config.pretrained={path}"
    if not (workdir.locate(path) / workdir.CHECKPOINTS).is_dir():
        try:
            imported = diffusers.read(path)
        except InputError as error:
            raise InputError(f"{option}: {error}") from error
        return Pretrained({"denoiser": imported.params}, imported.architecture)
    run = load(path, clusters=False)
    names = getattr(run.config.method, "PRETRAINED", ())
    if not names:
        raise InputError(f"{option}: {run.config.name} has no unconditional denoiser; give another")
    if run.spec.shape != spec.shape:
        raise InputError(
            f"{option}: was trained on examples of shape {run.spec.shape}, these have {spec.shape}"
        )
    own, given = config.method, run.config.method
    if run.spec.pretrained is None:
        for name in names:
            if getattr(own, name) != getattr(given, name):
                raise InputError(
                    f"{option}: was trained with --config.method.{name}={getattr(given, name)}, "
                    f"not {getattr(own, name)}; give that here too"
                )
    architecture = run.spec.pretrained and run.spec.pretrained.architecture
    return Pretrained({"denoiser": run.state.ema_params["denoiser"]}, architecture)


def kept_number(choice: Any, path: Any) -> int:
    """The number of clusters that a run has chosen; raises InputError where there is none.

    ``choice`` is what ``num_clusters.json`` in the workdir ``path`` holds.
    """
    try:
        return int(choice["chosen"])
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"--workdir={path}: its run has not chosen its number of clusters yet, or "
            f"{num_clusters.CHOICE} is damaged; remove it and give the command of the run again"
        ) from None
