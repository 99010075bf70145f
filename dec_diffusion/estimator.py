"""The methods as scikit-learn estimators, on arrays in memory.

>>> from dec_diffusion import NeuralMixture
>>> model = NeuralMixture(n_clusters=4, random_state=0).fit(X)     # doctest: +SKIP
>>> model.predict(X_new), model.predict_proba(X_new)               # doctest: +SKIP

All the work is done by ``train.fit`` and ``trained.assign``, as on the command line; what is here
translates parameters, arrays and messages.
"""

import contextlib
import dataclasses
import difflib
import math
import numbers
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from dec_diffusion import config as configs
from dec_diffusion import data, evaluate, parallel, prototypes, results, train, trained, workdir
from dec_diffusion.config import Config, TrainConfig
from dec_diffusion.data import DataConfig, Dataset
from dec_diffusion.methods import clusterddpm, diec, neural_mixture
from dec_diffusion.prototypes import Prototypes
from dec_diffusion.train import NonFiniteLossError
from dec_diffusion.trained import Run
from dec_diffusion.types import InputError
from dec_diffusion.workdir import Assigned, Workdir

_ESTIMATOR = "estimator.json"


class Kind(NamedTuple):
    """What an estimator does with one kind of data unless told otherwise.

    Attributes:
        settings: of the method, where they differ from its own defaults.
        batch_size: examples per gradient step.
    """

    settings: Mapping[str, Any]
    batch_size: int


