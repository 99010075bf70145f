"""The search over layers and timesteps: one compiled pass against a loop over cells.

    python -m benchmarks.search [--examples=2000] [--timesteps=27] [--blocks=2] [--output=F]

Both score every cell (layer, timestep) of a DiEC denoiser with R = 4 draws of noise: features,
principal axes, four runs of k-means, indices. ``one_pass`` is what training does: a compiled loop
over timesteps whose every forward pass yields all layers, and whose k-means runs as one batch.
``loop`` runs each cell by itself, as one does by hand: the same forward pass (compiled once) for
that cell, then scikit-learn's PCA, k-means (of as many restarts) and index. Both are warmed up.

The weights are random: time does not depend on them, scores do and are not compared here (the
tests do that). JSON goes to standard output; only the ratio of figures of one run means anything.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, calinski_harabasz_score

from dec_diffusion import features, schedule, search
from dec_diffusion.features import Denoiser
from dec_diffusion.networks import denoiser_network

_K, _DIMS, _RESTARTS = 10, 24, 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--timesteps", type=int, default=27)
    parser.add_argument("--side", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--loop-timesteps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = vars(parser.parse_args())
    output = options.pop("output")
    text = json.dumps(measure(**options), indent=2)
    print(text)
    if output:
        output.write_text(text + "\n", encoding="utf-8")


def measure(
    *,
    examples: int = 2000,
    timesteps: int = 27,
    side: int = 8,
    width: int = 16,
    blocks: int = 1,
    loop_timesteps: int = 2,
    repeats: int = 3,
) -> dict[str, Any]:
    """Seconds for all cells, each way, and their ratio.

    Args:
        examples: m.
        timesteps: of the search; half of the schedule is covered.
        side: of the images, which are random.
        width: channels of the U-Net's first level, of three.
        blocks: residual blocks per level and direction.
        loop_timesteps: timesteps that the loop really runs; its time is proportional.
        repeats: of both in turn.
    """
    shape = (side, side, 1)
    network = denoiser_network(shape, width=width, multipliers=(1, 2, 2), blocks=blocks)
    f = features.describe(
        Denoiser(network, schedule.linear(1000), "eps"), shape, pool="layout", draws=4
    )
    x = jax.random.normal(jax.random.key(0), (examples, *shape))
    params = network.init(jax.random.key(1), x[:1], jnp.zeros(1))
    # A fresh network is 0 beyond its first layers: move every weight.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [v + 0.05 * jax.random.normal(k, v.shape) for v, k in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, moved)
    times = np.linspace(0, 500, timesteps).round().astype(np.int32)
    whole, single = _one_pass(f, params, x), _loop(f, params, x)
    whole(times)
    single(times[:1])
    ratios, seconds = [], {"one_pass": [], "loop": []}
    for _ in range(repeats):
        ours = _clock(lambda: whole(times))
        theirs = _clock(lambda: single(times[:loop_timesteps])) * timesteps / loop_timesteps
        seconds["one_pass"].append(ours)
        seconds["loop"].append(theirs)
        ratios.append(theirs / ours)
    return {
        "cells": timesteps * len(f.layers),
        "layers": len(f.layers),
        "longest_feature": f.width,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "device": jax.devices()[0].device_kind,
    }


def _one_pass(f: features.Features, params: Any, x: jax.Array) -> Callable[[np.ndarray], Any]:
    def cells(timestep: jax.Array) -> search.Cell:
        h = features.in_blocks(lambda block: features.halves(f, params, block, timestep), x)
        return jax.vmap(
            lambda layer: search.score_cell(
                jax.random.key(3), layer, _K, dims=_DIMS, unit=True, restarts=_RESTARTS
            ),
            in_axes=1,
        )(h)

    every = jax.jit(lambda times: jax.lax.map(cells, times))
    return lambda times: jax.block_until_ready(every(jnp.asarray(times)))


def _loop(f: features.Features, params: Any, x: jax.Array) -> Callable[[np.ndarray], Any]:
    forward = jax.jit(
        lambda timestep, layer: features.in_blocks(
            lambda block: features.halves(f, params, block, timestep, layer), x
        )
    )

    def run(times: np.ndarray) -> None:
        for timestep in times:
            for layer in range(len(f.layers)):
                _score(np.asarray(forward(timestep, layer)))

    return run


def _score(halves: np.ndarray) -> tuple[float, float, float]:
    """What ``search.score_cell`` computes, by scikit-learn."""
    whole = halves.mean(0)
    axes = PCA(_DIMS, whiten=True, random_state=0).fit(whole)
    noise = np.random.default_rng(0).normal(size=(len(whole), _DIMS))
    labels, indices = [], []
    for part in (whole, *halves):
        z = axes.transform(part)
        z /= np.sqrt(np.square(z).mean(1, keepdims=True))
        labels.append(KMeans(_K, n_init=_RESTARTS, max_iter=50, random_state=0).fit_predict(z))
        indices.append(calinski_harabasz_score(z, labels[-1]))
    noise /= np.sqrt(np.square(noise).mean(1, keepdims=True))
    null = KMeans(_K, n_init=_RESTARTS, max_iter=50, random_state=0).fit_predict(noise)
    corrected = indices[0] / calinski_harabasz_score(noise, null)
    return indices[0], corrected, float(adjusted_rand_score(labels[1], labels[2]))


def _clock(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
