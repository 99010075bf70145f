"""The number of clusters, chosen without labels: its steps, its answers, runs that ask for it."""

import csv
import json
import os
import pathlib

import numpy as np
import pytest
from scipy import sparse
from scipy.spatial.distance import pdist
from sklearn.datasets import load_digits

import dec_diffusion
from dec_diffusion import num_clusters, report
from dec_diffusion.data import synthetic
from dec_diffusion.method import DataSpec
from dec_diffusion.num_clusters import Choice

MODULE = "import runpy; runpy.run_module('dec_diffusion.main', run_name='__main__', alter_sys=True)"


def halves(shape: tuple[int, int], *, apart: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A Gaussian cut in two through its middle, the second part moved away."""
    x = np.random.default_rng(1).standard_normal(shape)
    right = x[:, 0] > 0
    return x[~right], x[right] + apart * np.eye(shape[1])[0]


# -- the steps --


def test_the_graph_is_that_of_shared_neighbours():
    z = np.random.default_rng(0).standard_normal((40, 3))
    graph = num_clusters.shared_neighbours(z, 4).toarray()
    order = np.argsort(np.square(z[:, None] - z).sum(-1), axis=1)[:, :5]
    near = [set(row.tolist()) for row in order]
    for i in range(40):
        for j in range(40):
            linked = i != j and (i in near[j] or j in near[i])
            jaccard = len(near[i] & near[j]) / len(near[i] | near[j])
            assert graph[i, j] == pytest.approx(jaccard if linked else 0.0)


def modularity(graph: np.ndarray, labels: np.ndarray) -> float:
    strength = graph.sum(0)
    same = labels[:, None] == labels
    return ((graph - np.outer(strength, strength) / graph.sum()) * same).sum() / graph.sum()


def test_communities_are_those_of_the_greatest_modularity():
    # Six cliques of five in a ring, neighbours joined by one edge: the best partition is known.
    graph = np.kron(np.eye(6), 1 - np.eye(5))
    for i in range(0, 30, 5):
        graph[i, (i + 7) % 30] = graph[(i + 7) % 30, i] = 1
    for seed in range(3):
        found = num_clusters.communities(sparse.csr_array(graph), np.random.default_rng(seed))
        assert len(np.unique(found)) == 6
        assert modularity(graph, found) == pytest.approx(modularity(graph, np.arange(30) // 5))


@pytest.mark.parametrize("dimensions", [1, 3, 20])
def test_a_gaussian_cut_in_two_has_no_valley(dimensions):
    depth = num_clusters.valley(*halves((800, dimensions)), np.random.default_rng(0))
    assert depth > 0.9


def test_valleys_deepen_as_groups_part():
    rng = np.random.default_rng(0)
    depths = [num_clusters.valley(*halves((800, 5), apart=a), rng) for a in (0.0, 1.0, 2.0, 4.0)]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] > 0.9 and depths[-1] < 0.05


def test_noise_in_many_dimensions_is_not_mistaken_for_a_valley():
    # The axis found on all of so few examples parts any two sets; on the other half it does not.
    x = np.random.default_rng(0).standard_normal((60, 50))
    assert num_clusters.valley(x[:30], x[30:], np.random.default_rng(0)) > 0.7


def test_merging_takes_the_closest_first():
    rng = np.random.default_rng(0)
    centres = np.array([[0.0], [3.0], [20.0]])
    labels = np.repeat([0, 1, 2], 200)
    z = centres[labels] + rng.standard_normal((600, 1))
    full = sparse.csr_array(np.ones((600, 600)))
    clusters, valleys, joined = num_clusters.merge(z, full, labels, rng)
    assert clusters == [3, 2] and joined[0] == (0, 1)
    assert valleys[0] > 0.3 > valleys[1]


# -- the answers --


@pytest.mark.parametrize(("name", "truth"), [("gmm4", 4), ("gmm10", 10), ("imb3", 3)])
def test_synthetic_sets(name, truth):
    for seed in range(2):
        x, _ = synthetic.draw_blobs(name, seed=seed)
        choice = num_clusters.choose(x, seed=seed)
        assert choice.chosen == choice.found == truth
        weights = np.sort(synthetic.SETS[name].weights)[::-1]
        np.testing.assert_allclose(choice.shares, weights, atol=0.01)


@pytest.mark.parametrize("dimensions", [10, 60])
def test_unequal_groups_in_many_dimensions(dimensions):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), [600, 300, 200, 100, 60, 40])
    x = 3 * rng.standard_normal((6, dimensions))[labels] + rng.standard_normal((1300, dimensions))
    assert num_clusters.choose(x).chosen == 6


def test_digits():
    images, _ = load_digits(return_X_y=True)
    assert abs(num_clusters.choose(images.reshape(-1, 8, 8)).chosen - 10) <= 2


def test_units_do_not_matter_where_the_scaling_is_given():
    x, _ = synthetic.draw_blobs("gmm4")
    plain = num_clusters.choose(x)
    scaled = num_clusters.choose(8 * x + 4, offset=4.0, scale=np.array([8.0, 8.0]))
    assert scaled.chosen == plain.chosen == 4


def test_examples_of_few_different_values_are_warned_of():
    rng = np.random.default_rng(0)
    centre = np.where(rng.integers(0, 2, (600, 1)) == 0, 1.7, 4.3)
    ratings = np.clip(np.round(centre + rng.normal(0, 0.7, (600, 2))), 1, 5)
    different = len(np.unique(ratings, axis=0))
    with pytest.warns(UserWarning, match=rf"only {different} of 600 examples differ"):
        num_clusters.choose(ratings)
    assert num_clusters.choose(ratings + rng.uniform(-0.5, 0.5, ratings.shape)).chosen == 2


def test_the_same_seed_chooses_alike_and_examples_are_bounded(monkeypatch):
    x, _ = synthetic.draw_blobs("gmm4", n=600)
    assert num_clusters.choose(x, seed=3) == num_clusters.choose(x, seed=3)
    monkeypatch.setattr(num_clusters, "EXAMPLES", 200)
    assert num_clusters.choose(x, seed=3).examples == 200


def test_one_group_is_said_to_be_one():
    x = np.random.default_rng(0).standard_normal((900, 4))
    choice = num_clusters.choose(x)
    assert (choice.found, choice.chosen, choice.shares) == (1, 2, (1.0,))
    assert "may be one group" in num_clusters.describe(choice)


@pytest.mark.filterwarnings("ignore:only 2 of 600 examples differ")
@pytest.mark.parametrize(
    "x",
    [
        np.array([[0.0], [1.0]]),
        np.array([[0.0], [0.0], [1.0]]),
        np.repeat([[0.0, 0.0], [1.0, 1.0]], 300, axis=0),
        np.random.default_rng(0).standard_normal((9, 400)),
    ],
)
def test_few_examples_or_few_distinct_ones(x):
    assert num_clusters.choose(x).chosen == 2


def test_few_examples_of_many_values_lose_nothing_by_their_axes(monkeypatch):
    rng = np.random.default_rng(0)
    x = 4 * rng.standard_normal((3, 400))[np.repeat([0, 1, 2], 15)] + rng.standard_normal((45, 400))
    z = num_clusters.principal_axes(x, num_clusters.AXES)
    assert z.shape == (45, 44)
    np.testing.assert_allclose(pdist(z), pdist(x), rtol=1e-9)
    short = num_clusters.choose(x)
    monkeypatch.setattr(num_clusters, "principal_axes", lambda x, most: x - x.mean(0))
    whole = num_clusters.choose(x)
    assert short.chosen == whole.chosen == 3 and short.clusters == whole.clusters
    np.testing.assert_allclose(short.valleys, whole.valleys, atol=1e-4)


def test_other_thresholds_give_what_is_said(monkeypatch):
    images, _ = load_digits(return_X_y=True)
    choice = num_clusters.choose(images)
    low, high = choice.holds
    assert low < choice.threshold <= high
    found = {}
    for threshold in (low * 1.01, high, low * 0.99, high * 1.01):
        monkeypatch.setattr(num_clusters, "SHALLOW", threshold)
        found[threshold] = num_clusters.choose(images).chosen
    inside, outside = list(found.values())[:2], list(found.values())[2:]
    assert inside == [choice.chosen] * 2
    assert choice.runner_up in outside and choice.chosen not in outside
    assert f"runner-up {choice.runner_up}" in num_clusters.describe(choice)


# -- what is shown --


CHOICE = Choice(3, 3, 5, 0.3, (0.1, 0.45), (5, 4, 3, 2), (0.9, 0.45, 0.1, 0.05), (0.5, 0.3, 0.2), 9)


def test_a_choice_survives_its_file():
    kept = json.loads(json.dumps(CHOICE._asdict()))
    assert num_clusters.describe(kept) == num_clusters.describe(CHOICE)
    assert num_clusters.describe(CHOICE).startswith("3 clusters, chosen without labels")


def test_the_picture_of_a_choice(tmp_path):
    report.choice_of_clusters(tmp_path / "a.png", CHOICE._asdict())
    report.choice_of_clusters(tmp_path / "b.png", CHOICE._asdict() | {"chosen": 2})
    a, b = ((tmp_path / n).read_bytes() for n in ("a.png", "b.png"))
    assert a.startswith(b"\x89PNG") and a != b
    report.choice_of_clusters(
        tmp_path / "c.png", CHOICE._asdict() | {"clusters": [], "valleys": []}
    )


# -- runs --

TINY = [
    "--config=neural_mixture:vectors",
    "--config.method.num_clusters=auto",
    "--config.method.width=16",
    "--config.method.hidden=16",
    "--config.method.networks=1",
    "--config.method.iterations=1",
    "--config.method.steps=60",
    "--config.data.path=points.npy",
    "--workdir=run",
]


@pytest.fixture(scope="module")
def finished(run_python, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """The folder of a run that chose its number of clusters, and what it printed."""
    cwd = tmp_path_factory.mktemp("auto")
    np.save(cwd / "points.npy", synthetic.draw_blobs("gmm4", n=400)[0])
    return cwd, run_python(MODULE, *TINY, cwd=cwd).stdout


def test_a_run_chooses_says_so_and_keeps_it(finished):
    cwd, said = finished
    run = cwd / "run"
    choice = json.loads((run / "num_clusters.json").read_text())
    assert choice["chosen"] == 4 and len(choice["clusters"]) == len(choice["valleys"])
    assert num_clusters.describe(choice) in said and ", 4 clusters, 1 cpu" in said
    assert json.loads((run / "config.json").read_text())["method"]["num_clusters"] == "auto"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["num_clusters"] == choice and summary["clusters"]["asked"] == 4
    assert "num_clusters.png" in said and (run / "num_clusters.png").read_bytes()[1:4] == b"PNG"
    page = (run / "report.html").read_text()
    assert "Number of clusters" in page and "--config.method.num_clusters=auto" in page
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("clusters_nonempty", "smallest_share", "largest_share"):
        assert 0 < records[-1][name] <= 4


def test_the_same_command_goes_on_with_the_same_number(finished, run_python):
    cwd, _ = finished
    kept = (cwd / "run" / "num_clusters.json").read_bytes()
    again = run_python(MODULE, *TINY, cwd=cwd).stdout
    assert "complete after" in again and "choosing" not in again
    assert (cwd / "run" / "num_clusters.json").read_bytes() == kept
    other = run_python(MODULE, *TINY, "--config.method.num_clusters=3", cwd=cwd, status=2)
    assert "num_clusters" in other.stderr


@pytest.mark.parametrize("named", [True, False])
def test_other_modes_know_the_number(finished, run_python, named):
    cwd, _ = finished
    x, _ = synthetic.draw_blobs("gmm4", n=50, seed=1)
    np.save(cwd / "new.npy", x)
    config = TINY[:-2] if named else []
    run_python(
        MODULE, "--mode=predict", *config, "--config.data.path=new.npy", "--workdir=run", cwd=cwd
    )
    with open(cwd / "run" / "predict" / "assignments.csv", encoding="utf-8") as file:
        found = [int(row["cluster"]) for row in csv.DictReader(file)]
    assert len(found) == 50 and set(found) <= set(range(4))
    if named:
        said = run_python(
            MODULE, "--mode=evaluate", "--config.data.path=new.npy", "--workdir=run", cwd=cwd
        ).stdout
        # The picture of the choice is of the training, and not in this folder.
        assert "of 4 clusters have members, chosen without labels\n" in said
        text = (cwd / "run" / "evaluate" / "report.html").read_text()
        assert "4 clusters chosen, " in text and "4 clusters asked for" not in text
    model = dec_diffusion.load(cwd / "run")
    assert model.n_clusters == model.n_clusters_ == 4
    assert model.predict(x).tolist() == found


def test_a_run_that_was_killed_before_it_chose_says_so(finished, run_python, tmp_path):
    cwd, _ = finished
    os.mkdir(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_bytes((cwd / "run" / "config.json").read_bytes())
    done = run_python(MODULE, "--mode=predict", "--workdir=run", cwd=tmp_path, status=2)
    assert "has not chosen its number of clusters" in done.stderr
    assert done.stderr.count("\n") == 1


SMALL = {
    dec_diffusion.ClusterDDPM: {
        "width": 8,
        "latent": 2,
        "pretrain_iterations": 1,
        "balance_iterations": 0,
        "em_iterations": 1,
        "steps": 2,
        "mixture_restarts": 2,
    },
    dec_diffusion.NeuralMixture: {"width": 8, "hidden": 8, "networks": 1, "steps": 2},
    dec_diffusion.DiEC: {
        "width": 8,
        "timesteps": 2,
        "refine": 0,
        "pretrain_iterations": 1,
        "iterations": 1,
        "steps": 2,
        "dims": 2,
        "search_restarts": 1,
        "restarts": 2,
        "start": "kmeans",
    },
}


@pytest.mark.filterwarnings("ignore::dec_diffusion.train.EmptyClusterWarning")
@pytest.mark.filterwarnings("ignore::dec_diffusion.train.CollapseWarning")
@pytest.mark.parametrize(
    "kind",
    [
        dec_diffusion.NeuralMixture,
        pytest.param(dec_diffusion.ClusterDDPM, marks=pytest.mark.slow),
        pytest.param(dec_diffusion.DiEC, marks=pytest.mark.slow),
    ],
)
def test_estimators_choose_before_they_fit(kind, capsys):
    x, _ = synthetic.draw_blobs("imb3", n=300)
    model = kind("auto", settings=SMALL[kind], random_state=0, verbose=1).fit(x)
    assert model.n_clusters == "auto" and model.n_clusters_ == 3
    assert model.predict_proba(x[:5]).shape == (5, 3)
    assert "3 clusters, chosen without labels" in capsys.readouterr().out


@pytest.mark.parametrize("kind", SMALL)
def test_a_method_is_not_built_without_a_number(kind):
    settings = kind._settings_class(num_clusters="auto")
    with pytest.raises(dec_diffusion.InputError, match="num_clusters=auto"):
        settings.build(DataSpec((2,), 50))


@pytest.mark.parametrize("value", ["automatic", 2.5, None])
def test_other_words_are_refused(value):
    with pytest.raises(dec_diffusion.InputError, match=r"n_clusters=.*a whole number, or auto"):
        dec_diffusion.NeuralMixture(value).fit(np.eye(5))
