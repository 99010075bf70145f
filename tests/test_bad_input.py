"""Every kind of bad input gets one line that names it and the remedy, and changes nothing.

It is answered before anything is computed, so the tests call ``main.execute``, all but its exit, in
this process; some go through a process of their own, as from a shell.
"""

import hashlib
import io
import json
import pathlib
import pickle
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from dec_diffusion import NeuralMixture, main
from dec_diffusion import config as configs
from dec_diffusion.config import Config
from dec_diffusion.methods.clusterddpm import ClusterDDPM

MODULE = "import runpy; runpy.run_module('dec_diffusion.main', run_name='__main__', alter_sys=True)"
CLUSTERS = 4
TINY = [
    "--config=clusterddpm",
    f"--config.method.num_clusters={CLUSTERS}",
    "--config.method.latent=4",
    "--config.method.width=4",
    "--config.method.multipliers=1",
    "--config.method.encoder_multipliers=1",
    "--config.method.attention=",
    "--config.method.pretrain_iterations=1",
    "--config.method.em_iterations=1",
    "--config.method.steps=1",
    "--config.data.limit=200",
    "--config.train.batch_size=32",
]
VECTORS = ["--config=neural_mixture:vectors", "--config.method.num_clusters=3"]


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def pickled(tmp: pathlib.Path, kind: str) -> bytes:
    """An array of NumPy's, or several, that would make a file in ``tmp`` if unpickled."""
    array, out = np.array([Payload(tmp / "made"), 1], object), io.BytesIO()
    if kind == "npy":
        np.save(out, array, allow_pickle=True)
    else:
        np.savez(out, cluster=array, name=array, embedding=array)
    return out.getvalue()


def png() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(out, "png")
    return out.getvalue()


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


def folder(tmp: pathlib.Path, **contents: bytes) -> list[str]:
    """Images, or what pretends to be some."""
    for name, content in contents.items():
        put(tmp / "pictures" / f"{name}.png", content)
    (tmp / "pictures").mkdir(exist_ok=True)
    return [*TINY, "--config.data.name=folder", f"--config.data.path={tmp / 'pictures'}"]


def csv(tmp: pathlib.Path, text: str, *more: str) -> list[str]:
    return [*VECTORS, f"--config.data.path={put(tmp / 'cells.csv', text)}", *more]


