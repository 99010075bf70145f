"""The command line as a person meets it: whole runs, kills, resumes, and runs put to use.

Runs are real processes, on a network as small as it gets. Bad input is in test_bad_input.py.
"""

import csv
import dataclasses
import errno
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
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

from dec_diffusion import command, interrupt, main, options, report, results, train, trained
from dec_diffusion import config as configs
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
    "prototypes.npz",
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
    a, b = trained.load(one), trained.load(other)
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
    header = "index,path,cluster,probability,entropy,prototype"
    assert file.read_text().splitlines()[0] == header
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
    entropy = np.array([float(row["entropy"]) for row in rows])
    assert (entropy >= 0).all()
    assert (entropy <= np.log(CLUSTERS) + 1e-6).all()
    # The surest have the least of it, and the others more than if they had but two choices.
    p = np.clip(probability, 1e-9, 1 - 1e-9)
    assert (entropy >= -p * np.log(p) - (1 - p) * np.log1p(-p) - 1e-3).all()


def test_every_row_names_a_prototype_of_its_cluster(finished):
    rows = rows_of(finished.workdir / "assignments.csv")
    cluster_of = {row["index"]: row["cluster"] for row in rows}
    assert all(cluster_of[row["prototype"]] == row["cluster"] for row in rows)
    with np.load(finished.workdir / "prototypes.npz", allow_pickle=False) as stored:
        named = dict(zip(np.char.decode(stored["name"]).tolist(), stored["cluster"], strict=True))
    assert {row["prototype"] for row in rows} <= set(named)
    for index, cluster in named.items():
        assert cluster_of[index] == str(cluster)
        # Nothing is closer to a prototype than itself.
        assert next(row["prototype"] for row in rows if row["index"] == index) == index


def test_the_summary_scores_the_run_and_its_baselines(finished):
    summary = json.loads((finished.workdir / "summary.json").read_text())
    assert summary["data"]["examples"] == EXAMPLES
    assert summary["data"]["shape"] == [8, 8, 1]
    assert summary["training"]["steps"] == LAST
    assert summary["training"]["examples_per_second"] > 0
    clusters = np.array([int(r["cluster"]) for r in rows_of(finished.workdir / "assignments.csv")])
    assert summary["clusters"]["asked"] == CLUSTERS
    assert summary["clusters"]["found"] == len(np.unique(clusters))
    assert set(summary["baselines"]) >= {
        "kmeans_pixels",
        "gmm_pixels",
        "graph_pixels",
        "kmeans_latents",
    }
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
    # What a phase began with stands in its first record.
    begun = [(r["phase"], r["iteration"]) for r in records if "modularity" in r]
    assert begun == [("em", 1)]


def test_the_output_tells_progress_and_results(finished):
    lines = finished.stdout.splitlines()
    assert f"{EXAMPLES} examples of 8x8x1 (digits" in lines[0]
    assert lines[1].endswith(f"{LAST} steps")
    progress = [line for line in lines if re.match(r" *\d+%  ", line)]
    assert re.fullmatch(
        r"100%  em 6/6  0:00 left  [\d,]+ examples/s  loss \S+  .*acc \S+  nmi \S+", progress[-1]
    )
    assert "em: looking at all examples to begin with ..." in lines
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


def saves(workdir: pathlib.Path) -> set[str]:
    """Checkpoints that are being written; listed a thousand times a second, so without globbing."""
    try:
        return {name for name in os.listdir(workdir / "checkpoints") if "tmp" in name}
    except FileNotFoundError:
        return set()


def test_killed_at_any_moment_the_result_is_the_same(start_python, run_python, finished, tmp_path):
    workdir = tmp_path / "killed"
    command = [*TINY, f"--workdir={workdir}"]
    delay = random.Random().uniform(0.0, 10.0)
    print(f"random delay {delay}")  # shown if the test fails
    first = time.monotonic()
    moments = [
        ("the start", lambda w, old: (w / "config.json").exists()),
        ("a save", lambda w, old: saves(w)),
        ("a later save", lambda w, old: saves(w) - old),
        (
            "a random moment",
            lambda w, old: time.monotonic() - first > delay or (w / "assignments.csv").exists(),
        ),
        ("the results", lambda w, old: (w / "assignments.csv").exists()),
    ]
    killed = []
    for moment, reached in moments:
        process = start_python(MODULE, *command)
        old, first = saves(workdir), time.monotonic()
        while process.poll() is None and not reached(workdir, old):
            time.sleep(0.001)
        if process.poll() is None:
            process.kill()
            killed.append(moment)
        process.communicate()
        if moment == "a save":
            # Only a complete save is renamed to what counts as a checkpoint.
            assert saves(workdir)
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
    for x in jax.tree.leaves(trained.load(workdir, clusters=False).state):
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
    assert got["prototype"] == rows[7]["prototype"]


