"""The conditional U-Net score network.

Every residual block receives the noise level and the latent through adaptive group norm, so
both reach every resolution (the official ClusterDDPM network lets them in only twice, in the
decoder half; `networks/official.py` has that one).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from dec_diffusion.networks.layers import (
    Conv,
    Norm,
    ResBlock,
    SelfAttention,
    noise_features,
    pad_to_multiple,
    upsample,
)
from dec_diffusion.types import Array


class Condition(nn.Module):
    """One embedding of the noise level and, if there is one, the latent."""

    width: int

    @nn.compact
    def __call__(self, log_snr: Array, z: Array | None, keep: Array | None) -> Array:
        level = nn.Dense(self.width)(nn.silu(nn.Dense(self.width)(noise_features(log_snr))))
        if z is None:
            return nn.silu(level)
        latent = nn.Dense(self.width)(nn.silu(nn.Dense(self.width)(z)))
        if keep is not None:
            # A learned token: the zero vector is a legal latent, so it cannot mean "none".
            null = self.param("null", nn.initializers.normal(0.02), (self.width,))
            latent = jnp.where(keep[:, None] > 0, latent, null)
        return nn.silu(level + latent)


class UNet(nn.Module):
    """U-Net on images of any size and any number of channels.

    Attributes:
        width: channels of the first level.
        multipliers: channels of each level, in units of ``width``; each level after the first
            halves the resolution.
        blocks: residual blocks per level, on the way down and on the way up.
        attention: levels that attend, counted from 0; the middle attends if the last does.
        dtype: of the activations; parameters, norms and the output are float32.
    """

    width: int = 16
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_t: Array,
        log_snr: Array,
        z: Array | None = None,
        keep: Array | None = None,
        *,
        features: bool = False,
    ) -> Any:
        """Predict the target of the denoiser.

        Args:
            x_t: noisy images [b, h, w, c].
            log_snr: noise level of each image [b].
            z: latents [b, d], or None for an unconditional network.
            keep: [b], 0 where the latent is replaced by the learned null token.
            features: also return the activations after every block, by name
                (``down_0_0``, ``middle``, ``up_0_1``, ...).

        Returns:
            float32 [b, h, w, c], or a pair of it and the dictionary of features.
        """
        levels = len(self.multipliers)
        named: dict[str, Array] = {}
        condition = Condition(4 * self.width, name="condition")(log_snr, z, keep)
        height, width, channels = x_t.shape[1:]
        x = pad_to_multiple(x_t, 2 ** (levels - 1)).astype(self.dtype)
        x = Conv(self.width, dtype=self.dtype, name="input")(x)
        skips = []
        for level, multiplier in enumerate(self.multipliers):
            for block in range(self.blocks):
                name = f"down_{level}_{block}"
                x = ResBlock(multiplier * self.width, dtype=self.dtype, name=name)(x, condition)
                if level in self.attention:
                    x = SelfAttention(dtype=self.dtype, name=f"attend_{name}")(x)
                named[name] = x
                skips.append(x)
            if level + 1 < levels:
                x = Conv(x.shape[-1], stride=2, dtype=self.dtype, name=f"halve_{level}")(x)
        x = ResBlock(x.shape[-1], dtype=self.dtype, name="middle")(x, condition)
        if levels - 1 in self.attention:
            x = SelfAttention(dtype=self.dtype, name="attend_middle")(x)
        named["middle"] = x
        for level in reversed(range(levels)):
            for block in range(self.blocks):
                name = f"up_{level}_{block}"
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = ResBlock(self.multipliers[level] * self.width, dtype=self.dtype, name=name)(
                    x, condition
                )
                if level in self.attention:
                    x = SelfAttention(dtype=self.dtype, name=f"attend_{name}")(x)
                named[name] = x
            if level > 0:
                # To the width of the level above: the same as wider, at half of its cost.
                above = self.multipliers[level - 1] * self.width
                x = Conv(above, dtype=self.dtype, name=f"double_{level}")(upsample(x))
        x = nn.silu(Norm(dtype=self.dtype, name="output_norm")(x))
        x = Conv(channels, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="output")(x)
        out = x[:, :height, :width].astype(jnp.float32)
        return (out, named) if features else out
