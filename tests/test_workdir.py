"""The workdir: what is on disk after refusals and damage."""

import csv
import json
import os
import pathlib
import platform

import jax.numpy as jnp
import numpy as np
import pytest

from dec_diffusion.types import InputError
from dec_diffusion.workdir import Assigned, Workdir, open_workdir, read_config

CONFIG = {"seed": 0, "data": {"name": "digits", "shape": (8, 8)}, "train": {"lr": 1e-3, "every": 5}}


# -- opening --


def test_a_run_is_opened_again_with_its_config(tmp_path):
    opened = open_workdir(tmp_path / "a" / "run", CONFIG)
    again = open_workdir(tmp_path / "a" / "run", json.loads(json.dumps(CONFIG)))
    assert opened == again == Workdir(tmp_path / "a" / "run")
    assert read_config(opened.path) == json.loads(json.dumps(CONFIG))
    assert [p.name for p in opened.path.iterdir()] == ["config.json"]


def test_another_config_is_refused_naming_every_field(tmp_path):
    open_workdir(tmp_path, CONFIG | {"old": None})
    before = (tmp_path / "config.json").read_bytes()
    other = {"seed": 1, "data": CONFIG["data"], "train": {"lr": 0.01, "every": 9}, "new": "x"}
    with pytest.raises(InputError) as caught:
        open_workdir(tmp_path, other, ignore=("train.every",))
    message = str(caught.value)
    assert f"--workdir={tmp_path}" in message and "give another --workdir" in message
    for part in (
        "seed 0 -> 1", "train.lr 0.001 -> 0.01", 'new (absent) -> "x"', "old null -> (absent)"
    ):  # fmt: skip
        assert part in message
    assert "every" not in message and "data" not in message and "\n" not in message
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize("ignore", ["train.every", "train"])
def test_ignored_fields_may_change_and_are_recorded(tmp_path, ignore):
    open_workdir(tmp_path, CONFIG)
    open_workdir(tmp_path, CONFIG | {"train": {"lr": 1e-3, "every": 9}}, ignore=(ignore,))
    assert read_config(tmp_path)["train"]["every"] == 9


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(InputError, match=r"holds files but no config\.json.*thesis\.tex"):
        open_workdir(tmp_path, CONFIG)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("thesis.tex", "dear")]


def test_a_run_killed_while_writing_its_config_can_start(tmp_path):
    (tmp_path / ".config.json.123.tmp").write_text('{"seed"')
    open_workdir(tmp_path, CONFIG)
    assert read_config(tmp_path)["seed"] == 0


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_the_way_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file; give another --workdir"):
        open_workdir(tmp_path / place, CONFIG)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unwritable_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("permissions do not bind this user")
        for place in (tmp_path, tmp_path / "below"):
            with pytest.raises(InputError, match="cannot be written"):
                open_workdir(place, CONFIG)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="needs Linux")
def test_a_folder_that_cannot_be_made_is_refused():
    with pytest.raises(InputError, match=r"--workdir=/proc/run: cannot be written \(.+\); give"):
        open_workdir("/proc/run", CONFIG)


def test_one_command_at_a_time_trains_in_a_workdir(tmp_path):
    place = open_workdir(tmp_path / "run", {"k": 3})
    other = open_workdir(tmp_path / "run", {"k": 3})
    with (
        place.locked(),
        pytest.raises(InputError, match=r"^--workdir=.*run: another command is training there; "),
        other.locked(),
    ):
        pytest.fail("both train")
    with other.locked():
        assert (tmp_path / "run" / "config.json").exists()


def test_the_lock_of_another_machine_may_be_one_that_is_gone(tmp_path, monkeypatch):
    place = open_workdir(tmp_path / "run", {"k": 3})
    with place.locked():
        monkeypatch.setattr(platform, "node", lambda: "other")
        said = pytest.warns(UserWarning, match=r": another command is training there, on .")
        with said, place.locked():
            pass


def test_a_remote_path_is_refused():
    with pytest.raises(InputError, match="only local folders"):
        open_workdir("gs://bucket/run", CONFIG)


def test_a_config_that_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--config\.train\.lr=inf"):
        open_workdir(tmp_path / "run", CONFIG | {"train": {"lr": float("inf")}})
    assert not (tmp_path / "run").exists()


def test_read_config_says_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no run"):
        read_config(tmp_path)
    for text in (b"{", b"[1]", b"\xff\x00"):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(InputError, match=r"config\.json is damaged"):
            read_config(tmp_path)
        with pytest.raises(InputError, match=r"config\.json is damaged"):
            open_workdir(tmp_path, CONFIG)
        assert (tmp_path / "config.json").read_bytes() == text


# -- small files --


