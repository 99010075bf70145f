"""Values in the types of JSON."""

import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def plain(value: Any) -> Any:
    """``value`` in the types of JSON: arrays become lists, NaN and infinities ``None``."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return plain(np.asarray(value).tolist())
    raise TypeError(f"{type(value).__name__} has no form in JSON: {value!r}")
