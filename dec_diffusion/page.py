"""The report of a run: one page that needs a browser and nothing else.

All of it is in the one file: pictures are embedded, the only script shows the example under the
pointer of the map, and a content policy forbids everything from elsewhere. The number of pictures
is bounded, so the page stays under `MAX_BYTES` whatever the data. It holds no date: the same run
gives the same page, up to the seconds that it took.

Text is escaped where it is put in: only `Html`, which `tag` makes, goes in as it is. Names of
files, classes and runs are text.
"""

import base64
import hashlib
import html
import io
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dec_diffusion import config as configs
from dec_diffusion import metrics, num_clusters, prototypes, report
from dec_diffusion.config import Config
from dec_diffusion.data import Dataset
from dec_diffusion.data.dataset import few_rows
from dec_diffusion.evaluate import Assignment
from dec_diffusion.report import Layout

if TYPE_CHECKING:
    from PIL.Image import Image

PAGE = "report.html"
MAX_BYTES = 5_000_000
"""What a page takes at most, pictures and all."""
MAX_CARDS = report.MAX_ROWS
"""Clusters that are shown one by one."""

_THUMB = 64  # longest side of a picture in a card, in pixels
_SPRITE = 40  # longest side of a picture of the map
_SPRITE_BYTES = 1_300_000
_MAX_TABLE = 30  # rows or columns of a confusion matrix that is a table and not a picture
_FEATURES = 8
_UNSURE = 0.7
_VOID = frozenset({"br", "circle", "img", "meta"})

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
_BASELINES = {
    "kmeans_pixels": "k-means on the {inputs}",
    "gmm_pixels": "Gaussian mixture on the {inputs}",
    "umap_pixels": "k-means on a UMAP embedding of the {inputs}",
    "kmeans_latents": "k-means on the learned features",
    "gmm_latents": "Gaussian mixture on the learned features",
    "kmeans_at_cell": "k-means on the features found by the search, before fine-tuning",
}


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


class Notice(NamedTuple):
    """Something that a reader should know, and what to do about it."""

    what: str
    remedy: str


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


def write(
    path: Any,
    summary: Mapping[str, Any],
    dataset: Dataset,
    assignment: Assignment,
    *,
    config: Config,
    layout: Layout | None = None,
    samples: np.ndarray | None = None,
    command: str | None = None,
    seed: int = 0,
) -> None:
    """Write the page.

    Args:
        path: the file; ``curves.png``, ``search.png``, ``confusion.png`` and ``num_clusters.png``
            beside it are shown.
        summary: of the run, what ``summary.json`` holds.
        dataset: what was clustered, under the scaling of the run.
        assignment: of that data set.
        config: of the run.
        layout: of the map, if it has been computed already.
        samples: generated images [k, m, h, w, c] in [0, 1].
        command: that repeats the run, where it is known.
        seed: of the map.
    """
    target = path if hasattr(path, "write_bytes") else Path(path)
    if layout is None:
        layout = report.lay_out(assignment.embedding, seed=seed)
    pictures = {
        name: (target.parent / name).read_bytes()
        for name in ("curves.png", "search.png", "confusion.png", "num_clusters.png")
        if (target.parent / name).exists()
    }
    page = build(
        summary,
        dataset,
        assignment,
        config=config,
        layout=layout,
        samples=samples,
        command=command,
        pictures=pictures,
    )
    target.write_bytes(page.encode())


