"""Deep clustering with diffusion models.

Usage:
  python -m dec_diffusion.main --config=CONFIG [--workdir=DIR] [--config.FIELD=VALUE ...]
  python -m dec_diffusion.main --mode=MODE --workdir=DIR [--config.FIELD=VALUE ...]

Options:
  --config=CONFIG[:VARIANT]  a config file, or one that comes with the package:
                             {shipped};
                             CONFIG:images for a folder or array of images, CONFIG:vectors for a
                             table, --config=CONFIG --help lists all variants
  --config.FIELD=VALUE       change a value of the config, say --config.method.num_clusters=12;
                             --config=CONFIG --help lists them all
  --workdir=DIR              folder of the run, made by the first command and resumed by the
                             same command given again; if left out, runs/CONFIG-VARIANT, with
                             -seeds behind it where --seeds is given
  --mode=MODE                train (if left out), or with the trained run in DIR, whose config
                             is used if --config is left out:
                             evaluate  assign and score examples, with pictures, in DIR/evaluate
                             predict   assign examples to clusters, in DIR/predict
                             sample    generate examples of every cluster, in DIR/sample
  --seeds=0..4               train once with each of these seeds (0,3,5 is a list), in DIR/seed0
                             and so on; their scores in DIR/seeds.json and .csv, and one run is
                             chosen without labels, to which --mode with --workdir=DIR leads
  --logger=LOGGER            none (if left out): the files in DIR are all; or tensorboard: also
                             event files in DIR/tensorboard
  --distributed=WHEN         auto (if left out) makes one run of the processes of a TPU pod, of
                             Slurm or of Open MPI; on, or the next three, of any others; off none
  --coordinator=HOST:PORT    address of process 0, which every process must reach
  --num_processes=N          of the run; all are given the same command but for the next option
  --process_id=I             of this process, from 0 to N-1
  --distributed_timeout=S    seconds to wait for other processes before giving up (300)
  --quiet                    print nothing but errors and warnings
  --help                     print this

Exit status: 0 done; 1 training failed, or the disk is full; 2 bad input (nothing was changed), or a
checkpoint could not be written; 75 stopped by SIGTERM or Ctrl-C after saving a checkpoint, 130 by
Ctrl-C without; 76 another process of the run is gone. After 75 and 76, and after a crash, the same
command resumes.
"""

import ast
import difflib
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

# Nothing here imports JAX, so that help and bad options are answered at once.

_MODES = ("train", "evaluate", "predict", "sample")
LOGGERS = ("none", "tensorboard")
_DISTRIBUTED = ("auto", "on", "off")
_POD = ("coordinator", "num_processes", "process_id")
_OPTIONS = ("config", "workdir", "mode", "seeds", "logger", "quiet", "help")
_OPTIONS += ("distributed", "distributed_timeout", *_POD)
_SECTIONS = ("data", "method", "train")  # of a config, which hold values and are none
_MOST_SEEDS = 1000
_PACKAGE = Path(__file__).resolve().parent


class Options(NamedTuple):
    """What the command line says.

    Attributes:
        mode: what to do.
        config: a config file; None for the config of the run in ``workdir``.
        variant: the argument of its ``get_config``; None for the default.
        overrides: dotted names of fields, and their values as text (None where it has none).
        workdir: None for the default.
        seeds: to train with one after the other; None for that of the config.
        logger: what else to report progress to.
        quiet: whether to print errors and warnings only.
        help: whether only help is wanted.
        distributed: the arguments of ``distributed.Pod``, in its order.
    """

    mode: str
    config: Path | None
    variant: str | None
    overrides: list[tuple[str, str | None]]
    workdir: str | None
    seeds: tuple[int, ...] | None
    logger: str
    quiet: bool
    help: bool
    distributed: tuple[Any, ...] = ("auto", None, None, None, 300)


