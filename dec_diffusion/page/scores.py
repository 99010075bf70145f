"""How good a result is: the heading, the comparison with baselines, classes by cluster."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dec_diffusion import metrics
from dec_diffusion.config import Config
from dec_diffusion.page.embed import figure
from dec_diffusion.page.markup import Html, scroll, table, tag
from dec_diffusion.page.words import baseline_name, method_name, number, wanted

_MAX_TABLE = 30  # rows or columns of a confusion matrix that is a table and not a picture
_SCORES = {
    "acc": "ACC",
    "nmi": "NMI",
    "ari": "ARI",
    "macro_recall": "macro recall",
    "silhouette": "silhouette",
    "occupancy_entropy": "evenness of sizes",
    "clusters_nonempty": "clusters with members",
    "smallest_share": "smallest share",
    "largest_share": "largest share",
    "mean_probability": "mean probability",
    "mixture_log_likelihood": "log-likelihood of the mixture",
}


def heading(summary: Mapping[str, Any], config: Config, things: str) -> Iterable[Html]:
    """What was clustered by what, and how well, in words; ``things`` is what the examples are."""
    data, clusters, scores = summary["data"], summary["clusters"], summary["scores"]
    yield tag("p", summary["name"], class_="faint")
    yield tag("h1", f"{method_name(config)} on {data['name']}")
    shape = " x ".join(map(str, data["shape"]))
    kind = f"{things} of {shape}" if len(data["shape"]) == 3 else f"{things} with {shape} features"
    line = f"{data['examples']:,} {kind}. {clusters['asked']} clusters {wanted(summary)}, "
    yield tag("p", f"{line}{clusters['found']} found.", class_="lead")
    yield tag("ul", *(tag("li", sentence) for sentence in _in_words(scores, things)))


def _in_words(scores: Mapping[str, Any], things: str) -> Iterable[str]:
    acc, nmi, ari = (scores.get(name) for name in ("acc", "nmi", "ari"))
    if acc is not None and nmi is not None and ari is not None:
        yield (
            f"Accuracy {acc:.3f}: if each cluster stands for one class, {acc:.1%} of the {things} "
            "are in the cluster of their class. Labels were used for this figure, not for training."
        )
        yield (
            f"NMI {nmi:.3f} and ARI {ari:.3f}: agreement of clusters and classes, 1 for the same "
            "groups. ARI is 0 by chance; NMI is above it, the more so the fewer the examples."
        )
    apart = scores.get("silhouette")
    if apart is not None:
        words = "lie well apart" if apart > 0.5 else "lie apart, with some overlap"
        words = words if apart > 0.25 else "overlap"
        yield f"Silhouette {apart:.3f}: in the learned features the clusters {words}."
    mean = scores.get("mean_probability")
    if mean is not None:
        yield (
            f"Mean probability {mean:.3f}: how sure the method is of its own assignments, "
            "which is not how often they are right."
        )


def comparison(summary: Mapping[str, Any], is_image: bool) -> list[Html]:
    """The scores of the run above those of its baselines; the best of those with labels in bold."""
    labelled = summary["data"]["labels"]
    columns = ["acc", "nmi", "ari"] if labelled else []
    columns += ["silhouette", "occupancy_entropy", "clusters_nonempty"]
    rows = [("this run", summary["scores"])]
    rows += [(baseline_name(n, is_image), b["scores"]) for n, b in summary["baselines"].items()]
    best = {c: max((s[c] for _, s in rows if s.get(c) is not None), default=None) for c in columns}

    def cell(name: str, scores: Mapping[str, Any]) -> Html:
        value = scores.get(name)
        top = name in ("acc", "nmi", "ari") and value is not None and value == best[name]
        shown = number(value, name)
        return tag("td", tag("strong", shown) if top else shown)

    body = [
        tag("tr", tag("th", name, scope="row"), *(cell(c, scores) for c in columns))
        for name, scores in rows
    ]
    head = tag("tr", tag("td"), *(tag("th", _SCORES[c], scope="col") for c in columns))
    words = "Labels are used for scoring only: no method has seen them. " if labelled else ""
    words += "Silhouettes are measured in the space that each row clusters, so they compare "
    words += "results in the same space only. Evenness is 1 when all clusters have the same size."
    details = table(
        (_SCORES.get(name) or name.replace("_", " "), number(value, name))
        for name, value in summary["scores"].items()
    )
    return [
        scroll(tag("table", tag("thead", head), tag("tbody", *body), class_="numbers")),
        tag("p", words, class_="faint"),
        tag("details", tag("summary", "All scores of this run"), details),
    ]


def confusion(classes: np.ndarray, clusters: np.ndarray, picture: bytes | None) -> list[Html]:
    """Classes [n] by clusters [n] as a table, or as the picture where they are too many."""
    table, names, columns = metrics.contingency(classes, clusters)
    words = "How each class spreads over the clusters; labels are used for this table only. "
    words += "Matched pairs come first, and lie on the diagonal."
    said = tag("p", words, class_="faint")
    if max(table.shape) > _MAX_TABLE:
        return [said] + (figure(picture, "Classes by cluster") if picture else [])
    rows, order = metrics.matched_order(table)
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)

    def cell(i: int, j: int) -> Html:
        return tag("td", f"{table[i, j]:,}" if table[i, j] else "", style=f"--p:{share[i, j]:.2f}")

    heads = [tag("th", f"cluster {columns[j]}", scope="col") for j in order]
    body = [
        tag("tr", tag("th", f"class {names[i]}", scope="row"), *(cell(i, j) for j in order))
        for i in rows
    ]
    head = tag("thead", tag("tr", tag("td"), *heads))
    return [said, scroll(tag("table", head, tag("tbody", *body), class_="numbers heat"))]
