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
reader or a killed run never sees half a file. Checkpoints are saved by all processes together.

The checkpoint library writes a step into a temporary folder and renames it, so a killed save leaves
no half step behind; but it reads back flipped bits in the arrays without noticing. Each step
therefore carries a CRC-32 of every array, computed on the host when the step is saved (about 5 ms
for 20 MB, against about 100 ms for the write behind it) and compared when it is restored.

Start ``jax.distributed`` (where it is used) before calling anything here: telling the processes
apart starts the JAX backend.
"""

import contextlib
import csv
import io
import json
import logging
import math
import os
import pathlib
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dec_diffusion.types import InputError, first_line

_LOG = logging.getLogger(__name__)

CONFIG = "config.json"
METRICS = "metrics.jsonl"
ASSIGNMENTS = "assignments.csv"
CHECKPOINTS = "checkpoints"
SEEDS = "seeds.json"

_MISSING = object()


# -- small files --


def _plain(value: Any) -> Any:
    """``value`` in the types of JSON: arrays become lists, NaN and infinities ``None``."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return _plain(np.asarray(value).tolist())
    raise TypeError(f"{type(value).__name__} has no form in JSON: {value!r}")


_PART = 2**20


def _write_atomic(path: pathlib.Path, content: str | bytes | Iterable[str]) -> None:
    """Replaces ``path`` by ``content`` in one step; what was there stays until that step.

    Long texts come in parts, so that they are never in memory as a whole.

    File names that are not valid UTF-8 come back from Python with surrogates, and are written as
    the bytes they were.
    """
    temporary = path.with_name(f".{path.name}.tmp")
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
    return json.dumps(_plain(obj), indent=2, allow_nan=False) + "\n"


def _is_writer() -> bool:
    return jax.process_index() == 0


# -- opening --


class Assigned(NamedTuple):
    """What ``assignments.csv`` says of every input.

    Attributes:
        cluster: int32 [n].
        probability: float32 [n], of that cluster.
        entropy: float32 [n], of the probabilities of all clusters, in nats.
        prototype: [n], the closest prototype of that cluster: its file, or else its row in the
            training data; "" where there is none.
    """

    cluster: np.ndarray
    probability: np.ndarray
    entropy: np.ndarray
    prototype: Sequence[str]