def build(
    summary: Mapping[str, Any],
    dataset: Dataset,
    assignment: Assignment,
    *,
    config: Config,
    layout: Layout,
    samples: np.ndarray | None = None,
    command: str | None = None,
    pictures: Mapping[str, bytes],
) -> Html:
    """The page as a text; ``pictures`` are PNG files by name, the rest as in `write`."""
    things = "images" if dataset.is_image else "examples"
    warned = notices(summary, assignment)
    sections = {
        "This run and honest baselines": _comparison(summary, dataset.is_image),
        "What to look at": _warnings(warned),
        "Clusters": _cards(summary, dataset, assignment, samples),
        "Map": _map(dataset, assignment, layout),
    }
    if "num_clusters" in summary and "num_clusters.png" in pictures:
        chosen = _choice(summary["num_clusters"], pictures["num_clusters.png"])
        sections["Number of clusters"] = chosen
    if dataset.labels is not None:
        picture = pictures.get("confusion.png")
        sections["Classes by cluster"] = _confusion(dataset.labels, assignment.labels, picture)
    if "curves.png" in pictures:
        alt = "Losses, sizes of clusters and scores over the steps of training"
        sections["Curves"] = _picture(pictures["curves.png"], alt)
    if "search" in summary and "search.png" in pictures:
        sections["Search"] = _search(summary["search"], pictures["search.png"])
    sections["Settings"] = _settings(summary, config, command)
    named = {f"s{i}": (title, body) for i, (title, body) in enumerate(sections.items())}
    nav = tag("nav", *(tag("a", t, href=f"#{i}") for i, (t, _) in named.items()), aria_label="Page")
    body = [tag("section", tag("h2", title), *b, id=i) for i, (title, b) in named.items()]
    head = tag("header", *_heading(summary, config, things), nav)
    return _document(f"{_method(config)} on {summary['data']['name']}", head, tag("main", *body))


def command(config: Config, dataset: Dataset, folder: Path) -> str | None:
    """The command that trains this run, with every setting; None if it cannot be known."""
    package, _, name = type(config.method).__module__.rpartition(".")
    source = config.data
    known = {source.name, source.tfds_name}
    if source.path:
        known |= {Path(source.path).stem, Path(source.path).expanduser().resolve().name}
    if package != "dec_diffusion.methods" or dataset.name not in known:
        return None
    options = [f"--config=configs/{name}.py", f"--workdir={folder}"]
    for field, value in configs.flatten(config).items():
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        options.append(f"--config.{field}={shown}")
    return shlex.join(["python", "-m", "dec_diffusion.main", *options])


# -- what to say ------------------------------------------------------------------------------


def notices(summary: Mapping[str, Any], assignment: Assignment) -> list[Notice]:
    """What in a result deserves doubt, in words, each with its remedy."""
    rows, asked = summary["clusters"]["report"], summary["clusters"]["asked"]
    fewer = "ask for fewer with --config.method.num_clusters"
    empty = [r["cluster"] for r in rows if not r["size"]]
    tiny = [r["cluster"] for r in rows if r["size"] and r["share"] < 0.1 / asked]
    huge = [r for r in rows if r["share"] > min(0.9, max(0.5, 3 / asked))]
    found = []
    if empty:
        what = f"{_named(empty)} {_are(empty)} empty: {asked} were asked for, "
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
    mean = float(assignment.probability.mean())
    if mean < _UNSURE:
        doubtful = float((assignment.probability < 0.5).mean())
        what = f"Assignments are unsure: mean probability {mean:.2f}, and {doubtful:.0%} of the "
        what += "examples have no cluster with a probability of one half."
        remedy = "trust only rows of assignments.csv with a high probability; try other numbers "
        remedy += "of clusters, or train longer."
        found.append(Notice(what, remedy))
    if summary.get("search", {}).get("boundary"):
        what = f"The search chose timestep {summary['search']['timestep']}, the first or last that "
        what += "it tried: the best one may lie outside."
        remedy = "look at the heat-map below; widen the search with "
        remedy += "--config.method.largest_timestep."
        found.append(Notice(what, remedy))
    return found + _beaten(summary)


def _beaten(summary: Mapping[str, Any]) -> list[Notice]:
    """Says so when something shallow is as good; without labels nothing can say it."""
    ours = summary["scores"].get("nmi")
    shallow = {n: b["scores"].get("nmi") for n, b in summary["baselines"].items() if "pixels" in n}
    better = {n: v for n, v in shallow.items() if ours is not None and v is not None and v >= ours}
    if not better:
        return []
    best = max(better, key=lambda n: better[n])
    is_image = len(summary["data"]["shape"]) == 3
    what = f"{_baseline(best, is_image)} is as good as this run "
    what += f"(NMI {better[best]:.3f} against {ours:.3f})."
    remedy = "use the simple method here, train longer, or try another method."
    return [Notice(what[0].upper() + what[1:], remedy)]


