"""The number of clusters chosen without labels, against the number of classes.

    python -m benchmarks.num_clusters [--seeds=5] [--data=DIR] [--threshold=T] [--output=F]

Prints one row for each set: classes, the number chosen by every seed, how many of them lie within 2
of the classes, and seconds. scikit-learn's digits and the synthetic
sets need no files; ``DIR`` holds ``mnist/`` and ``fashion-mnist/`` (IDX files) and
``usps/usps.h5``, and those that are not there are left out. A seed draws the synthetic sets anew,
and which 5,000 of more examples are looked at, and the order in which they are visited.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits, make_moons

from dec_diffusion import data, num_clusters
from dec_diffusion.data import DataConfig, Dataset, synthetic

Draw = Callable[[int], Dataset]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--threshold", type=float, default=num_clusters.SHALLOW)
    parser.add_argument("--only", nargs="*", help="names of sets")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    num_clusters.SHALLOW = options.threshold
    results = []
    print("| set | examples, values | classes | chosen | within 2 | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, draw in sets(options.data):
        if not options.only or name in options.only:
            results.append(measure(name, draw, options.seeds))
            r = results[-1]
            chosen = ", ".join(map(str, r["chosen"]))
            print(
                f"| {name} | {r['examples']:,} x {r['values']} | {r['classes']} | {chosen} "
                f"| {r['within_2']} of {options.seeds} | {r['seconds']:.1f} |",
                flush=True,
            )
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def measure(name: str, draw: Draw, seeds: int) -> dict:
    """What is chosen for one set by every seed; ``seconds`` is the mean of one choice."""
    chosen, seconds, dataset = [], 0.0, draw(0)
    for seed in range(seeds):
        dataset = draw(seed)
        start = time.perf_counter()
        choice = num_clusters.choose(
            dataset.examples, offset=dataset.offset, scale=dataset.scale, seed=seed
        )
        seconds += time.perf_counter() - start
        chosen.append(choice.found)
    assert dataset.labels is not None
    classes = len(np.unique(dataset.labels))
    return {
        "name": name,
        "examples": dataset.num_examples,
        "values": int(np.prod(dataset.example_shape)),
        "classes": classes,
        "chosen": chosen,
        "within_2": sum(abs(k - classes) <= 2 for k in chosen),
        "seconds": seconds / seeds,
    }


def sets(folder: Path | None) -> Iterator[tuple[str, Draw]]:
    """Names of sets, and functions from a seed to the set."""
    yield "digits", lambda seed: _images(*load_digits(return_X_y=True), side=8)
    if folder:
        for name, path, config in (
            ("MNIST, test split", "mnist", DataConfig("mnist", split="test")),
            ("Fashion-MNIST, test split", "fashion-mnist", DataConfig("mnist", split="test")),
            ("USPS", "usps/usps.h5", DataConfig("usps", split="all")),
        ):
            config.path = str(folder / path)
            if (folder / path).exists():
                yield name, functools.partial(_read, config)
    for name in synthetic.SETS:
        yield name, lambda seed, name=name: data.from_arrays(*synthetic.draw_blobs(name, seed=seed))
    for k, d in ((6, 20), (15, 50), (25, 30)):
        yield f"{k} Gaussians in {d} dimensions", functools.partial(_gaussians, k, d, None)
    yield "5 Gaussians of 50 to 3%", functools.partial(_gaussians, 5, 10, (50, 25, 15, 7, 3))
    yield (
        "two moons",
        lambda seed: data.from_arrays(*make_moons(1500, noise=0.06, random_state=seed)),
    )
    yield "one Gaussian", functools.partial(_gaussians, 1, 8, None)


def _images(x: np.ndarray, y: np.ndarray, *, side: int) -> Dataset:
    return data.from_arrays(x.reshape(-1, side, side), y)


def _read(config: DataConfig, seed: int) -> Dataset:
    del seed
    return data.load(config, verbose=0)


def _gaussians(k: int, d: int, percent: tuple[int, ...] | None, seed: int) -> Dataset:
    rng = np.random.default_rng(seed)
    centres = 3 * rng.standard_normal((k, d))
    labels = rng.choice(k, 2000, p=None if percent is None else np.array(percent) / 100)
    return data.from_arrays(centres[labels] + rng.standard_normal((2000, d)), labels)


if __name__ == "__main__":
    main()
