class Worker:
    """The same step in PyTorch: fused Adam, multi-tensor clipping and averaging, no host syncs."""

    def probe(self, platform: str) -> None:
        """Import PyTorch.

        Raises:
            WorkerError: there is none, or not for this platform; says what to do.
        """
        _import_torch()
        if platform not in ("cpu", "gpu"):
            raise WorkerError(f"nothing to compare on a {platform}; use --device=cpu")
        if platform == "gpu" and not torch.cuda.is_available():
            raise WorkerError("its build sees no GPU; install one for CUDA, or use --device=cpu")

    def start(self, path: str, **settings: Any) -> dict[str, Any]:
        """Take over our weights, and choose the memory layout."""
        device = {"cpu": "cpu", "gpu": "cuda"}[settings["device"]]
        torch.set_num_threads(_cpus())
        torch.backends.cudnn.benchmark = True
        self.settings, self.device = settings, torch.device(device)
        self.dtype = getattr(torch, settings["dtype"])
        layouts = {"best": ["nchw", "nhwc"]}.get(settings["layout"], [settings["layout"]])
        with np.load(path) as file:
            arrays = dict(file)
        # The first trial of a layout also warms it up.
        trials = {x: [self._prepare(x, arrays) or self._eager(2) for _ in "ab"] for x in layouts}
        seconds = {layout: trial[-1]["seconds"] for layout, trial in trials.items()}
        self.layout = min(seconds, key=lambda layout: seconds[layout])
        self._prepare(self.layout, arrays)
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        return {
            "platform": "gpu" if device == "cuda" else "cpu",
            "device": name,
            "layout": self.layout,
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in self.params.values()),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }

    def check(self, path: str) -> dict[str, Any]:
        """Compare with what ``JaxWorker.export`` wrote: errors, each relative to the largest value.

        The error of ``gradient`` is the norm of the difference over the norm, for all parameters
        together.
        """
        with np.load(path) as file:
            ours = dict(file)
        convert = self._converter()
        std = np.exp(0.5 * ours["log_variance"])
        steps = np.argmin(
            np.abs(ours["log_snr"][:, None] - self.levels["log_snr"].cpu().numpy()), 1
        )
        noise = {
            "z": convert((ours["z"] - ours["mean"]) / std),
            "eps": convert(ours["eps"]),
            "keep": convert(ours["keep"]),
            "step": torch.as_tensor(steps, device=self.device),
        }
        x = convert(ours["x"])
        with _full_precision():
            loss, seen = self._loss(self.params, x, noise, torch.float32)
            grads = torch.autograd.grad(loss, list(self.params.values()))
        theirs = {name: value.detach().cpu().numpy() for name, value in seen.items()}
        theirs["prediction"] = theirs["prediction"].transpose(0, 2, 3, 1)
        theirs["loss"] = loss.detach().cpu().numpy()
        errors = {
            name: float(np.abs(theirs[name] - ours[name]).max() / np.abs(ours[name]).max())
            for name in ("mean", "log_variance", "level", "prediction", "loss")
        }
        expected = [convert(ours[f"grads/{name}"], name).double() for name in self.params]
        difference = sum(((a - b) ** 2).sum() for a, b in zip(grads, expected, strict=True))
        errors["gradient"] = float((difference / sum((b**2).sum() for b in expected)) ** 0.5)
        passed = all(error <= TOLERANCE for error in errors.values())
        return {"passed": passed, "tolerance": TOLERANCE, "relative_errors": errors}

    def run(self, contender: str, steps: int) -> dict[str, float]:
        """Take ``steps`` gradient steps."""
        if contender == "torch_eager":
            return self._eager(steps)
        if self.compiled is None:
            self.compiled = torch.compile(self._training_loss, mode=self.settings["compile_mode"])
        return self._take(self.compiled, steps)

    def _eager(self, steps: int) -> dict[str, float]:
        return self._take(self._training_loss, steps)

    def _take(self, loss_of: Callable[..., Any], steps: int) -> dict[str, float]:
        def work() -> float:
            loss = None
            for index in self._order(steps):
                self.optimizer.zero_grad(set_to_none=True)
                loss = loss_of(self.params, index)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.leaves, 1000.0, foreach=True)
                self.optimizer.step()
                decay = min(0.99, (1 + self.step) / (10 + self.step))
                with torch.no_grad():
                    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                        self.averages, self.leaves, 1 - decay
                    )
                self.step += 1
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            assert loss is not None
            return float(loss.detach())

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        timing = _timed(work)
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else _peak_host_mib()
        return timing | {"peak_mib": peak}

    def _prepare(self, layout: str, arrays: dict[str, np.ndarray]) -> None:
        """Our weights and data in this layout, and a fresh optimiser."""
        self.layout = layout
        convert = self._converter()
        names = [name for name in arrays if name.startswith("params/")]
        self.params = {
            (short := name.removeprefix("params/")): convert(arrays[name], short).requires_grad_()
            for name in names
        }
        self.leaves = list(self.params.values())
        self.averages = [p.detach().clone() for p in self.leaves]
        self.optimizer = torch.optim.Adam(self.leaves, lr=1e-4, betas=(0.9, 0.99), fused=True)
        self.raw = convert(_images(self.settings))
        self.mixture = {
            name.removeprefix("mixture/"): convert(value)
            for name, value in arrays.items()
            if name.startswith("mixture/")
        }
        self.kl_weight = float(arrays["kl_weight"])
        self.levels = _linear_schedule(self.settings["num_steps"], self.device)
        self.pending: list[Any] = []
        self.step, self.compiled = 0, None

    def _converter(self) -> Callable[..., Any]:
        """From an array of ours to a tensor in this layout."""

        def convert(array: np.ndarray, name: str = "") -> Any:
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

        return convert

    def _order(self, steps: int) -> Iterator[Any]:
        """Batches of example numbers, from a new permutation in every epoch."""
        n, batch_size = self.settings["num_examples"], self.settings["batch_size"]
        for _ in range(steps):
            if not self.pending:
                order = torch.randperm(n, device=self.device)[: n // batch_size * batch_size]
                self.pending = list(order.split(batch_size))
            yield self.pending.pop()

    def _training_loss(self, params: Tensors, index: Any) -> Any:
        x = (self.raw[index].float() - 127.5) / 127.5
        b = x.shape[0]
        noise = {
            "z": torch.randn(b, self.settings["latent"], device=x.device),
            "eps": torch.randn_like(x),
            "keep": (torch.rand(b, device=x.device) < 0.9).float(),
            "step": torch.randint(1, self.settings["num_steps"] + 1, (b,), device=x.device),
        }
        return self._loss(params, x, noise, self.dtype)[0]

    def _loss(self, params: Tensors, x: Any, noise: Tensors, dtype: Any) -> tuple[Any, Tensors]:
        encode, denoise = {
            "official": (_official_encoder, _official_unet),
            "unet": (_encoder, _unet),
        }[self.settings["network"]]
        mean, log_variance = encode(params, x, dtype)
        z = mean + torch.exp(0.5 * log_variance) * noise["z"]
        step = noise["step"]
        alpha, sigma = (self.levels[n][step][:, None, None, None] for n in ("alpha", "sigma"))
        x_t = alpha * x + sigma * noise["eps"]
        name = "position" if self.settings["network"] == "official" else "log_snr"
        level = self.levels[name][step]
        prediction = denoise(params, x_t, level, z, noise["keep"], dtype)
        error = (noise["eps"] - prediction).square().sum((1, 2, 3))
        kl = _mixture_kl(self.mixture, mean, log_variance)
        loss = error.mean() + self.kl_weight * kl.mean()
        seen = {"mean": mean, "log_variance": log_variance, "level": level}
        return loss, seen | {"prediction": prediction}


def _linear_schedule(num_steps: int, device: Any) -> Tensors:
    """Amplitudes of step t at index t, for betas 1e-4 to 0.02."""
    betas = torch.linspace(1e-4, 0.02, num_steps + 1, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - betas, 0)
    levels = {
        "alpha": alpha_bar.sqrt(),
        "sigma": (1 - alpha_bar).sqrt(),
        "log_snr": torch.logit(alpha_bar),
        "position": torch.linspace(0, 1, num_steps + 1),
    }
    return {name: value.float().to(device) for name, value in levels.items()}


def _mixture_kl(mixture: Tensors, mean: Any, log_variance: Any) -> Any:
    """-log sum_c pi_c exp(-KL(q | N_c)) for each example, in nats."""
    ratio = log_variance[:, None] - mixture["variances"].log()
    distance = (mean[:, None] - mixture["means"]).square() / mixture["variances"]
    kl = 0.5 * (ratio.exp() + distance - 1 - ratio).sum(-1)
    return -torch.logsumexp(mixture["log_weights"] - kl, -1)


def _dense(p: Tensors, name: str, x: Any, dtype: Any = None) -> Any:
    dtype = dtype or x.dtype
    weight, bias = p[f"{name}/kernel"].to(dtype), p[f"{name}/bias"].to(dtype)
    return F.linear(x.to(dtype), weight, bias)


def _conv(p: Tensors, name: str, x: Any, dtype: Any, stride: int = 1) -> Any:
    weight, bias = p[f"{name}/kernel"].to(dtype), p[f"{name}/bias"].to(dtype)
    padding = weight.shape[-1] // 2
    return F.conv2d(x.to(dtype), weight, bias, stride=stride, padding=padding)


def _block_upsample(p: Tensors, name: str, x: Any, dtype: Any) -> Any:
    weight, bias = p[f"{name}/kernel"].to(dtype), p[f"{name}/bias"].to(dtype)
    return F.conv_transpose2d(x.to(dtype), weight, bias, stride=weight.shape[-1])


def _norm(p: Tensors, name: str, x: Any, condition: Any = None) -> Any:
    channels = x.shape[1]
    groups = max(g for g in range(1, 9) if channels % g == 0)
    scale, shift = (p[f"{name}/{part}"].to(x.dtype) for part in ("scale", "bias"))
    y = F.group_norm(x, groups, scale, shift, 1e-6)
    if condition is None:
        return y
    affine = _dense(p, f"{name}/Dense_0", condition)[:, :, None, None].to(x.dtype)
    extra_scale, extra_shift = affine.chunk(2, 1)
    return y * (1 + extra_scale) + extra_shift


def _gelu(x: Any) -> Any:
    return F.gelu(x, approximate="tanh")


def _pad(x: Any, height: int, width: int) -> Any:
    pads = (0, width - x.shape[3], 0, height - x.shape[2])
    return F.pad(x, pads, mode="replicate") if any(pads) else x


def _block(p: Tensors, name: str, x: Any, dtype: Any, residual: bool = False) -> Any:
    first = _gelu(_norm(p, f"{name}/Norm_0", _conv(p, f"{name}/Conv_0", x, dtype)))
    second = _gelu(_norm(p, f"{name}/Norm_1", _conv(p, f"{name}/Conv_1", first, dtype)))
    if not residual:
        return second
    return ((x if x.shape[1] == second.shape[1] else first) + second) / 1.414


def _trunk(p: Tensors, name: str, x: Any, dtype: Any) -> tuple[Any, Any, Any]:
    size = -(-max(x.shape[2:]) // 4) * 4
    pool = F.max_pool2d
    x = _block(p, f"{name}/_Block_0", _pad(x, size, size), dtype, residual=True)
    down1 = pool(_block(p, f"{name}/_Block_1", x, dtype), 2)
    down2 = pool(_block(p, f"{name}/_Block_2", down1, dtype), 2)
    return x, down1, down2


def _embedding(p: Tensors, name: str, x: Any, dtype: Any) -> Any:
    y = _dense(p, f"{name}/Dense_0", _gelu(_dense(p, f"{name}/Dense_1", x)))
    return y[:, :, None, None].to(dtype)


def _official_encoder(p: Tensors, x: Any, dtype: Any) -> tuple[Any, Any]:
    _, _, down2 = _trunk(p, "encoder/_Trunk_0", x, dtype)
    hidden = _gelu(down2.mean((2, 3))).float()
    return _dense(p, "encoder/Dense_0", hidden), _dense(p, "encoder/Dense_1", hidden)


def _official_unet(p: Tensors, x_t: Any, level: Any, z: Any, keep: Any, dtype: Any) -> Any:
    root = "denoiser"
    height, width = x_t.shape[2:]
    z, t = z * keep[:, None], level[:, None]
    x, down1, down2 = _trunk(p, f"{root}/_Trunk_0", x_t, dtype)
    up = _block_upsample(
        p, f"{root}/BlockUpsample_0", _gelu(down2.mean((2, 3), keepdim=True)), dtype
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


def _silu(x: Any) -> Any:
    return F.silu(x)


def _res_block(p: Tensors, name: str, x: Any, dtype: Any, condition: Any = None) -> Any:
    y = _conv(p, f"{name}/Conv_0", _silu(_norm(p, f"{name}/Norm_0", x)), dtype)
    y = _conv(p, f"{name}/Conv_1", _silu(_norm(p, f"{name}/Norm_1", y, condition)), dtype)
    return (_conv(p, f"{name}/Conv_2", x, dtype) if x.shape[1] != y.shape[1] else x) + y


def _encoder(p: Tensors, x: Any, dtype: Any) -> tuple[Any, Any]:
    levels = sum(f"encoder/down_{n}_0/Conv_0/kernel" in p for n in range(8))
    height, width = (-(-s // 2 ** (levels - 1)) * 2 ** (levels - 1) for s in x.shape[2:])
    x = _conv(p, "encoder/input", _pad(x, height, width), dtype)
    for level in range(levels):
        x = _res_block(p, f"encoder/down_{level}_0", x, dtype)
        if level + 1 < levels:
            x = _conv(p, f"encoder/halve_{level}", x, dtype, stride=2)
    x = _silu(_norm(p, "encoder/Norm_0", x)).permute(0, 2, 3, 1).flatten(1)
    x = _silu(_dense(p, "encoder/Dense_0", x, dtype)).float()
    log_variance = _dense(p, "encoder/Gaussian_0/Dense_0", x).clamp(-10.0, 4.0)
    return _dense(p, "encoder/Gaussian_0/mean", x), log_variance


def _condition(p: Tensors, name: str, log_snr: Any, z: Any, keep: Any) -> Any:
    wavelength = 4.0 * 20.0 ** (torch.arange(16, device=z.device) / 15)
    angle = log_snr[:, None] * (2 * torch.pi / wavelength)
    features = torch.cat([angle.sin(), angle.cos()], 1)
    level = _dense(p, f"{name}/Dense_0", _silu(_dense(p, f"{name}/Dense_1", features)))
    latent = _dense(p, f"{name}/Dense_2", _silu(_dense(p, f"{name}/Dense_3", z)))
    return _silu(level + torch.where(keep[:, None] > 0, latent, p[f"{name}/null"]))


def _unet(p: Tensors, x_t: Any, level: Any, z: Any, keep: Any, dtype: Any) -> Any:
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
    x = _silu(_norm(p, f"{root}/output_norm", x))
    return _conv(p, f"{root}/output", x, dtype)[:, :, :height, :width].float()
