"""Maps of the latent space in two dimensions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from dec_diffusion.metrics import best_match
from dec_diffusion.report.style import (
    INK,
    RULE,
    check_labels,
    cluster_colour,
    darker,
    new_figure,
    save,
    short_names,
    title_style,
)
from dec_diffusion.types import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    codes = check_labels(labels, len(points))
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
    figure = new_figure(6.2 * panels + (1.7 if legend else 0.2) + 0.2, 6.4)
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
    axes[0].set_title(f"Found clusters   ·   {method}, {drawn}", **title_style())
    if classes is not None:
        ordered = sorted(classes.tolist(), key=lambda v: (type(v).__name__, v))
        known = list(dict.fromkeys(ordered))
        # Classes that no cluster is matched with get colours that no cluster has.
        spare = iter(range(len(sizes), len(sizes) + len(known)))
        groups = [
            (
                name,
                cluster_colour(match[v] if v in match else next(spare)),
                np.array([value == v for value in classes[chosen].tolist()]),
            )
            for v, name in zip(known, short_names([str(v) for v in known]), strict=True)
        ]
        _scatter(axes[1], flat, groups)
        axes[1].set_title("True classes   ·   shown for comparison only", **title_style())
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
            labelcolor=INK,
            handletextpad=0.2,
            borderaxespad=0,
            labelspacing=0.55 if len(sizes) <= 25 else 0.35,
        )
    save(figure, path, dpi=130)
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
            color=darker(colour),
            weight="bold",
            ha="center",
            va="center",
            fontsize=16 if len(groups) <= 20 else 10,
            path_effects=outline,
            parse_math=False,  # a dollar sign in a class's name begins no formula
        )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.04)
    for spine in axes.spines.values():
        spine.set_color(RULE)
