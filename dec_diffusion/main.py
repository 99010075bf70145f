"""Command line: ``python -m dec_diffusion.main --config=configs/clusterddpm.py[:variant]``."""

import os
import sys
import warnings
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from dec_diffusion import command
from dec_diffusion.types import InputError

_MODES = ("train", "evaluate", "predict", "sample")
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with a variant after a colon; values as --config.a.b=value."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; runs/<config name> if unset.")
_MODE = flags.DEFINE_enum("mode", "train", _MODES, "What to do.")
_QUIET = flags.DEFINE_bool("quiet", False, "Print nothing but errors and warnings.")


def main(argv: list[str]) -> None:
    """Run what the flags say; bad input ends in one line and exit status 2."""
    if len(argv) > 1:
        raise InputError(f"unexpected argument {argv[1]!r}: options begin with --")
    command.run(_MODE.value, _CONFIG.value, _WORKDIR.value, verbose=0 if _QUIET.value else 1)


def run(argv: list[str] | None = None) -> None:
    """Entry point of ``python -m dec_diffusion.main`` and of the ``dec-diffusion`` script."""
    warnings.showwarning = _one_line
    argv = command.locate_config(list(sys.argv if argv is None else argv))
    try:
        app.run(main, argv=argv, flags_parser=command.parse_flags)
    except InputError as error:
        _exit(f"error: {error}", 2)
    except command.NonFiniteLossError as error:
        _exit(f"error: {error}", 1)


def _one_line(message: Any, category: type, *_: Any, **__: Any) -> None:
    print(f"{category.__name__}: {message}", file=sys.stderr, flush=True)


def _exit(text: str, status: int) -> None:
    print(text, file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Threads of a run that failed half way (a save under way, say) must not keep the process.
    os._exit(status)


if __name__ == "__main__":
    run()
