"""Means over a batch, and their gradients, one part of the batch after another.

(1)  f(params, batch) = 1/n sum_j f(params, part_j)   for n equal parts of the batch
(2)  the gradient is the mean of the parts' gradients, each taken as soon as its part is done

So only one part's activations exist at a time: they fit into a CPU's cache, and memory no longer
grows with the batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dec_diffusion.types import Array

Means = Callable[[Any, Any], tuple[Array, Any]]
"""From parameters and a batch to a loss and metrics, all of them means over the batch."""

_PART_BYTES = 3 * 2**20


def count(batch_size: int, example_bytes: int) -> int:
    """How many parts are fastest on the default backend; they divide the batch.

    Args:
        batch_size: examples.
        example_bytes: of the largest activation of one example. On a CPU that of a part is kept
            near 3 MiB, so that what one layer writes the next still finds in the cache; elsewhere,
            and where a batch is spread over devices, it is one part.
    """
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return 1
    most = max(1, _PART_BYTES // example_bytes)
    size = max(n for n in range(1, min(most, batch_size) + 1) if batch_size % n == 0)
    # A batch of, say, a prime number of examples is better left whole.
    return batch_size // size if size * 4 > most else 1


def mean(function: Means, parts: int) -> Means:
    """``function`` evaluated part by part, (1).

    Differentiable in the loss with respect to ``params`` only, (2); the metrics, and whatever else
    is in the batch, are taken as constants.
    """
    if parts == 1:
        return function

    def split(batch: Any) -> Any:
        return jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), batch)

    def over_parts(one: Callable[[Any], Any], batch: Any) -> Any:
        first = jax.tree.map(lambda a: a[0], split(batch))
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(one, first))

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(lambda a, b: a + b / parts, total, one(part)), None

        return jax.lax.scan(add, zero, split(batch))[0]

    @jax.custom_vjp
    def whole(params: Any, batch: Any) -> tuple[Array, Any]:
        return over_parts(functools.partial(function, params), batch)

    def forward(params: Any, batch: Any) -> tuple[tuple[Array, Any], Any]:
        gradient = jax.value_and_grad(function, has_aux=True)
        return over_parts(functools.partial(gradient, params), batch)

    def backward(grads: Any, cotangent: tuple[Array, Any]) -> tuple[Any, None]:
        return jax.tree.map(lambda g: cotangent[0] * g, grads), None

    whole.defvjp(forward, backward)
    return whole
