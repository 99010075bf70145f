"""Imported diffusers models against diffusers: its stored results, and itself where installed."""

import functools
import json
import math
import pathlib
import pickle
import re
import runpy
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from dec_diffusion import schedule
from dec_diffusion.networks import diffusers, layers
from dec_diffusion.networks.diffusers import WEIGHTS, Halve, Resnet, log_snr_grid, network, read
from dec_diffusion.networks.layers import upsample
from dec_diffusion.types import InputError

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
QUICK = {"xla_backend_optimization_level": 0}  # to compile in half of the time
MODELS = ["attention", "ddpm", "plain", "resnet"]


@functools.cache
def stored(name):
    """The model of a fixture, and what diffusers made of it."""
    folder = FIXTURES / "diffusers" / name
    with np.load(folder / "expected.npz") as file:
        return read(folder), dict(file)


def readout(shape):
    return jnp.cos(jnp.arange(math.prod(shape), dtype=jnp.float32)).reshape(shape)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def evaluate(apply, params, x, t):
    """Output and features."""
    return apply(params, x, t, features=True)


def gradients(apply, params, x, t):
    """Of the output's readout, by the parameters and by x."""

    def project(params, x):
        out = apply(params, x, t)
        return jnp.sum(out * readout(out.shape))

    return jax.grad(project, (0, 1))(params, x)


def norms(by_params):
    """Of the gradients by the parameters, sorted by the parameters' names in diffusers."""
    flat = traverse_util.flatten_dict(by_params)
    return [np.linalg.norm(flat[path]) for path in sorted(flat, key=diffusers._torch_key)]


def edited(tmp_path, *, config=None, scheduler=None, drop=()):
    """A copy of a fixture with some options set, and others (``drop``) left out."""
    folder = shutil.copytree(FIXTURES / "diffusers" / "attention", tmp_path / "model")
    for name, changes in (("config.json", config), ("scheduler/scheduler_config.json", scheduler)):
        values = json.loads((folder / name).read_text()) | (changes or {})
        values = {key: value for key, value in values.items() if key not in drop}
        (folder / name).write_text(json.dumps(values))
    return folder


# -- equality --


@pytest.mark.parametrize("name", MODELS)
def test_stored_models_give_what_diffusers_gave(name):
    model, expected = stored(name)
    apply = network(model.architecture).apply
    out, named = evaluate(apply, model.params, expected["x"], expected["t"])
    assert out.dtype == jnp.float32 and np.std(out) > 0.1
    np.testing.assert_allclose(out, expected["out"], rtol=0, atol=1e-5)
    sums = {f"feature/{k}": v @ np.cos(np.arange(v.shape[-1])) for k, v in named.items()}
    assert sums.keys() == {key for key in expected if key.startswith("feature/")}
    for key, value in sums.items():
        np.testing.assert_allclose(value, expected[key], rtol=0, atol=1e-4)


