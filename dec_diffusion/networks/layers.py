"""Building blocks of the networks, and the one place that chooses the form of a convolution.

XLA:CPU has a fast convolution kernel, but brings the two backward convolutions into the form it
needs only outside loops; inside a ``scan`` they run about 50 times slower. So on CPU the
gradients are written here as convolutions that already have that form: the input's is a
convolution with the mirrored kernel, and the kernel's is one in which the batch takes the place
of the channels. Training steps can then be scanned on every backend.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dec_diffusion.networks import onednn
from dec_diffusion.types import Array, Float, Params

ConvForm = Literal["lax", "canonical", "im2col", "onednn"]


class Network(NamedTuple):
    """A network as two pure functions.

    Attributes:
        init: ``(key, *inputs) -> params``.
        apply: ``(params, *inputs, **options) -> outputs``.
    """

    init: Callable[..., Params]
    apply: Callable[..., Any]


def as_network(module: nn.Module) -> Network:
    """Wrap a Linen module whose only variables are parameters."""

    def init(key: Array, *inputs: Any) -> Params:
        return module.init(key, *inputs)["params"]

    def apply(params: Params, *inputs: Any, **options: Any) -> Any:
        return module.apply({"params": params}, *inputs, **options)

    return Network(init, apply)


def conv_form(
    shape: tuple[int, ...], stride: int, *, features: int = 1, dtype: Any = jnp.float32
) -> ConvForm:
    """The fastest form on the default backend, inside and outside loops.

    On CPU the canonical form loses on images of one or two pixels a side (7 times slower for
    2x2x64) and on very few channels (2 times for 8x8x1), where im2col wins; at 64 channels and
    more oneDNN needs half the time of both, where it can be called.

    Args:
        shape: of the input, [b, h, w, c].
        stride: of the convolution.
        features: channels of the output.
        dtype: of the input.
    """
    if jax.default_backend() != "cpu":
        return "lax"
    _, height, width, channels = shape
    if stride != 1 or min(height, width) <= 2 or channels <= 3:
        return "im2col"
    wide = min(channels, features) >= onednn.LEAST_CHANNELS and dtype == jnp.float32
    return "onednn" if wide and onednn.usable() else "canonical"


def conv2d(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "s s c o"],
    *,
    stride: int = 1,
    form: ConvForm | None = None,
) -> Float[Array, "b h2 w2 o"]:
    """A 2-D convolution, zero padding of ``s // 2`` on every side, in the dtype of its inputs.

    Args:
        x: input, channels last.
        kernel: weights in HWIO order; its size ``s`` is odd.
        stride: step along height and width; the output is ``ceil(size / stride)``.
        form: ``lax`` leaves everything to XLA; ``canonical`` (stride 1 only) is the same with
            gradients that XLA:CPU runs fast in loops; ``im2col`` is shifted slices and one
            matrix product; ``onednn`` (likewise stride 1) is for wide layers, where ``onednn``
            is usable. All agree to rounding. The default is that of ``conv_form``.

    Raises:
        ValueError: ``canonical`` or ``onednn`` with a stride other than 1.
    """
    form = form or conv_form(x.shape, stride, features=kernel.shape[3], dtype=x.dtype)
    if kernel.shape[0] == 1 and stride == 1:
        return x @ kernel[0, 0]
    if form in ("canonical", "onednn"):
        if stride != 1:
            raise ValueError(f"the {form} form is for stride 1, not {stride}")
        return _canonical_conv(x, kernel) if form == "canonical" else onednn.conv(x, kernel)
    if form == "im2col":
        return _im2col_conv(x, kernel, stride)
    return _lax_conv(x, kernel, stride)


def _lax_conv(x: Array, kernel: Array, stride: int = 1, padding: int | None = None) -> Array:
    p = kernel.shape[0] // 2 if padding is None else padding
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(p, p)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _im2col_conv(x: Array, kernel: Array, stride: int) -> Array:
    size, _, c_in, c_out = kernel.shape
    p = size // 2
    height, width = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
    x = jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    patches = [
        x[:, i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(size * size * c_in, c_out)


@jax.custom_vjp
def _canonical_conv(x: Array, kernel: Array) -> Array:
    return _lax_conv(x, kernel)


def _canonical_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _lax_conv(x, kernel), (x, kernel)


def _canonical_bwd(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    d_x = _lax_conv(g, kernel[::-1, ::-1].transpose(0, 1, 3, 2))
    # The kernel's gradient correlates x with g over the batch and the pixels: a convolution of
    # "images" [c, h, w, b] with "kernels" [h, w, b, o], whose result is [c, s, s, o].
    d_kernel = _lax_conv(
        x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), padding=kernel.shape[0] // 2
    )
    return d_x, d_kernel.transpose(1, 2, 0, 3)


_canonical_conv.defvjp(_canonical_fwd, _canonical_bwd)


class Conv(nn.Module):
    """``conv2d`` with a bias; ``kernel`` is HWIO whatever the form, so checkpoints move."""

    features: int
    size: int = 3
    stride: int = 1
    dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = conv2d(x.astype(self.dtype), kernel.astype(self.dtype), stride=self.stride)
        return x + bias.astype(self.dtype)


class BlockUpsample(nn.Module):
    """Transposed convolution whose kernel is as large as its stride: a dot, then a reshape."""

    features: int
    factor: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        f = self.factor
        shape = (c, f, f, self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(in_axis=0, out_axis=-1), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        blocks = x.astype(self.dtype) @ kernel.astype(self.dtype).reshape(c, -1)
        blocks = blocks.reshape(b, h, w, f, f, self.features).transpose(0, 1, 3, 2, 4, 5)
        return blocks.reshape(b, h * f, w * f, self.features) + bias.astype(self.dtype)


class Norm(nn.Module):
    """Group norm in float32 with at most ``groups`` groups that divide the channels.

    With ``condition`` [b, e] the output is scaled and shifted by a linear map of it that starts
    at zero (adaptive group norm).
    """

    groups: int = 8
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        b, channels = x.shape[0], x.shape[-1]
        groups = max(g for g in range(1, self.groups + 1) if channels % g == 0)
        scale = self.param("scale", nn.initializers.ones, (channels,))
        shift = self.param("bias", nn.initializers.zeros, (channels,))
        if condition is not None:
            affine = nn.Dense(2 * channels, kernel_init=nn.initializers.zeros)(condition)
            extra_scale, extra_shift = jnp.split(affine[:, None], 2, axis=-1)
            scale, shift = scale * (1.0 + extra_scale), shift * (1.0 + extra_scale) + extra_shift
        flat = x.astype(jnp.float32).reshape(b, -1, channels)
        # Moments by channel, then pooled within groups by a small matrix product: on CPU several
        # times faster than reductions over a [b, pixels, groups, channels] view.
        pool = jnp.kron(jnp.eye(groups), jnp.ones((channels // groups,) * 2)) * groups / channels
        mean = jnp.matmul(flat.mean(1), pool, precision="highest")
        centred = flat - mean[:, None]
        variance = jnp.matmul(jnp.square(centred).mean(1), pool, precision="highest")
        gain = jax.lax.rsqrt(variance + 1e-6)[:, None] * scale
        return (centred * gain + shift).reshape(x.shape).astype(self.dtype)


class ResBlock(nn.Module):
    """Pre-activation residual block: norm, SiLU, conv, conditioned norm, SiLU, conv."""

    features: int
    groups: int = 8
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        y = nn.silu(Norm(self.groups, self.dtype)(x))
        y = Conv(self.features, dtype=self.dtype)(y)
        y = nn.silu(Norm(self.groups, self.dtype)(y, condition))
        y = Conv(self.features, dtype=self.dtype, kernel_init=nn.initializers.zeros)(y)
        if x.shape[-1] != self.features:
            x = Conv(self.features, size=1, dtype=self.dtype)(x)
        return x + y


class SelfAttention(nn.Module):
    """Residual multi-head self-attention over the pixels of a feature map."""

    heads: int = 4
    groups: int = 8
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        y = Norm(self.groups, self.dtype)(x).reshape(b, h * w, c)
        heads = max(g for g in range(1, self.heads + 1) if c % g == 0)
        y = nn.MultiHeadDotProductAttention(
            num_heads=heads, dtype=self.dtype, out_kernel_init=nn.initializers.zeros
        )(y, y)
        return x + y.reshape(b, h, w, c)


def noise_features(log_snr: Float[Array, "b"], dim: int = 32) -> Float[Array, "b dim"]:
    """Sinusoidal features of the log-SNR, at wavelengths from 4 to 80 nats."""
    frequency = 2 * jnp.pi / jnp.geomspace(4.0, 80.0, dim // 2)
    angle = log_snr[:, None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def pad_to_multiple(
    x: Float[Array, "b h w c"], multiple: int | tuple[int, int]
) -> Float[Array, "b h2 w2 c"]:
    """Repeat the border until the sides are multiples of ``multiple``, one or one for each."""
    pads = [(0, -size % m) for size, m in zip(x.shape[1:3], _pair(multiple), strict=True)]
    return jnp.pad(x, ((0, 0), *pads, (0, 0)), mode="edge")


def average_pool(
    x: Float[Array, "b h w c"], factor: int | tuple[int, int]
) -> Float[Array, "b h2 w2 c"]:
    """Mean over blocks of ``factor`` pixels, one or one for each side; it must divide the sizes."""
    b, h, w, c = x.shape
    tall, wide = _pair(factor)
    return x.reshape(b, h // tall, tall, w // wide, wide, c).mean((2, 4))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def upsample(x: Float[Array, "b h w c"], factor: int = 2) -> Float[Array, "b h2 w2 c"]:
    """Nearest-neighbour enlargement."""
    return jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)
