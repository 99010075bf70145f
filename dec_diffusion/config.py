"""Typed configuration: what a config file returns, its checks, and how it goes to JSON and back."""

import dataclasses
import difflib
import importlib
import inspect
import math
import numbers
import re
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from dec_diffusion.data import DataConfig
from dec_diffusion.method import DataSpec, Method
from dec_diffusion.types import AUTO, Count, InputError


class MethodConfig(Protocol):
    """The settings of a method: a dataclass in ``dec_diffusion.methods`` that can build it."""

    num_clusters: Count

    def build(self, spec: DataSpec) -> Method:
        """Make the method for data of this shape and size; raises InputError on bad settings."""
        ...


@dataclasses.dataclass
class TrainConfig:
    """What the host loop does.

    Only ``batch_size`` decides what is learnt. ``sweep_size`` names the random numbers of methods
    that draw in a sweep; ``resident_gib`` and ``shard_params`` change results by rounding.

    Attributes:
        batch_size: examples per gradient step; all of them where they are fewer.
        sweep_size: examples per batch where the whole data set is swept in order.
        evaluate_every: iterations between evaluations (a sweep and label-free scores).
        checkpoint_every: iterations between checkpoints; one is always made at the end.
        keep_checkpoints: how many of the newest checkpoints stay on disk.
        resident_gib: data up to this size (in GiB) are kept on the devices, spread over them;
            larger data are streamed from the host, with the same result to rounding.
        shard_params: spread large arrays of weights and of the optimiser's state over the devices
            instead of keeping all on each: saves memory, costs traffic in every step.
    """

    batch_size: int = 128
    sweep_size: int = 512
    evaluate_every: int = 5
    checkpoint_every: int = 5
    keep_checkpoints: int = 2
    resident_gib: float = 2.0
    shard_params: bool = False

    def batch(self, num_examples: int) -> int:
        """How many of so many examples a gradient step sees."""
        return min(self.batch_size, num_examples)


@dataclasses.dataclass
class Config:
    """A run.

    Attributes:
        name: of the run; ``runs/<name>`` is its workdir unless ``--workdir`` says otherwise.
        method: settings of the method, one of the dataclasses in ``dec_diffusion.methods``.
        data: which examples to cluster.
        train: settings of the host loop.
        seed: everything random is derived from it.
        pretrained: for methods that can start from a denoiser (DiEC): the workdir of a run that
            trained one, or a folder of Hugging Face diffusers with a ``UNet2DModel``.
    """

    name: str
    method: Any
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    seed: int = 0
    pretrained: str = ""


Variants = dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]
"""Of each variant of a config file what differs from the default settings: of the method, the data
and the training."""


def of_variant(name: str, method: Callable[..., Any], variants: Variants, variant: str) -> Config:
    """One of the variants of a config file.

    Args:
        name: of the file, without its ending.
        method: the dataclass of the method's settings.
        variants: by their names.
        variant: the one that was asked for.

    Raises:
        InputError: there is no such variant.
    """
    if variant not in variants:
        raise InputError(
            f"--config={name}:{variant}: no such variant; choose one of {', '.join(variants)}"
        )
    of_method, of_data, of_training = variants[variant]
    return Config(
        name=f"{name}-{variant}",
        method=method(**of_method),
        data=DataConfig(**of_data),
        train=TrainConfig(**of_training),
    )


RESUMABLE = (
    "data.cache",
    "data.kind",
    "train.evaluate_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.shard_params",
)
"""Fields that may change when a run is resumed: they change no weight and no assignment."""


def check(config: Config) -> None:
    """Check what can be checked before any data are read: types, and ranges of host settings.

    Raises:
        InputError: naming the first field that cannot work and the remedy.
    """
    if not dataclasses.is_dataclass(config.method):
        kind = type(config.method).__name__
        raise InputError(
            f"--config.method: {kind} holds no settings of a method; give a class of "
            "dec_diffusion.methods, say neural_mixture.NeuralMixture(num_clusters=12)"
        )
    hints = _hints(config)
    for name, value in flatten(config).items():
        if not _fits(value, hints[name]):
            raise InputError(f"--config.{name}={value}: must be {_expected(hints[name])}")
    if not config.name:
        raise InputError("--config.name=: must not be empty; it names the run")
    for name, value in flatten(config.train).items():
        least = 0 if name in ("resident_gib", "shard_params") else 1
        if value < least:
            raise InputError(f"--config.train.{name}={value}: must be at least {least}")
    if config.pretrained and not getattr(config.method, "PRETRAINED", ()):
        raise InputError(
            f"--config.pretrained={config.pretrained}: {config.name} starts from no denoiser; "
            "leave it out, or use configs/diec.py"
        )
    if not 0 <= config.seed < 2**32:
        raise InputError(f"--config.seed={config.seed}: must lie between 0 and {2**32 - 1}")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The fields of a dataclass and of those within it, by dotted name."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def explain(config: Any, prefix: str = "") -> dict[str, str]:
    """What each field is for, by dotted name: what its docstring says, and what it may be."""
    said, hints = attributes(type(config)), get_type_hints(type(config), include_extras=True)
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= explain(value, f"{prefix}{field.name}.")
        else:
            about = said.get(field.name, "").rstrip(".")
            found[prefix + field.name] = f"{about} ({_expected(hints[field.name])})".strip()
    return found


