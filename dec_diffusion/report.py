"""Pictures of a clustering, as PNG files.

Each function draws one picture and writes one file. No display is needed and no global state of
matplotlib is changed: figures are built as objects, never through ``pyplot``, so pictures may be
drawn in threads and inside notebooks. The same input and seed give the same file.

Cluster k has the same colour in every picture, whatever the number of clusters (`cluster_colour`).
Labels are only ever drawn beside the result, and the picture says so.

``path`` is a string or anything with ``write_bytes`` (``pathlib``, ``etils.epath``); the folder
must exist. Images are [.., h, w, c] with values in [0, 1] (or uint8); values outside are clipped
and non-finite pixels drawn magenta, since a report should show a defect and not hide or die of it.
One channel is grey, two are averaged, of more the first three are red, green and blue.
"""

import colorsys
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from dec_diffusion.metrics import best_match
from dec_diffusion.types import InputError, Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAD = 2
"""White pixels between neighbouring tiles of a row."""
ROW_PAD = 6
"""White pixels between rows."""
GAP = 22
"""White pixels between the two blocks of a grid."""
MAX_ROWS = 100
"""Rows of a grid; clusters beyond are named in the title instead of drawn."""

_DPI = 100
_TILE = 64  # side that small images are enlarged to, in pixels
_LARGEST_TILE = 96
_LARGEST_SIDE = 4800  # of a whole grid, in pixels
_INK = "#1f2933"
_FAINT = "#6b7785"
_RULE = "#d9dee4"
# Ten well-separated hues of even lightness, then their dark and light relatives.
_PALETTE = (
    "#4878cf", "#ee854a", "#3fa66b", "#d65f5f", "#956cb4",
    "#a0714f", "#e377c2", "#8c8c8c", "#b5a82b", "#31b5c9",
    "#1f3f7a", "#a34d12", "#1c5e38", "#8a1f2b", "#553079",
    "#5b3a22", "#9c2f7f", "#4d4d4d", "#6e6512", "#0f6674",
)  # fmt: skip

GROUPS: Mapping[str, tuple[str, ...]] = {
    "loss": ("*loss*", "denoise", "denoising", "kl", "kl_z", "kl_c", "recon", "reconstruction"),
    "share of clusters": ("smallest_share", "largest_share"),
    "non-empty clusters": ("clusters_nonempty",),
    "label-free scores": ("silhouette", "occupancy_entropy"),
    "log-likelihood per example": ("log_likelihood", "bound"),
    "accuracy (labels used for scoring only)": ("acc", "nmi", "ari"),
}
"""Panels of `curves`: title -> metric names; a name between asterisks matches any key with it."""


def cluster_colour(k: int) -> str:
    """Hex colour of cluster ``k`` >= 0; it never depends on how many clusters there are."""
    if k < len(_PALETTE):
        return _PALETTE[k]
    # Golden-ratio steps keep neighbours apart; three lightnesses tell near hues apart.
    red, green, blue = colorsys.hls_to_rgb(k * 0.618034 % 1, (0.42, 0.6, 0.3)[k % 3], 0.55)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


# -- grids of images --------------------------------------------------------------------------


def tile_origin(
    row: int, column: int, h: int, w: int, *, gap_after: int | None = None
) -> tuple[int, int]:
    """Top and left pixel of a tile of `compose_grid`; ``h``, ``w`` are the tile's size there."""
    shift = GAP if gap_after is not None and column >= gap_after else 0
    return row * (h + ROW_PAD), column * (w + PAD) + shift