# Layouts beyond those stored; each differs from diffusers' defaults in several options.
SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
LAYOUTS = {
    "defaults": {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 8},
    "no attention": {
        **SMALL, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
        "in_channels": 1, "out_channels": 1, "add_attention": False, "downsample_padding": 0,
        "act_fn": "gelu",
    },
    "one level": {
        **SMALL, "block_out_channels": (8,), "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",), "attention_head_dim": None, "in_channels": 1,
        "out_channels": 1, "mid_block_scale_factor": 2.0,
    },
    "scale and shift": {
        **SMALL, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "act_fn": "relu",
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "norm_eps": 0.1,
        "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8,
        "flip_sin_to_cos": False, "freq_shift": 1, "attention_head_dim": 4,
    },
    "resnets between": {
        **SMALL, "block_out_channels": (8, 12, 16), "attention_head_dim": 4,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "downsample_type": "resnet", "upsample_type": "resnet", "center_input_sample": True,
    },
    "mixed": {
        **SMALL, "block_out_channels": (9, 6, 12), "norm_num_groups": 3, "layers_per_block": 3,
        "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D"), "downsample_padding": 0,
        "attention_head_dim": 3, "time_embedding_dim": 10, "act_fn": "swish",
        "downsample_type": "conv", "upsample_type": "resnet", "in_channels": 2, "out_channels": 2,
    },
    "no middle": {
        **SMALL, "down_block_types": ("UNetResDownBlock2D", "UNetResAttnDownBlock2D"),
        "up_block_types": ("UNetResAttnUpBlock2D", "UNetResUpBlock2D"), "mid_block_type": None,
        "attention_head_dim": 8, "layers_per_block": 2, "act_fn": "mish",
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_models_of_other_layouts_equal_diffusers(tmp_path, layout):
    """Where torch and diffusers are installed, which they are not in CI."""
    for library in ("torch", "diffusers"):
        pytest.importorskip(library)
    make = runpy.run_path(str(FIXTURES / "make_diffusers.py"))
    config = {"in_channels": 3, **LAYOUTS[layout]}
    model = make["build"](config, seed=list(LAYOUTS).index(layout))
    model.save_pretrained(tmp_path)
    x, t = make["inputs"](config, size=(8, 16), batch=4)
    expected, features, gradient, sizes = make["run"](model, x, t)
    found = read(tmp_path)
    apply = network(found.architecture).apply
    out, named = evaluate(apply, found.params, x, t)
    assert expected.std() > 0.1
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)
    assert named.keys() == features.keys()
    for name, value in features.items():
        np.testing.assert_allclose(named[name], value, rtol=0, atol=1e-4)
    by_params, by_x = jax.jit(gradients, static_argnums=0)(apply, found.params, x, t)
    np.testing.assert_allclose(by_x, gradient, rtol=0, atol=1e-4)
    sizes = [sizes[key] for key in sorted(sizes)]
    np.testing.assert_allclose(norms(by_params), sizes, rtol=1e-3, atol=1e-4)


def test_the_published_cifar10_model_has_its_35_7_million_parameters():
    architecture = stored("ddpm")[0].architecture | {
        "block_out_channels": [128, 256, 256, 256], "norm_num_groups": 32,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    }  # fmt: skip
    net, x = network(architecture), jnp.zeros((2, 32, 32, 3))
    params = jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(2))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 35_746_307
    out, named = jax.eval_shape(
        functools.partial(net.apply, features=True), params, x, jnp.zeros(2, int)
    )
    assert out.shape == x.shape and len(named) == 8 + 1 + 12
    assert named["middle"].shape == (2, 4, 4, 256) and named["up_3_2"].shape == (2, 32, 32, 128)


def test_gradients_in_a_scan_are_those_of_diffusers():
    model, expected = stored("ddpm")
    step = functools.partial(gradients, network(model.architecture).apply, model.params)
    many = [jnp.stack([a, a[::-1]]) for a in (expected["x"], expected["t"])]

    def body(carry, batch):
        return carry, step(*batch)

    scan = jax.jit(lambda many: jax.lax.scan(body, None, many)[1], compiler_options=QUICK)
    by_params, by_x = scan(many)
    np.testing.assert_allclose(by_x[0], expected["gradient"], rtol=0, atol=1e-5)
    found = norms(jax.tree.map(lambda a: a[0], by_params))
    np.testing.assert_allclose(found, expected["norms"], rtol=1e-3, atol=1e-5)


