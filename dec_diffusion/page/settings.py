"""How a result came about: what was chosen on the way, every setting, the command to repeat it."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dec_diffusion import config as configs
from dec_diffusion import num_clusters
from dec_diffusion.config import Config
from dec_diffusion.data import Dataset
from dec_diffusion.page.embed import figure
from dec_diffusion.page.markup import Html, table, tag
from dec_diffusion.page.words import number


def number_chosen(choice: Mapping[str, Any], picture: bytes) -> list[Html]:
    """How the number of clusters was chosen, in words and as ``num_clusters.png``."""
    alt = "How far apart the closest two groups are, for every number of clusters; one is chosen"
    words = num_clusters.describe(choice)
    return [tag("p", words[0].upper() + words[1:]), *figure(picture, alt)]


def cell_chosen(chosen: Mapping[str, Any], picture: bytes) -> list[Html]:
    """Which layer and timestep the search chose, in words and as ``search.png``."""
    words = f"Features of layer {chosen['layer']} at timestep {chosen['timestep']} were chosen, "
    words += "by a score that needs no labels."
    if chosen.get("acc") is not None:
        words += f" There k-means has an accuracy of {chosen['acc']:.3f}; the best of all cells, "
        words += f"which only labels can tell, has {chosen['best_acc_of_all_cells']:.3f}."
    alt = "Heat-maps of the scores of all layers and timesteps; the chosen cell is framed"
    return [tag("p", words), *figure(picture, alt)]


def settings(summary: Mapping[str, Any], config: Config, command: str | None) -> list[Html]:
    """What ran where and how long, every setting, the versions, and the command if known."""
    training, device = summary["training"], summary["device"]
    facts: list[tuple[str, Any]] = [
        ("device", f"{device['count']} x {device['kind']}"),
        ("gradient steps", f"{training['steps']:,}"),
        ("parameters", f"{training['parameters']:,}"),
        ("seconds of training", number(training["seconds"], "seconds")),
        ("examples per second", number(training["examples_per_second"], "examples_per_second")),
    ]
    if "seconds_this_command" in summary:
        facts.append(("seconds in all", number(summary["seconds_this_command"], "seconds")))
    named = ((name, plain(value)) for name, value in configs.flatten(config).items())
    parts = [
        tag("h3", "What ran"),
        table(facts),
        tag("details", tag("summary", "Every setting"), table(named)),
        tag("details", tag("summary", "Versions"), table(summary["versions"].items())),
    ]
    if command:
        made = tag("summary", "The command that made it")
        parts.append(tag("details", made, tag("pre", command)))
    return parts


def plain(value: Any) -> str:
    """The value of a setting as a reader expects it."""
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


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
