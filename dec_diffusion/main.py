"""Entry point of the command line; ``--help`` says what it takes, see ``options``."""

import errno
import gc
import logging
import os
import sys
import warnings
from typing import Any

from absl import flags

from dec_diffusion import options

# Nothing here imports JAX, so that help and bad options are answered at once.

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not done, try again
LOST = 76  # EX_PROTOCOL: another process of the run is gone
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def execute(argv: list[str]) -> int:
    """Carry out a command line, the program's name first.

    Returns:
        The exit status; an error has been printed, in one line.
    """
    try:
        given = options.parse(argv)
    except flags.Error as error:
        return _failed(error, 2)
    if given.help and given.config is None:
        print(options.usage())
        return 0
    from dec_diffusion import command
    from dec_diffusion.distributed import LostProcessError
    from dec_diffusion.interrupt import StoppedError
    from dec_diffusion.types import InputError

    try:
        print(command.describe(given)) if given.help else command.run(given)
    except InputError as error:
        return _failed(error, 2)
    except FloatingPointError as error:
        return _failed(error, 1)
    except LostProcessError as error:
        return _failed(error, LOST)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        remedy = "make room or permit writing there, then give the same command again"
        return _failed(f"{where}{error.strerror}; {remedy}", 1)
    except StoppedError as error:
        print(_clear() + str(error), file=sys.stderr, flush=True)
        return STOPPED
    except KeyboardInterrupt:
        return _failed("interrupted; the same command resumes from the last checkpoint", 130)
    return 0


def run() -> None:
    """Entry point of ``python -m dec_diffusion.main`` and of the ``dec-diffusion`` script."""
    warnings.showwarning = _show_warning
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    # Tracing makes hundreds of thousands of objects that stay; looking for garbage among them
    # every 700 took a tenth of the time to the first step.
    gc.set_threshold(100_000)
    status = execute(sys.argv)
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        # Threads of a run that failed half way (a save under way, say) must not keep the process.
        os._exit(status)


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
