"""Deep clustering with diffusion models, in JAX.

>>> import dec_diffusion
>>> model = dec_diffusion.load("runs/clusterddpm-digits")     # doctest: +SKIP
>>> model.predict(X)                                           # doctest: +SKIP

``ClusterDDPM``, ``DiEC`` and ``NeuralMixture`` are scikit-learn estimators for arrays, and ``load``
gives the one that a workdir holds. ``fit`` trains from a ``Config``, as the command line does, and
``fit_seeds`` does so from several seeds.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dec_diffusion.config import Config, TrainConfig
    from dec_diffusion.data import DataConfig, Dataset, from_arrays
    from dec_diffusion.estimator import ClusterDDPM, DiEC, NeuralMixture, load
    from dec_diffusion.results import generate, sample
    from dec_diffusion.seeds import fit_seeds
    from dec_diffusion.train import fit
    from dec_diffusion.trained import assign
    from dec_diffusion.types import InputError

_HOMES = {
    "ClusterDDPM": "estimator",
    "Config": "config",
    "DataConfig": "data",
    "Dataset": "data",
    "DiEC": "estimator",
    "InputError": "types",
    "NeuralMixture": "estimator",
    "TrainConfig": "config",
    "assign": "trained",
    "fit": "train",
    "fit_seeds": "seeds",
    "from_arrays": "data",
    "generate": "results",
    "load": "estimator",
    "sample": "results",
}

__all__ = [
    "ClusterDDPM",
    "Config",
    "DataConfig",
    "Dataset",
    "DiEC",
    "InputError",
    "NeuralMixture",
    "TrainConfig",
    "assign",
    "fit",
    "fit_seeds",
    "from_arrays",
    "generate",
    "load",
    "sample",
]


def __getattr__(name: str) -> Any:
    # Public names are imported when first used: importing the package starts nothing heavy.
    if name not in _HOMES:
        raise AttributeError(f"module 'dec_diffusion' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dec_diffusion.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