def distinctive(
    x: np.ndarray, labels: np.ndarray, cluster: int, *, most: int = _FEATURES
) -> list[Feature]:
    """The features in which the mean of a cluster is farthest from that of all other examples.

    Args:
        x: [n, d]; ``labels``: int [n].
        cluster: which, with members and not with all of them, or the list is empty.
        most: features to name.
    """
    member = labels == cluster
    if not 0 < member.sum() < len(member):
        return []
    inside, outside = (x[rows].mean(axis=0, dtype=np.float64) for rows in (member, ~member))
    spread = x.std(axis=0, dtype=np.float64)
    difference = np.divide(inside - outside, spread, out=np.zeros_like(spread), where=spread > 0)
    order = np.argsort(-np.abs(difference), kind="stable")[:most]
    return [
        Feature(f"column {j}", float(inside[j]), float(outside[j]), float(difference[j]))
        for j in order
        if difference[j]
    ]


def _heading(summary: Mapping[str, Any], config: Config, things: str) -> Iterable[Html]:
    data, clusters, scores = summary["data"], summary["clusters"], summary["scores"]
    yield tag("p", summary["name"], class_="faint")
    yield tag("h1", f"{_method(config)} on {data['name']}")
    shape = " x ".join(map(str, data["shape"]))
    kind = f"{things} of {shape}" if len(data["shape"]) == 3 else f"{things} with {shape} features"
    line = f"{data['examples']:,} {kind}. {clusters['asked']} clusters asked for, "
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
            f"NMI {nmi:.3f} and ARI {ari:.3f}: agreement of clusters and classes, from 0 (chance) "
            "to 1 (the same groups)."
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


def _comparison(summary: Mapping[str, Any], is_image: bool) -> list[Html]:
    labelled = summary["data"]["labels"]
    columns = ["acc", "nmi", "ari"] if labelled else []
    columns += ["silhouette", "occupancy_entropy", "clusters_nonempty"]
    rows = [("this run", summary["scores"])]
    rows += [(_baseline(n, is_image), b["scores"]) for n, b in summary["baselines"].items()]
    best = {c: max((s[c] for _, s in rows if s.get(c) is not None), default=None) for c in columns}

    def cell(name: str, scores: Mapping[str, Any]) -> Html:
        value = scores.get(name)
        top = name in ("acc", "nmi", "ari") and value is not None and value == best[name]
        shown = _number(value, name)
        return tag("td", tag("strong", shown) if top else shown)

    body = [
        tag("tr", tag("th", name, scope="row"), *(cell(c, scores) for c in columns))
        for name, scores in rows
    ]
    head = tag("tr", tag("td"), *(tag("th", _SCORES[c], scope="col") for c in columns))
    words = "Labels are used for scoring only: no method has seen them. " if labelled else ""
    words += "Silhouettes are measured in the space that each row clusters, so they compare "
    words += "results in the same space only. Evenness is 1 when all clusters have the same size."
    details = _table(
        (_SCORES.get(name) or name.replace("_", " "), _number(value, name))
        for name, value in summary["scores"].items()
    )
    return [
        _scroll(tag("table", tag("thead", head), tag("tbody", *body), class_="numbers")),
        tag("p", words, class_="faint"),
        tag("details", tag("summary", "All scores of this run"), details),
    ]


def _warnings(found: Sequence[Notice]) -> list[Html]:
    if not found:
        words = "No empty, tiny or dominant clusters; the assignments are sure of themselves."
        return [tag("p", words, class_="good")]
    return [
        tag(
            "div", tag("strong", n.what), " ", tag("em", "Remedy:"), " ", n.remedy, class_="warning"
        )
        for n in found
    ]


# -- clusters ---------------------------------------------------------------------------------


def _cards(
    summary: Mapping[str, Any],
    dataset: Dataset,
    assignment: Assignment,
    samples: np.ndarray | None,
) -> list[Html]:
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
    pictures = [Shown(data_uri(thumbnail(x, _THUMB)), title, title) for x in drawn]
    return [_strip("Generated", pictures, samples.shape[2:])] if pictures else []


def _card_of_vectors(
    dataset: Dataset, assignment: Assignment, k: int, certain: np.ndarray, doubtful: np.ndarray
) -> list[Html]:
    rows = few_rows(dataset)
    found = distinctive(dataset.examples[rows], assignment.labels[rows], k)
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
    parts = [_scroll(tag("table", head, tag("tbody", *rows), class_="numbers"))] if rows else []
    for title, members in (("Prototypes", certain[:5]), ("Least certain", doubtful[:5])):
        if len(members):
            names = ", ".join(_name(dataset, int(i)) for i in members)
            parts.append(tag("p", tag("b", f"{title}: "), names, class_="faint"))
    if rows:
        words = "Difference in standard deviations of the column."
        parts.append(tag("p", words, class_="faint"))
    return parts


