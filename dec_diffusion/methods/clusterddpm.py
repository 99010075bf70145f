"""ClusterDDPM (arXiv 2312.08029): EM with a conditional diffusion model. PROTOTYPE."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from dec_diffusion import gmm, sampling, schedule, views
from dec_diffusion.method import DataSpec, EStage, Method, Phase
from dec_diffusion.networks.encoder import Encoder
from dec_diffusion.networks.layers import as_network
from dec_diffusion.networks.mlp import MLPDenoiser, MLPEncoder
from dec_diffusion.networks.unet import UNet
from dec_diffusion.types import Array, Batch


@dataclasses.dataclass
class ClusterDDPM:
    num_clusters: int = 10
    latent: int = 10
    width: int = 16
    multipliers: tuple[int, ...] = (1, 2)
    encoder_width: int = 16
    encoder_multipliers: tuple[int, ...] = (1, 2, 4)
    hidden: int = 128
    log_snr_mean: float = -1.5
    log_snr_std: float = 1.0
    drop_latent: float = 0.1
    kl_weight: float = 0.3
    kl_warmup: float = 0.1
    pretrain_kl: float = 0.01
    rotate: float = 10.0
    shift: float = 0.08
    scale: float = 0.1
    shear: float = 0.1
    noise: float = 0.0
    decode_view: bool = False
    consistency: float = 0.0
    pretrain_iterations: int = 20
    em_iterations: int = 40
    steps: int = 50
    learning_rate: float = 1e-3
    em_learning_rate: float = 1e-3
    ema: float = 0.99
    gmm_iterations: int = 20
    prior: float = 1.0
    floor: float = 1e-2
    split_merge: bool = False

    def build(self, spec: DataSpec) -> Method:
        enc = as_network(Encoder(self.latent, self.encoder_width, self.encoder_multipliers, hidden=self.hidden))
        den = as_network(UNet(self.width, self.multipliers))
        k = self.num_clusters

        def init(key, batch):
            a, b = jax.random.split(key)
            x = batch["image"]
            z = jnp.zeros((x.shape[0], self.latent))
            params = {"encoder": enc.init(a, x), "denoiser": den.init(b, x, jnp.zeros(x.shape[0]), z, jnp.ones(x.shape[0]))}
            mix = gmm.Mixture(jnp.full((k,), -jnp.log(k)), jnp.zeros((k, self.latent)), jnp.ones((k, self.latent)))
            return params, mix

        def view(x, key):
            a, b = jax.random.split(key)
            x = views.affine(x, a, rotate=self.rotate, shift=self.shift, scale=self.scale, shear=self.shear)
            return views.noise(x, b, std=self.noise) if self.noise else x

        def encode(params, x):
            m, lv = enc.apply(params["encoder"], x)
            return m, jnp.exp(lv)

        def denoising(params, x, z, key):
            a, b, c = jax.random.split(key, 3)
            n = x.shape[0]
            u = (jnp.arange(n) + jax.random.uniform(a, (n,))) / n
            log_snr = self.log_snr_mean + self.log_snr_std * jax.scipy.stats.norm.ppf(jnp.clip(u, 1e-4, 1 - 1e-4))
            eps = jax.random.normal(b, x.shape)
            keep = jax.random.bernoulli(c, 1 - self.drop_latent, (n,)).astype(jnp.float32)
            x_t = schedule.add_noise(x, eps, log_snr)
            v = schedule.target(x, eps, log_snr, prediction="v")
            out = den.apply(params["denoiser"], x_t, log_snr, z, keep)
            return jnp.sum((v - out) ** 2, axis=tuple(range(1, x.ndim))).mean()

        def terms(params, x, key):
            ks = jax.random.split(key, 5)
            m, v = encode(params, view(x, ks[0]))
            z = m + jnp.sqrt(v) * jax.random.normal(ks[1], m.shape)
            target = view(x, ks[2]) if self.decode_view else x
            return m, v, denoising(params, target, z, ks[3]), ks[4]

        def pre_loss(params, cluster, batch, key, progress):
            m, v, rec, _ = terms(params, batch["image"], key)
            kl = 0.5 * jnp.sum(m**2 + v - 1 - jnp.log(v), -1).mean()
            return rec + self.pretrain_kl * kl, (cluster, {"denoise": rec, "kl": kl})

        def em_loss(params, cluster, batch, key, progress):
            m, v, rec, k2 = terms(params, batch["image"], key)
            kl = gmm.mixture_kl_bound(cluster, m, v).mean()
            w = self.kl_weight * jnp.minimum(1.0, progress / self.kl_warmup)
            loss = rec + w * kl
            out = {"denoise": rec, "kl": kl}
            if self.consistency:
                m2, v2 = encode(params, view(batch["image"], k2))
                g1, _ = gmm.log_responsibilities(cluster, m, v)
                g2, _ = gmm.log_responsibilities(cluster, m2, v2)
                c = -0.5 * (jax.lax.stop_gradient(jnp.exp(g1)) * g2 + jax.lax.stop_gradient(jnp.exp(g2)) * g1).sum(-1).mean()
                loss = loss + w * self.consistency * c
                out["consistency"] = c
            return loss, (cluster, out)

        def collect(params, cluster, batch, key):
            return encode(params, batch["image"])

        def fit(params, cluster, features, weight, key):
            m, v = features
            res = gmm.fit(cluster, m, v, weight=weight, iterations=self.gmm_iterations, variance_floor=self.floor, weight_prior=self.prior)
            return params, res.mixture, info(res.mixture, m, v, weight)

        def info(mix, m, v, weight):
            return {"min_weight": jnp.exp(mix.log_weights.min())}

        def first(params, cluster, features, weight, key):
            m, v = features
            mix = gmm.init(key, m, k, variance=v, weight=weight, restarts=20).mixture
            return fit(params, mix, features, weight, key)

        def tx(lr, n):
            s = optax.warmup_cosine_decay_schedule(0.0, lr, max(1, n // 50), n, lr * 0.05)
            return optax.chain(optax.clip_by_global_norm(1000.0), optax.adam(s, b2=0.99))

        e = EStage(collect, fit)
        phases = {
            "pretrain": Phase(pre_loss, tx(self.learning_rate, self.pretrain_iterations * self.steps), self.pretrain_iterations, self.steps, ema=self.ema),
            "em": Phase(em_loss, tx(self.em_learning_rate, self.em_iterations * self.steps), self.em_iterations, self.steps, EStage(collect, first), e, ema=self.ema),
        }

        def predict(params, cluster, batch, key):
            m, v = encode(params, batch["image"])
            return gmm.log_responsibilities(cluster, m, v)[0]

        def embed(params, cluster, batch, key):
            return encode(params, batch["image"])[0]

        return Method(init, phases, predict, embed)
