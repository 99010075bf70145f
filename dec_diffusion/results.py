"""What a finished run leaves in its workdir: assignments, summary, pictures, samples."""

import csv
import dataclasses
import importlib.metadata
import io
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dec_diffusion import evaluate, metrics, page, progress, prototypes, reading, report
from dec_diffusion.data import Dataset
from dec_diffusion.data.dataset import few_rows
from dec_diffusion.evaluate import Assignment
from dec_diffusion.method import Findings
from dec_diffusion.num_clusters import CHOICE
from dec_diffusion.prototypes import Prototypes
from dec_diffusion.trained import Run
from dec_diffusion.types import AUTO, Array, InputError
from dec_diffusion.workdir import ASSIGNMENTS, Assigned, Workdir

SUMMARY = "summary.json"
PROTOTYPES = "prototypes.npz"
SAMPLES_PER_CLUSTER = 12
_PACKAGES = ("dec_diffusion", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "scikit-learn")


def write(
    run: Run,
    dataset: Dataset,
    assignment: Assignment,
    place: Workdir,
    known: Prototypes | None = None,
    *,
    home: Workdir,
    started: float,
) -> dict[str, Any]:
    """Write everything a person looks at after a run; returns the summary.

    The work of one process.

    Args:
        run: the trained method.
        dataset: what it was trained on, or other data.
        assignment: of that data set.
        place: the folder to write to: the workdir, or one in it.
        known: the prototypes of the run; after training they are chosen here.
        home: the workdir of the run; where that is ``place``, the data set is the one that the
            method was trained on.
        started: ``time.monotonic()`` when the command began.
    """
    training, history, choice = place == home, home.read_metrics(), home.read_json(CHOICE)
    checksum = reading.checksum(dataset.examples, sampled=True)
    if training:
        known = prototypes.choose(dataset, assignment)
        write_prototypes(known, place)
    write_assignments(dataset, assignment, place, known)
    truth, num_clusters = dataset.labels, run.config.method.num_clusters
    records = history if training else []
    rates = [r["examples_per_second"] for r in history]
    summary = {
        "name": run.config.name,
        "data": {
            "name": dataset.name,
            "examples": dataset.num_examples,
            "shape": dataset.example_shape,
            "labels": truth is not None,
            "checksum": checksum,
            "trained_on": training or checksum == _checksum(read(home)),
        },
        "clusters": {
            "asked": num_clusters,
            "found": len(np.unique(assignment.labels)),
            "report": metrics.cluster_report(
                assignment.labels, assignment.probability, truth, num_clusters=num_clusters
            ),
        },
        "scores": evaluate.score(assignment, num_clusters, truth)
        | {k: v for r in records[-1:] for k, v in r.items() if k == "mixture_log_likelihood"},
        "baselines": evaluate.compare(dataset, assignment, num_clusters, seed=run.config.seed),
        "training": {
            "steps": run.step,
            "seconds": sum(r["seconds"] for r in history),
            # The median: the first iteration of a phase also compiles.
            "examples_per_second": float(np.median(rates)) if rates else None,
            "parameters": sum(x.size for x in jax.tree.leaves(run.state.ema_params)),
        },
        "device": {"kind": jax.devices()[0].device_kind, "count": len(jax.devices())},
        "versions": _versions(),
    }
    asked = run.config
    if choice is not None:
        summary["num_clusters"] = choice
        settings = dataclasses.replace(asked.method, num_clusters=AUTO)
        asked = dataclasses.replace(asked, method=settings)
    layout, samples = _pictures(run, dataset, assignment, place, records)
    if training and run.method.findings is not None:
        found = run.method.findings(run.state.cluster)
        summary["baselines"] = {
            name: {
                "scores": evaluate.score_labels(assignment.embedding, labels, num_clusters, truth)
            }
            for name, labels in found.partitions.items()
        } | summary["baselines"]
        summary["search"] = _search(run, found, truth, place)
    summary["seconds_this_command"] = time.monotonic() - started
    page.write(
        place.path / page.PAGE,
        summary,
        dataset,
        assignment,
        config=run.config,
        layout=layout,
        samples=samples,
        command=page.command(asked, dataset, place.path) if training else None,
    )
    place.write_json(SUMMARY, summary)
    return summary


