"""The command line as a person meets it: whole runs, kills, resumes, and every kind of bad input.

Runs are real processes, on a network as small as it gets. Bad input is answered before anything is
computed, so those tests call ``main.execute``, all but its exit, in this process.
"""

import csv
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import time
import tomllib

import jax
import numpy as np
import pytest
from PIL import Image

from dec_diffusion import config as configs
from dec_diffusion import main, train
from dec_diffusion.config import Config
from dec_diffusion.methods.clusterddpm import ClusterDDPM

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODULE = "import runpy; runpy.run_module('dec_diffusion.main', run_name='__main__', alter_sys=True)"

CLUSTERS, EXAMPLES, STEPS = 4, 200, 20
ITERATIONS = {"pretrain": 2, "em": 6}
LAST = STEPS * sum(ITERATIONS.values())
TINY = [
    "--config=clusterddpm",
    f"--config.method.num_clusters={CLUSTERS}",
    "--config.method.latent=4",
    "--config.method.width=4",
    "--config.method.multipliers=1",
    "--config.method.encoder_multipliers=1",
    "--config.method.attention=",
    f"--config.method.pretrain_iterations={ITERATIONS['pretrain']}",
    "--config.method.balance_iterations=2",
    f"--config.method.em_iterations={ITERATIONS['em'] - 2}",
    f"--config.method.steps={STEPS}",
    "--config.method.mixture_restarts=2",
    "--config.method.sample_steps=4",
    # So that a run this short finds clusters at all: one cluster only would hide differences.
    "--config.method.learning_rate=0.01",
    "--config.method.pretrain_kl=0.0",
    "--config.method.kl_weight=0.001",
    "--config.method.ema=0.5",
    f"--config.data.limit={EXAMPLES}",
    "--config.train.batch_size=32",
    "--config.train.checkpoint_every=1",
    "--config.train.evaluate_every=2",
]
DOCUMENTED = {
    "config.json",
    "metrics.jsonl",
    "assignments.csv",
    "summary.json",
    "report.html",
    "clusters.png",
    "generated.png",
    "latents.png",
    "curves.png",
}
FORBIDDEN = ("tensorflow", "tensorflow_datasets", "torch")


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that nothing disturbed."""

    workdir: pathlib.Path
    stdout: str
    stderr: str
    forbidden: list[str]


@pytest.fixture(scope="module")
def finished(run_python, tmp_path_factory) -> Finished:
    """The first command, given in an empty folder."""
    cwd, poison, seen = (tmp_path_factory.mktemp(n) for n in ("empty", "poison", "seen"))
    for package in FORBIDDEN:
        (poison / f"{package}.py").write_text(
            f"open({str(seen / package)!r}, 'w').close()\nraise ImportError\n"
        )
    done = run_python(MODULE, *TINY, cwd=cwd, env={"PYTHONPATH": f"{poison}:{ROOT}"})
    (workdir,) = (cwd / "runs").iterdir()
    return Finished(workdir, done.stdout, done.stderr, sorted(p.name for p in seen.iterdir()))


@pytest.fixture
def copy(finished, tmp_path) -> pathlib.Path:
    """A copy of the finished workdir, to be damaged say."""
    return pathlib.Path(shutil.copytree(finished.workdir, tmp_path / "copy"))


def rows_of(file: pathlib.Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def metrics_of(workdir: pathlib.Path) -> list[dict]:
    """The records of a run, without what depends on the clock."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clock = {"seconds", "examples_per_second"}
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


