"""The report of a run: what it says, that it holds any names, and that a browser shows it."""

import base64
import dataclasses
import io
import pathlib
import re
import shlex
import shutil
import subprocess
import time
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dec_diffusion import config as configs
from dec_diffusion import data, evaluate, metrics, options, page, report, results
from dec_diffusion.config import Config
from dec_diffusion.data import DataConfig, Dataset
from dec_diffusion.evaluate import Assignment
from dec_diffusion.methods.clusterddpm import ClusterDDPM
from dec_diffusion.methods.diec import DiEC
from dec_diffusion.methods.neural_mixture import NeuralMixture
from dec_diffusion.page.settings import plain
from dec_diffusion.page.template import SCRIPT, STYLE
from dec_diffusion.report import Layout

VOID = {"img", "meta", "br"}
NASTY = "<img src=x onerror=alert(1)>.png"


class Reader(HTMLParser):
    """Elements with their attributes and the text inside each; fails on unbalanced tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[int] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for i in self.open:
            self.texts[i] += data

    def all(self, tag: str, **attributes: str) -> list[str]:
        """The texts of all elements of a kind with these attributes (``class_`` is one of)."""
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [
            text
            for (name, attrs), text in zip(self.elements, self.texts, strict=True)
            if name == tag and all(v in (attrs.get(k) or "").split() for k, v in wanted.items())
        ]


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def assigned(labels: np.ndarray, k: int, *, probability: Any = 0.9) -> Assignment:
    n, rng = len(labels), np.random.default_rng(0)
    resp = np.full((n, k), 0.1 / max(1, k - 1), np.float32)
    resp[np.arange(n), labels] = probability
    embedding = rng.normal(size=(n, 2)) + 8 * np.c_[labels % 3, labels // 3]
    sure = np.broadcast_to(np.float32(probability), n).copy()
    return Assignment(labels.astype(np.int32), sure, resp, embedding.astype(np.float32))


def summary_of(dataset: Dataset, a: Assignment, k: int, name: str = "my run") -> dict[str, Any]:
    """What a run would say of an assignment, with baselines that cost nothing."""
    scores = evaluate.score(a, k, dataset.labels)
    by_chance = np.random.default_rng(1).integers(0, k, len(a.labels))
    other = evaluate.score_labels(a.embedding, by_chance, k, dataset.labels)
    rows = metrics.cluster_report(a.labels, a.probability, dataset.labels, num_clusters=k)
    return {
        "name": name,
        "data": {
            "name": dataset.name,
            "examples": dataset.num_examples,
            "shape": dataset.example_shape,
            "labels": dataset.labels is not None,
            "trained_on": True,
        },
        "clusters": {"asked": k, "found": len(np.unique(a.labels)), "report": rows},
        "scores": scores,
        "baselines": {"kmeans_pixels": {"scores": other}, "my_<own>": {"scores": other}},
        "training": {"steps": 1234, "seconds": 5.5, "examples_per_second": None, "parameters": 99},
        "device": {"kind": "cpu", "count": 1},
        "versions": {"jax": "0.0"},
        "seconds_this_command": 7.25,
    }


def images(
    n: int = 40, shape: tuple[int, ...] = (8, 8, 1), *, labelled: bool = True, k: int = 4
) -> tuple[Dataset, np.ndarray]:
    """Noise, and a clustering of it into k groups of nearly the same size."""
    x = np.random.default_rng(0).integers(0, 256, (n, *shape), np.uint8)
    found = np.arange(n) % k
    truth = np.where(np.arange(n) < 4, 0, found) if labelled else None
    return data.from_arrays(x, truth, nominal=(0, 255)), found


def make(dataset: Dataset, labels: np.ndarray, k: int, **more: Any) -> tuple[str, dict[str, Any]]:
    a = assigned(labels, k, probability=more.pop("probability", 0.9))
    config = more.pop("config", Config("my run", ClusterDDPM(num_clusters=k)))
    summary = summary_of(dataset, a, k, config.name) | more.pop("summary", {})
    rows = np.arange(min(len(labels), 2000))
    layout = Layout(rows, a.embedding[rows].astype(np.float64), "as it is")
    options: dict[str, Any] = {"config": config, "layout": layout, "pictures": {}} | more
    return page.build(summary, dataset, a, **options), summary


# -- what it says -----------------------------------------------------------------------------


def test_every_section_is_there_and_the_numbers_are_those_of_the_summary():
    dataset, found = images()
    buffer = io.BytesIO()
    Image.new("RGB", (60, 60), "red").save(buffer, "PNG")
    chosen = {"layer": "mid", "timestep": 7, "boundary": True, "acc": 0.25}
    chosen |= {"best_acc_of_all_cells": 0.75}
    html, summary = make(
        dataset,
        found,
        4,
        samples=np.random.default_rng(0).random((4, 12, 8, 8, 1)),
        pictures={"curves.png": buffer.getvalue(), "search.png": buffer.getvalue()},
        summary={"search": chosen},
        command="python -m somewhere --x='a b'",
    )
    reader = read(html)
    assert reader.all("h2") == [
        "This run and honest baselines", "What to look at", "Clusters", "Map",
        "Classes by cluster", "Curves", "Search", "Settings",
    ]  # fmt: skip
    assert reader.all("h1") == reader.all("title") == ["ClusterDDPM on array"]
    text = " ".join(reader.all("html"))
    scores = summary["scores"]
    for name in ("acc", "nmi", "ari", "silhouette", "mean_probability"):
        assert f"{scores[name]:.3f}" in " ".join(reader.all("header"))
    ours = [row for row in reader.all("tr") if row.startswith("this run")]
    assert ours[0].startswith("this run" + "".join(f"{scores[n]:.3f}" for n in ("acc", "nmi")))
    for words in ("k-means on the pixels", "my <own>", "1,234", "7.2", "--x='a b'", "scoring only"):
        assert words in text
    assert "accuracy of 0.250" in text and "has 0.750" in text and "timestep 7" in text
    # The table of confusion holds every count, in some order.
    assert dataset.labels is not None
    table, _, _ = metrics.contingency(dataset.labels, found)
    cells = re.findall(r'<td style="--p:[\d.]+">([\d,]*)</td>', html)
    assert sorted(int(c or 0) for c in cells) == sorted(table.ravel().tolist())
    for name, value in configs.flatten(Config("my run", ClusterDDPM(num_clusters=4))).items():
        assert f'<th scope="row">{name}</th><td>{page.escape(plain(value))}</td>' in html


def test_a_number_of_clusters_that_was_chosen_is_not_said_to_be_asked_for():
    dataset, found = images(labelled=False)
    asked, _ = make(dataset, found % 3, 4)
    assert "4 clusters asked for, 3 found." in asked and "4 were asked for, 3 found." in asked
    chosen, _ = make(dataset, found % 3, 4, summary={"num_clusters": {"chosen": 4}})
    assert "4 clusters chosen, 3 found." in chosen and "4 were chosen, 3 found." in chosen


def test_cards_show_members_from_the_most_to_the_least_certain():
    dataset, found = images(60)
    probability = np.linspace(0.5, 1, 60).astype(np.float32)
    html, summary = make(dataset, found, 4, probability=probability)
    reader = read(html)
    cards = reader.all("article")
    assert len(cards) == 4
    for k, (card, row) in enumerate(zip(cards, summary["clusters"]["report"], strict=True)):
        assert card.startswith(f"Cluster {k}{row['size']:,} · {row['share']:.1%} · mean")
        assert f"{row['confidence']:.3f}" in card
        assert f"mostly class {row['majority']}" in card
        assert "Generated" not in card
    titles = re.findall(r'alt="member of cluster 2: row (\d+) ', html)
    members = np.flatnonzero(found == 2)
    assert [int(t) for t in titles] == [*members[::-1][:12], *members[::-1][-3:]]
    # The pictures are the examples, pixel for pixel.
    uri = re.search(r'src="data:image/png;base64,([^"]+)" alt="member of cluster 2: row 58 ', html)
    assert uri is not None
    with Image.open(io.BytesIO(base64.b64decode(uri[1]))) as picture:
        np.testing.assert_array_equal(np.asarray(picture), dataset.examples[58, ..., 0])


def test_map_has_one_dot_per_point_in_the_colour_of_its_cluster():
    dataset, found = images()
    html, _ = make(dataset, found, 4)
    dots = [attrs for tag, attrs in read(html).elements if tag == "circle"]
    assert sorted(int(d["data-i"] or "") for d in dots) == list(range(40))
    for dot in dots:
        i = int(dot["data-i"] or "")
        assert dot["fill"] == report.cluster_colour(int(found[i]))
        assert (dot["data-t"] or "").startswith(f"row {i} · cluster {found[i]} · 0.90")
        assert 0 <= float(dot["cx"] or "") <= 1000 and 0 <= float(dot["cy"] or "") <= 700


def test_sprite_holds_each_picture_where_the_script_looks_for_it():
    x = np.random.default_rng(0).integers(0, 256, (7, 6, 8, 3), np.uint8)
    picture, columns, rows = page.sprite(x, 40)
    assert (columns, rows, picture.size) == (3, 3, (24, 24))
    for i in range(7):
        top, left = i // 3 * 8 + 1, i % 3 * 8
        tile = np.asarray(picture)[top : top + 6, left : left + 8]
        np.testing.assert_array_equal(tile, x[i])


def test_distinctive_features_are_those_that_were_moved():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(400, 30)), np.arange(400) % 4
    x[labels == 2, 7] += 5
    x[labels == 2, 3] -= 3
    x[:, 9] = 1.0
    features = page.distinctive(x, labels, 2, most=4)
    assert [f.name for f in features[:2]] == ["column 7", "column 3"]
    first = features[0]
    inside, outside = x[labels == 2, 7].mean(), x[labels != 2, 7].mean()
    expected = (inside, outside, (inside - outside) / x[:, 7].std())
    np.testing.assert_allclose((first.inside, first.outside, first.difference), expected)
    assert features[1].difference < 0
    assert len(page.distinctive(x, labels, 2, most=99)) == 29, "a constant tells nothing"
    assert page.distinctive(x, np.zeros(400, int), 0) == page.distinctive(x, labels, 5) == []
    named = page.distinctive(x, labels, 2, most=2, names=[f"gene {j}" for j in range(30)])
    assert [f.name for f in named] == ["gene 7", "gene 3"]


# What is done to a clustering of 100 examples into 4: labels, probability, and words of warning.
EVEN = np.arange(100) % 4
DOUBTS = {
    "nothing": (EVEN, 0.9, []),
    "empty": (EVEN % 3, 0.9, ["Cluster 3 is empty", "--config.method.num_clusters"]),
    "two empty": (EVEN % 2, 0.9, ["2 clusters (2, 3) are empty", "--config.seed"]),
    "tiny": (np.r_[3, np.arange(99) % 3], 0.9, ["Cluster 3 is tiny", "outliers"]),
    "dominant": (np.r_[1, 2, 3, np.zeros(97, int)], 0.9, ["Cluster 0 holds 97%", "collapse"]),
    "unsure": (EVEN, 0.4, ["unsure", "100%", "assignments.csv"]),
}


@pytest.mark.parametrize("what", DOUBTS)
def test_doubtful_results_are_said_to_be_so_with_a_remedy(what):
    labels, probability, words = DOUBTS[what]
    dataset, _ = images(100, labelled=False)
    reader = read(make(dataset, labels, 4, probability=probability)[0])
    warned = reader.all("div", class_="warning")
    assert bool(warned) == bool(words)
    assert bool(reader.all("p", class_="good")) != bool(words)
    assert all(word in " ".join(warned) for word in words), warned
    assert all("Remedy:" in w for w in warned)
    assert len(reader.all("article")) == 4


NEW = {
    "few of one group": (np.zeros(9, int), 0.9, []),
    "some groups only": (EVEN % 2, 0.9, []),
    "one group": (
        np.zeros(20, int),
        0.9,
        ["Cluster 0 holds 100% of these", "differ from the data"],
    ),
    "unsure": (EVEN, 0.4, ["unsure", "trust only rows of assignments.csv"]),
}


@pytest.mark.parametrize("what", NEW)
def test_new_data_that_lack_some_groups_call_for_no_other_training(what):
    labels, probability, words = NEW[what]
    dataset, _ = images(len(labels), labelled=False)
    a = assigned(labels, 4, probability=probability)
    summary = summary_of(dataset, a, 4)
    summary["data"]["trained_on"] = False
    # K-means on the features would find better groups, which a new training alone could use.
    summary["baselines"] = {"kmeans_latents": {"scores": {"silhouette": 1.0}}}
    said = " ".join(" ".join(notice) for notice in page.notices(summary, a))
    assert bool(said) == bool(words) and all(word in said for word in words), said
    assert not any(word in said for word in ("train longer", "seed", "num_clusters", "k-means"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gmm_pixels", "Gaussian mixture on the pixels"),
        ("graph_pixels", "Clustering the neighbour graph of the images' thumbnails"),
    ],
)
def test_a_shallow_baseline_that_does_as_well_is_said_to(name, words):
    dataset, found = images()
    a = assigned(found, 4)
    good = {"scores": evaluate.score(a, 4, dataset.labels)}
    html, summary = make(dataset, found, 4, summary={"baselines": {name: good}})
    assert f"{words} is as good" in " ".join(read(html).all("section"))
    assert page.notices(summary | {"baselines": {"kmeans_latents": good}}, a) == []
    nmi = summary["scores"]["nmi"]
    for ahead, how in ((0.019, "as good as"), (0.021, "better than")):
        other = {"scores": {"nmi": nmi + ahead}}
        (notice,) = page.notices(summary | {"baselines": {name: other}}, a)
        said = f"{words} is {how} this run (NMI {nmi + ahead:.3f} against {nmi:.3f})."
        assert notice.what == said


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        (NeuralMixture(num_clusters=4), "--config.method.prior=learned"),
        (NeuralMixture(num_clusters=4, prior="learned"), None),
        (ClusterDDPM(num_clusters=4), "--config.method.balance_iterations=0"),
        (ClusterDDPM(num_clusters=4, balance_iterations=0), None),
        (DiEC(num_clusters=4), None),
    ],
)
def test_groups_that_k_means_finds_farther_apart_are_said_to_be(method, setting):
    dataset, found = images(labelled=False)
    config = Config("my run", method)
    _, summary = make(dataset, found, 4)
    ours = summary["scores"]["silhouette"]

    def said(silhouette: float | None) -> list[str]:
        baselines = {"kmeans_latents": {"scores": {"silhouette": silhouette}}}
        html, _ = make(dataset, found, 4, config=config, summary={"baselines": baselines})
        return read(html).all("div", class_="warning")

    (warned,) = said(ours + 0.101)
    assert f"farther apart than those of this run (silhouette {ours + 0.101:.3f} aga" in warned
    assert re.findall(r"--config[\w.]+=\w+", warned) == ([setting] if setting else [])
    assert said(ours + 0.099) == said(None) == []


def test_the_terminal_calls_baselines_as_the_page_does(tmp_path):
    dataset, found = images()
    _, summary = make(dataset, found, 4)
    for shape, inputs in (((8, 8, 1), "pixels"), ((64,), "inputs")):
        summary["data"]["shape"] = shape
        head, ours, kmeans, *_ = results.describe(summary, tmp_path).splitlines()
        assert kmeans.startswith(f"k-means on the {inputs} ")
        acc = [summary["scores"]["acc"], summary["baselines"]["kmeans_pixels"]["scores"]["acc"]]
        assert [line[head.index("acc") - 2 :][:5] for line in (ours, kmeans)] == [
            f"{value:.3f}" for value in acc
        ]


# -- odd data ---------------------------------------------------------------------------------


def test_names_are_text_wherever_they_come_from():
    dataset, found = images()
    names = [f"a/{i}-{NASTY}" for i in range(38)] + ["\udcff.png", "\"&'\x00</script>.png"]
    classes = np.array(["<b>bold</b>", "it's", 'a "b"', "</style>"])[found]
    dataset = dataclasses.replace(dataset, name=f"x {NASTY}", paths=names, labels=classes)
    config = Config("\"'><script>alert(1)</script>", ClusterDDPM(num_clusters=4))
    config.data.path = "</pre><script>alert(2)</script>"
    html, _ = make(dataset, found, 4, config=config, command=f"do {NASTY}")
    reader = read(html)
    html.encode()
    kinds = {tag for tag, _ in reader.elements}
    assert not kinds & {"b", "iframe", "object", "embed", "link", "base", "form"}
    assert kinds - set(page_of_nothing_special()) == set()
    scripts = [text for (tag, _), text in zip(reader.elements, reader.texts, strict=True)
               if tag == "script"]  # fmt: skip
    assert scripts == [SCRIPT]
    assert reader.all("style") == [STYLE]
    assert not [k for _, attrs in reader.elements for k in attrs if k.startswith("on")]
    said = {attrs.get("title") for tag, attrs in reader.elements if tag == "img"}
    assert f"a/0-{NASTY} · probability 0.900" in said
    assert reader.all("h1") == [f"ClusterDDPM on x {NASTY}"]
    assert config.name in reader.all("p", class_="faint")
    assert reader.all("pre") == [f"do {NASTY}"]
    assert any("<b>bold</b>" in text for text in reader.all("th"))


def page_of_nothing_special() -> set[str]:
    """The kinds of elements of a page with everything in it and names that need no escape."""
    dataset, found = images()
    return {tag for tag, _ in read(make(dataset, found, 4, command="x")[0]).elements}


def test_page_needs_nothing_from_elsewhere():
    dataset, found = images()
    html, _ = make(dataset, found, 4, samples=np.zeros((4, 2, 8, 8, 1)))
    assert "http://" not in html and "https://" not in html and "@import" not in html
    for tag, attrs in read(html).elements:
        for key, value in attrs.items():
            if key in ("src", "href", "data", "srcset", "poster"):
                assert (value or "").startswith(("data:image/", "#")), (tag, key)
        assert "//" not in (attrs.get("style") or "").split(";base64,")[0]
    assert "<script src" not in html
    assert all("url(" not in text for text in read(html).all("style"))


CASES = {
    "no labels": (images(labelled=False)[0], EVEN[:40], 4),
    "one example per cluster": (images(6)[0], np.arange(6), 6),
    "all in one": (images()[0], np.zeros(40, int), 3),
    "two examples": (images(2)[0], np.arange(2), 2),
    "wide colour": (images(30, (10, 300, 3))[0], np.arange(30) % 4, 4),
    "four channels": (images(30, (9, 5, 4))[0], np.arange(30) % 4, 4),
    "more clusters than cards": (images(240)[0], np.arange(240) % 120, 120),
}


@pytest.mark.parametrize("what", CASES)
def test_odd_data_make_a_page_too(what):
    dataset, labels, k = CASES[what]
    html, _ = make(dataset, labels, k)
    reader = read(html)
    assert len(reader.all("article")) == min(k, page.MAX_CARDS)
    assert ("Classes by cluster" in reader.all("h2")) == (dataset.labels is not None)
    filled = len(np.unique(labels[labels < page.MAX_CARDS]))
    strips = [text for text in reader.all("h4") if text == "Prototypes"]
    assert len(strips) == filled
    assert ("NMI" in html) == (dataset.labels is not None)


@pytest.mark.parametrize("labelled", [True, False])
def test_vectors_show_features_and_no_pictures(labelled):
    x = np.random.default_rng(0).normal(size=(60, 12)).astype(np.float32)
    found = np.arange(60) % 3
    x[found == 1, 5] += 9
    dataset = data.from_arrays(x, found if labelled else None)
    reader = read(make(dataset, found, 3)[0])
    assert not [tag for tag, _ in reader.elements if tag == "img"]
    card = reader.all("article")[1]
    assert "differs most in" in card and "column 5" in card
    dataset = dataclasses.replace(dataset, columns=tuple(f"<gene {j}>" for j in range(12)))
    card = read(make(dataset, found, 3)[0]).all("article")[1]
    assert "<gene 5>" in card and "column" not in card.replace("of the column", "")
    assert "k-means on the inputs" in " ".join(reader.all("th"))


def test_rows_of_a_table_go_by_their_names_which_may_be_whole_texts():
    x = np.random.default_rng(0).normal(size=(60, 12)).astype(np.float32)
    names = [f"<cell {i}>" for i in range(59)] + ["begins " + "x" * 10_000 + " ends"]
    html, _ = make(data.from_arrays(x, paths=names), np.arange(60) % 3, 3)
    card = read(html).all("article")[1]
    assert "Prototypes: <cell " in card and "row " not in card
    cut = f"begins {'x' * 72}…{'x' * 75} ends"
    assert cut in html and len(cut) == 160 and "x" * 80 not in html


@pytest.mark.parametrize("shape", [(28, 28, 1), (120, 90, 3)], ids=str)
def test_page_is_small_whatever_the_data(shape):
    # Noise is the worst case: nothing compresses it.
    n = 2000 if shape[0] < 100 else 500
    few = np.random.default_rng(0).integers(0, 256, (n, *shape), np.uint8)
    x = np.broadcast_to(few, (2100 // n, n, *shape)).reshape(-1, *shape)
    dataset = data.from_arrays(x, nominal=(0, 255))
    k = 100
    labels = np.arange(len(x)) % k
    begin = time.process_time()
    html, _ = make(dataset, labels, k, samples=few[:k, None].repeat(4, axis=1) / np.float32(255))
    assert time.process_time() - begin < 30
    assert len(html) < page.MAX_BYTES


def test_write_reads_the_pictures_beside_it_and_repeats_itself(tmp_path):
    dataset, found = images()
    a = assigned(found, 4)
    records = [{"step": s, "loss": 1.0 / (s + 1)} for s in range(5)]
    report.curves(tmp_path / "curves.png", records)
    summary, config = summary_of(dataset, a, 4), Config("x", ClusterDDPM(num_clusters=4))
    for name in ("one.html", "two.html"):
        layout = report.lay_out(a.embedding)
        page.write(tmp_path / name, summary, dataset, a, config=config, layout=layout)
    one = (tmp_path / "one.html").read_bytes()
    assert one == (tmp_path / "two.html").read_bytes()
    encoded = base64.b64encode((tmp_path / "curves.png").read_bytes()).decode()
    assert encoded in one.decode()


def test_command_means_the_same_config(tmp_path):
    config = Config("a 'run'", ClusterDDPM(num_clusters=7), DataConfig(path="/x y/$(z).npy"))
    config.data.name = "npy"
    dataset = dataclasses.replace(images()[0], name="$(z)")
    line = page.command(config, dataset, tmp_path / "w w")
    assert line is not None
    python, flag, module, *argv = shlex.split(line)
    assert (python, flag, module) == ("python", "-m", "dec_diffusion.main")
    parsed = options.parse(["main", *argv])
    assert parsed.workdir == str(tmp_path / "w w")
    again = Config("other", ClusterDDPM())
    for name, text in parsed.overrides:
        again = configs.override(again, name, text)
    assert configs.to_dict(again) == configs.to_dict(config)
    assert page.command(config, images()[0], tmp_path) is None, "these are other data"


# -- in a browser -----------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium")
CHECK = """
function narrow(width) {
  document.body.style.maxWidth = width + "px";
  const parts = [...document.querySelectorAll("header, main, section, article")];
  return parts.every(e => e.scrollWidth <= e.clientWidth && e.clientWidth <= width);
}
addEventListener("load", () => {
  const map = document.getElementById("map"), dot = map.querySelector("circle");
  const box = dot.getBoundingClientRect(), tip = document.getElementById("tip");
  dot.dispatchEvent(new PointerEvent("pointerover", {bubbles: true, clientX: 5, clientY: 5}));
  document.body.dataset.found = JSON.stringify({
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
    images: document.images.length,
    wide: document.documentElement.scrollWidth - innerWidth > 1,
    dot: box.width > 0,
    tip: tip.getBoundingClientRect().width > 0 && tip.textContent === dot.dataset.t,
    cards: document.querySelectorAll("article").length,
    narrow: narrow(400),
  });
});
"""


def browse(tmp_path: pathlib.Path, file: pathlib.Path, *options: str) -> tuple[str, str]:
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --enable-logging=stderr --v=0"
    ).split()
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [str(CHROMIUM), *flags, profile, *options, file.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout, done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [500, 1280])
def test_a_browser_shows_the_page(tmp_path, width):
    dataset, found = images(60, (8, 8, 3))
    dataset = dataclasses.replace(dataset, paths=[f"{i}/{NASTY}" for i in range(60)])
    html, _ = make(dataset, found, 4, samples=np.random.default_rng(0).random((4, 3, 8, 8, 3)))
    # The page as it is: nothing is refused by its own policy, and nothing fails.
    file = tmp_path / "report.html"
    file.write_bytes(html.encode())
    shot = tmp_path / "shot.png"
    size = f"--window-size={width},900"
    _, log = browse(tmp_path, file, size, f"--screenshot={shot}")
    assert "CONSOLE" not in log
    with Image.open(shot) as picture:
        assert np.asarray(picture.convert("RGB")).std() > 5
    # A copy that looks at itself, which the policy of the page would not allow.
    policy = r'<meta http-equiv="Content-Security-Policy"[^>]*>'
    checked = re.sub(policy, "", html).replace("</body>", f"<script>{CHECK}</script></body>")
    file.write_bytes(checked.encode())
    dom, log = browse(tmp_path, file, size, "--dump-dom")
    assert "CONSOLE" not in log
    (body,) = [attrs for tag, attrs in read(dom).elements if tag == "body"]
    count = html.count("<img ")
    assert body["data-found"] == (
        f'{{"broken":0,"images":{count},"wide":false,"dot":true,"tip":true,"cards":4,"narrow":true}}'
    )
