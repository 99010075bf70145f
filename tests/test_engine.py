"""The engine's laws: what is scanned, streamed, resumed or padded gives the same numbers.

Most laws are tested on a method of a few lines whose every number NumPy can follow; those that
could fail in a compiler are tested on every method of the package as well.
"""

import dataclasses
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dec_diffusion import engine, feed, parallel, train
from dec_diffusion import method as contract
from dec_diffusion.config import Config, TrainConfig
from dec_diffusion.data import DataConfig
from dec_diffusion.method import DataSpec, EStage, Method, Phase
from dec_diffusion.methods.clusterddpm import ClusterDDPM
from dec_diffusion.methods.diec import DiEC
from dec_diffusion.methods.neural_mixture import NeuralMixture

KEY = jax.random.key(11)
N, BATCH, SWEEP, STEPS, ITERATIONS = 60, 8, 16, 3, 3
CLOSE = 1e-4  # between two programs that round differently

METHODS = {
    "clusterddpm": ClusterDDPM(
        num_clusters=3,
        latent=3,
        width=4,
        multipliers=(1,),
        encoder_multipliers=(1,),
        num_steps=20,
        rotate=0.0,  # geometric views take long to compile
        shift=0.0,
        scale=0.0,
        shear=0.0,
        noise=0.1,
        kl_weight=0.15,  # a stronger pull magnifies the rounding in which programs differ
        pretrain_iterations=1,
        balance_iterations=0,
        em_iterations=ITERATIONS,
        steps=STEPS,
        mixture_iterations=3,
        mixture_restarts=2,
        sample_steps=2,
    ),
    "diec": DiEC(
        num_clusters=3,
        width=4,
        multipliers=(1,),
        num_steps=20,
        timestep=5,
        dims=3,
        search_restarts=1,
        restarts=1,
        pretrain_iterations=1,
        iterations=ITERATIONS,
        steps=STEPS,
        neighbours=3,
        hidden=4,
        sample_steps=2,
        tolerance=0.0,
    ),
    "neural_mixture": NeuralMixture(
        num_clusters=3,
        heads=2,
        networks=2,
        width=4,
        hidden=8,
        rotate=0.0,
        shift=0.0,
        scale=0.0,
        shear=0.0,
        noise=0.1,
        iterations=ITERATIONS,
        steps=STEPS,
    ),
}


def images(seed=0):
    """Noisy copies of three 8x8 pictures, uint8 [n, 8, 8, 1], and which one each is."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(3, size=N)
    pictures = rng.integers(0, 200, size=(3, 8, 8, 1))
    return (pictures[truth] + rng.integers(0, 56, size=(N, 8, 8, 1))).astype(np.uint8), truth


def snapshot(tree):
    """A copy in host memory, which no later donation can touch."""
    return jax.tree.map(np.array, tree)


def revive(tree):
    return jax.tree.map(jnp.array, tree)


def assert_same(found, expected, tolerance=0.0):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        if tolerance:
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


def describe(tree):
    return jax.tree.map(lambda a: (tuple(a.shape), jnp.dtype(a.dtype)), tree)


# -- a method that NumPy can follow --

RATE, EMA, WIDTH = 0.01, 0.9, 3
RAW = np.random.default_rng(5).normal(size=(N, WIDTH)).astype(np.float32)
OFFSET, SCALE = np.float32([0.5, -1.0, 0.0]), np.float32([2.0, 1.0, 0.5])


def least_squares(*, tx=None, begin=None, trace=lambda name: None) -> Method:
    """Fit |x - m|^2 + c by a linear map of x, with the E-step's m = mean(x), c = mean(w x)."""

    def init(key, batch):
        w = jax.random.normal(key, batch["image"].shape[-1:])
        return {"w": w}, {"m": jnp.zeros_like(w), "c": jnp.float32(0), "seen": jnp.float32(0)}

    def loss(params, cluster, batch, key, progress):
        trace("loss")
        x = batch["image"]
        target = jnp.sum((x - cluster["m"]) ** 2, -1) + cluster["c"]
        value = jnp.mean((x @ params["w"] - target) ** 2)
        # A cluster may also move inside the loss.
        cluster = {**cluster, "seen": cluster["seen"] + batch["weight"].sum()}
        return value, (cluster, {"progress": progress, "draw": jax.random.uniform(key)})

    def collect(params, cluster, batch, key):
        trace("collect")
        x = batch["image"]
        draw = jax.random.uniform(key, x.shape[:1])
        return {"x": x, "fit": (x * params["w"]).sum(-1), "index": batch["index"], "draw": draw}

    def update(params, cluster, features, weight, key, progress):
        trace("update")
        m = weight @ features["x"] / weight.sum()
        c = weight @ features["fit"] / weight.sum()
        return params, {**cluster, "m": m, "c": c}, {"rows": weight.sum(), "e_progress": progress}

    def predict(params, cluster, batch, key):
        return jax.nn.log_softmax(batch["image"] * params["w"])

    def embed(params, cluster, batch, key):
        return batch["image"]

    refresh = EStage(collect, update)
    phase = Phase(loss, tx or optax.sgd(RATE), ITERATIONS, STEPS, begin, refresh, ema=EMA)
    return Method(init, {"only": phase}, predict, embed)


