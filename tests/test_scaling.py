"""Collectives are counted right, and the benchmark of scaling runs."""

import importlib
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Every program prints its count; all in one process, which pays for starting JAX once.
PROGRAMS = """
import json
import jax, jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P
from benchmarks import collectives

mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
spread, same = jnp.ones(80), jnp.ones(1000)

def psum(x):
    return lax.psum(x, "d")

def scanned(x, length):
    return lax.scan(lambda c, _: (psum(c), None), x, None, length=length)[0]

def nested(x):
    return lax.scan(lambda c, _: (scanned(c, 3) * 0.5, None), x, None, length=5)[0]

def until(x):
    return lax.while_loop(lambda v: v.sum() < 1e9, psum, x)

def either(x):
    return lax.cond(psum(x[:1])[0] > 0, lambda v: psum(v), lambda v: v, x)

PROGRAMS = {
    "psum": (psum, (same,), P()),
    "two": (lambda x: psum((x, x[:10].astype(jnp.bfloat16))), (same,), P()),
    "scan": (lambda x: scanned(x, 5), (same,), P()),
    "nested": (nested, (same,), P()),
    "while": (until, (same,), P()),
    "cond": (either, (same,), P()),
    "gather": (lambda x: lax.all_gather(x, "d", tiled=True), (spread,), P("d")),
    "scatter": (lambda x: lax.psum_scatter(x, "d", tiled=True), (same,), P()),
    "permute": (lambda x: lax.ppermute(x, "d", [(i, (i + 1) % 8) for i in range(8)]),
                (spread,), P("d")),
    "exchange": (lambda x: lax.all_to_all(x.reshape(8, -1), "d", 0, 0), (same,), P()),
    "nothing": (lambda x: x + 1, (same,), P()),
}
for name, (function, args, spec) in PROGRAMS.items():
    out = P("d") if name in ("scatter", "exchange", "permute") else P()
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False)
    text = jax.jit(mapped).lower(*args).compile().as_text()
    counted = collectives.count(text)
    print(json.dumps([name, counted.sent, counted.calls, counted.unbounded]))
"""


def test_collectives_of_known_programs(run_python):
    lines = run_python(PROGRAMS, devices=8).stdout.splitlines()
    counted = {name: (sent, calls, open_) for name, sent, calls, open_ in map(json.loads, lines)}
    reduce = "all-reduce"
    assert counted["psum"] == ({reduce: 4000}, {reduce: 1}, 0)
    assert counted["two"][0] == {reduce: 4000 + 20} or counted["two"][0] == {reduce: 4000 + 40}
    assert counted["scan"] == ({reduce: 20_000}, {reduce: 5}, 0)
    assert counted["nested"] == ({reduce: 60_000}, {reduce: 15}, 0)
    assert counted["while"] == ({reduce: 4000}, {reduce: 1}, 1)
    assert counted["cond"][0] == {reduce: 4000 + 4}
    assert counted["gather"] == ({"all-gather": 40}, {"all-gather": 1}, 0)
    assert counted["scatter"][0] == {"reduce-scatter": 4000}
    assert counted["permute"] == ({"collective-permute": 40}, {"collective-permute": 1}, 0)
    assert counted["exchange"][0] == {"all-to-all": 4000}
    assert counted["nothing"] == ({}, {}, 0)


TPU_TEXT = """
HloModule jit_f, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %s = f32[]{:T(128)} add(f32[] %x, f32[] %y)
}

ENTRY %main (p: bf16[16,128], q: u8[3]) -> bf16[16,128] {
  %p = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %q = u8[3]{0:T(512)} parameter(1)
  %t = (bf16[16,128]{1,0:T(8,128)(2,1)}, /*index=1*/u8[3]{0:T(512)}) tuple(%p, %q)
  %ars = bf16[16,128]{1,0:T(8,128)(2,1)} all-reduce-start(bf16[16,128]{1,0:T(8,128)} %p), \
channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  %ard = bf16[16,128]{1,0:T(8,128)(2,1)} all-reduce-done(bf16[16,128]{1,0:T(8,128)} %ars)
  %ags = (u8[3]{0}, u8[24]{0}) all-gather-start(%q), dimensions={0}
  %agd = u8[24]{0} all-gather-done(%ags)
  ROOT %c = bf16[16,128]{1,0:T(8,128)(2,1)} copy(%ard)
}
"""


def test_asynchronous_collectives_count_once_and_layouts_do_not_confuse(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    collectives = importlib.import_module("benchmarks.collectives")
    counted = collectives.count(TPU_TEXT)
    assert counted.sent == {"all-reduce": 2 * 16 * 128, "all-gather": 3}
    assert counted.calls == {"all-reduce": 1, "all-gather": 1}
    with pytest.raises(ValueError, match="no entry"):
        collectives.count("not a program")


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.scaling")


def test_prediction_adds_up_and_follows_the_assumptions(scaling):
    small = [
        "--config=clusterddpm:images",
        "--config.method.width=32",
        "--config.train.batch_size=64",
    ]
    one, two = (scaling.predict(scaling.load(small), chips=chips) for chips in (64, 256))
    assert one["counts"]["steps"] == 1_281_167 // 64
    assert one["counts"]["bytes_per_step"]["images"] == 64 * 64 * 64 * 3
    for a, b in zip(one["seconds"], two["seconds"], strict=True):
        parts = [b["m_step_compute"], b["e_step_compute"], *b["network"].values()]
        assert b["total"] == pytest.approx(sum(parts))
        # Four times the chips: a quarter of the computing, hardly less for the network.
        assert a["m_step_compute"] == pytest.approx(4 * b["m_step_compute"])
        assert a["e_step_compute"] == pytest.approx(4 * b["e_step_compute"])
        assert a["network"]["gradients"] < b["network"]["gradients"]
    # A training step goes through two networks and back, a sweep through one; wide convolutions
    # must not escape the count.
    flops = one["counts"]["flops_per_example"]
    assert flops["step"] > 7 * flops["sweep"] > 0


@pytest.mark.parametrize("wrong", ["--layouts=8", "--layouts=0x1", "--lay=1x1", "--x=1"])
def test_bad_options_are_named(scaling, monkeypatch, capsys, wrong):
    monkeypatch.setattr("sys.argv", ["scaling", wrong])
    with pytest.raises(SystemExit) as stop:
        scaling.run()
    assert stop.value.code == 2 and wrong.split("=")[0] in capsys.readouterr().err


@pytest.mark.slow
def test_layouts_are_measured_and_e_steps_send_the_same_whatever_the_examples(run_python, tmp_path):
    tiny = ["--config.method.width=8", "--config.method.mixture_iterations=2", "--steps=2"]
    output = tmp_path / "scaling.json"
    code = "from benchmarks import scaling; scaling.run()"
    run_python(code, "--layouts=1x1,1x2", "--repeats=1", f"--output={output}", *tiny, timeout=900)
    result = json.loads(output.read_text())
    assert [row["devices"] for row in result["scaling"]] == [1, 2]
    assert all(row[kind]["seconds"] > 0 for row in result["scaling"] for kind in ("strong", "weak"))
    alone, pair = (row["strong"]["traffic"] for row in result["scaling"])
    assert alone["total"] == 0 < pair["total"]
    traffic = result["traffic"]
    assert traffic["e_step_bytes"] == traffic["e_step_bytes_of_twice_the_examples"] > 0
