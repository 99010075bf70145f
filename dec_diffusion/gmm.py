"""Gaussian mixtures over points or over Gaussian posteriors, fitted by expectation-maximisation.

An example is a diagonal Gaussian q = N(m, diag v), such as an encoder's posterior, or a point
(v = 0). The mixture has weights pi_c and components N(mu_c, S_c), S_c diagonal or full.

(1) expected log joint   l_c = log pi_c + E_{z~q} log N(z; mu_c, S_c)
                             = log pi_c - 1/2 [ d log 2 pi + log|S_c| + tr(S_c^-1 diag v)
                                                + (m - mu_c)' S_c^-1 (m - mu_c) ]
(2) responsibilities     g*_c = exp(l_c) / sum_c' exp(l_c')
(3) divergence           KL_c = KL(q || N_c) = -H(q) - (l_c - log pi_c)
(4) bound                KL(q || mixture) <= -log sum_c pi_c exp(-KL_c)
                                          <= sum_c g_c KL_c + KL(g || pi)  for every g,
                         the second with equality at g = g*
(5) M-step               N_c = sum_i w_i g*_ic,  pi_c = N_c / sum_c' N_c',
                         mu_c = sum_i w_i g*_ic m_i / N_c,
                         S_c = sum_i w_i g*_ic [ (m_i - mu_c)(m_i - mu_c)' + diag v_i ] / N_c
(6) balanced     log pi_c <- log pi_c - log N_c, up to a constant, in place of pi_c in (5)

Alternating (2) and (5) never lowers the mean of log sum_c exp(l_c), so never raises the mean of the
middle term of (4), since H(q) does not depend on the mixture. With points this is textbook EM, and
log sum_c exp(l_c) is the log-likelihood. (4) is the variational bound of Hershey and Olsen (2007).

Everything works in the dtype of the data. Second moments are taken about the current means, or of
much data about a point among them while that is accurate (``products``), so that float32 suffices
far from the origin. Rows of weight 0 must be finite and have no effect.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dec_diffusion import kmeans, products
from dec_diffusion.types import Array, Float, InputError, Int, PRNGKeyArray, Shaped, pytree

# Accelerators multiply float32 matrices in a shorter format unless told otherwise.
_matmul = functools.partial(jnp.matmul, precision="highest")
# Above this many elements of [n, k, d] the components take turns instead of being broadcast.
_BROADCAST_LIMIT = 2**22
# Half of a normal distribution, cut at its mean, has its mean at this many variances (squared).
_HALF_NORMAL = 2 / math.pi


@pytree
class Mixture:
    """A Gaussian mixture; ``covariance`` holds variances [k, d] or full matrices [k, d, d]."""

    log_weights: Float[Array, " k"]
    means: Float[Array, "k d"]
    covariance: Float[Array, "k d"] | Float[Array, "k d d"]


@pytree
class Statistics:
    """What (5) needs, as sums over examples: those of two halves of the data add up.

    ``first`` and ``second`` are moments about the means of the mixture they were computed with.
    """

    count: Float[Array, " k"]
    first: Float[Array, "k d"]
    second: Float[Array, "k d"] | Float[Array, "k d d"]
    log_likelihood: Float[Array, ""]
    weight: Float[Array, ""]


@pytree
class FitResult:
    """A mixture with the evidence of its convergence.

    ``log_likelihood[i]`` is the mean of log sum_c exp(l_c) entering iteration i; after the stop it
    repeats the last value.
    """

    mixture: Mixture
    log_likelihood: Float[Array, " iterations"]
    iterations: Int[Array, ""]
    converged: Shaped[Array, ""]


def log_joint(
    mixture: Mixture, mean: Float[Array, "n d"], variance: Float[Array, "n d"] | None = None
) -> Float[Array, "n k"]:
    """The expected log joint l_c of (1), in nats; ``variance`` None means points."""
    return mixture.log_weights + _log_density(mixture, mean, variance)


def log_responsibilities(
    mixture: Mixture, mean: Float[Array, "n d"], variance: Float[Array, "n d"] | None = None
) -> tuple[Float[Array, "n k"], Float[Array, " n"]]:
    """The logarithms of g* (2), and of its normaliser sum_c exp(l_c)."""
    joint = log_joint(mixture, mean, variance)
    norm = jax.nn.logsumexp(joint, axis=1)
    return joint - norm[:, None], norm


def predict(
    mixture: Mixture, mean: Float[Array, "n d"], variance: Float[Array, "n d"] | None = None
) -> Int[Array, " n"]:
    """The most responsible component of each example."""
    return jnp.argmax(log_joint(mixture, mean, variance), axis=1)


def log_likelihood(
    mixture: Mixture,
    mean: Float[Array, "n d"],
    variance: Float[Array, "n d"] | None = None,
    weight: Float[Array, " n"] | None = None,
    *,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """The weighted mean over examples of log sum_c exp(l_c), in nats."""
    weight = _weight(weight, mean)
    _, norm = log_responsibilities(mixture, mean, variance)
    total, count = _psum((jnp.sum(weight * norm), jnp.sum(weight)), axis_name)
    return total / jnp.maximum(count, 1e-30)


def kl_to_components(
    mixture: Mixture, mean: Float[Array, "n d"], variance: Float[Array, "n d"]
) -> Float[Array, "n k"]:
    """KL(q || N_c) in nats (3), in closed form; ``variance`` must be positive."""
    return -_entropy(variance)[:, None] - _log_density(mixture, mean, variance)


def mixture_kl_bound(
    mixture: Mixture, mean: Float[Array, "n d"], variance: Float[Array, "n d"]
) -> Float[Array, " n"]:
    """The middle term of (4), in nats: the bound of KL(q || mixture) that is least over g.

    Its gradient is that of the right-hand side with g = g* held fixed.
    """
    return -_entropy(variance) - log_responsibilities(mixture, mean, variance)[1]


def statistics(
    mixture: Mixture,
    mean: Float[Array, "n d"],
    variance: Float[Array, "n d"] | None = None,
    weight: Float[Array, " n"] | None = None,
    *,
    axis_name: str | None = None,
) -> Statistics:
    """The E-step: the sums that (5) needs, over all devices when ``axis_name`` is given."""
    weight = _weight(weight, mean)
    parts = mixture.log_weights, mixture.means, mixture.covariance, mean, variance, weight
    if mixture.covariance.ndim == 2 and not _small(mixture.means.shape[0], mean):
        close = products.holds(mixture.means, mixture.covariance)
        sums: products.Sums = jax.lax.cond(close, products.sums, _sums, *parts)
    else:
        sums = _sums(*parts)
    return _psum(Statistics(*sums, weight=jnp.sum(weight)), axis_name)


def _sums(
    log_weights: Array,
    means: Array,
    covariance: Array,
    mean: Array,
    variance: Array | None,
    weight: Array,
) -> products.Sums:
    """As ``products.sums``, from differences to each mean: slower, accurate always."""
    mixture = Mixture(log_weights, means, covariance)
    log_resp, norm = log_responsibilities(mixture, mean, variance)
    resp = jnp.exp(log_resp) * weight[:, None]
    first, second = _moments(mixture, resp, mean, variance)
    return jnp.sum(resp, axis=0), first, second, jnp.sum(weight * norm)


def add(one: Statistics, other: Statistics) -> Statistics:
    """The statistics of the union of two sets of examples, under the same mixture."""
    return jax.tree.map(jnp.add, one, other)


def update(
    mixture: Mixture,
    stats: Statistics,
    *,
    reg_covar: float = 1e-6,
    variance_floor: float = 0.0,
    weight_prior: float = 1.0,
    balance: float = 0.0,
) -> Mixture:
    """The M-step (5), with guards against degenerate components.

    Args:
      mixture: the mixture ``stats`` were computed with; a component that no example belongs to
        keeps its mean and covariance.
      stats: sums over all examples.
      reg_covar: added to the variances, in squared units of the data.
      variance_floor: least variance, as a fraction of the variance of the whole data along each
        axis (full covariances: in every direction of the data standardised axis by axis).
      weight_prior: alpha >= 1 of a symmetric Dirichlet prior; pi_c is proportional to
        N_c + alpha - 1, which keeps it above zero for alpha > 1.
      balance: b in [0, 1]; 0 is maximum likelihood, 1 makes components share the data equally.
        In between log pi_c is the average, by b, of log N_c and of (6), one Sinkhorn step, whose
        fixed point has N_c equal for all c.
    """
    tiny = 10 * jnp.finfo(mixture.means.dtype).eps
    alive = stats.count > tiny
    count = jnp.where(alive, stats.count, 1)
    shift = stats.first / _per(count, stats.first)
    scatter = stats.second / _per(count, stats.second) - _square(shift, mixture)
    means = jnp.where(_per(alive, shift), mixture.means + shift, mixture.means)
    covariance = jnp.where(_per(alive, scatter), scatter, mixture.covariance)

    share = stats.count / jnp.maximum(jnp.sum(stats.count), tiny)
    # The centre is a difference from one of the means, lest means near 1000 cost digits.
    offset = means - means[0]
    offset = offset - _matmul(share, offset)
    pooled = jnp.maximum(_matmul(share, _diagonal(covariance, mixture) + offset**2), 0)
    if covariance.ndim == 2:
        covariance = jnp.maximum(jnp.maximum(covariance, 0) + reg_covar, variance_floor * pooled)
    else:
        covariance = covariance + reg_covar * jnp.eye(means.shape[1], dtype=means.dtype)
        covariance = jax.lax.cond(
            variance_floor > 0,
            lambda full: _floor_full(full, pooled, variance_floor),
            lambda full: full,
            covariance,
        )
    log_count = jnp.log(stats.count + (weight_prior - 1))
    # Where there is no balancing a dead component's weight of zero must not meet 0 * inf.
    scaled = mixture.log_weights - jnp.maximum(log_count, -30.0)
    log_weights = jnp.where(balance > 0, balance * scaled, 0.0) + (1 - balance) * log_count
    log_weights = jnp.where(balance < 1, log_weights, scaled)
    return Mixture(log_weights - jax.nn.logsumexp(log_weights), means, covariance)


@functools.partial(jax.jit, static_argnames=("iterations", "axis_name"))
def fit(
    mixture: Mixture,
    mean: Float[Array, "n d"],
    variance: Float[Array, "n d"] | None = None,
    *,
    weight: Float[Array, " n"] | None = None,
    iterations: int = 100,
    tol: float = 1e-3,
    axis_name: str | None = None,
    **guards: float,
) -> FitResult:
    """EM from ``mixture``, at most ``iterations`` times (2) and (5).

    Stops, as scikit-learn does, once the mean log-likelihood changes by less than ``tol`` from one
    iteration to the next, hence not before the second; ``tol`` = 0 never stops. ``guards`` are
    those of ``update``.
    """
    weight = _weight(weight, mean)
    mixture = jax.tree.map(lambda leaf: leaf.astype(mean.dtype), mixture)

    def unfinished(carry: tuple[Any, ...]) -> Array:
        iteration, *_, done = carry
        return (iteration < iterations) & ~done

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        iteration, mixture, trace, previous, _ = carry
        stats = statistics(mixture, mean, variance, weight, axis_name=axis_name)
        value = stats.log_likelihood / jnp.maximum(stats.weight, 1e-30)
        mixture = update(mixture, stats, **guards)
        done = jnp.abs(value - previous) < tol
        return iteration + 1, mixture, trace.at[iteration].set(value), value, done

    start = jnp.asarray(-jnp.inf, mean.dtype)
    trace = jnp.zeros(iterations, mean.dtype)
    carry = (jnp.int32(0), mixture, trace, start, jnp.bool_(False))
    iteration, mixture, trace, last, done = jax.lax.while_loop(unfinished, body, carry)
    trace = jnp.where(jnp.arange(iterations) < iteration, trace, last)
    return FitResult(mixture, trace, iteration, done)


@functools.partial(
    jax.jit,
    static_argnames=("k", "restarts", "covariance", "lloyd_iterations", "iterations"),
)
def init(
    key: PRNGKeyArray,
    mean: Float[Array, "n d"],
    k: int,
    *,
    variance: Float[Array, "n d"] | None = None,
    weight: Float[Array, " n"] | None = None,
    restarts: int = 10,
    covariance: str = "diag",
    lloyd_iterations: int = 10,
    iterations: int = 20,
    tol: float = 1e-3,
    **guards: float,
) -> FitResult:
    """The fit of highest likelihood among ``restarts`` starts; of little data, all in one batch.

    Each start is k-means++ seeding, a few Lloyd iterations, the moments of the clusters, and a
    short EM; ``guards`` are those of ``update``.

    Raises:
      InputError: ``k`` is below 1 or above the number of rows, or ``covariance`` is unknown.
    """
    n, d = mean.shape
    kmeans.check_clusters(k, n)
    if covariance not in ("diag", "full"):
        raise InputError(f"covariance = {covariance!r} is unknown: choose 'diag' or 'full'")
    weight = _weight(weight, mean)

    unit = jnp.ones((k, d), mean.dtype)
    unit = unit if covariance == "diag" else unit[:, :, None] * jnp.eye(d, dtype=mean.dtype)

    def run(key: PRNGKeyArray) -> FitResult:
        seeds = kmeans.plus_plus(key, mean, weight, k)
        clusters = kmeans.lloyd(mean, seeds, weight, max_iterations=lloyd_iterations)
        start = Mixture(jnp.full(k, -math.log(k), mean.dtype), clusters.centers, unit)
        start = of_groups(clusters.labels, start, mean, variance, weight=weight, **guards)
        return fit(start, mean, variance, weight=weight, iterations=iterations, tol=tol, **guards)

    keys = jax.random.split(key, restarts)
    # In a batch all starts last as long as the slowest, and take the slow branch of a condition.
    runs = jax.vmap(run)(keys) if _small(k, mean) else jax.lax.map(run, keys)
    final = runs.log_likelihood[:, -1]
    best = jnp.argmax(jnp.where(jnp.isnan(final), -jnp.inf, final))
    return jax.tree.map(lambda leaf: leaf[best], runs)


def of_groups(
    labels: Int[Array, " n"],
    start: Mixture,
    mean: Float[Array, "n d"],
    variance: Float[Array, "n d"] | None = None,
    *,
    weight: Float[Array, " n"] | None = None,
    **guards: float,
) -> Mixture:
    """The mixture with the moments of these groups; one without examples stays as in ``start``.

    The means of ``start`` need not be near; ``guards`` are those of ``update``.
    """
    weight = _weight(weight, mean)
    k = start.means.shape[0]
    resp = jax.nn.one_hot(labels, k, dtype=mean.dtype) * weight[:, None]
    moments = _moments(start, resp, mean, variance)
    stats = Statistics(jnp.sum(resp, axis=0), *moments, jnp.zeros(()), jnp.sum(weight))
    return update(start, stats, **guards)


def reseed_dead(
    mixture: Mixture, *, threshold: float | Array | None = None
) -> tuple[Mixture, Shaped[Array, " k"]]:
    """Replace components of weight below ``threshold`` by halves of the heaviest component.

    The heaviest component is cut across its widest axis into two of half its weight that keep its
    mean and covariance. ``threshold`` defaults to 1 / (10 k).

    Returns:
      the mixture, and which components were replaced [k].
    """
    k = mixture.log_weights.shape[0]
    limit = 1 / (10 * k) if threshold is None else threshold
    dead = jnp.exp(mixture.log_weights) < limit

    def revive(mixture: Mixture, target: Array) -> tuple[Mixture, None]:
        source = jnp.argmax(mixture.log_weights)
        pair = jnp.stack([source, target])
        halves = _halves(mixture, source)
        split = jax.tree.map(lambda leaf, half: leaf.at[pair].set(half), mixture, halves)
        take = dead[target]
        return jax.tree.map(lambda new, old: jnp.where(take, new, old), split, mixture), None

    # Dead weight goes first, so that what a replaced component gets is never counted as dead.
    log_weights = jnp.where(dead, -jnp.inf, mixture.log_weights)
    log_weights = log_weights - jax.nn.logsumexp(log_weights)
    mixture = Mixture(log_weights, mixture.means, mixture.covariance)
    return jax.lax.scan(revive, mixture, jnp.arange(k))[0], dead


def sample(
    mixture: Mixture,
    key: PRNGKeyArray,
    n: int,
    *,
    component: int | Int[Array, " n"] | None = None,
    temperature: float = 1.0,
) -> tuple[Float[Array, "n d"], Int[Array, " n"]]:
    """Draw ``n`` points, and the component of each.

    ``component`` fixes it (one for all, or one each); ``temperature`` multiplies the standard
    deviations.
    """
    pick, noise = jax.random.split(key)
    if component is None:
        labels = jax.random.categorical(pick, mixture.log_weights, shape=(n,))
    else:
        labels = jnp.broadcast_to(jnp.asarray(component), (n,))
    means = mixture.means[labels]
    eps = temperature * jax.random.normal(noise, means.shape, means.dtype)
    if mixture.covariance.ndim == 2:
        return means + jnp.sqrt(mixture.covariance)[labels] * eps, labels
    factors = jnp.linalg.cholesky(mixture.covariance)[labels]
    return means + jnp.einsum("nij,nj->ni", factors, eps, precision="highest"), labels


def bic(mixture: Mixture, log_likelihood: Float[Array, ""], n: int) -> Float[Array, ""]:
    """Schwarz's criterion (lower is better) from the mean log-likelihood of ``n`` examples."""
    k, d = mixture.means.shape
    free = k - 1 + k * d + k * (d if mixture.covariance.ndim == 2 else d * (d + 1) // 2)
    return -2 * n * log_likelihood + free * jnp.log(jnp.asarray(n, mixture.means.dtype))


def _psum(tree: Any, axis_name: str | None) -> Any:
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _weight(weight: Array | None, mean: Array) -> Array:
    return jnp.ones_like(mean[:, 0]) if weight is None else weight.astype(mean.dtype)


def _per(values: Array, like: Array) -> Array:
    """``values`` [k], shaped to broadcast against ``like`` [k, ...]."""
    return values.reshape(values.shape + (1,) * (like.ndim - 1))


def _square(vector: Array, mixture: Mixture) -> Array:
    """v v' of each vector [..., d], or its diagonal when the covariances are diagonal."""
    if mixture.covariance.ndim == 2:
        return vector**2
    return vector[..., :, None] * vector[..., None, :]


def _diagonal(covariance: Array, mixture: Mixture) -> Array:
    if mixture.covariance.ndim == 2:
        return covariance
    return jnp.diagonal(covariance, axis1=-2, axis2=-1)


def _entropy(variance: Array) -> Array:
    """H(q) [n] of N(., diag variance), in nats."""
    return 0.5 * jnp.sum(jnp.log(2 * math.pi * math.e * variance), axis=1)


def _over_components(function: Callable[[Any], Any], tree: Any, mean: Array) -> Any:
    """Apply to each component: at once while [n, k, d] is small, else one after another."""
    k = jax.tree.leaves(tree)[0].shape[0]
    return jax.vmap(function)(tree) if _small(k, mean) else jax.lax.map(function, tree)


def _small(k: int, mean: Array) -> bool:
    return mean.size * k <= _BROADCAST_LIMIT


def _log_density(mixture: Mixture, mean: Array, variance: Array | None) -> Array:
    """E_{z~q} log N(z; mu_c, S_c) [n, k], from differences to each mean, not expanded squares."""
    d = mean.shape[1]

    def diagonal(component: tuple[Array, Array]) -> Array:
        mu, s = component
        squares = (mean - mu) ** 2 if variance is None else (mean - mu) ** 2 + variance
        return jnp.sum(squares * (1 / s), axis=1) + jnp.sum(jnp.log(s))

    def full(component: tuple[Array, Array]) -> Array:
        mu, s = component
        root = jnp.linalg.cholesky(s)
        eye = jnp.eye(d, dtype=s.dtype)
        whiten = jax.scipy.linalg.solve_triangular(root, eye, lower=True)
        quadratic = jnp.sum(_matmul(mean - mu, whiten.T) ** 2, axis=1)
        if variance is not None:
            quadratic += _matmul(variance, jnp.sum(whiten**2, axis=0))
        return quadratic + 2 * jnp.sum(jnp.log(jnp.diagonal(root)))

    one = diagonal if mixture.covariance.ndim == 2 else full
    values = _over_components(one, (mixture.means, mixture.covariance), mean)
    return -0.5 * (values.T + d * math.log(2 * math.pi))


def _moments(
    mixture: Mixture, resp: Array, mean: Array, variance: Array | None
) -> tuple[Array, Array]:
    """First and second moments about the mixture's means, under ``resp`` [n, k]."""

    def one(component: tuple[Array, Array]) -> tuple[Array, Array]:
        mu, r = component
        difference = mean - mu
        first = _matmul(r, difference)
        if mixture.covariance.ndim == 2:
            squares = difference**2 if variance is None else difference**2 + variance
            return first, _matmul(r, squares)
        second = _matmul((r[:, None] * difference).T, difference)
        return first, second if variance is None else second + jnp.diag(_matmul(r, variance))

    return _over_components(one, (mixture.means, resp.T), mean)


def _floor_full(covariance: Array, pooled: Array, floor: float | Array) -> Array:
    """Raise the eigenvalues of standardised covariances [k, d, d] to ``floor``."""
    scale = jnp.sqrt(jnp.where(pooled > 0, pooled, 1))
    unit = covariance / (scale[:, None] * scale)
    values, vectors = jnp.linalg.eigh(unit)
    # Only what is missing is added, so that a covariance above the floor stays as it is.
    missing = jnp.maximum(floor - values, 0)[:, None, :]
    lift = _matmul(vectors * missing, jnp.swapaxes(vectors, -1, -2))
    return covariance + lift * (scale[:, None] * scale)


def _halves(mixture: Mixture, source: Array) -> Mixture:
    """Component ``source`` cut across its widest axis into 2 components of the same moments."""
    s = mixture.covariance[source]
    if s.ndim == 1:
        widest = jnp.argmax(s)
        step = jnp.zeros_like(s).at[widest].set(jnp.sqrt(_HALF_NORMAL * s[widest]))
    else:
        values, vectors = jnp.linalg.eigh(s)
        step = jnp.sqrt(_HALF_NORMAL * values[-1]) * vectors[:, -1]
    rest = s - _square(step, mixture)
    return Mixture(
        jnp.full(2, mixture.log_weights[source] - math.log(2)),
        mixture.means[source] + jnp.stack([-step, step]),
        jnp.stack([rest, rest]),
    )
