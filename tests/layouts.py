"""Trains a method for a few iterations on whatever devices and processes there are.

``python tests/layouts.py FOLDER METHOD ITERATIONS [COORDINATOR COUNT ID]`` leaves a
workdir stopped after that many further iterations, and ``METHOD.npz`` with its clusters
and assignments as this layout computes them. A run in the folder is resumed.
"""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable

import jax
import numpy as np

from dec_diffusion import config, data, distributed, engine, train, trained
from dec_diffusion.interrupt import Stop, StoppedError
from dec_diffusion.methods.clusterddpm import ClusterDDPM
from dec_diffusion.methods.diec import DiEC
from dec_diffusion.methods.neural_mixture import NeuralMixture

N, SWEEP, STEPS = 203, 16, 3
_MORE = 50  # iterations that are never reached
METHODS = {
    "clusterddpm": ClusterDDPM(
        num_clusters=3,
        latent=3,
        width=8,
        num_steps=20,
        sample_steps=2,
        noise=0.1,
        pretrain_iterations=1,
        balance_iterations=0,
        em_iterations=_MORE,
        steps=STEPS,
        mixture_iterations=5,
        mixture_restarts=2,
        anchors=100,
        learning_rate=1e-4,
    ),
    "diec": DiEC(
        num_clusters=3,
        width=8,
        num_steps=20,
        sample_steps=2,
        timestep=5,
        dims=3,
        search_restarts=1,
        subset=150,
        restarts=2,
        pretrain_iterations=1,
        iterations=_MORE,
        steps=STEPS,
        neighbours=3,
        anchors=100,
        hidden=4,
        tolerance=0.0,
        learning_rate=1e-4,
    ),
    "neural_mixture": NeuralMixture(
        num_clusters=3,
        heads=2,
        over_heads=1,
        over_clusters=5,
        neighbours=3,
        anchors=100,
        width=8,
        hidden=8,
        noise=0.1,
        iterations=_MORE,
        steps=STEPS,
        learning_rate=1e-4,
    ),
}
# Images, so that the layers are those of a U-Net.
METHODS["clusterddpm_layers"] = dataclasses.replace(
    METHODS["clusterddpm"],
    start="layers",
    width=4,
    multipliers=(1, 2),
    encoder_multipliers=(1, 2),
    encoder_blocks=0,
)
SHAPES = dict.fromkeys(METHODS, (8,)) | {"clusterddpm_layers": (8, 8, 1)}
TRAINING = {
    "clusterddpm": {"batch_size": 24},
    "clusterddpm_layers": {"batch_size": 24},
    "diec": {"batch_size": 20},  # which 8 devices cannot share equally
    "neural_mixture": {"batch_size": 24, "resident_gib": 0.0},  # streamed
}


class After(Stop):
    """Stops after so many iterations; counts what was compiled by the end of each."""

    def __init__(self, iterations: int, compiled: Callable[[], int]) -> None:
        super().__init__()
        self._left, self._compiled = iterations, compiled
        self.counts: list[int] = []

    def asked(self) -> bool:
        self._left -= 1
        self.counts.append(self._compiled())
        return self._left <= 0


def examples(shape: tuple[int, ...]) -> data.Dataset:
    """Vectors, or images in [0, 1], around three points."""
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=N)
    x = rng.normal(size=(3, *shape))[truth] * 2 + rng.normal(size=(N, *shape))
    if len(shape) > 1:
        x = np.clip(0.5 + x / 8, 0, 1)
    return data.from_arrays(x.astype(np.float32), name="three")


def settings(name: str) -> config.Config:
    fixed = {"sweep_size": SWEEP, "evaluate_every": 1, "checkpoint_every": 1000}
    return config.Config(name, METHODS[name], train=config.TrainConfig(**fixed, **TRAINING[name]))


def statistics(name: str, state: engine.TrainState) -> list[jax.Array]:
    """What the closed-form part of a method found."""
    found = state.cluster
    if name.startswith("clusterddpm"):
        return [found.mixture.log_weights, found.mixture.means, found.mixture.covariance]
    if name == "diec":
        return [found.anchors, found.target.values, state.ema_params["centers"]]
    # Not the means of the scores: they shift with a bias that no loss depends on, and that only
    # rounding moves.
    norm = found.norm
    return [found.log_prior, norm.variance, norm.log_constant, found.score, found.temperature]


def main(folder: pathlib.Path, name: str, iterations: int, pod: distributed.Pod) -> None:
    compilations = []

    def count(event: str, duration_secs: float, **_: object) -> None:
        if "backend_compile" in event:
            compilations.append(event)

    with distributed.joined(pod):
        jax.monitoring.register_event_duration_secs_listener(count)
        dataset = examples(SHAPES[name])
        stop = After(iterations, lambda: len(compilations))
        with contextlib.suppress(StoppedError):
            train.fit(settings(name), folder / name, dataset=dataset, verbose=0, stop=stop)
        run = trained.load(folder / name, clusters=False)
        found = trained.assign(run, dataset)
        clusters = statistics(name, run.state)
        if jax.process_index() == 0:
            np.savez(
                folder / f"{name}.npz",
                *map(np.asarray, clusters),
                labels=found.labels,
                responsibilities=found.responsibilities,
                compiled=stop.counts,
            )


if __name__ == "__main__":
    out, method, count, *rest = sys.argv[1:]
    pod = distributed.Pod("on", rest[0], int(rest[1]), int(rest[2]), 60) if rest else None
    main(pathlib.Path(out), method, int(count), pod or distributed.Pod("off"))
