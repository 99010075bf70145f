"""Map: the learned features in two dimensions, with the example under the pointer."""

import numpy as np

from dec_diffusion import report
from dec_diffusion.data import Dataset
from dec_diffusion.evaluate import Assignment
from dec_diffusion.page.cards import MAX_CARDS
from dec_diffusion.page.embed import data_uri, in_unit, sprite
from dec_diffusion.page.markup import Html, tag
from dec_diffusion.page.words import example_name
from dec_diffusion.report import Layout

_SPRITE = 40  # longest side of a picture of the map
_SPRITE_BYTES = 1_300_000


def cluster_map(dataset: Dataset, assignment: Assignment, layout: Layout) -> list[Html]:
    """A dot for each point of the layout, a legend, and what appears beside the pointer."""
    places = _places(layout.flat)
    order = np.random.default_rng(0).permutation(len(places))
    radius = float(np.clip(200 / np.sqrt(max(1, len(places))), 4, 9))
    dots = []
    # In random order, so that no cluster lies on top of the others.
    for turn in order:
        i = int(layout.rows[turn])
        k, (x, y) = int(assignment.labels[i]), places[turn]
        words = f"{example_name(dataset, i)} · cluster {k} · {assignment.probability[i]:.2f}"
        if dataset.labels is not None:
            words += f" · class {dataset.labels[i]}"
        where = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "fill": report.cluster_colour(k)}
        dots.append(tag("circle", **where, data_i=int(turn), data_t=words))
    n, total = len(places), dataset.num_examples
    count = f"{n:,} of {total:,} examples" if n < total else f"all {total:,} examples"
    what = f"The learned features in two dimensions ({layout.method}), {count}"
    drawing = tag(
        "svg",
        *dots,
        viewBox="0 0 1000 700",
        role="img",
        aria_label=f"{what}, coloured by cluster",
        id="map",
        style=f"--r:{radius:.1f}px",
    )
    words = f"{what}. Near means alike; distances between far groups mean little. "
    words += "Point at a dot to see what it is."
    parts = [tag("p", words, class_="faint"), drawing, _legend(assignment.labels)]
    return [*parts, _tip(dataset, layout)]


def _tip(dataset: Dataset, layout: Layout) -> Html:
    """What appears beside the pointer: the example's tile of one picture of them all."""
    tile = []
    if dataset.is_image:
        # One at a time: all at once could be gigabytes.
        shown = (in_unit(dataset, dataset.examples[i]) for i in layout.rows)
        picture, columns, rows = sprite(shown, _SPRITE)
        style = f"background-image:url({data_uri(picture, _SPRITE_BYTES)});"
        style += f"background-size:{100 * columns}% {100 * rows}%;"
        h, w = dataset.example_shape[:2]
        style += f"image-rendering:{'pixelated' if max(h, w) < _SPRITE else 'auto'}"
        tile = [tag("div", class_="tile", style=style, data_columns=columns, data_rows=rows)]
    return tag("div", *tile, tag("span"), id="tip", hidden="")


def _legend(labels: np.ndarray) -> Html:
    found = np.unique(labels)[:MAX_CARDS]
    keys = [
        tag("li", tag("i", style=f"background:{report.cluster_colour(int(k))}"), f"cluster {k}")
        for k in found
    ]
    return tag("ul", *keys, class_="legend")


def _places(flat: np.ndarray) -> np.ndarray:
    """Points [n, 2] stretched over the drawing, upwards as on paper."""
    low, high = flat.min(axis=0), flat.max(axis=0)
    unit = (flat - low) / np.where(high > low, high - low, 1.0)
    return np.c_[20 + 960 * unit[:, 0], 680 - 660 * unit[:, 1]]
