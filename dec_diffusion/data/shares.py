"""Decoding shared by the processes of a run: each its own rows, into one entry of the cache.

Process 0 makes the folder, every process writes a contiguous share of the examples to files of its
own, and once all are done process 0 makes the folder an entry, which all then map. What fails in
one process fails in all of them, with the same words.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dec_diffusion.data import cache
from dec_diffusion.data.cache import Cache, CacheError, Entry, Memory, Writer
from dec_diffusion.types import InputError


class Team(NamedTuple):
    """The processes that read a source together.

    Attributes:
      number: of this one, from 0.
      count: of all.
      exchange: from a topic and a text to the texts of all processes, in their order; waits until
        each has given its own.
    """

    number: int
    count: int
    exchange: Callable[[str, str], list[str]]


ALONE = Team(0, 1, lambda topic, text: [text])


class Filled(NamedTuple):
    """What came of a share.

    Attributes:
      rows: int64 [m], the places in the source of the examples that were added.
      broken: name and reason of each that was left out.
      labels: [m] if the source has labels in it.
    """

    rows: np.ndarray
    broken: list[tuple[str, str]]
    labels: np.ndarray | None = None


Fill = Callable[[Memory | Writer, int, int], Filled]
"""Adds the examples of a range of the rows to a store; raises InputError."""


def decode(
    fill: Fill,
    num_rows: int,
    shape: tuple[int, ...],
    *,
    dtype: Any = np.uint8,
    largest: int = 0,
    kept: Cache | None,
    team: Team = ALONE,
    refuse: Callable[[Sequence[tuple[str, str]]], None] = lambda broken: None,
    verbose: int = 0,
) -> Entry:
    """All rows, from the cache after they were left there, or in memory where it is not wanted.

    Args:
      fill: decodes.
      num_rows: of all.
      shape: of one example as it begins; the last axis may grow from 1 to 3.
      dtype: of the examples.
      largest: bytes that they may take; 0 where ``shape`` cannot grow.
      kept: where the entry is to be.
      team: who shares the work.
      refuse: raises InputError for what was left out, if nothing is left.
      verbose: 1 says where the entry is, or why there is none for all processes.

    Raises:
      InputError: what ``fill`` or ``refuse`` raise in any of the processes.
    """
    largest = largest or num_rows * int(np.prod(shape)) * np.dtype(dtype).itemsize
    if kept is not None and kept.wants(largest):
        try:
            found = _make(fill, num_rows, shape, dtype, largest, kept, team, refuse, verbose)
            if verbose:
                held = f"{found.images.nbytes / 2**20:,.0f} MiB"
                print(
                    f"the decoded images are kept in {kept.folder} ({held});"
                    " --config.data.cache=none keeps none",
                    flush=True,
                )
            return found
        except CacheError as error:
            cache.warn(error)
    store = Memory(num_rows, shape, dtype)
    rows, broken, labels = fill(store, 0, num_rows)
    if not store.count:
        refuse(broken)
    return Entry(store.images(), rows, broken, labels)


def find(kept: Cache | None, team: Team) -> Entry | None:
    """The entry, if every process finds it."""
    found = None if kept is None else cache.find(kept)
    return found if all(team.exchange("cache", "" if found is None else "found")) else None


def _make(
    fill: Fill,
    num_rows: int,
    shape: tuple[int, ...],
    dtype: Any,
    largest: int,
    kept: Cache,
    team: Team,
    refuse: Callable[[Sequence[tuple[str, str]]], None],
    verbose: int,
) -> Entry:
    folder, seen = _begin(kept, team, largest)
    if not seen:
        if verbose:
            print(
                f"{kept.folder.parent} is not one folder for all processes, so each decodes all"
                " examples itself; share the work by --config.data.cache=FOLDER on a file system"
                " that all see",
                flush=True,
            )
        if team.number == 0:
            shutil.rmtree(folder, ignore_errors=True)
        if (own := cache.find(kept)) is not None:
            return own
        team = ALONE
        folder, _ = _begin(kept, team, largest)
    first, last = (num_rows * (team.number + i) // team.count for i in (0, 1))
    try:
        path = folder / cache.named("images", team.number, team.count)
        with contextlib.ExitStack() as stack:

            def share() -> dict[str, Any]:
                writer = stack.enter_context(contextlib.closing(Writer(path, shape, dtype)))
                filled = fill(writer, first, last)
                found.extend([writer, filled])
                labels = filled.labels is not None
                about = {"count": writer.count, "shape": writer.shape, "labels": labels}
                return about | {"broken": filled.broken}

            found: list[Any] = []
            reports = _all(team, "share", share)
            broken = [(name, reason) for report in reports for name, reason in report["broken"]]
            total = sum(report["count"] for report in reports)
            if not total:
                refuse(broken)
            widest = max((report["shape"] for report in reports), key=lambda shape: shape[-1])

            def finish() -> dict[str, Any]:
                writer, filled = found
                if writer.channels < widest[-1]:
                    writer.widen()
                writer.finish()
                for stem, values in (("rows", filled.rows), ("labels", filled.labels)):
                    if values is not None:
                        name = cache.named(stem, team.number, team.count)
                        with cache.failing(folder):
                            np.save(folder / name, values, allow_pickle=False)
                return {}

            _all(team, "files", finish)

        def complete() -> dict[str, Any]:
            if team.number == 0:
                labels, whole = any(report["labels"] for report in reports), (total, *widest)
                cache.complete(kept, folder, whole, broken, parts=team.count, labels=labels)
            return {}

        _all(team, "entry", complete)
        return _all_find(kept, team)
    finally:
        if team.number == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _begin(kept: Cache, team: Team, num_bytes: int) -> tuple[Path, bool]:
    """A folder that process 0 has made, and whether all processes see it."""

    def begin() -> dict[str, Any]:
        return {"name": cache.begin(kept, num_bytes).name} if team.number == 0 else {}

    # Where each process would look for it itself.
    folder = kept.folder.parent / _all(team, "folder", begin)[0]["name"]
    return folder, all(team.exchange("seen", "seen" if folder.is_dir() else ""))


def _all_find(kept: Cache, team: Team) -> Entry:
    entry = find(kept, team)
    if entry is None:
        raise CacheError(f"{kept.folder}: cannot be read back")
    return entry


def _all(team: Team, topic: str, work: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """What the work of each process gives; raises in all what it raises in one."""
    try:
        own = work()
    except InputError as error:
        own = {"input": str(error)}
    except CacheError as error:
        own = {"cache": str(error)}
    reports = [json.loads(text) for text in team.exchange(topic, json.dumps(own))]
    for kind, error in (("input", InputError), ("cache", CacheError)):
        for report in reports:
            if kind in report:
                raise error(report[kind])
    return reports
