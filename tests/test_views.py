"""Random views against SciPy, colorsys and Pillow, with the draws reconstructed from the key."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dec_diffusion import views
from dec_diffusion.views import View

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


# --- crops -------------------------------------------------------------------------------------


def rectangles(key, b, min_area, aspect=4 / 3):
    """What ``crop`` draws, as fractions of the image: top, left, height and width."""
    keys = jax.random.split(key, 3)
    area = np.asarray(jax.random.uniform(keys[0], (b,), minval=min_area, maxval=1.0), np.float64)
    u = np.asarray(jax.random.uniform(keys[1], (b,), minval=-1.0, maxval=1.0), np.float64)
    ratio = np.exp(u * np.minimum(np.log(aspect), -np.log(area)))
    height, width = np.sqrt(area * ratio), np.sqrt(area / ratio)
    top, left = np.asarray(jax.random.uniform(keys[2], (2, b)), np.float64)
    return np.stack([(1 - height) * top, (1 - width) * left, height, width], axis=-1)


def test_crop_agrees_with_scipy():
    x = images(6, 9, 7, 2)
    b, h, w, c = x.shape
    expected = np.empty_like(x)
    for i, (top, left, height, width) in enumerate(rectangles(ONE, b, 0.3)):
        # The centre of output pixel p is at start + (p + 1/2) part, in units of pixels.
        offset = [top * h + 0.5 * height - 0.5, left * w + 0.5 * width - 0.5]
        for j in range(c):
            expected[i, ..., j] = ndimage.affine_transform(
                x[i, ..., j], np.diag([height, width]), offset, order=1, mode="nearest"
            )
    out = views.crop(x, ONE, min_area=0.3)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    assert np.abs(out - x).max() > 0.1


def test_crops_lie_inside_and_have_the_promised_areas_and_ratios():
    # A ramp shows where each output row was read: its values are linear in the row.
    ramp = np.linspace(-1, 1, 33, dtype=np.float32)[None, :, None, None] * np.ones((2000, 1, 1, 1))
    boxes = rectangles(ONE, 2000, 0.2)
    area, ratio = boxes[:, 2] * boxes[:, 3], boxes[:, 2] / boxes[:, 3]
    assert area.min() >= 0.2 and area.min() < 0.22 and area.max() > 0.98 and area.max() <= 1.0
    assert abs(area.mean() - 0.6) < 0.02
    assert 0.75 - 1e-6 <= ratio.min() < 0.77 and 1.3 < ratio.max() <= 4 / 3 + 1e-6
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 1 + 1e-6).all()
    out = np.asarray(views.crop(jnp.asarray(ramp, jnp.float32), ONE, min_area=0.2))[:, :, 0, 0]
    centres = boxes[:, 0] + boxes[:, 2] / 2
    np.testing.assert_allclose(out[:, 16], 2 * 33 / 32 * (centres - 0.5), atol=1e-4)


# --- colours -----------------------------------------------------------------------------------

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}


def colour_draws(key, b):
    """What ``colour`` draws in [-1, 1]: rows for brightness, contrast, saturation and hue."""
    factor_key, hue_key, _ = jax.random.split(key, 3)
    u = jax.random.uniform(factor_key, (3, b, 1, 1, 1), minval=-1.0, maxval=1.0)
    turn = jax.random.uniform(hue_key, (b, 1, 1), minval=-1.0, maxval=1.0)
    return np.concatenate([np.asarray(u).reshape(3, b), np.asarray(turn).reshape(1, b)])


def luminance(y):
    return y @ np.array([0.299, 0.587, 0.114])


def test_hue_agrees_with_colorsys():
    x = images(4, 5, 6, 3)
    x[0, 0], x[0, 1] = 0.3, -1.0  # greys and black have no hue
    x[0, 2] = [[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [-1, 1, 1], [1, -1, 1]]
    turns = 0.5 * colour_draws(ONE, 4)[3]

    def turned(pixel, turn):
        hue, saturation, value = colorsys.rgb_to_hsv(*(0.5 * pixel.astype(float) + 0.5))
        return 2 * np.array(colorsys.hsv_to_rgb((hue + turn) % 1.0, saturation, value)) - 1

    expected = np.array(
        [
            [[turned(p, turn) for p in row] for row in image]
            for image, turn in zip(x, turns, strict=True)
        ]
    )
    out = views.colour(x, ONE, hue=0.5)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert np.abs(out - x).max() > 0.5


@pytest.mark.parametrize("what", ["brightness", "contrast", "saturation"])
def test_factors_interpolate_between_the_image_and_what_has_none(what):
    x = images(8, 5, 6, 3)
    y = 0.5 * x.astype(np.float64) + 0.5
    nothing = {
        "brightness": np.zeros((8, 1, 1, 1)),
        "contrast": luminance(y).mean((1, 2))[:, None, None, None],
        "saturation": luminance(y)[..., None],
    }[what]
    row = ["brightness", "contrast", "saturation"].index(what)
    factor = 1 + 0.8 * colour_draws(ONE, 8)[row][:, None, None, None]
    assert factor.min() < 0.7 and factor.max() > 1.3
    expected = 2 * np.clip(nothing + factor * (y - nothing), 0, 1) - 1
    np.testing.assert_allclose(views.colour(x, ONE, **{what: 0.8}), expected, atol=1e-5)


def test_grey_is_the_luminance_of_pillow():
    x = images(5, 6, 7, 3)
    out = np.asarray(views.grey(x, ONE, probability=1.0))
    assert (out == out[..., :1]).all()
    pixels = np.round((x + 1) * 127.5).astype(np.uint8)
    pillow = np.stack([np.asarray(Image.fromarray(p).convert("L")) for p in pixels])
    np.testing.assert_allclose((out[..., 0] + 1) * 127.5, pillow, atol=1.5)


@pytest.mark.parametrize("change", ["colour", "grey"])
def test_a_share_of_the_images_changes_and_the_others_stay_bitwise(change):
    x = np.repeat(images(1, 3, 4, 3), 400, axis=0)
    make = {"colour": lambda p: views.colour(x, ONE, **JITTER, probability=p)}
    make["grey"] = lambda p: views.grey(x, ONE, probability=p)
    kept = (np.asarray(make[change](0.2)) == x).all((1, 2, 3))
    assert 290 < kept.sum() < 350
    np.testing.assert_array_equal(make[change](0.0), x)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_without_three_channels_have_no_saturation_hue_or_grey(channels):
    x = images(8, 5, 4, channels)
    np.testing.assert_array_equal(views.grey(x, ONE, probability=1.0), x)
    np.testing.assert_allclose(views.colour(x, ONE, saturation=0.9, hue=0.5), x, atol=1e-6)
    assert np.abs(views.colour(x, ONE, brightness=0.9) - x).max() > 0.2


def test_colours_stay_within_the_range_and_greys_stay_grey():
    x = images(200, 3, 4, 3)
    out = np.asarray(views.colour(x, ONE, brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5))
    assert out.min() >= -1 and out.max() <= 1
    flat = np.repeat(images(20, 3, 4, 1), 3, axis=-1)
    out = np.asarray(views.colour(flat, ONE, **JITTER))
    np.testing.assert_allclose(out, np.repeat(out[..., :1], 3, axis=-1), atol=1e-5)


# --- all together ------------------------------------------------------------------------------

ALL = View(**BOUNDS, crop=0.6, flip=True, jitter=0.4, jitter_probability=0.8, grey=0.2, noise=0.05)


@pytest.mark.parametrize("shape", [(4, 8, 8, 3), (4, 5, 7, 1), (6, 9)])
def test_a_view_that_allows_nothing_is_the_identity(shape):
    x = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    np.testing.assert_array_equal(views.apply(x, ONE, View()), x)
    if len(shape) == 4:
        np.testing.assert_allclose(views.crop(x, ONE, min_area=1.0), x, atol=1e-6)
        np.testing.assert_allclose(views.colour(x, ONE), x, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(4, 8, 8, 3), (3, 5, 7, 1), (6, 9)])
def test_a_view_keeps_shape_and_dtype_and_depends_on_the_key_alone(shape, dtype):
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, shape), dtype)
    view = jax.jit(lambda x, key: views.apply(x, key, ALL))
    out = view(x, ONE)
    assert (out.shape, out.dtype) == (shape, dtype)
    np.testing.assert_array_equal(out, view(x, ONE))
    assert (np.asarray(out) != np.asarray(view(x, jax.random.key(4)))).any()
    assert np.isfinite(np.asarray(out, np.float32)).all()


def test_vectors_only_get_noise():
    x = np.random.default_rng(0).normal(size=(400, 20)).astype(np.float32)
    added = np.asarray(views.apply(x, ONE, ALL)) - x
    assert abs(added.std() - 0.05) < 0.002
    quiet = View(**BOUNDS, crop=0.6, flip=True, jitter=0.4, grey=1.0)
    np.testing.assert_array_equal(views.apply(x, ONE, quiet), x)


def test_the_changes_of_a_view_are_those_of_the_single_functions_in_order():
    x = images(6, 9, 7, 3)
    keys = jax.random.split(ONE, 3)
    expected = views.flip(views.affine(x, keys[0], **BOUNDS), keys[1])
    expected = views.noise(expected, keys[2], std=0.1)
    together = views.apply(x, ONE, View(**BOUNDS, flip=True, noise=0.1))
    np.testing.assert_allclose(together, expected, atol=1e-6)


@pytest.mark.parametrize(
    "only", [{"crop": 0.6}, {"flip": True}, {"jitter": 0.4}, {"grey": 0.5}, {"noise": 0.1}]
)
def test_each_part_of_a_view_works_alone_and_draws_for_each_example(only):
    x = np.repeat(images(1, 6, 5, 3), 12, axis=0)
    out = np.asarray(views.apply(x, ONE, View(**only))).reshape(12, -1)
    distinct = len(np.unique(out, axis=0))
    # Mirrored or grey images are of two kinds; a jitter leaves some images as they are.
    assert distinct == 2 if only.keys() & {"flip", "grey"} else distinct >= 8


def test_an_example_has_the_same_view_whatever_the_others_hold():
    x, other = images(5, 6, 6, 3), images(5, 6, 6, 3, seed=1)
    other[2] = x[2]
    kept = views.apply(x, ONE, ALL)[2]
    np.testing.assert_allclose(views.apply(other, ONE, ALL)[2], kept, atol=1e-6)
