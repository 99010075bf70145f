"""TensorBoard event files, and what happens without its package."""

import json
import pathlib
import struct
import sys

import pytest

from dec_diffusion import loggers, main, options, train
from dec_diffusion.command import load_config
from dec_diffusion.types import InputError

# As small as that, some clusters are empty.
pytestmark = pytest.mark.filterwarnings("ignore::dec_diffusion.train.EmptyClusterWarning")
SMALL = [
    "--config=neural_mixture:blobs",
    "--config.method.networks=1",
    "--config.method.heads=1",
    "--config.method.width=8",
    "--config.method.hidden=4",
    "--config.method.iterations=3",
    "--config.method.steps=2",
    "--config.data.limit=120",
    "--config.train.batch_size=60",
    "--config.train.evaluate_every=2",
    "--config.train.checkpoint_every=1",
]


def events(folder: pathlib.Path) -> list[tuple[int, str, float, float]]:
    """Step, tag, value and time of every scalar, read with nothing but the message's definition."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.iterdir()
    content, found, at = file.read_bytes(), [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        event = Event.FromString(content[at + 12 : at + 12 + length])
        at += 16 + length
        found += [(event.step, v.tag, v.simple_value, event.wall_time) for v in event.summary.value]
    return found


def expected(workdir: pathlib.Path) -> dict[tuple[int, str], float]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        (r["step"], f"{r['phase']}/{name}"): value
        for r in records
        for name, value in r.items()
        if name not in ("step", "phase", "iteration")
    }


@pytest.mark.slow
def test_events_are_the_metrics_from_the_start_whatever_happened(tmp_path):
    pytest.importorskip("tensorboardX")
    config = load_config(options.parse(["main", *SMALL]))
    run = tmp_path / "run"
    train.fit(config, run, verbose=0)
    assert not (run / "tensorboard").exists()
    metrics = (run / "metrics.jsonl").read_bytes()
    # Of a run that is complete, of the same again, and of one that lost its last iteration.
    for resumed in (False, False, True):
        if resumed:
            (run / "summary.json").unlink()
            (run / "checkpoints" / "6").rename(tmp_path / "lost")
        train.fit(config, run, logger="tensorboard", verbose=0)
        found = events(run / "tensorboard")
        assert {(step, tag) for step, tag, _, _ in found} == set(expected(run))
        assert len(found) == len(expected(run))
        for step, tag, value, _ in found:
            assert value == pytest.approx(expected(run)[step, tag], rel=1e-6)
        times = [time for *_, time in found]
        assert times == sorted(times)
    assert len((run / "metrics.jsonl").read_bytes().splitlines()) == len(metrics.splitlines()) == 3


def test_without_the_package_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    argv = ["main", *SMALL, "--logger=tensorboard", f"--workdir={tmp_path / 'run'}"]
    assert main.execute(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--logger=tensorboard: needs the package tensorboardX" in line
    assert line.endswith("pip install 'dec_diffusion[tensorboard]'")
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_logged_to_is_refused():
    config = load_config(options.parse(["main", *SMALL]))
    with pytest.raises(InputError, match="--logger=wandb: unknown; choose one of none"):
        train.fit(config, None, logger="wandb", verbose=0)
    pytest.importorskip("tensorboardX")
    with pytest.raises(InputError, match="needs a workdir"):
        train.fit(config, None, logger="tensorboard", verbose=0)


def test_both_lists_of_loggers_are_one():
    assert loggers.NAMES == options.LOGGERS
