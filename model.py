"""Score networks, small to large, behind one interface: model(x, sigma) -> denoised.

    model = load_model("checkpoints/score_cifar10.pt")
    denoised = model(x, 0.1)        # E[x0 | x], the minimum-mean-squared-error estimate
    score = model.score(x, 0.1)     # grad log p_sigma(x) = (denoised - x) / sigma^2  (Tweedie)

x is a float tensor (B, 3, H, W) of images in [0, 1] plus noise of standard deviation sigma in the same units.
"""

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


class UNet(nn.Module):
    """A U-Net with added (not concatenated) skips; `widths` and `blocks` are per resolution, finest first."""

    def __init__(self, widths, blocks, features=96):
        super().__init__()
        self.embedding = NoiseEmbedding(features)
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList(stage(w, n, features) for w, n in zip(widths, blocks))
        self.decoder = nn.ModuleList(stage(w, n, features) for w, n in zip(widths[:-1], blocks[:-1]))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in zip(widths, widths[1:]))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in zip(widths, widths[1:]))
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


def stage(channels, blocks, features):
    return nn.ModuleList(ResidualBlock(channels, features) for _ in range(blocks))


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

    sigma_min, sigma_max: the trained range of noise levels. Outside it the output is an extrapolation; nothing
    checks that here, since a check would make a GPU wait at every call.
    bfloat16: run the convolutions in bfloat16 (about 5 times faster where the hardware has it); everything
    around the network, and so the state of a sampler, stays in the precision of x.
    Raises ValueError for an unknown network, widths and blocks that do not match, or a range that is not
    0 < sigma_min <= sigma_max.
    """

    sigma_data = 0.25  # standard deviation of the pixels of natural images around 0.5

    def __init__(self, network, sigma_min, sigma_max, widths=(), blocks=(), bfloat16=False):
        super().__init__()
        if not 0 < sigma_min <= sigma_max:
            raise ValueError(f"noise range must be 0 < sigma_min <= sigma_max, not {sigma_min} and {sigma_max}")
        if network not in ("unet", "cnn3"):
            raise ValueError(f"unknown network '{network}': choose 'unet' or 'cnn3'")
        if network == "unet" and not (len(widths) == len(blocks) > 0 and min(*widths, *blocks) > 0):
            raise ValueError(f"widths {tuple(widths)} and blocks {tuple(blocks)} must be positive and as many as each other")
        self.config = dict(network=network, sigma_min=sigma_min, sigma_max=sigma_max, widths=tuple(widths), blocks=tuple(blocks))
        self.sigma_min, self.sigma_max, self.bfloat16 = sigma_min, sigma_max, bfloat16
        self.net = CNN3() if network == "cnn3" else UNet(widths, blocks)
        self.to(memory_format=torch.channels_last)

    def forward(self, x, sigma):
        """Return E[x0 | x], the denoised image (Tweedie's formula read backwards).

        x: (B, 3, H, W), any H, W >= 1, never clipped or rounded. sigma: a float, 0-d or (B,) tensor, in units of [0, 1].
        Raises ValueError if x is not such a tensor of float32 or float64.
        """
        if x.dtype not in (torch.float32, torch.float64) or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"expected (B, 3, H, W) of float32 or float64, not {tuple(x.shape)} of {x.dtype}")
        s = _per_image(sigma, x)
        if self.config["network"] == "cnn3":
            return x + s**2 * self._run(x)
        variance = s**2 + self.sigma_data**2
        c_skip, c_out, c_in = self.sigma_data**2 / variance, s * self.sigma_data / variance.sqrt(), 1 / variance.sqrt()
        centred = x - 0.5
        return 0.5 + c_skip * centred + c_out * self._run(c_in * centred, s.flatten().float().log())

    def score(self, x, sigma):
        """Return grad_x log p_sigma(x) = (E[x0 | x] - x) / sigma^2, shape of x (Miyasawa 1961, Robbins 1956)."""
        return (self(x, sigma) - x) / _per_image(sigma, x) ** 2

    def _run(self, x, *condition):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            out = self.net(x.float().contiguous(memory_format=torch.channels_last), *condition)
        return out.to(x.dtype)


def _per_image(sigma, x):  # -> (B, 1, 1, 1) like x
    if not torch.is_tensor(sigma):  # filled in on the device: to copy a number there would make a GPU wait
        sigma = torch.full((), sigma, dtype=x.dtype, device=x.device)
    return sigma.to(x).expand(len(x))[:, None, None, None]


def load_model(path, device="cpu", bfloat16=False):
    """Load a checkpoint of train_score.py: a ScoreModel in eval mode with the EMA weights, on `device`.

    Its `info` is what the training wrote about itself: options, images seen, hardware, validation PSNR.
    Raises FileNotFoundError if there is no such file and ValueError if it is not such a checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = ScoreModel(**checkpoint["config"], bfloat16=bfloat16)
        model.load_state_dict(checkpoint["weights"])
        model.info = checkpoint["info"]
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint at '{path}': train one with train_score.py, or name another") from None
    except Exception as error:  # whatever a damaged pickle, archive or dictionary can raise
        raise ValueError(f"'{path}' is not a checkpoint of train_score.py, or it is damaged ({type(error).__name__})") from None
    return model.eval().requires_grad_(False).to(device)
