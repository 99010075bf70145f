"""Our side of whole EM iterations and of sampling, on the network of ``jax_step``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import jax_step
from benchmarks.worker import NUM_STEPS, peak_host_mib, timed
from dec_diffusion import engine, networks, sampling, schedule


class Worker(jax_step.Worker):
    """What the process of ``jax_loop`` answers to."""

    def run(self, contender: str, steps: int) -> dict[str, float]:
        """``iteration``, or samplers of so many levels; ``steps`` counts levels to run."""
        if contender not in self.compiled:
            make = self._iteration if contender == "iteration" else self._sampler
            self.compiled[contender] = make(contender, steps)
        return timed(self.compiled[contender]) | {"peak_mib": peak_host_mib()}

    def _iteration(self, contender: str, steps: int) -> Callable[[], float]:
        batch_size = self.settings.batch_size
        phase = self.phase._replace(steps=self.settings.num_examples // batch_size)

        def em(state: Any, examples: Any) -> Any:
            return engine.em_iteration(
                phase, state, examples, self.key, batch_size=batch_size, sweep_size=batch_size
            )

        compiled = jax.jit(em, donate_argnums=0)

        def work() -> float:
            self.state, info = compiled(self.state, self.examples)
            return float(info["loss"][-1])

        return work

    def _sampler(self, contender: str, steps: int) -> Callable[[], float]:
        s = self.settings
        shape = (s.batch_size, s.image_size, s.image_size, s.channels)
        _, denoiser = networks.clusterddpm_networks(
            s.network,
            shape[1:],
            latent=s.latent,
            width=s.width,
            multipliers=(1, 2),
            encoder_multipliers=(1, 2, 4),
            dtype=s.dtype,
        )
        grid = schedule.linear(NUM_STEPS + 1)
        position = jnp.linspace(0.0, 1.0, NUM_STEPS + 1)
        sampler, levels = {"ddpm400": (sampling.ddpm, 400), "ddim50": (sampling.ddim, 50)}[
            contender
        ]
        chosen = sampling.subsample(grid, levels, first=1)[:steps]

        def draw(params: Any, key: Any) -> Any:
            z_key, key = jax.random.split(key)
            z = jax.random.normal(z_key, (s.batch_size, s.latent))

            def denoise(x_t: Any, log_snr: Any) -> Any:
                level = jnp.interp(-log_snr, -grid.log_snr, position)
                level = level if s.network == "official" else log_snr
                out = denoiser.apply(params, x_t, level, z, jnp.ones(s.batch_size))
                return schedule.to_x0(out, x_t, log_snr, prediction="eps")

            return sampler(denoise, chosen, key, shape, clip=1.0)

        compiled, keys = jax.jit(draw), iter(range(10**6))
        params = self.state.ema_params["denoiser"]
        return lambda: float(jnp.std(compiled(params, jax.random.key(next(keys)))))
