"""Import of Hugging Face diffusers' ``UNet2DModel``, without torch or diffusers.

``read`` takes a folder that diffusers saved, ``network`` makes the same function of it in JAX, and
``log_snr_grid`` the noise levels it was trained at. Only safetensors files are read: the older
``.bin`` files are pickles, which may run any code when they are opened.

What differs from ``networks/unet.py``: the time enters as a time step, not as a log-SNR; it is
added between the two convolutions of a residual block (or scales and shifts there); every level
but the last is halved after its blocks, and the result is a skip connection of its own, so that
the way up has one residual block more per level.

(1)  time features: sin(t w_k), cos(t w_k),  w_k = 10000^(-k / (m - freq_shift)),  k = 0 .. m - 1
(2)  linear:             beta_t = beta_start + (beta_end - beta_start) t / (T - 1),  t = 0 .. T - 1
(3)  scaled_linear:      sqrt(beta_t) likewise, between the square roots
(4)  squaredcos_cap_v2:  beta_t = min(1 - f(t + 1) / f(t), 0.999),
     f(t) = cos((t / T + 0.008) / 1.008 * pi / 2)^2
(5)  log-SNR of step t: log(abar_t / (1 - abar_t)),  abar_t = prod_{s <= t} (1 - beta_s)

Sources: (1, 2) Ho et al. 2020, "Denoising Diffusion Probabilistic Models"; (3) Rombach et al.
2022, "High-Resolution Image Synthesis with Latent Diffusion Models"; (4) Nichol and Dhariwal 2021,
"Improved Denoising Diffusion Probabilistic Models". The layout is that of diffusers, which the
tests compare with.
"""

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dec_diffusion.networks.layers import Conv, Network, Norm, as_network, average_pool, upsample
from dec_diffusion.types import Array, InputError, Params

WEIGHTS = "diffusion_pytorch_model.safetensors"

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "mish": jax.nn.mish,
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=False),
}

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")


class Imported(NamedTuple):
    """What ``read`` found.

    Attributes:
        architecture: JSON values: the fields of ``UNet2D`` by name, ``sample_size`` (what the
            folder says about the size of its images: an integer, a pair or None) and
            ``scheduler``, a dictionary of ``num_train_timesteps``, ``beta_start``, ``beta_end``,
            ``beta_schedule``, ``trained_betas`` and ``prediction_type`` (``epsilon``, ``sample``
            or ``v_prediction``).
        params: float32 NumPy arrays for ``network(architecture).apply``.
    """

    architecture: dict[str, Any]
    params: Params


