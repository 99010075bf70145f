"""Shallow baselines on the same data, so that a deep result is never shown alone.

The settings are fixed here; all but the graph are scikit-learn or UMAP. Fits never see labels:

* k-means, k-means++ starts, Lloyd to convergence (at most 300 iterations). The best of 10 starts
  by inertia; of 3 when more than ``LARGE`` rows are fitted, which is recorded.
* Gaussian mixture with diagonal covariances, started from k-means, the best of 3 starts by
  likelihood (1 start above ``LARGE`` rows), at most 200 iterations. Its ``reg_covar`` is added to
  every variance; the default of 1e-6 lets constant pixels decide everything, so here it is
  ``VARIANCE_FLOOR`` times the mean feature variance, which does not depend on the data's units
  (on scikit-learn's digits floors of 0.01 to 0.3 differ by under 0.02 in mean accuracy and by
  0.03 in NMI, in favour of the larger).

* Communities of a neighbour graph (``communities``), the partition of highest modularity of
  ``GRAPH_STARTS``, among ``GRAPH_ROWS`` rows at most, along ``GRAPH_AXES`` principal axes if there
  are more; of more rows the others join the group of most of their five nearest. Not of more than
  ``GRAPH_CLUSTERS`` clusters.

* UMAP to ``UMAP_AXES`` dimensions (15 neighbours, no distance kept between points), then k-means
  as above; only where the extra ``umap`` is installed.

``limit`` fits on that many randomly drawn rows, and ``MAX_FITTED`` on as many as memory bears; all
rows are labelled and scored all the same, a part at a time, except that the silhouette is that of
the rows fitted. So the input may be mapped from a file larger than memory. Inputs are centred
first: neither method sees a shift, but float32 squares do. Arrays above ``MAX_DOUBLE`` elements are
taken in float32 to halve the memory, others in float64.

No global state is touched (random numbers, warnings, thread pools), so calls may run in threads.
The same seed gives the same result up to the order of floating-point sums inside the thread pool.
"""

import functools
import importlib.util
import time
from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from dec_diffusion.metrics import external_scores, internal_scores, occupancy
from dec_diffusion.types import InputError, Rows

LARGE = 20_000
"""Rows above which fewer starts are made."""

VARIANCE_FLOOR = 0.1
"""Added to each variance of the mixture, in units of the mean feature variance."""

GRAPH_ROWS = 10_000
"""Rows among which the graph's neighbours are looked for."""

GRAPH_CLUSTERS = 200
"""Clusters above which the graph is left out: its time grows with rows times clusters."""

GRAPH_AXES = 50
"""Principal axes in which they are looked for."""

GRAPH_STARTS = 5
"""Starts of the graph's communities."""

UMAP_AXES = 10
"""Dimensions that UMAP keeps for k-means; two are for looking at."""

MAX_DOUBLE = 2**25
"""Elements above which an input is fitted in float32."""

MAX_FITTED = 2**26
"""Elements that are fitted at most; one copy of them takes 256 MiB."""

_CHUNK = 2**22
"""Elements that are labelled at a time where not all rows are fitted."""

View = Callable[[np.ndarray], np.ndarray]
"""From rows [m, d] of the input to those that a baseline is fitted on [m, e]."""

Predict = Callable[[np.ndarray], Any]
"""From rows [m, d] to the cluster [m] of each."""


class Baseline(TypedDict):
    """One baseline's result."""

    scores: dict[str, float]
    """`internal_scores` on the baseline's own input; `external_scores` too if labels are given."""
    seconds: float
    """Wall time of fitting and assigning, without scoring."""
    labels: np.ndarray
    """int32 [n], in 0..k-1."""
    settings: dict[str, Any]
    """What ran, in plain values: method, starts, rows fitted, iterations, convergence."""


def baselines(
    x_flat: ArrayLike | Rows,
    k: int,
    labels_true: ArrayLike | None = None,
    *,
    seed: int,
    limit: int | None = None,
    scale: ArrayLike | None = None,
    view: View | None = None,
) -> dict[str, Baseline]:
    """The baselines on scaled inputs: ``kmeans_pixels``, ``gmm_pixels``, and perhaps two others.

    ``graph_pixels`` of up to ``GRAPH_CLUSTERS`` clusters, ``umap_pixels`` where UMAP is installed.

    Args:
        x_flat: [n, d] finite inputs.
        k: number of clusters, 1 <= k <= n.
        labels_true: [n] classes of any type, for scoring only.
        seed: of the starts and of the draw of ``limit`` rows.
        limit: most rows to fit on; None means all.
        scale: [d] positive, what features are divided by; None leaves them.
        view: of rows [m, d] as they come, what the graph compares, float [m, e]; None is the
            scaled inputs.

    Raises:
        InputError: wrong shape, non-finite values, or k or ``limit`` out of range.
    """
    methods = {"kmeans_pixels": kmeans_on, "gmm_pixels": gmm_on}
    if k <= GRAPH_CLUSTERS:
        methods["graph_pixels"] = functools.partial(graph_on, view=view)
    if importlib.util.find_spec("umap"):
        methods["umap_pixels"] = umap_on
    return {
        name: method(x_flat, k, labels_true, seed=seed, limit=limit, scale=scale)
        for name, method in methods.items()
    }


