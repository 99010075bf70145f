"""What lies where on eight simulated devices, and what travels between them."""

import pathlib
import threading
import time

import pytest

from dec_diffusion import stream

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROLOGUE = """
import dataclasses, re, sys
from collections import Counter
import jax, jax.numpy as jnp, numpy as np
sys.path.insert(0, "tests")
import layouts
from dec_diffusion import engine, feed, kmeans, parallel, placement
from dec_diffusion.method import DataSpec
KEY = jax.random.key(3)
assert placement.size() == 8

def data(n, resident=True, shape=(8,)):
    raw = np.random.default_rng(0).normal(size=(n, *shape)).astype(np.float32)
    return parallel.place(raw, np.float32(0), np.float32(1), sweep_size=16, resident=resident)
"""

COLLECTIVES = (
    PROLOGUE
    + """
PATTERN = re.compile(
    r"= (.*?) (all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)(?:-start)?\\("
)

def collectives(compiled):
    # Some are joined, in no particular order.
    return Counter(
        (kind, one)
        for shapes, kind in PATTERN.findall(compiled.as_text())
        for one in re.findall(r"\\w+\\[[^]]*\\]", shapes)
    )

def of(name, n):
    shape = layouts.SHAPES[name]
    method = layouts.METHODS[name].build(DataSpec(shape, n))
    table = data(n, shape=shape)
    phase = list(method.phases.values())[-1]
    batch = parallel.first_batch(table)
    state = engine.state_template(method, phase, KEY, batch)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    state = placement.place_state(state, num_rows=table.rows.size)
    enter, update, iteration = parallel._programs(phase, n, 24, 16, False)
    key = placement.replicate(KEY)
    found = []
    for stage, program in ((phase.refresh, update), (phase.begin, enter)):
        # DiEC begins with its search, which takes long to compile.
        if stage and (stage is phase.refresh or name != "diec" or sys.argv[1] == "search"):
            collect = parallel._collect_resident(stage, n, 16)
            args = state.ema_params, state.cluster, key, table.examples
            sweep = collect.lower(*args).compile()
            assert not collectives(sweep), collectives(sweep)
            found.append(collectives(program.lower(state, sweep(*args), key).compile()))
    return found

for name in layouts.METHODS:
    if name == "clusterddpm_layers" and sys.argv[1] != "search":
        continue  # takes long to compile, too
    few, many = of(name, 200), of(name, 1600)
    assert few[0] and few == many, (few, many)
    print(name)
"""
)


@pytest.mark.parametrize("also", ["", pytest.param("search", marks=pytest.mark.slow)])
def test_what_an_e_step_moves_does_not_depend_on_the_number_of_examples(run_python, also):
    """Compiled for 200 and for 1600 examples, the collectives and their shapes are the same.

    Those of the first mixture too; and a sweep has none at all.
    """
    out = run_python(COLLECTIVES, also, devices=8, cwd=ROOT).stdout.split()
    assert out == ["clusterddpm", "diec", "neural_mixture"] + ["clusterddpm_layers"] * (also != "")