def table(*, resident=True, sweep_size=SWEEP) -> parallel.Data:
    return parallel.place(RAW, OFFSET, SCALE, sweep_size=sweep_size, resident=resident)


def entered(method: Method, data: parallel.Data) -> tuple[Phase, engine.TrainState]:
    """The method's first phase, and a state that has just entered it."""
    phase = next(iter(method.phases.values()))
    state = engine.init_state(method, KEY, parallel.first_batch(data))
    begin, _ = parallel.compile_phase(phase, data, KEY, batch_size=BATCH)
    return phase, begin(state)[0]


def iterated(method: Method, data: parallel.Data, iterations: int = ITERATIONS):
    """States after entering the first phase and after each iteration, and metrics."""
    phase, state = entered(method, data)
    _, iterate = parallel.compile_phase(phase, data, KEY, batch_size=BATCH)
    states, records = [snapshot(state)], []
    for _ in range(iterations):
        state, metrics = iterate(state)
        states.append(snapshot(state))
        records.append(metrics)
    return states, records


def scanned_iterations(phase: Phase, state: engine.TrainState, data: parallel.Data):
    """A whole phase in one compiled call: its last state, and metrics of every iteration."""

    def body(state, _):
        return engine.em_iteration(
            phase, state, data.examples, KEY, batch_size=BATCH, sweep_size=SWEEP
        )

    return jax.jit(lambda state: jax.lax.scan(body, state, length=ITERATIONS))(state)


def by_hand(w, iterations):
    """The same method in NumPy, float64; only the order of the examples is the engine's."""
    x = (RAW.astype(np.float64) - OFFSET) / SCALE
    order = engine.epoch_order(
        engine.iteration_keys(KEY).order, 0, steps=iterations * STEPS, batch_size=BATCH,
        num_examples=N,
    )  # fmt: skip
    m, c, ema, losses = x.mean(0), (x @ w).mean(), w, []
    for step, rows in enumerate(np.asarray(order)):
        batch = x[rows]
        error = batch @ w - ((batch - m) ** 2).sum(1) - c
        losses.append((error**2).mean())
        w = w - RATE * 2 / BATCH * error @ batch
        decay = min(EMA, (1 + step) / (10 + step))
        ema = decay * ema + (1 - decay) * w
        if step % STEPS == STEPS - 1:
            c = (x @ ema).mean()
    return w, ema, {"m": m, "c": c}, losses


# -- the order of examples --


@pytest.mark.parametrize(("n", "batch"), [(12, 4), (10, 3), (7, 7), (5, 2), (8, 1), (9, 5)])
def test_every_epoch_is_a_permutation_cut_into_batches(n, batch):
    per_epoch, epochs = n // batch, 4
    order = np.asarray(
        engine.epoch_order(
            KEY, jnp.int32(0), steps=epochs * per_epoch, batch_size=batch, num_examples=n
        )
    )
    assert order.shape == (epochs * per_epoch, batch) and order.dtype == np.int32
    by_epoch = order.reshape(epochs, -1)
    for epoch in by_epoch:
        assert len(set(epoch)) == per_epoch * batch and set(epoch) <= set(range(n))
    assert len(np.unique(by_epoch, axis=0)) == epochs
    left_out = {tuple(sorted(set(range(n)) - set(epoch))) for epoch in by_epoch}
    assert (len(left_out) > 1) == (n % batch != 0)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_order_is_addressed_by_step(steps):
    def order(first, steps):
        return engine.epoch_order(KEY, first, steps=steps, batch_size=3, num_examples=10)

    run = np.asarray(order(0, 16))
    part = jax.jit(functools.partial(order, steps=steps))
    for first in range(16 - steps + 1):
        np.testing.assert_array_equal(part(first), run[first : first + steps])
    other = engine.epoch_order(jax.random.key(0), 0, steps=16, batch_size=3, num_examples=10)
    assert (other != run).any()