def _shown(dataset: Dataset, assignment: Assignment, i: int, k: int) -> Shown:
    sure = f"{assignment.probability[i]:.3f}"
    title = f"{_name(dataset, i)} · probability {sure}"
    picture = thumbnail(_in_unit(dataset, dataset.examples[i]), _THUMB)
    return Shown(data_uri(picture), title, f"member of cluster {k}: {title}")


def _strip(title: str, pictures: Sequence[Shown], shape: tuple[int, ...]) -> Html:
    small = "pixels" if max(shape[:2]) < _THUMB else "smooth"
    images = [tag("img", src=p.uri, alt=p.alt, title=p.title, class_=small) for p in pictures]
    return tag("div", tag("h4", title), tag("div", *images, class_="strip"))


# -- the map ----------------------------------------------------------------------------------


def _map(dataset: Dataset, assignment: Assignment, layout: Layout) -> list[Html]:
    places = _places(layout.flat)
    order = np.random.default_rng(0).permutation(len(places))
    radius = float(np.clip(200 / np.sqrt(max(1, len(places))), 4, 9))
    dots = []
    # In random order, so that no cluster lies on top of the others.
    for turn in order:
        i = int(layout.rows[turn])
        k, (x, y) = int(assignment.labels[i]), places[turn]
        words = f"{_name(dataset, i)} · cluster {k} · {assignment.probability[i]:.2f}"
        if dataset.labels is not None:
            words += f" · class {dataset.labels[i]}"
        where = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "fill": report.cluster_colour(k)}
        dots.append(tag("circle", **where, data_i=int(turn), data_t=words))
    n, total = len(places), dataset.num_examples
    count = f"{n:,} of {total:,} examples" if n < total else f"all {total:,} examples"
    what = f"The learned features in two dimensions ({layout.method}), {count}"
    drawing = tag(
        "svg",
        *dots,
        viewBox="0 0 1000 700",
        role="img",
        aria_label=f"{what}, coloured by cluster",
        id="map",
        style=f"--r:{radius:.1f}px",
    )
    words = f"{what}. Near means alike; distances between far groups mean little. "
    words += "Point at a dot to see what it is."
    parts = [tag("p", words, class_="faint"), drawing, _legend(assignment.labels)]
    return [*parts, _tip(dataset, layout)]


def _tip(dataset: Dataset, layout: Layout) -> Html:
    """What appears beside the pointer: the example's tile of one picture of them all."""
    tile = []
    if dataset.is_image:
        # One at a time: all at once could be gigabytes.
        shown = (_in_unit(dataset, dataset.examples[i]) for i in layout.rows)
        picture, columns, rows = sprite(shown, _SPRITE)
        style = f"background-image:url({data_uri(picture, _SPRITE_BYTES)});"
        style += f"background-size:{100 * columns}% {100 * rows}%;"
        h, w = dataset.example_shape[:2]
        style += f"image-rendering:{'pixelated' if max(h, w) < _SPRITE else 'auto'}"
        tile = [tag("div", class_="tile", style=style, data_columns=columns, data_rows=rows)]
    return tag("div", *tile, tag("span"), id="tip", hidden="")


def _legend(labels: np.ndarray) -> Html:
    found = np.unique(labels)[:MAX_CARDS]
    keys = [
        tag("li", tag("i", style=f"background:{report.cluster_colour(int(k))}"), f"cluster {k}")
        for k in found
    ]
    return tag("ul", *keys, class_="legend")


def _places(flat: np.ndarray) -> np.ndarray:
    """Points [n, 2] stretched over the drawing, upwards as on paper."""
    low, high = flat.min(axis=0), flat.max(axis=0)
    unit = (flat - low) / np.where(high > low, high - low, 1.0)
    return np.c_[20 + 960 * unit[:, 0], 680 - 660 * unit[:, 1]]


# -- the rest ---------------------------------------------------------------------------------


