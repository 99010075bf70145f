"""DiEC: its laws, and what it does end to end on data that hold known groups."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dec_diffusion import command, communities, engine, features, metrics, train, trained
from dec_diffusion.config import Config, TrainConfig
from dec_diffusion.data import DataConfig
from dec_diffusion.features import pooled
from dec_diffusion.method import DataSpec, Pretrained
from dec_diffusion.methods import diec
from dec_diffusion.methods.diec import DiEC
from dec_diffusion.networks import diffusers
from dec_diffusion.options import parse
from dec_diffusion.targets import target_distribution
from dec_diffusion.types import InputError

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "diffusers"
KEY = jax.random.key(3)
N, K = 240, 4

TINY = DiEC(
    num_clusters=K,
    width=8,
    multipliers=(1, 2),
    noise_schedule="cosine",
    num_steps=100,
    timesteps=3,
    refine=0,
    dims=6,
    search_restarts=2,
    restarts=3,
    pretrain_iterations=3,
    iterations=2,
    steps=40,
    neighbours=5,
    hidden=8,
    sample_steps=4,
    tolerance=0.0,
)


def planted(seed=0):
    """Noisy copies of four 8x8 pictures in [-1, 1], and which one each is."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(K, size=N)
    pictures = np.sign(rng.normal(size=(K, 8, 8, 1)))
    return (0.6 * pictures[truth] + 0.3 * rng.normal(size=(N, 8, 8, 1))).astype(np.float32), truth


X, TRUTH = planted()
WHOLE = {
    "image": jnp.asarray(X),
    "index": jnp.arange(N, dtype=jnp.int32),
    "weight": jnp.ones(N),
}


def build(settings, *, pretrained=True):
    start = Pretrained({}, None) if pretrained else None
    return settings.build(DataSpec((8, 8, 1), N, 64, start))


def memo(function):
    """Keep results by the text of the arguments, since settings are not hashable."""
    known = {}

    def once(*arguments):
        key = repr(arguments)
        if key not in known:
            known[key] = function(*arguments)
        return known[key]

    return once


def iterations_of(method, name):
    """A compiled EM iteration of a phase, on the planted data."""
    examples = engine.Examples(jnp.asarray(X), jnp.float32(0), jnp.float32(1))
    return jax.jit(
        lambda state: engine.em_iteration(
            method.phases[name], state, examples, KEY, batch_size=64, sweep_size=N
        )
    )


def fresh(method):
    return engine.init_state(method, KEY, jax.tree.map(lambda a: a[:2], WHOLE))


@memo
def denoiser():
    """A denoiser trained for a moment on the planted data, and its last losses."""
    method = build(TINY, pretrained=False)
    state, _ = engine.begin_phase(method.phases["pretrain"], fresh(method), None, KEY)
    run, info = iterations_of(method, "pretrain"), {}
    for _ in range(TINY.pretrain_iterations):
        state, info = run(state)
    return state.ema_params["denoiser"], np.asarray(info["loss"])


@memo
def entered(settings):
    """The method and its state on entering the second phase, with the denoiser above."""
    method = build(settings)
    phase, state = method.phases["cluster"], fresh(method)
    params = {**state.params, "denoiser": denoiser()[0]}
    state = dataclasses.replace(state, params=params, ema_params=params)

    @jax.jit
    def enter(state):
        state, _ = engine.begin_phase(phase, state, (WHOLE["image"], WHOLE["weight"]), KEY)
        found = phase.refresh.collect(state.ema_params, state.cluster, WHOLE, KEY)
        return engine.e_step(phase, state, (found, WHOLE["weight"]), KEY)[0]

    return method, enter(state)


@memo
def fine_tuned(settings):
    """The state after the second phase, and what its last iteration said."""
    method, state = entered(settings)
    run, info = iterations_of(method, "cluster"), {}
    for _ in range(settings.iterations):
        state, info = run(state)
    return state, info


def fixed(timestep, layer="middle", **changes):
    """One cell, and the start that compiles quickly."""
    changes = {"start": "kmeans"} | changes
    return dataclasses.replace(TINY, timestep=timestep, layer=layer, **changes)


VECTORS = fixed(25, "block_1", prediction="eps")


def accuracy(labels):
    return metrics.external_scores(TRUTH, np.asarray(labels, np.int32))["acc"]


