"""What the pictures share: colours, figures and their titles, checks, and the file written."""

import colorsys
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from dec_diffusion.types import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ROWS = 100
"""Rows of a grid; clusters beyond are named in the title instead of drawn."""

DPI = 100
INK = "#1f2933"
FAINT = "#6b7785"
RULE = "#d9dee4"
# Ten well-separated hues of even lightness, then their dark and light relatives.
PALETTE = (
    "#4878cf", "#ee854a", "#3fa66b", "#d65f5f", "#956cb4",
    "#a0714f", "#e377c2", "#8c8c8c", "#b5a82b", "#31b5c9",
    "#1f3f7a", "#a34d12", "#1c5e38", "#8a1f2b", "#553079",
    "#5b3a22", "#9c2f7f", "#4d4d4d", "#6e6512", "#0f6674",
)  # fmt: skip


def cluster_colour(k: int) -> str:
    """Hex colour of cluster ``k`` >= 0; it never depends on how many clusters there are."""
    if k < len(PALETTE):
        return PALETTE[k]
    # Golden-ratio steps keep neighbours apart; three lightnesses tell near hues apart.
    red, green, blue = colorsys.hls_to_rgb(k * 0.618034 % 1, (0.42, 0.6, 0.3)[k % 3], 0.55)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def new_figure(width: float, height: float) -> "Figure":
    """A white figure (inches) with its own Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def add_title(figure: "Figure", title: str, x: float, y: float) -> None:
    """A title so many inches from the left and from the top."""
    width, height = figure.get_size_inches()
    style: dict[str, Any] = {"fontsize": 11.5, "fontweight": "bold", "color": INK}
    figure.text(x / width, 1 - y / height, title, va="center", **style)


def save(figure: "Figure", path: Any, *, dpi: int = DPI) -> None:
    """Write a figure to ``path`` as PNG."""
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


def check_labels(labels: ArrayLike, n: int, num_clusters: int | None = None) -> np.ndarray:
    """The labels as int64 [n]; they must be at least 0, and below ``num_clusters`` if given.

    Raises:
        InputError: another length, type or range.
    """
    codes = np.asarray(labels)
    if codes.shape != (n,):
        raise InputError(f"labels have shape {codes.shape}: expected one per example, ({n},)")
    top = np.inf if num_clusters is None else num_clusters
    if codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() >= top:
        upper = "" if num_clusters is None else f" below num_clusters={num_clusters}"
        raise InputError(f"labels must be integers from 0{upper}: give cluster numbers")
    return codes.astype(np.int64)


def clusters_text(k: int) -> str:
    """``k clusters``, for a title; says so where not all of them are drawn."""
    text = f"{k} cluster{'s' if k != 1 else ''}"
    return text if k <= MAX_ROWS else f"the first {MAX_ROWS} of {text}"


def title_style(size: float = 11.5) -> dict[str, Any]:
    """Arguments for the title of a set of axes."""
    return {"fontsize": size, "color": INK, "loc": "left", "pad": 7, "fontweight": "bold"}


def short(text: str, most: int = 18) -> str:
    """The text, cut to at most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def short_names(names: Sequence[str], most: int = 18) -> list[str]:
    """Names cut to at most so many characters, with different ones still different."""
    many = len(set(names))
    cut = [short(name, most) for name in names]
    if len(set(cut)) < many:  # what begins alike may end differently
        half = (most - 1) // 2
        cut = [n if len(n) <= most else f"{n[:half]}…{n[half + 1 - most :]}" for n in names]
    if len(set(cut)) < many:
        marks = [f"…{j}" if len(name) > most else "" for j, name in enumerate(names)]
        cut = [name[: most - len(mark)] + mark for name, mark in zip(names, marks, strict=True)]
    return cut


def darker(colour: str) -> str:
    """The colour at 70 % brightness, legible as text on white."""
    return "#" + "".join(f"{int(int(colour[i : i + 2], 16) * 0.7):02x}" for i in (1, 3, 5))
