"""The workdir: what is on disk after refusals, damage, kills and full disks."""

import csv
import json
import logging
import os
import pathlib
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dec_diffusion.types import InputError, pytree
from dec_diffusion.workdir import Assigned, Checkpoints, Workdir, open_workdir, read_config

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
    (tmp_path / ".config.json.tmp").write_text('{"seed"')
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
    assigned = Assigned(cluster, probability, entropy, paths[::-1])
    assert work.read_assignments() is None
    work.write_assignments(np.arange(5)[::-1], paths, assigned)
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
    assert [x.dtype for x in read[:3]] == [np.int32, np.float32, np.float32]
    for x, y in zip(read, assigned, strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(ValueError, match="longer"):
        work.write_assignments([0, 1], ["", ""], assigned)


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


# -- checkpoints --


@pytree
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    cluster: tuple


def make_state(seed: int, width: int = 64) -> State:
    draw = np.random.default_rng(seed)
    params = {
        "dense": {"kernel": jnp.asarray(draw.normal(size=(width, width)), jnp.float32)},
        "half": jnp.asarray(draw.normal(size=(5,)), jnp.bfloat16),
        "empty": jnp.zeros((0, 3)),
    }
    return State(
        step=jnp.int32(seed),
        params=params,
        opt_state=optax.adam(1e-3).init(params),
        cluster=(jnp.array([True, False]), None, ()),
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save_steps(folder, steps, **options):
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make_state(step), {"phase": "em", "next": step + 1})


def test_the_newest_state_comes_back_bitwise(tmp_path):
    with open_workdir(tmp_path, CONFIG).checkpoints(keep=2) as checkpoints:
        assert checkpoints.restore_latest(make_state(0)) is None
        for step in range(4):
            checkpoints.save(step, make_state(step), {"scale": 0.1, "nan": float("nan")})
        restored = checkpoints.restore_latest(make_state(0))
        assert checkpoints.steps() == [2, 3]
        assert checkpoints.save(3, make_state(7), {}) is False
    assert restored.step == 3
    assert restored.meta == {"scale": 0.1, "nan": None}
    assert_same(restored.state, make_state(3))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored.state))


def test_a_template_without_shardings_restores_to_numpy(tmp_path):
    save_steps(tmp_path, [4])
    template = jax.eval_shape(lambda: make_state(0))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        restored = checkpoints.restore_latest(template)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(restored.state))
    assert_same(restored.state, make_state(4))


