"""The pair of networks for vectors (tables, embeddings): a denoiser and an encoder."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from dec_diffusion.networks.encoder import Gaussian
from dec_diffusion.networks.layers import Norm
from dec_diffusion.networks.unet import Condition
from dec_diffusion.types import Array


class MLPDenoiser(nn.Module):
    """Residual multilayer perceptron with the noise level and the latent in every norm.

    Arguments and result as in ``UNet``, for vectors [b, d].
    """

    width: int = 256
    blocks: int = 3
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
        named: dict[str, Array] = {}
        condition = Condition(self.width, name="condition")(log_snr, z, keep)
        x = nn.Dense(self.width, dtype=self.dtype, name="input")(x_t)
        for block in range(self.blocks):
            y = nn.silu(Norm(1, self.dtype, name=f"norm_{block}")(x, condition))
            y = nn.silu(nn.Dense(self.width, dtype=self.dtype, name=f"hidden_{block}")(y))
            y = nn.Dense(
                self.width,
                dtype=self.dtype,
                kernel_init=nn.initializers.zeros,
                name=f"project_{block}",
            )(y)
            x = x + y
            named[f"block_{block}"] = x
        x = nn.silu(Norm(1, self.dtype, name="output_norm")(x))
        out = nn.Dense(x_t.shape[-1], kernel_init=nn.initializers.zeros, name="output")(x)
        out = out.astype(jnp.float32)
        return (out, named) if features else out


class MLPEncoder(nn.Module):
    """``widths`` dense layers with SiLU, then mean and log-variance of q(z|x)."""

    latent: int = 10
    widths: tuple[int, ...] = (256, 256)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        for width in self.widths:
            x = nn.silu(nn.Dense(width, dtype=self.dtype)(x))
        return Gaussian(self.latent)(x)


class ResidualMap(nn.Module):
    """``e + W2 silu(W1 norm(e))`` for vectors, with W2 zero at the start: first the identity."""

    hidden: int

    @nn.compact
    def __call__(self, e: Array) -> Array:
        y = nn.silu(nn.Dense(self.hidden)(nn.LayerNorm()(e)))
        return e + nn.Dense(e.shape[-1], kernel_init=nn.initializers.zeros)(y)
