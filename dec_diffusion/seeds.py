"""The same run from several seeds: what may be expected of it, and which one to keep.

A single run may be a lucky one, so scores are reported as their mean and standard deviation over
seeds. The run to keep is chosen without labels, in the same way for every method:

(1) agreement   A_s = mean over the other seeds r of ARI(labels_s, labels_r)

The run of the largest A_s is the one most typical of what the method finds in these data (the
medoid of the partitions). A likelihood or an index of the embedding would be compared between
embeddings that each run made for itself, and rewards those that merely spread their clusters apart;
the ARI, corrected for chance, sees nothing but who is with whom. Where all labels are one, there is
no partition to agree on and the term is 0. Two runs always agree equally: then, as in every tie,
the larger silhouette decides.
"""

import csv
import dataclasses
import io
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dec_diffusion import config as configs
from dec_diffusion import data, metrics, page, progress, reading, results, train, workdir
from dec_diffusion.config import Config
from dec_diffusion.data import Dataset
from dec_diffusion.interrupt import Stop
from dec_diffusion.train import NonFiniteLossError
from dec_diffusion.types import InputError

TABLE = "seeds.csv"
_LABELLED = ("acc", "nmi", "ari")
_CHOICE = "agreement"


class Comparison(NamedTuple):
    """What ``fit_seeds`` returns; the same is in ``seeds.json``.

    Attributes:
        path: of the folder that holds the runs; ``load`` takes it for the one chosen.
        best: the seed chosen.
        scores: of each seed: those of its summary, and ``agreement``.
        summary: what ``seeds.json`` holds.
    """

    path: Path
    best: int
    scores: Mapping[int, Mapping[str, float]]
    summary: Mapping[str, Any]


def fit_seeds(
    config: Config,
    path: str | os.PathLike[str],
    seeds: Iterable[int] = range(5),
    *,
    dataset: Dataset | None = None,
    logger: str = "none",
    verbose: int = 1,
    stop: Stop | None = None,
) -> Comparison:
    """Train once with each seed, compare, and choose one run without labels.

    Every seed is a run of its own, in ``path/seed0`` and so on: it is resumed if it was
    interrupted, and left as it is if it is complete. So seeds may be added later, and several
    processes may share them: all that are complete are compared, with those of earlier calls.

    Args:
        config: of all runs, but for its seed.
        path: the folder for all of them.
        seeds: whole numbers, all different.
        dataset: as in ``train.fit``.
        logger: likewise.
        verbose: likewise.
        stop: likewise.

    Raises:
        StoppedError: as ``train.fit``; the same call goes on.
        InputError: as ``train.fit``, before any training; or ``path`` holds something else.
        NonFiniteLossError: the loss of some seeds became NaN or infinite; the others are trained
            and compared all the same.
    """
    wanted = list(seeds)
    if not wanted or len(set(wanted)) < len(wanted):
        raise InputError(f"--seeds={wanted}: must name at least one seed, and each only once")
    runs = {seed: dataclasses.replace(config, seed=seed) for seed in wanted}
    for run in runs.values():
        configs.check(run)
    folder = _open(path, runs)
    given = dataset or data.load(config.data, verbose=verbose)
    if dataset is None:
        k = configs.resolved(config, 2).method.num_clusters  # every seed may choose its own
        data.check_clusters(given, k)
    _complete(folder, given)  # refuses those of other data
    summaries: dict[int, dict[str, Any]] = {}
    labels: dict[int, np.ndarray] = {}
    failed: dict[int, str] = {}
    for number, (seed, run) in enumerate(runs.items(), 1):
        if verbose:
            print(f"-- seed {seed}, {number} of {len(runs)} --", flush=True)
        try:
            result = train.fit(
                run, folder / name(seed), dataset=given, logger=logger, verbose=verbose, stop=stop
            )
        except NonFiniteLossError as error:
            failed[seed] = str(error)
            continue
        summaries[seed], labels[seed] = result.summary, result.assignment.labels
    for seed, summary, own in _earlier(folder, given, but=runs):
        summaries[seed], labels[seed] = summary, own
    lost = _failed_before(folder, but={*runs, *summaries}) | failed
    comparison = _compare(folder, config, summaries, labels, lost) if summaries else None
    if comparison and verbose:
        print(describe(comparison), flush=True)
    for seed, message in failed.items():
        raise NonFiniteLossError(f"{len(failed)} of {len(runs)} seeds failed, {seed}: {message}")
    assert comparison is not None
    return comparison