def npz_bytes(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def npz(tmp: pathlib.Path, **arrays: np.ndarray) -> list[str]:
    path = put(tmp / "data.npz", npz_bytes(**arrays))
    return [*TINY, "--config.data.name=npz", f"--config.data.path={path}"]


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


def run_without_checkpoint(tmp: pathlib.Path) -> pathlib.Path:
    config = Config("x", ClusterDDPM())
    return put(tmp / "run" / "config.json", json.dumps(configs.to_dict(config))).parent


def config_of_module(tmp: pathlib.Path, kind: str) -> pathlib.Path:
    config = configs.to_dict(Config("x", ClusterDDPM()))
    config["method"] = {"is": kind, "path": str(tmp / "made")}
    return put(tmp / "run" / "config.json", json.dumps(config)).parent


def runs_of_seeds(tmp: pathlib.Path, best: str | None) -> pathlib.Path:
    run_without_checkpoint(tmp / "w").rename(tmp / "w" / "seed0")
    return put(tmp / "w" / "seeds.json", json.dumps({"best": best})).parent


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
    "images for vectors": (
        lambda t: [
            "--config=neural_mixture:vectors",
            "--config.data.name=digits",
            f"--workdir={t / 'run'}",
        ],
        ["--config.data.name=digits: holds images (8x8x1)", "variant images"],
    ),
    "vectors for images": (
        lambda t: [
            "--config=clusterddpm:images",
            "--config.data.name=blobs",
            f"--workdir={t / 'run'}",
        ],
        ["--config.data.name=blobs: holds vectors (2)", "variant vectors", "data.kind=any"],
    ),
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
    # more data
    "pickle in npy": (
        lambda t: npy(t, pickled(t, "npy")),
        ["data.npy", "allow_pickle", "np.save"],
    ),
    "pickle in npz": (
        lambda t: [
            *TINY,
            "--config.data.name=npz",
            f"--config.data.path={put(t / 'data.npz', pickled(t, 'npz'))}",
            "--config.data.image_key=embedding",
        ],
        ["data.npz", "allow_pickle"],
    ),
    "bare pickle": (lambda t: npy(t, pickle.dumps(Payload(t / "made"))), ["data.npy"]),
    "unknown label_key": (
        lambda t: [*npz(t, x=RANDOM, y=np.arange(60) % 4), "--config.data.label_key=z"],
        ["--config.data.label_key=z", "known: x, y"],
    ),
    "broken image": (
        lambda t: folder(t, a=png(), b=png()[:40]),
        ["b.png", "--config.data.broken=skip"],
    ),
    "folder without images": (lambda t: folder(t), ["pictures", "holds no files"]),
    "text column": (
        lambda t: csv(t, "a,b,c\n1,x,2\n3,y,4\n"),
        ["cells.csv", "column b", "--config.data.drop=b"],
    ),
    "ragged csv": (lambda t: csv(t, "a,b\n1,2\n3\n4,5\n"), ["cells.csv", "line 3", "1 fields"]),
    "missing value": (lambda t: csv(t, "a,b\n1,2\n3,\n4,5\n"), ["cells.csv", "line 3", "missing"]),
    "no such label": (
        lambda t: csv(t, "a,kind\n1,2\n3,4\n5,6\n", "--config.data.label=kinds"),
        ["--config.data.label=kinds", "did you mean kind?"],
    ),
    "no such column to drop": (
        lambda t: csv(t, "a,b\n1,2\n3,4\n5,6\n", "--config.data.drop=c"),
        ["--config.data.drop=c", "no such column"],
    ),
    "corrupt parquet": (
        lambda t: [*VECTORS, f"--config.data.path={put(t / 'x.parquet', b'PAR1' + b'x' * 80)}"],
        ["x.parquet", "cannot be read", "again"],
    ),
    "K above n": (
        lambda t: [*TINY, "--config.method.num_clusters=500"],
        ["--config.method.num_clusters=500", "digits has only 200"],
    ),
    "nothing to start from": (
        lambda t: ["--config=diec", f"--config.pretrained={t}/nothing"],
        ["--config.pretrained=", "nothing"],
    ),
    # seeds and loggers
    "seeds in words": (lambda t: [*TINY, "--seeds=all"], ["--seeds=all", "0..4"]),
    "seeds without an end": (lambda t: [*TINY, "--seeds=0.."], ["--seeds=0..:", "0,3,5"]),
    "negative seeds": (lambda t: [*TINY, "--seeds=-1..2"], ["--seeds=-1..2", "0..4"]),
    "seeds backwards": (lambda t: [*TINY, "--seeds=4..0"], ["--seeds=4..0", "lower end"]),
    "a seed twice": (lambda t: [*TINY, "--seeds=1,0..2"], ["--seeds=1,0..2", "once"]),
    "many seeds": (lambda t: [*TINY, "--seeds=0..9999999999"], ["--seeds=", "at most 1,000"]),
    "seed too large": (lambda t: [*TINY, "--seeds=9999999999"], ["seed=9999999999", "between"]),
    "seed and seeds": (
        lambda t: [*TINY, "--seeds=0..2", "--config.seed=3"],
        ["--seeds=0..2", "--config.seed"],
    ),
    "seeds to predict": (
        lambda t: ["--mode=predict", f"--workdir={t}", "--seeds=0..2"],
        ["--seeds=0..2", "--mode=predict"],
    ),
    "seeds in the workdir of one": (
        lambda t: [*TINY, "--seeds=0..2", f"--workdir={run_without_checkpoint(t)}"],
        ["--workdir=", "one seed"],
    ),
    "seeds in a foreign folder": (
        lambda t: [*TINY, "--seeds=0..2", f"--workdir={put(t / 'o' / 'thesis.tex', 'x').parent}"],
        ["--workdir=", "thesis.tex"],
    ),
    "seeds of another config": (
        lambda t: [*TINY, "--seeds=1..2", f"--workdir={runs_of_seeds(t, None)}"],
        ["seed0", "method.latent"],
    ),
    "seeds and too many clusters": (
        lambda t: [*TINY, "--seeds=0..2", "--config.method.num_clusters=500"],
        ["num_clusters=500", "only 200"],
    ),
    "no seed chosen yet": (
        lambda t: ["--mode=predict", f"--workdir={runs_of_seeds(t, None)}"],
        ["--workdir=", "seeds.json", "--seeds"],
    ),
    "a choice that leads elsewhere": (
        lambda t: ["--mode=predict", f"--workdir={runs_of_seeds(t, '../..')}"],
        ["--workdir=", "seeds.json"],
    ),
    "unknown logger": (lambda t: [*TINY, "--logger=wandb"], ["--logger=wandb", "none|tensorboard"]),
    "logger to predict": (
        lambda t: ["--mode=predict", f"--workdir={t}", "--logger=tensorboard"],
        ["--logger=tensorboard", "--mode=predict"],
    ),
    # runs that were tampered with
    "method of another module": (
        lambda t: ["--mode=predict", f"--workdir={config_of_module(t, 'os:mkdir')}"],
        ["config.json", "os"],
    ),
    "method of a module of ours": (
        lambda t: [
            "--mode=predict",
            f"--workdir={config_of_module(t, 'dec_diffusion.methods.diec:Path')}",
        ],
        ["config.json", "version"],
    ),
}

PREDICT = "--mode=predict"


def spoil(tmp: pathlib.Path, name: str, content: bytes) -> list[str]:
    put(tmp / "run" / name, content)
    return [PREDICT, f"--workdir={tmp / 'run'}", "--config.data.name=npy", new(tmp)]


