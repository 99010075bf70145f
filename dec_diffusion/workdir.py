"""Everything that touches the disk for a run: the workdir *is* the run.

A workdir holds

=====================  ======================================================================
``config.json``        the configuration; a run with another one is refused
``checkpoints/``       the newest few states, saved asynchronously
``metrics.jsonl``      one JSON object per line
``assignments.csv``    one row per input: which cluster, how surely, like which prototype
``prototypes.npz``     a few examples that stand for each cluster
``*.json``, ``*.png``  summaries and pictures
=====================  ======================================================================

The runs of several seeds lie side by side in one folder, whose ``seeds.json`` names the one chosen;
whatever reads a run takes that folder for the run it names.

Small files are written by process 0, each through a temporary file that replaces the old one, so a
reader or a killed run never sees half a file. Checkpoints, which all processes save together, are
the matter of ``checkpoints``.

Start ``jax.distributed`` (where it is used) before calling anything here: telling the processes
apart starts the JAX backend.
"""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import pathlib
import platform
import re
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np

from dec_diffusion.checkpoints import Checkpoints, NoCheckpoints
from dec_diffusion.plain import plain
from dec_diffusion.types import InputError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

CONFIG = "config.json"
METRICS = "metrics.jsonl"
ASSIGNMENTS = "assignments.csv"
CHECKPOINTS = "checkpoints"
SEEDS = "seeds.json"
LOCK = ".lock"

_MISSING = object()


# -- small files --

_SPECIAL = re.compile(r'[,"\r\n]')
_TEMPORARY = re.compile(rf"\.{re.escape(CONFIG)}\.(\d+\.)?tmp")


def _write_atomic(path: pathlib.Path, content: str | bytes | Iterable[str]) -> None:
    """Replaces ``path`` by ``content`` in one step; what was there stays until that step.

    Long texts come in parts, say lines, so that they are never in memory as a whole.

    File names that are not valid UTF-8 come back from Python with surrogates, and are written as
    the bytes they were.
    """
    # Processes that share the seeds of a folder may write its files at the same time.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            file.writelines(map(_encoded, [content] if isinstance(content, str) else content))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _json_text(obj: Any) -> str:
    return json.dumps(plain(obj), indent=2, allow_nan=False) + "\n"


def _read_again(file: TextIO) -> str:
    file.seek(0)
    return file.read()


def _is_writer() -> bool:
    return jax.process_index() == 0


# -- opening --


class Assigned(NamedTuple):
    """What ``assignments.csv`` says of every input, a column for each field.

    Attributes:
        index: int64 [n], the row of the data set.
        path: [n], the file it came from or its name in a table, "" where there is neither.
        cluster: int32 [n].
        probability: float32 [n], of that cluster.
        entropy: float32 [n], of the probabilities of all clusters, in nats.
        prototype: [n], the closest prototype of that cluster: its file, its name in a table, or
            else its row in the training data; "" where there is none.
    """

    index: np.ndarray
    path: Sequence[str]
    cluster: np.ndarray
    probability: np.ndarray
    entropy: np.ndarray
    prototype: Sequence[str]


_NUMBERS = {"index": "q", "cluster": "i", "probability": "f", "entropy": "f"}
_READ: dict[str | None, Any] = {"q": int, "i": int, "f": float, None: str}


def _field(text: str) -> str:
    """One field of a table, in quotes where a reader would take a part of it for its end."""
    return '"' + text.replace('"', '""') + '"' if _SPECIAL.search(text) else text


