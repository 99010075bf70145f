"""The host loop, with a method small enough to know: k centres moved by gradient.

Whole runs of a real method, killed and resumed as processes, are in ``test_cli.py``.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dec_diffusion import train
from dec_diffusion.config import Config, TrainConfig
from dec_diffusion.data import DataConfig
from dec_diffusion.method import DataSpec, EStage, Method, Phase
from dec_diffusion.types import InputError

STEPS = 3
ITERATIONS = {"first": 2, "second": 4}
LAST = STEPS * sum(ITERATIONS.values())


@dataclasses.dataclass
class Centres:
    """Centres w, and c, the mean of the data as the E-step last saw it.

    Attributes:
        num_clusters: k.
        loss_breaks_at: progress of the second phase from which the loss is NaN.
        weights_break_at: step of the second phase whose update is infinite.
        lonely: whether one centre starts where no example is.
    """

    num_clusters: int = 3
    loss_breaks_at: float = 2.0
    weights_break_at: int = -1
    lonely: bool = False

    def build(self, spec: DataSpec) -> Method:
        k, d = self.num_clusters, spec.shape[0]

        def init(key, batch):
            w = jax.random.normal(key, (k, d))
            return {"w": w.at[0].add(1e3) if self.lonely else w}, jnp.zeros(d)

        def distances(params, x):
            return jnp.sum((x[:, None] - params["w"]) ** 2, axis=-1)

        def loss(params, cluster, batch, key, progress):
            x = batch["image"] - cluster + 0.01 * jax.random.normal(key, batch["image"].shape)
            value = -jax.nn.logsumexp(-distances(params, x), axis=-1).mean()
            return value, (cluster, {"spread": x.std()})

        def breaking_loss(params, cluster, batch, key, progress):
            value, aux = loss(params, cluster, batch, key, progress)
            return jnp.where(progress >= self.loss_breaks_at, jnp.nan, value), aux

        def mean(params, cluster, x, weight, key, progress):
            return params, weight @ x / weight.sum(), {"rows": weight.sum()}

        def rate(count):
            return jnp.where(count == self.weights_break_at - 1, jnp.inf, 0.1)

        e_step = EStage(lambda params, cluster, batch, key: batch["image"], mean)
        phases = {
            "first": Phase(loss, optax.adam(0.3), ITERATIONS["first"], STEPS, assigns=False),
            "second": Phase(
                breaking_loss,
                optax.sgd(rate),
                ITERATIONS["second"],
                STEPS,
                begin=e_step,
                refresh=e_step,
            ),
        }
        return Method(
            init,
            phases,
            lambda params, c, batch, key: jax.nn.log_softmax(
                -distances(params, batch["image"] - c)
            ),
            lambda params, c, batch, key: batch["image"],
        )


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    """Examples [60, 2] around three centres, and their labels."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    return np.array([[0, 0], [9, 0], [0, 9]])[y] + rng.normal(size=(60, 2)), y


def make(tmp: pathlib.Path, x, y=None, *, limit=None, seed=0, train=None, **method) -> Config:
    path = tmp / "data.npz"
    np.savez(path, x=x) if y is None else np.savez(path, x=x, y=y)
    settings = {"batch_size": 16, "checkpoint_every": 1, "evaluate_every": 2}
    return Config(
        "toy",
        Centres(**method),
        DataConfig(name="npz", path=str(path), limit=limit),
        TrainConfig(**{**settings, "keep_checkpoints": 100, **(train or {})}),
        seed,
    )