def spoil_checkpoints(tmp: pathlib.Path) -> list[str]:
    for file in (tmp / "run" / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return [PREDICT, f"--workdir={tmp / 'run'}", new(tmp)]


def new(tmp: pathlib.Path, shape: tuple[int, ...] = (9, 3)) -> str:
    return f"--config.data.path={put(tmp / 'new.npy', np.ones(shape))}"


# The same with a trained run in the folder ``run``, which is left as it was found.
BAD_WITH_A_RUN = {
    "more features": (
        lambda t: [PREDICT, f"--workdir={t}/run", new(t, (9, 4))],
        ["--config.data", "(4,)", "3 features"],
    ),
    "images": (
        lambda t: [PREDICT, f"--workdir={t}/run", new(t, (9, 8, 8))],
        ["--config.data", "(8, 8, 1)", "3 features"],
    ),
    "NaN to predict": (
        lambda t: [
            PREDICT,
            f"--workdir={t}/run",
            f"--config.data.path={put(t / 'n.npy', np.full((9, 3), np.nan))}",
        ],
        ["n.npy", "NaN"],
    ),
    "no data to predict": (lambda t: [PREDICT, f"--workdir={t}/run"], ["--config.data.path"]),
    "other settings": (
        lambda t: [PREDICT, f"--workdir={t}/run", new(t), "--config.method.width=9"],
        ["--workdir=", "width"],
    ),
    "no generative method": (
        lambda t: ["--mode=sample", f"--workdir={t}/run"],
        ["--mode=sample", "does not generate; train ClusterDDPM (--config=clusterddpm) or DiEC"],
    ),
    "workdir of another config": (
        lambda t: [*TINY, f"--workdir={t}/run"],
        ["--workdir=", "another config", "method.is"],
    ),
    "room for a folder taken": (
        lambda t: spoil(t, "predict", b""),
        ["predict", "cannot be written"],
    ),
    "corrupt checkpoints": (spoil_checkpoints, ["checkpoints", "delete this folder"]),
    "corrupt config.json": (lambda t: spoil(t, "config.json", b'{"'), ["config.json", "damaged"]),
    "corrupt prototypes": (
        lambda t: spoil(t, "prototypes.npz", b"PK" * 99),
        ["prototypes.npz", "delete it"],
    ),
    "pickle in prototypes": (
        lambda t: spoil(t, "prototypes.npz", pickled(t, "npz")),
        ["prototypes.npz", "delete it"],
    ),
    "bare pickle as prototypes": (
        lambda t: spoil(t, "prototypes.npz", pickle.dumps(Payload(t / "made"))),
        ["prototypes.npz", "delete it"],
    ),
    "other arrays as prototypes": (
        lambda t: spoil(t, "prototypes.npz", npz_bytes(x=RANDOM)),
        ["prototypes.npz", "delete it"],
    ),
}


def digest(folder: pathlib.Path) -> dict[str, str]:
    """Every file and folder below a folder, and what it holds."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        if p.is_file()
        else ""
        for p in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A trained run on vectors of three features."""
    path = tmp_path_factory.mktemp("trained") / "run"
    small = {"networks": 1, "heads": 1, "width": 4, "hidden": 4, "iterations": 1, "steps": 1}
    x = np.random.default_rng(0).normal(size=(60, 3))
    NeuralMixture(2, settings=small, random_state=0).fit(x).save(path)
    return path


def prepared(what: str, tmp_path: pathlib.Path, request) -> tuple[list[str], list[str]]:
    """The command line, and what its answer must say."""
    if what in BAD_WITH_A_RUN:
        shutil.copytree(request.getfixturevalue("run"), tmp_path / "run")
    make, words = (BAD | BAD_WITH_A_RUN)[what]
    return make(tmp_path), words


def assert_one_line(stderr: str, words: list[str]) -> None:
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in line
    missing = [word for word in words if word not in line]
    assert not missing, line


@pytest.mark.parametrize("what", [*BAD, *BAD_WITH_A_RUN])
def test_bad_input_gets_one_line_and_changes_nothing(what, capfd, tmp_path, monkeypatch, request):
    argv, words = prepared(what, tmp_path, request)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    before = digest(tmp_path)
    assert main.execute(["main", *argv]) == 2
    assert_one_line(capfd.readouterr().err, words)
    # What is pickled in a file has not run either: it would have made another.
    assert digest(tmp_path) == before


@pytest.mark.parametrize("what", ["unknown option", "K above n", "corrupt checkpoints"])
def test_so_it_does_from_a_shell(what, run_python, tmp_path, request):
    argv, words = prepared(what, tmp_path, request)
    before = digest(tmp_path)
    done = run_python(MODULE, *argv, cwd=tmp_path, status=2)
    assert done.stdout == ""
    assert_one_line(done.stderr, words)
    assert digest(tmp_path) == before


def test_the_payload_would_have_run(tmp_path):
    np.load(io.BytesIO(pickled(tmp_path, "npy")), allow_pickle=True)[0].close()
    assert (tmp_path / "made").exists()
