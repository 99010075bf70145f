"""What several sections call a method, a baseline or an example, and how they write a number."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dec_diffusion.config import Config
from dec_diffusion.data import Dataset

_BASELINES = {
    "kmeans_pixels": "k-means on the {inputs}",
    "gmm_pixels": "Gaussian mixture on the {inputs}",
    "graph_pixels": "clustering the neighbour graph of the {examples}",
    "umap_pixels": "k-means on a UMAP embedding of the {inputs}",
    "kmeans_latents": "k-means on the learned features",
    "gmm_latents": "Gaussian mixture on the learned features",
    "kmeans_at_cell": "k-means on the features found by the search, before fine-tuning",
    "graph_at_timestep": "communities of the neighbour graph of all layers, before fine-tuning",
}
_LONGEST_NAME = 160


def number(value: Any, name: str) -> str:
    """The value of a score or a fact with as many digits as one of that name deserves."""
    if value is None or not np.isfinite(value):
        return "n/a"
    if name == "clusters_nonempty":
        return f"{value:.0f}"
    if name in ("seconds", "examples_per_second"):
        return f"{value:,.1f}"
    return f"{value:.3f}"


def method_name(config: Config) -> str:
    """The method of a run."""
    return type(config.method).__name__


def baseline_name(name: str, is_image: bool) -> str:
    """What a baseline of the summary is, in words."""
    known = _BASELINES.get(name) or name.replace("_", " ")
    inputs, examples = ("pixels", "images' thumbnails") if is_image else ("inputs", "inputs")
    return known.format(inputs=inputs, examples=examples)


def wanted(summary: Mapping[str, Any]) -> str:
    """Where the number of clusters comes from: "asked for", or "chosen" by the run itself."""
    return "chosen" if "num_clusters" in summary else "asked for"


def example_name(dataset: Dataset, i: int) -> str:
    """Example ``i``: its file or its name in a table, or its row in the source.

    The middle of a long one is cut: the first column of a table may hold whole texts, and a page
    shows thousands of names.
    """
    name = dataset.paths[i] if dataset.paths else f"row {dataset.rows[i]}"
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"