@pytest.mark.parametrize(("n", "batch"), [(12, 4), (10, 3), (7, 7), (3, 8)])
def test_a_sweep_covers_everything_once_in_order(n, batch):
    rows = np.asarray(engine.sweep_order(batch_size=batch, num_examples=n))
    assert rows.shape == (-(-n // batch), batch)
    flat = rows.ravel()
    np.testing.assert_array_equal(flat[:n], np.arange(n))
    np.testing.assert_array_equal(flat[n:], -1)


def test_batches_are_scaled_and_mark_padding():
    fetch = engine.fetch_resident(table().examples)
    batch = fetch(jnp.array([4, 0, -1]))
    np.testing.assert_allclose(batch["image"][:2], (RAW[[4, 0]] - OFFSET) / SCALE, rtol=1e-6)
    assert np.isfinite(batch["image"]).all()
    np.testing.assert_array_equal(batch["index"], [4, 0, 0])
    np.testing.assert_array_equal(batch["weight"], [1, 1, 0])
    raw = np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1)
    scaled = engine.make_batch(raw, jnp.arange(2), offset=jnp.float32(3.5), scale=jnp.float32(3.5))
    np.testing.assert_allclose(scaled["image"], raw / 3.5 - 1, rtol=1e-6)
    assert {name: value.dtype.name for name, value in scaled.items()} == {
        "image": "float32", "index": "int32", "weight": "float32",
    }  # fmt: skip


# -- sweeps --


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("size", [1, 7, N, 10 * N])
def test_a_sweep_collects_in_order_whatever_its_batches(size, resident, monkeypatch):
    monkeypatch.setattr(feed, "_SUPERBATCH_BYTES", 3 * size * RAW[:1].nbytes)
    data = table(sweep_size=size, resident=resident)
    assert data.resident == resident
    w = jnp.array([1.0, 2.0, 3.0])

    def function(params, cluster, batch, key):
        return batch["image"], batch["index"], batch["image"] * params - cluster

    x, index, mapped = parallel.compile_sweep(function, data)(w, 0.5, KEY)
    np.testing.assert_array_equal(index, np.arange(N))
    np.testing.assert_allclose(x, (RAW - OFFSET) / SCALE, rtol=1e-6)
    np.testing.assert_allclose(mapped, x * [1, 2, 3] - 0.5, rtol=1e-5, atol=1e-6)


def test_a_sweep_in_parts_is_the_whole_sweep():
    data, method = table(), least_squares()
    phase, state = entered(method, data)
    sweep = functools.partial(engine.collect, phase.refresh, state.params, state.cluster)
    fetch = engine.fetch_resident(data.examples)
    whole, weight = sweep(data.rows, fetch, KEY)
    assert weight.shape == (64,) and weight.sum() == N
    assert len(np.unique(whole["draw"])) == 64
    parts = [sweep(data.rows[a:b], fetch, KEY, first=a) for a, b in [(0, 1), (1, 4)]]
    joined = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
    assert_same(joined, (whole, weight))


# -- steps and iterations, against NumPy --


def test_iterations_follow_the_equations():
    states, records = iterated(least_squares(), table())
    w, ema, cluster, losses = by_hand(states[0].params["w"].astype(np.float64), ITERATIONS)
    last = states[-1]
    np.testing.assert_allclose(last.params["w"], w, rtol=1e-4)
    np.testing.assert_allclose(last.ema_params["w"], ema, rtol=1e-4)
    np.testing.assert_allclose(last.cluster["m"], cluster["m"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(last.cluster["c"], cluster["c"], rtol=1e-4)
    np.testing.assert_allclose(np.concatenate([r["loss"] for r in records]), losses, rtol=1e-3)
    assert [int(s.step) for s in states] == [0, STEPS, 2 * STEPS, 3 * STEPS]
    assert last.cluster["seen"] == BATCH * STEPS * ITERATIONS
    assert [r["rows"] for r in records] == [N] * ITERATIONS


def test_progress_and_draws_of_a_phase():
    _, records = iterated(least_squares(), table())
    total = STEPS * ITERATIONS
    progress = np.concatenate([r["progress"] for r in records])
    np.testing.assert_allclose(progress, np.arange(total) / total, rtol=1e-6)
    after = [r["e_progress"] for r in records]
    np.testing.assert_allclose(after, np.arange(1, ITERATIONS + 1) / ITERATIONS, rtol=1e-6)
    assert len({float(d) for r in records for d in r["draw"]}) == total


def test_the_gradient_norm_is_of_the_loss():
    data, method = table(), least_squares()
    phase, state = entered(method, data)
    batch = parallel.first_batch(data)
    _, metrics = engine.train_step(phase, state, batch, KEY)
    gradient = jax.grad(lambda p: phase.loss(p, state.cluster, batch, KEY, 0.0)[0])(state.params)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient["w"]), rtol=1e-5)


def test_entering_a_phase_starts_from_the_average_with_a_fresh_optimiser():
    method = least_squares(tx=optax.adam(0.1))
    states, _ = iterated(method, table(), 1)
    old = revive(states[1])
    assert (old.params["w"] != old.ema_params["w"]).any()
    phase = method.phases["only"]
    state, info = engine.begin_phase(phase, old, None, KEY)
    assert_same(state.params, old.ema_params)
    assert_same(state.ema_params, old.ema_params)
    assert_same(state.cluster, old.cluster)
    assert_same(state.opt_state, phase.tx.init(old.ema_params))
    assert state.step == 0 and info == {}


def test_a_stage_that_begins_a_phase_may_change_everything():
    def update(params, cluster, features, weight, key, progress):
        mean = weight @ features["x"] / weight.sum()
        # What was collected must come from the averaged weights.
        fit = weight @ features["fit"] / weight.sum()
        return {"w": mean}, {**cluster, "c": fit}, {"rows": weight.sum()}

    method = least_squares()
    begin = EStage(method.phases["only"].refresh.collect, update)
    method, data = least_squares(begin=begin), table()
    phase = method.phases["only"]._replace(refresh=None)
    state = engine.init_state(method, KEY, parallel.first_batch(data))
    state = dataclasses.replace(state, ema_params={"w": jnp.array([1.0, -1.0, 2.0])})
    enter, _ = parallel.compile_phase(phase, data, KEY, batch_size=BATCH)
    after, info = enter(state)
    x = (RAW - OFFSET) / SCALE
    np.testing.assert_allclose(after.params["w"], x.mean(0), rtol=1e-5, atol=1e-6)
    assert_same(after.ema_params, after.params)
    np.testing.assert_allclose(after.cluster["c"], (x @ [1.0, -1.0, 2.0]).mean(), rtol=1e-4)
    assert info == {"rows": N}
    # The first E-step comes after, and sees the weights that the stage has left.
    enter, _ = parallel.compile_phase(method.phases["only"], data, KEY, batch_size=BATCH)
    fitted, _ = enter(state)
    assert_same(fitted.params, after.params)
    np.testing.assert_allclose(fitted.cluster["c"], (x @ x.mean(0)).mean(), rtol=1e-3)


def test_an_m_step_is_a_loop_of_steps():
    data, method = table(), least_squares(tx=optax.adam(0.01))
    phase, state = entered(method, data)
    rows = engine.epoch_order(KEY, 0, steps=7, batch_size=BATCH, num_examples=N)
    fetch = engine.fetch_resident(data.examples)
    scanned, metrics = jax.jit(lambda s: engine.m_step(phase, s, rows, fetch, KEY))(state)
    step = jax.jit(lambda s, row: engine.train_step(phase, s, fetch(row), KEY))
    for i, row in enumerate(rows):
        state, found = step(state, row)
        assert_same(found, jax.tree.map(lambda a, i=i: a[i], metrics), 1e-5)
    assert_same(state, scanned, 1e-6)


def test_a_scan_of_iterations_is_a_loop_of_them():
    """Bit by bit."""
    method = least_squares(tx=optax.adam(0.01))
    states, records = iterated(method, table())
    state, metrics = scanned_iterations(method.phases["only"], revive(states[0]), table())
    assert_same(state, states[-1])
    assert_same(metrics, jax.tree.map(lambda *a: np.stack(a), *records))


def test_a_phase_without_an_e_step_only_takes_steps():
    data, method = table(), least_squares()
    method.phases["only"] = method.phases["only"]._replace(refresh=None)
    for place in (data, table(resident=False)):
        states, records = iterated(method, place, 1)
        assert "rows" not in records[0] and states[1].step == STEPS
        assert_same(states[1].cluster["m"], states[0].cluster["m"])


# -- streaming, compilation, memory --


@pytest.mark.parametrize("rows", [1, 2, 1000])
def test_streamed_data_give_the_same_run(rows, monkeypatch):
    """Bit by bit, however many superbatches an iteration takes."""
    monkeypatch.setattr(feed, "_SUPERBATCH_BYTES", rows * BATCH * RAW[:1].nbytes)
    method = least_squares(tx=optax.adam(0.01))
    resident = iterated(method, table())
    streamed = iterated(method, table(resident=False))
    assert_same(streamed, resident)


@pytest.mark.parametrize("resident", [True, False])
def test_nothing_is_traced_after_the_first_iteration(resident, monkeypatch):
    monkeypatch.setattr(feed, "_SUPERBATCH_BYTES", 2 * BATCH * RAW[:1].nbytes)
    traced = []
    data = table(resident=resident)
    method = least_squares(trace=traced.append)
    phase, state = entered(method, data)
    _, iterate = parallel.compile_phase(phase, data, KEY, batch_size=BATCH)
    counts = []
    for _ in range(3):
        state, _ = iterate(state)
        counts.append(len(traced))
    assert counts[0] >= 3 and counts[2] == counts[0]


@pytest.mark.parametrize("resident", [True, False])
def test_iterations_reuse_the_memory_of_the_state(resident):
    data, method = table(resident=resident), least_squares()
    state = engine.init_state(method, KEY, parallel.first_batch(data))
    begin, iterate = parallel.compile_phase(method.phases["only"], data, KEY, batch_size=BATCH)
    # A fresh state holds its weights twice under one name, which a phase must take apart.
    first, _ = begin(state)
    second, _ = iterate(first)
    third, _ = iterate(second)
    assert first.params["w"].is_deleted() and second.ema_params["w"].is_deleted()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(third))


