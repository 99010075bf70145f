"""The benchmarks run, and what they print makes sense; the figures themselves are not tested."""

import importlib.util
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = (
    "--network=unet --device=cpu --width=8 --latent=4 --image-size=6 --batch-size=4"
    " --num-examples=16 --steps=2 --repeats=2"
).split()
CODE = "import runpy; runpy.run_module('benchmarks.throughput', run_name='__main__')"
# The smoke test wants a program soon, not a fast one.
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


def test_throughput_without_torch_gives_our_figures_and_says_how_to_get_more(run_python, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('not installed')\n")
    env = QUICK | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    output = tmp_path / "out.json"
    done = run_python(CODE, *TINY, f"--output={output}", cwd=ROOT, env=env, timeout=550)
    result = json.loads(done.stdout)
    assert result == json.loads(output.read_text())
    assert result["valid"] and result["check"] is None
    assert any("pip install torch==" in note for note in result["notes"])
    assert "pip install torch==" in done.stderr
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
def test_throughput_names_a_bad_option(run_python, option, named):
    done = run_python(CODE, *TINY, option, cwd=ROOT, status=2)
    assert done.stdout == "" and named in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.parametrize("network", ["official", "unet"])
def test_the_pytorch_step_is_the_same_function(run_python, network):
    args = [*TINY, f"--network={network}", "--image-size=10", "--skip-compile"]
    result = json.loads(run_python(CODE, *args, cwd=ROOT, timeout=550).stdout)
    assert result["check"]["passed"] and result["valid"]
    assert max(result["check"]["relative_errors"].values()) < 1e-4
    assert "ours_scan/torch_eager" in result["ratios"]