def _confusion(classes: np.ndarray, clusters: np.ndarray, picture: bytes | None) -> list[Html]:
    table, names, columns = metrics.contingency(classes, clusters)
    words = "How each class spreads over the clusters; labels are used for this table only. "
    words += "Matched pairs come first, and lie on the diagonal."
    said = tag("p", words, class_="faint")
    if max(table.shape) > _MAX_TABLE:
        return [said] + (_picture(picture, "Classes by cluster") if picture else [])
    match = metrics.best_match(classes, clusters)
    row_of = {name: i for i, name in enumerate(names.tolist())}
    column_of = {name: j for j, name in enumerate(columns.tolist())}
    pairs = sorted((row_of[c], column_of[k]) for k, c in match.items())
    rows = [i for i, _ in pairs] + [i for i in row_of.values() if i not in dict(pairs)]
    order = [j for _, j in pairs]
    order += [j for j in column_of.values() if j not in order]
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)

    def cell(i: int, j: int) -> Html:
        return tag("td", f"{table[i, j]:,}" if table[i, j] else "", style=f"--p:{share[i, j]:.2f}")

    heads = [tag("th", f"cluster {columns[j]}", scope="col") for j in order]
    body = [
        tag("tr", tag("th", f"class {names[i]}", scope="row"), *(cell(i, j) for j in order))
        for i in rows
    ]
    head = tag("thead", tag("tr", tag("td"), *heads))
    return [said, _scroll(tag("table", head, tag("tbody", *body), class_="numbers heat"))]


def _choice(choice: Mapping[str, Any], picture: bytes) -> list[Html]:
    alt = "How far apart the closest two groups are, for every number of clusters; one is chosen"
    words = num_clusters.describe(choice)
    return [tag("p", words[0].upper() + words[1:]), *_picture(picture, alt)]


def _search(chosen: Mapping[str, Any], picture: bytes) -> list[Html]:
    words = f"Features of layer {chosen['layer']} at timestep {chosen['timestep']} were chosen, "
    words += "by a score that needs no labels."
    if chosen.get("acc") is not None:
        words += f" There k-means has an accuracy of {chosen['acc']:.3f}; the best of all cells, "
        words += f"which only labels can tell, has {chosen['best_acc_of_all_cells']:.3f}."
    alt = "Heat-maps of the scores of all layers and timesteps; the chosen cell is framed"
    return [tag("p", words), *_picture(picture, alt)]


def _settings(summary: Mapping[str, Any], config: Config, command: str | None) -> list[Html]:
    training, device = summary["training"], summary["device"]
    facts: list[tuple[str, Any]] = [
        ("device", f"{device['count']} x {device['kind']}"),
        ("gradient steps", f"{training['steps']:,}"),
        ("parameters", f"{training['parameters']:,}"),
        ("seconds of training", _number(training["seconds"], "seconds")),
        ("examples per second", _number(training["examples_per_second"], "examples_per_second")),
    ]
    if "seconds_this_command" in summary:
        facts.append(("seconds in all", _number(summary["seconds_this_command"], "seconds")))
    plain = ((name, _plain(value)) for name, value in configs.flatten(config).items())
    parts = [
        tag("h3", "What ran"),
        _table(facts),
        tag("details", tag("summary", "Every setting"), _table(plain)),
        tag("details", tag("summary", "Versions"), _table(summary["versions"].items())),
    ]
    if command:
        made = tag("summary", "The command that made it")
        parts.append(tag("details", made, tag("pre", command)))
    return parts


# -- pictures ---------------------------------------------------------------------------------


def thumbnail(image: np.ndarray, side: int) -> "Image":
    """An image [h, w, c] in [0, 1] or uint8, shrunk so that its longest side is ``side``."""
    from PIL import Image

    picture = Image.fromarray(report.compose_grid(image[None, None]))
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
    return picture


