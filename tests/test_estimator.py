"""The estimators: scikit-learn's own checks, and what they promise beyond."""

import copy
import csv
import functools
import pickle
import warnings
from typing import Any

import jax
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks

import dec_diffusion
from dec_diffusion import (
    ClusterDDPM,
    DiEC,
    NeuralMixture,
    command,
    data,
    main,
    options,
    parallel,
    results,
    train,
    trained,
)
from dec_diffusion.estimator import _Estimator, _in_terms_of_parameters
from dec_diffusion.types import InputError
from dec_diffusion.workdir import Workdir

TINY: dict[type[_Estimator], dict[str, Any]] = {
    ClusterDDPM: {
        "width": 8,
        "multipliers": (1,),
        "encoder_multipliers": (1, 1),
        "latent": 2,
        "pretrain_iterations": 1,
        "balance_iterations": 0,
        "em_iterations": 1,
        "steps": 3,
        "mixture_restarts": 5,
        "sample_steps": 2,
        "noise": 0.0,
    },
    NeuralMixture: {
        "network": "mlp",
        "width": 16,
        "hidden": 16,
        "networks": 1,
        "heads": 2,
        "iterations": 1,
        "steps": 30,
        "learning_rate": 1e-2,
    },
    DiEC: {
        "width": 8,
        "multipliers": (1,),
        "timesteps": 2,
        "refine": 0,
        "pretrain_iterations": 1,
        "iterations": 1,
        "steps": 2,
        "dims": 3,
        "neighbours": 2,
        "search_restarts": 1,
        "restarts": 5,
        "sample_steps": 2,
    },
}
ALL = list(TINY)

EXPECTED: dict[type[_Estimator], dict[str, str]] = {}

POINTS, TRUTH = map(np.asarray, make_blobs(40, centers=[[0, 0, 0], [9, 9, 0]], random_state=0)[:2])
_RNG = np.random.default_rng(0)
ARRAYS = {
    "points": POINTS,
    "grey": _RNG.integers(0, 256, (40, 6, 6), np.uint8),
    "float": _RNG.random((40, 6, 6, 1)),
    "colour": _RNG.integers(0, 256, (40, 6, 5, 3), np.uint8),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore::dec_diffusion.train.CollapseWarning"),
    pytest.mark.filterwarnings("ignore::dec_diffusion.train.EmptyClusterWarning"),
]


def tiny(kind: type[_Estimator], **parameters: Any) -> Any:
    return kind(**{"n_clusters": 2, "settings": TINY[kind], "random_state": 0} | parameters)


# One for each thing that scikit-learn checks; all of them, for all estimators, run with -m slow.
QUICK = (
    "check_clusterer_compute_labels_predict",
    "check_complex_data",
    "check_dict_unchanged",
    "check_estimators_pickle",
    "check_estimators_unfitted",
    "check_fit2d_1sample",
    "check_methods_sample_order_invariance",
    "check_methods_subset_invariance",
    "check_n_features_in_after_fitting",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_transformer_preserve_dtypes",
)


@pytest.mark.parametrize("name", QUICK)
def test_some_of_the_checks(name):
    getattr(estimator_checks, name)("NeuralMixture", tiny(NeuralMixture))


@pytest.mark.slow
@parametrize_with_checks(
    [tiny(kind) for kind in ALL],
    expected_failed_checks=lambda estimator: EXPECTED.get(type(estimator), {}),
)
def test_all_checks(estimator, check):
    check(estimator)


# -- parameters --


