"""What an algorithm is: a record of pure functions that the engine runs.

A method is an ordered list of phases. A phase minimises one loss by gradient; on entering it,
and after each of its iterations, something may be recomputed in closed form from one ordered
sweep over the data (a Gaussian mixture, centroids, targets). No signature has room for labels.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import optax

from dec_diffusion.types import AUTO, Array, Batch, InputError, Metrics, Params, PRNGKeyArray

Cluster = Any
"""What moves in closed form: any pytree of arrays, ``()`` if nothing does."""


Update = Callable[
    [Params, Cluster, Any, Array, PRNGKeyArray, Array], tuple[Params, Cluster, Metrics]
]
"""The closed-form part of an E-step; see ``EStage``."""


class EStage(NamedTuple):
    """A closed-form update from one sweep over the data.

    Attributes:
        collect: ``(params, cluster, batch, key) -> features``, a pytree of arrays [b, ...].
        update: ``(params, cluster, features, weight, key, progress) -> (params, cluster, info)``;
            features have the leading axis n, in data order; ``weight`` [n] is 0 on padding;
            ``progress`` runs from 0 to 1 over the phase; ``info`` is a dictionary of scalars to
            log, of which ``converged``, if not 0, ends the phase. Only a stage that begins a
            phase may change ``params``.
    """

    collect: Callable[[Params, Cluster, Batch, PRNGKeyArray], Any]
    update: Update


class Phase(NamedTuple):
    """One stage of training.

    Attributes:
        loss: ``(params, cluster, batch, key, progress) -> (loss, (cluster, metrics))``, the
            M-step's objective; ``progress`` runs from 0 to 1 over the phase.
        tx: the optimiser, made anew when the phase begins.
        iterations: EM iterations; after each one a run reports and may checkpoint.
        steps: gradient steps per iteration.
        begin: closed-form update on entering the phase.
        refresh: closed-form update on entering the phase, after ``begin``, and after every
            iteration: the E-step. Clusters thus always fit the averaged weights.
        ema: decay of the averaged weights that E-steps, prediction and sampling use.
        assigns: whether ``predict`` means anything yet, so that progress can be scored.
    """

    loss: Callable[
        [Params, Cluster, Batch, PRNGKeyArray, Array], tuple[Array, tuple[Cluster, Metrics]]
    ]
    tx: optax.GradientTransformation
    iterations: int
    steps: int
    begin: EStage | None = None
    refresh: EStage | None = None
    ema: float = 0.99
    assigns: bool = True


class Findings(NamedTuple):
    """What a method found on the way and a reader should see beside its assignments.

    Attributes:
        partitions: by name, int [n]: earlier assignments of the training examples, to be scored
            beside the baselines.
        figures: by name, numbers for the summary.
        samples: [m, ...] in network scale, generated before the last phase.
        rows: timesteps of a search [e], increasing.
        columns: names of its layers.
        scores: by name, [e, layers]; ``value`` is what cells were compared by.
        cells: int [e, layers, m], clusters in every cell.
        examples: int [m], which examples those are.
        chosen: row and column of the cell that was chosen.
        boundary: whether the chosen timestep is the first or last of those tried.
    """

    partitions: Mapping[str, np.ndarray]
    figures: Mapping[str, float]
    samples: np.ndarray
    rows: tuple[int, ...]
    columns: tuple[str, ...]
    scores: Mapping[str, np.ndarray]
    cells: np.ndarray
    examples: np.ndarray
    chosen: tuple[int, int]
    boundary: bool


class Method(NamedTuple):
    """An algorithm.

    Attributes:
        init: ``(key, batch) -> (params, cluster)``.
        phases: by name, in the order in which they run.
        predict: ``(params, cluster, batch, key) -> log_resp`` [b, k], the log-probability of
            each cluster; deterministic methods ignore the key.
        embed: ``(params, cluster, batch, key) -> features`` [b, d], the space clustered in.
        sample: ``(params, cluster, key, component [b]) -> examples`` [b, ...] in network scale,
            one of each component given, -1 to draw the component too; None if the method does
            not generate.
        findings: ``cluster -> Findings``, on the host, after training; None if there are none.
        score: ``(params, cluster, batch, key) -> log_likelihood`` [b], in nats; None if the
            method is no density model.
    """

    init: Callable[[PRNGKeyArray, Batch], tuple[Params, Cluster]]
    phases: Mapping[str, Phase]
    predict: Callable[[Params, Cluster, Batch, PRNGKeyArray], Array]
    embed: Callable[[Params, Cluster, Batch, PRNGKeyArray], Array]
    sample: Callable[..., Array] | None = None
    findings: Callable[[Cluster], Findings] | None = None
    score: Callable[[Params, Cluster, Batch, PRNGKeyArray], Array] | None = None


class Pretrained(NamedTuple):
    """A denoiser to start from.

    Attributes:
        params: those parameters of the method that are given, by their top-level name.
        architecture: of an imported network, JSON values; None for the package's own.
    """

    params: Params
    architecture: Mapping[str, Any] | None = None


class DataSpec(NamedTuple):
    """What a method must know before it is built.

    Attributes:
        shape: of one example: (h, w, c) for images, (d,) for vectors.
        num_examples: n.
        batch_size: examples per gradient step.
        pretrained: what it starts from, None for nothing.
    """

    shape: tuple[int, ...]
    num_examples: int
    batch_size: int = 128
    pretrained: Pretrained | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Gradient steps of one pass over the data."""
        return max(1, self.num_examples // self.batch_size)

    @property
    def is_image(self) -> bool:
        """Whether examples are images rather than vectors."""
        return len(self.shape) == 3


Rule = tuple[str, Callable[[Any], bool], str]
"""Names of settings, separated by blanks; what must hold for each; and how to say so."""


def check_settings(settings: Any, rules: Iterable[Rule]) -> None:
    """Check the settings of a method: fields with a fixed choice, then ``rules``.

    Raises:
        InputError: naming the first option that cannot work and the remedy.
    """

    def refuse(name: str, remedy: str) -> None:
        raise InputError(f"--config.method.{name}={getattr(settings, name)}: {remedy}")

    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal and getattr(settings, name) not in get_args(hint):
            refuse(name, f"choose one of {', '.join(map(str, get_args(hint)))}")
    if settings.num_clusters == AUTO:
        refuse("num_clusters", "a method is built with a number; dec_diffusion.fit chooses one")
    for names, holds, remedy in rules:
        for name in names.split():
            if not holds(getattr(settings, name)):
                refuse(name, remedy)


def check_levels(attention: tuple[int, ...], multipliers: tuple[int, ...]) -> None:
    """Check that the levels of a U-Net that attend exist.

    Raises:
        InputError: one does not.
    """
    if any(not 0 <= level < len(multipliers) for level in attention):
        raise InputError(
            f"--config.method.attention={attention}: levels are numbered from 0 to "
            f"{len(multipliers) - 1}, one for each of --config.method.multipliers"
        )


def check_neighbours(neighbours: int, anchors: int, spec: DataSpec) -> None:
    """Check that a neighbour graph over ``anchors`` examples has so many neighbours for each.

    Raises:
        InputError: there are too few examples or anchors.
    """
    if neighbours >= min(anchors, spec.num_examples):
        raise InputError(
            f"--config.method.neighbours={neighbours}: there are {spec.num_examples} examples "
            f"and {anchors} anchors; ask for fewer neighbours"
        )
