"""What a run prints: on a terminal, elsewhere, and silenced."""

import io
import re
import time

import pytest

from dec_diffusion.progress import Progress, clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(text: str) -> list[str]:
    """The lines a terminal shows after ``text``: a carriage return writes over the line."""
    lines, column = [""], 0
    for character in text:
        if character == "\n":
            lines.append("")
            column = 0
        elif character == "\r":
            column = 0
        else:
            line = lines[-1]
            lines[-1] = line[:column] + character + line[column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-3, "0:00"),
        (0, "0:00"),
        (9.4, "0:09"),
        (59.6, "1:00"),
        (75.2, "1:15"),
        (3599.4, "59:59"),
        (3600, "1:00:00"),
        (86399, "23:59:59"),
    ],
)
def test_clock(seconds, shown):
    assert clock(seconds) == shown


def test_a_terminal_shows_one_line_that_is_written_over():
    stream = Terminal()
    progress = Progress(100, 0, stream=stream)
    progress.note("opening")
    progress.update(10, "pretrain 1/10", {"loss": 123456.0, "acc": 0.5}, 1234.5)
    assert screen(stream.getvalue())[0] == "opening"
    assert screen(stream.getvalue())[1].endswith("1,234 examples/s  loss 1.235e+05  acc 0.5")
    progress.update(20, "em 1/10", {"loss": 1.0}, 5.0)
    shown = screen(stream.getvalue())
    # The longer line before leaves nothing behind.
    assert len(shown) == 2
    assert shown[1] == " 20%  em 1/10  ... left  5 examples/s  loss 1"
    progress.update(30, "em 2/10", {"loss": 1.0}, 5.0)
    shown = screen(stream.getvalue())
    assert re.fullmatch(r" 30%  em 2/10  \d+:\d\d left  5 examples/s  loss 1", shown[1])
    progress.update(100, "em 10/10", {"loss": 1.0}, 5.0)
    shown = screen(stream.getvalue())
    assert shown[1] == "100%  em 10/10  0:00 left  5 examples/s  loss 1"
    assert shown[2:] == [""]


def test_a_live_line_never_wraps(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    record = dict.fromkeys(("loss", "clusters_nonempty", "silhouette", "acc", "nmi"), 1.0)
    Progress(100, 0, stream=stream).update(10, "pretrain 1/10", record, 1.0)
    assert len(stream.getvalue().removeprefix("\r")) == 39


def test_elsewhere_lines_are_plain_and_few():
    stream = io.StringIO()
    progress = Progress(1000, 0, stream=stream)
    for step in range(1, 1001):
        progress.update(step, "em", {"loss": 2.0}, 10.0)
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    # The first and the last; the rest come within seconds of the first.
    assert [line.split()[0] for line in lines] == ["0%", "100%"]


def test_silence():
    stream = Terminal()
    progress = Progress(10, 0, silent=True, stream=stream)
    progress.note("opening")
    progress.update(10, "em", {"loss": 2.0}, 10.0)
    assert stream.getvalue() == ""


def test_time_left_counts_no_steps_of_other_processes_and_no_compiling(monkeypatch):
    seconds = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: seconds)
    stream = Terminal()
    progress = Progress(10_000, 9_000, stream=stream)
    shown = []
    # The first iteration of each phase, after a resume too, compiles for a minute.
    for step, where, took in [
        (9_100, "pretrain 4/5", 60), (9_200, "pretrain 5/5", 10), (9_300, "em 1/8", 60),
        (9_400, "em 2/8", 20), (9_500, "em 3/8", 30), (10_000, "em 8/8", 9),
    ]:  # fmt: skip
        seconds += took
        progress.update(step, where, {}, 1.0)
        shown.append(screen(stream.getvalue())[0].split("  ")[-2].strip())
    # 0.1 seconds a step at first, 0.15 on the average of the next, 0.2 of all three.
    assert shown == ["... left", "1:20 left", "1:10 left", "1:30 left", "1:40 left", "0:00 left"]