@pytest.mark.parametrize(
    ("kind", "name", "variants"),
    [
        (ClusterDDPM, "clusterddpm", {"small": "digits", "images": "mnist_cpu"}),
        (NeuralMixture, "neural_mixture", {"small": "digits", "images": "mnist"}),
        (DiEC, "diec", {"small": "digits", "images": "images"}),
    ],
)
def test_defaults_are_those_of_the_configs(kind, name, variants):
    for of, variant in (variants | {"vectors": "vectors"}).items():
        parsed = options.parse(["dec-diffusion", f"--config={name}:{variant}"])
        config = command.load_config(parsed)
        assert kind._settings_class(**kind._kinds[of].settings) == config.method
        assert kind._kinds[of].batch_size == config.train.batch_size
    largest = 8 if kind is ClusterDDPM else 16
    for side, of in ((1, "small"), (largest, "small"), (largest + 1, "images")):
        assert kind._kind_of((1, side, 3)) is kind._kinds[of]
    assert kind._kind_of((1,)) is kind._kinds["vectors"]


@pytest.mark.parametrize(
    ("parameters", "parts"),
    [
        ({"settings": {"stepz": 3}}, ["settings['stepz']", "did you mean 'steps'"]),
        ({"settings": {"q": 3}}, ["settings['q']", "methods.neural_mixture.NeuralMixture"]),
        ({"settings": {"num_clusters": 3}}, ["n_clusters"]),
        ({"settings": {"width": 0}}, ["settings['width']=0", "at least 1"]),
        ({"settings": {"width": 1.5}}, ["settings['width']=1.5", "whole number"]),
        ({"n_clusters": 0}, ["n_clusters=0", "at least 1"]),
        ({"n_clusters": "2"}, ["n_clusters=2", "whole number"]),
        ({"n_clusters": 41}, ["n_clusters=41", "40 distinct"]),
        ({"batch_size": 0}, ["batch_size=0"]),
        ({"random_state": -1}, ["random_state=-1"]),
    ],
)
def test_bad_parameters_are_named_at_fit(parameters, parts):
    model = tiny(NeuralMixture, **parameters)
    with pytest.raises(InputError) as caught:
        model.fit(POINTS)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "--" not in message and "\n" not in message


# -- what was fitted --


@functools.cache
def fitted(kind: type[_Estimator], form: str) -> Any:
    return tiny(kind).fit(ARRAYS[form])


every_estimator = pytest.mark.parametrize("kind", ALL)


SLOW_IMAGES = [pytest.param(kind, "grey", marks=pytest.mark.slow) for kind in (ClusterDDPM, DiEC)]


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (ClusterDDPM, "points"),
        pytest.param(DiEC, "points", marks=pytest.mark.slow),
        (NeuralMixture, "points"),
        (NeuralMixture, "grey"),
        *SLOW_IMAGES,
    ],
)
def test_an_estimator_keeps_its_promises(kind, form):
    model, x = fitted(kind, form), ARRAYS[form]
    n = len(x)
    assert model.labels_.shape == (n,) and model.labels_.dtype == np.int32
    np.testing.assert_array_equal(model.predict(x), model.labels_)
    probability = model.predict_proba(x)
    np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(probability.argmax(1), model.labels_)
    z = model.transform(x)
    assert model.cluster_centers_.shape == (2, z.shape[1])
    assert len(model.get_feature_names_out()) == z.shape[1]
    assert model.n_features_in_ == x[0].size
    assert model.n_iter_ == len(model.history_) and model.history_[-1]["step"] > 0
    assert isinstance(model.converged_, bool)
    assert model.score(x) == pytest.approx(model.score_samples(x).mean())
    # Whatever an example comes with, it gets the same, bit by bit.
    for method in (model.predict_proba, model.transform, model.score_samples):
        np.testing.assert_array_equal(method(x[3:5]), method(x)[3:5])


@every_estimator
def test_the_same_seed_gives_the_same_and_compiles_nothing(kind):
    model = fitted(kind, "points")
    clone(model).fit(POINTS)  # its programs may have made room for those of other tests
    before = parallel._programs.cache_info().misses
    again: Any = clone(model)
    again.fit(POINTS)
    assert parallel._programs.cache_info().misses == before
    np.testing.assert_array_equal(again.labels_, model.labels_)
    np.testing.assert_array_equal(again.transform(POINTS), model.transform(POINTS))
    other: Any = clone(model)
    other.set_params(random_state=1).fit(POINTS)
    assert not np.array_equal(other.transform(POINTS), model.transform(POINTS))


