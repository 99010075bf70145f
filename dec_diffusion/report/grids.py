"""Grids of images: the members of every cluster, generated ones, and rows of any."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dec_diffusion.report.style import (
    DPI,
    FAINT,
    INK,
    MAX_ROWS,
    RULE,
    add_title,
    check_labels,
    cluster_colour,
    clusters_text,
    new_figure,
    save,
)
from dec_diffusion.report.tiles import compose_grid, fit_tiles, tile_origin
from dec_diffusion.types import InputError, Rows


def members_to_show(
    labels: np.ndarray, confidence: np.ndarray, cluster: int, *, most: int, least: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a cluster's most and least confident members, each from the most to the least.

    No example is in both; a small cluster fills the first list first. Ties, common where a
    posterior saturates at 1, are broken at random by ``seed`` and not by file order.

    Args:
        labels: int [n]; ``confidence``: float [n].
        cluster: whose members.
        most: largest length of the first list; ``least``: of the second.
    """
    members = np.flatnonzero(labels == cluster)
    shuffle = np.random.default_rng([seed, cluster]).random(len(members))
    ordered = members[np.lexsort((shuffle, -confidence[members]))]
    rest = ordered[most:]
    return ordered[:most], rest[max(0, len(rest) - least) :]


def images_by_cluster(
    path: Any,
    images: ArrayLike | Rows,
    labels: ArrayLike,
    confidence: ArrayLike,
    *,
    num_clusters: int,
    per_cluster: int = 12,
    least: int = 4,
    seed: int = 0,
    in_unit: Callable[[np.ndarray], np.ndarray] | None = None,
) -> None:
    """One row per cluster: its most confident members, a gap, and its least confident ones.

    Args:
        path: PNG file to write.
        images: [n, h, w, c] in [0, 1], or in other units with ``in_unit``; or ``Rows`` of them.
        labels: int [n] in 0..num_clusters-1; clusters without members get an empty row.
        confidence: float [n], probability of the assigned cluster.
        num_clusters: rows (the first `MAX_ROWS` are drawn).
        per_cluster: most confident members per row; ``least``: least confident ones.
        seed: breaks ties of confidence.
        in_unit: makes images [..., h, w, c] ones in [0, 1]; given only those that are drawn.

    Raises:
        InputError: shapes that do not match, or labels out of range.
    """
    # Not all in memory, if they are mapped from files.
    pictures: Any = images if hasattr(images, "shape") else np.asarray(images)
    if pictures.ndim != 4 or 0 in pictures.shape:
        raise InputError(f"images have shape {pictures.shape}: expected [n, h, w, c], not empty")
    codes = check_labels(labels, len(pictures), num_clusters)
    sure = np.asarray(confidence, np.float64)
    if sure.shape != codes.shape:
        raise InputError(f"confidence has shape {sure.shape}: expected one per image {codes.shape}")
    if per_cluster < 1 or least < 0:
        raise InputError("per_cluster must be at least 1 and least not negative")
    rows = min(num_clusters, MAX_ROWS)
    sizes = np.bincount(codes, minlength=num_clusters)
    # Columns that no cluster can fill would only be white space.
    most = min(per_cluster, int(sizes.max()))
    least = min(least, int(sizes.max()) - most)
    index = np.zeros((rows, most + least), int)
    present = np.zeros((rows, most + least), bool)
    captions = []
    for k in range(rows):
        high, low = members_to_show(codes, sure, k, most=most, least=least, seed=seed)
        columns = np.r_[np.arange(len(high)), most + np.arange(len(low))].astype(int)
        index[k, columns], present[k, columns] = np.r_[high, low], True
        mean = sure[codes == k].mean() if sizes[k] else 0.0
        captions.append(f"{sizes[k]:,} · {mean:.3f}" if sizes[k] else "empty")
    heads = [(0, "most confident")] + [(most, "least confident")] * (least > 0)
    title = f"Images by cluster   ·   {len(codes):,} images, {clusters_text(num_clusters)}"
    _grid_figure(
        path,
        pictures[index] if in_unit is None else in_unit(pictures[index]),
        present,
        title,
        captions,
        note="size · mean confidence",
        heads=heads,
        gap_after=most if least else None,
    )


