"""Score networks, small to large, behind one interface: model(x, sigma) -> denoised.

    model = load_model("checkpoints/score_cifar10.pt")
    denoised = model(x, 0.1)        # E[x0 | x], the minimum-mean-squared-error estimate
    score = model.score(x, 0.1)     # grad log p_sigma(x) = (denoised - x) / sigma^2  (Tweedie)

x is a float tensor (B, 3, H, W) of images in [0, 1] plus noise of standard deviation sigma in the same units.
"""

import math
import os
import zipfile
from itertools import pairwise
from numbers import Real
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# -----------------------------------------------------------------------------
# The starting point: three convolutions, one noise level
# -----------------------------------------------------------------------------


class CNN3(nn.Module):
    """Predict the score at one noise level with three 3x3 convolutions (3 -> 64 -> 128 -> 3, ReLU)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 128, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(128, 3, 3, padding=1),
        )

    def forward(self, x):  # (B, 3, H, W) -> (B, 3, H, W)
        return self.layers(x)


# -----------------------------------------------------------------------------
# A compact U-Net for all noise levels
# -----------------------------------------------------------------------------


class NoiseEmbedding(nn.Module):
    """Turn the logarithm of the noise level into features by sines, cosines and a small perceptron."""

    def __init__(self, features, frequencies=16):
        super().__init__()
        # log sigma spans a few units, so wavelengths from 2 pi / 0.25 down to 2 pi / 4 resolve it.
        self.register_buffer("frequencies", torch.logspace(-2, 2, frequencies, base=2.0))
        self.layers = nn.Sequential(nn.Linear(2 * frequencies, features), nn.SiLU(), nn.Linear(features, features), nn.SiLU())

    def forward(self, log_sigma):  # (B,) -> (B, features)
        angles = log_sigma[:, None] * self.frequencies
        return self.layers(torch.cat([angles.cos(), angles.sin()], dim=1))


class ResidualBlock(nn.Module):
    """x + conv(SiLU(film(conv(SiLU(x))))), where film scales and shifts each channel by the noise level.

    There is no normalisation: at these depths the residual branch that starts at zero is enough, and the
    memory traffic of a GroupNorm costs a CPU as much as the convolution beside it.
    """

    def __init__(self, channels, features):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(features, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        for parameter in (self.film.weight, self.film.bias, self.conv2.weight, self.conv2.bias):
            nn.init.zeros_(parameter)

    def forward(self, x, embedding):  # (B, C, H, W), (B, features) -> (B, C, H, W)
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(x))
        h = torch.addcmul(h + shift, h, scale)
        return x + self.conv2(F.silu(h))


class WindowAttention(nn.Module):
    """x + conv(softmax(q k / sqrt(8)) v) in heads of 32 channels, among the positions of each window (Vaswani et al. 2017).

    Queries and keys are normalised (Henry et al. 2020), so that no logit grows beyond 32 / sqrt(8). Windows are aligned to the
    first pixel; those at the far edges are as large as what is left of the picture. On a CPU the attention is written out, since
    the library's own is slower there, the more so backwards, and takes some windows at a time, which is faster and takes less
    memory; a GPU takes the library's, and all windows at once.
    """

    def __init__(self, channels, window):
        super().__init__()
        self.window = window
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        for parameter in (self.out.weight, self.out.bias):
            nn.init.zeros_(parameter)

    def forward(self, x, embedding):  # (B, C, H, W), unused -> (B, C, H, W)
        (height, width), w = x.shape[2:], self.window
        padding = (0, -width % w, 0, -height % w)

        def windows(t, heads):  # (B, heads * c, H, W) -> (B * windows, heads, w * w, c)
            t = F.pad(t, padding).permute(0, 2, 3, 1).unflatten(2, (-1, w)).unflatten(1, (-1, w)).transpose(2, 3)
            return t.reshape(-1, w * w, heads, t.shape[-1] // heads).transpose(1, 2)

        def attend(q, k, v, there):  # -> (windows, w * w, heads, 32)
            q, k = F.rms_norm(q, (32,)), F.rms_norm(k, (32,))
            mask = there if any(padding) else None  # nobody looks at what is not there
            if x.is_cuda:
                return F.scaled_dot_product_attention(q, k, v, mask, scale=8**-0.5).transpose(1, 2)
            logits = q / 8**0.5 @ k.transpose(2, 3)
            if mask is not None:
                logits = logits.masked_fill(~mask, -math.inf)
            return (logits.softmax(-1) @ v).transpose(1, 2)

        q, k, v = (windows(t, t.shape[1] // 32) for t in self.qkv(x).chunk(3, dim=1))
        there = windows(torch.ones_like(x[:, :1]), 1).transpose(2, 3) > 0
        some = len(q) if x.is_cuda else 32
        h = torch.cat([attend(*parts) for parts in zip(*(t.split(some) for t in (q, k, v, there)))])
        h = h.reshape(len(x), -(-height // w), -(-width // w), w, w, -1).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x + self.out(h[:, :height, :width].permute(0, 3, 1, 2))


class UNet(nn.Module):
    """A U-Net with added (not concatenated) skips; `widths`, `blocks` and `attention` are per resolution, finest first.

    Where `attention` is 1, the stage on the way up (at the coarsest resolution: the only one) has an attention layer, in
    windows of 32 x 32 pixels of the picture: the size of the images that the network is trained on. `features` is the number
    of features that tell each block the noise level.
    """

    def __init__(self, widths, blocks, attention, features):
        super().__init__()
        shapes = [(w, n, features, a * 32 // 2**i) for i, (w, n, a) in enumerate(zip(widths, blocks, attention))]
        self.embedding = NoiseEmbedding(features)
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList([*(stage(*s[:3]) for s in shapes[:-1]), stage(*shapes[-1])])
        self.decoder = nn.ModuleList(stage(*s) for s in shapes[:-1])
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.head = nn.Conv2d(widths[0], 3, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x, log_sigma):  # (B, 3, H, W), (B,) -> (B, 3, H, W)
        height, width = x.shape[-2:]
        multiple = 2 ** len(self.down)
        x = F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        embedding = self.embedding(log_sigma)
        h = self.stem(x)
        skips = []
        for i, blocks in enumerate(self.encoder):
            for block in blocks:
                h = block(h, embedding)
            if i < len(self.down):
                skips.append(h)
                h = self.down[i](h)
        for i in reversed(range(len(self.up))):
            h = self.up[i](h) + skips[i]
            for block in self.decoder[i]:
                h = block(h, embedding)
        return self.head(F.silu(h))[..., :height, :width]


def stage(channels, blocks, features, window=0):
    """Return residual blocks, and attention after the first of them if the window is not 0."""
    layers = [ResidualBlock(channels, features) for _ in range(blocks)]
    if window:
        layers.insert(1, WindowAttention(channels, window))
    return nn.ModuleList(layers)


# -----------------------------------------------------------------------------
# From a network to a denoiser and a score
# -----------------------------------------------------------------------------


class ScoreModel(nn.Module):
    """A network with the arithmetic around it that makes it a denoiser, and with it a score.

    network "unet" is preconditioned after Karras et al. 2022 (EDM, table 1), around the middle grey 0.5:
        D(x, sigma) = c_skip x + c_out F(c_in x, log sigma),
    so that the input and the target of F have unit variance at every noise level.
    network "cnn3" is the score itself, at the single level it was trained for:
        D(x, sigma) = x + sigma^2 F(x).

    widths, blocks, attention, features: those of UNet; the first checkpoints have 96 features, and do not say so.
    sigma_min, sigma_max: the trained range of noise levels. Outside it the network is asked as at the nearest end, while the
    arithmetic around it keeps to the level asked for: an extrapolation, and with "unet" one that stays an image.
    bfloat16: run the network's products in bfloat16 (about 5 times faster where the hardware has it); everything
    around the network, and so the state of a sampler, stays in the precision of x.
    Raises ValueError, before anything is built, for an unknown network or numbers that no network can have.
    """

    sigma_data = 0.25  # standard deviation of the pixels of natural images around 0.5

    def __init__(self, network, sigma_min, sigma_max, widths=(), blocks=(), attention=(), features=96, bfloat16=False):
        super().__init__()
        attention = attention or (0,) * len(widths)
        if not 1e-6 <= sigma_min <= sigma_max <= 1e6:
            raise ValueError(f"noise range must be 0 < sigma_min <= sigma_max, not {sigma_min} and {sigma_max}")
        if network not in ("unet", "cnn3"):
            raise ValueError(f"unknown network '{network}': choose 'unet' or 'cnn3'")
        if network == "cnn3" and sigma_min != sigma_max:
            raise ValueError(f"network 'cnn3' has one noise level: sigma_min {sigma_min} and sigma_max {sigma_max} must be equal")
        if network == "unet":
            _check_shape(widths, blocks, attention, features)
        self.config = dict(network=network, sigma_min=sigma_min, sigma_max=sigma_max)
        if network == "unet":
            self.config |= dict(widths=tuple(widths), blocks=tuple(blocks), attention=tuple(attention), features=features)
        self.sigma_min, self.sigma_max, self.bfloat16 = sigma_min, sigma_max, bfloat16
        self.net = CNN3() if network == "cnn3" else UNet(widths, blocks, attention, features)
        self.to(memory_format=torch.channels_last)

    def forward(self, x, sigma):
        """Return E[x0 | x], the denoised image (Tweedie's formula read backwards).

        x: (B, 3, H, W), any H, W >= 1, never clipped or rounded. sigma, in units of [0, 1]: a number, or one for each image
        as a tensor, array or list of B values in any shape.
        Raises ValueError if x is not such a tensor of float32 or float64, or sigma has another number of values, or is a
        negative number.
        """
        if x.dtype not in (torch.float32, torch.float64) or x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape:
            raise ValueError(f"expected (B, 3, H, W) of float32 or float64, not {tuple(x.shape)} of {x.dtype}")
        s = _per_image(sigma, x)
        if self.config["network"] == "cnn3":
            return x + s**2 * self._features(x)
        variance = s**2 + self.sigma_data**2
        c_skip, c_out, c_in = self.sigma_data**2 / variance, s * self.sigma_data / variance.sqrt(), 1 / variance.sqrt()
        centred = x - 0.5
        log_sigma = s.flatten().float().clamp(self.sigma_min, self.sigma_max).log()
        return 0.5 + c_skip * centred + c_out * self._features(c_in * centred, log_sigma)

    def score(self, x, sigma):
        """Return grad_x log p_sigma(x) = (E[x0 | x] - x) / sigma^2, shape of x (Miyasawa 1961, Robbins 1956)."""
        return (self(x, sigma) - x) / _per_image(sigma, x) ** 2

    def _features(self, x, *condition):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            out = self.net(x.float().contiguous(memory_format=torch.channels_last), *condition)
        return out.to(x.dtype)


def _check_shape(widths, blocks, attention, features):
    numbers = [*widths, *blocks, *attention, features]
    if not (len(widths) == len(blocks) == len(attention) in range(1, 6) and all(type(n) is int for n in numbers)):
        raise ValueError(f"give integers, 1 to 5 and as many as each other: {widths=}, {blocks=}, {attention=}; {features=}")
    if not (all(1 <= w <= 2048 for w in (*widths, features)) and all(1 <= n <= 100 for n in blocks)):
        what = f"widths {tuple(widths)} and features {features} must lie between 1 and 2048"
        raise ValueError(f"{what}, and blocks {tuple(blocks)} between 1 and 100")
    if (weights := sum(18 * n * w**2 for w, n in zip(widths, blocks))) > 5e8:
        raise ValueError(f"widths {tuple(widths)} and blocks {tuple(blocks)} make {weights:.1g} weights: at most 5e8")
    if any(a not in (0, 1) or (a and w % 32) for a, w in zip(attention, widths)):
        raise ValueError(f"attention {tuple(attention)} is 0 or 1, and 1 only where widths {tuple(widths)} are multiples of 32")


def _per_image(sigma, x):  # -> (B, 1, 1, 1) like x
    if isinstance(sigma, Real):  # filled in on the device: to copy a number there would make a GPU wait
        if not 0 <= sigma <= 1e18:  # beyond, its square is not a float32
            raise ValueError(f"a noise level must not be negative, or above 1e18: {sigma}")
        sigma = torch.full((), float(sigma), dtype=x.dtype, device=x.device)
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    if sigma.numel() not in (1, len(x)):
        raise ValueError(f"{sigma.numel()} noise levels for {len(x)} images: give one, or one for each image")
    return sigma.reshape(-1, 1, 1, 1).expand(len(x), 1, 1, 1)


# -----------------------------------------------------------------------------
# Files
# -----------------------------------------------------------------------------


def load_model(path, device="cpu", bfloat16=False):
    """Load a checkpoint of train_score.py: a ScoreModel in eval mode with the EMA weights, on `device`.

    Its `info` is what the training wrote about itself: options, images seen, hardware, validation PSNR.
    Raises FileNotFoundError if there is no such file and ValueError if it is not such a checkpoint.
    """
    checkpoint = load_checkpoint(path)
    try:
        with torch.device("meta"):  # so that nothing is allocated for a shape that the weights do not have
            model = ScoreModel(**checkpoint["config"], bfloat16=bfloat16)
        restore(model, checkpoint["weights"])
        model.info = dict(checkpoint["info"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"'{path}' is not a checkpoint of train_score.py ({type(error).__name__}: {reason})") from None
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def load_checkpoint(path):
    """Read a dictionary of tensors and plain values; checksums are verified, and no code in the file is run.

    Raises FileNotFoundError, or ValueError if the file cannot be read, is damaged, or holds anything else.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no checkpoint at '{path}': train one with train_score.py, or name another")
    if not (Path(path).is_file() and os.access(path, os.R_OK)):
        raise ValueError(f"'{path}' is not a file that can be read")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise ValueError(f"it holds a {type(checkpoint).__name__}")
    except Exception as error:  # whatever a damaged archive or pickle can raise
        raise ValueError(f"'{path}' is not a checkpoint, or it is damaged ({type(error).__name__}: {error})") from None
    return checkpoint


def restore(module, weights):
    """Load weights into a module; raises ValueError unless names, shapes and types agree and all values are finite."""
    expected = module.state_dict()
    if not isinstance(weights, dict) or weights.keys() != expected.keys():
        raise ValueError("its weights have other names")
    for name, value in weights.items():
        if not torch.is_tensor(value) or (value.shape, value.dtype) != (expected[name].shape, expected[name].dtype):
            raise ValueError(f"its weight {name} has another shape or type")
        if not value.isfinite().all():
            raise ValueError(f"its weight {name} is not finite")
    module.load_state_dict(weights, assign=any(value.is_meta for value in expected.values()))


def restore_optimizer(optimizer, state, memory):
    """Load what an optimiser remembers; raises ValueError unless each weight has the memory, of its shape and finite."""
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    for parameter in optimizer.param_groups[0]["params"] if memory else []:
        found = optimizer.state[parameter]
        if found.keys() != memory or any(x.shape not in ((), parameter.shape) for x in found.values()):
            raise ValueError("the memory of an optimiser has other names or shapes")
        if not all(x.isfinite().all() for x in found.values()):
            raise ValueError("the memory of an optimiser is not finite")