@pytest.mark.parametrize("form", ["float", "colour"])
def test_images_of_every_form(form):
    x = ARRAYS[form]
    model = fitted(NeuralMixture, form)
    np.testing.assert_array_equal(model.predict(x), model.labels_)
    with pytest.raises(ValueError, match="give data of that shape"):
        model.predict(x[:, :-1])
    with pytest.raises(ValueError, match=f"NeuralMixture is expecting {x[0].size} features"):
        model.predict(POINTS)


def test_groups_that_are_there_are_found():
    model = tiny(NeuralMixture, settings=TINY[NeuralMixture] | {"iterations": 5})
    assert adjusted_rand_score(model.fit_predict(POINTS), TRUTH) == 1
    pipeline = make_pipeline(StandardScaler(), model).fit(POINTS)
    assert adjusted_rand_score(pipeline.predict(POINTS), TRUTH) == 1


# -- scores, each against another way to compute it --


def test_the_score_of_clusterddpm_is_what_its_last_e_step_maximised():
    model = fitted(ClusterDDPM, "points")
    last = model.history_[-1]["mixture_log_likelihood"]
    assert model.score(POINTS) == pytest.approx(last, rel=1e-4)
    np.testing.assert_array_equal(model.cluster_centers_, model._run.state.cluster.mixture.means)


