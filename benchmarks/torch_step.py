"""PyTorch's side: the same step as it is best written there.

Fused Adam, multi-tensor clipping and averaging, data on the device, no host syncs. Needs neither
JAX nor this package, so that it runs in an environment of its own.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from benchmarks.worker import (
    NUM_STEPS,
    Settings,
    WorkerError,
    images,
    peak_host_mib,
    timed,
    usable_cpus,
)

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
except ImportError as error:
    install = "pip install torch==2.13.0"
    raise WorkerError(f"PyTorch cannot be imported ({error}); {install}") from error

TOLERANCE = 1e-4

Tensors = dict[str, Tensor]
"""Tensors by name; parameters carry the path that they have in our tree."""

Loss = Callable[[Tensors, Tensor], Tensor]
"""From parameters and example numbers, or images, to the loss that training minimises."""


class Worker:
    """What the process of ``torch`` answers to."""

    def probe(self, platform: str) -> None:
        """Raise WorkerError, saying what to do, if there is no PyTorch for this platform."""
        if platform not in ("cpu", "gpu"):
            raise WorkerError(f"nothing to compare on a {platform}; use --device=cpu")
        if platform == "gpu" and not torch.cuda.is_available():
            raise WorkerError("its build sees no GPU; install one for CUDA, or use --device=cpu")

    def start(self, path: str, platform: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Take over our weights, and choose the memory layout by a short trial."""
        self.settings, self.cuda = Settings(**settings), platform == "gpu"
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.dtype = getattr(torch, self.settings.dtype)
        torch.set_num_threads(usable_cpus())
        torch.backends.cudnn.benchmark = True
        _allow_tf32(True)
        with np.load(path) as file:
            arrays = dict(file)
        seconds = {}
        for layout in ("nchw", "nhwc"):
            self._prepare(layout, arrays)
            self._take(self._training_loss, 2)  # warms up
            seconds[layout] = self._take(self._training_loss, 2)["seconds"]
        self._prepare(min(seconds, key=seconds.__getitem__), arrays)
        return {
            "platform": platform,
            "device": torch.cuda.get_device_name() if self.cuda else "cpu",
            "layout": self.layout,
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in self.leaves),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }

    def check(self, path: str) -> dict[str, Any]:
        """Compare with what our side exported: errors, each relative to the largest value.

        The error of ``gradient`` is the norm of the difference over the norm, for all parameters
        together.
        """
        with np.load(path) as file:
            ours = dict(file)
        std = np.exp(0.5 * ours["log_variance"])
        distance = np.abs(ours["log_snr"][:, None] - self.levels["log_snr"].cpu().numpy())
        noise = {
            "z": self._convert((ours["z"] - ours["mean"]) / std),
            "eps": self._convert(ours["eps"]),
            "keep": self._convert(ours["keep"]),
            "step": torch.as_tensor(distance.argmin(1), device=self.device),
        }
        _allow_tf32(False)
        loss, seen = self._loss(self.params, self._convert(ours["x"]), noise, torch.float32)
        grads = torch.autograd.grad(loss, self.leaves)
        _allow_tf32(True)
        seen |= {"loss": loss, "prediction": seen["prediction"].permute(0, 2, 3, 1)}
        errors = {}
        for name, value in seen.items():
            difference = np.abs(value.detach().cpu().numpy() - ours[name]).max()
            errors[name] = float(difference / np.abs(ours[name]).max())
        expected = [self._convert(ours[f"grads/{name}"], name).double() for name in self.params]
        squares = sum(((a - b) ** 2).sum() for a, b in zip(grads, expected, strict=True))
        errors["gradient"] = float((squares / sum((b**2).sum() for b in expected)) ** 0.5)
        passed = all(error <= TOLERANCE for error in errors.values())
        return {"passed": passed, "tolerance": TOLERANCE, "relative_errors": errors}

    def run(self, contender: str, steps: int) -> dict[str, float]:
        """Take ``steps`` gradient steps."""
        if contender == "torch_eager":
            return self._take(self._training_loss, steps)
        if self.compiled is None:
            self.compiled = torch.compile(self._training_loss, mode=self.settings.compile_mode)
        return self._take(self.compiled, steps)

    def _take(
        self, loss_of: Loss, steps: int, batches: Iterable[Tensor] | None = None
    ) -> dict[str, float]:
        """A gradient step for each of ``batches``, by default of ``steps`` example numbers."""
        wait = torch.cuda.synchronize if self.cuda else lambda: None

        def work() -> float:
            loss = torch.tensor(torch.nan)
            for batch in batches or self._order(steps):
                self.optimizer.zero_grad(set_to_none=True)
                loss = loss_of(self.params, batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.leaves, 1000.0, foreach=True)
                self.optimizer.step()
                decay = min(0.99, (1 + self.step) / (10 + self.step))
                with torch.no_grad():
                    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                        self.averages, self.leaves, 1 - decay
                    )
                self.step += 1
            wait()
            return float(loss.detach())

        wait()
        timing = timed(work)
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else peak_host_mib()
        return timing | {"peak_mib": peak}

    def _prepare(self, layout: str, arrays: dict[str, np.ndarray]) -> None:
        """Our weights and data in this layout, and a fresh optimiser."""

        def part(prefix: str) -> Tensors:
            names = {n.removeprefix(prefix): n for n in arrays if n.startswith(prefix)}
            return {short: self._convert(arrays[name], short) for short, name in names.items()}

        self.layout = layout
        self.params = {name: p.requires_grad_() for name, p in part("params/").items()}
        self.leaves = list(self.params.values())
        self.averages = [p.detach().clone() for p in self.leaves]
        self.optimizer = torch.optim.Adam(self.leaves, lr=1e-4, betas=(0.9, 0.99), fused=True)
        self.raw = self._convert(images(self.settings))
        self.mixture = part("mixture/")
        self.kl_weight = float(arrays["kl_weight"])
        self.levels = {name: x.to(self.device) for name, x in _linear_schedule(NUM_STEPS).items()}
        self.pending: list[Tensor] = []
        self.step, self.compiled = 0, None

    def _convert(self, array: np.ndarray, name: str = "") -> Tensor:
        """An array of ours in PyTorch's order of axes and in the layout chosen."""
        if name.endswith("kernel"):
            # Ours: HWIO, for block upsampling IHWO, and [in, out].
            block = (0, 3, 1, 2) if "BlockUpsample" in name else (3, 2, 0, 1)
            array = array.transpose(block if array.ndim == 4 else (1, 0))
        elif array.ndim == 4:
            array = array.transpose(0, 3, 1, 2)
        # A copy, for training must not write into the arrays that it started from.
        tensor = torch.tensor(np.ascontiguousarray(array), device=self.device)
        if tensor.ndim == 4 and self.layout == "nhwc":
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def _order(self, steps: int) -> Iterator[Tensor]:
        """Batches of example numbers, from a new permutation in every epoch."""
        n, batch_size = self.settings.num_examples, self.settings.batch_size
        for _ in range(steps):
            if not self.pending:
                order = torch.randperm(n, device=self.device)[: n // batch_size * batch_size]
                self.pending = list(order.split(batch_size))
            yield self.pending.pop()

    def _training_loss(self, params: Tensors, index: Tensor) -> Tensor:
        return self._loss_of(params, self.raw[index])

    def _loss_of(self, params: Tensors, raw: Tensor) -> Tensor:
        x = (raw.float() - 127.5) / 127.5
        b = x.shape[0]
        noise = {
            "z": torch.randn(b, self.settings.latent, device=x.device),
            "eps": torch.randn_like(x),
            "keep": (torch.rand(b, device=x.device) < 0.9).float(),
            "step": torch.randint(1, NUM_STEPS + 1, (b,), device=x.device),
        }
        return self._loss(params, x, noise, self.dtype)[0]

    def _loss(
        self, params: Tensors, x: Tensor, noise: Tensors, dtype: torch.dtype
    ) -> tuple[Tensor, Tensors]:
        official = self.settings.network == "official"
        encode, denoise = encoder(self.settings.network), denoiser(self.settings.network)
        mean, log_variance = encode(params, x, dtype)
        z = mean + torch.exp(0.5 * log_variance) * noise["z"]
        step = noise["step"]
        alpha, sigma = (self.levels[n][step][:, None, None, None] for n in ("alpha", "sigma"))
        x_t = alpha * x + sigma * noise["eps"]
        level = self.levels["position" if official else "log_snr"][step]
        prediction = denoise(params, x_t, level, z, noise["keep"], dtype)
        error = (noise["eps"] - prediction).square().sum((1, 2, 3))
        kl = _mixture_kl(self.mixture, mean, log_variance)
        loss = error.mean() + self.kl_weight * kl.mean()
        seen = {"mean": mean, "log_variance": log_variance, "level": level}
        return loss, seen | {"prediction": prediction}


def encoder(network: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """From parameters, images and a dtype to mean and log variance."""
    return _official_encoder if network == "official" else _encoder


def denoiser(network: str) -> Callable[..., Tensor]:
    """From parameters, x_t, its level, z, whether to look at z, and a dtype to eps."""
    return _official_unet if network == "official" else _unet


def _allow_tf32(allowed: bool) -> None:
    """Whether float32 products may use it, as those of our side do by default on a GPU."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def _linear_schedule(num_steps: int) -> Tensors:
    """Amplitudes of step t at index t, for betas 1e-4 to 0.02."""
    betas = torch.linspace(1e-4, 0.02, num_steps + 1, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - betas, 0)
    levels = {
        "alpha": alpha_bar.sqrt(),
        "sigma": (1 - alpha_bar).sqrt(),
        "log_snr": torch.logit(alpha_bar),
        "position": torch.linspace(0, 1, num_steps + 1),
    }
    return {name: value.float() for name, value in levels.items()}


def _mixture_kl(mixture: Tensors, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log sum_c pi_c exp(-KL(q | N_c)) for each example, in nats."""
    ratio = log_variance[:, None] - mixture["variances"].log()
    distance = (mean[:, None] - mixture["means"]).square() / mixture["variances"]
    kl = 0.5 * (ratio.exp() + distance - 1 - ratio).sum(-1)
    return -torch.logsumexp(mixture["log_weights"] - kl, -1)


def _dense(p: Tensors, name: str, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype or x.dtype
    weight, bias = p[f"{name}/kernel"].to(dtype), p[f"{name}/bias"].to(dtype)
    return F.linear(x.to(dtype), weight, bias)


def _conv(p: Tensors, name: str, x: Tensor, dtype: torch.dtype, stride: int = 1) -> Tensor:
    weight, bias = p[f"{name}/kernel"].to(dtype), p[f"{name}/bias"].to(dtype)
    padding = weight.shape[-1] // 2
    return F.conv2d(x.to(dtype), weight, bias, stride=stride, padding=padding)


def _block_upsample(p: Tensors, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    weight, bias = p[f"{name}/kernel"].to(dtype), p[f"{name}/bias"].to(dtype)
    return F.conv_transpose2d(x.to(dtype), weight, bias, stride=weight.shape[-1])


def _norm(p: Tensors, name: str, x: Tensor, condition: Tensor | None = None) -> Tensor:
    channels = x.shape[1]
    groups = max(g for g in range(1, 9) if channels % g == 0)
    scale, shift = (p[f"{name}/{part}"].to(x.dtype) for part in ("scale", "bias"))
    y = F.group_norm(x, groups, scale, shift, 1e-6)
    if condition is None:
        return y
    affine = _dense(p, f"{name}/Dense_0", condition)[:, :, None, None].to(x.dtype)
    extra_scale, extra_shift = affine.chunk(2, 1)
    return y * (1 + extra_scale) + extra_shift


def _pad(x: Tensor, height: int, width: int) -> Tensor:
    pads = (0, width - x.shape[3], 0, height - x.shape[2])
    return F.pad(x, pads, mode="replicate") if any(pads) else x


def _block(p: Tensors, name: str, x: Tensor, dtype: torch.dtype, residual: bool = False) -> Tensor:
    first = F.gelu(_norm(p, f"{name}/Norm_0", _conv(p, f"{name}/Conv_0", x, dtype)))
    second = F.gelu(_norm(p, f"{name}/Norm_1", _conv(p, f"{name}/Conv_1", first, dtype)))
    if not residual:
        return second
    return ((x if x.shape[1] == second.shape[1] else first) + second) / 1.414


def _trunk(p: Tensors, name: str, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    size = -(-max(x.shape[2:]) // 4) * 4
    x = _block(p, f"{name}/_Block_0", _pad(x, size, size), dtype, residual=True)
    # Of equal maxima ours passes the gradient to the leftmost, this to the topmost; all else is the
    # same, and on images of noise there are none.
    down1 = F.max_pool2d(_block(p, f"{name}/_Block_1", x, dtype), 2)
    down2 = F.max_pool2d(_block(p, f"{name}/_Block_2", down1, dtype), 2)
    return x, down1, down2


def _embedding(p: Tensors, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    y = _dense(p, f"{name}/Dense_0", F.gelu(_dense(p, f"{name}/Dense_1", x)))
    return y[:, :, None, None].to(dtype)


def _official_encoder(p: Tensors, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _, _, down2 = _trunk(p, "encoder/_Trunk_0", x, dtype)
    hidden = F.gelu(down2.mean((2, 3))).float()
    return _dense(p, "encoder/Dense_0", hidden), _dense(p, "encoder/Dense_1", hidden)


def _official_unet(
    p: Tensors, x_t: Tensor, level: Tensor, z: Tensor, keep: Tensor, dtype: torch.dtype
) -> Tensor:
    root = "denoiser"
    height, width = x_t.shape[2:]
    z, t = z * keep[:, None], level[:, None]
    x, down1, down2 = _trunk(p, f"{root}/_Trunk_0", x_t, dtype)
    up = _block_upsample(
        p, f"{root}/BlockUpsample_0", F.gelu(down2.mean((2, 3), keepdim=True)), dtype
    )
    up = torch.relu(_norm(p, f"{root}/Norm_0", up))
    for level_number, skip in enumerate((down2, down1)):
        scale = _embedding(p, f"{root}/_Embedding_{2 * level_number}", z, dtype)
        shift = _embedding(p, f"{root}/_Embedding_{2 * level_number + 1}", t, dtype)
        up = torch.cat([scale * up + shift, skip], 1)
        up = _block_upsample(p, f"{root}/BlockUpsample_{level_number + 1}", up, dtype)
        for number in (2 * level_number, 2 * level_number + 1):
            up = _block(p, f"{root}/_Block_{number}", up, dtype)
    out = _conv(p, f"{root}/Conv_0", torch.cat([up, x], 1), dtype)
    out = _conv(p, f"{root}/Conv_1", torch.relu(_norm(p, f"{root}/Norm_1", out)), dtype)
    return out[:, :, :height, :width].float()


def _res_block(
    p: Tensors, name: str, x: Tensor, dtype: torch.dtype, condition: Tensor | None = None
) -> Tensor:
    y = _conv(p, f"{name}/Conv_0", F.silu(_norm(p, f"{name}/Norm_0", x)), dtype)
    y = _conv(p, f"{name}/Conv_1", F.silu(_norm(p, f"{name}/Norm_1", y, condition)), dtype)
    return (_conv(p, f"{name}/Conv_2", x, dtype) if x.shape[1] != y.shape[1] else x) + y


def _encoder(p: Tensors, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    levels = sum(f"encoder/down_{n}_0/Conv_0/kernel" in p for n in range(8))
    height, width = (-(-s // 2 ** (levels - 1)) * 2 ** (levels - 1) for s in x.shape[2:])
    x = _conv(p, "encoder/input", _pad(x, height, width), dtype)
    for level in range(levels):
        x = _res_block(p, f"encoder/down_{level}_0", x, dtype)
        if level + 1 < levels:
            x = _conv(p, f"encoder/halve_{level}", x, dtype, stride=2)
    x = F.silu(_norm(p, "encoder/Norm_0", x)).permute(0, 2, 3, 1).flatten(1)
    x = F.silu(_dense(p, "encoder/Dense_0", x, dtype)).float()
    log_variance = _dense(p, "encoder/Gaussian_0/Dense_0", x).clamp(-10.0, 4.0)
    return _dense(p, "encoder/Gaussian_0/mean", x), log_variance


def _condition(p: Tensors, name: str, log_snr: Tensor, z: Tensor, keep: Tensor) -> Tensor:
    wavelength = 4.0 * 20.0 ** (torch.arange(16, device=z.device) / 15)
    angle = log_snr[:, None] * (2 * torch.pi / wavelength)
    features = torch.cat([angle.sin(), angle.cos()], 1)
    level = _dense(p, f"{name}/Dense_0", F.silu(_dense(p, f"{name}/Dense_1", features)))
    latent = _dense(p, f"{name}/Dense_2", F.silu(_dense(p, f"{name}/Dense_3", z)))
    return F.silu(level + torch.where(keep[:, None] > 0, latent, p[f"{name}/null"]))


def _unet(
    p: Tensors, x_t: Tensor, level: Tensor, z: Tensor, keep: Tensor, dtype: torch.dtype
) -> Tensor:
    root = "denoiser"
    condition = _condition(p, f"{root}/condition", level, z, keep)
    levels = sum(f"{root}/down_{n}_0/Conv_0/kernel" in p for n in range(8))
    height, width = x_t.shape[2:]
    multiple = 2 ** (levels - 1)
    x = _pad(x_t, *(-(-s // multiple) * multiple for s in (height, width)))
    x = _conv(p, f"{root}/input", x, dtype)
    skips = []
    for number in range(levels):
        x = _res_block(p, f"{root}/down_{number}_0", x, dtype, condition)
        skips.append(x)
        if number + 1 < levels:
            x = _conv(p, f"{root}/halve_{number}", x, dtype, stride=2)
    for number in range(2):
        x = _res_block(p, f"{root}/middle_{number}", x, dtype, condition)
    for number in reversed(range(levels)):
        x = torch.cat([x, skips.pop()], 1)
        x = _res_block(p, f"{root}/up_{number}_0", x, dtype, condition)
        if number > 0:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = _conv(p, f"{root}/double_{number}", x, dtype)
    x = F.silu(_norm(p, f"{root}/output_norm", x))
    return _conv(p, f"{root}/output", x, dtype)[:, :, :height, :width].float()
