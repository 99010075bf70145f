"""Networks that give every example a vector of features and a few linear scores.

All norms are over one example (group norm), so that the same function runs in training and
afterwards and an example's scores do not depend on its batch.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from dec_diffusion.networks.layers import Conv, Norm, average_pool, pad_to_multiple
from dec_diffusion.types import Array, Float


class Scores(nn.Module):
    """A dense layer of features with norm and ReLU, then the linear scores, which are float32."""

    outputs: int
    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> tuple[Array, Array]:
        """Features [b, hidden] and scores [b, outputs], both float32."""
        x = nn.Dense(self.hidden, dtype=self.dtype, name="hidden")(x)
        features = nn.relu(Norm(1, self.dtype, name="norm")(x)).astype(jnp.float32)
        return features, nn.Dense(self.outputs, name="scores")(features)


class ConvClassifier(nn.Module):
    """Three levels of conv, norm, ReLU with ``width``, 2 and 4 times ``width`` channels.

    Images above 24 pixels are cut into patches of 2 x 2, 4 x 4, ... pixels first, whose pixels
    become channels; between levels the resolution is halved while it is above 4 pixels. Both
    keep convolutions and norms off the large maps, where nearly all of the time would go, and
    leave a map of about 4 x 4 that is flattened: where a stroke is matters. Inside, values run
    from 0 to 1, so that a black background is what convolutions pad with: in [-1, 1] every image
    has a bright frame, and MNIST takes several times as many steps to cluster.
    """

    outputs: int
    width: int = 32
    hidden: int = 128
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Array, Array]:
        """Features [b, hidden] and scores [b, outputs], both float32."""
        x = 0.5 * (x.astype(self.dtype) + 1.0)
        while max(x.shape[1:3]) > 24:
            x = space_to_depth(pad_to_multiple(x, 2))
        for level in range(3):
            if level > 0 and min(x.shape[1:3]) > 4:
                x = average_pool(pad_to_multiple(x, 2), 2)
            x = Conv(2**level * self.width, dtype=self.dtype, name=f"conv_{level}")(x)
            x = nn.relu(Norm(dtype=self.dtype, name=f"norm_{level}")(x))
        return Scores(self.outputs, self.hidden, self.dtype, name="head")(x.reshape(x.shape[0], -1))


class ResNet18(nn.Module):
    """ResNet-18 (arXiv 1512.03385, table 1) with group norm, averaged over pixels at the end.

    Images of at most 64 pixels take the stem that is usual for CIFAR, one 3 x 3 convolution;
    larger ones that of ImageNet, which quarters the resolution.
    """

    outputs: int
    width: int = 64
    hidden: int = 512
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Array, Array]:
        """Features [b, hidden] and scores [b, outputs], both float32."""
        x, dtype = x.astype(self.dtype), self.dtype
        large = max(x.shape[1:3]) > 64
        stem = Conv(self.width, size=7 if large else 3, stride=2 if large else 1, dtype=dtype)
        x = nn.relu(Norm(dtype=dtype)(stem(x)))
        if large:
            x = max_pool(x)
        for level in range(4):
            for block in range(2):
                stride = 2 if level > 0 and block == 0 else 1
                x = BasicBlock(2**level * self.width, stride, dtype)(x)
        x = x.astype(jnp.float32).mean((1, 2))
        return Scores(self.outputs, self.hidden, dtype, name="head")(x)


class BasicBlock(nn.Module):
    """Conv, norm, ReLU, conv, norm, plus the input, ReLU."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = self.dtype
        y = Conv(self.features, stride=self.stride, dtype=dtype)(x)
        y = nn.relu(Norm(dtype=dtype)(y))
        y = Norm(dtype=dtype)(Conv(self.features, dtype=dtype)(y))
        if x.shape != y.shape:
            x = Conv(self.features, size=1, stride=self.stride, dtype=dtype)(x)
            x = Norm(dtype=dtype)(x)
        return nn.relu(x + y)


class MLPClassifier(nn.Module):
    """For vectors: a dense layer with ReLU, then features and scores."""

    outputs: int
    width: int = 64
    hidden: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> tuple[Array, Array]:
        """Features [b, hidden] and scores [b, outputs], both float32."""
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.width, dtype=self.dtype, name="input")(x))
        x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name="hidden")(x))
        x = x.astype(jnp.float32)
        return x, nn.Dense(self.outputs, name="scores")(x)


def space_to_depth(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c4"]:
    """Each patch of 2 x 2 pixels becomes one pixel with four times the channels."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // 2, w // 2, 4 * c)


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Maximum over 3 x 3 pixels in steps of 2; the output is ``ceil(size / 2)``."""
    padding: Any = ((1, 1), (1, 1))  # flax declares only its named paddings
    return nn.max_pool(x, (3, 3), (2, 2), padding)
