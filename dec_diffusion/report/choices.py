"""What a run chose without labels, and from what: a cell of a search, a number of clusters."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dec_diffusion.report.style import FAINT, INK, RULE, add_title, cluster_colour, new_figure, save
from dec_diffusion.types import InputError

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
    figure = new_figure(left + count * (wide + gap) + 0.1, below + high + above)
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
        ax.tick_params(labelsize=8, labelcolor=INK, length=0)
        ax.set_title(_SCORE_NAMES.get(name, name), fontsize=9, color=INK)
        row, column = chosen
        frame = {"fill": False, "edgecolor": "#e4572e", "linewidth": 2.0}
        ax.add_patch(_rectangle((column - 0.5, row - 0.5), 1, 1, **frame))
        beside = (x + wide + 0.06) / width
        bar = figure.add_axes((beside, below / height, 0.09 / width, high / height))
        figure.colorbar(picture, cax=bar)
        bar.tick_params(labelsize=7, labelcolor=FAINT, length=0)
        for spine in (*ax.spines.values(), *bar.spines.values()):
            spine.set_visible(False)
        if i == 0:
            ax.set_ylabel("timestep", fontsize=9.5, color=INK)
    where = f"layer {layers[chosen[1]]}, timestep {timesteps[chosen[0]]}"
    warning = "   ·   at the edge of the search: widen it" if boundary else ""
    title = f"Search   ·   chosen {where}{warning}"
    add_title(figure, title, left, 0.25)
    save(figure, path, dpi=110)


def choice_of_clusters(path: Any, choice: Mapping[str, Any]) -> None:
    """How deep the shallowest valley between two groups is, for every number of groups.

    Args:
        path: PNG file to write.
        choice: the fields of a ``num_clusters.Choice``.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7.5, 3.4)
    ax = figure.add_axes((0.09, 0.16, 0.88, 0.7))
    clusters, valleys = choice["clusters"], choice["valleys"]
    ax.axhline(choice["threshold"], color=FAINT, lw=0.9, ls=(0, (4, 3)))
    ax.plot(clusters, valleys, color=cluster_colour(0), lw=1.4, marker="o", ms=4)
    chosen = choice["chosen"]
    if chosen in clusters:
        at = valleys[clusters.index(chosen)]
        ax.plot([chosen], [at], marker="o", ms=11, mfc="none", mec="#e4572e", mew=1.8)
    ax.set_ylim(-0.03, 1.05)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("groups", fontsize=9.5, color=INK)
    ax.set_ylabel("shallowest valley / peak", fontsize=9.5, color=INK)
    ax.tick_params(labelsize=8.5, labelcolor=INK, color=RULE)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(RULE)
    add_title(figure, f"Number of clusters   ·   chosen {chosen}", 0.68, 0.25)
    save(figure, path, dpi=110)


def _rectangle(*args: Any, **kwargs: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(*args, **kwargs)