def parse(argv: list[str]) -> Options:
    """Parse a command line, the program's name first.

    Raises:
        flags.Error: in one line, what is wrong and what would be right.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_enum("mode", "train", _MODES, "", flag_values=values)
    flags.DEFINE_string("seeds", None, "", flag_values=values)
    flags.DEFINE_enum("logger", "none", LOGGERS, "", flag_values=values)
    flags.DEFINE_enum("distributed", "auto", _DISTRIBUTED, "", flag_values=values)
    flags.DEFINE_string("coordinator", None, "", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "", flag_values=values)
    flags.DEFINE_integer("process_id", None, "", flag_values=values)
    flags.DEFINE_integer("distributed_timeout", 300, "", flag_values=values)
    flags.DEFINE_bool("quiet", False, "", flag_values=values)
    flags.DEFINE_bool("help", False, "", short_name="h", flag_values=values)
    rest, overrides = _take_overrides(argv)
    try:
        extra = values(rest)[1:]
    except flags.UnrecognizedFlagError as error:
        known = _fields() | {option: option for option in _OPTIONS}
        near = difflib.get_close_matches(error.flagname.rpartition(".")[2], known, n=1)
        hint = f"did you mean --{known[near[0]]}?" if near else "--help lists the options"
        raise flags.Error(f"--{error.flagname}: no such option; {hint}") from error
    if extra:
        raise flags.Error(f"unexpected argument {extra[0]!r}: write options as --name=value")
    for name in ("config", "workdir", "seeds"):
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
    for option, usual in (("seeds", None), ("logger", "none")):
        if given[option] != usual and mode != "train":
            raise flags.Error(
                f"--{option}={given[option]}: has no meaning with --mode={mode}; leave it out"
            )
    return Options(
        mode,
        _find(name) if name else None,
        variant if colon else None,
        overrides,
        workdir,
        _seeds(given["seeds"], overrides),
        given["logger"],
        given["quiet"],
        wants_help,
        _pod(given),
    )


def _seeds(text: str | None, overrides: list[tuple[str, str | None]]) -> tuple[int, ...] | None:
    """The seeds that ``0..4``, ``0,3,5`` or a mixture of both means."""
    if text is None:
        return None
    if any(name == "seed" for name, _ in overrides):
        raise flags.Error(f"--seeds={text}: --config.seed is given as well; leave one of them out")
    seeds: list[int] = []
    for part in text.split(","):
        ends = [end.strip() for end in part.split("..")]
        if not 1 <= len(ends) <= 2 or not all(end.isdecimal() for end in ends):
            raise flags.Error(f"--seeds={text}: write whole numbers as 0..4 or as 0,3,5")
        first, last = int(ends[0]), int(ends[-1])
        if last - first >= _MOST_SEEDS:
            raise flags.Error(f"--seeds={text}: give at most {_MOST_SEEDS:,} seeds")
        seeds += range(first, last + 1)
    if not seeds or len(set(seeds)) < len(seeds):
        raise flags.Error(f"--seeds={text}: must name each seed once, the lower end of .. first")
    return tuple(seeds)


def _pod(given: dict[str, Any]) -> tuple[Any, ...]:
    """The options about processes, which must make a whole.

    Raises:
        flags.Error: some are missing, or cannot be.
    """
    mode, timeout = given["distributed"], given["distributed_timeout"]
    present = [name for name in _POD if given[name] is not None]
    missing = [name for name in _POD if given[name] is None]
    if present and mode == "off":
        raise flags.Error(f"--{present[0]}: contradicts --distributed=off; leave out one of them")
    if present and missing:
        raise flags.Error(f"--{missing[0]} is missing: it goes with --{present[0]}; give both")
    if timeout < 1:
        raise flags.Error(f"--distributed_timeout={timeout}: must be at least 1 second")
    if present:
        address, count, number = (given[name] for name in _POD)
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise flags.Error(f"--coordinator={address}: write HOST:PORT, say 10.0.0.2:1234")
        if count < 1:
            raise flags.Error(f"--num_processes={count}: must be at least 1")
        if not 0 <= number < count:
            raise flags.Error(
                f"--process_id={number}: must lie between 0 and {count - 1}, there are "
                f"--num_processes={count}"
            )
    return mode, given["coordinator"], given["num_processes"], given["process_id"], timeout


def usage() -> str:
    """What ``--help`` shows."""
    return (__doc__ or "").format(shipped=", ".join(shipped()))


def shipped() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(p.stem for p in _config_folder().glob("*.py"))


def _fields() -> dict[str, str]:
    """The fields of all configs, and the options that set them.

    They are read from the sources, because importing the classes would import JAX.
    """
    methods = sorted((_PACKAGE / "methods").glob("*.py"))
    # A method's settings are the class that is called as its file is.
    sections = {file.stem.replace("_", ""): "config.method." for file in methods}
    sections |= {"dataconfig": "config.data.", "trainconfig": "config.train.", "config": "config."}
    found = {}
    for file in (*methods, _PACKAGE / "data" / "config.py", _PACKAGE / "config.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.lower() in sections:
                fields = (ast.unparse(s.target) for s in node.body if isinstance(s, ast.AnnAssign))
                found |= {name: sections[node.name.lower()] + name for name in fields}
    return {name: option for name, option in found.items() if name not in _SECTIONS}


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