def steps_of(workdir: pathlib.Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def digest(folder: pathlib.Path) -> dict[str, str]:
    """Every file below a folder, and what it holds."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    """Bitwise the same weights, mixture and assignments, and the same history."""
    a, b = train.load(one), train.load(other)
    assert a.step == b.step == LAST
    leaves, structure = jax.tree.flatten(a.state)
    others, other_structure = jax.tree.flatten(b.state)
    assert structure == other_structure
    for x, y in zip(leaves, others, strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert (one / "assignments.csv").read_bytes() == (other / "assignments.csv").read_bytes()
    assert metrics_of(one) == metrics_of(other)
    scores = [json.loads((w / "summary.json").read_text())["scores"] for w in (one, other)]
    assert scores[0] == scores[1]


# -- a whole run --


def test_the_first_run_leaves_every_documented_file(finished):
    files = {p.name for p in finished.workdir.iterdir() if p.is_file()}
    assert files >= DOCUMENTED
    assert not [name for name in files if name.endswith(".tmp")]
    for name in (n for n in files if n.endswith(".png")):
        with Image.open(finished.workdir / name) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) > 50
        assert pixels.std() > 0, f"{name} is blank"
    plain = json.loads((finished.workdir / "config.json").read_text())
    config = configs.from_dict(plain)
    assert finished.workdir.name == config.name
    assert (config.method.num_clusters, config.data.limit) == (CLUSTERS, EXAMPLES)


def test_assignments_have_one_row_per_example_in_input_order(finished):
    file = finished.workdir / "assignments.csv"
    assert file.read_text().splitlines()[0] == "index,path,cluster,probability"
    rows = rows_of(file)
    index = [int(row["index"]) for row in rows]
    assert len(rows) == EXAMPLES
    assert index == sorted(set(index))
    assert 0 <= index[0] < index[-1] < 1797
    assert {row["path"] for row in rows} == {""}
    assert {int(row["cluster"]) for row in rows} <= set(range(CLUSTERS))
    probability = np.array([float(row["probability"]) for row in rows])
    assert (probability >= 1 / CLUSTERS - 1e-6).all()
    assert (probability <= 1).all()
    # Not all alike, or other tests here would see no difference.
    assert len({row["cluster"] for row in rows}) > 1
    assert probability.std() > 0.01


def test_the_summary_scores_the_run_and_its_baselines(finished):
    summary = json.loads((finished.workdir / "summary.json").read_text())
    assert summary["data"]["examples"] == EXAMPLES
    assert summary["data"]["shape"] == [8, 8, 1]
    assert summary["training"]["steps"] == LAST
    assert summary["training"]["examples_per_second"] > 0
    clusters = np.array([int(r["cluster"]) for r in rows_of(finished.workdir / "assignments.csv")])
    assert summary["clusters"]["asked"] == CLUSTERS
    assert summary["clusters"]["found"] == len(np.unique(clusters))
    assert set(summary["baselines"]) >= {"kmeans_pixels", "gmm_pixels", "kmeans_latents"}
    for scores in [summary["scores"], *(b["scores"] for b in summary["baselines"].values())]:
        assert all(0 <= scores[name] <= 1 for name in ("acc", "nmi"))
    assert summary["baselines"]["kmeans_pixels"]["scores"]["acc"] > 0.3


def test_metrics_record_every_iteration_once(finished):
    records = metrics_of(finished.workdir)
    assert [r["step"] for r in records] == list(range(STEPS, LAST + 1, STEPS))
    expected = [(name, i + 1) for name, n in ITERATIONS.items() for i in range(n)]
    assert [(r["phase"], r["iteration"]) for r in records] == expected
    assert all(np.isfinite(r["loss"]) for r in records)
    scored = [r["step"] for r in records if "acc" in r]
    assert scored == [4 * STEPS, 6 * STEPS, LAST]
    assert steps_of(finished.workdir) == [LAST - STEPS, LAST]


def test_the_output_tells_progress_and_results(finished):
    lines = finished.stdout.splitlines()
    assert f"{EXAMPLES} examples of 8x8x1 (digits" in lines[0]
    assert lines[1].endswith(f"{LAST} steps")
    progress = [line for line in lines if re.match(r" *\d+%  ", line)]
    assert re.fullmatch(
        r"100%  em 6/6  0:00 left  [\d,]+ examples/s  loss \S+  .*acc \S+  nmi \S+", progress[-1]
    )
    assert any(line.startswith("this run ") for line in lines)
    assert f"results: {finished.workdir}" in lines
    assert "\r" not in finished.stdout
    # Nothing but our own warnings on standard error.
    assert all(line.startswith("warning: step ") for line in finished.stderr.splitlines())


def test_the_default_path_imports_no_other_framework(finished):
    assert finished.forbidden == []


def test_the_same_command_again_changes_nothing_and_quiet_is_quiet(run_python, finished):
    before = digest(finished.workdir)
    done = run_python(MODULE, *TINY, "--quiet", cwd=finished.workdir.parents[1])
    assert (done.stdout, done.stderr) == ("", "")
    assert digest(finished.workdir) == before


# -- killed and resumed --


def appears(*parts: str):
    """Whether a file or folder of that pattern is in the workdir."""
    return lambda workdir, _: any(workdir.glob("/".join(parts)))


def test_killed_at_any_moment_the_result_is_the_same(start_python, run_python, finished, tmp_path):
    workdir = tmp_path / "killed"
    command = [*TINY, f"--workdir={workdir}"]
    delay = random.Random().uniform(0.0, 10.0)
    print(f"random delay {delay}")  # shown if the test fails
    first = time.monotonic()
    moments = [
        ("the start", appears("config.json")),
        ("a save", appears("checkpoints", "*tmp*")),
        ("a later save", lambda w, old: {p.name for p in w.glob("checkpoints/*tmp*")} - old),
        (
            "a random moment",
            lambda w, old: time.monotonic() - first > delay or (w / "assignments.csv").exists(),
        ),
        ("the results", appears("assignments.csv")),
    ]
    killed = []
    for moment, reached in moments:
        process = start_python(MODULE, *command)
        old = {p.name for p in workdir.glob("checkpoints/*")}
        first = time.monotonic()
        while process.poll() is None and not reached(workdir, old):
            time.sleep(0.0005)
        if process.poll() is None:
            process.kill()
            killed.append(moment)
        process.communicate()
        if moment == "a save":
            # Only a complete save is renamed to what counts as a checkpoint.
            assert any(workdir.glob("checkpoints/*tmp*"))
    assert {"the start", "a save", "the results"} <= set(killed)
    assert not (workdir / "summary.json").exists()
    run_python(MODULE, *command)
    assert_same_run(finished.workdir, workdir)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(run_python, finished, copy):
    (copy / "summary.json").unlink()
    newest = copy / "checkpoints" / str(LAST)
    for file in (p for p in newest.rglob("*") if p.is_file()):
        content = bytearray(file.read_bytes())
        content[len(content) // 2 :] = b"\0" * (len(content) - len(content) // 2)
        file.write_bytes(content)
    done = run_python(MODULE, *TINY, f"--workdir={copy}")
    first, *others = done.stderr.splitlines()
    assert first.startswith(f"warning: checkpoint {newest} is damaged")
    assert all(line.startswith("warning: step ") for line in others)
    assert f"resuming at step {LAST - STEPS} of {LAST}" in done.stdout
    assert_same_run(finished.workdir, copy)


def test_a_changed_config_is_refused_with_its_fields(capsys, copy):
    before = digest(copy)
    changes = ["--config.method.latent=5", "--config.seed=1"]
    assert main.execute(["main", *TINY, *changes, f"--workdir={copy}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "method.latent 4 -> 5" in line
    assert "seed 0 -> 1" in line
    assert f"--workdir={copy}" in line
    assert "width" not in line
    assert digest(copy) == before


def test_what_changes_no_weight_may_change_on_resume(capsys, copy):
    change = "--config.train.keep_checkpoints=5"
    assert main.execute(["main", *TINY, change, f"--workdir={copy}"]) == 0
    assert json.loads((copy / "config.json").read_text())["train"]["keep_checkpoints"] == 5
    assert f"complete after {LAST} steps" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_and_spoils_nothing(run_python, tmp_path):
    workdir = tmp_path / "nan"
    command = [
        *TINY,
        "--config.method.learning_rate=1e35",
        "--config.method.clip=1e30",
        "--config.method.steps=1",
        "--config.method.pretrain_iterations=20",
        "--config.train.keep_checkpoints=100",
        f"--workdir={workdir}",
    ]
    done = run_python(MODULE, *command, status=1)
    (line,) = done.stderr.splitlines()
    found = re.search(r"not finite at step (\d+) .* last good checkpoint is step (\d+)", line)
    assert found, line
    failed, good = map(int, found.groups())
    assert good == failed - 1 == steps_of(workdir)[-1]
    assert "--config.method.learning_rate" in line
    for x in jax.tree.leaves(train.load(workdir).state):
        assert np.isfinite(np.asarray(x)).all()
    assert not (workdir / "assignments.csv").exists()
    before = digest(workdir / "checkpoints")
    again = run_python(MODULE, *command, status=1)
    assert again.stderr.splitlines() == [line]
    assert digest(workdir / "checkpoints") == before


# -- a trained run --


def test_predict_assigns_the_training_data_as_the_run_did(run_python, finished, copy):
    done = run_python(MODULE, "--mode=predict", f"--workdir={copy}")
    file = copy / "predict" / "assignments.csv"
    assert file.read_bytes() == (finished.workdir / "assignments.csv").read_bytes()
    assert done.stdout == f"{EXAMPLES} examples assigned: {file}\n"
    assert done.stderr == ""
    rest = {k: v for k, v in digest(copy).items() if not k.startswith("predict")}
    assert rest == digest(finished.workdir)


def test_predict_assigns_new_data_with_the_scaling_of_the_old(capsys, finished, copy, tmp_path):
    from sklearn.datasets import load_digits

    rows = rows_of(finished.workdir / "assignments.csv")
    index = np.array([int(row["index"]) for row in rows])
    images = load_digits().images.astype(np.uint8)
    # More than the training data, whose limit must not apply, and in another order.
    order = np.concatenate([index[::-1], np.arange(100)])
    np.save(tmp_path / "new.npy", images[order])
    new = ["--config.data.name=npy", f"--config.data.path={tmp_path / 'new.npy'}"]
    assert main.execute(["main", "--mode=predict", f"--workdir={copy}", *new]) == 0
    got = rows_of(copy / "predict" / "assignments.csv")
    assert [int(row["index"]) for row in got] == list(range(EXAMPLES + 100))
    got = got[:EXAMPLES][::-1]
    assert [row["cluster"] for row in got] == [row["cluster"] for row in rows]
    probability = [[float(row["probability"]) for row in r] for r in (got, rows)]
    np.testing.assert_allclose(*probability, atol=1e-4)


def test_one_image_is_enough_to_predict(finished, copy, tmp_path):
    from sklearn.datasets import load_digits

    rows = rows_of(finished.workdir / "assignments.csv")
    np.save(tmp_path / "new.npy", load_digits().images.astype(np.uint8)[[int(rows[7]["index"])]])
    new = ["--config.data.name=npy", f"--config.data.path={tmp_path / 'new.npy'}"]
    assert main.execute(["main", "--mode=predict", f"--workdir={copy}", *new]) == 0
    (got,) = rows_of(copy / "predict" / "assignments.csv")
    assert got["cluster"] == rows[7]["cluster"]


def test_predict_warns_of_other_units(capsys, copy, tmp_path):
    np.save(tmp_path / "new.npy", np.random.default_rng(0).random((20, 8, 8)))
    new = ["--config.data.name=npy", f"--config.data.path={tmp_path / 'new.npy'}"]
    with pytest.warns(UserWarning, match="the training data 0 to 16; give data in the same units"):
        assert main.execute(["main", "--mode=predict", f"--workdir={copy}", *new]) == 0


@pytest.mark.parametrize("shape", [(20, 9, 8), (20, 8, 8, 3), (20, 64)])
def test_predict_refuses_data_of_another_shape(capsys, copy, tmp_path, shape):
    np.save(tmp_path / "new.npy", np.random.default_rng(0).integers(0, 16, shape))
    new = ["--config.data.name=npy", f"--config.data.path={tmp_path / 'new.npy'}"]
    before = digest(copy)
    assert main.execute(["main", "--mode=predict", f"--workdir={copy}", *new]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--config.data" in line
    assert str(shape[1:])[:-1] in line or "trained on images" in line
    assert digest(copy) == before
    assert not (copy / "predict").exists()


def test_evaluate_scores_other_data(capsys, finished, copy):
    other = ["--config.data.name=digits", "--config.data.split=test", "--config.data.limit=100"]
    assert main.execute(["main", "--mode=evaluate", f"--workdir={copy}", *other]) == 0
    files = {p.name for p in (copy / "evaluate").iterdir()}
    assert files >= {"assignments.csv", "summary.json", "clusters.png", "latents.png"}
    summary = json.loads((copy / "evaluate" / "summary.json").read_text())
    assert summary["data"]["examples"] == len(rows_of(copy / "evaluate" / "assignments.csv")) == 100
    assert summary["training"]["steps"] == LAST
    assert "this run " in capsys.readouterr().out
    rest = {k: v for k, v in digest(copy).items() if not k.startswith("evaluate")}
    assert rest == digest(finished.workdir)


def test_sample_draws_from_every_cluster_again_and_again_the_same(capsys, copy):
    drawn = []
    for seed in ("0", "0", "1"):
        seeded = ["--quiet", "--mode=sample", f"--workdir={copy}", f"--config.seed={seed}"]
        assert main.execute(["main", *seeded]) == 0
        drawn.append(np.load(copy / "sample" / "samples.npy"))
        with Image.open(copy / "sample" / "generated.png") as image:
            assert min(image.size) > 50
    assert capsys.readouterr().out == ""
    assert drawn[0].shape[0] == CLUSTERS
    assert drawn[0].shape[2:] == (8, 8, 1)
    assert drawn[0].dtype == np.float32
    # In the units of the data.
    assert 0 <= drawn[0].min() < drawn[0].max() <= 16
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()


def test_other_settings_of_the_method_are_refused_with_a_trained_run(capsys, copy):
    before = digest(copy)
    mode = ["--mode=predict", f"--workdir={copy}"]
    assert main.execute(["main", *mode, "--config.method.latent=5"]) == 2
    assert main.execute(["main", *mode, "--config=clusterddpm"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "(latent)" in first
    assert "without --config" in second
    assert digest(copy) == before
    # The sampler's may differ.
    steps = "--config.method.sample_steps=2"
    assert main.execute(["main", "--mode=sample", f"--workdir={copy}", steps]) == 0


# -- help, and the way in --


def test_help_needs_no_jax(run_python):
    code = "import sys; from dec_diffusion import main; s = main.execute(sys.argv)\n"
    code += "print('jax' in sys.modules, s)"
    *text, last = run_python(code, "--help").stdout.splitlines()
    assert last == "False 0"
    for option in ("--config=", "--config.FIELD=", "--workdir=", "--mode=", "--quiet", "--help"):
        assert any(line.startswith(f"  {option}") for line in text), option
    assert all(len(line) <= 100 for line in text)
    assert "clusterddpm" in "".join(text)


def test_help_with_a_config_lists_its_fields_as_options(capsys):
    assert main.execute(["main", *TINY, "--help"]) == 0
    listed = [line.strip() for line in capsys.readouterr().out.splitlines()[1:]]
    assert "--config.method.multipliers=1" in listed
    assert f"--config.data.limit={EXAMPLES}" in listed
    # What it lists, the command line reads back.
    config = configs.override(Config("x", ClusterDDPM()), "name", "y")
    for name, _, value in (line.removeprefix("--config.").partition("=") for line in listed):
        config = configs.override(config, name, value)
    options = main.parse(["main", *TINY])
    expected = [f"--config.{name}={value}" for name, value in options.overrides]
    assert set(expected) <= set(listed)
    assert config.method.multipliers == (1,)


def test_bad_options_need_no_jax_either(run_python):
    code = """
import sys
from dec_diffusion import main
for line in sys.stdin:
    print(main.execute(["main", *line.split()]), "jax" in sys.modules)
"""
    lines = ["--wrokdir=x", "--mode=foo", "extra", "", "--config=foo", "--workdir"]
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="\n".join(lines) + "\n",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["2 False"] * len(lines)
    assert len(done.stderr.splitlines()) == len(lines)


@pytest.mark.parametrize("way", ["module", "script"])
def test_both_ways_in_exit_with_the_status(run_python, tmp_path, way):
    code = MODULE
    if way == "script":
        scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
        module, _, function = scripts["dec-diffusion"].partition(":")
        code = f"import sys; from {module} import {function}; sys.exit({function}())"
    assert run_python(code, "--help", cwd=tmp_path).stdout.startswith("Deep clustering")
    done = run_python(code, "--config=clusterddpn", cwd=tmp_path, status=2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: --config=clusterddpn: no such file; did you mean clust")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_bad_input_found_late_exits_in_the_same_way(run_python, tmp_path):
    done = run_python(MODULE, *TINY, "--config.method.num_clusters=500", cwd=tmp_path, status=2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: --config.method.num_clusters=500: digits has only 200")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--config=clusterddpm"], []),
        (["--config", "clusterddpm", "--config.seed", "5"], [("seed", "5")]),
        (["--config.seed=5", "--config=configs/clusterddpm.py"], [("seed", "5")]),
        (["--config=clusterddpm", "--config.a.b", "--noconfig.c"], [("a.b", None), ("c", "false")]),
        (["--config=clusterddpm.py", "--config.m", "-1.5", "--quiet"], [("m", "-1.5")]),
        (["--config=clusterddpm", "--config.p=a=b"], [("p", "a=b")]),
        (["--config=clusterddpm", "--config.s=1", "--config.s=2"], [("s", "1"), ("s", "2")]),
    ],
)
def test_parse_takes_overrides_in_every_form(argv, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = main.parse(["main", *argv])
    assert options.overrides == expected
    assert options.config is not None
    assert options.config.samefile(ROOT / "configs" / "clusterddpm.py")


def test_parse_reads_the_rest():
    options = main.parse(["main", "--mode", "predict", "--workdir", "w", "--quiet"])
    assert (options.mode, options.workdir, options.quiet) == ("predict", "w", True)
    assert options.config is None
    options = main.parse(["main", "--config=clusterddpm:a:b"])
    assert (options.variant, options.mode, options.quiet) == ("a:b", "train", False)


# -- bad input --


def idx(shape: tuple[int, ...], values: int) -> bytes:
    sizes = b"".join(n.to_bytes(4, "big") for n in shape)
    return bytes([0, 0, 8, len(shape)]) + sizes + bytes(range(256)) * (values // 256 + 1)


def put(path: pathlib.Path, content) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def npy(tmp: pathlib.Path, content) -> list[str]:
    path = put(tmp / "data.npy", content)
    return [*TINY, "--config.data.name=npy", f"--config.data.path={path}"]


def own(tmp: pathlib.Path, text: str) -> list[str]:
    """A config file of the user's."""
    return [f"--config={put(tmp / 'c.py', text)}"]


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array[3, 2] = value
    return array


RANDOM = np.random.default_rng(0).random((60, 8, 8)).astype(np.float32)
IMPORTS = """
from dec_diffusion.config import Config
from dec_diffusion.methods.clusterddpm import ClusterDDPM as M
"""

# What is wrong: the options (from a folder to put files in), and words of the answer.
BAD = {
    # the command line
    "no config": (lambda t: [], ["--config is missing", "clusterddpm"]),
    "no config to predict": (lambda t: ["--mode=predict"], ["--config", "--workdir"]),
    "empty config": (lambda t: ["--config="], ["--config needs a value"]),
    "unknown config": (lambda t: ["--config=clusterdpm"], ["did you mean clusterddpm?"]),
    "missing config file": (
        lambda t: [f"--config={t}/clusterddpm.py"],
        ["clusterddpm.py: no such file"],
    ),
    "unknown variant": (
        lambda t: [*TINY, "--config=clusterddpm:mnits"],
        ["clusterddpm.py:mnits", "did you mean mnist"],
    ),
    "unknown option": (lambda t: [*TINY, "--wrokdir=x"], ["--wrokdir", "did you mean --workdir?"]),
    "unknown option 2": (lambda t: [*TINY, "--xyz=x"], ["--xyz", "--help"]),
    "abbreviated option": (lambda t: [*TINY, "--work=x"], ["--work"]),
    "unknown mode": (lambda t: [*TINY, "--mode=fit"], ["--mode=fit", "train|evaluate|predict"]),
    "extra argument": (lambda t: [*TINY, "more"], ["'more'", "--name=value"]),
    "no value": (lambda t: [*TINY, "--workdir"], ["--workdir"]),
    "option as value": (lambda t: [*TINY, "--workdir", "--quiet"], ["--workdir needs a value"]),
    "empty value": (lambda t: [*TINY, "--workdir="], ["--workdir needs a value"]),
    "quiet value": (lambda t: [*TINY, "--quiet=maybe"], ["--quiet=maybe"]),
    "typo": (lambda t: [*TINY, "--config.sed=1"], ["--config.sed:", "did you mean --config.seed?"]),
    "nested typo": (
        lambda t: [*TINY, "--config.method.kl_wieght=1"],
        ["--config.method.kl_wieght:", "did you mean --config.method.kl_weight?"],
    ),
    "group": (lambda t: [*TINY, "--config.method=1"], ["--config.method:"]),
    "wrong type": (lambda t: [*TINY, "--config.seed=abc"], ["--config.seed=abc", "whole number"]),
    "override without value": (lambda t: [*TINY, "--config.seed"], ["--config.seed needs a value"]),
    "wrong choice": (
        lambda t: [*TINY, "--config.method.prediction=x1"],
        ["--config.method.prediction=x1", "v, eps, x0"],
    ),
    # config files
    "config with an error": (
        lambda t: own(t, "x = 1\ny = x / 0"),
        ["c.py", "line 2", "ZeroDivisionError"],
    ),
    "config with a syntax error": (
        lambda t: own(t, "def get_config(:"),
        ["c.py", "SyntaxError"],
    ),
    "config without get_config": (
        lambda t: own(t, "x = 1"),
        ["c.py", "get_config"],
    ),
    "config of another kind": (
        lambda t: own(t, "def get_config(): return {}"),
        ["c.py", "dict", "Config"],
    ),
    "config that is no Python": (
        lambda t: [f"--config={put(t / 'c.json', '{}')}"],
        ["c.json", "Python"],
    ),
    "config with a wrong type": (
        lambda t: own(t, IMPORTS + "def get_config(): return Config('x', M(learning_rate='1e-3'))"),
        ["--config.method.learning_rate=1e-3", "finite number"],
    ),
    # data
    "missing file": (
        lambda t: [*TINY, "--config.data.name=npy", f"--config.data.path={t}/nothing.npy"],
        ["nothing.npy", "does not exist"],
    ),
    "no path": (lambda t: [*TINY, "--config.data.name=mnist"], ["--config.data.path"]),
    "unknown source": (
        lambda t: [*TINY, "--config.data.name=minst"],
        ["--config.data.name=minst", "did you mean mnist?"],
    ),
    "unknown split": (
        lambda t: [*TINY, "--config.data.split=tset"],
        ["--config.data.split=tset", "did you mean test?"],
    ),
    "empty folder": (
        lambda t: [*TINY, "--config.data.name=mnist", f"--config.data.path={t}"],
        ["train-images-idx3-ubyte"],
    ),
    "empty file": (lambda t: npy(t, ""), ["data.npy", "is empty"]),
    "text as npy": (lambda t: npy(t, "1,2,3\n4,5,6\n"), ["data.npy", "np.save"]),
    "truncated npy": (
        lambda t: npy(t, put(t / "whole.npy", RANDOM).read_bytes()[:-50]),
        ["data.npy", "cannot be read"],
    ),
    "truncated IDX": (
        lambda t: [
            *TINY,
            "--config.data.name=idx",
            f"--config.data.path={put(t / 'x-images-idx3-ubyte', idx((60, 8, 8), 500))}",
        ],
        ["x-images-idx3-ubyte", "truncated"],
    ),
    "one axis": (lambda t: npy(t, RANDOM[:, 0, 0]), ["data.npy", "(60,)", "[n, d]"]),
    "five axes": (lambda t: npy(t, RANDOM[:, None, None]), ["data.npy", "(60, 1, 1, 8, 8)"]),
    "channels first": (
        lambda t: npy(t, np.random.default_rng(0).random((60, 3, 8, 8))),
        ["channels first"],
    ),
    "NaN": (lambda t: npy(t, with_value(RANDOM, np.nan)), ["data.npy", "NaN", "example 3"]),
    "infinity": (lambda t: npy(t, with_value(RANDOM, np.inf)), ["data.npy", "infinite"]),
    "complex numbers": (lambda t: npy(t, RANDOM * 1j), ["data.npy", "complex"]),
    "objects": (lambda t: npy(t, np.array([{}, []], object)), ["data.npy", "cannot be read"]),
    "no examples": (lambda t: npy(t, RANDOM[:0]), ["data.npy", "0 examples"]),
    "one example": (lambda t: npy(t, RANDOM[:1]), ["--config.data", "only 1 example"]),
    "identical examples": (lambda t: npy(t, np.ones((60, 8, 8))), ["--config.data", "identical"]),
    # settings against the data, and against reason
    "K of 1": (lambda t: [*TINY, "--config.method.num_clusters=1"], ["num_clusters=1", "least 2"]),
    "K above distinct examples": (
        lambda t: npy(t, RANDOM[np.arange(60) % 3]),
        [f"num_clusters={CLUSTERS}", "3 distinct"],
    ),
    "batch above the data": (
        lambda t: [*TINY, "--config.train.batch_size=500"],
        ["--config.train.batch_size=500", "200"],
    ),
    "batch of 0": (lambda t: [*TINY, "--config.train.batch_size=0"], ["batch_size=0", "least 1"]),
    "negative seed": (lambda t: [*TINY, "--config.seed=-1"], ["--config.seed=-1"]),
    "limit of 1": (lambda t: [*TINY, "--config.data.limit=1"], ["--config.data.limit=1"]),
    "no learning": (lambda t: [*TINY, "--config.method.learning_rate=0"], ["learning_rate=0"]),
    "share above 1": (lambda t: [*TINY, "--config.method.drop_latent=2"], ["drop_latent=2"]),
    "no latent": (lambda t: [*TINY, "--config.method.latent=0"], ["latent=0"]),
    "no levels": (lambda t: [*TINY, "--config.method.multipliers="], ["multipliers"]),
    "too many sampling steps": (
        lambda t: [*TINY, "--config.method.sample_steps=2000"],
        ["sample_steps=2000", "num_steps"],
    ),
    # workdirs
    "foreign workdir": (
        lambda t: [*TINY, f"--workdir={put(t / 'other' / 'thesis.tex', 'x').parent}"],
        ["--workdir=", "thesis.tex"],
    ),
    "workdir is a file": (
        lambda t: [*TINY, f"--workdir={put(t / 'file', 'x')}"],
        ["--workdir=", "is a file"],
    ),
    "workdir below a file": (
        lambda t: [*TINY, f"--workdir={put(t / 'file', 'x')}/run"],
        ["--workdir=", "is a file"],
    ),
    "unwritable workdir": (lambda t: [*TINY, "--workdir=/proc/run"], ["--workdir=/proc/run"]),
    "remote workdir": (lambda t: [*TINY, "--workdir=gs://b/run"], ["--workdir=gs://b/run"]),
    "damaged config.json": (
        lambda t: [*TINY, f"--workdir={put(t / 'run' / 'config.json', '{').parent}"],
        ["config.json", "damaged"],
    ),
    "no run": (
        lambda t: ["--mode=evaluate", f"--workdir={t / 'nothing'}"],
        ["--workdir=", "holds no run"],
    ),
    "no run in the folder": (
        lambda t: ["--mode=evaluate", f"--workdir={put(t / 'a' / 'x', 'x').parent}"],
        ["--workdir=", "holds no run"],
    ),
    "no checkpoint yet": (
        lambda t: ["--mode=sample", f"--workdir={run_without_checkpoint(t)}"],
        ["--workdir=", "no checkpoint yet"],
    ),
    "run of another version": (
        lambda t: ["--mode=sample", f"--workdir={put(t / 'r' / 'config.json', '{}').parent}"],
        ["config.json", "version"],
    ),
}


def run_without_checkpoint(tmp: pathlib.Path) -> pathlib.Path:
    config = Config("x", ClusterDDPM())
    return put(tmp / "run" / "config.json", json.dumps(configs.to_dict(config))).parent


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_one_line_and_changes_nothing(what, capfd, tmp_path, monkeypatch):
    make, words = BAD[what]
    argv = make(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = digest(tmp_path), sorted(tmp_path.rglob("*"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    status = main.execute(["main", *argv])
    shown = capfd.readouterr()
    assert status == 2
    lines = [line for line in shown.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, shown.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in shown.err
    missing = [word for word in words if word not in lines[0]]
    assert not missing, lines[0]
    assert list(here.iterdir()) == [], "nothing may be left behind"
    here.rmdir()
    assert (digest(tmp_path), sorted(tmp_path.rglob("*"))) == before