def assert_bitwise(a: train.Result, b: train.Result) -> None:
    for x, y in zip(jax.tree.leaves(a.run.state), jax.tree.leaves(b.run.state), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert (a.assignment.labels == b.assignment.labels).all()
    assert a.assignment.responsibilities.tobytes() == b.assignment.responsibilities.tobytes()


def steps_of(workdir: pathlib.Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def history(workdir: pathlib.Path) -> list[dict]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clock = {"seconds", "examples_per_second"}
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, blobs) -> tuple[train.Result, pathlib.Path, Config]:
    """A run from start to end, with all its checkpoints."""
    tmp = tmp_path_factory.mktemp("whole")
    config = make(tmp, *blobs)
    return train.fit(config, tmp / "run", verbose=0), tmp / "run", config


def test_a_run_finds_the_blobs_and_says_so(whole, blobs):
    result, workdir, _ = whole
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["scores"]["acc"] == summary["baselines"]["kmeans_pixels"]["scores"]["acc"] == 1
    assert result.summary["scores"] == summary["scores"]
    assert result.run.step == LAST
    lines = (workdir / "assignments.csv").read_text().splitlines()[1:]
    expected = zip(result.assignment.labels, result.assignment.probability, strict=True)
    assert [line.split(",")[:4] for line in lines] == [
        [str(i), "", str(c), str(p)] for i, (c, p) in enumerate(expected)
    ]
    np.testing.assert_allclose(result.assignment.responsibilities.sum(1), 1, rtol=1e-6)


def test_the_history_tells_phases_steps_and_e_steps(whole):
    _, workdir, _ = whole
    records = history(workdir)
    assert [r["step"] for r in records] == list(range(STEPS, LAST + 1, STEPS))
    assert [r["phase"] for r in records] == ["first"] * 2 + ["second"] * 4
    assert [r["iteration"] for r in records] == [1, 2, 1, 2, 3, 4]
    # Padding has weight 0, and the first phase has no E-step.
    assert [r.get("rows") for r in records] == [None, None, 60, 60, 60, 60]
    assert ["acc" in r for r in records] == [False, False, False, True, False, True]
    assert steps_of(workdir) == [r["step"] for r in records]


@pytest.mark.parametrize("resumed_at", [STEPS, 2 * STEPS, 4 * STEPS])
def test_resumed_is_uninterrupted(whole, tmp_path, resumed_at):
    """In the first phase, between the phases, and in the second."""
    result, workdir, config = whole
    copy = pathlib.Path(shutil.copytree(workdir, tmp_path / "copy"))
    for name in ("assignments.csv", "summary.json"):
        (copy / name).unlink()
    for step in steps_of(copy):
        if step > resumed_at:
            shutil.rmtree(copy / "checkpoints" / str(step))
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "pha')  # a record that a kill cut short
    again = train.fit(config, copy, verbose=0)
    assert_bitwise(result, again)
    assert history(copy) == history(workdir)
    assert steps_of(copy) == steps_of(workdir)
    assert (copy / "assignments.csv").read_bytes() == (workdir / "assignments.csv").read_bytes()


def test_a_complete_run_is_left_alone(whole, capsys):
    result, workdir, config = whole
    before = {p: p.stat().st_mtime_ns for p in workdir.glob("*.*") if p.suffix != ".jsonl"}
    again = train.fit(config, workdir)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert_bitwise(result, again)
    assert again.summary == json.loads((workdir / "summary.json").read_text())
    assert "complete after 18 steps" in capsys.readouterr().out


def test_labels_change_nothing_but_the_scores(whole, blobs, tmp_path):
    x, y = blobs
    shuffled = train.fit(make(tmp_path, x, y[::-1] % 2), tmp_path / "shuffled", verbose=0)
    absent = train.fit(make(tmp_path, x), tmp_path / "absent", verbose=0)
    assert_bitwise(whole[0], shuffled)
    assert_bitwise(whole[0], absent)
    assert shuffled.summary["scores"]["acc"] < 1
    assert "acc" not in absent.summary["scores"]
    assert not absent.summary["data"]["labels"]


def test_streamed_is_resident(whole, blobs, tmp_path):
    config = make(tmp_path, *blobs, train={"resident_gib": 0.0})
    assert_bitwise(whole[0], train.fit(config, tmp_path / "run", verbose=0))


def test_another_seed_is_another_run(whole, blobs, tmp_path, capsys):
    other = train.fit(make(tmp_path, *blobs, seed=1), tmp_path / "run", verbose=0)
    assert not np.array_equal(other.run.state.params["w"], whole[0].run.state.params["w"])
    assert capsys.readouterr().out == ""


def test_a_batch_above_the_data_holds_all_of_them(blobs, tmp_path):
    runs = [
        train.fit(make(tmp_path, *blobs, train={"batch_size": size}), None, verbose=0)
        for size in (60, 256)
    ]
    assert_bitwise(*runs)


def test_a_limit_keeps_the_rows_of_the_source(blobs, tmp_path):
    result = train.fit(make(tmp_path, *blobs, limit=30), tmp_path / "run", verbose=0)
    lines = (tmp_path / "run" / "assignments.csv").read_text().splitlines()[1:]
    index = [int(line.split(",")[0]) for line in lines]
    assert index == result.dataset.rows.tolist()
    assert index != list(range(30))
    np.testing.assert_array_equal(result.dataset.examples, blobs[0][index].astype(np.float32))


# Progress 0.5 is reached with 6 of the 12 steps of the second phase taken: the 7th fails. An
# update that breaks the weights shows in the loss of the step after it, or not at all if it is the
# last of its iteration; it must not be saved either way.
@pytest.mark.parametrize(
    ("method", "failed", "good"),
    [
        ({"loss_breaks_at": 0.5}, 13, 12),
        ({"loss_breaks_at": 0.59}, 15, 12),
        ({"loss_breaks_at": 0.0}, 7, 6),
        ({"weights_break_at": 5}, 12, 9),
        ({"weights_break_at": 6}, 12, 9),
    ],
)
def test_what_is_not_finite_stops_the_run_and_is_never_saved(blobs, tmp_path, method, failed, good):
    config = make(tmp_path, *blobs, **method)
    for _ in range(2):  # the same command again ends in the same way
        with pytest.raises(train.NonFiniteLossError) as caught:
            train.fit(config, tmp_path / "run", verbose=0)
        message = str(caught.value)
        assert f"at step {failed} (phase second)" in message
        assert f"last good checkpoint is step {good}" in message
        assert "--config.method.learning_rate" in message
        assert "\n" not in message
        assert steps_of(tmp_path / "run") == list(range(STEPS, good + 1, STEPS))
        assert [r["step"] for r in history(tmp_path / "run")] == steps_of(tmp_path / "run")
    assert not (tmp_path / "run" / "assignments.csv").exists()


def test_without_a_checkpoint_the_message_says_so(blobs, tmp_path):
    class Broken(Centres):
        def build(self, spec):
            method = super().build(spec)
            return method._replace(phases={"only": method.phases["second"]})

    config = make(tmp_path, *blobs)
    config = dataclasses.replace(config, method=Broken(loss_breaks_at=0.0))
    with pytest.raises(train.NonFiniteLossError, match="there is no checkpoint yet"):
        train.fit(config, tmp_path / "run", verbose=0)


def test_empty_clusters_are_warned_of(blobs, tmp_path):
    config = make(tmp_path, *blobs, lonely=True, train={"evaluate_every": 100})
    with pytest.warns(train.EmptyClusterWarning, match="step 18: 1 of 3 clusters are empty"):
        result = train.fit(config, tmp_path / "run", verbose=0)
    assert result.summary["clusters"]["found"] == 2


def test_collapse_is_warned_of_with_its_remedy(blobs, tmp_path):
    config = make(tmp_path, *blobs, lonely=True, num_clusters=2, train={"evaluate_every": 100})
    words = "step 18: one of 2 clusters holds 100% of the examples; .*--config.seed"
    with pytest.warns(train.EmptyClusterWarning), pytest.warns(train.CollapseWarning, match=words):
        train.fit(config, tmp_path / "run", verbose=0)


def test_bad_settings_leave_no_workdir(blobs, tmp_path):
    with pytest.raises(InputError, match="batch_size"):
        train.fit(make(tmp_path, *blobs, train={"batch_size": 0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