# -- the contract of every method --


class Tiny(NamedTuple):
    """A method that has run for a few iterations of its last phase."""

    method: Method
    phase: Phase
    data: parallel.Data
    entered: dict[str, Any]  # the state on entering each phase
    states: list[Any]  # after entering the last phase and after each of its iterations
    records: list[dict[str, np.ndarray]]
    traces: list[int]  # of functions of the last phase, by the end of each iteration

    @property
    def last(self) -> engine.TrainState:
        return revive(self.states[-1])

    def batch(self, rows) -> dict[str, jax.Array]:
        return engine.fetch_resident(self.data.examples)(jnp.asarray(rows))


@functools.cache
def tiny(name: str) -> Tiny:
    """Made once per method, because compiling it is most of the work here."""
    method = METHODS[name].build(DataSpec((8, 8, 1), N))
    data = place(resident=True)
    traced, whole = [], {}

    def counted(function):
        @functools.wraps(function)
        def count(*args):
            traced.append(function)
            return function(*args)

        return count

    state = engine.init_state(method, KEY, parallel.first_batch(data))
    for phase in method.phases.values():
        stage = phase.refresh and EStage(*map(counted, phase.refresh))
        watched = phase._replace(loss=counted(phase.loss), refresh=stage)
        begin, iterate = parallel.compile_phase(watched, data, KEY, batch_size=BATCH)
        state, _ = begin(state)
        whole[len(whole)] = snapshot(state)
    states, records, traces = [snapshot(state)], [], []
    for _ in range(ITERATIONS):
        state, metrics = iterate(state)
        states.append(snapshot(state))
        records.append(metrics)
        traces.append(len(traced))
    entered = dict(zip(method.phases, whole.values(), strict=True))
    return Tiny(method, phase, data, entered, states, records, traces)