def test_predict_warns_of_other_units(capsys, copy, tmp_path):
    np.save(tmp_path / "new.npy", np.random.default_rng(0).random((20, 8, 8)))
    new = ["--config.data.name=npy", f"--config.data.path={tmp_path / 'new.npy'}"]
    with pytest.warns(UserWarning, match="the training data 0 to 16; give data in the same units"):
        assert main.execute(["main", "--mode=predict", f"--workdir={copy}", *new]) == 0


def test_a_run_stopped_before_it_has_clusters_is_refused(capsys, tmp_path):
    class AtOnce(interrupt.Stop):
        def asked(self):
            return True

    config = options.parse(["main", *TINY])
    workdir = tmp_path / "run"
    with pytest.raises(interrupt.StoppedError):
        train.fit(command.load_config(config), workdir, verbose=0, stop=AtOnce())
    assert trained.load(workdir, clusters=False).step == STEPS
    for mode in ("predict", "evaluate", "sample"):
        assert main.execute(["main", f"--mode={mode}", f"--workdir={workdir}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "stopped in pretrain, before it had any clusters" in line
        assert not (workdir / mode).exists()


def test_unfinished_training_is_warned_of(copy):
    newest = sorted((copy / "checkpoints").iterdir(), key=lambda p: int(p.name))[-1]
    shutil.rmtree(newest)
    with pytest.warns(UserWarning, match=r"stopped after iteration \d of 6 of em"):
        trained.load(copy)


def test_fewer_examples_than_clusters_are_scored_without_baselines(capsys, copy):
    few = ["--config.data.name=digits", f"--config.data.limit={CLUSTERS - 1}"]
    assert main.execute(["main", "--mode=evaluate", f"--workdir={copy}", *few]) == 0
    summary = json.loads((copy / "evaluate" / "summary.json").read_text())
    assert summary["baselines"] == {}
    assert 0 <= summary["scores"]["acc"] <= 1
    assert "this run" in capsys.readouterr().out


def test_a_full_disk_is_one_line(capsys, copy, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dec_diffusion.results.write_assignments", full)
    assert main.execute(["main", "--mode=predict", f"--workdir={copy}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: No space left on device; make room")


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
    trained = json.loads((finished.workdir / "summary.json").read_text())
    assert trained["data"]["trained_on"] and not summary["data"]["trained_on"]
    assert summary["training"] == trained["training"]
    assert summary["training"]["seconds"] > 0
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
    few = results.sample(trained.load(copy), most=2)
    assert few.shape == (2, *drawn[0].shape[1:])
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


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_predict_remembers_which_columns_of_a_table_are_no_features(
    tmp_path, capsys, monkeypatch, ending
):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)

    def table(name: str, columns: str, n: int) -> str:
        of = {c: rng.normal(size=n) for c in ("a", "b", "other")}
        of |= {"kind": np.arange(n) % 2, "batch": np.full(n, 7), "note": np.full(n, "text")}
        of["id"] = [f"{name}-{i}" for i in range(n)]
        file = tmp_path / f"{name}.{ending}"
        if ending == "parquet":
            pq.write_table(pyarrow.table({c: of[c] for c in columns.split()}), file)
        else:
            rows = zip(*(of[c] for c in columns.split()), strict=True)
            lines = [",".join(map(str, row)) for row in rows]
            file.write_text("\n".join([columns.replace(" ", ","), *lines]) + "\n")
        return f"--config.data.path={file}"

    small = ["networks=1", "heads=1", "width=4", "hidden=4", "iterations=1", "steps=1"]
    train_on = [
        "--config=neural_mixture:vectors",
        "--config.method.num_clusters=2",
        *(f"--config.method.{setting}" for setting in small),
        "--config.train.batch_size=20",
        "--config.data.label=kind",
        "--config.data.drop=batch,note",
        f"--workdir={tmp_path / 'run'}",
    ]
    names, centres = [], report.centres

    def draw(*args, feature_names, **options):
        names.append(feature_names)
        centres(*args, feature_names=feature_names, **options)

    monkeypatch.setattr(report, "centres", draw)
    all_columns = table("old", "id a note b kind batch", 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", train.EmptyClusterWarning)
        assert main.execute(["main", *train_on, all_columns]) == 0
    # Pictures and the page call them by their names.
    assert names == [("a", "b")]
    assert '<th scope="row">a</th>' in (tmp_path / "run" / "report.html").read_text()
    mode = ["main", "--mode=predict", f"--workdir={tmp_path / 'run'}"]
    # Rows go by the name in the first column, those trained on and new ones.
    trained_on = rows_of(tmp_path / "run" / "assignments.csv")
    assert [row["path"] for row in trained_on] == [f"old-{i}" for i in range(40)]
    cluster = {row["path"]: row["cluster"] for row in trained_on}
    assert main.execute([*mode, table("new", "id kind a b", 9)]) == 0
    new_rows = rows_of(tmp_path / "run" / "predict" / "assignments.csv")
    assert [row["path"] for row in new_rows] == [f"new-{i}" for i in range(9)]
    known = [row for row in trained_on + new_rows if row["prototype"]]
    assert known and all(cluster[row["prototype"]] == row["cluster"] for row in known)
    # With all of the columns, with some, and with none but the features.
    for columns in ("kind a b note batch", "a batch b", "a b"):
        new = table("new", columns, 9)
        assert main.execute([*mode, new]) == 0, columns
        rows = rows_of(tmp_path / "run" / "predict" / "assignments.csv")
        assert [(row["index"], row["path"]) for row in rows] == [(str(i), "") for i in range(9)]
        # The sort of source may be said again.
        assert main.execute([*mode, f"--config.data.name={ending}", new]) == 0
    # What is asked for now goes before what was asked for then.
    assert main.execute([*mode, table("new", "kind a b", 9), "--config.data.drop=b"]) == 2
    assert "has no column b, of which the run was trained" in capsys.readouterr().err
    # Columns are told by their names: not by their order, and others are left out.
    assert trained.load(tmp_path / "run").columns == ("a", "b")
    found = []
    for columns in ("a b", "kind b other a"):
        rng = np.random.default_rng(1)
        assert main.execute([*mode, table("new", columns, 9), "--config.data.label=none"]) == 0
        found.append(rows_of(tmp_path / "run" / "predict" / "assignments.csv"))
    assert found[0] == found[1]


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
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()[1:]]
    assert all(len(line) <= 100 for line in lines)
    listed = [line for line in lines if line.startswith("--config.")]
    assert "--config.method.multipliers=1" in listed
    # Each with what it means, in words of its own, and the words that it takes.
    after = {line: lines[i + 1] for i, line in enumerate(lines[:-1]) if line in listed}
    assert len(after) == len(listed) and not set(after.values()) & set(listed)
    assert after["--config.method.latent=4"].startswith("dimensions of z (")
    assert after["--config.data.kind=any"].startswith("``images`` or ``vectors`` refuses")
    assert "one of auto, grey, rgb" in " ".join(lines)
    assert f"--config.data.limit={EXAMPLES}" in listed
    # What it lists, the command line reads back.
    config = configs.override(Config("x", ClusterDDPM()), "name", "y")
    for name, _, value in (line.removeprefix("--config.").partition("=") for line in listed):
        config = configs.override(config, name, value)
    parsed = options.parse(["main", *TINY])
    expected = [f"--config.{name}={value}" for name, value in parsed.overrides]
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


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--seed=3", "--config.seed"),
        ("--n_clusters=3", "--config.method.num_clusters"),
        ("--method.num_clusters=3", "--config.method.num_clusters"),
        ("--path=x", "--config.data.path"),
        ("--batchsize=9", "--config.train.batch_size"),
        ("--tau=1", "--config.method.tau"),
        ("--wrokdir=x", "--workdir"),
    ],
)
def test_fields_of_configs_are_suggested_too(capsys, given, meant):
    assert main.execute(["main", "--config=clusterddpm", given]) == 2
    name = given.partition("=")[0]
    assert capsys.readouterr().err == f"error: {name}: no such option; did you mean {meant}?\n"


def test_every_field_of_every_config_is_known():
    for module in options.shipped():
        config = command.load_config(options.parse(["main", f"--config={module}"]))
        named = {name.rpartition(".")[2] for name in configs.flatten(config)}
        assert named <= {*options._fields()}


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
    parsed = options.parse(["main", *argv])
    assert parsed.overrides == expected
    assert parsed.config is not None
    assert parsed.config.samefile(ROOT / "configs" / "clusterddpm.py")


def test_parse_reads_the_rest():
    parsed = options.parse(["main", "--mode", "predict", "--workdir", "w", "--quiet"])
    assert (parsed.mode, parsed.workdir, parsed.quiet) == ("predict", "w", True)
    assert parsed.config is None
    assert (parsed.seeds, parsed.logger) == (None, "none")
    parsed = options.parse(["main", "--config=clusterddpm:a:b", "--logger=tensorboard"])
    assert (parsed.variant, parsed.mode, parsed.quiet) == ("a:b", "train", False)
    assert parsed.logger == "tensorboard"


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("0..4", (0, 1, 2, 3, 4)),
        ("0,3,5", (0, 3, 5)),
        ("7", (7,)),
        ("2..2", (2,)),
        ("9, 0..2", (9, 0, 1, 2)),
    ],
)
def test_seeds_are_read_in_every_form(text, seeds):
    assert options.parse(["main", "--config=diec", f"--seeds={text}"]).seeds == seeds
