"""Deep clustering with diffusion models.

Usage:
  python -m dec_diffusion.main --config=CONFIG [--workdir=DIR] [--config.FIELD=VALUE ...]
  python -m dec_diffusion.main --mode=MODE --workdir=DIR [--config.FIELD=VALUE ...]

Options:
  --config=CONFIG[:VARIANT]  a config file, or one that comes with the package:
                             {shipped}
  --config.FIELD=VALUE       change a value of the config, say --config.method.num_clusters=12;
                             --config=CONFIG --help lists them all
  --workdir=DIR              folder of the run, made by the first command and resumed by the
                             same command given again; runs/<name of the config> if left out
  --mode=MODE                train (if left out), or with the trained run in DIR, whose config
                             is used if --config is left out:
                             evaluate  assign and score examples, with pictures, in DIR/evaluate
                             predict   assign examples to clusters, in DIR/predict
                             sample    generate examples of every cluster, in DIR/sample
  --quiet                    print nothing but errors and warnings
  --help                     print this

Exit status: 0 done, 1 training failed, 2 bad input (nothing was changed).
"""

import difflib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

# Nothing here imports JAX, so that help and bad options are answered at once.

_MODES = ("train", "evaluate", "predict", "sample")
_OPTIONS = ("config", "workdir", "mode", "quiet", "help")
_PACKAGE = Path(__file__).resolve().parent


class Options(NamedTuple):
    """What the command line says.

    Attributes:
        mode: what to do.
        config: a config file; None for the config of the run in ``workdir``.
        variant: the argument of its ``get_config``; None for the default.
        overrides: dotted names of fields, and their values as text (None where it has none).
        workdir: None for the default.
        quiet: whether to print errors and warnings only.
        help: whether only help is wanted.
    """

    mode: str
    config: Path | None
    variant: str | None
    overrides: list[tuple[str, str | None]]
    workdir: str | None
    quiet: bool
    help: bool


def parse(argv: list[str]) -> Options:
    """Parse a command line, the program's name first.

    Raises:
        flags.Error: in one line, what is wrong and what would be right.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_enum("mode", "train", _MODES, "", flag_values=values)
    flags.DEFINE_bool("quiet", False, "", flag_values=values)
    flags.DEFINE_bool("help", False, "", short_name="h", flag_values=values)
    rest, overrides = _take_overrides(argv)
    try:
        extra = values(rest)[1:]
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, _OPTIONS, n=1)
        hint = f"did you mean --{near[0]}?" if near else "--help lists the options"
        raise flags.Error(f"--{error.flagname}: no such option; {hint}") from error
    if extra:
        raise flags.Error(f"unexpected argument {extra[0]!r}: write options as --name=value")
    for name in ("config", "workdir"):
        value = values[name].value
        if value is not None and (not value or value.startswith("--")):
            raise flags.Error(f"--{name} needs a value, --{name}=...")
    name, colon, variant = (values["config"].value or "").partition(":")
    given: dict[str, Any] = {option: values[option].value for option in _OPTIONS}
    mode, workdir, wants_help = given["mode"], given["workdir"], given["help"]
    if not name and not wants_help and (mode == "train" or workdir is None):
        raise flags.Error(
            f"--config is missing: give a config file, or one of {', '.join(shipped())}"
            + ("" if mode == "train" else f"; or --workdir of the run to {mode}")
        )
    config = _find(name) if name else None
    return Options(
        mode,
        config,
        variant if colon else None,
        overrides,
        workdir,
        given["quiet"],
        wants_help,
    )


def shipped() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(p.stem for p in _config_folder().glob("*.py"))


def execute(argv: list[str]) -> int:
    """Carry out a command line, the program's name first.

    Returns:
        The exit status; an error has been printed, in one line.
    """
    try:
        options = parse(argv)
    except flags.Error as error:
        return _failed(error, 2)
    if options.help and options.config is None:
        print((__doc__ or "").format(shipped=", ".join(shipped())))
        return 0
    from dec_diffusion import command
    from dec_diffusion.types import InputError

    try:
        if options.help:
            print(command.describe(options))
        else:
            command.run(options)
    except InputError as error:
        return _failed(error, 2)
    except FloatingPointError as error:
        return _failed(error, 1)
    except KeyboardInterrupt:
        return _failed("interrupted; the same command resumes from the last checkpoint", 130)
    return 0


def run() -> None:
    """Entry point of ``python -m dec_diffusion.main`` and of the ``dec-diffusion`` script."""
    warnings.showwarning = _show_warning
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    status = execute(sys.argv)
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        # Threads of a run that failed half way (a save under way, say) must not keep the process.
        os._exit(status)


def _take_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Part ``--config.a=v``, ``--config.a v``, ``--config.a``, ``--noconfig.a`` from the rest."""
    rest, overrides = [], []
    waiting = list(reversed(argv))
    while waiting:
        argument = waiting.pop()
        name, equals, value = argument.partition("=")
        if name.startswith("--noconfig.") and not equals:
            overrides.append((name.removeprefix("--noconfig."), "false"))
        elif not name.startswith("--config."):
            rest.append(argument)
        elif not equals and waiting and not waiting[-1].startswith("--"):
            overrides.append((name.removeprefix("--config."), waiting.pop()))
        else:
            overrides.append((name.removeprefix("--config."), value if equals else None))
    return rest, overrides


def _config_folder() -> Path:
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def _find(name: str) -> Path:
    """The file of a config: a path, or the name of a shipped one."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    stem = path.name.removesuffix(".py")
    if path.parent in (Path("."), Path("configs")) and stem in shipped():
        return _config_folder() / f"{stem}.py"
    near = difflib.get_close_matches(stem, shipped(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise flags.Error(
        f"--config={name}: no such file; {hint}the package has {', '.join(shipped())}"
    )


def _failed(error: Any, status: int) -> int:
    # Messages of the flag library begin with "flag ".
    text = " ".join(str(error).split()).removeprefix("flag ")
    print(_clear() + f"error: {text}", file=sys.stderr, flush=True)
    return status


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print(_clear() + f"warning: {message}", file=sys.stderr, flush=True)


def _clear() -> str:
    """On a terminal, what removes the live line that progress may have left there."""
    return "\r\x1b[K" if sys.stderr.isatty() else ""


if __name__ == "__main__":
    run()