def compose_grid(
    images: ArrayLike,
    present: ArrayLike | None = None,
    *,
    scale: int = 1,
    gap_after: int | None = None,
) -> np.ndarray:
    """Place images on a white canvas.

    Args:
        images: [r, m, h, w, c], values in [0, 1] or uint8.
        present: bool [r, m]; tiles marked False stay white. All are drawn by default.
        scale: each pixel becomes a square of this side (nearest neighbour).
        gap_after: a wider gap precedes this column.

    Returns:
        uint8 [H, W, 3]. The tile of row i and column j lies at
        ``tile_origin(i, j, scale * h, scale * w, gap_after=gap_after)``.

    Raises:
        InputError: not five axes, or an axis is empty.
    """
    tiles = np.asarray(images)
    if tiles.ndim != 5 or 0 in tiles.shape:
        raise InputError(f"images have shape {tiles.shape}: expected [rows, columns, h, w, c]")
    r, m, h, w, _ = tiles.shape
    shown = np.ones((r, m), bool) if present is None else np.asarray(present, bool)
    h, w = h * scale, w * scale
    top, left = tile_origin(r - 1, m - 1, h, w, gap_after=gap_after)
    canvas = np.full((top + h, left + w, 3), 255, np.uint8)
    for i, j in np.argwhere(shown):
        top, left = tile_origin(i, j, h, w, gap_after=gap_after)
        tile = _rgb(tiles[i, j]).repeat(scale, axis=0).repeat(scale, axis=1)
        canvas[top : top + h, left : left + w] = tile
    return canvas


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
    codes = _cluster_labels(labels, len(pictures), num_clusters)
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
    title = f"Images by cluster   ·   {len(codes):,} images, {_clusters_text(num_clusters)}"
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
    title = f"Generated images   ·   {_clusters_text(len(pictures))}"
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
    grid, scale = _fit_tiles(grid, rows, columns)
    canvas = compose_grid(grid, present, scale=scale)
    top, margin = 44, 14
    width, height = canvas.shape[1] + 2 * margin, top + canvas.shape[0] + margin
    figure = _figure(width / _DPI, height / _DPI)
    figure.figimage(canvas, margin, margin, origin="upper")
    _head(figure, title, margin / _DPI, 22 / _DPI)
    _save(figure, path)


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
    images, scale = _fit_tiles(images, rows, columns)
    h, w = images.shape[2] * scale, images.shape[3] * scale
    canvas = compose_grid(images, present, scale=scale, gap_after=gap_after)
    two_lines = h >= 34
    left, top, margin = 185, (66 if heads or note else 44), 14
    width = max(left + canvas.shape[1] + margin, 560)
    height = top + canvas.shape[0] + margin
    figure = _figure(width / _DPI, height / _DPI)
    # figimage counts from the bottom left and does not resample.
    figure.figimage(canvas, left, margin, origin="upper")

    def write(x: float, y: float, text: str, px: float, **style: Any) -> None:
        style = {"color": _INK, "va": "center"} | style
        figure.text(x / width, 1 - y / height, text, fontsize=px * 72 / _DPI, **style)

    write(margin, 22, title, 17, weight="bold")
    if note:
        write(margin + 14, top - 12, note, 12, color=_FAINT)
    for column, text in heads:
        x = left + tile_origin(0, column, h, w, gap_after=gap_after)[1]
        if column == 0 or w * (columns - column) > 40:
            write(x, top - 12, text, 12, color=_FAINT)
    px = min(14.0, 0.75 * h)
    for k, caption in enumerate(captions):
        y = top + tile_origin(k, 0, h, w)[0]
        corner = (margin / width, 1 - (y + h) / height)
        colour = cluster_colour(k) if present[k].any() else _RULE
        bar = Rectangle(
            corner, 5 / width, h / height, color=colour, lw=0, transform=figure.transFigure
        )
        figure.add_artist(bar)
        ink = _INK if present[k].any() else _FAINT
        name, middle = f"cluster {k}", y + h / 2
        if two_lines and caption:
            write(margin + 14, middle - 9, name, px, weight="bold", color=ink)
            write(margin + 14, middle + 9, caption, 12, color=_FAINT)
        elif caption:
            write(margin + 14, middle, f"{name} · {caption}", min(px, 12), color=ink)
        else:
            write(margin + 14, middle, name, px, weight="bold", color=ink)
    _save(figure, path)


