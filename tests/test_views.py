"""Random views against SciPy's resampling, with the draws reconstructed from the key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from dec_diffusion import views

BOUNDS = {"rotate": 25.0, "shift": 0.2, "scale": 0.15, "shear": 0.3}
ONE = jax.random.key(3)


def images(b=6, h=9, w=7, c=2, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, size=(b, h, w, c)).astype(np.float32)


def draws(key, b):
    """What ``affine`` draws, as rows: angle, size, shear, vertical and horizontal shift."""
    return np.asarray(jax.random.uniform(key, (5, b), minval=-1.0, maxval=1.0), np.float64)


def resampled(x, key, *, rotate=0.0, shift=0.0, scale=0.0, shear=0.0):
    """The same views by SciPy in float64: output pixel p reads the input at A p + offset."""
    b, h, w, c = x.shape
    out = np.empty_like(x)
    centre = np.array([h - 1, w - 1]) / 2
    for i, (angle, size, slant, down, right) in enumerate(draws(key, b).T):
        a = np.deg2rad(rotate) * angle
        turn = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
        matrix = turn / (1 + scale * size) + np.array([[0, 0], [shear * slant, 0]])
        offset = centre - matrix @ centre + shift * np.array([h * down, w * right])
        for j in range(c):
            out[i, ..., j] = ndimage.affine_transform(
                x[i, ..., j], matrix, offset, order=1, mode="nearest"
            )
    return out


def every_view(x, key):
    return views.noise(views.flip(views.affine(x, key, **BOUNDS), key), key, std=0.1)


@pytest.mark.parametrize("bound", [*BOUNDS, "all"])
def test_affine_agrees_with_scipy(bound):
    x, bounds = images(), BOUNDS if bound == "all" else {bound: BOUNDS[bound]}
    out = views.affine(x, ONE, **bounds)
    np.testing.assert_allclose(out, resampled(x, ONE, **bounds), atol=2e-5)
    assert np.abs(out - x).max() > 0.1


def test_a_whole_pixel_shift_moves_rows_and_repeats_the_border():
    rows = images(1, 8, 6, 1) * np.ones((1, 1, 6, 1), np.float32)
    rows[:] = rows[:, :, :1]
    by_two = float(2 / 8 / draws(ONE, 1)[3, 0])
    out = np.asarray(views.affine(rows, ONE, shift=by_two))
    np.testing.assert_allclose(out[0], rows[0, [2, 3, 4, 5, 6, 7, 7, 7]], atol=1e-5)


def test_a_quarter_turn_is_rot90():
    x = images(1, 7, 7, 3)
    out = np.asarray(views.affine(x, ONE, rotate=float(90 / draws(ONE, 1)[0, 0])))
    np.testing.assert_allclose(out[0], np.rot90(x[0], -1), atol=1e-4)


def test_enlarging_keeps_the_centre_and_brings_neighbours_closer():
    x = np.zeros((1, 9, 9, 1), np.float32)
    x[0, 4, 6] = 1.0
    doubled = float(1 / draws(ONE, 1)[1, 0])  # a size of 1 + 1
    out = np.asarray(views.affine(x, ONE, scale=doubled))[0, ..., 0]
    assert np.unravel_index(out.argmax(), out.shape) == (4, 8)


def test_zero_bounds_change_nothing():
    x = images()
    np.testing.assert_array_equal(views.affine(x, ONE), x)
    np.testing.assert_array_equal(views.noise(x, ONE, std=0.0), x)


def test_affine_stays_within_the_range_of_each_channel():
    x = images()
    out = np.asarray(views.affine(x, ONE, **BOUNDS))
    low, high = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
    assert (out >= low - 1e-6).all() and (out <= high + 1e-6).all()
    flat = np.full_like(x, 0.37)
    np.testing.assert_allclose(views.affine(flat, ONE, **BOUNDS), flat, atol=1e-6)


def test_each_example_has_its_own_draw():
    x = np.repeat(images(1), 8, axis=0)
    out = np.asarray(views.affine(x, ONE, **BOUNDS)).reshape(8, -1)
    assert len(np.unique(out, axis=0)) == 8


def test_flip_mirrors_about_half_of_the_images():
    x = images(400, 3, 4, 1)
    out = np.asarray(views.flip(x, ONE))
    mirrored = (out == x[:, :, ::-1]).all((1, 2, 3))
    kept = (out == x).all((1, 2, 3))
    assert (mirrored ^ kept).all()
    assert 150 < mirrored.sum() < 250


@pytest.mark.parametrize("shape", [(50, 8, 8, 3), (200, 40)])
def test_noise_has_its_standard_deviation(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    added = np.asarray(views.noise(x, ONE, std=0.3)) - x
    assert abs(added.std() - 0.3) < 0.01 and abs(added.mean()) < 0.01
    first, second = added.reshape(2, -1)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(4, 8, 8, 1), (3, 5, 7, 3), (1, 1, 1, 1)])
def test_shape_and_dtype_stay(shape, dtype):
    out = jax.eval_shape(every_view, jnp.zeros(shape, dtype), ONE)
    assert (out.shape, out.dtype) == (shape, dtype)


def test_views_depend_on_the_key_and_on_nothing_else():
    x, other = images(), jax.random.key(4)
    for view in (lambda x, k: views.affine(x, k, **BOUNDS), views.flip, every_view):
        np.testing.assert_array_equal(view(x, ONE), view(x, ONE))
        assert (np.asarray(view(x, ONE)) != np.asarray(view(x, other))).any()


def test_jit_and_vmap_agree_with_plain_calls():
    x, keys = np.stack([images(), images(seed=1)]), jax.random.split(ONE, 2)
    plain = np.stack([every_view(a, k) for a, k in zip(x, keys, strict=True)])
    together = jax.jit(jax.vmap(every_view))(x, keys)
    np.testing.assert_allclose(together, plain, atol=1e-5)
