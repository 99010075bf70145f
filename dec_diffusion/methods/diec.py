"""DiEC: clusters from the inner features of a diffusion model (arXiv 2512.20905).

(1) pretraining  a denoiser minimises E |target - prediction(x_t, t)|^2, without any condition.
(2) features     h_l(x, t): the activation of layer l on x_t = alpha x + sigma eps, averaged over
                 fixed draws of eps, the same for every example, layer and timestep, in antithetic
                 pairs (eps, -eps); kept as a map of at most 4 x 4; projected to the principal
                 axes of a subset, e = A^T (h - mean), of variance 1 if whitened; every e then
                 scaled to the same length.
(3) search       (l*, t*) by a label-free score of k-means on e; see ``search``.
(4) map          z = e + W2 silu(W1 norm(e)), W2 zero at first. The centres mu start as the means
                 of K groups: the communities of the neighbour graph of all layers at t*, their e
                 side by side, see ``communities``; or k-means on e.
(5) assignment   q_ij ~ (1 + |z_i - mu_j|^2 / alpha)^(-(alpha + 1) / 2), and at intervals, over the
                 whole data set, the target p_ij ~ q_ij^2 / sum_i q_ij; see ``targets``. At first
                 the groups of the graph are the target, until the map has learnt them.
(6) clustering   minimises  KL(p | q) + structure * r + balance * [log K - H(mean q)] + denoise *
                 (1), where r is the mean of sum_j s_ij |z_i - z_j|^2 / 2 in units of twice the
                 variance of z over the batch, with s the adaptive neighbour graph of z, and e of
                 one fresh antithetic pair (or of two, and then + consistency * KL between their q).

Sources: the abstracts of versions 1 to 4 and Figure 1 of version 1 for the parts (layer and
timestep search, residual map, KL objective, adaptive graph and entropy, denoising at random
timesteps); the body of the paper was not available, so the form of (2), (4) and the weights
of (6) are ours. (5) is DEC's (Xie et al. 2016), there with alpha = 1; alpha = d - 1 after van der
Maaten 2009, "Learning a parametric embedding by preserving local structure". See docs/diec.md.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dec_diffusion import (
    communities,
    features,
    optimiser,
    pca,
    sampling,
    schedule,
    search,
    spread,
    targets,
)
from dec_diffusion.features import Denoiser
from dec_diffusion.kmeans import kmeans
from dec_diffusion.method import (
    DataSpec,
    EStage,
    Findings,
    Method,
    Phase,
    Rule,
    check_levels,
    check_neighbours,
    check_settings,
)
from dec_diffusion.networks import denoiser_network, residual_map
from dec_diffusion.pca import Projection
from dec_diffusion.schedule import Schedule
from dec_diffusion.search import Cell
from dec_diffusion.spread import Table
from dec_diffusion.types import (
    Array,
    Batch,
    Count,
    Float,
    InputError,
    Int,
    Metrics,
    Params,
    PRNGKeyArray,
    pytree,
)

_LEARN_START = 0.3  # part of fine-tuning in which the graph's groups are the target
_MOST_CLUSTERS = 2**15 - 1  # the labels of a search are int16
_GOLDEN = 2654435769  # 2^32 / 1.618...
_SNAPSHOT = 24  # images generated before fine-tuning, for comparison


@dataclasses.dataclass
class DiEC:
    """Settings of DiEC.

    Where a denoiser is imported, ``width``, ``multipliers``, ``blocks``, ``attention``,
    ``noise_schedule``, ``num_steps`` and ``prediction`` come from it.

    Attributes:
        num_clusters: K, or auto: `dec_diffusion.num_clusters` chooses it before training.
        width: channels of the first level of the U-Net (hidden units for vectors).
        multipliers: channels of each level in units of ``width``.
        blocks: residual blocks per level and direction.
        attention: levels that attend.
        dtype: of activations, ``float32`` or ``bfloat16``.
        noise_schedule: ``linear`` (betas 1e-4 to 0.02) or ``cosine``.
        num_steps: T of that schedule; timesteps count from 0, the cleanest.
        prediction: what the denoiser is asked for, ``eps``, ``v`` or ``x0``.
        held_out: share of examples that the denoiser is never trained on, and is tested on.
        pretrain_iterations: of the first phase.
        layer: name of the layer to use, ``middle`` for the bottleneck; empty to search. The
            groups of the ``graph`` are those of all layers whichever it is.
        timestep: timestep to use; -1 to search.
        strategy: ``grid`` compares all layers at all timesteps; ``golden`` and ``ternary``
            narrow the timestep down for one given layer.
        score: by what cells are compared, equations (1) to (5) of ``search``.
        timesteps: of the grid.
        refine: further timesteps next to the best of the grid.
        largest_timestep: end of the search, as a share of T.
        subset: examples that the search uses.
        draws: of noise, over which features are averaged; an even number.
        pool: keep the ``layout`` of feature maps, at most 4 x 4, or take the ``average``.
        dims: principal axes kept.
        whiten: give all of them the same variance.
        unit: give all examples the same length after that, so that directions are clustered.
        search_restarts: of k-means in every cell of the search.
        restarts: of k-means at the chosen cell, and of the groups below, on all the data.
        start: the partition that training begins with: ``graph``, the communities of the
            neighbour graph of all layers at the chosen timestep, or ``kmeans`` at the chosen
            cell, which suits groups of very different sizes better.
        frozen: train only the residual map and the centres, on features computed once.
        iterations: of the second phase; each ends with new targets.
        steps: gradient steps per iteration; 0 is one pass over the data.
        target: ``student`` as in equation (5), or ``sinkhorn``, which makes clusters equal.
        alpha: degrees of freedom of the kernel in (5); None is dims - 1, at which distances in
            many dimensions still tell clusters apart (1 in DEC).
        structure: weight of the graph term in (6).
        neighbours: of each example in that graph.
        anchors: examples among which neighbours are looked for: all, or as many drawn from more.
        balance: weight of the balance term.
        denoise: weight of the denoising loss, a mean over dimensions, while clustering.
        consistency: weight of the agreement between two draws of noise.
        tolerance: the second phase ends when fewer labels than this share change.
        hidden: units of the residual map.
        pretrain_rate: learning rate of pretraining.
        learning_rate: of the residual map and the centres.
        denoiser_rate: of the denoiser while clustering, in units of ``learning_rate``.
        decay: cosine decay of learning rates to 5%.
        clip: global norm at which gradients are clipped.
        ema: decay of the averaged weights.
        adam_b2: decay of Adam's second moment.
        sample_steps: denoiser calls per generated example.
    """

    PRETRAINED: ClassVar[tuple[str, ...]] = (
        "width",
        "multipliers",
        "blocks",
        "attention",
        "noise_schedule",
        "num_steps",
        "prediction",
    )
    """Settings that belong to the denoiser: those of a pretrained one must be the same."""

    num_clusters: Count = 10
    width: int = 16
    multipliers: tuple[int, ...] = (1, 2, 2)
    blocks: int = 1
    attention: tuple[int, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    noise_schedule: schedule.Name = "linear"
    num_steps: int = 1000
    prediction: Literal["eps", "v", "x0"] = "eps"
    held_out: float = 0.05
    pretrain_iterations: int = 30
    layer: str = ""
    timestep: int = -1
    strategy: search.Strategy = "grid"
    score: search.Score = "rank"
    timesteps: int = 21
    refine: int = 6
    largest_timestep: float = 0.5
    subset: int = 2000
    draws: int = 4
    pool: features.Pool = "layout"
    dims: int = 24
    whiten: bool = True
    unit: bool = True
    search_restarts: int = 4
    restarts: int = 20
    start: Literal["graph", "kmeans"] = "graph"
    frozen: bool = False
    iterations: int = 12
    steps: int = 50
    target: Literal["student", "sinkhorn"] = "student"
    alpha: float | None = None
    structure: float = 0.1
    neighbours: int = 10
    anchors: int = 65536
    balance: float = 0.1
    denoise: float = 1.0
    consistency: float = 0.0
    tolerance: float = 1e-3
    hidden: int = 256
    pretrain_rate: float = 2e-3
    learning_rate: float = 3e-3
    denoiser_rate: float = 0.03
    decay: bool = True
    clip: float = 1000.0
    ema: float = 0.99
    adam_b2: float = 0.99
    sample_steps: int = 50

    @property
    def freedom(self) -> float:
        """alpha of equation (5), with its default filled in."""
        return self.alpha or max(1.0, self.dims - 1.0)

    def build(self, spec: DataSpec) -> Method:
        """Make the method for data of this shape.

        Raises:
            InputError: a setting is out of range; names it and the remedy.
        """
        _check(self)
        architecture = spec.pretrained and spec.pretrained.architecture
        if architecture:
            return _method(self, features.imported(architecture, spec), spec)
        network = denoiser_network(
            spec.shape,
            width=self.width,
            multipliers=self.multipliers,
            blocks=self.blocks,
            attention=self.attention,
            dtype=self.dtype,
        )
        grid = schedule.named(self.noise_schedule, self.num_steps)
        denoiser = Denoiser(network, grid, self.prediction)
        return _method(self, denoiser, spec)


@pytree
class SearchMap:
    """All cells of a search, in the order of evaluation.

    Attributes:
        timesteps: int32 [e].
        cells: scores [e, layers], labels [e, layers, m].
        consensus: [e, layers], equation (4) of ``search``.
        value: [e, layers], by which cells were compared.
        examples: int32 [m], which examples were used.
        best: int32, the row of ``timesteps`` that was chosen.
    """

    timesteps: Int[Array, " e"]
    cells: Cell
    consensus: Float[Array, "e layers"]
    value: Float[Array, "e layers"]
    examples: Int[Array, " m"]
    best: Int[Array, ""]


@pytree
class Clusters:
    """What moves in closed form; n is the number of examples.

    Attributes:
        layer, timestep: int32, the chosen cell.
        projection: from pooled features to e, equation (2).
        features: e of every example if the denoiser is frozen, else empty.
        anchors: z of the examples among which neighbours are.
        target: p, equation (5), [n, k].
        neighbours, similarity: the graph, [n, g], as places among the anchors and s of (6).
        labels: int32 [n], the assignment that belongs to the target.
        kmeans, start: int32 [n], k-means at the chosen cell, and what training begins with.
        denoising: squared error on held-out examples (all, if none are) before fine-tuning and
            now, a mean over dimensions.
        snapshot: examples generated before fine-tuning.
        map: of the search.
        reach: the largest absolute values [d] that vectors have, None for images.
    """

    layer: Int[Array, ""]
    timestep: Int[Array, ""]
    projection: Projection
    features: Float[Array, "f d"]
    anchors: Float[Array, "a d"]
    target: Table
    neighbours: Table
    similarity: Table
    labels: Table
    kmeans: Table
    start: Table
    denoising: Float[Array, " 2"]
    snapshot: Float[Array, "m *s"]
    map: SearchMap
    reach: Float[Array, " d"] | None


def _method(s: DiEC, denoiser: Denoiser, spec: DataSpec) -> Method:
    """The functions of the method; equation numbers as at the top of the file."""
    network, grid = denoiser.network, denoiser.grid
    n, k, d = spec.num_examples, s.num_clusters, s.dims
    m, alpha = min(s.subset, n), s.freedom
    residual = residual_map(s.hidden)
    steps = s.steps or spec.steps_per_epoch
    extract = features.describe(denoiser, spec.shape, pool=s.pool, draws=s.draws)
    layers, width = extract.layers, extract.width
    coarse = _timesteps(s, grid)
    _check_fit(s, layers, spec)
    given_layer = layers.index(s.layer) if s.layer else None
    held_out = np.random.default_rng(0).random(n) < s.held_out
    anchors = communities.some(n, s.anchors)

    def level(timestep: Array, b: int) -> Array:
        return jnp.full(b, grid.log_snr[timestep])

    def projected(params: Params, cluster: Clusters, x: Array) -> Array:
        """e of equation (2), [b, d]."""
        h = features.halves(extract, params["denoiser"], x, cluster.timestep, cluster.layer)
        return pca.project(cluster.projection, h.mean(0), unit=s.unit)

    def assign(params: Params, e: Array) -> tuple[Array, Array]:
        """z and log q, equations (4) and (5)."""
        z = residual.apply(params["map"], e)
        return z, targets.log_student_t(z, params["centers"], alpha=alpha)

    def init(key: PRNGKeyArray, batch: Batch) -> tuple[Params, Clusters]:
        denoiser_key, map_key = jax.random.split(key)
        x = batch["image"]
        params = {
            "denoiser": network.init(denoiser_key, x, jnp.zeros(x.shape[0])),
            "map": residual.init(map_key, jnp.zeros((1, d))),
            "centers": jnp.zeros((k, d)),
        }
        e = search.evaluations(coarse, strategy=s.strategy, refine=s.refine)
        zeros, none = jnp.zeros((e, len(layers))), jnp.int32(0)
        cells = Cell(zeros, zeros, zeros, zeros, jnp.zeros((*zeros.shape, m), jnp.int16))
        return params, Clusters(
            layer=none,
            timestep=none,
            projection=Projection(jnp.zeros(width), jnp.zeros((width, d)), jnp.zeros(d)),
            features=jnp.zeros((n if s.frozen else 0, d)),
            anchors=jnp.zeros((len(anchors), d)),
            target=Table(jnp.full((n, k), 1.0 / k), n),
            neighbours=Table(jnp.zeros((n, s.neighbours), jnp.int32), n),
            similarity=Table(jnp.zeros((n, s.neighbours)), n),
            labels=Table(jnp.zeros(n, jnp.int32), n),
            kmeans=Table(jnp.zeros(n, jnp.int32), n),
            start=Table(jnp.zeros(n, jnp.int32), n),
            denoising=jnp.zeros(2),
            snapshot=jnp.zeros((_SNAPSHOT, *spec.shape)),
            map=SearchMap(
                jnp.zeros(e, jnp.int32), cells, zeros, zeros, jnp.zeros(m, jnp.int32), none
            ),
            reach=None if spec.is_image else jnp.zeros(spec.shape),
        )

    # -- denoising --

    def noised(x: Array, key: PRNGKeyArray) -> tuple[Array, Array, Array]:
        """x_t, its log-SNR and the target, at random timesteps."""
        level_key, noise_key = jax.random.split(key)
        log_snr = grid.log_snr[schedule.sample_steps(level_key, x.shape[0], grid)]
        eps = jax.random.normal(noise_key, x.shape)
        goal = schedule.target(x, eps, log_snr, prediction=denoiser.prediction)
        return schedule.add_noise(x, eps, log_snr), log_snr, goal

    def error(goal: Array, out: Array) -> Array:
        return jnp.square(goal - out).reshape(out.shape[0], -1).mean(1)

    def trained(batch: Batch) -> Array:
        """Weights that leave out what the denoiser must not see."""
        return batch["weight"] * (1.0 - jnp.asarray(held_out, jnp.float32)[batch["index"]])

    def pretrain_loss(
        params: Params, cluster: Clusters, batch: Batch, key: PRNGKeyArray, progress: Array
    ) -> tuple[Array, tuple[Clusters, Metrics]]:
        x_t, log_snr, goal = noised(batch["image"], key)
        out = network.apply(params["denoiser"], x_t, log_snr)
        loss = targets.mean(error(goal, out), trained(batch))
        return loss, (cluster, {"denoising": loss})

    # -- search, equations (2) and (3) --

    def images(params: Params, cluster: Clusters, batch: Batch, key: PRNGKeyArray) -> Array:
        return batch["image"]

    def begin(
        params: Params,
        cluster: Clusters,
        x: Array,
        weight: Array,
        key: PRNGKeyArray,
        progress: Array,
    ) -> tuple[Params, Clusters, Metrics]:
        subset_key, score_key, axes_key, kmeans_key, sample_key = jax.random.split(key, 5)
        graph_key = jax.random.fold_in(kmeans_key, 1)
        x, weight = spread.trimmed((x, weight), n)
        examples = jax.random.permutation(subset_key, n)[:m].astype(jnp.int32)
        some = Table(x, n).take(examples)
        timesteps, cells = explore(params, some, score_key)
        agreed, value = search.compare(cells, k, score=s.score, layer=given_layer)
        best, layer = jnp.unravel_index(value.argmax(), value.shape)
        layer, timestep = layer.astype(jnp.int32), timesteps[best]

        projections, everywhere = all_projected(params, x, some, timestep, axes_key)
        projection, e = jax.tree.map(lambda leaf: leaf[layer], (projections, everywhere))
        found = kmeans(kmeans_key, e, k, weight=weight, restarts=s.restarts, max_iterations=100)
        labels, centers = found.labels.astype(jnp.int32), found.centers
        start = labels
        if s.start == "graph":
            start = communities.partition(
                graph_key,
                jnp.moveaxis(everywhere, 0, 1).reshape(x.shape[0], -1),
                k,
                weight=weight,
                anchors=jnp.asarray(anchors, jnp.int32),
                restarts=s.restarts,
            ).labels
            member = jax.nn.one_hot(start, k) * weight[:, None]
            sums = jnp.matmul(member.T, e, precision="highest")
            centers = sums / jnp.maximum(member.sum(0), 1.0)[:, None]
        reach = None if spec.is_image else jnp.max(jnp.abs(x) * weight[:, None], 0)
        cluster = dataclasses.replace(
            cluster,
            layer=layer,
            timestep=timestep,
            projection=projection,
            features=e[:n] if s.frozen else cluster.features,
            kmeans=Table(labels, n),
            start=Table(start, n),
            labels=Table(start, n),
            snapshot=draw(params, sample_key, _SNAPSHOT, reach),
            map=SearchMap(timesteps, cells, agreed, value, examples, best.astype(jnp.int32)),
            reach=reach,
        )
        return {**params, "centers": centers}, cluster, {}

    def all_projected(
        params: Params, x: Array, some: Array, timestep: Array, key: PRNGKeyArray
    ) -> tuple[Projection, Array]:
        """Projections of all layers, fitted to some, and what they make of x, e, [layers, n, d]."""

        def fit(h: Array) -> Projection:
            found = pca.principal(key, h, d)
            return pca.whiten(found) if s.whiten else found

        def at_timestep(block: Array) -> Array:
            return features.halves(extract, params["denoiser"], block, timestep).mean(0)

        def project(block: Array) -> Array:
            apply = functools.partial(pca.project, unit=s.unit)
            return jax.vmap(apply)(projections, at_timestep(block))

        projections = jax.vmap(fit)(features.in_blocks(at_timestep, some))
        return projections, features.in_blocks(project, x)

    def explore(params: Params, x: Array, key: PRNGKeyArray) -> tuple[Array, Cell]:
        """Timesteps and the scores of all layers at each."""

        def evaluate(timestep: Array) -> Cell:
            halves = features.in_blocks(
                lambda block: features.halves(extract, params["denoiser"], block, timestep), x
            )
            return jax.vmap(
                lambda h: search.score_cell(
                    key, h, k, dims=d, whitened=s.whiten, unit=s.unit, restarts=s.search_restarts
                ),
                in_axes=1,
            )(halves)

        return search.explore(
            evaluate,
            coarse,
            k,
            strategy=s.strategy,
            refine=s.refine,
            score=s.score,
            layer=given_layer,
        )

    # -- clustering, equations (5) and (6) --

    def loss(
        params: Params, cluster: Clusters, batch: Batch, key: PRNGKeyArray, progress: Array
    ) -> tuple[Array, tuple[Clusters, Metrics]]:
        index, weight = batch["index"], batch["weight"]
        metrics: dict[str, Array] = {}
        if s.frozen:
            seen, denoising = [cluster.features[index]], jnp.float32(0.0)
        else:
            seen, denoising = views(params, cluster, batch, key)
            metrics["denoising"] = denoising
        out = [assign(params, e) for e in seen]
        z, log_q = out[0]
        clustering = targets.mean(targets.kl(cluster.target.take(index), log_q), weight)
        near, similarity = cluster.neighbours.take(index), cluster.similarity.take(index)
        structure = targets.graph_loss(z, cluster.anchors[near], similarity, weight)
        balance = targets.balance(log_q, weight)
        total = clustering + s.structure * structure + s.balance * balance + s.denoise * denoising
        if len(out) > 1:
            other = out[1][1]
            apart = 0.5 * (
                targets.kl(jax.lax.stop_gradient(jnp.exp(log_q)), other)
                + targets.kl(jax.lax.stop_gradient(jnp.exp(other)), log_q)
            )
            metrics["disagreement"] = targets.mean(apart, weight)
            total += s.consistency * metrics["disagreement"]
        metrics |= {"kl": clustering, "structure": structure, "balance": balance}
        return total, (cluster, metrics)

    def views(
        params: Params, cluster: Clusters, batch: Batch, key: PRNGKeyArray
    ) -> tuple[list[Array], Array]:
        """e of one or two fresh pairs of draws, and the denoising error, by one call."""
        x, b = batch["image"], batch["image"].shape[0]
        noise_key, denoise_key = jax.random.split(key)
        count = 2 if s.consistency else 1
        log_snr = level(cluster.timestep, b)
        eps = jax.random.normal(noise_key, (count, *x.shape))
        x_t, random_level, goal = noised(x, denoise_key)
        # In pairs, like the features that the centres were found on: one draw alone is noisier,
        # and at the same length that much less signal.
        inputs = [schedule.add_noise(x, sign * one, log_snr) for one in eps for sign in (1, -1)]
        out, h = features.all_layers(
            extract,
            params["denoiser"],
            jnp.concatenate([*inputs, x_t]),
            jnp.concatenate([log_snr] * len(inputs) + [random_level]),
        )
        h = h[cluster.layer, : len(inputs) * b].reshape(count, 2, b, width).mean(1)
        e = pca.project(cluster.projection, h, unit=s.unit)
        return list(e), targets.mean(error(goal, out[len(inputs) * b :]), trained(batch))

    def collect(params: Params, cluster: Clusters, batch: Batch, key: PRNGKeyArray) -> Any:
        x, index = batch["image"], batch["index"]
        e = cluster.features[index] if s.frozen else projected(params, cluster, x)
        # The same noise and timestep for an example at every call.
        log_snr = grid.log_snr[(_even(index) * grid.log_snr.shape[0]).astype(jnp.int32)]
        eps = jnp.broadcast_to(features.fixed_noise(extract)[0], x.shape)
        goal = schedule.target(x, eps, log_snr, prediction=denoiser.prediction)
        out = network.apply(params["denoiser"], schedule.add_noise(x, eps, log_snr), log_snr)
        return assign(params, e), error(goal, out)

    def update(
        params: Params,
        cluster: Clusters,
        collected: Any,
        weight: Array,
        key: PRNGKeyArray,
        progress: Array,
    ) -> tuple[Params, Clusters, Metrics]:
        ((z, log_q), errors), weight = spread.trimmed((collected, weight), n)
        make = {"student": targets.target_distribution, "sinkhorn": targets.sinkhorn_target}
        target, labels = make[s.target](log_q, weight), log_q.argmax(-1).astype(jnp.int32)
        iteration, learnt = jnp.round(progress * s.iterations), 0
        if s.start == "graph":
            # Nearest centres are not the groups of the graph: the map learns these first.
            learnt = math.ceil(_LEARN_START * s.iterations)
            given = jax.nn.one_hot(cluster.start.values, k)
            target = jnp.where(iteration >= learnt, target, given)
        change = targets.label_change(labels, cluster.labels.values, weight)
        # Padded here and not by the program, which would move rows between devices for it.
        tested = np.pad(held_out if held_out.any() else ~held_out, (0, len(weight) - n))
        now = targets.mean(errors, jnp.asarray(tested, jnp.float32))
        before = jnp.where(progress > 0, cluster.denoising[0], now)
        points = Table(z, n).take(jnp.asarray(anchors, jnp.int32))
        neighbours, similarity = targets.neighbour_graph(
            z, s.neighbours, weight=weight, among=(points, jnp.asarray(anchors))
        )
        cluster = dataclasses.replace(
            cluster,
            anchors=points,
            target=Table(target, n),
            neighbours=Table(neighbours, n),
            similarity=Table(similarity, n),
            labels=Table(labels, n),
            denoising=jnp.stack([before, now]),
        )
        info = {
            "label_change": change,
            "held_out_denoising": now,
            "confidence": targets.mean(jnp.exp(log_q.max(-1)), weight),
            # Labels may settle while the groups are learnt: only then the target is theirs.
            "converged": (iteration > learnt) & (change < s.tolerance),
        }
        return params, cluster, info

    def predict(params: Params, cluster: Clusters, batch: Batch, key: PRNGKeyArray) -> Array:
        return assign(params, projected(params, cluster, batch["image"]))[1]

    def embed(params: Params, cluster: Clusters, batch: Batch, key: PRNGKeyArray) -> Array:
        return assign(params, projected(params, cluster, batch["image"]))[0]

    # -- generation --

    def draw(params: Params, key: PRNGKeyArray, count: int, reach: Array | None) -> Array:
        def part(key: PRNGKeyArray, rows: Array) -> Array:
            return sampling.ddim(denoise, levels, key, (rows.shape[0], *spec.shape), clip=clip)

        def denoise(x_t: Array, log_snr: Array) -> Array:
            out = network.apply(params["denoiser"], x_t, log_snr)
            return schedule.to_x0(out, x_t, log_snr, prediction=denoiser.prediction)

        levels = sampling.subsample(grid, min(s.sample_steps, grid.log_snr.shape[0]))
        # Dividing by a small signal, as for eps, would else send vectors far from all data.
        clip = 1.0 if reach is None else reach
        return sampling.in_parts(part, key, jnp.arange(count))

    def sample(params: Params, cluster: Clusters, key: PRNGKeyArray, component: Array) -> Array:
        """Twice as many examples as asked for are drawn, all without a condition.

        Each request of a cluster takes the next of the most typical for it; -1 takes the one in
        its own place.
        """
        count = component.shape[0]
        x = draw(params, key, 2 * count, cluster.reach)

        def judge(_: PRNGKeyArray, x: Array) -> Array:
            return assign(params, projected(params, cluster, x))[1]

        log_q = sampling.in_parts(judge, key, x)
        ranking = jnp.argsort(-log_q, axis=0)
        wanted = jax.nn.one_hot(component, k, dtype=jnp.int32)
        turn = jnp.sum((jnp.cumsum(wanted, 0) - 1) * wanted, -1)
        chosen = jnp.where(component < 0, jnp.arange(count), ranking[turn, component])
        return x[chosen]

    def findings(cluster: Clusters) -> Findings:
        order = np.argsort(cluster.map.timesteps, kind="stable")
        cells, best = cluster.map.cells, int(cluster.map.best)
        graph = s.start == "graph"
        started = {"graph_at_timestep": np.asarray(cluster.start.values)} if graph else {}
        return Findings(
            partitions={"kmeans_at_cell": np.asarray(cluster.kmeans.values)} | started,
            figures={
                "denoising_before": float(cluster.denoising[0]),
                "denoising_after": float(cluster.denoising[1]),
            },
            samples=np.asarray(cluster.snapshot),
            rows=tuple(int(t) for t in np.asarray(cluster.map.timesteps)[order]),
            columns=layers,
            scores={
                name: np.asarray(score)[order]
                for name, score in (
                    ("value", cluster.map.value),
                    ("chi", cells.chi),
                    ("corrected", cells.corrected),
                    ("stability", cells.stability),
                    ("consensus", cluster.map.consensus),
                    ("dimensions", cells.dimensions),
                )
            },
            cells=np.asarray(cells.labels)[order],
            examples=np.asarray(cluster.map.examples),
            chosen=(int(np.flatnonzero(order == best)[0]), int(cluster.layer)),
            boundary=bool(search.at_boundary(cluster.map.timesteps, cluster.map.best)),
        )

    phases = {
        "pretrain": Phase(
            pretrain_loss,
            _optimiser(s, s.pretrain_iterations * steps, s.pretrain_rate),
            s.pretrain_iterations,
            steps,
            ema=s.ema,
            assigns=False,
        ),
        "cluster": Phase(
            loss,
            _fine_tuning(s, s.iterations * steps),
            s.iterations,
            steps,
            begin=EStage(images, begin),
            refresh=EStage(collect, update),
            ema=s.ema,
        ),
    }
    if spec.pretrained:
        del phases["pretrain"]
    return Method(init, phases, predict, embed, sample, findings)


def _check_fit(s: DiEC, layers: tuple[str, ...], spec: DataSpec) -> None:
    """Check the settings that depend on the network and on the number of examples."""
    if s.layer and s.layer not in layers:
        raise InputError(
            f"--config.method.layer={s.layer}: choose one of {', '.join(layers)}, or none to search"
        )
    check_neighbours(s.neighbours, s.anchors, spec)


def _even(index: Int[Array, " n"]) -> Float[Array, " n"]:
    """Numbers in [0, 1), evenly spread for consecutive rows: multiples of the golden ratio, mod 1.

    In integers, because of rows beyond a million float32 would leave few different ones.
    """
    return (index.astype(jnp.uint32) * jnp.uint32(_GOLDEN) >> 8) / 2**24


def _timesteps(s: DiEC, grid: Schedule) -> list[int]:
    """Where the search looks first."""
    last = grid.log_snr.shape[0] - 1
    if s.timestep > last:
        raise InputError(
            f"--config.method.timestep={s.timestep}: the last step of the schedule is {last}; "
            "choose one up to it, or -1 to search"
        )
    if s.timestep >= 0:
        return [s.timestep]
    return sorted({round(t) for t in np.linspace(0, s.largest_timestep * last, s.timesteps)})


def _optimiser(s: DiEC, steps: int, rate: float) -> optax.GradientTransformation:
    return optimiser.adam(steps, learning_rate=rate, decay=s.decay, clip=s.clip, b2=s.adam_b2)


def _fine_tuning(s: DiEC, steps: int) -> optax.GradientTransformation:
    """Adam, with smaller steps for the denoiser; none if it is frozen."""
    rate = 0.0 if s.frozen else s.denoiser_rate

    def scale(updates: Any, params: Any = None) -> Any:
        slow = jax.tree.map(lambda u: rate * u, updates["denoiser"])
        return {**updates, "denoiser": slow}

    return optax.chain(_optimiser(s, steps, s.learning_rate), optax.stateless(scale))


def _check(s: DiEC) -> None:
    counts = (
        "num_clusters width blocks pretrain_iterations timesteps draws dims search_restarts"
        " restarts iterations neighbours anchors hidden sample_steps"
    )
    sizes = "refine steps structure balance denoise consistency denoiser_rate"
    rules: list[Rule] = [
        ("num_steps", lambda v: v >= 2, "must be at least 2"),
        (counts, lambda v: v >= 1, "must be at least 1"),
        ("pretrain_rate learning_rate clip", lambda v: v > 0, "must be greater than 0"),
        (sizes, lambda v: v >= 0, "must not be negative"),
        ("held_out tolerance", lambda v: 0 <= v < 1, "must be at least 0 and below 1"),
        ("adam_b2", lambda v: 0 <= v < 1, "must be at least 0 and below 1"),
        ("ema largest_timestep", lambda v: 0 <= v <= 1, "must lie between 0 and 1"),
        ("multipliers", lambda v: v and min(v) >= 1, "needs a level"),
        ("alpha", lambda v: v is None or v > 0, "must be greater than 0, or none"),
        ("draws", lambda v: v % 2 == 0, "must be even: noise is drawn in antithetic pairs"),
        ("num_clusters", lambda v: v <= _MOST_CLUSTERS, f"must not exceed {_MOST_CLUSTERS}"),
        ("subset", lambda v: v > s.num_clusters, "must exceed num_clusters"),
        ("timestep", lambda v: v >= -1, "must be a step of the schedule, or -1"),
        ("sample_steps", lambda v: v <= s.num_steps, "must not exceed num_steps"),
    ]
    check_settings(s, rules)
    check_levels(s.attention, s.multipliers)
    if s.frozen and s.consistency:
        raise InputError(
            f"--config.method.consistency={s.consistency}: compares draws of noise, of which a "
            "frozen denoiser sees none; set it to 0, or --config.method.frozen=false"
        )
    if s.strategy != "grid" and (not s.layer or s.score in ("rank", "consensus")):
        raise InputError(
            f"--config.method.strategy={s.strategy}: narrows one layer down by one score; set "
            "--config.method.layer=middle and --config.method.score=chi, corrected or stability"
        )
