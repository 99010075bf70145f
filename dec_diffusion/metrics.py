"""Scores of a clustering: against labels, per cluster, and without any labels.

All on the host with NumPy. With the contingency table ``N[c, k]`` = number of examples of class
``c`` put in cluster ``k``, ``n`` the number of examples, row sums ``a_c`` and column sums ``b_k``:

(1) accuracy       ACC = max_m  sum_k N[m(k), k] / n,   m one-to-one from clusters to classes
                   (Hungarian method; Xie et al. 2016, "Unsupervised deep embedding", Eq. 10)
(2) information    NMI = I / ((H_a + H_b) / 2),   I = sum_ck N/n log(n N / (a_c b_k)),
                   H_a = -sum_c a_c/n log(a_c/n)
                   (Vinh, Epps and Bailey 2010, "Information theoretic measures", NMI_sum)
(3) adjusted Rand  ARI = 2 (TP TN - FN FP) / ((TP+FN)(FN+TN) + (TP+FP)(FP+TN)) over the ordered
                   pairs of examples (Hubert and Arabie 1985, "Comparing partitions", Eq. 5)
(4) purity         sum_k max_c N[c, k] / n
(5) macro recall   mean_c N[c, m^-1(c)] / a_c under the matching of (1), 0 for unmatched classes
(6) occupancy      H_b / log K: 1 when all K clusters are equally large, 0 when all but one are
                   empty
(7) silhouette     mean_i (v_i - u_i) / max(u_i, v_i), with u_i the mean distance to the others of
                   i's cluster and v_i that to the nearest other cluster (Rousseeuw 1987)

Labels may be of any type that compares equal to itself (integers, negative ones, strings), and
the numbers of classes and clusters may differ. Only (6), (7) and the likelihood may be used to
choose between runs: they never see a label.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dec_diffusion.types import InputError


def contingency(
    labels_true: ArrayLike, labels_pred: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts of every (class, cluster) pair.

    Args:
        labels_true: [n] class of each example, any type.
        labels_pred: [n] cluster of each example, any type.

    Returns:
        ``table`` int64 [classes, clusters]; ``classes`` and ``clusters``, the sorted distinct
        labels of the rows and of the columns.

    Raises:
        InputError: lengths differ, nothing given, not one-dimensional, or labels missing (NaN).
    """
    classes, rows = _encode(labels_true, "labels_true")
    clusters, columns = _encode(labels_pred, "labels_pred")
    _same_length(len(rows), len(columns), "labels_true", "labels_pred")
    shape = (len(classes), len(clusters))
    table = np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1])
    return table.reshape(shape).astype(np.int64), classes, clusters


def clustering_accuracy(labels_true: ArrayLike, labels_pred: ArrayLike) -> float:
    """Accuracy under the best one-to-one matching, equation (1); in [0, 1].

    With more clusters than classes the examples of unmatched clusters count as errors.
    """
    table, _, _ = contingency(labels_true, labels_pred)
    rows, columns = _matching(table)
    return float(table[rows, columns].sum() / table.sum())


def best_match(labels_true: ArrayLike, labels_pred: ArrayLike) -> dict[Any, Any]:
    """The matching ``m`` of equation (1), cluster -> class.

    It has min(classes, clusters) entries: a cluster left over when there are more clusters than
    classes is absent.
    """
    table, classes, clusters = contingency(labels_true, labels_pred)
    rows, columns = _matching(table)
    return dict(zip(clusters[columns].tolist(), classes[rows].tolist(), strict=True))


def nmi(labels_true: ArrayLike, labels_pred: ArrayLike) -> float:
    """Normalised mutual information, arithmetic mean of the entropies, equation (2)."""
    return _nmi(contingency(labels_true, labels_pred)[0])


def ari(labels_true: ArrayLike, labels_pred: ArrayLike) -> float:
    """Rand index adjusted for chance, equation (3); 1 is perfect, 0 the chance level."""
    return _ari(contingency(labels_true, labels_pred)[0])


def external_scores(labels_true: ArrayLike, labels_pred: ArrayLike) -> dict[str, float]:
    """Scores against labels: ``acc, nmi, ari, macro_recall, purity``, equations (1) to (5).

    Args:
        labels_true: [n] class of each example, any type.
        labels_pred: [n] cluster of each example, any type.

    Raises:
        InputError: as `contingency`.
    """
    table, _, _ = contingency(labels_true, labels_pred)
    rows, columns = _matching(table)
    matched = table[rows, columns]
    sizes = table.sum(axis=1)
    return {
        "acc": float(matched.sum() / table.sum()),
        "nmi": _nmi(table),
        "ari": _ari(table),
        "macro_recall": float((matched / sizes[rows]).sum() / len(sizes)),
        "purity": float(table.max(axis=0).sum() / table.sum()),
    }


