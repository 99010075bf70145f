"""Reading a folder of images: this package against a plain loop over Pillow.

    python -m benchmarks.reading [--images=5000] [--jpeg=0] [--repeats=5] [--output=F]

Writes images of mixed sizes (sides of 32 to 256 pixels, drawn evenly) and modes (grey, RGB, RGBA in
turn) as PNG, and a share of ``--jpeg`` of them as JPEG, to a temporary folder. Their content is
smooth with a little noise, so that they compress about as photographs do. Then, in alternating
rounds:

``ours``   ``dec_diffusion.data.load`` without its cache: looks for the files, reads all headers,
           decides the size, decodes in threads, checks every image.
``cached`` the same once the decoded images are on disk.
``plain``  ``Image.open(file).convert("RGB").resize(size)`` in a loop, one file after the other,
           into one array; the size is given to it.

JSON goes to standard output: seconds and CPU seconds of each, and how many times longer ``plain``
takes (``ratio``: median, least and most over rounds). Files are in the page cache after the first
round, which warms up and is not counted. Only ratios of one run mean anything on a shared machine,
and only of rounds in which it was not shared: ``others`` is the share of all cores that other
processes used (Linux only), and ``ratio_quiet`` is of the rounds where that was below a twentieth.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dec_diffusion import data

_MODES = ("L", "RGB", "RGBA")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--jpeg", type=float, default=0.0)
    parser.add_argument("--smallest", type=int, default=32)
    parser.add_argument("--largest", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = vars(parser.parse_args())
    output = options.pop("output")
    text = json.dumps(measure(**options), indent=2)
    print(text)
    if output:
        output.write_text(text + "\n", encoding="utf-8")


def measure(
    *,
    images: int = 5000,
    jpeg: float = 0.0,
    smallest: int = 32,
    largest: int = 256,
    repeats: int = 5,
) -> dict[str, Any]:
    """Seconds of each way of reading, and their ratios.

    Args:
        images: how many files.
        jpeg: share of them that are JPEG.
        smallest: side in pixels; ``largest``: likewise.
        repeats: rounds, after one that is not counted.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "images")
        num_bytes = make(folder, images, jpeg=jpeg, smallest=smallest, largest=largest)

        def load(cache: str) -> np.ndarray:
            config = data.DataConfig(name="folder", path=str(folder), cache=cache)
            return data.load(config).examples

        shape = load(str(Path(place, "cache"))).shape[1:]
        ways: dict[str, Callable[[], np.ndarray]] = {
            "ours": lambda: load("none"),
            "cached": lambda: np.array(load(str(Path(place, "cache")))),
            "plain": lambda: plain(folder, shape[:2]),
        }
        rounds = [{name: _clock(read) for name, read in ways.items()} for _ in range(repeats + 1)]
        rounds = rounds[1:]
    quiet = [turn for turn in rounds if max(clock.others for clock in turn.values()) < 0.05]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "images": images,
        "megabytes": round(num_bytes / 1e6, 1),
        "shape": shape,
        "cores": cores,
        "seconds": {name: _spread([r[name].wall for r in rounds]) for name in ways},
        "cpu_seconds": {name: _spread([r[name].cpu for r in rounds]) for name in ways},
        "others": {name: _spread([r[name].others for r in rounds]) for name in ways},
        "ratio": _ratios(rounds),
        "quiet_rounds": len(quiet),
        "ratio_quiet": _ratios(quiet),
    }


class Clock(NamedTuple):
    """Seconds, CPU seconds, and the share of all cores that others had meanwhile."""

    wall: float
    cpu: float
    others: float


def _clock(read: Callable[[], np.ndarray]) -> Clock:
    start, used, busy = time.perf_counter(), time.process_time(), _busy()
    read()
    wall, cpu = time.perf_counter() - start, time.process_time() - used
    others = max(0.0, _busy() - busy - cpu) / (wall * (os.cpu_count() or 1))
    return Clock(wall, cpu, others)


def _busy() -> float:
    """CPU seconds that all processes of this machine have used; 0 where that is not known."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _ratios(rounds: list[dict[str, Clock]]) -> dict[str, dict[str, float]]:
    if not rounds:
        return {}
    return {
        name: _spread([turn["plain"].wall / turn[name].wall for turn in rounds])
        for name in ("ours", "cached")
    }


def make(folder: Path, images: int, *, jpeg: float, smallest: int, largest: int) -> int:
    """Write the images; returns the bytes they take."""
    rng, total = np.random.default_rng(0), 0
    folder.mkdir()
    for i in range(images):
        width, height = (int(side) for side in rng.integers(smallest, largest + 1, 2))
        coarse = rng.integers(0, 256, (6, 6, 4), dtype=np.uint8)
        coarse[..., 3] = 255 if i % 2 else coarse[..., 3]
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noisy = np.asarray(image).astype(np.int16)
        noisy[..., :3] += rng.integers(-4, 5, (height, width, 1), dtype=np.int16)
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(_MODES[i % 3])
        if i < jpeg * images:
            path = folder / f"{i:06d}.jpg"
            image.convert("RGB" if image.mode == "RGBA" else image.mode).save(path, quality=90)
        else:
            path = folder / f"{i:06d}.png"
            image.save(path)
        total += path.stat().st_size
    return total


def plain(folder: Path, size: tuple[int, ...]) -> np.ndarray:
    """uint8 [n, h, w, 3], read as one does by hand; ``size`` is (h, w)."""
    images = []
    for path in sorted(folder.iterdir()):
        images.append(np.asarray(Image.open(path).convert("RGB").resize((size[1], size[0]))))
    return np.stack(images)


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


if __name__ == "__main__":
    main()