class Workdir(NamedTuple):
    """An opened workdir. All methods may be called by every process; process 0 writes."""

    path: pathlib.Path

    def checkpoints(self, *, keep: int = 3) -> Checkpoints:
        """The run's checkpoints, for saving: close them, or use them in a ``with`` block."""
        return Checkpoints(self.path / CHECKPOINTS, keep=keep)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Inside the block no other command trains here; a kill gives the workdir free, too.

        Raises:
            InputError: Another command does, on this machine. Of one on another machine, which
                may be gone while its file system still holds the lock, only a warning tells.
        """
        if fcntl is None or not _is_writer():
            yield
            return
        with open(self.path / LOCK, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _read_again(file) != platform.node():
                    file.truncate(0)
                    file.write(platform.node())
                    file.flush()
            except BlockingIOError:
                holder = _read_again(file)
                what = f"--workdir={self.path}: another command is training there"
                if holder in ("", platform.node()):
                    raise InputError(
                        f"{what}; let it end, stop it, or give another --workdir"
                    ) from None
                warnings.warn(f"{what}, on {holder}, or was when that was lost", stacklevel=3)
            except OSError:  # a file system without locks
                pass
            yield

    def write_text(self, name: str, text: str) -> None:
        """Writes ``text`` to the file ``name``."""
        if _is_writer():
            _write_atomic(self.path / name, text)

    def write_json(self, name: str, obj: Any) -> None:
        """Writes ``obj`` to the file ``name``; numpy and JAX values allowed, NaN becomes null."""
        self.write_text(name, _json_text(obj))

    def read_json(self, name: str) -> Any:
        """What ``write_json`` wrote; None if it is not there, or damaged."""
        try:
            return json.loads((self.path / name).read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def write_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes arrays of numbers or text to the file ``name``, an ``.npz``."""
        if not _is_writer():
            return
        encoded = {
            k: np.char.encode(x, "utf-8", "surrogateescape") if x.dtype.kind == "U" else x
            for k, x in arrays.items()
        }
        out = io.BytesIO()
        np.savez(out, allow_pickle=False, **encoded)
        _write_atomic(self.path / name, out.getvalue())

    def read_arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """What ``write_arrays`` wrote; None if it is not there.

        Raises:
            InputError: If the file is damaged, or holds anything but arrays.
        """
        file = self.path / name
        try:
            with np.load(file, allow_pickle=False) as stored:
                arrays = {k: stored[k] for k in stored.files}
        except FileNotFoundError:
            return None
        except Exception:  # whatever a damaged file makes the reader raise
            raise InputError(
                f"{file}: is damaged; delete it and give the command that trained the run again"
            ) from None
        return {
            k: np.char.decode(x, "utf-8", "surrogateescape") if x.dtype.kind == "S" else x
            for k, x in arrays.items()
        }

    def write_assignments(self, assigned: Assigned) -> None:
        """Writes ``assignments.csv``, one row per input in the order given.

        Numbers are written with just the digits that their dtype needs.
        """
        if _is_writer():
            rows = zip(*assigned, strict=True)
            lines = (
                f"{i!s},{_field(path)},{c!s},{q!s},{h!s},{_field(prototype)}\n"
                for i, path, c, q, h, prototype in rows
            )
            head = ",".join(Assigned._fields) + "\n"
            _write_atomic(self.path / ASSIGNMENTS, itertools.chain([head], lines))

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Appends one record to ``metrics.jsonl``; it is with the system when this returns."""
        if _is_writer():
            with open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(plain(record), allow_nan=False) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of ``metrics.jsonl``, without lines that a crash or an edit broke."""
        try:
            text = (self.path / METRICS).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        return list(_records(text))

    def truncate_metrics(self, step: int) -> None:
        """Drops the records after ``step`` and broken lines, before the run goes on from ``step``.

        Call it at every start (with -1 when no checkpoint was restored): the steps between the
        last checkpoint and the crash run, and are recorded, again. Records without a step stay.
        """
        if _is_writer() and (self.path / METRICS).exists():
            kept = [r for r in self.read_metrics() if not _after(r, step)]
            _write_atomic(self.path / METRICS, "".join(json.dumps(r) + "\n" for r in kept))

    def read_assignments(self) -> Assigned | None:
        """What ``write_assignments`` wrote; None if the file is not there, or damaged."""
        found = self._columns(Assigned._fields)
        return None if found is None else Assigned(**found)

    def read_clusters(self) -> np.ndarray | None:
        """Of ``read_assignments`` the clusters alone, int32 [n]."""
        found = self._columns(["cluster"])
        return None if found is None else found["cluster"]

    def _columns(self, names: Sequence[str]) -> dict[str, Any] | None:
        """Columns of ``assignments.csv``, in no more memory than they take."""
        found: dict[str, Any] = {n: array(_NUMBERS[n]) if n in _NUMBERS else [] for n in names}
        reads = [
            (column, Assigned._fields.index(name), _READ[_NUMBERS.get(name)])
            for name, column in found.items()
        ]
        limit = csv.field_size_limit(2**31 - 1)  # a name in a table may be a whole text
        try:
            with open(
                self.path / ASSIGNMENTS, newline="", encoding="utf-8", errors="surrogateescape"
            ) as file:
                rows = csv.reader(file)
                if next(rows, None) != list(Assigned._fields):
                    return None
                for row in rows:
                    if len(row) != len(Assigned._fields):
                        return None
                    for column, place, read in reads:
                        column.append(read(row[place]))
        except (FileNotFoundError, ValueError, csv.Error):
            return None
        finally:
            csv.field_size_limit(limit)
        return {
            n: column if isinstance(column, list) else np.asarray(column)
            for n, column in found.items()
        }


