"""The curves of a run: its metrics over the steps."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dec_diffusion.report.style import (
    FAINT,
    INK,
    PALETTE,
    RULE,
    new_figure,
    save,
    short,
    title_style,
)
from dec_diffusion.types import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROUPS: Mapping[str, tuple[str, ...]] = {
    "loss": ("loss", "denoising", "held_out_denoising", "kl"),
    "share of clusters": ("smallest_share", "largest_share"),
    "non-empty clusters": ("clusters_nonempty",),
    "label-free scores": ("silhouette", "occupancy_entropy"),
    "log-likelihood per example": ("mixture_log_likelihood", "log_mixture"),
    "accuracy (labels used for scoring only)": ("acc", "nmi", "ari"),
}
"""Panels of `curves`: title -> metric names."""


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
        groups: panel title -> metric names, `GROUPS` by default. Panels without data are left
            out.
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
            if key != x and seen and key in names:
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
    figure = new_figure(9.5, height)
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    figure.subplots_adjust(
        left=0.085, right=0.8, top=1 - 0.5 / height, bottom=0.55 / height, hspace=0.32
    )
    for ax, (title, lines) in zip(axes, panels, strict=True):
        _panel(ax, title, lines)
        for step, _ in starts:
            ax.axvline(step, color=FAINT, lw=0.8, ls=(0, (4, 3)), zorder=0)
    for step, name in starts:
        axes[0].annotate(
            short(name),
            (step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -3),
            textcoords="offset points",
            va="top",
            fontsize=8.5,
            color=FAINT,
            bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1},
        )
    axes[-1].set_xlabel(x, fontsize=10, color=INK)
    save(figure, path, dpi=130)


def _panel(ax: "Axes", title: str, lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """One set of axes; long noisy curves are drawn pale under their running mean."""
    from matplotlib.ticker import MaxNLocator

    for i, (key, (steps, values)) in enumerate(lines.items()):
        colour = PALETTE[i % len(PALETTE)]
        finite = np.where(np.isfinite(values), values, np.nan)
        marker = "o" if len(values) <= 30 else ""
        name = short(key, 24)
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
    ax.set_title(title, **title_style(10.5))
    ax.grid(axis="y", color=RULE, lw=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=9, colors=FAINT, length=3)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(RULE)
    ax.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.03),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
