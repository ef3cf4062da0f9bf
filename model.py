"""Score networks, small to large, behind one interface: model(x, sigma) -> denoised.

    model = load_model("checkpoints/score_cifar10.pt")
    denoised = model(x, 0.1)        # E[x0 | x], the minimum-mean-squared-error estimate
    score = model.score(x, 0.1)     # grad log p_sigma(x) = (denoised - x) / sigma^2  (Tweedie)

x is a float tensor (B, 3, H, W) of images in [0, 1] plus noise of standard deviation sigma in the
same units.
"""

import contextlib
import math
import zipfile
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class CNN3(nn.Module):
    """Predict the score at one noise level with three 3x3 convolutions and ReLU between them."""

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
    """Turn the logarithm of the noise level into features by sines, cosines and two layers."""

    def __init__(self, features, frequencies=16):
        super().__init__()
        # log sigma spans a few units: wavelengths from 2 pi / 0.25 down to 2 pi / 4 resolve it.
        self.register_buffer("frequencies", torch.logspace(-2, 2, frequencies, base=2.0))
        self.layers = nn.Sequential(
            nn.Linear(2 * frequencies, features),
            nn.SiLU(),
            nn.Linear(features, features),
            nn.SiLU(),
        )

    def forward(self, log_sigma):  # (B,) -> (B, features)
        angles = log_sigma[:, None] * self.frequencies
        return self.layers(torch.cat([angles.cos(), angles.sin()], dim=1))


class ResidualBlock(nn.Module):
    """x + conv(SiLU(film(conv(SiLU(x))))); film scales and shifts each channel by the noise level.

    There is no normalisation. At these depths the residual branch that starts at zero is enough,
    and on a CPU a GroupNorm costs as much memory traffic as the convolution beside it.
    """

    def __init__(self, channels, features):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(features, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        for layer in (self.film, self.conv2):
            _start_at_zero(layer)

    def forward(self, x, embedding):  # (B, C, H, W), (B, features) -> (B, C, H, W)
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(x))
        h = torch.addcmul(h + shift, h, scale)
        return x + self.conv2(F.silu(h))


class WindowAttention(nn.Module):
    """x + conv(softmax(q k / sqrt(8)) v), in heads of 32 channels, within windows.

    Queries and keys are normalised (Henry et al. 2020), so that no logit exceeds 32 / sqrt(8).
    Windows start at the first pixel; those at the far edges hold what is left of the image.
    """

    def __init__(self, channels, window):
        super().__init__()
        self.window = window
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        _start_at_zero(self.out)

    def forward(self, x, embedding):  # (B, C, H, W), unused -> (B, C, H, W)
        height, width = x.shape[2:]
        heads = _to_windows(self.qkv(x), self.window).unflatten(2, (3, -1, 32))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B * windows, heads, pixels, 32)
        mask = None
        if height % self.window or width % self.window:  # nobody attends to padding
            inside = torch.ones_like(x[:, :1])
            mask = _to_windows(inside, self.window).transpose(1, 2)[:, None] > 0
        q, k = F.rms_norm(q, (32,)), F.rms_norm(k, (32,))
        h = F.scaled_dot_product_attention(q, k, v, mask, scale=8**-0.5)
        h = h.transpose(1, 2).flatten(2)
        return x + self.out(_from_windows(h, self.window, height, width))


def _to_windows(x, w):
    """Cut (B, C, H, W), padded with zeros, into (B * windows, w * w, C)."""
    x = F.pad(x, (0, -x.shape[3] % w, 0, -x.shape[2] % w))
    x = x.unflatten(3, (-1, w)).unflatten(2, (-1, w))  # (B, C, rows, w, columns, w)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)