def _search(run: Run, found: Findings, truth: np.ndarray | None, place: Workdir) -> dict[str, Any]:
    """Write the map of a search as data and as a picture; returns what the summary says of it."""
    scores = {name: np.asarray(values) for name, values in found.scores.items()}
    if truth is not None:
        scores["acc"] = np.array(
            [
                [metrics.external_scores(truth[found.examples], cell)["acc"] for cell in row]
                for row in found.cells
            ]
        )
    row, column = found.chosen
    chosen = {
        "layer": found.columns[column],
        "timestep": found.rows[row],
        "boundary": found.boundary,
        **found.figures,
    }
    plain = {
        name: [[float(v) if np.isfinite(v) else None for v in row] for row in values]
        for name, values in scores.items()
    }
    table = {"timesteps": found.rows, "layers": found.columns, "chosen": chosen, "scores": plain}
    place.write_json("search.json", table)
    if truth is not None:
        # What the label-free choice costs: for the reader, never for the choice.
        chosen |= {"acc": scores["acc"][row, column], "best_acc_of_all_cells": scores["acc"].max()}
    names = [str(t) for t in found.rows]
    report.search_map(
        place.path / "search.png",
        scores,
        names,
        found.columns,
        chosen=found.chosen,
        boundary=found.boundary,
    )
    if run.spec.is_image:
        before = to_unit(found.samples * run.scale + run.offset, run)
        report.image_row(
            place.path / "generated_before.png", before, "Generated before fine-tuning"
        )
    return chosen


def _checksum(summary: Mapping[str, Any] | None) -> int | None:
    return summary["data"].get("checksum") if summary else None


def read(place: Workdir) -> dict[str, Any] | None:
    """The summary of a workdir; None where the results are not complete."""
    # The summary is written last.
    if not all((place.path / name).exists() for name in (ASSIGNMENTS, PROTOTYPES)):
        return None
    try:
        return json.loads((place.path / SUMMARY).read_bytes())
    except (OSError, ValueError):
        return None


def assigned(dataset: Dataset, assignment: Assignment, known: Prototypes | None) -> Assigned:
    """The columns of ``assignments.csv``; those without paths or prototypes are empty."""
    empty = [""] * dataset.num_examples
    return Assigned(
        dataset.rows,
        dataset.paths or empty,
        assignment.labels,
        assignment.probability,
        assignment.entropy,
        prototypes.closest(known, assignment) if known else empty,
    )


def write_assignments(
    dataset: Dataset, assignment: Assignment, place: Workdir, known: Prototypes | None
) -> None:
    """``assignments.csv``: one row per example, in the order of the source."""
    place.write_assignments(assigned(dataset, assignment, known))


def write_prototypes(known: Prototypes, place: Workdir) -> None:
    """``prototypes.npz``: what ``read_prototypes`` reads."""
    place.write_arrays(PROTOTYPES, known._asdict())


def read_prototypes(place: Workdir) -> Prototypes | None:
    """The prototypes of a run; None if it has none yet.

    Raises:
        InputError: their file is damaged.
    """
    arrays = place.read_arrays(PROTOTYPES)
    if arrays is None:
        return None
    try:
        return Prototypes(**arrays)
    except TypeError:
        raise InputError(
            f"{place.path / PROTOTYPES}: holds other arrays than prototypes; delete it and give "
            "the command that trained the run again"
        ) from None


