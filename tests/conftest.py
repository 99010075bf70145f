"""Settings and helpers shared by all tests."""

import contextlib
import gc
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping

import pytest
import threadpoolctl

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Before anything imports jax, and inherited by the processes that tests start: compiled programs
# are kept between runs and shared by all of them. Set the first variable to keep them elsewhere.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Where in the sources an operation of a program came from, which nobody reads here.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# As `main.run` does: tracing makes hundreds of thousands of objects that stay.
gc.set_threshold(100_000)


def _keep_to_own_cores() -> None:
    """Of several test processes each has its share of the cores, as have those that it starts.

    Otherwise each would start a thread for every core, and these wait for each other busily: 8% of
    the time of two processes on two cores.
    """
    number = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if number and hasattr(os, "sched_setaffinity"):
        count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        cores = sorted(os.sched_getaffinity(0))
        own = cores[int(number) % len(cores) :: count]
        os.sched_setaffinity(0, own)
        # Libraries that a plugin has loaded already have threads for all cores.
        threadpoolctl.threadpool_limits(len(own))


_keep_to_own_cores()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests, those with a timeout of their own, first: none waits for them alone."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


RunPython = Callable[..., "subprocess.CompletedProcess[str]"]
StartPython = Callable[..., "subprocess.Popen[str]"]


def _environment(devices: int | None, env: Mapping[str, str] | None) -> dict[str, str]:
    full = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(env or {})}
    if devices is not None:
        flags = [
            flag
            for flag in full.get("XLA_FLAGS", "").split()
            if not flag.startswith("--xla_force_host_platform_device_count")
        ]
        flags.append(f"--xla_force_host_platform_device_count={devices}")
        full |= {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    return full


def _command(code: str, args: tuple[object, ...]) -> list[str]:
    return [sys.executable, "-c", code, *map(str, args)]


@pytest.fixture(scope="session")
def run_python() -> RunPython:
    """``run_python(code, *args, devices=8)`` runs code in a process of its own.

    ``devices`` is how many CPU devices JAX sees there, ``env`` adds variables. Returns the
    completed process with its ``stdout`` and ``stderr``, and fails the test, showing both, if the
    exit status is not ``status`` (None allows any).
    """

    def run(
        code: str,
        *args: object,
        devices: int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: os.PathLike[str] | str | None = None,
        status: int | None = 0,
        timeout: float = 300,
    ) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            _command(code, args),
            env=_environment(devices, env),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if status is not None and done.returncode != status:
            pytest.fail(
                f"exit status {done.returncode}, not {status}\n{done.stdout}\n{done.stderr}"
            )
        return done

    return run


@pytest.fixture
def start_python() -> Iterator[StartPython]:
    """``start_python(code, *args)`` starts code in a process of its own, to be killed say.

    Returns the process, its output to be read from ``stdout`` and ``stderr``. The test's end kills
    what still runs.
    """
    with contextlib.ExitStack() as stack:

        def start(
            code: str,
            *args: object,
            devices: int | None = None,
            env: Mapping[str, str] | None = None,
            cwd: os.PathLike[str] | str | None = None,
        ) -> "subprocess.Popen[str]":
            process = subprocess.Popen(
                _command(code, args),
                env=_environment(devices, env),
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start
