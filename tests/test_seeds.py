"""Runs from several seeds: their table, the choice without labels, and what follows it."""

import csv
import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

import dec_diffusion
from dec_diffusion import data, main, options, seeds, train, trained
from dec_diffusion.command import load_config
from dec_diffusion.seeds import Comparison
from dec_diffusion.types import InputError

SMALL = [
    "--config=neural_mixture:blobs",
    "--config.method.networks=1",
    "--config.method.heads=1",
    "--config.method.width=8",
    "--config.method.hidden=4",
    "--config.method.iterations=2",
    "--config.method.steps=2",
    "--config.data.limit=120",
    "--config.train.batch_size=60",
]
# As small as that, some clusters are empty.
pytestmark = pytest.mark.filterwarnings("ignore::dec_diffusion.train.EmptyClusterWarning")
CONFIG = load_config(options.parse(["main", *SMALL]))


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Comparison:
    return seeds.fit_seeds(CONFIG, tmp_path_factory.mktemp("runs") / "w", [4, 0, 2], verbose=0)


def rows_of(file: pathlib.Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def labels_of(folder: pathlib.Path) -> list[int]:
    return [int(row["cluster"]) for row in rows_of(folder / "assignments.csv")]


def test_every_seed_is_the_run_it_would_be_alone(compared, tmp_path):
    assert {p.name for p in compared.path.iterdir()} == {
        "seed0", "seed2", "seed4", "seeds.json", "seeds.csv",
    }  # fmt: skip
    train.fit(dataclasses.replace(CONFIG, seed=4), tmp_path / "alone", verbose=0)
    for name in ("assignments.csv", "prototypes.npz", "config.json"):
        alone, together = tmp_path / "alone" / name, compared.path / "seed4" / name
        assert alone.read_bytes() == together.read_bytes()


def test_means_and_deviations_are_those_of_the_summaries(compared):
    plain = json.loads((compared.path / "seeds.json").read_text())
    each = [
        json.loads((compared.path / f"seed{s}" / "summary.json").read_text()) for s in (4, 0, 2)
    ]
    for name in ("acc", "nmi", "ari", "silhouette", "mean_probability"):
        values = [summary["scores"][name] for summary in each]
        assert plain["scores"][name]["mean"] == pytest.approx(np.mean(values), abs=1e-12)
        assert plain["scores"][name]["std"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)
        assert [plain["runs"][f"seed{s}"][name] for s in (4, 0, 2)] == values
    values = [summary["baselines"]["kmeans_pixels"]["scores"]["acc"] for summary in each]
    assert plain["baselines"]["kmeans_pixels"]["acc"]["mean"] == pytest.approx(np.mean(values))
    table = rows_of(compared.path / "seeds.csv")
    assert [row["seed"] for row in table] == ["4", "0", "2"]
    assert [row["kept"] for row in table] == [str(int(s == compared.best)) for s in (4, 0, 2)]
    assert [float(row["acc"]) for row in table] == [s["scores"]["acc"] for s in each]


def test_the_choice_is_the_partition_most_like_the_others(compared):
    labels = {s: labels_of(compared.path / f"seed{s}") for s in (4, 0, 2)}
    # Different runs, or the choice would be none.
    assert len({tuple(x) for x in labels.values()}) == 3
    agreement = {
        s: np.mean([adjusted_rand_score(labels[s], labels[r]) for r in labels if r != s])
        for s in labels
    }
    for s, expected in agreement.items():
        assert compared.scores[s]["agreement"] == pytest.approx(expected, abs=1e-12)
    assert compared.best == max(agreement, key=lambda s: agreement[s])
    assert compared.summary["best"] == f"seed{compared.best}"


def test_what_the_choice_costs_is_for_the_reader(compared):
    acc = {s: found["acc"] for s, found in compared.scores.items()}
    cost = compared.summary["cost"]
    assert cost["chosen"] == acc[compared.best]
    assert cost["best"] == acc[cost["best_seed"]] == max(acc.values())
    assert cost["mean"] == pytest.approx(np.mean(list(acc.values())))
    said = seeds.describe(compared)
    assert f"its ACC is {cost['chosen']:.3f}, the mean {cost['mean']:.3f}" in said
    assert f"kept: seed {compared.best}, whose clusters agree most" in said
    # Baselines have the names that they have in the report of a run.
    assert "k-means on the inputs  " in said and "kmeans" not in said


def test_seeds_of_which_only_some_had_labels_are_compared_without(tmp_path):
    scores = [{"silhouette": 0.5, "acc": 0.9}, {"silhouette": 0.4}]
    found = {
        s: {"scores": own, "baselines": {}, "data": {"shape": (2,)}} for s, own in enumerate(scores)
    }
    labels = dict.fromkeys(found, np.array([0, 0, 1, 1]))
    compared = seeds._compare(tmp_path, CONFIG, found, labels, {})
    assert (compared.best, compared.summary["scores"].keys()) == (0, {"silhouette", "agreement"})
    assert "ACC" not in seeds.describe(compared)


def test_the_folder_of_all_stands_for_the_run_kept(compared, tmp_path):
    folder = pathlib.Path(shutil.copytree(compared.path, tmp_path / "w"))
    model = dec_diffusion.load(folder)
    assert model.labels_.tolist() == labels_of(folder / f"seed{compared.best}")
    assert model.random_state == compared.best
    assert main.execute(["main", "--quiet", "--mode=predict", f"--workdir={folder}"]) == 0
    kept = folder / f"seed{compared.best}"
    written = kept / "predict" / "assignments.csv"
    assert written.read_bytes() == (kept / "assignments.csv").read_bytes()
    assert main.execute(["main", "--quiet", "--mode=evaluate", f"--workdir={folder}"]) == 0
    again = json.loads((kept / "evaluate" / "summary.json").read_text())["data"]
    assert again["trained_on"]
    assert again == json.loads((kept / "summary.json").read_text())["data"]


def test_finished_seeds_are_left_alone_and_more_may_join(compared, tmp_path, capsys):
    folder = pathlib.Path(shutil.copytree(compared.path, tmp_path / "w"))

    def contents() -> dict[pathlib.Path, bytes]:
        files = (p for s in (0, 2, 4) for p in (folder / f"seed{s}").rglob("*"))
        return {p: p.read_bytes() for p in files if p.is_file()}

    before = contents()
    argv = ["main", *SMALL, f"--workdir={folder}", "--seeds=0,2,4..5"]
    assert main.execute(argv) == 0
    assert contents() == before
    out = capsys.readouterr().out
    assert out.count("complete after 4 steps") == 3
    assert "4 seeds, mean and standard deviation" in out
    plain = json.loads((folder / "seeds.json").read_text())
    assert list(plain["runs"]) == ["seed0", "seed2", "seed4", "seed5"]
    assert main.execute(["main", "--quiet", *SMALL, f"--workdir={folder}", "--seeds=1"]) == 0
    plain = json.loads((folder / "seeds.json").read_text())
    assert sorted(plain["runs"]) == ["seed0", "seed1", "seed2", "seed4", "seed5"]
    assert contents() == before
    labels = {s: np.array(labels_of(folder / f"seed{s}")) for s in (0, 1, 2, 4, 5)}
    for s, expected in seeds.agreement(labels).items():
        assert plain["runs"][f"seed{s}"]["agreement"] == pytest.approx(expected, abs=1e-12)
    own = data.load(CONFIG.data, verbose=0)
    x = np.asarray(own.examples)
    for other_values in (x[:90], x[::-1]):
        other_data = dataclasses.replace(own, examples=other_values, labels=None)
        with pytest.raises(InputError, match=r"seed0 is of other data \(120 examples"):
            seeds.fit_seeds(CONFIG, folder, [7], dataset=other_data, verbose=0)
    other = dataclasses.replace(CONFIG, method=dataclasses.replace(CONFIG.method, width=9))
    with pytest.raises(InputError, match=r"seed0.*another config: method\.width 8 -> 9"):
        seeds.fit_seeds(other, folder, [7])
    assert not (folder / "seed7").exists()


def test_without_labels_nothing_else_changes(compared, tmp_path):
    dataset = dataclasses.replace(data.load(CONFIG.data), labels=None)
    again = seeds.fit_seeds(CONFIG, tmp_path / "w", [4, 0], dataset=dataset, verbose=0)
    labels = [labels_of(compared.path / f"seed{s}") for s in (4, 0)]
    for s, found in again.scores.items():
        assert found["agreement"] == pytest.approx(adjusted_rand_score(*labels), abs=1e-12)
        assert found["silhouette"] == compared.scores[s]["silhouette"]
        assert "acc" not in found
    assert again.best == max([4, 0], key=lambda s: compared.scores[s]["silhouette"])
    assert "cost" not in again.summary
    said = seeds.describe(again)
    assert "ACC" not in said
    assert f"kept: seed {again.best}, of two the one with the larger silhouette" in said


def test_a_seed_that_failed_before_is_remembered(compared, tmp_path):
    folder = pathlib.Path(shutil.copytree(compared.path, tmp_path / "w"))
    plain = json.loads((folder / "seeds.json").read_text())
    plain["failed"] = {"seed4": "its loss was not finite", "seed0": "so it was"}
    (folder / "seeds.json").write_text(json.dumps(plain))
    (folder / "seed4" / "summary.json").unlink()
    (folder / "seed4" / "assignments.csv").unlink()
    found = seeds.fit_seeds(CONFIG, folder, [2], verbose=0)
    assert found.summary["failed"] == {"seed4": "its loss was not finite"}
    assert sorted(found.scores) == [0, 2]
    (folder / "seed0" / "assignments.csv").write_text("index\n")
    with pytest.warns(UserWarning, match="seed0: is damaged, and not compared"):
        assert sorted(seeds.fit_seeds(CONFIG, folder, [2], verbose=0).scores) == [2]


def test_a_seed_that_fails_is_told_and_the_others_count(tmp_path):
    method = dataclasses.replace(CONFIG.method, learning_rate=1e38, steps=20)
    config = dataclasses.replace(CONFIG, method=method)
    with pytest.raises(train.NonFiniteLossError, match=r"2 of 2 seeds failed, 0: .*not finite"):
        seeds.fit_seeds(config, tmp_path / "w", [0, 1], verbose=0)
    assert not (tmp_path / "w" / "seeds.json").exists()


@pytest.mark.parametrize(
    ("agreement", "silhouette", "best"),
    [
        ([0.2, 0.9, 0.8], [0.9, 0.1, 0.5], 1),
        ([0.5, 0.5], [0.3, 0.4], 1),  # two always agree equally
        ([0.5, 0.5 + 1e-15], [0.4, 0.3], 0),
        ([0.0], [0.1], 0),
        ([0.7, 0.7, 0.7], [0.2, 0.2, 0.2], 0),
    ],
)
def test_ties_go_to_the_silhouette_and_then_to_the_lower_seed(agreement, silhouette, best):
    scores = {
        s: {"agreement": a, "silhouette": v}
        for s, (a, v) in enumerate(zip(agreement, silhouette, strict=True))
    }
    assert seeds.choose(scores) == best


def test_runs_that_found_a_single_cluster_agree_with_nothing():
    one, two = np.zeros(6, int), np.arange(6) % 2
    assert seeds.agreement({0: one, 1: one, 2: one}) == {0: 0.0, 1: 0.0, 2: 0.0}
    assert seeds.agreement({0: one, 1: two, 2: 1 - two}) == {0: 0.0, 1: 0.5, 2: 0.5}
    assert seeds.agreement({3: two}) == {3: 0.0}


@pytest.mark.slow
def test_every_seed_chooses_its_own_number_of_clusters(tmp_path):
    config = load_config(options.parse(["main", *SMALL, "--config.method.num_clusters=auto"]))
    found = seeds.fit_seeds(config, tmp_path / "w", [0, 1], verbose=0)
    plain = json.loads((found.path / "seeds.json").read_text())
    for seed in (0, 1):
        summary = json.loads((found.path / f"seed{seed}" / "summary.json").read_text())
        chosen = summary["num_clusters"]["chosen"]
        assert chosen == 4 == summary["clusters"]["asked"]
        largest = max(labels_of(found.path / f"seed{seed}"))
        assert largest < chosen
        assert plain["runs"][f"seed{seed}"]["clusters_nonempty"] <= chosen
    assert trained.load(found.path).config.method.num_clusters == 4
