"""Several processes as one run: start, agreement, and clear words where one is missing.

``jax.distributed`` connects the processes. It must be started before anything uses a device, so
nothing here does so before ``joined``. Agreement goes through its coordinator, in text and with a
timeout, where a collective would wait for ever.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax._src import distributed as _state  # the only door to the coordinator's store
from jax.experimental import multihost_utils

from dec_diffusion.interrupt import StoppedError
from dec_diffusion.types import InputError, first_line

_MAX_SHUTDOWN = 30  # seconds for which a process that is done waits for the others to be
_DAY = 24 * 3600.0

_timeout = 300.0
_calls: dict[str, Iterator[int]] = {}


class LostProcessError(RuntimeError):
    """Another process of the run died or cannot be reached any more."""


class Pod(NamedTuple):
    """What the command line says about processes.

    Attributes:
        mode: ``auto`` joins where JAX detects a cluster of several processes or the three below
            are given, ``on`` always joins, ``off`` never.
        coordinator: host and port of process 0; None to detect.
        num_processes: of the run; None to detect.
        process_id: of this one, from 0; None to detect.
        timeout: seconds to wait for others: to start, to agree, to answer.
    """

    mode: Literal["auto", "on", "off"] = "auto"
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 300


@contextlib.contextmanager
def joined(pod: Pod, *, verbose: bool = True) -> Iterator[None]:
    """Be one of the processes of ``pod`` inside the block; nothing happens where there is one.

    If the others do not come in time, this process prints so and exits with status 2: JAX, which
    waits for them in C++, could only be aborted.

    Raises:
        InputError: the processes cannot come together.
        LostProcessError: one of them died later.
    """
    if not _wanted(pod):
        yield
        return
    global _timeout
    _timeout = float(pod.timeout)
    with _given_up_on(pod):
        _connect(pod)
        if verbose:
            print(
                f"process {jax.process_index()} of {jax.process_count()}: "
                f"{jax.local_device_count()} of {jax.device_count()} "
                f"{jax.local_devices()[0].platform} devices",
                flush=True,
            )
    try:
        yield
    except (InputError, StoppedError):
        _leave()
        raise
    except (ValueError, RuntimeError, TimeoutError) as error:
        if not _means_lost(error):
            raise
        raise LostProcessError(
            "another process of this run died or cannot be reached "
            f"({first_line(error)}); the same commands resume from the last checkpoint"
        ) from error
    _leave()


def exchange(topic: str, text: str, *, timeout: float | None = None) -> list[str]:
    """Give a text, get those of all processes, in their order.

    Args:
        topic: what it is about; all processes come to each of their calls in the same order.
        text: anything.
        timeout: seconds; that of ``Pod`` if None.

    Raises:
        InputError: a process did not come to this call in time.
    """
    client = _state.global_state.client
    if client is None or jax.process_count() == 1:
        return [text]
    prefix = f"dec_diffusion/{topic}/{next(_calls.setdefault(topic, itertools.count()))}"
    client.key_value_set(f"{prefix}/{jax.process_index()}", text)
    seconds = _timeout if timeout is None else timeout
    found = []
    for number in range(jax.process_count()):
        try:
            found.append(client.blocking_key_value_get(f"{prefix}/{number}", int(1000 * seconds)))
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"--distributed: process {number} of {jax.process_count()} did not come as far as "
                f"'{topic}' within {seconds:.0f} s; look at its output, or raise "
                "--distributed_timeout"
            ) from error
    return found


@contextlib.contextmanager
def together(topic: str, *, timeout: float | None = None) -> Iterator[None]:
    """Work in which all processes succeed or all fail.

    Raises:
        InputError: in every process, what one of them raised in the block.
        StoppedError: one of them was asked to stop.
    """
    try:
        yield
    except Exception as error:
        tell(topic, failure(error))
        raise
    for number, text in enumerate(exchange(topic, "", timeout=timeout)):
        if text:
            raise failed(number, text)


def tell(topic: str, text: str) -> None:
    """Give a text without waiting for those of the others."""
    with contextlib.suppress(InputError):
        exchange(topic, text, timeout=0.01)


def failure(error: Exception) -> str:
    """An error in words for other processes."""
    return f"{type(error).__name__}: {error}"


def failed(number: int, text: str) -> Exception:
    """What to raise here for a ``failure`` of another process, by its number."""
    kind, _, words = text.partition(": ")
    if kind == StoppedError.__name__:
        return StoppedError(words)
    return InputError(f"process {number} stopped: {text.removeprefix('InputError: ')}")


def wait_for_results() -> contextlib.AbstractContextManager[None]:
    """``together`` for what one process writes at the end while the others wait."""
    return together("results", timeout=_DAY)


def check_same(settings: Mapping[str, Any]) -> None:
    """Check that all processes were given the same settings.

    Raises:
        InputError: in every process, naming the first that differs.
    """
    own = json.dumps(settings, sort_keys=True, default=str)
    first, *others = map(json.loads, exchange("config", own))
    for number, other in enumerate(others, 1):
        for name in sorted({*first, *other}):
            here, there = other.get(name), first.get(name)
            if here != there:
                raise InputError(
                    f"--{name}={here}: given to process {number}, process 0 was started with "
                    f"{there}; give all processes the same command"
                )


def is_first() -> bool:
    """Whether this process is the one that reports and writes."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether it is true in any process; all must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _wanted(pod: Pod) -> bool:
    if pod.mode == "off":
        return False
    return pod.mode == "on" or pod.coordinator is not None or _detected()