def assigned(method, state, batch):
    return jax.jit(method.predict)(state.ema_params, state.cluster, batch, KEY)


# -- features and search --


def test_pooling_keeps_at_most_four_by_four():
    h = jnp.arange(2 * 8 * 8 * 3.0).reshape(2, 8, 8, 3)
    blocks = h.reshape(2, 4, 2, 4, 2, 3).mean((2, 4)).reshape(2, -1)
    np.testing.assert_allclose(pooled(h, "layout"), blocks, rtol=1e-6)
    np.testing.assert_allclose(pooled(h, "average"), h.mean((1, 2)), rtol=1e-6)
    assert pooled(jnp.zeros((2, 7, 7, 5)), "layout").shape == (2, 4 * 4 * 5)
    assert pooled(jnp.zeros((2, 3, 2, 5)), "layout").shape == (2, 3 * 2 * 5)
    assert pooled(jnp.zeros((2, 9)), "layout").shape == (2, 9)
    # Either side by itself: no border is repeated where both are multiples of four.
    for height, width in ((8, 64), (16, 64), (32, 128), (4, 8), (2, 12)):
        h = jax.random.normal(KEY, (2, height, width, 3))
        rows = min(height, 4)
        blocks = h.reshape(2, rows, height // rows, 4, width // 4, 3).mean((2, 4))
        np.testing.assert_allclose(pooled(h, "layout"), blocks.reshape(2, -1), atol=1e-6)


def test_pretraining_learns_to_denoise():
    losses = denoiser()[1]
    # A network that says 0, as it does at first, has an error of 1.
    assert losses[-10:].mean() < 0.7


def test_search_finds_planted_groups_without_labels():
    method, state = entered(TINY)
    found = method.findings(state.cluster)
    assert found.rows == (0, 25, 50)
    assert found.columns == ("down_0_0", "down_1_0", "middle", "up_1_0", "up_0_0")
    assert accuracy(state.cluster.kmeans.values) > 0.95
    row, column = found.chosen
    assert found.scores["value"][row, column] == found.scores["value"].max()
    assert found.rows[row] == int(state.cluster.timestep)
    assert found.boundary == (row in (0, 2))
    cells = [[accuracy_of(c, found.examples) for c in line] for line in found.cells]
    assert np.max(cells) > 0.95


def accuracy_of(labels, examples):
    return metrics.external_scores(TRUTH[examples], np.asarray(labels, np.int32))["acc"]


@pytest.mark.slow
def test_one_pass_over_all_cells_equals_a_run_of_each():
    method, state = entered(TINY)
    found = method.findings(state.cluster)
    row = found.rows.index(25)
    for column in (2, 4):
        alone_method, alone = entered(fixed(25, found.columns[column]))
        assert int(alone.cluster.layer) == column
        single = alone_method.findings(alone.cluster)
        np.testing.assert_allclose(single.scores["chi"][0], found.scores["chi"][row], rtol=1e-3)
        np.testing.assert_array_equal(single.examples, found.examples)


def test_features_depend_on_nothing_but_the_example():
    method, state = entered(TINY)
    whole = assigned(method, state, WHOLE)
    part = jax.tree.map(lambda a: a[5:12], WHOLE)
    part = {**part, "index": part["index"] * 0}
    np.testing.assert_allclose(assigned(method, state, part), whole[5:12], atol=2e-4)


# -- fine-tuning --


def test_the_first_groups_are_those_of_all_layers_side_by_side(monkeypatch):
    seen = []

    def partition(key, x, k, **options):
        seen.append(x.shape)
        return communities.Communities(jnp.zeros(len(x), jnp.int32), jnp.float32(0))

    monkeypatch.setattr("dec_diffusion.methods.diec.communities.partition", partition)
    for settings in (TINY, dataclasses.replace(TINY, start="kmeans"), fixed(25, start="graph")):
        method = build(settings)
        state, begin = fresh(method), method.phases["cluster"].begin
        jax.eval_shape(
            begin.update, state.params, state.cluster, X, jnp.ones(N), KEY, jnp.float32(0)
        )
    assert seen == [(N, 5 * TINY.dims)] * 2


def test_first_assignment_is_that_of_kmeans_bit_for_bit():
    method, state = entered(dataclasses.replace(TINY, start="kmeans"))
    z = method.embed(state.ema_params, state.cluster, WHOLE, KEY)
    np.testing.assert_array_equal(state.cluster.labels.values, state.cluster.kmeans.values)
    np.testing.assert_array_equal(state.cluster.start.values, state.cluster.kmeans.values)
    params = {**state.params, "map": jax.tree.map(jnp.zeros_like, state.params["map"])}
    np.testing.assert_array_equal(z, method.embed(params, state.cluster, WHOLE, KEY))
    log_q = assigned(method, state, WHOLE)
    np.testing.assert_array_equal(log_q.argmax(1), state.cluster.kmeans.values)
    np.testing.assert_allclose(jnp.exp(log_q).sum(1), 1.0, rtol=1e-5)
    assert set(method.findings(state.cluster).partitions) == {"kmeans_at_cell"}


def test_the_groups_of_the_graph_are_the_first_target_and_their_means_the_centres():
    method, state = entered(TINY)
    groups = np.asarray(state.cluster.start.values)
    assert accuracy(groups) > 0.95
    np.testing.assert_array_equal(state.cluster.target.values, np.eye(K)[groups])
    e = np.asarray(method.embed(state.ema_params, state.cluster, WHOLE, KEY))
    means = np.stack([e[groups == c].mean(0) for c in range(K)])
    np.testing.assert_allclose(state.params["centers"], means, atol=1e-4)
    found = method.findings(state.cluster).partitions
    np.testing.assert_array_equal(found["graph_at_timestep"], groups)
    np.testing.assert_array_equal(found["kmeans_at_cell"], state.cluster.kmeans.values)
    # Past its first third, training teaches itself.
    refresh = method.phases["cluster"].refresh
    collected = refresh.collect(state.ema_params, state.cluster, WHOLE, KEY)
    log_q = collected[0][1]
    for progress, expected in ((0.2, np.eye(K)[groups]), (0.5, target_distribution(log_q))):
        _, cluster, info = refresh.update(
            state.params, state.cluster, collected, WHOLE["weight"], KEY, jnp.float32(progress)
        )
        np.testing.assert_allclose(cluster.target.values, expected, atol=1e-6)
        assert not info["converged"]


def reached(gradient):
    return {
        name: any(bool((jnp.abs(leaf) > 0).any()) for leaf in jax.tree.leaves(tree))
        for name, tree in gradient.items()
    }


@pytest.mark.parametrize(
    ("layer", "untouched"),
    [
        pytest.param("down_1_0", {"middle", "up_1_0", "up_0_0", "output"}, marks=pytest.mark.slow),
        ("middle", {"up_1_0", "up_0_0", "output"}),
    ],
)
def test_clustering_reaches_the_denoiser_up_to_the_layer_only(layer, untouched):
    settings = fixed(10, layer, denoise=0.0)
    method, state = entered(settings)
    loss = method.phases["cluster"].loss
    half = jnp.float32(0.5)
    gradient = jax.jit(jax.grad(lambda p: loss(p, state.cluster, WHOLE, KEY, half)[0]))(
        state.params
    )
    seen = reached(gradient["denoiser"])
    assert seen[layer]
    assert not any(seen[name] for name in untouched)
    assert reached(gradient)["map"]
    assert reached(gradient)["centers"]


def test_denoising_reaches_the_whole_denoiser_and_nothing_else():
    method = build(TINY, pretrained=False)
    params = {**fresh(method).params, "denoiser": denoiser()[0]}
    loss, cluster = method.phases["pretrain"].loss, fresh(method).cluster
    start = jnp.float32(0)
    gradient = jax.jit(jax.grad(lambda p: loss(p, cluster, WHOLE, KEY, start)[0]))(params)
    assert all(reached(gradient["denoiser"]).values())
    assert not reached(gradient)["map"]
    assert not reached(gradient)["centers"]


def test_fine_tuning_keeps_the_groups_and_the_denoiser():
    method, start = entered(TINY)
    state, info = fine_tuned(TINY)
    assert accuracy(state.cluster.labels.values) >= accuracy(start.cluster.kmeans.values)
    before, after = np.asarray(state.cluster.denoising)
    assert before == np.asarray(start.cluster.denoising)[1]
    assert after < 1.1 * before
    assert float(info["confidence"]) > float(jnp.exp(assigned(method, start, WHOLE)).max(1).mean())


@pytest.mark.slow
def test_frozen_denoiser_does_not_move():
    settings = dataclasses.replace(TINY, frozen=True, layer="up_0_0", timestep=10)
    state, _ = fine_tuned(settings)
    for a, b in zip(
        jax.tree.leaves(state.params["denoiser"]), jax.tree.leaves(denoiser()[0]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    method, _ = entered(settings)
    log_q = assigned(method, state, WHOLE)
    np.testing.assert_array_equal(log_q.argmax(1), state.cluster.labels.values)
    assert accuracy(state.cluster.labels.values) > 0.95


@pytest.mark.slow
def test_sinkhorn_targets_and_consistency():
    settings = fixed(10, target="sinkhorn", consistency=0.5, pool="average", whiten=False)
    method, start = entered(settings)
    np.testing.assert_allclose(start.cluster.target.values.mean(0), 1 / K, atol=1e-3)
    state, info = fine_tuned(settings)
    assert np.isfinite(info["loss"]).all()
    assert float(info["disagreement"][-1]) >= 0
    assert method.findings(state.cluster).partitions["kmeans_at_cell"].shape == (N,)


def test_held_out_examples_do_not_train_the_denoiser():
    settings = dataclasses.replace(TINY, held_out=0.3)
    method = build(settings, pretrained=False)
    state = fresh(method)
    loss = method.phases["pretrain"].loss
    out = np.random.default_rng(0).random(N) < 0.3
    params = {**state.params, "denoiser": denoiser()[0]}
    changed = {**WHOLE, "image": jnp.where(jnp.asarray(out)[:, None, None, None], 5.0, X)}
    value = jax.jit(lambda batch: loss(params, state.cluster, batch, KEY, jnp.float32(0))[0])
    np.testing.assert_array_equal(value(changed), value(WHOLE))
    others = {**WHOLE, "image": jnp.where(jnp.asarray(out)[:, None, None, None], X, 5.0)}
    assert value(others) != value(WHOLE)


def test_generated_examples_answer_the_clusters_asked_for():
    method, state = entered(TINY)
    component = jnp.asarray([0, 1, 2, 3, 0, 0, -1], jnp.int32)
    draw = jax.jit(method.sample)
    x = draw(state.ema_params, state.cluster, KEY, component)
    assert x.shape == (7, 8, 8, 1)
    assert float(jnp.abs(x).max()) <= 1.0
    np.testing.assert_array_equal(x, draw(state.ema_params, state.cluster, KEY, component))
    # Requests of one cluster get different examples.
    assert float(jnp.abs(x[0] - x[4]).max()) > 0
    assert float(jnp.abs(x[4] - x[5]).max()) > 0


def test_generated_examples_are_judged_in_parts(monkeypatch):
    monkeypatch.setattr("dec_diffusion.sampling._PART", 8)
    sizes, halves = set(), features.halves
    monkeypatch.setattr(features, "halves", lambda *a: sizes.add(len(a[2])) or halves(*a))
    method = VECTORS.build(DataSpec((3,), N, 64, Pretrained({}, None)))
    params, cluster = jax.jit(method.init)(KEY, {**WHOLE, "image": jnp.zeros((N, 3))})
    # Any projection, any centres and any bounds will do.
    axes = jax.random.normal(KEY, cluster.projection.axes.shape)
    cluster = dataclasses.replace(
        cluster,
        projection=dataclasses.replace(cluster.projection, axes=axes),
        reach=jnp.ones(3),
    )
    params = {**params, "centers": jax.random.normal(KEY, params["centers"].shape)}
    assert method.sample is not None
    x = jax.jit(method.sample)(params, cluster, KEY, jnp.zeros(9, jnp.int32))
    assert sizes == {6}  # 18 examples in three parts
    # The most typical first, as all together say.
    log_q = jax.jit(method.predict)(params, cluster, {"image": x}, KEY)[:, 0]
    assert (jnp.diff(log_q) < 1e-4).all() and log_q[0] > log_q[-1]


def test_generated_vectors_stay_within_the_data():
    method = VECTORS.build(DataSpec((3,), N, 64, Pretrained({}, None)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, 3)) * [1, 2, 0], jnp.float32)
    params, cluster = jax.jit(method.init)(KEY, {**WHOLE, "image": x})
    begin = method.phases["cluster"].begin
    assert begin is not None and method.sample is not None

    @jax.jit
    def begun(x, weight):
        found = begin.update(params, cluster, x, weight, KEY, jnp.float32(0))[1]
        return found.reach, found.snapshot  # so that nothing else is computed

    # Padding is no data.
    weight = jnp.repeat(jnp.asarray([1.0, 0.0]), N)
    reach, snapshot = begun(jnp.concatenate([x, x + 100]), weight)
    np.testing.assert_array_equal(reach, jnp.abs(x).max(0))
    cluster = dataclasses.replace(cluster, reach=reach)
    drawn = jax.jit(method.sample)(params, cluster, KEY, jnp.full(30, -1))
    for some in (drawn, snapshot):
        assert (jnp.abs(some) <= reach).all() and float(jnp.abs(some).max()) > 0.5


# -- settings and starting points --


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"draws": 3}, "draws"),
        ({"strategy": "golden"}, "strategy"),
        ({"strategy": "ternary", "layer": "middle", "score": "rank"}, "strategy"),
        ({"layer": "bottleneck"}, "layer"),
        ({"timestep": 100}, "timestep"),
        ({"subset": 4}, "subset"),
        ({"held_out": 1.0}, "held_out"),
        ({"neighbours": N}, "neighbours"),
        ({"num_clusters": 2**15, "subset": 2**16}, "num_clusters"),
        ({"adam_b2": 1.0}, "adam_b2"),
        ({"multipliers": ()}, "multipliers"),
        ({"pool": "max"}, "pool"),
        ({"attention": (7,)}, "attention"),
        ({"frozen": True, "consistency": 1.0}, "consistency"),
    ],
)
def test_bad_settings_are_refused(changes, named):
    with pytest.raises(InputError, match=rf"--config\.method\.{named}="):
        build(dataclasses.replace(TINY, **changes))


