"""Convolutions by the oneDNN library inside jaxlib, for training wide networks on a CPU.

XLA:CPU brings oneDNN along but no longer routes convolutions to it. Called by name it takes half
the time of XLA's own kernels at 64 channels and more, which docs/performance.md measures. The
calls are no documented interface of jaxlib, so they are made only where they have been tried:

* with the releases named here, whose encoding of the arguments is known; any other release,
  platform or dtype, and more than one device, takes XLA's own kernels;
* without a persistent compilation cache, because jaxlib cannot write programs with them to disk.
"""

import functools
import importlib.metadata
import json
import math
import platform
import sys

import jax
import jax.numpy as jnp

from dec_diffusion.types import Array

TRIED = ("0.10.2",)
"""Releases of jaxlib whose calls are known."""
LEAST_CHANNELS = 64
"""Of input and output; narrower layers do not wait for their convolutions."""
_ROWS = 1568
# Pixels per block of the kernel's gradient: the copies of so many stay in the cache.


def usable() -> bool:
    """Whether the calls can be made in this process, as it is configured now."""
    return (
        importlib.metadata.version("jaxlib") in TRIED
        and sys.platform == "linux"
        and platform.machine() == "x86_64"
        and jax.default_backend() == "cpu"
        and jax.device_count() == 1
        and getattr(jax.config, "jax_compilation_cache_dir", None) is None
    )


@jax.custom_vjp
def conv(x: Array, kernel: Array) -> Array:
    """A float32 convolution of stride 1, [b, h, w, c] by [s, s, c, o], padded by ``s // 2``."""
    return _conv(x, kernel)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _conv(x, kernel), (x, kernel)


def _backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    # The input's gradient is a convolution with the mirrored kernel.
    d_x = _conv(g, kernel[::-1, ::-1].transpose(0, 1, 3, 2))
    return d_x, _kernel_gradient(x, g, kernel.shape[0])


conv.defvjp(_forward, _backward)


def _kernel_gradient(x: Array, g: Array, size: int) -> Array:
    """The sum over pixels of x[h + i, w + j]' g[h, w], for all taps i, j in one product.

    Shifting ``x`` along the width and ``g`` along the height takes 2 s copies, not the s^2 of
    patches of ``x``, and makes the product square. A few images at a time stay in the cache.
    """
    b, height, width, channels = x.shape
    features, pad = g.shape[-1], size // 2
    few = math.gcd(b, 2 ** max(0, round(math.log2(_ROWS / (height * width)))))

    def some(x: Array, g: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (pad, pad), (0, 0)))
        g = jnp.pad(g, ((0, 0), (pad, pad), (0, 0), (0, 0)))
        columns = [x[:, :, j : j + width] for j in range(size)]
        rows = [g[:, i : i + height] for i in reversed(range(size))]
        return _transposed_product(
            jnp.concatenate(columns, -1).reshape(-1, size * channels),
            jnp.concatenate(rows, -1).reshape(-1, size * features),
        )

    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        return total + some(*part), None

    zero = jnp.zeros((size * channels, size * features), x.dtype)
    parts = x.reshape(-1, few, *x.shape[1:]), g.reshape(-1, few, *g.shape[1:])
    total, _ = jax.lax.scan(add, zero, parts)
    return total.reshape(size, channels, size, features).transpose(2, 0, 1, 3)


def _conv(x: Array, kernel: Array) -> Array:
    shape = jax.ShapeDtypeStruct((*x.shape[:3], kernel.shape[3]), x.dtype)
    return _call("convolution", shape, _conv_config(kernel.shape[0]), x, kernel)


def _transposed_product(a: Array, b: Array) -> Array:
    """The transpose of ``a`` [n, k] times ``b`` [n, o]."""
    shape = jax.ShapeDtypeStruct((a.shape[1], b.shape[1]), a.dtype)
    config = json.dumps({"onednn_matmul_config": {"transpose_a": True, "transpose_b": False}})
    return _call("matmul", shape, config, a, b)


def _call(name: str, shape: jax.ShapeDtypeStruct, config: str, a: Array, b: Array) -> Array:
    call = jax.ffi.ffi_call(
        f"__onednn${name}",
        shape,
        vmap_method="sequential",
        custom_call_api_version=2,
        legacy_backend_config=config,
    )
    return call(a, b)


@functools.cache
def _conv_config(size: int) -> str:
    """The arguments as jaxlib encodes them: axes by number, 64-bit integers as text."""
    data = {"batch_dim": "0", "feature_dim": "3", "spatial_dims": ["1", "2"]}
    image = {"dims": "4", "data": data}
    axes = {"input_feature_dim": "2", "output_feature_dim": "3", "spatial_dims": ["0", "1"]}
    pad, one = [str(size // 2)] * 2, ["1", "1"]
    window = {
        "size": [str(size)] * 2,
        "pad_left": pad,
        "pad_right": pad,
        "strides": one,
        "window_dilations": one,
    }
    config = {
        "dims": "4",
        "input": image,
        "kernel": {"dims": "4", "filter": axes},
        "output": image,
        "window": window,
        "feature_groups": "1",
    }
    return json.dumps({"onednn_conv_config": config})
