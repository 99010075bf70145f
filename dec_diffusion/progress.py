"""What a run says while it works: one live line on a terminal, plain lines elsewhere."""

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

_SECONDS_BETWEEN_LINES = 10.0
_SHOWN = ("loss", "clusters_nonempty", "silhouette", "acc", "nmi")


def table(rows: Mapping[str, Sequence[str]], columns: Sequence[str], width: int) -> list[str]:
    """Lines of a table: the columns, ``width`` characters each, and for each title its cells."""
    first = 2 + max(map(len, rows))
    every = {"": columns, **rows}.items()
    return [
        f"{title:{first}s}" + "".join(f"{c:>{width}s}" for c in cells) for title, cells in every
    ]


class Progress:
    """Rate, remaining time and the latest figures of a run.

    Args:
        total_steps: gradient steps of the whole run.
        first_step: where this process starts, after a resume.
        silent: print nothing.
        stream: where to; standard output by default.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int,
        *,
        silent: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self._total, self._step = total_steps, first_step
        self._phase = ""
        self._steps, self._seconds = 0, 0.0  # but for the first iterations of phases
        self._silent = silent
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._width = 0
        self._last_line = -float("inf")
        self._last_update = time.monotonic()

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if not self._silent:
            self._write(text, stays=True)

    def update(self, step: int, where: str, record: Mapping[str, float], rate: float) -> None:
        """Show where the run is, the figures of ``record`` worth showing, rate and time left.

        Args:
            step: gradient steps taken.
            where: the phase, in one word, and how far it is.
            record: of the iteration that ends here.
            rate: examples per second.
        """
        if self._silent:
            return
        left = self._left(step, where.partition(" ")[0])
        figures = [f"{name} {record[name]:.4g}" for name in _SHOWN if name in record]
        # The figures last: where a terminal is narrow they are cut off first.
        pace = [f"{left} left", f"{rate:,.0f} examples/s"]
        line = "  ".join([f"{100 * step // self._total:3d}%", where, *pace, *figures])
        if self._live:
            self._write(line, stays=step == self._total)
        elif step == self._total or time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._write(line, stays=True)

    def _left(self, step: int, phase: str) -> str:
        """The time left by the pace until now, ``...`` while that is not known.

        The first iteration of a phase counts for nothing: most of it may be compiling.
        """
        now = time.monotonic()
        if phase == self._phase:
            self._steps += step - self._step
            self._seconds += now - self._last_update
        self._phase, self._step, self._last_update = phase, step, now
        if step == self._total:
            return clock(0)
        if not self._steps:
            return "..."
        return clock(self._seconds / self._steps * (self._total - step))

    def _write(self, text: str, *, stays: bool) -> None:
        if not self._live:
            self._stream.write(text + "\n")
        elif stays:
            self._stream.write(f"\r{text.ljust(self._width)}\n")
            self._width = 0
        else:
            # A line that wraps could not be written over.
            text = text[: shutil.get_terminal_size().columns - 1]
            self._stream.write(f"\r{text.ljust(self._width)}")
            self._width = len(text)
        self._stream.flush()


def clock(seconds: float) -> str:
    """``75.2`` as ``1:15``, from an hour on as ``1:00:00``."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