def imported(**changes):
    """An architecture as a folder of diffusers has it, and data that suit it."""
    architecture = diffusers.read(FIXTURES / "plain").architecture | changes
    shape = (8, 8, architecture["in_channels"])
    return DataSpec(shape, N, 64, Pretrained({}, architecture))


def test_the_steps_of_an_imported_denoiser_are_those_of_its_own_schedule():
    pytest.importorskip("safetensors")
    spec = imported()
    assert spec.pretrained is not None and spec.pretrained.architecture is not None
    last = spec.pretrained.architecture["scheduler"]["num_train_timesteps"] - 1
    # What the settings say of a schedule of their own does not count.
    settings = fixed(last, num_steps=2, sample_steps=2)
    settings.build(spec)
    with pytest.raises(InputError, match=rf"method\.timestep={last + 1}: .* is {last};"):
        dataclasses.replace(settings, timestep=last + 1).build(spec)


def test_a_denoiser_of_images_in_another_range_is_refused():
    pytest.importorskip("safetensors")
    with pytest.raises(InputError, match=r"--config\.pretrained: .* \(center_input_sample\)"):
        TINY.build(imported(center_input_sample=True))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["golden", "ternary"])
def test_bracketing_finds_the_planted_groups_at_the_bottleneck(strategy):
    settings = dataclasses.replace(TINY, strategy=strategy, layer="middle", score="chi")
    method, state = entered(settings)
    assert int(state.cluster.layer) == 2
    assert accuracy(state.cluster.kmeans.values) > 0.95
    rows = method.findings(state.cluster).rows
    assert list(rows) == sorted(rows)


