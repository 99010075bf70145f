"""Our side: the M-step of this package, through the functions that training calls."""

import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.worker import NUM_STEPS, Settings, images, peak_host_mib, timed
from dec_diffusion import engine, schedule
from dec_diffusion.gmm import Mixture
from dec_diffusion.method import DataSpec
from dec_diffusion.methods import clusterddpm
from dec_diffusion.spread import Table

NUM_CLUSTERS = 10
CHECK_BATCH = 4


class Worker:
    """What the process of ``jax`` answers to."""

    def start(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Build the method, and a state in its EM phase."""
        self.settings = Settings(**settings)
        self.key = jax.random.key(0)
        method = _build(self.settings)
        self.phase = method.phases["em"]
        raw = jnp.asarray(images(self.settings))
        self.examples = engine.Examples(raw, jnp.float32(127.5), jnp.float32(127.5))
        params, cluster = _initialise(method, self._batch(2), self.settings.latent)
        state = engine.TrainState(jnp.int32(0), params, params, (), cluster)
        # As a run enters the phase, less the first mixture, which is random here.
        self.state, _ = jax.jit(lambda s: engine.begin_phase(self.phase, s, None, self.key))(state)
        self.compiled: dict[str, Any] = {}
        device = jax.devices()[0]
        versions = {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax", "optax")}
        return {
            "platform": device.platform,
            "device": device.device_kind,
            "devices_used": 1,
            "parameters": sum(p.size for p in jax.tree.leaves(params)),
            **versions,
        }

    def run(self, contender: str, steps: int) -> dict[str, float]:
        """Take ``steps`` gradient steps, as many in every call."""
        if contender not in self.compiled:
            make = {"ours_scan": self._compile_scan, "ours_loop": self._compile_loop}[contender]
            self.compiled[contender] = make(steps)
        take = self.compiled[contender]

        def work() -> float:
            self.state, loss = take(self.state)
            jax.block_until_ready(self.state)
            return float(loss)

        memory = jax.devices()[0].memory_stats() or {}
        peak = memory.get("peak_bytes_in_use", 2**20 * peak_host_mib()) / 2**20
        return timed(work) | {"peak_mib": peak}

    def export(self, path: str) -> None:
        """Write weights, inputs, noise, and all that our step makes of them, in full precision."""
        seen: dict[str, Any] = {}
        make_networks, add_noise = clusterddpm.clusterddpm_networks, schedule.add_noise

        def watch(name: str, network: Any) -> Any:
            def apply(params: Any, *inputs: Any, **options: Any) -> Any:
                out = network.apply(params, *inputs, **options)
                seen[name] = (inputs, out)
                return out

            return network._replace(apply=apply)

        def watched_networks(*args: Any, **kwargs: Any) -> Any:
            encoder, denoiser = make_networks(*args, **kwargs)
            return watch("encoder", encoder), watch("denoiser", denoiser)

        def watched_noise(x: Any, eps: Any, log_snr: Any) -> Any:
            seen["noise"] = (eps, log_snr)
            return add_noise(x, eps, log_snr)

        # The loss draws its noise inside; watching it from outside leaves it as it is, and
        # asks nothing about how it derives its keys.
        with (
            mock.patch.object(clusterddpm, "clusterddpm_networks", watched_networks),
            mock.patch.object(schedule, "add_noise", watched_noise),
            jax.default_matmul_precision("highest"),
        ):
            loss_of = _build(dataclasses.replace(self.settings, dtype="float32")).phases["em"].loss
            batch, cluster = self._batch(CHECK_BATCH), self.state.cluster

            def spied(params: Any) -> tuple[Any, Any]:
                loss, (_, metrics) = loss_of(params, cluster, batch, self.key, jnp.float32(1))
                return loss, (metrics, dict(seen))

            gradient = jax.jit(jax.value_and_grad(spied, has_aux=True))
            (loss, (metrics, records)), grads = gradient(self.state.params)
        _, (mean, log_variance) = records["encoder"]
        (_, level, z, keep), prediction = records["denoiser"]
        eps, log_snr = records["noise"]
        arrays: dict[str, Any] = {
            "x": batch["image"],
            "mean": mean,
            "log_variance": log_variance,
            "z": z,
            "level": level,
            "keep": keep,
            "eps": eps,
            "log_snr": log_snr,
            "prediction": prediction,
            "loss": loss,
            "kl_weight": metrics["kl_weight"],
            "mixture/log_weights": cluster.mixture.log_weights,
            "mixture/means": cluster.mixture.means,
            "mixture/variances": cluster.mixture.covariance,
            **_flatten("params", self.state.params),
            **_flatten("grads", grads),
        }
        np.savez(path, **arrays)

    def _batch(self, n: int) -> Any:
        return engine.fetch_resident(self.examples)(jnp.arange(n) % len(self.examples.raw))

    def _order(self, step: Any, steps: int) -> Any:
        return engine.epoch_order(
            self.key,
            step,
            steps=steps,
            batch_size=self.settings.batch_size,
            num_examples=self.settings.num_examples,
        )

    def scan(self, steps: int) -> Any:
        """The compiled function of state and examples that takes ``steps`` gradient steps."""

        def m_step(state: Any, examples: Any) -> tuple[Any, Any]:
            rows = self._order(state.step, steps)
            fetch = engine.fetch_resident(examples)
            state, metrics = engine.m_step(self.phase, state, rows, fetch, self.key)
            return state, metrics["loss"][-1]

        return jax.jit(m_step, donate_argnums=0)

    def _compile_scan(self, steps: int) -> Callable[[Any], tuple[Any, Any]]:
        compiled = self.scan(steps)
        return lambda state: compiled(state, self.examples)

    def _compile_loop(self, steps: int) -> Callable[[Any], tuple[Any, Any]]:
        def one(state: Any, examples: Any, row: Any) -> tuple[Any, Any]:
            batch = engine.fetch_resident(examples)(row)
            state, metrics = engine.train_step(self.phase, state, batch, self.key)
            return state, metrics["loss"]

        order = jax.jit(lambda step: self._order(step, steps))
        compiled = jax.jit(one, donate_argnums=0)

        def loop(state: Any) -> tuple[Any, Any]:
            loss = None
            for row in np.asarray(order(state.step)):
                state, loss = compiled(state, self.examples, row)
            return state, loss

        return loop


def _build(settings: Settings) -> Any:
    size, channels = settings.image_size, settings.channels
    return clusterddpm.ClusterDDPM(
        num_clusters=NUM_CLUSTERS,
        latent=settings.latent,
        network=settings.network,
        width=settings.width,
        dtype=settings.dtype,
        noise_schedule="linear",
        num_steps=NUM_STEPS,
        zero_terminal=False,
        prediction="eps",
        uniform_noise=1.0,
        drop_latent=0.1,
        responsibilities="closed_form",
        kl_weight=1.0,
        kl_warmup=0.0,
        rotate=0.0,
        shift=0.0,
        scale=0.0,
        shear=0.0,
        noise=0.0,
        flip=False,
        learning_rate=1e-4,
        decay=False,
        clip=1000.0,
        ema=0.99,
    ).build(DataSpec((size, size, channels), settings.num_examples))


def _initialise(method: Any, batch: Any, latent: int) -> tuple[Any, Any]:
    """Weights and a mixture without zeros or ones where they would make a term vanish.

    Drawn by numpy, because compiling the methods' own ``init`` takes longer than all the rest.
    """
    random = np.random.default_rng(1)

    def draw(path: Any, leaf: Any) -> Any:
        name = path[-1].key
        fan_in = np.prod(leaf.shape[:-1]) if "BlockUpsample" not in str(path) else leaf.shape[0]
        std = (2 / fan_in) ** 0.5 if name == "kernel" else 0.02
        value = (name == "scale") + std * random.standard_normal(leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    shapes, clusters = jax.eval_shape(method.init, jax.random.key(0), batch)
    log_weights = random.standard_normal(NUM_CLUSTERS)
    log_weights -= np.log(np.exp(log_weights).sum())
    means, log_variances = random.standard_normal((2, NUM_CLUSTERS, latent))
    mixture = [log_weights, means, np.exp(0.5 * log_variances)]
    n = clusters.start.count
    return (
        jax.tree_util.tree_map_with_path(draw, shapes),
        clusterddpm.Clusters(
            Mixture(*(jnp.asarray(part, jnp.float32) for part in mixture)),
            Table(jnp.zeros(n, jnp.int32), n),
        ),
    )


def _flatten(prefix: str, tree: Any) -> dict[str, Any]:
    if not hasattr(tree, "items"):
        return {prefix: tree}
    parts = [_flatten(f"{prefix}/{name}", value) for name, value in tree.items()]
    return {name: value for part in parts for name, value in part.items()}