def place(*, resident: bool) -> parallel.Data:
    return parallel.place(
        images()[0], np.float32(127.5), np.float32(127.5), sweep_size=SWEEP, resident=resident
    )


def assert_same_run(t: Tiny, state: engine.TrainState, records: list[Any]) -> None:
    """The same run by another program, so to rounding: XLA fuses convolutions otherwise there.

    Weights and clusters are compared by what they do. A bias before a norm has no gradient but
    rounding errors, which Adam turns into steps of full length.
    """
    assert_same(snapshot(records), t.records, CLOSE)
    batch = t.batch(np.arange(SWEEP))
    for function in (t.method.predict, t.method.embed):
        found, expected = (
            jax.jit(function)(s.ema_params, s.cluster, batch, KEY) for s in (state, t.last)
        )
        np.testing.assert_allclose(found, expected, rtol=10 * CLOSE, atol=10 * CLOSE)


every_method = pytest.mark.parametrize("name", METHODS)
quick_methods = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "diec" else ()) for name in METHODS],
)


@quick_methods
def test_training_changes_everything_and_stays_finite(name):
    t = tiny(name)
    for leaf in jax.tree.leaves((t.states, t.records)):
        assert np.isfinite(leaf).all()
    for field in ("params", "ema_params", "opt_state"):
        before, after = (jax.tree.leaves(getattr(s, field)) for s in (t.states[0], t.states[-1]))
        assert all((a != b).any() for a, b in zip(before, after, strict=True) if a.size > 64)
    assert all(r["loss"].shape == (STEPS,) for r in t.records)


