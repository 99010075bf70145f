"""Layouts: one device, many, and several real processes give the same run, and stop together."""

import functools
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
from absl import flags

from dec_diffusion import main, options

ROOT = pathlib.Path(__file__).resolve().parents[1]
METHODS = ("clusterddpm", "clusterddpm_layers", "diec", "neural_mixture")
slow = pytest.mark.slow
every_method = pytest.mark.parametrize(
    "name", [pytest.param(m, marks=() if m == "neural_mixture" else slow) for m in METHODS]
)
START = 120  # seconds for processes of a loaded machine to come together

# Simulated devices of one process, and processes on this machine.
Layout = tuple[int, int]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    flags = os.environ.get("XLA_FLAGS", "")
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
    }


def start(arguments: list[str], devices: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment(devices),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(processes: "list[subprocess.Popen[str]]", timeout: float = 400) -> list[str]:
    """Wait for all; their output. None outlives the test."""
    try:
        return [p.communicate(timeout=timeout)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()


# -- the same run, however it is laid out --


class Outcome(NamedTuple):
    clusters: list[np.ndarray]
    labels: np.ndarray
    responsibilities: np.ndarray
    compiled: np.ndarray


def train(folder: pathlib.Path, layout: Layout, iterations: int, name: str) -> Outcome:
    """Run ``layouts.py`` with so many processes of so many devices; what the method came to."""
    folder.mkdir(exist_ok=True)
    count, devices = layout
    script = [str(ROOT / "tests" / "layouts.py"), str(folder), name, str(iterations)]
    pod = [f"localhost:{free_port()}", str(count)] if count > 1 else []
    numbers = [[str(i)] for i in range(count)] if count > 1 else [[]]
    processes = [start([*script, *pod, *number], devices) for number in numbers]
    outputs = finish(processes)
    assert [p.returncode for p in processes] == [0] * count, "\n".join(outputs)
    for number, output in enumerate(outputs if count > 1 else []):
        assert f"process {number} of {count}: {devices} of {count * devices} cpu" in output
    return read(folder / f"{name}.npz")


def read(path: pathlib.Path) -> Outcome:
    with np.load(path) as found:
        clusters = [found[f"arr_{i}"] for i in range(len(found.files) - 3)]
        return Outcome(clusters, found["labels"], found["responsibilities"], found["compiled"])


def assert_same(found: Outcome, expected: Outcome) -> None:
    for a, b in zip(found.clusters, expected.clusters, strict=True):
        if a.dtype.kind == "f":
            scale = max(1.0, float(np.abs(b).max(initial=0)))
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)
    assert (found.labels == expected.labels).mean() >= 0.999
    np.testing.assert_allclose(found.responsibilities, expected.responsibilities, atol=1e-4)


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> Callable[[str], Outcome]:
    """Four iterations of a method in one process of eight devices."""

    @functools.cache
    def run(name: str) -> Outcome:
        return train(tmp_path_factory.mktemp("runs"), (1, 8), 4, name)

    return run


@every_method
def test_layouts_agree_and_restore_what_others_saved(name, eight, tmp_path):
    # Two iterations in two processes of four devices, then two more in one process of one.
    assert len(train(tmp_path, (2, 4), 2, name).compiled) == 2
    assert_same(train(tmp_path, (1, 1), 2, name), eight(name))
    assert len(np.unique(eight(name).labels)) > 1


@every_method
def test_nothing_is_compiled_after_the_first_iteration(name, eight):
    # The first phase has one iteration; those of the second come after.
    counts = eight(name).compiled
    assert counts[-1] == counts[-2] and counts[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("layout", [(1, 1), (2, 4), (4, 2)])
def test_every_layout_from_the_start(name, layout, eight, tmp_path):
    found = train(tmp_path / "run", layout, 4, name)
    assert_same(found, eight(name))
    assert found.compiled[-1] == found.compiled[-2]


# -- stopping --


@pytest.fixture
def pod(tmp_path) -> Iterator[Callable[..., "list[subprocess.Popen[str]]"]]:
    """``pod()`` starts the two processes of a long run of the command line."""
    started: list[subprocess.Popen[str]] = []

    def run(*more: str, count: int = 2, timeout: int = START) -> "list[subprocess.Popen[str]]":
        address = f"localhost:{free_port()}"
        command = [
            "-m", "dec_diffusion.main", "--config=neural_mixture:blobs",
            f"--workdir={tmp_path / 'run'}", "--config.method.iterations=100000",
            "--config.method.steps=1", "--config.train.checkpoint_every=5",
            "--config.train.evaluate_every=100000", f"--distributed_timeout={timeout}",
            f"--coordinator={address}", "--num_processes=2", *more,
        ]  # fmt: skip
        started.extend(start([*command, f"--process_id={i}"], 1) for i in range(count))
        return started[-count:]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def iterations(workdir: pathlib.Path) -> int:
    try:
        return len((workdir / "metrics.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


def wait_for(workdir: pathlib.Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while iterations(workdir) < count:
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.1)


def checkpoints(workdir: pathlib.Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.mark.slow
def test_processes_stop_together_and_the_same_commands_go_on(pod, tmp_path):
    workdir = tmp_path / "run"
    processes = pod()
    wait_for(workdir, 3)
    processes[1].send_signal(signal.SIGTERM)  # one is asked, both stop
    outputs = finish(processes)
    assert [p.returncode for p in processes] == [main.STOPPED] * 2, outputs
    stopped = int(re.findall(r"stopped at step (\d+)", outputs[0])[0])
    assert checkpoints(workdir)[-1] == iterations(workdir) == stopped
    # The same commands; one of the processes is lost.
    processes = pod()
    wait_for(workdir, stopped + 6)
    processes[1].kill()
    before = time.monotonic()
    output = finish(processes)[0]
    assert time.monotonic() - before < START
    assert f"resuming at step {stopped}" in output
    assert processes[0].returncode == main.LOST, output
    assert output.count("error: ") == 1 and "another process" in output.splitlines()[-1]
    # And again, from the last checkpoint.
    kept = checkpoints(workdir)[-1]
    assert kept > stopped
    before = iterations(workdir)  # a resumed run forgets those after its checkpoint
    processes = pod()
    wait_for(workdir, before + 1)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    outputs = finish(processes)
    assert f"resuming at step {kept}" in outputs[0]
    assert [p.returncode for p in processes] == [main.STOPPED] * 2, outputs


APART = """
import sys, time
from dec_diffusion import distributed
from dec_diffusion.interrupt import StoppedError

number, port, case = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed._MAX_SHUTDOWN = 2
with distributed.joined(distributed.Pod("on", f"localhost:{port}", 2, number), verbose=False):
    if case == "stop":
        try:
            with distributed.together("work"):
                if number == 1:
                    raise StoppedError("stopped, as asked")
                time.sleep(5)  # longer than the other waits for this one to end
        except StoppedError as error:
            print(error)
    elif number == 1:  # gives up, and is gone before the other is done
        try:
            with distributed.together("work", timeout=0.5):
                pass
        except Exception as error:
            print(error)
            raise
    else:
        time.sleep(5)
        print("done")
"""


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("stop", ["stopped, as asked", "stopped, as asked"]),
        ("give up", ["done", "process 0 of 2 did not come as far as 'work' within 0 s"]),
    ],
)
def test_what_one_process_does_is_no_crash_of_the_other(case, said):
    """Neither where one is asked to stop, nor where one has given up waiting and is gone."""
    port = str(free_port())
    processes = [start(["-c", APART, str(i), port, case], 1) for i in range(2)]
    outputs = finish(processes)
    assert said[0] in outputs[0] and said[1] in outputs[1], outputs
    assert processes[0].returncode == 0, outputs[0]
    assert "Check failure" not in outputs[0]


# -- pods that cannot form --


def test_a_process_alone_gives_up_in_one_line(pod):
    processes = pod(count=1, timeout=3)
    (output,) = finish(processes)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert processes[0].returncode == 2, output
    assert len(errors) == 1 and "2 processes did not come together within 3 s" in errors[0]


def test_processes_with_different_settings_are_refused(tmp_path):
    address = f"localhost:{free_port()}"
    command = [
        "-m", "dec_diffusion.main", "--config=neural_mixture:blobs", f"--workdir={tmp_path / 'w'}",
        f"--coordinator={address}", "--num_processes=2", f"--distributed_timeout={START}",
    ]  # fmt: skip
    processes = [start([*command, f"--process_id={i}", f"--config.seed={i}"], 1) for i in range(2)]
    outputs = finish(processes)
    assert processes[1].returncode == 2
    assert "--config.seed=1: given to process 1, process 0 was started with 0" in outputs[1]
    assert processes[0].returncode == 2, outputs[0]
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--coordinator=h:1"], "--num_processes is missing: it goes with --coordinator"),
        (["--process_id=0"], "--coordinator is missing"),
        (["--coordinator=h:1", "--num_processes=2"], "--process_id is missing"),
        (["--coordinator=h:1", "--num_processes=2", "--process_id=2"], "between 0 and 1"),
        (["--coordinator=h:1", "--num_processes=2", "--process_id=-1"], "between 0 and 1"),
        (["--coordinator=h:1", "--num_processes=0", "--process_id=0"], "at least 1"),
        (["--coordinator=h", "--num_processes=2", "--process_id=0"], "write HOST:PORT"),
        (["--coordinator=h:99999", "--num_processes=2", "--process_id=0"], "write HOST:PORT"),
        (["--coordinator=h:1", "--distributed=off"], "contradicts --distributed=off"),
        (["--distributed_timeout=0"], "at least 1 second"),
        (["--distributed=maybe"], "auto|on|off"),
    ],
)
def test_half_of_a_pod_is_refused(given, message):
    with pytest.raises(flags.Error, match=re.escape(message)):
        options.parse(["main", "--config=clusterddpm", *given])
