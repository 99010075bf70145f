"""Clusters: a card for each, with its members, generated images, or features that set it apart."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dec_diffusion import prototypes, report
from dec_diffusion.data import Dataset
from dec_diffusion.data.dataset import few_rows
from dec_diffusion.evaluate import Assignment
from dec_diffusion.page.embed import THUMB, data_uri, in_unit, thumbnail
from dec_diffusion.page.markup import Html, scroll, tag
from dec_diffusion.page.words import example_name

MAX_CARDS = report.MAX_ROWS
"""Clusters that are shown one by one."""

_FEATURES = 8


class Shown(NamedTuple):
    """A picture of an example: its data URI, what it is, and its description for a reader."""

    uri: str
    title: str
    alt: str


class Feature(NamedTuple):
    """A feature by which a cluster differs: means in and outside it, and the difference.

    ``difference`` is in standard deviations of the feature over all examples.
    """

    name: str
    inside: float
    outside: float
    difference: float


def cluster_cards(
    summary: Mapping[str, Any],
    dataset: Dataset,
    assignment: Assignment,
    samples: np.ndarray | None,
) -> list[Html]:
    """The cards of the first `MAX_CARDS` clusters, in the order of the summary; as in ``build``."""
    rows = summary["clusters"]["report"]
    shown = min(len(rows), MAX_CARDS)
    cards = []
    for row in rows[:shown]:
        k = row["cluster"]
        most, least = int(np.clip(240 // shown, 2, 12)), int(np.clip(80 // shown, 1, 4))
        ordered = prototypes.ranked(assignment, k)
        certain, rest = ordered[:most], ordered[most:]
        doubtful = rest[max(0, len(rest) - least) :]
        if dataset.is_image:
            body = _card_of_images(dataset, assignment, k, certain, doubtful)
            if samples is not None:
                body += _card_of_samples(samples, k, int(np.clip(80 // shown, 1, 6)))
        else:
            body = _card_of_vectors(dataset, assignment, k, certain, doubtful)
        cards.append(_card(row, body if row["size"] else []))
    words = f"The first {shown} of {len(rows)} clusters. " if shown < len(rows) else ""
    words += "Prototypes are the most certain members, of equally certain ones the most central; "
    words += "the least certain ones show where the cluster ends."
    return [tag("p", words, class_="faint"), tag("div", *cards, class_="cards")]


def _card(row: Mapping[str, Any], body: list[Html]) -> Html:
    if not row["size"]:
        words = "empty: no example belongs to it"
    else:
        words = f"{row['size']:,} · {row['share']:.1%} · mean probability {row['confidence']:.3f}"
    lines = [tag("p", words, class_="faint")]
    if row.get("majority") is not None:
        lines.append(tag("p", f"mostly class {row['majority']} ({row['purity']:.1%} of it)"))
    colour = report.cluster_colour(row["cluster"])
    title = tag("h3", f"Cluster {row['cluster']}", style=f"border-color:{colour}")
    return tag("article", title, *lines, *body, class_="card")


def _card_of_images(
    dataset: Dataset, assignment: Assignment, k: int, certain: np.ndarray, doubtful: np.ndarray
) -> list[Html]:
    def strip(title: str, rows: np.ndarray) -> Html:
        pictures = [_shown(dataset, assignment, int(i), k) for i in rows]
        return _strip(title, pictures, dataset.example_shape)

    parts = [strip("Prototypes", certain)]
    return parts + ([strip("Least certain", doubtful)] if len(doubtful) else [])


def _card_of_samples(samples: np.ndarray, k: int, most: int) -> list[Html]:
    drawn = samples[k, :most] if k < len(samples) else samples[:0, 0]
    title = f"generated for cluster {k}"
    pictures = [Shown(data_uri(thumbnail(x, THUMB)), title, title) for x in drawn]
    return [_strip("Generated", pictures, samples.shape[2:])] if pictures else []


def _card_of_vectors(
    dataset: Dataset, assignment: Assignment, k: int, certain: np.ndarray, doubtful: np.ndarray
) -> list[Html]:
    rows = few_rows(dataset)
    labels = assignment.labels[rows]
    found = distinctive(dataset.examples[rows], labels, k, names=dataset.columns)
    reach = max((abs(f.difference) for f in found), default=1.0)
    rows = [
        tag(
            "tr",
            tag("th", f.name, scope="row"),
            tag("td", f"{f.inside:.4g}"),
            tag("td", f"{f.outside:.4g}"),
            tag(
                "td",
                f"{f.difference:+.2f} ",
                tag(
                    "span",
                    class_="bar low" if f.difference < 0 else "bar",
                    style=f"width:{3 * abs(f.difference) / reach:.2f}em",
                ),
            ),
        )
        for f in found
    ]
    titles = ("differs most in", "mean", "elsewhere", "difference")
    head = tag("thead", tag("tr", *(tag("th", title, scope="col") for title in titles)))
    parts = [scroll(tag("table", head, tag("tbody", *rows), class_="numbers"))] if rows else []
    for title, members in (("Prototypes", certain[:5]), ("Least certain", doubtful[:5])):
        if len(members):
            names = ", ".join(example_name(dataset, int(i)) for i in members)
            parts.append(tag("p", tag("b", f"{title}: "), names, class_="faint"))
    if rows:
        words = "Difference in standard deviations of the column."
        parts.append(tag("p", words, class_="faint"))
    return parts


def _shown(dataset: Dataset, assignment: Assignment, i: int, k: int) -> Shown:
    sure = f"{assignment.probability[i]:.3f}"
    title = f"{example_name(dataset, i)} · probability {sure}"
    picture = thumbnail(in_unit(dataset, dataset.examples[i]), THUMB)
    return Shown(data_uri(picture), title, f"member of cluster {k}: {title}")


def _strip(title: str, pictures: Sequence[Shown], shape: tuple[int, ...]) -> Html:
    small = "pixels" if max(shape[:2]) < THUMB else "smooth"
    images = [tag("img", src=p.uri, alt=p.alt, title=p.title, class_=small) for p in pictures]
    return tag("div", tag("h4", title), tag("div", *images, class_="strip"))


def distinctive(
    x: np.ndarray,
    labels: np.ndarray,
    cluster: int,
    *,
    most: int = _FEATURES,
    names: Sequence[str] | None = None,
) -> list[Feature]:
    """The features in which the mean of a cluster is farthest from that of all other examples.

    Args:
        x: [n, d]; ``labels``: int [n].
        cluster: which, with members and not with all of them, or the list is empty.
        most: features to name.
        names: of the features, [d]; by default their numbers.
    """
    member = labels == cluster
    if not 0 < member.sum() < len(member):
        return []
    inside, outside = (x[rows].mean(axis=0, dtype=np.float64) for rows in (member, ~member))
    spread = x.std(axis=0, dtype=np.float64)
    difference = np.divide(inside - outside, spread, out=np.zeros_like(spread), where=spread > 0)
    order = np.argsort(-np.abs(difference), kind="stable")[:most]
    return [
        Feature(
            f"column {j}" if names is None else names[int(j)],
            float(inside[j]),
            float(outside[j]),
            float(difference[j]),
        )
        for j in order
        if difference[j]
    ]
