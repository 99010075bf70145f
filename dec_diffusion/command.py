"""What the command line does in each mode."""

import contextlib
import dataclasses
import difflib
import errno
import hashlib
import importlib.util
import os
import platform
import textwrap
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from dec_diffusion import config as configs
from dec_diffusion import data, distributed, reading, report, results, seeds, train, workdir
from dec_diffusion.config import Config
from dec_diffusion.data import DataConfig, Dataset, cache
from dec_diffusion.distributed import Pod
from dec_diffusion.evaluate import Assignment
from dec_diffusion.interrupt import Stop
from dec_diffusion.networks import onednn
from dec_diffusion.trained import Run, assign, load, rescaled
from dec_diffusion.types import InputError
from dec_diffusion.workdir import Workdir

if TYPE_CHECKING:
    from dec_diffusion.options import Options


def run(options: "Options") -> None:
    """Carry out a command.

    Raises:
        InputError: anything the user can mend.
        NonFiniteLossError: training failed.
        StoppedError: a signal stopped it.
        LostProcessError: another process of the run is gone.
    """
    started = time.monotonic()
    verbose = 0 if options.quiet else 1
    config = load_config(options)
    configs.check(config)
    path = options.workdir or str(Path("runs") / config.name) + "-seeds" * bool(options.seeds)
    with distributed.joined(Pod(*options.distributed), verbose=bool(verbose)):
        asked = {"mode": options.mode, "workdir": path, "seeds": options.seeds}
        asked |= {f"config.{name}": value for name, value in configs.flatten(config).items()}
        distributed.check_same(asked)
        # Only now: what follows asks for the devices.
        if not _trains_faster_uncached(config):
            _keep_compiled_programs()
        if options.mode == "train":
            _train(options, config, path, verbose)
        else:
            with distributed.wait_for_results():
                _use(options.mode, config, path, started, verbose)


def _train(options: "Options", config: Config, path: str, verbose: int) -> None:
    """Train until done, or until a signal asks to stop."""
    stop, logger = Stop(), options.logger
    with stop.listening():
        if not options.seeds:
            train.fit(config, path, logger=logger, verbose=verbose, stop=stop)
        elif jax.process_count() > 1:
            raise InputError(
                "--seeds: compares runs of one process each; start one run for each seed, with "
                "--config.seed"
            )
        else:
            seeds.fit_seeds(config, path, options.seeds, logger=logger, verbose=verbose, stop=stop)


def _use(mode: str, config: Config, path: str, started: float, verbose: int) -> None:
    """What is done with a trained run: all processes compute, the first writes and speaks."""
    first = distributed.is_first()
    verbose = verbose if first else 0
    trained = _with_settings(load(path), config, path)
    home = Workdir(workdir.locate(path))
    place = Workdir(home.path / mode)
    if mode == "sample":
        said = _sample(trained, place) if first else ""
    else:
        dataset = _dataset(trained, verbose)
        known = results.read_prototypes(home)
        if first:  # now, not after the work: a folder that cannot be made would lose it
            _make(place.path)
        assignment = assign(trained, dataset)
        said = ""
        if first and mode == "predict":
            said = _predict(dataset, assignment, place, known)
        elif first:
            said = _evaluate(trained, dataset, assignment, place, home, known, started)
    if verbose:
        print(said)


def _trains_faster_uncached(config: Config) -> bool:
    """Whether wide convolutions can use oneDNN, which rules out keeping their programs.

    The official network takes 15 seconds to compile on a CPU, and hours to train.
    """
    method: Any = config.method
    wide = getattr(method, "width", 0) >= onednn.LEAST_CHANNELS
    return wide and getattr(method, "network", "") == "official" and onednn.usable()


def _keep_compiled_programs() -> None:
    """Compile each program once per machine, not once per command, unless JAX was told where.

    Compiling is most of the start of a run on a CPU; a resumed run finds its programs here.
    """
    own = cache.user_folder()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and own is not None:
        jax.config.update("jax_compilation_cache_dir", str(own / "jax" / _cpu()))
        # All of them: dozens of small ones add up to a second of every start.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # An entry that a kill cut short is compiled again, and a folder that cannot be written only
    # costs time: neither is anything a person must know at every start.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation")


def _cpu() -> str:
    """A name for this kind of CPU: programs of another, in a home that many share, may not run."""
    about = platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        about += next(line for line in lines if line.startswith(("flags", "Features")))
    return hashlib.sha256(about.encode()).hexdigest()[:8]


def load_config(options: "Options") -> Config:
    """The config that the options name, or that of the run in the workdir, with its overrides.

    Raises:
        InputError: a broken config file, no such variant or field, or a value of another type.
    """
    if options.config is not None:
        config = _config_of_file(options.config, options.variant)
    else:
        config = configs.from_dict(workdir.read_config(options.workdir or ""))
        config = dataclasses.replace(config, data=_other_data(config.data, options.overrides))
    for name, text in options.overrides:
        config = configs.override(config, name, text)
    return config


