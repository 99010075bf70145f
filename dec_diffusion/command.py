"""What the command line does in each mode, and how its flags become a ``Config``."""

import dataclasses
import difflib
import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from dec_diffusion.types import InputError

PACKAGE = Path(__file__).resolve().parent
_SAVED = PACKAGE / "saved_config.py"


def run(mode: str, config: Any, path: str | None, *, verbose: int) -> None:
    """Carry out one command.

    Args:
        mode: ``train``, ``evaluate``, ``predict`` or ``sample``.
        config: the run's ``Config``.
        path: its workdir, ``runs/<name>`` if None.
        verbose: 0 or 1.

    Raises:
        InputError: anything the user can mend.
    """
    # Here, so that help and bad flags do not wait for JAX.
    from dec_diffusion import train

    path = path or str(Path("runs") / config.name)
    if mode == "train":
        train.fit(config, path, verbose=verbose)
        return
    trained = _with_settings(train.load(path), config, path)
    folder = Path(path) / mode
    folder.mkdir(exist_ok=True)
    {"evaluate": _evaluate, "predict": _predict, "sample": _sample}[mode](trained, config, folder)
    if verbose:
        print(f"{mode}: {', '.join(sorted(p.name for p in folder.iterdir()))} in {folder}")


def _with_settings(trained: Any, config: Any, path: str) -> Any:
    """The run with the sampler's settings of ``config``; nothing else of its method may differ."""
    saved, asked = dataclasses.asdict(trained.config.method), dataclasses.asdict(config.method)
    changed = [k for k in saved if saved[k] != asked.get(k) and not k.startswith("sample_")]
    if changed or type(config.method) is not type(trained.config.method):
        raise InputError(
            f"--workdir={path} was trained with other settings of --config.method "
            f"({', '.join(changed) or 'another method'}); leave --config out to use the run's own"
        )
    return trained._replace(config=config, method=config.method.build(trained.spec))


def _dataset(trained: Any, config: Any) -> Any:
    from dec_diffusion import data

    return data.with_scaling(data.load(config.data), trained.offset, trained.scale)


def _evaluate(trained: Any, config: Any, folder: Path) -> None:
    from dec_diffusion import results, train, workdir

    started = time.monotonic()
    dataset = _dataset(trained, config)
    assignment = train.assign(trained, dataset)
    summary = results.write(
        trained, dataset, assignment, workdir.Workdir(folder.absolute()), started=started
    )
    print(results.describe(summary, folder))


def _predict(trained: Any, config: Any, folder: Path) -> None:
    from dec_diffusion import results, train, workdir

    dataset = _dataset(trained, config)
    assignment = train.assign(trained, dataset)
    results.write_assignments(dataset, assignment, workdir.Workdir(folder.absolute()))


def _sample(trained: Any, config: Any, folder: Path) -> None:
    from dec_diffusion import report, results

    if trained.method.sample is None:
        raise InputError(f"--mode=sample: {trained.config.name} is no generative method")
    samples = results.sample(trained, seed=config.seed)
    np.save(folder / "samples.npy", samples)
    if trained.spec.is_image:
        report.generated_by_cluster(folder / "generated.png", results.to_unit(samples, trained))


def locate_config(argv: list[str]) -> list[str]:
    """Make ``--config`` point to a file: a path, a name of a shipped config, or a saved run's.

    Raises:
        InputError: there is no such config.
    """
    argv = _joined(argv)
    given = [i for i, a in enumerate(argv) if a.startswith("--config=")]
    if not given:
        options = dict(a[2:].split("=", 1) for a in argv if a.startswith("--") and "=" in a)
        if any(a.startswith(("--help", "-h")) for a in argv):
            return argv
        if options.get("mode", "train") == "train" or "workdir" not in options:
            raise InputError(
                f"--config is missing: give a config file or one of {', '.join(shipped())}"
                " (or --workdir of a finished run with --mode=evaluate, predict or sample)"
            )
        return [argv[0], f"--config={_SAVED}:{options['workdir']}", *argv[1:]]
    for i in given:
        value = argv[i].removeprefix("--config=")
        name, colon, variant = value.partition(":")
        argv[i] = f"--config={_find(name)}{colon}{variant}"
    return argv


def shipped() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(p.stem for p in _folder().glob("*.py"))


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; every mistake becomes one ``InputError``."""
    _check_overrides(argv)
    try:
        return flags.FLAGS(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(" ".join(str(error).split())) from error


def _joined(argv: list[str]) -> list[str]:
    """``--config x`` as ``--config=x``, likewise for ``-`` and for our other two flags."""
    out: list[str] = []
    rest = iter(argv)
    for a in rest:
        a = f"-{a}" if a.startswith("-") and not a.startswith("--") else a
        if a in ("--config", "--workdir", "--mode"):
            value = next(rest, None)
            if value is None:
                raise InputError(f"{a} needs a value")
            a = f"{a}={value}"
        out.append(a)
    return out


def _folder() -> Path:
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def _find(name: str) -> Path:
    stem = Path(name).name.removesuffix(".py")
    for candidate in (Path(name), _folder() / f"{stem}.py"):
        if candidate.is_file():
            return candidate
    near = difflib.get_close_matches(stem, shipped(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(f"--config={name}: no such file; {hint}shipped: {', '.join(shipped())}")


def _load(path: str, variant: str | None) -> Any:
    spec = importlib.util.spec_from_file_location("dec_diffusion_config", path)
    if spec is None or spec.loader is None:
        raise InputError(f"--config={path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config(variant) if variant is not None else module.get_config()
    except (SyntaxError, ImportError, AttributeError, TypeError, NameError) as error:
        raise InputError(f"--config={path}: cannot be read ({error})") from error


def _check_overrides(argv: list[str]) -> None:
    """Name the field a mistyped ``--config.a.b`` meant, which the flag library does not."""
    configs = [a.removeprefix("--config=") for a in argv if a.startswith("--config=")]
    if not configs:
        return
    path, colon, variant = configs[-1].partition(":")
    config = _load(path, variant if colon else None)
    known = _fields(config)
    for a in argv:
        if a.startswith(("--config.", "--noconfig.")):
            name = a.split("=", 1)[0].split(".", 1)[1]
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                group = name.rpartition(".")[0]
                options = [k for k in known if k.rpartition(".")[0] == group] or known
                hint = f"did you mean --config.{near[0]}? " if near else ""
                raise InputError(
                    f"--config.{name}: no such field; {hint}fields: {', '.join(options)}"
                )


def _fields(config: Any, prefix: str = "") -> list[str]:
    names: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            names += _fields(value, f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names