def read(folder: str | os.PathLike[str]) -> Imported:
    """Read a folder saved by diffusers.

    The folder of a ``UNet2DModel``, or of a pipeline that has it in ``unet``. The scheduler is
    ``scheduler_config.json``, there or in ``scheduler`` beside or in that folder; without one, the
    betas of Ho et al. 2020 and the prediction of noise are taken for granted, the defaults of
    diffusers too. Weights of any floating type become float32.

    Raises:
        InputError: The folder or a file of it is missing or broken, the model is of another class
            or conditional on classes, an option or a block is not supported, a weight is missing,
            superfluous, not finite or of the wrong shape, or safetensors is not installed.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give one with config.json and {WEIGHTS}")
    unet = next((f for f in (root, root / "unet") if (f / "config.json").is_file()), None)
    if unet is None:
        raise InputError(
            f"{root}: no config.json there or in unet/; give a folder that save_pretrained wrote"
        )
    architecture = _read_config(unet / "config.json")
    places = (unet, unet / "scheduler", unet.parent / "scheduler")
    schedulers = [p / "scheduler_config.json" for p in places]
    architecture["scheduler"] = _read_scheduler(next((p for p in schedulers if p.is_file()), None))
    return Imported(architecture, _read_weights(unet, architecture))


def network(architecture: Mapping[str, Any]) -> Network:
    """The network of an imported ``architecture``; see ``UNet2D`` for what it takes and returns."""
    return as_network(_module(architecture))


def log_snr_grid(architecture: Mapping[str, Any]) -> np.ndarray:
    """Log-SNR of every time step, float64 [T], equation (5).

    Raises:
        InputError: The scheduler's schedule is not one of equations (2) to (4), or a beta is
            outside of (0, 1).
    """
    return _log_snr(architecture["scheduler"], "scheduler")


# -- the network --


class Resnet(nn.Module):
    """Residual block: norm, activation, convolution, time, norm, activation, convolution.

    Attributes:
        features: channels of the output.
        groups: of the norms.
        eps: of the norms.
        act: the activation.
        scale_shift: the time scales and shifts the second norm's output, instead of adding to its
            input.
        divide: the sum of block and skip is divided by this.
        resample: halves or doubles the resolution, after the first activation and of the skip.
    """

    features: int
    groups: int
    eps: float
    act: Callable[[Array], Array]
    scale_shift: bool = False
    divide: float = 1.0
    resample: Callable[[Array], Array] = lambda x: x

    @nn.compact
    def __call__(self, x: Array, time: Array) -> Array:
        width = self.features * (2 if self.scale_shift else 1)
        time = nn.Dense(width, name="time_emb_proj")(time)[:, None, None]
        y = self.act(_norm(x, self.groups, self.eps, "norm1"))
        y = Conv(self.features, name="conv1")(self.resample(y))
        if self.scale_shift:
            scale, shift = jnp.split(time, 2, axis=-1)
            y = _norm(y, self.groups, self.eps, "norm2") * (1 + scale) + shift
        else:
            y = _norm(y + time, self.groups, self.eps, "norm2")
        y = Conv(self.features, name="conv2")(self.act(y))
        skip = self.resample(x)
        if skip.shape[-1] != self.features:
            skip = Conv(self.features, size=1, name="conv_shortcut")(skip)
        return (skip + y) / self.divide


class Attention(nn.Module):
    """Residual self-attention over the pixels; ``head`` channels each, no norm if no groups."""

    head: int
    groups: int | None
    eps: float
    divide: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        y = x.reshape(b, h * w, c)
        if self.groups is not None:
            y = _norm(y, self.groups, self.eps, "group_norm")
        q, k, v = (
            nn.Dense(c, name=name)(y).reshape(b, h * w, c // self.head, self.head)
            for name in ("to_q", "to_k", "to_v")
        )
        y = jax.nn.dot_product_attention(q, k, v).reshape(b, h, w, c)
        return (x + nn.Dense(c, name="to_out")(y)) / self.divide


class Halve(nn.Module):
    """Convolution of stride 2, padded on all sides, or (``padding`` 0) only below and right."""

    padding: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = Conv(x.shape[-1], stride=2, name="conv")
        if self.padding:
            return conv(x)
        # The layer pads all sides. One more pixel above and left moves its windows to where they
        # belong, one place later, and the first place is dropped.
        return conv(jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0))))[:, 1:, 1:]


class Double(nn.Module):
    """Nearest-neighbour enlargement, then a convolution."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return Conv(x.shape[-1], name="conv")(upsample(x))


class TimeEmbedding(nn.Module):
    """Features of equation (1), then two linear maps; ``sin`` first unless ``flip``."""

    inputs: int
    features: int
    flip: bool
    shift: float

    @nn.compact
    def __call__(self, t: Array) -> Array:
        half = self.inputs // 2
        # Rounded step by step in float32, as the network was trained: the phase is up to 1000
        # times as far off as the frequency.
        exponent = np.float32(-math.log(10_000)) * np.arange(half, dtype=np.float32)
        angle = t.astype(jnp.float32)[:, None] * np.exp(exponent / np.float32(half - self.shift))
        parts = [jnp.sin(angle), jnp.cos(angle)]
        y = jnp.concatenate(parts[::-1] if self.flip else parts, axis=-1)
        y = jnp.pad(y, ((0, 0), (0, self.inputs % 2)))
        y = nn.Dense(self.features, name="linear_1")(y)
        return nn.Dense(self.features, name="linear_2")(nn.silu(y))