class Memory:
    """Stands in for a workdir where a run shall leave nothing on disk; keeps its metrics."""

    path = "none"

    def __init__(self) -> None:
        self._metrics: list[dict[str, Any]] = []

    def checkpoints(self, *, keep: int = 3) -> NoCheckpoints:
        return NoCheckpoints()

    def locked(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def write_json(self, name: str, obj: Any) -> None:
        pass

    def read_json(self, name: str) -> None:
        return None

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        self._metrics.append(plain(record))

    def read_metrics(self) -> list[dict[str, Any]]:
        return self._metrics

    def truncate_metrics(self, step: int) -> None:
        pass


def _records(text: str) -> Iterator[dict[str, Any]]:
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def _after(record: Mapping[str, Any], step: int) -> bool:
    at = record.get("step")
    return isinstance(at, int | float) and at > step


def open_workdir(
    path: str | os.PathLike[str], config: Mapping[str, Any], *, ignore: Sequence[str] = ()
) -> Workdir:
    """Creates the workdir of a run, or opens it again for the same run.

    Args:
        path: The folder; made where it does not exist.
        config: The run's configuration, nested dictionaries of plain values. Compared as JSON, so
            a tuple equals a list.
        ignore: Dotted names of fields (or of groups of fields) that may differ when a run is
            opened again; ``config.json`` then takes the new values.

    Raises:
        InputError: If ``path`` is no folder, cannot be written, holds files of something else, or
            belongs to a run whose configuration differs. Nothing is changed then.
    """
    if "://" in os.fspath(path):
        raise InputError(f"--workdir={path}: only local folders work; give a path on this machine")
    folder = pathlib.Path(path).expanduser().absolute()
    wanted = _normalise(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError
        found = _read_config(folder)
        if found is not None:
            _check_same(path, _flatten(found), _flatten(wanted), ignore)
        if found != wanted and _is_writer():
            if found is None:
                _check_unused(path, folder)
            _write_atomic(folder / CONFIG, _json_text(wanted))
    except (FileExistsError, NotADirectoryError):
        raise InputError(
            f"--workdir={path}: it, or a folder above it, is a file; give another --workdir"
        ) from None
    except OSError as error:
        reason = error.strerror or "permission denied"
        raise InputError(
            f"--workdir={path}: cannot be written ({reason}); give another --workdir"
        ) from None
    return Workdir(folder)


def check_config(
    path: str | os.PathLike[str], config: Mapping[str, Any], *, ignore: Sequence[str] = ()
) -> None:
    """Raises as ``open_workdir`` does if ``path`` holds a run of another configuration."""
    found = _read_config(pathlib.Path(path).expanduser().absolute())
    if found is not None:
        _check_same(path, _flatten(found), _flatten(_normalise(config)), ignore)


def locate(path: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of a run: ``path`` itself, or the run chosen of those of several seeds in it.

    Raises:
        InputError: If ``path`` holds runs of several seeds, and none is chosen or to be found.
    """
    folder = pathlib.Path(path).expanduser().absolute()
    runs = sorted(p.parent.name for p in folder.glob(f"seed*/{CONFIG}"))
    if (folder / CONFIG).exists() or not runs:
        return folder
    try:
        best = json.loads((folder / SEEDS).read_bytes())["best"]
    except (OSError, ValueError, KeyError, TypeError):
        best = None
    # A name that leads elsewhere was not written here.
    if best not in runs:
        raise InputError(
            f"--workdir={path}: holds runs of several seeds, and {SEEDS} names none of them as "
            f"chosen; finish the command with --seeds, or give one of them, {folder / runs[0]}"
        )
    return folder / best


def check_shared(place: Workdir) -> None:
    """Check, in every process, that what process 0 wrote to the workdir can be seen.

    Raises:
        InputError: the workdir lies on the disk of one host.
    """
    if not (place.path / CONFIG).exists():
        raise InputError(
            f"--workdir={place.path}: process {jax.process_index()} does not see what process 0 "
            "wrote there; give a folder on a file system that all hosts share"
        )


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration of the run in a workdir.

    Raises:
        InputError: If there is no run in ``path``, or its ``config.json`` is damaged.
    """
    folder = locate(path)
    try:
        config = _read_config(folder)
    except OSError as error:
        raise InputError(
            f"{folder / CONFIG} cannot be read ({error.strerror}); give another --workdir"
        ) from None
    if config is None:
        raise InputError(
            f"--workdir={path} holds no run ({CONFIG} is missing); give the workdir of a run"
        )
    return config


def _read_config(folder: pathlib.Path) -> dict[str, Any] | None:
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise InputError(
            f"{folder / CONFIG} is damaged (not a JSON object); restore it, or give another "
            "--workdir"
        )
    return config


def _check_unused(path: str | os.PathLike[str], folder: pathlib.Path) -> None:
    # A run killed while it wrote its config leaves only the temporary file.
    names = sorted(e.name for e in folder.iterdir() if not _TEMPORARY.fullmatch(e.name))
    if names:
        more = ", ..." if len(names) > 3 else ""
        raise InputError(
            f"--workdir={path} holds files but no {CONFIG}, so it is not a run's "
            f"({', '.join(names[:3])}{more}); give an empty or new folder"
        )


def _check_same(
    path: str | os.PathLike[str],
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    ignore: Sequence[str],
) -> None:
    differing = [
        f"{name} {_show(old.get(name, _MISSING))} -> {_show(new.get(name, _MISSING))}"
        for name in sorted({*old, *new})
        if not any(name == i or name.startswith(f"{i}.") for i in ignore)
        and old.get(name, _MISSING) != new.get(name, _MISSING)
    ]
    if differing:
        raise InputError(
            f"--workdir={path} belongs to a run with another config: {', '.join(differing)}; "
            "give another --workdir, or restore these values"
        )


def _show(value: Any) -> str:
    return "(absent)" if value is _MISSING else json.dumps(value)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        # An empty group is a value of its own, or a group that became empty would go unseen.
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _normalise(config: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in _flatten(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--config.{name}={value}: must be finite; give a number, or None")
    return plain(config)