def name(seed: int) -> str:
    """The folder of one seed within that of all."""
    return f"seed{seed}"


def agreement(labels: Mapping[int, np.ndarray]) -> dict[int, float]:
    """Equation (1), for each seed; 0 where there is no other."""

    def pair(one: np.ndarray, other: np.ndarray) -> float:
        whole = len(np.unique(one)) == 1 or len(np.unique(other)) == 1
        return 0.0 if whole else metrics.ari(one, other)

    return {
        seed: float(
            np.mean([pair(own, o) for other, o in labels.items() if other != seed] or [0.0])
        )
        for seed, own in labels.items()
    }


def choose(scores: Mapping[int, Mapping[str, float]]) -> int:
    """The seed of the largest agreement; ties go to the larger silhouette, then the lower seed."""
    return max(scores, key=lambda s: (round(scores[s][_CHOICE], 9), scores[s]["silhouette"], -s))


def describe(comparison: Comparison) -> str:
    """The comparison in a few lines: scores beside those of the baselines, and the choice."""
    found = comparison.summary
    columns = _LABELLED if "cost" in found else ("silhouette",)
    is_image = len(found["data"]["shape"]) == 3
    rows = {"these runs": found["scores"]}
    rows |= {page.baseline_name(name, is_image): b for name, b in found["baselines"].items()}
    figures = {title: [_figure(scores[c]) for c in columns] for title, scores in rows.items()}
    lines = [f"{len(comparison.scores)} seeds, mean and standard deviation"]
    lines += progress.table(figures, columns, 15)
    others = {n: spread for n, spread in found["scores"].items() if n not in columns}
    lines += [f"  {n.replace('_', ' '):22s}{_figure(spread)}" for n, spread in others.items()]
    lines.append(f"kept: seed {comparison.best}, {found['reason']}")
    if "cost" in found:
        cost = found["cost"]
        lines.append(
            f"what that choice cost: its ACC is {cost['chosen']:.3f}, the mean "
            f"{cost['mean']:.3f}, the best {cost['best']:.3f} (seed {cost['best_seed']})"
        )
    lines.append(f"results: {comparison.path / workdir.SEEDS}, {TABLE}")
    lines.append(f"--workdir={comparison.path} with --mode=... now means the run kept")
    return "\n".join(lines)


def _open(path: str | os.PathLike[str], runs: Mapping[int, Config]) -> Path:
    """The folder of all runs, once it is certain that they may go there."""
    option, folder = f"--workdir={path}", Path(path).expanduser().absolute()
    if (folder / workdir.CONFIG).exists():
        raise InputError(f"{option}: holds a run of one seed; give another --workdir with --seeds")
    first = next(iter(runs.values()))
    others = _folders(folder)
    for seed, other in others.items():
        wanted = configs.to_dict(dataclasses.replace(first, seed=seed))
        workdir.check_config(other, wanted, ignore=configs.RESUMABLE)
    names = {p.name for p in folder.glob("*")} if folder.is_dir() else set()
    if names and not others and not names <= {name(seed) for seed in runs}:
        raise InputError(
            f"{option}: holds files of something else ({', '.join(sorted(names)[:3])}); give an "
            "empty or new folder"
        )
    return folder


def _folders(folder: Path) -> dict[int, Path]:
    """The runs that ``folder`` holds, by their seeds, in order."""
    paths = [p.parent for p in folder.glob(f"seed*/{workdir.CONFIG}")]
    numbers = [p.name.removeprefix("seed") for p in paths]
    found = {int(n): p for n, p in zip(numbers, paths, strict=True) if n.isdecimal()}
    return {seed: p for seed, p in sorted(found.items()) if p.name == name(seed)}