def sprite(images: Iterable[np.ndarray], side: int) -> tuple["Image", int, int]:
    """Thumbnails of images of one shape as tiles of one picture; also its columns and rows."""
    from PIL import Image

    tiles = [thumbnail(image, side) for image in images]
    columns = int(np.ceil(np.sqrt(len(tiles))))
    rows = -(-len(tiles) // columns)
    size = max(tiles[0].size)
    canvas = Image.new("RGB", (columns * size, rows * size), "white")
    for i, tile in enumerate(tiles):
        middle = ((size - tile.width) // 2, (size - tile.height) // 2)
        canvas.paste(tile, (i % columns * size + middle[0], i // columns * size + middle[1]))
    return canvas, columns, rows


def data_uri(picture: "Image", limit: int = 1500) -> str:
    """An image as a data URI: PNG if that takes ``limit`` bytes at most, else JPEG.

    JPEG is made coarser until it fits as well, or can be no coarser.
    """
    grey = picture.convert("L")
    if grey.convert("RGB").tobytes() == picture.tobytes():
        picture = grey
    encoded = _encoded(picture, "PNG", optimize=max(picture.size) <= _THUMB)
    if len(encoded) <= limit:
        return _uri(encoded, "image/png")
    # A thumbnail is too small to lose anything for a few bytes; a picture of thousands is not.
    for quality in (90, 80, 65, 50, 35, 20, 10):
        encoded = _encoded(picture, "JPEG", quality=quality)
        if len(encoded) <= limit:
            break
    return _uri(encoded, "image/jpeg")


def _encoded(picture: "Image", kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _picture(content: bytes, alt: str) -> list[Html]:
    return [tag("img", src=_uri(content, "image/png"), alt=alt, class_="figure")]


def _in_unit(dataset: Dataset, examples: np.ndarray) -> np.ndarray:
    """Images in the units of the data as uint8."""
    if examples.dtype == np.uint8 and dataset.offset == dataset.scale == 127.5:
        return examples
    unit = ((examples - dataset.offset) / dataset.scale + 1) / 2
    return np.round(255 * np.clip(unit, 0, 1)).astype(np.uint8)


# -- text and HTML ----------------------------------------------------------------------------


def tag(name: str, /, *children: str, **attributes: Any) -> Html:
    """An element; children that are no `Html` are escaped, and so are all attributes.

    ``class_`` is ``class``, and an underscore inside a name a hyphen.
    """
    start = name + "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
    )
    if name in _VOID:
        return Html(f"<{start}>" if name != "circle" else f"<{start}/>")
    inside = "".join(c if isinstance(c, Html) else escape(c) for c in children)
    return Html(f"<{start}>{inside}</{name}>")


def escape(value: Any) -> Html:
    """Any value as text for HTML; what no text can hold becomes a question mark."""
    # Names of files that are not UTF-8 arrive with surrogates.
    text = str(value).encode("utf-8", "replace").decode().replace("\0", "?")
    return Html(html.escape(text, quote=True))


def _table(rows: Iterable[tuple[str, Any]]) -> Html:
    lines = [tag("tr", tag("th", name, scope="row"), tag("td", str(value))) for name, value in rows]
    return _scroll(tag("table", tag("tbody", *lines)))


def _scroll(table: Html) -> Html:
    return tag("div", table, class_="scroll")


def _number(value: Any, name: str) -> str:
    if value is None or not np.isfinite(value):
        return "n/a"
    if name == "clusters_nonempty":
        return f"{value:.0f}"
    if name in ("seconds", "examples_per_second"):
        return f"{value:,.1f}"
    return f"{value:.3f}"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _method(config: Config) -> str:
    return type(config.method).__name__


def _baseline(name: str, is_image: bool) -> str:
    known = _BASELINES.get(name) or name.replace("_", " ")
    return known.format(inputs="pixels" if is_image else "inputs")


def _name(dataset: Dataset, i: int) -> str:
    return dataset.paths[i] if dataset.paths else f"row {dataset.rows[i]}"


def _named(clusters: Sequence[int]) -> str:
    few = ", ".join(map(str, clusters[:10])) + ("…" if len(clusters) > 10 else "")
    return f"Cluster {few}" if len(clusters) == 1 else f"{len(clusters)} clusters ({few})"


def _are(clusters: Sequence[int]) -> str:
    return "is" if len(clusters) == 1 else "are"


def _document(title: str, *body: Html) -> Html:
    allowed = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    policy += f"script-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(_STYLE)),
    )
    script = tag("script", Html(_SCRIPT))
    return Html("<!DOCTYPE html>\n" + tag("html", head, tag("body", *body, script), lang="en"))


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --faint: #56626f; --paper: #fff; --card: #f6f7f9;
  --rule: #d9dee4; --heat: 72, 120, 207; --warn: #fff4e0; --warn-rule: #e09f3e; --good: #e8f5ec; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --faint: #a3adb8; --paper: #14181c;
  --card: #1d2329; --rule: #38414a; --warn: #3a2c12; --good: #15301f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(.8rem, 3vw, 2.5rem) 4rem; max-width: 1280px;
  background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .7rem; padding-top: .7rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 0 0 .3rem; }
h4 { font-size: .85rem; font-weight: 600; margin: .6rem 0 .25rem; color: var(--faint); }
p { margin: .3rem 0; overflow-wrap: anywhere; }
.faint { color: var(--faint); font-size: .9rem; }
.lead { font-size: 1.1rem; }
ul { padding-left: 1.2rem; margin: .5rem 0; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin-top: 1rem; font-size: .9rem; }
a { color: inherit; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .92rem; }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid var(--rule);
  vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 500; }
thead th { color: var(--faint); font-size: .85rem; vertical-align: bottom; }
.numbers td, .numbers thead th { text-align: right; font-variant-numeric: tabular-nums; }
.numbers td { white-space: nowrap; }
.numbers th { overflow-wrap: normal; min-width: 3.5em; }
.numbers tbody th { min-width: 8em; }
.numbers thead th:first-child { text-align: left; }
tbody tr:first-child > * { border-top: 1px solid var(--rule); }
.heat td { background: rgba(var(--heat), calc(var(--p, 0) * .65)); min-width: 3.2em; }
.heat tbody th { white-space: nowrap; min-width: 0; }
.warning, .good { border-left: 4px solid var(--warn-rule); background: var(--warn);
  padding: .6rem .9rem; margin: .5rem 0; border-radius: 4px; overflow-wrap: anywhere; }
.good { border-color: #3fa66b; background: var(--good); }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%,
  24rem), 1fr)); margin-top: .8rem; }