def _other_data(own: DataConfig, overrides: list[tuple[str, str | None]]) -> DataConfig:
    """The data section of a run, without what was said of its data if others are asked for.

    A ``limit`` of the training data, say, must not cut short the data to predict. But columns that
    were no features of a table are none of another one that has them too.
    """
    changed = dict(overrides)
    if not changed.keys() & {"data.name", "data.path", "data.tfds_name"}:
        return own
    other = DataConfig(cache=own.cache)
    if "data.name" not in changed:
        other = dataclasses.replace(other, name=own.name, path=own.path)
    asked = {name: changed.get(f"data.{name}") for name in ("name", "path")}
    table = dataclasses.replace(other, **{k: v for k, v in asked.items() if v is not None})
    columns = data.column_names(table)
    return dataclasses.replace(
        other,
        label=own.label if own.label in columns else None,
        drop=tuple(name for name in own.drop if name in columns),
    )


def describe(options: "Options") -> str:
    """The fields of a config with their values and meanings, as options of the command line."""
    file = options.config
    assert file is not None
    config = load_config(options)
    variants = _variants(_module(file))
    lines = [f"{file}, variants: {', '.join(variants)}"] if variants else [str(file)]
    about = configs.explain(config)
    for name, value in configs.flatten(config).items():
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        lines.append(f"  --config.{name}={shown}")
        lines += textwrap.wrap(about[name], 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def _config_of_file(file: Path, variant: str | None) -> Config:
    module = _module(file)
    variants = _variants(module)
    if variant is not None and variants and variant not in variants:
        near = difflib.get_close_matches(variant, variants, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"--config={file}:{variant}: no such variant; {hint}variants: {', '.join(variants)}"
        )
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise InputError(f"--config={file}: has no function get_config; add one, or give another")
    try:
        config = get_config() if variant is None else get_config(variant)
    except InputError:
        raise
    except Exception as error:
        raise _broken(file, error) from error
    if not isinstance(config, Config):
        raise InputError(
            f"--config={file}: get_config returned a {type(config).__name__}; "
            "it must return a dec_diffusion.config.Config"
        )
    return config


def _module(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location("dec_diffusion_config", file)
    if spec is None or spec.loader is None:
        raise InputError(f"--config={file}: is no Python file; give one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _broken(file, error) from error
    return module


def _variants(module: Any) -> list[str]:
    return list(getattr(module, "VARIANTS", ()))


def _broken(file: Path, error: Exception) -> InputError:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    where = f" in line {lines[-1]}" if lines else ""
    reason = " ".join(str(error).split())
    return InputError(f"--config={file}: fails{where} ({type(error).__name__}: {reason}); mend it")


def _with_settings(trained: Run, config: Config, path: str) -> Run:
    """The run with the sampler's settings of ``config``; nothing else of its method may differ."""
    config = configs.resolved(config, trained.config.method.num_clusters)
    saved, asked = (configs.flatten(c.method) for c in (trained.config, config))
    changed = [k for k in saved if saved[k] != asked.get(k) and not k.startswith("sample_")]
    if changed or type(config.method) is not type(trained.config.method):
        raise InputError(
            f"--workdir={path} was trained with other settings of --config.method "
            f"({', '.join(changed) or 'another method'}); leave them as they were, "
            "which is easiest without --config"
        )
    return trained._replace(config=config, method=config.method.build(trained.spec))


def _dataset(trained: Run, verbose: int) -> Dataset:
    """The data of the config, under the scaling of the training data."""
    dataset = reading.read(trained.config.data, shape=trained.spec.shape, verbose=verbose)
    reading.check_same(dataset)
    return rescaled(trained, dataset)


def _evaluate(
    trained: Run,
    dataset: Dataset,
    assignment: Assignment,
    place: Workdir,
    home: Workdir,
    known: Any,
    started: float,
) -> str:
    summary = results.write(trained, dataset, assignment, place, known, home=home, started=started)
    return results.describe(summary, place.path)


def _predict(dataset: Dataset, assignment: Assignment, place: Workdir, known: Any) -> str:
    results.write_assignments(dataset, assignment, place, known)
    return f"{dataset.num_examples:,} examples assigned: {place.path / workdir.ASSIGNMENTS}"


def _sample(trained: Run, place: Workdir) -> str:
    results.generator(trained)
    _make(place.path)
    samples = results.sample(trained, seed=trained.config.seed)
    results.write_samples(trained, samples, place)
    said = f"{samples.shape[1]} examples of each of {samples.shape[0]} clusters: {place.path}"
    if trained.spec.is_image:
        shown = results.to_unit(samples, trained)
        report.generated_by_cluster(place.path / "generated.png", shown)
    return said


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}); make room for a folder there"
        ) from error