def test_a_run_under_way_can_be_read(tmp_path):
    with Checkpoints(tmp_path / "none", read_only=True) as reader:
        assert reader.restore_latest(make_state(0)) is None
    assert not (tmp_path / "none").exists()
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    save_steps(tmp_path, [1])
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path, read_only=True) as reader:
        assert reader.restore_latest(make_state(0)).step == 1
        assert (tmp_path / "2.orbax-checkpoint-tmp").exists()


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_middle(step: pathlib.Path) -> None:
    file = largest_file(step)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut_short(step: pathlib.Path) -> None:
    os.truncate(largest_file(step), largest_file(step).stat().st_size // 2)


def lose_arrays(step: pathlib.Path) -> None:
    largest_file(step).unlink()


def lose_everything(step: pathlib.Path) -> None:
    for file in step.rglob("*"):
        if file.is_file():
            file.unlink()


def change_meta(step: pathlib.Path) -> None:
    file = next(p for p in (step / "header").iterdir() if b'"em"' in p.read_bytes())
    file.write_bytes(file.read_bytes().replace(b'"em"', b'"en"'))


DAMAGES = [flip_middle, cut_short, lose_arrays, lose_everything, change_meta]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_is_passed_over_and_set_aside(tmp_path, caplog, damage):
    save_steps(tmp_path, [1, 2, 3])
    damage(tmp_path / "3")
    with Checkpoints(tmp_path, read_only=True) as reader:
        assert reader.restore_latest(make_state(0)).step == 2
        assert reader.steps() == [1, 2, 3]
    caplog.clear()
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(make_state(0))
        assert (restored.step, restored.meta) == (2, {"phase": "em", "next": 3})
        assert_same(restored.state, make_state(2))
        warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert [r.name for r in warnings] == ["dec_diffusion.workdir"]
        assert f"{tmp_path / '3'} is damaged" in warnings[0].getMessage()
        assert "\n" not in warnings[0].getMessage()
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.save(3, make_state(3), {"phase": "em", "next": 4})
    assert (tmp_path / "3.damaged").is_dir()
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(make_state(0))
        assert restored.step == 3
        assert_same(restored.state, make_state(3))


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    save_steps(tmp_path, [1])
    draw = random.Random(0)
    files = sorted(p for p in (tmp_path / "1").rglob("*") if p.is_file() and p.stat().st_size)
    noticed = 0
    with Checkpoints(tmp_path, read_only=True) as reader:
        for trial in range(3 * len(files)):
            file = files[trial % len(files)]
            intact = file.read_bytes()
            data = bytearray(intact)
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            file.write_bytes(data)
            try:
                restored = reader.restore_latest(make_state(0))
            except InputError:
                noticed += 1
            else:
                assert_same(restored.state, make_state(1))
                assert restored.meta == {"phase": "em", "next": 2}
            finally:
                file.write_bytes(intact)
    assert noticed >= 3


def test_no_readable_step_is_an_error_that_changes_nothing(tmp_path):
    save_steps(tmp_path, [1, 2])
    for step in "12":
        flip_middle(tmp_path / step)
    for _ in range(2):
        with (
            Checkpoints(tmp_path) as checkpoints,
            pytest.raises(InputError, match=r"none of the checkpoints.*\(steps 1, 2: checksum of"),
        ):
            checkpoints.restore_latest(make_state(0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
    ("template", "part"),
    [
        (make_state(0, width=32), r"float32\[64, 64\] there, float32\[32, 32\] here"),
        ({"step": jnp.int32(0)}, "absent here"),
        (
            jax.tree.map(lambda x: x.astype(jnp.float32), make_state(0)),
            r"cluster\.0 bool\[2\] there, float32\[2\] here and",
        ),
    ],
)
def test_another_model_is_refused_and_no_step_set_aside(tmp_path, template, part):
    save_steps(tmp_path, [1])
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(InputError, match=part):
            checkpoints.restore_latest(template)
        assert checkpoints.steps() == [1]


def test_only_arrays_are_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for state, part in (({"key": jax.random.key(0)}, "PRNG key"), ({"n": 1}, "n is a int")):
            with pytest.raises(TypeError, match=part):
                checkpoints.save(0, state, {})
        with pytest.raises(ValueError, match=r"called a\.b"):
            checkpoints.save(0, {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}, {})
        assert checkpoints.save(0, jnp.arange(3), {})
        assert_same(checkpoints.restore_latest(jnp.zeros(3, jnp.int32)).state, jnp.arange(3))


def test_donating_a_state_after_saving_or_restoring_it_is_safe(tmp_path):
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 7, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        state = {f"w{i}": jnp.full((256, 256), i, jnp.float32) for i in range(24)}
        expected = jax.tree.map(np.array, state)
        for step in range(4):
            checkpoints.save(step, state, {})
            for _ in range(3):
                state = advance(state)
            state = jax.tree.map(jnp.asarray, expected)
        for _ in range(2):
            restored = checkpoints.restore_latest(state)
            assert restored.step == 3
            assert_same(jax.tree.map(np.array, restored.state), expected)
            advance(restored.state)


def test_any_number_of_devices_can_restore(tmp_path, run_python):
    save = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from dec_diffusion.workdir import Checkpoints
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
assert jax.device_count() == 8
put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
x = np.arange(64, dtype=np.float32).reshape(16, 4)
with Checkpoints(sys.argv[1]) as c:
    c.save(1, {"sharded": put(x, P("x")), "copied": put(x + 1, P())}, {})
"""
    run_python(save, tmp_path, devices=8)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    expected = {
        "sharded": np.arange(64, dtype=np.float32).reshape(16, 4),
        "copied": np.arange(64, dtype=np.float32).reshape(16, 4) + 1,
    }
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P("x"))),
        expected,
    )
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(template)
    assert_same(restored.state, expected)
    assert restored.state["sharded"].sharding == NamedSharding(mesh, P("x"))


# A run that saves as fast as it can, and checks first that what it resumes from is intact.
KILLED = """
import sys, time, jax, numpy as np
from dec_diffusion.workdir import Checkpoints
def make(step):
    draw = np.random.default_rng(step)
    return {f"w{i}": jax.numpy.asarray(draw.random((1000, 500), np.float32)) for i in range(10)}
checkpoints = Checkpoints(sys.argv[1], keep=2)
restored = checkpoints.restore_latest(make(0))
step = 0
if restored is not None:
    step = restored.step
    for a, b in zip(jax.tree.leaves(restored.state), jax.tree.leaves(make(step))):
        assert np.array_equal(a, b), f"step {step} is not what was saved"
    assert restored.meta == {"step": step}
print(f"restored {step}\\n", end="")  # one write, which a kill cannot tear
while len(sys.argv) == 2:
    step += 1
    checkpoints.save(step, make(step), {"step": step})
    print(f"durable {step - 1}\\n", end="")  # save waits for the save before it
checkpoints.close()
"""


def test_kill_9_amid_saves_leaves_an_intact_state(tmp_path, run_python, start_python):
    draw = random.Random(0)
    durable = torn = 0
    for _ in range(4):
        process = start_python(KILLED, tmp_path)
        first = process.stdout.readline().split()
        if not first:
            pytest.fail(process.stderr.read())
        assert int(first[1]) >= durable
        for _ in range(2):
            durable = int(process.stdout.readline().split()[1])
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        out, err = process.communicate()
        durable = max([durable, *(int(line.split()[1]) for line in out.splitlines())])
        assert "Traceback" not in err and "damaged" not in err
        torn += any("tmp" in p.name for p in tmp_path.iterdir())
    last = run_python(KILLED, tmp_path, "stop").stdout.split()
    assert int(last[1]) >= durable > 0
    assert torn > 0, "no kill came amid a save, so nothing was tested"
    assert not any("tmp" in p.name for p in tmp_path.iterdir())


def test_a_failing_write_is_one_line_and_spares_the_last_good_step(tmp_path, run_python):
    code = """
import resource, sys, jax.numpy as jnp, numpy as np
from dec_diffusion.types import InputError
from dec_diffusion.workdir import Checkpoints
state = {"w": jnp.asarray(np.random.default_rng(0).random((1000, 500), np.float32))}
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, state, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # like a full disk
try:
    checkpoints.save(2, state, {})
    checkpoints.close()
except InputError as error:
    print(error)
"""
    done = run_python(code, tmp_path)
    assert len(done.stdout.splitlines()) == 1
    assert "a checkpoint could not be written" in done.stdout
    assert "Traceback" not in done.stderr
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest({"w": jnp.zeros((1000, 500))})
    assert restored.step == 1
    np.testing.assert_array_equal(
        restored.state["w"], np.random.default_rng(0).random((1000, 500), np.float32)
    )


def test_saving_and_restoring_say_nothing_under_absl(tmp_path, run_python):
    code = """
import sys, absl.app, absl.logging, jax.numpy as jnp
from dec_diffusion.workdir import Checkpoints
def main(argv):
    absl.logging.set_verbosity(absl.logging.INFO)
    for step in (1, 2):
        with Checkpoints(argv[1]) as checkpoints:
            checkpoints.restore_latest({"w": jnp.ones(3)})
            checkpoints.save(step, {"w": jnp.ones(3)}, {})
    absl.logging.info("heard")
absl.app.run(main)
"""
    done = run_python(code, tmp_path, env={"JAX_PLATFORMS": "cpu"})
    assert done.stdout == ""
    assert "heard" in done.stderr
    assert [line for line in done.stderr.splitlines() if "checkpoint" in line] == []