def kmeans_on(
    embedding: ArrayLike | Rows,
    k: int,
    labels_true: ArrayLike | None = None,
    *,
    seed: int,
    limit: int | None = None,
    scale: ArrayLike | None = None,
) -> Baseline:
    """k-means on any vectors [n, d], for instance learned latents; arguments as `baselines`."""

    def fit(fitted: np.ndarray) -> tuple[Predict, dict[str, Any]]:
        from sklearn.cluster import KMeans

        starts = 3 if len(fitted) > LARGE else 10
        # The hint of scikit-learn's n_init names only its default, a string.
        model = KMeans(k, n_init=starts, max_iter=300, random_state=seed)  # pyright: ignore[reportArgumentType]
        model.fit(fitted)
        settings = {
            "method": "k-means",
            "starts": starts,
            "iterations": int(model.n_iter_),
            "converged": bool(model.n_iter_ < 300),
        }
        return model.predict, settings

    return _run(fit, embedding, k, labels_true, seed, limit, scale)


def gmm_on(
    embedding: ArrayLike | Rows,
    k: int,
    labels_true: ArrayLike | None = None,
    *,
    seed: int,
    limit: int | None = None,
    scale: ArrayLike | None = None,
) -> Baseline:
    """Diagonal Gaussian mixture on any vectors [n, d]; arguments as `baselines`."""

    def fit(fitted: np.ndarray) -> tuple[Predict, dict[str, Any]]:
        from sklearn.mixture import GaussianMixture

        starts = 1 if len(fitted) > LARGE else 3
        # Constant data has no scale of its own; any positive floor will do.
        floor = VARIANCE_FLOOR * float(fitted.var(axis=0, dtype=np.float64).mean()) or 1e-6
        model = GaussianMixture(
            k,
            covariance_type="diag",
            reg_covar=floor,
            n_init=starts,
            max_iter=200,
            random_state=seed,
        ).fit(fitted)
        settings = {
            "method": "diagonal Gaussian mixture",
            "starts": starts,
            "reg_covar": floor,
            "iterations": int(model.n_iter_),
            "converged": bool(model.converged_),
        }
        return model.predict, settings

    return _run(fit, embedding, k, labels_true, seed, limit, scale)


def graph_on(
    embedding: ArrayLike | Rows,
    k: int,
    labels_true: ArrayLike | None = None,
    *,
    seed: int,
    limit: int | None = None,
    scale: ArrayLike | None = None,
    view: View | None = None,
) -> Baseline:
    """Communities of the neighbour graph of what ``view`` shows; arguments as `baselines`."""

    def fit(fitted: np.ndarray) -> tuple[Predict, dict[str, Any]]:
        import jax
        from sklearn.decomposition import PCA
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.pipeline import make_pipeline

        from dec_diffusion import communities

        rows, axes = len(fitted), min(GRAPH_AXES, *fitted.shape)
        project = PCA(axes, svd_solver="randomized", random_state=seed)
        z = project.fit_transform(fitted).astype(np.float32)
        found = communities.partition(
            jax.random.key(seed),
            jax.numpy.asarray(z),
            k,
            weight=jax.numpy.ones(rows),
            anchors=jax.numpy.arange(rows),
            restarts=GRAPH_STARTS,
        )
        labels = np.asarray(found.labels)
        nearest = KNeighborsClassifier(min(5, rows)).fit(z, labels)
        others = make_pipeline(project, nearest)
        settings = {
            "method": "communities of a neighbour graph",
            "starts": GRAPH_STARTS,
            "axes": axes,
            "modularity": float(found.modularity),
        }
        return lambda points: labels if points is fitted else others.predict(points), settings

    most = max(k, GRAPH_ROWS)
    limit = most if limit is None else min(limit, most)
    return _run(fit, embedding, k, labels_true, seed, limit, scale, view)