class Workdir(NamedTuple):
    """An opened workdir. All methods may be called by every process; process 0 writes."""

    path: pathlib.Path

    def checkpoints(self, *, keep: int = 3) -> "Checkpoints":
        """The run's checkpoints, for saving: close them, or use them in a ``with`` block."""
        return Checkpoints(self.path / CHECKPOINTS, keep=keep)

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
        plain = {
            k: np.char.encode(x, "utf-8", "surrogateescape") if x.dtype.kind == "U" else x
            for k, x in arrays.items()
        }
        out = io.BytesIO()
        np.savez(out, allow_pickle=False, **plain)
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

    def write_assignments(
        self, index: Iterable[int], path: Iterable[str | os.PathLike[str]], assigned: Assigned
    ) -> None:
        """Writes ``assignments.csv``, one row per input in the order given.

        Args:
            index: The rows of the data set, [n].
            path: The file each row came from, "" where there is none, [n].
            assigned: The other columns; numbers are written with just the digits that their dtype
                needs.
        """

        def text() -> Iterator[str]:
            out = io.StringIO()
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(["index", "path", *Assigned._fields])
            for i, p, c, q, h, name in zip(index, path, *assigned, strict=True):
                writer.writerow([int(i), os.fspath(p), int(c), str(q), str(h), name])
                if out.tell() > _PART:
                    yield out.getvalue()
                    out.seek(0)
                    out.truncate()
            yield out.getvalue()

        if _is_writer():
            _write_atomic(self.path / ASSIGNMENTS, text())

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Appends one record to ``metrics.jsonl``; it is with the system when this returns."""
        if _is_writer():
            with open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(_plain(record), allow_nan=False) + "\n")

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
        try:
            file = self.path / ASSIGNMENTS
            with open(file, newline="", encoding="utf-8", errors="surrogateescape") as opened:
                rows = list(csv.DictReader(opened))
            return Assigned(
                np.array([int(r["cluster"]) for r in rows], np.int32),
                np.array([float(r["probability"]) for r in rows], np.float32),
                np.array([float(r["entropy"]) for r in rows], np.float32),
                [r["prototype"] for r in rows],
            )
        except (FileNotFoundError, KeyError, TypeError, ValueError):
            return None


class Memory:
    """Stands in for a workdir where a run shall leave nothing on disk; keeps its metrics."""

    path = "none"

    def __init__(self) -> None:
        self._metrics: list[dict[str, Any]] = []

    def checkpoints(self, *, keep: int = 3) -> "NoCheckpoints":
        return NoCheckpoints()

    def write_json(self, name: str, obj: Any) -> None:
        pass

    def read_json(self, name: str) -> None:
        return None

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        self._metrics.append(_plain(record))

    def read_metrics(self) -> list[dict[str, Any]]:
        return self._metrics

    def truncate_metrics(self, step: int) -> None:
        pass


class NoCheckpoints(contextlib.nullcontext):
    """Stands in for ``Checkpoints`` where nothing is saved."""

    def steps(self) -> list[int]:
        return []

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> bool:
        return False

    def restore_latest(self, template: Any) -> None:
        return None

    def wait(self) -> None:
        pass

    def __enter__(self) -> "NoCheckpoints":
        return self


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
    names = sorted({entry.name for entry in folder.iterdir()} - {f".{CONFIG}.tmp"})
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
    return _plain(config)


# -- checkpoints --


class Restored(NamedTuple):
    """A checkpoint read back."""

    step: int
    state: Any
    meta: dict[str, Any]


class Checkpoints:
    """The newest ``keep`` states of a run, one folder per step.

    A state is a pytree of arrays; typed PRNG keys are refused, because keys are derived from the
    step and never stored. Arrays are stored under their path in the tree, empty ones not at all.
    In a run of several processes each calls every method, in the same order.

    Saving is asynchronous: when ``save`` returns, the arrays may be donated, and the write goes on
    in the background until the next ``save``, ``wait`` or ``close``.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, keep: int = 3, read_only: bool = False
    ) -> None:
        """Opens a folder of checkpoints.

        Args:
            folder: Made where it does not exist, unless ``read_only``.
            keep: How many of the newest steps to keep.
            read_only: Change nothing on disk, so that a run still under way can be read.
        """
        _silence_orbax()
        self._folder = pathlib.Path(folder).expanduser().absolute()
        self._read_only = read_only
        if read_only:
            options = ocp.CheckpointManagerOptions(
                read_only=True, save_interval_steps=0, create=False, lightweight_initialize=True
            )
        else:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                lightweight_initialize=True,
            )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def steps(self) -> list[int]:
        """The steps on disk, in ascending order, whether they can be read or not."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> bool:
        """Begins to save a step; waits first for the one before it.

        Args:
            step: At least 0.
            state: A pytree of arrays.
            meta: Anything that JSON holds; NaN becomes null.

        Returns:
            Whether the step is being saved; not when it is already on disk.

        Raises:
            InputError: If the save before this one failed, say on a full disk.
        """
        self.wait()
        if step in self.steps():
            return False
        arrays = _by_name(state)
        header = {
            "meta": _plain(meta),
            "arrays": {name: _describe(x) for name, x in arrays.items()},
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave({n: x for n, x in arrays.items() if x.size}),
            header=ocp.args.JsonSave(header | {"crc32": _crc_of_json(header)}),
        )
        with _failed_saves_reported(self._folder):
            # force: after a fall-back the next step may lie before the newest one on disk.
            return self._manager.save(step, args=args, force=True)

    def restore_latest(self, template: Any) -> Restored | None:
        """Restores the newest step that is intact.

        Steps that turn out damaged are reported in one line each and, once an older one has been
        restored, renamed to ``<step>.damaged``, so that their steps can be saved again.

        Args:
            template: A pytree of arrays or ``jax.ShapeDtypeStruct`` with the structure of the saved
                state, or a function from the meta saved with it to such a tree. A leaf with a
                sharding (the live state, say) is restored onto it, on any
                number of devices; one without (numpy, or from ``jax.eval_shape``) comes back as a
                numpy array.

        Returns:
            The step, the state and the meta saved with it; None if there are no checkpoints.

        Raises:
            InputError: If there are checkpoints but none is intact, or the newest intact one holds
                another state than the template's.
        """
        self.wait()
        self._manager.reload()
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                with _late_reads_ignored():
                    meta, arrays = self._read(step)
            except Exception as error:
                # Whatever the files make the readers raise, the remedy is the step before.
                damaged[step] = first_line(error)
                continue
            wanted = template(meta) if callable(template) else template
            state = _fill(wanted, arrays, self._folder / str(step))
            for bad, reason in damaged.items():
                where = self._folder / str(bad)
                _LOG.warning("checkpoint %s is damaged (%s); using the one before", where, reason)
            self._set_aside(list(damaged))
            return Restored(step, state, meta)
        if damaged:
            raise InputError(
                f"{self._folder}: none of the checkpoints can be read (steps "
                f"{', '.join(map(str, sorted(damaged)))}: {damaged[max(damaged)]}); delete this "
                "folder to start again, or give another --workdir"
            )
        return None

    def wait(self) -> None:
        """Waits until the save under way is on disk.

        Raises:
            InputError: If it failed.
        """
        with _failed_saves_reported(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save under way and releases the threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # The save under way would wait for it.
        if not _other_process_lost(error):
            self.close()

    def _read(self, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The meta and the arrays of a step; raises anything if the files are not as saved."""
        header = self._manager.restore(
            step, args=ocp.args.Composite(header=ocp.args.JsonRestore())
        )["header"]
        if _crc_of_json({k: header[k] for k in ("meta", "arrays")}) != header["crc32"]:
            raise ValueError("checksum of the header differs")
        empty = {
            name: np.zeros(d["shape"], np.dtype(d["dtype"])) for name, d in header["arrays"].items()
        }
        # Through the host, so that only the files can fail here: a device out of memory must not
        # pass for a damaged checkpoint.
        stored = {name: x for name, x in empty.items() if x.size}
        restore = ocp.args.Composite(state=ocp.args.StandardRestore(stored))
        arrays = empty | self._manager.restore(step, args=restore)["state"]
        for name, described in header["arrays"].items():
            crc = described["crc32"]
            if crc is not None and _crc(arrays[name]) != crc:
                raise ValueError(f"checksum of {name} differs")
        return header["meta"], arrays

    def _set_aside(self, steps: Sequence[int]) -> None:
        if not steps or self._read_only:
            return
        if _is_writer():
            for step in steps:
                source = self._folder / str(step)
                target = source.with_name(f"{step}.damaged")
                copies = 1
                while target.exists():
                    copies += 1
                    target = source.with_name(f"{step}.damaged-{copies}")
                source.rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("dec_diffusion.workdir: damaged steps set aside")
        self._manager.reload()


