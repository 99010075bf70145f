"""The benchmarks run, and what they print makes sense; the figures themselves are not tested."""

import importlib.util
import json
import os
import pathlib
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = (
    "--device=cpu --width=4 --latent=4 --image-size=8 --batch-size=4 --num-examples=16"
    " --steps=2 --repeats=2"
).split()

# A smoke test wants a program soon, not a fast one: as CI asks for, or at least so.
QUICK = os.environ.get("XLA_FLAGS") or "--xla_backend_optimization_level=0"


@pytest.fixture
def throughput(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("XLA_FLAGS", QUICK)
    return importlib.import_module("benchmarks.throughput")


def test_throughput_without_torch_gives_our_figures_and_says_how_to_get_more(
    throughput, monkeypatch, capsys, tmp_path
):
    (tmp_path / "torch.py").write_text("raise ImportError('not installed')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    output = tmp_path / "out.json"
    assert throughput.main([*TINY, f"--output={output}"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result == json.loads(output.read_text())
    assert result["valid"] and result["check"] is None
    assert any("pip install torch==" in note for note in result["notes"])
    assert "pip install torch==" in printed.err
    assert result["machine"]["jax"]["platform"] == "cpu"
    assert set(result["contenders"]) == {"ours_scan", "ours_loop"}
    for figures in result["contenders"].values():
        images, wall = figures["images_per_second"], figures["ms_per_step"]
        assert 0 < images["min"] <= images["median"] <= images["max"]
        assert images["max"] * wall["min"] == pytest.approx(1e3 * 4, rel=1e-3)
    assert set(result["ratios"]) == {"ours_scan/ours_loop"}


@pytest.mark.parametrize(
    ("option", "named"),
    [("--batch-size=0", "--batch-size"), ("--num-examples=2", "--num-examples")],
)
def test_throughput_names_a_bad_option(throughput, capsys, option, named):
    with pytest.raises(SystemExit) as stop:
        throughput.main([*TINY, option])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == "" and named in printed.err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.parametrize("network", ["official", "unet"])
def test_the_pytorch_step_is_the_same_function(throughput, capsys, network):
    # Sizes that both networks must pad.
    status = throughput.main([*TINY, f"--network={network}", "--image-size=10", "--skip-compile"])
    result = json.loads(capsys.readouterr().out)
    assert status == 0 and result["check"]["passed"] and result["valid"]
    assert max(result["check"]["relative_errors"].values()) < 1e-4
    assert "ours_scan/torch_eager" in result["ratios"]


def test_reading_is_compared_with_pillow(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    reading = importlib.import_module("benchmarks.reading")
    result = reading.measure(images=12, jpeg=0.25, smallest=20, largest=40, repeats=2)
    assert result["shape"][2] == 3 and result["images"] == 12
    for name in ("ours", "cached"):
        ratio = result["ratio"][name]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]


def suite(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, parts: str) -> dict:
    """What the command prints of these parts, as small as they come."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("XLA_FLAGS", QUICK)
    main = importlib.import_module("benchmarks.__main__").main
    output = tmp_path / "suite.json"
    options = ["--tiny", "--skip-torch", "--repeats=1", "--device=cpu", f"--output={output}"]
    assert main([f"--only={parts}", *options]) == 0
    return json.loads(output.read_text())["parts"]


def test_both_sides_of_the_mixture_do_the_same(monkeypatch, tmp_path):
    parts = suite(monkeypatch, tmp_path, "mixture")
    (mixture,) = (part for part in parts["mixture"].values() if isinstance(part, dict))
    ours, *others = [c["value"] for c in mixture["contenders"].values()]
    # The same start and as many iterations: the same log-likelihood.
    assert others and all(other == pytest.approx(ours, rel=1e-4) for other in others)
    assert set(mixture["ratios"]) >= {"ours/sklearn_float32", "ours/sklearn_float64"}


def test_operations_are_counted_through_loops(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    count = importlib.import_module("benchmarks.account").count

    def program(x, kernel):
        y, _ = jax.lax.scan(lambda a, _: (a @ a, None), x, length=3)
        image = jax.lax.conv_general_dilated(
            y[None, :, :, None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.jit(jnp.sum)(image)

    flop, byte = count(jax.make_jaxpr(program)(jnp.ones((4, 4)), jnp.ones((3, 3, 1, 5))).jaxpr)
    assert flop == 3 * 2 * 4**3 + 2 * (4 * 4 * 5) * (3 * 3)
    assert byte == 4 * (3 * 3 * 16 + 16 + 45 + 80)


def test_the_suite_names_an_unknown_part(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("benchmarks.__main__").main(["--only=mixtures"])
    assert stop.value.code == 2 and "mixtures" in capsys.readouterr().err


@pytest.mark.slow
def test_the_other_parts_of_the_suite_run(monkeypatch, tmp_path):
    names = "kmeans,step,iteration,sampling,search,growth,account,imports"
    parts = suite(monkeypatch, tmp_path, names)
    assert not any("skipped" in part for part in parts.values())
    assert parts["step"]["valid"]
    for part in parts["kmeans"].values():
        if isinstance(part, dict):
            values = [c["value"] for c in part["contenders"].values()]
            assert values[0] == pytest.approx(values[1], rel=0.01)
            assert part["ratios"]["ours/sklearn"]["min"] > 0
            assert all(c["working_mib"] > 0 for c in part["contenders"].values())
    assert parts["iteration"]["contenders"]["ours"]["seconds"]["median"] > 0
    for name in ("ddpm400", "ddim50"):
        assert parts["sampling"][name]["contenders"]["ours"]["images_per_second"] > 0
    assert parts["search"]["ratio"] > 0
    assert all(parts["account"][n]["of_peak_products"] > 0 for n in ("step", "mixture_iteration"))
    # JAX and little else: the package imports its parts when they are used.
    assert parts["imports"]["beyond_jax_seconds"]["package"] < 1.0