def cluster_report(
    labels_pred: ArrayLike,
    probability: ArrayLike,
    labels_true: ArrayLike | None = None,
    *,
    num_clusters: int | None = None,
) -> list[dict[str, Any]]:
    """One row per cluster, in the order of the cluster labels.

    Args:
        labels_pred: [n] cluster of each example, any type.
        probability: [n] probability of the assigned cluster, in [0, 1].
        labels_true: [n] class of each example, optional.
        num_clusters: if given, clusters are the integers 0..num_clusters-1 and empty ones are
            listed as well; otherwise only clusters that have members are.

    Returns:
        Dictionaries of plain Python values: ``cluster``, ``size``, ``share`` (of all examples),
        ``confidence`` (mean probability; None if empty) and, with labels, ``majority`` (the
        commonest class; the first on ties; None if empty) and ``purity`` (its share of the
        cluster; None if empty).

    Raises:
        InputError: lengths differ, empty input, probabilities outside [0, 1], or labels outside
            0..num_clusters-1.
    """
    clusters, codes = _clusters(labels_pred, num_clusters)
    confidence = np.asarray(probability, dtype=np.float64)
    if confidence.ndim != 1:
        raise InputError(
            f"probability has shape {confidence.shape}: give one value per example, that of its "
            "own cluster"
        )
    _same_length(len(codes), len(confidence), "labels_pred", "probability")
    # A float32 softmax may exceed 1 by rounding.
    if not np.all((confidence >= -1e-5) & (confidence <= 1 + 1e-5)):
        raise InputError("probability has values outside [0, 1]: give probabilities, not logits")
    sizes = np.bincount(codes, minlength=len(clusters))
    sums = np.bincount(codes, weights=confidence, minlength=len(clusters))
    report: list[dict[str, Any]] = [
        {
            "cluster": cluster,
            "size": int(size),
            "share": float(size / len(codes)),
            "confidence": float(total / size) if size else None,
        }
        for cluster, size, total in zip(clusters.tolist(), sizes, sums, strict=True)
    ]
    if labels_true is None:
        return report
    classes, rows = _encode(labels_true, "labels_true")
    _same_length(len(rows), len(codes), "labels_true", "labels_pred")
    for k, row in enumerate(report):
        counts = np.bincount(rows[codes == k], minlength=len(classes))
        top = int(counts.argmax())
        row["majority"] = classes.tolist()[top] if row["size"] else None
        row["purity"] = float(counts[top] / row["size"]) if row["size"] else None
    return report