def _by_name(state: Any) -> dict[str, Any]:
    """The leaves of a state by their path in it."""
    named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "state"
        if not isinstance(leaf, np.ndarray | np.generic | jax.Array | jax.ShapeDtypeStruct):
            raise TypeError(f"{name} is a {type(leaf).__name__}; a state holds arrays only")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{name} is a PRNG key; derive keys from the step instead")
        if name in named:
            raise ValueError(f"two leaves of the state are called {name}")
        named[name] = leaf
    return named


def _describe(x: Any) -> dict[str, Any]:
    # No process holds the whole of an array sharded over several of them: such an array, which
    # plain data parallelism does not make, goes without a checksum.
    whole = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
    crc = _crc(np.asarray(x)) if whole else None
    return {"shape": list(x.shape), "dtype": np.dtype(x.dtype).name, "crc32": crc}


def _crc(x: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


def _crc_of_json(obj: Any) -> int:
    return zlib.crc32(json.dumps(obj, sort_keys=True).encode())


def _fill(template: Any, arrays: Mapping[str, np.ndarray], where: pathlib.Path) -> Any:
    """The template's tree with the arrays read, each placed where its leaf is."""
    wanted = _by_name(template)
    differing = [
        f"{name} {_shape(arrays.get(name))} there, {_shape(wanted.get(name))} here"
        for name in sorted({*wanted, *arrays})
        if _shape(arrays.get(name)) != _shape(wanted.get(name))
    ]
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise InputError(
            f"{where} holds the state of another model or version ({differing[0]}{more}); "
            "give another --workdir"
        )
    leaves = [_place(arrays[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _shape(x: Any) -> str:
    return "absent" if x is None else f"{np.dtype(x.dtype).name}{list(x.shape)}"


def _place(x: np.ndarray, leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return x
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


@contextlib.contextmanager
def _late_reads_ignored() -> Iterator[None]:
    """Hides that, once the read of one array has failed, those still under way find no listener.

    Python would print a traceback for each; the failure itself is raised all the same.
    """
    hook = sys.unraisablehook

    def ignore(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = ignore
    try:
        yield
    except Exception:
        time.sleep(0.2)  # the reads under way end meanwhile
        raise
    finally:
        sys.unraisablehook = hook


@contextlib.contextmanager
def _failed_saves_reported(folder: pathlib.Path) -> Iterator[None]:
    """Turns the failure of a background save into one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if _other_process_lost(error):
            raise
        raise InputError(
            f"{folder}: a checkpoint could not be written ({first_line(error)}); make room "
            "there, then run the same command again"
        ) from error


def _other_process_lost(error: BaseException | None) -> bool:
    """Whether a failure may be that of another process, and not of this one's disk."""
    kinds = (RuntimeError, ValueError, TimeoutError)
    several = jax.process_count() > 1
    return several and isinstance(error, kinds) and not isinstance(error, InputError)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in pathlib.PurePath(record.pathname).parts


def _silence_orbax() -> None:
    """Keeps orbax's running commentary off the console; its failures still raise.

    It logs through the one logger that every absl program shares, hence a filter, not a level.
    """
    logging.getLogger("absl").addFilter(_not_from_orbax)
