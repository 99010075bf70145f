"""Typed configuration: what a config file returns, and how it goes to JSON and back."""

import dataclasses
import importlib
import math
from typing import Any, Protocol

from dec_diffusion.data import DataConfig
from dec_diffusion.method import DataSpec, Method
from dec_diffusion.types import InputError


class MethodConfig(Protocol):
    """The settings of a method: a dataclass in ``dec_diffusion.methods`` that can build it."""

    num_clusters: int

    def build(self, spec: DataSpec) -> Method:
        """Make the method for data of this shape and size; raises InputError on bad settings."""
        ...


@dataclasses.dataclass
class TrainConfig:
    """What the host loop does; nothing here but ``batch_size`` changes a weight.

    Attributes:
        batch_size: examples per gradient step.
        sweep_size: examples per batch where the whole data set is swept in order.
        evaluate_every: iterations between evaluations (a sweep and label-free scores).
        checkpoint_every: iterations between checkpoints; one is always made at the end.
        keep_checkpoints: how many of the newest checkpoints stay on disk.
        resident_gib: data up to this size (in GiB) are kept on the device; larger data are
            streamed from the host, with the same result.
    """

    batch_size: int = 128
    sweep_size: int = 512
    evaluate_every: int = 5
    checkpoint_every: int = 5
    keep_checkpoints: int = 2
    resident_gib: float = 2.0


@dataclasses.dataclass
class Config:
    """A run.

    Attributes:
        name: of the run; ``runs/<name>`` is its workdir unless ``--workdir`` says otherwise.
        method: settings of the method, one of the dataclasses in ``dec_diffusion.methods``.
        data: which examples to cluster.
        train: settings of the host loop.
        seed: everything random is derived from it.
    """

    name: str
    method: Any
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    seed: int = 0


RESUMABLE = ("train.evaluate_every", "train.checkpoint_every", "train.keep_checkpoints")
"""Fields that may change when a run is resumed: they change no weight and no assignment."""


def check(config: Config) -> None:
    """Check what can be checked before any data are read.

    Raises:
        InputError: naming the first field that cannot work and the remedy.
    """
    for field in dataclasses.fields(config.train):
        value = getattr(config.train, field.name)
        if not value > 0 or not math.isfinite(value):
            raise InputError(f"--config.train.{field.name}={value}: must be greater than 0")
    if config.seed < 0:
        raise InputError(f"--config.seed={config.seed}: must be 0 or greater")


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionaries of plain values, with the method's module beside its settings."""
    plain = dataclasses.asdict(config)
    kind = type(config.method)
    plain["method"] = {"is": f"{kind.__module__}:{kind.__qualname__}", **plain["method"]}
    return plain


def from_dict(plain: dict[str, Any]) -> Config:
    """The inverse of ``to_dict``.

    Raises:
        InputError: if ``plain`` was not written by this version of the package.
    """
    try:
        method = dict(plain["method"])
        module, _, name = method.pop("is").partition(":")
        if not module.startswith("dec_diffusion.methods."):
            raise ValueError(f"unknown method {module}")
        kind = getattr(importlib.import_module(module), name)
        return Config(
            name=plain["name"],
            method=_fill(kind, method),
            data=_fill(DataConfig, plain["data"]),
            train=_fill(TrainConfig, plain["train"]),
            seed=plain["seed"],
        )
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"config.json does not fit this version of dec_diffusion ({error}); "
            "use the version that made the run, or train again in a new --workdir"
        ) from error


def _fill(kind: Any, values: dict[str, Any]) -> Any:
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**tuples)