def internal_scores(
    embedding: ArrayLike,
    labels_pred: ArrayLike,
    log_likelihood: ArrayLike | None = None,
    *,
    num_clusters: int | None = None,
    sample: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Scores that need no labels, so they may choose between runs.

    Args:
        embedding: [n, d] finite points in which distances are meant (latents or inputs).
        labels_pred: [n] cluster of each example, any type.
        log_likelihood: [n] or scalar, natural log-density of the examples, optional.
        num_clusters: the K of equation (6); labels are then the integers 0..K-1 and empty
            clusters count. Without it K is the number of clusters that have members.
        sample: examples drawn for the silhouette, whose cost is quadratic.
        seed: of that draw.

    Returns:
        ``silhouette`` (equation (7); 0 when the sample holds a single cluster or nothing but
        singletons, where it is undefined), ``occupancy_entropy`` (equation (6); 0 for K = 1),
        ``clusters_nonempty``, ``smallest_share`` and ``largest_share`` of the K clusters, and
        ``log_likelihood`` (mean, nats per example) when given.

    Raises:
        InputError: lengths differ, empty or non-finite input, ``sample`` < 2, or labels outside
            0..num_clusters-1.
    """
    points = np.asarray(embedding)
    if points.ndim != 2:
        raise InputError(f"embedding has shape {points.shape}: expected [examples, dimensions]")
    clusters, codes = _clusters(labels_pred, num_clusters)
    _same_length(len(points), len(codes), "embedding", "labels_pred")
    if sample < 2:
        raise InputError(f"sample is {sample}: the silhouette needs at least 2 examples")
    if not np.isfinite(points).all():
        raise InputError("embedding holds NaN or infinite values: remove those examples")
    scores = {"silhouette": _silhouette(points, codes, sample, seed)}
    scores |= _occupancy(codes, len(clusters))
    if log_likelihood is not None:
        values = np.asarray(log_likelihood, dtype=np.float64)
        if values.ndim:
            _same_length(values.size, len(codes), "log_likelihood", "labels_pred")
        if not np.isfinite(values).all():
            raise InputError("log_likelihood holds NaN or infinite values: check the mixture")
        scores["log_likelihood"] = values.mean()
    return {name: float(value) for name, value in scores.items()}


def occupancy(labels_pred: ArrayLike, *, num_clusters: int | None = None) -> dict[str, float]:
    """The scores of `internal_scores` that need the sizes of the clusters only."""
    clusters, codes = _clusters(labels_pred, num_clusters)
    return {name: float(value) for name, value in _occupancy(codes, len(clusters)).items()}


def _occupancy(codes: np.ndarray, num_clusters: int) -> dict[str, float]:
    shares = np.bincount(codes, minlength=num_clusters) / len(codes)
    return {
        "occupancy_entropy": _entropy(shares) / np.log(len(shares)) if len(shares) > 1 else 0.0,
        "clusters_nonempty": float((shares > 0).sum()),
        "smallest_share": shares.min(),
        "largest_share": shares.max(),
    }


def _silhouette(points: np.ndarray, codes: np.ndarray, sample: int, seed: int) -> float:
    """Equation (7) on a draw without replacement."""
    # scikit-learn takes a second to import and is wanted only here.
    from sklearn.metrics import silhouette_score

    if len(codes) > sample:
        chosen = np.random.default_rng(seed).choice(len(codes), sample, replace=False)
        points, codes = points[chosen], codes[chosen]
    if not 1 < len(np.unique(codes)) < len(codes):
        return 0.0
    return float(silhouette_score(points.astype(np.float64), codes))


def _nmi(table: np.ndarray) -> float:
    """Equation (2); 0 if only one side is undivided, 1 if both are, as in scikit-learn."""
    p = table / table.sum()
    p_class, p_cluster = p.sum(axis=1), p.sum(axis=0)
    if len(p_class) == 1 or len(p_cluster) == 1:
        return float(len(p_class) == len(p_cluster))
    product = np.outer(p_class, p_cluster)
    seen = p > 0
    information = float((p[seen] * np.log(p[seen] / product[seen])).sum())
    mean_entropy = (_entropy(p_class) + _entropy(p_cluster)) / 2
    # Rounding can leave a few 1e-17 outside [0, 1].
    return float(np.clip(information / mean_entropy, 0.0, 1.0))


def _ari(table: np.ndarray) -> float:
    """Equation (3) in exact integers: the products pass 2^63 at 100,000 examples."""
    n = int(table.sum())
    both = int((table**2).sum())
    same_class = int((table.sum(axis=1) ** 2).sum())
    same_cluster = int((table.sum(axis=0) ** 2).sum())
    tp, fn, fp = both - n, same_class - both, same_cluster - both
    tn = n * n - same_class - same_cluster + both
    if fn == 0 and fp == 0:
        return 1.0
    return 2 * (tp * tn - fn * fp) / ((tp + fn) * (fn + tn) + (tp + fp) * (fp + tn))


def _entropy(p: np.ndarray) -> float:
    """-sum p log p in nats, with 0 log 0 = 0."""
    positive = p[p > 0]
    return float(-(positive * np.log(positive)).sum())


def _clusters(labels: ArrayLike, num_clusters: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Cluster names and the code [n] of each example; all of 0..K-1 when K is given."""
    distinct, codes = _encode(labels, "labels_pred")
    if num_clusters is None:
        return distinct, codes
    if distinct.dtype.kind not in "iu" or distinct[0] < 0 or distinct[-1] >= num_clusters:
        raise InputError(
            f"labels_pred has values outside 0..{num_clusters - 1}: with num_clusters="
            f"{num_clusters} labels must be integers in that range"
        )
    return np.arange(num_clusters), distinct.astype(np.int64)[codes]


def _matching(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the one-to-one matching of greatest sum."""
    # Half a second to import, which a run should not wait for before its first step.
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(table, maximize=True)


def matched_order(table: np.ndarray) -> tuple[list[int], list[int]]:
    """Rows and columns [classes, clusters] in an order with the matched pairs on the diagonal.

    Pairs are those of `best_match`, by class; what has no partner comes last.
    """
    rows, columns = (side.tolist() for side in _matching(table))
    rows += [i for i in range(table.shape[0]) if i not in rows]
    return rows, columns + [j for j in range(table.shape[1]) if j not in columns]


def _encode(labels: ArrayLike, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct labels, and the position [n] of each label among them."""
    values = np.asarray(labels)
    if values.ndim != 1:
        raise InputError(f"{name} has shape {values.shape}: give one label per example")
    if values.size == 0:
        raise InputError(f"{name} is empty: nothing to score")
    if values.dtype.kind in "OU":
        # Of a list its own members, as NumPy makes a text of a NaN among texts.
        members: Any = labels if isinstance(labels, list | tuple) else values
        missing = any(v is None or v != v for v in members)
    else:
        missing = bool(np.any(values != values))
    if missing:
        raise InputError(f"{name} has missing values: leave unlabelled examples out")
    try:
        distinct, codes = np.unique(values, return_inverse=True)
    except TypeError:  # an object array of several types has no order of its own
        ordered = sorted(set(values), key=lambda v: (type(v).__name__, v))
        position = {v: i for i, v in enumerate(ordered)}
        distinct = np.empty(len(ordered), dtype=object)
        distinct[:] = ordered
        codes = np.array([position[v] for v in values])
    return distinct, codes


def _same_length(n: int, m: int, name: str, other: str) -> None:
    if n != m:
        raise InputError(f"{name} has {n} rows and {other} {m}: they must match row by row")