LAYOUT = (
    PROLOGUE
    + """
table = data(203)
x = table.raw

# Examples lie in equal parts of whole batches, the last of them padded.
assert table.examples.raw.shape == (8 * 32, 8)
assert [s.data.shape for s in table.examples.raw.addressable_shards] == [(32, 8)] * 8
np.testing.assert_array_equal(table.examples.raw[:203], x)

# Batches are gathered from all parts, whatever their size, and spread.
for b in (16, 8, 13, 1):
    index = np.random.default_rng(b).permutation(203)[:b].astype(np.int32)
    batch = jax.jit(lambda e, i: feed.fetch_resident(e)(i))(table.examples, index)
    np.testing.assert_array_equal(batch["image"], x[index])
    np.testing.assert_array_equal(batch["index"], index)
    assert batch["image"].sharding.is_fully_replicated == (b % 8 > 0)

# A sweep is in the order of the data, its draws are those of one device.
def function(params, cluster, batch, key):
    return batch["image"] * params, batch["index"], jax.random.uniform(key, batch["index"].shape)

found = parallel.compile_sweep(function, table)(jnp.float32(2), (), KEY)
np.testing.assert_array_equal(found[0], 2 * x)
np.testing.assert_array_equal(found[1], np.arange(203))
draws = [jax.random.uniform(jax.random.fold_in(KEY, i), (16,)) for i in range(13)]
np.testing.assert_array_equal(found[2], np.concatenate(draws)[:203])

# So are features, and streamed ones are the same.
from dec_diffusion.method import EStage
stage = EStage(function, lambda *a: None)
both = [
    parallel._compile_collect(stage, data(203, resident))(
        placement.replicate(jnp.float32(2)), (), placement.replicate(KEY)
    )
    for resident in (True, False)
]
for (image, index, draw), weight in both:
    np.testing.assert_array_equal(image[:203], 2 * x)
    np.testing.assert_array_equal(draw[:203], np.concatenate(draws)[:203])
    np.testing.assert_array_equal(weight, np.arange(256) < 203)
    assert [s.data.shape for s in image.addressable_shards] == [(32, 8)] * 8

# The largest are found where they lie, ties in order.
values = jnp.asarray(np.random.default_rng(1).integers(0, 9, 256), jnp.float32)
spread = placement.spread((256,), np.asarray(values).__getitem__)
for count in (1, 5, 40):
    found = jax.jit(placement.in_mesh(lambda v: kmeans.largest(v, count)))(spread)
    for a, b in zip(found, jax.lax.top_k(values, count)):
        np.testing.assert_array_equal(a, b)

# Borders of small groups are mended where their examples lie.
from dec_diffusion import communities
rng = np.random.default_rng(2)
near, share = rng.integers(0, 256, (256, 6)), rng.dirichlet(np.ones(6), 256).astype(np.float32)
weight, labels = np.ones(256, np.float32), rng.integers(0, 12, 256).astype(np.int32)
there = [placement.spread(a.shape, a.__getitem__) for a in (near, share, weight, labels)]
def mend(near, share, weight, labels):
    graph = communities.Graph(jnp.arange(256), near, share, weight)
    return communities.mend(KEY, graph, labels, 12)
apart = jax.jit(placement.in_mesh(mend))(*there)
assert not apart.sharding.is_fully_replicated
np.testing.assert_array_equal(apart, mend(near, share, weight, jnp.asarray(labels)))
assert (np.asarray(apart) != labels).mean() > 0.3
print("ok")
"""
)


def test_examples_batches_and_sweeps_on_eight_devices(run_python):
    assert run_python(LAYOUT, devices=8, cwd=ROOT).stdout.split() == ["ok"]


SHARDED = (
    PROLOGUE
    + """
placement._SHARD_ABOVE = 40
method = layouts.METHODS["neural_mixture"].build(DataSpec((8,), 203))
table = data(203)
phase = method.phases["em"]._replace(tx=__import__("optax").adam(1e-3, eps=1e-4))
results = []
for shard in (False, True):
    state = engine.init_state(method, KEY, parallel.first_batch(table))
    state = placement.place_state(state, num_rows=table.rows.size, shard_params=shard)
    begin, iterate = parallel.compile_phase(
        phase, table, KEY, batch_size=24, shard_params=shard
    )
    state, _ = begin(state)
    for _ in range(2):
        state, metrics = iterate(state)
    parts = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    # Two tables; weights, their average and both moments of the optimiser.
    assert len(parts) == 2 + (4 * 3 if shard else 0), [x.shape for x in parts]
    assert all(s.data.size * 8 == leaf.size for leaf in parts for s in leaf.addressable_shards)
    results.append((jax.tree.map(np.asarray, placement.local(state)), metrics))
for a, b in zip(*map(jax.tree.leaves, results)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
print("ok")
"""
)


def test_parameters_may_be_spread_too(run_python):
    assert run_python(SHARDED, devices=8, cwd=ROOT).stdout.split() == ["ok"]


# -- reading ahead --


@pytest.mark.parametrize("depth", [1, 3])
def test_reading_ahead_keeps_the_order_and_stays_one_ahead(depth):
    made = []

    def items():
        for i in range(10):
            made.append(i)
            yield i

    seen = []
    for item in stream.ahead(items(), depth=depth):
        seen.append(item)
        # One in hand, ``depth`` waiting, one being made.
        assert len(made) <= len(seen) + depth + 1
    assert seen == made == list(range(10))


def test_reading_ahead_overlaps_with_its_consumer():
    def slow():
        for _ in range(5):
            time.sleep(0.1)
            yield None

    start = time.monotonic()
    for _ in stream.ahead(slow()):
        time.sleep(0.1)
    assert time.monotonic() - start < 0.9  # one after the other would be 1.0 s


def test_what_reading_raises_is_raised_in_its_place():
    def broken():
        yield 1
        raise OSError("disk gone")

    items = stream.ahead(broken())
    assert next(items) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(items)


def test_a_consumer_that_stops_stops_the_reader():
    before = threading.active_count()
    items = stream.ahead(iter(int, 1))
    next(items)
    items.close()
    assert threading.active_count() == before