def sample(
    run: Run,
    *,
    per_cluster: int = SAMPLES_PER_CLUSTER,
    most: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Generate examples of every cluster.

    Args:
        run: the trained method.
        per_cluster: examples of each cluster.
        most: how many clusters, the first ones; None for all.
        seed: of the draw.

    Returns:
        float32 [k, per_cluster, ...] in the units of the data.

    Raises:
        InputError: the method does not generate.
    """
    count = min(run.config.method.num_clusters, most or run.config.method.num_clusters)
    x = _draw(run, np.repeat(np.arange(count), per_cluster), seed)
    return x.reshape(count, per_cluster, *run.spec.shape)


def write_samples(run: Run, samples: np.ndarray, place: Workdir) -> None:
    """``samples.npy`` and, of a table, ``samples.csv``: a cluster and its values in each row.

    Args:
        run: that generated them.
        samples: float32 [k, m, ...], of clusters 0 to k-1.
        place: the folder.
    """
    np.save(place.path / "samples.npy", samples)
    if run.spec.is_image:
        return
    columns = run.columns or [f"column {j}" for j in range(samples.shape[2])]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["cluster", *columns])
    for cluster, examples in enumerate(samples):
        # As text, which has just the digits that a float32 needs.
        writer.writerows([cluster, *map(str, example)] for example in examples)
    place.write_text("samples.csv", out.getvalue())


def generate(run: Run, n: int, *, cluster: int | None = None, seed: int = 0) -> np.ndarray:
    """Generate ``n`` examples of one cluster, or of the whole: each draws its cluster first.

    Returns:
        float32 [n, ...] in the units of the data.

    Raises:
        InputError: the method does not generate.
    """
    return _draw(run, np.full(n, -1 if cluster is None else cluster), seed)


def generator(run: Run) -> Callable[..., Array]:
    """What generates examples of a run, as ``Method`` says.

    Raises:
        InputError: its method does not generate.
    """
    if run.method.sample is None:
        raise InputError(
            f"--mode=sample: {run.config.name} does not generate; train ClusterDDPM "
            "(--config=clusterddpm) or DiEC (--config=diec) on the data"
        )
    return run.method.sample


def _draw(run: Run, component: np.ndarray, seed: int) -> np.ndarray:
    x = jax.jit(generator(run))(
        run.state.ema_params, run.state.cluster, jax.random.key(seed), jnp.asarray(component)
    )
    return (np.asarray(x) * run.scale + run.offset).astype(np.float32)


def to_unit(examples: np.ndarray, run: Run) -> np.ndarray:
    """Images from the units of the data to [0, 1], for pictures."""
    return np.clip(((examples - run.offset) / run.scale + 1) / 2, 0, 1)


def describe(summary: Mapping[str, Any], folder: Path) -> str:
    """The end of a run in a few lines: this run beside its baselines, and where to look."""
    is_image = len(summary["data"]["shape"]) == 3
    rows = {"this run": summary["scores"]}
    for name, baseline in summary["baselines"].items():
        rows[page.baseline_name(name, is_image)] = baseline["scores"]
    columns = ("acc", "nmi", "ari") if summary["data"]["labels"] else ("silhouette",)
    figures = {name: [f"{scores[c]:.3f}" for c in columns] for name, scores in rows.items()}
    lines = progress.table(figures, columns, 11)
    if found := summary.get("search"):
        beyond = found["boundary"] and found["timestep"]
        note = ", the first or last timestep tried: widen the search" if beyond else ""
        lines.append(f"features of layer {found['layer']} at timestep {found['timestep']}{note}")
    clusters = summary["clusters"]
    pictures = sorted(p.name for p in folder.glob("*.png"))
    how = ", chosen without labels" if "num_clusters" in summary else ""
    how += " (num_clusters.png)" if "num_clusters.png" in pictures else ""
    lines.append(f"{clusters['found']} of {clusters['asked']} clusters have members{how}")
    lines.append(f"results: {folder}")
    lines.append("  " + "  ".join([page.PAGE, ASSIGNMENTS, SUMMARY, *pictures]))
    return "\n".join(lines)


def _pictures(
    run: Run,
    dataset: Dataset,
    assignment: Assignment,
    place: Workdir,
    records: list[dict[str, Any]],
) -> tuple[report.Layout, np.ndarray | None]:
    """Draw the pictures; returns what the page shows as well: the map, and images generated."""
    folder, num_clusters, samples = place.path, run.config.method.num_clusters, None
    for name in ("generated.png", "confusion.png"):  # perhaps of other data, evaluated before
        (folder / name).unlink(missing_ok=True)
    if dataset.is_image:
        report.images_by_cluster(
            folder / "clusters.png",
            dataset.examples,
            assignment.labels,
            assignment.probability,
            num_clusters=num_clusters,
            in_unit=lambda images: to_unit(images, run),
        )
        if run.method.sample is not None:
            samples = to_unit(sample(run, most=report.MAX_ROWS), run)
            report.generated_by_cluster(folder / "generated.png", samples)
    else:
        rows = few_rows(dataset)
        flat, labels = (dataset.examples[rows] - run.offset) / run.scale, assignment.labels[rows]
        report.centres(
            folder / "clusters.png",
            flat,
            labels,
            num_clusters=num_clusters,
            feature_names=dataset.columns,
        )
    layout = report.latent_map(
        folder / "latents.png",
        assignment.embedding,
        assignment.labels,
        labels_true=dataset.labels,
    )
    choice = place.read_json(CHOICE)
    if choice is not None:
        report.choice_of_clusters(folder / "num_clusters.png", choice)
    if records:
        report.curves(folder / "curves.png", records)
    if dataset.labels is not None:
        table, classes, clusters = metrics.contingency(dataset.labels, assignment.labels)
        report.confusion(folder / "confusion.png", table, classes, clusters)
    return layout, samples


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
