"""The encoder: an image to the mean and log-variance of its latent's Gaussian."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from dec_diffusion.networks.layers import Conv, Norm, ResBlock, pad_to_multiple
from dec_diffusion.types import Array


class Gaussian(nn.Module):
    """Two linear heads: the mean and the log-variance (clipped to [-10, 4]) of q(z|x)."""

    latent: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        x = x.astype(jnp.float32)
        mean = nn.Dense(self.latent, name="mean")(x)
        log_variance = nn.Dense(
            self.latent, kernel_init=nn.initializers.zeros, bias_init=nn.initializers.constant(-4.0)
        )(x)
        return mean, jnp.clip(log_variance, -10.0, 4.0)


class Encoder(nn.Module):
    """A convolution per level, which halves the resolution but at the first, then a dense layer.

    Residual blocks may follow each convolution.

    The last feature map is flattened, not averaged: where a stroke is matters for what a digit
    is, and averaging over pixels throws that away.

    Attributes:
        latent: dimensions of the latent.
        width, multipliers, dtype: as in ``UNet``.
        blocks: residual blocks per level.
        hidden: width of the dense layer before the two heads.
    """

    latent: int = 10
    width: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4)
    blocks: int = 1
    hidden: int = 128
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """``x`` [b, h, w, c] to the mean and the log-variance of q(z|x), both [b, latent]."""
        levels = len(self.multipliers)
        x = pad_to_multiple(x, 2 ** (levels - 1)).astype(self.dtype)
        for level, multiplier in enumerate(self.multipliers):
            stride = 1
            if level > 0:
                x, stride = nn.silu(Norm(dtype=self.dtype)(x)), 2
            x = Conv(multiplier * self.width, stride=stride, dtype=self.dtype)(x)
            for _ in range(self.blocks):
                x = ResBlock(multiplier * self.width, dtype=self.dtype)(x)
        x = nn.silu(Norm(dtype=self.dtype)(x)).reshape(x.shape[0], -1)
        x = nn.silu(nn.Dense(self.hidden, dtype=self.dtype)(x))
        return Gaussian(self.latent)(x)
