"""Classifier networks: shapes, kinds, what they may and may not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from dec_diffusion.networks import classifier_network, layers
from dec_diffusion.networks.classifier import BasicBlock, max_pool, space_to_depth

KEY = jax.random.key(0)
SMALL = {"conv": 4, "resnet18": 2, "mlp": 8}


def network(kind, shape, *, outputs=5, width=None, hidden=6, dtype="float32"):
    """A compiled network, parameters drawn without compiling its ``init``, and three examples."""
    net = classifier_network(
        kind, shape, outputs=outputs, width=width or SMALL[kind], hidden=hidden, dtype=dtype
    )
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, *shape)), jnp.float32)
    shapes = jax.eval_shape(net.init, KEY, x)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0.1, 0.4, s.shape), s.dtype), shapes)
    return net._replace(apply=jax.jit(net.apply)), params, x


def size_of(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (17, 13, 3), (96, 96, 3), (1, 5, 2)])
@pytest.mark.parametrize("kind", SMALL)
def test_features_and_scores_of_images_of_any_size(kind, shape, dtype):
    net = classifier_network(kind, shape, outputs=5, width=SMALL[kind], hidden=6, dtype=dtype)
    x = jnp.zeros((3, *shape))
    params = jax.eval_shape(net.init, KEY, x)
    features, scores = jax.eval_shape(net.apply, params, x)
    assert (features.shape, scores.shape) == ((3, 6), (3, 5))
    assert {leaf.dtype for leaf in jax.tree.leaves([features, scores, params])} == {
        np.dtype("float32")
    }


@pytest.mark.parametrize("kind", SMALL)
def test_vectors_always_take_the_perceptron(kind):
    net, params, x = network(kind, (7,), width=9)
    features, scores = net.apply(params, x)
    hidden = np.maximum(x @ params["input"]["kernel"] + params["input"]["bias"], 0)
    hidden = np.maximum(hidden @ params["hidden"]["kernel"] + params["hidden"]["bias"], 0)
    np.testing.assert_allclose(features, hidden, atol=1e-5)
    expected = hidden @ params["scores"]["kernel"] + params["scores"]["bias"]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert size_of(params) == (7 + 1) * 9 + (9 + 1) * 6 + (6 + 1) * 5


@pytest.mark.parametrize("kind", SMALL)
def test_scores_are_linear_in_features_and_examples_do_not_mix(kind):
    net, params, x = network(kind, (8, 8, 1))
    features, scores = net.apply(params, x)
    last = params["scores"] if kind == "mlp" else params["head"]["scores"]
    np.testing.assert_allclose(scores, features @ last["kernel"] + last["bias"], atol=1e-4)
    assert features.min() >= 0 and features.max() > 0
    others = net.apply(params, x.at[1:].set(0.0))
    np.testing.assert_allclose(others[1][0], scores[0], atol=1e-4)
    assert (np.asarray(others[1][1:]) != scores[1:]).any()


def test_a_resnet18_has_its_size():
    # 11,168,832 of convolutions with the 3 x 3 stem (the published 11,173,962 with ten classes and
    # batch norm, less 9,600 of norms and 5,130 of the classifier, plus biases here).
    net = classifier_network("resnet18", (32, 32, 3), outputs=10, width=64, hidden=128)
    params = jax.eval_shape(net.init, KEY, jnp.zeros((1, 32, 32, 3)))
    kernels = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(params)
        if path[-1].key == "kernel" and leaf.ndim == 4
    ]
    assert len(kernels) == 20
    assert sum(leaf.size for leaf in kernels) == 11_173_962 - 9_600 - 5_130
    head = params["head"]
    assert head["hidden"]["kernel"].shape == (512, 128)
    large = jax.eval_shape(net.init, KEY, jnp.zeros((1, 96, 96, 3)))
    assert large["Conv_0"]["kernel"].shape == (7, 7, 3, 64)


@pytest.mark.parametrize(
    ("side", "inputs", "flat"), [(8, 1, 64), (16, 1, 64), (28, 4, 64), (32, 4, 64), (64, 16, 64)]
)
def test_the_small_network_ends_at_about_four_by_four(side, inputs, flat):
    net = classifier_network("conv", (side, side, 1), outputs=10, width=1, hidden=8)
    params = jax.eval_shape(net.init, KEY, jnp.zeros((1, side, side, 1)))
    assert params["conv_0"]["kernel"].shape == (3, 3, inputs, 1)
    assert params["head"]["hidden"]["kernel"].shape == (flat, 8)


def test_patches_and_pools():
    x = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    patches = np.asarray(space_to_depth(x))
    assert patches.shape == (2, 2, 3, 12)
    for r, q in np.ndindex(2, 3):
        block = x[:, 2 * r : 2 * r + 2, 2 * q : 2 * q + 2]
        np.testing.assert_array_equal(patches[:, r, q], block.reshape(2, 12))
    pooled = np.asarray(max_pool(-x))
    assert pooled.shape == (2, 2, 3, 3)
    np.testing.assert_array_equal(pooled[:, 1, 1], (-x)[:, 1:4, 1:4].max((1, 2)))
    np.testing.assert_array_equal(pooled[:, 0, 0], (-x)[:, :2, :2].max((1, 2)))


@pytest.mark.parametrize("stride", [1, 2])
def test_forms_of_convolution_agree_in_a_residual_block(stride, monkeypatch):
    block = layers.as_network(BasicBlock(4, stride))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 7, 4)), jnp.float32)
    params = jax.jit(block.init)(KEY, x)

    def gradients():
        loss = lambda params, x: jnp.sum(jnp.sin(block.apply(params, x)))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)

    fast = gradients()
    monkeypatch.setattr(layers, "conv_form", lambda *_, **__: "lax")
    assert_close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)  # noqa: E731
    jax.tree.map(assert_close, fast, gradients())
    out = block.apply(params, x)
    assert out.shape == (2, -(-9 // stride), -(-7 // stride), 4) and out.min() >= 0


def test_bfloat16_is_close_to_float32():
    net, params, x = network("conv", (8, 8, 1), width=16, hidden=32)
    half, _, _ = network("conv", (8, 8, 1), width=16, hidden=32, dtype="bfloat16")
    for a, b in zip(net.apply(params, x), half.apply(params, x), strict=True):
        assert 0 < np.abs(np.asarray(a) - np.asarray(b)).max() < 0.1 * np.abs(a).max()


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="kind='vgg': must be one of conv, resnet18, mlp"):
        classifier_network("vgg", (8, 8, 1), outputs=2, width=4, hidden=4)


@pytest.mark.parametrize(("kind", "width", "least"), [("conv", 8, 0.92), ("mlp", 64, 0.85)])
def test_digits_are_learnt(kind, width, least):
    # Over four keys .936 to .961 and .897 to .917 are right.
    images, labels = load_digits(return_X_y=True)
    x = jnp.asarray(images.reshape(-1, 8, 8, 1) / 8 - 1, jnp.float32)
    net, _, _ = network(kind, (8, 8, 1), outputs=10, width=width, hidden=32)
    params = jax.jit(net.init)(KEY, x[:1])
    tx = optax.adam(3e-3)

    def step(state, key):
        params, opt_state = state
        rows = jax.random.randint(key, (64,), 0, 1437)

        def loss(params):
            scores = net.apply(params, x[rows])[1]
            y = jnp.asarray(labels)[rows]
            return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    train = jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(KEY, 300))[0])
    params, _ = train((params, tx.init(params)))
    found = np.asarray(jax.jit(net.apply)(params, x[1437:])[1]).argmax(-1)
    assert (found == labels[1437:]).mean() >= least