@quick_methods
def test_scanned_iterations_are_the_loop(name):
    t = tiny(name)
    state, metrics = scanned_iterations(t.phase, revive(t.states[0]), t.data)
    records = [jax.tree.map(lambda a, i=i: a[i], metrics) for i in range(ITERATIONS)]
    assert_same_run(t, state, records)


@every_method
def test_a_resumed_run_is_the_uninterrupted_one(name):
    """Bit by bit: compiled anew, from a state that went through host memory."""
    t = tiny(name)
    _, iterate = parallel.compile_phase(t.phase, t.data, KEY, batch_size=BATCH)
    state = revive(t.states[1])
    for i in range(1, ITERATIONS):
        state, metrics = iterate(state)
        assert_same(metrics, t.records[i])
    assert_same(state, t.states[-1])


@quick_methods
def test_streamed_data_give_every_method_the_same_run(name, monkeypatch):
    t, data = tiny(name), place(resident=False)
    monkeypatch.setattr(feed, "_SUPERBATCH_BYTES", 2 * SWEEP * data.raw[:1].nbytes)
    _, iterate = parallel.compile_phase(t.phase, data, KEY, batch_size=BATCH)
    state, records = revive(t.states[0]), []
    for _ in range(ITERATIONS):
        state, metrics = iterate(state)
        records.append(metrics)
    assert_same_run(t, state, records)


@every_method
def test_no_method_is_traced_again(name):
    traces = tiny(name).traces
    assert traces[0] > 0 and traces[-1] == traces[0]


@every_method
def test_padding_does_not_move_the_e_step(name):
    t = tiny(name)
    for phase in t.method.phases.values():
        if phase.refresh is None:
            continue
        params, cluster = t.last.ema_params, t.last.cluster
        features, weight = jax.jit(
            lambda p, c, stage=phase.refresh: engine.collect(
                stage, p, c, t.data.rows, engine.fetch_resident(t.data.examples), KEY
            )
        )(params, cluster)
        assert weight.shape == (64,) and weight.sum() == N
        other = jax.tree.map(lambda a: a.at[N:].set(7.0), features)
        update = jax.jit(phase.refresh.update)
        half = jnp.float32(0.5)
        found = update(params, cluster, features, weight, KEY, half)
        assert_same(update(params, cluster, other, weight, KEY, half), found)
        assert_same(found[0], params)  # an E-step leaves the networks alone
        alone = jax.tree.map(lambda a: a[:N], (features, weight))
        assert_same(update(params, cluster, *alone, KEY, half), found, 1e-4)


@every_method
def test_templates_describe_the_live_state(name):
    t = tiny(name)
    batch = parallel.first_batch(t.data)
    for phase, live in t.entered.items():
        template = engine.state_template(t.method, t.method.phases[phase], KEY, batch)
        assert describe(template) == describe(live)
    assert describe(t.states[-1]) == describe(t.states[0])


