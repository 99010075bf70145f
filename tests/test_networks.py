"""Layers against flax, lax and NumPy; networks against what their docstrings promise."""

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dec_diffusion.networks import as_network, clusterddpm_networks, onednn
from dec_diffusion.networks.encoder import Encoder, Gaussian
from dec_diffusion.networks.layers import (
    BlockUpsample,
    Norm,
    ResBlock,
    SelfAttention,
    average_pool,
    conv2d,
    conv_form,
    noise_features,
    pad_to_multiple,
    upsample,
)
from dec_diffusion.networks.mlp import MLPDenoiser, MLPEncoder
from dec_diffusion.networks.official import OfficialEncoder, OfficialUNet
from dec_diffusion.networks.unet import UNet

KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles faster
B, LATENT = 2, 3
SMALL = UNet(4, (1, 2))
BLOCKS = ["down_0_0", "down_1_0", "middle", "up_1_0", "up_0_0"]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def inputs(*shape):
    """Noisy examples, noise levels, latents and the mask of a denoiser."""
    return normal(B, *shape), jnp.array([-2.0, 1.0]), normal(B, LATENT, seed=1), jnp.ones(B)


def filled(module, *args, scale=0.3):
    """Random parameters everywhere, also where a network starts at zero."""
    shapes = jax.eval_shape(as_network(module).init, KEY, *args)
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda s: jnp.asarray(scale * rng.normal(size=s.shape), s.dtype), shapes)


def run(module, params, *args, **options):
    return jax.jit(functools.partial(as_network(module).apply, **options))(params, *args)


def shapes_of(module, *args, **options):
    """Shapes and dtypes of the parameters and of the outputs, without computing anything."""
    network = as_network(module)
    params = jax.eval_shape(network.init, KEY, *args)
    return params, jax.eval_shape(functools.partial(network.apply, **options), params, *args)


def names(params):
    return {path[0] for path in traverse_util.flatten_dict(params)}


# -- convolutions --


