"""Where else a run reports its progress, beside ``metrics.jsonl``, which is always written."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dec_diffusion.types import InputError

NAMES = ("none", "tensorboard")
FOLDER = "tensorboard"
_PLACE = ("step", "phase", "iteration")


class Logger:
    """Reports nowhere."""

    def replay(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Begin with these records, those of the run until now."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Report one record of ``metrics.jsonl``."""


class TensorBoard(Logger):
    """Event files made anew from ``metrics.jsonl`` whenever a run starts or goes on.

    They never show what a crash undid, and a run that is complete can still be shown. Times are
    those of the training alone, so that pauses leave no gap.
    """

    def __init__(self, make: Any, folder: Path) -> None:
        self._make, self._folder = make, folder
        self._writer: Any = None
        self._clock = 0.0

    def replay(self, records: Sequence[Mapping[str, Any]]) -> None:
        # Not before: until here a run may be refused, and then nothing may change.
        for old in self._folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = self._make(str(self._folder))
        self._clock = time.time() - sum(r["seconds"] for r in records)
        for record in records:
            self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        self._clock += record["seconds"]
        for name, value in record.items():
            if name not in _PLACE and value is not None:
                tag = f"{record['phase']}/{name}"
                self._writer.add_scalar(tag, value, record["step"], walltime=self._clock)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


@contextlib.contextmanager
def start(name: str, workdir: Path | None) -> Iterator[Logger]:
    """The logger of that name, for as long as a run takes.

    Args:
        name: ``none`` or ``tensorboard``.
        workdir: of the run; None has room for no logger but ``none``.

    Raises:
        InputError: no such logger, its package is missing, or there is nowhere to write.
    """
    make = check(name)
    if make is None or jax.process_index() != 0:
        yield Logger()
        return
    if workdir is None:
        raise InputError(f"logger={name}: needs a workdir to write to; give one, or none")
    with contextlib.closing(TensorBoard(make, workdir / FOLDER)) as logger:
        yield logger


def check(name: str) -> Any:
    """What makes the writer of that logger, None if it has none; raises as ``start`` does."""
    if name not in NAMES:
        raise InputError(f"--logger={name}: unknown; choose one of {', '.join(NAMES)}")
    if name == "none":
        return None
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError(
            f"--logger={name}: needs the package tensorboardX ({error}); "
            "pip install 'dec_diffusion[tensorboard]'"
        ) from error
    return SummaryWriter
