"""The networks of the official ClusterDDPM code, for its `paper` variant.

Shapes and parameter counts as in github.com/Jarvisyan/ClusterDDPM-pytorch (main.py at 2d4c950:
1,654,529 for the U-Net and 342,144 for the encoder at 64 features and 32 latent dimensions), with
group norm where that has batch norm: under batch norm the E-step and the M-step would see two
different encoders.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dec_diffusion.networks.layers import BlockUpsample, Conv, Norm, average_pool
from dec_diffusion.types import Array


class _Block(nn.Module):
    """Two times conv, norm, GELU; with ``residual`` the input (or first output) is added."""

    features: int
    residual: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        first = _gelu(Norm(dtype=self.dtype)(Conv(self.features, dtype=self.dtype)(x)))
        second = _gelu(Norm(dtype=self.dtype)(Conv(self.features, dtype=self.dtype)(first)))
        if not self.residual:
            return second
        skip = x if x.shape[-1] == self.features else first
        return (skip + second) / 1.414


class _Embedding(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Dense(self.features)(_gelu(nn.Dense(self.features)(x)))
        return x[:, None, None]


class _Trunk(nn.Module):
    """The part that U-Net and encoder have in common: three resolutions on the way down."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array, Array]:
        x = _Block(self.features, residual=True, dtype=self.dtype)(x)
        down1 = _max_pool(_Block(self.features, dtype=self.dtype)(x))
        down2 = _max_pool(_Block(2 * self.features, dtype=self.dtype)(down1))
        return x, down1, down2


class OfficialUNet(nn.Module):
    """The conditional U-Net; time and latent enter at two places of the decoder half.

    Arguments as in ``networks.unet.UNet``, but ``level`` is t / T and height and width are
    padded to multiples of 4. A dropped latent is the zero vector.
    """

    features: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_t: Array, level: Array, z: Array, keep: Array | None = None) -> Array:
        f, dtype = self.features, self.dtype
        height, width, channels = x_t.shape[1:]
        x_t = _pad_to_square(x_t)
        z = z if keep is None else z * keep[:, None]
        t = level[:, None]
        x, down1, down2 = _Trunk(f, dtype)(x_t)
        size = down2.shape[1]
        hidden = _gelu(average_pool(down2, size))
        up0 = BlockUpsample(2 * f, size, dtype)(hidden)
        up0 = nn.relu(Norm(dtype=dtype)(up0))
        up1 = _Embedding(2 * f)(z).astype(dtype) * up0 + _Embedding(2 * f)(t).astype(dtype)
        up1 = self._up(f, jnp.concatenate([up1, down2], -1))
        up2 = _Embedding(f)(z).astype(dtype) * up1 + _Embedding(f)(t).astype(dtype)
        up2 = self._up(f, jnp.concatenate([up2, down1], -1))
        out = Conv(f, dtype=dtype)(jnp.concatenate([up2, x], -1))
        out = Conv(channels, dtype=dtype)(nn.relu(Norm(dtype=dtype)(out)))
        return out[:, :height, :width].astype(jnp.float32)

    def _up(self, features: int, x: Array) -> Array:
        x = BlockUpsample(features, 2, self.dtype)(x)
        for _ in range(2):
            x = _Block(features, dtype=self.dtype)(x)
        return x


class OfficialEncoder(nn.Module):
    """The U-Net's way down, averaged over pixels, then mean and log-variance heads."""

    latent: int = 32
    features: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        _, _, down2 = _Trunk(self.features, self.dtype)(_pad_to_square(x))
        hidden = _gelu(average_pool(down2, down2.shape[1])).reshape(x.shape[0], -1)
        hidden = hidden.astype(jnp.float32)
        return nn.Dense(self.latent)(hidden), nn.Dense(self.latent)(hidden)


def _gelu(x: Array) -> Array:
    # By erf; flax's takes erfc, which costs several times as much and differs only where the
    # result is next to nothing.
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.7071067811865476))


def _max_pool(x: Array) -> Array:
    # Comparisons, because the gradient of a reduction by maximum divides by the number of ties,
    # which a compiler that recomputes the maximum with other rounding can make zero.
    x = jnp.where(x[:, :, ::2] >= x[:, :, 1::2], x[:, :, ::2], x[:, :, 1::2])
    return jnp.where(x[:, ::2] >= x[:, 1::2], x[:, ::2], x[:, 1::2])


def _pad_to_square(x: Array) -> Array:
    size = -(-max(x.shape[1:3]) // 4) * 4
    pads = [(0, size - s) for s in x.shape[1:3]]
    return jnp.pad(x, ((0, 0), *pads, (0, 0)), mode="edge")
