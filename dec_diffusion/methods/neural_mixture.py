"""Neural mixture models: clusters whose densities are a network's outputs (arXiv 2107.02453).

A network gives every example x_i one score a_ik per cluster. An additional transformation makes
each score a density p_ik = p_k(x_i) that integrates to one against the data themselves, so a
cluster can neither win nor lose everything. With pi the prior and <.> the mean over the data (in
training over the batch, for prediction over the whole data set):

(1) S        p_ik = 2 sigmoid(g s_ik),  s_ik = (a_ik - <a_k>) / std(a_k): one constant, 1/2, for all
(2) P        p_ik = sigmoid(g s_ik) / <sigmoid(g s_k)>: a constant of each cluster's own
(3) X        p_ik = exp(a_ik) / <exp(a_k)>: no squashing, hence no ceiling on the confidence
(4) E-step   g_ik ~ (pi_k p_ik)^(1/tau), normalised, held constant; at tau = 0 one-hot
(5) M-step   minimise  -<sum_k g_ik log(pi_k p_ik)>, in which g is that of (4)
(6) views    of two random views u and v of x, each is explained by the other's assignment:
             -1/2 <sum_k g_k(u) log(pi_k p_k(v)) + g_k(v) log(pi_k p_k(u))>
             = <H(g(u)) + KL(g(u) | g_1(v)) - log sum_k pi_k p_k(v)>, symmetrised, g_1 at tau = 1
(7) prior    pi <- (1 - r) pi + r <g>, with a floor; or uniform
(8) bound    <sum_k g_k(u) log p_k(v)> <= I(cluster of u; v) for P and X: what a head of the network
             knows of one view from the other, in nats; heads are compared by it, without labels,
             with g one-hot and of p_k alone
(9) sure     p(k | x_i) ~ (pi_k p_ik)^(1/T), with T such that the mean of the largest equals the
             share of examples that keep their cluster in another view: (1) and (2) rank examples
             by certainty, but at T = 1 their posterior stays near 1/K however clear the groups are
(10) near    g_ik <- (1 - r) g_ik + r <h_jk>, a mean over the nearest neighbours j of i, by distance
             of vectors or of thumbnails; h_jk is one-hot, the cluster of j when all the data were
             last swept. Neighbours are views of an example that no transformation makes

At tau = 1 the gradient of (5) is that of the negative log-likelihood -<log sum_k pi_k p_ik>, whose
optimum under (1) and (2) is K/2 copies of one split and K/2 of its negative; a lower tau, which
makes clusters compete, is what cures that. See docs/neural_mixture.md.

Sources: the abstract and second-hand summaries for the method (sigmoid of a normalised score over
a constant; batch-wise EM in the forward and backward pass; fused with consistency); the text of
the paper was not available, so (2), (3), (6) to (10) and every setting are our reconstruction.
Nearest neighbours that agree: Van Gansbeke et al. 2020, there of features learnt before.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from dec_diffusion import communities, features, optimiser, spread, targets, views
from dec_diffusion.method import (
    DataSpec,
    EStage,
    Method,
    Phase,
    Rule,
    check_neighbours,
    check_settings,
)
from dec_diffusion.networks import Network, classifier_network
from dec_diffusion.spread import Table
from dec_diffusion.types import (
    Array,
    Batch,
    Count,
    Float,
    Int,
    Metrics,
    Params,
    PRNGKeyArray,
    pytree,
)

_LEAST = 1e-30  # weight of a cluster

Density = Literal["S", "P", "X"]
"""Which transformation makes scores densities: equation (1), (2) or (3)."""


@dataclasses.dataclass
class NeuralMixture:
    """Settings of neural mixture models.

    Attributes:
        num_clusters: K, or auto: `dec_diffusion.num_clusters` chooses it before training.
        density: ``S``, ``P`` or ``X``, equations (1) to (3).
        gain: g of equations (1) and (2).
        tau: temperature of the E-step, equation (4), at the end of training; 0 is hard EM.
        tau_start: the same at the start; it moves linearly over the first half of training.
        consistency: explain each of two views by the other's assignment, equation (6); without
            it one view is explained by its own, equation (5).
        prior: ``uniform``, or ``learned`` by equation (7) for clusters of different sizes.
        prior_rate: r of equation (7), per gradient step.
        prior_floor: lowest weight of a cluster, in units of 1 / K.
        prior_strength: share of a uniform prior in every update (Dirichlet pseudo-counts).
        networks: independent networks, trained side by side.
        heads: independent sets of K outputs of each network; of all of them the one with the
            highest bound (8) predicts.
        over_heads: further sets of outputs of each network, for training its features only.
        over_clusters: clusters of each of those.
        neighbours: of each example, of equation (10); 0 leaves it out.
        neighbour_share: r of equation (10).
        anchors: examples among which neighbours are looked for: all, or as many drawn from more.
        network: ``conv`` (small), ``resnet18`` or ``mlp``, which vectors always take.
        width: of the network's first level.
        hidden: features, the layer below the outputs.
        dtype: of activations, ``float32`` or ``bfloat16``; densities are always float32.
        rotate: degrees by which a view of an image is turned, at most; 0 switches this off, as
            it does with all changes down to ``noise``.
        shift: fraction of the image's size by which it is moved, at most.
        scale: relative change of its size, likewise.
        shear: horizontal shear per unit of height, likewise.
        crop: the largest share of its area that is cut away before it is enlarged again.
        flip: whether it may be mirrored left to right.
        jitter: relative change of brightness, contrast and saturation, at most; hue turns by a
            quarter of it.
        jitter_probability: share of images whose colours are changed at all.
        grey: share of colour images that lose their colour.
        noise: standard deviation of Gaussian noise, in units of the inputs; all that vectors know.
        iterations: after each, statistics are taken over all the data and a run reports.
        steps: gradient steps per iteration; 0 is one pass over the data.
        learning_rate: of Adam, after a warm-up over the first 50 steps.
        decay: cosine decay of the learning rate to 5%.
        weight_decay: of Adam.
        clip: global norm at which gradients are clipped.
        ema: decay of the averaged weights, which predict.
        adam_b2: decay of Adam's second moment.
    """

    num_clusters: Count = 10
    density: Density = "P"
    gain: float = 1.0
    tau: float = 0.0
    tau_start: float = 0.0
    consistency: bool = True
    prior: Literal["uniform", "learned"] = "uniform"
    prior_rate: float = 0.05
    prior_floor: float = 0.2
    prior_strength: float = 0.0
    networks: int = 1
    heads: int = 5
    over_heads: int = 0
    over_clusters: int = 50
    neighbours: int = 0
    neighbour_share: float = 0.5
    anchors: int = 65536
    network: Literal["conv", "resnet18", "mlp"] = "conv"
    width: int = 32
    hidden: int = 128
    dtype: Literal["float32", "bfloat16"] = "float32"
    rotate: float = 15.0
    shift: float = 0.1
    scale: float = 0.15
    shear: float = 0.2
    crop: float = 0.0
    flip: bool = False
    jitter: float = 0.0
    jitter_probability: float = 0.8
    grey: float = 0.0
    noise: float = 0.0
    iterations: int = 20
    steps: int = 50
    learning_rate: float = 1e-3
    decay: bool = True
    weight_decay: float = 0.0
    clip: float = 1000.0
    ema: float = 0.99
    adam_b2: float = 0.99

    def build(self, spec: DataSpec) -> Method:
        """Make the method for data of this shape.

        Raises:
            InputError: a setting is out of range; names it and the remedy.
        """
        _check(self, spec)
        network = classifier_network(
            self.network,
            spec.shape,
            outputs=self.heads * self.num_clusters + self.over_heads * self.over_clusters,
            width=self.width,
            hidden=self.hidden,
            dtype=self.dtype,
        )
        return _method(self, ensemble(network, self.networks), spec)


# -- densities --


@pytree
class Normaliser:
    """What turns the scores of neurons into densities; a row of numbers for each head.

    Attributes:
        mean: <a_k>.
        variance: of a_k over the data, biased.
        log_constant: logarithm of what the transformed score is divided by.
    """

    mean: Float[Array, "*h k"]
    variance: Float[Array, "*h k"]
    log_constant: Float[Array, "*h k"]


def normaliser(
    scores: Float[Array, "n *h k"],
    weight: Float[Array, " n"],
    *,
    density: Density,
    gain: float = 1.0,
    eps: float = 1e-5,
) -> Normaliser:
    """The statistics that equations (1) to (3) need, over these examples.

    Sums over the leading axis and nothing else, so they are those of the whole batch when it
    is spread over devices.

    Args:
        scores: outputs of the network, of any number of heads.
        weight: of each example, 0 on padding.
        density: whose statistics.
        gain: g.
        eps: added to the variance in (1) and (2).

    Returns:
        Each neuron's own, [*h, k]; what a density does not need is 0 (a variance 1).
    """
    scores = _wide(scores)
    zero = jnp.zeros_like(scores[0])
    if density == "X":
        return Normaliser(zero, zero + 1.0, _log_mean_exp(scores, weight))
    mean = targets.mean(scores, weight)
    variance = targets.mean(jnp.square(scores - mean), weight) + eps
    if density == "S":
        return Normaliser(mean, variance, zero - jnp.log(2.0))
    squashed = jax.nn.log_sigmoid(gain * (scores - mean) * jax.lax.rsqrt(variance))
    return Normaliser(mean, variance, _log_mean_exp(squashed, weight))


def log_density(
    norm: Normaliser, scores: Float[Array, "n *h k"], *, density: Density, gain: float = 1.0
) -> Float[Array, "n *h k"]:
    """log p_ik of equations (1) to (3) under the statistics given, in float32 or wider."""
    scores = _wide(scores)
    if density != "X":
        scores = (scores - norm.mean) * jax.lax.rsqrt(norm.variance)
        scores = jax.nn.log_sigmoid(gain * scores)
    return scores - norm.log_constant


def responsibilities(
    log_joint: Float[Array, "n *h k"], tau: float | Array
) -> Float[Array, "n *h k"]:
    """Equation (4), from log pi_k p_ik; gradients do not pass.

    Args:
        log_joint: log pi_k p_ik.
        tau: temperature; 0 is one-hot, at the first of the largest.
    """
    hard = jax.nn.one_hot(log_joint.argmax(-1), log_joint.shape[-1], dtype=log_joint.dtype)
    soft = jax.nn.softmax(log_joint / jnp.maximum(tau, 1e-6), axis=-1)
    return jax.lax.stop_gradient(jnp.where(tau > 0, soft, hard))


# -- objectives; all are means over examples, and one number for each head --


def em_loss(
    gamma: Float[Array, "n *h k"], log_joint: Float[Array, "n *h k"], weight: Float[Array, " n"]
) -> Float[Array, "*h"]:
    """Equation (5): the negative expected log-likelihood of examples and clusters, in nats."""
    return -targets.mean(jnp.sum(gamma * log_joint, -1), weight)


def swapped_loss(
    u: Float[Array, "n *h k"],
    v: Float[Array, "n *h k"],
    weight: Float[Array, " n"],
    *,
    tau: float | Array,
    near: Int[Array, "n g *h"] | None = None,
    share: float = 0.0,
) -> Float[Array, "*h"]:
    """Equation (6), from log pi_k p_k of both views; ``near`` and ``share`` as for (10)."""

    def gamma(log_joint: Array) -> Array:
        own = responsibilities(log_joint, tau)
        return own if near is None else with_neighbours(own, near, share)

    return 0.5 * (em_loss(gamma(u), v, weight) + em_loss(gamma(v), u, weight))


def with_neighbours(
    gamma: Float[Array, "n *h k"], near: Int[Array, "n g *h"], share: float
) -> Float[Array, "n *h k"]:
    """Equation (10).

    Args:
        gamma: responsibilities.
        near: clusters of each example's neighbours; one below 0 is not known and leaves its part
            to the example itself.
        share: r.
    """
    theirs = jax.nn.one_hot(near, gamma.shape[-1], dtype=gamma.dtype).mean(1)
    return (1.0 - share * theirs.sum(-1, keepdims=True)) * gamma + share * theirs


def log_mixture(
    log_joint: Float[Array, "n *h k"], weight: Float[Array, " n"]
) -> Float[Array, "*h"]:
    """<log sum_k pi_k p_ik>, the log-likelihood against the data measure, in nats."""
    return targets.mean(jax.nn.logsumexp(log_joint, -1), weight)


def update_prior(
    log_prior: Float[Array, "*h k"],
    gamma: Float[Array, "n *h k"],
    weight: Float[Array, " n"],
    *,
    rate: float,
    floor: float = 0.0,
    strength: float = 0.0,
) -> Float[Array, "*h k"]:
    """Equation (7), closed form.

    Args:
        log_prior: log pi.
        gamma: responsibilities.
        weight: of each example.
        rate: r.
        floor: lowest pi_k, in units of 1 / K, up to the normalisation that follows.
        strength: share of the uniform distribution in what pi moves towards.
    """
    k = log_prior.shape[-1]
    share = (1.0 - strength) * targets.mean(gamma, weight) + strength / k
    # Without a floor the weight of an empty cluster would underflow, and its logarithm be infinite.
    prior = jnp.maximum((1.0 - rate) * jnp.exp(log_prior) + rate * share, max(floor / k, _LEAST))
    return jax.lax.stop_gradient(jnp.log(prior / prior.sum(-1, keepdims=True)))


# -- is a head any good? no labels needed --


def information(
    u: Float[Array, "n *h k"], v: Float[Array, "n *h k"], weight: Float[Array, " n"]
) -> Float[Array, "*h"]:
    """Equation (8), in nats, with hard assignments; from log p_k of both views, symmetrised."""
    return -swapped_loss(u, v, weight, tau=0.0)


def effective_clusters(
    gamma: Float[Array, "n *h k"], weight: Float[Array, " n"]
) -> Float[Array, "*h"]:
    """exp of the entropy of the mean assignment: K if all are used alike, 1 if one takes all."""
    share = targets.mean(gamma, weight)
    return jnp.exp(jax.scipy.special.entr(share).sum(-1))


def duplicates(
    log_p: Float[Array, "n *h k"], weight: Float[Array, " n"], *, threshold: float = 0.95
) -> Float[Array, "*h"]:
    """How many neurons repeat an earlier one: their densities correlate above ``threshold``."""
    centred = (log_p - targets.mean(log_p, weight)) * jnp.sqrt(_over(weight, log_p))
    covariance = jnp.einsum("n...j,n...k->...jk", centred, centred, precision="highest")
    scale = jnp.sqrt(jnp.diagonal(covariance, axis1=-2, axis2=-1)) + 1e-12
    correlation = covariance / (scale[..., None] * scale[..., None, :])
    twin = jnp.tril(correlation > threshold, -1).any(-1)
    return twin.sum(-1).astype(log_p.dtype)


def agreement(
    u: Float[Array, "n *h k"], v: Float[Array, "n *h k"], weight: Float[Array, " n"]
) -> Float[Array, "*h"]:
    """Share of examples whose most probable cluster is the same in both views."""
    return targets.mean((u.argmax(-1) == v.argmax(-1)).astype(u.dtype), weight)


def temperature(
    log_joint: Float[Array, "n *h k"], confidence: Float[Array, "*h"], weight: Float[Array, " n"]
) -> Float[Array, "*h"]:
    """Equation (9): T in [1e-4, 1e4] at which the mean largest posterior is ``confidence``.

    Found by bisection of log T, as that mean falls from 1 to 1/K while T rises.
    """

    def halve(_: Int[Array, ""], bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        largest = jax.nn.softmax(log_joint / jnp.exp(middle)[..., None], axis=-1).max(-1)
        too_sure = targets.mean(largest, weight) > confidence
        return jnp.where(too_sure, middle, low), jnp.where(too_sure, high, middle)

    bound = jnp.full(confidence.shape, jnp.log(1e4), log_joint.dtype)
    low, high = jax.lax.fori_loop(0, 30, halve, (-bound, bound))
    return jnp.exp(0.5 * (low + high))


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _over(weight: Array, x: Array) -> Array:
    """The weights, against the leading axis of ``x``."""
    return weight.reshape(-1, *[1] * (x.ndim - 1))


def _log_mean_exp(x: Array, weight: Array) -> Array:
    return jax.nn.logsumexp(x, axis=0, b=_over(weight, x)) - jnp.log(weight.sum())


# -- the method --


def ensemble(network: Network, members: int) -> Network:
    """Several networks with weights of their own that see the same examples.

    Args:
        network: with ``apply(params, x) -> (features [b, d], scores [b, o])``.
        members: m.

    Returns:
        A network whose parameters have a leading axis m; features are [b, m, d], scores [b, m, o].
    """

    def init(key: PRNGKeyArray, x: Array) -> Params:
        return jax.lax.map(lambda k: network.init(k, x), jax.random.split(key, members))

    def apply(params: Params, x: Array) -> tuple[Array, Array]:
        # One after the other on CPU, which runs convolutions with batched kernels at half speed.
        many = jax.lax.map if jax.default_backend() == "cpu" else _vmap
        out = many(lambda p: network.apply(p, x), params)
        return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), out)

    return Network(init, apply)


@pytree
class Around:
    """What equation (10) needs of every example.

    Attributes:
        neighbours: int32 [n, g], their numbers.
        labels: int32 [n, h], its cluster in each head, those for over-clustering last; -1 before
            the first sweep of trained weights.
    """

    neighbours: Table
    labels: Table


@pytree
class Heads:
    """What moves in closed form.

    Attributes:
        log_prior: log pi of each head, those of the first network first.
        norm: statistics over the whole data set, which prediction uses.
        score: equation (8) of each head, in nats.
        best: int32, the head that predicts.
        temperature: T of equation (9), of each head.
        around: None if no neighbours are used.
    """

    log_prior: Float[Array, "h k"]
    norm: Normaliser
    score: Float[Array, " h"]
    best: Int[Array, ""]
    temperature: Float[Array, " h"]
    around: Around | None


def _vmap(function: Callable[[Any], Any], x: Any) -> Any:
    return jax.vmap(function)(x)


def _method(s: NeuralMixture, network: Network, spec: DataSpec) -> Method:
    """The functions of the method; equation numbers as at the top of the file."""
    shape = {"density": s.density, "gain": s.gain}
    uniform = -jnp.log(s.over_clusters)
    steps, total = s.steps or spec.steps_per_epoch, s.networks * s.heads
    n = spec.num_examples
    anchors = communities.some(n, s.anchors)
    near = s.neighbours

    def init(key: PRNGKeyArray, batch: Batch) -> tuple[Params, Heads]:
        zeros = jnp.zeros((total, s.num_clusters))
        norm = Normaliser(zeros, zeros + 1.0, zeros)
        prior = zeros - jnp.log(s.num_clusters)
        around = strangers(jnp.zeros((n, near), jnp.int32)) if near else None
        start = Heads(prior, norm, jnp.zeros(total), jnp.int32(0), jnp.ones(total), around)
        return network.init(key, batch["image"]), start

    def strangers(neighbours: Array) -> Around:
        """These neighbours, whose clusters are not known yet."""
        heads = total + s.networks * s.over_heads
        labels = jnp.full((neighbours.shape[0], heads), -1, jnp.int32)
        return Around(Table(neighbours, n), Table(labels, n))

    def heads_of(scores: Array) -> tuple[Array, Array]:
        """The scores [b, h, k] of the heads, and of the heads for over-clustering."""
        b, main = scores.shape[0], s.heads * s.num_clusters
        return (
            scores[..., :main].reshape(b, total, s.num_clusters),
            scores[..., main:].reshape(b, s.networks * s.over_heads, s.over_clusters),
        )

    def scores_of(params: Params, x: Array) -> tuple[Array, Array]:
        return heads_of(network.apply(params, x)[1])

    def view(x: Array, key: PRNGKeyArray) -> Array:
        return views.apply(x, key, _view(s))

    def joint(scores: Array, log_prior: Array, weight: Array) -> Array:
        """log pi_k p_ik, normalised over this batch."""
        return log_prior + log_density(normaliser(scores, weight, **shape), scores, **shape)

    def of_neighbours(around: Around, index: Array) -> Array:
        """Their clusters in all heads, int32 [b, g, h]."""
        numbers = around.neighbours.take(index)
        return around.labels.take(numbers.reshape(-1)).reshape(*numbers.shape, -1)

    def loss(
        params: Params, cluster: Heads, batch: Batch, key: PRNGKeyArray, progress: Array
    ) -> tuple[Array, tuple[Heads, Metrics]]:
        x, weight = batch["image"], batch["weight"]
        tau = s.tau_start + (s.tau - s.tau_start) * jnp.minimum(1.0, 2.0 * progress)
        seen = [
            scores_of(params, view(x, k)) for k in jax.random.split(key, 2 if s.consistency else 1)
        ]

        theirs = None if cluster.around is None else of_neighbours(cluster.around, batch["index"])

        def objective(of: list[Array], heads: slice) -> Array:
            near = None if theirs is None else theirs[..., heads]
            options = {"tau": tau, "near": near, "share": s.neighbour_share}
            # With one view, its first and its last are the same, and (6) is (5).
            return swapped_loss(of[0], of[-1], weight, **options).mean()

        joints = [joint(scores, cluster.log_prior, weight) for scores, _ in seen]
        value = objective(joints, slice(total))
        if s.over_heads:
            over = [joint(scores, uniform, weight) for _, scores in seen]
            value += objective(over, slice(total, None))
        if s.prior == "learned":
            prior = update_prior(
                cluster.log_prior,
                0.5 * (responsibilities(joints[0], tau) + responsibilities(joints[-1], tau)),
                weight,
                rate=s.prior_rate,
                floor=s.prior_floor,
                strength=s.prior_strength,
            )
            cluster = dataclasses.replace(cluster, log_prior=prior)
        metrics = {
            "log_mixture": log_mixture(joints[0], weight).mean(),
            "confidence": targets.mean(responsibilities(joints[0], 1.0).max(-1), weight).mean(),
        }
        return value, (cluster, metrics)

    def collect(params: Params, cluster: Heads, batch: Batch, key: PRNGKeyArray) -> Any:
        x = batch["image"]
        scores, over = scores_of(params, x)
        moved = scores_of(params, view(x, key))[0]
        return scores, moved, over if near and s.over_heads else ()

    def appearance(params: Params, cluster: Heads, batch: Batch, key: PRNGKeyArray) -> Array:
        return features.thumbnails(batch["image"])

    def find_neighbours(
        params: Params,
        cluster: Heads,
        seen: Array,
        weight: Array,
        key: PRNGKeyArray,
        progress: Array,
    ) -> tuple[Params, Heads, Metrics]:
        seen, weight = spread.trimmed((seen, weight), n)
        numbers = jnp.asarray(anchors, jnp.int32)
        among = Table(seen, n).take(numbers), numbers
        places, _ = targets.neighbour_graph(seen, near, weight=weight, among=among)
        return params, dataclasses.replace(cluster, around=strangers(numbers[places])), {}

    def update(
        params: Params,
        cluster: Heads,
        swept: Any,
        weight: Array,
        key: PRNGKeyArray,
        progress: Array,
    ) -> tuple[Params, Heads, Metrics]:
        *views_of, over = swept
        clean, seen = (
            (norm, log_density(norm, scores, **shape))
            for scores in views_of
            for norm in [normaliser(scores, weight, **shape)]
        )
        score = information(clean[1], seen[1], weight)
        best = score.argmax().astype(jnp.int32)
        plain = clean[1] + cluster.log_prior
        same = agreement(plain, seen[1] + cluster.log_prior, weight)
        # Where all agree the largest would be 1 for everybody, and say nothing of who is surer.
        most = 1.0 - 0.5 / jnp.maximum(weight.sum(), 1.0)
        sure = temperature(plain, jnp.minimum(same, most), weight)
        gamma = responsibilities(plain, 0.0)
        info = {
            "information": score[best],
            "agreement": same[best],
            "effective_clusters": effective_clusters(gamma, weight)[best],
            "duplicates": duplicates(clean[1], weight)[best],
            "smallest_weight": jnp.exp(cluster.log_prior[best]).min(),
            "largest_weight": jnp.exp(cluster.log_prior[best]).max(),
        }
        around = cluster.around
        if around is not None:
            joints = [plain, joint(over, uniform, weight)] if s.over_heads else [plain]
            labels = jnp.concatenate([a.argmax(-1) for a in joints], 1).astype(jnp.int32)
            # Those of weights that no step has changed would be chance.
            labels = spread.trimmed(jnp.where(progress > 0, labels, -1), n)
            around = dataclasses.replace(around, labels=Table(labels, n))
        return params, Heads(cluster.log_prior, clean[0], score, best, sure, around), info

    def best_joint(params: Params, cluster: Heads, batch: Batch) -> Array:
        """log pi_k p_ik of the head that predicts, normalised over the whole data set."""
        scores = scores_of(params, batch["image"])[0][:, cluster.best]
        norm = jax.tree.map(lambda a: a[cluster.best], cluster.norm)
        return log_density(norm, scores, **shape) + cluster.log_prior[cluster.best]

    def predict(params: Params, cluster: Heads, batch: Batch, key: PRNGKeyArray) -> Array:
        log_joint = best_joint(params, cluster, batch)
        # Divided by a low temperature, the largest would be rounded as the large number it is.
        below = log_joint - log_joint.max(-1, keepdims=True)
        return jax.nn.log_softmax(below / cluster.temperature[cluster.best], axis=-1)

    def score(params: Params, cluster: Heads, batch: Batch, key: PRNGKeyArray) -> Array:
        """log sum_k pi_k p_ik, the log-likelihood against the data measure."""
        return jax.nn.logsumexp(best_joint(params, cluster, batch), axis=-1)

    def embed(params: Params, cluster: Heads, batch: Batch, key: PRNGKeyArray) -> Array:
        return network.apply(params, batch["image"])[0][:, cluster.best // s.heads]

    em = Phase(
        loss,
        _optimiser(s, s.iterations * steps),
        s.iterations,
        steps,
        begin=EStage(appearance, find_neighbours) if near else None,
        refresh=EStage(collect, update),
        ema=s.ema,
    )
    return Method(init, {"em": em}, predict, embed, score=score)


def _view(s: NeuralMixture) -> views.View:
    return views.View(**{f.name: getattr(s, f.name) for f in dataclasses.fields(views.View)})


def _optimiser(s: NeuralMixture, steps: int) -> optax.GradientTransformation:
    return optimiser.adam(
        steps,
        learning_rate=s.learning_rate,
        decay=s.decay,
        clip=s.clip,
        b2=s.adam_b2,
        weight_decay=s.weight_decay,
    )


def _check(s: NeuralMixture, spec: DataSpec) -> None:
    sizes = (
        "tau tau_start over_heads neighbours rotate shift scale shear jitter noise steps"
        " weight_decay"
    )
    shares = (
        "prior_rate prior_floor prior_strength neighbour_share crop jitter_probability grey ema"
        " adam_b2"
    )
    rules: list[Rule] = [
        ("over_clusters", lambda v: v >= 2, "must be at least 2"),
        (
            "num_clusters networks heads anchors width hidden iterations",
            lambda v: v >= 1,
            "must be at least 1",
        ),
        ("gain learning_rate clip", lambda v: v > 0, "must be greater than 0"),
        (sizes, lambda v: v >= 0, "must not be negative"),
        (shares, lambda v: 0 <= v <= 1, "must lie between 0 and 1"),
        ("scale crop", lambda v: v < 1, "must be below 1"),
    ]
    check_settings(s, rules)
    check_neighbours(s.neighbours, s.anchors, spec)