class UNet2D(nn.Module):
    """The function of diffusers' ``UNet2DModel`` with the same options; dropout is left out.

    Attributes:
        in_channels: of the images.
        out_channels: of the output; the same.
        center_input_sample: the images are in [0, 1] and are first mapped to [-1, 1].
        flip_sin_to_cos: order of the time features.
        freq_shift: of the time features, equation (1).
        time_embedding_dim: width of the embedded time; None is 4 times the first level's.
        down_block_types: of each level on the way down, of ``DOWN_BLOCKS``.
        mid_block_type: ``UNetMidBlock2D``, or None for no middle.
        up_block_types: of each level on the way up, lowest resolution first, of ``UP_BLOCKS``.
        block_out_channels: channels of each level.
        layers_per_block: residual blocks per level on the way down.
        mid_block_scale_factor: the sums in the middle are divided by this.
        downsample_padding: 1 on all sides, 0 below and right only.
        downsample_type: ``conv`` or ``resnet``, after blocks with attention.
        upsample_type: likewise.
        act_fn: one of ``ACTIVATIONS``.
        attention_head_dim: channels per head; None is one head.
        norm_num_groups: of all norms.
        attn_norm_num_groups: of the norm of the middle's attention; None is ``norm_num_groups``,
            or no norm where the time scales and shifts.
        norm_eps: of all norms.
        resnet_time_scale_shift: ``default`` or ``scale_shift``.
        add_attention: whether the middle attends.
    """

    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    time_embedding_dim: int | None = None
    down_block_types: tuple[str, ...] = ("DownBlock2D", *("AttnDownBlock2D",) * 3)
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = (*("AttnUpBlock2D",) * 3, "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True

    @nn.compact
    def __call__(self, x: Array, t: Array, *, features: bool = False) -> Any:
        """Predict what the scheduler's ``prediction_type`` says: the noise, as a rule.

        Args:
            x: noisy images [b, h, w, c] in [-1, 1]; each halving must divide h and w by two.
            t: time step of each image [b], integer or fractional, 0 is the cleanest.
            features: also return the activations after every block with its attention, by name:
                ``down_0_0``, ``middle``, ``up_0_2``, ...; the first number is the block's place
                in diffusers' lists, so that ``up_0`` has the lowest resolution.

        Returns:
            float32 [b, h, w, c], or a pair of it and the dictionary of features.

        Raises:
            InputError: The images' size or number of channels does not suit the network.
        """
        last = len(self.block_out_channels) - 1
        _check_images(x.shape, self.in_channels, 2**last)
        act, groups, eps = ACTIVATIONS[self.act_fn], self.norm_num_groups, self.norm_eps
        scale_shift = self.resnet_time_scale_shift == "scale_shift"
        resnet = functools.partial(Resnet, groups=groups, eps=eps, act=act, scale_shift=scale_shift)

        def block(x: Array, channels: int, kind: str, name: str) -> Array:
            x = resnet(channels, name=name)(x, time)
            if kind.startswith("Attn"):
                head = self.attention_head_dim or channels
                x = Attention(head, groups, eps, name=f"attend_{name}")(x)
            named[name] = x
            return x

        named: dict[str, Array] = {}
        first = self.block_out_channels[0]
        width = self.time_embedding_dim or 4 * first
        time = TimeEmbedding(first, width, self.flip_sin_to_cos, self.freq_shift, name="time")(t)
        time = act(time)
        x = x.astype(jnp.float32)
        x = Conv(first, name="input")(2 * x - 1 if self.center_input_sample else x)
        skips = [x]
        for level, kind in enumerate(self.down_block_types):
            channels = self.block_out_channels[level]
            for i in range(self.layers_per_block):
                x = block(x, channels, kind, f"down_{level}_{i}")
                skips.append(x)
            if level < last:
                if _by_resnet(kind, self.downsample_type):
                    half = functools.partial(average_pool, factor=2)
                    x = resnet(channels, resample=half, name=f"halve_{level}")(x, time)
                else:
                    x = Halve(self.downsample_padding, name=f"halve_{level}")(x)
                skips.append(x)
        if self.mid_block_type is not None:
            channels, divide = x.shape[-1], self.mid_block_scale_factor
            x = resnet(channels, divide=divide, name="middle_0")(x, time)
            if self.add_attention:
                head = self.attention_head_dim or channels
                inner = self.attn_norm_num_groups or (None if scale_shift else groups)
                x = Attention(head, inner, eps, divide, name="attend_middle")(x)
            x = resnet(channels, divide=divide, name="middle_1")(x, time)
            named["middle"] = x
        for level, kind in enumerate(self.up_block_types):
            channels = self.block_out_channels[last - level]
            for i in range(self.layers_per_block + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block(x, channels, kind, f"up_{level}_{i}")
            if level < last:
                if _by_resnet(kind, self.upsample_type):
                    x = resnet(channels, resample=upsample, name=f"double_{level}")(x, time)
                else:
                    x = Double(name=f"double_{level}")(x)
        x = nn.silu(_norm(x, groups, eps, "output_norm"))
        out = Conv(self.out_channels, name="output")(x)
        return (out, named) if features else out


def _norm(x: Array, groups: int, eps: float, name: str) -> Array:
    # The layer adds 1e-6 to the variance. Scaling what goes in scales its variance only.
    return Norm(groups, name=name)(x if eps == 1e-6 else x * math.sqrt(1e-6 / eps))


def _by_resnet(kind: str, sampling: str) -> bool:
    return kind.startswith("Resnet") or (kind.startswith("Attn") and sampling == "resnet")


def _check_images(shape: tuple[int, ...], channels: int, multiple: int) -> None:
    _, height, width, found = shape
    if found != channels:
        raise InputError(
            f"images have {found} channels and the diffusers network takes {channels}: choose data"
            " or a network that fits the other"
        )
    if height % multiple or width % multiple:
        raise InputError(
            f"images of {height}x{width} do not suit the diffusers network: pad or resize them to"
            f" multiples of {multiple} pixels"
        )


def _module(architecture: Mapping[str, Any]) -> UNet2D:
    values: dict[str, Any] = {name: architecture[name] for name in _defaults()}
    for name in ("down_block_types", "up_block_types", "block_out_channels"):
        values[name] = tuple(values[name])
    return UNet2D(**values)


def _defaults() -> dict[str, Any]:
    """Options of ``UNet2D`` and their defaults, which are those of diffusers."""
    fields = {f.name: f.default for f in dataclasses.fields(UNet2D)}
    return {name: value for name, value in fields.items() if name not in ("parent", "name")}


# -- config.json --

# Options with few values, what else there is being refused.
_CHOICES: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": tuple(ACTIVATIONS),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "center_input_sample": (False, True),
    "flip_sin_to_cos": (False, True),
    "add_attention": (False, True),
}
_COUNTS = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups")
_OPTIONAL_COUNTS = ("attention_head_dim", "attn_norm_num_groups", "time_embedding_dim")

# Options without influence here: for training, or the bookkeeping of averaged weights.
_IGNORED = {
    "dropout", "num_train_timesteps", "decay", "inv_gamma", "min_decay", "optimization_step",
    "power", "update_after_step", "use_ema_warmup",
}  # fmt: skip


def _read_config(path: Path) -> dict[str, Any]:
    found = _read_json(path)
    kind = found.get("_class_name")
    if kind != "UNet2DModel":
        raise InputError(f"{path}: _class_name is {kind!r}; only UNet2DModel can be imported")
    for name in ("num_class_embeds", "class_embed_type"):
        if found.pop(name, None) is not None:
            raise InputError(
                f"{path}: {name} makes it a class-conditional model, which needs labels; choose an"
                " unconditional one"
            )
    defaults = {**_defaults(), "time_embedding_type": "positional", "sample_size": None}
    for name, value in found.items():
        known = name in defaults or name in _IGNORED or name.startswith("_")
        if not known and value is not None:
            raise InputError(
                f"{path}: unknown option {name}={value!r}; remove it if the model does not need it"
            )
    values = {**defaults, **{k: v for k, v in found.items() if k in defaults}}
    for name in ("downsample_type", "upsample_type"):
        values[name] = values[name] or "conv"
    values = json.loads(json.dumps(values))
    for name in ("down_block_types", "up_block_types"):
        if isinstance(values[name], list):
            # Blocks had a longer name in the first versions.
            values[name] = [
                kind.removeprefix("UNetRes") if isinstance(kind, str) else kind
                for kind in values[name]
            ]
    _check_config(values, path)
    del values["time_embedding_type"]
    return values


def _check_config(values: Mapping[str, Any], path: Path) -> None:
    def refuse(name: str, remedy: str) -> InputError:
        return InputError(f"{path}: {name}={values[name]!r} is not supported; {remedy}")

    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise refuse(name, f"choose a model with {' or '.join(map(repr, choices))}")
    for name in (*_COUNTS, *_OPTIONAL_COUNTS):
        if not (_is_count(values[name]) or (values[name] is None and name in _OPTIONAL_COUNTS)):
            raise refuse(name, "it must be a positive integer")
    for name in ("norm_eps", "mid_block_scale_factor"):
        if not (_is_number(values[name]) and values[name] > 0):
            raise refuse(name, "it must be a positive number")
    if values["out_channels"] != values["in_channels"]:
        raise refuse("out_channels", "it must equal in_channels, one prediction for each")
    channels = values["block_out_channels"]
    if not (isinstance(channels, list) and channels and all(map(_is_count, channels))):
        raise refuse("block_out_channels", "it must be a list of positive integers")
    for name, kinds in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        blocks = values[name]
        if not (isinstance(blocks, list) and len(blocks) == len(channels)):
            raise refuse(name, f"it must name {len(channels)} blocks, as block_out_channels has")
        for kind in blocks:
            if kind not in kinds:
                raise InputError(
                    f"{path}: {name} has {kind!r}, which is not supported; choose a model of"
                    f" {', '.join(kinds)}"
                )
    if any(c % values["norm_num_groups"] for c in channels):
        raise refuse("norm_num_groups", f"it must divide block_out_channels {channels}")
    if channels[-1] % (values["attn_norm_num_groups"] or 1):
        raise refuse("attn_norm_num_groups", f"it must divide {channels[-1]} channels")
    attending = {
        c
        for c, down, up in zip(
            channels, values["down_block_types"], reversed(values["up_block_types"]), strict=True
        )
        if "Attn" in down + up
    } | ({channels[-1]} if values["add_attention"] and values["mid_block_type"] else set())
    if any(c % (values["attention_head_dim"] or 1) for c in attending):
        raise refuse("attention_head_dim", f"it must divide {sorted(attending)} channels")
    if not (_is_number(values["freq_shift"]) and values["freq_shift"] < channels[0] // 2):
        raise refuse("freq_shift", f"it must be less than {channels[0] // 2}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON; save the model again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: is not a JSON object; save the model again")
    return found


# -- the scheduler --


def _read_scheduler(path: Path | None) -> dict[str, Any]:
    values: dict[str, Any] = {
        "num_train_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "trained_betas": None,
        "prediction_type": "epsilon",
    }
    if path is None:
        return values
    found = _read_json(path)
    if "beta_schedule" not in found:
        raise InputError(
            f"{path}: {found.get('_class_name')!r} has no beta_schedule; choose a model trained"
            " with a DDPMScheduler"
        )
    if found.get("rescale_betas_zero_snr"):
        raise InputError(f"{path}: rescale_betas_zero_snr=True is not supported; choose another")
    values |= {name: value for name, value in found.items() if name in values}
    predictions = ("epsilon", "sample", "v_prediction")
    if values["prediction_type"] not in predictions:
        raise InputError(
            f"{path}: prediction_type={values['prediction_type']!r} is not supported; choose a"
            f" model with {' or '.join(map(repr, predictions))}"
        )
    _log_snr(values, path)
    return values


def _log_snr(scheduler: Mapping[str, Any], source: Path | str) -> np.ndarray:
    """Equation (5); ``source`` is where errors say that the values are from."""
    steps, kind = scheduler["num_train_timesteps"], scheduler["beta_schedule"]
    ends = scheduler["beta_start"], scheduler["beta_end"]
    if not _is_count(steps):
        raise InputError(f"{source}: num_train_timesteps={steps!r} must be a positive integer")
    if scheduler["trained_betas"] is not None:
        kind, given = "trained_betas", scheduler["trained_betas"]
        if not (isinstance(given, list) and len(given) == steps and all(map(_is_number, given))):
            raise InputError(f"{source}: trained_betas must be {steps} numbers, one per time step")
        betas = np.asarray(given, np.float64)
    elif kind == "squaredcos_cap_v2":
        u = np.arange(steps + 1) / steps
        curve = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
    elif kind not in ("linear", "scaled_linear"):
        raise InputError(
            f"{source}: beta_schedule={kind!r} is not supported; choose a model with 'linear',"
            " 'scaled_linear' or 'squaredcos_cap_v2', or give its trained_betas"
        )
    elif not all(_is_number(end) and 0 < end < 1 for end in ends):
        raise InputError(f"{source}: beta_start and beta_end are {ends}, not both within (0, 1)")
    elif kind == "linear":
        betas = np.linspace(ends[0], ends[1], steps)
    else:
        betas = np.linspace(ends[0] ** 0.5, ends[1] ** 0.5, steps) ** 2
    if not np.all((betas > 0) & (betas < 1)):
        raise InputError(f"{source}: {kind} has values that are not within (0, 1)")
    log_alpha_bar = np.cumsum(np.log1p(-betas))
    return log_alpha_bar - np.log(-np.expm1(log_alpha_bar))


# -- the weights --

# Modules here and in diffusers; what is inside of them has the same names.
_MODULES = (
    (r"input", "conv_in"),
    (r"time", "time_embedding"),
    (r"(down|up)_(\d+)_(\d+)", r"\1_blocks.\2.resnets.\3"),
    (r"attend_(down|up)_(\d+)_(\d+)", r"\1_blocks.\2.attentions.\3"),
    (r"halve_(\d+)", r"down_blocks.\1.downsamplers.0"),
    (r"middle_(\d)", r"mid_block.resnets.\1"),
    (r"attend_middle", "mid_block.attentions.0"),
    (r"double_(\d+)", r"up_blocks.\1.upsamplers.0"),
    (r"output_norm", "conv_norm_out"),
    (r"output", "conv_out"),
)
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "to_out": "to_out.0"}

# Names of attention's linear maps before version 0.16 of diffusers.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _read_weights(folder: Path, architecture: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / WEIGHTS
    found = _load(path)
    old = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)")
    found = {old.sub(lambda match: _OLD_NAMES[match[0]], key): a for key, a in found.items()}
    module = as_network(_module(architecture))
    size = 2 ** (len(architecture["block_out_channels"]) - 1)

    def init() -> Params:
        images = jnp.zeros((1, size, size, architecture["in_channels"]))
        return module.init(jax.random.key(0), images, jnp.zeros(1))

    # The module says which parameters there are: nothing is computed.
    expected: dict[Any, Any] = traverse_util.flatten_dict(dict(jax.eval_shape(init)))
    keys = {place: _torch_key(place) for place in expected}
    remedy = "config.json and the weights must be of one model; save it again"
    for problem, names in (
        ("missing", sorted(set(keys.values()) - found.keys())),
        ("unknown", sorted(found.keys() - set(keys.values()))),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{path}: weight {names[0]}{more} {problem}; {remedy}")
    params = {}
    for place, leaf in expected.items():
        key, array = keys[place], found[keys[place]]
        # Convolutions are OIHW there and HWIO here, linear maps are transposed.
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
        shape = tuple(leaf.shape[i] for i in axes)
        if array.shape != shape:
            raise InputError(f"{path}: weight {key} has shape {array.shape}, not {shape}; {remedy}")
        if not np.isfinite(array).all():
            raise InputError(f"{path}: weight {key} has values that are not finite; train again")
        params[place] = np.ascontiguousarray(array.transpose(np.argsort(axes)), np.float32)
    return traverse_util.unflatten_dict(params)


def _torch_key(path: tuple[str, ...]) -> str:
    module, *inner = path
    for pattern, name in _MODULES:
        if match := re.fullmatch(pattern, module):
            return ".".join([match.expand(name), *(_LEAVES.get(part, part) for part in inner)])
    raise AssertionError(f"no name for {module}")


def _load(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        # Recognised by their names only: a pickle may run any code, so it is never opened.
        others = sorted(p.name for p in path.parent.glob("*.bin"))
        shards = path.parent / f"{WEIGHTS}.index.json"
        if others:
            raise InputError(
                f"{path.parent}: has its weights in {others[0]}, a pickle, which is never opened;"
                " if you trust it, load it with diffusers' UNet2DModel.from_pretrained and save it"
                " with save_pretrained(..., safe_serialization=True)"
            )
        if shards.is_file():
            raise InputError(
                f"{shards}: weights in several files are not supported; save the model again with"
                " save_pretrained(..., max_shard_size='100GB')"
            )
        raise InputError(f"{path}: no such file; save the model again with save_pretrained")
    try:
        import safetensors
        from safetensors.numpy import load_file
    except ImportError as error:
        raise InputError(
            f"{path}: reading it needs safetensors; pip install 'dec_diffusion[diffusers]'"
        ) from error
    try:
        arrays = load_file(path)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be read as safetensors; fetch or save it again"
        ) from error
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}