class _Estimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """What the estimators share: everything but the method and its defaults."""

    _settings_class: ClassVar[type[Any]]
    _kinds: ClassVar[Mapping[str, Kind]]
    _small: ClassVar[int] = 16  # pixels a side: up to here images get the settings of the digits

    labels_: np.ndarray
    cluster_centers_: np.ndarray
    n_clusters_: int
    n_features_in_: int
    feature_names_in_: np.ndarray  # of a data frame, or a table
    n_iter_: int
    converged_: bool
    history_: list[dict[str, Any]]
    _run: Run
    _assigned: Assigned
    _prototypes: Prototypes | None

    def __init__(
        self,
        n_clusters: int | Literal["auto"] = 10,
        *,
        settings: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
        workdir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.settings = settings
        self.batch_size = batch_size
        self.random_state = random_state
        self.verbose = verbose
        self.workdir = workdir

    # -- fitting --

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Cluster examples.

        Args:
            X: vectors [n, d] or images [n, h, w] or [n, h, w, c]; uint8 or float.
            y: ignored.

        Raises:
            InputError: parameters or data that cannot work (a ``ValueError``).
            NonFiniteLossError: the loss became NaN or infinite.
        """
        examples = self._validated(X, reset=True)
        with _in_terms_of_parameters():
            names = getattr(self, "feature_names_in_", None)
            dataset = data.from_arrays(
                examples, source="X", name="X", columns=None if names is None else list(names)
            )
            config = self._config(dataset)
            if self.verbose > 1:
                print(", ".join(f"{k}={v}" for k, v in configs.flatten(config.method).items()))
            result = train.fit(
                config, self.workdir, dataset=dataset, verbose=min(int(self.verbose), 1)
            )
        self._adopt(result.run, result.history)
        self.labels_ = result.assignment.labels
        self._prototypes = prototypes.choose(result.dataset, result.assignment)
        self._assigned = results.assigned(result.dataset, result.assignment, self._prototypes)
        self.cluster_centers_ = self._centers(result.run, result.assignment)
        if self.verbose > 1:
            sizes = np.bincount(self.labels_, minlength=self.n_clusters_)
            print(f"cluster sizes: {', '.join(map(str, sizes))}")
        if self.workdir is not None:
            self._write_centers(Workdir(Path(self.workdir).expanduser().absolute()))
        return self

    def _config(self, dataset: Dataset) -> Config:
        kind = self._kind_of(dataset.example_shape)
        method = self._settings_class(
            num_clusters=self.n_clusters, **{**kind.settings, **self._given_settings()}
        )
        batch_size = kind.batch_size if self.batch_size is None else self.batch_size
        return Config(
            name=type(self).__name__,
            method=method,
            data=DataConfig(name="array"),
            train=TrainConfig(batch_size=batch_size),
            seed=self._seed(),
        )

    @classmethod
    def _kind_of(cls, shape: tuple[int, ...]) -> Kind:
        if len(shape) == 1:
            return cls._kinds["vectors"]
        return cls._kinds["small" if max(shape[:2]) <= cls._small else "images"]

    def _given_settings(self) -> dict[str, Any]:
        given = dict(self.settings or {})
        known = [f.name for f in dataclasses.fields(self._settings_class)]
        for name in given:
            if name == "num_clusters":
                raise InputError("settings['num_clusters']: give n_clusters instead")
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                where = f"{self._settings_class.__module__}.{self._settings_class.__qualname__}"
                hint = f"did you mean {near[0]!r}?" if near else f"help({where}) lists them"
                raise InputError(f"settings[{name!r}]: no such setting; {hint}")
        return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}

    def _seed(self) -> int:
        if isinstance(self.random_state, numbers.Integral):
            return int(self.random_state)
        if self.random_state is None and self.workdir is not None:
            # A run to resume keeps the seed that it drew.
            with contextlib.suppress(InputError, KeyError):
                return workdir.read_config(self.workdir)["seed"]
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _adopt(self, run: Run, history: list[dict[str, Any]]) -> None:
        """Take over a trained run, without what only its training needs."""
        params = run.state.ema_params
        state = dataclasses.replace(run.state, params=params, opt_state=())
        self._run = run._replace(state=state)
        self.n_clusters_ = run.config.method.num_clusters
        self.n_features_in_ = math.prod(run.spec.shape)
        self.n_iter_ = len(history)
        self.history_ = history
        self.converged_ = self._converged(run.config.method, history)

    def _converged(self, settings: Any, history: list[dict[str, Any]]) -> bool:
        raise NotImplementedError

    def _centers(self, run: Run, assignment: evaluate.Assignment | None) -> np.ndarray:
        raise NotImplementedError

    # -- using what was fitted --

    def predict(self, X: ArrayLike) -> np.ndarray:
        """The most probable cluster of each example, int32 [n]; of those fitted, ``labels_``."""
        return self._assign(X).labels

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """The probability of every cluster, float32 [n, k]; rows sum to one."""
        return self._assign(X).responsibilities

    def transform(self, X: ArrayLike) -> np.ndarray:
        """The space clustered in, float32 [n, e]."""
        return self._assign(X).embedding

    def score_samples(self, X: ArrayLike) -> np.ndarray:
        """The log-likelihood of each example under the method's mixture, float64 [n], in nats."""
        dataset = self._dataset(X)
        method = self._run.method
        assert method.score is not None
        sweep = parallel.compile_sweep(method.score, trained.prepare(dataset, self._run.config))
        key = jax.random.key(self._run.config.seed)
        state = self._run.state
        return sweep(state.ema_params, state.cluster, key).astype(np.float64)

    def score(self, X: ArrayLike, y: Any = None) -> float:
        """The mean of ``score_samples``; ``y`` is ignored."""
        return float(self.score_samples(X).mean())

    def sample(
        self, n_samples: int = 1, *, cluster: int | None = None, random_state: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Generate examples.

        Args:
            n_samples: how many, n.
            cluster: of which cluster; None for examples of the whole.
            random_state: of the draw; None is the seed of the fit.

        Returns:
            Examples, float32 [n, ...] in the units of X, and clusters, int32 [n]: the one asked
            for, or else what ``predict`` gives.

        Raises:
            InputError: the method does not generate, or there is no such cluster.
        """
        check_is_fitted(self)
        if n_samples < 1:
            raise InputError(f"n_samples={n_samples}: must be at least 1")
        num_clusters = self._run.config.method.num_clusters
        if cluster is not None and not 0 <= cluster < num_clusters:
            raise InputError(f"cluster={cluster}: must lie between 0 and {num_clusters - 1}")
        if self._run.method.sample is None:
            raise InputError(
                f"sample: {type(self).__name__} does not generate; fit ClusterDDPM or DiEC"
            )
        seed = self._run.config.seed if random_state is None else random_state
        x = results.generate(self._run, n_samples, cluster=cluster, seed=seed)
        if cluster is None:
            # As it is: what it made needs no checks, and has no names of features.
            made = data.from_arrays(x, source="samples", name="samples", columns=self._run.columns)
            return x, trained.assign(self._run, made).labels
        return x, np.full(n_samples, cluster, np.int32)

    def _assign(self, X: ArrayLike) -> evaluate.Assignment:
        dataset = self._dataset(X)
        return trained.assign(self._run, dataset)

    def _dataset(self, X: ArrayLike) -> Dataset:
        """Examples under the scaling of those fitted; raises InputError on another shape."""
        check_is_fitted(self)
        examples = self._validated(X, reset=False)
        with _in_terms_of_parameters():
            return trained.rescaled(self._run, data.from_arrays(examples, source="X", name="X"))

    def _validated(self, X: Any, *, reset: bool) -> Any:
        least = 2 if reset else 1
        if not reset:
            self._refuse_one_image(X)
        if getattr(X, "ndim", None) in (3, 4) or (isinstance(X, list) and np.ndim(X) > 2):
            X = check_array(X, allow_nd=True, ensure_min_samples=least, estimator=self)
            if reset:
                vars(self).pop("feature_names_in_", None)
            return X
        return validate_data(self, cast(Any, X), reset=reset, ensure_min_samples=least)

    def _refuse_one_image(self, X: Any) -> None:
        """One image [h, w] would be taken for h vectors, and [h, w, c] for h images."""
        shape, own = self._run.spec.shape, getattr(X, "shape", None)
        if shape == (1, 1, 1):  # all readings are the same
            return
        if len(shape) == 3 and own is not None and shape in (tuple(own), (*own, 1)):
            raise InputError(f"X has the shape {tuple(own)} of one example: give X[None]")

    # -- keeping it --

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted estimator to a new folder, a workdir that the command line reads too.

        Raises:
            InputError: the folder is in use or cannot be written.
        """
        check_is_fitted(self)
        with _in_terms_of_parameters():
            place = trained.save(self._run, path)
        for record in self.history_:
            place.append_metrics(record)
        if hasattr(self, "labels_"):
            place.write_assignments(self._assigned)
        if self._prototypes is not None:
            results.write_prototypes(self._prototypes, place)
        if hasattr(self, "cluster_centers_"):
            self._write_centers(place)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The fitted estimator of a workdir, of ``save`` or of a run of the command line.

        Raises:
            InputError: there is no trained run in ``path``, or it is of another method.
        """
        with _in_terms_of_parameters():
            run = trained.load(path)
        if type(run.config.method) is not cls._settings_class:
            raise InputError(
                f"workdir={path}: is a run of {type(run.config.method).__name__}, not of "
                f"{cls.__name__}; use dec_diffusion.load"
            )
        with _in_terms_of_parameters():
            return cls._of(run, path)

    @classmethod
    def _of(cls, run: Run, path: str | os.PathLike[str]) -> Self:
        own = cls(run.config.method.num_clusters)
        own.settings = cls._differing(run) or None
        own.batch_size, own.random_state = run.config.train.batch_size, run.config.seed
        if run.columns is not None:
            own.feature_names_in_ = np.array(run.columns, dtype=object)
        place = Workdir(workdir.locate(path))
        own._adopt(run, place.read_metrics())
        own._prototypes = results.read_prototypes(place)
        assigned, centers = place.read_assignments(), place.read_json(_ESTIMATOR)
        if assigned is not None:
            own.labels_, own._assigned = assigned.cluster, assigned
        if centers is not None:
            own.cluster_centers_ = np.asarray(centers["cluster_centers"], np.float32)
        else:
            with contextlib.suppress(LookupError):
                own.cluster_centers_ = own._centers(run, None)
        return own

    @classmethod
    def _differing(cls, run: Run) -> dict[str, Any]:
        """The settings that make the estimator what the run was."""
        kind = cls._kind_of(run.spec.shape)
        usual = configs.flatten(cls._settings_class(**kind.settings))
        given = configs.flatten(run.config.method)
        return {k: v for k, v in given.items() if v != usual[k] and k != "num_clusters"}

    def _write_centers(self, place: Workdir) -> None:
        place.write_json(_ESTIMATOR, {"cluster_centers": self.cluster_centers_})

    def __getstate__(self) -> Any:
        state: Any = super().__getstate__()
        if "_run" in state:
            run = state["_run"]
            arrays = jax.tree.map(np.asarray, run.state)
            state = {**state, "_run": run._replace(method=None, state=arrays)}
        return state

    def __setstate__(self, state: Any) -> None:
        if "_run" in state:
            run = state["_run"]
            method = trained.build(run.config, run.spec)
            arrays = jax.tree.map(jnp.asarray, run.state)
            state = {**state, "_run": run._replace(method=method, state=arrays)}
        super().__setstate__(state)

    @property
    def _n_features_out(self) -> int:
        method, state, spec = self._run.method, self._run.state, self._run.spec
        batch = {
            "image": np.zeros((1, *spec.shape), np.float32),
            "index": np.zeros(1, np.int32),
            "weight": np.ones(1, np.float32),
        }
        out = jax.eval_shape(
            method.embed, state.ema_params, state.cluster, batch, jax.random.key(0)
        )
        return out.shape[1]

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_run")

    def __sklearn_tags__(self) -> Tags:
        tags: Any = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


class ClusterDDPM(_Estimator):
    """Clustering by EM with a conditional diffusion model (arXiv 2312.08029); generates.

    Without ``settings``, vectors take those of the variant ``vectors`` of
    ``configs/clusterddpm.py``, images of up to 8 x 8 those of ``digits`` and larger ones those of
    ``mnist_cpu``, which is small enough for a CPU.

    Args:
        n_clusters: K, or "auto": `dec_diffusion.num_clusters` chooses it before training.
        settings: fields of ``dec_diffusion.methods.clusterddpm.ClusterDDPM`` and their values.
        batch_size: examples per gradient step, n at most; None for that of the variant.
        random_state: an int is the seed of the command line; a ``RandomState`` (None is NumPy's
            own) draws one.
        verbose: 0 is silent, 1 shows progress, 2 also the settings and the sizes of clusters.
        workdir: None, or where to leave all that a run leaves; fitting the same data with the
            same parameters again resumes from there, and a complete run is only read.

    Attributes:
        labels_: int32 [n], the cluster of each example.
        cluster_centers_: [k, latent], the means of the mixture, in the space of ``transform``.
        n_clusters_: K, also where it was chosen.
        n_features_in_: numbers in one example.
        n_iter_: iterations of all phases.
        converged_: whether the last iteration changed the log-likelihood of the latents by less
            than 1%. Training has a fixed length; nothing is stopped by this.
        history_: a dictionary for each iteration, as in ``metrics.jsonl``.
    """

    _settings_class = clusterddpm.ClusterDDPM
    # On 16 x 16 (USPS) ACC is .80 with the settings of the digits, .96 with the others.
    _small = 8
    _kinds: ClassVar[Mapping[str, Kind]] = {
        "small": Kind({}, 96),
        "images": Kind(
            {
                "width": 8,
                "multipliers": (1, 2, 2),
                "encoder_blocks": 0,
                "start": "layers",
                "balance_iterations": 0,
                "em_iterations": 24,
            },
            128,
        ),
        "vectors": Kind(
            {"width": 256, "noise": 0.2, "balance_iterations": 0, "start": "likelihood"}, 128
        ),
    }

    def _converged(self, settings: Any, history: list[dict[str, Any]]) -> bool:
        return _settled(history, "mixture_log_likelihood")

    def _centers(self, run: Run, assignment: evaluate.Assignment | None) -> np.ndarray:
        return np.asarray(run.state.cluster.mixture.means)

    def score_samples(self, X: ArrayLike) -> np.ndarray:
        """log sum_c pi_c exp(E_q log N_c(z)), float64 [n], in nats.

        That is the likelihood of an example's latent under the mixture, the term that the E-step
        maximises; that of the example itself would need its denoising at every noise level.
        """
        return super().score_samples(X)


class NeuralMixture(_Estimator):
    """Clustering by a network whose outputs are cluster densities (arXiv 2107.02453).

    It does not generate: ``sample`` raises an ``InputError``. Without ``settings``, vectors take
    those of the variant ``vectors`` of ``configs/neural_mixture.py``, images of up to 16 x 16
    those of ``digits`` and larger ones those of ``mnist``.

    Args:
        n_clusters: K, or "auto": `dec_diffusion.num_clusters` chooses it before training.
        settings: fields of ``dec_diffusion.methods.neural_mixture.NeuralMixture`` and their values.
        batch_size: examples per gradient step, n at most; None for that of the variant.
        random_state: as in ``ClusterDDPM``.
        verbose: as in ``ClusterDDPM``.
        workdir: as in ``ClusterDDPM``.

    Attributes:
        labels_: int32 [n], the cluster of each example.
        cluster_centers_: [k, hidden], the mean features of each cluster's members, NaN where there
            are none, in the space of ``transform``; not there after loading a run of the command
            line, which does not keep them.
        n_clusters_: K, also where it was chosen.
        n_features_in_: numbers in one example.
        n_iter_: iterations.
        converged_: whether the last iteration changed the information that the head which
            predicts has of one view from another by less than 1%. Training has a fixed length;
            nothing is stopped by this.
        history_: a dictionary for each iteration, as in ``metrics.jsonl``.
    """

    _settings_class = neural_mixture.NeuralMixture
    _kinds: ClassVar[Mapping[str, Kind]] = {
        "small": Kind(
            {
                "network": "mlp",
                "networks": 4,
                "heads": 3,
                "width": 256,
                "hidden": 128,
                "iterations": 15,
                "steps": 100,
            },
            256,
        ),
        "images": Kind(
            {
                "width": 16,
                "heads": 5,
                "over_heads": 1,
                "neighbours": 5,
                "iterations": 9,
                "steps": 273,
                "learning_rate": 3e-3,
            },
            256,
        ),
        "vectors": Kind(
            {
                "width": 256,
                "hidden": 128,
                "networks": 5,
                "heads": 1,
                "density": "X",
                "tau": 0.7,
                "tau_start": 0.7,
                "noise": 0.2,
                "iterations": 20,
                "steps": 100,
                "learning_rate": 3e-3,
                "decay": False,
            },
            256,
        ),
    }

    def _converged(self, settings: Any, history: list[dict[str, Any]]) -> bool:
        return _settled(history, "information")

    def _centers(self, run: Run, assignment: evaluate.Assignment | None) -> np.ndarray:
        if assignment is None:
            raise LookupError
        members = np.eye(run.config.method.num_clusters)[assignment.labels]
        with np.errstate(invalid="ignore"):
            return (members.T @ assignment.embedding / members.sum(0)[:, None]).astype(np.float32)

    def score_samples(self, X: ArrayLike) -> np.ndarray:
        """log sum_k pi_k p_k(x), float64 [n], in nats: the density against that of the data.

        It is positive where the clusters explain an example better than the average of them.
        """
        return super().score_samples(X)


class DiEC(_Estimator):
    """Clustering by the inner features of a diffusion model (arXiv 2512.20905); generates.

    Without ``settings``, vectors take those of the variant ``vectors`` of ``configs/diec.py``,
    images of up to 16 x 16 those of ``digits`` and larger ones those of ``images``.

    Args:
        n_clusters: K, or "auto": `dec_diffusion.num_clusters` chooses it before training.
        settings: fields of ``dec_diffusion.methods.diec.DiEC`` and their values.
        batch_size: examples per gradient step, n at most; None for that of the variant.
        random_state: as in ``ClusterDDPM``.
        verbose: as in ``ClusterDDPM``.
        workdir: as in ``ClusterDDPM``.

    Attributes:
        labels_: int32 [n], the cluster of each example.
        cluster_centers_: [k, dims], the centres of the Student kernels, in the space of
            ``transform``.
        n_clusters_: K, also where it was chosen.
        n_features_in_: numbers in one example.
        n_iter_: iterations of all phases.
        converged_: whether fewer labels than the share ``tolerance`` changed in the last
            iteration; this ends the training.
        history_: a dictionary for each iteration, as in ``metrics.jsonl``.
    """

    _settings_class = diec.DiEC
    _kinds: ClassVar[Mapping[str, Kind]] = {
        "small": Kind({}, 128),
        "images": Kind({"width": 8}, 128),
        "vectors": Kind({"width": 256, "pretrain_rate": 1e-3, "start": "kmeans"}, 128),
    }

    def _converged(self, settings: Any, history: list[dict[str, Any]]) -> bool:
        changes = [r["label_change"] for r in history if r.get("label_change") is not None]
        return bool(changes and changes[-1] < settings.tolerance)

    def _centers(self, run: Run, assignment: evaluate.Assignment | None) -> np.ndarray:
        return np.asarray(run.state.ema_params["centers"])

    def score_samples(self, X: ArrayLike) -> np.ndarray:
        """log mean_j (1 + |z - mu_j|^2 / alpha)^(-(alpha + 1) / 2), float64 [n], as in (5).

        The logarithm of what normalises the soft assignments. It is 0 at most, and falls with
        the distance to all centres; the kernels are not normalised, so it is no likelihood of
        the example, and not comparable between fits.
        """
        z = self._assign(X).embedding.astype(np.float64)  # transform may give a data frame
        centers = np.asarray(self._run.state.ema_params["centers"], np.float64)
        k, alpha = len(centers), self._run.config.method.freedom
        square = np.square(z[:, None] - centers).sum(-1)
        log_kernel = -(alpha + 1) / 2 * np.log1p(square / alpha)
        return np.asarray(logsumexp(log_kernel, axis=1)) - math.log(k)


def load(path: str | os.PathLike[str]) -> ClusterDDPM | DiEC | NeuralMixture:
    """The fitted estimator of a workdir, whether of ``fit``, ``save`` or the command line.

    Raises:
        InputError: there is no trained run in ``path``, or no estimator of its method.
    """
    with _in_terms_of_parameters():
        run = trained.load(path)
        for kind in (ClusterDDPM, DiEC, NeuralMixture):
            if type(run.config.method) is kind._settings_class:
                return kind._of(run, path)
    raise InputError(
        f"workdir={path}: there is no estimator of {type(run.config.method).__name__}; use "
        "dec_diffusion.trained.load"
    )


def _settled(history: list[dict[str, Any]], name: str) -> bool:
    """Whether the last two values of a figure are within 1% of each other."""
    values = [r[name] for r in history if r.get(name) is not None][-2:]
    return len(values) == 2 and math.isclose(*values, rel_tol=0.01)


@contextlib.contextmanager
def _in_terms_of_parameters() -> Iterator[None]:
    """Messages name options of the command line; here they name parameters instead."""
    show = warnings.showwarning

    def translate(message: Warning | str, category: type[Warning], *where: Any) -> None:
        text = _translated(str(message))
        show(message if text == str(message) else category(text), category, *where)

    warnings.showwarning = translate
    try:
        yield
    except (InputError, NonFiniteLossError) as error:
        raise type(error)(_translated(str(error))) from None
    finally:
        warnings.showwarning = show


def _translated(message: str) -> str:
    text = re.sub(r"--config\.method\.num_clusters", "n_clusters", message)
    text = re.sub(r"--config\.method\.(\w+)", r"settings['\1']", text)
    text = re.sub(r"--config\.train\.(\w+)", r"\1", text)
    text = re.sub(r"--config\.seed", "random_state", text)
    text = re.sub(r"--config\.data\b", "X", text)
    return text.replace("--workdir", "workdir")
