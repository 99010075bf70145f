"""Networks as pairs of pure functions; the only folder that imports flax."""

import jax.numpy as jnp

from dec_diffusion.networks.classifier import ConvClassifier, MLPClassifier, ResNet18
from dec_diffusion.networks.encoder import Encoder
from dec_diffusion.networks.layers import Network, as_network
from dec_diffusion.networks.mlp import MLPDenoiser, MLPEncoder, ResidualMap
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
    encoder_blocks: int = 1,
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
        encoder_blocks: residual blocks of each of those.
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
    encoder = Encoder(latent, width, encoder_multipliers, encoder_blocks, dtype=act)
    denoiser = UNet(width, multipliers, attention=attention, dtype=act)
    return as_network(encoder), as_network(denoiser)


def denoiser_network(
    shape: tuple[int, ...],
    *,
    width: int,
    multipliers: tuple[int, ...],
    blocks: int = 1,
    attention: tuple[int, ...] = (),
    dtype: str = "float32",
) -> Network:
    """An unconditional denoiser with ``apply(params, x_t, log_snr, features=False)``.

    With ``features`` it returns a pair: the prediction, and a dictionary of every block's output.

    Args:
        shape: (h, w, c), or (d,) for a multilayer perceptron of three blocks.
        width: of the first level, or of hidden layers.
        multipliers: channels of each level in units of ``width``.
        blocks: residual blocks per level and direction.
        attention: levels that attend.
        dtype: of activations.
    """
    act = jnp.dtype(dtype)
    if len(shape) == 1:
        return as_network(MLPDenoiser(width, dtype=act))
    return as_network(UNet(width, multipliers, blocks, attention, act))


def residual_map(hidden: int) -> Network:
    """A map of vectors [b, d] that is the identity at the start, with ``hidden`` units."""
    return as_network(ResidualMap(hidden))


def classifier_network(
    kind: str,
    shape: tuple[int, ...],
    *,
    outputs: int,
    width: int,
    hidden: int,
    dtype: str = "float32",
) -> Network:
    """A network with ``apply(params, x) -> (features [b, hidden], scores [b, outputs])``.

    Both results are float32. Nothing is shared between the examples of a batch.

    Args:
        kind: ``conv`` (small and fast), ``resnet18`` or ``mlp``; vectors always get a multilayer
            perceptron, which takes images as flat vectors.
        shape: (h, w, c) or (d,).
        outputs: number of linear scores.
        width: channels of the first level, or of the perceptron's first layer.
        hidden: number of features.
        dtype: of activations.

    Raises:
        ValueError: another ``kind``.
    """
    kinds = {"conv": ConvClassifier, "resnet18": ResNet18, "mlp": MLPClassifier}
    if kind not in kinds:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(kinds)}")
    make = MLPClassifier if len(shape) == 1 else kinds[kind]
    return as_network(make(outputs, width, hidden, jnp.dtype(dtype)))


__all__ = [
    "Network",
    "as_network",
    "classifier_network",
    "clusterddpm_networks",
    "denoiser_network",
    "residual_map",
]