def _from_windows(x, w, height, width):
    """Put (B * windows, w * w, C) back together as (B, C, height, width), without the padding."""
    rows, columns = -(-height // w), -(-width // w)
    x = x.unflatten(1, (w, w)).unflatten(0, (-1, rows, columns))  # (B, rows, columns, w, w, C)
    x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return x[:, :, :height, :width]


def _start_at_zero(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


class UNet(nn.Module):
    """A U-Net with added skips; widths, blocks and attention are per resolution, finest first.

    Where attention is 1, the stage on the way up (at the coarsest resolution: the only one) has an
    attention layer, in windows of 32 x 32 pixels of the image. features: length of the vector from
    which each block learns the noise level.
    """

    def __init__(self, widths, blocks, attention, features):
        super().__init__()
        if not 1 <= len(widths) == len(blocks) == len(attention) <= 5:
            words = "give 1 to 5 widths, and as many blocks and attention"
            raise ValueError(f"{words}, not {widths}, {blocks}, {attention}")
        if any(use and width % 32 for use, width in zip(attention, widths)):
            raise ValueError(f"attention needs widths that are multiples of 32, not {widths}")
        self.embedding = NoiseEmbedding(features)
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for i, (channels, count) in enumerate(zip(widths, blocks)):
            window = attention[i] * 32 // 2**i
            coarsest = i == len(widths) - 1
            self.encoder.append(stage(channels, count, features, window if coarsest else 0))
            if not coarsest:
                self.decoder.append(stage(channels, count, features, window))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.head = nn.Conv2d(widths[0], 3, 3, padding=1)
        _start_at_zero(self.head)

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


def stage(channels, blocks, features, window):
    """Return residual blocks, with attention after the first of them if the window is not 0."""
    layers = [ResidualBlock(channels, features) for _ in range(blocks)]
    if window:
        layers.insert(1, WindowAttention(channels, window))
    return nn.ModuleList(layers)


# -----------------------------------------------------------------------------
# From a network to a denoiser and a score
# -----------------------------------------------------------------------------


class ScoreModel(nn.Module):
    """A network with the arithmetic around it that makes it a denoiser, and so a score.

    network "unet" is preconditioned (Karras et al. 2022, table 1) around the middle grey 0.5:
        D(x, sigma) = c_skip x + c_out F(c_in x, log sigma),
    so that the input and the target of F have unit variance at every noise level.
    network "cnn3" is the score itself, at the single level it was trained for:
        D(x, sigma) = x + sigma^2 F(x).

    sigma_min, sigma_max: the trained range of noise levels. Outside it the network is given the
    nearest trained level; the preconditioning still uses the true one.
    widths, blocks, attention, features: those of UNet.
    Raises ValueError for an unknown network or numbers that no network can have.
    """

    sigma_data = 0.25  # standard deviation of the pixels of natural images around 0.5
    autocast = False  # True: the network's products in bfloat16; x and the result as they are

    def __init__(
        self, network, sigma_min, sigma_max, widths=(), blocks=(), attention=(), features=48
    ):
        super().__init__()
        if not 0 < sigma_min <= sigma_max < math.inf:
            words = "noise levels must satisfy 0 < sigma_min <= sigma_max"
            raise ValueError(f"{words}, not {sigma_min} and {sigma_max}")
        self.config = {"network": network, "sigma_min": sigma_min, "sigma_max": sigma_max}
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        if network == "unet":
            shape = {"widths": tuple(widths), "blocks": tuple(blocks)}
            shape |= {"attention": tuple(attention), "features": features}
            self.config |= shape
            self.net = UNet(**shape)
        elif network == "cnn3" and sigma_min == sigma_max:
            self.net = CNN3()
        else:
            words = "the network must be 'unet', or 'cnn3' for one noise level"
            raise ValueError(f"{words}, not '{network}' for {sigma_min} to {sigma_max}")
        self.to(memory_format=torch.channels_last)

    def forward(self, x, sigma):
        """Return E[x0 | x], the denoised image.

        x: floats (B, 3, H, W), any H, W >= 1, never clipped or rounded. sigma, in units of [0, 1]:
        a number, or a tensor, array or list of one value or of B values, in any shape.
        Raises ValueError for another x, and for a level that is negative, infinite or not a number;
        levels on a GPU, in a compiled graph and within vmap are not looked at.
        """
        if not x.is_floating_point() or x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape[2:]:
            raise ValueError(f"expected floats (B, 3, H, W), not {tuple(x.shape)} of {x.dtype}")
        s = _per_image(sigma, x)
        if self.config["network"] == "cnn3":
            return x + s**2 * self._features(x)
        variance = s**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = s * self.sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        centred = x - 0.5
        log_sigma = s.flatten().clamp(self.sigma_min, self.sigma_max).log()
        return 0.5 + c_skip * centred + c_out * self._features(c_in * centred, log_sigma)

    def score(self, x, sigma):
        """Return grad_x log p_sigma(x) = (E[x0 | x] - x) / sigma^2, like x; sigma above 0."""
        return (self(x, sigma) - x) / _per_image(sigma, x) ** 2

    def _features(self, *inputs):
        """Run the network in the precision of its weights; the result has that of the inputs."""
        dtype = next(self.net.parameters()).dtype
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=self.autocast):
            out = self.net(*(value.to(dtype) for value in inputs))
        return out.to(inputs[0].dtype)


def _per_image(sigma, x):
    """Return the noise levels as (B, 1, 1, 1), like x."""
    levels = torch.as_tensor(sigma, dtype=x.dtype)
    if not (levels.is_cuda or torch.compiler.is_compiling()):
        with contextlib.suppress(RuntimeError):  # within vmap there is no single value to look at
            if not ((levels >= 0) & levels.isfinite()).all():
                raise ValueError(f"a noise level must be a number of at least 0, not {sigma}")
    levels = levels.to(x.device, non_blocking=x.is_cuda)  # a GPU does not wait for a number
    return levels.reshape(-1, 1, 1, 1).expand(x.shape[0], 1, 1, 1)


# -----------------------------------------------------------------------------
# Files
# -----------------------------------------------------------------------------


def load_model(path, device="cpu", bfloat16=False):
    """Load a checkpoint of train_score.py: a ScoreModel in eval mode with the averaged weights.

    path: a file; what ships with the project ("checkpoints/score_cifar10.pt") is found from any
    folder. bfloat16: run the network's products in bfloat16, about 5 times faster where the
    hardware has it; the state of a sampler keeps its precision.
    `info` of the model is what its training wrote: options, images seen, hardware, PSNR.
    Raises FileNotFoundError if there is no such file and ValueError if it is not such a checkpoint.
    """
    shipped = Path(__file__).resolve().parent / path
    checkpoint = load_checkpoint(shipped if shipped.exists() and not Path(path).exists() else path)
    try:
        with torch.device("meta"):  # allocates nothing for a shape that the weights do not have
            model = ScoreModel(**checkpoint["config"])
        model.load_state_dict(checkpoint["weights"], assign=True)
        if not all(value.isfinite().all() for value in model.state_dict().values()):
            raise ValueError("a weight is not finite")
        model.info = dict(checkpoint["info"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"'{path}' is not a checkpoint of train_score.py ({reason})") from None
    model.autocast = bfloat16
    model.eval().requires_grad_(False)
    return model.to(device, memory_format=torch.channels_last)


def load_checkpoint(path):
    """Read a dictionary of tensors and plain values; no code in the file is run.

    Raises FileNotFoundError, or ValueError if the file is damaged or holds anything else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at '{path}': train one with train_score.py")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged archive or pickle can raise
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"'{path}' is not a checkpoint, or it is damaged ({reason})") from None
