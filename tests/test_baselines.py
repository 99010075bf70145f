"""Baselines: right answers on easy data, agreement with scikit-learn, and fairness rules."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, make_blobs
from sklearn.metrics import adjusted_rand_score

from dec_diffusion import baselines as module
from dec_diffusion import evaluate
from dec_diffusion.baselines import LARGE, baselines, gmm_on, graph_on, kmeans_on
from dec_diffusion.data import from_arrays
from dec_diffusion.metrics import external_scores, internal_scores
from dec_diffusion.types import InputError

METHODS = [kmeans_on, gmm_on, graph_on]


def blobs(n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    return make_blobs(n, 5, centers=4, cluster_std=0.5, random_state=3)


def digits() -> tuple[np.ndarray, np.ndarray]:
    x, labels = load_digits(return_X_y=True)
    return x[:600] / 16, labels[:600]


@pytest.mark.parametrize("names", [np.arange(4), np.array(["n", "e", "s", "w"])])
def test_separated_blobs_are_found(names: np.ndarray) -> None:
    x, labels = blobs()
    found = baselines(x, 4, names[labels], seed=0)
    assert {"kmeans_pixels", "gmm_pixels", "graph_pixels"} <= set(found)
    for name in ("kmeans_pixels", "gmm_pixels", "graph_pixels"):
        result = found[name]
        assert result["scores"]["acc"] == result["scores"]["ari"] == 1.0
        assert result["labels"].shape == (300,)
        assert result["labels"].dtype == np.int32
        assert result["seconds"] > 0
        assert result["settings"].get("converged", True)


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_the_labels_returned(method) -> None:
    x, labels = digits()
    result = method(x, 10, labels, seed=1)
    expected = external_scores(labels, result["labels"])
    expected |= internal_scores(x, result["labels"], num_clusters=10, seed=1)
    assert result["scores"] == pytest.approx(expected, abs=1e-9)
    assert result["scores"]["acc"] > 0.65  # five times chance: digits are not that hard


@pytest.mark.parametrize("method", METHODS)
def test_labels_change_scores_only(method) -> None:
    x, labels = digits()
    blind, seeing = method(x, 10, seed=0), method(x, 10, labels[::-1], seed=0)
    np.testing.assert_array_equal(blind["labels"], seeing["labels"])
    assert set(seeing["scores"]) - set(blind["scores"]) == set(external_scores([0], [0]))


def test_the_graph_finds_digits_that_kmeans_does_not() -> None:
    x, labels = digits()
    graph = graph_on(x, 10, labels, seed=0)
    assert graph["scores"]["nmi"] > kmeans_on(x, 10, labels, seed=0)["scores"]["nmi"] + 0.05
    assert 0.7 < graph["settings"]["modularity"] < 0.9  # of ten groups at most 1 - 1 / 10


def test_rows_beyond_the_graph_join_their_neighbours(monkeypatch) -> None:
    x, labels = blobs()
    monkeypatch.setattr(module, "GRAPH_ROWS", 100)
    result = graph_on(x, 4, labels, seed=0)
    assert result["settings"]["rows_fitted"] == 100
    assert result["scores"]["acc"] == 1.0
    # As many clusters as that, or more, take as many rows.
    assert graph_on(x, 120, seed=0)["settings"]["rows_fitted"] == 120


def test_the_graph_is_left_out_of_very_many_clusters() -> None:
    x, _ = blobs()
    assert "graph_pixels" in baselines(x, 200, seed=0)
    more = baselines(x, 201, seed=0)
    assert "kmeans_pixels" in more
    assert "graph_pixels" not in more


def test_the_graph_compares_what_its_view_shows() -> None:
    x, labels = blobs()
    noise = np.random.default_rng(0).normal(size=(300, 5))
    both = np.concatenate([100 * noise, x], axis=1)
    seen = baselines(both, 4, labels, seed=0, view=lambda rows: rows[:, 5:])
    assert seen["graph_pixels"]["scores"]["acc"] == 1.0
    assert seen["kmeans_pixels"]["scores"]["acc"] < 0.6


def test_thumbnails_are_those_of_the_scaled_images() -> None:
    images = np.random.default_rng(0).normal(size=(5, 9, 9, 1)).astype(np.float32)
    seen = []
    for units in (1.0, 1e-4):
        dataset = from_arrays(units * images)
        rows = np.asarray(dataset.examples).reshape(5, -1)
        seen.append(evaluate._thumbnails(dataset, rows))
    np.testing.assert_allclose(np.square(seen[0]).sum(1), 1, atol=1e-4)
    np.testing.assert_allclose(*seen, atol=1e-5)


def test_umap_is_a_baseline_where_it_is_installed() -> None:
    pytest.importorskip("umap")
    x, labels = blobs()
    result = baselines(x, 4, labels, seed=0)["umap_pixels"]
    assert result["scores"]["acc"] == 1.0
    assert result["settings"]["axes"] == 5


def test_kmeans_is_scikit_learns() -> None:
    x, _ = digits()
    reference = KMeans(10, n_init=10, random_state=4).fit(x).labels_
    assert adjusted_rand_score(reference, kmeans_on(x, 10, seed=4)["labels"]) > 0.999


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", [lambda x: 255 * x, lambda x: x / 3 + 1000.0])
def test_units_do_not_matter(method, change) -> None:
    x, _ = digits()
    first, second = method(x, 10, seed=0)["labels"], method(change(x), 10, seed=0)["labels"]
    assert adjusted_rand_score(first, second) > 0.999


@pytest.mark.parametrize("method", METHODS)
def test_seeded_in_threads_and_no_global_random_state(method) -> None:
    x, _ = digits()
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    alone = [method(x, 10, seed=s)["labels"] for s in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda s: method(x, 10, seed=s)["labels"], range(3)))
    np.testing.assert_array_equal(alone, together)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize("method", METHODS)
def test_limit_fits_few_rows_and_labels_all(method) -> None:
    x, labels = blobs()
    result = method(x, 4, labels, seed=0, limit=100)
    assert result["settings"]["rows_fitted"] == 100
    assert result["labels"].shape == (300,)
    assert result["scores"]["acc"] == 1.0
    assert method(x, 4, seed=0, limit=10**9)["settings"]["rows_fitted"] == 300


def test_many_rows_get_fewer_starts_and_say_so() -> None:
    x, labels = blobs(LARGE + 1)
    assert kmeans_on(x[:, :2], 4, labels, seed=0)["settings"]["starts"] == 3
    assert gmm_on(x[:, :2], 4, labels, seed=0)["settings"]["starts"] == 1
    assert kmeans_on(x[:, :2], 4, seed=0, limit=500)["settings"]["starts"] == 10


@pytest.mark.parametrize("method", METHODS)
def test_one_cluster_and_integer_pixels(method) -> None:
    x = (digits()[0] * 16).astype(np.uint8)
    result = method(x, 1, seed=0)
    assert set(result["labels"]) == {0}
    assert result["scores"]["largest_share"] == 1.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("x", "k", "knobs", "message"),
    [
        (np.ones(4), 2, {}, "examples, dimensions"),
        (np.ones((0, 3)), 1, {}, "non-empty"),
        (np.array([[0.0], [np.nan]]), 1, {}, "finite"),
        (np.array([["a"], ["b"]]), 1, {}, "numbers"),
        (np.eye(3), 0, {}, "k is 0"),
        (np.eye(3), 4, {}, "between 1 and 3"),
        (np.eye(3), 3, {"limit": 2}, "between 1 and 2"),
        (np.eye(3), 2, {"limit": 0}, "limit is 0"),
        (np.eye(3), 2, {"labels_true": [0, 1]}, "labels_true has 2 rows"),
    ],
)
def test_bad_input_is_refused(method, x, k: int, knobs, message: str) -> None:
    with pytest.raises(InputError, match=message):
        method(x, k, seed=0, **knobs)