@every_method
def test_predictions_are_log_probabilities(name):
    t = tiny(name)
    predict = jax.jit(t.method.predict)
    params, cluster = t.last.ema_params, t.last.cluster
    rows = np.arange(SWEEP)
    found = np.asarray(predict(params, cluster, t.batch(rows), KEY))
    assert found.shape == (SWEEP, METHODS[name].num_clusters) and found.dtype == np.float32
    np.testing.assert_allclose(np.logaddexp.reduce(found, axis=1), 0, atol=1e-5)
    assert np.ptp(found, axis=0).max() > 0
    again = predict(params, cluster, t.batch(rows), jax.random.key(99))
    np.testing.assert_array_equal(again, found)
    backwards = predict(params, cluster, t.batch(rows[::-1]), KEY)
    np.testing.assert_allclose(backwards[::-1], found, atol=1e-4)


@every_method
def test_embeddings_are_vectors(name):
    t = tiny(name)
    found = jax.jit(t.method.embed)(t.last.ema_params, t.last.cluster, t.batch([3, 1, 2]), KEY)
    assert found.ndim == 2 and found.shape[0] == 3 and found.dtype == jnp.float32
    assert np.isfinite(found).all() and len(np.unique(found, axis=0)) == 3


@every_method
def test_samples_are_examples(name):
    t = tiny(name)
    if t.method.sample is None:
        pytest.skip("does not generate")
    sample = jax.jit(t.method.sample)
    component = jnp.array([0, 0, 2, 1])
    found = sample(t.last.ema_params, t.last.cluster, KEY, component)
    assert found.shape == (4, 8, 8, 1) and np.isfinite(found).all()
    assert np.abs(found[0] - found[1]).max() > 0
    again = sample(t.last.ema_params, t.last.cluster, KEY, component)
    np.testing.assert_array_equal(again, found)
    other = sample(t.last.ema_params, t.last.cluster, jax.random.key(1), component)
    assert np.abs(other - found).max() > 0


# -- labels --


@every_method
def test_no_function_of_a_method_has_room_for_labels(name):
    method = METHODS[name].build(DataSpec((8, 8, 1), N))

    def arguments(function):
        return len(inspect.signature(function).parameters)

    assert arguments(method.init) == 2
    assert arguments(method.predict) == arguments(method.embed) == 4
    for phase in method.phases.values():
        assert arguments(phase.loss) == 5
        for stage in filter(None, (phase.begin, phase.refresh)):
            assert (arguments(stage.collect), arguments(stage.update)) == (4, 6)


@pytest.mark.parametrize("module", [contract, engine, parallel])
def test_labels_have_no_name_where_training_happens(module):
    records = [r for _, r in inspect.getmembers(module, inspect.isclass)]
    functions = [f for _, f in inspect.getmembers(module, inspect.isfunction)]
    assert functions or records
    used = {p for f in functions for p in inspect.signature(f).parameters}
    used |= {field for r in records for field in getattr(r, "__annotations__", {})}
    assert not {name for name in used if any(w in name for w in ("label", "truth", "classes"))}
    assert set(parallel.first_batch(table())) == {"image", "index", "weight"}


@every_method
@pytest.mark.filterwarnings("ignore::dec_diffusion.train.EmptyClusterWarning")
@pytest.mark.filterwarnings("ignore::dec_diffusion.train.CollapseWarning")
def test_labels_change_no_weight_and_no_assignment(name, tmp_path):
    examples, truth = images()
    examples = examples.reshape(N, -1).astype(np.float32)  # vectors, whose networks compile fast
    shuffled = np.random.default_rng(1).permutation(truth)
    results, scored = {}, {}
    for kind, labels in {"with": truth, "shuffled": shuffled, "without": None}.items():
        path = tmp_path / f"{kind}.npz"
        np.savez(path, x=examples, **({} if labels is None else {"y": labels}))
        config = Config(
            name=name,
            method=METHODS[name],
            data=DataConfig(name="npz", path=str(path)),
            train=TrainConfig(batch_size=BATCH, sweep_size=SWEEP, evaluate_every=1),
        )
        done = train.fit(config, tmp_path / kind, verbose=0)
        results[kind] = snapshot(done.run.state), done.assignment._asdict()
        scored[kind] = done.summary["baselines"]["kmeans_pixels"]["scores"].get("acc")
    assert scored["with"] != scored["shuffled"] and scored["without"] is None
    assert_same(results["shuffled"], results["with"])
    assert_same(results["without"], results["with"])
    written = {(tmp_path / kind / "assignments.csv").read_bytes() for kind in results}
    assert len(written) == 1