def reference(x, kernel, stride):
    """The convolution as XLA has it."""
    pad = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,) * 2, [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def value_and_gradients(conv, x, kernel):
    """The output, and the gradients by both arguments of its product with a fixed array."""
    out, back = jax.vjp(conv, x, kernel)
    return out, *back(jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_forms_of_convolution_agree_in_value_and_gradients(size, stride):
    forms = {"default": None, "lax": "lax", "im2col": "im2col"}
    forms |= {"canonical": "canonical"} if stride == 1 else {}

    @jax.jit
    def compare(x, kernel):
        found = {
            name: value_and_gradients(
                functools.partial(conv2d, stride=stride, form=form), x, kernel
            )
            for name, form in forms.items()
        }
        return found, value_and_gradients(functools.partial(reference, stride=stride), x, kernel)

    for h, w, c in [(5, 7, 1), (8, 8, 3)]:
        found, expected = compare(normal(B, h, w, c), normal(size, size, c, 4, seed=1))
        assert expected[0].shape == (B, -(-h // stride), -(-w // stride), 4)
        for parts in found.values():
            for part, correct in zip(parts, expected, strict=True):
                np.testing.assert_allclose(part, correct, rtol=1e-4, atol=1e-4)


_ONEDNN = """
import functools, sys
import jax, jax.numpy as jnp, numpy as np
from dec_diffusion.networks.layers import conv2d, conv_form

assert conv_form((6, 9, 7, 64), 1, features=64) == "onednn"
assert conv_form((6, 9, 7, 64), 1, features=63) == "canonical"
assert conv_form((6, 9, 7, 64), 1, features=64, dtype=jnp.bfloat16) == "canonical"
rng = np.random.default_rng(0)
for size, features in [(3, 128), (5, 64)]:
    x = jnp.asarray(rng.normal(size=(6, 9, 7, 64)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 64, features)), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def compare(form, x, kernel):
        def body(carry, x):
            out, back = jax.vjp(functools.partial(conv2d, form=form), x, kernel)
            return carry, (out, *back(jnp.sin(jnp.arange(out.size * 1.0)).reshape(out.shape)))

        return jax.lax.scan(body, None, x[None])[1]

    for part, correct in zip(compare(None, x, kernel), compare("lax", x, kernel), strict=True):
        error = np.abs(part - correct).max() / np.abs(correct).max()
        assert error < 1e-5, (size, features, error)
"""


@pytest.mark.skipif(
    sys.platform != "linux"
    or platform.machine() != "x86_64"
    or importlib.metadata.version("jaxlib") not in onednn.TRIED
    or jax.default_backend() != "cpu",
    reason="these calls are made on tried releases for Linux on x86-64 only",
)
def test_wide_layers_by_onednn_are_convolutions():
    # A process of its own, because a cache of compiled programs switches the form off.
    env = {
        k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
    }
    done = subprocess.run([sys.executable, "-c", _ONEDNN], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_compilation_cache_or_an_untried_release_switches_onednn_off(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        assert not onednn.usable()
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setattr(onednn, "TRIED", ())
        assert not onednn.usable()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(("form", "stride"), [("lax", 1), ("canonical", 1), ("im2col", 2)])
def test_convolutions_in_a_scan_are_those_outside(form, stride):
    x, kernel = normal(3, B, 5, 7, 3), normal(3, 3, 3, 4, seed=1)
    conv = functools.partial(conv2d, stride=stride, form=form)

    def body(carry, x):
        return carry, value_and_gradients(conv, x, kernel)

    _, inside = jax.jit(lambda x: jax.lax.scan(body, None, x))(x)
    outside = jax.jit(value_and_gradients, static_argnums=0)
    for i in range(3):
        for part, correct in zip(inside, outside(conv, x[i], kernel), strict=True):
            np.testing.assert_allclose(part[i], correct, rtol=1e-4, atol=1e-4)


def test_the_canonical_form_is_for_stride_one():
    assert conv_form((4, 8, 8, 16), 1) in ("lax", "canonical")
    for shape, stride in [((4, 8, 8, 16), 2), ((4, 2, 8, 16), 1), ((4, 8, 8, 3), 1)]:
        assert conv_form(shape, stride) in ("lax", "im2col")
    with pytest.raises(ValueError, match="stride"):
        conv2d(normal(1, 4, 4, 1), normal(3, 3, 1, 1), stride=2, form="canonical")


# -- layers --


@pytest.mark.parametrize(("channels", "groups"), [(4, 4), (10, 5), (11, 1), (12, 6), (16, 8)])
def test_norm_is_group_norm(channels, groups):
    x, condition = 3 + 5 * normal(B, 3, 5, channels), normal(B, 6, seed=1)
    params = filled(Norm(), x, condition)
    theirs = nn.GroupNorm(num_groups=groups, use_fast_variance=False)
    plain = theirs.apply({"params": {name: params[name] for name in ("scale", "bias")}}, x)
    np.testing.assert_allclose(run(Norm(), params, x), plain, atol=2e-5)
    dense = params["Dense_0"]
    scale, shift = np.split(condition @ dense["kernel"] + dense["bias"], 2, axis=-1)
    adapted = plain * (1 + scale[:, None, None]) + shift[:, None, None]
    np.testing.assert_allclose(run(Norm(), params, x, condition), adapted, atol=5e-5)


def test_norm_of_vectors_in_one_group_is_layer_norm():
    x = 100 + normal(B, 9)
    params = filled(Norm(1), x)
    theirs = nn.LayerNorm(use_fast_variance=False).apply({"params": params}, x)
    np.testing.assert_allclose(run(Norm(1), params, x), theirs, atol=1e-4)


def test_conditions_start_without_effect():
    x, condition = normal(B, 4, 4, 6), normal(B, 5, seed=1)
    params = as_network(Norm()).init(KEY, x, condition)
    np.testing.assert_array_equal(run(Norm(), params, x, condition), run(Norm(), params, x))


def test_residual_blocks_start_as_their_skip():
    x = normal(B, 4, 4, 6)
    for features in (6, 4):
        params = as_network(ResBlock(features)).init(KEY, x)
        skip = x if features == 6 else x @ params["Conv_2"]["kernel"][0, 0]
        np.testing.assert_allclose(run(ResBlock(features), params, x), skip, atol=1e-5)


def test_attention_moves_with_the_pixels():
    x, order = normal(B, 3, 4, 6), np.random.default_rng(0).permutation(12)
    params = filled(SelfAttention(), x)
    assert params["MultiHeadDotProductAttention_0"]["query"]["kernel"].shape == (6, 3, 2)

    def permuted(x):
        return x.reshape(B, 12, 6)[:, order].reshape(x.shape)

    out = run(SelfAttention(), params, x)
    np.testing.assert_allclose(run(SelfAttention(), params, permuted(x)), permuted(out), atol=1e-5)
    fresh = as_network(SelfAttention()).init(KEY, x)
    np.testing.assert_array_equal(run(SelfAttention(), fresh, x), x)


def test_block_upsampling_is_a_transposed_convolution():
    x, factor = normal(B, 2, 3, 5), 4
    params = filled(BlockUpsample(6, factor), x)
    mirrored = params["kernel"].transpose(1, 2, 0, 3)[::-1, ::-1]
    theirs = jax.lax.conv_transpose(x, mirrored, (factor, factor), "VALID")
    np.testing.assert_allclose(
        run(BlockUpsample(6, factor), params, x), theirs + params["bias"], atol=1e-4
    )


def test_resizing():
    x = normal(B, 5, 7, 3)
    padded = pad_to_multiple(x, 4)
    np.testing.assert_array_equal(padded, np.pad(x, ((0, 0), (0, 3), (0, 1), (0, 0)), "edge"))
    np.testing.assert_array_equal(pad_to_multiple(padded, 4), padded)
    np.testing.assert_array_equal(upsample(x), np.kron(x, np.ones((1, 2, 2, 1))))
    np.testing.assert_allclose(average_pool(upsample(x, 3), 3), x, rtol=1e-6)
    np.testing.assert_allclose(average_pool(x[:, :4, :6], 2)[0, 1, 2], x[0, 2:4, 4:6].mean((0, 1)))


def test_noise_features_tell_all_levels_apart():
    level = jnp.arange(-15, 15, 0.1)
    found = np.asarray(noise_features(level))
    assert found.shape == (300, 32)
    np.testing.assert_allclose(found[:, :16] ** 2 + found[:, 16:] ** 2, 1, atol=1e-5)
    apart = np.abs(found[:, None] - found[None]).max(-1) + np.eye(300)
    assert apart.min() > 0.1
    quarter = np.asarray(noise_features(jnp.array([1.0, 20.0])))  # of the extreme wavelengths
    np.testing.assert_allclose([quarter[0, 0], quarter[1, 15]], 1, atol=1e-5)


# -- the U-Net --


@functools.cache
def small():
    """Parameters of a small U-Net, and its output and its gradient by z, compiled once."""
    x, level, z, keep = inputs(8, 8, 1)
    params = filled(SMALL, x, level, z, keep)
    readout = normal(B, 8, 8, 1, seed=5)

    @jax.jit
    def both(params, z, keep):
        def project(z):
            out = as_network(SMALL).apply(params, x, level, z, keep)
            return jnp.sum(out * readout), out

        (_, out), gradient = jax.value_and_grad(project, has_aux=True)(z)
        return out, gradient

    return params, both


@pytest.mark.parametrize("shape", [(5, 7, 3), (8, 8, 1), (28, 28, 1)])
def test_unet_takes_any_size_and_names_its_features(shape):
    args = inputs(*shape)
    params = filled(SMALL, *args)
    out, named = run(SMALL, params, *args, features=True)
    assert out.shape == (B, *shape) and out.dtype == jnp.float32
    assert np.isfinite(out).all() and np.std(out) > 0
    h, w = -(-shape[0] // 2), -(-shape[1] // 2)
    fine, coarse = (B, 2 * h, 2 * w, 4), (B, h, w, 8)
    assert {name: value.shape for name, value in named.items()} == {
        "down_0_0": fine, "down_1_0": coarse, "middle": coarse, "up_1_0": coarse, "up_0_0": fine,
    }  # fmt: skip


def test_unet_pads_odd_sizes_with_their_border():
    x, *rest = inputs(5, 7, 3)
    params = filled(SMALL, x, *rest)
    padded = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    whole = run(SMALL, params, padded, *rest)
    np.testing.assert_allclose(run(SMALL, params, x, *rest), whole[:, :5, :7], atol=1e-5)


def test_asking_for_features_does_not_change_the_output():
    params, both = small()
    args = inputs(8, 8, 1)
    out, _ = run(SMALL, params, *args, features=True)
    np.testing.assert_allclose(out, both(params, *args[2:])[0], atol=1e-5)


def test_features_of_several_blocks_and_levels_have_their_names():
    unet = UNet(4, (1, 2, 2), blocks=2)
    params, (out, named) = shapes_of(unet, *inputs(9, 10, 3), features=True)
    assert out.shape == (B, 9, 10, 3)
    sizes = {0: (12, 12, 4), 1: (6, 6, 8), 2: (3, 3, 8)}
    expected = {
        f"{way}_{level}_{block}": (B, *size)
        for way in ("down", "up")
        for level, size in sizes.items()
        for block in range(2)
    }
    assert {name: value.shape for name, value in named.items()} == {
        **expected, "middle": (B, 3, 3, 8),
    }  # fmt: skip
    assert expected.keys() <= names(params)


@pytest.mark.parametrize(
    ("denoiser", "shape"), [(UNet(4, (1,)), (4, 4, 1)), (MLPDenoiser(4, 1), (5,))]
)
def test_denoisers_start_at_zero(denoiser, shape):
    args = inputs(*shape)
    params = jax.jit(as_network(denoiser).init)(KEY, *args)
    np.testing.assert_array_equal(run(denoiser, params, *args), np.zeros((B, *shape)))


@pytest.mark.parametrize("block", BLOCKS)
def test_the_latent_reaches_every_block(block):
    """With the latent's way into all other blocks cut, it still moves the output."""
    params, both = small()
    _, _, z, keep = inputs(8, 8, 1)

    def cut(path, value):
        into = path[0] in BLOCKS and "Dense_0" in path
        return jnp.zeros_like(value) if into and path[0] != block else value

    left = traverse_util.path_aware_map(cut, params)
    assert np.abs(both(left, z, keep)[1]).max(1).min() > 1e-6
    left[block]["Norm_1"]["Dense_0"] = jax.tree.map(
        jnp.zeros_like, left[block]["Norm_1"]["Dense_0"]
    )
    np.testing.assert_array_equal(both(left, z, keep)[1], 0)


def test_a_dropped_latent_has_no_influence():
    params, both = small()
    z, other = inputs(8, 8, 1)[2], normal(B, LATENT, seed=9)
    first = jnp.array([0.0, 1.0])
    out, gradient = both(params, z, first)
    changed, _ = both(params, other, first)
    np.testing.assert_array_equal(out[0], changed[0])
    np.testing.assert_array_equal(gradient[0], 0)
    assert np.abs(out[1] - changed[1]).max() > 1e-3
    # The token for "none" is not the zero vector, which is a legal latent.
    zero, _ = both(params, jnp.zeros_like(z), jnp.ones(B))
    assert np.abs(zero[0] - out[0]).max() > 1e-3


def test_without_a_latent_there_is_none_in_the_parameters():
    x, level, z, keep = inputs(8, 8, 1)
    alone, out = shapes_of(SMALL, x, level)
    kept, _ = shapes_of(SMALL, x, level, z)
    whole, _ = shapes_of(SMALL, x, level, z, keep)
    assert out.shape == x.shape
    sizes = [set(p["condition"]) for p in (alone, kept, whole)]
    assert sizes[2] - sizes[1] == {"null"}
    assert sizes[1] - sizes[0] == {"Dense_2", "Dense_3"}


@pytest.mark.parametrize(
    ("levels", "places"),
    [
        ((), set()),
        ((0,), {"down_0_0", "up_0_0"}),
        ((1,), {"down_1_0", "middle", "up_1_0"}),
        ((0, 1), {"down_0_0", "down_1_0", "middle", "up_1_0", "up_0_0"}),
    ],
)
def test_attention_is_where_it_was_asked_for(levels, places):
    params, _ = shapes_of(UNet(4, (1, 2), attention=levels), *inputs(8, 8, 1))
    assert {n for n in names(params) if n.startswith("attend")} == {f"attend_{p}" for p in places}


def test_attention_adds_to_the_network_without_it():
    args = inputs(8, 8, 1)
    attending = UNet(4, (1, 2), attention=(1,))
    params, both = small()
    extra = filled(attending, *args)
    extra = {name: value for name, value in extra.items() if name.startswith("attend")}
    plain = both(params, *args[2:])[0]
    out = jax.jit(as_network(attending).apply)
    assert np.abs(out({**params, **extra}, *args) - plain).max() > 1e-3
    silent = jax.tree.map(jnp.zeros_like, extra)
    np.testing.assert_allclose(out({**params, **silent}, *args), plain, atol=1e-5)


def test_networks_vmap_over_parameters():
    x, level, z, _ = inputs(4, 4, 1)
    flat = UNet(4, (1,))
    params = filled(flat, x, level, z)
    pair = jax.tree.map(lambda a: jnp.stack([a, -a]), params)
    out = jax.jit(jax.vmap(as_network(flat).apply, in_axes=(0, None, None, None)))(
        pair, x, level, z
    )
    np.testing.assert_allclose(out[0], run(flat, params, x, level, z), atol=1e-5)
    assert np.abs(out[0] - out[1]).max() > 1e-2


# -- encoders, vectors and the official networks --


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("shape", [(5, 7, 3), (8, 8, 1), (28, 28, 1)])
def test_encoder_takes_any_size(shape, blocks):
    params, out = shapes_of(Encoder(LATENT, 4, (1, 2, 2), blocks, hidden=8), normal(B, *shape))
    assert sum("ResBlock" in name for name in params) == 3 * blocks
    assert [(a.shape, a.dtype) for a in out] == [((B, LATENT), jnp.float32)] * 2
    assert params["Dense_0"]["kernel"].shape[0] == 8 * np.prod([-(-n // 4) for n in shape[:2]])


def test_encoder_sees_where_things_are():
    """The features are flattened: two halves exchanged give another latent."""
    encoder, x = Encoder(LATENT, 4, (1,), hidden=8), normal(B, 4, 4, 1)
    params = filled(encoder, x)
    there, back = (run(encoder, params, a)[0] for a in (x, jnp.roll(x, 2, axis=1)))
    assert np.abs(there - back).max() > 1e-2


def test_log_variances_start_small_and_are_bounded():
    x = jnp.linspace(-100, 100, 41)[:, None]
    mean, log_variance = run(Gaussian(4), as_network(Gaussian(4)).init(KEY, x), x)
    np.testing.assert_array_equal(log_variance, np.full((41, 4), -4.0))
    assert len(np.unique(mean[:, 0])) == 41
    _, log_variance = run(Gaussian(4), filled(Gaussian(4), x, scale=1.0), x)
    assert (log_variance.min(), log_variance.max()) == (-10, 4)


def test_mlp_pair():
    x, level, z, keep = inputs(5)
    denoiser = MLPDenoiser(8, 2)
    params = filled(denoiser, x, level, z, keep)
    out, named = run(denoiser, params, x, level, z, keep, features=True)
    assert out.shape == (B, 5) and out.dtype == jnp.float32
    assert {name: value.shape for name, value in named.items()} == {
        "block_0": (B, 8), "block_1": (B, 8),
    }  # fmt: skip
    eager = as_network(denoiser).apply(params, x, level, z, keep)
    np.testing.assert_allclose(eager, out, atol=1e-5)
    other = normal(B, LATENT, seed=9)
    drop = functools.partial(run, denoiser, params, x, level, keep=jnp.zeros(B))
    assert np.abs(run(denoiser, params, x, level, other, keep) - out).max() > 1e-3
    np.testing.assert_array_equal(drop(z=z), drop(z=other))
    mean, log_variance = run(MLPEncoder(LATENT, (6,)), filled(MLPEncoder(LATENT, (6,)), x), x)
    assert mean.shape == log_variance.shape == (B, LATENT)


def test_official_networks_have_the_published_sizes():
    x = jnp.zeros((1, 28, 28, 1))
    unet, out = shapes_of(OfficialUNet(64), x, jnp.zeros(1), jnp.zeros((1, 32)))
    encoder, latents = shapes_of(OfficialEncoder(32, 64), x)
    assert sum(p.size for p in jax.tree.leaves(unet)) == 1_654_529
    assert sum(p.size for p in jax.tree.leaves(encoder)) == 342_144
    assert out.shape == x.shape and [a.shape for a in latents] == [(1, 32)] * 2


def test_official_networks_run():
    x, level, z, _ = inputs(5, 7, 3)
    unet, encoder = OfficialUNet(4), OfficialEncoder(LATENT, 4)
    params = filled(unet, x, level, z)
    apply = jax.jit(as_network(unet).apply)
    out = apply(params, x, level, z, jnp.array([0.0, 1.0]))
    assert out.shape == x.shape and np.isfinite(out).all()
    # Here a dropped latent is the zero vector.
    zero = apply(params, x, level, jnp.zeros_like(z), jnp.ones(B))
    np.testing.assert_array_equal(out[0], zero[0])
    assert np.abs(out[1] - zero[1]).max() > 1e-4
    mean, log_variance = run(encoder, filled(encoder, x), x)
    assert mean.shape == log_variance.shape == (B, LATENT) and np.ptp(mean) > 0


# -- precision and the choice of networks --


@pytest.mark.parametrize(
    ("module", "shape", "denoises"),
    [
        (UNet(4, (1, 2), attention=(1,), dtype=jnp.bfloat16), (8, 8, 1), True),
        (OfficialUNet(4, dtype=jnp.bfloat16), (8, 8, 1), True),
        (MLPDenoiser(8, dtype=jnp.bfloat16), (5,), True),
        (Encoder(LATENT, 4, dtype=jnp.bfloat16), (8, 8, 1), False),
        (OfficialEncoder(LATENT, 4, dtype=jnp.bfloat16), (8, 8, 1), False),
        (MLPEncoder(LATENT, dtype=jnp.bfloat16), (5,), False),
    ],
    ids=lambda v: type(v).__name__,
)
def test_half_precision_is_for_activations_only(module, shape, denoises):
    args = inputs(*shape)
    params, out = shapes_of(module, *(args if denoises else args[:1]))
    assert {leaf.dtype for leaf in jax.tree.leaves((params, out))} == {jnp.dtype("float32")}


def test_half_precision_is_close_to_single():
    params, both = small()
    args = inputs(8, 8, 1)
    half, named = run(UNet(4, (1, 2), dtype=jnp.bfloat16), params, *args, features=True)
    single = np.asarray(both(params, *args[2:])[0])
    assert {value.dtype for value in named.values()} == {jnp.dtype("bfloat16")}
    assert 0 < np.abs(half - single).max() < 0.1 * np.abs(single).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "shape"), [("unet", (5, 7, 3)), ("official", (8, 8, 1)), ("unet", (6,))]
)
def test_networks_for_examples_of_any_shape(kind, shape, dtype):
    encoder, denoiser = clusterddpm_networks(
        kind, shape, latent=LATENT, width=4, multipliers=(1, 2), encoder_multipliers=(1, 2),
        dtype=dtype,
    )  # fmt: skip
    args = inputs(*shape)
    latents = jax.eval_shape(encoder.apply, jax.eval_shape(encoder.init, KEY, args[0]), args[0])
    out = jax.eval_shape(denoiser.apply, jax.eval_shape(denoiser.init, KEY, *args), *args)
    assert [a.shape for a in latents] == [(B, LATENT)] * 2
    assert out.shape == args[0].shape
    assert {a.dtype for a in (*latents, out)} == {jnp.dtype("float32")}