def _detected() -> bool:
    """Whether this is one of several processes of a cluster that JAX knows how to join."""
    size = os.environ.get
    if "SLURM_STEP_NODELIST" in os.environ and "SLURM_PROCID" in os.environ:
        return int(size("SLURM_NTASKS", "1")) > 1
    if "OMPI_MCA_orte_hnp_uri" in os.environ:
        return int(size("OMPI_COMM_WORLD_SIZE", "1")) > 1
    # A TPU VM of one host has one name here, or none.
    hosts = size("TPU_WORKER_HOSTNAMES") or size("TPU_PROCESS_ADDRESSES") or ""
    return len(hosts.split(",")) > 1 or _on_tpu_pod()


def _on_tpu_pod() -> bool:
    """Whether this host is a worker of a TPU slice of several."""
    from jax._src import cloud_tpu_init
    from jax._src.clusters import cloud_tpu_cluster

    if not cloud_tpu_init.running_in_cloud_tpu_vm:
        return False
    try:
        cluster = cloud_tpu_cluster.GceTpuCluster
        return bool(cluster.is_env_present()) and cluster.get_process_count() > 1
    except (AttributeError, RuntimeError, ValueError, OSError):
        return False


@contextlib.contextmanager
def _given_up_on(pod: Pod) -> Iterator[None]:
    """Within the block the processes must come together in time."""
    watch = threading.Timer(pod.timeout, _give_up, [pod])
    watch.daemon = True
    watch.start()
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise InputError(_not_together(pod, error)) from error
    finally:
        watch.cancel()


def _connect(pod: Pod) -> None:
    # SIGTERM is ours to handle: the coordinator's own handler would only swallow it.
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        pod.coordinator,
        pod.num_processes,
        pod.process_id,
        initialization_timeout=pod.timeout + 60,
        heartbeat_timeout_seconds=pod.timeout,
        shutdown_timeout_seconds=min(pod.timeout, _MAX_SHUTDOWN),
    )


def _give_up(pod: Pod) -> None:
    print(f"error: {_not_together(pod)}", file=sys.stderr, flush=True)
    os._exit(2)


def _not_together(pod: Pod, error: Exception | None = None) -> str:
    reason = f" ({first_line(error)})" if error else ""
    if pod.coordinator is None and error:
        return (
            f"--distributed={pod.mode}: JAX cannot tell which processes make this run{reason}; "
            "give --coordinator, --num_processes and --process_id"
        )
    name = f"--coordinator={pod.coordinator}" if pod.coordinator else f"--distributed={pod.mode}"
    this = "" if pod.process_id is None else f", this is process {pod.process_id}"
    count = "the" if pod.num_processes is None else str(pod.num_processes)
    return (
        f"{name}: {count} processes did not come together within {pod.timeout} s{this}{reason}; "
        "start all of them, each with a --process_id of its own, and see that they reach process 0"
    )


_LOST = (
    "gloo",
    "connection closed",
    "connection reset",
    "heartbeat",
    "unavailable",
    "coordination",
    "nccl",
    "deadline",
)


def _means_lost(error: Exception) -> bool:
    text = str(error).lower()
    return any(word in text for word in _LOST)


def _leave() -> None:
    """Say goodbye, so that no process takes another's end for its death.

    Only if all do: alone, JAX would wait, and then end the process with a stack trace.
    """
    with contextlib.suppress(InputError, RuntimeError, ValueError):
        exchange("end", "", timeout=_MAX_SHUTDOWN)
        # A process that gave up waiting has left its word there all the same, but none here.
        exchange("left", "", timeout=_MAX_SHUTDOWN)
        jax.distributed.shutdown()
