"""One whole EM iteration, and sampling, on the official network beside PyTorch.

``iteration``: ours is one compiled call on resident data (gradient steps over one epoch, a sweep of
the encoder, the mixture warm-started); PyTorch's is what the official script does, see
``torch_loop``. The mixtures stop by scikit-learn's rule, after 20 and 100 iterations at the latest;
ours is fitted to posteriors, PyTorch's to their means, from k-means.

``sampling``: the same loop over noise levels on both sides, its time proportional to the levels,
of which ``levels_run`` are run.
"""

import contextlib
import dataclasses
import functools
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.rounds import Options, alternate, compare, say, summarise
from benchmarks.worker import Settings, WorkerError, connect

OFFICIAL = Settings("official", 128, 64, 32, 28, 1, 8192, "float32", "auto", "default")


def iteration(options: Options, platform: str) -> dict[str, Any]:
    """Seconds of an iteration; of 256 images on a CPU unless ``options.full``, else 70,000."""
    n = 70_000 if options.full or platform != "cpu" else 256
    settings = dataclasses.replace(OFFICIAL, num_examples=n, device=options.device)
    result = _measure(options, settings, {"iteration": 0})["iteration"]
    result["images"] = n if not options.tiny else _tiny(settings).num_examples
    return result


def sampling(options: Options, platform: str) -> dict[str, Any]:
    """Images per second of DDPM-400 and DDIM-50."""
    cpu = platform == "cpu"
    batch_size, share = (16 if cpu else 512), (1 if options.full or not cpu else 10)
    settings = dataclasses.replace(
        OFFICIAL, num_examples=batch_size, batch_size=batch_size, device=options.device
    )
    counts = {"ddpm400": 400 // share, "ddim50": 50}
    if options.tiny:
        counts = {"ddpm400": 4, "ddim50": 2}
    results = _measure(options, settings, counts)
    for name, result in results.items():
        levels, run = int(name[4:]), counts[name]
        result |= {"levels": levels, "levels_run": run}
        batch_size = _tiny(settings).batch_size if options.tiny else batch_size
        for figures in result["contenders"].values():
            seconds = figures["seconds"]["median"] * levels / run
            figures["images_per_second"] = round(batch_size / seconds, 3)
    return results


def _tiny(settings: Settings) -> Settings:
    return dataclasses.replace(
        settings, width=4, latent=4, image_size=8, batch_size=8, num_examples=24
    )


def _measure(options: Options, settings: Settings, counts: dict[str, int]) -> dict[str, Any]:
    """Every contender of ``counts`` on both sides, by so many steps or levels."""
    settings = _tiny(settings) if options.tiny else settings
    notes: list[str] = []
    sides: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        sides["ours"] = stack.enter_context(connect("jax_loop", sys.executable, settings.device))
        given = dataclasses.asdict(settings)
        platform = sides["ours"]("start", settings=given)["platform"]
        path = str(Path(folder, "ours.npz"))
        if options.torch_python is None:
            notes.append("no PyTorch figures: not asked for")
        else:
            theirs = stack.enter_context(
                connect("torch_loop", options.torch_python, options.device)
            )
            try:
                theirs("probe", platform=platform)
            except WorkerError as error:
                notes.append(f"no PyTorch figures: {error}")
            else:
                sides["ours"]("export", path=path)
                theirs("start", path=path, platform=platform, settings=given)
                sides["torch"] = theirs
        results = {}
        for name, steps in counts.items():
            say(name)
            calls = {
                side: functools.partial(call, "run", contender=name, steps=steps)
                for side, call in sides.items()
            }
            own = list(notes)
            runs = alternate(calls, options.repeats, own)
            ratios = compare(runs, [("ours", "torch")])
            results[name] = {"contenders": summarise(runs), "ratios": ratios, "notes": own}
    return results
