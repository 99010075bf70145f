"""Networks as pairs of pure functions; the only folder that imports flax."""

import jax.numpy as jnp

from dec_diffusion.networks.encoder import Encoder
from dec_diffusion.networks.layers import Network, as_network
from dec_diffusion.networks.mlp import MLPDenoiser, MLPEncoder
from dec_diffusion.networks.official import OfficialEncoder, OfficialUNet
from dec_diffusion.networks.unet import UNet


def clusterddpm_networks(
    kind: str,
    shape: tuple[int, ...],
    *,
    latent: int,
    width: int,
    multipliers: tuple[int, ...],
    encoder_multipliers: tuple[int, ...],
    attention: tuple[int, ...] = (),
    dtype: str = "float32",
) -> tuple[Network, Network]:
    """The encoder and the denoiser for examples of ``shape``.

    Args:
        kind: ``unet`` or ``official``; vectors always get multilayer perceptrons.
        shape: (h, w, c) or (d,).
        latent: dimensions of z.
        width: of the first level, or of hidden layers.
        multipliers: of the denoiser's levels.
        encoder_multipliers: of the encoder's levels.
        attention: levels of the denoiser that attend.
        dtype: of activations.
    """
    act = jnp.dtype(dtype)
    if len(shape) == 1:
        encoder = MLPEncoder(latent, (width, width), dtype=act)
        return as_network(encoder), as_network(MLPDenoiser(width, dtype=act))
    if kind == "official":
        encoder = OfficialEncoder(latent, width, dtype=act)
        return as_network(encoder), as_network(OfficialUNet(width, dtype=act))
    encoder = Encoder(latent, width, encoder_multipliers, dtype=act)
    denoiser = UNet(width, multipliers, attention=attention, dtype=act)
    return as_network(encoder), as_network(denoiser)


__all__ = ["Network", "as_network", "clusterddpm_networks"]