def run_config(**changes):
    settings = dataclasses.replace(
        TINY,
        num_clusters=10,
        timesteps=2,
        pretrain_iterations=1,
        steps=25,
        dims=5,
        **changes,
    )
    return Config(
        "diec-test",
        settings,
        DataConfig(limit=200),
        TrainConfig(batch_size=50, sweep_size=200, evaluate_every=1, checkpoint_every=1),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diec") / "run"
    return folder, train.fit(run_config(), folder, verbose=0)


def test_run_leaves_the_search_as_data_and_picture(finished):
    folder, result = finished
    for name in ("search.png", "generated_before.png", "generated.png", "assignments.csv"):
        assert (folder / name).stat().st_size > 0
    table = json.loads((folder / "search.json").read_text())
    assert len(table["timesteps"]) == 2
    assert np.shape(table["scores"]["acc"]) == (2, len(table["layers"]))
    summary = result.summary
    assert summary["search"]["layer"] in table["layers"]
    assert summary["search"]["denoising_before"] > 0
    assert next(iter(summary["baselines"])) == "kmeans_at_cell"
    assert "kmeans_pixels" in summary["baselines"]


def test_finished_run_is_left_alone_and_loads(finished, capsys):
    folder, result = finished
    before = (folder / "metrics.jsonl").read_text()
    again = train.fit(run_config(), folder)
    assert "complete after" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_text() == before
    np.testing.assert_array_equal(again.assignment.labels, result.assignment.labels)
    run = trained.load(folder)
    np.testing.assert_array_equal(
        trained.assign(run, result.dataset).labels, result.assignment.labels
    )


@pytest.mark.parametrize("first", [0, 10**6, 2 * 10**7, 2**31 - 2000])
def test_held_out_examples_of_any_row_get_all_timesteps(first):
    share = np.asarray(diec._even(jnp.arange(first, first + 1000)))
    assert share.min() >= 0 and share.max() < 1
    # The largest gap between 1,000 multiples of the golden ratio is under 1 / 377.
    assert np.diff(np.sort(share)).max() < 1 / 377
    np.testing.assert_array_equal(share[:2], np.asarray(diec._even(jnp.array([first, first + 1]))))


def test_phase_ends_when_labels_settle(tmp_path):
    result = train.fit(run_config(tolerance=0.99, iterations=5), tmp_path / "run", verbose=0)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    # Two learn the groups of the graph; it takes a third, on the target of its own, to judge that.
    assert [r["phase"] for r in records] == ["pretrain", "cluster", "cluster", "cluster"]
    assert result.run.step == 100
    train.fit(run_config(tolerance=0.99, iterations=5), tmp_path / "run", verbose=0)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_denoiser_of_another_run_is_reused(finished, tmp_path):
    folder, _ = finished
    config = dataclasses.replace(run_config(), pretrained=str(folder))
    result = train.fit(config, tmp_path / "again", verbose=0)
    assert list(result.run.method.phases) == ["cluster"]
    assert result.run.step == 50
    assert trained.load(tmp_path / "again").spec.pretrained is not None
    other = dataclasses.replace(config, method=dataclasses.replace(config.method, width=16))
    with pytest.raises(InputError, match=r"--config\.pretrained=.*--config\.method\.width=8"):
        train.fit(other, tmp_path / "other", verbose=0)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_imported_denoiser_clusters_end_to_end(tmp_path):
    pytest.importorskip("safetensors")
    config = dataclasses.replace(run_config(iterations=1), pretrained=str(FIXTURES / "plain"))
    result = train.fit(config, tmp_path / "run", verbose=0)
    assert "middle" in result.summary["search"] or result.summary["search"]["layer"]
    run = trained.load(tmp_path / "run")
    np.testing.assert_array_equal(
        trained.assign(run, result.dataset).labels, result.assignment.labels
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--config.pretrained=/nowhere"], "--config.pretrained=/nowhere: "),
        (["--config.method.layer=bottom"], "--config.method.layer=bottom: "),
    ],
)
def test_command_line_refuses_in_one_line(options, said, tmp_path):
    options = parse(["main", "--config=diec", f"--workdir={tmp_path / 'w'}", *options])
    with pytest.raises(InputError) as refused:
        command.run(options)
    assert str(refused.value).startswith(said)
    assert not (tmp_path / "w").exists()


def test_other_methods_refuse_a_denoiser(tmp_path):
    options = parse(
        ["main", "--config=clusterddpm", f"--workdir={tmp_path / 'w'}", "--config.pretrained=x"]
    )
    with pytest.raises(InputError, match=r"--config\.pretrained=x: .*diec"):
        command.run(options)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_pass_is_ten_times_as_fast_as_a_loop_over_cells():
    """See benchmarks/search.py, which measures the same at full size."""
    from benchmarks import search as benchmark

    assert benchmark.measure(examples=1000, timesteps=6)["ratio"] >= 10