def test_blocks_in_a_scan_have_the_gradients_of_lax(monkeypatch):
    half, resnet = Halve(0), Resnet(6, 2, 1e-5, jax.nn.silu, resample=upsample)
    rng = np.random.default_rng(0)
    x, time = (rng.normal(size=s).astype(np.float32) for s in ((3, 2, 8, 12, 4), (3, 2, 5)))
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: (half.init(key, x[0]), resnet.init(key, x[0], time[0])))
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)

    def loss(params, x, time):
        out = resnet.apply(params[1], half.apply(params[0], x), time)
        return jnp.sum(out * readout(out.shape))

    def body(carry, batch):
        return carry, jax.grad(loss, (0, 1))(params, *batch)

    _, scanned = jax.jit(lambda *batches: jax.lax.scan(body, None, batches))(x, time)
    assert np.abs(scanned[1]).max(axis=(1, 2, 3, 4)).min() > 0.1
    monkeypatch.setattr(layers, "conv_form", lambda *_, **__: "lax")
    outside = jax.jit(jax.grad(loss, (0, 1)))
    for i in range(3):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4),
            scanned,
            outside(params, x[i], time[i]),
        )


# -- what a folder may look like --


def test_architectures_survive_json_and_parameters_are_plain_arrays():
    for name in MODELS:
        architecture, params = stored(name)[0]
        assert json.loads(json.dumps(architecture)) == architecture
        for leaf in jax.tree.leaves(params):
            assert type(leaf) is np.ndarray and leaf.dtype == np.float32
    assert stored("ddpm")[0].architecture["scheduler"] == {
        "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02,
        "beta_schedule": "linear", "trained_betas": None, "prediction_type": "epsilon",
    }  # fmt: skip
    assert stored("attention")[0].architecture["scheduler"]["prediction_type"] == "v_prediction"


def same(a, b):
    flat = traverse_util.flatten_dict(dict(a)), traverse_util.flatten_dict(dict(b))
    return flat[0].keys() == flat[1].keys() and all(
        np.array_equal(flat[0][key], flat[1][key]) for key in flat[0]
    )


def test_the_network_may_be_named_inside_its_pipeline(tmp_path):
    whole = read(str(FIXTURES / "diffusers" / "ddpm"))
    part = read(FIXTURES / "diffusers" / "ddpm" / "unet")
    assert part.architecture == whole.architecture and same(part.params, whole.params)
    # Without a scheduler, that of Ho et al. is taken for granted.
    alone = shutil.copytree(FIXTURES / "diffusers" / "ddpm" / "unet", tmp_path / "alone")
    assert read(alone).architecture == whole.architecture


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_of_other_precisions_become_single(tmp_path, dtype):
    folder = edited(tmp_path)
    arrays = {k: a.astype(jnp.dtype(dtype)) for k, a in load_file(folder / WEIGHTS).items()}
    save_file(arrays, folder / WEIGHTS)
    single = {k: a.astype(np.float32) for k, a in arrays.items()}
    found = read(folder).params
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float32")}
    np.testing.assert_array_equal(found["input"]["bias"], single["conv_in.bias"])


def test_bookkeeping_in_the_configuration_is_ignored(tmp_path):
    extra = {"decay": 0.999, "optimization_step": 7, "_name_or_path": "x", "dropout": 0.1}
    folder = edited(tmp_path, config=extra | {"some_later_option": None})
    assert read(folder).architecture == stored("attention")[0].architecture


# -- noise --


@pytest.mark.parametrize("name", MODELS)
def test_log_snrs_are_those_of_the_scheduler(name):
    model, expected = stored(name)
    found, alpha_bar = log_snr_grid(model.architecture), expected["alpha_bar"].astype(np.float64)
    assert found.dtype == np.float64 and found.shape == alpha_bar.shape
    assert (np.diff(found) < 0).all()
    # The scheduler's products are in single precision.
    np.testing.assert_allclose(1 / (1 + np.exp(-found)), alpha_bar, rtol=3e-5, atol=0)
    np.testing.assert_allclose(1 / (1 + np.exp(found)), 1 - alpha_bar, rtol=0, atol=1e-6)


def test_the_linear_grid_is_the_one_of_this_package():
    grid = log_snr_grid(stored("ddpm")[0].architecture)
    np.testing.assert_allclose(grid, schedule.linear(1000).log_snr, rtol=1e-6)


