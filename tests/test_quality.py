"""The bars that the default has to clear; minutes each, hence ``-m slow``."""

import numpy as np
import pytest

from dec_diffusion import ClusterDDPM, Config, fit


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_digits_by_the_default_over_five_seeds(tmp_path):
    scores = []
    for seed in range(5):
        config = Config(name="digits", method=ClusterDDPM(), seed=seed)
        result = fit(config, tmp_path / str(seed), verbose=0)
        scores.append([result.summary["scores"][name] for name in ("acc", "nmi")])
    accuracy, nmi = np.mean(scores, axis=0)
    assert accuracy >= 0.83
    assert nmi >= 0.86
