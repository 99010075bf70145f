"""A batch in parts is the batch as a whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dec_diffusion import parts


def loss(params, batch):
    out = jnp.tanh(batch["x"] @ params["w"] + params["b"])
    return jnp.mean(out**2 * batch["scale"][:, None]), {"size": jnp.abs(out).mean()}


@pytest.mark.parametrize("number", [1, 3, 12])
def test_a_mean_by_parts_has_the_value_metrics_and_gradient_of_the_whole(number):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(5, 4))), "b": jnp.asarray(rng.normal(size=4))}
    batch = {"x": jnp.asarray(rng.normal(size=(12, 5))), "scale": jnp.arange(12.0)}

    def double(function):
        def value(params, batch):
            value, metrics = function(params, batch)
            return 2.0 * value, metrics

        return jax.jit(jax.value_and_grad(value, has_aux=True))(params, batch)

    found, expected = double(parts.mean(loss, number)), double(loss)
    plain = jax.jit(parts.mean(loss, number))(params, batch)
    for part, correct in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(part, correct, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(plain[0], expected[0][0] / 2.0, rtol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="parts are for CPUs")
@pytest.mark.parametrize(
    ("batch", "bytes_", "expected"),
    [(128, 784 * 64 * 4, 16), (128, 4096, 1), (127, 784 * 64 * 4, 1), (4, 784 * 64 * 4, 1)],
)
def test_parts_divide_the_batch_and_stay_near_the_size_of_a_cache(batch, bytes_, expected):
    assert parts.count(batch, bytes_) == expected