# -- what is refused --

CONFIGS = [
    ({"_class_name": "UNet2DConditionModel"}, "_class_name is 'UNet2DConditionModel'"),
    ({"num_class_embeds": 10}, "num_class_embeds makes it a class-conditional"),
    ({"class_embed_type": "timestep"}, "class_embed_type makes it a class-conditional"),
    ({"down_block_types": ["SkipDownBlock2D"] * 2}, "down_block_types has 'SkipDownBlock2D'"),
    ({"up_block_types": ["UpBlock2D", "AttnSkipUpBlock2D"]}, "has 'AttnSkipUpBlock2D'"),
    ({"up_block_types": ["UpBlock2D"]}, "up_block_types=.* must name 2 blocks"),
    ({"mid_block_type": "Other"}, "mid_block_type='Other'"),
    ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
    ({"act_fn": "tanh"}, "act_fn='tanh'"),
    ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift='spatial'"),
    ({"downsample_padding": 2}, "downsample_padding=2"),
    ({"downsample_type": "fir"}, "downsample_type='fir'"),
    ({"upsample_type": "fir"}, "upsample_type='fir'"),
    ({"out_channels": 2}, "out_channels=2"),
    ({"layers_per_block": 0}, "layers_per_block=0"),
    ({"layers_per_block": [1, 2]}, "layers_per_block="),
    ({"norm_num_groups": 3}, "norm_num_groups=3 .* must divide"),
    ({"norm_num_groups": None}, "norm_num_groups=None"),
    ({"attn_norm_num_groups": 3}, "attn_norm_num_groups=3"),
    ({"attention_head_dim": 3}, "attention_head_dim=3"),
    ({"norm_eps": 0}, "norm_eps=0"),
    ({"norm_eps": True}, "norm_eps=True"),
    ({"mid_block_scale_factor": float("nan")}, "mid_block_scale_factor=nan"),
    ({"freq_shift": 2}, "freq_shift=2"),
    ({"block_out_channels": 8}, "block_out_channels=8"),
    ({"block_out_channels": []}, "block_out_channels="),
    ({"add_attention": "yes"}, "add_attention='yes'"),
    ({"act_fn": ["silu"]}, "act_fn="),
    ({"down_block_types": [["DownBlock2D"]] * 2}, "down_block_types has"),
    ({"encoder_hid_dim": 8}, "unknown option encoder_hid_dim=8"),
]
SCHEDULERS = [
    ({"beta_schedule": "laplace"}, "beta_schedule='laplace'"),
    ({"beta_schedule": "linear", "beta_end": 1.5}, "beta_start and beta_end"),
    ({"beta_schedule": "scaled_linear", "beta_start": "0"}, "beta_start and beta_end"),
    ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
    ({"trained_betas": [0.1, 0.2]}, "trained_betas must be 100 numbers"),
    ({"num_train_timesteps": 1, "trained_betas": [1.0]}, "trained_betas has values"),
    ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
]


def refused(folder, message):
    """``read`` fails with one line that starts with the path and has this in it."""
    with pytest.raises(InputError, match=message) as error:
        read(folder)
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [("config", *case) for case in CONFIGS] + [("scheduler", *case) for case in SCHEDULERS],
    ids=lambda value: re.sub(r"\W+", "-", json.dumps(value))[:40],
)
def test_options_that_are_refused(tmp_path, file, changes, message):
    refused(edited(tmp_path, **{file: changes}), message)


def test_schedulers_without_betas_are_refused(tmp_path):
    refused(edited(tmp_path, drop=["beta_schedule"]), "'DDPMScheduler' has no beta_schedule")


def change_weights(folder, **changes):
    arrays = load_file(folder / WEIGHTS)
    for name, change in changes.items():
        arrays[name] = change(arrays.get(name))
    save_file({k: v for k, v in arrays.items() if v is not None}, folder / WEIGHTS)