.card { background: var(--card); border-radius: 8px; padding: .8rem 1rem; min-width: 0; }
.card h3 { border-left: 6px solid; padding-left: .5rem; }
.card table { font-size: .82rem; width: 100%; }
.card th, .card td { padding: .15rem .4rem; }
.card tbody th { min-width: 6em; overflow-wrap: anywhere; }
.strip { display: flex; flex-wrap: wrap; gap: 4px; }
.strip img { width: 52px; height: 52px; object-fit: contain; border-radius: 3px; }
.pixels { image-rendering: pixelated; }
.bar { display: inline-block; height: .6em; background: #d65f5f; border-radius: 2px; }
.bar.low { background: #4878cf; }
svg { display: block; width: 100%; height: auto; background: var(--card); border-radius: 8px; }
circle { r: var(--r); opacity: .75; }
circle:hover { opacity: 1; stroke: var(--ink); stroke-width: 3px; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem;
  font-size: .88rem; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 50%;
  margin-right: .35em; }
#tip { position: fixed; z-index: 2; pointer-events: none; max-width: min(18rem, 90vw);
  padding: .5rem; font-size: .82rem; line-height: 1.35; overflow-wrap: anywhere;
  background: var(--paper); border: 1px solid var(--rule); border-radius: 6px;
  box-shadow: 0 3px 14px rgba(0, 0, 0, .25); }
#tip .tile { width: 96px; height: 96px; margin-bottom: .3rem; background-repeat: no-repeat; }
.figure { max-width: 100%; height: auto; border-radius: 6px; }
details { margin: .5rem 0; }
summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); padding: .8rem;
  border-radius: 6px; font-size: .85rem; }
"""

_SCRIPT = """
const tip = document.getElementById("tip"), tile = tip.querySelector(".tile");
const part = (i, n) => n > 1 ? 100 * i / (n - 1) + "%" : "0";
document.getElementById("map").addEventListener("pointerover", event => {
  const dot = event.target.dataset, at = Number(dot.i);
  tip.hidden = dot.t === undefined;
  if (tip.hidden) return;
  tip.querySelector("span").textContent = dot.t;
  if (tile) {
    const columns = Number(tile.dataset.columns), rows = Number(tile.dataset.rows);
    tile.style.backgroundPosition =
      part(at % columns, columns) + " " + part(Math.floor(at / columns), rows);
  }
  const box = tip.getBoundingClientRect(), gap = 14;
  const x = event.clientX + gap, y = event.clientY + gap;
  tip.style.left = Math.max(0, Math.min(x, innerWidth - box.width - gap)) + "px";
  tip.style.top = (y + box.height > innerHeight ? event.clientY - box.height - gap : y) + "px";
});
document.getElementById("map").addEventListener("pointerleave", () => { tip.hidden = true; });
"""