def _complete(folder: Path, dataset: Dataset) -> dict[int, dict[str, Any]]:
    """The summaries of the complete runs in ``folder``, by their seeds.

    Raises:
        InputError: one of them is of other data.
    """
    found, own = {}, reading.checksum(dataset.examples, sampled=True)
    for seed, path in _folders(folder).items():
        summary = results.read(workdir.Workdir(path))
        if summary is None:
            continue
        about = summary["data"]
        if about["examples"] != dataset.num_examples or about.get("checksum", own) != own:
            raise InputError(
                f"--workdir={folder}: {path.name} is of other data ({about['examples']:,} "
                f"examples, these are {dataset.num_examples:,}; or their values differ); restore "
                "them, or give a new --workdir"
            )
        found[seed] = summary
    return found


def _earlier(
    folder: Path, dataset: Dataset, but: Collection[int]
) -> Iterator[tuple[int, dict[str, Any], np.ndarray]]:
    """Seed, summary and labels [n] of each complete run of an earlier call."""
    for seed, summary in _complete(folder, dataset).items():
        if seed in but:
            continue
        place = workdir.Workdir(folder / name(seed))
        labels = place.read_clusters()
        if labels is None:
            warnings.warn(f"{place.path}: is damaged, and not compared", stacklevel=3)
        else:
            yield seed, summary, labels


def _failed_before(folder: Path, but: Collection[int]) -> dict[int, str]:
    """Seeds of earlier calls of which no run is left to compare, and why."""
    told = (workdir.Workdir(folder).read_json(workdir.SEEDS) or {}).get("failed", {})
    return {s: told[name(s)] for s in _folders(folder) if name(s) in told and s not in but}


def _compare(
    folder: Path,
    config: Config,
    summaries: Mapping[int, Mapping[str, Any]],
    labels: Mapping[int, np.ndarray],
    failed: Mapping[int, str],
) -> Comparison:
    """Choose, and write ``seeds.json`` and ``seeds.csv``."""
    agreed = agreement(labels)
    scores = {s: dict(found["scores"]) | {_CHOICE: agreed[s]} for s, found in summaries.items()}
    best = choose(scores)
    baselines = [found["baselines"] for found in summaries.values()]
    common = [b for b in baselines[0] if all(b in other for other in baselines)]
    summary: dict[str, Any] = {
        "name": config.name,
        "data": summaries[best]["data"],
        "best": name(best),
        "chosen_by": _CHOICE,
        "reason": _reason(scores, best),
        "scores": _spread(list(scores.values())),
        "baselines": {b: _spread([other[b]["scores"] for other in baselines]) for b in common},
        "runs": {name(s): found for s, found in scores.items()},
        "failed": {name(s): message for s, message in failed.items()},
    }
    if all("acc" in own for own in scores.values()):
        # For the reader, never for the choice.
        acc = {s: found["acc"] for s, found in scores.items()}
        top = max(acc, key=lambda s: (acc[s], -s))
        mean = float(np.mean(list(acc.values())))
        summary["cost"] = {"chosen": acc[best], "mean": mean, "best": acc[top], "best_seed": top}
    place = workdir.Workdir(folder)
    place.write_text(TABLE, _table(scores, best))
    place.write_json(workdir.SEEDS, summary)
    return Comparison(folder, best, scores, summary)


def _reason(scores: Mapping[int, Mapping[str, float]], best: int) -> str:
    if len(scores) == 1:
        return "the only one"
    if len(scores) == 2:
        return "of two the one with the larger silhouette; a third would tell which is typical"
    own = scores[best][_CHOICE]
    return f"whose clusters agree most with those of the other seeds (mean ARI {own:.3f})"


def _spread(scores: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation (n - 1 in its denominator; None for one) of every score."""
    # What is not finite is null in a summary.
    names = [n for n in scores[0] if all(other.get(n) is not None for other in scores)]
    return {
        n: {"mean": float(np.mean(values)), "std": _deviation(values)}
        for n in names
        for values in [[other[n] for other in scores]]
    }


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _figure(spread: Mapping[str, float | None]) -> str:
    mean, std = spread["mean"], spread["std"]
    return f"{mean:.3f}" + ("" if std is None else f" ± {std:.3f}")


def _table(scores: Mapping[int, Mapping[str, float]], best: int) -> str:
    """One row for each seed, one column for each score."""
    columns = list(dict.fromkeys(n for found in scores.values() for n in found))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["seed", "workdir", "kept", *columns])
    for seed, found in scores.items():
        row = [found.get(n, "") for n in columns]
        writer.writerow([seed, name(seed), int(seed == best), *row])
    return out.getvalue()
