"""ClusterDDPM: EM clustering with a conditional diffusion model (arXiv 2312.08029).

Model      c ~ Cat(pi),  z | c ~ N(mu_c, diag s_c^2),  x | z ~ conditional diffusion model
Encoder    q(z|x) = N(m(x), diag v(x))

(1) E-step   the mixture (pi, mu, s^2) maximises  mean_i log sum_c exp(E_q log pi_c N_c(z))
             over the whole data set, warm-started; see ``gmm``.
(2) M-step   encoder and denoiser minimise  E |target - prediction(x_t, z, t)|^2 + w KL,
             the squared error summed over dimensions, with one z ~ q(z|x) per example.
(3) KL       of q(z|x) to the mixture: its tightest bound -log sum_c pi_c exp(-KL_c) in closed
             form, whose gradient is that of sum_c g_c KL_c + KL(g | pi) at the best fixed g.
(4) paper    the official code instead evaluates sum_c g_c KL_c + KL(g | pi) with g at one more
             sample of z, and lets the gradient flow through g.
(5) weight   w = kl_weight / sum_t w_t, w_t the weights of the diffusion bound: at kl_weight 1
             the loss is proportional to the negative ELBO with its weights averaged.
(6) sample   c, then z ~ N(mu_c, temperature^2 s_c^2), then x by guided DDIM.
(7) start    the first mixture has the moments of K groups found without labels; those of the
             denoiser's layers, or of thumbnails where their modularity is clearly higher, are also
             g of (3) or (4) and the responsibilities of (1), for as long as they are held.

Sources: the abstract (EM, conditional DDPM, KL to the mixture), the official code (main.py of
Jarvisyan/ClusterDDPM-pytorch at 2d4c950) for everything else about the method; deviations and
what each does are listed in docs/clusterddpm.md.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dec_diffusion import (
    communities,
    features,
    gmm,
    optimiser,
    parts,
    pca,
    sampling,
    schedule,
    spread,
    views,
)
from dec_diffusion.gmm import Mixture
from dec_diffusion.method import (
    DataSpec,
    EStage,
    Method,
    Phase,
    Rule,
    check_levels,
    check_settings,
)
from dec_diffusion.networks import Network, clusterddpm_networks
from dec_diffusion.schedule import Prediction, Schedule
from dec_diffusion.spread import Table
from dec_diffusion.types import (
    Array,
    Batch,
    Count,
    Float,
    InputError,
    Metrics,
    Params,
    PRNGKeyArray,
    pytree,
)

_CLEARER = 0.01  # modularity by which thumbnails must be ahead of the layers; starts differ by .004
_REACH = 2.0  # standard deviations about the mean log-SNR in which training draws most
_SKETCH, _AXES = 64, 24  # directions, and principal axes in them, of each of the denoiser's layers


@dataclasses.dataclass
class ClusterDDPM:
    """Settings of ClusterDDPM.

    Attributes:
        num_clusters: K, or auto: `dec_diffusion.num_clusters` chooses it before training.
        latent: dimensions of z.
        network: ``unet`` (conditioned at every level) or ``official`` (the paper's code); vectors
            always take a multilayer perceptron.
        width: channels of the networks' first level (hidden units for vectors).
        multipliers: channels of each level of the denoiser in units of ``width``.
        encoder_multipliers: the same for the encoder.
        encoder_blocks: residual blocks per level of the encoder.
        attention: levels of the denoiser that attend.
        dtype: of activations, ``float32`` or ``bfloat16``.
        unit_range: give the networks images in [0, 1], as the official code does, not [-1, 1].
        noise_schedule: ``linear`` (betas 1e-4 to 0.02) or ``cosine``, for sampling and for the
            part of training that draws noise levels from it.
        num_steps: T of that schedule.
        zero_terminal: rescale the schedule so that its last step carries no signal.
        prediction: what the denoiser is asked for, ``v``, ``eps`` or ``x0``.
        uniform_noise: share of examples whose noise level is uniform over the schedule's steps;
            the others draw a normal log-SNR, concentrated where z can help.
        log_snr_mean: of that normal; None is -1.5 for images of 8x8 and for vectors, and
            2 ln(side / 8) less for larger images, which show as much through more noise.
        log_snr_std: of that normal.
        drop_latent: probability that the denoiser does not see z (for guidance).
        pretrain_kl: weight of KL(q | N(0, I)) in pretraining.
        kl_weight: of equation (5), in units of the schedule's own weight.
        kl_warmup: part of the EM phase over which the weight rises from 0.
        responsibilities: ``closed_form``, equation (3), or ``sampled``, equation (4).
        sampled_latents: fit the mixture to one sample of z per example, as the official code
            does, instead of to the posteriors.
        rotate: degrees by which the encoder's view of an image is turned, at most.
        shift: fraction of the image's size by which it is moved, likewise.
        scale: relative change of its size, likewise.
        shear: horizontal shear per unit of height, likewise.
        flip: whether it may be mirrored left to right.
        noise: standard deviation of Gaussian noise, in units of the inputs; all that vectors know.
        pretrain_iterations: of the first phase, which has no mixture.
        balance_iterations: EM iterations, before the others, in which the components are made to
            share the data equally; 0 leaves them out, which is right if group sizes differ
            several-fold.
        em_iterations: EM iterations after those.
        steps: gradient steps per iteration; 0 is one pass over the data.
        learning_rate: of Adam, after a warm-up over the first 50 steps of a phase.
        decay: cosine decay of the learning rate to 5%, over pretraining and over the EM
            iterations that do not balance.
        clip: global norm at which gradients are clipped.
        ema: decay of the averaged weights.
        mixture_iterations: EM iterations of the mixture per E-step.
        start: the first mixture, each the best of several: of the ``graph``, from the
            communities of the neighbour graph of the latents; of the ``layers``, from those of all
            of the denoiser's layers side by side, or of the images' thumbnails if their modularity
            is clearly higher, which are then held; or the one of highest ``likelihood``, which
            suits groups of very different sizes better.
        hold: share of the EM phase in which the groups of the ``layers`` are the
            responsibilities, so that ``balance_iterations``, ``responsibilities``,
            ``mixture_iterations`` and ``reseed_below`` matter only after it; the other starts hold
            nothing.
        anchors: examples among which neighbours are looked for: all, or as many drawn from more.
        mixture_restarts: how many starts.
        variance_floor: lowest variance of a component, in units of the pooled variance.
        weight_prior: Dirichlet parameter of the mixture's weights; 1 is none.
        reseed_below: share, in units of 1 / K, below which a component is re-seeded by splitting
            the heaviest; 0 never does.
        adam_b2: decay of Adam's second moment.
        sample_steps: denoiser calls per generated example.
        sample_guidance: guidance weight.
        sample_temperature: of the draw of z.
    """

    num_clusters: Count = 10
    latent: int = 10
    network: Literal["unet", "official"] = "unet"
    width: int = 16
    multipliers: tuple[int, ...] = (1, 2)
    encoder_multipliers: tuple[int, ...] = (1, 2, 4)
    encoder_blocks: int = 1
    attention: tuple[int, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    unit_range: bool = False
    noise_schedule: schedule.Name = "cosine"
    num_steps: int = 1000
    zero_terminal: bool = True
    prediction: Literal["v", "eps", "x0"] = "v"
    uniform_noise: float = 0.0
    log_snr_mean: float | None = None
    log_snr_std: float = 1.0
    drop_latent: float = 0.1
    pretrain_kl: float = 0.01
    kl_weight: float = 0.5
    kl_warmup: float = 0.1
    responsibilities: Literal["closed_form", "sampled"] = "closed_form"
    sampled_latents: bool = False
    rotate: float = 10.0
    shift: float = 0.08
    scale: float = 0.1
    shear: float = 0.1
    noise: float = 0.0
    flip: bool = False
    pretrain_iterations: int = 16
    balance_iterations: int = 10
    em_iterations: int = 14
    steps: int = 50
    learning_rate: float = 1e-3
    decay: bool = True
    clip: float = 1000.0
    ema: float = 0.99
    mixture_iterations: int = 20
    start: Literal["graph", "layers", "likelihood"] = "graph"
    hold: float = 1.0
    anchors: int = 65536
    mixture_restarts: int = 20
    variance_floor: float = 1e-2
    weight_prior: float = 1.0
    reseed_below: float = 0.1
    adam_b2: float = 0.99
    sample_steps: int = 50
    sample_guidance: float = 0.0
    sample_temperature: float = 0.8

    def build(self, spec: DataSpec) -> Method:
        """Make the method for data of this shape.

        Raises:
            InputError: a setting is out of range; names it and the remedy.
        """
        _check(self, spec)
        encoder, denoiser = clusterddpm_networks(
            self.network,
            spec.shape,
            latent=self.latent,
            width=self.width,
            multipliers=self.multipliers,
            encoder_multipliers=self.encoder_multipliers,
            encoder_blocks=self.encoder_blocks,
            attention=self.attention,
            dtype=self.dtype,
        )
        noise = Noise(log_snr_mean(self, spec), self.log_snr_std)
        return _method(self, encoder, denoiser, _schedule(self), noise, spec)


@pytree
class Clusters:
    """What moves in closed form; n is the number of examples.

    Attributes:
        mixture: over the latents.
        start: int32 [n], the groups of the layers' or thumbnails' graph; zeros if there is none.
        reach: the largest absolute values [d] of the vectors trained on, where the sampler needs
            to know them, else None.
    """

    mixture: Mixture
    start: Table
    reach: Float[Array, " d"] | None = None


class Noise(NamedTuple):
    """The normal distribution of log-SNRs that training draws from."""

    mean: float
    std: float


def log_snr_mean(s: ClusterDDPM, spec: DataSpec) -> float:
    """Where the noise levels of training are centred for data of this shape.

    Averaging over blocks of k x k pixels multiplies the signal-to-noise ratio by k^2, so an image
    k times as large needs 2 ln k less for the same content to be visible.
    """
    if s.log_snr_mean is not None:
        return s.log_snr_mean
    side = math.sqrt(spec.shape[0] * spec.shape[1]) if spec.is_image else 8.0
    return -1.5 - 2.0 * math.log(side / 8.0)


def _schedule(s: ClusterDDPM) -> Schedule:
    # Index 0 is the cleanest step; the official schedule has one more beta than steps drawn.
    grid = schedule.named(s.noise_schedule, s.num_steps + 1)
    return schedule.zero_terminal_snr(grid) if s.zero_terminal else grid


def sampled_kl(
    mixture: Mixture, mean: Float[Array, "b d"], variance: Float[Array, "b d"], z: Array
) -> Float[Array, " b"]:
    """Equation (4): sum_c g_c KL_c + KL(g | pi) with g = p(c | z), in nats.

    The official code adds 1e-10 to every density before normalising, which turns a point on its
    own mean into a uniform assignment at 32 dimensions, and exponentiates without a shift, which
    overflows; log-space responsibilities here are the documented repair of both. A component of
    weight 0 adds nothing.
    """
    # Its logarithm is made finite: minus infinity would meet itself in the difference below.
    log_weights = jnp.maximum(mixture.log_weights, -1e30)
    mixture = dataclasses.replace(mixture, log_weights=log_weights)
    log_g, _ = gmm.log_responsibilities(mixture, z)
    g = jnp.exp(log_g)
    kl = gmm.kl_to_components(mixture, mean, variance)
    return jnp.sum(g * (kl + log_g - log_weights), axis=-1)


def kl_scale(s: ClusterDDPM, grid: Schedule, noise: Noise) -> float:
    """The KL weight at which the loss is the negative ELBO with averaged weights, equation (5).

    For uniform steps that is ``schedule.kl_weight``. For a normal log-SNR l the bound is
    1/2 int alpha^2(l) |v error|^2 dl (and 1/2 int |eps error|^2 dl), taken over the two standard
    deviations on either side of the mean in which the loss is trained.
    """
    if s.uniform_noise == 1.0:
        return float(schedule.kl_weight(grid, prediction=s.prediction, first=1))
    reach = _REACH * noise.std
    log_snr = jnp.linspace(noise.mean - reach, noise.mean + reach, 257)
    density = 0.5 * schedule.error_ratio(log_snr, of="eps", to=s.prediction)
    return float(1.0 / jnp.trapezoid(density, log_snr))


def _method(
    s: ClusterDDPM,
    encoder: Network,
    denoiser: Network,
    grid: Schedule,
    noise: Noise,
    spec: DataSpec,
) -> Method:
    """The functions of the method; equation numbers as at the top of the file."""
    prediction: Prediction = s.prediction
    em_weight = s.kl_weight * kl_scale(s, grid, noise)
    steps = s.steps or spec.steps_per_epoch
    view = views.View(
        rotate=s.rotate, shift=s.shift, scale=s.scale, shear=s.shear, flip=s.flip, noise=s.noise
    )
    n, k = spec.num_examples, s.num_clusters
    anchors = communities.some(n, s.anchors)
    em_iterations = s.balance_iterations + s.em_iterations
    # Half an iteration less, so that rounding cannot move the last balanced E-step.
    balanced_share = (s.balance_iterations - 0.5) / em_iterations

    def level(log_snr: Array) -> Array:
        # The official network takes t / T, the others the log-SNR itself.
        if s.network == "unet" or not spec.is_image:
            return log_snr
        position = jnp.linspace(0.0, 1.0, grid.log_snr.shape[0])
        return jnp.interp(-log_snr, -grid.log_snr, position)

    def ranged(batch: Batch) -> Array:
        return 0.5 * (batch["image"] + 1.0) if s.unit_range else batch["image"]

    def init(key: PRNGKeyArray, batch: Batch) -> tuple[Params, Clusters]:
        encoder_key, denoiser_key = jax.random.split(key)
        x = batch["image"]
        z, ones = jnp.zeros((x.shape[0], s.latent)), jnp.ones(x.shape[0])
        params = {
            "encoder": encoder.init(encoder_key, x),
            "denoiser": denoiser.init(denoiser_key, x, ones, z, ones),
        }
        d = s.latent
        mixture = Mixture(jnp.full(k, -jnp.log(k)), jnp.zeros((k, d)), jnp.ones((k, d)))
        # The noise, on vectors: dividing by a small signal sends samples far from the data.
        reach = jnp.zeros(spec.shape) if prediction == "eps" and not spec.is_image else None
        return params, Clusters(mixture, Table(jnp.zeros(n, jnp.int32), n), reach)

    def met(cluster: Clusters, x: Array) -> Clusters:
        if cluster.reach is None:
            return cluster
        reach = jnp.maximum(cluster.reach, jnp.abs(x).max(0))
        return dataclasses.replace(cluster, reach=reach)

    def encode(params: Params, x: Array) -> tuple[Array, Array]:
        mean, log_variance = encoder.apply(params["encoder"], x)
        return mean, jnp.exp(log_variance)

    def draw_noise_levels(key: PRNGKeyArray, n: int) -> Array:
        uniform_key, normal_key, choice_key = jax.random.split(key, 3)
        index = schedule.sample_steps(uniform_key, n, grid, first=1)
        normal = schedule.sample_log_snr(normal_key, n, mean=noise.mean, std=noise.std)
        uniform = jax.random.bernoulli(choice_key, s.uniform_noise, (n,))
        return jnp.where(uniform, grid.log_snr[index], normal)

    def draw(batch: Batch, key: PRNGKeyArray) -> dict[str, Array]:
        """What a loss needs of a batch, its randomness included, each [b, ...]."""
        view_key, z_key, noise_key = jax.random.split(key, 3)
        level_key, eps_key, drop_key = jax.random.split(noise_key, 3)
        x = ranged(batch)
        b = x.shape[0]
        return {
            "x": x,
            "view": views.apply(x, view_key, view),
            "log_snr": draw_noise_levels(level_key, b),
            "eps": jax.random.normal(eps_key, x.shape),
            "keep": jax.random.bernoulli(drop_key, 1.0 - s.drop_latent, (b,)).astype(jnp.float32),
            "z_noise": jax.random.normal(z_key, (b, s.latent)),
        }

    def terms(params: Params, drawn: dict[str, Array]) -> tuple[Array, Array, Array]:
        """Posterior mean and variance, and the error of the denoiser, all per example."""
        mean, variance = encode(params, drawn["view"])
        z = mean + jnp.sqrt(variance) * drawn["z_noise"]
        x, eps, log_snr = drawn["x"], drawn["eps"], drawn["log_snr"]
        x_t = schedule.add_noise(x, eps, log_snr)
        target = schedule.target(x, eps, log_snr, prediction=prediction)
        out = denoiser.apply(params["denoiser"], x_t, level(log_snr), z, drawn["keep"])
        return mean, variance, jnp.sum(jnp.square(target - out), axis=tuple(range(1, x.ndim)))

    def means(function: parts.Means, params: Params, drawn: dict[str, Array]) -> Any:
        widest = spec.shape[0] * spec.shape[1] * s.width if spec.is_image else s.width
        number = parts.count(drawn["x"].shape[0], widest * jnp.dtype(s.dtype).itemsize)
        return parts.mean(function, number)(params, drawn)

    def pretrain_loss(
        params: Params, cluster: Clusters, batch: Batch, key: PRNGKeyArray, progress: Array
    ) -> tuple[Array, tuple[Clusters, Metrics]]:
        def function(params: Params, drawn: dict[str, Array]) -> tuple[Array, Metrics]:
            mean, variance, error = terms(params, drawn)
            kl = 0.5 * jnp.sum(mean**2 + variance - 1.0 - jnp.log(variance), axis=-1).mean()
            return error.mean() + s.pretrain_kl * kl, {"denoising": error.mean(), "kl": kl}

        drawn = draw(batch, key)
        loss, metrics = means(function, params, drawn)
        return loss, (met(cluster, drawn["x"]), metrics)

    def em_loss(
        params: Params, cluster: Clusters, batch: Batch, key: PRNGKeyArray, progress: Array
    ) -> tuple[Array, tuple[Clusters, Metrics]]:
        weight = em_weight * jnp.minimum(1.0, progress / s.kl_warmup if s.kl_warmup else 1.0)
        mixture = cluster.mixture

        def function(params: Params, drawn: dict[str, Array]) -> tuple[Array, Metrics]:
            mean, variance, error = terms(params, drawn)
            if s.responsibilities == "closed_form":
                kl = gmm.mixture_kl_bound(mixture, mean, variance)
            else:
                z = mean + jnp.sqrt(variance) * drawn["second"]
                kl = sampled_kl(mixture, mean, variance, z)
            if s.start == "layers":
                each = gmm.kl_to_components(mixture, mean, variance) - mixture.log_weights
                own = jnp.take_along_axis(each, drawn["start"][:, None], 1)[:, 0]
                kl = jnp.where(held(progress), own, kl)
            kl = kl.mean()
            return error.mean() + weight * kl, {"denoising": error.mean(), "kl": kl}

        loss_key, z_key = jax.random.split(key)
        drawn = draw(batch, loss_key)
        drawn["second"] = jax.random.normal(z_key, drawn["z_noise"].shape)
        if s.start == "layers":
            drawn["start"] = cluster.start.take(batch["index"])
        loss, metrics = means(function, params, drawn)
        return loss, (met(cluster, drawn["x"]), metrics | {"kl_weight": weight})

    def collect(params: Params, cluster: Clusters, batch: Batch, key: PRNGKeyArray) -> Any:
        mean, variance = encode(params, ranged(batch))
        if s.sampled_latents:
            z = mean + jnp.sqrt(variance) * jax.random.normal(key, mean.shape)
            return z, jnp.zeros_like(variance)
        return mean, variance

    guards = {"variance_floor": s.variance_floor, "weight_prior": s.weight_prior}

    def held(progress: Array) -> Array:
        """Whether the groups of the layers are still the responsibilities."""
        return jnp.asarray((s.start == "layers") & (progress <= s.hold) & (s.hold > 0))

    def of_groups(labels: Array, cluster: Clusters, latents: Any, weight: Array) -> Mixture:
        return gmm.of_groups(labels, cluster.mixture, *latents, weight=weight, **guards)

    def e_step(
        params: Params,
        cluster: Clusters,
        latents: Any,
        weight: Array,
        key: PRNGKeyArray,
        progress: Array,
    ) -> tuple[Params, Clusters, Metrics]:
        mean, variance = latents
        balanced = progress < balanced_share
        mixture = gmm.fit(
            cluster.mixture,
            mean,
            variance,
            weight=weight,
            iterations=s.mixture_iterations,
            # Balancing moves the weights while the likelihood hardly changes.
            tol=jnp.where(balanced, 0.0, 1e-3),
            balance=jnp.where(balanced, 1.0, 0.0),
            **guards,
        ).mixture
        if s.start == "layers":
            rows = spread.trimmed((latents, weight), n)
            given = of_groups(cluster.start.values, cluster, *rows)
            # Both are cheap; sums over devices behind a condition could wait for each other.
            mixture = jax.tree.map(functools.partial(jnp.where, held(progress)), given, mixture)
        # While balancing, weights are multipliers, not shares, and none can die; nor while held.
        threshold = jnp.where(balanced | held(progress), 0.0, s.reseed_below / k)
        mixture, dead = gmm.reseed_dead(mixture, threshold=threshold)
        log_resp, log_likelihood = gmm.log_responsibilities(mixture, mean, variance)
        share = jnp.exp(log_resp).T @ weight / weight.sum()
        info = {
            "mixture_log_likelihood": log_likelihood @ weight / weight.sum(),
            "smallest_weight": share.min(),
            "largest_weight": share.max(),
            "revived": dead.sum(),
        }
        return params, dataclasses.replace(cluster, mixture=mixture), info

    # -- the first mixture, equation (7) --

    def look(params: Params, cluster: Clusters, batch: Batch, key: PRNGKeyArray) -> Any:
        """The latents, sketches of the denoiser's layers [b, layers, size], and thumbnails."""
        bare = features.without_latent(denoiser, s.latent, grid, prediction)
        extract = features.describe(bare, spec.shape, pool="layout", draws=4)
        # The cleanest level that training knows: of noisier features several different partitions
        # have the same modularity.
        timestep = jnp.abs(grid.log_snr - (noise.mean + _REACH * noise.std)).argmin()

        def of_block(x: Array) -> Array:
            return features.sketches(extract, params["denoiser"], x, timestep, _SKETCH)

        layers = jnp.moveaxis(features.in_blocks(of_block, ranged(batch)), 0, 1)
        small = features.thumbnails(batch["image"])
        return collect(params, cluster, batch, key), layers, small

    def side_by_side(layers: Array, key: PRNGKeyArray) -> Array:
        """Each layer along its principal axes, of variance 1 and one length, [n, d]."""

        def projected(some: Array, layer: Array) -> Array:
            axes = pca.whiten(pca.principal(key, some, _AXES))
            return pca.project(axes, layer, unit=True)

        some = Table(layers, n).take(jnp.asarray(anchors, jnp.int32))
        e = jax.vmap(projected, in_axes=1, out_axes=1)(some, layers)
        return e.reshape(e.shape[0], -1)

    def partition(key: PRNGKeyArray, x: Array, weight: Array) -> communities.Communities:
        among = jnp.asarray(anchors, jnp.int32)
        return communities.partition(
            key, x, k, weight=weight, anchors=among, restarts=s.mixture_restarts
        )

    def from_graph(
        params: Params,
        cluster: Clusters,
        latents: Any,
        weight: Array,
        key: PRNGKeyArray,
        progress: Array,
    ) -> tuple[Params, Clusters, Metrics]:
        groups = partition(key, latents[0], weight)
        mixture = of_groups(groups.labels, cluster, latents, weight)
        cluster = dataclasses.replace(cluster, mixture=mixture)
        return params, cluster, {"modularity": groups.modularity}

    def from_layers(
        params: Params,
        cluster: Clusters,
        seen: Any,
        weight: Array,
        key: PRNGKeyArray,
        progress: Array,
    ) -> tuple[Params, Clusters, Metrics]:
        (latents, layers, small), weight = spread.trimmed((seen, weight), n)
        axes_key, groups_key = jax.random.split(key)
        inner = partition(groups_key, side_by_side(layers, axes_key), weight)
        outer = partition(groups_key, small, weight)
        better = outer.modularity > inner.modularity + _CLEARER
        groups = jax.tree.map(lambda a, b: jnp.where(better, a, b), outer, inner)
        mixture = of_groups(groups.labels, cluster, latents, weight)
        info = {"modularity": inner.modularity, "modularity_thumbnails": outer.modularity}
        start = Table(groups.labels, n)
        return params, dataclasses.replace(cluster, mixture=mixture, start=start), info

    def likeliest(
        params: Params,
        cluster: Clusters,
        latents: Any,
        weight: Array,
        key: PRNGKeyArray,
        progress: Array,
    ) -> tuple[Params, Clusters, Metrics]:
        mean, variance = latents
        found = gmm.init(
            key,
            mean,
            k,
            variance=variance,
            weight=weight,
            restarts=s.mixture_restarts,
            **guards,
        )
        cluster = dataclasses.replace(cluster, mixture=found.mixture)
        return params, cluster, {"mixture_log_likelihood": found.log_likelihood[-1]}

    begin = {
        "graph": EStage(collect, from_graph),
        "layers": EStage(look, from_layers),
        "likelihood": EStage(collect, likeliest),
    }[s.start]

    def predict(params: Params, cluster: Clusters, batch: Batch, key: PRNGKeyArray) -> Array:
        mean, variance = encode(params, ranged(batch))
        return gmm.log_responsibilities(cluster.mixture, mean, variance)[0]

    def embed(params: Params, cluster: Clusters, batch: Batch, key: PRNGKeyArray) -> Array:
        return encode(params, ranged(batch))[0]

    def score(params: Params, cluster: Clusters, batch: Batch, key: PRNGKeyArray) -> Array:
        """The term of equation (1) that is each example's: of the latents, not of the data."""
        mean, variance = encode(params, ranged(batch))
        return gmm.log_responsibilities(cluster.mixture, mean, variance)[1]

    def sample(params: Params, cluster: Clusters, key: PRNGKeyArray, component: Array) -> Array:
        """Equation (6): one example in network scale for each component given [b], -1 for any."""
        draw = functools.partial(sample_part, params, cluster)
        return sampling.in_parts(draw, key, component)

    def sample_part(
        params: Params, cluster: Clusters, key: PRNGKeyArray, component: Array
    ) -> Array:
        c_key, z_key, x_key = jax.random.split(key, 3)
        b, mixture = component.shape[0], cluster.mixture
        drawn = jax.random.categorical(c_key, mixture.log_weights, shape=(b,))
        component = jnp.where(component < 0, drawn, component)
        z, _ = gmm.sample(mixture, z_key, b, component=component, temperature=s.sample_temperature)

        def estimate(keep: float) -> sampling.Denoise:
            def denoise(x_t: Array, log_snr: Array) -> Array:
                out = denoiser.apply(params["denoiser"], x_t, level(log_snr), z, jnp.full(b, keep))
                return schedule.to_x0(out, x_t, log_snr, prediction=prediction)

            return denoise

        denoise = sampling.guide(estimate(1.0), estimate(0.0), s.sample_guidance)
        levels = _levels(s, grid, noise)
        # The bounds of [-1, 1] also bound [0, 1] well enough for the sampler to stay on the data.
        clip = 1.0 if spec.is_image else cluster.reach
        x = sampling.ddim(denoise, levels, x_key, (b, *spec.shape), clip=clip)
        return 2.0 * x - 1.0 if s.unit_range else x

    phases = {
        "pretrain": Phase(
            pretrain_loss,
            _optimiser(s, s.pretrain_iterations * steps),
            s.pretrain_iterations,
            steps,
            ema=s.ema,
            assigns=False,
        ),
        "em": Phase(
            em_loss,
            _optimiser(s, em_iterations * steps, constant=s.balance_iterations * steps),
            em_iterations,
            steps,
            begin=begin,
            refresh=EStage(collect, e_step),
            ema=s.ema,
        ),
    }
    return Method(init, phases, predict, embed, sample, score=score)


def _optimiser(s: ClusterDDPM, steps: int, *, constant: int = 0) -> optax.GradientTransformation:
    return optimiser.adam(
        steps,
        learning_rate=s.learning_rate,
        constant=constant,
        decay=s.decay,
        clip=s.clip,
        b2=s.adam_b2,
    )


def _levels(s: ClusterDDPM, grid: Schedule, noise: Noise) -> Float[Array, " steps"]:
    """The noise levels that the sampler visits: of the schedule if the denoiser knows them all."""
    if s.uniform_noise:
        return sampling.subsample(grid, s.sample_steps, first=1)
    # From nearly nothing but noise to the cleanest that training knows: where it has seen nothing,
    # a denoiser leaves grain.
    low, high = noise.mean - 4 * noise.std, noise.mean + _REACH * noise.std
    return jnp.linspace(low, high, s.sample_steps)


def _check(s: ClusterDDPM, spec: DataSpec) -> None:
    counts = (
        "latent width num_steps pretrain_iterations em_iterations mixture_iterations"
        " mixture_restarts sample_steps"
    )
    sizes = (
        "encoder_blocks pretrain_kl kl_weight rotate shift scale shear noise steps"
        " balance_iterations variance_floor reseed_below sample_temperature sample_guidance"
    )
    rules: list[Rule] = [
        (counts, lambda v: v >= 1, "must be at least 1"),
        ("log_snr_std learning_rate clip", lambda v: v > 0, "must be greater than 0"),
        (sizes, lambda v: v >= 0, "must not be negative"),
        (
            "uniform_noise drop_latent kl_warmup hold ema",
            lambda v: 0 <= v <= 1,
            "must lie between 0 and 1",
        ),
        ("adam_b2", lambda v: 0 <= v < 1, "must be at least 0 and below 1"),
        ("weight_prior", lambda v: v >= 1, "must be at least 1"),
        ("anchors", lambda v: v >= 2, "must be at least 2"),
        # Nothing but equal shares is above 1 / K for all, so that all would be split.
        ("scale reseed_below", lambda v: v < 1, "must be below 1"),
        ("multipliers encoder_multipliers", lambda v: v and min(v) >= 1, "needs a level"),
        ("sample_steps", lambda v: v <= s.num_steps, "must not exceed num_steps"),
    ]
    check_settings(s, rules)
    check_levels(s.attention, s.multipliers)
    official = s.network == "official" and spec.is_image
    if s.start == "layers" and (official or not s.drop_latent):
        remedy = "network=unet" if official else "drop_latent above 0"
        raise InputError(
            "--config.method.start=layers: needs a denoiser whose layers can be seen without a "
            f"latent; set --config.method.{remedy}, or --config.method.start=graph"
        )
    _check_weight(s)
    if s.sample_guidance and not s.drop_latent:
        raise InputError(
            f"--config.method.sample_guidance={s.sample_guidance}: needs a denoiser trained with "
            "--config.method.drop_latent above 0; train one, or set the guidance to 0"
        )


def _check_weight(s: ClusterDDPM) -> None:
    """Check that the weight of the KL, equation (5), is not that of a single step."""
    if s.uniform_noise < 1 or s.prediction != "eps" or not s.kl_weight:
        return
    weights = schedule.elbo_weights(_schedule(s), prediction=s.prediction)[1:]
    share = float(weights.max() / weights.sum())
    if share > 0.5:
        raise InputError(
            "--config.method.prediction=eps: with uniform_noise=1 the noisiest step of "
            f"noise_schedule={s.noise_schedule} has {share:.0%} of the weight of all steps, beside "
            "which the KL counts for nothing; set --config.method.prediction=v, or "
            "--config.method.noise_schedule=linear"
        )
