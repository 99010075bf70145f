"""What to look at: what in a result deserves doubt, each with its remedy."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dec_diffusion.config import Config
from dec_diffusion.evaluate import Assignment
from dec_diffusion.page.markup import Html, tag
from dec_diffusion.page.words import baseline_name, wanted

_UNSURE = 0.7
_HUGE = 0.9  # of all examples
_FEW = 10  # examples, which may well be of one group
_FARTHER = 0.1  # silhouette; that of healthy runs is within .03 of k-means' in the same space
_BETTER = 0.02  # of NMI, from which on a baseline is not as good but better


class Notice(NamedTuple):
    """Something that a reader should know, and what to do about it."""

    what: str
    remedy: str


def notices(
    summary: Mapping[str, Any], assignment: Assignment, config: Config | None = None
) -> list[Notice]:
    """What in a result deserves doubt, in words, each with its remedy.

    Args:
        summary: of the run.
        assignment: of its examples.
        config: of the run; with it a remedy can name settings of its method.
    """
    found = _sizes(summary) if summary["data"]["trained_on"] else _other_data(summary)
    mean = float(assignment.probability.mean())
    if mean < _UNSURE:
        doubtful = float((assignment.probability < 0.5).mean())
        what = f"Assignments are unsure: mean probability {mean:.2f}, and {doubtful:.0%} of the "
        what += "examples have no cluster with a probability of one half."
        remedy = "trust only rows of assignments.csv with a high probability"
        if summary["data"]["trained_on"]:
            remedy += "; try other numbers of clusters, or train longer"
        found.append(Notice(what, f"{remedy}."))
    # Beyond timestep 0, without any noise, there is nothing to try.
    if summary.get("search", {}).get("boundary") and summary["search"]["timestep"]:
        what = f"The search chose timestep {summary['search']['timestep']}, the first or last that "
        what += "it tried: the best one may lie outside."
        remedy = "look at the heat-map below; widen the search with "
        remedy += "--config.method.largest_timestep."
        found.append(Notice(what, remedy))
    if summary["data"]["trained_on"]:
        found += _torn(summary, config)
    return found + _beaten(summary)


def _other_data(summary: Mapping[str, Any]) -> list[Notice]:
    """Of data that the method was not trained on, which may lack what its clusters stand for."""
    largest = max(summary["clusters"]["report"], key=lambda r: r["share"])
    few = summary["data"]["examples"] < _FEW
    if few or largest["share"] <= _HUGE or summary["clusters"]["asked"] == 1:
        return []
    what = f"Cluster {largest['cluster']} holds {largest['share']:.0%} of these data."
    remedy = "unless they are that uneven, they differ from the data of the training: compare "
    remedy += "their pictures and units, or train on them too."
    return [Notice(what, remedy)]


def _sizes(summary: Mapping[str, Any]) -> list[Notice]:
    """Of clusters that are empty, tiny or huge."""
    rows, asked = summary["clusters"]["report"], summary["clusters"]["asked"]
    fewer = "ask for fewer with --config.method.num_clusters"
    empty = [r["cluster"] for r in rows if not r["size"]]
    tiny = [r["cluster"] for r in rows if r["size"] and r["share"] < 0.1 / asked]
    huge = [r for r in rows if asked > 1 and r["share"] > min(_HUGE, max(0.5, 3 / asked))]
    found = []
    if empty:
        what = f"{_named(empty)} {_are(empty)} empty: {asked} were {wanted(summary)}, "
        what += f"{asked - len(empty)} found."
        found.append(Notice(what, f"{fewer}, train longer, or try another --config.seed."))
    if tiny:
        what = f"{_named(tiny)} {_are(tiny)} tiny, with under a tenth of an even share."
        remedy = f"look at the members: outliers may deserve a group of their own; if not, {fewer}."
        found.append(Notice(what, remedy))
    for row in huge:
        what = f"Cluster {row['cluster']} holds {row['share']:.0%} of everything."
        remedy = "this is collapse unless the data are that uneven: try another --config.seed, "
        remedy += "train longer, or change --config.method.num_clusters."
        found.append(Notice(what, remedy))
    return found


def _torn(summary: Mapping[str, Any], config: Config | None) -> list[Notice]:
    """Says so when k-means finds groups in the learned features that lie much farther apart.

    Both silhouettes are of the same points, so they compare; no labels are needed. Methods that
    prefer groups of equal size tear large ones apart where the groups have other sizes.
    """
    theirs = summary["baselines"].get("kmeans_latents", {}).get("scores", {}).get("silhouette")
    ours = summary["scores"].get("silhouette")
    if ours is None or theirs is None or theirs - ours < _FARTHER:
        return []
    what = "K-means on the learned features finds groups that lie farther apart than those of this "
    what += f"run (silhouette {theirs:.3f} against {ours:.3f})."
    remedy = "the clusters may not be the groups that the features show, as where groups of "
    remedy += "different sizes are made equal: compare the sizes with what you expect"
    settings: Any = None if config is None else config.method
    if getattr(settings, "prior", "") == "uniform":
        remedy += ", and try --config.method.prior=learned, which lets them differ"
    elif getattr(settings, "balance_iterations", 0):
        remedy += ", and try --config.method.balance_iterations=0, which lets them differ"
    return [Notice(what, f"{remedy}.")]


def _beaten(summary: Mapping[str, Any]) -> list[Notice]:
    """Says so when something shallow is as good or better; without labels nothing can say it."""
    ours = summary["scores"].get("nmi")
    shallow = {n: b["scores"].get("nmi") for n, b in summary["baselines"].items() if "pixels" in n}
    better = {n: v for n, v in shallow.items() if ours is not None and v is not None and v >= ours}
    if not better:
        return []
    best = max(better, key=lambda n: better[n])
    is_image = len(summary["data"]["shape"]) == 3
    how = "better than" if better[best] - ours >= _BETTER else "as good as"
    what = f"{baseline_name(best, is_image)} is {how} this run "
    what += f"(NMI {better[best]:.3f} against {ours:.3f})."
    remedy = "use the simple method here, train longer, or try another method."
    return [Notice(what[0].upper() + what[1:], remedy)]


def notice_boxes(found: Sequence[Notice]) -> list[Html]:
    """A box for each notice, or one that says there is none."""
    if not found:
        words = "No empty, tiny or dominant clusters; the assignments are sure of themselves."
        return [tag("p", words, class_="good")]
    return [
        tag(
            "div", tag("strong", n.what), " ", tag("em", "Remedy:"), " ", n.remedy, class_="warning"
        )
        for n in found
    ]


def _named(clusters: Sequence[int]) -> str:
    few = ", ".join(map(str, clusters[:10])) + ("…" if len(clusters) > 10 else "")
    return f"Cluster {few}" if len(clusters) == 1 else f"{len(clusters)} clusters ({few})"


def _are(clusters: Sequence[int]) -> str:
    return "is" if len(clusters) == 1 else "are"
