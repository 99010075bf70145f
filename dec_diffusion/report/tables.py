"""Heat maps of one table: classes by clusters, and the clusters' means."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from dec_diffusion.metrics import matched_order
from dec_diffusion.report.style import (
    FAINT,
    INK,
    MAX_ROWS,
    check_labels,
    cluster_colour,
    clusters_text,
    darker,
    new_figure,
    save,
    short_names,
    title_style,
)
from dec_diffusion.types import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def confusion(path: Any, table: ArrayLike, classes: ArrayLike, clusters: ArrayLike) -> None:
    """Heat map of a contingency table: how each class spreads over the clusters.

    Both are reordered so that matched pairs (Hungarian method) lie on the diagonal, clusters
    without a class last, as are classes without a cluster. Colour is the share of the class,
    numbers are counts.

    Args:
        path: PNG file to write.
        table: int [classes, clusters], see `metrics.contingency`.
        classes: [classes] names of the rows; ``clusters``: [clusters] of the columns.

    Raises:
        InputError: names that do not match the table.
    """
    counts = np.asarray(table)
    rows, columns = np.asarray(classes).tolist(), np.asarray(clusters).tolist()
    if counts.ndim != 2 or 0 in counts.shape or counts.shape != (len(rows), len(columns)):
        raise InputError(
            f"table has shape {counts.shape}: expected ({len(rows)}, {len(columns)}), one row per "
            "class and one column per cluster"
        )
    down, across = matched_order(counts)
    counts = counts[np.ix_(down, across)]
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(16 / max(counts.shape), 0.1, 0.46))
    figure, ax = _heat(
        share,
        short_names([str(rows[i]) for i in down]),
        short_names([str(columns[j]) for j in across]),
        "Blues",
        (0.0, float(share.max()) or 1.0),
        cell=(side, side),
        axis_names=("class", "cluster"),
        bar_name="share of the class",
    )
    if side > 0.35:
        style: dict[str, Any] = {"ha": "center", "va": "center"}
        style["fontsize"] = 9.5 if counts.max() < 1000 else 7.5
        for (i, j), count in np.ndenumerate(counts):
            if count:
                ink = "white" if share[i, j] > 0.55 * share.max() else INK
                ax.text(j, i, f"{count}", color=ink, **style)
    ax.set_title("Classes by cluster   ·   labels used for scoring only", **title_style())
    save(figure, path, dpi=130)


def centres(
    path: Any,
    x: ArrayLike,
    labels: ArrayLike,
    *,
    num_clusters: int,
    feature_names: Sequence[str] | None = None,
    max_features: int = 60,
) -> None:
    """Heat map of each cluster's mean, for vectors that are not images.

    Colour is (mean in the cluster - mean over all) / standard deviation over all, so features of
    unlike units compare. With many features those on which the clusters differ most are drawn.

    Args:
        path: PNG file to write.
        x: [n, d] finite.
        labels: int [n] in 0..num_clusters-1; empty clusters get a blank row.
        num_clusters: rows (the first `MAX_ROWS` are drawn).
        feature_names: [d], column numbers by default.
        max_features: most columns drawn.

    Raises:
        InputError: shapes that do not match, or labels out of range.
    """
    points = np.asarray(x, np.float64)
    if points.ndim != 2 or 0 in points.shape:
        raise InputError(f"x has shape {points.shape}: expected [n, d], not empty")
    codes = check_labels(labels, len(points), num_clusters)
    d = points.shape[1]
    if feature_names is not None and len(feature_names) != d:
        raise InputError(f"feature_names has {len(feature_names)} names for {d} features")
    sizes = np.bincount(codes, minlength=num_clusters)
    spread = points.std(axis=0)
    scores = (points - points.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    rows = min(num_clusters, MAX_ROWS)
    means = np.full((rows, d), np.nan)
    for k in np.flatnonzero(sizes[:rows]):
        means[k] = scores[codes == k].mean(axis=0)
    columns = np.arange(d)
    if d > max_features:
        between = np.nansum(sizes[:rows, None] * means**2, axis=0)
        columns = np.sort(np.argsort(-between, kind="stable")[:max_features])
    means = means[:, columns]
    names = columns if feature_names is None else [feature_names[j] for j in columns]
    reach = max(float(np.nanmax(np.abs(means))), 1e-9)
    figure, ax = _heat(
        means,
        [f"cluster {k} · " + (f"{sizes[k]:,}" if sizes[k] else "empty") for k in range(rows)],
        short_names([str(name) for name in names]),
        "RdBu_r",
        (-reach, reach),
        cell=(min(0.36, 20 / rows), float(np.clip(12 / len(columns), 0.18, 0.5))),
        bar_name="standard deviations",
    )
    for tick in ax.get_yticklabels():
        k = int(tick.get_text().split()[1])
        tick.set_color(darker(cluster_colour(k)) if sizes[k] else FAINT)
    which = "" if len(columns) == d else f", the {len(columns)} of {d} features that differ most"
    title = f"Cluster means against the overall mean   ·   {clusters_text(num_clusters)}{which}"
    ax.set_title(title, **title_style())
    save(figure, path, dpi=130)


def _heat(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    colour_map: str,
    limits: tuple[float, float],
    *,
    cell: tuple[float, float],
    axis_names: tuple[str, str] = ("", ""),
    bar_name: str,
) -> tuple["Figure", "Axes"]:
    """A heat map with named rows and columns; ``cell`` is its height and width in inches."""
    r, c = values.shape
    cell_h, cell_w = cell
    long_column = max(map(len, columns))
    upright = 0.085 * long_column > cell_w
    # A name gets its tick only where there is room for it.
    every_row = int(np.ceil(0.16 / cell_h))
    every_column = int(np.ceil((0.16 if upright else 0.085 * long_column + 0.05) / cell_w))
    left = 0.25 + 0.085 * max(map(len, rows)) + (0.3 if axis_names[0] else 0)
    below = 0.2 + (0.08 * long_column if upright else 0.15) + (0.3 if axis_names[1] else 0)
    right, above = 1.25, 0.45
    width = left + max(c * cell_w, 3.6) + right
    height = below + max(r * cell_h, 2.2) + above
    figure = new_figure(width, height)
    box = (left / width, below / height, 1 - (left + right) / width, 1 - (below + above) / height)
    ax = figure.add_axes(box)
    ax.set_facecolor("#f1f3f5")
    picture = ax.imshow(
        values,
        cmap=colour_map,
        vmin=limits[0],
        vmax=limits[1],
        aspect="auto",
        interpolation="nearest",
    )
    # Names are a user's: a dollar sign in them begins no formula.
    plain: dict[str, Any] = {"parse_math": False}
    ax.set_yticks(range(0, r, every_row), rows[::every_row], **plain)
    upright_by = 90 * upright
    ax.set_xticks(range(0, c, every_column), columns[::every_column], rotation=upright_by, **plain)
    ax.tick_params(labelsize=9.5, labelcolor=INK, length=0)
    ax.set_ylabel(axis_names[0], fontsize=10.5, color=INK)
    ax.set_xlabel(axis_names[1], fontsize=10.5, color=INK)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if max(r, c) <= 60:
        ax.set_xticks(np.arange(c + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(r + 1) - 0.5, minor=True)
        ax.grid(which="minor", color="white", lw=1.0)
        ax.tick_params(which="minor", length=0)
    tall = min(box[3], 3.5 / height)
    bar = (1 - (right - 0.15) / width, box[1] + box[3] - tall, 0.13 / width, tall)
    colours = figure.colorbar(picture, cax=figure.add_axes(bar))
    colours.set_label(bar_name, fontsize=9.5, color=INK)
    colours.ax.tick_params(labelsize=8.5, labelcolor=FAINT, length=0)
    for spine in colours.ax.spines.values():
        spine.set_visible(False)
    return figure, ax
