"""Data sets: sources, validation and scaling. NumPy only; nothing here knows about batches.

``load(DataConfig(...))`` reads a named source, ``from_arrays`` wraps arrays already in memory;
both return a validated ``Dataset``. TFDS, h5py and scikit-learn are imported only by the source
that needs them, and TensorFlow never is.
"""

from dec_diffusion.data.config import DataConfig
from dec_diffusion.data.dataset import (
    Dataset,
    check_clusters,
    from_arrays,
    varies,
    warn_of_rounding,
    with_columns,
    with_scaling,
)
from dec_diffusion.data.shares import Team
from dec_diffusion.data.sources import column_names, load

__all__ = [
    "DataConfig",
    "Dataset",
    "Team",
    "check_clusters",
    "column_names",
    "from_arrays",
    "load",
    "varies",
    "warn_of_rounding",
    "with_columns",
    "with_scaling",
]