def attributes(kind: type) -> dict[str, str]:
    """The section "Attributes" of a docstring, a text for each name."""
    found: dict[str, str] = {}
    names, section = [], (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    indent = len(section) - len(section.lstrip())
    for line in section.splitlines():
        start = re.match(rf" {{{indent}}}(\w[\w, ]*): (.*)", line)
        names = start[1].split(", ") if start else names
        for name in names:
            found[name] = f"{found.get(name, '')} {start[2] if start else line.strip()}".strip()
    return found


def override(config: Config, name: str, text: str | None) -> Config:
    """The config with one field changed, as the command line asks.

    Args:
        config: stays as it is.
        name: of the field, dotted.
        text: its value, in the syntax of the command line: ``none`` where the field may be unset,
            a tuple as ``1,2,4``; None means true.

    Raises:
        InputError: no such field, or a value of another type.
    """
    hints = _hints(config)
    if name not in hints:
        raise InputError(f"--config.{name}: no such field; {_suggest(name, list(hints))}")
    if text is None and hints[name] is not bool:
        raise InputError(f"--config.{name} needs a value, --config.{name}=...")
    try:
        value = _from_text("true" if text is None else text.strip(), hints[name])
        if not _fits(value, hints[name]):
            raise ValueError
    except ValueError:
        raise InputError(f"--config.{name}={text}: must be {_expected(hints[name])}") from None
    return _replace(config, name.split("."), value)


def resolved(config: Config, num_clusters: int) -> Config:
    """The config with this number of clusters if it leaves them to be chosen, else as it is."""
    if config.method.num_clusters != AUTO:
        return config
    return _replace(config, ["method", "num_clusters"], num_clusters)


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
        module, _, name = str(method.pop("is", "")).partition(":")
        # A config.json may come from anywhere: it must not choose what is imported and called.
        if not module.startswith("dec_diffusion.methods."):
            raise ValueError(f"unknown method {module}")
        kind = getattr(importlib.import_module(module), name)
        if not dataclasses.is_dataclass(kind) or kind.__module__ != module:
            raise ValueError(f"unknown method {module}:{name}")
        parts = {
            "method": _fill(kind, method),
            "data": _fill(DataConfig, plain["data"]),
            "train": _fill(TrainConfig, plain["train"]),
        }
        return Config(**{**plain, **parts})
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise InputError(
            f"config.json does not fit this version of dec_diffusion ({reason}); "
            "use the version that made the run, or train again in a new --workdir"
        ) from error


def _fill(kind: Any, values: dict[str, Any]) -> Any:
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _replace(record: Any, names: list[str], value: Any) -> Any:
    first, *rest = names
    new = _replace(getattr(record, first), rest, value) if rest else value
    return dataclasses.replace(record, **{first: new})


def _suggest(name: str, known: list[str]) -> str:
    ends = {k.rpartition(".")[2]: k for k in known}
    end = name.rpartition(".")[2]
    # The right field in the wrong group, a slip in the whole name, or a slip and no group.
    near = [ends[end]] if end in ends else difflib.get_close_matches(name, known, 1, cutoff=0.7)
    near = near or [ends[e] for e in difflib.get_close_matches(end, ends, 1)]
    return f"did you mean --config.{near[0]}?" if near else "--config=... --help lists the fields"


# -- types of fields --


def _hints(config: Any, prefix: str = "") -> dict[str, Any]:
    """The type of every field that ``flatten`` gives."""
    hints, own = {}, get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            hints |= _hints(value, f"{name}.")
        else:
            hints[name] = own[field.name]
    return hints


def _optional(hint: Any) -> Any:
    """``T`` of ``T | None``, else None."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(h for h in get_args(hint) if h is not types.NoneType)
    return None


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        return value == AUTO or _fits(value, get_args(hint)[0])
    if inner := _optional(hint):
        return value is None or _fits(value, inner)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(v, get_args(hint)[0]) for v in value)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    return hint is Any or isinstance(value, hint)


def _from_text(text: str, hint: Any) -> Any:
    """The value that a text means; raises ValueError if it has none of this type."""
    if get_origin(hint) is Annotated:
        return AUTO if text.lower() == AUTO else _from_text(text, get_args(hint)[0])
    if inner := _optional(hint):
        return None if text.lower() == "none" else _from_text(text, inner)
    if get_origin(hint) is tuple:
        inside = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
        items = inside.split(",")
        return tuple(_from_text(i.strip(), get_args(hint)[0]) for i in items if i.strip())
    if hint is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        return words.get(text.lower())
    return hint(text) if hint in (int, float) else text


def _expected(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        return f"{_expected(get_args(hint)[0])}, or {AUTO}"
    if inner := _optional(hint):
        return f"{_expected(inner)}, or none"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is tuple:
        return f"{_expected(get_args(hint)[0])}, or several with commas between"
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    return words.get(hint, str(hint))