QUERY = "mid_block.attentions.0.to_q.weight"
FOLDERS = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read"),
    "not text": (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json: cannot be read"),
    "not an object": (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS}: no such file"),
    "only a pickle": (
        lambda f: (f / WEIGHTS).rename(f / "diffusion_pytorch_model.bin"),
        r"diffusion_pytorch_model.bin, a pickle, .* safe_serialization=True",
    ),
    "in parts": (
        lambda f: (f / WEIGHTS).rename(f / f"{WEIGHTS}.index.json"), "max_shard_size",
    ),
    "cut off": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-4]),
        "cannot be read as safetensors",
    ),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "cannot be read as safetensors"),
    "one missing": (
        lambda f: change_weights(f, **{QUERY: lambda a: None}), f"weight {QUERY} missing",
    ),
    "two missing": (
        lambda f: change_weights(
            f, **{QUERY: lambda a: None, "conv_in.bias": lambda a: None}
        ),
        "weight conv_in.bias and 1 more missing",
    ),
    "one too many": (
        lambda f: change_weights(f, **{"class_embedding.weight": lambda a: np.zeros(3)}),
        "weight class_embedding.weight unknown",
    ),
    "wrong shape": (
        lambda f: change_weights(f, **{QUERY: lambda a: a[:, :4].copy()}),
        rf"weight {QUERY} has shape \(8, 4\), not \(8, 8\)",
    ),
    "not finite": (
        lambda f: change_weights(f, **{QUERY: lambda a: a * np.nan}),
        f"weight {QUERY} has values that are not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_are_refused(tmp_path, case):
    folder = edited(tmp_path)
    damage, message = FOLDERS[case]
    damage(folder)
    refused(folder, message)


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    folder = edited(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused(folder, r"pip install 'dec_diffusion\[diffusers\]'")


class Malice:
    """A pickle of it writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


def test_pickles_are_never_opened(tmp_path, run_python):
    """Neither beside safetensors nor alone; and importing the module imports no safetensors."""
    both = edited(tmp_path)
    mark, name = tmp_path / "mark", "diffusion_pytorch_model.bin"
    (both / name).write_bytes(pickle.dumps(Malice(mark)))
    alone = shutil.copytree(both, tmp_path / "alone")
    (alone / WEIGHTS).unlink()
    code = """
import sys
from dec_diffusion.networks.diffusers import read
from dec_diffusion.types import InputError
lazy = "safetensors" not in sys.modules
seen = []
sys.addaudithook(lambda event, arguments: seen.append((event, str(arguments))))
params = read(sys.argv[1]).params
try:
    read(sys.argv[2])
except InputError:
    print(lazy, bool(params), "torch" in sys.modules)
print([a for event, a in seen if event.startswith("pickle") or event == "open" and ".bin" in a])
print(any(event == "open" and "config.json" in a for event, a in seen))
"""
    out = run_python(code, both, alone).stdout.splitlines()
    assert out == ["True True False", "[]", "True"]
    assert not mark.exists()
    pickle.loads((both / name).read_bytes())  # it would have been seen
    assert mark.exists()


@pytest.mark.parametrize(
    ("shape", "message"), [((1, 9, 8, 1), "9x8 .* multiples of 2"), ((1, 8, 8, 3), "3 channels")]
)
def test_images_that_do_not_suit_the_network(shape, message):
    model, _ = stored("attention")
    with pytest.raises(InputError, match=message):
        network(model.architecture).apply(model.params, jnp.zeros(shape), jnp.zeros(1))


def test_every_option_of_the_network_is_an_option_of_diffusers():
    """A misspelt field would be left at its default, whatever the file says."""
    unet = pytest.importorskip("diffusers").UNet2DModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        norm_num_groups=8,
    )  # fmt: skip
    shown = {*diffusers._defaults(), *diffusers._CHOICES}
    assert shown <= set(unet.config)