def test_json_takes_arrays_and_turns_nan_into_null(tmp_path):
    work = open_workdir(tmp_path, CONFIG)
    work.write_json(
        "summary.json",
        {
            "acc": np.float32(0.5),
            "k": np.int64(3),
            "ok": np.bool_(True),
            "nan": float("nan"),
            "array": np.array([1.0, np.inf]),
            "jax": jnp.arange(3),
            "path": pathlib.PurePosixPath("a/b"),
            7: (None, "x"),
        },
    )
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "acc": 0.5, "k": 3, "ok": True, "nan": None, "array": [1.0, None], "jax": [0, 1, 2],
        "path": "a/b", "7": [None, "x"],
    }  # fmt: skip
    with pytest.raises(TypeError, match="object"):
        work.write_json("summary.json", {"x": object()})
    assert json.loads((tmp_path / "summary.json").read_text())["k"] == 3


def test_assignments_come_back_through_a_csv_reader(tmp_path):
    work = open_workdir(tmp_path, CONFIG)
    paths = ["", 'a,"b".png', "two\nlines", os.fsdecode(b"\xff.png"), "ü"]
    probability = np.array([1.0, 0.1, 1 / 3, 1e-9, 0.0], np.float32)
    cluster, entropy = np.array([3, 0, 1, 2, 0], np.int32), probability[::-1].copy()
    assigned = Assigned(np.arange(5)[::-1], paths, cluster, probability, entropy, paths[::-1])
    assert work.read_assignments() is None
    work.write_assignments(assigned)
    with open(
        tmp_path / "assignments.csv", newline="", encoding="utf-8", errors="surrogateescape"
    ) as file:
        header, *rows = csv.reader(file)
    assert header == ["index", "path", "cluster", "probability", "entropy", "prototype"]
    assert [int(r[0]) for r in rows] == [4, 3, 2, 1, 0]
    assert [r[1] for r in rows] == paths
    assert [int(r[2]) for r in rows] == [3, 0, 1, 2, 0]
    np.testing.assert_array_equal([np.float32(r[3]) for r in rows], probability)
    read = work.read_assignments()
    assert read is not None
    assert [x.dtype for x in read[2:5]] == [np.int32, np.float32, np.float32]
    for x, y in zip(read, assigned, strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(ValueError, match="longer"):
        work.write_assignments(assigned._replace(index=np.arange(2)))


def test_any_name_of_a_row_comes_back(tmp_path):
    work = open_workdir(tmp_path, CONFIG)
    names = ["x" * 200_000, "a\rb", "\r\n", '"', ",", " ", "", "\x00"]
    n = len(names)
    numbers = np.arange(n, dtype=np.float32)
    work.write_assignments(Assigned(np.arange(n), names, np.arange(n), numbers, numbers, names))
    read = work.read_assignments()
    assert read is not None and (read.path, read.prototype) == (names, names)
    np.testing.assert_array_equal(work.read_clusters(), np.arange(n))
    lines = (tmp_path / "assignments.csv").read_text().replace("prototype", "nearest", 1)
    for damaged in (lines, "index,path\n0,\n", "", lines[:-3]):
        (tmp_path / "assignments.csv").write_text(damaged)
        assert work.read_assignments() is None and work.read_clusters() is None


def test_arrays_come_back_and_nothing_else_is_read(tmp_path):
    work = open_workdir(tmp_path, CONFIG)
    assert work.read_arrays("x.npz") is None
    names = np.array(["", "ü", os.fsdecode(b"\xff.png")])
    work.write_arrays("x.npz", {"a": np.eye(2, dtype=np.float32), "names": names})
    read = work.read_arrays("x.npz")
    assert read is not None
    assert list(read) == ["a", "names"]
    np.testing.assert_array_equal(read["a"], np.eye(2, dtype=np.float32))
    np.testing.assert_array_equal(read["names"], names)
    whole = (tmp_path / "x.npz").read_bytes()
    work.write_arrays("x.npz", {"a": np.eye(2, dtype=np.float32), "names": names})
    assert (tmp_path / "x.npz").read_bytes() == whole
    with pytest.raises(ValueError, match="allow_pickle"):
        work.write_arrays("x.npz", {"a": np.array([{}], object)})
    for end in (0, 10, len(whole) // 2):
        (tmp_path / "x.npz").write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"x\.npz: is damaged; delete it"):
            work.read_arrays("x.npz")


def test_metrics_survive_a_half_written_line_and_are_cut_on_resume(tmp_path):
    work = open_workdir(tmp_path, CONFIG)
    assert work.read_metrics() == []
    work.truncate_metrics(-1)
    records = [{"step": s, "loss": float("nan") if s == 2 else s / 3} for s in range(5)]
    work.append_metrics({"note": "start"})
    for record in records:
        work.append_metrics(record)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 5, "lo\xff')
    kept = [{"note": "start"}, *(r | {"loss": None} if r["step"] == 2 else r for r in records)]
    assert work.read_metrics() == kept
    work.truncate_metrics(3)
    work.append_metrics({"step": 4, "loss": jnp.float32(0.25)})
    assert work.read_metrics() == [*kept[:5], {"step": 4, "loss": 0.25}]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == work.read_metrics()