def _fit_tiles(images: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, int]:
    """Shrink large images by averaging; for small ones return the factor to enlarge by."""
    side = max(images.shape[2:4])
    limit = int(np.clip(_LARGEST_SIDE // max(rows, columns) - ROW_PAD, 12, _LARGEST_TILE))
    if side <= limit:
        return images, max(1, min(_TILE, limit) // side)
    factor = -(-side // limit)
    r, m, h, w, c = images.shape
    small = np.zeros((r, m, -(-h // factor), -(-w // factor), c), np.float32)
    # Row by row: the whole grid as floats could be gigabytes.
    for i in range(r):
        padding = ((0, 0), (0, -h % factor), (0, -w % factor), (0, 0))
        padded = np.pad(_unit(images[i]), padding, mode="edge")
        blocks = padded.reshape(m, small.shape[2], factor, small.shape[3], factor, c)
        small[i] = blocks.mean(axis=(2, 4))
    return small, 1


def _unit(images: np.ndarray) -> np.ndarray:
    """Float images; uint8 means 0..255."""
    if images.dtype == np.uint8:
        return images.astype(np.float32) / 255
    return images.astype(np.float32)


def _rgb(image: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] of one image [h, w, c]."""
    values = _unit(image)
    if values.shape[-1] < 3:
        values = values.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    values = values[..., :3]
    broken = ~np.isfinite(values).all(axis=-1)
    pixels = np.round(np.clip(np.where(np.isfinite(values), values, 0), 0, 1) * 255)
    pixels[broken] = (255, 0, 255)
    return pixels.astype(np.uint8)


# -- the latent space -------------------------------------------------------------------------


def project(embedding: ArrayLike, *, seed: int = 0) -> tuple[np.ndarray, str]:
    """Two dimensions for viewing.

    Args:
        embedding: [n, d] finite.
        seed: of t-SNE's gradient descent.

    Returns:
        float64 [n, 2] and the method's name: t-SNE from a PCA start (van der Maaten and Hinton
        2008) for d > 2; the points themselves for d = 2; against random heights for d = 1; PCA
        where t-SNE has too few points (under 10) or nothing to tell apart.
    """
    points = np.asarray(embedding, np.float64)
    n, d = points.shape
    if d == 1:
        return np.c_[points, np.random.default_rng(seed).random(n)], "value, random height"
    if d == 2:
        return points, "both latent dimensions"
    centred = points - points.mean(axis=0)
    left, scale, _ = np.linalg.svd(centred, full_matrices=False)
    flat = np.zeros((n, 2))
    flat[:, : min(2, len(scale))] = (left * scale)[:, :2]
    if n < 10 or scale[0] <= 1e-12 * max(1.0, np.abs(points).max()):
        return flat, "PCA"
    from sklearn.manifold import TSNE

    # The start that scikit-learn would make, without its random solver.
    start = (flat / flat[:, 0].std() * 1e-4).astype(np.float32)
    # A sign convention: singular vectors have none.
    start *= np.where(start[np.abs(start).argmax(axis=0), [0, 1]] < 0, -1, 1)
    # Half of the usual iterations: from a PCA start the picture hardly changes after that.
    perplexity = min(30.0, (n - 1) / 3)
    tsne = TSNE(init=start, perplexity=perplexity, max_iter=500, random_state=seed)
    return tsne.fit_transform(centred).astype(np.float64), "t-SNE"


class Layout(NamedTuple):
    """A map of the latent space: which examples [m], where [m, 2], and by which projection."""

    rows: np.ndarray
    flat: np.ndarray
    method: str


def lay_out(embedding: ArrayLike, *, seed: int = 0, sample: int = 2000) -> Layout:
    """`project` of at most ``sample`` rows of ``embedding`` [n, d], drawn by ``seed``."""
    points = np.asarray(embedding)
    chosen = np.arange(len(points))
    if len(points) > sample:
        chosen = np.sort(np.random.default_rng(seed).choice(len(points), sample, replace=False))
    return Layout(chosen, *project(points[chosen], seed=seed))


def latent_map(
    path: Any,
    embedding: ArrayLike,
    labels: ArrayLike,
    *,
    labels_true: ArrayLike | None = None,
    seed: int = 0,
    sample: int = 2000,
) -> Layout:
    """The latent space in two dimensions, coloured by cluster; by class beside it if given.

    A class has the colour of the cluster it is matched with.

    Args:
        path: PNG file to write.
        embedding: [n, d] finite latents.
        labels: int [n] >= 0.
        labels_true: [n] classes of any type, optional, drawn but used for nothing else.
        seed: of the sample and of t-SNE.
        sample: most points drawn.

    Returns:
        What was drawn where.

    Raises:
        InputError: shapes that do not match, non-finite values, negative labels.
    """
    points = np.asarray(embedding)
    if points.ndim != 2 or 0 in points.shape:
        raise InputError(f"embedding has shape {points.shape}: expected [n, d], not empty")
    codes = _cluster_labels(labels, len(points))
    if not np.isfinite(points).all():
        raise InputError("embedding holds NaN or infinite values: nothing can be mapped")
    classes = None if labels_true is None else np.asarray(labels_true)
    if classes is not None and classes.shape != codes.shape:
        raise InputError(f"labels_true has shape {classes.shape}: expected {codes.shape}")
    sizes = np.bincount(codes)
    match = {} if classes is None else {c: k for k, c in best_match(classes, codes).items()}
    layout = lay_out(points, seed=seed, sample=sample)
    chosen, flat, method = layout
    of_all = f" of {len(points):,}" if len(chosen) < len(points) else ""
    drawn = f"{len(chosen):,}{of_all} points"
    panels = 1 if classes is None else 2
    legend = len(sizes) <= 40
    figure = _figure(6.2 * panels + (1.7 if legend else 0.2) + 0.2, 6.4)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    figure.subplots_adjust(
        left=0.02,
        right=1 - (1.75 if legend else 0.2) / figure.get_figwidth(),
        top=0.94,
        bottom=0.02,
        wspace=0.04,
    )
    found = [(str(k), cluster_colour(k), codes[chosen] == k) for k in range(len(sizes))]
    _scatter(axes[0], flat, found)
    axes[0].set_title(f"Found clusters   ·   {method}, {drawn}", **_title_style())
    if classes is not None:
        ordered = sorted(classes.tolist(), key=lambda v: (type(v).__name__, v))
        known = list(dict.fromkeys(ordered))
        # Classes that no cluster is matched with get colours that no cluster has.
        spare = iter(range(len(sizes), len(sizes) + len(known)))
        groups = [
            (
                _short(str(v)),
                cluster_colour(match[v] if v in match else next(spare)),
                np.array([value == v for value in classes[chosen].tolist()]),
            )
            for v in known
        ]
        _scatter(axes[1], flat, groups)
        axes[1].set_title("True classes   ·   shown for comparison only", **_title_style())
    if legend:
        from matplotlib.lines import Line2D

        handles = [
            Line2D(
                [],
                [],
                marker="o",
                ls="",
                ms=7,
                color=cluster_colour(k),
                label=f"cluster {k} · {size:,}",
            )
            for k, size in enumerate(sizes)
        ]
        axes[-1].legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            frameon=False,
            fontsize=9.5 if len(sizes) <= 25 else 7.5,
            labelcolor=_INK,
            handletextpad=0.2,
            borderaxespad=0,
            labelspacing=0.55 if len(sizes) <= 25 else 0.35,
        )
    _save(figure, path, dpi=130)
    return layout


def _scatter(axes: "Axes", flat: np.ndarray, groups: Sequence[tuple[str, str, np.ndarray]]) -> None:
    """Points by group, and each group's name at its median."""
    from matplotlib.patheffects import withStroke

    order = np.random.default_rng(0).permutation(len(flat))
    colours = np.full(len(flat), "#999999", dtype=object)
    for _, colour, member in groups:
        colours[member] = colour
    size = float(np.clip(24_000 / max(1, len(flat)), 9, 40))
    # In random order, so that no group lies on top of the others.
    axes.scatter(*flat[order].T, c=colours[order].tolist(), s=size, alpha=0.75, linewidths=0)
    for name, colour, member in groups:
        if not member.any():
            continue
        x, y = np.median(flat[member], axis=0)
        outline = [withStroke(linewidth=4, foreground="white")]
        axes.text(
            x,
            y,
            name,
            color=_darker(colour),
            weight="bold",
            ha="center",
            va="center",
            fontsize=16 if len(groups) <= 20 else 10,
            path_effects=outline,
        )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.04)
    for spine in axes.spines.values():
        spine.set_color(_RULE)


# -- curves -----------------------------------------------------------------------------------


def curves(
    path: Any,
    records: Iterable[Mapping[str, Any]],
    groups: Mapping[str, Sequence[str]] | None = None,
    *,
    x: str = "step",
) -> None:
    """Metrics over steps, one panel per group.

    Args:
        path: PNG file to write.
        records: the rows of ``metrics.jsonl``. Rows without ``x`` are skipped; of rows with the
            same ``x`` later ones win key by key (a resumed run repeats steps). A ``phase`` string
            marks where phases begin.
        groups: panel title -> metric names, `GROUPS` by default. A name also matches behind a
            prefix (``acc`` matches ``eval/acc``). Panels without data are left out.
        x: key of the horizontal axis.

    Raises:
        InputError: no record holds any of the metrics.
    """
    rows: dict[float, dict[str, Any]] = {}
    for record in records:
        if _is_number(record.get(x)):
            rows.setdefault(float(record[x]), {}).update(record)
    steps = sorted(rows)
    keys = list(dict.fromkeys(key for step in steps for key in rows[step]))
    panels: list[tuple[str, dict[str, tuple[np.ndarray, np.ndarray]]]] = []
    for title, names in (GROUPS if groups is None else groups).items():
        lines = {}
        for key in keys:
            seen = [step for step in steps if _is_number(rows[step].get(key))]
            if key != x and seen and any(_matches(key, name) for name in names):
                lines[key] = (np.array(seen), np.array([float(rows[s][key]) for s in seen]))
        if lines:
            panels.append((title, lines))
    if not panels:
        raise InputError(f"records hold no metric to draw against {x!r}: nothing was logged yet")
    starts = [
        (step, str(rows[step]["phase"]))
        for before, step in zip([None, *steps], steps, strict=False)
        if "phase" in rows[step]
        and (before is None or rows[before].get("phase") != rows[step]["phase"])
    ]
    height = 2.15 * len(panels) + 0.75
    figure = _figure(9.5, height)
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    figure.subplots_adjust(
        left=0.085, right=0.8, top=1 - 0.5 / height, bottom=0.55 / height, hspace=0.32
    )
    for ax, (title, lines) in zip(axes, panels, strict=True):
        _panel(ax, title, lines)
        for step, _ in starts:
            ax.axvline(step, color=_FAINT, lw=0.8, ls=(0, (4, 3)), zorder=0)
    for step, name in starts:
        axes[0].annotate(
            _short(name),
            (step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -3),
            textcoords="offset points",
            va="top",
            fontsize=8.5,
            color=_FAINT,
            bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1},
        )
    axes[-1].set_xlabel(x, fontsize=10, color=_INK)
    _save(figure, path, dpi=130)


def _panel(ax: "Axes", title: str, lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """One set of axes; long noisy curves are drawn pale under their running mean."""
    from matplotlib.ticker import MaxNLocator

    for i, (key, (steps, values)) in enumerate(lines.items()):
        colour = _PALETTE[i % len(_PALETTE)]
        finite = np.where(np.isfinite(values), values, np.nan)
        marker = "o" if len(values) <= 30 else ""
        name = _short(key, 24)
        if len(values) > 200:
            ax.plot(steps, finite, color=colour, alpha=0.25, lw=0.8)
            finite = _running_mean(finite, len(values) // 50)
        ax.plot(steps, finite, color=colour, lw=1.8, marker=marker, ms=3.5, label=name)
    everything = np.concatenate([values for _, values in lines.values()])
    everything = everything[np.isfinite(everything)]
    if len(everything) and everything.min() > 0 and everything.max() > 50 * everything.min():
        ax.set_yscale("log")
    if all(key.split("/")[-1] == "clusters_nonempty" for key in lines):
        ax.set_ylim(0, max(1.0, everything.max(initial=1)) * 1.1)
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.set_title(title, **_title_style(10.5))
    ax.grid(axis="y", color=_RULE, lw=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=9, colors=_FAINT, length=3)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_RULE)
    ax.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.03),
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        borderaxespad=0,
        handlelength=1.4,
    )


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over ``width`` values that ignores gaps and shortens at the ends."""
    seen = np.isfinite(values)
    window = np.ones(2 * (width // 2) + 1)
    count = np.convolve(seen, window, mode="same")
    total = np.convolve(np.where(seen, values, 0.0), window, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _matches(key: str, name: str) -> bool:
    last = key.split("/")[-1]
    if name.startswith("*") and name.endswith("*"):
        return name.strip("*") in last
    return name in (key, last)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


# -- tables -----------------------------------------------------------------------------------


def confusion(path: Any, table: ArrayLike, classes: ArrayLike, clusters: ArrayLike) -> None:
    """Heat map of a contingency table: how each class spreads over the clusters.

    Columns are reordered so that matched pairs (Hungarian method) lie on the diagonal, clusters
    without a class last. Colour is the share of the class, numbers are counts.

    Args:
        path: PNG file to write.
        table: int [classes, clusters], see `metrics.contingency`.
        classes: [classes] names of the rows; ``clusters``: [clusters] of the columns.

    Raises:
        InputError: names that do not match the table.
    """
    from scipy.optimize import linear_sum_assignment

    counts = np.asarray(table)
    rows, columns = np.asarray(classes).tolist(), np.asarray(clusters).tolist()
    if counts.ndim != 2 or 0 in counts.shape or counts.shape != (len(rows), len(columns)):
        raise InputError(
            f"table has shape {counts.shape}: expected ({len(rows)}, {len(columns)}), one row per "
            "class and one column per cluster"
        )
    matched = linear_sum_assignment(counts, maximize=True)[1].tolist()
    order = matched + [k for k in range(len(columns)) if k not in matched]
    counts = counts[:, order]
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(16 / max(counts.shape), 0.1, 0.46))
    figure, ax = _heat(
        share,
        [_short(str(c)) for c in rows],
        [_short(str(columns[k])) for k in order],
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
                ink = "white" if share[i, j] > 0.55 * share.max() else _INK
                ax.text(j, i, f"{count}", color=ink, **style)
    ax.set_title("Classes by cluster   ·   labels used for scoring only", **_title_style())
    _save(figure, path, dpi=130)


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
    codes = _cluster_labels(labels, len(points), num_clusters)
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
        [_short(str(name)) for name in names],
        "RdBu_r",
        (-reach, reach),
        cell=(min(0.36, 20 / rows), float(np.clip(12 / len(columns), 0.18, 0.5))),
        bar_name="standard deviations",
    )
    for tick in ax.get_yticklabels():
        k = int(tick.get_text().split()[1])
        tick.set_color(_darker(cluster_colour(k)) if sizes[k] else _FAINT)
    which = "" if len(columns) == d else f", the {len(columns)} of {d} features that differ most"
    title = f"Cluster means against the overall mean   ·   {_clusters_text(num_clusters)}{which}"
    ax.set_title(title, **_title_style())
    _save(figure, path, dpi=130)


_SCORE_NAMES = {
    "value": "compared by",
    "chi": "Calinski-Harabasz",
    "corrected": "corrected by noise",
    "stability": "stability",
    "consensus": "consensus of cells",
    "dimensions": "effective rank",
    "acc": "accuracy (reading only)",
}


def search_map(
    path: Any,
    scores: Mapping[str, ArrayLike],
    timesteps: Sequence[str],
    layers: Sequence[str],
    *,
    chosen: tuple[int, int],
    boundary: bool = False,
) -> None:
    """Heat maps of a search over layers and timesteps, one for each score, beside each other.

    Args:
        path: PNG file to write.
        scores: by name, [timesteps, layers]; cells that are not finite stay grey.
        timesteps: names of the rows; ``layers``: of the columns.
        chosen: row and column of the chosen cell, which is framed.
        boundary: whether the title must warn that the choice lies at the edge of the search.

    Raises:
        InputError: a score of another shape.
    """
    r, c = len(timesteps), len(layers)
    cell_h, cell_w = float(np.clip(5.5 / r, 0.14, 0.4)), float(np.clip(1.9 / c, 0.16, 0.42))
    wide, high, left, below, above, gap = c * cell_w, r * cell_h, 0.75, 0.95, 0.75, 0.75
    count = len(scores)
    figure = _figure(left + count * (wide + gap) + 0.1, below + high + above)
    width, height = figure.get_size_inches()
    for i, (name, values) in enumerate(scores.items()):
        table = np.asarray(values, np.float64)
        if table.shape != (r, c):
            raise InputError(f"score {name} has shape {table.shape}: expected ({r}, {c})")
        x = left + i * (wide + gap)
        ax = figure.add_axes((x / width, below / height, wide / width, high / height))
        ax.set_facecolor("#d9dee4")
        picture = ax.imshow(
            np.ma.masked_invalid(table), cmap="viridis", aspect="auto", interpolation="nearest"
        )
        every = int(np.ceil(0.17 / cell_h))
        ax.set_yticks(range(0, r, every), timesteps[::every] if i == 0 else [""] * -(-r // every))
        ax.set_xticks(range(c), list(layers), rotation=90)
        ax.tick_params(labelsize=8, labelcolor=_INK, length=0)
        ax.set_title(_SCORE_NAMES.get(name, name), fontsize=9, color=_INK)
        row, column = chosen
        frame = {"fill": False, "edgecolor": "#e4572e", "linewidth": 2.0}
        ax.add_patch(_rectangle((column - 0.5, row - 0.5), 1, 1, **frame))
        beside = (x + wide + 0.06) / width
        bar = figure.add_axes((beside, below / height, 0.09 / width, high / height))
        figure.colorbar(picture, cax=bar)
        bar.tick_params(labelsize=7, labelcolor=_FAINT, length=0)
        for spine in (*ax.spines.values(), *bar.spines.values()):
            spine.set_visible(False)
        if i == 0:
            ax.set_ylabel("timestep", fontsize=9.5, color=_INK)
    where = f"layer {layers[chosen[1]]}, timestep {timesteps[chosen[0]]}"
    warning = "   ·   at the edge of the search: widen it" if boundary else ""
    title = f"Search   ·   chosen {where}{warning}"
    _head(figure, title, left, 0.25)
    _save(figure, path, dpi=110)


def choice_of_clusters(path: Any, choice: Mapping[str, Any]) -> None:
    """How deep the shallowest valley between two groups is, for every number of groups.

    Args:
        path: PNG file to write.
        choice: the fields of a ``num_clusters.Choice``.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _figure(7.5, 3.4)
    ax = figure.add_axes((0.09, 0.16, 0.88, 0.7))
    clusters, valleys = choice["clusters"], choice["valleys"]
    ax.axhline(choice["threshold"], color=_FAINT, lw=0.9, ls=(0, (4, 3)))
    ax.plot(clusters, valleys, color=cluster_colour(0), lw=1.4, marker="o", ms=4)
    chosen = choice["chosen"]
    if chosen in clusters:
        at = valleys[clusters.index(chosen)]
        ax.plot([chosen], [at], marker="o", ms=11, mfc="none", mec="#e4572e", mew=1.8)
    ax.set_ylim(-0.03, 1.05)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("groups", fontsize=9.5, color=_INK)
    ax.set_ylabel("shallowest valley / peak", fontsize=9.5, color=_INK)
    ax.tick_params(labelsize=8.5, labelcolor=_INK, color=_RULE)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_RULE)
    _head(figure, f"Number of clusters   ·   chosen {chosen}", 0.68, 0.25)
    _save(figure, path, dpi=110)


def _rectangle(*args: Any, **kwargs: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(*args, **kwargs)


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
    figure = _figure(width, height)
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
    ax.set_yticks(range(0, r, every_row), rows[::every_row])
    ax.set_xticks(range(0, c, every_column), columns[::every_column], rotation=90 * upright)
    ax.tick_params(labelsize=9.5, labelcolor=_INK, length=0)
    ax.set_ylabel(axis_names[0], fontsize=10.5, color=_INK)
    ax.set_xlabel(axis_names[1], fontsize=10.5, color=_INK)
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
    colours.set_label(bar_name, fontsize=9.5, color=_INK)
    colours.ax.tick_params(labelsize=8.5, labelcolor=_FAINT, length=0)
    for spine in colours.ax.spines.values():
        spine.set_visible(False)
    return figure, ax


# -- shared -----------------------------------------------------------------------------------


def _figure(width: float, height: float) -> "Figure":
    """A white figure (inches) with its own Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _head(figure: "Figure", title: str, x: float, y: float) -> None:
    """A title so many inches from the left and from the top."""
    width, height = figure.get_size_inches()
    style: dict[str, Any] = {"fontsize": 11.5, "fontweight": "bold", "color": _INK}
    figure.text(x / width, 1 - y / height, title, va="center", **style)


def _save(figure: "Figure", path: Any, *, dpi: int = _DPI) -> None:
    buffer = io.BytesIO()
    # Without the version stamp the same picture is the same file.
    figure.savefig(
        buffer,
        format="png",
        dpi=dpi,
        facecolor="white",
        bbox_inches=None,
        metadata={"Software": None},
    )
    target = path if hasattr(path, "write_bytes") else Path(path)
    target.write_bytes(buffer.getvalue())


def _cluster_labels(labels: ArrayLike, n: int, num_clusters: int | None = None) -> np.ndarray:
    codes = np.asarray(labels)
    if codes.shape != (n,):
        raise InputError(f"labels have shape {codes.shape}: expected one per example, ({n},)")
    top = np.inf if num_clusters is None else num_clusters
    if codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() >= top:
        upper = "" if num_clusters is None else f" below num_clusters={num_clusters}"
        raise InputError(f"labels must be integers from 0{upper}: give cluster numbers")
    return codes.astype(np.int64)


def _clusters_text(k: int) -> str:
    text = f"{k} cluster{'s' if k != 1 else ''}"
    return text if k <= MAX_ROWS else f"the first {MAX_ROWS} of {text}"


def _title_style(size: float = 11.5) -> dict[str, Any]:
    return {"fontsize": size, "color": _INK, "loc": "left", "pad": 7, "fontweight": "bold"}


def _short(text: str, most: int = 18) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _darker(colour: str) -> str:
    """The colour at 70 % brightness, legible as text on white."""
    return "#" + "".join(f"{int(int(colour[i : i + 2], 16) * 0.7):02x}" for i in (1, 3, 5))