def test_the_density_of_a_neural_mixture_integrates_to_one():
    model = fitted(NeuralMixture, "points")
    assert np.exp(model.score_samples(POINTS)).mean() == pytest.approx(1, rel=1e-4)
    z = model.transform(POINTS)
    for k in np.unique(model.labels_):
        mean = z[model.labels_ == k].mean(0)
        np.testing.assert_allclose(model.cluster_centers_[k], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_score_of_diec_normalises_its_assignments():
    model = fitted(DiEC, "points")
    square = euclidean_distances(model.transform(POINTS), model.cluster_centers_, squared=True)
    framed = copy.copy(model)
    framed.transform = lambda X: {}  # as of set_output, no array
    joint = model.predict_proba(POINTS) * 2 * np.exp(framed.score_samples(POINTS))[:, None]
    np.testing.assert_allclose(joint, (1 + square / 2) ** -1.5, rtol=1e-3)  # alpha is 2


# -- generation --


@pytest.mark.parametrize(
    ("kind", "form"), [(ClusterDDPM, "points"), (DiEC, "points"), *SLOW_IMAGES]
)
def test_samples_are_in_the_units_of_the_data(kind, form):
    model = fitted(kind, form)
    x, y = model.sample(5)
    assert x.shape == ((5, 6, 6, 1) if form == "grey" else (5, 3)) and x.dtype == np.float32
    assert np.isfinite(x).all()
    if form == "grey":
        assert x.min() >= 0 and 1 < x.max() <= 255
    np.testing.assert_array_equal(model.predict(x), y)
    np.testing.assert_array_equal(x, model.sample(5)[0])
    assert not np.array_equal(x, model.sample(5, random_state=7)[0])
    np.testing.assert_array_equal(model.sample(3, cluster=1)[1], [1, 1, 1])
    with pytest.raises(InputError, match="cluster=2"):
        model.sample(cluster=2)


def test_samples_of_a_data_frame_come_without_a_warning():
    model = copy.copy(fitted(ClusterDDPM, "points"))
    model.feature_names_in_ = np.array(["a", "b", "c"], object)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(model.sample(2)[1]) == 2


def test_warnings_name_parameters():
    sizes = {"clusters_nonempty": 2, "largest_share": 0.5}
    said = pytest.warns(train.EmptyClusterWarning, match=r"ask for fewer with n_clusters, or train")
    with said, _in_terms_of_parameters():
        train._warn_of_sizes(sizes, 3, 1)
    assert warnings.showwarning.__module__ != "dec_diffusion.estimator"


def test_a_neural_mixture_says_that_it_does_not_generate():
    with pytest.raises(InputError, match="NeuralMixture does not generate; fit ClusterDDPM or D"):
        fitted(NeuralMixture, "points").sample()


@pytest.mark.parametrize("load", [dec_diffusion.load, NeuralMixture.load])
def test_what_cannot_be_loaded_is_said_in_terms_of_parameters(load, tmp_path):
    with pytest.raises(
        InputError, match=f"^workdir={tmp_path}/nothing holds no run .* the workdir"
    ):
        load(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"is damaged .* give another workdir$"):
        load(tmp_path)


# -- other data --


def test_the_shape_of_new_images_is_checked_before_their_units():
    model = fitted(NeuralMixture, "grey")
    images = ARRAYS["grey"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one in (images[0], np.zeros((6, 6, 1))):
            with pytest.raises(InputError, match="of one example: give X"):
                model.predict(one)
        with pytest.raises(InputError, match=r"have shape \(5, 6, 1\), the run was trained on"):
            model.predict(1e6 * np.random.default_rng(0).random((9, 5, 6)))
        # What is constant has no range to tell units by.
        assert len(model.predict(np.zeros((3, 6, 6), np.uint8))) == 3
    with pytest.warns(UserWarning, match="give data in the same units"):
        model.predict(np.random.default_rng(0).random((9, 6, 6)))


# -- on disk --


def assert_same_model(a: Any, b: Any, x: np.ndarray) -> None:
    np.testing.assert_array_equal(a.predict_proba(x), b.predict_proba(x))
    np.testing.assert_array_equal(a.score_samples(x), b.score_samples(x))
    for name in ("labels_", "cluster_centers_", "n_iter_", "n_features_in_", "converged_"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.history_ == b.history_


@every_estimator
def test_a_pickle_holds_arrays_and_settings(kind):
    model = fitted(kind, "points")
    state = model.__getstate__()["_run"].state
    assert {type(leaf) for leaf in jax.tree.leaves(state)} <= {np.ndarray, np.generic}
    assert_same_model(pickle.loads(pickle.dumps(model)), model, POINTS)


@every_estimator
def test_saved_is_loaded(kind, tmp_path):
    model = fitted(kind, "points")
    model.save(tmp_path / "model")
    with pytest.raises(InputError, match="holds a run already"):
        model.save(tmp_path / "model")
    for load in (kind.load, dec_diffusion.load):
        loaded = load(tmp_path / "model")
        assert type(loaded) is kind
        assert_same_model(loaded, model, POINTS)
    # As parameters it has what makes it again, whatever the defaults of its kind of data are.
    assert loaded._config(data.from_arrays(POINTS)).method == model._run.config.method
    other = next(k for k in ALL if k is not kind)
    with pytest.raises(InputError, match=f"is a run of {kind.__name__}"):
        other.load(tmp_path / "model")


def test_columns_keep_their_names(tmp_path):
    pa = pytest.importorskip("pyarrow")
    names = ("a", "b", "c")
    rows = (f"row-{i}," + ",".join(map(str, row)) for i, row in enumerate(POINTS[:, :3]))
    lines = ["name," + ",".join(names), *rows]
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    config = tiny(NeuralMixture)._config(data.from_arrays(POINTS[:, :3]))
    config.data.path, config.data.limit = str(tmp_path / "table.csv"), 35
    train.fit(config, tmp_path / "run", verbose=0)
    model = dec_diffusion.load(tmp_path / "run")
    assert tuple(model.feature_names_in_) == names
    model.save(tmp_path / "saved")
    assert tuple(dec_diffusion.load(tmp_path / "saved").feature_names_in_) == names
    kept, saved = (tmp_path / place / "assignments.csv" for place in ("run", "saved"))
    assert kept.read_bytes() == saved.read_bytes()
    index, path = zip(*(r.split(",")[:2] for r in saved.read_text().splitlines()[1:]), strict=True)
    assert path == tuple(f"row-{i}" for i in index) and len(path) == 35
    assert index != tuple(map(str, range(35)))

    def frame(names):
        return pa.table({name: POINTS[:, "abc".index(name)] for name in names})

    wanted = trained.assign(model._run, data.from_arrays(POINTS[:, :3])).labels
    np.testing.assert_array_equal(model.predict(frame(names)), wanted)
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(frame("bac"))
    framed = tiny(NeuralMixture).fit(frame("ca"))
    assert framed._run.columns == ("c", "a")


def test_a_batch_may_exceed_the_data_and_be_numpys(tmp_path):
    model = tiny(NeuralMixture, batch_size=np.int64(256)).fit(POINTS)
    np.testing.assert_array_equal(
        model.labels_, tiny(NeuralMixture, batch_size=40).fit_predict(POINTS)
    )
    model.save(tmp_path / "model")
    again = dec_diffusion.load(tmp_path / "model")
    assert again.batch_size == 256
    np.testing.assert_array_equal(again.predict(POINTS), model.labels_)


def test_the_command_line_reads_what_an_estimator_saved(tmp_path):
    model = fitted(NeuralMixture, "points")
    model.save(tmp_path / "model")
    np.save(tmp_path / "new.npy", POINTS[:7])
    options = ["--mode=predict", f"--workdir={tmp_path}/model", "--quiet"]
    status = main.execute(["dec-diffusion", *options, f"--config.data.path={tmp_path}/new.npy"])
    assert status == 0
    lines = (tmp_path / "model" / "predict" / "assignments.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[2]) for line in lines] == model.labels_[:7].tolist()


def test_samples_of_a_table_are_a_table(tmp_path):
    run = fitted(ClusterDDPM, "points")._run
    trained.save(run._replace(columns=("a", "b, c", "d")), tmp_path / "model")
    assert main.execute(["main", "--mode=sample", f"--workdir={tmp_path}/model", "--quiet"]) == 0
    folder = tmp_path / "model" / "sample"
    samples = np.load(folder / "samples.npy")
    with (folder / "samples.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["cluster", "a", "b, c", "d"]
    assert [int(row[0]) for row in rows] == [0] * 12 + [1] * 12
    values = np.array([row[1:] for row in rows], np.float32)
    np.testing.assert_array_equal(values, samples.reshape(24, 3))
    results.write_samples(run, samples, Workdir(tmp_path))
    first = (tmp_path / "samples.csv").read_text().splitlines()[0]
    assert first == "cluster,column 0,column 1,column 2"


def test_a_workdir_holds_the_run_and_is_resumed(tmp_path, capsys):
    parameters = {"workdir": tmp_path / "run", "random_state": None}
    np.random.seed(3)  # noqa: NPY002  what None draws from
    model = tiny(NeuralMixture, **parameters).fit(POINTS)
    assert capsys.readouterr().out == ""
    for name in ("config.json", "assignments.csv", "metrics.jsonl", "summary.json", "curves.png"):
        assert (tmp_path / "run" / name).exists()
    # Without a seed the second fit takes that of the run, finds it complete, and trains no more.
    again = tiny(NeuralMixture, **parameters, verbose=2).fit(POINTS)
    out = capsys.readouterr().out
    assert "complete" in out and "width=16" in out and "cluster sizes: " in out
    assert_same_model(again, model, POINTS)
    assert_same_model(dec_diffusion.load(tmp_path / "run"), model, POINTS)
    with pytest.raises(InputError, match="belongs to a run with another config"):
        tiny(NeuralMixture, **parameters, batch_size=7).fit(POINTS)