def generated_by_cluster(
    path: Any, images: ArrayLike, *, captions: Sequence[str] | None = None
) -> None:
    """One row of generated images per cluster.

    Args:
        path: PNG file to write.
        images: [k, m, h, w, c] in [0, 1]; the first `MAX_ROWS` clusters are drawn.
        captions: [k] a few words under each cluster's name, optional.

    Raises:
        InputError: wrong shape.
    """
    pictures = np.asarray(images)
    if pictures.ndim != 5 or 0 in pictures.shape:
        raise InputError(f"images have shape {pictures.shape}: expected [k, m, h, w, c], not empty")
    if captions is not None and len(captions) != len(pictures):
        raise InputError(f"captions: {len(captions)} for {len(pictures)} clusters, give one each")
    rows = min(len(pictures), MAX_ROWS)
    title = f"Generated images   ·   {clusters_text(len(pictures))}"
    words = [""] * rows if captions is None else list(captions[:rows])
    present = np.ones((rows, pictures.shape[1]), bool)
    _grid_figure(path, pictures[:rows], present, title, words)


def image_row(path: Any, images: ArrayLike, title: str, *, columns: int = 12) -> None:
    """Images in rows of ``columns`` under a title; ``images`` [m, h, w, c] in [0, 1].

    Raises:
        InputError: wrong shape.
    """
    # Not all in memory, if they are mapped from files.
    pictures: Any = images if hasattr(images, "shape") else np.asarray(images)
    if pictures.ndim != 4 or 0 in pictures.shape:
        raise InputError(f"images have shape {pictures.shape}: expected [m, h, w, c], not empty")
    rows = -(-len(pictures) // columns)
    present = np.arange(rows * columns).reshape(rows, columns) < len(pictures)
    padding = [(0, rows * columns - len(pictures)), (0, 0), (0, 0), (0, 0)]
    grid = np.pad(pictures, padding).reshape(rows, columns, *pictures.shape[1:])
    grid, scale = fit_tiles(grid, rows, columns)
    canvas = compose_grid(grid, present, scale=scale)
    top, margin = 44, 14
    width, height = canvas.shape[1] + 2 * margin, top + canvas.shape[0] + margin
    figure = new_figure(width / DPI, height / DPI)
    figure.figimage(canvas, margin, margin, origin="upper")
    add_title(figure, title, margin / DPI, 22 / DPI)
    save(figure, path)


def _grid_figure(
    path: Any,
    images: np.ndarray,
    present: np.ndarray,
    title: str,
    captions: Sequence[str],
    *,
    note: str = "",
    heads: Sequence[tuple[int, str]] = (),
    gap_after: int | None = None,
) -> None:
    """A grid with row names, drawn pixel for pixel."""
    from matplotlib.patches import Rectangle

    rows, columns = images.shape[:2]
    images, scale = fit_tiles(images, rows, columns)
    h, w = images.shape[2] * scale, images.shape[3] * scale
    canvas = compose_grid(images, present, scale=scale, gap_after=gap_after)
    two_lines = h >= 34
    left, top, margin = 185, (66 if heads or note else 44), 14
    width = max(left + canvas.shape[1] + margin, 560)
    height = top + canvas.shape[0] + margin
    figure = new_figure(width / DPI, height / DPI)
    # figimage counts from the bottom left and does not resample.
    figure.figimage(canvas, left, margin, origin="upper")

    def write(x: float, y: float, text: str, px: float, **style: Any) -> None:
        style = {"color": INK, "va": "center"} | style
        figure.text(x / width, 1 - y / height, text, fontsize=px * 72 / DPI, **style)

    write(margin, 22, title, 17, weight="bold")
    if note:
        write(margin + 14, top - 12, note, 12, color=FAINT)
    for column, text in heads:
        x = left + tile_origin(0, column, h, w, gap_after=gap_after)[1]
        if column == 0 or w * (columns - column) > 40:
            write(x, top - 12, text, 12, color=FAINT)
    px = min(14.0, 0.75 * h)
    for k, caption in enumerate(captions):
        y = top + tile_origin(k, 0, h, w)[0]
        corner = (margin / width, 1 - (y + h) / height)
        colour = cluster_colour(k) if present[k].any() else RULE
        bar = Rectangle(
            corner, 5 / width, h / height, color=colour, lw=0, transform=figure.transFigure
        )
        figure.add_artist(bar)
        ink = INK if present[k].any() else FAINT
        name, middle = f"cluster {k}", y + h / 2
        if two_lines and caption:
            write(margin + 14, middle - 9, name, px, weight="bold", color=ink)
            write(margin + 14, middle + 9, caption, 12, color=FAINT)
        elif caption:
            write(margin + 14, middle, f"{name} · {caption}", min(px, 12), color=ink)
        else:
            write(margin + 14, middle, name, px, weight="bold", color=ink)
    save(figure, path)
