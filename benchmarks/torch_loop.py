"""PyTorch's side of whole EM iterations and of sampling, as the official script goes about it.

An iteration is one pass of a shuffling DataLoader over images in the host's memory, a gradient step
for each batch, another pass that encodes, and scikit-learn's GaussianMixture on the latents.
"""

from collections.abc import Iterator

import numpy as np

from benchmarks import torch_step
from benchmarks.torch_step import Tensors, torch
from benchmarks.worker import NUM_STEPS, images, peak_host_mib, timed


class Worker(torch_step.Worker):
    """What the process of ``torch_loop`` answers to."""

    def run(self, contender: str, steps: int) -> dict[str, float]:
        """``iteration``, or samplers of so many levels; ``steps`` counts levels to run."""
        if contender == "iteration":
            return timed(self._iteration) | {"peak_mib": peak_host_mib()}
        return timed(lambda: self._sample(contender, steps)) | {"peak_mib": peak_host_mib()}

    def _iteration(self) -> float:
        from sklearn.mixture import GaussianMixture

        loss = self._take(self._loss_of, 0, self._batches(shuffle=True))["loss"]
        encode = torch_step.encoder(self.settings.network)
        latents = []
        with torch.no_grad():
            for raw in self._batches(shuffle=False):
                x = (raw.float() - 127.5) / 127.5
                latents.append(encode(self.params, x, self.dtype)[0].cpu().numpy())
        model = GaussianMixture(len(self.mixture["means"]), covariance_type="diag", random_state=0)
        model.fit(np.concatenate(latents))
        found = {
            "log_weights": np.log(np.asarray(model.weights_)),
            "means": model.means_,
            "variances": model.covariances_,
        }
        self.mixture: Tensors = {
            name: torch.tensor(value, dtype=torch.float32, device=self.device)
            for name, value in found.items()
        }
        return loss

    def _batches(self, *, shuffle: bool) -> Iterator[torch.Tensor]:
        from torch.utils.data import DataLoader, TensorDataset

        pixels = torch.tensor(images(self.settings)).permute(0, 3, 1, 2).contiguous()
        loader = DataLoader(
            TensorDataset(pixels),
            self.settings.batch_size,
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=0,
            pin_memory=self.cuda,
        )
        layout = torch.channels_last if self.layout == "nhwc" else torch.contiguous_format
        for (raw,) in loader:
            yield raw.to(self.device, non_blocking=True).contiguous(memory_format=layout)

    @torch.no_grad()
    def _sample(self, contender: str, steps: int) -> float:
        s = self.settings
        levels = {"ddpm400": 400, "ddim50": 50}[contender]
        every = np.linspace(1, NUM_STEPS, levels).round().astype(int)[::-1].tolist()
        z = torch.randn(s.batch_size, s.latent, device=self.device)
        keep = torch.ones(s.batch_size, device=self.device)
        network = torch_step.denoiser(s.network)
        level = self.levels["position" if s.network == "official" else "log_snr"]
        alpha, sigma = self.levels["alpha"], self.levels["sigma"]
        x = torch.randn(s.batch_size, s.channels, s.image_size, s.image_size, device=self.device)
        for number, t in enumerate(every[:steps]):
            eps = network(self.params, x, level[t].expand(s.batch_size), z, keep, self.dtype)
            x0 = ((x - sigma[t] * eps) / alpha[t]).clamp(-1, 1)
            # After the last level there is clean data, as on our side.
            alpha_s, sigma_s = torch.ones_like(alpha[t]), torch.zeros_like(sigma[t])
            if number < steps - 1:
                alpha_s, sigma_s = alpha[every[number + 1]], sigma[every[number + 1]]
            if contender == "ddim50":
                x = alpha_s * x0 + sigma_s * (x - alpha[t] * x0) / sigma[t]
                continue
            ratio = alpha[t] / alpha_s
            fresh = 1 - (sigma_s * ratio / sigma[t]) ** 2
            mean = (1 - fresh) / ratio * x + alpha_s * fresh * x0
            x = mean + sigma_s * fresh.clamp(min=0).sqrt() * torch.randn_like(x)
        return float(x.std())