def umap_on(
    embedding: ArrayLike | Rows,
    k: int,
    labels_true: ArrayLike | None = None,
    *,
    seed: int,
    limit: int | None = None,
    scale: ArrayLike | None = None,
) -> Baseline:
    """k-means on a UMAP embedding of any vectors [n, d]; arguments as `baselines`.

    Raises:
        ImportError: the extra ``umap`` is not installed.
    """

    def fit(fitted: np.ndarray) -> tuple[Predict, dict[str, Any]]:
        from sklearn.cluster import KMeans
        from umap import UMAP  # pyright: ignore[reportMissingImports]

        axes, near = min(UMAP_AXES, fitted.shape[1]), min(15, len(fitted) - 1)
        reducer = UMAP(
            n_components=axes,
            n_neighbors=near,
            min_dist=0.0,
            init="pca",
            random_state=seed,
            n_jobs=1,
        ).fit(fitted)
        model = KMeans(k, n_init=10, max_iter=300, random_state=seed)  # pyright: ignore[reportArgumentType]
        model.fit(reducer.embedding_)
        settings = {"method": "UMAP, then k-means", "axes": axes, "neighbours": near, "starts": 10}
        return lambda rows: model.predict(reducer.transform(rows)), settings

    return _run(fit, embedding, k, labels_true, seed, limit, scale)


def _run(
    fit: Callable[[np.ndarray], tuple[Predict, dict[str, Any]]],
    embedding: ArrayLike | Rows,
    k: int,
    labels_true: ArrayLike | None,
    seed: int,
    limit: int | None,
    scale: ArrayLike | None,
    view: View | None = None,
) -> Baseline:
    """Check, centre, time and score ``fit(fitted rows) -> (predict, settings)``."""
    given, mean = _checked(embedding)
    n, d = given.shape
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}: give a positive number of rows, or None for all")
    rows = min(n, limit or n, max(k, MAX_FITTED // d))
    if not 1 <= k <= rows:
        raise InputError(f"k is {k}: give between 1 and {rows}, the number of rows fitted")
    if labels_true is not None and len(np.asarray(labels_true)) != n:
        raise InputError(f"labels_true has {len(np.asarray(labels_true))} rows and the data {n}")
    dtype = np.float64 if given.size <= MAX_DOUBLE else np.float32
    divisor = None if scale is None else np.asarray(scale, dtype)

    def points(part: np.ndarray) -> np.ndarray:
        if view is not None:
            return view(part)
        centred = part.astype(dtype)
        centred -= mean.astype(dtype)
        if divisor is not None:
            centred /= divisor
        return centred

    drawn = None
    if rows < n:
        # Sorted, so that the draw reads memory in order.
        drawn = np.sort(np.random.default_rng(seed).choice(n, rows, replace=False))
    fitted = points(given[:] if drawn is None else given[drawn])
    start = time.perf_counter()
    predict, settings = fit(fitted)
    if drawn is None:
        labels = np.asarray(predict(fitted))
    else:
        step = max(1, _CHUNK // d)
        parts = [predict(points(given[i : i + step])) for i in range(0, n, step)]
        labels = np.concatenate(parts)
    seconds = time.perf_counter() - start
    scores = {} if labels_true is None else external_scores(labels_true, labels)
    of_fitted = labels if drawn is None else labels[drawn]
    scores |= internal_scores(fitted, of_fitted, num_clusters=k, seed=seed)
    scores |= occupancy(labels, num_clusters=k)
    return {
        "scores": scores,
        "seconds": seconds,
        "labels": labels.astype(np.int32),
        "settings": settings | {"rows_fitted": rows, "rows": n, "seed": seed},
    }


def _checked(embedding: ArrayLike | Rows) -> tuple[Rows, np.ndarray]:
    """The input [n, d] and its mean, float64 [d]."""
    given: Any = embedding if hasattr(embedding, "shape") else np.asarray(embedding)
    if given.ndim != 2 or 0 in given.shape:
        raise InputError(f"baselines need a non-empty [examples, dimensions] array: {given.shape}")
    if given.dtype.kind not in "biuf":
        raise InputError(f"baselines need numbers, not {given.dtype}: encode the columns first")
    step = max(1, _CHUNK // given.shape[1])
    parts = range(0, len(given), step)
    total = sum(given[i : i + step].sum(axis=0, dtype=np.float64) for i in parts)
    mean = np.asarray(total / len(given))
    if not np.isfinite(mean).all():
        raise InputError("baselines need finite values: the data hold NaN or infinite ones")
    return given, mean
