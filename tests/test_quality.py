"""The bars that the defaults have to clear; minutes each, hence ``-m slow``."""

import dataclasses
import pathlib

import numpy as np
import pytest

from dec_diffusion import fit
from dec_diffusion.command import load_config
from dec_diffusion.options import parse

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("name", "bars"),
    [("clusterddpm", {"acc": 0.83, "nmi": 0.86}), ("neural_mixture", {"acc": 0.82})],
)
def test_digits_by_the_default_over_five_seeds(name, bars, tmp_path):
    config = load_config(parse(["main", f"--config={CONFIGS / name}.py"]))
    scores = []
    for seed in range(5):
        seeded = dataclasses.replace(config, seed=seed)
        result = fit(seeded, tmp_path / str(seed), verbose=0)
        scores.append([result.summary["scores"][score] for score in bars])
    for mean, bar in zip(np.mean(scores, axis=0), bars.values(), strict=True):
        assert mean >= bar
