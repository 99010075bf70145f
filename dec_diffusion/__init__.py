"""Deep clustering with diffusion models, in JAX.

>>> import dec_diffusion
>>> run = dec_diffusion.load("runs/clusterddpm-digits")     # doctest: +SKIP

``fit`` trains and writes a workdir, ``load`` reads one back, ``assign`` clusters new data.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dec_diffusion.config import Config, TrainConfig
    from dec_diffusion.data import DataConfig, Dataset, from_arrays
    from dec_diffusion.methods.clusterddpm import ClusterDDPM
    from dec_diffusion.methods.neural_mixture import NeuralMixture
    from dec_diffusion.results import generate, sample
    from dec_diffusion.train import assign, fit, load
    from dec_diffusion.types import InputError

_HOMES = {
    "ClusterDDPM": "methods.clusterddpm",
    "Config": "config",
    "DataConfig": "data",
    "Dataset": "data",
    "InputError": "types",
    "NeuralMixture": "methods.neural_mixture",
    "TrainConfig": "config",
    "assign": "train",
    "fit": "train",
    "from_arrays": "data",
    "generate": "results",
    "load": "train",
    "sample": "results",
}

__all__ = [
    "ClusterDDPM",
    "Config",
    "DataConfig",
    "Dataset",
    "InputError",
    "NeuralMixture",
    "TrainConfig",
    "assign",
    "fit",
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
