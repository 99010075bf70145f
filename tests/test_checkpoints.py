"""Checkpoints: what comes back after damage, kills and full disks."""

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

from dec_diffusion.checkpoints import Checkpoints
from dec_diffusion.types import InputError, pytree
from dec_diffusion.workdir import open_workdir


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
    with open_workdir(tmp_path, {"seed": 0}).checkpoints(keep=2) as checkpoints:
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
        assert [r.name for r in warnings] == ["dec_diffusion.checkpoints"]
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
from dec_diffusion.checkpoints import Checkpoints
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
from dec_diffusion.checkpoints import Checkpoints
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
from dec_diffusion.checkpoints import Checkpoints
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
from dec_diffusion.checkpoints import Checkpoints
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
