"""Checkpoints: the newest few states of a run, saved asynchronously and checked when read.

The checkpoint library writes a step into a temporary folder and renames it, so a killed save leaves
no half step behind; but it reads back flipped bits in the arrays without noticing. Each step
therefore carries a CRC-32 of every array, computed on the host when the step is saved (about 5 ms
for 20 MB, against about 100 ms for the write behind it) and compared when it is restored.

All processes save and restore together: start ``jax.distributed`` (where it is used) before calling
anything here.
"""

import contextlib
import json
import logging
import os
import pathlib
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dec_diffusion.plain import plain
from dec_diffusion.types import InputError, first_line

_LOG = logging.getLogger(__name__)


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
            "meta": plain(meta),
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
        if jax.process_index() == 0:
            for step in steps:
                source = self._folder / str(step)
                target = source.with_name(f"{step}.damaged")
                copies = 1
                while target.exists():
                    copies += 1
                    target = source.with_name(f"{step}.damaged-{copies}")
                source.rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("dec_diffusion: damaged steps set aside")
        self._manager.reload()


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
