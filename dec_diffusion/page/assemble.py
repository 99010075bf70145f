"""The page from its sections, and the file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dec_diffusion.config import Config
from dec_diffusion.data import Dataset
from dec_diffusion.evaluate import Assignment
from dec_diffusion.page.cards import cluster_cards
from dec_diffusion.page.doubts import notice_boxes, notices
from dec_diffusion.page.embed import figure
from dec_diffusion.page.map import cluster_map
from dec_diffusion.page.markup import Html, tag
from dec_diffusion.page.scores import comparison, confusion, heading
from dec_diffusion.page.settings import cell_chosen, number_chosen, settings
from dec_diffusion.page.template import document
from dec_diffusion.page.words import method_name
from dec_diffusion.report import Layout

PAGE = "report.html"
MAX_BYTES = 5_000_000
"""What a page takes at most, pictures and all."""


def write(
    path: Any,
    summary: Mapping[str, Any],
    dataset: Dataset,
    assignment: Assignment,
    *,
    config: Config,
    layout: Layout,
    samples: np.ndarray | None = None,
    command: str | None = None,
) -> None:
    """Write the page.

    Args:
        path: the file; ``curves.png``, ``search.png``, ``confusion.png`` and ``num_clusters.png``
            beside it are shown.
        summary: of the run, what ``summary.json`` holds.
        dataset: what was clustered, under the scaling of the run.
        assignment: of that data set.
        config: of the run.
        layout: of the map.
        samples: generated images [k, m, h, w, c] in [0, 1].
        command: that repeats the run, where it is known.
    """
    target = path if hasattr(path, "write_bytes") else Path(path)
    pictures = {
        name: (target.parent / name).read_bytes()
        for name in ("curves.png", "search.png", "confusion.png", "num_clusters.png")
        if (target.parent / name).exists()
    }
    page = build(
        summary,
        dataset,
        assignment,
        config=config,
        layout=layout,
        samples=samples,
        command=command,
        pictures=pictures,
    )
    target.write_bytes(page.encode())


def build(
    summary: Mapping[str, Any],
    dataset: Dataset,
    assignment: Assignment,
    *,
    config: Config,
    layout: Layout,
    samples: np.ndarray | None = None,
    command: str | None = None,
    pictures: Mapping[str, bytes],
) -> Html:
    """The page as a text; ``pictures`` are PNG files by name, the rest as in `write`."""
    things = "images" if dataset.is_image else "examples"
    warned = notices(summary, assignment, config)
    sections = {
        "This run and honest baselines": comparison(summary, dataset.is_image),
        "What to look at": notice_boxes(warned),
        "Clusters": cluster_cards(summary, dataset, assignment, samples),
        "Map": cluster_map(dataset, assignment, layout),
    }
    if "num_clusters" in summary and "num_clusters.png" in pictures:
        chosen = number_chosen(summary["num_clusters"], pictures["num_clusters.png"])
        sections["Number of clusters"] = chosen
    if dataset.labels is not None:
        picture = pictures.get("confusion.png")
        sections["Classes by cluster"] = confusion(dataset.labels, assignment.labels, picture)
    if "curves.png" in pictures:
        alt = "Losses, sizes of clusters and scores over the steps of training"
        sections["Curves"] = figure(pictures["curves.png"], alt)
    if "search" in summary and "search.png" in pictures:
        sections["Search"] = cell_chosen(summary["search"], pictures["search.png"])
    sections["Settings"] = settings(summary, config, command)
    named = {f"s{i}": (title, body) for i, (title, body) in enumerate(sections.items())}
    nav = tag("nav", *(tag("a", t, href=f"#{i}") for i, (t, _) in named.items()), aria_label="Page")
    body = [tag("section", tag("h2", title), *b, id=i) for i, (title, b) in named.items()]
    head = tag("header", *heading(summary, config, things), nav)
    return document(f"{method_name(config)} on {summary['data']['name']}", head, tag("main", *body))
