"""Scores against scikit-learn, SciPy, brute force and hand-made cases."""

import itertools
import json

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as oracle
from sklearn.datasets import make_blobs
from sklearn.metrics.cluster import contingency_matrix

from dec_diffusion import metrics
from dec_diffusion.types import InputError

SIZES = [(1, 1), (1, 4), (4, 1), (2, 2), (3, 5), (5, 3), (5, 5)]
SCORES = [
    metrics.clustering_accuracy,
    metrics.nmi,
    metrics.ari,
    lambda t, p: metrics.external_scores(t, p)["macro_recall"],
    lambda t, p: metrics.external_scores(t, p)["purity"],
]


def draw(classes: int, clusters: int, n: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels with a dependence between class and cluster, so that scores are not all near 0."""
    rng = np.random.default_rng([seed, classes, clusters])
    t = np.r_[np.arange(classes), rng.integers(0, classes, n - classes)]
    p = np.where(rng.random(n) < 0.5, t % clusters, rng.integers(0, clusters, n))
    p[:clusters] = np.arange(clusters)
    return t, p


def best_permutation(t: np.ndarray, p: np.ndarray, k: int) -> float:
    return max(np.mean(np.array(m)[p] == t) for m in itertools.permutations(range(k)))


@pytest.mark.parametrize(("classes", "clusters"), SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_oracles(classes: int, clusters: int, seed: int) -> None:
    t, p = draw(classes, clusters, seed=seed)
    table, rows, columns = metrics.contingency(t, p)
    assert table.dtype == np.int64
    np.testing.assert_array_equal(table, contingency_matrix(t, p))
    np.testing.assert_array_equal(rows, np.arange(classes))
    np.testing.assert_array_equal(columns, np.arange(clusters))
    acc = best_permutation(t, p, max(classes, clusters))
    assert metrics.clustering_accuracy(t, p) == pytest.approx(acc, abs=1e-12)
    nmi = oracle.normalized_mutual_info_score(t, p, average_method="arithmetic")
    assert metrics.nmi(t, p) == pytest.approx(nmi, abs=1e-12)
    assert metrics.ari(t, p) == pytest.approx(oracle.adjusted_rand_score(t, p), abs=1e-12)
    scores = metrics.external_scores(t, p)
    assert (scores["acc"], scores["nmi"], scores["ari"]) == (
        metrics.clustering_accuracy(t, p),
        metrics.nmi(t, p),
        metrics.ari(t, p),
    )


def test_macro_recall_is_scikit_learns_balanced_accuracy_of_the_matched_labels() -> None:
    t, p = draw(5, 5)
    match = metrics.best_match(t, p)
    matched = np.array([match[k] for k in p])
    scores = metrics.external_scores(t, p)
    assert scores["macro_recall"] == pytest.approx(oracle.balanced_accuracy_score(t, matched))
    assert scores["acc"] == pytest.approx(np.mean(matched == t))
    assert scores["macro_recall"] != pytest.approx(scores["acc"])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("classes", "clusters"), [(3, 5), (5, 3), (4, 4)])
def test_scores_do_not_depend_on_order_or_names(score, classes: int, clusters: int) -> None:
    t, p = draw(classes, clusters)
    rng = np.random.default_rng(1)
    order = rng.permutation(len(t))
    names = rng.permutation(clusters) * 7 - 11  # negative and with holes
    words = np.array(["horse", "auto", "bird", "cat", "dog"])
    value = score(t, p)
    assert score(t[order], p[order]) == pytest.approx(value, abs=1e-12)
    assert score(t, names[p]) == pytest.approx(value, abs=1e-12)
    assert score(words[t], p) == pytest.approx(value, abs=1e-12)
    assert score(words[t].tolist(), [f"c{k}" for k in p]) == pytest.approx(value, abs=1e-12)
    assert score(words[t].astype(object), p) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("score", SCORES)
def test_perfect_agreement_scores_one(score) -> None:
    t = np.repeat(["b", "a", "c"], [3, 5, 1])
    p = np.repeat([-1, 7, 4], [3, 5, 1])
    assert score(t, p) == pytest.approx(1.0, abs=1e-12)


def test_more_clusters_than_classes_by_hand() -> None:
    # Classes x: 4 examples split 3 + 1, y: 2 examples alone in cluster 9.
    t, p = list("xxxxyy"), [5, 5, 5, 8, 9, 9]
    scores = metrics.external_scores(t, p)
    assert scores["acc"] == pytest.approx(5 / 6)
    assert scores["macro_recall"] == pytest.approx((3 / 4 + 1) / 2)
    assert scores["purity"] == 1.0
    assert metrics.best_match(t, p) == {5: "x", 9: "y"}


def test_fewer_clusters_than_classes_by_hand() -> None:
    t, p = [0, 0, 0, 1, 1, 2], list("aaabbb")
    scores = metrics.external_scores(t, p)
    assert scores["acc"] == pytest.approx(5 / 6)
    assert scores["macro_recall"] == pytest.approx((1 + 1 + 0) / 3)
    assert scores["purity"] == pytest.approx(5 / 6)
    assert metrics.best_match(t, p) == {"a": 0, "b": 1}


def test_one_cluster_scores_the_largest_class_and_no_information() -> None:
    scores = metrics.external_scores([0, 0, 0, 1, 1, 2], [4] * 6)
    assert scores["acc"] == scores["purity"] == pytest.approx(0.5)
    assert scores["nmi"] == scores["ari"] == 0.0


def test_matching_is_the_best_not_the_greedy_one() -> None:
    # Greedy takes the 5 and is left with 0: 5. The best is 4 + 4.
    t = np.repeat([0, 0, 1], [5, 4, 4])
    p = np.repeat([0, 1, 0], [5, 4, 4])
    assert metrics.clustering_accuracy(t, p) == pytest.approx(8 / 13)
    assert metrics.best_match(t, p) == {0: 1, 1: 0}


def test_rand_index_is_exact_where_products_pass_64_bits() -> None:
    rng = np.random.default_rng(0)
    t = rng.integers(0, 3, 200_000)
    p = np.where(rng.random(len(t)) < 0.8, t, 0)
    assert metrics.ari(t, p) == pytest.approx(oracle.adjusted_rand_score(t, p), abs=1e-12)


def test_labels_of_several_types_stay_apart() -> None:
    t = np.array([1, "1", 1, "1"], dtype=object)
    table, classes, _ = metrics.contingency(t, [0, 1, 0, 1])
    np.testing.assert_array_equal(table, [[2, 0], [0, 2]])
    assert classes.tolist() == [1, "1"]


@pytest.mark.parametrize(
    ("t", "p", "message"),
    [
        ([0, 1], [0, 1, 1], "labels_true has 2 rows and labels_pred 3"),
        ([], [], "labels_true is empty"),
        ([0, 1], [[0, 1]], "labels_pred has shape"),
        ([0.0, float("nan")], [0, 1], "labels_true has missing values"),
        (np.array([0, None], object), [0, 1], "labels_true has missing values"),
        (["a", float("nan")], [0, 1], "labels_true has missing values"),  # as NumPy has it: "nan"
    ],
)
def test_bad_labels_are_refused(t, p, message: str) -> None:
    for score in (*SCORES, metrics.contingency, metrics.best_match):
        with pytest.raises(InputError, match=message) as error:
            score(t, p)
        assert "\n" not in str(error.value)


def test_cluster_report_by_hand() -> None:
    report = metrics.cluster_report(
        [0, 0, 0, 3],
        np.array([1.0, 0.5, 0.6, 0.9], np.float32),
        ["b", "b", "a", "a"],
        num_clusters=4,
    )
    assert [row["cluster"] for row in report] == [0, 1, 2, 3]
    assert [row["size"] for row in report] == [3, 0, 0, 1]
    assert [row["share"] for row in report] == [0.75, 0, 0, 0.25]
    assert [row["majority"] for row in report] == ["b", None, None, "a"]
    assert report[0]["confidence"] == pytest.approx(0.7)
    assert report[0]["purity"] == pytest.approx(2 / 3)
    assert report[1]["confidence"] is report[1]["purity"] is None
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("names", [np.arange(4), np.array(["n", "e", "s", "w"])])
def test_cluster_report_sums_to_the_whole(names: np.ndarray) -> None:
    t, p = draw(3, 4)
    confidence = np.random.default_rng(0).random(len(p))
    report = metrics.cluster_report(names[p], confidence, t)
    sizes = np.array([row["size"] for row in report])
    assert sizes.sum() == len(p)
    assert sum(row["share"] for row in report) == pytest.approx(1)
    means = np.array([row["confidence"] for row in report])
    assert sizes @ means / len(p) == pytest.approx(confidence.mean())
    purity = sizes @ np.array([row["purity"] for row in report]) / len(p)
    assert purity == pytest.approx(metrics.external_scores(t, p)["purity"])
    assert "purity" not in metrics.cluster_report(p, confidence)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1], [0.5]), "labels_pred has 2 rows and probability 1"),
        (([0, 1], [0.5, 1.5]), "outside"),
        (([0, 1], [0.5, float("nan")]), "outside"),
        (([0, 1], [[0.5, 0.5], [0.5, 0.5]]), "one value per example"),
        (([0, 1], [0.5, 0.5], [1]), "labels_true has 1 rows"),
    ],
)
def test_cluster_report_refuses(arguments, message: str) -> None:
    with pytest.raises(InputError, match=message):
        metrics.cluster_report(*arguments)


def test_cluster_report_refuses_labels_beyond_the_number_of_clusters() -> None:
    with pytest.raises(InputError, match=r"outside 0\.\.2"):
        metrics.cluster_report([0, 3], [1, 1], num_clusters=3)


def blobs() -> tuple[np.ndarray, np.ndarray]:
    x, labels = make_blobs([150, 100, 50], 4, cluster_std=2.0, random_state=0)
    return x.astype(np.float32), labels


def test_internal_scores_equal_oracles() -> None:
    x, labels = blobs()
    density = np.linspace(-5, 3, len(x))
    scores = metrics.internal_scores(x, labels, density)
    assert scores["silhouette"] == pytest.approx(oracle.silhouette_score(x, labels), abs=1e-5)
    entropy = stats.entropy([150, 100, 50]) / np.log(3)
    assert scores["occupancy_entropy"] == pytest.approx(entropy, abs=1e-12)
    assert scores["clusters_nonempty"] == 3
    assert scores["smallest_share"] == pytest.approx(50 / 300)
    assert scores["largest_share"] == pytest.approx(150 / 300)
    assert scores["log_likelihood"] == pytest.approx(-1.0)
    assert metrics.internal_scores(x, labels, -1.0) == pytest.approx(scores)
    assert "log_likelihood" not in metrics.internal_scores(x, labels)


def test_silhouette_on_a_sample_is_seeded_and_close_to_the_whole() -> None:
    x, labels = blobs()
    whole = metrics.internal_scores(x, labels)["silhouette"]
    some = [metrics.internal_scores(x, labels, sample=150, seed=s)["silhouette"] for s in (0, 0, 1)]
    assert some[0] == some[1] != some[2]
    assert some == pytest.approx([whole] * 3, abs=0.1)


def test_internal_scores_do_not_depend_on_names() -> None:
    x, labels = blobs()
    words = np.array(["c", "a", "b"])[labels]
    assert metrics.internal_scores(x, words, seed=3) == pytest.approx(
        metrics.internal_scores(x, labels, seed=3), abs=1e-9
    )


def test_collapse_shows() -> None:
    x, _ = blobs()
    scores = metrics.internal_scores(x, np.full(len(x), 2), num_clusters=5)
    assert scores == {
        "silhouette": 0.0,
        "occupancy_entropy": 0.0,
        "clusters_nonempty": 1.0,
        "smallest_share": 0.0,
        "largest_share": 1.0,
    }
    assert metrics.internal_scores(x, np.zeros(len(x), int))["occupancy_entropy"] == 0.0


def test_empty_clusters_count_when_their_number_is_given() -> None:
    x, labels = blobs()
    scores = metrics.internal_scores(x, labels, num_clusters=6)
    entropy = stats.entropy([150, 100, 50]) / np.log(6)
    assert scores["occupancy_entropy"] == pytest.approx(entropy, abs=1e-12)
    assert (scores["clusters_nonempty"], scores["smallest_share"]) == (3, 0)


@pytest.mark.parametrize(
    ("x", "labels", "knobs", "message"),
    [
        (np.ones(3), [0, 1, 1], {}, "embedding has shape"),
        (np.ones((3, 2)), [0, 1], {}, "embedding has 3 rows and labels_pred 2"),
        (np.ones((0, 2)), [], {}, "labels_pred is empty"),
        (np.array([[0.0], [np.inf]]), [0, 1], {}, "infinite"),
        (np.ones((2, 1)), [0, 1], {"log_likelihood": [0.0]}, "log_likelihood has 1 rows"),
        (np.ones((2, 1)), [0, 1], {"log_likelihood": np.nan}, "log_likelihood holds NaN"),
        (np.ones((2, 1)), [0, 1], {"num_clusters": 1}, r"outside 0\.\.0"),
        (np.ones((2, 1)), [0, -1], {"num_clusters": 2}, r"outside 0\.\.1"),
        (np.ones((2, 1)), [0, 1], {"sample": 1}, "sample is 1"),
    ],
)
def test_internal_scores_refuse(x, labels, knobs, message: str) -> None:
    with pytest.raises(InputError, match=message):
        metrics.internal_scores(x, labels, **knobs)
