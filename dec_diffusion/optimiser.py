"""The optimiser that the methods share."""

from typing import Any

import jax
import optax

_ONE_VECTOR = 2**24  # parameters; larger networks may have theirs spread over devices


def adam(
    steps: int,
    *,
    learning_rate: float,
    constant: int = 0,
    decay: bool = True,
    clip: float = 1000.0,
    b2: float = 0.99,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adam for a phase of ``steps`` steps.

    Args:
        steps: gradient steps of the phase.
        learning_rate: reached after a warm-up over the first 50 steps (a tenth of short phases).
        constant: steps at the full rate before it decays.
        decay: whether it decays at all, by half a cosine to 5%.
        clip: global norm at which gradients are clipped.
        b2: decay of the second moment.
        weight_decay: decoupled, in units of the learning rate.
    """
    warmup = max(1, min(50, steps // 10))
    constant = max(warmup, constant)
    rate = optax.linear_schedule(0.0, learning_rate, warmup)
    if decay:
        falls = optax.cosine_decay_schedule(learning_rate, max(1, steps - constant), alpha=0.05)
        rate = optax.join_schedules([rate, falls], [constant])
    update = optax.adamw(rate, b2=b2, weight_decay=weight_decay)
    return _in_one_vector(optax.chain(optax.clip_by_global_norm(clip), update))


def _in_one_vector(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """``tx`` on one long vector, whose update compiles sooner than hundreds of small ones.

    State of as many parameters as would fill a device keeps their shapes, and lies where they do.
    """
    flat = optax.flatten(tx)

    def of(tree: Any) -> optax.GradientTransformation:
        return flat if sum(x.size for x in jax.tree.leaves(tree)) <= _ONE_VECTOR else tx

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return of(updates).update(updates, state, params)

    return optax.GradientTransformation(lambda params: of(params).init(params), update)
